// Package agekeys reads the keys that a log is encrypted to, and those that read it again, in the forms that age
// (age-encryption.org/v1) takes them: native keys (X25519, and ML-KEM-768 with X25519) and SSH keys of the type ssh-ed25519.
package agekeys
