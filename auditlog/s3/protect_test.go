package s3

import (
	"bytes"
	"context"
	"crypto/ed25519"
	"crypto/sha256"
	"encoding/base64"
	"encoding/hex"
	"encoding/pem"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"net"
	"net/http"
	"net/http/httptest"
	"net/http/httputil"
	"net/url"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/minio/minio-go/v7"
	"github.com/minio/minio-go/v7/pkg/tags"

	"github.com/sallyport/sallyport/auditlog"
	"github.com/sallyport/sallyport/auditlog/s3/s3test"
)

func rootClient(t *testing.T, server *s3test.Server, u s3test.User) *minio.Client {
	t.Helper()
	client, done, err := server.Client(u)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(done)
	return client
}

// The gate's credential can put, and nothing else: each other thing that one might do with it is refused.
func TestPutterRefused(t *testing.T) {
	server := startBy(t, s3test.StartLocked)
	put(t, storeOf(t, config(t, server, s3test.Putter, "")), "sessions/a", "one")
	root, putter := rootClient(t, server, s3test.Root), rootClient(t, server, s3test.Putter)
	const bucket, name = s3test.Bucket, s3test.Prefix + "/sessions/a"
	info, err := root.StatObject(t.Context(), bucket, name, minio.StatObjectOptions{})
	if err != nil || info.VersionID == "" {
		t.Fatal(info.VersionID, err)
	}
	until := time.Now().Add(time.Hour)
	governance := minio.Governance
	list := func(opts minio.ListObjectsOptions) error {
		for o := range putter.ListObjects(t.Context(), bucket, opts) {
			return o.Err
		}
		return errors.New("an empty list")
	}
	get := func(opts minio.GetObjectOptions) error {
		o, err := putter.GetObject(t.Context(), bucket, name, opts)
		if err != nil {
			return err
		}
		defer o.Close()
		_, err = io.ReadAll(o)
		return err
	}
	of := minio.GetObjectOptions{VersionID: info.VersionID}
	for what, err := range map[string]error{
		"list":           list(minio.ListObjectsOptions{Prefix: s3test.Prefix, Recursive: true}),
		"list versions":  list(minio.ListObjectsOptions{Prefix: s3test.Prefix, Recursive: true, WithVersions: true}),
		"get":            get(minio.GetObjectOptions{}),
		"get a version":  get(of),
		"delete":         putter.RemoveObject(t.Context(), bucket, name, minio.RemoveObjectOptions{}),
		"delete version": putter.RemoveObject(t.Context(), bucket, name, minio.RemoveObjectOptions{VersionID: info.VersionID}),
		"set a lock":     putter.PutObjectRetention(t.Context(), bucket, name, minio.PutObjectRetentionOptions{Mode: &governance, RetainUntilDate: &until}),
		"stop versions":  putter.SuspendVersioning(t.Context(), bucket),
		"set a policy":   putter.SetBucketPolicy(t.Context(), bucket, ""),
		"remove bucket":  putter.RemoveBucket(t.Context(), bucket),
		"put elsewhere": func() error {
			_, err := putter.PutObject(t.Context(), bucket, "elsewhere", strings.NewReader("x"), 1, minio.PutObjectOptions{})
			return err
		}(),
		"set tags": func() error {
			o, err := tags.NewTags(map[string]string{"a": "b"}, true)
			if err != nil {
				return err
			}
			return putter.PutObjectTagging(t.Context(), bucket, name, o, minio.PutObjectTaggingOptions{})
		}(),
	} {
		if code(err) != "AccessDenied" {
			t.Errorf("%s: %v, want AccessDenied", what, err)
		} else {
			t.Logf("%s: %v", what, err)
		}
	}
	if _, err := putter.StatObject(t.Context(), bucket, name, minio.StatObjectOptions{}); err == nil {
		t.Error("stat: not refused")
	}
}

// A thief of the gate's credential puts something else over a segment: by the gate's own way that is refused; by a request without
// the condition it becomes a new version, the old one stays and can't be removed before its time, and the reader sees it.
func TestOverwritten(t *testing.T) {
	server := startBy(t, s3test.StartLocked)
	cfg := config(t, server, s3test.Putter, "")
	key := ed25519.NewKeyFromSeed(bytes.Repeat([]byte{7}, ed25519.SeedSize))
	root, putter := rootClient(t, server, s3test.Root), rootClient(t, server, s3test.Putter)
	// The bucket's own default locks what is put, with no permission of the gate's.
	mode, days, unit := minio.Compliance, uint(30), minio.Days
	if err := root.SetBucketObjectLockConfig(t.Context(), s3test.Bucket, &mode, &days, &unit); err != nil {
		t.Fatal(err)
	}
	writeSession(t, storeOf(t, cfg), key, "s1")
	src := sourceOf(t, config(t, server, s3test.Reader, ""))
	report := func() auditlog.Report {
		for log, err := range auditlog.Logs(t.Context(), src, auditlog.SessionPrefix) {
			if err != nil {
				t.Fatal(err)
			}
			return auditlog.NewSessionReader(src, log, key.Public().(ed25519.PublicKey)).Verify(t.Context())
		}
		t.Fatal("no log")
		return auditlog.Report{}
	}
	if rep := report(); rep.State != auditlog.Sealed {
		t.Fatalf("%+v", rep)
	}
	var name string
	for n := range list(t, src) {
		name = n
	}
	forged := "forged"
	put(t, storeOf(t, cfg), name, forged) // kept as a duplicate: verify of the tool speaks of it
	if rep := report(); rep.State != auditlog.Sealed {
		t.Errorf("put by the gate's way has changed the segment: %+v", rep)
	}

	full := s3test.Prefix + "/" + name
	first, err := root.StatObject(t.Context(), s3test.Bucket, full, minio.StatObjectOptions{})
	if err != nil {
		t.Fatal(err)
	}
	if _, err := putter.PutObject(t.Context(), s3test.Bucket, full, strings.NewReader(forged), int64(len(forged)), minio.PutObjectOptions{SendContentMd5: true}); err != nil {
		t.Logf("put without a condition is refused: %v", err) // as good
		if rep := report(); rep.State != auditlog.Sealed {
			t.Errorf("%+v", rep)
		}
		return
	}
	rep := report()
	if rep.State != auditlog.Damaged {
		t.Errorf("an overwritten segment is not seen: %+v", rep)
	}
	t.Logf("overwritten: %v", rep.Problems)
	for _, who := range []*minio.Client{putter, root} {
		if err := who.RemoveObject(t.Context(), s3test.Bucket, full, minio.RemoveObjectOptions{VersionID: first.VersionID}); err == nil {
			t.Error("the locked version was removed")
		} else {
			t.Logf("removing the first version: %v", err)
		}
	}
	o, err := root.GetObject(t.Context(), s3test.Bucket, full, minio.GetObjectOptions{VersionID: first.VersionID})
	if err != nil {
		t.Fatal(err)
	}
	defer o.Close()
	s, err := auditlog.NewSegmentReader(o)
	for err == nil {
		_, err = s.Next()
	}
	if !errors.Is(err, io.EOF) {
		t.Errorf("the first version: %v", err)
	}
}

func writeSession(t *testing.T, store *Store, key ed25519.PrivateKey, id string) {
	t.Helper()
	l, err := auditlog.Open(t.Context(), auditlog.Config{Spool: t.TempDir(), SyncInterval: 5 * time.Millisecond}, key, store, "gate-1",
		slog.New(slog.DiscardHandler))
	if err != nil {
		t.Fatal(err)
	}
	r := l.New(id)
	if err := errors.Join(r.Record(0, &auditlog.Connect{Source: "192.0.2.7:4022"}), r.Begin(), r.Close(&auditlog.End{Cause: "client-left"}),
		l.Close(context.WithoutCancel(t.Context()))); err != nil {
		t.Fatal(err)
	}
}

// A lock that is configured is set on each object: it can't be removed before its time, not even by the bucket's owner.
func TestRetention(t *testing.T) {
	server := startBy(t, s3test.StartLocked)
	root := rootClient(t, server, s3test.Root)
	for _, mode := range []string{"governance", "compliance"} {
		cfg := config(t, server, s3test.Root, "/"+mode)
		cfg.Retention = Retention{Mode: mode, Days: 3}
		before := time.Now()
		put(t, storeOf(t, cfg), "sessions/a", "one")
		name := s3test.Prefix + "/" + mode + "/sessions/a"
		info, err := root.StatObject(t.Context(), s3test.Bucket, name, minio.StatObjectOptions{})
		if err != nil {
			t.Fatal(err)
		}
		until, err := time.Parse(time.RFC3339, info.Metadata.Get("X-Amz-Object-Lock-Retain-Until-Date"))
		if got := info.Metadata.Get("X-Amz-Object-Lock-Mode"); err != nil || !strings.EqualFold(got, mode) {
			t.Fatalf("%s: %v %v", mode, info.Metadata, err)
		}
		if until.Before(before.AddDate(0, 0, 3).Add(-time.Minute)) || until.After(time.Now().AddDate(0, 0, 3).Add(time.Minute)) {
			t.Errorf("%s: until %v", mode, until)
		}
		if err := root.RemoveObject(t.Context(), s3test.Bucket, name, minio.RemoveObjectOptions{VersionID: info.VersionID}); err == nil {
			t.Errorf("%s: removed all the same", mode)
		}
	}
	// Without the permission for it, that the lock is refused is said, and nothing is stored without it.
	cfg := config(t, server, s3test.Putter, "/without")
	cfg.Retention = Retention{Mode: "compliance", Days: 3}
	err := storeOf(t, cfg).Put(t.Context(), "sessions/a", strings.NewReader("x"), 1)
	t.Logf("a lock with s3:PutObject alone: %v", err)
	if err == nil {
		info, err := root.StatObject(t.Context(), s3test.Bucket, s3test.Prefix+"/without/sessions/a", minio.StatObjectOptions{})
		if err != nil || info.Metadata.Get("X-Amz-Object-Lock-Mode") != "COMPLIANCE" {
			t.Errorf("stored without its lock: %v %v", info.Metadata, err)
		}
	}
}

// recorded is a proxy before the server that keeps the headers of all requests.
type recorded struct {
	mu      sync.Mutex
	headers []http.Header
	hosts   []string
}

func (r *recorded) last() http.Header {
	r.mu.Lock()
	defer r.mu.Unlock()
	return r.headers[len(r.headers)-1]
}

func record(t *testing.T, to string, answer func(w http.ResponseWriter, r *http.Request) bool) (*httptest.Server, *recorded) {
	t.Helper()
	target, err := url.Parse(to)
	if err != nil {
		t.Fatal(err)
	}
	transport := &http.Transport{}
	t.Cleanup(transport.CloseIdleConnections)
	proxy := &httputil.ReverseProxy{Transport: transport, Rewrite: func(p *httputil.ProxyRequest) {
		p.SetURL(target)
		p.Out.Host = p.In.Host // it is signed
	}}
	seen := &recorded{}
	server := httptest.NewTLSServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		seen.mu.Lock()
		seen.headers, seen.hosts = append(seen.headers, r.Header.Clone()), append(seen.hosts, r.Host)
		seen.mu.Unlock()
		if answer == nil || !answer(w, r) {
			proxy.ServeHTTP(w, r)
		}
	}))
	t.Cleanup(server.Close)
	return server, seen
}

func caFileOf(t *testing.T, server *httptest.Server) string {
	t.Helper()
	file := filepath.Join(t.TempDir(), "ca.pem")
	if err := os.WriteFile(file, pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: server.Certificate().Raw}), 0o600); err != nil {
		t.Fatal(err)
	}
	return file
}

// A server may say that a name is taken while another's object of that name can't be read yet, or when it went no further: the name is
// tried again, and not for ever.
func TestTakenAndNotThere(t *testing.T) {
	server := startBy(t, s3test.StartLocked)
	var refuse atomic.Int64
	proxy, seen := record(t, server.Endpoint(), func(w http.ResponseWriter, r *http.Request) bool {
		if r.Method != http.MethodPut || refuse.Add(-1) < 0 {
			return false
		}
		w.WriteHeader(http.StatusPreconditionFailed)
		io.WriteString(w, "<Error><Code>PreconditionFailed</Code></Error>")
		return true
	})
	cfg := config(t, server, s3test.Root, "/taken")
	through := cfg
	through.Endpoint, through.CAFile = proxy.URL, caFileOf(t, proxy)
	store := storeOf(t, through)
	refuse.Store(2)
	put(t, store, "sessions/a", "one")
	put(t, storeOf(t, cfg), "sessions/a", "one") // the same is there
	refuse.Store(1000)
	before := len(seen.headers)
	if err := store.Put(t.Context(), "sessions/b", strings.NewReader("one"), 3); code(err) != "NoSuchKey" {
		t.Errorf("%v", err)
	}
	if n := len(seen.headers) - before; n != 2*conflictTries {
		t.Errorf("%d requests", n)
	}
}

// What was altered on its way is refused, locked or not, and nothing of it is stored.
func TestAlteredOnTheWay(t *testing.T) {
	server := startBy(t, s3test.StartLocked)
	proxy, _ := record(t, server.Endpoint(), func(_ http.ResponseWriter, r *http.Request) bool {
		if r.Method == http.MethodPut {
			r.Body = io.NopCloser(strings.NewReader("onE"))
		}
		return false
	})
	for _, retention := range []Retention{{}, {Mode: "compliance", Days: 1}} {
		cfg := config(t, server, s3test.Root, "/altered")
		cfg.Retention = retention
		through := cfg
		through.Endpoint, through.CAFile = proxy.URL, caFileOf(t, proxy)
		err := storeOf(t, through).Put(t.Context(), "sessions/a"+retention.Mode, strings.NewReader("one"), 3)
		if err == nil || code(err) == "" {
			t.Errorf("%+v: %v", retention, err)
		}
		put(t, storeOf(t, cfg), "sessions/a"+retention.Mode, "one") // its name is free
	}
}

// The server's encryption is asked for as configured; what the server makes of it is its own. A customer's key goes with each
// request, also of who reads.
func TestSSE(t *testing.T) {
	server := startServer(t)
	proxy, seen := record(t, server.Endpoint(), nil)
	key := bytes.Repeat([]byte{9}, 32)
	keyFile := filepath.Join(t.TempDir(), "sse")
	if err := os.WriteFile(keyFile, []byte(base64.StdEncoding.EncodeToString(key)+"\n"), 0o600); err != nil {
		t.Fatal(err)
	}
	for name, c := range map[string]struct {
		sse  SSE
		want map[string]string
	}{
		"none": {SSE{}, map[string]string{"X-Amz-Server-Side-Encryption": ""}},
		"s3":   {SSE{Type: "s3"}, map[string]string{"X-Amz-Server-Side-Encryption": "AES256"}},
		"kms":  {SSE{Type: "kms", KMSKey: "alias/evidence"}, map[string]string{"X-Amz-Server-Side-Encryption": "aws:kms", "X-Amz-Server-Side-Encryption-Aws-Kms-Key-Id": "alias/evidence"}},
		"customer": {SSE{Type: "customer", KeyFile: keyFile}, map[string]string{"X-Amz-Server-Side-Encryption-Customer-Algorithm": "AES256",
			"X-Amz-Server-Side-Encryption-Customer-Key": base64.StdEncoding.EncodeToString(key)}},
	} {
		cfg := config(t, server, s3test.Both, "/sse-"+name)
		cfg.Endpoint, cfg.CAFile, cfg.SSE = proxy.URL, caFileOf(t, proxy), c.sse
		err := storeOf(t, cfg).Put(t.Context(), "sessions/a", strings.NewReader("one"), 3)
		h := seen.last()
		for k, v := range c.want {
			if h.Get(k) != v {
				t.Errorf("%s: %s is %q, want %q", name, k, h.Get(k), v)
			}
		}
		sum := sha256.Sum256([]byte("one"))
		if h.Get("If-None-Match") != "*" || h.Get("X-Amz-Content-Sha256") != hex.EncodeToString(sum[:]) ||
			h.Get("X-Amz-Checksum-Sha256") != base64.StdEncoding.EncodeToString(sum[:]) {
			t.Errorf("%s: %v", name, h)
		}
		t.Logf("%s: the server says %v", name, err)
		if err != nil && code(err) == "" {
			t.Errorf("%s: %v", name, err)
		}
		if name == "customer" {
			r, err := sourceOf(t, cfg).Open(t.Context(), "sessions/a")
			if err == nil {
				r.Close()
			}
			if seen.last().Get("X-Amz-Server-Side-Encryption-Customer-Key") == "" {
				t.Error("customer: who reads does not send the key")
			}
		}
	}
	for want, sse := range map[string]SSE{"is none of s3, kms": {Type: "x"}, "only with the type kms": {Type: "s3", KMSKey: "x"},
		"needs one": {Type: "customer"}, "only with the type customer": {KeyFile: "x"}} {
		if err := (Config{Bucket: "evidence", SSE: sse}).WithDefaults().Validate(); err == nil || !strings.Contains(err.Error(), want) {
			t.Errorf("%+v: %v", sse, err)
		}
	}
	if err := (Config{Bucket: "evidence", Endpoint: "http://127.0.0.1:9", SSE: SSE{Type: "customer", KeyFile: keyFile}}).WithDefaults().Validate(); err == nil ||
		!strings.Contains(err.Error(), "only to an https") {
		t.Errorf("a key in the clear: %v", err)
	}
	if err := os.WriteFile(keyFile, []byte("c2hvcnQ="), 0o600); err != nil {
		t.Fatal(err)
	}
	cfg := config(t, server, s3test.Both, "")
	cfg.Endpoint, cfg.SSE = proxy.URL, SSE{Type: "customer", KeyFile: keyFile}
	if _, err := NewStore(cfg, slog.New(slog.DiscardHandler)); err == nil || !strings.Contains(err.Error(), "want 32 bytes") || strings.Contains(err.Error(), "c2hv") {
		t.Errorf("a short key: %v", err)
	}
	for want, r := range map[string]Retention{"is none of governance": {Mode: "x", Days: 1}, "retention.days": {Mode: "governance"}, "but days are": {Days: 3},
		"between 1 and": {Mode: "compliance", Days: 1 << 30}} {
		if err := (Config{Bucket: "evidence", Retention: r}).WithDefaults().Validate(); err == nil || !strings.Contains(err.Error(), want) {
			t.Errorf("%+v: %v", r, err)
		}
	}
}

// A bucket is a path or a host, as configured.
func TestLookup(t *testing.T) {
	server := startBy(t, func(dir string) (*s3test.Server, error) { return s3test.StartDomain(dir, "s3.test") })
	_, port, err := net.SplitHostPort(server.Addr())
	if err != nil {
		t.Fatal(err)
	}
	proxy, seen := record(t, server.Endpoint(), nil)
	for _, lookup := range []string{"path", "dns"} {
		cfg := config(t, server, s3test.Both, "/"+lookup)
		cfg.Endpoint, cfg.Lookup, cfg.CAFile = "https://s3.test", lookup, caFileOf(t, proxy)
		store, src := storeOf(t, cfg), sourceOf(t, cfg)
		for _, b := range []*bucket{store.b, src.b} {
			b.transport.DialContext = func(ctx context.Context, network, _ string) (net.Conn, error) {
				return new(net.Dialer).DialContext(ctx, network, proxy.Listener.Addr().String())
			}
			b.transport.TLSClientConfig.ServerName = "example.com" // as the test's certificate has it
		}
		put(t, store, "sessions/a", lookup)
		if got := list(t, src); got["sessions/a"] != lookup {
			t.Errorf("%s: %v", lookup, got)
		}
		seen.mu.Lock()
		host := seen.hosts[len(seen.hosts)-1]
		seen.mu.Unlock()
		if want := map[string]string{"path": "s3.test", "dns": s3test.Bucket + ".s3.test"}[lookup]; host != want {
			t.Errorf("%s: host %q, want %q (port %s)", lookup, host, want, port)
		}
	}
}

// roleServer gives credentials as EC2's metadata service, a container's agent and the token service do; who asks gets the next.
type roleServer struct {
	mu    sync.Mutex
	next  []s3test.User
	asked int
	life  time.Duration
}

func (r *roleServer) take() (s3test.User, string) {
	r.mu.Lock()
	defer r.mu.Unlock()
	u := r.next[min(r.asked, len(r.next)-1)]
	r.asked++
	return u, time.Now().Add(r.life).UTC().Format(time.RFC3339)
}

func (r *roleServer) ServeHTTP(w http.ResponseWriter, q *http.Request) {
	switch {
	case q.Method == http.MethodPut && strings.HasSuffix(q.URL.Path, "/api/token"):
		io.WriteString(w, "metadata-token")
	case strings.HasSuffix(q.URL.Path, "/security-credentials/"):
		io.WriteString(w, "gate-role")
	case strings.HasSuffix(q.URL.Path, "/gate-role"), q.URL.Path == "/agent":
		if q.URL.Path == "/agent" && q.Header.Get("Authorization") != "agent-token" {
			http.Error(w, "no token", http.StatusForbidden)
			return
		}
		u, until := r.take()
		fmt.Fprintf(w, `{"Code":"Success","AccessKeyId":%q,"SecretAccessKey":%q,"Token":"","Expiration":%q}`, u.AccessKey, u.SecretKey, until)
	case q.FormValue("Action") == "AssumeRoleWithWebIdentity":
		if q.FormValue("WebIdentityToken") != "pod-token" || q.FormValue("RoleArn") != "arn:aws:iam::1:role/gate" {
			http.Error(w, "no", http.StatusForbidden)
			return
		}
		u, until := r.take()
		fmt.Fprintf(w, `<AssumeRoleWithWebIdentityResponse xmlns="https://sts.amazonaws.com/doc/2011-06-15/"><AssumeRoleWithWebIdentityResult><Credentials><AccessKeyId>%s</AccessKeyId>`+
			`<SecretAccessKey>%s</SecretAccessKey><SessionToken></SessionToken><Expiration>%s</Expiration></Credentials>`+
			`</AssumeRoleWithWebIdentityResult></AssumeRoleWithWebIdentityResponse>`, u.AccessKey, u.SecretKey, until)
	default:
		http.NotFound(w, q)
	}
}

// A role's credential is fetched in each of the three ways, when it is first needed, and anew when the server says that it is none any
// more. A service that is away keeps no gate from starting.
func TestRole(t *testing.T) {
	server := startServer(t)
	for _, name := range []string{"AWS_WEB_IDENTITY_TOKEN_FILE", "AWS_ROLE_ARN", "AWS_CONTAINER_CREDENTIALS_FULL_URI",
		"AWS_CONTAINER_CREDENTIALS_RELATIVE_URI", "AWS_CONTAINER_AUTHORIZATION_TOKEN", "AWS_REGION"} {
		t.Setenv(name, "")
	}
	for _, way := range []string{"metadata", "web identity", "container"} {
		t.Run(way, func(t *testing.T) {
			role := &roleServer{next: []s3test.User{{AccessKey: "gone", SecretKey: "expired"}, s3test.Both}, life: time.Hour}
			service := httptest.NewServer(role)
			defer service.Close()
			cfg := Config{Bucket: s3test.Bucket, Prefix: s3test.Prefix + "/role-" + strings.ReplaceAll(way, " ", "-"), Endpoint: server.Endpoint(),
				Credentials: "role", RoleEndpoint: service.URL}
			switch way {
			case "web identity":
				token := filepath.Join(t.TempDir(), "token")
				if err := os.WriteFile(token, []byte("pod-token"), 0o600); err != nil {
					t.Fatal(err)
				}
				t.Setenv("AWS_WEB_IDENTITY_TOKEN_FILE", token)
				t.Setenv("AWS_ROLE_ARN", "arn:aws:iam::1:role/gate")
			case "container":
				cfg.RoleEndpoint = ""
				t.Setenv("AWS_CONTAINER_CREDENTIALS_FULL_URI", service.URL+"/agent")
				t.Setenv("AWS_CONTAINER_AUTHORIZATION_TOKEN", "agent-token")
			}
			store := storeOf(t, cfg)
			if role.asked != 0 {
				t.Error("asked before it was needed")
			}
			err := store.Put(t.Context(), "sessions/a", strings.NewReader("a"), 1)
			if err == nil || strings.Contains(err.Error(), "expired") {
				t.Fatalf("put with a credential that is none: %v", err)
			}
			put(t, store, "sessions/a", "a")
			put(t, store, "sessions/b", "b")
			if role.asked != 2 {
				t.Errorf("asked %d times, want 2: once at first, once after the refusal", role.asked)
			}
		})
	}
	away := httptest.NewServer(http.NotFoundHandler())
	away.Close()
	store := storeOf(t, Config{Bucket: s3test.Bucket, Endpoint: server.Endpoint(), Credentials: "role", RoleEndpoint: away.URL})
	if err := store.Put(t.Context(), "sessions/a", strings.NewReader("a"), 1); err == nil {
		t.Error("put without a credential")
	}
	for want, c := range map[string]Config{"want role": {Credentials: "x"}, "write one of them": {Credentials: "role", CredentialsFile: "x"},
		"only with credentials: role": {RoleEndpoint: "http://x"}, "want a URL": {Credentials: "role", RoleEndpoint: "x"}} {
		c.Bucket = "evidence"
		if err := c.WithDefaults().Validate(); err == nil || !strings.Contains(err.Error(), want) {
			t.Errorf("%+v: %v", c, err)
		}
	}
}

// A credential with a token that has expired is read anew from its file.
func TestExpiredToken(t *testing.T) {
	server := startServer(t)
	expired := true
	proxy, seen := record(t, server.Endpoint(), func(w http.ResponseWriter, r *http.Request) bool {
		if !strings.Contains(r.Header.Get("Authorization"), "test-putter-old/") {
			return false
		}
		expired = false
		w.WriteHeader(http.StatusBadRequest)
		io.WriteString(w, `<Error><Code>ExpiredToken</Code><Message>The provided token has expired.</Message></Error>`)
		return true
	})
	cfg := config(t, server, s3test.User{AccessKey: "test-putter-old", SecretKey: "x"}, "")
	cfg.Endpoint, cfg.CAFile = proxy.URL, caFileOf(t, proxy)
	store := storeOf(t, cfg)
	if err := store.Put(t.Context(), "sessions/a", strings.NewReader("a"), 1); code(err) != "ExpiredToken" || expired {
		t.Fatalf("%v", err)
	}
	if err := s3test.Putter.WriteCredentials(cfg.CredentialsFile); err != nil {
		t.Fatal(err)
	}
	put(t, store, "sessions/a", "a")
	if !strings.Contains(seen.last().Get("Authorization"), s3test.Putter.AccessKey+"/") {
		t.Error(seen.last().Get("Authorization"))
	}
}
