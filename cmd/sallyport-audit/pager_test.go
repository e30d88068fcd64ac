package main

import (
	"bytes"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"strings"
	"syscall"
	"testing"
)

// Progress is told until there is something to page, and not after.
func TestPager(t *testing.T) {
	var screen, errs bytes.Buffer
	p := &pager{cmd: exec.Command("tr", "a-z", "A-Z")}
	p.cmd.Stdout = &screen
	progress := newProgress(p, &errs)
	progress.w = &errs // as if it were a terminal
	progress.set("reading session %d", 1)
	if errs.String() != "reading session 1" || p.begun.Load() {
		t.Errorf("%q, begun %v", errs.String(), p.begun.Load())
	}
	if _, err := fmt.Fprint(p, "found"); err != nil {
		t.Fatal(err)
	}
	told := errs.String()
	if !strings.HasSuffix(told, " \r") {
		t.Errorf("the progress still stands: %q", told)
	}
	progress.last = progress.last.Add(-1e9)
	progress.set("reading session %d", 2)
	if err := p.close(); err != nil || screen.String() != "FOUND" || errs.String() != told {
		t.Errorf("%v: %q, progress %q", err, screen.String(), errs.String())
	}

	nothing := &pager{cmd: exec.Command("false")}
	if err := nothing.close(); err != nil || nothing.cmd.Process != nil {
		t.Errorf("a pager for nothing: %v", err)
	}

	absent := &pager{cmd: exec.Command("/nonexistent/pager")}
	for range 2 { // who prints may go on
		if _, err := absent.Write([]byte("x")); err == nil {
			t.Error("no error")
		}
	}
	if err := absent.close(); err != nil {
		t.Error(err)
	}

	gone := &pager{cmd: exec.Command("true")}
	line := bytes.Repeat([]byte("x"), 1<<20) // more than a pipe holds
	_, err := gone.Write(line)
	if !errors.Is(err, syscall.EPIPE) && !errors.Is(err, os.ErrClosed) {
		t.Errorf("to a pager that has ended: %v", err)
	}
	if err := gone.close(); err != nil {
		t.Error(err)
	}
}
