package sshserver

import (
	"bytes"
	"strings"
	"testing"

	"github.com/sallyport/sallyport/auditlog"
	"github.com/sallyport/sallyport/authz"
)

// What a program executes is in the log under its channel, complete before the program's exit; unless the profile has it off.
func TestPrograms(t *testing.T) {
	for _, mode := range []string{"", "required", "off"} {
		t.Run("exec_audit "+mode, func(t *testing.T) {
			g := newGate(t, nil)
			login := g.rules.login
			g.rules.login = func(in authz.LoginInput) (authz.Login, error) {
				d, err := login(in)
				d.Sandbox.ExecAudit = mode
				return d, err
			}
			c := g.dial("alice")
			for range 2 {
				s, err := c.NewSession()
				if err != nil {
					t.Fatal(err)
				}
				if err := s.Run("/bin/echo marked; /bin/false || true"); err != nil {
					t.Fatal(err)
				}
			}
			c.Close()
			found := map[uint32]int{}
			ends := map[uint64]bool{}
			open := map[uint32]bool{1: true, 2: true}
			for _, rec := range g.records()[0] {
				switch b := rec.Body.(type) {
				case *auditlog.Sandbox:
					if on := b.ExecAudit == "on"; on == (mode == "off") {
						t.Errorf("exec audit %q", b.ExecAudit)
					}
				case *auditlog.ProgramExec:
					if line := string(bytes.Join(b.Args, []byte(" "))); line == "/bin/echo marked" {
						found[rec.Channel]++
						ends[b.Exec] = false
					} else if !strings.Contains(line, "marked") && line != "/bin/false" {
						t.Errorf("executed %q", line)
					}
					if !open[rec.Channel] {
						t.Errorf("after the exit: %+v", b)
					}
				case *auditlog.ProgramEnd:
					if _, ok := ends[b.Exec]; ok {
						ends[b.Exec] = b.Code == 0 && open[rec.Channel]
					}
				case *auditlog.Exit:
					open[rec.Channel] = false
				}
			}
			want := 1
			if mode == "off" {
				want = 0
			}
			if found[1] != want || found[2] != want || len(found) != 2*want {
				t.Errorf("found by channel: %v", found)
			}
			for exec, ended := range ends {
				if !ended {
					t.Errorf("execution %d has no end before its channel's exit", exec)
				}
			}
		})
	}
}
