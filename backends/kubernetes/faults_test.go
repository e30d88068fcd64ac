package kubernetes

import (
	"context"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/tls"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/base64"
	"encoding/json"
	"encoding/pem"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"math/big"
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

	authenticationv1 "k8s.io/api/authentication/v1"
	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	utilnet "k8s.io/apimachinery/pkg/util/net"
	"k8s.io/client-go/rest"

	"github.com/sallyport/sallyport/backends"
)

// faulty is a TLS proxy on loopback in front of the cluster's API server, for a gate with a token, that fails as it is told.
type faulty struct {
	server *httptest.Server
	config string // kubeconfig of a gate that goes through it
	token  string // the file with its token

	fail     atomic.Pointer[func(http.ResponseWriter, *http.Request) bool] // answers a request itself if it returns true
	requests atomic.Int64

	mu    sync.Mutex // guards conns
	conns map[net.Conn]bool
}

// newFaulty gives the gate a service account that may do in the test's namespace what docs/kubernetes.md says.
func newFaulty(t *testing.T) *faulty {
	t.Helper()
	ns := requireNamespace(t)
	admin := fixture.cluster.config
	target, err := url.Parse(admin.Host)
	if err != nil {
		t.Fatal(err)
	}
	// The gate's own credential goes through; the proxy has none.
	anonymous := rest.AnonymousClientConfig(admin)
	anonymous.NextProtos = []string{"http/1.1"} // HTTP/2 knows no upgrades
	transport, err := rest.TransportFor(anonymous)
	if err != nil {
		t.Fatal(err)
	}
	f := &faulty{conns: make(map[net.Conn]bool)}
	proxy := &httputil.ReverseProxy{
		Rewrite:       func(r *httputil.ProxyRequest) { r.SetURL(target) },
		Transport:     transport,
		FlushInterval: -1,
		ErrorLog:      slog.NewLogLogger(slog.DiscardHandler, slog.LevelDebug),
	}
	f.server = httptest.NewUnstartedServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		f.requests.Add(1)
		if fail := f.fail.Load(); fail != nil && (*fail)(w, r) {
			return
		}
		proxy.ServeHTTP(w, r)
	}))
	f.server.Config.ErrorLog = slog.NewLogLogger(slog.DiscardHandler, slog.LevelDebug)
	f.server.Config.ConnState = func(c net.Conn, s http.ConnState) {
		f.mu.Lock()
		defer f.mu.Unlock()
		if s == http.StateClosed {
			delete(f.conns, c)
		} else {
			f.conns[c] = true
		}
	}
	certificate, pemBytes := selfSigned(t)
	f.server.TLS = &tls.Config{Certificates: []tls.Certificate{certificate}}
	f.server.StartTLS()
	t.Cleanup(func() {
		f.fail.Store(nil)
		f.cut()
		f.server.Close()
		utilnet.CloseIdleConnectionsFor(transport)
	})

	name := gateAccount(t, ns)
	dir := t.TempDir()
	f.token = filepath.Join(dir, "token")
	f.renew(t, ns, name)
	f.config = filepath.Join(dir, "kubeconfig")
	ca := filepath.Join(dir, "ca.crt")
	text := fmt.Sprintf(`apiVersion: v1
kind: Config
current-context: gate
clusters: [{name: lab, cluster: {server: "%s", certificate-authority: "%s"}}]
users: [{name: gate, user: {tokenFile: "%s"}}]
contexts: [{name: gate, context: {cluster: lab, user: gate}}]
`, f.server.URL, ca, f.token)
	if err := errors.Join(os.WriteFile(ca, pemBytes, 0o600), os.WriteFile(f.config, []byte(text), 0o600)); err != nil {
		t.Fatal(err)
	}
	return f
}

// gateAccount makes a service account that may do in a namespace what docs/kubernetes.md says.
func gateAccount(t *testing.T, ns string) string {
	t.Helper()
	name := "gate-" + strings.ToLower(rand.Text()[:8])
	put(t, ns, "serviceaccounts", &corev1.ServiceAccount{ObjectMeta: metav1.ObjectMeta{Name: name}})
	for path, body := range map[string]string{
		"roles": `{"apiVersion":"rbac.authorization.k8s.io/v1","kind":"Role","metadata":{"name":"` + name + `"},"rules":[
			{"apiGroups":[""],"resources":["pods"],"verbs":["create","get","list","watch","delete"]},
			{"apiGroups":[""],"resources":["pods/exec"],"verbs":["create","get"]},
			{"apiGroups":[""],"resources":["events"],"verbs":["list"]},
			{"apiGroups":["networking.k8s.io"],"resources":["networkpolicies"],"verbs":["get","create","update"]}]}`,
		"rolebindings": `{"apiVersion":"rbac.authorization.k8s.io/v1","kind":"RoleBinding","metadata":{"name":"` + name + `"},
			"roleRef":{"apiGroup":"rbac.authorization.k8s.io","kind":"Role","name":"` + name + `"},
			"subjects":[{"kind":"ServiceAccount","name":"` + name + `","namespace":"` + ns + `"}]}`,
	} {
		err := fixture.cluster.core.Post().AbsPath("/apis/rbac.authorization.k8s.io/v1/namespaces/"+ns+"/"+path).
			SetHeader("Content-Type", "application/json").Body([]byte(body)).Do(context.Background()).Error()
		if err != nil {
			t.Fatal(err)
		}
	}
	return name
}

// renew writes a new token of the account.
func (f *faulty) renew(t *testing.T, ns, account string) {
	t.Helper()
	body := `{"apiVersion":"authentication.k8s.io/v1","kind":"TokenRequest","spec":{"audiences":null,"expirationSeconds":3600}}`
	b, err := fixture.cluster.core.Post().Namespace(ns).Resource("serviceaccounts").Name(account).SubResource("token").
		SetHeader("Content-Type", "application/json").Body([]byte(body)).Do(context.Background()).Raw()
	if err != nil {
		t.Fatal(err)
	}
	var answer authenticationv1.TokenRequest
	if err := json.Unmarshal(b, &answer); err != nil || answer.Status.Token == "" {
		t.Fatalf("no token: %v", err)
	}
	if err := os.WriteFile(f.token, []byte(answer.Status.Token), 0o600); err != nil {
		t.Fatal(err)
	}
}

// when has requests answered by fail, if that returns true; nil: none.
func (f *faulty) when(fail func(http.ResponseWriter, *http.Request) bool) {
	if fail == nil {
		f.fail.Store(nil)
		return
	}
	f.fail.Store(&fail)
}

// cut closes all connections, as a restart of the API server does.
func (f *faulty) cut() {
	f.mu.Lock()
	defer f.mu.Unlock()
	for c := range f.conns {
		c.Close()
	}
}

// accountOf is the name of a token's service account.
func accountOf(t *testing.T, token string) string {
	t.Helper()
	parts := strings.Split(token, ".")
	if len(parts) != 3 {
		t.Fatal("not a token")
	}
	b, err := base64.RawURLEncoding.DecodeString(parts[1])
	var claims struct {
		Subject string `json:"sub"`
	}
	if err = errors.Join(err, json.Unmarshal(b, &claims)); err != nil {
		t.Fatal(err)
	}
	return claims.Subject[strings.LastIndexByte(claims.Subject, ':')+1:]
}

func selfSigned(t *testing.T) (tls.Certificate, []byte) {
	t.Helper()
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	template := &x509.Certificate{
		SerialNumber: big.NewInt(1), Subject: pkix.Name{CommonName: "proxy"}, IsCA: true, BasicConstraintsValid: true,
		NotBefore: time.Now().Add(-time.Hour), NotAfter: time.Now().Add(time.Hour),
		IPAddresses: []net.IP{net.IPv4(127, 0, 0, 1)}, KeyUsage: x509.KeyUsageDigitalSignature | x509.KeyUsageCertSign,
	}
	der, err := x509.CreateCertificate(rand.Reader, template, template, key.Public(), key)
	if err != nil {
		t.Fatal(err)
	}
	return tls.Certificate{Certificate: [][]byte{der}, PrivateKey: key}, pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: der})
}

// status is an answer of the API server's kind.
func status(w http.ResponseWriter, code int, reason metav1.StatusReason, after string) {
	if after != "" {
		w.Header().Set("Retry-After", after)
	}
	w.Header().Set("Content-Type", "application/json")
	w.WriteHeader(code)
	fmt.Fprintf(w, `{"kind":"Status","apiVersion":"v1","status":"Failure","message":"injected","reason":%q,"code":%d}`, reason, code)
}

func isExec(r *http.Request) bool { return strings.HasSuffix(r.URL.Path, "/exec") }
func isCreate(r *http.Request) bool {
	return r.Method == http.MethodPost && strings.HasSuffix(r.URL.Path, "/pods")
}

// TestFaults puts each fault between a gate and its API server. The gate has the least rights and a token.
func TestFaults(t *testing.T) {
	t.Parallel()
	f := newFaulty(t)
	b := newBackend(t, func(c *Config) { c.Kubeconfig = f.config })
	start := func(limit time.Duration) (backends.Sandbox, error) {
		ctx, stop := context.WithTimeout(context.Background(), limit)
		defer stop()
		return b.Start(ctx, newSpec(busyboxImage))
	}
	works := func(t *testing.T) {
		t.Helper()
		s, err := start(time.Minute)
		if err != nil {
			t.Fatal(err)
		}
		if got := sh(t, s, "echo hi"); got != "hi\n" {
			t.Errorf("%q", got)
		}
		if err := s.Close(context.Background()); err != nil {
			t.Error(err)
		}
	}
	fails := func(t *testing.T, limit time.Duration, text string) {
		t.Helper()
		_, err := start(limit)
		var known *backends.TextError
		if !errors.As(err, &known) || !strings.Contains(known.Text, text) {
			t.Errorf("%v, want %q for the user", err, text)
		}
	}
	t.Run("none", works)
	t.Run("throttled a few times", func(t *testing.T) {
		var n atomic.Int32
		f.when(func(w http.ResponseWriter, r *http.Request) bool {
			if !isCreate(r) || n.Add(1) > 2 {
				return false
			}
			status(w, http.StatusTooManyRequests, metav1.StatusReasonTooManyRequests, "1")
			return true
		})
		works(t)
		if n.Load() < 3 {
			t.Errorf("asked %d times", n.Load())
		}
	})
	t.Run("throttled", func(t *testing.T) {
		f.when(func(w http.ResponseWriter, r *http.Request) bool {
			if isCreate(r) {
				status(w, http.StatusTooManyRequests, metav1.StatusReasonTooManyRequests, "")
			}
			return isCreate(r)
		})
		fails(t, time.Minute, "too much to do")
	})
	t.Run("throttled relay", func(t *testing.T) {
		var n atomic.Int32
		f.when(func(w http.ResponseWriter, r *http.Request) bool {
			if !isExec(r) || n.Add(1) > 3 {
				return false
			}
			status(w, http.StatusTooManyRequests, metav1.StatusReasonTooManyRequests, "1")
			return true
		})
		works(t)
	})
	t.Run("no SPDY", func(t *testing.T) {
		var webSocket atomic.Bool
		f.when(func(w http.ResponseWriter, r *http.Request) bool {
			switch {
			case !isExec(r):
			case strings.EqualFold(r.Header.Get("Upgrade"), "websocket"):
				webSocket.Store(true)
			default:
				http.Error(w, "no upgrades here", http.StatusBadRequest)
				return true
			}
			return false
		})
		works(t)
		if !webSocket.Load() {
			t.Error("no stream over WebSocket")
		}
	})
	t.Run("no WebSocket", func(t *testing.T) {
		// None is needed, either: each that comes before the container does leaves a connection in the API server.
		f.when(func(w http.ResponseWriter, r *http.Request) bool {
			if !strings.EqualFold(r.Header.Get("Upgrade"), "websocket") {
				return false
			}
			t.Error("a stream over WebSocket was tried")
			http.Error(w, "no upgrades here", http.StatusBadRequest)
			return true
		})
		works(t)
	})
	t.Run("broken", func(t *testing.T) {
		f.when(func(w http.ResponseWriter, r *http.Request) bool {
			if isCreate(r) {
				status(w, http.StatusInternalServerError, metav1.StatusReasonInternalError, "")
			}
			return isCreate(r)
		})
		fails(t, time.Minute, "can't answer")
	})
	t.Run("made but not answered", func(t *testing.T) {
		// The pod is made, and the answer is lost: it is found and removed (newBackend's own check).
		var made atomic.Bool
		f.when(func(w http.ResponseWriter, r *http.Request) bool {
			if !isCreate(r) || made.Swap(true) {
				return false
			}
			body, err := io.ReadAll(r.Body)
			if err != nil {
				t.Error(err)
			}
			err = fixture.cluster.core.Post().Namespace(fixture.ns).Resource("pods").SetHeader("Content-Type", "application/json").
				Body(body).Do(context.Background()).Error()
			if err != nil {
				t.Error(err)
			}
			panic(http.ErrAbortHandler)
		})
		if _, err := start(time.Minute); err == nil {
			t.Error("started")
		}
		f.when(nil)
		if left := pods(t, fixture.ns, b.ownLabels()); len(left) != 0 {
			t.Errorf("%d pods are left", len(left))
		}
	})
	t.Run("relay forbidden", func(t *testing.T) {
		f.when(func(w http.ResponseWriter, r *http.Request) bool {
			if isExec(r) {
				status(w, http.StatusForbidden, metav1.StatusReasonForbidden, "")
			}
			return isExec(r)
		})
		fails(t, time.Minute, "does not let this gate into")
	})
	t.Run("slow", func(t *testing.T) {
		f.when(func(http.ResponseWriter, *http.Request) bool { time.Sleep(500 * time.Millisecond); return false })
		works(t)
	})
	t.Run("away", func(t *testing.T) {
		f.when(func(http.ResponseWriter, *http.Request) bool { panic(http.ErrAbortHandler) })
		fails(t, time.Minute, "does not answer")
		if err := b.Ready(context.Background()); err == nil {
			t.Error("ready")
		}
	})
	t.Run("away while a session ends", func(t *testing.T) {
		f.when(nil)
		s, err := start(time.Minute)
		if err != nil {
			t.Fatal(err)
		}
		f.when(func(_ http.ResponseWriter, r *http.Request) bool {
			if r.Method == http.MethodDelete {
				panic(http.ErrAbortHandler)
			}
			return false
		})
		if err := s.Close(context.Background()); err == nil {
			t.Error("closed")
		}
		f.when(nil)
		// What could not be removed is by the next look, or by a second Close.
		if err := b.Reap(context.Background()); err != nil {
			t.Error(err)
		}
		if left := pods(t, fixture.ns, b.ownLabels()); len(left) != 0 {
			t.Errorf("%d pods are left", len(left))
		}
		if err := s.Close(context.Background()); err != nil {
			t.Error(err)
		}
	})
	t.Run("watch dropped", func(t *testing.T) {
		f.when(nil)
		s, err := start(time.Minute)
		if err != nil {
			t.Fatal(err)
		}
		defer s.Close(context.Background())
		// Connections are cut, the session's among them: it ends, and says so.
		f.cut()
		select {
		case <-s.Done():
			if s.Err() == nil {
				t.Error("no reason")
			}
		case <-time.After(time.Minute):
			t.Error("the session goes on without a stream")
		}
		// And a pod's fate is heard of again.
		again, err := start(time.Minute)
		if err != nil {
			t.Fatal(err)
		}
		defer again.Close(context.Background())
		k := again.(*sandbox)
		if err := fixture.cluster.deletePod(context.Background(), k.at.namespace, k.at.name, k.uid); err != nil {
			t.Fatal(err)
		}
		<-again.Done()
		if err := again.Err(); err == nil || !strings.Contains(err.Error(), "deleted") {
			t.Errorf("%v", err)
		}
	})
	t.Run("token rotated", func(t *testing.T) {
		f.when(nil)
		old, err := os.ReadFile(f.token)
		if err != nil {
			t.Fatal(err)
		}
		f.renew(t, fixture.ns, accountOf(t, string(old)))
		f.when(func(w http.ResponseWriter, r *http.Request) bool {
			if r.Header.Get("Authorization") == "Bearer "+string(old) {
				status(w, http.StatusUnauthorized, metav1.StatusReasonUnauthorized, "")
				return true
			}
			return false
		})
		works(t)
	})
	t.Run("token refused", func(t *testing.T) {
		f.when(func(w http.ResponseWriter, r *http.Request) bool {
			status(w, http.StatusUnauthorized, metav1.StatusReasonUnauthorized, "")
			return true
		})
		fails(t, time.Minute, "does not know this gate")
	})
	f.when(nil)
}

// TestIdle: sessions that do nothing ask nothing of the API server, but for the gate's own watch and look-around.
func TestIdle(t *testing.T) {
	t.Parallel()
	f := newFaulty(t)
	b := newBackend(t, func(c *Config) { c.Kubeconfig = f.config })
	for range 3 {
		startSandbox(t, b, newSpec(busyboxImage))
	}
	time.Sleep(time.Second) // the last start's requests are done
	before := f.requests.Load()
	time.Sleep(10 * time.Second)
	// One look-around in 30 s may fall into it, and one watch begin anew.
	if n := f.requests.Load() - before; n > 3 {
		t.Errorf("%d requests in 10 s of 3 idle sessions", n)
	}
}
