package test

import (
	"encoding/json"
	"errors"
	"fmt"
	"regexp"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"
)

// podsOf are the names of pods in the sandboxes' namespace, with their phases.
func (f *fleet) podsOf(labels string) (map[string]string, error) {
	out, err := kubectlOutput("get", "pods", "-n", f.sandboxes, "-l", labels, "-o", "json")
	if err != nil {
		return nil, err
	}
	var list struct {
		Items []struct {
			Metadata struct{ Name string }
			Status   struct{ Phase string }
		}
	}
	if err := json.Unmarshal(out, &list); err != nil {
		return nil, err
	}
	pods := map[string]string{}
	for _, p := range list.Items {
		pods[p.Metadata.Name] = p.Status.Phase
	}
	return pods, nil
}

// deletedText is what a user reads whose pod somebody deleted.
var deletedText = regexp.MustCompile(`the sandbox (was|is being) deleted`)

// shown is a line of `sallyport session list --output json`.
type shown struct{ ID, Gate, User, Sandbox, Source string }

func (g *gate) sessions(t *testing.T, args ...string) (list []shown) {
	t.Helper()
	out, err := g.tool(append([]string{"session", "list", "--output", "json"}, args...)...)
	if err == nil {
		err = json.Unmarshal([]byte(out), &list)
	}
	if err != nil {
		t.Fatalf("session list: %v: %s", err, out)
	}
	return list
}

// TestGates: two gates that know of each other only by the cluster. One user's limit holds over both at the same time, each
// lists the sessions of both, and ends the other's.
func TestGates(t *testing.T) {
	f := newFleet(t)
	f.prepare()
	f.user("alice", "debug")
	const limit = 3
	gates := []*gate{f.newGate(t, "north", fmt.Sprintf("  max_per_user: %d\n", limit)), f.newGate(t, "south", fmt.Sprintf("  max_per_user: %d\n", limit))}

	var mu sync.Mutex // guards the two
	in := map[*gate][]*session{}
	var refused []string
	var wg sync.WaitGroup
	for i := range 8 {
		wg.Go(func() {
			g := gates[i%2]
			s, err := begin(t, g.ssh("alice", "cat"))
			mu.Lock()
			defer mu.Unlock()
			if err != nil {
				refused = append(refused, err.Error())
			} else {
				in[g] = append(in[g], s)
			}
		})
	}
	wg.Wait()
	if n := len(in[gates[0]]) + len(in[gates[1]]); n != limit {
		t.Fatalf("%d sessions of one user over two gates, want %d; refused: %q", n, limit, refused)
	}
	for _, text := range refused {
		if !strings.Contains(text, "you have 3 sandboxes already") {
			t.Errorf("refused: %s", text)
		}
	}
	// Both gates have to have a session for what follows. Which won is chance.
	for i, g := range gates {
		if len(in[g]) > 0 {
			continue
		}
		other := gates[1-i]
		if err := in[other][0].finish(false); err != nil {
			t.Errorf("cat: %v", err)
		}
		in[other] = in[other][1:]
		eventually(t, "the name to be free", func() error {
			s, err := begin(t, g.ssh("alice", "cat"))
			if err == nil {
				in[g] = append(in[g], s)
			}
			return err
		})
	}

	count := func(list []shown, gate string) (n int) {
		for _, s := range list {
			if s.Gate == gate && s.User == "alice" && strings.HasPrefix(s.Sandbox, f.sandboxes+"/sp-") {
				n++
			}
		}
		return n
	}
	for _, g := range gates {
		all := g.sessions(t, "--all")
		if len(all) != limit || count(all, "north") != len(in[gates[0]]) || count(all, "south") != len(in[gates[1]]) {
			t.Errorf("%s lists %+v; north has %d, south %d", g.name, all, len(in[gates[0]]), len(in[gates[1]]))
		}
		if own := g.sessions(t); len(own) != len(in[g]) || count(own, g.name) != len(own) {
			t.Errorf("%s lists of its own %+v, want %d", g.name, own, len(in[g]))
		}
	}

	// North ends a session of south's.
	var id string
	for _, s := range gates[0].sessions(t, "--all") {
		if s.Gate == "south" {
			id = s.ID
		}
	}
	if out, err := gates[0].tool("session", "end", id, "--reason", "lunch"); err != nil || !strings.Contains(out, "gate south's") {
		t.Errorf("session end: %v: %s", err, out)
	}
	var ended *session
	eventually(t, "the session to end", func() error {
		for _, s := range in[gates[1]] {
			if deletedText.MatchString(s.stderr.String()) {
				ended = s
				return nil
			}
		}
		told := ""
		for _, s := range in[gates[1]] {
			told += s.stderr.String()
		}
		return fmt.Errorf("the users were told %q", told)
	})
	ended.wait()
	if !strings.Contains(gates[0].log(), "lunch") {
		t.Errorf("north does not say why it ended the session:\n%s", gates[0].log())
	}
	eventually(t, "the log", func() error {
		out, err := f.audit("cat", id)
		if err == nil && !strings.Contains(out, `"cause":"sandbox-gone"`) {
			err = errors.New("no such cause")
		}
		return err
	})
	if out, err := gates[0].tool("session", "end", id); err == nil || !strings.Contains(out, "no such session") {
		t.Errorf("session end of one that has ended: %v: %s", err, out)
	}
	for _, bad := range []string{"nosuch", "a,b", "x=y", strings.Repeat("a", 200)} {
		if out, err := gates[0].tool("session", "end", bad); err == nil || !strings.Contains(out, "no such session") {
			t.Errorf("session end %q: %v: %s", bad, err, out)
		}
	}
	// Its name is free again, for either gate.
	eventually(t, "a login in its place", func() error {
		s, err := begin(t, gates[0].ssh("alice", "cat"))
		if err == nil {
			in[gates[0]] = append(in[gates[0]], s)
		}
		return err
	})
	for _, g := range gates {
		for _, s := range in[g] {
			if s == ended {
				continue
			}
			if err := s.says("still here"); err != nil {
				t.Error(err)
			}
			if err := s.finish(false); err != nil {
				t.Errorf("cat: %v: %s", err, s.stderr.String())
			}
		}
	}
	for _, g := range gates {
		g.end(t, syscall.SIGTERM)
	}
	if pods, err := f.podsOf("app.kubernetes.io/managed-by=sallyport"); err != nil || len(pods) != 0 {
		t.Errorf("left: %v, %v", pods, err)
	}
}

// TestGateKilled: of two gates with one store one is killed under 50 sessions. Its pods go, the other's sessions don't, and when
// a gate starts on its state directory all logs get sealed.
func TestGateKilled(t *testing.T) {
	const many, few = 50, 3
	f := newFleet(t)
	f.useS3()
	f.prepare()
	f.user("alice", "debug")
	f.user("bob", "debug")
	more := "  max_per_user: 60\n  schedule_wait: 60s\n"
	killed, other := f.newGate(t, "killed", more), f.newGate(t, "other", more)

	var mu sync.Mutex // guards the two
	sessions := map[*gate][]*session{}
	var failed []error
	var wg sync.WaitGroup
	slots := make(chan struct{}, 6) // a node of two processors starts no more at once
	for i := range many + few {
		wg.Go(func() {
			slots <- struct{}{}
			defer func() { <-slots }()
			g, user := killed, "alice"
			if i >= many {
				g, user = other, "bob"
			}
			s, err := begin(t, g.ssh(user, "cat"))
			mu.Lock()
			defer mu.Unlock()
			if err != nil {
				failed = append(failed, err)
			} else {
				sessions[g] = append(sessions[g], s)
			}
		})
	}
	wg.Wait()
	if len(failed) > 0 {
		t.Fatalf("%d of %d logins failed: %v", len(failed), many+few, errors.Join(failed...))
	}
	label := killed.label(t)
	if pods, err := f.podsOf(label); err != nil || len(pods) != many {
		t.Fatalf("%d pods, %v", len(pods), err)
	}

	began := time.Now()
	killed.end(t, syscall.SIGKILL)
	gone := func(goes func(phase string) bool) func() error {
		return func() error {
			pods, err := f.podsOf(label)
			n := 0
			for _, phase := range pods {
				if goes(phase) {
					n++
				}
			}
			if err == nil && n > 0 {
				err = fmt.Errorf("%d of %d", n, len(pods))
			}
			return err
		}
	}
	eventually(t, "the killed gate's pods to end", gone(func(phase string) bool { return phase == "Running" || phase == "Pending" }))
	ended := time.Since(began)
	eventually(t, "the killed gate's pods to be removed", gone(func(string) bool { return true }))
	t.Logf("%d pods of the killed gate had ended after %.1f s and were removed after %.1f s", many, ended.Seconds(), time.Since(began).Seconds())
	for _, s := range sessions[other] {
		if err := s.says("still here"); err != nil {
			t.Errorf("the other gate's session: %v: %s", err, s.stderr.String())
		}
	}
	if own := other.sessions(t); len(own) != few {
		t.Errorf("the other gate has %+v", own)
	}
	for _, s := range sessions[killed] {
		s.wait() // the client sees its connection cut
	}

	killed.start(t)
	want := func(sealed, interrupted, live int) func() error {
		return func() error {
			states, err := f.states()
			if err == nil && (states["sealed"] != sealed || states["interrupted"] != interrupted || states["live"] != live || len(states) > 3) {
				err = fmt.Errorf("%v, want %d sealed, %d interrupted, %d live", states, sealed, interrupted, live)
			}
			return err
		}
	}
	eventually(t, "the killed gate's logs to be sealed", want(0, many, few))
	for _, s := range sessions[other] {
		if err := s.says("and still"); err != nil {
			t.Error(err)
		}
		if err := s.finish(false); err != nil {
			t.Errorf("cat: %v: %s", err, s.stderr.String())
		}
	}
	eventually(t, "the other's logs to be sealed", want(few, many, 0))
	for _, g := range []*gate{killed, other} { // their own logs are sealed then, too
		g.end(t, syscall.SIGTERM)
	}
	if out, err := f.audit("verify"); err != nil || !strings.Contains(out, " 0 live, 0 damaged") {
		t.Errorf("verify: %v\n%s", err, out)
	}
	if err := want(few, many, 0)(); err != nil {
		t.Error(err)
	}
}
