package s3

import (
	"bufio"
	"bytes"
	"context"
	"crypto/ed25519"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"net"
	"net/http"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/sallyport/sallyport/auditlog"
	"github.com/sallyport/sallyport/auditlog/s3/s3test"
)

// Faults of the network in front of the server, or of a server that is not itself.
const (
	faultNone     = ""
	faultReset    = "reset"              // each connection, at once
	faultUpload   = "reset mid-upload"   // each connection, after some of a request's body
	faultAnswer   = "answer lost"        // what was put is stored, and the gate is not told
	faultHalf     = "half-open"          // connections are taken, and nothing answers
	faultBusy     = "503"                // SlowDown
	faultInternal = "500"                // InternalError
	faultExpired  = "credential expired" // ExpiredToken
	faultWrong    = "wrong credential"   // the server's own answer
	faultSlow     = "slow"               // a few bytes at a time
)

// proxy is a TCP proxy with faults before a real server.
type proxy struct {
	l      net.Listener
	server string
	wg     sync.WaitGroup

	mu    sync.Mutex // guards all below
	fault string
	conns map[net.Conn]bool
	tries int // connections and requests that had the fault
}

func startProxy(t *testing.T, server string) *proxy {
	t.Helper()
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	p := &proxy{l: l, server: strings.TrimPrefix(server, "http://"), conns: map[net.Conn]bool{}}
	p.wg.Add(1)
	go func() {
		defer p.wg.Done()
		for {
			nc, err := l.Accept()
			if err != nil {
				return
			}
			p.wg.Add(1)
			go func() { defer p.wg.Done(); p.serve(nc) }()
		}
	}()
	t.Cleanup(func() { l.Close(); p.set(faultNone); p.wg.Wait() })
	return p
}

// set changes the fault, and cuts off what has the one before.
func (p *proxy) set(fault string) {
	p.mu.Lock()
	defer p.mu.Unlock()
	p.fault, p.tries = fault, 0
	for nc := range p.conns {
		reset(nc)
	}
}

func (p *proxy) had() int {
	p.mu.Lock()
	defer p.mu.Unlock()
	return p.tries
}

func reset(nc net.Conn) {
	if tc, ok := nc.(*net.TCPConn); ok {
		tc.SetLinger(0) // closed by a reset
	}
	nc.Close()
}

// serve carries one connection, one request at a time. The fault is that of its first moment.
func (p *proxy) serve(nc net.Conn) {
	p.mu.Lock()
	fault := p.fault
	p.conns[nc] = true
	p.tries++
	p.mu.Unlock()
	defer func() {
		p.mu.Lock()
		delete(p.conns, nc)
		p.mu.Unlock()
		reset(nc)
	}()
	switch fault {
	case faultReset:
		return
	case faultHalf:
		io.Copy(io.Discard, nc) // until who waits has enough
		return
	case faultBusy, faultInternal, faultExpired:
		answer := map[string]string{
			faultBusy: "503 Slow Down|SlowDown", faultInternal: "500 Internal Server Error|InternalError", faultExpired: "400 Bad Request|ExpiredToken",
		}[fault]
		status, code, _ := strings.Cut(answer, "|")
		for in := bufio.NewReader(nc); ; {
			r, err := http.ReadRequest(in)
			if err != nil {
				return
			}
			io.Copy(io.Discard, r.Body)
			body := "<Error><Code>" + code + "</Code><Message>" + strings.Repeat("x", 100) + "</Message></Error>"
			if _, err := fmt.Fprintf(nc, "HTTP/1.1 %s\r\nContent-Type: application/xml\r\nContent-Length: %d\r\n\r\n%s", status, len(body), body); err != nil {
				return
			}
			p.mu.Lock()
			p.tries++
			p.mu.Unlock()
		}
	}
	up, err := net.Dial("tcp", p.server)
	if err != nil {
		return
	}
	defer up.Close()
	p.mu.Lock()
	p.conns[up] = true
	p.mu.Unlock()
	defer func() {
		p.mu.Lock()
		defer p.mu.Unlock()
		delete(p.conns, up)
	}()
	answered := make(chan struct{})
	go func() {
		defer close(answered)
		if fault == faultAnswer {
			io.ReadFull(up, make([]byte, 1)) // it has answered, so it has stored
		} else {
			io.Copy(nc, up)
		}
		reset(nc)
	}()
	switch fault {
	case faultUpload:
		io.CopyN(up, nc, 4<<10)
	case faultSlow:
		for b := make([]byte, 256); ; time.Sleep(time.Millisecond) {
			n, err := nc.Read(b)
			if n > 0 {
				if _, err := up.Write(b[:n]); err != nil {
					break
				}
			}
			if err != nil {
				break
			}
		}
	default:
		io.Copy(up, nc)
	}
	up.Close()
	<-answered
}

// Whatever the network or the server does to what is put, sessions go on, and when it is over all is in the bucket, once:
// nothing is missing and nothing there twice. With a credential that can't read, a segment whose answer was lost is there a
// second time under its duplicate's name, with the same bytes.
func TestFaults(t *testing.T) {
	server := startServer(t)
	for _, user := range []s3test.User{s3test.Both, s3test.Putter} {
		for i, fault := range []string{faultReset, faultUpload, faultAnswer, faultHalf, faultBusy, faultInternal, faultExpired, faultWrong, faultSlow} {
			t.Run(user.AccessKey+"/"+fault, func(t *testing.T) { faultOnce(t, server, user, fault, fmt.Sprintf("/%s-%d", user.AccessKey, i)) })
		}
	}
}

func faultOnce(t *testing.T, server *s3test.Server, user s3test.User, fault, below string) {
	p := startProxy(t, server.Endpoint())
	cfg := config(t, server, user, below)
	cfg.Endpoint = "http://" + p.l.Addr().String()
	stall := time.Minute
	if fault == faultHalf {
		stall = 300 * time.Millisecond
	}
	var said bytes.Buffer
	var saidMu sync.Mutex
	log := slog.New(slog.NewTextHandler(lockedWriter{&saidMu, &said}, &slog.HandlerOptions{Level: slog.LevelDebug}))
	store, err := newStore(cfg, log, stall)
	if err != nil {
		t.Fatal(err)
	}
	defer store.Close()
	key := ed25519.NewKeyFromSeed(bytes.Repeat([]byte{7}, ed25519.SeedSize))
	l, err := auditlog.Open(t.Context(), auditlog.Config{Spool: t.TempDir(), SegmentBytes: 32 << 10, SegmentAge: 20 * time.Millisecond,
		SyncInterval: 5 * time.Millisecond, Codec: "none"}, key, store, "gate-1", log)
	if err != nil {
		t.Fatal(err)
	}
	until := func(what string, ok func() bool) {
		t.Helper()
		for end := time.Now().Add(2 * time.Minute); !ok(); time.Sleep(5 * time.Millisecond) {
			if time.Now().After(end) {
				t.Fatalf("not within 2 minutes: %s; %+v, %v", what, l.Stats(), l.StoreErr())
			}
		}
	}
	chunk := bytes.Repeat([]byte("content "), 2<<10)
	write := func(r *auditlog.Recorder) {
		t.Helper()
		if err := r.Record(1, &auditlog.Data{Stream: auditlog.Output, Data: chunk}); err != nil {
			t.Fatal(err)
		}
	}
	begin := func(id string) *auditlog.Recorder {
		t.Helper()
		r := l.New(id)
		if err := errors.Join(r.Record(0, &auditlog.Connect{Source: "192.0.2.7:4022"}), r.Begin()); err != nil {
			t.Fatal(err)
		}
		return r
	}
	through := begin("through") // the fault
	write(through)
	until("a segment is stored", func() bool { return l.Stats().Stored > 0 })
	p.set(fault)
	if fault == faultWrong {
		wrong := s3test.User{AccessKey: user.AccessKey, SecretKey: "a-wrong-secret"}
		if err := wrong.WriteCredentials(cfg.CredentialsFile); err != nil {
			t.Fatal(err)
		}
	}
	var during []*auditlog.Recorder
	for i := range 6 {
		r := begin(fmt.Sprintf("during-%d", i))
		for range 4 {
			write(r)
			write(through)
		}
		during = append(during, r)
	}
	for _, r := range during {
		if err := r.Close(&auditlog.End{Cause: "client-left"}); err != nil {
			t.Fatal(err)
		}
	}
	switch fault {
	case faultSlow:
		until("segments are stored, slowly", func() bool { return l.Stats().Stored > 3 })
	default:
		until("tries fail", func() bool {
			return l.Stats().Failed > 5 && (p.had() > 5 || fault == faultWrong) && l.StoreErr() != nil
		})
		if waiting := l.Stats().Waiting; waiting == 0 {
			t.Error("nothing waits")
		}
	}
	if err := l.Ready(); err != nil {
		t.Errorf("not ready for sessions: %v", err)
	}
	write(through)
	p.set(faultNone)
	if fault == faultWrong {
		if err := user.WriteCredentials(cfg.CredentialsFile); err != nil {
			t.Fatal(err)
		}
	}
	write(through)
	if err := through.Close(&auditlog.End{Cause: "client-left"}); err != nil {
		t.Fatal(err)
	}
	until("all is stored", func() bool { return l.Stats().Waiting == 0 && l.StoreErr() == nil })
	ctx, cancel := context.WithTimeout(t.Context(), 2*time.Minute)
	defer cancel()
	if err := l.Close(ctx); err != nil {
		t.Fatal(err)
	}
	if s := l.Stats(); s.SpoolBytes != 0 {
		t.Errorf("%d bytes are left in the spool, by its own account", s.SpoolBytes)
	}

	src := sourceOf(t, config(t, server, s3test.Reader, below))
	want := map[string]int{"through": 27 * len(chunk)}
	for i := range 6 {
		want[fmt.Sprintf("during-%d", i)] = 4 * len(chunk)
	}
	got := map[string]int{}
	for stored, err := range auditlog.Logs(t.Context(), src, "") {
		if err != nil {
			t.Fatal(err)
		}
		r := auditlog.NewSessionReader(src, stored, key.Public().(ed25519.PublicKey))
		n := 0
		for rec := range r.Records(t.Context()) {
			if d, ok := rec.Body.(*auditlog.Data); ok {
				n += len(d.Data)
			}
		}
		rep := r.Report()
		if rep.State != auditlog.Sealed {
			t.Errorf("%s: %s: %v", rep.ID, rep.State, rep.Problems)
		}
		got[rep.ID] += n
	}
	if fmt.Sprint(got) != fmt.Sprint(want) {
		t.Errorf("bytes by log: %v, want %v", got, want)
	}
	duplicates := 0
	objects := list(t, src)
	for name, content := range objects {
		if original, _, err := auditlog.ParseDuplicateName(name); err == nil {
			duplicates++
			if objects[original] != content {
				t.Errorf("%s differs from %s", name, original)
			}
		}
	}
	if duplicates > 0 && user != s3test.Putter || duplicates == 0 && user == s3test.Putter && fault == faultAnswer {
		t.Errorf("%d duplicates", duplicates)
	}
	saidMu.Lock()
	defer saidMu.Unlock()
	if strings.Contains(said.String(), user.SecretKey) || strings.Contains(said.String(), "a-wrong-secret") {
		t.Error("the gate's log has the secret")
	}
}

type lockedWriter struct {
	mu *sync.Mutex
	w  io.Writer
}

func (l lockedWriter) Write(p []byte) (int, error) {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.w.Write(p)
}
