package kubernetes

import (
	"context"
	"errors"
	"fmt"
	"strings"
	"sync"
	"testing"
	"time"

	corev1 "k8s.io/api/core/v1"
	networkingv1 "k8s.io/api/networking/v1"
	"k8s.io/apimachinery/pkg/api/resource"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/runtime"
	"k8s.io/apimachinery/pkg/types"

	"github.com/sallyport/sallyport/backends"
)

// TestConfinement looks at a sandbox from inside. That its namespace enforces Pod Security "restricted" is the fixture's.
func TestConfinement(t *testing.T) {
	b := newBackend(t, nil)
	s := startSandbox(t, b, newSpec(busyboxImage))
	for _, test := range []struct{ line, want string }{
		{"id -u; id -g; id -G", "1000\n1000\n1000\n"},
		{"grep -E '^(CapEff|CapBnd|CapPrm|CapAmb|NoNewPrivs|Seccomp):' /proc/self/status | tr -d '\\t 0\\n'",
			"CapPrm:CapEff:CapBnd:CapAmb:NoNewPrivs:1Seccomp:2"},
		{"touch /x", "Read-only file system"},
		{"touch /.sallyport/x", "Read-only file system"},
		{"chmod 755 /.sallyport/agent", "Read-only file system"},
		{"stat -c '%a %u' /.sallyport/agent", "111 65532\n"},
		{"cat /.sallyport/agent", "Permission denied"},
		{"ls -A /tmp", ""},
		{"cat /proc/1/environ", "Permission denied"},
		{"cat /proc/1/mem", "Permission denied"},
		{"ls /proc/1/fd", "Permission denied"},
		{"tr '\\0' ' ' </proc/1/cmdline | cut -c-23", "/.sallyport/agent serve"},
		{"kill -9 1; kill -TERM 1; kill -STOP 1; echo $?", "0\n"},
		{"ls /var/run/secrets /run/secrets 2>&1 | grep -c 'No such'", "2\n"},
		{"for d in /tmp $HOME; do printf '#!/bin/sh\necho ran\n' >$d/x; chmod +x $d/x; $d/x; done", "ran\nran\n"},
		{"awk '$2 == \"/tmp\" || $2 == \"/home/sandbox\" {print $3, $4}' /proc/mounts | grep -c '^tmpfs rw,.*size=131072k'", "2\n"},
		{"dd if=/dev/zero of=/tmp/full bs=1M 2>&1; rm /tmp/full", "No space left"},
		{"echo $USER $HOME", " /home/sandbox\n"},
		{"unshare -r id", "not permitted"},
		{"cat /etc/resolv.conf", "nameserver 127.0.0.1"},
		{"env | grep -c TEST_SERVICE", "0\n"},
		{"ls /dev/mem /dev/kmsg /dev/sda 2>&1 | grep -c 'No such'", "3\n"},
	} {
		if got := sh(t, s, test.line); !strings.Contains(got, test.want) || test.want == "" && got != "" {
			t.Errorf("%s: %q, want %q", test.line, got, test.want)
		}
	}
	info := s.Info()
	if info.Backend != "kubernetes" || info.Image != busyboxImage || info.Node == "" || info.Spec == nil || info.ExecAudit == "" {
		t.Errorf("%+v", info)
	}
	if s.ID() != fixture.ns+"/"+s.at.name {
		t.Errorf("ID %q", s.ID())
	}
}

// TestReports: what runs and connects is reported under RuntimeDefault.
func TestReports(t *testing.T) {
	b := newBackend(t, nil)
	spec := newSpec(busyboxImage)
	spec.Template.ExecAudit = backends.ExecAudit{Mode: backends.ExecAuditRequired, Strict: true}
	var mu sync.Mutex
	var paths []string
	connects := 0
	spec.Reports = func(r *backends.Report) error {
		mu.Lock()
		defer mu.Unlock()
		if r.Exec != nil {
			paths = append(paths, string(r.Exec.Path))
		}
		if r.Connect != nil {
			connects++
		}
		if r.Unaudited != nil {
			t.Errorf("unaudited: %+v", r.Unaudited)
		}
		return nil
	}
	s := startSandbox(t, b, spec)
	if s.Info().ExecAudit != "on, strict" {
		t.Errorf("%q", s.Info().ExecAudit)
	}
	sh(t, s, "/bin/uname; nc -w 1 127.0.0.1 1")
	mu.Lock()
	defer mu.Unlock()
	if all := strings.Join(paths, " "); !strings.Contains(all, "/bin/uname") || connects != 1 {
		t.Errorf("%d connects, executions %q", connects, all)
	}
}

// put makes an object of the test's in a namespace.
func put[T any, P interface {
	*T
	runtime.Object
}](t *testing.T, ns, resource string, o P) {
	t.Helper()
	if err := fixture.cluster.create(context.Background(), ns, resource, o, P(new(T))); err != nil {
		t.Fatal(err)
	}
}

// TestFailures: each is told within seconds, in words for the user and whole for the log, and leaves nothing.
func TestFailures(t *testing.T) {
	full := newNamespace(t)
	put(t, full, "resourcequotas", &corev1.ResourceQuota{
		ObjectMeta: metav1.ObjectMeta{Name: "none"},
		Spec:       corev1.ResourceQuotaSpec{Hard: corev1.ResourceList{corev1.ResourcePods: resource.MustParse("0")}},
	})
	// Until its controller has counted, a quota forbids all the same, but with other words.
	for end := time.Now().Add(30 * time.Second); ; time.Sleep(50 * time.Millisecond) {
		var q corev1.ResourceQuota
		if err := fixture.cluster.get(context.Background(), full, "resourcequotas", "none", &q); err != nil || time.Now().After(end) {
			t.Fatal("the quota is not counted", err)
		}
		if len(q.Status.Hard) > 0 {
			break
		}
	}
	b := newBackend(t, func(c *Config) {
		c.Namespaces = []string{full}
		c.NodeLabels = []string{"sallyport-test"}
		c.ScheduleWait = time.Second
		c.HostPaths = []string{"/var"}
		c.ConfigMaps = []string{"missing"}
		c.Runtimes = []string{"missing"}
		c.CSI = []string{"missing.example"}
	})
	for _, test := range []struct {
		name       string
		change     func(*backends.Template)
		text, want string
	}{
		{"image never pulled", func(t *backends.Template) { t.Image = "sallyport/none:1" }, "image can't be had", "ErrImageNeverPull"},
		{"image not to be pulled", func(t *backends.Template) { t.Image, t.PullPolicy = "127.0.0.1:1/none:1", "always" }, "image can't be had", "refused"},
		{"no node", func(t *backends.Template) { t.Nodes = map[string]string{"sallyport-test": "none"} }, "no room", "node"},
		{"quota", func(t *backends.Template) { t.Namespace = full }, "quota", "exceeded quota"},
		{"admission", func(t *backends.Template) {
			t.Mounts = []backends.Mount{{Source: "/var/log", Target: "/logs"}}
		}, "forbids", "PodSecurity"},
		{"config map not there", func(t *backends.Template) {
			t.Mounts = []backends.Mount{{Type: "configmap", Source: "missing", Target: "/settings"}}
		}, "data is not there", "missing"},
		{"CSI driver not there", func(t *backends.Template) {
			t.Mounts = []backends.Mount{{Type: "csi", Source: "missing.example", Target: "/data"}}
		}, "data is not there", "missing.example"},
		{"runtime class not there", func(t *backends.Template) { t.Runtime = "missing" }, "forbids", "missing"},
	} {
		t.Run(test.name, func(t *testing.T) {
			spec := newSpec(busyboxImage)
			test.change(&spec.Template)
			ctx, stop := context.WithTimeout(context.Background(), time.Minute)
			defer stop()
			began := time.Now()
			_, err := b.Start(ctx, spec)
			took := time.Since(began)
			var known *backends.TextError
			if !errors.As(err, &known) || !strings.Contains(known.Text, test.text) || !strings.Contains(err.Error(), test.want) {
				t.Errorf("%v: want %q for the user, %q in the whole", err, test.text, test.want)
			}
			if took > 15*time.Second { // half of the time-out that it must not be
				t.Errorf("took %v", took)
			}
			t.Logf("after %v: %v", took.Round(time.Millisecond), err)
			for _, ns := range b.namespaces() {
				if left := pods(t, ns, labelUser+"="+hashed(spec.Owner.User)); len(left) != 0 {
					t.Errorf("%d pods are left", len(left))
				}
			}
		})
	}
}

// TestSlots: the limit per user holds over gates, and what has finished takes no place.
func TestSlots(t *testing.T) {
	limit := func(c *Config) { c.MaxPerUser = 2 }
	one, other := newBackend(t, limit), newBackend(t, limit)
	user := "bob@" + t.Name()
	spec := func() backends.Spec {
		s := newSpec(busyboxImage)
		s.Owner.User = user
		return s
	}
	first := startSandbox(t, one, spec())
	second := startSandbox(t, other, spec())
	for _, b := range []*Backend{one, other} {
		var known *backends.TextError
		if _, err := b.Start(context.Background(), spec()); !errors.As(err, &known) || !strings.Contains(known.Text, "2 sandboxes already") {
			t.Errorf("a third: %v", err)
		}
	}
	// A pod whose gate is gone ends by itself, and its name is free again though nobody has removed it.
	second.client.Close()
	waitFor(t, "the pod to end", func() bool {
		for _, p := range pods(t, fixture.ns, labelUser+"="+hashed(user)) {
			if p.UID == second.uid {
				return finished(&p)
			}
		}
		return true
	})
	third := startSandbox(t, one, spec())
	if third.ID() == first.ID() {
		t.Errorf("both are %s", third.ID())
	}
	sh(t, first, "true")
	sh(t, third, "true")
}

func waitFor(t *testing.T, what string, f func() bool) {
	t.Helper()
	for end := time.Now().Add(60 * time.Second); !f(); time.Sleep(50 * time.Millisecond) {
		if time.Now().After(end) {
			t.Fatalf("waited for %s", what)
		}
	}
}

// TestReap: a gate that was killed leaves pods; the next of its name removes them at once, another gate only those that
// have finished, and none that live.
func TestReap(t *testing.T) {
	other := newBackend(t, nil)
	alive := startSandbox(t, other, newSpec(busyboxImage))
	gate := "test-killed-" + strings.ToLower(t.Name())
	killed, stop := newGate(t, gate, nil)
	defer stop()
	var dead []types.UID
	for range 2 {
		s, err := killed.Start(context.Background(), newSpec(busyboxImage))
		if err != nil {
			t.Fatal(err)
		}
		dead = append(dead, s.(*sandbox).uid)
	}
	left := func(uid types.UID) *corev1.Pod {
		for _, p := range pods(t, fixture.ns, "") {
			if p.UID == uid {
				return &p
			}
		}
		return nil
	}
	// Another gate's pods that live are not touched.
	seen, err := other.reap(context.Background(), nil, "")
	if err == nil {
		_, err = other.reap(context.Background(), seen, "")
	}
	if err != nil || left(dead[0]) == nil || left(dead[1]) == nil {
		t.Fatalf("another gate's living pods are gone (%v)", err)
	}
	for _, s := range killed.live {
		if left(s.uid) == nil {
			t.Fatal("gone")
		}
	}
	stop() // and nothing is closed: as killed
	killed.mu.Lock()
	for _, s := range killed.live {
		if s.uid == dead[0] {
			s.client.Close() // as the kernel closes a killed gate's connections
		}
	}
	killed.mu.Unlock()
	waitFor(t, "the first to end", func() bool { p := left(dead[0]); return p != nil && finished(p) })
	seen, err = other.reap(context.Background(), nil, finishedPods)
	if err == nil && !seen[dead[0]] {
		t.Error("a finished pod is not seen")
	}
	if err == nil {
		_, err = other.reap(context.Background(), seen, finishedPods)
	}
	if err != nil || left(dead[0]) != nil {
		t.Errorf("a finished pod of another gate is still there (%v)", err)
	}
	again, stopAgain := newGate(t, gate, nil)
	defer stopAgain()
	if err := again.Reap(context.Background()); err != nil || left(dead[1]) != nil {
		t.Errorf("its own pod is still there (%v)", err)
	}
	if left(alive.uid) == nil {
		t.Error("a living pod of another gate is gone")
	}
	sh(t, alive, "true")
	killed.mu.Lock()
	defer killed.mu.Unlock()
	for _, s := range killed.live {
		s.client.Close()
	}
}

// TestEnds: a session's end says what the cluster says of its pod.
func TestEnds(t *testing.T) {
	b := newBackend(t, nil)
	ctx := context.Background()
	for _, test := range []struct {
		name string
		end  func(*testing.T, *sandbox)
		want string
	}{
		{"deleted at once", func(t *testing.T, s *sandbox) {
			if err := fixture.cluster.deletePod(ctx, s.at.namespace, s.at.name, s.uid); err != nil {
				t.Fatal(err)
			}
		}, "deleted"},
		{"deleted", func(t *testing.T, s *sandbox) {
			if err := fixture.cluster.core.Delete().Namespace(s.at.namespace).Resource("pods").Name(s.at.name).Do(ctx).Error(); err != nil {
				t.Fatal(err)
			}
		}, "is being deleted"},
		{"evicted", func(t *testing.T, s *sandbox) {
			evict(t, s)
		}, "was evicted"},
		{"deadline", func(t *testing.T, s *sandbox) {
			err := fixture.cluster.core.Patch(types.MergePatchType).Namespace(s.at.namespace).Resource("pods").Name(s.at.name).
				Body([]byte(`{"spec":{"activeDeadlineSeconds":1}}`)).Do(ctx).Error()
			if err != nil {
				t.Fatal(err)
			}
		}, "longest life"},
	} {
		t.Run(test.name, func(t *testing.T) {
			s := startSandbox(t, b, newSpec(busyboxImage))
			test.end(t, s)
			select {
			case <-s.Done():
			case <-time.After(60 * time.Second):
				t.Fatal("the sandbox has not ended")
			}
			if err := s.Err(); err == nil || !strings.Contains(err.Error(), test.want) {
				t.Errorf("%v, want %q", err, test.want)
			}
			if err := s.Close(ctx); err != nil {
				t.Error(err)
			}
		})
	}
}

func evict(t *testing.T, s *sandbox) {
	t.Helper()
	body := []byte(`{"apiVersion":"policy/v1","kind":"Eviction","metadata":{"name":"` + s.at.name + `","namespace":"` + s.at.namespace + `"}}`)
	err := fixture.cluster.core.Post().Namespace(s.at.namespace).Resource("pods").Name(s.at.name).SubResource("eviction").
		SetHeader("Content-Type", "application/json").Body(body).Do(context.Background()).Error()
	if err != nil {
		t.Fatal(err)
	}
}

// cordon has a node take no more pods, or take them again.
func cordon(t *testing.T, node string, on bool) {
	t.Helper()
	err := fixture.cluster.core.Patch(types.MergePatchType).Resource("nodes").Name(node).
		Body(fmt.Appendf(nil, `{"spec":{"unschedulable":%t}}`, on)).Do(context.Background()).Error()
	if err != nil {
		t.Fatal(err)
	}
}

// TestDrained: a user whose node is cleared is told so, and so is who comes while no node takes sandboxes. Afterwards all is
// as before.
func TestDrained(t *testing.T) {
	b := newBackend(t, func(c *Config) { c.ScheduleWait = time.Second })
	s := startSandbox(t, b, newSpec(busyboxImage))
	node := s.Info().Node
	t.Cleanup(func() { cordon(t, node, false) })
	cordon(t, node, true)
	evict(t, s)
	select {
	case <-s.Done():
	case <-time.After(time.Minute):
		t.Fatal("the sandbox has not ended")
	}
	if err := s.Err(); err == nil || !strings.Contains(err.Error(), "was evicted: its node is being cleared") {
		t.Errorf("%v", err)
	}
	if err := s.Close(context.Background()); err != nil {
		t.Error(err)
	}
	ctx, stop := context.WithTimeout(context.Background(), time.Minute)
	defer stop()
	var known *backends.TextError
	if _, err := b.Start(ctx, newSpec(busyboxImage)); !errors.As(err, &known) || !strings.Contains(known.Text, "no room") {
		t.Errorf("%v", err)
	}
	if left := pods(t, fixture.ns, b.ownLabels()); len(left) != 0 {
		t.Errorf("%d pods are left", len(left))
	}
	cordon(t, node, false)
	sh(t, startSandbox(t, b, newSpec(busyboxImage)), "true")
}

// TestNamespaceDeleted: sessions end with the namespace that a profile has named, others go on, and who comes later is told.
func TestNamespaceDeleted(t *testing.T) {
	requireCluster(t)
	t.Parallel()
	ns, err := fixture.makeNamespace()
	if err != nil {
		t.Fatal(err)
	}
	deleted := false
	remove := func() {
		if !deleted {
			deleted = true
			if err := fixture.removeNamespace(ns); err != nil {
				t.Error(err)
			}
		}
	}
	t.Cleanup(remove)
	b := newBackend(t, func(c *Config) { c.Namespaces = []string{ns} })
	other := startSandbox(t, b, newSpec(busyboxImage))
	spec := newSpec(busyboxImage)
	spec.Template.Namespace = ns
	s := startSandbox(t, b, spec)
	if !strings.HasPrefix(s.ID(), ns+"/") {
		t.Errorf("in %s", s.ID())
	}
	remove()
	select {
	case <-s.Done():
	case <-time.After(time.Minute):
		t.Fatal("the sandbox has not ended")
	}
	if err := s.Err(); err == nil || !strings.Contains(err.Error(), "deleted") {
		t.Errorf("%v", err)
	}
	if err := s.Close(context.Background()); err != nil {
		t.Error(err)
	}
	spec = newSpec(busyboxImage)
	spec.Template.Namespace = ns
	var known *backends.TextError
	if _, err := b.Start(context.Background(), spec); !errors.As(err, &known) || !strings.Contains(known.Text, "namespace") {
		t.Errorf("%v", err)
	}
	sh(t, other, "true")
}

func TestMounts(t *testing.T) {
	put(t, requireNamespace(t), "configmaps", &corev1.ConfigMap{
		ObjectMeta: metav1.ObjectMeta{Name: "settings"}, Data: map[string]string{"app.conf": "level=debug\n"},
	})
	put(t, fixture.ns, "secrets", &corev1.Secret{ObjectMeta: metav1.ObjectMeta{Name: "ca"}, StringData: map[string]string{"ca.crt": "certificate\n"}})
	b := newBackend(t, func(c *Config) { c.ConfigMaps, c.Secrets = []string{"settings"}, []string{"ca"} })
	spec := newSpec(busyboxImage)
	spec.Template.Scratch = "volume"
	spec.Template.Env = []string{"A=$(HOME) $$"}
	spec.Template.ExtraHosts = []string{"db.test:192.0.2.1"}
	spec.Template.Groups = []uint32{4}
	spec.Template.Mounts = []backends.Mount{
		{Type: "configmap", Source: "settings", Target: "/etc/app"},
		{Type: "secret", Source: "ca", Target: "/ca"},
		{Type: "projected", Source: "configmap:settings,secret:ca", Target: "/both"},
	}
	s := startSandbox(t, b, spec)
	for _, test := range []struct{ line, want string }{
		{"cat /etc/app/app.conf /ca/ca.crt /both/app.conf /both/ca.crt", "level=debug\ncertificate\nlevel=debug\ncertificate\n"},
		{"touch /etc/app/x", "Read-only"},
		{"touch /ca/x", "Read-only"},
		{"touch /both/x", "Read-only"},
		{"echo $A", "$(HOME) $$\n"},
		{"grep db.test /etc/hosts | tr '\\t' ' '", "192.0.2.1 db.test\n"},
		{"id -G", "1000 4\n"},
		{"grep -c ' /home/sandbox tmpfs' /proc/mounts; touch ~/x && ls ~", "0\nx\n"},
	} {
		if got := sh(t, s, test.line); !strings.Contains(got, test.want) {
			t.Errorf("%s: %q, want %q", test.line, got, test.want)
		}
	}
}

func requireNamespace(t *testing.T) string {
	requireCluster(t)
	return fixture.ns
}

// TestPolicies looks at the objects; whether they are enforced is the cluster's network's business.
func TestPolicies(t *testing.T) {
	ns := newNamespace(t)
	ctx := context.Background()
	get := func(name string) networkingv1.NetworkPolicy {
		t.Helper()
		var p networkingv1.NetworkPolicy
		if err := fixture.cluster.get(ctx, ns, "networkpolicies", name, &p); err != nil {
			t.Fatal(err)
		}
		return p
	}
	db := Network{Egress: []Egress{{CIDR: "192.0.2.0/24", TCP: []int32{5432}}}}
	b := newBackend(t, func(c *Config) { c.Namespace, c.Networks = ns, map[string]Network{"db": db} })
	s := startSandbox(t, b, newSpec(busyboxImage))
	s.Close(ctx)
	if p := get("sallyport-none"); len(p.Spec.Egress)+len(p.Spec.Ingress) != 0 || len(p.Spec.PolicyTypes) != 2 {
		t.Errorf("%+v", p.Spec)
	}
	if err := b.ensurePolicy(ctx, ns, "db"); err != nil {
		t.Fatal(err)
	}
	if p := get("sallyport-db"); len(p.Spec.Egress) != 1 || p.Spec.Egress[0].To[0].IPBlock.CIDR != "192.0.2.0/24" {
		t.Errorf("%+v", p.Spec)
	}
	// Changed by somebody, it is put right at the next look.
	p := get("sallyport-db")
	p.Spec.Egress = append(p.Spec.Egress, networkingv1.NetworkPolicyEgressRule{})
	if err := fixture.cluster.update(ctx, ns, "networkpolicies", p.Name, &p, &networkingv1.NetworkPolicy{}); err != nil {
		t.Fatal(err)
	}
	b.policies = policyCache{}
	if err := b.ensurePolicy(ctx, ns, "db"); err != nil {
		t.Fatal(err)
	}
	if p := get("sallyport-db"); len(p.Spec.Egress) != 1 {
		t.Errorf("%+v", p.Spec)
	}
	// One that is not the gate's is left alone, and no sandbox starts in its place.
	p = get("sallyport-db")
	p.Labels = nil
	if err := fixture.cluster.update(ctx, ns, "networkpolicies", p.Name, &p, &networkingv1.NetworkPolicy{}); err != nil {
		t.Fatal(err)
	}
	b.policies = policyCache{}
	spec := newSpec(busyboxImage)
	spec.Template.Network = "db"
	if _, err := b.Start(ctx, spec); err == nil || !strings.Contains(err.Error(), "not the gate's") {
		t.Errorf("%v", err)
	}

	refer := newBackend(t, func(c *Config) {
		c.Namespace, c.PolicyMode = ns, "refer"
		c.Networks = map[string]Network{"db": {Policy: "sallyport-none"}, "x": {Policy: "missing"}}
	})
	for network, want := range map[string]string{"none": "", "db": "does not select", "x": "not found"} {
		err := refer.ensurePolicy(ctx, ns, network)
		if want == "" && err != nil || want != "" && (err == nil || !strings.Contains(err.Error(), want)) {
			t.Errorf("%s: %v, want %q", network, err, want)
		}
	}
}
