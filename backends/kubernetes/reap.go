package kubernetes

import (
	"context"
	"errors"
	"fmt"
	"sync"
	"time"

	corev1 "k8s.io/api/core/v1"
	"k8s.io/apimachinery/pkg/types"
)

const (
	// reapEvery is the time between looks for pods that have finished: what a killed gate leaves is gone after two of them.
	// Each wholeEvery-th time it is all pods, for those that go on and are nobody's.
	reapEvery  = 5 * time.Second
	wholeEvery = 6

	// pendingLimit is the age from which no gate waits for a pod to start, whatever its start_timeout.
	pendingLimit = 15 * time.Minute
)

// Run removes what earlier gates of this name and failed removals left, and what any gate's ended sessions did, at once and
// every 5 s, and hears from the cluster what becomes of the pods, until ctx ends.
func (b *Backend) Run(ctx context.Context) {
	var wg sync.WaitGroup
	defer wg.Wait()
	for _, ns := range b.namespaces() {
		wg.Go(func() { b.hear(ctx, ns) })
	}
	t := time.NewTicker(reapEvery)
	defer t.Stop()
	seen := make(map[types.UID]bool)
	for round := 0; ; round++ {
		fields := finishedPods
		if round%wholeEvery == 0 {
			fields = ""
		}
		var err error
		if seen, err = b.reap(ctx, seen, fields); err != nil && ctx.Err() == nil {
			b.log.ErrorContext(ctx, "remove leftovers", "error", err)
		}
		select {
		case <-ctx.Done():
			return
		case <-t.C:
		}
	}
}

// Reap removes every pod of this gate that belongs to no sandbox of this Backend.
func (b *Backend) Reap(ctx context.Context) error {
	_, err := b.reap(ctx, nil, "")
	return err
}

// finishedPods selects by what fields of a pod can be asked for.
const finishedPods = "status.phase!=Pending,status.phase!=Running"

// reap also removes other gates' pods that have finished, and had so before: their own gate may want to know how. It
// returns those that it saw. It looks at the pods that fields selects.
func (b *Backend) reap(ctx context.Context, before map[types.UID]bool, fields string) (map[types.UID]bool, error) {
	seen := make(map[types.UID]bool)
	var errs []error
	for _, ns := range b.namespaces() {
		var pods corev1.PodList
		if err := b.cluster.list(ctx, ns, "pods", listOptions{labels: labelManaged + "=" + managed, fields: fields}, &pods); err != nil {
			errs = append(errs, err)
			continue
		}
		// Read after the list: what is listed and not live now has no session any more.
		b.mu.Lock()
		live := make(map[string]bool, len(b.live))
		for session := range b.live {
			live[session] = true
		}
		b.mu.Unlock()
		for i := range pods.Items {
			pod := &pods.Items[i]
			if pod.Annotations[labelServer] == b.gate {
				if live[pod.Annotations[labelSession]] {
					continue
				}
			} else {
				switch {
				case finished(pod):
					seen[pod.UID] = true
					if !before[pod.UID] {
						continue
					}
				case pod.Status.Phase == corev1.PodPending && time.Since(pod.CreationTimestamp.Time) > pendingLimit:
				default:
					continue
				}
			}
			b.log.InfoContext(ctx, "removing a leftover sandbox", "session", pod.Annotations[labelSession], "pod", ns+"/"+pod.Name,
				"gate", pod.Annotations[labelServer])
			if err := b.cluster.deletePod(ctx, ns, pod.Name, pod.UID); err != nil {
				errs = append(errs, fmt.Errorf("remove pod: %w", err))
			}
		}
	}
	return seen, errors.Join(errs...)
}
