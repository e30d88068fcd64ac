package main

import (
	"bytes"
	"cmp"
	"context"
	"crypto/sha256"
	"encoding/hex"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"time"

	"github.com/spf13/cobra"

	"github.com/sallyport/sallyport/auditlog"
)

// transferWord says in a word what a transfer was.
func transferWord(b *auditlog.Transfer) string {
	if b.Op != "file" {
		return b.Op
	}
	const read, write = 1, 2 // draft-ietf-secsh-filexfer-02, section 6.3
	switch {
	case b.Written != nil && b.Read != nil:
		return "both ways"
	case b.Written != nil, b.Read == nil && b.Flags&(read|write) == write:
		return "upload"
	case b.Read != nil, b.Flags&read != 0:
		return "download"
	}
	return b.Op
}

// transferPath is the path that counts: as resolved, if it was.
func transferPath(b *auditlog.Transfer) string {
	p := string(b.Path)
	if len(b.Resolved) > 0 {
		p = string(b.Resolved)
	}
	if len(b.Name) > 0 {
		p += ": " + string(b.Name) // what scp means by it is not known
	}
	return p
}

func transferTarget(b *auditlog.Transfer) string {
	if len(b.TargetResolved) > 0 {
		return string(b.TargetResolved)
	}
	return string(b.Target)
}

// transferResult is how it ended.
func transferResult(b *auditlog.Transfer) string {
	var r string
	switch {
	case b.Op == "undecodable":
		r = b.Detail
	case b.Denied:
		r = "denied by the gate: " + b.Message
	case b.Status != 0:
		r = fmt.Sprintf("failed (%d): %s", b.Status, b.Message)
	default:
		r = "ok"
	}
	if b.Unfinished {
		r += ", unfinished"
	}
	return r
}

// flow gives the one that counts, and its bytes.
func transferFlow(b *auditlog.Transfer) *auditlog.TransferFlow {
	if b.Written != nil {
		return b.Written
	}
	return b.Read
}

// flowBytes is how much there is of a flow, each byte counted once where that is known, and what else is to be said of it.
func flowBytes(f *auditlog.TransferFlow) (n uint64, note string) {
	switch n, ok := f.Length(); {
	case ok && n < f.Bytes:
		return n, size(f.Bytes-n) + " of that again"
	case !ok && f.Bytes > 0:
		return f.Bytes, "in parts"
	}
	return f.Bytes, ""
}

// hashText is a flow's hash, with what it is of.
func hashText(f *auditlog.TransferFlow) string {
	switch {
	case f == nil || f.SHA256 == nil:
		return ""
	case !f.Whole:
		return "sha256 of these bytes " + hex.EncodeToString(f.SHA256)
	}
	return "sha256 " + hex.EncodeToString(f.SHA256)
}

// tellTransfer prints a transfer of a channel.
func (w *textWriter) tellTransfer(b *auditlog.Transfer) {
	note := []string{transferPath(b)}
	if asked := string(b.Path); len(b.Resolved) > 0 && asked != string(b.Resolved) {
		note = append(note, "asked as "+asked)
	}
	if t := transferTarget(b); t != "" {
		note = append(note, "to "+t)
	}
	for i, f := range []*auditlog.TransferFlow{b.Written, b.Read} {
		if f == nil || b.Op == "list" {
			continue
		}
		word := ""
		if b.Read != nil && b.Written != nil {
			word = []string{"written ", "read "}[i]
		}
		n, how := flowBytes(f)
		note = append(note, word+size(n), how)
		note = append(note, hashText(f))
	}
	if b.Op == "list" {
		note = append(note, fmt.Sprintf("%d names", b.Names))
	}
	w.field(transferWord(b), append(note, transferResult(b))...)
}

// jsonTransfer is a transfer with paths as text and hashes in hexadecimal.
type jsonTransfer struct {
	*auditlog.Transfer
	Path           *jsonBytes `json:"path,omitempty"` // the outer field of a name hides the embedded one
	Resolved       *jsonBytes `json:"resolved,omitempty"`
	Target         *jsonBytes `json:"target,omitempty"`
	TargetResolved *jsonBytes `json:"target_resolved,omitempty"`
	Name           *jsonBytes `json:"name,omitempty"`
	Read           *jsonFlow  `json:"read,omitempty"`
	Written        *jsonFlow  `json:"written,omitempty"`
	Stream         string     `json:"stream,omitempty"`
}

type jsonFlow struct {
	*auditlog.TransferFlow
	SHA256 string `json:"sha256,omitempty"`
}

func newFlow(f *auditlog.TransferFlow) *jsonFlow {
	if f == nil {
		return nil
	}
	return &jsonFlow{f, hex.EncodeToString(f.SHA256)}
}

func newTransfer(b *auditlog.Transfer) jsonTransfer {
	t := jsonTransfer{Transfer: b, Path: newBytes(b.Path), Resolved: newBytes(b.Resolved), Target: newBytes(b.Target),
		TargetResolved: newBytes(b.TargetResolved), Name: newBytes(b.Name), Read: newFlow(b.Read), Written: newFlow(b.Written)}
	if b.Op == "undecodable" {
		t.Stream = streamName(b.Stream)
	}
	return t
}

func (t *tool) filesCommand() *cobra.Command {
	var s selection
	c := &cobra.Command{
		Use: "files [ID]", Short: "List transferred files, of all sessions or of one", Args: cobra.MaximumNArgs(1),
		Long: `List what sftp and scp transferred, as the gate saw it pass: of all sessions, of those that the flags choose, or of one. Paths are
as the sandbox resolved them. A hash is of the whole file, or of the bytes that passed where that is said. What other programs carried
(cat, tar, rsync) is not here: see show.`,
		Example: `  sallyport-audit files latest
  sallyport-audit files --since 1w --user 'ext-*'
  sallyport-audit files --has-file .csv -o json`,
		ValidArgsFunction: t.completeSessions,
		RunE: func(c *cobra.Command, args []string) error {
			if err := cmp.Or(notBoth(c.Flags(), oneOrMany(args), "has-file"), s.prepare(time.Now(), t.zone())); err != nil {
				return err
			}
			return t.paged(c, func(out io.Writer) error { return t.files(c.Context(), oneOrMany(args), &s, out) })
		},
	}
	s.flags(c.Flags())
	return c
}

// listedFile is a line of files, as JSON.
type listedFile struct {
	Session string       `json:"session"`
	User    string       `json:"user"`
	Ticket  string       `json:"ticket,omitempty"`
	Channel uint32       `json:"channel"`
	Time    time.Time    `json:"time"`
	What    string       `json:"what"`
	Result  string       `json:"result"`
	File    jsonTransfer `json:"transfer"`
}

func (t *tool) files(ctx context.Context, id string, s *selection, out io.Writer) error {
	l, err := t.openLogs("")
	if err != nil {
		return err
	}
	defer l.Close()
	var w *table
	if t.output == "text" {
		w = newTable(out, styleOf(out), -1, "TIME", "SESSION", "USER", "WHAT", "PATH", "BYTES", "RESULT", "SHA256")
	}
	// A session is read once to choose it, and again for its files: they may be more than there is memory for.
	one := func(log auditlog.Stored, m *summary) error {
		r := l.reader(log)
		defer l.count(r, m)
		return t.sessionFiles(ctx, r, s.file, w, out)
	}
	if id != "" {
		log, err := find(ctx, l, id)
		if err == nil {
			err = one(log, nil)
		}
		if err != nil {
			return err
		}
	} else if err := l.summarizeAll(ctx, s.logs(ctx, l.source), s, one); err != nil {
		return err
	}
	if w != nil {
		if err := w.flush(); err != nil {
			return err
		}
	}
	return context.Cause(ctx)
}

// maxShown is how much is repeated, of a session's user and ticket with each of its files and of a transfer's own fields, in
// characters: a gate writes no more.
const maxShown = 1024

func (t *tool) sessionFiles(ctx context.Context, r *auditlog.SessionReader, pattern string, w *table, out io.Writer) error {
	s := summary{}
	for rec := range r.Records(ctx) {
		s.add(rec)
		b, ok := rec.Body.(*auditlog.Transfer)
		if !ok || pattern != "" && !slices.ContainsFunc(fileTexts(b), func(p []byte) bool { return contains(pattern, string(p)) }) {
			continue
		}
		id := r.Report().ID
		if w == nil {
			if err := printJSON(out, listedFile{Session: id, User: short(s.User, maxShown), Ticket: short(s.Ticket, maxShown), Channel: rec.Channel, Time: rec.Time,
				What: short(transferWord(b), maxShown), Result: short(transferResult(b), maxShown), File: newTransfer(b)}); err != nil {
				return err
			}
			continue
		}
		path := transferPath(b)
		if target := transferTarget(b); target != "" {
			path += " to " + target
		}
		bytes, hash, result := "-", "-", transferResult(b)
		if f := transferFlow(b); f != nil && b.Op != "list" {
			n, how := flowBytes(f)
			if bytes = fmt.Sprint(n); how != "" {
				result += ", " + how
			}
			if f.SHA256 != nil {
				hash = hex.EncodeToString(f.SHA256)
				if !f.Whole {
					hash += " (of these bytes)"
				}
			}
		}
		w.row(t.time(rec.Time), id, dash(clean(s.User)), clean(transferWord(b)), dash(clean(bounded(path))), bytes, clean(bounded(result)), hash)
		if w.err != nil {
			return w.err
		}
	}
	return context.Cause(ctx)
}

// extraction says what of which file is wanted.
type extraction struct {
	to      string
	stream  string
	partial bool
}

func (t *tool) extractCommand() *cobra.Command {
	var e extraction
	c := &cobra.Command{
		Use: "extract ID PATH", Short: "Give back a transferred file's content", Args: cobra.ExactArgs(2),
		Long: `Give back the content of a file that was transferred in a session, and check it against the recorded hash. PATH is the path as
asked or as resolved (for scp, the file's name will do too); of several transfers the last that has content counts. The profile must have
said to keep content (transfer.content: full); what is beyond its limits is not there.`,
		Example: `  sallyport-audit extract latest /home/sandbox/report.csv --out report.csv
  sallyport-audit extract 01JD report.csv --stream output | sha256sum`,
		ValidArgsFunction: t.completeSessions,
		RunE: func(c *cobra.Command, args []string) error {
			return t.extract(c.Context(), args[0], args[1], e, c.OutOrStdout())
		},
	}
	c.Flags().StringVar(&e.to, "out", "", "write to this file, which must not be there yet (default: standard output)")
	c.Flags().StringVar(&e.stream, "stream", "", "input for what was written, output for what was read (default: what there is)")
	c.Flags().BoolVar(&e.partial, "partial", false, "write what was kept where that is not all")
	return c
}

// contentKey names a file's content in a session.
type contentKey struct {
	channel uint32
	id      uint64
	stream  auditlog.Stream
}

func (t *tool) extract(ctx context.Context, id, path string, e extraction, out io.Writer) (err error) {
	if e.stream != "" && e.stream != "input" && e.stream != "output" {
		return fmt.Errorf("--stream %q: want input or output", e.stream)
	}
	src, err := t.open("")
	if err != nil {
		return err
	}
	defer src.Close()
	keys, err := t.keys()
	if err != nil {
		return err
	}
	log, err := find(ctx, src, id)
	if err != nil {
		return err
	}
	records := func(f func(rec auditlog.Record) error) error {
		r, err := t.reader(src, log, keys...)
		if err != nil {
			return err
		}
		for rec := range r.Records(ctx) {
			if err := f(rec); err != nil {
				return err
			}
		}
		if err := context.Cause(ctx); err != nil {
			return err
		}
		t.countUnread(r.Report())
		if err := verdict(r.Report().State); err != nil && !e.partial {
			t.damage.add(r.Report())
			return err
		}
		return nil
	}
	key, flow, err := wanted(records, path, e.stream)
	if err != nil {
		return err
	}
	want := flow.Bytes
	if n, ok := flow.Length(); ok {
		want = n // what was read again may be in no record, and is not asked for
	}
	if flow.Kept < want && !e.partial {
		return fmt.Errorf("%s: %d of %d bytes were kept; --partial writes those", clean(path), flow.Kept, want)
	}
	dir := ""
	if e.to != "" {
		dir = filepath.Dir(e.to)
	}
	temp, err := os.CreateTemp(dir, ".extract-*")
	if err != nil {
		return err
	}
	defer func() {
		temp.Close()
		if rerr := os.Remove(temp.Name()); rerr != nil && !errors.Is(rerr, os.ErrNotExist) {
			err = errors.Join(err, rerr)
		}
	}()
	if err := gather(records, key, temp); err != nil {
		return err
	}
	if err := checkContent(temp, flow); err != nil && !e.partial {
		return fmt.Errorf("%s: %w", clean(path), err)
	}
	if e.to != "" {
		return keep(temp, e.to)
	}
	if _, err := temp.Seek(0, io.SeekStart); err != nil {
		return err
	}
	_, err = io.Copy(out, temp)
	return err
}

// keep gives a temporary file its name, never another file's.
func keep(temp *os.File, name string) error {
	err := os.Link(temp.Name(), name)
	if err == nil {
		return nil
	}
	if _, there := os.Lstat(name); there == nil {
		return fmt.Errorf("--out %s: is there already: choose another name", clean(name))
	}
	// A file system without links, as of a USB stick.
	to, cerr := os.OpenFile(name, os.O_WRONLY|os.O_CREATE|os.O_EXCL, 0o600)
	if cerr != nil {
		return cerr
	}
	if _, err = temp.Seek(0, io.SeekStart); err == nil {
		_, err = io.Copy(to, temp)
	}
	if err = errors.Join(err, to.Close()); err != nil {
		return errors.Join(err, os.Remove(name))
	}
	return nil
}

// wanted finds the last transfer of a path that has content, or else the last.
func wanted(records func(func(auditlog.Record) error) error, path, stream string) (key contentKey, flow *auditlog.TransferFlow, err error) {
	err = records(func(rec auditlog.Record) error {
		b, ok := rec.Body.(*auditlog.Transfer)
		if !ok || b.Op != "file" || path != string(b.Path) && path != string(b.Resolved) && path != string(b.Name) && path != transferPath(b) {
			return nil
		}
		for i, f := range []*auditlog.TransferFlow{b.Written, b.Read} { // as auditlog.Input and auditlog.Output are numbered
			if f == nil || stream != "" && stream != streamName(auditlog.Stream(i)) {
				continue
			}
			if flow == nil || f.Kept > 0 || flow.Kept == 0 {
				key, flow = contentKey{rec.Channel, b.ID, auditlog.Stream(i)}, f
			}
		}
		return nil
	})
	switch {
	case err != nil:
	case flow == nil:
		err = fmt.Errorf("%s: no such file was transferred; see files", clean(path))
	case flow.Kept == 0 && flow.Bytes > 0:
		err = fmt.Errorf("%s: its content was not kept, only %s", clean(path), cmp.Or(hashText(flow), "that it passed"))
	}
	return key, flow, err
}

// gather writes a file's content. Parts that were kept before under the same hash are found in a second reading.
func gather(records func(func(auditlog.Record) error) error, key contentKey, to io.WriterAt) error {
	again := make(map[string][]uint64) // offsets by hash
	write := func(b *auditlog.Content, at uint64) error {
		sum := sha256.Sum256(b.Data)
		if !bytes.Equal(sum[:], b.SHA256) {
			return fmt.Errorf("content at %d does not have its hash", b.Offset)
		}
		_, err := to.WriteAt(b.Data, int64(at))
		return err
	}
	err := records(func(rec auditlog.Record) error {
		b, ok := rec.Body.(*auditlog.Content)
		if !ok || (contentKey{rec.Channel, b.ID, b.Stream}) != key {
			return nil
		}
		if b.Offset > 1<<62 {
			return fmt.Errorf("content at %d: no file is so long", b.Offset)
		}
		if len(b.Data) == 0 {
			again[string(b.SHA256)] = append(again[string(b.SHA256)], b.Offset)
			return nil
		}
		return write(b, b.Offset)
	})
	if err != nil || len(again) == 0 {
		return err
	}
	err = records(func(rec auditlog.Record) error {
		b, ok := rec.Body.(*auditlog.Content)
		if !ok || len(b.Data) == 0 {
			return nil
		}
		for _, at := range again[string(b.SHA256)] {
			if err := write(b, at); err != nil {
				return err
			}
		}
		delete(again, string(b.SHA256))
		return nil
	})
	if err == nil && len(again) > 0 {
		err = errors.New("a part of its content is nowhere in the session")
	}
	return err
}

// checkContent holds a file against what was recorded of it.
func checkContent(f *os.File, flow *auditlog.TransferFlow) error {
	length, ok := flow.Length()
	if !ok {
		return nil // there is no hash; the parts have theirs
	}
	h := sha256.New()
	n, err := io.Copy(h, io.NewSectionReader(f, 0, 1<<62))
	if err != nil {
		return err
	}
	if uint64(n) != length || flow.SHA256 != nil && !bytes.Equal(h.Sum(nil), flow.SHA256) {
		return fmt.Errorf("what was kept (%d bytes, sha256 %x) is not what passed (%d bytes, %s)", n, h.Sum(nil), length,
			strings.TrimPrefix(hashText(flow), "sha256 "))
	}
	return nil
}
