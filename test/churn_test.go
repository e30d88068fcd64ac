package test

import (
	"context"
	"fmt"
	"io"
	"math/rand/v2"
	"net/http"
	"os"
	"os/exec"
	"path/filepath"
	"sort"
	"strconv"
	"strings"
	"sync"
	"testing"
	"time"
)

// traces are what a gate could leave behind, by kind: all there is, not only what bears our label.
func traces(s *state) (map[string][]string, error) {
	all := map[string][]string{}
	for kind, args := range map[string][]string{
		"container": {"ps", "-aq", "--no-trunc"}, "volume": {"volume", "ls", "-q"}, "network": {"network", "ls", "-q", "--no-trunc"},
	} {
		out, err := exec.Command("docker", args...).Output()
		if err != nil {
			return nil, fmt.Errorf("docker %s: %w", args[0], err)
		}
		all[kind] = strings.Fields(string(out))
	}
	mounts, err := os.ReadFile("/proc/mounts")
	if err != nil {
		return nil, err
	}
	for _, line := range strings.Split(string(mounts), "\n") {
		if f := strings.Fields(line); len(f) > 1 {
			all["mount"] = append(all["mount"], f[1])
		}
	}
	for kind, dir := range map[string]string{"run": "/run", "tmp": "/tmp"} {
		entries, err := os.ReadDir(dir)
		if err != nil {
			return nil, err
		}
		for _, e := range entries {
			if strings.HasPrefix(e.Name(), "go-build") { // go test's own
				continue
			}
			all[kind] = append(all[kind], e.Name())
		}
	}
	err = filepath.WalkDir(filepath.Join(s.dir, "state"), func(path string, d os.DirEntry, err error) error {
		if err == nil && !strings.Contains(path, "/spool") { // the log's own; it is looked at apart
			all["state"] = append(all["state"], path)
		}
		return nil
	})
	if err != nil {
		return nil, err
	}
	procs, err := filepath.Glob("/proc/[0-9]*/cmdline")
	if err != nil {
		return nil, err
	}
	for _, p := range procs {
		b, _ := os.ReadFile(p)
		for _, name := range []string{"sallyport-agent", "/.sallyport/agent", "agent-stage2", "containerd-shim"} {
			if strings.Contains(string(b), name) {
				all["process"] = append(all["process"], filepath.Base(filepath.Dir(p))+" "+name)
			}
		}
	}
	return all, nil
}

// added lists what is in after and not in before.
func added(before, after map[string][]string) []string {
	var new []string
	for kind, names := range after {
		had := map[string]bool{}
		for _, n := range before[kind] {
			had[n] = true
		}
		for _, n := range names {
			if !had[n] {
				new = append(new, kind+" "+n)
			}
		}
	}
	sort.Strings(new)
	return new
}

// inside is a running gate's goroutines and descriptors.
func inside(s *state, monitor string) (goroutines, descriptors int, err error) {
	resp, err := http.Get("http://" + monitor + "/metrics")
	if err != nil {
		return 0, 0, err
	}
	defer resp.Body.Close()
	b, err := io.ReadAll(resp.Body)
	if err != nil {
		return 0, 0, err
	}
	for _, line := range strings.Split(string(b), "\n") {
		if v, ok := strings.CutPrefix(line, "go_goroutines "); ok {
			goroutines, err = strconv.Atoi(v)
		}
	}
	fds, err2 := os.ReadDir(fmt.Sprintf("/proc/%d/fd", s.gate.Process.Pid))
	if err == nil {
		err = err2
	}
	return goroutines, len(fds), err
}

// 200 connections of which half are cut at random moments leave nothing: not in the engine, not on the machine, not in the
// gate. Every one of them is in the log, sealed.
func TestNothingLeft(t *testing.T) {
	if noEngine {
		t.Skip("no Docker engine answers")
	}
	if testing.Short() {
		t.Skip("not in -short")
	}
	const connections, atOnce = 200, 8
	dir := t.TempDir()
	s, err := newState(dir, "auto")
	if err != nil {
		t.Fatal(err)
	}
	monitor := fmt.Sprintf("127.0.0.1:%d", freePort(t))
	b, err := os.ReadFile(filepath.Join(dir, "gate.yaml"))
	if err != nil {
		t.Fatal(err)
	}
	config := strings.Replace(string(b), `listen: ""`, "listen: "+monitor, 1)
	// One that was cut counts until its container is gone, and the engine may have many to remove.
	config = strings.Replace(config, "  drain_time", fmt.Sprintf("  max_sessions_per_user: %d\n  drain_time", connections), 1)
	if err := os.WriteFile(filepath.Join(dir, "gate.yaml"), []byte(config), 0o600); err != nil {
		t.Fatal(err)
	}
	if err := s.start("gate.yaml"); err != nil {
		t.Fatal(err)
	}
	defer func() {
		if err := s.end(); err != nil {
			t.Error(err)
		}
	}()
	ssh := func(ctx context.Context, args ...string) *exec.Cmd {
		cmd := exec.CommandContext(ctx, "ssh", append([]string{"-F", "ssh_config"}, args...)...)
		cmd.Dir = dir
		cmd.WaitDelay = 10 * time.Second
		return cmd
	}
	// What a first session sets up for good is there before the count begins.
	if out, err := ssh(t.Context(), "gate", "true").CombinedOutput(); err != nil {
		t.Fatalf("ssh: %v: %s", err, out)
	}
	if left, err := s.left(); err != nil || len(left) > 0 {
		t.Fatal(left, err)
	}
	before, err := traces(s)
	if err != nil {
		t.Fatal(err)
	}
	goroutines, descriptors, err := inside(s, monitor)
	if err != nil {
		t.Fatal(err)
	}

	seed := uint64(time.Now().UnixNano())
	t.Logf("seed %d", seed)
	random := rand.New(rand.NewPCG(seed, 0))
	type plan struct {
		args []string
		cut  time.Duration // 0: not cut
	}
	var plans []plan
	kinds := [][]string{
		{"gate", "true"}, {"gate", "head -c 3000000 /dev/urandom | sha256sum"}, {"gate", "head -c 5000000 /dev/zero"},
		{"-tt", "gate", "sleep 0.3; exit"}, {"gate", "sleep 60 & exit 0"},
	}
	for i := range connections {
		p := plan{args: kinds[random.IntN(len(kinds)-1)]}
		if i%2 == 1 {
			p = plan{args: kinds[random.IntN(len(kinds))], cut: time.Duration(1+random.IntN(1500)) * time.Millisecond}
		}
		plans = append(plans, p)
	}
	var wg sync.WaitGroup
	next := make(chan plan)
	for range atOnce {
		wg.Add(1)
		go func() {
			defer wg.Done()
			for p := range next {
				ctx, cancel := t.Context(), func() {}
				if p.cut > 0 {
					ctx, cancel = context.WithTimeout(ctx, p.cut) // SIGKILL
				}
				out, err := ssh(ctx, p.args...).CombinedOutput()
				cancel()
				if p.cut == 0 && err != nil {
					t.Errorf("ssh %v: %v: %.200s", p.args, err, out)
				}
			}
		}()
	}
	for _, p := range plans {
		next <- p
	}
	close(next)
	wg.Wait()

	var left []string
	var g, d int
	for end := time.Now().Add(30 * time.Second); ; time.Sleep(200 * time.Millisecond) {
		after, err := traces(s)
		if err != nil {
			t.Fatal(err)
		}
		left = added(before, after)
		if g, d, err = inside(s, monitor); err != nil {
			t.Fatal(err)
		}
		// A few come and go: the metrics' own connection, the reaper's look at the engine.
		if len(left) == 0 && g <= goroutines+5 && d <= descriptors+5 {
			break
		}
		if time.Now().After(end) {
			t.Errorf("left after 30 s: %v; goroutines %d, were %d; descriptors %d, were %d", left, g, goroutines, d, descriptors)
			break
		}
	}
	t.Logf("goroutines %d, were %d; descriptors %d, were %d", g, goroutines, d, descriptors)

	if err := s.stop(15); err != nil {
		t.Error(err)
	}
	all, err := s.list()
	if err != nil {
		t.Fatal(err)
	}
	for _, l := range all {
		if l.State != "sealed" {
			t.Errorf("session %s is %s", l.ID, l.State)
		}
	}
	t.Logf("%d sessions in the log", len(all))
	if out, err := s.audit("verify", filepath.Join(dir, "log")); err != nil {
		t.Errorf("verify: %v\n%s", err, out)
	}
	if spool, err := filepath.Glob(filepath.Join(dir, "state/spool/*/*")); err == nil && len(spool) > 0 {
		t.Errorf("left in the spool: %v", spool)
	}
}
