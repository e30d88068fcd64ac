package auditlog_test

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"log/slog"
	"net"
	"os"
	"os/signal"
	"path/filepath"
	"strings"
	"sync"
	"syscall"
	"time"

	"golang.org/x/crypto/ssh"

	"github.com/sallyport/sallyport/auditlog"
	"github.com/sallyport/sallyport/auditlog/file"
	"github.com/sallyport/sallyport/authz"
	"github.com/sallyport/sallyport/backends"
	"github.com/sallyport/sallyport/backends/backendtest"
	"github.com/sallyport/sallyport/sshserver"
)

// gateEnv makes this test's binary a gate: the real server, policy, log and agent, with sandboxes that are processes.
const gateEnv = "AUDITLOG_TEST_KILLED_GATE"

// gatePlan is what such a gate is told, as JSON in gateEnv.
type gatePlan struct {
	Dir   string
	Sync  string
	Phase string // in which the gate ends itself by SIGKILL; empty: it does not
	N     int    // at the phase's N-th point
}

// The phases, and the points in them at which a gate ends itself. In transfer it is ended from outside.
const (
	inHandshake = "handshake"     // the N-th byte of a client's that has not authenticated
	inStart     = "sandbox start" // N times 100 us after a start began, at the latest when it ended
	inTransfer  = "transfer"
	inCut       = "segment cut" // before, in the middle of, or after the N-th operation: on the disk from the footer on, and on the store
	inSeal      = "seal"        // likewise, of a log's last segment
	inTree      = "checkpoint"  // likewise, of a leaf or a checkpoint
)

var phases = []string{inHandshake, inStart, inTransfer, inCut, inSeal, inTree}

func gateKey(dir, name string) (ssh.Signer, error) {
	b, err := os.ReadFile(filepath.Join(dir, name))
	if err != nil {
		return nil, err
	}
	return ssh.ParsePrivateKey(b)
}

// killedGate runs the gate until SIGTERM, or the plan's point.
func killedGate(plan string) error {
	var p gatePlan
	if err := json.Unmarshal([]byte(plan), &p); err != nil {
		return err
	}
	log := slog.New(slog.NewTextHandler(os.Stderr, &slog.HandlerOptions{Level: slog.LevelError}))
	k := &killer{plan: p, phase: make(map[string]string), last: make(map[string]bool)}
	store, err := file.NewStore(filepath.Join(p.Dir, "store"))
	if err != nil {
		return err
	}
	ctx, stop := signal.NotifyContext(context.Background(), syscall.SIGTERM)
	defer stop()
	cfg := killedConfig(p.Dir)
	cfg.SyncBytes, cfg.Sync = gateSyncBytes, p.Sync
	l, err := auditlog.OpenOn(ctx, killDisk{auditlog.OSDisk{}, k}, cfg, testKey, killStore{store, k}, "gate-1", log)
	if err != nil {
		return err
	}
	policy, err := authz.Open(authz.Config{Data: filepath.Join(p.Dir, "data")}, log)
	if err != nil {
		return err
	}
	defer policy.Close()
	host, err := gateKey(p.Dir, "host.key")
	if err != nil {
		return err
	}
	server, err := sshserver.New(sshserver.Options{
		Config: sshserver.DefaultConfig(), Gate: "gate-1", Version: "test", HostKeys: []ssh.Signer{host}, Policy: policy,
		Backend: killBackend{backendtest.NewMemory(), k}, Log: l, Slog: log,
	})
	if err != nil {
		return err
	}
	listener, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		return err
	}
	fmt.Println(listener.Addr())
	k.begin()
	served := make(chan error, 1)
	go func() { served <- server.Serve(killListener{listener, k}) }()
	<-ctx.Done()
	now, cancel := context.WithCancel(context.Background())
	cancel()
	server.Shutdown(now)
	closing, cancel := context.WithTimeout(context.Background(), time.Minute)
	defer cancel()
	return errors.Join(<-served, l.Close(closing))
}

// gateSyncBytes is how far records may be behind in mode interval.
const gateSyncBytes = 64 << 10

// killer ends the process at the plan's point.
type killer struct {
	plan gatePlan

	mu    sync.Mutex // guards all below; nobody gets it any more once the process ends
	begun bool       // the gate takes connections
	count int
	phase map[string]string // of the spool's files whose footer was begun, and of a directory with a name that is not durable
	last  map[string]bool   // logs whose last segment was begun to be sealed
}

// begin says that the gate takes connections.
func (k *killer) begin() {
	k.mu.Lock()
	defer k.mu.Unlock()
	k.begun = true
}

// phaseOf is the phase that an operation on a file, or in a directory, is of. The lock is held.
func (k *killer) phaseOf(name string) string {
	switch {
	case strings.Contains(name, objectPart), name == filepath.Join(k.plan.Dir, "tree"), filepath.Dir(name) == filepath.Join(k.plan.Dir, "tree"):
		if k.begun {
			return inTree
		}
		return ""
	}
	return k.phase[name]
}

// objectPart is in the name of an object's file in the spool.
const objectPart = ".obj"

func (k *killer) die() {
	fmt.Println("killed in", k.plan.Phase)
	syscall.Kill(os.Getpid(), syscall.SIGKILL)
	select {}
}

// point is one of a phase's points. The lock is held.
func (k *killer) point(phase string) {
	if phase != "" && phase == k.plan.Phase {
		if k.count++; k.count == k.plan.N {
			k.die()
		}
	}
}

// unsynced is a sync: a kill takes nothing that was written, synced or not. TestPowerCut is for the syncs.
func unsynced() error { return nil }

type killDisk struct {
	auditlog.OSDisk
	k *killer
}

func (d killDisk) around(name string, f func() error) error {
	d.k.mu.Lock()
	phase := d.k.phaseOf(name)
	d.k.point(phase)
	d.k.mu.Unlock()
	err := f()
	d.k.mu.Lock()
	defer d.k.mu.Unlock()
	d.k.point(phase)
	return err
}

func (d killDisk) OpenFile(name string, flag int, perm fs.FileMode) (auditlog.DiskFile, error) {
	parts := strings.Split(filepath.Base(name), ".")
	fresh := len(parts) == 3 && parts[1] != "00000000" && "."+parts[2] != objectPart
	if fresh {
		d.k.mu.Lock()
		d.k.phase[name] = inCut
		d.k.mu.Unlock()
	}
	var f auditlog.DiskFile
	err := d.around(name, func() (err error) { f, err = d.OSDisk.OpenFile(name, flag, perm); return err })
	if err != nil {
		return nil, err
	}
	return &killFile{f, d, fresh}, nil
}

func (d killDisk) Rename(from, to string) error {
	d.k.mu.Lock()
	phase := d.k.phase[from]
	d.k.phase[to], d.k.phase[filepath.Dir(to)] = phase, phase
	delete(d.k.phase, from)
	d.k.mu.Unlock()
	return d.around(to, func() error { return d.OSDisk.Rename(from, to) })
}

func (d killDisk) SyncDir(name string) error {
	defer func() {
		d.k.mu.Lock()
		defer d.k.mu.Unlock()
		delete(d.k.phase, name)
	}()
	return d.around(name, unsynced)
}

func (d killDisk) Remove(name string) error {
	return d.around(name, func() error { return d.OSDisk.Remove(name) })
}

type killFile struct {
	auditlog.DiskFile
	d     killDisk
	fresh bool // it is made by a cut, which goes on until its first sync
}

func (f *killFile) Write(p []byte) (int, error) {
	footer, last := auditlog.LastFooter(p)
	half := 0
	if k := f.d.k; footer {
		k.mu.Lock()
		phase := inCut
		if last {
			phase = inSeal
			k.last[strings.Split(filepath.Base(f.Name()), ".")[0]] = true
		}
		k.phase[f.Name()] = phase
		f.fresh = false
		k.point(phase)
		k.mu.Unlock()
		half = len(p) / 2
	}
	n := 0
	err := f.d.around(f.Name(), func() (err error) { n, err = f.DiskFile.Write(p[:half]); return err })
	if err == nil {
		m := 0
		err = f.d.around(f.Name(), func() (err error) { m, err = f.DiskFile.Write(p[half:]); return err })
		n += m
	}
	return n, err
}

func (f *killFile) Sync() error {
	err := f.d.around(f.Name(), unsynced)
	if f.fresh {
		f.fresh = false
		f.d.k.mu.Lock()
		defer f.d.k.mu.Unlock()
		delete(f.d.k.phase, f.Name())
	}
	return err
}

type killStore struct {
	auditlog.Store
	k *killer
}

func (s killStore) Put(ctx context.Context, name string, r io.Reader, size int64) error {
	n, err := auditlog.ParseName(name)
	point := func() {
		s.k.mu.Lock()
		defer s.k.mu.Unlock()
		switch {
		case err != nil: // no segment
			s.k.point(s.k.phaseOf(objectPart))
		case s.k.last[n.ID]:
			s.k.point(inSeal)
		default:
			s.k.point(inCut)
		}
	}
	point()
	defer point()
	return s.Store.Put(ctx, name, r, size)
}

type killBackend struct {
	backends.Backend
	k *killer
}

func (b killBackend) Start(ctx context.Context, spec backends.Spec) (backends.Sandbox, error) {
	if b.k.plan.Phase != inStart {
		return b.Backend.Start(ctx, spec)
	}
	// The first starts are left alone, so that there is something to lose.
	b.k.mu.Lock()
	b.k.count++
	spare := b.k.count <= 3
	b.k.mu.Unlock()
	if spare {
		return b.Backend.Start(ctx, spec)
	}
	time.AfterFunc(time.Duration(b.k.plan.N)*100*time.Microsecond, b.k.die)
	b.Backend.Start(ctx, spec)
	b.k.die()
	return nil, nil
}

type killListener struct {
	net.Listener
	k *killer
}

func (l killListener) Accept() (net.Conn, error) {
	nc, err := l.Listener.Accept()
	if err != nil || l.k.plan.Phase != inHandshake {
		return nc, err
	}
	l.k.mu.Lock()
	defer l.k.mu.Unlock()
	if l.k.count++; l.k.count <= 3 {
		return nc, nil
	}
	return &killConn{Conn: nc, k: l.k, left: l.k.plan.N}, nil
}

// killConn ends the process when so many bytes have come.
type killConn struct {
	net.Conn
	k    *killer
	left int
}

func (c *killConn) Read(p []byte) (int, error) {
	n, err := c.Conn.Read(p[:min(len(p), max(c.left, 1))])
	if c.left -= n; c.left <= 0 {
		c.k.die()
	}
	return n, err
}

// content is the i-th byte that session s of the test passes.
func content(s uint64, i int) byte { return byte((uint64(i)*2654435761 + s*40503) >> 7) }

// contentReader reads a session's bytes.
type contentReader struct {
	s    uint64
	i, n int
}

func (r *contentReader) Read(p []byte) (int, error) {
	if r.i >= r.n {
		return 0, io.EOF
	}
	p = p[:min(len(p), r.n-r.i)]
	for j := range p {
		p[j] = content(r.s, r.i+j)
	}
	r.i += len(p)
	return len(p), nil
}
