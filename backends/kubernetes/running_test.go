package kubernetes

import (
	"encoding/json"
	"fmt"
	"log/slog"
	"net/http"
	"net/http/httptest"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"

	"github.com/sallyport/sallyport/backends"
)

// Sessions that have joined a target are listed with the others, by what their containers say; another gate's end is refused, with
// the gate that can. What a container says is anyone's who may add one: odd ones are left out.
func TestRunningGuests(t *testing.T) {
	began := time.Date(2026, 3, 1, 12, 0, 0, 0, time.UTC)
	guest := func(session, user string) corev1.EphemeralContainer {
		spec := backends.Spec{Owner: backends.Owner{Session: session, User: user, Profile: "debug", Grant: "OPS-$1"},
			Template: backends.Template{Image: "debug:1", Env: []string{"A=b"}, Target: &backends.Target{Namespace: "payments"}}, Join: &backends.Running{}}
		c, err := ephemeral(spec, "gate-2-abc", targetPrefix+"x-"+session, "key")
		if err != nil {
			t.Fatal(err)
		}
		return c
	}
	pod := func(ns, name string, ended bool, containers ...corev1.EphemeralContainer) corev1.Pod {
		p := corev1.Pod{ObjectMeta: metav1.ObjectMeta{Name: name, Namespace: ns}, Spec: corev1.PodSpec{EphemeralContainers: containers}}
		for _, c := range containers {
			state := corev1.ContainerState{Running: &corev1.ContainerStateRunning{StartedAt: metav1.NewTime(began)}}
			if ended {
				state = corev1.ContainerState{Terminated: &corev1.ContainerStateTerminated{}}
			}
			p.Status.EphemeralContainerStatuses = append(p.Status.EphemeralContainerStatuses, corev1.ContainerStatus{Name: c.Name, State: state})
		}
		return p
	}
	odd, foreign, mute := guest("s9", "x"), guest("s8", "x"), guest("s7", "x")
	odd.Env[len(odd.Env)-1].Value = `{"session":"../\u001b[2J"}`
	foreign.Name = "debugger-s8"
	mute.Env = nil
	forged := guest("s1", "mallory")
	forged.Name += "-x"
	own := corev1.Pod{ObjectMeta: metav1.ObjectMeta{Name: "own", Namespace: "sandboxes", CreationTimestamp: metav1.NewTime(began),
		Annotations: map[string]string{labelSession: "s5", labelServer: "gate-1-abc", labelUser: "bob"}}}
	pages := [][]corev1.Pod{ // of the targets' namespace
		{pod("payments", "db-0", false, guest("s1", "alice"), odd, foreign, mute), pod("payments", "db-1", true, guest("s2", "alice"))},
		{pod("payments", "db-2", false, guest("s3", "carol"), guest("s5", "mallory")), pod("payments", "db-3", false, forged)},
	}
	server := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		list := corev1.PodList{TypeMeta: metav1.TypeMeta{APIVersion: "v1", Kind: "PodList"}}
		switch query := r.URL.Query(); {
		case r.URL.Path == "/api/v1/namespaces/sandboxes/pods":
			if selector := query.Get("labelSelector"); !strings.Contains(selector, labelSession) {
				list.Items = []corev1.Pod{own}
			}
		case r.URL.Path != "/api/v1/namespaces/payments/pods" || query.Get("labelSelector") != "debug=yes":
			http.Error(w, r.URL.String(), http.StatusTeapot)
			return
		case query.Get("continue") == "":
			list.Items, list.Continue = pages[0], "next"
		default:
			list.Items = pages[1]
		}
		w.Header().Set("Content-Type", "application/json")
		if err := json.NewEncoder(w).Encode(list); err != nil {
			t.Error(err)
		}
	}))
	defer server.Close()
	config := filepath.Join(t.TempDir(), "kubeconfig")
	if err := os.WriteFile(config, fmt.Appendf(nil, `{"apiVersion": "v1", "kind": "Config", "current-context": "a", "clusters": [{"name": "a", "cluster": {"server": %q}}],
		"users": [{"name": "a", "user": {}}], "contexts": [{"name": "a", "context": {"cluster": "a", "user": "a"}}]}`, server.URL), 0o600); err != nil {
		t.Fatal(err)
	}
	c := Config{Kubeconfig: config, Namespace: "sandboxes", Targets: Targets{Namespaces: []string{"forbidden", "payments"}, Labels: map[string]string{"debug": "yes"}}}
	k, err := newCluster(c, slog.New(slog.DiscardHandler))
	if err != nil {
		t.Fatal(err)
	}
	b := &Backend{config: c, cluster: k, log: slog.New(slog.DiscardHandler)}
	all, err := b.Running(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	var got []string
	for _, s := range all {
		if !s.Started.Equal(began) {
			t.Errorf("%s started at %v", s.Session, s.Started)
		}
		got = append(got, strings.Join([]string{s.Session, s.Server, s.User, s.Profile, s.Grant, s.ID}, " "))
	}
	want := []string{"s1 gate-2-abc alice debug OPS-$1 payments/db-0/sallyport-x-s1", "s1 gate-2-abc mallory debug OPS-$1 payments/db-3/sallyport-x-s1-x", "s3 gate-2-abc carol debug OPS-$1 payments/db-2/sallyport-x-s3", "s5 gate-1-abc bob   sandboxes/own"}
	if strings.Join(got, "\n") != strings.Join(want, "\n") {
		t.Errorf("got\n%s\nwant\n%s", strings.Join(got, "\n"), strings.Join(want, "\n"))
	}
	if s, err := b.EndRunning(t.Context(), "s3"); s != nil || err == nil || !strings.Contains(err.Error(), `only its gate can end it, "gate-2-abc" (by payments/db-2/sallyport-x-s3)`) {
		t.Errorf("end: %v %v", s, err)
	}
	if s, err := b.EndRunning(t.Context(), "s2"); s != nil || err == nil || !strings.Contains(err.Error(), "in namespace forbidden") {
		t.Errorf("end of one that has ended: %v %v", s, err)
	}
}
