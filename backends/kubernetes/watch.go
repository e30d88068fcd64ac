package kubernetes

import (
	"context"
	"errors"
	"fmt"
	"math/rand/v2"
	"slices"
	"strings"
	"time"

	corev1 "k8s.io/api/core/v1"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/watch"

	"github.com/sallyport/sallyport/backends"
)

// The wait before a watch that failed is tried again.
const minRewatch, maxRewatch = 500 * time.Millisecond, 30 * time.Second

// hear tells sandboxes what becomes of their pods in a namespace, until ctx ends: one request for all, however many there are.
func (b *Backend) hear(ctx context.Context, ns string) {
	wait := minRewatch
	for {
		began := time.Now()
		err := b.hearOnce(ctx, ns)
		if ctx.Err() != nil {
			return
		}
		if time.Since(began) > time.Minute {
			wait = minRewatch
		}
		if err != nil {
			b.log.WarnContext(ctx, "watch pods", "namespace", ns, "error", err, "again_in", wait)
		}
		select {
		case <-ctx.Done():
			return
		case <-time.After(wait + rand.N(wait)): // not all gates at once
		}
		wait = min(2*wait, maxRewatch)
	}
}

// hearOnce lists the pods and then watches them, until the watch is lost.
func (b *Backend) hearOnce(ctx context.Context, ns string) error {
	// Whoever had a pod before the list and is not in it has none any more.
	before := make(map[*sandbox]bool)
	b.mu.Lock()
	for _, s := range b.live {
		s.mu.Lock()
		if s.at.namespace == ns && s.uid != "" {
			before[s] = true
		}
		s.mu.Unlock()
	}
	b.mu.Unlock()
	var pods corev1.PodList
	if err := b.cluster.list(ctx, ns, "pods", listOptions{labels: b.ownLabels()}, &pods); err != nil {
		return err
	}
	for i := range pods.Items {
		if s := b.saw(&pods.Items[i], false); s != nil {
			delete(before, s)
		}
	}
	for s := range before {
		s.dies("was deleted", "the watch was interrupted, and the pod is not listed after it")
	}
	version := pods.ResourceVersion
	for {
		w, err := b.cluster.watchPods(ctx, ns, b.ownLabels(), version)
		if err != nil {
			return err
		}
		began := time.Now()
		version, err = b.follow(w, version)
		w.Stop()
		if err != nil {
			return err
		}
		// The server ends a watch after its time. One that ends at once is no watch.
		if time.Since(began) < time.Second {
			return errors.New("the watch ended at once")
		}
		if ctx.Err() != nil {
			return ctx.Err()
		}
	}
}

// follow reads a watch to its end, and says where the next may begin.
func (b *Backend) follow(w watch.Interface, version string) (string, error) {
	for e := range w.ResultChan() {
		if e.Type == watch.Error {
			return "", apierrors.FromObject(e.Object)
		}
		pod, ok := e.Object.(*corev1.Pod)
		if !ok {
			if m, ok := e.Object.(metav1.Object); ok {
				version = m.GetResourceVersion()
			}
			continue
		}
		version = pod.ResourceVersion
		if e.Type != watch.Bookmark {
			b.saw(pod, e.Type == watch.Deleted)
		}
	}
	return version, nil
}

// saw tells the sandbox of a pod what the cluster says of it. It returns that sandbox, if there is one.
func (b *Backend) saw(pod *corev1.Pod, deleted bool) *sandbox {
	b.mu.Lock()
	s := b.live[pod.Annotations[labelSession]]
	b.mu.Unlock()
	if s == nil {
		return nil
	}
	s.mu.Lock()
	mine := s.at == slot{pod.Namespace, pod.Name} && (s.uid == "" || s.uid == pod.UID)
	if mine {
		s.node = pod.Spec.NodeName
		if id := imageOf(pod); id != "" && s.digest == "" {
			s.digest = id
			close(s.told)
		}
		if why := unschedulable(pod); why == "" {
			s.unschedulable = ""
		} else if s.unschedulable == "" {
			s.unschedulable, s.since = why, time.Now()
		}
	}
	s.mu.Unlock()
	if !mine {
		return nil
	}
	if short, whole := fate(pod, deleted); short != "" {
		s.dies(short, whole)
	} else if t := trouble(pod); t != nil {
		s.fails(t)
	}
	return s
}

// maxDigest bounds what is taken from a pod's status as a digest.
const maxDigest = 512

// imageOf is the digest of the image that the session's container runs, as its kubelet says; empty: not known yet.
func imageOf(pod *corev1.Pod) string {
	for _, c := range pod.Status.ContainerStatuses {
		if c.Name == mainContainer && len(c.ImageID) <= maxDigest {
			_, id, found := strings.Cut(c.ImageID, "://") // the runtime's own way of getting it
			if !found {
				id = c.ImageID
			}
			return id
		}
	}
	return ""
}

// dies says that the pod has ended or is about to.
func (s *sandbox) dies(short, whole string) {
	s.fails(&backends.TextError{Text: "the sandbox " + short, Err: errors.New(whole)})
}

func (s *sandbox) fails(why *backends.TextError) {
	select {
	case s.death <- why:
	default: // the first word counts
	}
}

// finished says that no container of the pod will ever run again.
func finished(pod *corev1.Pod) bool {
	return pod.Status.Phase == corev1.PodSucceeded || pod.Status.Phase == corev1.PodFailed
}

// fate says how a pod ended, in short and whole; both are empty while it has not.
func fate(pod *corev1.Pod, deleted bool) (short, whole string) {
	status := pod.Status
	whole = fmt.Sprintf("pod %s/%s: phase %s", pod.Namespace, pod.Name, status.Phase)
	add := func(name, reason, message string) {
		if reason != "" || message != "" {
			whole += fmt.Sprintf("; %s: %s %s", name, reason, message)
		}
	}
	add("status", status.Reason, status.Message)
	disruption := ""
	for _, c := range status.Conditions {
		if c.Type == corev1.DisruptionTarget && c.Status == corev1.ConditionTrue {
			disruption = c.Reason
			add("disruption", c.Reason, c.Message)
		}
	}
	oom := false
	for _, c := range slices.Concat(status.InitContainerStatuses, status.ContainerStatuses) {
		if t := c.State.Terminated; t != nil && (t.ExitCode != 0 || c.Name == mainContainer) {
			add("container "+c.Name, fmt.Sprintf("%s, exit code %d", t.Reason, t.ExitCode), t.Message)
			oom = oom || t.Reason == "OOMKilled"
		}
	}
	switch {
	case disruption == corev1.PodReasonPreemptionByScheduler:
		return "had to make room for a pod of higher priority", whole
	case disruption == "DeletionByTaintManager":
		return "was removed: its node is lost or being cleared", whole
	case disruption == "EvictionByEvictionAPI":
		return "was evicted: its node is being cleared", whole
	case status.Reason == "Evicted" || disruption == corev1.PodReasonTerminationByKubelet:
		return "was evicted by its node", whole
	case status.Reason == "DeadlineExceeded":
		return "has reached the longest life of a pod here", whole
	case status.Reason == "NodeLost" || disruption == "DeletionByPodGC":
		return "was lost with its node", whole
	case oom:
		return "was killed: it ran out of memory", whole
	case finished(pod):
		return "ended", whole
	case deleted:
		return "was deleted", whole + "; deleted"
	case pod.DeletionTimestamp != nil:
		return "is being deleted", whole + "; being deleted"
	}
	return "", ""
}

// unschedulable says why no node takes the pod; empty: one does, or it is not known yet.
func unschedulable(pod *corev1.Pod) string {
	for _, c := range pod.Status.Conditions {
		if c.Type == corev1.PodScheduled && c.Status == corev1.ConditionFalse && c.Reason == corev1.PodReasonUnschedulable {
			return c.Message
		}
	}
	return ""
}

// unscheduled is an error if no node has taken the pod for too long.
func (s *sandbox) unscheduled() error {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.unschedulable == "" || time.Since(s.since) < s.backend.config.ScheduleWait {
		return nil
	}
	return &backends.TextError{
		Text: "the cluster has no room for the sandbox: try again later, or tell an operator",
		Err:  fmt.Errorf("unschedulable: %s", s.unschedulable),
	}
}

// trouble says why a pod will not come up, or nil while it may.
func trouble(pod *corev1.Pod) *backends.TextError {
	all := slices.Concat(pod.Status.InitContainerStatuses, pod.Status.ContainerStatuses)
	for i := range all {
		if why := troubleOfStatus(&all[i]); why != nil {
			return why
		}
	}
	return nil
}

// troubleOfStatus says why one container waits in vain; nil: it does not.
func troubleOfStatus(c *corev1.ContainerStatus) *backends.TextError {
	w := c.State.Waiting
	if w == nil {
		return nil
	}
	text := ""
	switch w.Reason {
	case "ErrImagePull", "ImagePullBackOff", "ErrImageNeverPull", "InvalidImageName", "ImageInspectError", "RegistryUnavailable":
		text = noImage
	case "CreateContainerConfigError", "CreateContainerError", "RunContainerError", "CrashLoopBackOff":
		text = noStart
	default:
		return nil
	}
	return &backends.TextError{Text: text, Err: fmt.Errorf("container %s, image %s: %s: %s", c.Name, c.Image, w.Reason, w.Message)}
}

// lookAtEvents finds what a pod's status says late or never: of an image that can't be pulled 10 s later, of a volume that
// is not there nothing.
func (s *sandbox) lookAtEvents(ctx context.Context) error {
	s.mu.Lock()
	at, uid := s.at, s.uid
	s.mu.Unlock()
	var events corev1.EventList
	err := s.backend.cluster.list(ctx, at.namespace, "events", listOptions{fields: "type=Warning,involvedObject.uid=" + string(uid), limit: 100}, &events)
	if err != nil {
		return nil // the start goes on without; the gate may not be permitted to read events
	}
	text := ""
	var whole []string
	for _, e := range events.Items {
		whole = append(whole, e.Reason+": "+e.Message)
		if t := troubleOf(e.Reason, e.Message); t != "" {
			text = t
		}
	}
	if text == "" {
		return nil
	}
	return &backends.TextError{Text: text, Err: errors.New(strings.Join(whole, "; "))}
}

// troubleOf says what an event means for a pod that is to come up; empty: nothing that would not pass.
func troubleOf(reason, message string) string {
	switch {
	case reason == "FailedMount" && strings.Contains(message, "not found"):
		return "the sandbox's data is not there: tell an operator"
	case reason == "ErrImageNeverPull", reason == "InspectFailed",
		reason == "Failed" && (strings.HasPrefix(message, "Failed to pull image") || strings.HasPrefix(message, "Error: ErrImage")):
		return noImage
	case reason == "Failed" && strings.HasPrefix(message, "Error: "):
		return noStart
	}
	return ""
}

const (
	noImage = "the sandbox's image can't be had: tell an operator"
	noStart = "the sandbox can't be started as its profile says: tell an operator"
)
