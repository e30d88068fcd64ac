package agent

import (
	"os"
	"os/signal"
	"sync"
	"syscall"
)

// reaper waits for every child of this process: for its own, and for the orphans that the kernel gives to the first
// process of a sandbox. No other code may wait for a child.
type reaper struct {
	mu sync.Mutex // held over each start and each wait, so that no status is met before its owner has registered
	// children holds the started and not yet reaped ones, by pid.
	children map[int]chan syscall.WaitStatus
}

// newReaper starts reaping, until stop is closed.
func newReaper(stop <-chan struct{}) *reaper {
	r := &reaper{children: make(map[int]chan syscall.WaitStatus)}
	wake := make(chan os.Signal, 1)
	signal.Notify(wake, syscall.SIGCHLD)
	go func() {
		defer signal.Stop(wake)
		for {
			select {
			case <-stop:
				return
			case <-wake:
				r.reapAll()
			}
		}
	}()
	return r
}

// reapAll takes every status there is, and says whether this process has no child left.
func (r *reaper) reapAll() bool {
	r.mu.Lock()
	defer r.mu.Unlock()
	for {
		var status syscall.WaitStatus
		pid, err := syscall.Wait4(-1, &status, syscall.WNOHANG, nil)
		switch {
		case err == syscall.EINTR:
			continue
		case err != nil:
			return err == syscall.ECHILD
		case pid == 0:
			return false
		}
		if c := r.children[pid]; c != nil {
			delete(r.children, pid)
			c <- status
		}
	}
}

// start starts a child. Its status is sent to the channel.
func (r *reaper) start(path string, argv []string, attr *syscall.ProcAttr) (int, <-chan syscall.WaitStatus, error) {
	r.mu.Lock()
	defer r.mu.Unlock()
	pid, err := syscall.ForkExec(path, argv, attr)
	if err != nil {
		return 0, nil, err
	}
	c := make(chan syscall.WaitStatus, 1)
	r.children[pid] = c
	return pid, c, nil
}
