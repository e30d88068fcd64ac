package kubernetes

import (
	"cmp"
	"context"
	"crypto/ed25519"
	"errors"
	"fmt"
	"net"
	"net/http"
	"net/netip"
	"sync"
	"time"

	apierrors "k8s.io/apimachinery/pkg/api/errors"

	"github.com/sallyport/sallyport/agent"
	"github.com/sallyport/sallyport/backends"
)

// inside is what a sandbox of a pod of its own and one in a target have in common: an agent, and the way to it.
type inside struct {
	backend *Backend
	session string
	info    backends.Info
	client  *agent.Client // set before the sandbox is given out

	done chan struct{}
	err  error // set before done is closed

	ended   chan struct{}
	endOnce sync.Once // closes ended: Close was called
}

func (b *Backend) inside(spec backends.Spec) inside {
	return inside{backend: b, session: spec.Owner.Session, done: make(chan struct{}), ended: make(chan struct{})}
}

// attempts paces how often the relay is tried: soon and often at first, as the cluster's word that a container runs comes up to
// a second after it does, and then ever less, as while an image is pulled.
func attempts(since time.Duration) time.Duration {
	switch {
	case since < 3*time.Second:
		return 20 * time.Millisecond
	case since < 15*time.Second:
		return 100 * time.Millisecond
	}
	return 500 * time.Millisecond
}

// lookEvery is the time between looks at why a container does not come up: most have come up before the first.
const lookEvery = 1500 * time.Millisecond

// reach tries until the agent answers. Between attempts, look hears what the last one met, and whether it is time to ask the
// cluster; an error of its ends the start.
func (s *inside) reach(ctx context.Context, try func(over protocol) (*agent.Client, error), look func(err error, due bool) error) error {
	began := time.Now()
	looked := began
	var last error
	unauthorized := 0 // once in a row is a token that has just been renewed
	for {
		client, early, err := attempt(ctx, func(over protocol) (*agent.Client, error) {
			if err := s.backend.tries.Wait(ctx); err != nil {
				return nil, err
			}
			return try(over)
		})
		if err == nil {
			s.client = client
			return nil
		}
		if ctx.Err() != nil {
			// What the last attempt met says more than that the time is over.
			return late(ctx, cmp.Or(last, err))
		}
		last = err
		wait := attempts(time.Since(began))
		if !early {
			wait = max(wait, webSocketPause)
		}
		switch status := answered(err); {
		case mayNot(err, "create"):
			return notLetIn(err)
		case status == nil:
		case apierrors.IsUnauthorized(status) && unauthorized == 0:
			unauthorized++
		case apierrors.IsForbidden(status), apierrors.IsUnauthorized(status):
			return notLetIn(err)
		case apierrors.IsTooManyRequests(status), status.Status().Code == http.StatusServiceUnavailable:
			wait = max(wait, time.Second)
		}
		due := time.Since(looked) > lookEvery
		if due {
			looked = time.Now()
		}
		if err := look(err, due); err != nil {
			return err
		}
		select {
		case <-ctx.Done():
		case <-time.After(wait):
		}
	}
}

func notLetIn(err error) error {
	return &backends.TextError{Text: "the cluster does not let this gate into its sandboxes: tell an operator", Err: err}
}

// noPod says that an attempt was answered with: there is no such pod.
func noPod(err error) bool {
	status := answered(err)
	return status != nil && apierrors.IsNotFound(status) && status.Status().Details != nil && status.Status().Details.Kind == "pods"
}

// late is the end of a start whose time is over.
func late(ctx context.Context, last error) error {
	cause := context.Cause(ctx)
	if errors.Is(cause, context.DeadlineExceeded) {
		// It is also what the caller is told when nothing is known.
		return fmt.Errorf("reach the agent: %w; at last: %w", cause, last)
	}
	return cause
}

// relay makes one attempt to reach an agent, by a program that the cluster executes beside it.
func (b *Backend) relay(
	ctx context.Context, at slot, container string, over protocol, key ed25519.PrivateKey, hello agent.Hello, flags ...string,
) (*agent.Client, error) {
	stream, err := b.cluster.execIn(ctx, at, container, over, append([]string{insideAgent, "relay", "--socket", insideRelay}, flags...)...)
	if err != nil {
		return nil, err
	}
	client, err := agent.NewClient(ctx, stream, key, hello)
	if err == nil {
		return client, nil
	}
	stream.Close()
	if why := stream.why(); why != nil && ctx.Err() == nil {
		return nil, fmt.Errorf("%w: %w", err, why)
	}
	return nil, err
}

// end says that the sandbox is closed, and ends its agent.
func (s *inside) end() {
	s.endOnce.Do(func() { close(s.ended) })
	s.client.Close()
}

func (s *inside) Info() backends.Info   { return s.info }
func (s *inside) Done() <-chan struct{} { return s.done }

func (s *inside) Err() error {
	select {
	case <-s.done:
		return s.err
	default:
		return nil
	}
}

func (s *inside) Exec(ctx context.Context, p backends.Process) (backends.ExitStatus, error) {
	return s.client.Exec(ctx, p)
}

func (s *inside) Resolve(ctx context.Context, host string) ([]netip.Addr, error) {
	return s.client.Resolve(ctx, host)
}

func (s *inside) DialContext(ctx context.Context, network, address string) (net.Conn, error) {
	return s.client.DialContext(ctx, network, address)
}

func (s *inside) Listen(ctx context.Context, network, address string) (net.Listener, error) {
	return s.client.Listen(ctx, network, address)
}
