package kubernetes

import (
	"context"
	"fmt"
	"net"
	"net/http"
	"strconv"
	"strings"
	"testing"
	"time"

	corev1 "k8s.io/api/core/v1"

	"github.com/sallyport/sallyport/backends"
	"github.com/sallyport/sallyport/backends/backendtest"
)

// direct has pods dialled. The tests' cluster is on this machine, which is a node of it.
func direct(c *Config) {
	c.Stream, c.DirectFrom = streamDirect, []Peer{{CIDR: "192.0.2.0/24"}}
}

// TestDirectContract is the whole contract, with sandboxes that are dialled.
func TestDirectContract(t *testing.T) {
	b := newBackend(t, direct)
	backendtest.Run(t, backendtest.Subject{
		Backend: b,
		Spec:    func() backends.Spec { return newSpec(busyboxImage) },
		Own:     insideDir,
		Kill: func(s backends.Sandbox) error {
			k := s.(*sandbox)
			return fixture.cluster.deletePod(context.Background(), k.at.namespace, k.at.name, k.uid)
		},
	})
}

// TestDirect: the port is the gate's alone and closed once it has come; what the policy says; and a session that is dialled goes
// on without the API server, whose end a relayed one would share.
func TestDirect(t *testing.T) {
	f := newFaulty(t)
	b := newBackend(t, func(c *Config) { c.Kubeconfig = f.config; direct(c) })
	s := startSandbox(t, b, newSpec(busyboxImage))
	port := strconv.Itoa(int(b.config.DirectPort))
	for _, a := range s.pin.Addresses {
		if c, err := net.DialTimeout("tcp", net.JoinHostPort(a.String(), port), time.Minute); err == nil {
			c.Close()
			t.Errorf("%s: the agent listens still", a)
		}
	}
	if got := sh(t, s, "ls -A /tmp; nc -w 5 127.0.0.1 "+port+" </dev/null && echo listens"); got != "nc: can't connect to remote host (127.0.0.1): Connection refused\n" {
		t.Errorf("%q", got)
	}
	p := policyOf(b.config, "ns", noNetwork)
	if r := p.Spec.Ingress; len(r) != 1 || len(r[0].Ports) != 1 || r[0].Ports[0].Port.String() != port || r[0].From[0].IPBlock.CIDR != "192.0.2.0/24" {
		t.Errorf("%+v", r)
	}
	text := fmt.Sprint(s.Info().Spec.(*corev1.Pod).Spec.Containers[0].Args)
	if !strings.Contains(text, "--direct :"+port) {
		t.Error(text)
	}

	f.when(func(http.ResponseWriter, *http.Request) bool { panic(http.ErrAbortHandler) })
	f.cut()
	if got := sh(t, s, "echo on"); got != "on\n" {
		t.Errorf("%q", got)
	}
	f.when(nil)
	// Its fate is heard of again.
	waitFor(t, "the API server", func() bool { return b.Ready(context.Background()) == nil })
	if err := fixture.cluster.deletePod(context.Background(), s.at.namespace, s.at.name, s.uid); err != nil {
		t.Fatal(err)
	}
	select {
	case <-s.Done():
	case <-time.After(2 * time.Minute):
		t.Fatal("the sandbox has not ended")
	}
}
