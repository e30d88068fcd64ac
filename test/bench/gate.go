package main

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"net"
	"net/http"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"syscall"
	"time"

	"github.com/goccy/go-yaml"
)

const (
	gateUser  = "alice" // sallyport demo's
	startWait = 30 * time.Second
	stopWait  = 90 * time.Second // a gate drains for 30 s
	restWait  = time.Minute      // for a session's container to be removed and its log to be stored
)

// gate is one running gate.
type gate struct {
	target
	binary  string
	config  string // file
	state   string // directory
	log     string // the store's directory
	monitor string // address
	process *process
}

// benchRecipient is whom the encrypted log is for: nobody reads it.
const benchRecipient = "age1hxe4qyzgxuwytd9k25xk3a8a2yhcnddae39g29e87ushrvn4qczs30pa03"

// setUpGates has sallyport demo write the configuration, and starts three gates with it: one as it is shipped, one
// that differs in audit.data alone, and one in audit.recipients. Limits that the demo has no use for are raised.
func (b *bench) setUpGates(ctx context.Context) error {
	demo := b.path("demo")
	ports, err := freePorts(7)
	if err != nil {
		return err
	}
	cmd := exec.CommandContext(ctx, filepath.Join(b.bin, "sallyport"), "demo", "--once", "--dir", demo,
		"--port", ports[0], "--image", b.image, "--bin", b.bin)
	cmd.SysProcAttr = &syscall.SysProcAttr{Setpgid: true}
	cmd.Cancel = func() error { return cmd.Process.Signal(syscall.SIGTERM) }
	cmd.WaitDelay = stopWait
	if out, err := cmd.CombinedOutput(); err != nil {
		return fmt.Errorf("sallyport demo: %w\n%s", err, out)
	}
	if err := prolong(filepath.Join(demo, "data", "grants", gateUser+".json")); err != nil {
		return fmt.Errorf("the demo's grant: %w", err)
	}
	if err := addUsers(filepath.Join(demo, "data"), auditProfiles); err != nil {
		return fmt.Errorf("users of the audit's case: %w", err)
	}
	shipped, err := os.ReadFile(filepath.Join(demo, "sallyport.yaml"))
	if err != nil {
		return err
	}
	start := func(name, suffix, port, monitor string, extra map[string]any) (*gate, error) {
		set := map[string]any{
			"state": "state" + suffix, "audit.store.directory": "log" + suffix, "ssh.listen": "127.0.0.1:" + port,
			"monitor.listen":            "127.0.0.1:" + monitor,
			"ssh.max_sessions_per_user": 200, "ssh.max_startups_per_source": 200, "ssh.max_startups": 200,
		}
		for k, v := range extra {
			set[k] = v
		}
		text, err := withSettings(shipped, set)
		if err != nil {
			return nil, err
		}
		g := &gate{
			binary: filepath.Join(demo, "bin", "sallyport"), config: filepath.Join(demo, "bench"+suffix+".yaml"),
			state: filepath.Join(demo, "state"+suffix), log: filepath.Join(demo, "log"+suffix),
			monitor: "127.0.0.1:" + monitor,
			target:  target{name: name, addr: "127.0.0.1:" + port, user: gateUser, data: "/production", tmp: "."},
		}
		g.rest = g.settle
		g.cpu = func() (time.Duration, error) { return cpuTime(g.process.pid()) }
		if err := os.WriteFile(g.config, text, 0o644); err != nil {
			return nil, err
		}
		if err := g.start(ctx); err != nil {
			return nil, fmt.Errorf("%s: %w", name, err)
		}
		b.later(func() error { return b.engine.removeAll(g) })
		return g, nil
	}
	if b.gate, err = start("Sallyport", "", ports[1], ports[2], nil); err != nil {
		return err
	}
	if b.off, err = start("recording off", "-off", ports[3], ports[4], map[string]any{"audit.data": "none"}); err != nil {
		return err
	}
	b.encrypted, err = start("encrypted", "-encrypted", ports[5], ports[6], map[string]any{"audit.recipients": []string{benchRecipient}})
	return err
}

// withSettings changes a YAML file's values, each named by its path with dots.
func withSettings(text []byte, set map[string]any) ([]byte, error) {
	var all map[string]any
	if err := yaml.Unmarshal(text, &all); err != nil {
		return nil, err
	}
	for path, value := range set {
		at := all
		names := strings.Split(path, ".")
		for _, n := range names[:len(names)-1] {
			if at[n] == nil {
				at[n] = map[string]any{}
			}
			next, ok := at[n].(map[string]any)
			if !ok {
				return nil, fmt.Errorf("%s is no mapping", n)
			}
			at = next
		}
		at[names[len(names)-1]] = value
	}
	return yaml.Marshal(all)
}

// prolong lets the demo's grant, which is one of an hour, last for a day.
func prolong(file string) error {
	text, err := os.ReadFile(file)
	if err != nil {
		return err
	}
	var grants map[string]map[string]any
	if err := json.Unmarshal(text, &grants); err != nil {
		return err
	}
	for _, g := range grants {
		g["not_after"] = time.Now().Add(24 * time.Hour).UTC().Format(time.RFC3339)
	}
	if text, err = json.Marshal(grants); err != nil {
		return err
	}
	return os.WriteFile(file, text, 0o644)
}

// addUsers gives each of names the demo's key, profile and grant, but for what change does to a copy of the profile.
func addUsers(data string, change map[string]func(profile map[string]any)) error {
	read := func(name string, v any) error {
		text, err := os.ReadFile(filepath.Join(data, name))
		if err != nil {
			return err
		}
		return json.Unmarshal(text, v)
	}
	write := func(name string, v any) error {
		text, err := json.Marshal(v)
		if err != nil {
			return err
		}
		return os.WriteFile(filepath.Join(data, name), text, 0o644)
	}
	for name, f := range change {
		var user, profile map[string]any
		var grants map[string]map[string]any
		if err := errors.Join(read("users/"+gateUser+".json", &user), read("grants/"+gateUser+".json", &grants)); err != nil {
			return err
		}
		for _, g := range grants {
			if err := read(fmt.Sprintf("profiles/%v.json", g["profile"]), &profile); err != nil {
				return err
			}
			g["profile"] = name
		}
		f(profile)
		err := errors.Join(write("users/"+name+".json", user), write("profiles/"+name+".json", profile), write("grants/"+name+".json", grants))
		if err != nil {
			return err
		}
	}
	return nil
}

func (g *gate) start(ctx context.Context) error {
	p, err := startProcess(ctx, g.addr, g.state+".stderr", g.binary, "serve", "--config", g.config)
	if err == nil {
		g.process = p
	}
	return err
}

func (g *gate) stop() error { return g.process.stop() }

func (g *gate) restart(ctx context.Context) error {
	if err := g.stop(); err != nil {
		return err
	}
	return g.start(ctx)
}

// hostKey is the line of its key in known_hosts.
func (g *gate) hostKey() (string, error) {
	pub, err := os.ReadFile(filepath.Join(g.state, "ssh_host_ed25519_key.pub"))
	return string(pub), err
}

// instance is the value of the label that its containers bear: its name and the state directory's number.
func (g *gate) instance() (string, error) {
	number, err := os.ReadFile(filepath.Join(g.state, "instance"))
	return "demo-" + strings.TrimSpace(string(number)), err
}

// settle waits until no container of its is left and every session's log has reached the store.
func (g *gate) settle(ctx context.Context, b *bench) error {
	ctx, cancel := context.WithTimeout(ctx, restWait)
	defer cancel()
	for {
		n, err := b.engine.count(ctx, g)
		if err != nil {
			return err
		}
		waiting, err := g.spooled()
		if err != nil {
			return err
		}
		if n == 0 && waiting == 0 {
			return nil
		}
		select {
		case <-ctx.Done():
			return fmt.Errorf("after %v, %d containers are left, and %d segments not stored", restWait, n, waiting)
		case <-time.After(10 * time.Millisecond):
		}
	}
}

// stored waits until every session's log has reached the store.
func (g *gate) stored(ctx context.Context) error {
	ctx, cancel := context.WithTimeout(ctx, restWait)
	defer cancel()
	for {
		waiting, err := g.spooled()
		if err != nil || waiting == 0 {
			return err
		}
		select {
		case <-ctx.Done():
			return fmt.Errorf("after %v, %d segments are not stored", restWait, waiting)
		case <-time.After(10 * time.Millisecond):
		}
	}
}

// spooled counts the segments of sessions in the spool. The gate's own log has a dash in its ID and is never done.
func (g *gate) spooled() (int, error) {
	entries, err := os.ReadDir(filepath.Join(g.state, "spool"))
	n := 0
	for _, e := range entries {
		id, rest, ok := strings.Cut(e.Name(), ".")
		if ok && !strings.Contains(id, "-") && (strings.HasSuffix(rest, ".part") || strings.HasSuffix(rest, ".seg")) {
			n++
		}
	}
	return n, err
}

// takeLog gives the size of all sessions' logs in the store and removes them, so that no run needs more disk than one
// transfer's. The gate is at rest.
func (g *gate) takeLog() (int64, error) {
	var total int64
	err := filepath.WalkDir(filepath.Join(g.log, "sessions"), func(path string, d fs.DirEntry, err error) error {
		if err != nil || !d.Type().IsRegular() {
			if errors.Is(err, fs.ErrNotExist) {
				return nil
			}
			return err
		}
		info, err := d.Info()
		if err != nil {
			return err
		}
		total += info.Size()
		return os.Remove(path)
	})
	return total, err
}

// metric reads one value of /metrics.
func (g *gate) metric(ctx context.Context, name string) (float64, error) {
	req, err := http.NewRequestWithContext(ctx, http.MethodGet, "http://"+g.monitor+"/metrics", nil)
	if err != nil {
		return 0, err
	}
	resp, err := http.DefaultClient.Do(req)
	if err != nil {
		return 0, err
	}
	defer resp.Body.Close()
	text, err := io.ReadAll(io.LimitReader(resp.Body, 4<<20))
	if err != nil {
		return 0, err
	}
	for line := range strings.Lines(string(text)) {
		if value, ok := strings.CutPrefix(line, name+" "); ok {
			return strconv.ParseFloat(strings.TrimSpace(value), 64)
		}
	}
	return 0, fmt.Errorf("metrics: there is no %s", name)
}

// process is a server that was started and answers on a port.
type process struct {
	cmd    *exec.Cmd
	stderr string // file
	gone   chan error
}

func (p *process) pid() int { return p.cmd.Process.Pid }

// startProcess starts a server and waits until addr answers.
func startProcess(ctx context.Context, addr, stderr, name string, args ...string) (*process, error) {
	f, err := os.OpenFile(stderr, os.O_CREATE|os.O_WRONLY|os.O_APPEND, 0o600)
	if err != nil {
		return nil, err
	}
	defer f.Close()
	p := &process{cmd: exec.Command(name, args...), stderr: stderr, gone: make(chan error, 1)}
	p.cmd.Stdout, p.cmd.Stderr = f, f
	// A group of its own: a Ctrl-C is for us, who then stop it in order.
	p.cmd.SysProcAttr = &syscall.SysProcAttr{Setpgid: true, Pdeathsig: syscall.SIGTERM}
	if err := p.cmd.Start(); err != nil {
		return nil, err
	}
	go func() { p.gone <- p.cmd.Wait() }()
	deadline := time.Now().Add(startWait)
	for {
		nc, err := net.DialTimeout("tcp", addr, time.Second)
		if err == nil {
			return p, nc.Close()
		}
		select {
		case err := <-p.gone:
			p.gone <- err
			text, _ := os.ReadFile(stderr)
			return nil, fmt.Errorf("%s did not start: %v\n%s", filepath.Base(name), err, bytes.TrimSpace(text))
		case <-ctx.Done():
			return nil, errors.Join(ctx.Err(), p.stop())
		case <-time.After(20 * time.Millisecond):
		}
		if time.Now().After(deadline) {
			return nil, errors.Join(fmt.Errorf("%s does not answer on %s", filepath.Base(name), addr), p.stop())
		}
	}
}

// stop ends it and waits for its end. A second stop does nothing.
func (p *process) stop() error {
	p.cmd.Process.Signal(syscall.SIGTERM) // it may be gone
	select {
	case err := <-p.gone:
		p.gone <- nil
		var exit *exec.ExitError
		// sshd ends by the signal, with status 255.
		if err != nil && (!errors.As(err, &exit) || !strings.HasSuffix(p.cmd.Path, "sshd")) {
			text, _ := os.ReadFile(p.stderr)
			return fmt.Errorf("%s ended: %w\n%s", filepath.Base(p.cmd.Path), err, text)
		}
		return nil
	case <-time.After(stopWait):
		p.cmd.Process.Kill()
		return fmt.Errorf("%s did not stop and was killed", filepath.Base(p.cmd.Path))
	}
}

// freePorts gives ports of 127.0.0.1 on which nobody listened a moment ago.
func freePorts(n int) ([]string, error) {
	var ports []string
	for range n {
		l, err := net.Listen("tcp", "127.0.0.1:0")
		if err != nil {
			return nil, err
		}
		defer l.Close() // all at once, so that they differ
		ports = append(ports, strconv.Itoa(l.Addr().(*net.TCPAddr).Port))
	}
	return ports, nil
}
