// Command sallyport-audit reads, checks and shows the audit logs of a Sallyport gate. It trusts neither the gate nor the
// store, and nothing in a log can control the terminal it prints to.
package main

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"os/signal"
	"runtime/debug"
	"syscall"

	"github.com/sallyport/sallyport/auditlog"
)

// version is set by the linker.
var version = "devel"

// Exit codes, to script on.
const (
	exitError   = 1 // also: not found
	exitDamaged = 2
)

// errDamaged is returned, after the output that says how, when a log is damaged.
var errDamaged = errors.New("damaged")

// errUnreadable is returned, after the output that says how, when a log could not be read whole.
var errUnreadable = errors.New("unreadable")

// verdict is the error of a log in its state.
func verdict(s auditlog.State) error {
	switch s {
	case auditlog.Damaged:
		return errDamaged
	case auditlog.Unreadable:
		return errUnreadable
	}
	return nil
}

// memoryLimit is what the collector works to stay below. A log may be of any size; what is kept of it is bounded, and all together
// shall take less than 200 MiB.
const memoryLimit = 128 << 20

func main() {
	if os.Getenv("GOMEMLIMIT") == "" {
		debug.SetMemoryLimit(memoryLimit)
	}
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt, syscall.SIGTERM)
	err := run(ctx, os.Args[1:], os.Stdin, os.Stdout, os.Stderr)
	stop()
	os.Exit(exitCode(err, os.Stderr))
}

func exitCode(err error, stderr io.Writer) int {
	switch {
	case err == nil:
		return 0
	case errors.Is(err, errDamaged):
		return exitDamaged
	case errors.Is(err, context.Canceled), errors.Is(err, syscall.EPIPE), errors.Is(err, errNothing), errors.Is(err, errUnreadable),
		errors.Is(err, errSilent):
		return exitError
	}
	fmt.Fprintln(stderr, "sallyport-audit:", clean(err.Error()))
	var code *codeError
	if errors.As(err, &code) {
		return code.code
	}
	return exitError
}

func run(ctx context.Context, args []string, stdin io.Reader, stdout, stderr io.Writer) error {
	t := &tool{}
	c := t.command()
	c.SetArgs(args)
	c.SetIn(stdin)
	c.SetOut(stdout)
	c.SetErr(stderr)
	return t.finish(c.ExecuteContext(ctx), stderr)
}

// finish says, after a command has ended, what its output does not: which logs are damaged, and what could not be read. It is an error if
// there are such.
func (t *tool) finish(err error, stderr io.Writer) error {
	if errors.Is(err, context.Canceled) || errors.Is(err, syscall.EPIPE) {
		return err // who asked has gone
	}
	if worst := t.damage.tell(stderr); worst != nil && (err == nil || errors.Is(err, errNothing) || errors.Is(err, errUnreadable)) {
		err = worst
	}
	index := t.tellIndexFailed(stderr)
	unread := t.unread.err(len(t.idFiles) > 0)
	if err == nil {
		return cmp.Or(unread, index)
	}
	if unread != nil {
		fmt.Fprintln(stderr, "sallyport-audit:", unread)
	}
	return err
}
