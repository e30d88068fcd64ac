package auditlog_test

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"log/slog"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/sallyport/sallyport/auditlog"
)

// recovered puts files into a spool, starts a gate on it, and gives what is in the store after.
func recovered(t *testing.T, stored, spool map[string][]byte) (memory, auditlog.Stored) {
	t.Helper()
	store, dir := newStore(t)
	for name, b := range stored {
		must(t, store.Put(t.Context(), name, bytes.NewReader(b), int64(len(b))))
	}
	cfg := fastConfig(t.TempDir())
	must(t, os.MkdirAll(cfg.Spool, 0o700))
	for name, b := range spool {
		must(t, os.WriteFile(filepath.Join(cfg.Spool, name), b, 0o600))
	}
	closeLog(t, openGate(t, cfg, store))
	left, err := os.ReadDir(cfg.Spool)
	must(t, err)
	if len(left) != 1 { // the lock
		t.Errorf("left in the spool: %v", left)
	}
	m := load(t, dir)
	all := logs(t, m, auditlog.SessionPrefix)
	if len(all) == 0 {
		return m, auditlog.Stored{}
	}
	return m, all[0]
}

// A gate that was killed at any moment of writing and cutting segments leaves one of these spools.
func TestRecover(t *testing.T) {
	m, names := one(t, "zstd")
	last := len(names) - 1
	spoolFile := func(i int, suffix string) string { return fmt.Sprintf("sample-0-zstd.%08d%s", i, suffix) }
	footerLess := func(i int) []byte { // without its footer, of whose payload the size is that of the next-to-last frame's end
		b := m[names[i]]
		s, err := auditlog.NewSegmentReader(bytes.NewReader(b))
		must(t, err)
		whole := s.Whole()
		for err == nil {
			if s.Whole() < int64(len(b)) {
				whole = s.Whole()
			}
			_, err = s.Next()
		}
		return b[:whole]
	}
	recordsOf := func(n int) (count uint64) {
		for _, name := range names[:n] {
			s, err := auditlog.NewSegmentReader(bytes.NewReader(m[name]))
			must(t, err)
			for err == nil {
				if _, err = s.Next(); err == nil {
					count++
				}
			}
		}
		return count
	}
	for what, c := range map[string]struct {
		stored int               // of the segments, already in the store
		spool  map[string][]byte // files
		state  auditlog.State
		min    uint64 // records
	}{
		"open, no footer":              {2, map[string][]byte{spoolFile(2, ".part"): footerLess(2)}, auditlog.Interrupted, recordsOf(3) + 1},
		"open, zeros after a crash":    {2, map[string][]byte{spoolFile(2, ".part"): append(bytes.Clone(footerLess(2)), make([]byte, 5000)...)}, auditlog.Interrupted, recordsOf(3) + 1},
		"open, nothing in it":          {2, map[string][]byte{spoolFile(2, ".part"): headerOf(m[names[2]])}, auditlog.Interrupted, recordsOf(2) + 1},
		"footer, next not made":        {2, map[string][]byte{spoolFile(2, ".part"): m[names[2]]}, auditlog.Interrupted, recordsOf(3) + 1},
		"footer, next half made":       {2, map[string][]byte{spoolFile(2, ".part"): m[names[2]], spoolFile(3, ".part"): m[names[3]][:20]}, auditlog.Interrupted, recordsOf(3) + 1},
		"footer, next made":            {2, map[string][]byte{spoolFile(2, ".part"): m[names[2]], spoolFile(3, ".part"): headerOf(m[names[3]])}, auditlog.Interrupted, recordsOf(3) + 1},
		"renamed, next not durable":    {2, map[string][]byte{spoolFile(2, ".seg"): m[names[2]]}, auditlog.Interrupted, recordsOf(3) + 1},
		"renamed, next empty":          {2, map[string][]byte{spoolFile(2, ".seg"): m[names[2]], spoolFile(3, ".part"): nil}, auditlog.Interrupted, recordsOf(3) + 1},
		"stored, not removed":          {3, map[string][]byte{spoolFile(2, ".seg"): m[names[2]], spoolFile(3, ".part"): headerOf(m[names[3]])}, auditlog.Interrupted, recordsOf(3) + 1},
		"end written, no footer":       {last, map[string][]byte{spoolFile(last, ".part"): footerLess(last)}, auditlog.Interrupted, recordsOf(last + 1)},
		"last footer, not renamed":     {last, map[string][]byte{spoolFile(last, ".part"): m[names[last]]}, auditlog.Sealed, recordsOf(last + 1)},
		"last renamed":                 {last, map[string][]byte{spoolFile(last, ".seg"): m[names[last]]}, auditlog.Sealed, recordsOf(last + 1)},
		"nothing stored, all in spool": {0, map[string][]byte{spoolFile(0, ".seg"): m[names[0]], spoolFile(1, ".seg"): m[names[1]], spoolFile(2, ".part"): footerLess(2)}, auditlog.Interrupted, recordsOf(3) + 1},
		"probe left":                   {last + 1, map[string][]byte{"probe-1.probe": nil, "tlog-x.00000003.obj.tmp": []byte("tlog/")}, auditlog.Sealed, recordsOf(last + 1)},
	} {
		stored := make(map[string][]byte)
		for _, name := range names[:c.stored] {
			stored[name] = m[name]
		}
		got, s := recovered(t, stored, c.spool)
		recs, rep := readAll(t, got, s)
		if rep.State != c.state || rep.Records != c.min {
			t.Errorf("%s: %s with %d records, want %s with %d: %v", what, rep.State, rep.Records, c.state, c.min, rep.Problems)
		}
		if end, ok := recs[len(recs)-1].Body.(*auditlog.End); !ok || end.Cause != "interrupted" && end.Cause != "client-left" {
			t.Errorf("%s: last record %+v", what, recs[len(recs)-1].Body)
		}
	}
	// A session's first file that is not whole was never promised to anybody.
	if _, s := recovered(t, nil, map[string][]byte{spoolFile(0, ".part"): m[names[0]][:30]}); len(s.Segments) > 0 {
		t.Error("a session out of nothing")
	}
}

// An open segment cut at any byte is sealed with all that was whole.
func TestRecoverCutAnywhere(t *testing.T) {
	m, names := one(t, "none")
	stored := map[string][]byte{names[0]: m[names[0]]}
	whole := m[names[1]]
	for cut := len(headerOf(whole)); cut < len(whole); cut += 29 {
		got, s := recovered(t, stored, map[string][]byte{"sample-2-none.00000001.part": whole[:cut]})
		if _, rep := readAll(t, got, s); rep.State != auditlog.Interrupted {
			t.Errorf("cut at %d: %+v", cut, rep)
		}
	}
}

func TestKeys(t *testing.T) {
	path := filepath.Join(t.TempDir(), "log.key")
	key, err := auditlog.CreateKey(path)
	must(t, err)
	got, err := auditlog.LoadKey(path)
	if err != nil || !got.Equal(key) {
		t.Errorf("load: %v", err)
	}
	pub, err := auditlog.LoadPublicKeys(path + ".pub")
	if err != nil || len(pub) != 1 || !pub[0].Equal(key.Public()) {
		t.Errorf("public half: %v %v", pub, err)
	}
	if files, err := os.ReadDir(filepath.Dir(path)); err != nil || len(files) != 2 {
		t.Errorf("beside the key: %v %v", files, err)
	}
	info, err := os.Stat(path + ".pub")
	if err != nil || info.Mode() != 0o644 {
		t.Errorf("public half: %v %v", info, err)
	}
	if _, err := auditlog.CreateKey(path); !errors.Is(err, fs.ErrExist) {
		t.Error("overwritten")
	} else if again, err := auditlog.LoadKey(path); err != nil || !again.Equal(key) {
		t.Errorf("after a refused creation: %v", err)
	}
	must(t, os.Chmod(path, 0o440)) // a Secret's file
	if again, err := auditlog.LoadKey(path); err != nil || !again.Equal(key) {
		t.Errorf("mode 0440: %v", err)
	}
	for _, mode := range []fs.FileMode{0o640, 0o604, 0o620, 0o444, 0o460, 0o450} {
		must(t, os.Chmod(path, mode))
		if _, err := auditlog.LoadKey(path); err == nil {
			t.Errorf("loaded with mode %o", mode)
		}
	}
	for _, bad := range []string{"", "# nothing\n", "ed25519\n", "ed25519 AAAA\n", "ssh-ed25519 " + "AAAA", "ed25519 !!!"} {
		if keys, err := auditlog.ParsePublicKeys([]byte(bad)); err == nil {
			t.Errorf("%q: %v", bad, keys)
		}
	}
	line := auditlog.FormatPublicKey(pub[0])
	if keys, err := auditlog.ParsePublicKeys([]byte("\n# c\n" + line + " gate one\n" + line)); err != nil || len(keys) != 2 {
		t.Errorf("%v %v", keys, err)
	}
	// As `openssl pkey -pubout -outform DER | tail -c 32 | sha256sum` gives it for 32 zeros.
	if got := auditlog.Fingerprint(make([]byte, 32)); got != "SHA256:Zmh6rfhivXdsj8GLjp+OIAiXFIVu4jOzkCpZHQ1fKSU" {
		t.Errorf("fingerprint %s", got)
	}
}

// spoiler is a store under which a segment's file is spoilt in the spool once its bytes are taken.
type spoiler struct{ shelf }

func (s *spoiler) Put(ctx context.Context, name string, r io.Reader, size int64) error {
	if err := s.shelf.Put(ctx, name, r, size); err != nil || !strings.HasPrefix(name, auditlog.SessionPrefix) {
		return err
	}
	return os.WriteFile(r.(*os.File).Name(), make([]byte, size), 0o600)
}

// A log's leaf is of what the gate wrote, not of what its file says after.
func TestLeafOfWhatWasWritten(t *testing.T) {
	store := &spoiler{shelf{objects: make(map[string][]byte)}}
	l, err := auditlog.Open(t.Context(), powerConfig(t.TempDir()), testKey, store, "gate-1", slog.New(slog.DiscardHandler))
	must(t, err)
	r := l.New("s1")
	login(t, r)
	must(t, r.Begin())
	must(t, r.Close(&auditlog.End{Cause: "client-left"}))
	closeLog(t, l)
	if !hasLeaf(store.source(), "s1") {
		t.Error("no leaf")
	}
	if err := checkTree(store.source(), nil, 1); err != nil {
		t.Error(err)
	}
}
