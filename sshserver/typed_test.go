package sshserver

import (
	"bytes"
	"fmt"
	"io"
	"strings"
	"testing"
	"testing/synctest"
	"time"

	"github.com/sallyport/sallyport/backends"
)

func quiet(string) {}

// recorded is what a typed has put in the log: bytes as they are, a marker as [*].
type recorded struct{ bytes.Buffer }

func (r *recorded) put(data []byte, hidden bool) {
	if hidden {
		r.WriteString("[*]")
	}
	r.Write(data)
}

func TestTyped(t *testing.T) {
	var (
		plain    = backends.TerminalState{Echo: true, Canonical: true}
		getpass  = backends.TerminalState{Canonical: true}
		readline = backends.TerminalState{}
	)
	for _, tc := range []struct {
		name, screen, typed string
		state               backends.TerminalState
		want                string
	}{
		{"cooked", "$ ", "ls\r", plain, "ls\r"},
		{"bash reads with both off", "alice@host:~$ ", "ls\r", readline, "ls\r"},
		{"vi", "~\r\n~\r\n-- INSERT --", "text", readline, "text"},
		{"getpass", "Password for user bob: ", "hunter2\r", getpass, "[*]"},
		{"read -s without a prompt", "", "hunter2\r", getpass, "[*]"},
		{"mysql -p", "Enter password: ", "hunter2\r", readline, "[*]"},
		{"coloured prompt", "\x1b[1mPassword:\x1b[0m ", "x\r", readline, "[*]"},
		{"ssh", "alice@db's password: ", "x\r", readline, "[*]"},
		{"passphrase", "Enter passphrase for key '/home/a/.ssh/id': ", "x\r", readline, "[*]"},
		{"sudo with feedback", "[sudo] password for bob: ****", "rest\r", readline, "[*]"},
		{"git", "Password for 'https://bob@example.com': ", "x\r", readline, "[*]"},
		{"a code", "MFA code: ", "123456\r", readline, "[*]"},
		{"vault", "Unseal Key (will be hidden): ", "x\r", readline, "[*]"},
		{"psql on a database of that name", "tokens=> ", "select 1;\r", readline, "select 1;\r"},
		{"a line that only speaks of passwords", "the password was wrong\r\n$ ", "ls\r", readline, "ls\r"},
	} {
		t.Run(tc.name, func(t *testing.T) {
			line := &lastLine{}
			line.add([]byte("earlier\r\n" + tc.screen))
			var rec recorded
			r := newTyped(strings.NewReader(tc.typed), line, quiet, rec.put)
			b, err := io.ReadAll(r)
			if err != nil || string(b) != tc.typed {
				t.Fatalf("passed %q, %v; want all of %q", b, err, tc.typed)
			}
			for range tc.typed { // key by key
				r.wrote(1, tc.state)
			}
			r.close()
			if got := rec.String(); got != tc.want {
				t.Errorf("recorded %q, want %q", got, tc.want)
			}
		})
	}
}

// A password's length must not show, and two passwords are two markers.
func TestTypedMarkers(t *testing.T) {
	var rec recorded
	r := newTyped(strings.NewReader("short\rmuch longer one\rls\r"), &lastLine{}, quiet, rec.put)
	io.ReadAll(r)
	for range len("short\rmuch longer one\r") {
		r.wrote(1, backends.TerminalState{Canonical: true})
	}
	r.wrote(3, backends.TerminalState{Echo: true, Canonical: true})
	r.close()
	if got, want := rec.String(), "[*][*]ls\r"; got != want {
		t.Errorf("recorded %q, want %q", got, want)
	}
}

// Without the agent's word the bytes are recorded after a second; the word that comes late is not taken for later bytes.
func TestTypedLate(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		var rec recorded
		in, w := io.Pipe()
		r := newTyped(in, &lastLine{}, quiet, rec.put)
		read := func(s string) {
			go fmt.Fprint(w, s)
			io.ReadFull(r, make([]byte, len(s)))
		}
		read("one")
		time.Sleep(typedWait / 2)
		synctest.Wait()
		so := func() string { r.mu.Lock(); defer r.mu.Unlock(); return rec.String() }
		if so() != "" {
			t.Fatalf("recorded %q before its time", so())
		}
		time.Sleep(typedWait)
		synctest.Wait()
		if so() != "one" {
			t.Fatalf("recorded %q, want one", so())
		}
		read("secret\r")
		r.wrote(3, backends.TerminalState{Echo: true})      // for "one", late
		r.wrote(7, backends.TerminalState{Canonical: true}) // for the rest
		r.close()
		if got, want := rec.String(), "one[*]"; got != want {
			t.Errorf("recorded %q, want %q", got, want)
		}
	})
}

// What waits for the agent's word is bounded.
func TestTypedBounded(t *testing.T) {
	var rec recorded
	r := newTyped(bytes.NewReader(make([]byte, 1<<20)), &lastLine{}, quiet, rec.put)
	io.Copy(io.Discard, r)
	if r.size > maxPending {
		t.Errorf("%d bytes wait, more than %d", r.size, maxPending)
	}
	r.close()
	if rec.Len() != 1<<20 {
		t.Errorf("recorded %d bytes, want all", rec.Len())
	}
}

// A shell that reads with ECHO off must not work unseen: the auditor is told, and from some point on it is recorded.
func TestTypedAlerts(t *testing.T) {
	for _, tc := range []struct {
		name, screen string
		lines        int
		alerts       int
		last         bool // the last line is recorded
	}{
		{"a password at its prompt", "Password: ", 1, 0, false},
		{"three tries", "Password: ", 3, 0, false},
		{"no prompt", "", 1, 1, false},
		{"a hidden shell", "", maxHidden + 2, 2, true},
		{"a hidden shell that asks for passwords", "password: ", maxHidden + 2, 1, true},
	} {
		t.Run(tc.name, func(t *testing.T) {
			var rec recorded
			alerts := 0
			in, w := io.Pipe()
			line := &lastLine{}
			r := newTyped(in, line, func(string) { alerts++ }, rec.put)
			for i := range tc.lines {
				line.add([]byte("\r\n" + tc.screen))
				text := fmt.Sprintf("line%d\r", i)
				go fmt.Fprint(w, text)
				io.ReadFull(r, make([]byte, len(text)))
				r.wrote(len(text), backends.TerminalState{Canonical: true})
			}
			r.close()
			if alerts != tc.alerts || strings.Contains(rec.String(), fmt.Sprintf("line%d", tc.lines-1)) != tc.last {
				t.Errorf("%d alerts, recorded %q; want %d alerts, the last line recorded: %v", alerts, rec.String(), tc.alerts, tc.last)
			}
		})
	}
}
