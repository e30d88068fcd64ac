package agent

import (
	"bytes"
	"fmt"
	"os"
	"strconv"
	"syscall"
	"testing"

	"golang.org/x/sys/unix"

	"github.com/sallyport/sallyport/backends"
)

// TestAuditSignals sends the agent signals all the time while programs are executed side by side: none of them may go
// unreported, or end the session, because a signal came while the agent waited for the kernel's lock.
func TestAuditSignals(t *testing.T) {
	public, private := newKey(t)
	conn, agent, ended := startAgent(t, public)
	reported := 0
	c, err := NewClient(t.Context(), conn, private, Hello{Audit: backends.ExecAudit{Mode: backends.ExecAuditRequired},
		Reports: func(r *backends.Report) error {
			if r.Exec != nil && bytes.HasPrefix(r.Exec.Path, []byte("/nowhere/")) {
				reported++
			}
			return nil
		}})
	if err != nil {
		t.Fatal(err)
	}
	stop, stopped := make(chan struct{}), make(chan struct{})
	go func() {
		defer close(stopped)
		for {
			select {
			case <-stop:
				return
			default:
			}
			threads, _ := os.ReadDir(fmt.Sprintf("/proc/%d/task", agent.Process.Pid))
			for _, thread := range threads {
				tid, _ := strconv.Atoi(thread.Name())
				unix.Tgkill(agent.Process.Pid, tid, syscall.SIGWINCH)
			}
		}
	}()
	const side, each = 32, 60
	command := fmt.Sprintf(`seq %d | xargs -P %d -I X perl -e 'for (1..%d) { exec "/nowhere/X/$_" }'`, side, side, each)
	_, err = c.Exec(t.Context(), backends.Process{Channel: 1, Kind: backends.KindExec, Command: command})
	close(stop)
	<-stopped
	if err != nil {
		t.Errorf("%v; the session: %v", err, c.Err())
	}
	c.Close()
	waitEnd(t, ended, "after the gate")
	if reported != side*each {
		t.Errorf("%d of %d were reported", reported, side*each)
	}
}
