package main

import (
	"container/heap"
	"time"

	"github.com/sallyport/sallyport/auditlog"
	"github.com/sallyport/sallyport/auditlog/screen"
)

const (
	// maxScreens is how many channels of a session are rendered at the same time. One more takes the place of the one that has
	// been silent for the longest; its lines are given then.
	maxScreens = 8
	// readable is the pause after which a person may have read what stands on a screen.
	readable = 100 * time.Millisecond
)

// readLine is a line of a terminal, or of what was printed without one, as a person would have read it.
type readLine struct {
	channel  uint32
	terminal bool
	stream   auditlog.Stream // Input: what the client sent where there was no terminal that would have echoed it
	at       time.Time       // of its last change
	text     string
}

// where says by which way it went.
func (l readLine) where() string {
	switch {
	case l.terminal:
		return "terminal"
	case l.stream == auditlog.Input:
		return "input"
	case l.stream == auditlog.Error:
		return "error"
	}
	return "output"
}

// rendering turns a session's records into lines. Binary content is no exception: a zero byte shall not hide what stands beside it.
type rendering struct {
	emit    func(readLine)
	screens map[screenKey]*rendered
	sizes   map[uint32]terminalSize // of the channels that have a terminal
	count   int
}

type screenKey struct {
	channel uint32
	stream  auditlog.Stream
}

type terminalSize struct{ columns, rows int }

type rendered struct {
	*screen.Screen
	last time.Time
	used int
}

func newRendering(emit func(readLine)) *rendering {
	return &rendering{emit: emit, screens: make(map[screenKey]*rendered), sizes: make(map[uint32]terminalSize)}
}

func (r *rendering) add(rec auditlog.Record) {
	switch b := rec.Body.(type) {
	case *auditlog.Request:
		r.request(rec, b)
	case *auditlog.Data:
		if _, terminal := r.sizes[rec.Channel]; terminal && b.Stream == auditlog.Input {
			return // the terminal echoes what is to be read
		}
		if len(b.Data) > 0 {
			s := r.screen(screenKey{rec.Channel, b.Stream}, rec.Time)
			if pause := rec.Time.Sub(s.last); pause >= readable || pause < 0 {
				s.Settle()
			}
			s.last, s.Now = rec.Time, rec.Time
			s.Write(b.Data)
		}
	case *auditlog.ChannelClose:
		for stream := auditlog.Input; stream <= auditlog.Error; stream++ {
			r.end(screenKey{rec.Channel, stream})
		}
		delete(r.sizes, rec.Channel)
	}
}

func (r *rendering) request(rec auditlog.Record, b *auditlog.Request) {
	if !b.OK && b.Type == "pty-req" || b.Type != "pty-req" && b.Type != "window-change" {
		return
	}
	if _, have := r.sizes[rec.Channel]; !have && (b.Type != "pty-req" || len(r.sizes) >= maxShownChannels) {
		return
	}
	size := terminalSize{clampInt(b.Columns), clampInt(b.Rows)}
	r.sizes[rec.Channel] = size
	if s := r.screens[screenKey{rec.Channel, auditlog.Output}]; s != nil {
		s.Resize(size.columns, size.rows)
	}
}

func clampInt(n uint32) int { return int(min(n, 10_000)) }

// screen gives the screen of a stream, a new one if need be.
func (r *rendering) screen(key screenKey, at time.Time) *rendered {
	r.count++
	s := r.screens[key]
	if s == nil {
		if len(r.screens) >= maxScreens {
			oldest := key
			for k, other := range r.screens {
				if oldest == key || other.used < r.screens[oldest].used {
					oldest = k
				}
			}
			r.end(oldest)
		}
		s = &rendered{last: at}
		size, terminal := r.sizes[key.channel]
		terminal = terminal && key.stream == auditlog.Output
		emit := func(text string, at time.Time) { r.emit(readLine{key.channel, terminal, key.stream, at, text}) }
		if terminal {
			s.Screen = screen.New(size.columns, size.rows, emit)
		} else {
			s.Screen = screen.NewPlain(emit)
		}
		r.screens[key] = s
	}
	s.used = r.count
	return s
}

func (r *rendering) end(key screenKey) {
	if s := r.screens[key]; s != nil {
		s.Flush()
		delete(r.screens, key)
	}
}

// finish gives what still stands on the screens, in the order in which they were last written to.
func (r *rendering) finish() {
	for len(r.screens) > 0 {
		var first screenKey
		found := false
		for k, s := range r.screens {
			if !found || s.used < r.screens[first].used {
				first, found = k, true
			}
		}
		r.end(first)
	}
}

// A screen gives a line when it is gone from there: what is written over, as a bar of progress is, comes before what stands above it.
// inOrder holds lines back, and gives them in the order of their times as long as they are not further apart than these.
const (
	maxHeldLines = 4096
	maxHeldBytes = 1 << 20
)

// timedLine is a line of text.
type timedLine struct {
	at     time.Time
	number int // as it came: lines of the same moment stay in that order
	text   string
}

type inOrder struct {
	emit  func(text string)
	held  timedLines
	bytes int
	count int
}

func (o *inOrder) add(at time.Time, text string) {
	heap.Push(&o.held, timedLine{at, o.count, text})
	o.count++
	o.bytes += len(text)
	for len(o.held) > maxHeldLines || o.bytes > maxHeldBytes {
		o.next()
	}
}

func (o *inOrder) next() {
	l, _ := heap.Pop(&o.held).(timedLine)
	o.bytes -= len(l.text)
	o.emit(l.text)
}

// finish gives what is held back.
func (o *inOrder) finish() {
	for len(o.held) > 0 {
		o.next()
	}
}

// timedLines is a heap, the earliest first.
type timedLines []timedLine

func (h timedLines) Len() int { return len(h) }
func (h timedLines) Less(i, j int) bool {
	if c := h[i].at.Compare(h[j].at); c != 0 {
		return c < 0
	}
	return h[i].number < h[j].number
}
func (h timedLines) Swap(i, j int) { h[i], h[j] = h[j], h[i] }
func (h *timedLines) Push(v any)   { l, _ := v.(timedLine); *h = append(*h, l) }
func (h *timedLines) Pop() any {
	last := len(*h) - 1
	l := (*h)[last]
	(*h)[last] = timedLine{}
	*h = (*h)[:last]
	return l
}
