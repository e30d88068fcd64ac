package agekeys

import (
	"bytes"
	"errors"
	"fmt"
	"io"
	"os"
	"strings"

	"filippo.io/age"
	"filippo.io/age/agessh"
)

// maxFile bounds a file of recipients or identities, in bytes.
const maxFile = 1 << 20

// ParseRecipient reads one recipient: "age1...", "age1pq1...", or "ssh-ed25519 BASE64 [COMMENT]".
func ParseRecipient(s string) (age.Recipient, error) {
	s = strings.TrimSpace(s)
	// age's errors quote what they were given, which may be an identity put in the wrong place: none of them is passed on.
	switch {
	case strings.HasPrefix(s, "age1pq1"):
		if r, err := age.ParseHybridRecipient(s); err == nil {
			return r, nil
		}
		return nil, errors.New("not a recipient: it begins with age1pq1, and is malformed")
	case strings.HasPrefix(s, "age1"):
		if r, err := age.ParseX25519Recipient(s); err == nil {
			return r, nil
		}
		return nil, errors.New("not a recipient: malformed age1..., or of a plugin, which are not supported")
	case strings.HasPrefix(s, "ssh-ed25519 "):
		if r, err := agessh.ParseRecipient(s); err == nil {
			return r, nil
		}
		return nil, errors.New("not a recipient: malformed ssh-ed25519 key")
	case strings.HasPrefix(s, "ssh-"), strings.HasPrefix(s, "ecdsa-"), strings.HasPrefix(s, "sk-"):
		return nil, errors.New("not a recipient: of SSH keys only ssh-ed25519 is one")
	case strings.HasPrefix(strings.ToUpper(s), "AGE-SECRET-KEY-"):
		return nil, errors.New("this is an identity, a secret: it belongs to the auditors and to no gate. " +
			"Give its recipient (age-keygen -y), and take a new one, as this one has been seen here")
	}
	return nil, errors.New("not a recipient: want one that begins with age1, age1pq1 or ssh-ed25519")
}

// ParseRecipients reads a file of recipients: one a line; empty lines and lines that begin with # are skipped. A file without
// a recipient is an error.
func ParseRecipients(b []byte) ([]age.Recipient, error) {
	var all []age.Recipient
	number := 0
	for line := range bytes.Lines(b) {
		number++
		s := strings.TrimSpace(string(line))
		if s == "" || strings.HasPrefix(s, "#") {
			continue
		}
		r, err := ParseRecipient(s)
		if err != nil {
			return nil, fmt.Errorf("line %d: %w", number, err)
		}
		all = append(all, r)
	}
	if len(all) == 0 {
		return nil, errors.New("no recipient in it")
	}
	return all, nil
}

// LoadRecipients reads a file of recipients; see ParseRecipients.
func LoadRecipients(path string) ([]age.Recipient, error) {
	b, err := readFile(path)
	if err != nil {
		return nil, err
	}
	all, err := ParseRecipients(b)
	if err != nil {
		return nil, fmt.Errorf("%s: %w", path, err)
	}
	return all, nil
}

// Compatible says why a key can't be wrapped to all of these: one that a quantum computer could open would undo what the
// hybrid ones are for.
func Compatible(all []age.Recipient) error {
	hybrid := 0
	for _, r := range all {
		if _, ok := r.(*age.HybridRecipient); ok {
			hybrid++
		}
	}
	if hybrid != 0 && hybrid != len(all) {
		return errors.New("age1pq1... (post-quantum) beside others, which would undo it: write either all or none of this type")
	}
	return nil
}

func readFile(path string) ([]byte, error) {
	f, err := os.Open(path)
	if err != nil {
		return nil, err
	}
	defer f.Close()
	b, err := io.ReadAll(io.LimitReader(f, maxFile+1))
	if err != nil {
		return nil, err
	}
	if len(b) > maxFile {
		return nil, fmt.Errorf("%s: larger than 1 MiB", path)
	}
	return b, nil
}
