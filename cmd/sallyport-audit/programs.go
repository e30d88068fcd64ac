package main

import (
	"bytes"
	"cmp"
	"context"
	"encoding/hex"
	"fmt"
	"io"
	"net"
	"path"
	"slices"
	"strconv"
	"strings"
	"time"
	"unicode"
	"unicode/utf8"

	"github.com/spf13/cobra"

	"github.com/sallyport/sallyport/auditlog"
)

// Bounds of a tree of programs.
const (
	maxPrograms      = 200_000 // of commands
	maxShownPrograms = 500     // of show, in a channel
	maxDepth         = 24      // levels that are indented
	maxLine          = 4 << 10 // bytes of a program's arguments that are printed
)

// program is an execution, with what became of it.
type program struct {
	exec     *auditlog.ProgramExec
	at       time.Time
	start    *auditlog.ProgramStart
	end      *auditlog.ProgramEnd
	script   *auditlog.Script
	became   *program // what its process executed next, and was seen to start
	again    uint64
	connects []*auditlog.ConnectOut
	children []*program
}

// programs is a tree of what a session, or one channel of it, has executed.
type programs struct {
	limit   int
	byExec  map[uint64]*program
	scripts map[string]*auditlog.Script
	roots   []*program
	loose   []*auditlog.ConnectOut // of no program that is known
	strange []*auditlog.ProgramStart
	outside []*auditlog.Unaudited
	count   int
	kept    int // bytes
	cut     int
}

func newPrograms(limit int) *programs {
	return &programs{limit: limit, byExec: make(map[uint64]*program), scripts: make(map[string]*auditlog.Script)}
}

// add adds a record, if it is one of those.
func (p *programs) add(rec auditlog.Record) bool {
	switch b := rec.Body.(type) {
	case *auditlog.ProgramExec:
		if b.Again > 0 {
			if n := p.byExec[b.Exec]; n != nil {
				n.again += uint64(b.Again)
			}
			return true
		}
		if p.full(b) {
			return true
		}
		n := &program{exec: b, at: timeOf(b.Time, rec.Time), script: p.scripts[string(b.Script)]}
		if by := p.byExec[b.By]; by != nil && b.By != b.Exec {
			by.children = append(by.children, n)
		} else {
			p.roots = append(p.roots, n)
		}
		p.byExec[b.Exec] = n
	case *auditlog.ProgramStart:
		if n := p.byExec[b.Exec]; n != nil && n.start == nil {
			if weight(b) > maxLine && p.full(b) {
				return true
			}
			n.start = b
			if by := p.byExec[n.exec.By]; by != nil && by.exec.PID == n.exec.PID && by.became == nil {
				by.became = n
			}
		} else if !p.full(b) {
			p.strange = append(p.strange, b)
		}
	case *auditlog.ProgramEnd:
		if weight(b) > maxLine && p.full(b) {
			return true
		}
		n := p.byExec[b.Exec]
		if n != nil {
			n.end = b
		}
		// What a process attempted in vain was not its end: that is the program's that it already was.
		for seen := 0; n != nil && n.start == nil && seen < maxDepth; seen++ {
			by := p.byExec[n.exec.By]
			if by == nil || by.exec.PID != b.PID || by.end != nil {
				break
			}
			by.end, n = b, by
		}
	case *auditlog.ConnectOut:
		switch n := p.byExec[b.Exec]; {
		case p.full(b):
		case n != nil:
			n.connects = append(n.connects, b)
		default:
			p.loose = append(p.loose, b)
		}
	case *auditlog.Script:
		s := *b
		s.Data = nil
		if !p.full(&s) {
			p.scripts[string(b.Hash)] = &s
		}
	case *auditlog.Unaudited:
		if !p.full(b) {
			p.outside = append(p.outside, b)
		}
	default:
		return false
	}
	return true
}

// full says whether there is no room for one more, and takes it.
func (p *programs) full(b auditlog.Body) bool {
	n := weight(b)
	if p.count >= p.limit || p.kept+n > maxKept {
		p.cut++
		return true
	}
	p.count++
	p.kept += n
	return false
}

func timeOf(inside, recorded time.Time) time.Time {
	if inside.IsZero() {
		return recorded
	}
	return inside
}

func (p *programs) empty() bool {
	return len(p.roots)+len(p.loose)+len(p.strange)+len(p.outside)+p.cut == 0
}

// insideLine is something that was reported from inside, as it is printed.
type insideLine struct {
	at    time.Time
	depth int
	text  string
	notes []string // what an auditor must not miss, or may not know
}

func (l insideLine) indent() string { return strings.Repeat("  ", min(l.depth, maxDepth)) }

// tell prints the tree.
func (p *programs) tell(w *textWriter, clock func(time.Time) string) {
	for _, l := range p.lines(p.roots, true) {
		at := clock(l.at)
		if day, rest, other := strings.Cut(at, " "); other {
			w.line("  %s", day)
			at = rest
		}
		w.line("  %s  %s%s", at, l.indent(), l.text)
		for _, note := range l.notes {
			w.line("  %12s  %s  ! %s", "", l.indent(), note)
		}
	}
	if p.cut > 0 {
		w.line("  and %d records more: see cat", p.cut)
	}
}

// lines gives the trees below roots, and, with rest, what belongs to no program.
func (p *programs) lines(roots []*program, rest bool) []insideLine {
	var all []insideLine
	if rest {
		for _, u := range p.outside {
			text := fmt.Sprintf("ALERT      pid %d came from outside, and what it does is not reported: %s", u.PID, commandLine(u.Args, false))
			all = append(all, insideLine{at: u.Time, text: text})
		}
	}
	all = appendPrograms(all, roots, nil, 0)
	if rest {
		for _, s := range p.strange {
			text := fmt.Sprintf("pid %d is %s: %s", s.PID, clean(string(s.File)), commandLine(s.Args, s.Count > uint32(len(s.Args))))
			all = append(all, insideLine{at: s.Time, text: text})
		}
		for _, c := range p.loose {
			all = append(all, insideLine{at: c.Time, text: clean(string(c.Program)) + ": " + connectText(c)})
		}
	}
	return all
}

func (t *tool) clock(at time.Time) string {
	if t.utc {
		return at.UTC().Format("15:04:05.000")
	}
	return at.Local().Format("15:04:05.000")
}

// clockFrom gives the clock's time of moments that come one after the other, with the day where it is another than that of the one
// before; start is what comes before the first.
func (t *tool) clockFrom(start time.Time) func(at time.Time) string {
	zone := t.zone()
	last := start.In(zone).Format(time.DateOnly)
	return func(at time.Time) string {
		day := at.In(zone).Format(time.DateOnly)
		if day == last || start.IsZero() {
			return t.clock(at)
		}
		last = day
		return day + " " + t.clock(at)
	}
}

// appendPrograms adds programs that have the same parent, whose directory that is, with all below them.
func appendPrograms(all []insideLine, programs []*program, dir []byte, depth int) []insideLine {
	missed := 0
	for i, n := range programs {
		// The search along PATH: the same, tried in one directory after the other.
		if i+1 < len(programs) && n.searches(programs[i+1]) {
			missed++
			continue
		}
		all = append(all, insideLine{at: n.at, depth: depth, text: n.command() + "  [" + n.fate(dir, missed) + "]", notes: n.notes()})
		dir, missed = n.exec.Dir, 0
		for _, c := range n.connects {
			all = append(all, insideLine{at: c.Time, depth: depth + 1, text: "> " + connectText(c)})
		}
		all = appendPrograms(all, n.children, dir, depth+1)
	}
	return all
}

// searches says that n came to nothing, and that next is the same with the file in another place.
func (n *program) searches(next *program) bool {
	return n.start == nil && n.exec.PID == next.exec.PID && len(n.children)+len(n.connects)+len(n.exec.Script) == 0 && n.again == 0 &&
		n.exec.Error == "" && path.Base(string(n.exec.Path)) == path.Base(string(next.exec.Path)) &&
		slices.EqualFunc(n.exec.Args, next.exec.Args, bytes.Equal)
}

func (n *program) command() string {
	if len(n.exec.Args) == 0 {
		return quote(n.exec.Path)
	}
	return commandLine(n.exec.Args, int(n.exec.Count) > len(n.exec.Args) || len(n.exec.Hash) > 0)
}

// fate says in a few words what was executed where, if that is not dir, and what became of it.
func (n *program) fate(dir []byte, missed int) string {
	var parts []string
	if file := n.file(); file != "" {
		parts = append(parts, file)
	}
	if len(n.exec.Dir) > 0 && !bytes.Equal(n.exec.Dir, dir) {
		parts = append(parts, "in "+quote(n.exec.Dir))
	}
	if n.start == nil {
		parts = append(parts, "attempted")
	}
	if missed > 0 {
		parts = append(parts, fmt.Sprintf("not in %d other places", missed))
	}
	ended := time.Time{}
	switch {
	case n.end == nil && n.became != nil:
		parts, ended = append(parts, "became the next one"), n.became.at
	case n.end == nil && n.start == nil:
	case n.end == nil:
		parts = append(parts, "no end")
	case n.end.Signal != "":
		parts, ended = append(parts, "signal "+clean(n.end.Signal)), n.end.Time
	default:
		parts, ended = append(parts, "exit "+strconv.Itoa(int(n.end.Code))), n.end.Time
	}
	if ended.After(n.at) {
		parts = append(parts, ended.Sub(n.at).Round(time.Millisecond).String())
	}
	if n.again > 0 {
		parts = append(parts, fmt.Sprintf("%d times", n.again+1))
	}
	return strings.Join(append(parts, "pid "+strconv.FormatInt(n.exec.PID, 10)), ", ")
}

// systemDirs are where an image has its programs. Their names tell what they are, as far as the image is to be trusted.
var systemDirs = []string{"/bin/", "/sbin/", "/usr/bin/", "/usr/sbin/", "/usr/local/bin/", "/usr/local/sbin/"}

// file is the file that runs, or was asked for, where the arguments would let one think of another. What a script led to is
// in the notes.
func (n *program) file() string {
	file := n.exec.Path
	if s := n.start; s != nil && len(n.exec.Script) == 0 && len(s.File) > 0 {
		if file = s.File; len(s.Image) > 0 {
			return ""
		}
	}
	if len(file) == 0 || len(n.exec.Args) == 0 || bytes.Equal(file, n.exec.Args[0]) {
		return ""
	}
	if n.exec.By == 0 && string(n.exec.Path) == "/proc/self/exe" {
		return "the agent's own sftp server"
	}
	name, base := strings.TrimPrefix(path.Base(string(n.exec.Args[0])), "-"), path.Base(string(file))
	system := slices.ContainsFunc(systemDirs, func(dir string) bool { return path.Dir(string(file))+"/" == dir })
	// vim is vim.basic, python3 is python3.11, and sh some shell.
	if system && (strings.HasPrefix(base, name) || name == "sh" && strings.HasSuffix(base, "sh")) {
		return ""
	}
	return "file " + quote(file)
}

// notes are what an auditor must not miss.
func (n *program) notes() []string {
	var notes []string
	e := n.exec
	if e.Error != "" {
		notes = append(notes, "not known: not all was read: "+clean(e.Error))
	}
	if e.Call != "" {
		notes = append(notes, "by "+clean(e.Call)+" of "+quote(e.Path))
	}
	if len(e.Hash) > 0 {
		notes = append(notes, fmt.Sprintf("%d arguments of %d bytes in all, SHA-256 %s", e.Count, e.Bytes, hex.EncodeToString(e.Hash)))
	}
	if len(e.Script) > 0 {
		text := "script, SHA-256 " + hex.EncodeToString(e.Script)
		if n.script != nil {
			text += ", " + size(uint64(max(n.script.Size, 0)))
		}
		notes = append(notes, text)
	}
	if s := n.start; s != nil && s.Differ {
		text := "run as: "
		if len(e.Script) == 0 && e.Error == "" {
			text = "CHANGED before it ran: "
		}
		notes = append(notes, text+commandLine(s.Args, len(s.Hash) > 0)+" ("+quote(s.File)+")")
	}
	if s := n.start; s != nil && len(s.Image) > 0 {
		notes = append(notes, "a file without a name: "+quote(s.File)+", SHA-256 "+hex.EncodeToString(s.Image))
	}
	return notes
}

func connectText(c *auditlog.ConnectOut) string {
	text := clean(c.Call) + " " + clean(net.JoinHostPort(c.Address, strconv.Itoa(int(c.Port)))) + " (claimed)"
	if c.Error != "" {
		text = clean(c.Call) + " to an address that could not be read: " + clean(c.Error)
	}
	if c.Again > 0 {
		text = fmt.Sprintf("%s, %d times more", text, c.Again)
	}
	return text
}

// commandLine writes arguments as one would type them.
func commandLine(args [][]byte, more bool) string {
	var b strings.Builder
	for i, a := range args {
		if i > 0 {
			b.WriteByte(' ')
		}
		if b.Len()+len(a) > maxLine {
			a, more = a[:max(0, min(len(a), maxLine-b.Len()))], true
		}
		b.WriteString(quote(a))
		if b.Len() >= maxLine {
			break
		}
	}
	if more {
		b.WriteString(" ...")
	}
	return b.String()
}

// quote makes an argument safe to print and, if it has something special, stands it in quotes.
func quote(a []byte) string {
	plain := len(a) > 0 && utf8.Valid(a)
	for _, r := range string(a) {
		plain = plain && (unicode.IsLetter(r) || unicode.IsDigit(r) || strings.ContainsRune("%+,-./:=@_", r))
	}
	if plain {
		return clean(string(a))
	}
	return "'" + strings.ReplaceAll(clean(string(a)), "'", `'\''`) + "'"
}

func (t *tool) commandsCommand() *cobra.Command {
	return &cobra.Command{
		Use: "commands ID", Short: "Print the programs that a session has executed", Args: cobra.ExactArgs(1),
		Long: `Print the programs that a session has executed, as a tree: each below the program that started it, with its time, how it ended,
how long it took, its process's number, and the addresses that it wanted to reach.

All this is reported from inside the sandbox, by the agent: the gate has not seen it. "attempted" is a program that was not seen
to start: its file may not have been there. "became the next one" is a program in whose process another was executed in its
place. "file" is there where the arguments would let one think of another file, "in" where the directory is not that of the program
before it. What a shell or an interpreter does by itself is no program of its own, and is not known: see docs/what-is-recorded.md.`,
		Example: `  sallyport-audit commands latest
  sallyport-audit commands 01JD -o json`,
		ValidArgsFunction: t.completeSessions,
		RunE: func(c *cobra.Command, args []string) error {
			return t.paged(c, func(out io.Writer) error { return t.commands(c.Context(), args[0], out) })
		},
	}
}

func (t *tool) commands(ctx context.Context, id string, out io.Writer) error {
	return t.withSession(ctx, id, func(_ auditlog.Source, r *auditlog.SessionReader) error {
		var s summary
		audit := ""
		all := newPrograms(maxPrograms)
		channels := make(map[uint64]uint32)
		for rec := range r.Records(ctx) {
			s.add(rec)
			switch b := rec.Body.(type) {
			case *auditlog.Sandbox:
				audit = b.ExecAudit
			case *auditlog.ProgramExec:
				if b.Again == 0 && len(channels) < maxPrograms {
					channels[b.Exec] = rec.Channel
				}
			}
			all.add(rec)
		}
		if err := context.Cause(ctx); err != nil {
			return err
		}
		rep := r.Report()
		var err error
		if t.output == "json" {
			err = printJSON(out, struct {
				ID        string         `json:"id"`
				User      string         `json:"user,omitempty"`
				State     auditlog.State `json:"state"`
				ExecAudit string         `json:"exec_audit"`
				Programs  []jsonProgram  `json:"programs"`
				Unaudited []any          `json:"unaudited,omitempty"`
				Strange   []any          `json:"starts_of_nothing_known,omitempty"`
				Loose     []any          `json:"connects_of_nothing_known,omitempty"`
				Cut       int            `json:"more_records,omitempty"`
				Unread    uint64         `json:"unread_records,omitempty"` // for want of an identity
			}{rep.ID, s.User, rep.State, audit, jsonPrograms(all.roots, func(exec uint64) uint32 { return channels[exec] }, 0), bodies(all.outside), bodies(all.strange), bodies(all.loose), all.cut, rep.Unread})
		} else {
			w := &textWriter{w: out}
			w.line("session %s: %s", rep.ID, rep.State)
			w.field("user", s.User)
			w.field("began", t.time(rep.Start))
			clock := t.clockFrom(rep.Start)
			w.field("not shown", unreadText(rep))
			if audit != "" || rep.Unread == 0 {
				w.field("programs", map[bool]string{true: "not reported", false: "reported from inside"}[audit == "" || strings.HasPrefix(audit, "off")], audit)
			}
			// One channel after the other, in the order of their first programs.
			for len(all.roots) > 0 {
				channel := channels[all.roots[0].exec.Exec]
				w.line("")
				w.line("channel %d", channel)
				own := newPrograms(0)
				all.roots = slices.DeleteFunc(all.roots, func(n *program) bool {
					if channels[n.exec.Exec] != channel {
						return false
					}
					own.roots = append(own.roots, n)
					return true
				})
				own.tell(w, clock)
			}
			all.tell(w, clock)
			for _, p := range rep.Problems {
				w.line("%s: %s", rep.State, clean(p.String()))
			}
			err = w.err
		}
		return cmp.Or(err, verdict(rep.State))
	})
}

// jsonProgram is a program as JSON.
type jsonProgram struct {
	Channel  uint32               `json:"channel"`
	Exec     any                  `json:"exec"`
	Start    any                  `json:"start,omitempty"`
	End      *auditlog.ProgramEnd `json:"end,omitempty"`
	Again    uint64               `json:"again,omitempty"`
	Connects []any                `json:"connects,omitempty"`
	Children []jsonProgram        `json:"children,omitempty"`
}

// maxJSONDepth bounds the nesting: a chain of programs may be as long as the log. Deeper ones stand beside each other.
const maxJSONDepth = 500

func jsonPrograms(all []*program, channel func(exec uint64) uint32, depth int) []jsonProgram {
	out := make([]jsonProgram, 0, len(all))
	for _, n := range all {
		j := jsonProgram{Channel: channel(n.exec.Exec), Exec: jsonBody(n.exec), End: n.end, Again: n.again, Connects: bodies(n.connects)}
		if n.start != nil {
			j.Start = jsonBody(n.start)
		}
		below := jsonPrograms(n.children, channel, depth+1)
		if depth < maxJSONDepth {
			j.Children, below = below, nil
		}
		out = append(append(out, j), below...)
	}
	return out
}

func bodies[B auditlog.Body](all []B) []any {
	var out []any
	for _, b := range all {
		out = append(out, jsonBody(b))
	}
	return out
}

// jsonBody is the JSON form of a body that holds bytes: text where they are that; hashes in hexadecimal.
func jsonBody(body auditlog.Body) any {
	switch b := body.(type) { // the outer field of a name hides the embedded one
	case *auditlog.ProgramExec:
		return struct {
			*auditlog.ProgramExec
			Path   *jsonBytes   `json:"path,omitempty"`
			Dir    *jsonBytes   `json:"dir,omitempty"`
			Args   []*jsonBytes `json:"args,omitempty"`
			Hash   string       `json:"arg_sha256,omitempty"`
			Script string       `json:"script_sha256,omitempty"`
		}{b, newBytes(b.Path), newBytes(b.Dir), listBytes(b.Args), hex.EncodeToString(b.Hash), hex.EncodeToString(b.Script)}
	case *auditlog.ProgramStart:
		return struct {
			*auditlog.ProgramStart
			File  *jsonBytes   `json:"file,omitempty"`
			Args  []*jsonBytes `json:"args,omitempty"`
			Hash  string       `json:"arg_sha256,omitempty"`
			Image string       `json:"image_sha256,omitempty"`
		}{b, newBytes(b.File), listBytes(b.Args), hex.EncodeToString(b.Hash), hex.EncodeToString(b.Image)}
	case *auditlog.ConnectOut:
		return struct {
			*auditlog.ConnectOut
			Program *jsonBytes `json:"program,omitempty"`
		}{b, newBytes(b.Program)}
	case *auditlog.Script:
		return struct {
			*auditlog.Script
			Hash string     `json:"sha256"`
			Path *jsonBytes `json:"path,omitempty"`
			Data *jsonBytes `json:"data,omitempty"`
		}{b, hex.EncodeToString(b.Hash), newBytes(b.Path), newBytes(b.Data)}
	case *auditlog.Unaudited:
		return struct {
			*auditlog.Unaudited
			File *jsonBytes   `json:"file,omitempty"`
			Args []*jsonBytes `json:"args,omitempty"`
		}{b, newBytes(b.File), listBytes(b.Args)}
	}
	return body
}

func listBytes(list [][]byte) []*jsonBytes {
	var out []*jsonBytes
	for _, b := range list {
		if j := newBytes(b); j != nil {
			out = append(out, j)
		} else {
			out = append(out, &jsonBytes{Text: new(string)})
		}
	}
	return out
}
