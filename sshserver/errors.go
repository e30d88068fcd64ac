package sshserver

import (
	"errors"
	"fmt"
)

// UserError is an error whose text is meant for the client. Every other error becomes "internal error" and the
// connection's ID.
type UserError struct {
	Text string // one line, what happened and what to do
	Err  error  // for the gate's own log; may be nil
}

func (e *UserError) Error() string {
	if e.Err == nil {
		return e.Text
	}
	return e.Text + ": " + e.Err.Error()
}

func (e *UserError) Unwrap() error { return e.Err }

// userText is what a client may read of err.
func userText(err error, id string) string {
	var u *UserError
	if errors.As(err, &u) {
		return fmt.Sprintf("%s (connection %s)", u.Text, id)
	}
	return fmt.Sprintf("internal error (connection %s)", id)
}

// cause is why a connection ends: the word for the log and the text for the user. It is the connection context's
// cancel cause.
type cause struct {
	word   string // one of the causes in auditlog/FORMAT.md
	text   string // for the user's terminal; empty: nothing is said
	detail error  // for the log; may be nil
}

func (c *cause) Error() string {
	if c.detail == nil {
		return c.word
	}
	return c.word + ": " + c.detail.Error()
}

func (c *cause) Unwrap() error { return c.detail }

// endCause is the cause in err, which is what context.Cause returned.
func endCause(err error) *cause {
	var c *cause
	if errors.As(err, &c) {
		return c
	}
	return &cause{word: "internal-error", detail: err}
}
