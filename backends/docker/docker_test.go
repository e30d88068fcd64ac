package docker

import (
	"archive/tar"
	"bytes"
	"context"
	"crypto/rand"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/docker/docker/api/types/container"
	"github.com/docker/docker/api/types/filters"
	"github.com/docker/docker/api/types/image"
	"github.com/docker/docker/client"
	"go.uber.org/goleak"

	"github.com/sallyport/sallyport/backends"
	"github.com/sallyport/sallyport/backends/backendtest"
)

func TestMain(m *testing.M) {
	code := 0
	func() {
		defer fixture.remove()
		code = m.Run()
	}()
	if code == 0 {
		if err := goleak.Find(); err != nil {
			fmt.Fprintln(os.Stderr, err)
			code = 1
		}
	}
	os.Exit(code)
}

// fixture is what all tests that need an engine share.
var fixture engineFixture

type engineFixture struct {
	once   sync.Once
	err    error
	engine *client.Client
	dir    string
	agent  string
	images []string
}

const (
	busyboxImage = "sallyport-test/busybox:1"
	scratchImage = "sallyport-test/scratch:1"
	hostileImage = "sallyport-test/hostile:1"
)

var errNoEngine = errors.New("no Docker engine answers")

// requireEngine returns the engine, or ends the test if none answers: as a failure where SALLYPORT_REQUIRE_DOCKER is set.
func requireEngine(t testing.TB) *client.Client {
	t.Helper()
	fixture.once.Do(func() { fixture.err = fixture.setUp() })
	if errors.Is(fixture.err, errNoEngine) && os.Getenv("SALLYPORT_REQUIRE_DOCKER") == "" {
		t.Skipf("NOT TESTED: %v", fixture.err)
	}
	if fixture.err != nil {
		t.Fatal(fixture.err)
	}
	return fixture.engine
}

func (f *engineFixture) setUp() error {
	ctx, stop := context.WithTimeout(context.Background(), 5*time.Minute)
	defer stop()
	var err error
	if f.engine, err = client.NewClientWithOpts(client.FromEnv, client.WithAPIVersionNegotiation()); err != nil {
		return err
	}
	if _, err := f.engine.Ping(ctx); err != nil {
		return fmt.Errorf("%w: %w", errNoEngine, err)
	}
	if f.dir, err = os.MkdirTemp("", "sallyport-docker-test-"); err != nil {
		return err
	}
	f.agent = filepath.Join(f.dir, "sallyport-agent")
	if err := goBuild(ctx, f.agent, "../../cmd/sallyport-agent"); err != nil {
		return err
	}
	hello := filepath.Join(f.dir, "hello")
	if err := goBuild(ctx, hello, "./testdata/hello"); err != nil {
		return err
	}
	box, err := busyboxFiles(ctx)
	if err != nil {
		return err
	}
	program, err := os.ReadFile(hello)
	if err != nil {
		return err
	}
	for _, i := range []struct {
		name    string
		files   []file
		changes []string
	}{
		{busyboxImage, box, []string{"ENV PATH=/bin"}},
		{scratchImage, []file{{name: "hello", mode: 0o755, content: program}}, nil},
		{hostileImage, box, []string{
			"USER root", "VOLUME /data", "VOLUME /data/more", "VOLUME /tmp", "VOLUME /.sallyport/run",
			"HEALTHCHECK --interval=1s CMD touch /data/unhealthy", `ENTRYPOINT ["/bin/sleep","777"]`, `CMD ["888"]`,
			"ENV GODEBUG=madvdontneed=x LD_PRELOAD=/no/such", "WORKDIR /data",
			"LABEL sallyport.server=another sallyport.session=other",
		}},
	} {
		if err := f.importImage(ctx, i.name, i.files, i.changes); err != nil {
			return fmt.Errorf("make image %s: %w", i.name, err)
		}
	}
	return nil
}

func (f *engineFixture) remove() {
	if f.engine == nil {
		return
	}
	for _, name := range f.images {
		if _, err := f.engine.ImageRemove(context.Background(), name, image.RemoveOptions{Force: true}); err != nil {
			fmt.Fprintln(os.Stderr, "remove image:", err)
		}
	}
	if a, err := readAgent(f.agent); err == nil {
		if err := f.engine.VolumeRemove(context.Background(), a.volume(), true); err != nil {
			fmt.Fprintln(os.Stderr, "remove volume:", err)
		}
	}
	f.engine.Close()
	os.RemoveAll(f.dir)
}

func goBuild(ctx context.Context, to, pkg string) error {
	cmd := exec.CommandContext(ctx, "go", "build", "-trimpath", "-ldflags", "-s -w", "-o", to, pkg)
	cmd.Env = append(os.Environ(), "CGO_ENABLED=0")
	if out, err := cmd.CombinedOutput(); err != nil {
		return fmt.Errorf("go build %s: %w\n%s", pkg, err, out)
	}
	return nil
}

type file struct {
	name    string
	mode    int64
	content []byte
	link    string
}

// busyboxFiles makes a root file system of the static busybox of this machine (Debian: busybox-static).
func busyboxFiles(ctx context.Context) ([]file, error) {
	const path = "/bin/busybox"
	content, err := os.ReadFile(path)
	if err != nil {
		return nil, fmt.Errorf("the test image needs package busybox-static: %w", err)
	}
	list, err := exec.CommandContext(ctx, path, "--list").Output()
	if err != nil {
		return nil, err
	}
	files := []file{
		{name: "bin/busybox", mode: 0o755, content: content},
		{name: "etc/group", mode: 0o644, content: []byte("root:x:0:\n")},
	}
	for _, name := range strings.Fields(string(list)) {
		if name != "busybox" {
			files = append(files, file{name: "bin/" + name, link: "busybox"})
		}
	}
	return files, nil
}

func (f *engineFixture) importImage(ctx context.Context, name string, files []file, changes []string) error {
	var b bytes.Buffer
	w := tar.NewWriter(&b)
	for _, x := range files {
		h := &tar.Header{Name: x.name, Mode: x.mode, Size: int64(len(x.content)), Typeflag: tar.TypeReg}
		if x.link != "" {
			h.Typeflag, h.Linkname = tar.TypeSymlink, x.link
		}
		if err := w.WriteHeader(h); err != nil {
			return err
		}
		if _, err := w.Write(x.content); err != nil {
			return err
		}
	}
	if err := w.Close(); err != nil {
		return err
	}
	r, err := f.engine.ImageImport(ctx, image.ImportSource{Source: &b, SourceName: "-"}, name,
		image.ImportOptions{Changes: changes})
	if err != nil {
		return err
	}
	defer r.Close()
	out, err := io.ReadAll(r)
	if err != nil || bytes.Contains(out, []byte(`"error"`)) {
		return fmt.Errorf("%s %w", out, err)
	}
	f.images = append(f.images, name)
	return nil
}

// newBackend returns a running backend with a gate's name of its own, and checks at the end that it left nothing.
func newBackend(t testing.TB, change func(*Config)) *Backend {
	t.Helper()
	requireEngine(t)
	config := Config{Agent: fixture.agent, StateDir: filepath.Join(t.TempDir(), "state"), Transport: transportSocket}
	if change != nil {
		change(&config)
	}
	gate := "test-" + rand.Text()
	before := everything(t)
	b, err := New(context.Background(), config, gate, slog.New(slog.NewTextHandler(t.Output(), nil)))
	if err != nil {
		t.Fatal(err)
	}
	ctx, stop := context.WithCancel(context.Background())
	ended := make(chan struct{})
	go func() {
		defer close(ended)
		b.Run(ctx)
	}()
	t.Cleanup(func() {
		stop()
		<-ended
		b.Close()
		if len(b.live) != 0 {
			t.Errorf("%d sandboxes are still live", len(b.live))
		}
		for _, dir := range []string{runDir, scratchDir} {
			if entries, _ := os.ReadDir(filepath.Join(config.StateDir, dir)); len(entries) > 0 {
				t.Errorf("left in %s: %v", dir, entries)
			}
		}
		if after := everything(t); after != before {
			t.Errorf("left in the engine:\n%s\nbefore:\n%s", after, before)
		}
	})
	return b
}

// everything lists the containers that are named as ours, and all volumes.
func everything(t testing.TB) string {
	t.Helper()
	ctx := context.Background()
	containers, err := fixture.engine.ContainerList(ctx, container.ListOptions{
		All: true, Filters: filters.NewArgs(filters.Arg("name", "^/"+namePrefix+"test-")),
	})
	if err != nil {
		t.Fatal(err)
	}
	var all []string
	for _, c := range containers {
		all = append(all, fmt.Sprint(c.Names, c.Labels))
	}
	volumes, err := exec.Command("docker", "volume", "ls", "-q").Output()
	if err != nil {
		t.Fatal(err)
	}
	for _, v := range strings.Fields(string(volumes)) {
		if !strings.HasPrefix(v, volumePrefix) { // those stay
			all = append(all, v)
		}
	}
	helpers, err := exec.Command("sh", "-c", "docker ps -aq --filter label="+labelHelper+"; docker images -q --filter label="+labelHelper).Output()
	if err != nil {
		t.Fatal(err)
	}
	return strings.Join(append(all, string(helpers)), "\n")
}

func newSpec(image string) backends.Spec {
	return backends.Spec{
		Template: backends.Template{Image: image, PullPolicy: "never", UID: 1000, GID: 1000},
		Owner: backends.Owner{
			Session: "test-" + rand.Text(), User: "alice", Profile: "p", Grant: "OPS-1", Expires: time.Now().Add(time.Hour),
		},
	}
}

func startSandbox(t testing.TB, b *Backend, spec backends.Spec) *sandbox {
	t.Helper()
	ctx, stop := context.WithTimeout(context.Background(), time.Minute)
	defer stop()
	s, err := b.Start(ctx, spec)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := s.Close(context.Background()); err != nil {
			t.Error(err)
		}
	})
	return s.(*sandbox)
}

type result struct {
	status         backends.ExitStatus
	stdout, stderr string
	err            error
}

func run(t testing.TB, s backends.Sandbox, p backends.Process) result {
	t.Helper()
	ctx, stop := context.WithTimeout(context.Background(), time.Minute)
	defer stop()
	var stdout, stderr bytes.Buffer
	p.Stdout, p.Stderr = &stdout, &stderr
	status, err := s.Exec(ctx, p)
	return result{status, stdout.String(), stderr.String(), err}
}

func sh(t testing.TB, s backends.Sandbox, line string) string {
	t.Helper()
	r := run(t, s, backends.Process{Kind: backends.KindExec, Command: line})
	if r.err != nil {
		t.Fatalf("%q: %v", line, r.err)
	}
	return r.stdout + r.stderr
}

func TestContract(t *testing.T) {
	t.Run("Socket", func(t *testing.T) { contract(t, newBackend(t, nil)) })
	// The scripts in test/ have the relay over the engine's own socket.
	t.Run("RelayByTLS", func(t *testing.T) {
		requireEngine(t)
		a := newAuthority(t, t.TempDir(), "authority")
		address, files := tlsEngine(t, a, a.issue("engine", "127.0.0.1"), "127.0.0.1"), a.issue("gate", "")
		contract(t, newBackend(t, func(c *Config) { c.Host, c.TLS, c.Transport = address, files, transportAuto }))
	})
}

func contract(t *testing.T, b *Backend) {
	backendtest.Run(t, backendtest.Subject{
		Backend: b,
		Spec:    func() backends.Spec { return newSpec(busyboxImage) },
		Own:     insideDir,
		Kill: func(s backends.Sandbox) error {
			return fixture.engine.ContainerKill(context.Background(), s.ID(), "KILL")
		},
	})
}
