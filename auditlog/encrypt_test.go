package auditlog_test

import (
	"bytes"
	"encoding/binary"
	"errors"
	"hash/crc32"
	"log/slog"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"filippo.io/age"

	"github.com/sallyport/sallyport/auditlog"
	"github.com/sallyport/sallyport/auditlog/agekeys"
	"github.com/sallyport/sallyport/auditlog/file"
)

// The auditors of the tests. Their keys are in the repository: they protect nothing.
const (
	nativeAuditor = "testdata/auditor.age.txt"
	hybridAuditor = "testdata/auditor.pq.age.txt"
	sshAuditor    = "testdata/auditor_ed25519"
	encryptedDir  = "testdata/v1-encrypted"
)

const secret = "the cat sat on the payments"

// identitiesOf reads a file of identities that has no passphrase.
func identitiesOf(t testing.TB, file string) []age.Identity {
	t.Helper()
	ids, err := agekeys.LoadIdentities(file, nil)
	if err != nil {
		t.Fatal(err)
	}
	return ids
}

// recipientOf is the recipient of an identity's file, as its comment has it, or the file beside it.
func recipientOf(t testing.TB, file string) string {
	t.Helper()
	if b, err := os.ReadFile(file + ".pub"); err == nil {
		return strings.TrimSpace(string(b))
	}
	b, err := os.ReadFile(file)
	if err != nil {
		t.Fatal(err)
	}
	_, rest, _ := strings.Cut(string(b), "# public key: ")
	line, _, _ := strings.Cut(rest, "\n")
	return line
}

func encryptedConfig(t testing.TB, dir string, auditors ...string) auditlog.Config {
	t.Helper()
	cfg := fastConfig(dir)
	for _, a := range auditors {
		cfg.Recipients = append(cfg.Recipients, recipientOf(t, a))
	}
	return cfg
}

// writeEncrypted writes one session of several segments into the store.
func writeEncrypted(t *testing.T, cfg auditlog.Config, store auditlog.Store, id string) {
	t.Helper()
	l := openGate(t, cfg, store)
	r := l.New(id)
	login(t, r)
	must(t, r.Begin())
	for i := range 3 {
		must(t, r.Record(1, &auditlog.Data{Stream: auditlog.Output, Data: []byte(strings.Repeat(secret+"\n", 40))}))
		must(t, r.Record(1, &auditlog.Alert{Name: secret}))
		waitFor(t, func() bool { return l.Stats().Stored >= uint64(i+1) })
	}
	must(t, r.Close(&auditlog.End{Cause: "client-left"}))
	closeLog(t, l)
}

func readWith(t testing.TB, src auditlog.Source, s auditlog.Stored, ids ...age.Identity) ([]auditlog.Record, auditlog.Report) {
	t.Helper()
	r := auditlog.NewSessionReader(src, s, testPublic())
	r.Decrypt(ids...)
	recs := slices.Collect(r.Records(t.Context()))
	if err := r.Err(); err != nil {
		t.Fatal(err)
	}
	return recs, r.Report()
}

// Each kind of recipient reads a log that is encrypted to it; who is none verifies it, and reads nothing of it.
func TestEncrypted(t *testing.T) {
	for _, c := range []struct {
		to    []string
		types string
	}{
		{[]string{nativeAuditor}, "X25519"},
		{[]string{hybridAuditor}, "mlkem768x25519"},
		{[]string{sshAuditor}, "ssh-ed25519"},
		{[]string{nativeAuditor, sshAuditor}, "X25519 ssh-ed25519"},
	} {
		for _, codec := range []string{"zstd", "s2", "none"} {
			store, dir := newStore(t)
			cfg := encryptedConfig(t, t.TempDir(), c.to...)
			cfg.Codec = codec
			writeEncrypted(t, cfg, store, "s1")
			m := load(t, dir)
			for name, b := range m {
				if bytes.Contains(b, []byte("cat sat")) || bytes.Contains(b, []byte("alice")) || bytes.Contains(b, []byte("192.0.2")) {
					t.Errorf("%s: in the clear", name)
				}
			}
			all := logs(t, m, auditlog.SessionPrefix)
			for _, a := range []string{nativeAuditor, hybridAuditor, sshAuditor} {
				recs, rep := readWith(t, m, all[0], identitiesOf(t, a)...)
				if rep.State != auditlog.Sealed || strings.Join(rep.Recipients, " ") != c.types || rep.Segments < 4 {
					t.Fatalf("%v %s: %+v", c.to, a, rep)
				}
				if !slices.Contains(c.to, a) {
					if len(recs) != 0 || rep.Unread != rep.Records || rep.Records < 9 {
						t.Errorf("%v, read by %s: %d records, %+v", c.to, a, len(recs), rep)
					}
					continue
				}
				if rep.Unread != 0 || uint64(len(recs)) != rep.Records || recs[len(recs)-1].Body.(*auditlog.End).Cause != "client-left" {
					t.Errorf("%v, read by %s: %+v", c.to, a, rep)
				}
				out := ""
				for _, rec := range recs {
					if d, ok := rec.Body.(*auditlog.Data); ok {
						out += string(d.Data)
					}
				}
				if out != strings.Repeat(secret+"\n", 120) {
					t.Errorf("%v, read by %s: %q", c.to, a, out)
				}
			}
			if recs, rep := readWith(t, m, all[0]); len(recs) != 0 || rep.State != auditlog.Sealed || rep.Unread != rep.Records {
				t.Errorf("%v, read by nobody: %+v", c.to, rep)
			}
		}
	}
}

// What a killed gate left is cut back and sealed by one that can't read it, at whatever byte it was cut; the next sequence
// goes on from the frames' headers. What is in the spool is not in the clear at any moment.
func TestEncryptedRecovery(t *testing.T) {
	store, storeDir := newStore(t)
	cfg := encryptedConfig(t, t.TempDir(), nativeAuditor)
	cfg.SegmentAge = time.Hour // one segment
	l := openGate(t, cfg, store)
	r := l.New("s1")
	login(t, r)
	must(t, r.Begin())
	for range 3 {
		must(t, r.Record(1, &auditlog.Data{Stream: auditlog.Output, Data: []byte(secret)}))
		must(t, r.Sync(t.Context()))
	}
	part := filepath.Join(cfg.Spool, "s1.00000000.part")
	open, err := os.ReadFile(part)
	must(t, err)
	if bytes.Contains(open, []byte("cat sat")) || bytes.Contains(open, []byte("alice")) {
		t.Error("the spool is in the clear")
	}
	must(t, r.Close(&auditlog.End{Cause: "client-left"}))
	closeLog(t, l)
	sealed := load(t, storeDir)
	whole := slices.Concat(sealed[logs(t, sealed, auditlog.SessionPrefix)[0].Segments[0].Name])
	ids := identitiesOf(t, nativeAuditor)

	offsets, ended := frames(t, whole) // where frames begin; the footer's last
	if len(offsets) != 6 || !ended {
		t.Fatalf("frames at %v, ended %v", offsets, ended)
	}
	header := offsets[0]
	for cut := len(whole); cut >= header; cut -= 1 + cut%23 {
		dir := t.TempDir()
		store, storeDir := newStore(t)
		cfg := encryptedConfig(t, dir, hybridAuditor) // the restart's recipients are others
		must(t, os.Mkdir(cfg.Spool, 0o700))
		must(t, os.WriteFile(filepath.Join(cfg.Spool, "s1.00000000.part"), whole[:cut], 0o600))
		closeLog(t, openGate(t, cfg, store))
		src := source(t, storeDir)
		s := logs(t, src, auditlog.SessionPrefix)[0]
		recs, rep := readWith(t, src, s, ids...)
		frames := 0
		for _, at := range offsets[1:] {
			if at <= cut {
				frames++
			}
		}
		end, ok := recs[len(recs)-1].Body.(*auditlog.End)
		if !ok || rep.Unread != 0 || len(rep.Problems) > 0 {
			t.Fatalf("cut at %d: %+v", cut, rep)
		}
		// The frames: login, three times data, end.
		want := []int{1, 4, 5, 6, 7, 7}[frames]
		if len(recs) != want {
			t.Fatalf("cut at %d: %d records, want %d of %d frames", cut, len(recs), want, frames)
		}
		switch {
		case frames == 5 && end.Cause != "client-left", frames < 5 && end.Cause != "interrupted":
			t.Fatalf("cut at %d: ends as %s", cut, end.Cause)
		case cut < len(whole) && rep.State != auditlog.Interrupted, cut == len(whole) && rep.State != auditlog.Sealed:
			t.Fatalf("cut at %d: %s", cut, rep.State)
		}
	}
}

// frames gives the offsets of a segment's frames, and whether the last before the footer says that the log ends with it.
func frames(t *testing.T, b []byte) (offsets []int, ended bool) {
	t.Helper()
	at := 12 + int(binary.BigEndian.Uint16(b[10:])) + 4
	for at < len(b) {
		offsets = append(offsets, at)
		if b[at] == 1 {
			flags := binary.BigEndian.Uint16(b[at+2:])
			if flags&1 == 0 {
				t.Error("a frame is in the clear")
			}
			ended = flags&2 != 0
		}
		at += 28 + int(binary.BigEndian.Uint32(b[at+4:]))
	}
	return offsets, ended
}

// One who has the gate's signing key, and so makes all hashes and CRCs right, still can't put a frame elsewhere: into another segment,
// another place, another log, or under another header.
func TestFramesStay(t *testing.T) {
	ids := identitiesOf(t, nativeAuditor)
	store, dir := newStore(t)
	cfg := encryptedConfig(t, t.TempDir(), nativeAuditor)
	cfg.Codec = "none"
	writeEncrypted(t, cfg, store, "s1")
	m := load(t, dir)
	names := logs(t, m, auditlog.SessionPrefix)[0].Segments
	segment := m[names[1].Name]
	at, _ := frames(t, segment)
	for what, change := range map[string]func(b []byte){
		"nothing":            func([]byte) {},
		"records":            func(b []byte) { b[at[0]+15]++ },
		"ends":               func(b []byte) { b[at[0]+3] ^= 2 },
		"payload":            func(b []byte) { b[at[0]+40] ^= 1 },
		"wrapped key's home": func(b []byte) { b[20] ^= 1 }, // the gate's name
	} {
		b := bytes.Clone(segment)
		change(b)
		n := 12 + int(binary.BigEndian.Uint16(b[10:]))
		binary.BigEndian.PutUint32(b[n:], crc32.Checksum(b[:n], crc32.MakeTable(crc32.Castagnoli)))
		crc := crc32.Checksum(b[at[0]:at[0]+24], crc32.MakeTable(crc32.Castagnoli))
		binary.BigEndian.PutUint32(b[at[0]+24:], crc32.Update(crc, crc32.MakeTable(crc32.Castagnoli), b[at[0]+28:at[1]]))
		s, err := auditlog.NewSegmentReader(bytes.NewReader(b))
		must(t, err)
		must(t, s.Decrypt(ids...))
		_, err = s.Next()
		var damage *auditlog.DamageError
		if what == "nothing" {
			must(t, err)
		} else if !errors.As(err, &damage) || !strings.Contains(damage.What, "does not decrypt") {
			t.Errorf("%s: %v", what, err)
		}
	}
	// The frame of another segment of the same length, under this one's header.
	other := m[names[2].Name]
	atOther, _ := frames(t, other)
	b := slices.Concat(segment[:at[0]], other[atOther[0]:])
	copy(b[at[0]+16:at[0]+24], segment[at[0]+16:at[0]+24]) // its sequence
	crc := crc32.Checksum(b[at[0]:at[0]+24], crc32.MakeTable(crc32.Castagnoli))
	end := at[0] + atOther[1] - atOther[0]
	binary.BigEndian.PutUint32(b[at[0]+24:], crc32.Update(crc, crc32.MakeTable(crc32.Castagnoli), b[at[0]+28:end]))
	s, err := auditlog.NewSegmentReader(bytes.NewReader(b))
	must(t, err)
	must(t, s.Decrypt(ids...))
	if _, err := s.Next(); err == nil || !strings.Contains(err.Error(), "does not decrypt") {
		t.Errorf("frame of another segment: %v", err)
	}
}

// No key and no nonce is used twice: the same records, written twice, share no stored payload.
func TestFreshKeys(t *testing.T) {
	seen := map[string]bool{}
	for i := range 2 {
		store, dir := newStore(t)
		writeEncrypted(t, encryptedConfig(t, t.TempDir(), nativeAuditor), store, "s1")
		for name, b := range load(t, dir) {
			at, _ := frames(t, b)
			for j := range len(at) - 1 {
				payload := string(b[at[j]+28 : at[j]+28+16])
				if seen[payload] {
					t.Errorf("run %d: %s: frame %d begins as another does", i, name, j)
				}
				seen[payload] = true
			}
		}
	}
	if len(seen) < 8 {
		t.Errorf("only %d frames", len(seen))
	}
}

// What is wrong with recipients is said when the log is opened, without what was written there.
func TestRecipientsConfig(t *testing.T) {
	id := strings.Fields(string(mustRead(t, nativeAuditor)))
	store, _ := newStore(t)
	many := func(n int, s string) []string { return slices.Repeat([]string{s}, n) }
	for want, cfg := range map[string]auditlog.Config{
		"either all or none":            {Recipients: []string{recipientOf(t, nativeAuditor), recipientOf(t, hybridAuditor)}},
		"this is an identity, a secret": {Recipients: []string{id[len(id)-1]}},
		"number 2: not a recipient":     {Recipients: []string{recipientOf(t, nativeAuditor), "age1nonsense"}},
		"only ssh-ed25519 is one":       {Recipients: []string{"ssh-rsa AAAA"}},
		"no such file":                  {RecipientsFile: filepath.Join(t.TempDir(), "none")},
		"line 3: this is an identity":   {RecipientsFile: nativeAuditor},
		"too many recipients":           {Recipients: many(60, recipientOf(t, hybridAuditor))},
	} {
		cfg.Spool = t.TempDir()
		l, err := auditlog.Open(t.Context(), cfg, testKey, store, "gate-1", slog.New(slog.DiscardHandler))
		if err == nil {
			closeLog(t, l)
		}
		if err == nil || !strings.Contains(err.Error(), want) || strings.Contains(err.Error(), "SECRET-KEY-1") {
			t.Errorf("%v, want %q", err, want)
		}
	}
	file := filepath.Join(t.TempDir(), "recipients")
	must(t, os.WriteFile(file, []byte("# auditors\n\n"+recipientOf(t, nativeAuditor)+"\n"+recipientOf(t, sshAuditor)+"\n"), 0o600))
	l, err := auditlog.Open(t.Context(), auditlog.Config{Spool: t.TempDir(), RecipientsFile: file}, testKey, store, "gate-1", slog.New(slog.DiscardHandler))
	must(t, err)
	closeLog(t, l)
	// That many fit.
	l, err = auditlog.Open(t.Context(), auditlog.Config{Spool: t.TempDir(), Recipients: many(30, recipientOf(t, hybridAuditor))}, testKey,
		store, "gate-1", slog.New(slog.DiscardHandler))
	must(t, err)
	closeLog(t, l)
}

// The kept encrypted sample reads as it did when it was written.
func TestEncryptedSample(t *testing.T) {
	if *update {
		must(t, os.RemoveAll(encryptedDir))
		store, err := file.NewStore(encryptedDir)
		must(t, err)
		writeEncrypted(t, encryptedConfig(t, t.TempDir(), nativeAuditor, sshAuditor), store, "sample-encrypted")
		writeEncrypted(t, encryptedConfig(t, t.TempDir(), hybridAuditor), store, "sample-hybrid")
		must(t, os.RemoveAll(filepath.Join(encryptedDir, ".tmp")))
	}
	m := load(t, encryptedDir)
	ids := append(identitiesOf(t, sshAuditor), identitiesOf(t, hybridAuditor)...)
	all := logs(t, m, auditlog.SessionPrefix)
	if len(all) != 2 {
		t.Fatalf("%d sessions", len(all))
	}
	for _, s := range all {
		recs, rep := readWith(t, m, s, ids...)
		if rep.State != auditlog.Sealed || rep.Unread != 0 || len(recs) < 9 || rep.Segments < 4 {
			t.Errorf("%+v", rep)
		}
		if b, ok := recs[len(recs)-2].Body.(*auditlog.Alert); !ok || b.Name != secret {
			t.Errorf("%+v", recs[len(recs)-2])
		}
	}
}

func mustRead(t *testing.T, file string) []byte {
	t.Helper()
	b, err := os.ReadFile(file)
	must(t, err)
	return b
}

// FuzzEncryptedSegment: a reader with an identity, on hostile bytes.
func FuzzEncryptedSegment(f *testing.F) {
	for _, b := range load(f, encryptedDir) {
		f.Add(b)
		f.Add(b[:len(b)/2])
	}
	ids := append(identitiesOf(f, nativeAuditor), identitiesOf(f, hybridAuditor)...)
	f.Fuzz(func(t *testing.T, b []byte) {
		s, err := auditlog.NewSegmentReader(bytes.NewReader(fixCRC(bytes.Clone(b))))
		if err != nil {
			return
		}
		if _, err := s.Encrypted(); err != nil {
			return
		}
		_ = s.Decrypt(ids...)
		for err == nil {
			_, err = s.Next()
		}
	})
}
