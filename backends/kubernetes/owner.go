package kubernetes

import (
	"context"
	"errors"
	"fmt"
	"os"
	"strings"

	corev1 "k8s.io/api/core/v1"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"

	"github.com/sallyport/sallyport/backends"
)

// A pod may be owned by an object of its namespace: when that is deleted, the cluster's garbage collector deletes the pod. An
// owner that is not there, or in another namespace, counts as deleted, so none is ever named that was not seen.

// ownerPod is the Owner that is the gate's own pod.
const ownerPod = "pod"

// What the gate's own pod is, by the downward API.
const envPodName, envPodNamespace, envPodUID = "POD_NAME", "POD_NAMESPACE", "POD_UID"

// ownerMap is the name of the config map that owns pods; empty: none does.
func (c Config) ownerMap() string {
	name, _ := strings.CutPrefix(c.Owner, "configmap/")
	if name == c.Owner {
		return ""
	}
	return name
}

func (c Config) validateOwner() error {
	switch {
	case c.Owner == "", c.Owner == ownerPod:
	case !dnsName.MatchString(c.ownerMap()):
		return fmt.Errorf("owner: %q is none of pod, configmap/NAME", c.Owner)
	}
	return nil
}

// findOwnPod reads which pod the gate is, once. It owns only pods of its own namespace.
func (b *Backend) findOwnPod(ctx context.Context) error {
	if b.config.Owner != ownerPod {
		return nil
	}
	name, ns, uid := os.Getenv(envPodName), os.Getenv(envPodNamespace), os.Getenv(envPodUID)
	if name == "" || ns == "" || uid == "" {
		return fmt.Errorf("owner: pod: %s, %s and %s have to be in the environment, by the downward API", envPodName, envPodNamespace, envPodUID)
	}
	for _, other := range b.namespaces() {
		if other != ns {
			return fmt.Errorf("owner: pod: a pod in namespace %s can't own sandboxes in %s: name a configmap/NAME that is there", ns, other)
		}
	}
	var pod corev1.Pod
	if err := b.cluster.get(ctx, ns, "pods", name, &pod); err != nil {
		return fmt.Errorf("owner: find the gate's own pod: %w", err)
	}
	if string(pod.UID) != uid {
		return fmt.Errorf("owner: pod %s/%s has the UID %s, and the environment (%s) says %s", ns, name, pod.UID, envPodUID, uid)
	}
	b.ownPod = &metav1.OwnerReference{APIVersion: "v1", Kind: "Pod", Name: name, UID: pod.UID}
	return nil
}

// ownerIn is the owner of a pod that is to be made. A config map is asked for each time: one that was made anew since is another.
func (b *Backend) ownerIn(ctx context.Context, ns string) ([]metav1.OwnerReference, error) {
	if b.ownPod != nil {
		return []metav1.OwnerReference{*b.ownPod}, nil
	}
	name := b.config.ownerMap()
	if name == "" {
		return nil, nil
	}
	var m corev1.ConfigMap
	err := b.cluster.get(ctx, ns, "configmaps", name, &m)
	switch {
	case apierrors.IsNotFound(err):
		err = fmt.Errorf("owner: %w", err)
		return nil, &backends.TextError{Text: "the sandboxes' owner is not there: tell an operator", Err: err}
	case err != nil:
		return nil, failed("find the sandboxes' owner", err)
	case m.DeletionTimestamp != nil:
		err = errors.New("owner: the config map is being deleted")
		return nil, &backends.TextError{Text: "the sandboxes' owner is not there: tell an operator", Err: err}
	}
	return []metav1.OwnerReference{{APIVersion: "v1", Kind: "ConfigMap", Name: name, UID: m.UID}}, nil
}
