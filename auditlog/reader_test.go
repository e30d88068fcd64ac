package auditlog_test

import (
	"bytes"
	"context"
	"crypto/ed25519"
	"crypto/sha256"
	"encoding/binary"
	"errors"
	"flag"
	"fmt"
	"hash/crc32"
	"io"
	"io/fs"
	"iter"
	"maps"
	"os"
	"path/filepath"
	"runtime"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/fxamacker/cbor/v2"
	"github.com/klauspost/compress/zstd"

	"github.com/sallyport/sallyport/auditlog"
)

var update = flag.Bool("update", false, "write testdata/v1 anew; only before a format is released")

const sampleDir = "testdata/v1"

// memory is a source and a store for tampering.
type memory map[string][]byte

func (m memory) List(_ context.Context, prefix string) iter.Seq2[auditlog.Object, error] {
	return func(yield func(auditlog.Object, error) bool) {
		for _, name := range slices.Sorted(maps.Keys(m)) {
			if strings.HasPrefix(name, prefix) && !yield(auditlog.Object{Name: name, Size: int64(len(m[name]))}, nil) {
				return
			}
		}
	}
}

func (m memory) Open(_ context.Context, name string) (io.ReadCloser, error) {
	b, ok := m[name]
	if !ok {
		return nil, fs.ErrNotExist
	}
	return io.NopCloser(bytes.NewReader(b)), nil
}

// load reads a directory into memory.
func load(t testing.TB, dir string) memory {
	t.Helper()
	m := make(memory)
	err := filepath.WalkDir(dir, func(path string, d fs.DirEntry, err error) error {
		if err != nil || d.IsDir() {
			return err
		}
		name, err := filepath.Rel(dir, path)
		if err != nil {
			return err
		}
		m[filepath.ToSlash(name)], err = os.ReadFile(path)
		return err
	})
	if err != nil {
		t.Fatal(err)
	}
	return m
}

// makeSample writes one session of several segments, with a record of every kind, and a frame of every codec.
func makeSample(t *testing.T, dir string, codecs ...string) {
	t.Helper()
	tmp := t.TempDir()
	store, storeDir := newStore(t)
	for i, codec := range codecs {
		cfg := fastConfig(tmp)
		cfg.Codec = codec
		cfg.SegmentAge = 20 * time.Millisecond
		l := openGate(t, cfg, store)
		r := l.New(fmt.Sprintf("sample-%d-%s", i, codec))
		login(t, r)
		must(t, r.Record(0, &auditlog.Decision{ID: "d1", Revision: "r1", Allow: true, Reason: "grant", User: "alice", Ticket: "OPS-4711",
			Profile: "payments-debug", NotAfter: time.Date(2026, 11, 22, 12, 0, 0, 0, time.UTC)}))
		must(t, r.Begin())
		must(t, r.Record(0, &auditlog.Sandbox{ID: "c0ffee", Backend: "docker", Image: "sallyport/debug:1", Took: 400 * time.Millisecond}))
		must(t, r.Record(1, &auditlog.ChannelOpen{Type: "session"}))
		must(t, r.Record(1, &auditlog.Request{Type: "exec", Command: []byte("cat /logs/x"), OK: true}))
		waitFor(t, func() bool { return l.Stats().Stored >= 1 })
		for j := range 3 {
			must(t, r.Record(1, &auditlog.Data{Stream: auditlog.Output, Data: bytes.Repeat([]byte(fmt.Sprintf("line %d\n", j)), 30)}))
			must(t, r.Record(1, &auditlog.Data{Stream: auditlog.Error, Data: []byte{0xff, 0, byte(j)}}))
			waitFor(t, func() bool { return l.Stats().Stored >= uint64(j+2) })
		}
		must(t, r.Record(1, &auditlog.Data{Hidden: true}))
		must(t, r.Record(1, &auditlog.Data{EOF: true}))
		must(t, r.Record(1, &auditlog.Alert{Name: "example", Detail: "detail"}))
		must(t, r.Record(1, &auditlog.Exit{Code: 3}))
		must(t, r.Record(1, &auditlog.ChannelClose{Output: 90, Error: 9}))
		must(t, r.Close(&auditlog.End{Cause: "client-left"}))
		refused := l.New("refused")
		must(t, refused.Record(0, &auditlog.Connect{Source: "192.0.2.9:1"}))
		must(t, refused.Record(0, &auditlog.Authenticate{User: "mallory", Fingerprint: "SHA256:x", Result: "refused", Reason: "unknown key"}))
		must(t, refused.Close(&auditlog.End{Cause: "refused"}))
		closeLog(t, l)
	}
	m := load(t, storeDir)
	for name, b := range m {
		path := filepath.Join(dir, filepath.FromSlash(name))
		must(t, os.MkdirAll(filepath.Dir(path), 0o755))
		must(t, os.WriteFile(path, b, 0o644))
	}
}

// The kept sample reads as it did when it was written.
func TestSample(t *testing.T) {
	if *update {
		must(t, os.RemoveAll(sampleDir))
		makeSample(t, sampleDir, "zstd", "s2", "none")
	}
	m := load(t, sampleDir)
	kinds := make(map[auditlog.Kind]int)
	sessions := 0
	for _, s := range logs(t, m, "") {
		recs, rep := readAll(t, m, s)
		if rep.State != auditlog.Sealed || len(rep.Problems) > 0 {
			t.Errorf("%+v", rep)
		}
		out := ""
		for _, rec := range recs {
			kinds[rec.Body.Kind()]++
			switch b := rec.Body.(type) {
			case *auditlog.Data:
				if b.Stream == auditlog.Output {
					out += string(b.Data)
				}
			case *auditlog.Unknown:
				t.Errorf("record %d of %s is not known any more", rec.Sequence, rep.ID)
			}
		}
		if s.Name.Kind == auditlog.GateLog {
			continue
		}
		sessions++
		if want := strings.Repeat("line 0\n", 30) + strings.Repeat("line 1\n", 30) + strings.Repeat("line 2\n", 30); out != want {
			t.Errorf("%s: output %q", rep.ID, out)
		}
		if rep.Segments < 4 || recs[3].Body.(*auditlog.Decision).Ticket != "OPS-4711" || recs[len(recs)-3].Body.(*auditlog.Exit).Code != 3 {
			t.Errorf("%+v", rep)
		}
	}
	for k := auditlog.KindConnect; k <= auditlog.KindRefused; k++ {
		if kinds[k] == 0 {
			t.Errorf("no record of kind %s", k)
		}
	}
	if sessions != 3 {
		t.Errorf("%d sessions", sessions)
	}
}

// one is the sample's session with this codec, alone.
func one(t testing.TB, codec string) (memory, []string) {
	all := load(t, sampleDir)
	m := make(memory)
	for name, b := range all {
		if strings.HasPrefix(name, auditlog.SessionPrefix) && strings.Contains(name, "-"+codec+"/") {
			m[name] = b
		}
	}
	return m, slices.Sorted(maps.Keys(m))
}

func verify(t *testing.T, m memory, keys ...ed25519.PublicKey) auditlog.Report {
	t.Helper()
	all := logs(t, m, "")
	if len(all) != 1 {
		t.Fatalf("%d logs", len(all))
	}
	return auditlog.NewSessionReader(m, all[0], keys...).Verify(t.Context())
}

// Every byte of a log, flipped, is found, and found in its segment; also by one who makes the CRCs right again.
func TestEveryByte(t *testing.T) {
	for _, codec := range []string{"zstd", "none"} {
		m, names := one(t, codec)
		if rep := verify(t, m); rep.State != auditlog.Sealed {
			t.Fatalf("%+v", rep)
		}
		for _, name := range names {
			original := m[name]
			for i := range original {
				b := bytes.Clone(original)
				b[i] ^= 1 << (i % 8)
				m[name] = b
				rep := verify(t, m)
				if rep.State != auditlog.Damaged {
					t.Fatalf("%s byte %d: %s", name, i, rep.State)
				}
				if p := rep.Problems[0]; p.Segment != name || p.Offset > int64(i) {
					t.Fatalf("%s byte %d: found as %s", name, i, p)
				}
				if m[name] = fixCRC(b); bytes.Equal(m[name], original) {
					continue // it was a CRC
				}
				if rep := verify(t, m); rep.State != auditlog.Damaged || rep.Problems[0].Segment != name {
					t.Fatalf("%s byte %d, CRC right: %+v", name, i, rep)
				}
			}
			m[name] = original
		}
	}
}

// segment writes a segment from FORMAT.md alone, signed with the gate's key: what only one who has it can do.
type segment struct {
	id       string
	start    int64
	number   uint64
	previous []byte
	first    uint64
	records  [][]byte
	last     bool
}

func deterministic(t *testing.T, v any) []byte {
	t.Helper()
	mode, err := cbor.CoreDetEncOptions().EncMode()
	must(t, err)
	b, err := mode.Marshal(v)
	must(t, err)
	return b
}

func (s segment) encode(t *testing.T) []byte {
	t.Helper()
	table := crc32.MakeTable(crc32.Castagnoli)
	h := deterministic(t, map[int]any{1: 1, 2: "gate-1", 3: s.id, 4: s.start, 5: s.number, 6: s.previous, 7: s.start, 8: s.first})
	b := binary.BigEndian.AppendUint16([]byte("\x89SALLY\r\n\x00\x01"), uint16(len(h)))
	b = append(b, h...)
	b = binary.BigEndian.AppendUint32(b, crc32.Checksum(b, table))
	if payload := bytes.Join(s.records, nil); len(payload) > 0 {
		b = append(b, frame(1, 0, uint32(len(payload)), uint32(len(s.records)), s.first, payload)...)
	}
	sum := sha256.Sum256(b)
	statement := deterministic(t, map[int]any{1: sum[:], 2: len(s.records), 3: s.last, 4: false, 5: []byte(testPublic()), 6: s.start})
	digest := sha256.Sum256(statement)
	payload := append(statement, ed25519.Sign(testKey, append([]byte("sallyport auditlog segment footer v1\n"), digest[:]...))...)
	return append(b, frame(2, 0, uint32(len(payload)), uint32(len(s.records)), s.first+uint64(len(s.records)), payload)...)
}

// What one with the key can't do either, once segments are in somebody else's hands. It also shows that FORMAT.md is enough
// to write the format.
func TestForged(t *testing.T) {
	start := time.Date(2026, 11, 22, 10, 0, 0, 0, time.UTC).UnixNano()
	name := func(n int) string { return fmt.Sprintf("sessions/2026/11/22/s1/%08d.seg", n) }
	record := func(seq uint64, text string) []byte {
		return deterministic(t, []any{seq, start, 0, 11, map[int]any{1: text}})
	}
	hash := func(b []byte) []byte { sum := sha256.Sum256(b); return sum[:] }
	build := func(change func(s []segment)) memory {
		s := []segment{{records: [][]byte{record(0, "a"), record(1, "b")}}, {records: [][]byte{record(2, "c")}}, {records: [][]byte{record(3, "d")}, last: true}}
		m := make(memory)
		previous, first := make([]byte, 32), uint64(0)
		for i := range s {
			s[i].id, s[i].start, s[i].number, s[i].first, s[i].previous = "s1", start, uint64(i), first, previous
			first += uint64(len(s[i].records))
			previous = hash(s[i].encode(t))
		}
		change(s)
		for i := range s {
			m[name(i)] = s[i].encode(t)
		}
		return m
	}
	for what, c := range map[string]struct {
		change func(s []segment)
		want   string
	}{
		"nothing":             {func([]segment) {}, ""},
		"other content":       {func(s []segment) { s[1].records = [][]byte{record(2, "x")} }, name(2) + ": offset 0: does not follow"},
		"of another session":  {func(s []segment) { s[2].id = "s2" }, name(2) + ": offset 0: is not in its place"},
		"of another number":   {func(s []segment) { s[2].number = 7 }, name(2) + ": offset 0: is not in its place"},
		"of another day":      {func(s []segment) { s[2].start += int64(48 * time.Hour) }, name(2) + ": offset 0: is not in its place"},
		"of another start":    {func(s []segment) { s[2].start++ }, name(2) + ": offset 0: is of another log"},
		"after the last":      {func(s []segment) { s[1].last = true; s[2].previous = hash(s[1].encode(t)) }, name(2) + ": offset 0: a segment after the last"},
		"a record left out":   {func(s []segment) { s[2].first++; s[2].records[0] = record(4, "d") }, name(2) + ": offset 0: begins with record 4 where 3"},
		"sequence in a frame": {func(s []segment) { s[2].records[0] = record(5, "d") }, name(2) + ": offset "},
		"a first one before":  {func(s []segment) { s[0].previous = hash(nil) }, name(0) + ": offset 0: first segment names one"},
	} {
		rep := verify(t, build(c.change), testPublic())
		if c.want == "" {
			if rep.State != auditlog.Sealed || rep.Records != 4 {
				t.Errorf("%s: %+v", what, rep)
			}
			continue
		}
		if rep.State != auditlog.Damaged || !strings.HasPrefix(rep.Problems[0].String(), c.want) {
			t.Errorf("%s: %s %v, want %s", what, rep.State, rep.Problems, c.want)
		}
	}
}

func TestTampered(t *testing.T) {
	pristine, names := one(t, "zstd")
	other, others := one(t, "s2")
	last := names[len(names)-1]
	check := func(what string, want auditlog.State, tamper func(m memory)) {
		t.Helper()
		m := maps.Clone(pristine)
		tamper(m)
		rep := verify(t, m, testPublic())
		if rep.State != want {
			t.Errorf("%s: %s, want %s", what, rep.State, want)
		}
		for _, p := range rep.Problems {
			if p.Segment == "" || p.What == "" {
				t.Errorf("%s: %+v", what, p)
			}
		}
	}
	check("nothing", auditlog.Sealed, func(memory) {})
	check("last dropped", auditlog.Live, func(m memory) { delete(m, last) })
	for i, name := range names[:len(names)-1] {
		check("dropped "+name, auditlog.Damaged, func(m memory) { delete(m, name) })
		check("swapped "+name, auditlog.Damaged, func(m memory) { m[name], m[names[i+1]] = m[names[i+1]], m[name] })
		check("of another session "+name, auditlog.Damaged, func(m memory) { m[name] = other[others[i]] })
	}
	check("doubled", auditlog.Damaged, func(m memory) { m[names[1]] = m[names[0]] })
	check("added", auditlog.Damaged, func(m memory) { m[strings.Replace(last, "0000000", "0000001", 1)] = m[last] })
	check("foreign", auditlog.Damaged, func(m memory) { m[filepath.Dir(last)+"/note.txt"] = nil })
	check("appended to", auditlog.Damaged, func(m memory) { m[last] = append(bytes.Clone(m[last]), 0) })
	for _, name := range names {
		for _, cut := range []int{1, 64, len(pristine[name]) / 2, len(pristine[name])} {
			check(fmt.Sprintf("%s short by %d", name, cut), auditlog.Damaged, func(m memory) { m[name] = m[name][:len(m[name])-cut] })
		}
	}
	// Signed by somebody else: seen if the key is pinned.
	stranger := ed25519.NewKeyFromSeed(bytes.Repeat([]byte{9}, ed25519.SeedSize)).Public().(ed25519.PublicKey)
	if rep := verify(t, pristine, stranger); rep.State != auditlog.Damaged {
		t.Errorf("unknown key: %s", rep.State)
	}
	if rep := verify(t, pristine); rep.State != auditlog.Sealed || rep.Pinned || len(rep.Keys) != 1 {
		t.Errorf("unpinned: %+v", rep)
	}
}

// A segment cut anywhere gives every record of its whole frames, and says where it is cut.
func TestCutAnywhere(t *testing.T) {
	m, names := one(t, "zstd")
	whole := m[names[0]]
	var ends []int64 // of frames
	total := 0
	s, err := auditlog.NewSegmentReader(bytes.NewReader(whole))
	must(t, err)
	ends = append(ends, s.Whole())
	for {
		_, err := s.Next()
		if w := s.Whole(); w != ends[len(ends)-1] {
			ends = append(ends, w)
		}
		if err == io.EOF {
			break
		}
		must(t, err)
		total++
	}
	if ends[len(ends)-1] != int64(len(whole)) {
		t.Fatalf("frames end at %v of %d bytes", ends, len(whole))
	}
	if len(ends) < 3 {
		t.Fatalf("frames end at %v", ends)
	}
	before := 0
	for cut := range whole {
		s, err := auditlog.NewSegmentReader(bytes.NewReader(whole[:cut]))
		n := 0
		for err == nil {
			if _, err = s.Next(); err == nil {
				n++
			}
		}
		var d *auditlog.DamageError
		if !errors.As(err, &d) {
			t.Fatalf("cut at %d: %v", cut, err)
		}
		want := int64(0)
		for _, e := range ends {
			if e <= int64(cut) {
				want = e
			}
		}
		if d.Offset != want || n < before {
			t.Fatalf("cut at %d: said at %d, want %d; %d records", cut, d.Offset, want, n)
		}
		before = n
	}
	if before != total {
		t.Errorf("%d of %d records before the footer", before, total)
	}
}

// frame makes a frame whose CRC is right, so that what is behind it is reached.
func frame(kind, codec uint8, decoded, count uint32, first uint64, payload []byte) []byte {
	b := []byte{kind, codec, 0, 0}
	b = binary.BigEndian.AppendUint32(b, uint32(len(payload)))
	b = binary.BigEndian.AppendUint32(b, decoded)
	b = binary.BigEndian.AppendUint32(b, count)
	b = binary.BigEndian.AppendUint64(b, first)
	table := crc32.MakeTable(crc32.Castagnoli)
	return append(binary.BigEndian.AppendUint32(b, crc32.Update(crc32.Checksum(b, table), table, payload)), payload...)
}

// headerOf gives the header's bytes of a segment.
func headerOf(b []byte) []byte { return b[:12+int(binary.BigEndian.Uint16(b[10:]))+4] }

func TestBomb(t *testing.T) {
	m, names := one(t, "zstd")
	h := headerOf(m[names[0]])
	enc, err := zstd.NewWriter(nil)
	must(t, err)
	defer enc.Close()
	bomb := enc.EncodeAll(make([]byte, 200<<20), nil)
	many := bytes.Repeat([]byte{0x85, 0, 0, 0, 12, 0xa0}, 1)
	for what, f := range map[string][]byte{
		"bomb that says so":    frame(1, 1, 200<<20, 1, 0, bomb),
		"bomb that lies":       frame(1, 1, 1<<20, 1, 0, bomb),
		"s2 that lies":         frame(1, 2, 1<<10, 1, 0, []byte{0xff, 0xff, 0xff, 0x7f, 0, 0}),
		"too many records":     frame(1, 0, uint32(len(many)), 1<<31, 0, many),
		"fewer records":        frame(1, 0, uint32(len(many)), 2, 0, many),
		"no record":            frame(1, 0, 0, 0, 0, nil),
		"nested":               frame(1, 0, 1<<10, 1, 0, bytes.Repeat([]byte{0x81}, 1<<10)),
		"length without bytes": append(binary.BigEndian.AppendUint32([]byte{1, 0, 0, 0}, 16<<20), make([]byte, 20)...),
	} {
		var a, b runtime.MemStats
		runtime.ReadMemStats(&a)
		s, err := auditlog.NewSegmentReader(bytes.NewReader(append(bytes.Clone(h), f...)))
		must(t, err)
		for err == nil {
			_, err = s.Next()
		}
		runtime.ReadMemStats(&b)
		var d *auditlog.DamageError
		if !errors.As(err, &d) || d.Offset != int64(len(h)) {
			t.Errorf("%s: %v", what, err)
		}
		if used := b.TotalAlloc - a.TotalAlloc; used > 40<<20 {
			t.Errorf("%s: took %d bytes of memory", what, used)
		}
	}
}

// fixCRC makes the CRCs of what looks like header and frames right, so that a fuzzer comes past them.
func fixCRC(b []byte) []byte {
	b = bytes.Clone(b)
	table := crc32.MakeTable(crc32.Castagnoli)
	if len(b) < 12 {
		return b
	}
	n := 12 + int(binary.BigEndian.Uint16(b[10:]))
	if len(b) < n+4 {
		return b
	}
	binary.BigEndian.PutUint32(b[n:], crc32.Checksum(b[:n], table))
	for rest := b[n+4:]; len(rest) >= 28; {
		size := int(binary.BigEndian.Uint32(rest[4:]))
		if size > len(rest)-28 {
			break
		}
		binary.BigEndian.PutUint32(rest[24:], crc32.Update(crc32.Checksum(rest[:24], table), table, rest[28:28+size]))
		rest = rest[28+size:]
	}
	return b
}

func FuzzReader(f *testing.F) {
	for _, b := range load(f, sampleDir) {
		f.Add(b, true)
		f.Add(b[:len(b)/2], false)
	}
	f.Fuzz(func(t *testing.T, b []byte, fix bool) {
		if fix {
			b = fixCRC(b)
		}
		s, err := auditlog.NewSegmentReader(bytes.NewReader(b))
		if err == nil {
			if h := s.Header(); !auditlog.ValidID(h.ID) || h.Name().Number != h.Number {
				t.Errorf("header %+v", h)
			}
		}
		next := uint64(0)
		for n := 0; err == nil; n++ {
			var rec auditlog.Record
			if rec, err = s.Next(); err == nil {
				if rec.Body == nil || n > 0 && rec.Sequence != next {
					t.Fatalf("record %+v where %d should be", rec, next)
				}
				next = rec.Sequence + 1
			}
		}
		var d *auditlog.DamageError
		if err != io.EOF && (!errors.As(err, &d) || d.Offset < 0 || d.Offset > int64(len(b))) {
			t.Errorf("error %v", err)
		}
		if err == io.EOF {
			if footer, ok := s.Footer(); !ok || !footer.Verified {
				t.Error("ended without a footer that verifies")
			}
		}
		// The same bytes as an object of a store.
		m := memory{"sessions/2026/11/22/s1/00000000.seg": b}
		for st := range auditlog.Logs(t.Context(), m, "") {
			auditlog.NewSessionReader(m, st).Verify(t.Context())
		}
	})
}
