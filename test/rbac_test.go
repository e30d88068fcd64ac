package test

import (
	"encoding/json"
	"errors"
	"fmt"
	"os/exec"
	"slices"
	"strings"
	"testing"
	"time"
)

// rights are the rules of the gates' Role.
type rights []struct {
	APIGroups []string `json:"apiGroups"`
	Resources []string `json:"resources"`
	Verbs     []string `json:"verbs"`
}

// without is all but one verb.
func (r rights) without(resource, verb string) (less rights) {
	for _, rule := range r {
		if slices.Contains(rule.Resources, resource) {
			rule.Verbs = slices.DeleteFunc(slices.Clone(rule.Verbs), func(v string) bool { return v == verb })
		}
		if len(rule.Verbs) > 0 {
			less = append(less, rule)
		}
	}
	return less
}

// grantRights changes the gates' Role, and waits until the API server goes by it.
func (f *fleet) grantRights(r rights, resource, verb string, may bool) {
	f.t.Helper()
	b, err := json.Marshal(map[string]any{"rules": r})
	if err != nil {
		f.t.Fatal(err)
	}
	f.kubectl("patch", "role", "sallyport", "-n", f.sandboxes, "--type=merge", "-p", string(b))
	object, sub, _ := strings.Cut(resource, "/")
	eventually(f.t, "the right to "+verb+" "+resource, func() error {
		args := []string{"auth", "can-i", verb, object, "-n", f.sandboxes, "--as=system:serviceaccount:" + f.gates + ":sallyport"}
		if sub != "" {
			args = append(args, "--subresource="+sub)
		}
		out, _ := kubectl(args...).Output() // "no" is an error, too
		if got := strings.TrimSpace(string(out)); got != map[bool]string{true: "yes", false: "no"}[may] {
			return fmt.Errorf("can-i: %q", got)
		}
		return nil
	})
}

// refusal is what a client reads whose login fails; it is an error if the login works.
func refusal(cmd *exec.Cmd) (string, error) {
	out, err := cmd.CombinedOutput()
	if err == nil {
		return "", fmt.Errorf("logged in: %s", out)
	}
	return string(out), nil
}

// again does it until the user's last sandbox has gone: a client has left before its pod is removed.
func again(do func() error) error {
	for end := time.Now().Add(patience); ; time.Sleep(100 * time.Millisecond) {
		err := do()
		if err == nil || !strings.Contains(err.Error(), "sandboxes already") || time.Now().After(end) {
			return err
		}
	}
}

func says(text, want string) error {
	if !strings.Contains(text, want) {
		return fmt.Errorf("%q is not in: %s", want, text)
	}
	return nil
}

// TestRBAC takes each verb of the Role in the base manifests away in turn: something that a gate does with it fails. With all of
// them all of it works.
func TestRBAC(t *testing.T) {
	f := newFleet(t)
	f.prepare()
	f.user("alice", "debug")
	f.user("holder", "debug")
	f.profile("nodata", map[string]any{
		"image": busyboxImage, "pull_policy": "never", "memory": "64Mi", "permit": map[string]any{"exec": true},
		"mounts": []any{map[string]any{"type": "configmap", "source": "missing", "target": "/data"}},
	})
	f.user("carol", "nodata")
	var role struct{ Rules rights }
	if err := json.Unmarshal(f.kubectl("get", "role", "sallyport", "-n", f.sandboxes, "-o", "json"), &role); err != nil {
		t.Fatal(err)
	}
	const config = "  max_per_user: 1\n  config_maps: [missing]\n"
	holder := f.newGate(t, "holder", config) // with all rights, before any is taken away: holds a name of holder's
	held, err := begin(t, holder.ssh("holder", "cat"))
	if err != nil {
		t.Fatal(err)
	}

	login := func(g *gate) error {
		return again(func() error {
			out, err := g.ssh("alice", "true").CombinedOutput()
			if err != nil {
				return fmt.Errorf("login: %w: %s", err, out)
			}
			return nil
		})
	}
	told := func(user, want string) func(*gate) error {
		return func(g *gate) error {
			return again(func() error {
				text, err := refusal(g.ssh(user, "true"))
				return errors.Join(err, says(text, want))
			})
		}
	}
	noPolicy := func(g *gate) error {
		return errors.Join(told("alice", "the cluster forbids the sandbox")(g), says(g.log(), "make the network policy"))
	}
	// gone: a session ends whose pod somebody deletes, and its user is told so.
	gone := func(g *gate) error {
		var s *session
		err := again(func() (err error) {
			s, err = begin(t, g.ssh("alice", "cat"))
			return err
		})
		if err != nil {
			return err
		}
		for pod := range must(f.podsOf(g.label(t))) {
			f.kubectl("delete", "pod", "-n", f.sandboxes, pod, "--grace-period=0", "--force")
		}
		s.wait()
		if text := s.stderr.String(); !deletedText.MatchString(text) {
			return fmt.Errorf("told %q", text)
		}
		return nil
	}
	left := func(g *gate) error {
		if err := login(g); err != nil {
			return err
		}
		for end := time.Now().Add(patience); time.Now().Before(end); time.Sleep(100 * time.Millisecond) {
			if pods, err := f.podsOf(g.label(t)); err != nil || len(pods) == 0 {
				return err
			}
			if strings.Contains(g.log(), "cannot delete resource") {
				return errForbidden
			}
		}
		return errors.New("the pod is neither gone nor kept")
	}

	works := []struct {
		name string
		do   func(*gate) error
	}{
		{"login", login},
		{"a pod's end by another's hand is told", gone},
		{"nothing is left", left},
		{"a taken name is told from others", told("holder", "you have 1 sandboxes already")},
		{"missing data is told", told("carol", "the sandbox's data is not there")},
	}
	all := f.newGate(t, "all", config)
	for _, w := range works {
		if err := w.do(all); err != nil {
			t.Fatalf("with all rights: %s: %v\n%s", w.name, err, all.log())
		}
	}

	if strings.Contains(all.log(), "watch pods") {
		t.Errorf("with all rights a watch failed:\n%s", all.log())
	}
	// unheard: without a watch the gate lists its pods again and again, ever more seldom, and learns their ends late.
	unheard := func(g *gate) error {
		eventually(t, "the watch to fail", func() error { return says(g.log(), "cannot watch resource") })
		return nil
	}

	// What fails without: do returns nil if it fails as it should.
	fails := map[string]func(*gate) error{
		"pods/create":         told("alice", "the cluster forbids the sandbox"),
		"pods/delete":         func(g *gate) error { return expect(left(g), errForbidden) },
		"pods/get":            told("holder", "the cluster forbids the sandbox"),
		"pods/list":           nil, // the gate does not open
		"pods/watch":          unheard,
		"pods/exec/create":    told("alice", "the cluster does not let this gate into its sandboxes"),
		"events/list":         told("carol", "the sandbox did not start in time"),
		"networkpolicies/get": noPolicy,
	}
	for _, rule := range role.Rules {
		for _, resource := range rule.Resources {
			for _, verb := range rule.Verbs {
				name := resource + "/" + verb
				t.Run(name, func(t *testing.T) {
					do, ok := fails[name]
					if !ok {
						t.Fatal("nothing is known to need this verb: take it out of the Role, or say here what does")
					}
					delete(fails, name)
					f.grantRights(role.Rules.without(resource, verb), resource, verb, false)
					defer f.grantRights(role.Rules, resource, verb, true)
					g := &gate{f: f, name: strings.ReplaceAll(name, "/", "-"), port: freePort(t)}
					if name == "events/list" { // what fails is that nobody says why the pod does not start
						f.startTimeout = 15 * time.Second
						defer func() { f.startTimeout = patience }()
					}
					g.configure(t, config)
					err := g.open()
					if do == nil {
						if err == nil {
							g.kill()
							t.Fatal("the gate opens")
						}
						if err := says(err.Error(), "ask for pods in namespace"); err != nil {
							t.Error(err)
						}
						return
					}
					if err != nil {
						t.Fatal(err)
					}
					defer g.kill() // what it can't remove is removed below
					if err := do(g); err != nil {
						t.Errorf("%v\n%s", err, g.log())
					}
				})
			}
		}
	}
	for name := range fails {
		t.Errorf("%s: the Role has no such verb", name)
	}
	if err := held.says("still here"); err != nil {
		t.Error(err)
	}
	held.finish(false)
}

var errForbidden = errors.New("the pod can't be deleted")

// expect is nil if got is want.
func expect(got, want error) error {
	if errors.Is(got, want) {
		return nil
	}
	return fmt.Errorf("%w, want %w", got, want)
}

func must[T any](v T, err error) T {
	if err != nil {
		panic(err) // of a test
	}
	return v
}
