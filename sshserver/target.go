package sshserver

import (
	"context"
	"errors"
	"fmt"
	"reflect"
	"strconv"
	"strings"
	"sync"
	"time"

	"github.com/sallyport/sallyport/auditlog"
	"github.com/sallyport/sallyport/authz"
	"github.com/sallyport/sallyport/backends"
)

const (
	findTime   = 30 * time.Second // to find what a target means, and to ask policy about it
	chooseTime = 2 * time.Minute  // for the user to choose
	maxOffered = 50               // lines of a list at a terminal
	maxNamed   = 16               // names in a refusal
	maxAnswers = 3                // that are no number of the list
	maxAnswer  = 8                // characters
)

// choice is which of several targets the sandbox joins. At most one session of the connection decides it.
type choice struct {
	pick string // the name after the '/' of the user's choice; empty: none

	offered  []backends.Running // set before listed is closed
	listed   chan struct{}      // closed when there are several, and somebody has to choose
	deciding sync.Mutex         // held, and never given back, by the session that decides
	answer   chan int           // its answer, an index of offered; none is -1
}

func newChoice(pick string) *choice {
	return &choice{pick: pick, listed: make(chan struct{}), answer: make(chan int, 1)}
}

// chooseTarget finds what the spec's target means, asks policy about each, and gives the spec of the one that is joined. Where
// there are several, a session with a terminal chooses; the names of those that policy refuses are told to nobody.
func (c *conn) chooseTarget(spec backends.Spec) (backends.Spec, error) {
	joiner, ok := c.s.Backend.(backends.Joiner)
	if !ok {
		return spec, &backends.RefusedError{Reason: "this backend joins no target"}
	}
	c.mu.Lock()
	first := c.decision
	c.mu.Unlock()
	ch := c.choice
	may, decisions, reason, err := c.joinable(joiner, spec, first, ch.pick)
	if err != nil {
		return spec, err
	}
	if len(may) == 0 && ch.pick != "" && reason == "" {
		others, _, _, err := c.joinable(joiner, spec, first, "")
		if err != nil {
			return spec, err
		}
		text := "there is no target " + authz.Printable(ch.pick, 100) + " for you"
		if len(others) > 0 {
			text += "; there is: " + c.names(first, others)
		}
		return spec, &backends.TextError{Text: text, Err: errors.New("no such target")}
	}
	at := 0
	switch len(may) {
	case 0:
		if reason == "" {
			reason = "no target runs that the profile " + first.Profile + " names"
		}
		return spec, &backends.TextError{Text: reason, Err: errors.New("no target")}
	case 1:
	default:
		ch.offered = may
		close(ch.listed)
		timer := time.NewTimer(chooseTime)
		defer timer.Stop()
		at = -1
		select {
		case at = <-ch.answer:
		case <-timer.C:
		case <-c.ctx.Done():
			return spec, context.Cause(c.ctx)
		}
		if at < 0 || at >= len(may) {
			return spec, &backends.TextError{Text: "several targets, choose one: " + c.names(first, may), Err: errors.New("no target was chosen")}
		}
	}
	d, in := decisions[at], c.targetQuestion(first, may[at])
	chosen, err := specOf(c.s.Gate, c.id, c.login.User, d)
	if err != nil {
		return spec, err
	}
	chosen.Owner.Expires, chosen.Join = spec.Owner.Expires, &may[at]
	c.mu.Lock()
	c.decision, c.target = d, in.Target
	c.mu.Unlock()
	return chosen, c.recordDecision(in, d)
}

// targetQuestion is the question of the login, about one target.
func (c *conn) targetQuestion(first authz.Login, r backends.Running) authz.LoginInput {
	in := c.login
	in.Choice = first.Ticket
	in.Target = &authz.LoginTarget{
		Namespace: r.Namespace, Name: r.Name, Labels: r.Labels, Container: r.Container, Image: r.Image, Digest: r.Digest,
	}
	return in
}

// joinable lists the targets that policy lets the user join, with its decisions. reason is that of a refusal, if there was one.
func (c *conn) joinable(joiner backends.Joiner, spec backends.Spec, first authz.Login, name string) (may []backends.Running, decisions []authz.Login, reason string, err error) {
	ctx, cancel := context.WithTimeout(c.ctx, findTime)
	defer cancel()
	list, err := joiner.Targets(ctx, spec, name)
	if err != nil {
		return nil, nil, "", err
	}
	for _, r := range list {
		d, err := c.askLogin(ctx, c.targetQuestion(first, r))
		if err != nil {
			return nil, nil, "", fmt.Errorf("policy: target %s: %w", r, err)
		}
		switch {
		case !d.Allow:
			reason = authz.Printable(d.Reason, 2000)
		case d.Ticket != first.Ticket, d.Profile != first.Profile, !reflect.DeepEqual(d.Sandbox.Target, first.Sandbox.Target):
			reason = "the grant has changed: log in again"
		default:
			may, decisions = append(may, r), append(decisions, d)
		}
	}
	return may, decisions, reason, nil
}

// names is what to write to have one of them, for a refusal.
func (c *conn) names(d authz.Login, list []backends.Running) string {
	with := d.Ticket
	if c.login.Choice == d.Profile || strings.HasPrefix(c.login.Choice, d.Profile+"/") {
		with = d.Profile
	}
	var names []string
	for i, r := range list {
		if i == maxNamed {
			names = append(names, fmt.Sprintf("and %d more", len(list)-i))
			break
		}
		names = append(names, authz.Printable(c.login.User+"+"+with+"/"+r.Name, 400))
	}
	return strings.Join(names, ", ")
}

// chooseTarget has the user choose the target, if there are several and no other session decides: at a terminal by number,
// otherwise not at all.
func (s *session) chooseTarget() {
	ch := s.c.choice
	if ch == nil {
		return
	}
	select {
	case <-s.c.sandboxDone:
		return
	case <-ch.listed:
	case <-s.ctx.Done():
		return
	}
	if !ch.deciding.TryLock() {
		return
	}
	at := -1
	if s.terminal != nil {
		at = s.askTarget(ch.offered)
	}
	ch.answer <- at
}

// askTarget asks at the terminal, until there is an answer, and gives its index; -1 if there is none.
func (s *session) askTarget(offered []backends.Running) int {
	var b strings.Builder
	fmt.Fprintf(&b, "sallyport: %d targets; which one?\r\n", len(offered))
	for i, r := range offered {
		if i == maxOffered {
			fmt.Fprintf(&b, "  and %d more: choose by name, as in ssh %s+...\r\n", len(offered)-i, s.c.login.User)
			break
		}
		what := ""
		if r.Container != "" {
			what = "container " + r.Container + ", "
		}
		fmt.Fprintf(&b, "%4d  %s  (%simage %s)\r\n", i+1, authz.Printable(r.Name, 253), what, authz.Printable(r.Image, 100))
	}
	s.notice(b.String())
	for range maxAnswers {
		s.notice("Its number, or q for none: ")
		line, ok := s.readLine()
		if !ok || line == "q" {
			return -1
		}
		if n, err := strconv.Atoi(line); err == nil && n >= 1 && n <= min(len(offered), maxOffered) {
			return n - 1
		}
	}
	return -1
}

// readLine reads a short line from the client's terminal, which is raw, and shows what is typed. It takes nothing of what comes
// after the line. ok is false if there is none.
func (s *session) readLine() (line string, ok bool) {
	var b [1]byte
	var typed []byte
	defer func() {
		if len(typed) > 0 {
			s.c.recordInput(s.id, &auditlog.Data{Stream: auditlog.Input, Data: typed})
			s.in.Add(uint64(len(typed)))
		}
	}()
	for len(typed) < 1024 {
		if _, err := s.ch.Read(b[:]); err != nil {
			return "", false
		}
		s.c.touch()
		typed = append(typed, b[0])
		switch c := b[0]; {
		case c == '\r' || c == '\n':
			s.notice("\r\n")
			return strings.TrimSpace(line), true
		case c == 0x03 || c == 0x04: // ^C, ^D
			s.notice("\r\n")
			return "", false
		case c == 0x7f || c == '\b':
			if line != "" {
				line = line[:len(line)-1]
				s.notice("\b \b")
			}
		case c >= ' ' && c < 0x7f && len(line) < maxAnswer:
			line += string(c)
			s.notice(string(c))
		}
	}
	return "", false
}
