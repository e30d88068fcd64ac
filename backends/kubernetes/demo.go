package kubernetes

import (
	"context"
	"crypto/rand"
	"fmt"
	"log/slog"
	"strings"

	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
)

// Demo is a namespace to try a gate in. Pod Security "restricted" is enforced in it.
type Demo struct {
	Namespace string
	cluster   *cluster
}

// NewDemo makes a namespace with a name of its own in the cluster of a kubeconfig.
func NewDemo(ctx context.Context, kubeconfig string) (*Demo, error) {
	k, err := newCluster(Config{Kubeconfig: kubeconfig}.WithDefaults(), slog.New(slog.DiscardHandler))
	if err != nil {
		return nil, err
	}
	d := &Demo{Namespace: "sallyport-demo-" + strings.ToLower(rand.Text()[:6]), cluster: k}
	ns := &corev1.Namespace{ObjectMeta: metav1.ObjectMeta{
		Name: d.Namespace, Labels: map[string]string{"pod-security.kubernetes.io/enforce": "restricted"},
	}}
	if err := k.create(ctx, "", "namespaces", ns, &corev1.Namespace{}); err != nil {
		k.close()
		return nil, fmt.Errorf("make namespace %s: %w", d.Namespace, err)
	}
	return d, nil
}

// PutConfigMap makes a config map.
func (d *Demo) PutConfigMap(name string, data map[string]string) error {
	m := &corev1.ConfigMap{ObjectMeta: metav1.ObjectMeta{Name: name}, Data: data}
	return d.cluster.create(context.Background(), d.Namespace, "configmaps", m, &corev1.ConfigMap{})
}

// Remove removes the namespace and all in it; the cluster does so in a while.
func (d *Demo) Remove() error {
	defer d.cluster.close()
	err := asked(context.Background(), func(ctx context.Context) error {
		return d.cluster.core.Delete().Resource("namespaces").Name(d.Namespace).Do(ctx).Error()
	})
	if err != nil {
		return fmt.Errorf("remove namespace %s: %w", d.Namespace, err)
	}
	return nil
}
