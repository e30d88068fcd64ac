package agent

import (
	"bytes"
	"context"
	"crypto/sha256"
	"encoding/hex"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/sallyport/sallyport/backends"
)

// audited is a real agent with the audit on, and what it has reported.
type audited struct {
	t      testing.TB
	client *Client

	mu      sync.Mutex
	reports []*backends.Report
	hold    chan struct{} // not nil: reports are not taken until it is closed
}

func startAudited(t *testing.T, a backends.ExecAudit) *audited {
	t.Helper()
	public, private := newKey(t)
	conn, _, ended := startAgent(t, public)
	x := &audited{t: t}
	if a.Mode == "" {
		a.Mode = backends.ExecAuditRequired
	}
	var err error
	x.client, err = NewClient(t.Context(), conn, private, Hello{Audit: a, Reports: func(r *backends.Report) error {
		x.mu.Lock()
		hold := x.hold
		x.mu.Unlock()
		if hold != nil {
			<-hold
		}
		x.mu.Lock()
		defer x.mu.Unlock()
		x.reports = append(x.reports, r)
		return nil
	}})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		x.client.Close()
		waitEnd(t, ended, "after the gate")
	})
	return x
}

// run runs a shell command to its end and returns its output.
func (x *audited) run(command string) (string, backends.ExitStatus) {
	x.t.Helper()
	var out lockedBuffer
	status, err := x.client.Exec(context.Background(), backends.Process{
		Channel: 1, Kind: backends.KindExec, Command: command, Stdout: &out, Stderr: &out,
	})
	if err != nil {
		x.t.Errorf("%s: %v", command, err)
	}
	return out.String(), status
}

func (x *audited) all() []*backends.Report {
	x.mu.Lock()
	defer x.mu.Unlock()
	return slices.Clone(x.reports)
}

func argv(a backends.Args) string { return string(bytes.Join(a.List, []byte(" "))) }

// exec finds the one execution with these arguments.
func (x *audited) exec(args string) *backends.Report {
	x.t.Helper()
	var found []*backends.Report
	for _, r := range x.all() {
		if r.Exec != nil && argv(r.Exec.Args) == args && r.Exec.Count == 0 {
			found = append(found, r)
		}
	}
	if len(found) != 1 {
		x.t.Fatalf("%d executions of %q in\n%s", len(found), args, x)
	}
	return found[0]
}

// fate finds the start and the end of an execution.
func (x *audited) fate(exec *backends.Report) (s *backends.Started, e *backends.Ended) {
	for _, r := range x.all() {
		if r.Started != nil && r.Started.Exec == exec.Sequence {
			s = r.Started
		}
		if r.Ended != nil && r.Ended.Exec == exec.Sequence {
			e = r.Ended
		}
	}
	return s, e
}

func (x *audited) String() string {
	var b strings.Builder
	for _, r := range x.all() {
		fmt.Fprintf(&b, "%d channel %d: ", r.Sequence, r.Channel)
		switch {
		case r.Exec != nil:
			fmt.Fprintf(&b, "exec %+v %q\n", *r.Exec, r.Exec.Args.List)
		case r.Started != nil:
			fmt.Fprintf(&b, "started %+v %q\n", *r.Started, r.Started.File)
		case r.Ended != nil:
			fmt.Fprintf(&b, "ended %+v\n", *r.Ended)
		case r.Connect != nil:
			fmt.Fprintf(&b, "connect %+v\n", *r.Connect)
		case r.Script != nil:
			fmt.Fprintf(&b, "script %q %d %q\n", r.Script.Path, r.Script.Size, r.Script.Data)
		case r.Unaudited != nil:
			fmt.Fprintf(&b, "unaudited %+v\n", *r.Unaudited)
		}
	}
	return b.String()
}

// TestAudit has a shell run programs in all the ordinary ways.
func TestAudit(t *testing.T) {
	x := startAudited(t, backends.ExecAudit{})
	if x.client.ExecAudit() != "on" {
		t.Fatal(x.client.ExecAudit())
	}
	dir := t.TempDir()
	script := filepath.Join(dir, "script")
	const text = "#!/bin/sh\nexit 7\n"
	if err := os.WriteFile(script, []byte(text), 0o755); err != nil {
		t.Fatal(err)
	}
	command := fmt.Sprintf("cd %s; /bin/echo one; ./script; /bin/sh -c 'kill -TERM $$'; printf 'x%%s\\n' $?; /nowhere/x; "+
		"/bin/echo $(printf 'a\\377b'); /bin/true &\nwait", dir)
	out, _ := x.run(command)
	if !strings.Contains(out, "one\n") || !strings.Contains(out, "x143") {
		t.Errorf("output %q", out)
	}
	for args, want := range map[string]struct {
		code   int
		signal string
		file   string
	}{
		"/bin/echo one":            {0, "", "echo"},
		"./script":                 {7, "", ""},
		"/bin/sh -c kill -TERM $$": {0, "TERM", ""},
		"/bin/echo a\xffb":         {0, "", "echo"},
		"/bin/true":                {0, "", "true"},
		filepath.Base(shell(t)) + " -c " + command: {0, "", ""},
	} {
		e := x.exec(args)
		s, end := x.fate(e)
		if s == nil || end == nil {
			t.Errorf("%q: started %v, ended %v", args, s, end)
			continue
		}
		if end.Code != want.code || end.Signal != want.signal || !strings.HasSuffix(string(s.File), want.file) || e.Channel != 1 ||
			e.Exec.PID != s.PID || s.PID != end.PID || e.Exec.UID != uint32(os.Getuid()) || e.Exec.Error != "" {
			t.Errorf("%q: %+v, %+v %q, %+v", args, e.Exec, s, s.File, end)
		}
		if scripted := args == "./script"; (s.Args != nil) != scripted {
			t.Errorf("%q: really got %v", args, s.Args)
		}
	}
	e := x.exec("./script")
	sum := sha256.Sum256([]byte(text))
	s, _ := x.fate(e)
	if string(e.Exec.Dir) != dir || !bytes.Equal(e.Exec.Script, sum[:]) || argv(*s.Args) != "/bin/sh ./script" {
		t.Errorf("script %+v, %q", e.Exec, argv(*s.Args))
	}
	top := x.exec(filepath.Base(shell(t)) + " -c " + command)
	if e.Exec.Parent != top.Exec.PID {
		t.Errorf("parent %d, want %d", e.Exec.Parent, top.Exec.PID)
	}
	if s, end := x.fate(x.exec("/nowhere/x")); s != nil || end == nil || end.Code != 127 {
		t.Errorf("what is not there: started %v, ended %v", s, end)
	}
	// Once for each content.
	x.run("cp " + script + " " + script + "2; " + script + "; " + script + "2")
	scripts := 0
	for _, r := range x.all() {
		if r.Script != nil {
			scripts++
			if string(r.Script.Data) != text || r.Script.Size != int64(len(text)) || hex.EncodeToString(r.Script.Hash) != hex.EncodeToString(sum[:]) {
				t.Errorf("script %+v", r.Script)
			}
		}
	}
	if scripts != 1 {
		t.Errorf("%d scripts in\n%s", scripts, x)
	}
}

func shell(t *testing.T) string {
	t.Helper()
	f, err := os.Open("/etc/passwd")
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	return findShell(lookUp(f, os.Getuid()).shell)
}

var _ = time.Second
