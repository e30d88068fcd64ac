package kubernetes

import (
	"context"
	"encoding/json"
	"strings"
	"testing"
	"time"

	"github.com/sallyport/sallyport/backends"
)

// TestTemplateOnCluster: a cluster that enforces "restricted" takes what a template may bring, and nothing of it is left.
func TestTemplateOnCluster(t *testing.T) {
	b := newBackend(t, func(c *Config) {
		c.PodTemplates, c.PodLabels, c.Containers = true, []string{"team"}, []string{"sallyport/*"}
	})
	spec := newSpec(busyboxImage)
	spec.Template.Spread = []string{"kubernetes.io/hostname"}
	spec.Template.Pod = json.RawMessage(`{"metadata":{"labels":{"team":"payments"}},"spec":{
		"volumes":[{"name":"shared","emptyDir":{"sizeLimit":"1Mi"}}],
		"topologySpreadConstraints":[{"topologyKey":"kubernetes.io/hostname","maxSkew":100}],
		"containers":[{"name":"sandbox","env":[{"name":"TEAM","valueFrom":{"fieldRef":{"fieldPath":"metadata.labels['team']"}}}],
			"volumeMounts":[{"name":"shared","mountPath":"/shared"}]}],
		"initContainers":[{"name":"tool","image":"` + busyboxImage + `","imagePullPolicy":"Never","restartPolicy":"Always",
			"command":["sh","-c","id -u >/shared/from; exec sleep 100000"],
			"volumeMounts":[{"name":"shared","mountPath":"/shared"}],
			"securityContext":{"allowPrivilegeEscalation":false,"readOnlyRootFilesystem":true,"capabilities":{"drop":["ALL"]}},
			"resources":{"requests":{"memory":"16Mi","cpu":"1m","ephemeral-storage":"16Mi"},
				"limits":{"memory":"64Mi","cpu":"100m","ephemeral-storage":"64Mi"}}}]}}`)
	s := startSandbox(t, b, spec)
	if got := sh(t, s, "echo $TEAM; until cat /shared/from; do sleep 0.1; done 2>/dev/null; touch /shared/x; grep -l sleep /proc/[0-9]*/comm | wc -l"); got != "payments\n1000\n0\n" {
		t.Errorf("%q", got)
	}
	// A gate that is gone: the pod finishes, though a container of the template would go on.
	s.client.Close()
	waitFor(t, "the pod to end", func() bool {
		for _, p := range pods(t, fixture.ns, b.ownLabels()) {
			if p.UID == s.uid {
				return finished(&p)
			}
		}
		return true
	})
}

// TestDigest: an image that was named by its tag is known by its digest, however short the session is.
func TestDigest(t *testing.T) {
	b := newBackend(t, nil)
	ctx, stop := context.WithTimeout(context.Background(), time.Minute)
	defer stop()
	first := startSandbox(t, b, newSpec(busyboxImage))
	digest := first.Digest()(ctx)
	if !strings.Contains(digest, "sha256:") {
		t.Fatalf("%q", digest)
	}
	short, err := b.Start(ctx, newSpec(busyboxImage))
	if err != nil {
		t.Fatal(err)
	}
	wait := short.(backends.Identified).Digest()
	if err := short.Close(ctx); err != nil {
		t.Error(err)
	}
	if d := wait(ctx); d != digest {
		t.Errorf("%q, and of a longer session %q", d, digest)
	}
	// Who asks of one that is gone is not kept.
	gone, err := b.Start(ctx, newSpec(busyboxImage))
	if err != nil {
		t.Fatal(err)
	}
	if err := gone.Close(ctx); err != nil {
		t.Error(err)
	}
	gone.(*sandbox).Digest()(ctx)
	if ctx.Err() != nil {
		t.Error("waited for the digest of a sandbox that is gone")
	}
}
