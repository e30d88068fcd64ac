package main

import (
	"cmp"
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"strings"
	"sync"
	"sync/atomic"
	"syscall"
	"time"

	"github.com/spf13/cobra"
	"golang.org/x/term"

	"github.com/sallyport/sallyport/auditlog"
)

// isTerminal says whether a stream is a terminal, and of which size.
func isTerminal(stream any) (f *os.File, ok bool) {
	f, ok = stream.(*os.File)
	return f, ok && term.IsTerminal(int(f.Fd()))
}

// style prints in colours, or does not.
type style struct{ on bool }

// styleOf is the style for a writer: colours only on a terminal, and not if NO_COLOR is set (https://no-color.org).
func styleOf(w io.Writer) style {
	if p, ok := w.(*pager); ok {
		return p.style
	}
	_, ok := isTerminal(w)
	return style{ok && os.Getenv("NO_COLOR") == "" && os.Getenv("TERM") != "dumb"}
}

func (s style) code(code, text string) string {
	if !s.on || text == "" {
		return text
	}
	return "\x1b[" + code + "m" + text + "\x1b[0m"
}

func (s style) bold(text string) string { return s.code("1", text) }
func (s style) dim(text string) string  { return s.code("2", text) }
func (s style) mark(text string) string { return s.code("1;31", text) }

// state colours a log's state.
func (s style) state(text string) string {
	switch auditlog.State(strings.TrimSuffix(text, fromIndex)) {
	case auditlog.Sealed:
		return s.code("32", text)
	case auditlog.Damaged:
		return s.code("1;31", text)
	}
	return s.code("33", text)
}

// pager is the auditor's pager, which takes what a command prints. It begins with the first of it: until then the terminal is the
// progress's.
type pager struct {
	cmd   *exec.Cmd
	style style
	in    io.WriteCloser // nil: not begun, or it could not be

	begun  atomic.Bool // also set where it could not be
	before func()      // called once it is set; nil: nothing
}

// Write begins the pager if need be. It is not for several goroutines.
func (p *pager) Write(b []byte) (int, error) {
	if !p.begun.Swap(true) {
		if p.before != nil {
			p.before()
		}
		in, err := p.cmd.StdinPipe()
		if err == nil {
			err = p.cmd.Start()
		}
		if err != nil {
			return 0, fmt.Errorf("$PAGER: %w", err)
		}
		p.in = in
	}
	if p.in == nil {
		return 0, os.ErrClosed
	}
	return p.in.Write(b)
}

// close waits until the reader has seen all.
func (p *pager) close() error {
	if p.in == nil {
		return nil
	}
	return errors.Join(p.in.Close(), p.cmd.Wait())
}

// paged calls f with where to print to: the pager of $PAGER, or less, if standard output is a terminal, else standard output.
func (t *tool) paged(c *cobra.Command, f func(out io.Writer) error) error {
	out := c.OutOrStdout()
	name, set := os.LookupEnv("PAGER")
	if !set {
		name = "less"
	}
	words := strings.Fields(name)
	_, ok := isTerminal(out)
	if !ok || t.noPager || len(words) == 0 || words[0] == "cat" {
		return f(out)
	}
	path, err := exec.LookPath(words[0])
	if err != nil {
		if set {
			return fmt.Errorf("$PAGER: %w", err)
		}
		return f(out)
	}
	// F: not for what fits the screen. R: colours, and nothing else, are passed on. X: what was shown stays.
	p := &pager{cmd: exec.Command(path, words[1:]...), style: styleOf(out)}
	p.cmd.Env = append(os.Environ(), "LESS="+cmp.Or(os.Getenv("LESS"), "FRX"))
	p.cmd.Stdout, p.cmd.Stderr = out, c.ErrOrStderr()
	err = f(p)
	if p.in != nil && (errors.Is(err, syscall.EPIPE) || errors.Is(err, os.ErrClosed)) {
		err = nil // the reader has seen enough
	}
	return errors.Join(err, p.close())
}

// progress tells on a terminal how far a long reading is. It is erased when that ends.
type progress struct {
	w     io.Writer // nil: nobody looks
	pager *pager    // nil: none. It has the terminal once it has begun

	mu   sync.Mutex // guards all below: who lists is not who prints
	last time.Time
	text string
}

// newProgress tells on stderr, until out is a pager that has begun.
func newProgress(out, stderr io.Writer) *progress {
	p := &progress{}
	if _, ok := isTerminal(stderr); ok {
		p.w = stderr
	}
	if p.pager, _ = out.(*pager); p.pager != nil {
		p.pager.before = p.clear
	}
	return p
}

// set shows a text, five times a second at most.
func (p *progress) set(format string, args ...any) {
	if p.w == nil {
		return
	}
	p.mu.Lock()
	defer p.mu.Unlock()
	if p.pager != nil && p.pager.begun.Load() || time.Since(p.last) < time.Second/5 {
		return
	}
	p.last = time.Now()
	p.erase()
	p.text = fmt.Sprintf(format, args...)
	fmt.Fprint(p.w, p.text)
}

// clear erases it: something is to be printed.
func (p *progress) clear() {
	if p.w != nil {
		p.mu.Lock()
		defer p.mu.Unlock()
		p.erase()
	}
}

// erase takes the text away. The lock is held.
func (p *progress) erase() {
	if p.text != "" {
		fmt.Fprintf(p.w, "\r%s\r", strings.Repeat(" ", len(p.text)))
		p.text = ""
	}
}
