package agent

import (
	"errors"
	"fmt"
	"os"
	"strconv"
	"strings"
	"syscall"
	"time"
)

// Where the process namespace is another container's, the target's, the agent is not its first process, and there are processes
// around it that are none of its own. What is said here of containers is told by control groups: the runtime puts each into one
// of its own, and no process without privileges leaves it.

// ExitShared is the exit code of an agent that would not run beside a process of its own uid.
const ExitShared = 4

// errSharedUID ends an agent before it serves anybody.
var errSharedUID = errors.New("a process of the target has the session's uid")

// controlGroups gives the control groups of a process (cgroups(7), /proc/PID/cgroup); "self" is this one.
func controlGroups(pid string) (string, error) {
	b, err := os.ReadFile("/proc/" + pid + "/cgroup")
	return string(b), err
}

// sameContainer says whether the process is in this one's container.
func sameContainer(pid int) bool {
	own, err := controlGroups("self")
	if err != nil || own == "" {
		return false
	}
	theirs, err := controlGroups(strconv.Itoa(pid))
	return err == nil && theirs == own
}

// refuseSharedUID is an error if a process outside of this container has this one's uid: who may not have the target's files may
// not have that. A look at the start: a process of the target's that changes to this uid later is not found.
func refuseSharedUID() error {
	own, err := controlGroups("self")
	if err != nil {
		return fmt.Errorf("whose processes are there: %w", err)
	}
	uid := strconv.Itoa(os.Getuid())
	for _, p := range procTable() {
		if p.zombie { // as a session leaves behind whose agent was killed, where the target's first process waits for nobody
			continue
		}
		name := strconv.Itoa(p.pid)
		groups, err := controlGroups(name)
		if gone(err) || err == nil && groups == own {
			continue
		}
		if err != nil {
			return fmt.Errorf("whose processes are there: %w", err)
		}
		status, err := os.ReadFile("/proc/" + name + "/status")
		if gone(err) {
			continue
		}
		if err != nil {
			return fmt.Errorf("whose processes are there: %w", err)
		}
		if hasUID(string(status), uid) {
			return errSharedUID
		}
	}
	return nil
}

// gone is the error of reading of a process that has ended.
func gone(err error) bool { return errors.Is(err, os.ErrNotExist) || errors.Is(err, syscall.ESRCH) }

// hasUID says whether uid is among the real, effective, saved and file system uids of a process (proc_pid_status(5)).
func hasUID(status, uid string) bool {
	for line := range strings.SplitSeq(status, "\n") {
		ids, ok := strings.CutPrefix(line, "Uid:")
		if !ok {
			continue
		}
		for _, id := range strings.Fields(ids) {
			if id == uid {
				return true
			}
		}
		return false
	}
	return true // unknown
}

// endLimit bounds endContainer.
const endLimit = 10 * time.Second

// endContainer kills all processes of this container but this one, whoever stopped them. The runtime executes it where a user
// could stop the agent, which then can't end by itself.
func endContainer() error {
	own, err := controlGroups("self")
	if err != nil {
		return err
	}
	self := os.Getpid()
	for limit := time.Now().Add(endLimit); ; time.Sleep(time.Millisecond) {
		left := 0
		for _, p := range procTable() {
			if groups, err := controlGroups(strconv.Itoa(p.pid)); p.pid == self || p.zombie || err != nil || groups != own {
				continue
			}
			left++
			syscall.Kill(p.pid, syscall.SIGKILL)
		}
		if left == 0 {
			return nil
		}
		if time.Now().After(limit) {
			return fmt.Errorf("%d processes do not end", left)
		}
	}
}
