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
	maxHidden  = 6           // lines in a row; a password is asked for three times, a new one twice
	maxSecret  = 1 << 10     // bytes of one
)

// typed is the input of a terminal on its way to the log. Bytes wait until the agent has said how the terminal stood
// when it wrote them. They become a marker, without bytes or length, while ECHO is off and either ICANON is on (getpass,
// read -s) or the output's last line ends as a password prompt does (mysql clears ICANON too; bash, vi and python read
// with both off, and what they read is no password). Without an answer within typedWait they are recorded as they are.
type typed struct {
	r      io.Reader
	record func(data []byte, hidden bool)
	alert  func(detail string) // input was hidden that may be more than a password
	line   *lastLine

	mu      sync.Mutex // guards what follows; held over record, so that the order stays
	pending []chunk
	size    int
	late    int  // bytes recorded without an answer, whose answer is still to come
	hiding  bool // a marker stands for what is being typed
	hidden  int  // lines hidden since the last byte that was not
	length  int  // bytes of the line being hidden
	alerted [2]bool
	timer   *time.Timer
	closed  bool
}

type chunk struct {
	data   []byte
	at     time.Time
	prompt bool // the output's last line was a password prompt when these bytes came
}

func newTyped(r io.Reader, line *lastLine, alert func(string), record func([]byte, bool)) *typed {
	return &typed{r: r, record: record, alert: alert, line: line}
}

// Read is the process's stdin.
func (t *typed) Read(p []byte) (int, error) {
	n, err := t.r.Read(p)
	if n > 0 {
		t.mu.Lock()
		t.pending = append(t.pending, chunk{bytes.Clone(p[:n]), time.Now(), t.line.answer(p[:n])})
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
		t.putLocked(c.data[:k], hide, c.prompt)
		t.takeLocked(k)
		n -= k
	}
	t.armLocked()
}

// putLocked records bytes, or the marker for them. Nothing tells a password from a command that is typed into a shell with
// ECHO off; so what is hidden without a prompt on the screen, and more than anyone's passwords, is told to the auditor.
func (t *typed) putLocked(data []byte, hide, prompt bool) {
	if !hide {
		t.hiding, t.hidden, t.length = false, 0, 0
		t.record(data, false)
		return
	}
	if t.length += len(data); t.hidden >= maxHidden || t.length > maxSecret {
		// Nobody types so many passwords: a shell that reads with ECHO off must not work unseen.
		if !t.alerted[1] {
			t.alerted[1] = true
			t.alert("more was typed with ECHO off than passwords take; it is recorded from here on")
		}
		t.hiding = false
		t.record(data, false)
		return
	}
	if !prompt && !t.alerted[0] {
		t.alerted[0] = true
		t.alert("input was hidden for ECHO off, with no password prompt on the screen")
	}
	if !t.hiding {
		t.record(nil, true)
	}
	// One marker for one answer, however many keys it took: their number is not to be told.
	if n := bytes.Count(data, []byte{'\r'}) + bytes.Count(data, []byte{'\n'}); n > 0 {
		t.hiding, t.length = false, 0
		t.hidden += n
	} else {
		t.hiding = true
	}
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
		if t.hiding { // the rest of what a marker stands for
			t.takeLocked(len(t.pending[0].data))
			continue
		}
		t.flushLocked(len(t.pending[0].data))
	}
	t.closed = true
	t.armLocked()
}

// lastLine keeps the end of a terminal's output, to tell a password prompt.
type lastLine struct {
	mu    sync.Mutex // guards what follows
	buf   []byte
	typed bool // something was typed into the line that was no answer to a prompt: what it ends with may be an echo
}

func (l *lastLine) add(p []byte) {
	l.mu.Lock()
	defer l.mu.Unlock()
	if i := bytes.LastIndexByte(p, '\n'); i >= 0 {
		l.buf, p, l.typed = l.buf[:0], p[i+1:], false
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
	prompts = regexp.MustCompile(`(?i)(^|[^\pL\pN])(pass(word|wort|phrase|code)|mot de passe|pin|otp|(verification|mfa|one-time) code|` +
		`(api|unseal|secret|access|recovery) key|secret|token)([^\pL\pN].{0,200})?[:?][ \t]*[*•\x08 ]*$`)
)

// answer reports whether p, which is being typed, answers a password prompt.
func (l *lastLine) answer(p []byte) bool {
	l.mu.Lock()
	defer l.mu.Unlock()
	if !l.typed && prompts.Match(escapes.ReplaceAll(l.buf, nil)) {
		return true
	}
	if len(bytes.Trim(p, "\r\n")) > 0 {
		l.typed = true
	}
	return false
}
