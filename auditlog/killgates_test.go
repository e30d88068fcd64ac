package auditlog_test

import (
	"bufio"
	"crypto/ed25519"
	"encoding/json"
	"encoding/pem"
	"errors"
	"fmt"
	"io"
	"math/rand/v2"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"sync"
	"sync/atomic"
	"syscall"
	"testing"
	"time"

	"golang.org/x/crypto/ssh"

	"github.com/sallyport/sallyport/auditlog"
	"github.com/sallyport/sallyport/auditlog/file"
)

// gateTime bounds everything that is waited for from a gate or a client.
const gateTime = 2 * time.Minute

// The gate is killed by SIGKILL, in each phase equally often, while three clients have sessions with known content. The next
// start brings to the store every byte that was acknowledged, as its log verifies under the gate's key, and seals what was cut
// as interrupted; each log is in the one transparency log, which goes on from each checkpoint that was published. Acknowledged is what a client has seen; in mode interval, but for the last gateSyncBytes of a session, as far
// as records may be behind.
func TestKilledGate(t *testing.T) {
	rng := seed(t)
	kills := 20
	if soaking() {
		kills = 200
	}
	dir := t.TempDir()
	host, user := makeGate(t, dir)
	killed, interrupted, bytes := map[string]int{}, 0, 0
	for i := range kills {
		phase := phases[i%len(phases)]
		mode := []string{"interval", "before-pass"}[i/len(phases)%2]
		p := gatePlan{Dir: dir, Sync: mode, Phase: phase}
		switch phase {
		case inHandshake:
			p.N = 1 + rng.IntN(1000)
		case inStart:
			p.N = rng.IntN(100)
		default:
			p.N = 1 + rng.IntN(60)
		}
		k := killRound{t: t, what: fmt.Sprintf("kill %d, %s, %s, N=%d", i, phase, mode, p.N), plan: p, host: host, user: user,
			round: i, seed: rng.Uint64()}
		k.run(rng)
		interrupted += k.interrupted
		bytes += k.bytes
		killed[phase]++
		if t.Failed() {
			return
		}
	}
	for _, phase := range phases {
		if killed[phase] < kills/10 {
			t.Errorf("%s: %d kills", phase, killed[phase])
		}
	}
	if interrupted < kills/2 {
		t.Errorf("%d kills interrupted %d sessions only", kills, interrupted)
	}
	t.Logf("%v; %d sessions interrupted, %d bytes acknowledged, none lost", killed, interrupted, bytes)
}

// makeGate makes a gate's directory, and gives its public host key and its user's key.
func makeGate(t *testing.T, dir string) (host ssh.PublicKey, user ssh.Signer) {
	t.Helper()
	signer := func(b byte) (ssh.Signer, ed25519.PrivateKey) {
		k := ed25519.NewKeyFromSeed([]byte(strings.Repeat(string(rune(b)), ed25519.SeedSize)))
		s, err := ssh.NewSignerFromKey(k)
		must(t, err)
		return s, k
	}
	h, hostKey := signer('h')
	user, _ = signer('u')
	block, err := ssh.MarshalPrivateKey(hostKey, "")
	must(t, err)
	must(t, os.WriteFile(filepath.Join(dir, "host.key"), pem.EncodeToMemory(block), 0o600))
	for name, v := range map[string]any{
		"users/alice.json":    map[string]any{"keys": []string{strings.TrimSpace(string(ssh.MarshalAuthorizedKey(user.PublicKey())))}},
		"profiles/debug.json": map[string]any{"image": "none", "exec_audit": "off", "permit": map[string]any{"exec": true}},
		"grants/alice.json": map[string]any{"OPS-1": map[string]any{"profile": "debug", "reason": "a test", "approved_by": "bob",
			"not_before": time.Now().Add(-time.Hour).UTC().Format(time.RFC3339), "not_after": time.Now().Add(24 * time.Hour).UTC().Format(time.RFC3339)}},
	} {
		b, err := json.Marshal(v)
		must(t, err)
		must(t, os.MkdirAll(filepath.Dir(filepath.Join(dir, "data", name)), 0o700))
		must(t, os.WriteFile(filepath.Join(dir, "data", name), b, 0o600))
	}
	must(t, os.Mkdir(filepath.Join(dir, "tmp"), 0o700))
	return h.PublicKey(), user
}

// gateProcess is a running gate.
type gateProcess struct {
	cmd    *exec.Cmd
	addr   string
	killed atomic.Bool // it has said that it ends itself
	stderr strings.Builder
	read   chan struct{} // closed when its output has ended
}

func startGate(t *testing.T, p gatePlan) *gateProcess {
	t.Helper()
	plan, err := json.Marshal(p)
	must(t, err)
	exe, err := os.Executable()
	must(t, err)
	g := &gateProcess{cmd: exec.Command(exe), read: make(chan struct{})}
	g.cmd.Env = append(os.Environ(), gateEnv+"="+string(plan), "TMPDIR="+filepath.Join(p.Dir, "tmp"))
	g.cmd.Stderr = &g.stderr
	out, err := g.cmd.StdoutPipe()
	must(t, err)
	must(t, g.cmd.Start())
	lines := bufio.NewScanner(out)
	if lines.Scan() {
		g.addr = lines.Text()
	}
	go func() {
		defer close(g.read)
		for lines.Scan() {
			if strings.HasPrefix(lines.Text(), "killed in") {
				g.killed.Store(true)
			}
		}
	}()
	return g
}

// wait waits for the gate's end, and that of its sandboxes, which hold its standard error.
func (g *gateProcess) wait() error {
	timer := time.AfterFunc(gateTime, func() { g.cmd.Process.Kill() })
	defer timer.Stop()
	<-g.read
	return g.cmd.Wait()
}

// stop ends it in order.
func (g *gateProcess) stop(t *testing.T) {
	t.Helper()
	must(t, g.cmd.Process.Signal(syscall.SIGTERM))
	if err := g.wait(); err != nil || g.stderr.Len() > 0 {
		t.Fatalf("gate: %v %s", err, g.stderr.String())
	}
}

type killRound struct {
	t     *testing.T
	what  string
	plan  gatePlan
	host  ssh.PublicKey
	user  ssh.Signer
	round int
	seed  uint64

	mu   sync.Mutex        // guards seen
	seen map[string]*acked // by the session's command

	interrupted int
	bytes       int
}

// acked is what a client knows of a session.
type acked struct {
	seed  uint64
	bytes int // seen
}

// run runs one gate to its kill, and the next to its end, and looks into the store.
func (k *killRound) run(rng *rand.Rand) {
	t := k.t
	k.seen = make(map[string]*acked)
	g := startGate(t, k.plan)
	if g.addr == "" {
		t.Fatalf("%s: gate: %v %s", k.what, g.wait(), g.stderr.String())
	}
	var kill func(total int64)
	if k.plan.Phase == inTransfer {
		at := rng.Int64N(3 << 20)
		var once sync.Once
		kill = func(total int64) {
			if total >= at {
				once.Do(func() {
					g.killed.Store(true)
					g.cmd.Process.Signal(syscall.SIGKILL)
				})
			}
		}
	}
	var total atomic.Int64
	var clients sync.WaitGroup
	ended := make(chan struct{})
	for w := range 3 {
		clients.Add(1)
		go func() {
			defer clients.Done()
			for n := 0; ; n++ {
				select {
				case <-ended:
					return
				default:
				}
				k.session(g.addr, fmt.Sprintf("cat # %d-%d-%d", k.round, w, n), k.seed+uint64(w*1000+n), func(n int) {
					if sum := total.Add(int64(n)); kill != nil {
						kill(sum)
					}
				})
			}
		}()
	}
	err := g.wait()
	close(ended)
	clients.Wait()
	var exit *exec.ExitError
	if !errors.As(err, &exit) || exit.Sys().(syscall.WaitStatus).Signal() != syscall.SIGKILL || !g.killed.Load() {
		t.Fatalf("%s: the gate ended by itself: %v %s", k.what, err, g.stderr.String())
	}
	must(t, os.RemoveAll(filepath.Join(k.plan.Dir, "tmp"))) // what the killed gate's sandboxes had
	must(t, os.Mkdir(filepath.Join(k.plan.Dir, "tmp"), 0o700))

	kept := checkpoints(source(t, filepath.Join(k.plan.Dir, "store")))
	next := startGate(t, gatePlan{Dir: k.plan.Dir, Sync: k.plan.Sync})
	after := fmt.Sprintf("cat # %d-after", k.round)
	if !k.session(next.addr, after, k.seed, func(int) {}) {
		t.Errorf("%s: no session after the restart", k.what)
	}
	next.stop(t)
	k.check(after)
	if err := checkTree(source(t, filepath.Join(k.plan.Dir, "store")), kept, 2); err != nil {
		t.Errorf("%s: %v", k.what, err)
	}
	t.Logf("%s: %d sessions", k.what, len(k.seen))
	if k.round%10 == 9 {
		k.clear()
	}
}

// session passes bytes through a cat in a sandbox until all have come back, or the gate is gone. It reports whether all have.
func (k *killRound) session(addr, command string, seed uint64, came func(int)) bool {
	nc, err := net.DialTimeout("tcp", addr, gateTime)
	if err != nil {
		return false
	}
	defer nc.Close()
	nc.SetDeadline(time.Now().Add(gateTime))
	sc, channels, requests, err := ssh.NewClientConn(nc, addr, &ssh.ClientConfig{
		User: "alice", Auth: []ssh.AuthMethod{ssh.PublicKeys(k.user)}, HostKeyCallback: ssh.FixedHostKey(k.host),
	})
	if err != nil {
		return false
	}
	client := ssh.NewClient(sc, channels, requests)
	defer client.Close()
	s, err := client.NewSession()
	if err != nil {
		return false
	}
	defer s.Close()
	a := &acked{seed: seed}
	k.mu.Lock()
	k.seen[command] = a
	k.mu.Unlock()
	n := 40<<10 + int(seed%(160<<10))
	s.Stdin = &contentReader{s: seed, n: n}
	out, err := s.StdoutPipe()
	if err != nil || s.Start(command) != nil {
		return false
	}
	p := make([]byte, 16<<10)
	for {
		m, err := out.Read(p)
		for i, b := range p[:m] {
			if b != content(seed, a.bytes+i) {
				k.t.Errorf("%s: %s: byte %d came back wrong", k.what, command, a.bytes+i)
				return false
			}
		}
		a.bytes += m
		came(m)
		if err != nil {
			return errors.Is(err, io.EOF) && s.Wait() == nil && a.bytes == n
		}
	}
}

// check looks in the store for all that this round's clients have seen.
func (k *killRound) check(after string) {
	t := k.t
	t.Helper()
	src := source(t, filepath.Join(k.plan.Dir, "store"))
	found := map[string]bool{}
	for _, s := range logs(t, src, "") {
		r := auditlog.NewSessionReader(src, s, testPublic())
		var a *acked
		command := ""
		got := map[auditlog.Stream]int{}
		var last auditlog.Body
		for rec := range r.Records(t.Context()) {
			last = rec.Body
			switch b := rec.Body.(type) {
			case *auditlog.Request:
				if a = k.seen[string(b.Command)]; a != nil {
					command = string(b.Command)
				}
			case *auditlog.Data:
				for i, c := range b.Data {
					if a != nil && c != content(a.seed, got[b.Stream]+i) {
						t.Errorf("%s: %s: %v: byte %d is wrong in the log", k.what, command, b.Stream, got[b.Stream]+i)
						return
					}
				}
				got[b.Stream] += len(b.Data)
			}
		}
		rep := r.Report()
		end, ok := last.(*auditlog.End)
		if rep.State != auditlog.Sealed && rep.State != auditlog.Interrupted || !ok {
			t.Errorf("%s: %s %s: %s, ends with %T: %v", k.what, rep.ID, command, rep.State, last, rep.Problems)
			continue
		}
		if a == nil {
			continue // before a program was asked for, another round's, or the gate's own
		}
		found[command] = true
		want := a.bytes
		if k.plan.Sync == "interval" && command != after {
			want = max(0, want-gateSyncBytes)
		}
		if got[auditlog.Output] < want || got[auditlog.Input] < want {
			t.Errorf("%s: %s: %d bytes were acknowledged, the log has %d of input and %d of output (%s)", k.what, command, want,
				got[auditlog.Input], got[auditlog.Output], rep.State)
		}
		if end.Cause == "interrupted" {
			k.interrupted++
		}
		k.bytes += want
	}
	for command, a := range k.seen {
		if !found[command] && (a.bytes > gateSyncBytes || a.bytes > 0 && k.plan.Sync == "before-pass") {
			t.Errorf("%s: %s: %d bytes were seen, and there is no log", k.what, command, a.bytes)
		}
	}
	if left, err := os.ReadDir(filepath.Join(k.plan.Dir, "spool")); err != nil || len(left) != 1 {
		t.Errorf("%s: left in the spool: %v %v", k.what, left, err)
	}
}

// clear begins anew: what was looked at often need not be looked at again.
func (k *killRound) clear() {
	must(k.t, os.RemoveAll(filepath.Join(k.plan.Dir, "store")))
	must(k.t, os.RemoveAll(filepath.Join(k.plan.Dir, "tree")))
	_, err := file.NewStore(filepath.Join(k.plan.Dir, "store"))
	must(k.t, err)
}
