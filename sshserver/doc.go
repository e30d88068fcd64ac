// Package sshserver is the gate: the only place in Sallyport that speaks SSH. It takes connections, proves who is
// there (RFC 4252), asks policy, starts one sandbox for the connection, carries channels between client and sandbox
// (RFC 4254), and records all of it.
//
// The life of a connection, in call order, is the doc comment of conn. The files: server.go has the listener, its
// limits and the register of connections; auth.go proves and decides; conn.go ends things; session.go is the session
// channel; typed.go keeps passwords out of the log; spec.go turns a decision into a sandbox; messages.go has the
// payloads that x/crypto leaves to us; errors.go says what a client may read.
package sshserver
