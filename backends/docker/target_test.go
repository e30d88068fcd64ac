package docker

import (
	"bytes"
	"context"
	"crypto/rand"
	"errors"
	"fmt"
	"io"
	"os/exec"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/sallyport/sallyport/backends"
)

// runTarget runs a container to be joined until the test ends, and gives its name. It answers on 127.0.0.1:8080.
func runTarget(t *testing.T, user string, options ...string) string {
	t.Helper()
	requireEngine(t)
	name := "target-" + strings.ToLower(rand.Text()[:10])
	args := append([]string{"run", "-d", "--rm", "--init=false", "--name", name, "--network", "none", "--user", user,
		"--label", "test.target=" + name, "--cap-drop", "ALL", "--tmpfs", "/tmp:mode=1777,exec"}, options...)
	args = append(args, busyboxImage, "sh", "-c", "echo secret of $(id -u) >/tmp/secret; mkdir /tmp/w; echo hello >/tmp/w/index.html; exec httpd -f -p 127.0.0.1:8080 -h /tmp/w")
	if out, err := exec.Command("docker", args...).CombinedOutput(); err != nil {
		t.Fatalf("docker run: %v\n%s", err, out)
	}
	t.Cleanup(func() { exec.Command("docker", "rm", "-f", name).Run() })
	if out, err := exec.Command("docker", "exec", name, "sh", "-c", "until wget -qO- http://127.0.0.1:8080/; do sleep 0.1; done").CombinedOutput(); err != nil {
		t.Fatalf("the target does not answer: %v\n%s", err, out)
	}
	return name
}

func joiningSpec(name string, what func(*backends.Target)) backends.Spec {
	spec := newSpec(busyboxImage)
	spec.Template.Target = &backends.Target{Labels: map[string]string{"test.target": name}}
	if what != nil {
		what(spec.Template.Target)
	}
	return spec
}

func processes(t *backends.Target) { t.Processes = true }
func files(t *backends.Target)     { t.Processes, t.Files = true, true }

// find gives the one target that there is.
func find(t *testing.T, b *Backend, spec backends.Spec) *backends.Running {
	t.Helper()
	list, err := b.Targets(context.Background(), spec, "")
	if err != nil || len(list) != 1 {
		t.Fatalf("targets: %v, %v", list, err)
	}
	return &list[0]
}

func joinBackend(t *testing.T, transport string) *Backend {
	return newBackend(t, func(c *Config) {
		c.Transport = transport
		c.Targets = Targets{Containers: []string{"target-*"}, Processes: true, Files: true, MaxPerTarget: 2}
		c.AllowRoot = true
	})
}

func TestTarget(t *testing.T) {
	for _, transport := range []string{transportSocket, transportRelay} {
		t.Run(transport, func(t *testing.T) { testTarget(t, transport) })
	}
}

func testTarget(t *testing.T, transport string) {
	b := joinBackend(t, transport)
	start := func(t *testing.T, spec backends.Spec) *sandbox {
		t.Helper()
		spec.Join = find(t, b, spec)
		return startSandbox(t, b, spec)
	}
	t.Run("network", func(t *testing.T) {
		name := runTarget(t, "1000:1000") // the session's own uid, which here reaches nothing
		s := start(t, joiningSpec(name, nil))
		for _, test := range []struct{ line, want string }{
			{"wget -qO- http://127.0.0.1:8080/", "hello\n"},
			{"ps | grep -c [h]ttpd", "0\n"},
			{"tr '\\0' ' ' </proc/1/cmdline | cut -d' ' -f1,2", "/.sallyport/agent serve\n"},
			{"kill -9 1; echo alive", "alive\n"},
			{"ls /tmp/secret", "No such file"},
		} {
			if got := sh(t, s, test.line); !strings.Contains(got, test.want) {
				t.Errorf("%s: %q, want %q", test.line, got, test.want)
			}
		}
		j := s.Info().Joined
		if j == nil || j.Name != name || j.Image != busyboxImage || !strings.HasPrefix(j.Digest, "sha256:") && !strings.Contains(j.Digest, "@sha256:") ||
			!slices.Equal(j.What, []string{"network"}) || len(j.Weaker) != 1 || s.Info().ExecAudit != "on" && s.Info().ExecAudit != "off" {
			t.Errorf("%+v, exec audit %q", j, s.Info().ExecAudit)
		}
	})
	t.Run("processes", func(t *testing.T) {
		name := runTarget(t, "2000:2000")
		spec := joiningSpec(name, processes)
		spec.Template.ExecAudit.Mode = backends.ExecAuditRequired
		spec.Reports = func(*backends.Report) error { return nil }
		s := start(t, spec)
		for _, test := range []struct{ line, want string }{
			{"ps | grep -c [h]ttpd", "1\n"},
			{"tr '\\0' ' ' </proc/1/cmdline | cut -d' ' -f1", "httpd\n"},
			{"cat /proc/1/root/tmp/secret", "Permission denied"},
			{"cat /proc/1/environ", "Permission denied"},
			{"cat /proc/1/mem", "Permission denied"},
			{"kill -9 1", "not permitted"},
			{"wget -qO- http://127.0.0.1:8080/", "hello\n"},
		} {
			if got := sh(t, s, test.line); !strings.Contains(got, test.want) {
				t.Errorf("%s: %q, want %q", test.line, got, test.want)
			}
		}
		// The agent can be killed: nothing is executed after that, and the sandbox ends.
		var got bytes.Buffer
		_, err := s.Exec(context.Background(), backends.Process{Kind: backends.KindExec, Stdout: &got, Stderr: io.Discard,
			Command: "cd /proc; for p in [0-9]*; do case $(tr '\\0' ' ' <$p/cmdline) in */agent\\ serve*) a=$p;; esac; done; " +
				"echo agent $a; kill -9 $a; while :; do /bin/busybox echo executed; done"})
		if text := got.String(); !errors.Is(err, backends.ErrGone) || strings.Contains(text, "executed") {
			t.Errorf("the agent was killed, and then: %v, %.200q", err, text)
		}
		select {
		case <-s.Done():
		case <-time.After(time.Minute):
			t.Fatal("the sandbox goes on without its agent")
		}
		if s.Err() == nil {
			t.Error("no reason")
		}
	})
	t.Run("stopped agent", func(t *testing.T) {
		name := runTarget(t, "2000:2000")
		s := start(t, joiningSpec(name, processes))
		ctx, stop := context.WithCancel(context.Background())
		go func() {
			select {
			case <-s.Done():
			case <-time.After(time.Minute):
				t.Error("the sandbox goes on with an agent that does not")
			}
			stop()
		}()
		s.Exec(ctx, backends.Process{Kind: backends.KindExec, Command: "for p in /proc/[0-9]*; do case $(tr '\\0' ' ' <$p/cmdline) in */agent\\ serve*) kill -STOP ${p#/proc/};; esac; done"})
		<-ctx.Done()
		if err := s.Close(context.Background()); err != nil {
			t.Error(err)
		}
	})
	t.Run("files", func(t *testing.T) {
		name := runTarget(t, "1000:1000")
		spec := joiningSpec(name, processes)
		spec.Join = find(t, b, spec)
		_, err := b.Start(context.Background(), spec)
		var said *backends.TextError
		if !errors.As(err, &said) || !strings.Contains(said.Text, "does not permit its files") {
			t.Fatalf("the target's uid without the permit: %v", err)
		}
		s := start(t, joiningSpec(name, files))
		if got := sh(t, s, "cat /proc/1/root/tmp/secret && echo written >/proc/1/root/tmp/w/index.html; wget -qO- http://127.0.0.1:8080/"); got != "secret of 1000\nwritten\n" {
			t.Errorf("with the permit: %q", got)
		}
		if w := s.Info().Joined.Weaker; len(w) != 4 || !strings.Contains(w[3], "signals") {
			t.Errorf("%q", w)
		}
	})
	t.Run("gone", func(t *testing.T) {
		for what, change := range map[string]func(*backends.Target){"network": nil, "processes": processes} {
			name := runTarget(t, "2000:2000")
			s := start(t, joiningSpec(name, change))
			if out, err := exec.Command("docker", "kill", name).CombinedOutput(); err != nil {
				t.Fatalf("%v: %s", err, out)
			}
			select {
			case <-s.Done():
			case <-time.After(time.Minute):
				t.Fatal(what, ": the sandbox outlives its target")
			}
			var said *backends.TextError
			if !errors.As(s.Err(), &said) || said.Text != "the target "+name+" has ended" {
				t.Errorf("%s: %v", what, s.Err())
			}
		}
	})
	t.Run("restarted", func(t *testing.T) {
		name := runTarget(t, "2000:2000")
		spec := joiningSpec(name, nil)
		s := start(t, spec)
		if out, err := exec.Command("docker", "restart", "-t", "0", name).CombinedOutput(); err != nil {
			t.Fatalf("%v: %s", err, out)
		}
		select {
		case <-s.Done():
		case <-time.After(time.Minute):
			t.Fatal("the sandbox goes on in a network that nobody is in")
		}
	})
	t.Run("limit", func(t *testing.T) {
		name := runTarget(t, "2000:2000")
		spec := joiningSpec(name, nil)
		spec.Join = find(t, b, spec)
		var err error
		for n := range 3 {
			spec.Owner.Session = fmt.Sprintf("test-%s-%d", rand.Text()[:8], n)
			var s backends.Sandbox
			if s, err = b.Start(context.Background(), spec); err == nil {
				defer s.Close(context.Background())
			} else if n < 2 {
				t.Fatal(err)
			}
		}
		var said *backends.TextError
		if !errors.As(err, &said) || !strings.Contains(said.Text, "2 sessions have joined") {
			t.Errorf("a third: %v", err)
		}
	})
}

// What is not to be joined is not found, and is refused to whoever names it all the same.
func TestTargetRefused(t *testing.T) {
	b := joinBackend(t, transportSocket)
	name := runTarget(t, "2000:2000")
	host := "target-" + strings.ToLower(rand.Text()[:10])
	if out, err := exec.Command("docker", "run", "-d", "--rm", "--name", host, "--label", "test.target="+name, "--network", "host",
		busyboxImage, "sleep", "600").CombinedOutput(); err != nil {
		t.Fatalf("%v: %s", err, out)
	}
	defer exec.Command("docker", "rm", "-f", host).Run()
	spec := joiningSpec(name, nil)
	spec.Join = find(t, b, spec) // and not the one in the host's network
	inside := startSandbox(t, b, spec)
	ctx := context.Background()

	t.Run("none found", func(t *testing.T) {
		for what, change := range map[string]func(*backends.Spec){
			"another label": func(s *backends.Spec) { s.Template.Target.Labels = map[string]string{"test.target": "other"} },
			"another name":  func(s *backends.Spec) { s.Template.Target.Name = "target-other" },
			"a sandbox":     func(s *backends.Spec) { s.Template.Target.Labels = map[string]string{labelTarget: spec.Join.ID} },
			"not of the operator's": func(s *backends.Spec) {
				s.Template.Target = &backends.Target{Name: namePrefix + inside.session}
			},
		} {
			other := joiningSpec(name, nil)
			change(&other)
			if list, err := b.Targets(ctx, other, ""); err != nil || len(list) != 0 {
				t.Errorf("%s: %v, %v", what, list, err)
			}
		}
		for _, pick := range []string{"other", "../" + name, name + "/", "*", "target-*", host, "", strings.ToUpper(name), name + "\n"} {
			if list, err := b.Targets(ctx, joiningSpec(name, nil), pick); err != nil || pick != "" && len(list) != 0 {
				t.Errorf("%q: %v, %v", pick, list, err)
			}
		}
	})
	t.Run("refused", func(t *testing.T) {
		id := func(of string) string {
			out, err := exec.Command("docker", "inspect", "-f", "{{.Id}}", of).Output()
			if err != nil {
				t.Fatal(err)
			}
			return strings.TrimSpace(string(out))
		}
		for what, test := range map[string]struct {
			change func(*backends.Spec)
			want   string
		}{
			"nothing chosen": {func(s *backends.Spec) { s.Join = nil }, "no target was chosen"},
			"host's network": {func(s *backends.Spec) { s.Join.ID = id(host) }, "has the host's network"},
			"a sandbox": {func(s *backends.Spec) {
				s.Join.ID = inside.id
				s.Template.Target.Labels = nil
				s.Template.Target.Name = namePrefix + inside.session
			}, "not listed"},
			"other labels":     {func(s *backends.Spec) { s.Template.Target.Labels = map[string]string{"a": "b"} }, "is not what the profile names"},
			"gone":             {func(s *backends.Spec) { s.Join.ID = strings.Repeat("0", 64) }, "is not there any more"},
			"a name for an ID": {func(s *backends.Spec) { s.Join.ID = name }, "is not there any more"},
			"network":          {func(s *backends.Spec) { s.Template.Network = "bridge" }, "name no network"},
			"root":             {func(s *backends.Spec) { s.Template.UID = 0 }, "uid 0 is what its files are permitted for"},
			"caps":             {func(s *backends.Spec) { s.Template.Target.Processes = true; s.Template.Caps = []string{"SYS_PTRACE"} }, "capabilities reach into"},
			"workload":         {func(s *backends.Spec) { s.Template.Target.Workload = "deployment/x" }, "Kubernetes' alone"},
			"files alone":      {func(s *backends.Spec) { s.Template.Target.Files = true }, "files are not permitted"},
			"nothing named":    {func(s *backends.Spec) { s.Template.Target = &backends.Target{} }, "neither name nor labels"},
		} {
			other := joiningSpec(name, nil)
			join := *spec.Join
			other.Join = &join
			test.change(&other)
			s, err := b.Start(ctx, other)
			if err == nil {
				s.Close(ctx)
			}
			if err == nil || !strings.Contains(err.Error(), test.want) {
				t.Errorf("%s: %v, want %s", what, err, test.want)
			}
		}
	})
	t.Run("operator", func(t *testing.T) {
		for what, c := range map[string]Targets{
			"no container may be joined":  {Processes: true, Files: true},
			"processes are not permitted": {Containers: []string{"*"}},
			"files are not permitted":     {Containers: []string{"*"}, Processes: true},
		} {
			other := newBackend(t, func(config *Config) { config.Targets = c })
			if _, err := other.Targets(ctx, joiningSpec(name, files), ""); err == nil || !strings.Contains(err.Error(), what) {
				t.Errorf("%v, want %s", err, what)
			}
		}
	})
}

func TestTargetsPermit(t *testing.T) {
	c := Targets{Containers: []string{"api", "web-*"}, Labels: []string{"debug=yes", "empty="}}
	for _, test := range []struct {
		name   string
		labels map[string]string
		want   bool
	}{
		{"api", nil, true}, {"api2", nil, false}, {"web-", nil, true}, {"web-1", nil, true}, {"web", nil, false}, {"", nil, false},
		{"x", map[string]string{"debug": "yes"}, true}, {"x", map[string]string{"debug": "no"}, false},
		{"x", map[string]string{"debug": ""}, false}, {"x", map[string]string{"empty": ""}, true}, {"x", map[string]string{}, false},
	} {
		if got := c.permit(test.name, test.labels); got != test.want {
			t.Errorf("%q %v: %v", test.name, test.labels, got)
		}
	}
	for _, bad := range []Targets{
		{Containers: []string{"/api"}}, {Containers: []string{""}}, {Containers: []string{"a b"}}, {Labels: []string{"debug"}},
		{Labels: []string{"=x"}}, {Files: true}, {MaxPerTarget: -1},
	} {
		if len(bad.validate()) == 0 {
			t.Errorf("%+v is valid", bad)
		}
	}
	if errs := c.validate(); len(errs) != 0 {
		t.Error(errs)
	}
}
