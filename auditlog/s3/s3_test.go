package s3

import (
	"bytes"
	"context"
	"crypto/ed25519"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"net/http"
	"net/http/httptest"
	"os"
	"path/filepath"
	"strings"
	"sync/atomic"
	"testing"
	"time"

	"github.com/minio/minio-go/v7"
	"go.uber.org/goleak"

	"github.com/sallyport/sallyport/auditlog"
	"github.com/sallyport/sallyport/auditlog/s3/s3test"
	"github.com/sallyport/sallyport/auditlog/storetest"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

func startServer(t *testing.T) *s3test.Server { t.Helper(); return startBy(t, s3test.Start) }

func startBy(t *testing.T, start func(dir string) (*s3test.Server, error)) *s3test.Server {
	t.Helper()
	s, err := start(t.TempDir())
	if errors.Is(err, s3test.ErrNoBinary) && os.Getenv(s3test.RequireEnv) == "" {
		t.Skip(err)
	}
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := s.Stop(); err != nil {
			t.Error(err)
		}
	})
	return s
}

// config is what a user needs for the server; below, a prefix of its own.
func config(t *testing.T, s *s3test.Server, u s3test.User, below string) Config {
	t.Helper()
	file := filepath.Join(t.TempDir(), u.AccessKey)
	if err := u.WriteCredentials(file); err != nil {
		t.Fatal(err)
	}
	return Config{Bucket: s3test.Bucket, Prefix: s3test.Prefix + below, Endpoint: s.Endpoint(), CredentialsFile: file}
}

func storeOf(t *testing.T, c Config) *Store {
	t.Helper()
	s, err := NewStore(c, slog.New(slog.DiscardHandler))
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { s.Close() })
	return s
}

func sourceOf(t *testing.T, c Config) *Source {
	t.Helper()
	s, err := OpenSource(c)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { s.Close() })
	return s
}

func put(t *testing.T, s *Store, name, content string) {
	t.Helper()
	if err := s.Put(t.Context(), name, strings.NewReader(content), int64(len(content))); err != nil {
		t.Fatalf("put %s: %v", name, err)
	}
}

// list gives the names and contents of what is there.
func list(t *testing.T, s *Source) map[string]string {
	t.Helper()
	all := map[string]string{}
	for o, err := range s.List(t.Context(), "") {
		if err != nil {
			t.Fatal(err)
		}
		r, err := s.Open(t.Context(), o.Name)
		if err != nil {
			t.Fatal(err)
		}
		b, err := io.ReadAll(r)
		if err := errors.Join(err, r.Close()); err != nil {
			t.Fatal(err)
		}
		all[o.Name] = string(b)
	}
	return all
}

// Over TLS the authority that has signed the server's certificate must be known; where it is not, the error says what to do,
// and nothing is sent.
func TestTLS(t *testing.T) {
	server := startBy(t, s3test.StartTLS)
	c := config(t, server, s3test.Both, "/tls")
	c.CAFile = server.CAFile()
	big := strings.Repeat("a segment", 100000)
	put(t, storeOf(t, c), "sessions/one", big)
	if got := list(t, sourceOf(t, c)); len(got) != 1 || got["sessions/one"] != big {
		t.Errorf("%d objects came back, and not what was put", len(got))
	}
	if err := storeOf(t, c).Check(t.Context(), "gate"); err != nil {
		t.Error(err)
	}

	wrong := filepath.Join(t.TempDir(), "ca.pem")
	if err := s3test.WriteAuthority(wrong); err != nil {
		t.Fatal(err)
	}
	system, elsewhere, name := c, c, c
	system.CAFile, elsewhere.CAFile = "", wrong
	name.Endpoint = strings.Replace(c.Endpoint, "127.0.0.1", "localhost", 1)
	for want, c := range map[string]Config{
		"(ca_file, or --ca-file)":                system,
		"is signed by none of those in " + wrong: elsewhere,
		"not for this name":                      name,
	} {
		store, source := storeOf(t, c), sourceOf(t, c)
		_, open := source.Open(t.Context(), "sessions/one")
		var listed error
		for _, err := range source.List(t.Context(), "") {
			listed = err
		}
		for what, err := range map[string]error{
			"put":   store.Put(t.Context(), "sessions/two", strings.NewReader("x"), 1),
			"check": store.Check(t.Context(), "gate"),
			"list":  listed, "open": open,
		} {
			if err == nil || !strings.Contains(err.Error(), want) || len(err.Error()) > 600 {
				t.Errorf("%s: %v, want %q", what, err, want)
			}
		}
	}
	if got := list(t, sourceOf(t, c)); len(got) != 2 || got["check/gate"] == "" {
		t.Errorf("%d objects, want the one that was put and the check's", len(got))
	}

	// A file that is none is found before anything is dialled.
	for want, file := range map[string]string{"no such file": wrong + ".nosuch", "holds no certificate": c.CredentialsFile} {
		c.CAFile = file
		if _, err := NewStore(c, slog.New(slog.DiscardHandler)); err == nil || !strings.Contains(err.Error(), "ca_file: ") || !strings.Contains(err.Error(), want) {
			t.Errorf("%v, want %q", err, want)
		}
	}
}

// The store's contract holds with a credential that may put and read.
func TestStore(t *testing.T) {
	server := startServer(t)
	var n atomic.Int32
	storetest.Run(t, func(t *testing.T) (auditlog.Store, auditlog.Source) {
		below := fmt.Sprintf("/contract-%d", n.Add(1))
		return storeOf(t, config(t, server, s3test.Both, below)), sourceOf(t, config(t, server, s3test.Reader, below))
	})
}

// A credential that may only put is enough, and nothing is lost or overwritten when a name is taken.
func TestPutOnly(t *testing.T) {
	server := startServer(t)
	cfg := config(t, server, s3test.Putter, "")
	store, src := storeOf(t, cfg), sourceOf(t, config(t, server, s3test.Reader, ""))
	put(t, store, "sessions/a", "one")
	put(t, store, "sessions/a", "one")
	put(t, store, "sessions/a", "two")
	put(t, store, "sessions/a", "two")
	one, err1 := newObject(strings.NewReader("one"), 3)
	two, err2 := newObject(strings.NewReader("two"), 3)
	if err := errors.Join(err1, err2); err != nil {
		t.Fatal(err)
	}
	want := map[string]string{"sessions/a": "one", auditlog.DuplicateName("sessions/a", one.sha256): "one",
		auditlog.DuplicateName("sessions/a", two.sha256): "two"}
	if got := list(t, src); fmt.Sprint(got) != fmt.Sprint(want) {
		t.Errorf("%v, want %v", got, want)
	}
	for range 2 {
		if err := store.Check(t.Context(), "gate-1"); err != nil {
			t.Error(err)
		}
	}

	own := sourceOf(t, cfg)
	for _, err := range own.List(t.Context(), "") {
		if err == nil {
			t.Error("the gate's credential lists")
		}
	}
	if r, err := own.Open(t.Context(), "sessions/a"); err == nil {
		r.Close()
		t.Error("the gate's credential reads")
	}
	client, done, err := server.Client(s3test.Putter)
	if err != nil {
		t.Fatal(err)
	}
	defer done()
	if err := client.RemoveObject(t.Context(), s3test.Bucket, s3test.Prefix+"/sessions/a", minio.RemoveObjectOptions{}); err == nil {
		t.Error("the gate's credential removes")
	}
	if err := storeOf(t, config(t, server, s3test.Reader, "")).Check(t.Context(), "gate-2"); err == nil {
		t.Error("check is content with a credential that can't put")
	}
	if err := storeOf(t, config(t, server, s3test.Putter, "-elsewhere")).Put(t.Context(), "x", strings.NewReader("x"), 1); err == nil {
		t.Error("put beside the prefix")
	}
}

// A credential that is replaced in its file is taken without a restart.
func TestCredentialRotated(t *testing.T) {
	server := startServer(t)
	cfg := config(t, server, s3test.User{AccessKey: s3test.Putter.AccessKey, SecretKey: "an-old-secret"}, "")
	store := storeOf(t, cfg)
	if err := store.Put(t.Context(), "sessions/a", strings.NewReader("a"), 1); err == nil {
		t.Fatal("put with a wrong secret")
	} else if strings.Contains(err.Error(), "an-old-secret") {
		t.Errorf("says the secret: %v", err)
	}
	if err := s3test.Putter.WriteCredentials(cfg.CredentialsFile); err != nil {
		t.Fatal(err)
	}
	put(t, store, "sessions/a", "a")
}

// While the server is away sessions go on, and what they wrote is stored when it is back, by this gate or the next.
func TestServerAway(t *testing.T) {
	server := startServer(t)
	store, src := storeOf(t, config(t, server, s3test.Putter, "")), sourceOf(t, config(t, server, s3test.Reader, ""))
	spool := t.TempDir()
	key := ed25519.NewKeyFromSeed(bytes.Repeat([]byte{7}, ed25519.SeedSize))
	openLog := func() *auditlog.Log {
		l, err := auditlog.Open(t.Context(), auditlog.Config{Spool: spool, SegmentAge: 20 * time.Millisecond, SyncInterval: 5 * time.Millisecond},
			key, store, "gate-1", slog.New(slog.DiscardHandler))
		if err != nil {
			t.Fatal(err)
		}
		return l
	}
	l := openLog()
	session := func(id string, during func(r *auditlog.Recorder)) {
		t.Helper()
		r := l.New(id)
		err := errors.Join(r.Record(0, &auditlog.Connect{Source: "192.0.2.7:4022"}), r.Begin(), r.Record(1, &auditlog.Data{Data: []byte("before")}), r.Sync(t.Context()))
		if err != nil {
			t.Fatal(err)
		}
		during(r)
		if err := errors.Join(r.Record(1, &auditlog.Data{Data: []byte("after")}), r.Close(&auditlog.End{Cause: "client-left"})); err != nil {
			t.Fatal(err)
		}
	}
	until := func(what string, ok func() bool) {
		t.Helper()
		for end := time.Now().Add(30 * time.Second); !ok(); time.Sleep(5 * time.Millisecond) {
			if time.Now().After(end) {
				t.Fatalf("not within 30 s: %s", what)
			}
		}
	}
	session("s1", func(*auditlog.Recorder) {
		until("a segment is stored", func() bool { return l.Stats().Stored > 0 })
		if err := server.Stop(); err != nil {
			t.Fatal(err)
		}
	})
	session("s2", func(*auditlog.Recorder) {})
	until("the store's error shows", func() bool { return l.StoreErr() != nil })
	if err := l.Ready(); err != nil {
		t.Errorf("not ready for sessions while the store is away: %v", err)
	}
	if err := server.Run(); err != nil {
		t.Fatal(err)
	}
	until("all is stored", func() bool { return l.Stats().Waiting == 0 && l.StoreErr() == nil })
	if err := server.Stop(); err != nil {
		t.Fatal(err)
	}
	session("s3", func(*auditlog.Recorder) {})
	ctx, cancel := context.WithTimeout(t.Context(), 50*time.Millisecond)
	defer cancel()
	if err := l.Close(ctx); err != nil {
		t.Fatal(err)
	}
	if err := server.Run(); err != nil {
		t.Fatal(err)
	}
	l = openLog()
	if err := l.Close(t.Context()); err != nil { // waits for the store
		t.Fatal(err)
	}
	states := map[string]auditlog.State{}
	for log, err := range auditlog.Logs(t.Context(), src, auditlog.SessionPrefix) {
		if err != nil {
			t.Fatal(err)
		}
		rep := auditlog.NewSessionReader(src, log, key.Public().(ed25519.PublicKey)).Verify(t.Context())
		states[rep.ID] = rep.State
	}
	for _, id := range []string{"s1", "s2", "s3"} {
		if states[id] != auditlog.Sealed {
			t.Errorf("%s: %q", id, states[id])
		}
	}
}

// A server that takes the connection and answers nothing holds a Put no longer than the limit, nor does one that stops
// in the middle of an answer.
func TestStall(t *testing.T) {
	release := make(chan struct{})
	server := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		if r.Method == http.MethodGet {
			w.Header().Set("Content-Length", "10")
			w.Header().Set("Last-Modified", time.Unix(0, 0).UTC().Format(http.TimeFormat))
			io.WriteString(w, "12345")
			w.(http.Flusher).Flush()
		}
		<-release
	}))
	defer server.Close()
	defer close(release)
	file := filepath.Join(t.TempDir(), "credentials")
	if err := s3test.Root.WriteCredentials(file); err != nil {
		t.Fatal(err)
	}
	cfg := Config{Bucket: "evidence", Endpoint: server.URL, CredentialsFile: file}
	store, err1 := newStore(cfg, slog.New(slog.DiscardHandler), 200*time.Millisecond)
	src, err2 := openSource(cfg, 200*time.Millisecond)
	if err := errors.Join(err1, err2); err != nil {
		t.Fatal(err)
	}
	defer store.Close()
	defer src.Close()
	if err := store.Put(t.Context(), "sessions/a", bytes.NewReader([]byte("a")), 1); err == nil {
		t.Error("put without an answer")
	}
	r, err := src.Open(t.Context(), "sessions/a")
	if err != nil {
		t.Fatal(err)
	}
	defer r.Close()
	if b, err := io.ReadAll(r); err == nil || string(b) != "12345" {
		t.Errorf("%q, %v", b, err)
	}
}

// An answer that is cut off is not taken for the end of the object, which would look like damage.
func TestCutOff(t *testing.T) {
	server := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		w.Header().Set("Content-Length", "10")
		w.Header().Set("Last-Modified", time.Unix(0, 0).UTC().Format(http.TimeFormat))
		io.WriteString(w, "12345")
	}))
	defer server.Close()
	file := filepath.Join(t.TempDir(), "credentials")
	if err := s3test.Root.WriteCredentials(file); err != nil {
		t.Fatal(err)
	}
	src := sourceOf(t, Config{Bucket: "evidence", Endpoint: server.URL, CredentialsFile: file})
	r, err := src.Open(t.Context(), "sessions/a")
	if err != nil {
		t.Fatal(err)
	}
	defer r.Close()
	if _, err := io.ReadAll(r); err == nil || errors.Is(err, io.ErrUnexpectedEOF) {
		t.Errorf("%v", err)
	}
}

func TestConfig(t *testing.T) {
	good := Config{Bucket: "evidence"}
	if err := good.WithDefaults().Validate(); err != nil {
		t.Error(err)
	}
	for what, c := range map[string]Config{
		"bucket: not set":  {},
		"bucket: \"A\"":    {Bucket: "A"},
		"prefix: \"/x\"":   {Bucket: "evidence", Prefix: "/x"},
		"prefix: \"a/.b\"": {Bucket: "evidence", Prefix: "a/.b"},
		"prefix: \"../x\"": {Bucket: "evidence", Prefix: "../x"},
		"region: ":         {Bucket: "evidence", Region: "a/b"},
		"lookup: ":         {Bucket: "evidence", Lookup: "x"},
		"want https":       {Bucket: "evidence", Endpoint: "s3.example.com"},
		"https://HOST":     {Bucket: "evidence", Endpoint: "https://s3.example.com/bucket"},
		"//HOST":           {Bucket: "evidence", Endpoint: "https://a:b@s3.example.com"},
		"in the clear":     {Bucket: "evidence", Endpoint: "http://s3.example.com"},
	} {
		if err := c.WithDefaults().Validate(); err == nil || !strings.Contains(err.Error(), what) {
			t.Errorf("%+v: %v, want %q", c, err, what)
		}
	}
	for _, c := range []Config{{Bucket: "evidence", Endpoint: "http://127.0.0.1:9"}, {Bucket: "evidence", Endpoint: "http://s3.example.com", Insecure: true},
		{Bucket: "evidence", Prefix: "a/b/"}} {
		if err := c.WithDefaults().Validate(); err != nil {
			t.Errorf("%+v: %v", c, err)
		}
	}
	for _, name := range []string{"AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "AWS_ACCESS_KEY", "AWS_SECRET_KEY", "AWS_SHARED_CREDENTIALS_FILE", "AWS_PROFILE"} {
		t.Setenv(name, "")
	}
	if _, err := NewStore(good, slog.New(slog.DiscardHandler)); err == nil || !strings.Contains(err.Error(), "no credential") {
		t.Errorf("without a credential: %v", err)
	}
	t.Setenv("AWS_ACCESS_KEY_ID", "id")
	t.Setenv("AWS_SECRET_ACCESS_KEY", "secret")
	storeOf(t, good)
	missing := good
	missing.CredentialsFile = filepath.Join(t.TempDir(), "nosuch")
	if _, err := NewStore(missing, slog.New(slog.DiscardHandler)); err == nil {
		t.Error("a credentials' file that is not there, and the environment's taken instead")
	}
}

func TestParseURL(t *testing.T) {
	for in, want := range map[string]string{"s3://evidence": "evidence ", "s3://evidence/": "evidence ", "s3://evidence/a/b/": "evidence a/b",
		"s3://": "", "s3:///a": "", "s3://A/b": "", "https://evidence/a": ""} {
		bucket, prefix, err := ParseURL(in)
		if got := bucket + " " + prefix; want != "" && (got != want || err != nil) || want == "" && err == nil {
			t.Errorf("%s: %q %v, want %q", in, got, err, want)
		}
	}
}
