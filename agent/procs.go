package agent

import (
	"bytes"
	"os"
	"strconv"
	"syscall"
	"time"
)

// hangupGrace is the time between SIGHUP and SIGKILL for a process whose user is gone.
const hangupGrace = 500 * time.Millisecond

// proc is a line of the process table.
type proc struct {
	pid, parent, session int
	start                string // tells a process from a later one of the same number
	zombie               bool
}

// procTable lists the processes there are, from proc_pid_stat(5). A process that goes meanwhile is left out.
func procTable() []proc {
	dir, err := os.Open("/proc")
	if err != nil {
		return nil
	}
	defer dir.Close()
	names, err := dir.Readdirnames(-1)
	if err != nil {
		return nil
	}
	var table []proc
	for _, name := range names {
		pid, err := strconv.Atoi(name)
		if err != nil {
			continue
		}
		b, err := os.ReadFile("/proc/" + name + "/stat")
		if err != nil {
			continue
		}
		// The command's name stands in parentheses and may hold anything.
		f := bytes.Fields(b[bytes.LastIndexByte(b, ')')+1:])
		if len(f) < 20 {
			continue
		}
		p := proc{pid: pid, start: string(f[19]), zombie: f[0][0] == 'Z'}
		p.parent, _ = strconv.Atoi(string(f[1]))
		p.session, _ = strconv.Atoi(string(f[3]))
		table = append(table, p)
	}
	return table
}

// family finds the processes of a session, and the descendants of known ones.
type family struct {
	session int // also the pid of its first process; 0: none
	known   map[proc]bool
}

func key(p proc) proc { return proc{pid: p.pid, start: p.start} }

// living looks for members, remembers them, and returns those that are alive.
func (f *family) living() []int {
	table := procTable()
	member := make(map[int]bool)
	for _, p := range table {
		if f.known[key(p)] || f.session != 0 && p.session == f.session {
			member[p.pid] = true
		}
	}
	for found := true; found; {
		found = false
		for _, p := range table {
			if !member[p.pid] && member[p.parent] {
				member[p.pid], found = true, true
			}
		}
	}
	var pids []int
	for _, p := range table {
		if member[p.pid] {
			f.known[key(p)] = true
			if !p.zombie {
				pids = append(pids, p.pid)
			}
		}
	}
	return pids
}

// end sends SIGHUP to the family, and SIGKILL after grace, again and again until nobody is left or 2 s have passed.
func (f *family) end(grace time.Duration) {
	f.known = make(map[proc]bool)
	limit := time.Now().Add(grace)
	for _, pid := range f.living() {
		syscall.Kill(pid, syscall.SIGHUP)
		syscall.Kill(pid, syscall.SIGCONT) // a stopped process takes no SIGHUP
	}
	for time.Now().Before(limit) {
		if len(f.living()) == 0 {
			return
		}
		time.Sleep(10 * time.Millisecond)
	}
	for limit = limit.Add(2 * time.Second); time.Now().Before(limit); time.Sleep(5 * time.Millisecond) {
		pids := f.living()
		if len(pids) == 0 {
			return
		}
		for _, pid := range pids {
			syscall.Kill(pid, syscall.SIGKILL)
		}
	}
}

// endAll ends every process but this one, all of whose descendants become its children at last: as the first process
// of a namespace, or by PR_SET_CHILD_SUBREAPER. It gives up after grace and 5 s.
func endAll(r *reaper, grace time.Duration) {
	send := killDescendants
	if os.Getpid() == 1 {
		send = func(sig syscall.Signal) { syscall.Kill(-1, sig) }
	}
	begin := time.Now()
	for hungUp := false; !r.reapAll() && time.Since(begin) < grace+5*time.Second; time.Sleep(5 * time.Millisecond) {
		switch {
		case !hungUp:
			send(syscall.SIGHUP)
			hungUp = true
		case time.Since(begin) >= grace:
			send(syscall.SIGKILL)
		}
	}
}

func killDescendants(sig syscall.Signal) {
	f := &family{known: make(map[proc]bool)}
	self := os.Getpid()
	for _, p := range procTable() {
		if p.parent == self {
			f.known[key(p)] = true
		}
	}
	for _, pid := range f.living() {
		syscall.Kill(pid, sig)
	}
}
