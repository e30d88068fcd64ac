package auditlog_test

import (
	"bytes"
	"context"
	"crypto/ed25519"
	"errors"
	"fmt"
	"io"
	"iter"
	"log/slog"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync/atomic"
	"testing"
	"time"

	"github.com/sallyport/sallyport/auditlog"
	"github.com/sallyport/sallyport/auditlog/file"
	"github.com/sallyport/sallyport/auditlog/s3"
	"github.com/sallyport/sallyport/auditlog/s3/s3test"
)

// busySession has a record of each kind that an entry tells of.
func busySession(t testing.TB, l *auditlog.Log, id string) {
	t.Helper()
	r := l.New(id)
	for _, b := range []auditlog.Body{
		&auditlog.Connect{Gate: "gate-1", Source: "192.0.2.7:4022"},
		&auditlog.Authenticate{User: "alice", Result: "proven"},
		&auditlog.Decision{User: "alice", Ticket: "OPS-1", Profile: "debug", Groups: []string{"payments", "ops"}},
	} {
		if err := r.Record(0, b); err != nil {
			t.Fatal(err)
		}
	}
	if err := r.Begin(); err != nil {
		t.Fatal(err)
	}
	long := strings.Repeat("ä", 400)
	for _, b := range []auditlog.Body{
		&auditlog.Decision{Ticket: "OPS-2"}, // granted anew
		&auditlog.Sandbox{Image: "sallyport/debug:1", Digest: "sha256:1"},
		&auditlog.Request{Type: "exec", Command: []byte("cat /logs/\xff"), OK: true},
		&auditlog.Request{Type: "exec", Command: []byte("refused"), OK: false},
		&auditlog.Request{Type: "exec", Command: []byte(long), OK: true},
		&auditlog.Data{Stream: auditlog.Input, Data: []byte("in")},
		&auditlog.Data{Stream: auditlog.Output, Data: bytes.Repeat([]byte("x"), 300<<10)},
		&auditlog.Data{Stream: auditlog.Error, Data: []byte("err")},
		&auditlog.ProgramExec{Exec: 1, Path: []byte("/usr/bin/curl"), Args: [][]byte{[]byte("curl")}},
		&auditlog.ProgramExec{Exec: 1, Again: 4},
		&auditlog.ProgramStart{Exec: 1, File: []byte("/bin/\xffsh")},
		&auditlog.Transfer{Protocol: "sftp", Op: "file", Path: []byte("app.log"), Resolved: []byte("/logs/app.log")},
		&auditlog.Forward{Type: "direct-tcpip"},
		&auditlog.Alert{Name: "example"}, &auditlog.Unaudited{File: []byte("/bin/nsenter")},
	} {
		if err := r.Record(1, b); err != nil {
			t.Fatal(err)
		}
	}
	for i := range 20 {
		if err := r.Record(1, &auditlog.Request{Type: "exec", Command: fmt.Appendf(nil, "true %d", i), OK: true}); err != nil {
			t.Fatal(err)
		}
	}
	if err := r.Close(&auditlog.End{Cause: "client-left"}); err != nil {
		t.Fatal(err)
	}
}

func indexConfig(dir string) auditlog.Config {
	cfg := fastConfig(dir)
	cfg.Index = true
	return cfg
}

func readIndex(t testing.TB, src auditlog.Source, opts auditlog.IndexOptions) *auditlog.Index {
	t.Helper()
	x, err := auditlog.ReadIndex(t.Context(), src, opts)
	if err != nil {
		t.Fatal(err)
	}
	return x
}

// The gate's entry says what the log says, is found by its objects, and is not used when they are others.
func TestIndex(t *testing.T) {
	for _, encrypted := range []bool{false, true} {
		store, dir := newStore(t)
		cfg := indexConfig(t.TempDir())
		opts := auditlog.IndexOptions{Keys: []ed25519.PublicKey{testPublic()}}
		if encrypted {
			cfg.Recipients = []string{recipientOf(t, nativeAuditor)}
			cfg.IndexClear = []string{"user", "cause"}
			opts.Identities = identitiesOf(t, nativeAuditor)
		}
		l := openGate(t, cfg, store)
		busySession(t, l, "s1")
		closeLog(t, l)
		m := load(t, dir)
		x := readIndex(t, m, opts)
		log := logs(t, m, auditlog.SessionPrefix)[0]
		e, ok := x.Entry(log)
		if !ok || x.Len() != 1 || len(x.Reports) != 0 || x.Unread != 0 {
			t.Fatalf("encrypted %v: entry %v, %+v", encrypted, ok, x)
		}
		r := auditlog.NewSessionReader(m, log, testPublic())
		r.Decrypt(opts.Identities...)
		fromLog, complete := auditlog.EntryOf(t.Context(), r)
		if what := x.CompareIndex(fromLog); what != "" || !complete {
			t.Errorf("%s\nindex %+v\nlog   %+v", what, e, fromLog)
		}
		if e.User != "alice" || e.Ticket != "OPS-2" || e.Profile != "debug" || !slices.Equal(e.Groups, []string{"payments", "ops"}) || e.Image != "sallyport/debug:1" ||
			e.Source != "192.0.2.7:4022" || e.Cause != "client-left" || e.Input != 2 || e.Output != 300<<10+3 || e.Programs != 5 ||
			e.Files != 1 || e.Forwards != 1 || e.Alerts != 2 || !e.More || e.Records != uint64(3+15+2+20+1) ||
			len(e.Commands) != 16 || e.Commands[0] != `cat /logs/\xff` || len(e.Commands[1]) > 256 ||
			!slices.Equal(e.Names, []string{"curl", "?sh", "nsenter"}) || !slices.Equal(e.Paths, []string{"app.log", "/logs/app.log"}) ||
			!slices.Equal(e.AlertNames, []string{"example"}) || e.Start.IsZero() || e.End.Before(e.Start) {
			t.Errorf("%+v", e)
		}

		// A log that is not what the entry says is read.
		for what, change := range map[string]func(s *auditlog.Stored){
			"a segment less": func(s *auditlog.Stored) { s.Segments = s.Segments[1:] },
			"other bytes":    func(s *auditlog.Stored) { s.Segments[0].Size++ },
			"foreign":        func(s *auditlog.Stored) { s.Foreign = []string{"x"} },
			"another day":    func(s *auditlog.Stored) { s.Name.Day = "2020/01/01" },
			"another":        func(s *auditlog.Stored) { s.Name.ID = "s2" },
		} {
			other := log
			other.Segments = slices.Clone(log.Segments)
			change(&other)
			if _, ok := x.Entry(other); ok {
				t.Errorf("%s: the entry is used", what)
			}
		}
		// One that says otherwise is found out.
		lie := fromLog
		lie.User = "mallory"
		if what := x.CompareIndex(lie); !strings.HasSuffix(what, "user") {
			t.Errorf("another user: %q", what)
		}

		// The index is a log: verified, and left out if it does not verify.
		for _, s := range logs(t, m, auditlog.IndexPrefix) {
			if rep := auditlog.NewSessionReader(m, s, testPublic()).Verify(t.Context()); rep.State != auditlog.Sealed || rep.Kind != "index" || rep.Gate != "gate-1" {
				t.Errorf("%+v", rep)
			}
			for _, o := range s.Segments {
				b := bytes.Clone(m[o.Name])
				b[len(b)-1] ^= 1
				m[o.Name] = b
			}
		}
		if x := readIndex(t, m, opts); x.Len() != 0 || len(x.Reports) == 0 {
			t.Errorf("a damaged index is used: %d entries", x.Len())
		}
		m = load(t, dir)
		other := opts
		other.Keys = []ed25519.PublicKey{make(ed25519.PublicKey, 32)}
		if x := readIndex(t, m, other); x.Len() != 0 || len(x.Reports) == 0 {
			t.Errorf("an index signed by another is used: %d entries", x.Len())
		}
	}
}

// Of an encrypted index only what is configured is in the clear: by default what the logs' headers tell.
func TestIndexClear(t *testing.T) {
	for _, c := range []struct {
		fields   []string
		in, gone []string
	}{
		{nil, nil, []string{"alice", "OPS-2", "192.0.2", "debug", "payments", "client-left", "curl", "app.log", "example"}},
		{[]string{"user", "cause", "files"}, []string{"alice", "client-left", "app.log"}, []string{"OPS-2", "192.0.2", "debug", "payments", "curl", "example"}},
		{auditlog.ClearFields, []string{"alice", "OPS-2", "192.0.2", "sallyport/debug", "payments", "curl", "app.log", "example"}, nil},
	} {
		store, dir := newStore(t)
		cfg := indexConfig(t.TempDir())
		cfg.Codec = "none" // what is in the clear shall be seen
		cfg.Recipients = []string{recipientOf(t, nativeAuditor)}
		cfg.IndexClear = c.fields
		l := openGate(t, cfg, store)
		busySession(t, l, "s1")
		closeLog(t, l)
		m := load(t, dir)
		all := ""
		for _, b := range m {
			all += string(b)
		}
		for _, s := range c.in {
			if !strings.Contains(all, s) {
				t.Errorf("%v: no %q", c.fields, s)
			}
		}
		for _, s := range c.gone {
			if strings.Contains(all, s) {
				t.Errorf("%v: %q is in the clear", c.fields, s)
			}
		}
		x := readIndex(t, m, auditlog.IndexOptions{})
		log := logs(t, m, auditlog.SessionPrefix)[0]
		e, ok := x.Entry(log)
		if !ok || !e.Clear || e.Records == 0 || e.End.IsZero() || x.Unread == 0 {
			t.Errorf("%v: %v %+v", c.fields, ok, e)
		}
		r := auditlog.NewSessionReader(m, log)
		r.Decrypt(identitiesOf(t, nativeAuditor)...)
		fromLog, _ := auditlog.EntryOf(t.Context(), r)
		if what := x.CompareIndex(fromLog); what != "" {
			t.Errorf("%v: %s", c.fields, what)
		}
		fromLog.Cause, fromLog.Bytes = "idle", 1
		if what := x.CompareIndex(fromLog); what == "" {
			t.Errorf("%v: a difference is not seen", c.fields)
		}
	}
	for want, cfg := range map[string]auditlog.Config{
		"nothing is encrypted": {IndexClear: []string{"user"}},
		"none of user, groups": {IndexClear: []string{"usr"}, Recipients: []string{recipientOf(t, nativeAuditor)}},
	} {
		cfg.Spool = t.TempDir()
		store, _ := newStore(t)
		if _, err := auditlog.Open(t.Context(), cfg, testKey, store, "g", slog.New(slog.DiscardHandler)); err == nil || !strings.Contains(err.Error(), want) {
			t.Errorf("%v, want %q", err, want)
		}
	}
}

// A session that a restart had to seal has an entry that says so and no more; its log is read. Batches are numbered by run: no name
// is written twice.
func TestIndexRestart(t *testing.T) {
	store, dir := newStore(t)
	cfg := indexConfig(t.TempDir())
	cfg.SegmentAge = time.Hour
	cfg.Recipients = []string{recipientOf(t, nativeAuditor)}
	l := openGate(t, cfg, store)
	busySession(t, l, "whole")
	r := l.New("cut")
	login(t, r)
	must(t, r.Begin())
	must(t, r.Sync(t.Context()))
	waitFor(t, func() bool { return l.Stats().Stored == 1 && l.Stats().Waiting == 0 }) // nothing moves in the spool
	left := t.TempDir()
	must(t, os.CopyFS(filepath.Join(left, "spool"), os.DirFS(cfg.Spool)))
	must(t, r.Close(&auditlog.End{Cause: "client-left"}))
	closeLog(t, l)

	store2, dir2 := newStore(t)
	cfg.Spool = filepath.Join(left, "spool")
	closeLog(t, openGate(t, cfg, store2))
	m := load(t, dir)
	for name, b := range load(t, dir2) {
		if have, ok := m[name]; ok && !bytes.Equal(have, b) && strings.HasPrefix(name, auditlog.IndexPrefix) && !strings.Contains(name, "/00000000.seg") {
			t.Errorf("%s: written twice", name)
		}
	}
	m2 := load(t, dir2)
	x := readIndex(t, m2, auditlog.IndexOptions{Identities: identitiesOf(t, nativeAuditor)})
	if len(x.Reports) != 0 {
		t.Fatalf("%+v", x.Reports)
	}
	var cut *auditlog.Entry
	for e := range x.All() {
		if e.ID == "cut" {
			cut = &e
		}
	}
	if cut == nil || !cut.Partial || cut.User != "" || cut.Gate != "gate-1" {
		t.Fatalf("%+v", cut)
	}
	for _, s := range logs(t, m2, auditlog.SessionPrefix) {
		if s.Name.ID != "cut" {
			continue
		}
		if _, ok := x.Entry(s); ok {
			t.Error("a partial entry is used for the log")
		}
		r := auditlog.NewSessionReader(m2, s)
		r.Decrypt(identitiesOf(t, nativeAuditor)...)
		e, complete := auditlog.EntryOf(t.Context(), r)
		if what := x.CompareIndex(e); what != "" || !complete || e.Cause != "interrupted" || e.User != "alice" {
			t.Errorf("%s: %v %+v", what, complete, e)
		}
	}
	missing := slices.Collect(x.Missing(map[string]struct{}{"whole": {}}, time.Time{}))
	if len(missing) != 1 || missing[0].ID != "cut" {
		t.Errorf("missing: %+v", missing)
	}
}

// A gate can't speak for another one's session: where the entries of two gates have one ID, the log is read.
func TestIndexOfAnotherGate(t *testing.T) {
	for _, other := range []string{"gate-0", "gate-2"} { // read before, and after
		store, dir := newStore(t)
		l := openGate(t, indexConfig(t.TempDir()), store)
		busySession(t, l, "s1")
		busySession(t, l, "s2")
		closeLog(t, l)
		m := load(t, dir)
		log := logs(t, m, auditlog.SessionPrefix)[0]
		lie, ok := readIndex(t, m, auditlog.IndexOptions{}).Entry(log)
		if !ok {
			t.Fatal("no entry")
		}
		lie.Gate, lie.User, lie.Commands = other, "mallory", nil
		l, err := auditlog.Open(t.Context(), indexConfig(t.TempDir()), testKey, store, other, slog.New(slog.DiscardHandler))
		must(t, err)
		auditlog.Indexed(l, &lie)
		closeLog(t, l)
		m = load(t, dir)
		x := readIndex(t, m, auditlog.IndexOptions{})
		if e, ok := x.Entry(log); ok {
			t.Errorf("%s: the entry of %s is used: %+v", other, e.Gate, e)
		}
		for e := range x.All() {
			if e.ID != "s2" {
				t.Errorf("%s: %+v", other, e)
			}
		}
		fromLog, _ := auditlog.EntryOf(t.Context(), auditlog.NewSessionReader(m, log))
		if what := x.CompareIndex(fromLog); !strings.Contains(what, "two gates") {
			t.Errorf("%s: %q", other, what)
		}
		if _, ok := x.Entry(logs(t, m, auditlog.SessionPrefix)[1]); !ok {
			t.Errorf("%s: the other session's entry is not used", other)
		}
		// That there was such a session is known all the same.
		if n := len(slices.Collect(x.Missing(nil, time.Time{}))); n != 2 {
			t.Errorf("%s: %d missing", other, n)
		}
	}
}

// Batches are cut at their number of sessions, and at their age.
func TestIndexBatches(t *testing.T) {
	store, dir := newStore(t)
	cfg := indexConfig(t.TempDir())
	cfg.SegmentAge, cfg.IndexAge = time.Hour, 100*time.Millisecond
	l := openGate(t, cfg, store)
	busySession(t, l, "s1")
	src := source(t, dir)
	waitFor(t, func() bool { return len(logs(t, src, auditlog.IndexPrefix)) == 1 })
	closeLog(t, l)

	cfg.Spool, cfg.IndexAge = filepath.Join(t.TempDir(), "spool"), time.Hour
	store, dir = newStore(t)
	l = openGate(t, cfg, store)
	for i := range 2500 {
		auditlog.Indexed(l, &auditlog.Entry{ID: fmt.Sprintf("s%d", i), Gate: "gate-1"})
	}
	closeLog(t, l)
	x := readIndex(t, source(t, dir), auditlog.IndexOptions{})
	if x.Len() != 2500 || x.Objects < 2 || x.Objects > 5 {
		t.Errorf("%d entries in %d objects", x.Len(), x.Objects)
	}
}

// However much an index has, a bounded part of it is held; the rest is read from the logs.
func TestIndexOverflow(t *testing.T) {
	store, dir := newStore(t)
	l := openGate(t, indexConfig(t.TempDir()), store)
	long := slices.Repeat([]string{strings.Repeat("x", 64<<10)}, 40)
	for i := range 60 {
		auditlog.Indexed(l, &auditlog.Entry{ID: fmt.Sprintf("s%d", i), Gate: "gate-1", Paths: long})
	}
	closeLog(t, l)
	if x := readIndex(t, source(t, dir), auditlog.IndexOptions{}); !x.Overflow || x.Len() < 40 || x.Len() > 52 {
		t.Errorf("%d entries of 2.5 MiB, overflow %v", x.Len(), x.Overflow)
	}
}

// What an auditor keeps of an index reads as it was written, and is never preferred to more.
func TestIndexCache(t *testing.T) {
	store, dir := newStore(t)
	l := openGate(t, indexConfig(t.TempDir()), store)
	busySession(t, l, "s1")
	closeLog(t, l)
	m := load(t, dir)
	x := readIndex(t, m, auditlog.IndexOptions{})
	var b bytes.Buffer
	must(t, auditlog.WriteCache(&b, x.All()))
	for name := range m {
		if strings.HasPrefix(name, auditlog.IndexPrefix) {
			delete(m, name)
		}
	}
	lost := readIndex(t, m, auditlog.IndexOptions{})
	log := logs(t, m, auditlog.SessionPrefix)[0]
	if _, ok := lost.Entry(log); ok || lost.Len() != 0 {
		t.Error("an entry without an index")
	}
	must(t, lost.ReadCache(bytes.NewReader(b.Bytes())))
	if e, ok := lost.Entry(log); !ok || e.User != "alice" {
		t.Errorf("%v %+v", ok, e)
	}
	for _, bad := range []string{"", "x", "sallyport index cache 1\n\xff", b.String()[:b.Len()-3]} {
		if err := lost.ReadCache(strings.NewReader(bad)); err == nil || !strings.Contains(err.Error(), "read index cache: ") {
			t.Errorf("%.40q: %v", bad, err)
		}
	}
}

// counting counts the objects that are opened.
type counting struct {
	auditlog.Source
	opened atomic.Int64
}

func (c *counting) Open(ctx context.Context, name string) (io.ReadCloser, error) {
	c.opened.Add(1)
	return c.Source.Open(ctx, name)
}

func (c *counting) List(ctx context.Context, prefix string) iter.Seq2[auditlog.Object, error] {
	return c.Source.List(ctx, prefix)
}

// BenchmarkIndex is a list over 100,000 sessions in a directory and in a bucket: the index read, all objects listed, each session's entry
// looked up.
func BenchmarkIndex(b *testing.B) {
	server, err := s3test.Start(b.TempDir())
	if errors.Is(err, s3test.ErrNoBinary) && os.Getenv(s3test.RequireEnv) == "" {
		b.Skip(err)
	}
	if err != nil {
		b.Fatal(err)
	}
	defer server.Stop()
	const sessions = 100_000
	dir := server.Dir(s3test.Prefix)
	store, err := file.NewStore(dir)
	if err != nil {
		b.Fatal(err)
	}
	if err := auditlog.FakeStore(b.Context(), filepath.Join(b.TempDir(), "spool"), dir, store, testKey, sessions); err != nil {
		b.Fatal(err)
	}
	fromFile, err := file.OpenSource(dir)
	if err != nil {
		b.Fatal(err)
	}
	defer fromFile.Close()
	credentials := filepath.Join(b.TempDir(), "credentials")
	if err := s3test.Reader.WriteCredentials(credentials); err != nil {
		b.Fatal(err)
	}
	fromBucket, err := s3.OpenSource(s3.Config{Bucket: s3test.Bucket, Prefix: s3test.Prefix, Endpoint: server.Endpoint(), CredentialsFile: credentials})
	if err != nil {
		b.Fatal(err)
	}
	defer fromBucket.Close()
	for name, source := range map[string]auditlog.Source{"directory": fromFile, "bucket": fromBucket} {
		b.Run(name, func(b *testing.B) {
			src := &counting{Source: source}
			var index time.Duration
			for b.Loop() {
				src.opened.Store(0)
				start := time.Now()
				x, err := auditlog.ReadIndex(b.Context(), src, auditlog.IndexOptions{Keys: []ed25519.PublicKey{testPublic()}})
				if err != nil {
					b.Fatal(err)
				}
				index += time.Since(start)
				found := 0
				for log, err := range auditlog.Logs(b.Context(), src, auditlog.SessionPrefix) {
					if err != nil {
						b.Fatal(err)
					}
					if _, ok := x.Entry(log); ok {
						found++
					}
				}
				if found != sessions || src.opened.Load() > 500 {
					b.Fatalf("%d of %d sessions, %d objects read", found, sessions, src.opened.Load())
				}
			}
			b.ReportMetric(float64(src.opened.Load()), "objects")
			b.ReportMetric(index.Seconds()/float64(b.N), "index-s")
		})
	}
}
