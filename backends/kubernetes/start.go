package kubernetes

import (
	"context"
	"crypto/ed25519"
	"encoding/base64"
	"errors"
	"fmt"
	"strings"
	"sync"
	"time"

	corev1 "k8s.io/api/core/v1"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	"k8s.io/apimachinery/pkg/types"

	"github.com/sallyport/sallyport/agent"
	"github.com/sallyport/sallyport/backends"
)

// insideRelay is where the agent and its relay meet. No process of the session exists before that.
const insideRelay = agent.RelaySocket

// sandbox is one pod. Its life: Start registers it in live, creates the pod under a free name, and reaches its agent through
// a relay; watch sees its end; Close removes it.
type sandbox struct {
	inside
	pin agent.Pin // of an agent that is dialled, when it is known

	told  chan struct{}            // closed when digest is set
	death chan *backends.TextError // why the pod failed or ended, once, as the cluster tells it

	mu            sync.Mutex // guards what follows
	at            slot       // empty before a name was tried
	uid           types.UID  // empty before the pod is known to exist
	node          string     // empty before the pod is scheduled
	digest        string     // of the image that runs; empty before the cluster has told
	asking        int        // how many wait for the digest
	unschedulable string     // why it can't be scheduled, as far as is known
	since         time.Time  // that this is so

	closing sync.Mutex    // held by the Close that removes
	gone    bool          // guarded by closing: all is removed
	removed chan struct{} // closed when the first attempt to remove it has ended

	removedOnce sync.Once // closes removed
}

var (
	_ backends.Sandbox    = (*sandbox)(nil)
	_ backends.Dialer     = (*sandbox)(nil)
	_ backends.Listener   = (*sandbox)(nil)
	_ backends.Identified = (*sandbox)(nil)
)

// Start implements backends.Backend.
func (b *Backend) Start(ctx context.Context, spec backends.Spec) (backends.Sandbox, error) {
	if spec.Template.Target != nil {
		return b.startGuest(ctx, spec)
	}
	spec, err := b.check(spec)
	if err != nil {
		return nil, fmt.Errorf("kubernetes: %w", err)
	}
	s := &sandbox{
		inside: b.inside(spec),
		told:   make(chan struct{}), death: make(chan *backends.TextError, 1), removed: make(chan struct{}),
	}
	b.mu.Lock()
	_, twice := b.live[s.session]
	if !twice {
		b.live[s.session] = s
	}
	b.mu.Unlock()
	if twice {
		return nil, errors.New("kubernetes: the session has a sandbox already")
	}
	if err := s.start(ctx, spec); err != nil {
		err = fmt.Errorf("kubernetes: %w", err)
		if rerr := s.remove(ctx); rerr != nil {
			err = errors.Join(err, rerr)
		}
		return nil, err
	}
	go s.watch()
	return s, nil
}

func (s *sandbox) start(ctx context.Context, spec backends.Spec) error {
	if ctx.Err() != nil {
		return context.Cause(ctx)
	}
	b, t := s.backend, spec.Template
	public, private, err := ed25519.GenerateKey(nil)
	if err != nil {
		return err
	}
	if err := b.ensurePolicy(ctx, t.Namespace, t.Network); err != nil {
		return failed("make the network policy", err)
	}
	pod, err := s.create(ctx, spec, base64.StdEncoding.EncodeToString(public))
	if err != nil {
		return err
	}
	pod.ManagedFields = nil
	s.info = backends.Info{Backend: "kubernetes", Image: t.Image, Digest: pinned(t.Image), Spec: pod}
	err = s.reach(ctx, private, agent.Hello{
		User: spec.Owner.User, Deadline: spec.Owner.Expires, Audit: t.ExecAudit, Reports: spec.Reports,
	})
	if err != nil {
		return err
	}
	s.mu.Lock()
	s.info.Node = s.node
	if s.info.Digest == "" {
		s.info.Digest = s.digest
	}
	s.mu.Unlock()
	s.info.ExecAudit = s.client.ExecAudit()
	return nil
}

// failed adds words for the user to the API server's refusal.
func failed(what string, err error) error {
	err = fmt.Errorf("%s: %w", what, err)
	if text := refusal(err); text != "" {
		return &backends.TextError{Text: text, Err: err}
	}
	return err
}

// pinned is the digest in a reference. Which image a tag was is told by the cluster, mostly after the session has begun.
func pinned(reference string) string {
	if _, digest, ok := strings.Cut(reference, "@"); ok && digest != "" {
		return reference
	}
	return ""
}

// create makes the pod under the first name of the user's that is free. A name that is taken is the API server's answer, so
// the limit holds over all gates.
func (s *sandbox) create(ctx context.Context, spec backends.Spec, key string) (*corev1.Pod, error) {
	b := s.backend
	owner, err := b.ownerIn(ctx, spec.Template.Namespace)
	if err != nil {
		return nil, err
	}
	// A request given up half-way leaves nobody knows what.
	detachedCtx, stop := detached(ctx)
	defer stop()
	for _, sweep := range []bool{false, true} {
		for n := range b.config.MaxPerUser {
			if ctx.Err() != nil {
				return nil, context.Cause(ctx)
			}
			at := slotOf(spec.Template.Namespace, spec.Owner.User, n)
			if !s.take(at) {
				continue
			}
			if sweep {
				// What has finished is an object still, until some gate removes it.
				if free, err := b.sweep(detachedCtx, at); err != nil || !free {
					s.release()
					if err != nil {
						return nil, failed("look at the user's pods", err)
					}
					continue
				}
			}
			pod, err := b.pod(spec, key, at, owner)
			if err != nil {
				s.release()
				return nil, err
			}
			var made corev1.Pod
			err = b.cluster.create(detachedCtx, at.namespace, "pods", pod, &made)
			switch {
			case err == nil:
				s.mu.Lock()
				s.uid = made.UID
				s.mu.Unlock()
				return &made, nil
			case apierrors.IsAlreadyExists(err):
				s.release()
			default:
				return nil, failed("create the pod", err)
			}
		}
	}
	return nil, &backends.TextError{
		Text: fmt.Sprintf("you have %d sandboxes already: end one of them first", b.config.MaxPerUser),
		Err:  errors.New("all of the user's pod names are taken (max_per_user)"),
	}
}

// take takes a name, if no other sandbox of this gate has it.
func (s *sandbox) take(at slot) bool {
	b := s.backend
	b.mu.Lock()
	taken := b.used[at]
	if !taken {
		b.used[at] = true
	}
	b.mu.Unlock()
	if !taken {
		s.mu.Lock()
		s.at = at
		s.mu.Unlock()
	}
	return !taken
}

// release gives the name back.
func (s *sandbox) release() {
	s.mu.Lock()
	at := s.at
	s.at, s.uid = slot{}, ""
	s.mu.Unlock()
	s.backend.mu.Lock()
	delete(s.backend.used, at)
	s.backend.mu.Unlock()
}

// sweep removes the pod of that name if it has finished, and says whether the name is free then.
func (b *Backend) sweep(ctx context.Context, at slot) (bool, error) {
	var pod corev1.Pod
	err := b.cluster.get(ctx, at.namespace, "pods", at.name, &pod)
	if apierrors.IsNotFound(err) {
		return true, nil
	}
	if err != nil || pod.Labels[labelManaged] != managed || !finished(&pod) {
		return false, err
	}
	return true, b.cluster.deletePod(ctx, at.namespace, at.name, pod.UID)
}

// reach gets to the agent by its relay, and proves the gate to it.
func (s *sandbox) reach(ctx context.Context, key ed25519.PrivateKey, hello agent.Hello) error {
	ctx, cancel := context.WithCancelCause(ctx)
	defer cancel(nil)
	over := make(chan struct{})
	defer close(over)
	go func() {
		select {
		case why := <-s.death:
			cancel(why)
		case <-over:
		}
	}()
	s.mu.Lock()
	at := s.at
	s.mu.Unlock()
	try := func(over protocol) (*agent.Client, error) {
		return s.backend.relay(ctx, at, mainContainer, over, key, hello)
	}
	if s.backend.config.Stream == streamDirect {
		try = func(over protocol) (*agent.Client, error) { return s.dial(ctx, at, over, key, hello) }
	}
	return s.inside.reach(ctx, try, func(err error, due bool) error {
		if noPod(err) {
			return &backends.TextError{Text: "the sandbox was removed while it started: try again", Err: err}
		}
		if err := s.unscheduled(); err != nil || !due {
			return err
		}
		return s.lookAtEvents(ctx)
	})
}

// dial makes one attempt to reach the agent at the pod's address. Its key is asked for first, by way of the API server, and once.
func (s *sandbox) dial(ctx context.Context, at slot, over protocol, key ed25519.PrivateKey, hello agent.Hello) (*agent.Client, error) {
	if s.pin.Key == nil {
		stream, err := s.backend.cluster.exec(ctx, at, over, insideAgent, "pin", "--socket", insideRelay)
		if err != nil {
			return nil, err
		}
		stop := context.AfterFunc(ctx, func() { stream.Close() })
		defer stop()
		stream.SetDeadline(time.Now().Add(answerWait))
		pin, err := agent.ReadPin(stream)
		stream.Close()
		if err != nil {
			if why := stream.why(); why != nil && ctx.Err() == nil {
				return nil, fmt.Errorf("%w: %w", err, why)
			}
			return nil, err
		}
		s.pin = pin
	}
	conn, err := agent.DialDirect(ctx, s.pin, s.backend.config.DirectPort, key)
	if err != nil {
		return nil, err
	}
	return agent.NewClient(ctx, conn, key, hello)
}

func (s *sandbox) ID() string {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.at.namespace + "/" + s.at.name
}

// deathWait is how long the cluster's word about an end is waited for: a kubelet looks once a second.
const deathWait = 3 * time.Second

// watch finds out why the sandbox ended.
func (s *sandbox) watch() {
	defer close(s.done)
	var why *backends.TextError
	select {
	case <-s.ended:
		return
	case why = <-s.death:
		// The pod ends, or is said to have ended: an evicted one may go on for a while.
		s.client.Close()
	case <-s.client.Done():
		s.err = s.client.Err()
		select {
		case why = <-s.death:
		case <-s.ended:
			return
		case <-time.After(deathWait):
		}
	}
	switch {
	case why != nil:
		s.err = why
	case s.err == nil:
		s.err = errors.New("the sandbox ended")
	default:
		s.mu.Lock()
		s.err = fmt.Errorf("%w; the cluster has said nothing of the pod, on node %q", s.err, s.node)
		s.mu.Unlock()
	}
}

// Close implements backends.Sandbox.
func (s *sandbox) Close(ctx context.Context) error {
	s.end()
	s.awaitDigest(ctx)
	err := s.remove(ctx)
	<-s.done
	return err
}

// remove removes the pod. If that fails, it stays known as nobody's, and Run tries again.
func (s *sandbox) remove(ctx context.Context) error {
	s.closing.Lock()
	defer s.closing.Unlock()
	if s.gone {
		return nil
	}
	defer s.removedOnce.Do(func() { close(s.removed) })
	ctx, stop := detached(ctx)
	defer stop()
	if s.client != nil {
		s.client.Close()
	}
	s.mu.Lock()
	at, uid := s.at, s.uid
	s.mu.Unlock()
	var err error
	if at.name != "" {
		if uid == "" {
			uid, err = s.find(ctx, at)
		}
		if uid != "" {
			err = s.backend.cluster.deletePod(ctx, at.namespace, at.name, uid)
		}
	}
	s.backend.mu.Lock()
	delete(s.backend.live, s.session)
	delete(s.backend.used, at)
	s.backend.mu.Unlock()
	if err != nil {
		return fmt.Errorf("kubernetes: remove sandbox: %w", err)
	}
	s.gone = true
	return nil
}

// digestWait is how long a pod whose agent has ended is left for somebody to learn which image it had: its kubelet says so up
// to a second after it has started it, and a session may be shorter.
const digestWait = 3 * time.Second

// awaitDigest waits, if somebody asks.
func (s *sandbox) awaitDigest(ctx context.Context) {
	s.mu.Lock()
	asked := s.asking > 0
	s.mu.Unlock()
	if !asked {
		return
	}
	select {
	case <-s.told:
	case <-ctx.Done():
	case <-time.After(digestWait):
	}
}

// Digest implements backends.Identified.
func (s *sandbox) Digest() func(context.Context) string {
	if s.info.Digest != "" {
		return func(context.Context) string { return s.info.Digest }
	}
	s.mu.Lock()
	s.asking++
	s.mu.Unlock()
	return func(ctx context.Context) string {
		select {
		case <-s.told:
		case <-s.removed:
		case <-ctx.Done():
		}
		s.mu.Lock()
		defer s.mu.Unlock()
		s.asking--
		return s.digest
	}
}

// find looks for a pod whose creation was asked for and not answered.
func (s *sandbox) find(ctx context.Context, at slot) (types.UID, error) {
	var pod corev1.Pod
	err := s.backend.cluster.get(ctx, at.namespace, "pods", at.name, &pod)
	if apierrors.IsNotFound(err) || err == nil && pod.Annotations[labelSession] != s.session {
		return "", nil
	}
	return pod.UID, err
}
