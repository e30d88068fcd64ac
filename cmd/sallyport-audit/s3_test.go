package main

import (
	"bytes"
	"context"
	"errors"
	"io"
	"log/slog"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/sallyport/sallyport/auditlog"
	"github.com/sallyport/sallyport/auditlog/s3"
	"github.com/sallyport/sallyport/auditlog/s3/s3test"
)

// All commands read from a bucket, with a credential that can only read.
func TestBucket(t *testing.T) {
	server, err := s3test.Start(t.TempDir())
	if errors.Is(err, s3test.ErrNoBinary) && os.Getenv(s3test.RequireEnv) == "" {
		t.Skip(err)
	}
	if err != nil {
		t.Fatal(err)
	}
	defer server.Stop()
	putter, reader := filepath.Join(t.TempDir(), "putter"), filepath.Join(t.TempDir(), "reader")
	if err := errors.Join(s3test.Putter.WriteCredentials(putter), s3test.Reader.WriteCredentials(reader)); err != nil {
		t.Fatal(err)
	}
	store, err := s3.NewStore(s3.Config{Bucket: s3test.Bucket, Prefix: s3test.Prefix, Endpoint: server.Endpoint(), CredentialsFile: putter},
		slog.New(slog.DiscardHandler))
	if err != nil {
		t.Fatal(err)
	}
	defer store.Close()
	l, err := auditlog.Open(t.Context(), auditlog.Config{Spool: t.TempDir(), SegmentAge: 50 * time.Millisecond, SyncInterval: 10 * time.Millisecond},
		testKey, store, "gate-1", slog.New(slog.DiscardHandler))
	if err != nil {
		t.Fatal(err)
	}
	session(t, l, "s1", map[uint32][]auditlog.Body{1: {&auditlog.Request{Type: "exec", Command: []byte("date"), OK: true},
		&auditlog.Data{Stream: auditlog.Output, Data: []byte("noon\n")}}})
	live := l.New("s2")
	if err := errors.Join(live.Record(0, &auditlog.Connect{Source: "192.0.2.7:4022"}), live.Begin()); err != nil {
		t.Fatal(err)
	}
	for l.Stats().Waiting > 0 || l.Stats().Stored < 2 {
		time.Sleep(5 * time.Millisecond)
	}

	t.Setenv("AWS_ENDPOINT_URL_S3", "")
	t.Setenv("AWS_ENDPOINT_URL", server.Endpoint())
	t.Setenv("AWS_SHARED_CREDENTIALS_FILE", reader)
	for _, name := range []string{"AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "AWS_PROFILE", "AWS_CA_BUNDLE", "AWS_REGION"} {
		t.Setenv(name, "")
	}
	const url = "s3://" + s3test.Bucket + "/" + s3test.Prefix
	for _, c := range []struct {
		args []string
		want string
	}{
		{[]string{"list", url}, "alice"},
		{[]string{"list", "--store", url + "/"}, "date"},
		{[]string{"show", "s1", "--store", url}, "| noon"},
		{[]string{"cat", "s1", "--store", url}, `"kind":"end"`},
		{[]string{"verify", "s1", "--store", url}, "sealed"},
		{[]string{"verify", url}, "2 logs: 1 sealed, 0 interrupted, 1 live, 0 damaged"},
		{[]string{"show", "s2", "--store", url}, "192.0.2.7"},
		{[]string{"list", url, "--since", "1h", "--has-command", "date"}, "alice"},
		{[]string{"search", "noon", "--store", url}, "noon"},
		{[]string{"export", "s1", "-f", "asciicast-v3", "--store", url}, `"noon\r\n"`},
		{[]string{"export", "-f", "ocsf", "--since", "1h", "--store", url}, `"class_uid":4007`},
		{[]string{"report", "s1", "--store", url}, "Session s1"},
		{[]string{"play", "s1", "--store", url}, "noon"},
	} {
		if out, errs, code := audit(t, c.args...); code != 0 || !strings.Contains(out, c.want) {
			t.Errorf("%v: code %d, want %q\n%s%s", c.args, code, c.want, out, errs)
		}
	}

	// -f goes on with what comes.
	followed := make(chan string)
	go func() {
		out, errs, _ := audit(t, "cat", "-f", "s2", "--store", url)
		followed <- out + errs
	}()
	time.Sleep(50 * time.Millisecond)
	if err := errors.Join(live.Record(1, &auditlog.Alert{Name: "later"}), live.Close(&auditlog.End{Cause: "client-left"})); err != nil {
		t.Fatal(err)
	}
	if out := <-followed; !strings.Contains(out, "later") || !strings.Contains(out, `"kind":"end"`) {
		t.Errorf("cat -f: %s", out)
	}
	if err := l.Close(context.Background()); err != nil {
		t.Fatal(err)
	}

	// A segment that was put twice is no damage; another under its name is.
	var name string
	src, err := (&tool{}).open(url)
	if err != nil {
		t.Fatal(err)
	}
	defer src.Close()
	for o, err := range src.List(t.Context(), auditlog.SessionPrefix) {
		if err != nil {
			t.Fatal(err)
		}
		name = o.Name
	}
	r, err := src.Open(t.Context(), name)
	if err != nil {
		t.Fatal(err)
	}
	content, err := io.ReadAll(r)
	if err := errors.Join(err, r.Close(), store.Put(t.Context(), name, bytes.NewReader(content), int64(len(content)))); err != nil {
		t.Fatal(err)
	}
	if out, errs, code := audit(t, "verify", url); code != 0 || strings.Contains(out, "put under") {
		t.Errorf("the same twice: code %d\n%s%s", code, out, errs)
	}
	if err := store.Put(t.Context(), name, strings.NewReader("forged"), 6); err != nil {
		t.Fatal(err)
	}
	for _, o := range []string{"text", "json"} {
		if out, errs, code := audit(t, "verify", url, "-o", o); code != exitDamaged || !strings.Contains(out, "two objects were put under this name: see duplicates/"+name) {
			t.Errorf("another under the same name: code %d\n%s%s", code, out, errs)
		}
	}

	// What goes wrong is said.
	if _, errs, code := audit(t, "list", url, "--credentials-file", putter); code != exitError || !strings.Contains(errs, "s3:ListBucket") {
		t.Errorf("a credential that can't read: code %d %s", code, errs)
	}
	for _, bad := range []string{"s3://", "s3:///x", "s3://Evidence/x", "https://evidence/x"} {
		if _, errs, code := audit(t, "list", bad); code != exitError || !strings.Contains(errs, "s3://BUCKET/PREFIX") {
			t.Errorf("%s: code %d %s", bad, code, errs)
		}
	}
	if err := server.Stop(); err != nil {
		t.Fatal(err)
	}
	if _, errs, code := audit(t, "list", url); code != exitError || errs == "" {
		t.Errorf("no server: code %d %s", code, errs)
	}
}
