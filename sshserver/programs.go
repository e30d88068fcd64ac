package sshserver

import (
	"time"

	"github.com/sallyport/sallyport/auditlog"
	"github.com/sallyport/sallyport/authz"
	"github.com/sallyport/sallyport/backends"
)

// report records what the sandbox's agent reports. An error keeps the program from running, and ends the sandbox.
func (c *conn) report(r *backends.Report) error {
	body := reported(r)
	if r.Unaudited != nil {
		c.s.Slog.Warn("a process entered a sandbox from outside", "connection", c.id, "pid", r.Unaudited.PID)
	}
	return c.record(r.Channel, body)
}

// goneWait bounds the wait for the reason of a sandbox's end. The engine may need a moment for it, a cluster some seconds.
const goneWait = 5 * time.Second

// whyGone gives the sandbox's own reason for its end, which a program under which it ended with err does not know.
func whyGone(sb backends.Sandbox, err error) error {
	timer := time.NewTimer(goneWait)
	defer timer.Stop()
	select {
	case <-sb.Done():
		if why := sb.Err(); why != nil {
			return why
		}
	case <-timer.C:
	}
	return err
}

// reported is a report as a record. Its bytes are the report's.
func reported(r *backends.Report) auditlog.Body {
	at := time.Unix(0, r.Time).UTC()
	switch {
	case r.Exec != nil:
		e := r.Exec
		if e.Count > 0 {
			return &auditlog.ProgramExec{Time: at, Exec: e.Of, Again: e.Count}
		}
		return &auditlog.ProgramExec{
			Time: at, Exec: r.Sequence, PID: int64(e.PID), Parent: int64(e.Parent), UID: e.UID, Path: e.Path, Dir: e.Dir,
			Args: e.Args.List, Count: e.Args.Count, Bytes: e.Args.Bytes, Hash: e.Args.Hash, Unread: e.Args.Unread, Script: e.Script,
			Error: authz.Printable(e.Error, 256), Call: authz.Printable(e.Entry, 32), By: e.By,
		}
	case r.Started != nil:
		s := r.Started
		body := &auditlog.ProgramStart{Time: at, Exec: s.Exec, PID: int64(s.PID), File: s.File, Image: s.Image}
		if a := s.Args; a != nil {
			body.Differ, body.Args, body.Count, body.Bytes, body.Hash, body.Unread = true, a.List, a.Count, a.Bytes, a.Hash, a.Unread
		}
		return body
	case r.Ended != nil:
		e := r.Ended
		return &auditlog.ProgramEnd{
			Time: at, Exec: e.Exec, PID: int64(e.PID), Code: uint32(e.Code), Signal: e.Signal, Core: e.CoreDumped,
		}
	case r.Connect != nil:
		n := r.Connect
		body := &auditlog.ConnectOut{
			Time: at, Exec: n.Exec, PID: int64(n.PID), Program: n.Program, Port: uint32(n.Port),
			Call: authz.Printable(n.Call, 32), Again: n.Count, Error: authz.Printable(n.Error, 256),
		}
		if n.Address.IsValid() {
			body.Address = n.Address.String()
		}
		return body
	case r.Script != nil:
		s := r.Script
		return &auditlog.Script{Hash: s.Hash, Size: s.Size, Path: s.Path, Data: s.Data, Cut: s.Cut}
	}
	u := r.Unaudited
	return &auditlog.Unaudited{Time: at, PID: int64(u.PID), UID: u.UID, File: u.File, Args: u.Args.List}
}
