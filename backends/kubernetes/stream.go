package kubernetes

import (
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"slices"
	"strings"
	"sync"
	"time"

	"github.com/go-logr/logr"
	corev1 "k8s.io/api/core/v1"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	"k8s.io/client-go/tools/remotecommand"
	"k8s.io/klog/v2"
	"k8s.io/streaming/pkg/httpstream"

	"github.com/sallyport/sallyport/agent"
)

// protocol is what a stream is upgraded to.
type protocol bool

// An agent is tried over SPDY until it is there. Over WebSocket, each exec in a container that does not run yet leaves a connection
// to the kubelet in the API server for good (measured on Kubernetes 1.35.4; over SPDY none does), and there are some such with each
// login. But SPDY's errors are text alone, and a proxy before the API server may not let it through: what is not known to mean
// "not yet" is tried over WebSocket.
const (
	overSPDY      protocol = false
	overWebSocket protocol = true
)

// webSocketPause is the least time between two attempts over WebSocket.
const webSocketPause = time.Second

// attempt tries to reach an agent, over SPDY and, if need be, over WebSocket. It says whether that came before the container did.
func attempt(ctx context.Context, try func(over protocol) (*agent.Client, error)) (client *agent.Client, early bool, err error) {
	client, err = try(overSPDY)
	if err == nil || ctx.Err() != nil {
		return client, false, err
	}
	if notYet(err) {
		return nil, true, err
	}
	client, other := try(overWebSocket)
	if other != nil && mayNot(other, "get") {
		return nil, false, err // the gate's role is for SPDY alone
	}
	return client, false, other
}

// mayNot says that the gate lacks a right: "create" is SPDY's, and WebSocket's too from Kubernetes 1.35 on, beside "get".
func mayNot(err error, verb string) bool {
	return strings.Contains(err.Error(), "cannot "+verb+` resource "pods/exec"`)
}

// notYet says that an attempt over SPDY came before the container did.
func notYet(err error) bool {
	text := err.Error()
	return slices.ContainsFunc([]string{
		"container not found (",               // kubelet
		"pod does not exist",                  // kubelet that has not heard of it yet
		"does not have a host assigned",       // API server: no node yet
		"is in CONTAINER_CREATED state",       // containerd
		"is in CONTAINER_EXITED state",        // containerd; the watch says why
		"container is not created or running", // CRI-O
	}, func(s string) bool { return strings.Contains(text, s) })
}

// stream is a program's stdin and stdout in a pod, as a connection.
type stream struct {
	net.Conn // the near end

	stop  context.CancelFunc
	ended chan struct{}
	err   error // why it ended; set before ended is closed
}

// exec starts a program in the pod's main container: see execIn.
func (k *cluster) exec(ctx context.Context, at slot, over protocol, command ...string) (*stream, error) {
	return k.execIn(ctx, at, mainContainer, over, command...)
}

// execIn starts a program in a container of the pod's (pods/exec). It does not wait for an answer: a stream that could not be
// had ends at once, and its err says why.
func (k *cluster) execIn(ctx context.Context, at slot, container string, over protocol, command ...string) (*stream, error) {
	r := k.core.Post().Namespace(at.namespace).Resource("pods").Name(at.name).SubResource("exec").
		VersionedParams(&corev1.PodExecOptions{
			Container: container, Command: command, Stdin: true, Stdout: true, Stderr: true,
		}, k.params)
	var e remotecommand.Executor
	var err error
	if over == overWebSocket {
		e, err = remotecommand.NewWebSocketExecutor(k.config, http.MethodGet, r.URL().String())
	} else {
		e, err = remotecommand.NewSPDYExecutor(k.config, http.MethodPost, r.URL())
	}
	if err != nil {
		return nil, err
	}
	near, far := net.Pipe()
	// client-go tells its own log what it also returns, each time that a relay is not there yet.
	ctx, stop := context.WithCancel(klog.NewContext(context.WithoutCancel(ctx), logr.Discard()))
	s := &stream{Conn: near, stop: stop, ended: make(chan struct{})}
	go func() {
		defer close(s.ended)
		defer stop()
		var said tail
		err := e.StreamWithContext(ctx, remotecommand.StreamOptions{Stdin: far, Stdout: output{far}, Stderr: &said})
		far.Close()
		if err == nil {
			err = errors.New("the program ended")
		}
		if text := said.String(); text != "" {
			err = fmt.Errorf("%w: %s", err, text)
		}
		s.err = err
	}()
	return s, nil
}

// streamEnd bounds the wait for the end of a stream. A SPDY upgrade that nobody answers does not look at its context.
const streamEnd = 2 * time.Second

// Close implements net.Conn. It returns when nothing of the stream is used any more, or a little later.
func (s *stream) Close() error {
	err := s.Conn.Close()
	s.stop()
	select {
	case <-s.ended:
	case <-time.After(streamEnd):
	}
	return err
}

// why is why the stream ended; nil if it has not.
func (s *stream) why() error {
	select {
	case <-s.ended:
		return s.err
	default:
		return nil
	}
}

// output is what a program's output is written to. client-go would hold 32 KiB for it as long as the stream lives, and most
// streams are idle.
type output struct{ io.Writer }

// busyBuffers are for outputs of which more comes than idle streams pass.
var busyBuffers = sync.Pool{New: func() any {
	b := make([]byte, 32<<10)
	return &b
}}

// ReadFrom implements io.ReaderFrom.
func (o output) ReadFrom(r io.Reader) (int64, error) {
	var idle [2 << 10]byte
	var busy *[]byte
	b, total := idle[:], int64(0)
	for {
		n, err := r.Read(b)
		if n > 0 {
			if _, werr := o.Write(b[:n]); werr != nil {
				err = werr
			}
			total += int64(n)
		}
		switch {
		case n == len(idle) && busy == nil && err == nil:
			busy = busyBuffers.Get().(*[]byte)
			b = *busy
		case busy != nil && (n < len(idle) || err != nil):
			busyBuffers.Put(busy)
			b, busy = idle[:], nil
		}
		if errors.Is(err, io.EOF) {
			return total, nil
		}
		if err != nil {
			return total, err
		}
	}
}

// maxTail bounds what is kept of a program's error output.
const maxTail = 1 << 10

// tail keeps the first of what is written, for a message. Two goroutines of the executor's may write and end.
type tail struct {
	mu sync.Mutex // guards b
	b  []byte
}

func (t *tail) Write(b []byte) (int, error) {
	t.mu.Lock()
	defer t.mu.Unlock()
	t.b = append(t.b, b[:min(len(b), maxTail-len(t.b))]...)
	return len(b), nil
}

// ReadFrom implements io.ReaderFrom, for the same reason as output's.
func (t *tail) ReadFrom(r io.Reader) (int64, error) {
	return io.CopyBuffer(struct{ io.Writer }{t}, r, make([]byte, maxTail))
}

func (t *tail) String() string {
	t.mu.Lock()
	defer t.mu.Unlock()
	return strings.TrimSpace(string(t.b))
}

// answered gives what the API server itself said to a request for a stream, or nil if something before it answered, or
// nobody.
func answered(err error) *apierrors.StatusError {
	var upgrade *httpstream.UpgradeFailureError
	if errors.As(err, &upgrade) {
		err = upgrade.Cause
	}
	var status *apierrors.StatusError
	if errors.As(err, &status) {
		return status
	}
	return nil
}
