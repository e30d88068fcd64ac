package docker

import (
	"archive/tar"
	"bytes"
	"context"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/tls"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/binary"
	"encoding/pem"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"math/big"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"testing/iotest"
	"time"

	"github.com/containerd/errdefs"
	"github.com/docker/docker/api/types/container"
	"github.com/docker/docker/api/types/mount"
	"github.com/docker/docker/api/types/volume"

	"github.com/sallyport/sallyport/backends"
)

func byRelay(c *Config) { c.Transport = transportRelay }

// relayPID finds the relay in a sandbox: no process of it has started that, and it is not the first.
const relayPID = `for p in /proc/[2-9]* /proc/1?*; do grep -q '^PPid:.0$' $p/status && echo ${p#/proc/}; done 2>/dev/null`

// TestRelayAttacks has the user of a session attack the relay, whose uid is the same.
func TestRelayAttacks(t *testing.T) {
	s := startSandbox(t, newBackend(t, byRelay), newSpec(busyboxImage))
	pid := strings.TrimSpace(sh(t, s, relayPID))
	if pid == "" || strings.Contains(pid, "\n") {
		t.Fatalf("the relay is %q", pid)
	}
	for line, want := range map[string]string{
		"ls -A /tmp":                               "",
		"ls /proc/" + pid + "/fd":                  "Permission denied",
		"cat /proc/" + pid + "/mem":                "Permission denied",
		"cat /proc/" + pid + "/environ":            "Permission denied",
		"cat /.sallyport/agent":                    "Permission denied",
		"touch /.sallyport/x":                      "Read-only file system",
		"chmod 755 /.sallyport/agent":              "Read-only file system",
		"stat -c '%a %u %g' /.sallyport/agent":     "111 0 0\n",
		"ls -A /.sallyport":                        "agent\n",
		"cat /etc/hosts | grep -c localhost":       "2\n",
		"ls /sys/class/net":                        "lo\n",
		"/.sallyport/agent relay 2>&1; echo $?":    "sallyport-agent: reach the agent: dial: ",
		"kill -STOP " + pid + "; echo still here":  "still here\n",
		"kill -CONT " + pid + "; echo still there": "still there\n",
	} {
		if got := sh(t, s, line); !strings.Contains(got, want) || want == "" && got != "" {
			t.Errorf("%s: %q, want %q", line, got, want)
		}
	}
	// Someone else at the path now: nobody asks there any more.
	if got := sh(t, s, "mkfifo /tmp/.sallyport-relay && echo made"); got != "made\n" {
		t.Error(got)
	}
	run(t, s, backends.Process{Kind: backends.KindExec, Command: "kill -KILL " + pid + "; sleep 60"})
	select {
	case <-s.Done():
	case <-time.After(30 * time.Second):
		t.Fatal("the sandbox goes on without its relay")
	}
	if err := s.Err(); err == nil || !strings.HasPrefix(err.Error(), "the relay into the sandbox ended") {
		t.Errorf("the cause is %v", err)
	}
}

// TestRelayStopped: what a stopped relay has handed over works on.
func TestRelayStopped(t *testing.T) {
	s := startSandbox(t, newBackend(t, byRelay), newSpec(busyboxImage))
	sh(t, s, "kill -STOP $("+relayPID+")")
	r := run(t, s, backends.Process{Kind: backends.KindExec, Command: "cat", Stdin: bytes.NewReader(make([]byte, 4<<20))})
	if r.err != nil || len(r.stdout) != 4<<20 {
		t.Errorf("%v, %d bytes", r.err, len(r.stdout))
	}
}

// TestRelayOnlyStranger: the relay is from outside and known; a second one is told, and finds nobody.
func TestRelayOnlyStranger(t *testing.T) {
	spec := newSpec(busyboxImage)
	spec.Template.ExecAudit = backends.ExecAudit{Mode: backends.ExecAuditRequired}
	var mu sync.Mutex
	var strangers []string
	spec.Reports = func(r *backends.Report) error {
		if r.Unaudited != nil {
			mu.Lock()
			defer mu.Unlock()
			strangers = append(strangers, string(bytes.Join(r.Unaudited.Args.List, []byte(" "))))
		}
		return nil
	}
	s := startSandbox(t, newBackend(t, byRelay), spec)
	time.Sleep(11 * time.Second) // two looks
	mu.Lock()
	if len(strangers) != 0 {
		t.Errorf("strangers without a stranger: %q", strangers)
	}
	mu.Unlock()
	out, err := exec.Command("docker", "exec", s.ID(), insideAgent, "relay").CombinedOutput()
	if err == nil || !strings.Contains(string(out), "reach the agent") {
		t.Errorf("a second relay: %v, %s", err, out)
	}
	mu.Lock()
	if want := []string{insideAgent + " relay"}; !slices.Equal(strangers, want) {
		t.Errorf("strangers: %q, want %q", strangers, want)
	}
	mu.Unlock()
	if got := sh(t, s, "echo x"); got != "x\n" {
		t.Errorf("%q", got)
	}
}

// TestVolume: the agent's volume is filled again when it is gone, repaired when it holds something else, filled once by
// many at a time, and old ones are removed unless they are in use.
func TestVolume(t *testing.T) {
	engine := requireEngine(t)
	ctx := context.Background()
	b := newBackend(t, byRelay)
	name := b.file.volume()
	again := func() error {
		config := b.config
		c, err := New(ctx, config, "test-"+strings.ToLower(rand.Text()), slog.New(slog.DiscardHandler))
		if err == nil {
			c.Close()
		}
		return err
	}
	works := func(when string) {
		t.Helper()
		s := startSandbox(t, b, newSpec(busyboxImage))
		if got := sh(t, s, "stat -c '%a %u %g' /.sallyport/agent"); got != "111 0 0\n" {
			t.Errorf("%s: %q", when, got)
		}
		if err := s.Close(ctx); err != nil {
			t.Error(err)
		}
	}
	works("at first")
	if err := b.removeVolume(ctx, name); err != nil {
		t.Fatal(err)
	}
	works("after its removal")
	if err := b.removeVolume(ctx, name); err != nil {
		t.Fatal(err)
	}
	if _, err := engine.VolumeCreate(ctx, volume.CreateOptions{Name: name}); err != nil { // by the engine itself, say
		t.Fatal(err)
	}
	works("after another made it")
	for end := time.Now().Add(time.Minute); ; { // the engine may hold it for a moment yet
		if err := again(); err != nil {
			t.Fatal(err)
		}
		v, err := engine.VolumeInspect(ctx, name)
		if err == nil && v.Labels[labelMade] != "" && v.Labels[labelAgent] == b.file.hash {
			break
		}
		if time.Now().After(end) {
			t.Fatalf("a gate that starts leaves the volume that it can't know again: %+v, %v", v, err)
		}
	}
	works("after a gate replaced it")
	if out, err := exec.Command("docker", "run", "--rm", "-v", name+":/mnt", busyboxImage, "/bin/busybox", "rm", "/mnt/"+insideName).CombinedOutput(); err != nil {
		t.Fatalf("%v, %s", err, out)
	}
	works("after another emptied it")

	m := b.file.mount()
	m.ReadOnly = false
	for what, h := range map[string]tar.Header{
		"another file": {Name: insideName, Mode: 0o111, Size: 4}, "readable": {Name: insideName, Mode: 0o755, Size: int64(len(b.file.content))},
		"of the session's": {Name: insideName, Mode: 0o111, Uid: 1000, Size: int64(len(b.file.content))},
	} {
		content := b.file.content[:h.Size]
		var packed bytes.Buffer
		w := tar.NewWriter(&packed)
		if err := errors.Join(w.WriteHeader(&h), func() error { _, err := w.Write(content); return err }(), w.Close()); err != nil {
			t.Fatal(err)
		}
		err := b.helper(ctx, "sallyport-test-"+rand.Text(), m, func(ctx context.Context, id string) error {
			if err := engine.CopyToContainer(ctx, id, "/mnt", &packed, container.CopyToContainerOptions{}); err != nil {
				return err
			}
			if b.holdsAgent(ctx, id) == nil {
				t.Errorf("%s: taken for the agent", what)
			}
			return nil
		})
		if err != nil {
			t.Fatal(err)
		}
		if err := again(); err != nil {
			t.Errorf("%s: %v", what, err)
		}
		works("after " + what)
	}

	if err := b.removeVolume(ctx, name); err != nil {
		t.Fatal(err)
	}
	var all sync.WaitGroup
	for range 4 {
		all.Go(func() {
			if err := again(); err != nil {
				t.Error(err)
			}
		})
	}
	all.Wait()

	var old [2]string
	for i := range old {
		old[i] = volumePrefix + strings.ToLower(rand.Text())
		if _, err := engine.VolumeCreate(ctx, volume.CreateOptions{Name: old[i], Labels: map[string]string{labelAgent: "x"}}); err != nil {
			t.Fatal(err)
		}
	}
	err := b.helper(ctx, "sallyport-test-"+rand.Text(), mount.Mount{Type: mount.TypeVolume, Source: old[1]},
		func(ctx context.Context, _ string) error { return b.pruneAgents(ctx) })
	if err != nil {
		t.Error(err)
	}
	if _, err := engine.VolumeInspect(ctx, old[0]); !errdefs.IsNotFound(err) {
		t.Errorf("an old volume is left: %v", err)
	}
	if _, err := engine.VolumeInspect(ctx, old[1]); err != nil {
		t.Errorf("an old volume in use: %v", err)
	}
	if err := b.removeVolume(ctx, old[1]); err != nil {
		t.Error(err)
	}
	works("at last")
}

// TestVolumeStolen: others remove the agent's volume whenever nobody has it, and put an empty one in its place, all the
// time and many times in a second. Each sandbox has its agent none the less.
func TestVolumeStolen(t *testing.T) {
	engine := requireEngine(t)
	b := newBackend(t, byRelay)
	ctx, stop := context.WithCancel(context.Background())
	defer stop()
	var thieves sync.WaitGroup
	var stolen atomic.Int64
	for i := range 2 {
		thieves.Go(func() {
			for ctx.Err() == nil {
				if engine.VolumeRemove(ctx, b.file.volume(), false) == nil {
					made := volume.CreateOptions{Name: b.file.volume()} // by the engine itself, say
					if i == 0 {
						made.Labels = b.file.mount().VolumeOptions.Labels // by another gate, which was killed before it filled it
					}
					engine.VolumeCreate(ctx, made)
					stolen.Add(1)
				}
				select { // an engine that is asked for nothing but this starts no container
				case <-ctx.Done():
				case <-time.After(5 * time.Millisecond):
				}
			}
		})
	}
	for range 8 {
		had := stolen.Load()
		for limit := time.Now().Add(time.Minute); stolen.Load() < had+3 && time.Now().Before(limit); {
			time.Sleep(time.Millisecond)
		}
		if stolen.Load() == had {
			t.Fatal("nobody could remove the volume")
		}
		s, err := b.Start(context.Background(), newSpec(busyboxImage))
		if err != nil {
			t.Error(err)
			continue
		}
		if got := sh(t, s, "echo here"); got != "here\n" {
			t.Errorf("%q", got)
		}
		if err := s.Close(context.Background()); err != nil {
			t.Error(err)
		}
	}
	stop()
	thieves.Wait()
}

// TestVolumeOfKilledGate: a helper that a killed gate has left keeps nobody from filling the volume for longer than it may be at work.
func TestVolumeOfKilledGate(t *testing.T) {
	engine := requireEngine(t)
	ctx := context.Background()
	b := newBackend(t, byRelay)
	b.helperAge = 20 * time.Second
	if err := b.removeVolume(ctx, b.file.volume()); err != nil {
		t.Fatal(err)
	}
	// What there is when it dies in the middle: the helper, its image, and a part of the agent.
	empty, err := b.emptyImage(ctx)
	if err != nil {
		t.Fatal(err)
	}
	m := b.file.mount()
	m.Target, m.ReadOnly = "/mnt", false
	left, err := engine.ContainerCreate(ctx, &container.Config{Image: empty, Cmd: []string{"/none"}, Labels: map[string]string{labelHelper: "killed"}},
		&container.HostConfig{NetworkMode: "none", Mounts: []mount.Mount{m}}, nil, nil, b.file.volume()+"-fill")
	if err != nil {
		t.Fatal(err)
	}
	half := agentFile{content: b.file.content[:len(b.file.content)/2], hash: b.file.hash}
	if err := (&Backend{engine: engine, file: half}).copyAgent(ctx, left.ID); err != nil {
		t.Fatal(err)
	}
	began := time.Now()
	s := startSandbox(t, b, newSpec(busyboxImage))
	if got := sh(t, s, "echo here"); got != "here\n" {
		t.Errorf("%q", got)
	}
	if waited := time.Since(began); waited < b.helperAge/2 {
		t.Errorf("a helper that may be at work was not waited for: %v", waited)
	}
	if _, err := engine.ContainerInspect(ctx, left.ID); !errdefs.IsNotFound(err) {
		t.Errorf("the helper is left: %v", err)
	}
	if _, err := engine.ImageInspect(ctx, empty); !errdefs.IsNotFound(err) {
		t.Errorf("its image is left: %v", err)
	}
}

// hiddenVariable makes this test's program look for the way to its agents from where the engine sees no state directory.
const hiddenVariable = "SALLYPORT_TEST_HIDDEN"

// TestTransport: the way to the agents is found out.
func TestTransport(t *testing.T) {
	if dir := os.Getenv(hiddenVariable); dir != "" {
		b, err := New(context.Background(), Config{StateDir: dir, Agent: os.Getenv("AGENT")}, "test-hidden", slog.New(slog.DiscardHandler))
		if err != nil {
			fmt.Println("error:", err)
			return
		}
		fmt.Println(b.Transport())
		b.Close()
		return
	}
	b := newBackend(t, func(c *Config) { c.Transport = transportAuto })
	if way, why := b.Transport(); way != transportSocket || !strings.Contains(why, "sees") {
		t.Errorf("here: %s, %s", way, why)
	}
	if entries, err := filepath.Glob(filepath.Join(b.config.StateDir, "probe-*")); err != nil || len(entries) != 0 {
		t.Errorf("left: %v %v", entries, err)
	}
	if os.Geteuid() != 0 {
		if os.Getenv("CI") != "" {
			t.Fatal("an engine that sees other files needs root, and CI is set")
		}
		t.Skip("NOT TESTED: an engine that sees other files needs root")
	}
	dir := t.TempDir()
	for what, test := range map[string]struct {
		flags []string
		do    string
		want  string
	}{
		"other files":     {[]string{"--mount"}, `mount -t tmpfs tmpfs "$1"`, "relay the engine does not see the gate's state directory"},
		"no such path":    {[]string{"--mount"}, `mount -t tmpfs tmpfs "$1" && export ` + hiddenVariable + `="$1/only-here"`, "relay the engine does not see the gate's state directory"},
		"other processes": {[]string{"--mount", "--pid", "--fork", "--mount-proc"}, "true", "relay the engine's processes are not visible here: the gate runs in a container"},
	} {
		cmd := exec.Command("unshare", append(test.flags, "sh", "-c", test.do+` && "$0" -test.run='^TestTransport$'`, os.Args[0], dir)...)
		cmd.Env = append(os.Environ(), hiddenVariable+"="+dir, "AGENT="+fixture.agent)
		out, err := cmd.CombinedOutput()
		if err != nil || !strings.Contains(string(out), test.want) {
			t.Errorf("%s: %v, %s", what, err, out)
		}
	}
}

// TestTLS speaks to the engine through TLS with certificates on both sides.
func TestTLS(t *testing.T) {
	requireEngine(t)
	dir := t.TempDir()
	good, bad := newAuthority(t, dir, "good"), newAuthority(t, dir, "bad")
	server, files := good.issue("engine", "127.0.0.1"), good.issue("gate", "")
	address := tlsEngine(t, good, server, "127.0.0.1")
	use := func(c *Config) { c.Host, c.TLS, c.Transport = address, files, transportAuto }
	b := newBackend(t, use)
	if way, why := b.Transport(); way != transportRelay || !strings.Contains(why, "network") {
		t.Errorf("%s, %s", way, why)
	}
	if err := b.Ready(context.Background()); err != nil {
		t.Error(err)
	}
	s := startSandbox(t, b, newSpec(busyboxImage))
	data := make([]byte, 8<<20)
	rand.Read(data)
	r := run(t, s, backends.Process{Kind: backends.KindExec, Command: "cat", Stdin: bytes.NewReader(data)})
	if r.err != nil || r.stdout != string(data) {
		t.Errorf("%v, %d bytes", r.err, len(r.stdout))
	}
	if err := fixture.engine.ContainerKill(context.Background(), s.ID(), "KILL"); err != nil {
		t.Error(err)
	}
	<-s.Done()
	if err := s.Err(); err == nil || !strings.HasPrefix(err.Error(), "the sandbox was killed") {
		t.Errorf("the cause is %v", err)
	}

	elsewhere := tlsEngine(t, good, good.issue("other", "127.0.0.2"), "127.0.0.1")
	impostor := tlsEngine(t, good, bad.issue("engine2", "127.0.0.1"), "127.0.0.1")
	for what, c := range map[string]Config{
		"another name":                    {Host: elsewhere, TLS: files},
		"another authority's engine":      {Host: impostor, TLS: files},
		"another authority's gate":        {Host: address, TLS: TLS{CA: files.CA, Cert: bad.issue("gate2", "").Cert, Key: filepath.Join(dir, "gate2.key")}},
		"the key of another certificate":  {Host: address, TLS: TLS{CA: files.CA, Cert: files.Cert, Key: server.Key}},
		"no file":                         {Host: address, TLS: TLS{CA: files.CA, Cert: files.Cert, Key: filepath.Join(dir, "none")}},
		"an authority that is none":       {Host: address, TLS: TLS{CA: files.Key, Cert: files.Cert, Key: files.Key}},
		"a server's certificate for ours": {Host: address, TLS: server},
	} {
		c.StateDir, c.Agent = filepath.Join(dir, "state"), fixture.agent
		if b, err := New(context.Background(), c, "test-tls", slog.New(slog.DiscardHandler)); err == nil {
			b.Close()
			t.Errorf("%s: no error", what)
		}
	}
}

// tlsEngine serves the engine by TLS to who has a certificate of the authority, and gives its address.
func tlsEngine(t *testing.T, clients *authority, files TLS, ip string) string {
	t.Helper()
	cert, err := tls.LoadX509KeyPair(files.Cert, files.Key)
	if err != nil {
		t.Fatal(err)
	}
	pool := x509.NewCertPool()
	pool.AddCert(clients.cert)
	l, err := tls.Listen("tcp", ip+":0", &tls.Config{Certificates: []tls.Certificate{cert}, ClientCAs: pool, ClientAuth: tls.RequireAndVerifyClientCert})
	if err != nil {
		t.Fatal(err)
	}
	var all sync.WaitGroup
	t.Cleanup(func() {
		l.Close()
		all.Wait()
	})
	all.Go(func() {
		for {
			c, err := l.Accept()
			if err != nil {
				return
			}
			all.Go(func() { passOn(c.(*tls.Conn)) })
		}
	})
	return "tcp://" + l.Addr().String()
}

// passOn carries a connection to the engine's socket.
func passOn(c *tls.Conn) {
	defer c.Close()
	engine, err := net.Dial("unix", "/var/run/docker.sock")
	if err != nil {
		return
	}
	defer engine.Close()
	done := make(chan struct{})
	go func() {
		defer close(done)
		io.Copy(engine, c)
		engine.(*net.UnixConn).CloseWrite()
	}()
	io.Copy(c, engine)
	c.Close()
	<-done
}

// authority issues certificates into a directory.
type authority struct {
	t    *testing.T
	dir  string
	name string
	key  *ecdsa.PrivateKey
	cert *x509.Certificate
}

func newAuthority(t *testing.T, dir, name string) *authority {
	t.Helper()
	a := &authority{t: t, dir: dir, name: name}
	a.cert, a.key = a.sign(&x509.Certificate{
		Subject: pkix.Name{CommonName: name}, IsCA: true, BasicConstraintsValid: true, KeyUsage: x509.KeyUsageCertSign,
	}, name)
	return a
}

func (a *authority) sign(c *x509.Certificate, name string) (*x509.Certificate, *ecdsa.PrivateKey) {
	a.t.Helper()
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		a.t.Fatal(err)
	}
	c.SerialNumber, _ = rand.Int(rand.Reader, big.NewInt(1<<62))
	c.NotBefore, c.NotAfter = time.Now().Add(-time.Hour), time.Now().Add(time.Hour)
	parent, signer := a.cert, a.key
	if parent == nil {
		parent, signer = c, key
	}
	der, err := x509.CreateCertificate(rand.Reader, c, parent, &key.PublicKey, signer)
	if err != nil {
		a.t.Fatal(err)
	}
	pkcs8, err := x509.MarshalPKCS8PrivateKey(key)
	if err != nil {
		a.t.Fatal(err)
	}
	for _, f := range []struct {
		suffix string
		block  pem.Block
	}{{".pem", pem.Block{Type: "CERTIFICATE", Bytes: der}}, {".key", pem.Block{Type: "PRIVATE KEY", Bytes: pkcs8}}} {
		if err := os.WriteFile(filepath.Join(a.dir, name+f.suffix), pem.EncodeToMemory(&f.block), 0o600); err != nil {
			a.t.Fatal(err)
		}
	}
	cert, err := x509.ParseCertificate(der)
	if err != nil {
		a.t.Fatal(err)
	}
	return cert, key
}

// issue makes a certificate: an engine's of an address, or else a gate's.
func (a *authority) issue(name, ip string) TLS {
	c := &x509.Certificate{Subject: pkix.Name{CommonName: name}, KeyUsage: x509.KeyUsageDigitalSignature, ExtKeyUsage: []x509.ExtKeyUsage{x509.ExtKeyUsageClientAuth}}
	if ip != "" {
		c.ExtKeyUsage, c.IPAddresses = []x509.ExtKeyUsage{x509.ExtKeyUsageServerAuth}, []net.IP{net.ParseIP(ip)}
	}
	a.sign(c, name)
	return TLS{CA: filepath.Join(a.dir, a.name+".pem"), Cert: filepath.Join(a.dir, name+".pem"), Key: filepath.Join(a.dir, name+".key")}
}

func execFrameOf(kind byte, text string) string {
	return string(append([]byte{kind, 0, 0, 0}, binary.BigEndian.AppendUint32(nil, uint32(len(text)))...)) + text
}

func TestExecConn(t *testing.T) {
	for _, test := range []struct{ in, want, err string }{
		{"", "", "EOF"},
		{execFrameOf(1, "one") + execFrameOf(1, "") + execFrameOf(1, "two"), "onetwo", "EOF"},
		{execFrameOf(1, "one") + execFrameOf(2, "bad:\n\x1b[1m ") + execFrameOf(2, "thing"), "one", "the relay said: bad:  [1m thing"},
		{execFrameOf(2, strings.Repeat("x", 3000)), "", "the relay said: " + strings.Repeat("x", execMessage)},
		{execFrameOf(3, "x"), "", errExecFrame.Error()},
		{execFrameOf(0, "x"), "", errExecFrame.Error()},
		{execFrameOf(1, "one") + "\x01\x00\x00\x00\xff\xff\xff\xff", "one", errExecFrame.Error()},
		{execFrameOf(1, "one")[:9], "o", "EOF"},
		{execFrameOf(1, "one")[:5], "", "EOF"},
	} {
		for name, reader := range map[string]func(io.Reader) io.Reader{"whole": func(r io.Reader) io.Reader { return r }, "bytes": iotest.OneByteReader, "end": iotest.DataErrReader} {
			c := &execConn{r: reader(strings.NewReader(test.in))}
			var got []byte
			b := make([]byte, 5)
			var err error
			for err == nil {
				var n int
				n, err = c.Read(b)
				got = append(got, b[:n]...)
			}
			if string(got) != test.want || err.Error() != test.err {
				t.Errorf("%s %q: %q, %v", name, test.in, got, err)
			}
		}
	}
}

func FuzzExecConn(f *testing.F) {
	f.Add([]byte(execFrameOf(1, "one")+execFrameOf(2, "two")), 3)
	f.Fuzz(func(t *testing.T, in []byte, size int) {
		c := &execConn{r: bytes.NewReader(in)}
		b := make([]byte, 1+size&0xfff)
		for total := 0; ; {
			n, err := c.Read(b)
			if total += n; total > len(in) || len(c.stderr) > execMessage {
				t.Fatalf("%d bytes of %d, %d of a message", total, len(in), len(c.stderr))
			}
			if err != nil {
				return
			}
		}
	})
}
