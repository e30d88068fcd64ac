package auditlog

import (
	"bytes"
	"path"
	"slices"
	"time"
	"unicode/utf8"
)

// KindIndex is the kind of Entry.
const KindIndex Kind = 14

// Bounds of an entry's lists, so that a batch of a thousand stays small. What has no room sets More.
const (
	maxAsked     = 16 // of commands, of files and of alerts
	maxNames     = 64 // of programs
	maxEntryText = 256
)

// Entry is a session in an index: what a list shows of it. It is made from the session's records alone, by the gate while it
// writes them and by who reads them, and so the two can be compared.
type Entry struct {
	ID      string    `cbor:"1,keyasint,omitempty" json:"id"`
	Gate    string    `cbor:"2,keyasint,omitempty" json:"gate,omitempty"`
	Start   time.Time `cbor:"3,keyasint,omitzero" json:"start,omitzero"` // of the log
	End     time.Time `cbor:"4,keyasint,omitzero" json:"end,omitzero"`   // time of the last record
	User    string    `cbor:"5,keyasint,omitempty" json:"user,omitempty"`
	Groups  []string  `cbor:"6,keyasint,omitempty" json:"groups,omitempty"`
	Ticket  string    `cbor:"7,keyasint,omitempty" json:"ticket,omitempty"` // of the last decision that had one
	Profile string    `cbor:"8,keyasint,omitempty" json:"profile,omitempty"`
	Source  string    `cbor:"9,keyasint,omitempty" json:"source,omitempty"` // address:port
	Image   string    `cbor:"10,keyasint,omitempty" json:"image,omitempty"`
	Digest  string    `cbor:"11,keyasint,omitempty" json:"digest,omitempty"`
	Cause   string    `cbor:"12,keyasint,omitempty" json:"cause,omitempty"` // of the end

	Records  uint64 `cbor:"13,keyasint,omitempty" json:"records"`
	Input    uint64 `cbor:"14,keyasint,omitempty" json:"input_bytes"`  // of data that was recorded
	Output   uint64 `cbor:"15,keyasint,omitempty" json:"output_bytes"` //
	Programs uint64 `cbor:"16,keyasint,omitempty" json:"programs"`     // executions reported from inside
	Files    uint64 `cbor:"17,keyasint,omitempty" json:"files"`        // operations on files
	Forwards uint64 `cbor:"18,keyasint,omitempty" json:"forwards"`
	Alerts   uint64 `cbor:"19,keyasint,omitempty" json:"alerts"` // and processes that came in from outside

	Commands   []string `cbor:"20,keyasint,omitempty" json:"commands,omitempty"`    // asked for: "shell", commands, "subsystem NAME"
	Names      []string `cbor:"21,keyasint,omitempty" json:"names,omitempty"`       // of the programs, without directories; each once
	Paths      []string `cbor:"22,keyasint,omitempty" json:"paths,omitempty"`       // of files; each once
	AlertNames []string `cbor:"23,keyasint,omitempty" json:"alert_names,omitempty"` // each once
	More       bool     `cbor:"24,keyasint,omitempty" json:"more,omitempty"`        // a list or a text was cut

	// What the store holds of the session: an entry that does not fit the objects that are there is not used.
	Segments uint32 `cbor:"25,keyasint,omitempty" json:"segments,omitempty"`
	Bytes    int64  `cbor:"26,keyasint,omitempty" json:"bytes,omitempty"`       // stored, of all segments
	Last     []byte `cbor:"27,keyasint,omitempty" json:"last_sha256,omitempty"` // of the last segment's object

	// Partial: made by a restart, which can't read what an earlier gate wrote; only ID, Gate, Start and Last are there.
	Partial bool `cbor:"28,keyasint,omitempty" json:"partial,omitempty"`
	// Clear: only what is kept in the clear of an encrypted log.
	Clear bool `cbor:"29,keyasint,omitempty" json:"clear,omitempty"`
}

// Kind implements Body.
func (*Entry) Kind() Kind { return KindIndex }

// Add takes a record's part of the entry; records come in their order.
func (e *Entry) Add(rec Record) { e.add(rec.Time, rec.Body) }

func (e *Entry) add(at time.Time, body Body) {
	e.count(at)
	switch b := body.(type) {
	case *Connect:
		e.Source = e.text(b.Source)
	case *Authenticate:
		if b.Result == "proven" {
			e.User = e.text(b.User)
		}
	case *Decision:
		e.decision(b)
	case *Sandbox:
		e.Image, e.Digest = e.text(b.Image), e.text(b.Digest)
	case *Request:
		if c := asked(b); c != "" && b.OK {
			e.list(&e.Commands, e.text(c), maxAsked, false)
		}
	case *Data:
		e.data(b.Stream, len(b.Data))
	case *ProgramExec:
		e.Programs += max(1, uint64(b.Again))
		e.program(b.Path)
	case *ProgramStart:
		e.program(b.File)
	case *Transfer:
		e.Files++
		for _, p := range [][]byte{b.Path, b.Resolved, b.Target, b.TargetResolved, b.Name} {
			if len(p) > 0 {
				e.list(&e.Paths, e.text(string(p)), maxAsked, true)
			}
		}
	case *Forward:
		e.Forwards++
	case *Alert:
		e.Alerts++
		e.list(&e.AlertNames, e.text(b.Name), maxAsked, true)
	case *Unaudited:
		e.Alerts++
		e.program(b.File)
	case *End:
		e.Cause = e.text(b.Cause)
	}
}

func (e *Entry) count(at time.Time) {
	e.End = time.Unix(0, at.UnixNano()).UTC()
	e.Records++
}

func (e *Entry) data(s Stream, n int) {
	if s == Input {
		e.Input += uint64(n)
	} else {
		e.Output += uint64(n)
	}
}

func (e *Entry) decision(b *Decision) {
	if b.User != "" {
		e.User = e.text(b.User)
	}
	if b.Ticket != "" {
		e.Ticket = e.text(b.Ticket)
	}
	if b.Profile != "" {
		e.Profile = e.text(b.Profile)
	}
	if len(b.Groups) > 0 {
		e.Groups = nil
		for _, g := range b.Groups {
			e.list(&e.Groups, e.text(g), maxNames, true)
		}
	}
}

func (e *Entry) program(file []byte) {
	if len(file) > 0 {
		e.list(&e.Names, e.text(path.Base(string(bytes.ToValidUTF8(file, []byte("?"))))), maxNames, true)
	}
}

// list adds to a list; once says that it holds each text once.
func (e *Entry) list(to *[]string, s string, most int, once bool) {
	switch {
	case once && slices.Contains(*to, s):
	case len(*to) >= most:
		e.More = true
	default:
		*to = append(*to, s)
	}
}

// text is what an entry keeps of a text: as it is in the record, and no more than maxEntryText bytes.
func (e *Entry) text(s string) string {
	if len(s) > 4*maxEntryText {
		s, e.More = s[:4*maxEntryText], true // before it is escaped: it may be megabytes
	}
	if !utf8.ValidString(s) {
		s = escapeInvalid(s)
	}
	if len(s) <= maxEntryText {
		return s
	}
	e.More = true
	n := maxEntryText
	for !utf8.RuneStart(s[n]) {
		n--
	}
	return string([]byte(s[:n])) // a copy: the long one is not held in memory
}

// asked is what a request asks to run, "" if it asks for something else.
func asked(b *Request) string {
	switch b.Type {
	case "shell":
		return "shell"
	case "exec":
		return string(b.Command)
	case "subsystem":
		return "subsystem " + b.Name
	}
	return ""
}

// ClearFields are the names by which Config.IndexClear says what of an entry is kept in the clear beside the least: ID, gate,
// times, and the numbers of records, segments and bytes, which the segments' headers tell as well.
var ClearFields = []string{"user", "groups", "ticket", "profile", "source", "image", "cause", "counters", "commands", "programs", "files", "alerts"}

// clear gives the entry with what may be in the clear alone.
func (e *Entry) clear(fields []string) *Entry {
	c := &Entry{ID: e.ID, Gate: e.Gate, Start: e.Start, End: e.End, Records: e.Records, Segments: e.Segments, Bytes: e.Bytes,
		Last: e.Last, Partial: e.Partial, Clear: true}
	for _, f := range fields {
		switch f {
		case "user":
			c.User = e.User
		case "groups":
			c.Groups = e.Groups
		case "ticket":
			c.Ticket = e.Ticket
		case "profile":
			c.Profile = e.Profile
		case "source":
			c.Source = e.Source
		case "image":
			c.Image, c.Digest = e.Image, e.Digest
		case "cause":
			c.Cause = e.Cause
		case "counters":
			c.Input, c.Output, c.Programs, c.Files, c.Forwards, c.Alerts = e.Input, e.Output, e.Programs, e.Files, e.Forwards, e.Alerts
		case "commands":
			c.Commands = e.Commands
		case "programs":
			c.Names = e.Names
		case "files":
			c.Paths = e.Paths
		case "alerts":
			c.AlertNames = e.AlertNames
		}
	}
	return c
}
