package sshserver

import (
	"crypto/sha256"
	"errors"
	"fmt"
	"hash"
	"io"
	"path"
	"slices"
	"strings"
	"sync"
	"time"

	"github.com/sallyport/sallyport/auditlog"
	"github.com/sallyport/sallyport/auditlog/transfer"
	"github.com/sallyport/sallyport/authz"
	"github.com/sallyport/sallyport/backends"
)

const (
	// contentFile and contentSession are how much is kept of a file's and of all files' content, if the profile says no more
	// than that content is kept.
	contentFile    = 16 << 20
	contentSession = 256 << 20

	// contentBlock is the unit in which content is kept, and recognised when it comes again.
	contentBlock = 64 << 10

	// contentKnown bounds the blocks of a session that are recognised: a gibibyte of content.
	contentKnown = 16 << 10

	// contentTimeout is how long a server that says nothing at all may leave the gate's own question unanswered.
	contentTimeout = 30 * time.Second
)

// transferRules are a profile's words on file transfers, read.
type transferRules struct {
	denyUpload, denyDownload bool
	denyPaths                [][]string // patterns by component
	maxSize                  uint64     // 0: none
	mode                     transfer.ContentMode
	file, session            uint64 // bytes of content that are kept
	raw                      bool
}

func readTransferRules(t *authz.Transfer) (transferRules, error) {
	r := transferRules{file: contentFile, session: contentSession}
	if t == nil {
		return r, nil
	}
	r.denyUpload, r.denyDownload, r.raw = t.DenyUpload, t.DenyDownload, t.Raw
	for _, p := range t.DenyPaths {
		parts := components(p)
		for _, part := range parts {
			if _, err := path.Match(part, ""); err != nil || !path.IsAbs(p) {
				return r, fmt.Errorf("deny_paths: %q is no absolute path or pattern", p)
			}
		}
		r.denyPaths = append(r.denyPaths, parts)
	}
	for _, s := range []struct {
		name, from string
		to         *uint64
	}{{"max_size", t.MaxSize, &r.maxSize}, {"content_file", t.ContentFile, &r.file}, {"content_session", t.ContentSession, &r.session}} {
		if s.from == "" {
			continue
		}
		n, err := parseSize(s.from)
		if err != nil {
			return r, fmt.Errorf("%s: %w", s.name, err)
		}
		*s.to = uint64(n)
	}
	switch t.Content {
	case "", "hash":
	case "full":
		r.mode = transfer.ContentFull
	case "none":
		r.mode = transfer.ContentNone
	default:
		return r, fmt.Errorf("content: %q is none of hash, full, none", t.Content)
	}
	return r, nil
}

// any says whether there is something to be refused.
func (r *transferRules) any() bool {
	return r.denyUpload || r.denyDownload || len(r.denyPaths) > 0 || r.maxSize > 0
}

// decide answers a decoder's question. The text is for the client.
func (r *transferRules) decide(op *transfer.Op) transfer.Verdict {
	changes := op.Write || op.Kind != transfer.File && op.Kind != transfer.List
	switch {
	case r.denyUpload && changes:
		return transfer.Verdict{Deny: "uploads and changes are not permitted"}
	case r.denyDownload && op.Kind == transfer.File && op.Read:
		return transfer.Verdict{Deny: "downloads are not permitted"}
	case r.denied(op.Path, op.Kind), op.Kind != transfer.Symlink && r.denied(op.Target, op.Kind):
		return transfer.Verdict{Deny: "this path is not permitted"}
	}
	return transfer.Verdict{MaxSize: r.maxSize}
}

func (r *transferRules) denied(p transfer.Path, kind transfer.Kind) bool {
	name := p.Resolved
	if name == "" {
		name = p.Asked
	}
	if name == "" {
		return false
	}
	parts := components(name)
	for _, pattern := range r.denyPaths {
		// Who renames a directory moves what is below it.
		if covers(pattern, parts) || kind == transfer.Rename && above(pattern, parts) {
			return true
		}
	}
	return false
}

// scp says why a legacy scp is refused before it runs, or "". It resolves no links, so rules about paths would be none.
func (r *transferRules) scp(cmd transfer.SCPCommand) string {
	switch {
	case r.denyUpload && cmd.Sink:
		return "uploads are not permitted"
	case r.denyDownload && !cmd.Sink:
		return "downloads are not permitted"
	case len(r.denyPaths) > 0:
		return "scp's old protocol is not permitted here: use sftp, or scp without -O"
	}
	return ""
}

// components splits a path or pattern.
func components(p string) []string {
	p = strings.Trim(path.Clean("/"+p), "/")
	if p == "" {
		return nil
	}
	return strings.Split(p, "/")
}

// covers says whether a pattern means the path or a directory above it. ** stands for any number of components, none too;
// within one, * and the rest are path.Match's. It takes time in proportion to both lengths: the path is a client's.
func covers(pattern, name []string) bool {
	at := make([]bool, len(name)+1) // where in name the pattern so far may have ended
	at[0] = true
	for _, part := range pattern {
		for i := len(name); i >= 0 && part != "**"; i-- {
			at[i] = false
			if i > 0 && at[i-1] {
				at[i], _ = path.Match(part, name[i-1]) // a bad pattern was refused
			}
		}
		for i := 1; i <= len(name) && part == "**"; i++ {
			at[i] = at[i] || at[i-1]
		}
	}
	return slices.Contains(at, true)
}

// above says whether what a pattern means can lie below the path.
func above(pattern, name []string) bool {
	switch {
	case len(pattern) == 0 || len(name) == 0 || pattern[0] == "**":
		return true
	}
	ok, _ := path.Match(pattern[0], name[0])
	return ok && above(pattern[1:], name[1:])
}

// decoder is what transfer.SFTP and transfer.SCP have in common.
type decoder interface {
	Client(p []byte) error
	Server(p []byte) error
	Finish() error
}

// relay carries the bytes of a program that transfers files through a decoder. Its life: newRelay; pump reads the
// client, Write takes what the program prints; finish, when the program has ended.
type relay struct {
	s        *session
	protocol string
	rules    transferRules
	decoder  decoder
	in, out  *keep

	stdin *io.PipeReader // the program's
	feed  *io.PipeWriter

	content content
}

// newRelay gives a relay for a program that speaks a protocol of file transfers; nil for another.
func newRelay(s *session, p backends.Process) (*relay, error) {
	cmd, isSCP := transfer.SCPCommand{}, false
	if p.Kind == backends.KindExec {
		cmd, isSCP = transfer.ParseSCPCommand(p.Command)
	}
	if p.Kind != backends.KindSFTP && !isSCP || p.Terminal != nil {
		return nil, nil
	}
	permit := s.c.permit()
	rules, err := readTransferRules(permit.Transfer)
	if err != nil {
		return nil, err
	}
	r := &relay{s: s, rules: rules, protocol: "sftp", in: s.keeps[auditlog.Input], out: s.keeps[auditlog.Output]}
	r.content.r = r
	r.stdin, r.feed = io.Pipe()
	c := transfer.Config{
		Server: r.feed, Client: writerFunc(r.toClient), Event: r.event, Mode: rules.mode, Timeout: contentTimeout,
		Content: r.content.add, FileLimit: rules.file, SessionLimit: rules.session,
	}
	if !rules.raw {
		c.Raw = func(d transfer.Direction, _ uint64, p []byte) error {
			if d == transfer.ToServer {
				return r.in.record(p)
			}
			return r.out.record(p)
		}
	}
	if rules.any() {
		c.Decide = rules.decide
	}
	if isSCP {
		r.protocol, r.decoder = "scp", transfer.NewSCP(c, cmd)
	} else {
		c.Resolve = true // for the record, where no rule needs it
		r.decoder = transfer.NewSFTP(c)
	}
	return r, nil
}

// pump hands on what the client sends, until its end or the program's.
func (r *relay) pump() {
	b := make([]byte, 4<<10)
	for {
		n, err := r.s.ch.Read(b)
		if n > 0 {
			r.s.c.touch()
			if r.rules.raw {
				if lost := r.in.record(b[:n]); lost != nil {
					r.feed.CloseWithError(lost)
					return
				}
			}
			r.s.in.Add(uint64(n))
			if derr := r.decoder.Client(b[:n]); derr != nil {
				r.end(derr)
				return
			}
		}
		if err != nil {
			r.in.eof()
			r.feed.Close()
			return
		}
		if n == len(b) && n < 64<<10 {
			b = make([]byte, 64<<10)
		}
	}
}

// end ends the program's input, and with it a transfer that can't go on.
func (r *relay) end(err error) {
	if !errors.Is(err, transfer.ErrFinished) {
		r.s.c.s.Slog.Warn("transfer", "connection", r.s.c.id, "channel", r.s.id, "error", err)
	}
	r.feed.Close()
	// The client's window must not fill up: what else it sends goes nowhere, and the channel ends with the program.
	io.Copy(io.Discard, r.s.ch) //nolint:errcheck // until the channel's end
}

// Write takes what the program prints.
func (r *relay) Write(p []byte) (int, error) {
	r.s.c.touch()
	if r.rules.raw {
		if err := r.out.record(p); err != nil {
			return 0, err
		}
	}
	if err := r.decoder.Server(p); err != nil {
		return 0, err
	}
	return len(p), nil
}

func (r *relay) toClient(p []byte) (int, error) {
	r.s.out.Add(uint64(len(p)))
	return r.s.ch.Write(p)
}

// finish records what is unfinished. The program has ended.
func (r *relay) finish() {
	r.stdin.Close()
	if err := r.decoder.Finish(); err != nil && r.s.c.ctx.Err() == nil {
		r.s.c.s.Slog.Warn("transfer", "connection", r.s.c.id, "channel", r.s.id, "error", err)
	}
}

// event records what a decoder says.
func (r *relay) event(e *transfer.Event) error {
	kept, err := r.content.done(e.ID)
	if err != nil {
		return err
	}
	t := &auditlog.Transfer{
		Protocol: r.protocol, Op: string(e.Kind), ID: e.ID,
		Path: []byte(e.Path.Asked), Resolved: []byte(e.Path.Resolved),
		Target: []byte(e.Target.Asked), TargetResolved: []byte(e.Target.Resolved), Name: []byte(e.Name),
		Start: e.Start, Took: e.End.Sub(e.Start), Flags: e.Flags, Names: e.Names,
		Read: flowOf(e.Read, kept[auditlog.Output]), Written: flowOf(e.Written, kept[auditlog.Input]),
		Status: e.Status.Code, Message: authz.Printable(e.Status.Message, 256), Denied: e.Denied, Unfinished: e.Unfinished,
		Detail: authz.Printable(e.Detail, 500), Offset: e.Offset,
	}
	if e.Direction == transfer.ToClient {
		t.Stream = auditlog.Output
	}
	if a := e.Attrs; a.Valid != 0 {
		t.Attrs = &auditlog.TransferAttrs{Valid: a.Valid, Size: a.Size, UID: a.UID, GID: a.GID, Permissions: a.Permissions, Atime: a.Atime, Mtime: a.Mtime}
	}
	if e.Kind == transfer.Copy {
		t.Copied = []uint64{e.Ranges[0].Start, e.Ranges[0].End, e.Ranges[1].Start, e.Ranges[1].End}
	}
	if e.Start.IsZero() || e.End.IsZero() {
		t.Took = 0
	}
	return r.s.c.record(r.s.id, t)
}

// flowOf is what there was of a flow, nil if nothing.
func flowOf(f transfer.Flow, kept uint64) *auditlog.TransferFlow {
	if f.Bytes == 0 && !f.Whole && f.SHA256 == nil && len(f.Ranges) == 0 {
		return nil
	}
	t := &auditlog.TransferFlow{Bytes: f.Bytes, Cut: f.Cut, Contiguous: f.Contiguous, SHA256: f.SHA256, Whole: f.Whole, Kept: kept}
	for _, r := range f.Ranges {
		t.Ranges = append(t.Ranges, r.Start, r.End)
	}
	return t
}

// content keeps files' content, block by block: what a session has kept once is not kept again.
type content struct {
	r *relay

	mu    sync.Mutex // guards what follows: both directions come here
	files map[contentFlow]*contentOpen
}

type contentFlow struct {
	id     uint64
	stream auditlog.Stream
}

// contentOpen is a block that is not full yet.
type contentOpen struct {
	offset uint64
	block  []byte
	kept   uint64
}

// add takes content of a file as it passes. It is a transfer.Config's Content.
func (c *content) add(id uint64, d transfer.Direction, offset uint64, p []byte) error {
	flow := contentFlow{id: id}
	if d == transfer.ToClient {
		flow.stream = auditlog.Output
	}
	c.mu.Lock()
	defer c.mu.Unlock()
	f := c.files[flow]
	if f == nil {
		if c.files == nil {
			c.files = make(map[contentFlow]*contentOpen)
		}
		f = &contentOpen{}
		c.files[flow] = f
	}
	for len(p) > 0 {
		if len(f.block) > 0 && offset != f.offset+uint64(len(f.block)) {
			if err := c.flush(flow, f); err != nil {
				return err
			}
		}
		if len(f.block) == 0 {
			f.offset = offset
		}
		n := min(len(p), int(contentBlock-offset%contentBlock))
		f.block = append(f.block, p[:n]...)
		p = p[n:]
		if offset += uint64(n); offset%contentBlock == 0 {
			if err := c.flush(flow, f); err != nil {
				return err
			}
		}
	}
	return nil
}

// flush records a block. mu is held.
func (c *content) flush(flow contentFlow, f *contentOpen) error {
	if len(f.block) == 0 {
		return nil
	}
	sum := sha256.Sum256(f.block)
	known, room := c.r.s.c.kept.take(sum, uint64(len(f.block)), c.r.rules.session)
	rec := &auditlog.Content{ID: flow.id, Stream: flow.stream, Offset: f.offset, SHA256: sum[:]}
	switch {
	case known:
		rec.Length = uint32(len(f.block))
	case room:
		rec.Data = f.block
	}
	if known || room {
		f.kept += uint64(len(f.block))
		if err := c.r.s.c.record(c.r.s.id, rec); err != nil {
			return err
		}
	}
	f.block = f.block[:0]
	return nil
}

// done records what is left of a file, and says how much of each stream was kept.
func (c *content) done(id uint64) (kept [2]uint64, err error) {
	c.mu.Lock()
	defer c.mu.Unlock()
	for _, stream := range []auditlog.Stream{auditlog.Input, auditlog.Output} {
		flow := contentFlow{id, stream}
		if f := c.files[flow]; f != nil {
			err = errors.Join(err, c.flush(flow, f))
			kept[stream] = f.kept
			delete(c.files, flow)
		}
	}
	return kept, err
}

// contentKept is what a session has kept of content.
type contentKept struct {
	mu     sync.Mutex // guards what follows
	blocks map[[sha256.Size]byte]struct{}
	bytes  uint64
}

// take says whether a block is kept already, or if not whether there is room for it, which it then takes.
func (k *contentKept) take(sum [sha256.Size]byte, n, limit uint64) (known, room bool) {
	k.mu.Lock()
	defer k.mu.Unlock()
	if _, ok := k.blocks[sum]; ok {
		return true, false
	}
	if k.bytes+n > limit {
		return false, false
	}
	k.bytes += n
	if k.blocks == nil {
		k.blocks = make(map[[sha256.Size]byte]struct{})
	}
	if len(k.blocks) < contentKnown {
		k.blocks[sum] = struct{}{}
	}
	return false, true
}

// keep is what is recorded of one of a channel's streams as data: all of it, or as much as the profile says and the rest
// as a number and a hash.
type keep struct {
	c      *conn
	id     uint32 // the channel
	stream auditlog.Stream
	limit  uint64 // 0: none

	mu    sync.Mutex // guards what follows
	n     uint64
	hash  hash.Hash // nil without a limit
	over  bool
	ended bool
}

func newKeep(c *conn, id uint32, stream auditlog.Stream, limit uint64) *keep {
	k := &keep{c: c, id: id, stream: stream, limit: limit}
	if limit > 0 {
		k.hash = sha256.New()
	}
	return k
}

// record records bytes before they pass. An error means that they must not.
func (k *keep) record(p []byte) error {
	if k.c.s.NoData || len(p) == 0 {
		return nil
	}
	if k.limit == 0 {
		return k.c.record(k.id, &auditlog.Data{Stream: k.stream, Data: p})
	}
	k.mu.Lock()
	defer k.mu.Unlock()
	if k.ended {
		return io.ErrClosedPipe
	}
	k.hash.Write(p)
	room := k.limit - min(k.limit, k.n)
	k.n += uint64(len(p))
	if part := p[:min(uint64(len(p)), room)]; len(part) > 0 {
		if err := k.c.record(k.id, &auditlog.Data{Stream: k.stream, Data: part}); err != nil {
			return err
		}
	}
	if k.n > k.limit && !k.over {
		k.over = true
		return k.c.record(k.id, &auditlog.DataRest{Stream: k.stream, Offset: k.limit})
	}
	return nil
}

// eof records the stream's end.
func (k *keep) eof() {
	if !k.c.s.NoData {
		k.c.record(k.id, &auditlog.Data{Stream: k.stream, EOF: true})
	}
}

// end records what was not kept. Nothing is recorded after it.
func (k *keep) end() {
	k.mu.Lock()
	defer k.mu.Unlock()
	k.ended = true
	if k.over {
		k.c.record(k.id, &auditlog.DataRest{Stream: k.stream, Offset: k.limit, End: true, Bytes: k.n, SHA256: k.hash.Sum(nil)})
	}
}

type writerFunc func(p []byte) (int, error)

func (f writerFunc) Write(p []byte) (int, error) { return f(p) }
