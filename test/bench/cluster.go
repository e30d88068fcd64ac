package main

import (
	"bytes"
	"context"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/tls"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/pem"
	"errors"
	"fmt"
	"io"
	"log"
	"math/big"
	"net"
	"net/http"
	"net/http/httputil"
	"net/url"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"
	"time"

	corev1 "k8s.io/api/core/v1"
	"k8s.io/client-go/rest"
)

const clusterTable = "On Kubernetes: `true`"

// caseCluster measures a whole `ssh gate true` beside what the cluster alone takes: the creation of the same pod and the first
// program in it. Both also with an image that carries the agent, whose pod has no init container.
func caseCluster(ctx context.Context, b *bench) error {
	k := b.cluster
	shapes := map[string]*corev1.Pod{}
	whole, total, handshake, floor := map[string]*samples{}, map[string]*samples{}, map[string]*samples{}, map[string]*samples{}
	var sshdWhole, sshdTotal, kubectlRun, kubectlStart samples
	users := []string{"plain", "carried"}
	rest := func(ctx context.Context) error { return b.onCluster.rest(ctx, b) }
	as := func(user string) *target {
		t := b.onCluster.target
		t.user = user
		return &t
	}
	var turns []turn
	for _, user := range users {
		if err := rest(ctx); err != nil {
			return err
		}
		c, err := b.client.dial(ctx, as(user))
		if err != nil {
			return err
		}
		_, err = c.runTrue()
		if err == nil {
			shapes[user], err = k.podShape(ctx)
		}
		c.Close()
		if err != nil {
			return fmt.Errorf("%s: %w", user, err)
		}
		if init := len(shapes[user].Spec.InitContainers); (init == 1) != (user == "plain") {
			return fmt.Errorf("%s: a pod with %d init containers", user, init)
		}
		whole[user], total[user], handshake[user], floor[user] = new(samples), new(samples), new(samples), new(samples)
		turns = append(turns,
			turn{user + ", ssh", rest, func() error {
				began := time.Now()
				err := b.client.ssh(ctx, as(user), aes, nil, nil, nil, "true")
				whole[user].duration(time.Since(began))
				return err
			}},
			turn{user + ", client in Go", rest, func() error {
				began := time.Now()
				c, err := b.client.dial(ctx, as(user))
				if err != nil {
					return err
				}
				defer c.Close()
				_, err = c.runTrue()
				total[user].duration(time.Since(began))
				handshake[user].duration(c.handshake)
				return err
			}},
			turn{user + ", bare pod", rest, func() error {
				name, took, err := k.start(ctx, shapes[user])
				floor[user].duration(took)
				if name != "" {
					err = errors.Join(err, k.delete(ctx, name))
				}
				return err
			}})
	}
	turns = append(turns,
		turn{"kubectl run", rest, func() error {
			began := time.Now()
			err := k.kubectlRun(ctx, shapes["plain"])
			kubectlRun.duration(time.Since(began))
			return err
		}},
		turn{"kubectl", rest, func() error {
			cmd, cancel := k.command(ctx, "version", "--client")
			defer cancel()
			began := time.Now()
			out, err := cmd.CombinedOutput()
			kubectlStart.duration(time.Since(began))
			if err != nil {
				return fmt.Errorf("kubectl version: %w: %s", err, out)
			}
			return nil
		}},
		b.turn(&b.sshd.target, func(t *target) error {
			began := time.Now()
			err := b.client.ssh(ctx, t, aes, nil, nil, nil, "true")
			sshdWhole.duration(time.Since(began))
			if err != nil {
				return err
			}
			began = time.Now()
			c, err := b.client.dial(ctx, t)
			if err != nil {
				return err
			}
			defer c.Close()
			_, err = c.runTrue()
			sshdTotal.duration(time.Since(began))
			return err
		}))
	if err := b.inTurn(ctx, b.fewer(), turns...); err != nil {
		return err
	}
	own := max(0, sshdWhole.median()-sshdTotal.median())
	version, err := k.version(ctx)
	if err != nil {
		return err
	}
	t := b.report.table(clusterTable, "step, ms", "agent by init container", "image with the agent")
	row := func(name string, m map[string]*samples) { t.row(name, m["plain"].ms(), m["carried"].ms()) }
	row("**floor**: the same pod's creation and its first program (pods/exec)", floor)
	row("`ssh gate true`, client in Go", total)
	row("of this, connect, key exchange, authentication", handshake)
	row("`ssh gate true`, OpenSSH's client", whole)
	t.row("`kubectl run --rm` of the same pod, with `true`", kubectlRun.ms(), "")
	t.row("of this, kubectl's own start (`kubectl version --client`)", kubectlStart.ms(), "")
	t.note("%s. The floor is created over a connection that is there, and its program is tried every %v, as the gate does it. "+
		"OpenSSH's client takes %s ms longer than the one in Go, measured with sshd.", version, tryEvery, number(own*1000))
	t.note("`kubectl run` waits for the status Running, which a kubelet reports up to a second late.")
	for _, user := range users {
		bound := 1.2*floor[user].median() + handshake[user].median() + own
		what := map[string]string{"plain": "the agent by an init container", "carried": "an image with the agent"}[user]
		b.report.aim(whole[user].median() <= bound, "Kubernetes, "+what+": `ssh gate true` within 1.2 × its floor and the SSH handshake",
			fmt.Sprintf("%s of %s ms, %.2f of the floor less the handshake", number(whole[user].median()*1000), number(bound*1000),
				(whole[user].median()-handshake[user].median()-own)/floor[user].median()))
	}
	return nil
}

// caseClusterTransfer has bytes pass one program in a pod, by the gate and by kubectl exec.
func caseClusterTransfer(ctx context.Context, b *bench) error {
	k := b.cluster
	if err := b.onCluster.rest(ctx, b); err != nil {
		return err
	}
	m, err := b.client.connect(ctx, &b.onCluster.target, aes)
	if err != nil {
		return err
	}
	defer m.close()
	shape, err := k.podShape(ctx)
	if err != nil {
		return err
	}
	shape.Spec.Containers[0].Command, shape.Spec.Containers[0].Args = []string{"/bin/sleep", "3600"}, nil
	pod, _, err := k.start(ctx, shape)
	if pod != "" {
		defer k.delete(context.WithoutCancel(ctx), pod)
	}
	if err != nil {
		return err
	}
	zeros := b.path("stream")
	f, err := os.Create(zeros)
	if err == nil {
		err = errors.Join(f.Truncate(b.stream), f.Close())
	}
	if err != nil {
		return err
	}
	byGate := func(in io.Reader, out io.Writer, command string) error { return m.run(ctx, in, out, command) }
	byKubectl := func(in io.Reader, out io.Writer, command string) error {
		cmd, cancel := k.command(ctx, append([]string{"exec", "-i", pod, "-c", sandboxName, "--"}, strings.Fields(command)...)...)
		defer cancel()
		var stderr bytes.Buffer
		cmd.Stdin, cmd.Stdout, cmd.Stderr = in, out, &stderr
		if err := cmd.Run(); err != nil {
			return fmt.Errorf("kubectl exec: %w: %s", err, bytes.TrimSpace(stderr.Bytes()))
		}
		return nil
	}
	type rates struct{ start, down, up samples }
	measure := func(by func(io.Reader, io.Writer, string) error, r *rates) func() error {
		return func() error {
			began := time.Now()
			if err := by(nil, nil, "true"); err != nil {
				return err
			}
			r.start.duration(time.Since(began))
			null, err := os.OpenFile(os.DevNull, os.O_RDWR, 0)
			if err != nil {
				return err
			}
			defer null.Close()
			began = time.Now()
			if err := by(nil, null, fmt.Sprintf("head -c %d /dev/zero", b.stream)); err != nil {
				return err
			}
			r.down.add(float64(b.stream) / mib / time.Since(began).Seconds())
			in, err := os.Open(zeros)
			if err != nil {
				return err
			}
			defer in.Close()
			var out bytes.Buffer
			began = time.Now()
			if err := by(in, &out, "wc -c"); err != nil {
				return err
			}
			r.up.add(float64(b.stream) / mib / time.Since(began).Seconds())
			if n := strings.TrimSpace(out.String()); n != strconv.FormatInt(b.stream, 10) {
				return fmt.Errorf("%s bytes arrived of %d", n, b.stream)
			}
			return nil
		}
	}
	var gate, bare rates
	none := func(context.Context) error { return nil }
	err = b.inTurn(ctx, b.slow(), turn{"Sallyport", none, measure(byGate, &gate)}, turn{"kubectl exec", none, measure(byKubectl, &bare)})
	if err != nil {
		return err
	}
	t := b.report.table("On Kubernetes: throughput", "transfer", "kubectl exec, MiB/s", "Sallyport, MiB/s", "ratio")
	t.row(size(b.stream)+" of zeros down", bare.down.text(), gate.down.text(), gate.down.ratio(bare.down))
	t.row(size(b.stream)+" of zeros up", bare.up.text(), gate.up.text(), gate.up.ratio(bare.up))
	t.note("All bytes pass the API server and the kubelet, and here all of them share the machine's processors. What the same client "+
		"takes for `true` is in it: kubectl %s ms, ssh on its connection %s.", bare.start.ms(), gate.start.ms())
	return nil
}

// caseClusterIdle counts what idle sessions take: the gate's memory, and requests to the API server, by a proxy before it.
func caseClusterIdle(ctx context.Context, b *bench) error {
	if err := b.onCluster.rest(ctx, b); err != nil {
		return err
	}
	proxy, err := newCounter(b)
	if err != nil {
		return err
	}
	defer proxy.close()
	ports, err := freePorts(2)
	if err != nil {
		return err
	}
	g, err := b.clusterGate("Sallyport on the cluster, counted", "-counted", ports[0], ports[1], proxy.kubeconfig)
	if err != nil {
		return err
	}
	if err := g.start(ctx); err != nil {
		return err
	}
	defer g.stop()
	small := g.target
	small.user = "small"
	var conns []*goConn
	var mu sync.Mutex // guards conns
	defer func() {
		for _, c := range conns {
			c.Close()
		}
	}()
	open := func(n int) error { // four at a time
		slots := make(chan struct{}, 4)
		errs := make([]error, n)
		var wg sync.WaitGroup
		for i := range n {
			slots <- struct{}{}
			wg.Go(func() {
				defer func() { <-slots }()
				c, err := b.client.dial(ctx, &small)
				if err != nil {
					errs[i] = err
					return
				}
				if _, err := c.shell(); err != nil {
					errs[i] = errors.Join(err, c.Close())
					return
				}
				mu.Lock()
				conns = append(conns, c)
				mu.Unlock()
			})
		}
		wg.Wait()
		return errors.Join(errs...)
	}
	type state struct {
		n                                            int
		rss, pss, goroutines, descriptors, perMinute float64
	}
	t := b.report.table("On Kubernetes: idle sessions, each a pod with a shell at its prompt", "sessions", "gate RSS, MiB", "PSS, MiB",
		"goroutines", "descriptors", "requests to the API server a minute")
	row := func(name string, s state) {
		t.row(name, number(s.rss), number(s.pss), number(s.goroutines), number(s.descriptors), number(s.perMinute))
	}
	var states []state
	for _, n := range []int{b.idle[0], b.idle[len(b.idle)-1]} { // each takes minutes
		if err := open(n - len(conns)); err != nil {
			if ctx.Err() != nil || len(states) == 0 {
				return err
			}
			// A node has room for so many.
			b.say("cluster-idle: %d sessions, not %d: %v", len(conns), n, err)
			t.note("The cluster took %d sessions, not %d.", len(conns), n)
		}
		settle := 20 * time.Second
		if b.quick {
			settle = time.Second
		}
		wait := func(d time.Duration) error {
			select {
			case <-time.After(d):
				return nil
			case <-ctx.Done():
				return ctx.Err()
			}
		}
		if err := wait(settle); err != nil {
			return err
		}
		before := proxy.requests.Load()
		if err := wait(b.watch); err != nil {
			return err
		}
		s := state{n: len(conns), perMinute: float64(proxy.requests.Load()-before) / b.watch.Minutes()}
		pid := g.process.pid()
		memory, err := readMemory(pid)
		if err != nil {
			return err
		}
		fds, err := descriptors(pid)
		if err != nil {
			return err
		}
		s.rss, s.pss, s.descriptors = memory.rss/mib, memory.pss/mib, float64(fds)
		if s.goroutines, err = g.metric(ctx, "go_goroutines"); err != nil {
			return err
		}
		// All of them still live: what is measured is no graveyard.
		for _, c := range conns {
			if _, err := c.runTrue(); err != nil {
				return fmt.Errorf("an idle session: %w", err)
			}
		}
		states = append(states, s)
		row(strconv.Itoa(s.n), s)
	}
	first, last := states[0], states[len(states)-1]
	if n := float64(last.n - first.n); n > 0 {
		each := state{rss: (last.rss - first.rss) / n, pss: (last.pss - first.pss) / n, goroutines: (last.goroutines - first.goroutines) / n,
			descriptors: (last.descriptors - first.descriptors) / n, perMinute: (last.perMinute - first.perMinute) / n}
		row("**each**", each)
		b.report.aim(each.perMinute < 0.01, "Kubernetes: an idle session asks the API server nothing",
			fmt.Sprintf("%s requests a minute and session, of %d", number(max(0, each.perMinute)), last.n))
	}
	t.note("Requests are counted by a proxy before the API server, for %v. What there is without a session is the gate's look for "+
		"pods that others have left, and its watch.", b.watch)
	for _, c := range conns {
		c.Close()
	}
	conns = nil
	return errors.Join(g.rest(ctx, b), g.stop())
}

// counter is a proxy on loopback before the API server that counts requests. Who has its token has the credential of the kubeconfig.
type counter struct {
	requests   atomic.Int64
	kubeconfig string // file
	server     *http.Server
	done       chan struct{}
}

func newCounter(b *bench) (*counter, error) {
	target, err := url.Parse(b.cluster.config.Host)
	if err != nil {
		return nil, err
	}
	config := rest.CopyConfig(b.cluster.config)
	config.NextProtos = []string{"http/1.1"} // HTTP/2 knows no upgrades
	transport, err := rest.TransportFor(config)
	if err != nil {
		return nil, err
	}
	cert, authority, err := loopbackCertificate()
	if err != nil {
		return nil, err
	}
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		return nil, err
	}
	token := "Bearer " + rand.Text()
	p := &counter{kubeconfig: b.path("counted.kubeconfig"), done: make(chan struct{})}
	proxy := &httputil.ReverseProxy{
		Rewrite: func(r *httputil.ProxyRequest) {
			r.SetURL(target)
			r.Out.Header.Del("Authorization")
		},
		Transport: transport, FlushInterval: -1, ErrorLog: log.New(io.Discard, "", 0),
	}
	p.server = &http.Server{
		TLSConfig: &tls.Config{Certificates: []tls.Certificate{cert}, NextProtos: []string{"http/1.1"}},
		ErrorLog:  log.New(io.Discard, "", 0),
		Handler: http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
			if r.Header.Get("Authorization") != token {
				http.Error(w, "who are you?", http.StatusUnauthorized)
				return
			}
			p.requests.Add(1)
			proxy.ServeHTTP(w, r)
		}),
		TLSNextProto: map[string]func(*http.Server, *tls.Conn, http.Handler){},
	}
	go func() {
		defer close(p.done)
		p.server.ServeTLS(l, "", "")
	}()
	ca := b.path("counted.pem")
	text := fmt.Sprintf(`apiVersion: v1
kind: Config
current-context: counted
clusters: [{name: counted, cluster: {server: "https://%s", certificate-authority: "%s"}}]
users: [{name: counted, user: {token: "%s"}}]
contexts: [{name: counted, context: {cluster: counted, user: counted}}]
`, l.Addr(), filepath.Base(ca), strings.TrimPrefix(token, "Bearer "))
	if err := errors.Join(os.WriteFile(ca, authority, 0o600), os.WriteFile(p.kubeconfig, []byte(text), 0o600)); err != nil {
		p.close()
		return nil, err
	}
	return p, nil
}

func (p *counter) close() {
	p.server.Close()
	<-p.done
}

// loopbackCertificate is for a server on 127.0.0.1 that lives no longer than this process.
func loopbackCertificate() (tls.Certificate, []byte, error) {
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		return tls.Certificate{}, nil, err
	}
	c := &x509.Certificate{
		SerialNumber: big.NewInt(1), Subject: pkix.Name{CommonName: "counter"}, IPAddresses: []net.IP{net.IPv4(127, 0, 0, 1)},
		NotBefore: time.Now().Add(-time.Hour), NotAfter: time.Now().Add(24 * time.Hour),
		IsCA: true, BasicConstraintsValid: true, KeyUsage: x509.KeyUsageDigitalSignature | x509.KeyUsageCertSign,
	}
	der, err := x509.CreateCertificate(rand.Reader, c, c, key.Public(), key)
	if err != nil {
		return tls.Certificate{}, nil, err
	}
	return tls.Certificate{Certificate: [][]byte{der}, PrivateKey: key}, pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: der}), nil
}
