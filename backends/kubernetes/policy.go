package kubernetes

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"sync"
	"time"

	corev1 "k8s.io/api/core/v1"
	networkingv1 "k8s.io/api/networking/v1"
	"k8s.io/apimachinery/pkg/api/equality"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/labels"
	"k8s.io/apimachinery/pkg/util/intstr"
)

// policyFresh is how long a policy that was seen is taken to be there.
const policyFresh = 30 * time.Second

// policyCache spares a login the question for a policy that was seen a moment ago.
type policyCache struct {
	mu   sync.Mutex // guards seen
	seen map[slot]time.Time
}

func (c *policyCache) fresh(at slot) bool {
	c.mu.Lock()
	defer c.mu.Unlock()
	return time.Since(c.seen[at]) < policyFresh
}

func (c *policyCache) put(at slot) {
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.seen == nil {
		c.seen = make(map[slot]time.Time)
	}
	c.seen[at] = time.Now() // as many as the configuration has networks and namespaces
}

// policyName is the object's name.
func (c Config) policyName(network string) string {
	if n := c.Networks[network]; n.Policy != "" {
		return n.Policy
	}
	return "sallyport-" + network
}

// policyOf makes the policy of a network: nothing but the gate comes in, if it dials, and only what is named is reached.
func policyOf(c Config, ns, network string) *networkingv1.NetworkPolicy {
	p := &networkingv1.NetworkPolicy{
		ObjectMeta: metav1.ObjectMeta{Name: c.policyName(network), Namespace: ns, Labels: map[string]string{labelManaged: managed}},
		Spec: networkingv1.NetworkPolicySpec{
			PodSelector: metav1.LabelSelector{MatchLabels: map[string]string{labelManaged: managed, labelNetwork: network}},
			PolicyTypes: []networkingv1.PolicyType{networkingv1.PolicyTypeIngress, networkingv1.PolicyTypeEgress},
		},
	}
	for _, e := range c.Networks[network].Egress {
		rule := networkingv1.NetworkPolicyEgressRule{}
		for protocol, ports := range map[corev1.Protocol][]int32{corev1.ProtocolTCP: e.TCP, corev1.ProtocolUDP: e.UDP} {
			for _, port := range ports {
				rule.Ports = append(rule.Ports, networkingv1.NetworkPolicyPort{Protocol: pointer(protocol), Port: pointer(intstr.FromInt32(port))})
			}
		}
		slices.SortStableFunc(rule.Ports, func(a, b networkingv1.NetworkPolicyPort) int {
			if *a.Protocol != *b.Protocol {
				return map[bool]int{true: -1, false: 1}[*a.Protocol < *b.Protocol]
			}
			return a.Port.IntValue() - b.Port.IntValue()
		})
		rule.To = []networkingv1.NetworkPolicyPeer{e.peer().policy()}
		p.Spec.Egress = append(p.Spec.Egress, rule)
	}
	if c.Stream == streamDirect {
		rule := networkingv1.NetworkPolicyIngressRule{Ports: []networkingv1.NetworkPolicyPort{{
			Protocol: pointer(corev1.ProtocolTCP), Port: pointer(intstr.FromInt32(int32(c.DirectPort))),
		}}}
		for _, peer := range c.DirectFrom {
			rule.From = append(rule.From, peer.policy())
		}
		p.Spec.Ingress = append(p.Spec.Ingress, rule)
	}
	return p
}

func (p Peer) policy() networkingv1.NetworkPolicyPeer {
	var peer networkingv1.NetworkPolicyPeer
	if p.CIDR != "" {
		peer.IPBlock = &networkingv1.IPBlock{CIDR: p.CIDR}
	}
	if len(p.Namespace) > 0 {
		peer.NamespaceSelector = &metav1.LabelSelector{MatchLabels: p.Namespace}
	}
	if len(p.Pod) > 0 {
		peer.PodSelector = &metav1.LabelSelector{MatchLabels: p.Pod}
	}
	return peer
}

// ensurePolicy sees to it that the network's policy is there before a pod is.
func (b *Backend) ensurePolicy(ctx context.Context, ns, network string) error {
	if b.policies.fresh(slot{ns, network}) {
		return nil
	}
	at := slot{ns, b.config.policyName(network)}
	var err error
	if b.config.PolicyMode == "refer" {
		err = b.findPolicy(ctx, at, network)
	} else {
		err = b.keepPolicy(ctx, at, network)
	}
	if err != nil {
		return fmt.Errorf("network policy %s/%s: %w", at.namespace, at.name, err)
	}
	b.policies.put(slot{ns, network})
	return nil
}

// findPolicy looks for a policy of the operator's, and that it holds for this network's pods.
func (b *Backend) findPolicy(ctx context.Context, at slot, network string) error {
	var p networkingv1.NetworkPolicy
	if err := b.cluster.get(ctx, at.namespace, "networkpolicies", at.name, &p); err != nil {
		return err
	}
	selector, err := metav1.LabelSelectorAsSelector(&p.Spec.PodSelector)
	if err != nil {
		return err
	}
	if !selector.Matches(labels.Set{labelManaged: managed, labelNetwork: network}) {
		return fmt.Errorf("does not select pods with the label %s=%s", labelNetwork, network)
	}
	for _, kind := range []networkingv1.PolicyType{networkingv1.PolicyTypeIngress, networkingv1.PolicyTypeEgress} {
		if !slices.Contains(p.Spec.PolicyTypes, kind) {
			return fmt.Errorf("says nothing of %s", kind)
		}
	}
	return nil
}

// keepPolicy makes the policy what the configuration says.
func (b *Backend) keepPolicy(ctx context.Context, at slot, network string) error {
	want := policyOf(b.config, at.namespace, network)
	// Twice, as another gate may do the same at the same time.
	for range 2 {
		var have networkingv1.NetworkPolicy
		err := b.cluster.get(ctx, at.namespace, "networkpolicies", at.name, &have)
		if apierrors.IsNotFound(err) {
			if err = b.cluster.create(ctx, at.namespace, "networkpolicies", want, &have); apierrors.IsAlreadyExists(err) {
				continue
			}
			return err
		}
		if err != nil {
			return err
		}
		if have.Labels[labelManaged] != managed {
			return errors.New("is there, and not the gate's (label " + labelManaged + ")")
		}
		if equality.Semantic.DeepEqual(have.Spec, want.Spec) {
			return nil
		}
		have.Spec = want.Spec
		if err = b.cluster.update(ctx, at.namespace, "networkpolicies", at.name, &have, &have); apierrors.IsConflict(err) {
			continue
		}
		return err
	}
	return errors.New("changes all the time")
}
