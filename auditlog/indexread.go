package auditlog

import (
	"bytes"
	"context"
	"crypto/ed25519"
	"crypto/sha256"
	"errors"
	"fmt"
	"io"
	"iter"
	"slices"
	"strings"
	"time"

	"filippo.io/age"
)

// maxIndexed bounds what an Index holds in memory, in bytes: some 150,000 entries. The logs of sessions that have no room are read.
const maxIndexed = 128 << 20

// Index is what a store's index says of its sessions. It is never more than a short cut: Entry gives an entry only if it fits the
// objects that the store holds, and CompareIndex holds all of it against the logs.
type Index struct {
	entries map[string]*Entry
	two     map[string]struct{} // IDs that entries of different gates have: one of them speaks for a session that is not its own

	Objects  int      // of the store that were read
	Unread   uint64   // entries that are encrypted, and to none of the identities
	Reports  []Report // of the index's logs that are damaged: their entries are not used
	Failed   []error  // of the source, one for each of the index's logs that it names and does not give whole: likewise
	Overflow bool     // there were more entries than are kept in memory
	bytes    int
}

// IndexOptions say how an index is read.
type IndexOptions struct {
	Keys       []ed25519.PublicKey // that may have signed it; none: any
	Identities []age.Identity      // for one that is encrypted
	Since      time.Time           // only sessions that began at or after this are asked for; zero: all
}

// ReadIndex reads a store's index. A log of the index that is damaged, or signed by a key that is not one of Keys, is left out, and
// is in Reports; one of which the source does not give an object is in Failed. So the index is less than it was, and the logs of the
// sessions that it lacks are read. An error is one of the list.
func ReadIndex(ctx context.Context, src Source, opts IndexOptions) (*Index, error) {
	x := &Index{entries: make(map[string]*Entry), two: make(map[string]struct{})}
	since := ""
	if !opts.Since.IsZero() {
		since = opts.Since.UTC().AddDate(0, 0, -1).Format("2006/01/02") // clocks jump
	}
	for log, err := range Logs(ctx, src, IndexPrefix) {
		if err != nil {
			return nil, err
		}
		if len(log.Segments) == 0 || log.Name.Day < since {
			continue // a session is in the index of the day on which it ended, or of a later one
		}
		r := NewSessionReader(src, log, opts.Keys...)
		r.Decrypt(opts.Identities...)
		var entries []*Entry
		pending := 0 // bytes of them
		for rec := range r.Records(ctx) {
			e, ok := rec.Body.(*Entry)
			if !ok || !ValidID(e.ID) {
				continue
			}
			if pending += e.weight(); x.bytes+pending > maxIndexed {
				x.Overflow = true
				continue
			}
			entries = append(entries, e)
		}
		if err := context.Cause(ctx); err != nil {
			return nil, err
		}
		rep := r.Report()
		x.Objects += rep.Segments
		x.Unread += rep.Unread
		err := r.Err()
		if err != nil {
			x.Failed = append(x.Failed, err)
		}
		if len(x.Failed) == maxProblems { // a store that is away, or an index that is denied: each try may take its time
			x.Failed = append(x.Failed, errors.New("read index: too much of it can't be read, the rest was not tried"))
			break
		}
		if rep.State == Damaged {
			x.Reports = append(x.Reports, rep)
		}
		if rep.State == Damaged || err != nil {
			continue
		}
		for _, e := range entries {
			if e.Gate == log.Name.Gate {
				x.add(e)
			}
		}
	}
	return x, nil
}

// add keeps the entry that says more. Of two gates' neither is used.
func (x *Index) add(e *Entry) {
	have := x.entries[e.ID]
	if have != nil && have.Gate != e.Gate {
		x.two[e.ID] = struct{}{}
		return
	}
	if have != nil && rank(e) <= rank(have) {
		return
	}
	n := e.weight()
	if have != nil {
		n -= have.weight()
	}
	if x.bytes+n > maxIndexed {
		x.Overflow = true
		return
	}
	x.bytes += n
	x.entries[e.ID] = e
}

// weight is about what an entry takes in memory, in bytes.
func (e *Entry) weight() int {
	const fixed, each = 640, 16
	n := fixed + len(e.ID) + len(e.Gate) + len(e.User) + len(e.Ticket) + len(e.Profile) + len(e.Source) + len(e.Image) + len(e.Digest) +
		len(e.Cause) + len(e.Last)
	for _, list := range [...][]string{e.Groups, e.Commands, e.Names, e.Paths, e.AlertNames} {
		for _, s := range list {
			n += each + len(s)
		}
	}
	return n
}

func rank(e *Entry) int {
	switch {
	case e.Partial:
		return 0
	case e.Clear:
		return 1
	}
	return 2
}

// Len is the number of sessions that the index knows.
func (x *Index) Len() int { return len(x.entries) }

// Entry gives a log's entry, if there is one that was made by the gate that wrote the session to its end, and that fits the
// log's objects: their number and their bytes. If there is none, the log has to be read. What it says of the session is the gate's
// word, signed, and not checked against the log.
func (x *Index) Entry(log Stored) (Entry, bool) {
	if x == nil || log.Name.Kind != SessionLog || len(log.Foreign) > 0 {
		return Entry{}, false
	}
	e := x.entries[log.Name.ID]
	if _, two := x.two[log.Name.ID]; two || e == nil || e.Partial || int(e.Segments) != len(log.Segments) || e.Start.UTC().Format("2006/01/02") != log.Name.Day {
		return Entry{}, false
	}
	var size int64
	for i, o := range log.Segments {
		if n, err := ParseName(o.Name); err != nil || n.Number != uint32(i) {
			return Entry{}, false
		}
		size += o.Size
	}
	return *e, size == e.Bytes
}

// All yields the entries, in the order of their sessions' starts; without those that two gates speak for.
func (x *Index) All() iter.Seq[Entry] {
	return func(yield func(Entry) bool) {
		for e := range x.sorted() {
			if _, two := x.two[e.ID]; !two && !yield(e) {
				return
			}
		}
	}
}

func (x *Index) sorted() iter.Seq[Entry] {
	all := make([]*Entry, 0, len(x.entries))
	for _, e := range x.entries {
		all = append(all, e)
	}
	slices.SortFunc(all, func(a, b *Entry) int {
		if c := a.Start.Compare(b.Start); c != 0 {
			return c
		}
		return strings.Compare(a.ID, b.ID)
	})
	return func(yield func(Entry) bool) {
		for _, e := range all {
			if !yield(*e) {
				return
			}
		}
	}
}

// EntryOf makes a session's entry from its log, as the gate would have. complete says that all of the log could be read and is
// sealed: only then is the entry what the gate's would be.
func EntryOf(ctx context.Context, r *SessionReader) (e Entry, complete bool) {
	for rec := range r.Records(ctx) {
		e.Add(rec)
	}
	rep := r.Report()
	e.ID, e.Gate, e.Start = rep.ID, rep.Gate, rep.Start
	e.Segments, e.Bytes, e.Last = uint32(rep.Segments), rep.Bytes, r.chain.hash[:]
	return e, (rep.State == Sealed || rep.State == Interrupted) && rep.Unread == 0
}

// CompareIndex holds a session's entry in the index, if there is one, against the one that was made from its log (EntryOf), and says
// what differs. "" means that nothing does, or that the index has no entry: it may be lost, the log is what counts.
func (x *Index) CompareIndex(fromLog Entry) string {
	e := x.entries[fromLog.ID]
	if e == nil {
		return ""
	}
	if _, two := x.two[fromLog.ID]; two {
		return "the index has entries of two gates"
	}
	have, want := *e, fromLog
	switch {
	case e.Partial:
		have, want = Entry{Gate: e.Gate, Start: e.Start, Last: e.Last}, Entry{Gate: want.Gate, Start: want.Start, Last: want.Last}
	case e.Clear:
		// What of the rest is in the clear is as it was configured: so each field is as in the log, or is not there.
		want = *want.clear(setFields(e))
	}
	a, errA := encMode.Marshal(&have)
	b, errB := encMode.Marshal(&want)
	if errA != nil || errB != nil || bytes.Equal(a, b) {
		return ""
	}
	for _, f := range []struct {
		name string
		same bool
	}{
		{"gate", have.Gate == want.Gate}, {"start", have.Start.Equal(want.Start)}, {"end", have.End.Equal(want.End)},
		{"user", have.User == want.User}, {"ticket", have.Ticket == want.Ticket}, {"source", have.Source == want.Source},
		{"cause of the end", have.Cause == want.Cause}, {"number of records", have.Records == want.Records},
		{"segments", have.Segments == want.Segments && have.Bytes == want.Bytes}, {"hash of the last segment", bytes.Equal(have.Last, want.Last)},
	} {
		if !f.same {
			return "the index says otherwise than the log: " + f.name
		}
	}
	return "the index says otherwise than the log"
}

// EntryMark is what is kept of an entry to hold it against its log, where many are.
type EntryMark struct {
	all, core      [16]byte // hashes: of all of the entry, and of what a log that can't be read tells as well
	set            uint16   // of ClearFields, where Clear
	partial, clear bool
}

// Mark gives the entry's.
func (e *Entry) Mark() (EntryMark, error) {
	m := EntryMark{partial: e.Partial, clear: e.Clear}
	if e.Clear {
		m.set = fieldsMask(setFields(e))
	}
	var err error
	if m.core, err = e.core(e.Partial).hash(); err == nil {
		m.all, err = e.hash()
	}
	return m, err
}

// Fits says whether the entry is the one that follows from the log (EntryOf). Of a log that could not be read completely only what its
// headers and sizes tell is compared.
func (m EntryMark) Fits(fromLog Entry, complete bool) bool {
	core, err := fromLog.core(m.partial).hash()
	if err != nil || core != m.core {
		return false
	}
	if m.partial || !complete {
		return true
	}
	want := &fromLog
	if m.clear {
		want = want.clear(maskedFields(m.set))
	}
	all, err := want.hash()
	return err == nil && all == m.all
}

// core is what a log tells that is encrypted; of one that a restart sealed, what that knows.
func (e *Entry) core(partial bool) *Entry {
	c := &Entry{ID: e.ID, Gate: e.Gate, Start: e.Start, Last: e.Last}
	if !partial {
		c.Segments, c.Bytes = e.Segments, e.Bytes
	}
	return c
}

func (e *Entry) hash() ([16]byte, error) {
	b, err := encMode.Marshal(e)
	sum := sha256.Sum256(b)
	return [16]byte(sum[:16]), err
}

func fieldsMask(fields []string) (mask uint16) {
	for i, f := range ClearFields {
		if slices.Contains(fields, f) {
			mask |= 1 << i
		}
	}
	return mask
}

func maskedFields(mask uint16) (fields []string) {
	for i, f := range ClearFields {
		if mask>>i&1 == 1 {
			fields = append(fields, f)
		}
	}
	return fields
}

// setFields are those of ClearFields that an entry has.
func setFields(e *Entry) []string {
	var set []string
	for _, f := range ClearFields {
		none := Entry{ID: e.ID, Gate: e.Gate, Start: e.Start, End: e.End, Records: e.Records, Segments: e.Segments, Bytes: e.Bytes,
			Last: e.Last, Partial: e.Partial, Clear: true}
		a, errA := encMode.Marshal(&none)
		b, errB := encMode.Marshal(e.clear([]string{f}))
		if errA == nil && errB == nil && !bytes.Equal(a, b) {
			set = append(set, f)
		}
	}
	return set
}

// Missing yields the sessions that the index knows, began at or after since (zero: all), and are not among those seen: their
// logs were removed, by whose rules so ever, or by somebody.
func (x *Index) Missing(seen map[string]struct{}, since time.Time) iter.Seq[Entry] {
	return func(yield func(Entry) bool) {
		for e := range x.sorted() {
			if _, ok := seen[e.ID]; ok || e.Start.Before(since) {
				continue
			}
			if !yield(e) {
				return
			}
		}
	}
}

// cacheMagic begins a file of entries that an auditor keeps; see WriteCache.
const cacheMagic = "sallyport index cache 1\n"

// WriteCache writes entries for ReadCache. It is an auditor's own file: it is not signed, and not encrypted.
func WriteCache(w io.Writer, entries iter.Seq[Entry]) error {
	if _, err := io.WriteString(w, cacheMagic); err != nil {
		return err
	}
	enc := encMode.NewEncoder(w)
	for e := range entries {
		if err := enc.Encode(&e); err != nil {
			return err
		}
	}
	return nil
}

// ReadCache adds the entries of WriteCache to the index. Of two of a session it keeps the one that says more, of two
// gates' neither.
func (x *Index) ReadCache(r io.Reader) error {
	magic := make([]byte, len(cacheMagic))
	if _, err := io.ReadFull(r, magic); err != nil || string(magic) != cacheMagic {
		return errors.New("read index cache: not a cache of an index")
	}
	dec := decMode.NewDecoder(r)
	for {
		var e Entry
		switch err := dec.Decode(&e); {
		case errors.Is(err, io.EOF):
			return nil
		case err != nil:
			return fmt.Errorf("read index cache: %w", err)
		case ValidID(e.ID):
			x.add(&e)
		}
	}
}
