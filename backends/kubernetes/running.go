package kubernetes

import (
	"context"
	"fmt"
	"slices"
	"sort"
	"strings"

	corev1 "k8s.io/api/core/v1"

	"github.com/sallyport/sallyport/backends"
)

var _ backends.Shared = (*Backend)(nil)

// Running implements backends.Shared.
func (b *Backend) Running(ctx context.Context) ([]backends.Session, error) {
	pods, err := b.runningPods(ctx, "")
	if err != nil {
		return nil, err
	}
	var all []backends.Session
	for i := range pods {
		all = append(all, runningIn(&pods[i]))
	}
	guests, err := b.runningGuests(ctx)
	if err != nil { // of some targets' namespaces: what is known is still worth having
		b.log.Warn("kubernetes: sessions in targets may be missing from the list", "error", err)
	}
	pod := func(session string) bool {
		return slices.ContainsFunc(all[:len(pods)], func(s backends.Session) bool { return s.Session == session })
	}
	for _, g := range guests {
		if !pod(g.Session) { // two that say they are one are both listed: one is forged, and none shall hide the other
			all = append(all, g)
		}
	}
	sort.SliceStable(all, func(i, j int) bool { return all[i].Session < all[j].Session })
	return all, nil
}

// EndRunning implements backends.Shared.
func (b *Backend) EndRunning(ctx context.Context, session string) (*backends.Session, error) {
	if !sessionPattern.MatchString(session) {
		return nil, nil
	}
	pods, err := b.runningPods(ctx, ","+labelSession+"="+labelValue(session))
	if err != nil {
		return nil, err
	}
	for i := range pods {
		if pod := &pods[i]; pod.Annotations[labelSession] == session {
			if err := b.cluster.deletePod(ctx, pod.Namespace, pod.Name, pod.UID); err != nil {
				return nil, fmt.Errorf("kubernetes: remove pod %s/%s: %w", pod.Namespace, pod.Name, err)
			}
			r := runningIn(pod)
			return &r, nil
		}
	}
	guests, err := b.runningGuests(ctx)
	var gates []string
	for _, g := range guests {
		if g.Session == session {
			gates = append(gates, fmt.Sprintf("%q (by %s)", g.Server, g.ID))
		}
	}
	if len(gates) > 0 {
		return nil, fmt.Errorf("kubernetes: session %s has joined a target, and has no pod of its own: only its gate can end it, %s", session, strings.Join(gates, " or "))
	}
	return nil, err
}

// runningPods are the sandboxes of all gates that have not finished.
func (b *Backend) runningPods(ctx context.Context, andLabels string) ([]corev1.Pod, error) {
	var running []corev1.Pod
	for _, ns := range b.namespaces() {
		var pods corev1.PodList
		if err := b.cluster.list(ctx, ns, "pods", listOptions{labels: labelManaged + "=" + managed + andLabels}, &pods); err != nil {
			return nil, fmt.Errorf("kubernetes: list pods in namespace %s: %w", ns, err)
		}
		for _, pod := range pods.Items {
			if !finished(&pod) && pod.DeletionTimestamp == nil {
				running = append(running, pod)
			}
		}
	}
	return running, nil
}

func runningIn(pod *corev1.Pod) backends.Session {
	a := pod.Annotations
	return backends.Session{
		Session: a[labelSession], Server: a[labelServer], User: a[labelUser], Profile: a[annotationProfile], Grant: a[annotationGrant],
		ID: pod.Namespace + "/" + pod.Name, Started: pod.CreationTimestamp.Time,
	}
}
