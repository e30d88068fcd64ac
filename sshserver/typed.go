package sshserver

import (
	"bytes"
	"io"
	"regexp"
	"sync"
	"time"

	"github.com/sallyport/sallyport/backends"
)

// What a profile's permit.input may say.
const (
	inputNoPasswords = "no-passwords"
	inputAll         = "all"
	inputNone        = "none"
)

const (
	typedWait  = time.Second // for the agent's word on the terminal's state
	maxPending = 64 << 10    // typed bytes that wait for it
	maxLine    = 512         // of the output's last line
)

// typed is the input of a terminal on its way to the log. Bytes wait until the agent has said how the terminal stood
// when it wrote them. They become a marker, without bytes or length, while ECHO is off and either ICANON is on (getpass,
// read -s) or the output's last line ends as a password prompt does (mysql clears ICANON too; bash, vi and python read
// with both off, and what they read is no password). Without an answer within typedWait they are recorded as they are.
type typed struct {
	r      io.Reader
	record func(data []byte, hidden bool)
	line   *lastLine

	mu      sync.Mutex // guards what follows; held over record, so that the order stays
	pending []chunk
	size    int
	late    int  // bytes recorded without an answer, whose answer is still to come
	hiding  bool // a marker stands for what is being typed
	timer   *time.Timer
	closed  bool
}

type chunk struct {
	data   []byte
	at     time.Time
	prompt bool // the output's last line was a password prompt when these bytes came
}

func newTyped(r io.Reader, line *lastLine, record func([]byte, bool)) *typed {
	return &typed{r: r, record: record, line: line}
}

// Read is the process's stdin.
func (t *typed) Read(p []byte) (int, error) {
	n, err := t.r.Read(p)
	if n > 0 {
		t.mu.Lock()
		t.pending = append(t.pending, chunk{bytes.Clone(p[:n]), time.Now(), t.line.prompt()})
		t.size += n
		for t.size > maxPending {
			t.flushLocked(len(t.pending[0].data))
		}
		t.armLocked()
		t.mu.Unlock()
	}
	return n, err
}

// wrote is the agent's word: n more bytes went to the terminal while it stood as state says.
func (t *typed) wrote(n int, state backends.TerminalState) {
	t.mu.Lock()
	defer t.mu.Unlock()
	skip := min(n, t.late)
	t.late -= skip
	n -= skip
	for n > 0 && len(t.pending) > 0 {
		c := &t.pending[0]
		k := min(n, len(c.data))
		hide := !state.Echo && (state.Canonical || c.prompt)
		t.putLocked(c.data[:k], hide)
		t.takeLocked(k)
		n -= k
	}
	t.armLocked()
}

func (t *typed) putLocked(data []byte, hide bool) {
	if !hide {
		t.hiding = false
		t.record(data, false)
		return
	}
	if !t.hiding {
		t.record(nil, true)
	}
	// One marker for one answer, however many keys it took: their number is not to be told.
	t.hiding = bytes.IndexAny(data, "\r\n") < 0
}

func (t *typed) takeLocked(k int) {
	c := &t.pending[0]
	c.data = c.data[k:]
	t.size -= k
	if len(c.data) == 0 {
		t.pending[0] = chunk{}
		t.pending = t.pending[1:]
		if len(t.pending) == 0 {
			t.pending = nil
		}
	}
}

// flushLocked records n bytes of the first chunk without the agent's word.
func (t *typed) flushLocked(n int) {
	t.hiding = false
	t.record(t.pending[0].data[:n], false)
	t.late += n
	t.takeLocked(n)
}

func (t *typed) armLocked() {
	if t.closed || len(t.pending) == 0 {
		if t.timer != nil {
			t.timer.Stop()
		}
		return
	}
	wait := max(0, time.Until(t.pending[0].at.Add(typedWait)))
	if t.timer == nil {
		t.timer = time.AfterFunc(wait, t.expire)
		return
	}
	t.timer.Reset(wait)
}

func (t *typed) expire() {
	t.mu.Lock()
	defer t.mu.Unlock()
	for !t.closed && len(t.pending) > 0 && time.Since(t.pending[0].at) >= typedWait {
		t.flushLocked(len(t.pending[0].data))
	}
	t.armLocked()
}

// close records what still waits. Nothing is recorded after it.
func (t *typed) close() {
	t.mu.Lock()
	defer t.mu.Unlock()
	if t.closed {
		return
	}
	for len(t.pending) > 0 {
		t.flushLocked(len(t.pending[0].data))
	}
	t.closed = true
	t.armLocked()
}

// lastLine keeps the end of a terminal's output, to tell a password prompt.
type lastLine struct {
	mu  sync.Mutex // guards buf
	buf []byte
}

func (l *lastLine) add(p []byte) {
	l.mu.Lock()
	defer l.mu.Unlock()
	if i := bytes.LastIndexByte(p, '\n'); i >= 0 {
		l.buf, p = l.buf[:0], p[i+1:]
	}
	if len(p) > maxLine {
		l.buf, p = l.buf[:0], p[len(p)-maxLine:]
	}
	l.buf = append(l.buf, p...)
	if n := len(l.buf) - maxLine; n > 0 {
		l.buf = append(l.buf[:0], l.buf[n:]...)
	}
}

var (
	escapes = regexp.MustCompile("\x1b(\\[[0-9;?]*[ -/]*[@-~]|\\][^\x07\x1b]*(\x07|\x1b\\\\)?|[@-Z\\\\^_=>])")
	prompts = regexp.MustCompile(`(?i)(pass(word|phrase|code)|\bpin\b|secret|otp|verification code|token)[^:?>\r]*[:?>][ \t]*$`)
)

func (l *lastLine) prompt() bool {
	l.mu.Lock()
	defer l.mu.Unlock()
	return prompts.Match(escapes.ReplaceAll(l.buf, nil))
}
