package docker

import (
	"bytes"
	"context"
	"crypto/rand"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"math/bits"
	mathrand "math/rand/v2"
	"net"
	"net/netip"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/docker/docker/api/types/container"
	"github.com/docker/docker/api/types/network"
	"github.com/pkg/sftp"

	"github.com/sallyport/sallyport/backends"
)

// TestConfinement looks at a sandbox from inside.
func TestConfinement(t *testing.T) {
	l, err := net.Listen("tcp", "0.0.0.0:0") // as the gate or its metrics might listen
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close()
	_, port, _ := net.SplitHostPort(l.Addr().String())
	s := startSandbox(t, newBackend(t, nil), newSpec(busyboxImage))
	for _, test := range []struct{ line, want string }{
		{"id -u; id -g", "1000\n1000\n"},
		{"grep -E '^(CapEff|CapBnd|CapPrm|CapAmb|NoNewPrivs|Seccomp):' /proc/self/status | tr -d '\\t 0\\n'",
			"CapPrm:CapEff:CapBnd:CapAmb:NoNewPrivs:1Seccomp:2"},
		{"touch /x", "Read-only file system"},
		{"touch /.sallyport/run/x", "Read-only file system"},
		{"chmod 755 /.sallyport/agent", "Read-only file system"},
		{"cat /.sallyport/agent", "Permission denied"},
		{"ls -A /.sallyport/run", ""},
		{"cat /proc/1/environ", "Permission denied"},
		{"cat /proc/1/mem", "Permission denied"},
		{"ls /proc/1/fd", "Permission denied"},
		{"kill -9 1; kill -TERM 1; kill -STOP 1; echo $?", "0\n"},
		{"sleep 0.2; cat /proc/$$/oom_score_adj", "500\n"},
		{"stat -c %a /tmp $HOME", "700\n700\n"},
		{"awk '$2 == \"/tmp\" || $2 == \"/home/sandbox\" {print $3, $4}' /proc/mounts | grep -c " +
			"'^tmpfs rw,nosuid,nodev,relatime,size=131072k,nr_inodes=32768,mode=700,uid=1000,gid=1000'", "2\n"},
		{"for d in /tmp $HOME; do printf '#!/bin/sh\necho ran\n' >$d/x; chmod +x $d/x; $d/x; done", "ran\nran\n"},
		{"ls /sys/class/net; wc -l </proc/net/route; wc -l </proc/net/ipv6_route", "lo\n1\n"},
		{"ulimit -c", "0\n"},
		{"ls /var/run/docker.sock /run/docker.sock 2>&1 | grep -c 'No such'", "2\n"},
		{"ls /dev/mem /dev/kmsg /dev/sda 2>&1 | grep -c 'No such'", "3\n"},
		{"echo $USER $LOGNAME $HOME", "alice alice /home/sandbox\n"},
		{"hostname | wc -c", "13\n"},
		{"nc -w 2 127.0.0.1 " + port + " </dev/null; echo $?", "1\n"},
		{"unshare -r id", "not permitted"},
	} {
		if got := sh(t, s, test.line); !strings.Contains(got, test.want) || test.want == "" && got != "" {
			t.Errorf("%s: %q, want %q", test.line, got, test.want)
		}
	}
	c, err := fixture.engine.ContainerInspect(context.Background(), s.ID())
	if err != nil {
		t.Fatal(err)
	}
	if c.Config.Labels[labelUser] != "alice" || c.Config.Labels[labelSession] != s.session || c.HostConfig.Privileged ||
		len(c.Mounts) != 3 || c.HostConfig.LogConfig.Type != "none" || !c.HostConfig.AutoRemove {
		t.Errorf("%+v", c)
	}
	info := s.Info()
	if info.Backend != "docker" || info.Image != busyboxImage || info.Digest != c.Image || info.Node == "" {
		t.Errorf("%+v", info)
	}
}

// TestOwnNetworkNamespace: without a network a sandbox still has a namespace of its own, nobody else's.
func TestOwnNetworkNamespace(t *testing.T) {
	host, err := os.Readlink("/proc/self/ns/net")
	if err != nil {
		t.Fatal(err)
	}
	b := newBackend(t, nil)
	seen := map[string]bool{host: true}
	for range 3 { // all alive at once
		s := startSandbox(t, b, newSpec(busyboxImage))
		got := strings.TrimSpace(sh(t, s, "readlink /proc/self/ns/net"))
		if !strings.HasPrefix(got, "net:[") || seen[got] {
			t.Errorf("namespace %q; those taken are %v", got, seen)
		}
		seen[got] = true
		if got := sh(t, s, "cat /etc/hosts; ls /sys/class/net; echo x >>/etc/hosts"); !strings.Contains(got, "127.0.0.1\tlocalhost") ||
			!strings.Contains(got, "\nlo\n") || !strings.Contains(got, "can't create") {
			t.Errorf("inside: %q", got)
		}
		// Its loopback works, and is its own.
		if got := sh(t, s, "(echo hi | nc -l -p 4711 >/dev/null &) ; sleep 0.3; nc -w 2 127.0.0.1 4711 </dev/null"); !strings.Contains(got, "hi") {
			t.Errorf("loopback: %q", got)
		}
	}
}

// TestHostUnreachable looks for the host from the networks that are said not to reach it.
func TestHostUnreachable(t *testing.T) {
	engine := requireEngine(t)
	l, err := net.Listen("tcp", "0.0.0.0:0")
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close()
	_, port, _ := net.SplitHostPort(l.Addr().String())
	ctx := context.Background()
	name := "sallyport-test-" + rand.Text()
	created, err := engine.NetworkCreate(ctx, name, network.CreateOptions{
		Driver: "bridge", Internal: true,
		// Without this the bridge has an address, at which every listener of the host answers.
		Options: map[string]string{"com.docker.network.bridge.inhibit_ipv4": "true"},
	})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := engine.NetworkRemove(ctx, created.ID); err != nil {
			t.Error(err)
		}
	})
	b := newBackend(t, func(c *Config) { c.Networks = []string{name} })
	n, err := engine.NetworkInspect(ctx, name, network.InspectOptions{})
	if err != nil {
		t.Fatal(err)
	}
	if len(n.IPAM.Config) != 1 {
		t.Fatalf("the network has %d subnets", len(n.IPAM.Config))
	}
	subnet, err := netip.ParsePrefix(n.IPAM.Config[0].Subnet)
	if err != nil {
		t.Fatal(err)
	}
	gateway, err := netip.ParseAddr(n.IPAM.Config[0].Gateway)
	if err != nil {
		t.Fatal(err)
	}
	addresses, err := net.InterfaceAddrs()
	if err != nil {
		t.Fatal(err)
	}
	for _, a := range addresses {
		if p, err := netip.ParsePrefix(a.String()); err == nil && p.Addr() == gateway {
			t.Errorf("the host has the network's gateway, %v", gateway)
		}
	}
	// Dialled are the sandbox's own loopback and the gateway of the network that this test made; that nothing else can be
	// reached is read from the routes.
	for _, tc := range []struct {
		network string
		dial    []string
		routes  []route
	}{
		{"", []string{"127.0.0.1"}, nil},
		// An old engine sets a default route on an internal network too: its gateway is an address that nobody has.
		{name, []string{"127.0.0.1", gateway.String()}, []route{{subnet, netip.IPv4Unspecified()}, {netip.MustParsePrefix("0.0.0.0/0"), gateway}}},
	} {
		spec := newSpec(busyboxImage)
		spec.Template.Network = tc.network
		s := startSandbox(t, b, spec)
		for _, host := range tc.dial {
			got := sh(t, s, fmt.Sprintf("nc -w 1 %s %s </dev/null && echo reached", host, port))
			if strings.Contains(got, "reached") {
				t.Errorf("network %q: the host's listener answers at %s", tc.network, host)
			}
		}
		for _, r := range routesOf(t, sh(t, s, "cat /proc/net/route")) {
			if !slices.Contains(tc.routes, r) {
				t.Errorf("network %q has the route %v", tc.network, r)
			}
		}
		s.Close(ctx)
	}
}

type route struct {
	to  netip.Prefix
	via netip.Addr // unspecified: on the link
}

// routesOf reads /proc/net/route: interface, then destination, gateway and (seventh) mask in little-endian hexadecimal.
func routesOf(t *testing.T, table string) (routes []route) {
	t.Helper()
	for _, line := range strings.Split(strings.TrimSpace(table), "\n")[1:] {
		f := strings.Fields(line)
		if len(f) < 8 {
			t.Fatalf("route %q", line)
		}
		word := func(field string) netip.Addr {
			n, err := strconv.ParseUint(field, 16, 32)
			if err != nil {
				t.Fatal(err)
			}
			var b [4]byte
			binary.LittleEndian.PutUint32(b[:], uint32(n))
			return netip.AddrFrom4(b)
		}
		mask := word(f[7]).As4()
		routes = append(routes, route{netip.PrefixFrom(word(f[1]), bits.OnesCount32(binary.BigEndian.Uint32(mask[:]))), word(f[2])})
	}
	return routes
}

// TestFull fills what can be filled: there is an error, and the sandbox lives.
func TestFull(t *testing.T) {
	spec := newSpec(busyboxImage)
	spec.Template.Memory, spec.Template.PIDs = 128<<20, 64
	s := startSandbox(t, newBackend(t, nil), spec)
	for _, dir := range []string{"/tmp", "$HOME", "/dev/shm"} {
		if got := sh(t, s, "dd if=/dev/zero of="+dir+"/big bs=1M count=200"); !strings.Contains(got, "No space left") {
			t.Errorf("%s: %q", dir, got)
		}
	}
	got := sh(t, s, "rm /tmp/big $HOME/big /dev/shm/big; i=0; while echo -n >/tmp/$i; do i=$((i+1)); done 2>&1 | tail -1")
	if !strings.Contains(got, "No space left") {
		t.Errorf("inodes: %q", got)
	}
	r := run(t, s, backends.Process{Kind: backends.KindExec, Command: "exec tail /dev/zero"})
	if r.err != nil || r.status.Signal != "KILL" {
		t.Errorf("memory: %+v", r)
	}
	ctx, stop := context.WithTimeout(context.Background(), 3*time.Second)
	defer stop()
	s.Exec(ctx, backends.Process{Kind: backends.KindExec, Command: "f() { f | f & }; f; sleep 1000"})
	if got := sh(t, s, "echo lives"); got != "lives\n" {
		t.Errorf("%q", got)
	}
}

func TestHostileImage(t *testing.T) {
	// Where the agent's directory is a volume, read-only, the engine has no place in it for a volume of the image's.
	if _, err := newBackend(t, byRelay).Start(context.Background(), newSpec(hostileImage)); err == nil || !strings.Contains(err.Error(), insideDir) {
		t.Errorf("a volume of the image's among the agent's: %v", err)
	}
	s := startSandbox(t, newBackend(t, nil), newSpec(hostileImage))
	time.Sleep(1500 * time.Millisecond) // for the health check that must not run
	for _, test := range []struct{ line, want string }{
		{"id -u", "1000"},
		{"ls -A /data", "more"},
		{"stat -c %a:%u /data/more", "700:1000"},
		{"dd if=/dev/zero of=/data/more/big bs=1M count=200", "No space left"},
		{"pwd", "/home/sandbox"},
	} {
		if got := sh(t, s, "unset LD_PRELOAD; "+test.line); !strings.Contains(got, test.want) {
			t.Errorf("%s: %q, want %q", test.line, got, test.want)
		}
	}
	if got := sh(t, s, "ps"); strings.Contains(got, "777") {
		t.Errorf("the entry point runs: %s", got)
	}
	c, err := fixture.engine.ContainerInspect(context.Background(), s.ID())
	if err != nil {
		t.Fatal(err)
	}
	if c.State.Health != nil && c.State.Health.Status != container.NoHealthcheck {
		t.Errorf("health check: %+v", c.State.Health)
	}
	for _, m := range c.Mounts {
		if m.Type == "volume" {
			t.Errorf("volume: %+v", m)
		}
	}
	if c.Config.Labels[labelServer] != s.backend.gate || c.Config.Labels[labelSession] != s.session {
		t.Errorf("labels: %v", c.Config.Labels)
	}
}

// TestImageWithoutShell has an image with one static program and nothing else.
func TestImageWithoutShell(t *testing.T) {
	s := startSandbox(t, newBackend(t, nil), newSpec(scratchImage))
	for _, test := range []struct {
		line   string
		code   int
		stdout string
		stderr string
	}{
		{`/hello 'a  b' $HOME *`, 0, "[\"a  b\" \"$HOME\" \"*\"]\ninput", ""},
		{"/hello fail", 9, "[\"fail\"]\ninput", ""},
		{"hello", 127, "", "hello: no such file"},
		{"/.sallyport", 126, "", "permission denied"},
	} {
		r := run(t, s, backends.Process{Kind: backends.KindExec, Command: test.line, Stdin: strings.NewReader("input")})
		if r.err != nil || r.status.Code != test.code || r.stdout != test.stdout || !strings.Contains(r.stderr, test.stderr) {
			t.Errorf("%s: %+v", test.line, r)
		}
	}
	if r := run(t, s, backends.Process{Kind: backends.KindShell}); !errors.Is(r.err, backends.ErrNoShell) {
		t.Errorf("shell: %+v", r)
	}
	if r := run(t, s, backends.Process{Kind: backends.KindExec, Command: "'"}); r.err == nil {
		t.Errorf("quote: %+v", r)
	}
	stdin, feed := io.Pipe()
	out, stdout := io.Pipe()
	go func() {
		s.Exec(context.Background(), backends.Process{Kind: backends.KindSFTP, Stdin: stdin, Stdout: stdout})
		stdout.Close()
	}()
	c, err := sftp.NewClientPipe(out, feed)
	if err != nil {
		t.Fatal(err)
	}
	if list, err := c.ReadDir("/"); err != nil || len(list) < 4 {
		t.Errorf("%v %v", list, err)
	}
	c.Close()
	feed.Close()
}

func TestMounts(t *testing.T) {
	for _, transport := range []string{transportSocket, transportRelay} {
		t.Run(transport, func(t *testing.T) { mounts(t, transport) })
	}
}

func mounts(t *testing.T, transport string) {
	data := t.TempDir()
	if err := os.Chmod(data, 0o755); err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(filepath.Join(data, "app.log"), []byte("a line\n"), 0o640); err != nil {
		t.Fatal(err)
	}
	if err := os.Chown(filepath.Join(data, "app.log"), 0, 4); err != nil {
		t.Fatal(err)
	}
	if err := os.Mkdir(filepath.Join(data, "out"), 0o777); err != nil {
		t.Fatal(err)
	}
	if err := os.Chmod(filepath.Join(data, "out"), 0o777); err != nil {
		t.Fatal(err)
	}
	b := newBackend(t, func(c *Config) { c.Transport, c.BindPrefixes = transport, []string{filepath.Dir(data)} })
	spec := newSpec(busyboxImage)
	spec.Template.Groups = []uint32{4}
	spec.Template.Scratch = "volume"
	spec.Template.Mounts = []backends.Mount{
		{Source: data, Target: "/logs"}, {Source: filepath.Join(data, "out"), Target: "/out", Write: true},
	}
	s := startSandbox(t, b, spec)
	for _, test := range []struct{ line, want string }{
		{"cat /logs/app.log", "a line\n"},
		{"touch /logs/out/x", "Read-only file system"},
		{"echo x >/out/x; cat /logs/out/x", "x\n"},
		{"stat -c %a:%u:%g $HOME; echo x >~/f; cat ~/f", "700:1000:1000\nx\n"},
		{"awk '$2 == \"/home/sandbox\" {print $3}' /proc/mounts | grep -c tmpfs", "0\n"},
		{"ln -s /etc ~/link; mkdir -p ~/a/b; chmod 0 ~/a", ""},
	} {
		if got := sh(t, s, test.line); !strings.Contains(got, test.want) {
			t.Errorf("%s: %q, want %q", test.line, got, test.want)
		}
	}
	// Without the group the log can't be read.
	spec = newSpec(busyboxImage)
	spec.Template.Mounts = []backends.Mount{{Source: data, Target: "/logs"}}
	if got := sh(t, startSandbox(t, b, spec), "cat /logs/app.log"); !strings.Contains(got, "Permission denied") {
		t.Errorf("%q", got)
	}
}

// TestVolumes: a named volume that the operator lists is mounted read-only, or to write where the profile says so. It is
// the operator's: the gate neither makes nor removes one, also where its container is removed by force.
func TestVolumes(t *testing.T) {
	requireEngine(t)
	docker := func(args ...string) string {
		t.Helper()
		out, err := exec.Command("docker", args...).CombinedOutput()
		if err != nil {
			t.Fatalf("docker %v: %v: %s", args, err, out)
		}
		return string(out)
	}
	name, absent := "sallyport-test-"+rand.Text(), "sallyport-test-absent-"+rand.Text()
	docker("volume", "create", "--label", "sallyport.test="+name, name)
	t.Cleanup(func() { docker("volume", "rm", name) })
	const fill = "echo a line >/v/app.log && mkdir /v/out && chmod 777 /v/out"
	docker("run", "--rm", "--pull", "never", "--network", "none", "-v", name+":/v", busyboxImage, "/bin/sh", "-c", fill)

	b := newBackend(t, func(c *Config) { c.Volumes = []string{name, absent} }) // and looks at its end that no volume came or went
	start := func(mounts ...backends.Mount) *sandbox {
		t.Helper()
		spec := newSpec(busyboxImage)
		spec.Template.Mounts = mounts
		return startSandbox(t, b, spec)
	}
	s := start(backends.Mount{Type: "volume", Source: name, Target: "/v"})
	for _, test := range []struct{ line, want string }{
		{"cat /v/app.log", "a line\n"},
		{"echo x >/v/out/x", "Read-only file system"},
		{"rm /v/app.log", "Read-only file system"},
		{"chmod 700 /v/out", "Read-only file system"},
		{"mount -o remount,rw /v", "permission denied"},
		{"awk '$2 == \"/v\" {print $4}' /proc/mounts | cut -d , -f 1", "ro\n"},
	} {
		if got := sh(t, s, test.line); !strings.Contains(got, test.want) {
			t.Errorf("%s: %q, want %q", test.line, got, test.want)
		}
	}
	writes := start(backends.Mount{Type: "volume", Source: name, Target: "/v", Write: true})
	if got := sh(t, writes, "echo x >/v/out/x; cat /v/out/x"); got != "x\n" {
		t.Errorf("with write: %q", got)
	}
	if got := sh(t, s, "cat /v/out/x"); got != "x\n" {
		t.Errorf("the other sandbox has another volume: %q", got)
	}

	// Sandboxes end in an orderly way and by force: the volume and what is in it stay.
	if err := s.Close(context.Background()); err != nil {
		t.Error(err)
	}
	if err := fixture.engine.ContainerKill(context.Background(), writes.ID(), "KILL"); err != nil {
		t.Fatal(err)
	}
	select {
	case <-writes.Done():
	case <-time.After(20 * time.Second):
		t.Fatal("not done")
	}
	if err := writes.Close(context.Background()); err != nil {
		t.Error(err)
	}
	if got := sh(t, start(backends.Mount{Type: "volume", Source: name, Target: "/v"}), "cat /v/app.log /v/out/x"); got != "a line\nx\n" {
		t.Errorf("afterwards: %q", got)
	}

	// One that is listed and not there, and one that is not even listed.
	for source, want := range map[string]string{absent: "find volume: ", "sallyport-test-other": "is not listed (volumes)"} {
		spec := newSpec(busyboxImage)
		spec.Template.Mounts = []backends.Mount{{Type: "volume", Source: source, Target: "/v"}}
		sandbox, err := b.Start(context.Background(), spec)
		if err == nil {
			sandbox.Close(context.Background())
		}
		if err == nil || !strings.Contains(err.Error(), want) || !strings.Contains(err.Error(), source) {
			t.Errorf("volume %s: %v, want %q", source, err, want)
		}
		if out, err := exec.Command("docker", "volume", "inspect", source).CombinedOutput(); err == nil {
			docker("volume", "rm", source)
			t.Errorf("the gate has made a volume: %s", out)
		}
	}
}

func TestRoot(t *testing.T) {
	b := newBackend(t, func(c *Config) { c.AllowRoot, c.AllowCaps = true, []string{"NET_RAW"} })
	spec := newSpec(busyboxImage)
	spec.Template.UID, spec.Template.GID, spec.Template.Caps = 0, 0, []string{"NET_RAW"}
	s := startSandbox(t, b, spec)
	for _, test := range []struct{ line, want string }{
		{"id -u; grep CapEff /proc/self/status", "0\nCapEff:\t0000000000002000\n"},
		{"cat /.sallyport/agent", "Permission denied"},
		{"cat /proc/1/environ", "Permission denied"},
		{"chmod 755 /.sallyport/agent", "Read-only file system"},
		{"mount -o remount,rw /", "permission denied"},
	} {
		if got := sh(t, s, test.line); !strings.Contains(got, test.want) {
			t.Errorf("%s: %q, want %q", test.line, got, test.want)
		}
	}
}

func TestFailedStarts(t *testing.T) {
	b := newBackend(t, nil)
	ctx := context.Background()
	spec := newSpec("sallyport-test/no-such-image:1")
	if _, err := b.Start(ctx, spec); err == nil || !strings.Contains(err.Error(), "find image") {
		t.Errorf("no image: %v", err)
	}
	// An agent that ends at once, as one of another protocol might.
	broken := newBackend(t, func(c *Config) { c.Agent = filepath.Join(fixture.dir, "hello") })
	begin := time.Now()
	_, err := broken.Start(ctx, newSpec(busyboxImage))
	if err == nil || !strings.Contains(err.Error(), "before it was reached") || time.Since(begin) > 15*time.Second {
		t.Errorf("broken agent: %v after %v", err, time.Since(begin))
	}
	spec = newSpec(busyboxImage)
	s := startSandbox(t, b, spec)
	if _, err := b.Start(ctx, spec); err == nil {
		t.Error("a second sandbox for the session")
	}
	if got := sh(t, s, "echo x"); got != "x\n" {
		t.Errorf("%q", got)
	}
}

func TestDeathIsExplained(t *testing.T) {
	s := startSandbox(t, newBackend(t, nil), newSpec(busyboxImage))
	time.Sleep(200 * time.Millisecond) // for Run to listen
	if err := fixture.engine.ContainerKill(context.Background(), s.ID(), "KILL"); err != nil {
		t.Fatal(err)
	}
	select {
	case <-s.Done():
	case <-time.After(20 * time.Second):
		t.Fatal("not done")
	}
	if err := s.Err(); err == nil || !strings.Contains(err.Error(), "killed") {
		t.Errorf("%v", err)
	}
}

// TestReap leaves what a crash could leave, of this gate and of another.
func TestReap(t *testing.T) {
	engine := requireEngine(t)
	b := newBackend(t, nil)
	ctx := context.Background()
	live := startSandbox(t, b, newSpec(busyboxImage))
	make := func(gate, session, name string) string {
		c, err := engine.ContainerCreate(ctx, &container.Config{
			Image: busyboxImage, Cmd: []string{"/bin/sleep", "60"},
			Labels: map[string]string{labelServer: gate, labelSession: session},
		}, nil, nil, nil, name)
		if err != nil {
			t.Fatal(err)
		}
		t.Cleanup(func() { b.removeContainer(ctx, c.ID) })
		return c.ID
	}
	never := "test-" + rand.Text()
	neverStarted := make(b.gate, never, namePrefix+never)
	started := "test-" + rand.Text()
	running := make(b.gate, started, namePrefix+started)
	if err := engine.ContainerStart(ctx, running, container.StartOptions{}); err != nil {
		t.Fatal(err)
	}
	other := "test-" + rand.Text()
	foreign := make("another-gate", other, namePrefix+other)
	odd := make(b.gate, "x", namePrefix+"test-odd-"+rand.Text()) // only its image or its starter says it is ours
	for _, dir := range []string{runDir, scratchDir} {
		if err := os.MkdirAll(filepath.Join(b.config.StateDir, dir, "old", "a"), 0o700); err != nil {
			t.Fatal(err)
		}
	}
	for range 2 {
		if err := b.Reap(ctx); err != nil {
			t.Fatal(err)
		}
	}
	for id, want := range map[string]bool{neverStarted: false, running: false, foreign: true, odd: true, live.ID(): true} {
		if _, err := engine.ContainerInspect(ctx, id); (err == nil) != want {
			t.Errorf("%s: %v", id, err)
		}
	}
	for _, dir := range []string{runDir, scratchDir} {
		if _, err := os.Stat(filepath.Join(b.config.StateDir, dir, "old")); err == nil {
			t.Errorf("%s/old is left", dir)
		}
	}
	if got := sh(t, live, "echo x"); got != "x\n" {
		t.Errorf("%q", got)
	}
}

// gateVariable makes this test's program a gate that starts a sandbox, says so and waits to be killed.
const gateVariable = "SALLYPORT_TEST_GATE"

// TestKilledGate kills a gate: its sandbox ends by itself, and the next gate removes what else there is.
func TestKilledGate(t *testing.T) {
	if state := os.Getenv(gateVariable); state != "" {
		gateToBeKilled(state)
		return
	}
	for _, transport := range []string{transportSocket, transportRelay} {
		t.Run(transport, func(t *testing.T) { killedGate(t, transport) })
	}
}

func killedGate(t *testing.T, transport string) {
	b := newBackend(t, func(c *Config) { c.Transport = transport })
	cmd := exec.Command(os.Args[0], "-test.run=^TestKilledGate$")
	cmd.Env = append(os.Environ(), strings.Join([]string{
		gateVariable + "=" + b.config.StateDir, b.config.Agent, b.gate, newSpec("").Owner.Session, transport,
	}, "|"))
	out, err := cmd.StdoutPipe()
	if err != nil {
		t.Fatal(err)
	}
	cmd.Stderr = os.Stderr
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	var id string
	if _, err := fmt.Fscanf(out, "started %s\n", &id); err != nil {
		t.Error(err)
	}
	if _, err := fixture.engine.ContainerInspect(context.Background(), id); err != nil {
		t.Error(err)
	}
	cmd.Process.Kill()
	cmd.Wait()
	for end := time.Now().Add(10 * time.Second); ; time.Sleep(50 * time.Millisecond) {
		if _, err := fixture.engine.ContainerInspect(context.Background(), id); err != nil {
			break
		}
		if time.Now().After(end) {
			t.Error("the container is left")
			break
		}
	}
	if entries, _ := os.ReadDir(filepath.Join(b.config.StateDir, runDir)); len(entries) != 1 && transport == transportSocket {
		t.Errorf("before the next gate: %v", entries)
	}
	if err := b.Reap(context.Background()); err != nil {
		t.Error(err)
	}
}

func gateToBeKilled(arguments string) {
	a := strings.Split(arguments, "|")
	b, err := New(context.Background(), Config{StateDir: a[0], Agent: a[1], Transport: a[4]}, a[2], slog.New(slog.DiscardHandler))
	if err != nil {
		panic(err) // of a test
	}
	spec := newSpec(busyboxImage)
	spec.Owner.Session = a[3]
	spec.Template.Scratch = "volume"
	s, err := b.Start(context.Background(), spec)
	if err != nil {
		panic(err) // of a test
	}
	go s.Exec(context.Background(), backends.Process{Kind: backends.KindExec, Command: "trap '' HUP; sleep 1000"})
	fmt.Printf("started %s\n", s.ID())
	select {}
}

// TestCut ends sandboxes at random moments of their start and their life; newBackend's clean-up looks what is left.
func TestCut(t *testing.T) {
	for _, transport := range []string{transportSocket, transportRelay} {
		t.Run(transport, func(t *testing.T) { cut(t, newBackend(t, func(c *Config) { c.Transport = transport })) })
	}
}

func cut(t *testing.T, b *Backend) {
	var all sync.WaitGroup
	slots := make(chan struct{}, 4)
	for range 24 {
		slots <- struct{}{}
		all.Go(func() {
			defer func() { <-slots }()
			ctx, stop := context.WithCancel(context.Background())
			defer stop()
			time.AfterFunc(time.Duration(mathrand.IntN(1500))*time.Millisecond, stop)
			s, err := b.Start(ctx, newSpec(busyboxImage))
			if err != nil {
				if !errors.Is(err, context.Canceled) {
					t.Error(err)
				}
				return
			}
			var out bytes.Buffer
			s.Exec(ctx, backends.Process{Kind: backends.KindExec, Command: "yes", Stdout: &out})
			if mathrand.IntN(2) == 0 {
				fixture.engine.ContainerKill(context.Background(), s.ID(), "KILL")
			}
			if err := s.Close(ctx); err != nil {
				t.Error(err)
			}
		})
	}
	all.Wait()
}

// TestLongStateDir has a state directory in which no path of a socket fits into an address.
func TestLongStateDir(t *testing.T) {
	b := newBackend(t, func(c *Config) { c.StateDir = filepath.Join(c.StateDir, strings.Repeat("long/", 30)) })
	if got := sh(t, startSandbox(t, b, newSpec(busyboxImage)), "echo x"); got != "x\n" {
		t.Errorf("%q", got)
	}
}

// The agent's 6 MB stay in memory only where a volume may have to be filled with them again.
func TestAgentNotKept(t *testing.T) {
	for transport, keeps := range map[string]bool{transportSocket: false, transportRelay: true} {
		b := newBackend(t, func(c *Config) { c.Transport = transport })
		if got := len(b.file.content) > 0; got != keeps {
			t.Errorf("%s: the agent's file is in memory: %v, want %v", transport, got, keeps)
		}
	}
}

func TestReady(t *testing.T) {
	b := newBackend(t, nil)
	if err := b.Ready(context.Background()); err != nil {
		t.Error(err)
	}
	info, err := os.Stat(b.agent)
	if err != nil || info.Mode() != 0o111 {
		t.Errorf("%v %v", info, err)
	}
	old := filepath.Join(filepath.Dir(filepath.Dir(b.agent)), "old")
	if err := os.MkdirAll(old, 0o700); err != nil {
		t.Fatal(err)
	}
	if err := pruneCopies(b.agent); err != nil {
		t.Error(err)
	}
	if _, err := os.Stat(old); err == nil {
		t.Error("an old version is left")
	}
	if _, err := os.Stat(b.agent); err != nil {
		t.Error(err)
	}
	_, err = New(context.Background(), Config{
		Host: "unix:///no/such.sock", Agent: fixture.agent, StateDir: t.TempDir(),
	}, "gate", slog.New(slog.DiscardHandler))
	if err == nil {
		t.Error("no error without an engine")
	}
}
