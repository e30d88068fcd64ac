package kubernetes

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"log/slog"
	"net/http"
	"os"
	"strings"
	"time"

	authorizationv1 "k8s.io/api/authorization/v1"
	corev1 "k8s.io/api/core/v1"
	networkingv1 "k8s.io/api/networking/v1"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/runtime"
	"k8s.io/apimachinery/pkg/runtime/schema"
	"k8s.io/apimachinery/pkg/runtime/serializer"
	"k8s.io/apimachinery/pkg/types"
	utilnet "k8s.io/apimachinery/pkg/util/net"
	"k8s.io/apimachinery/pkg/watch"
	"k8s.io/client-go/rest"
	"k8s.io/client-go/tools/clientcmd"
	"k8s.io/client-go/transport"
)

const (
	// answerWait bounds one request, its repetitions included.
	answerWait = 15 * time.Second
	// tries bounds the repetitions of a request that the server told to come again (429, 503 with Retry-After).
	tries = 5
	// The gate's own bound on requests, far above what logins make: a handful each. The server's own fairness rules besides.
	requestsPerSecond, requestsBurst = 100, 200
)

// cluster is the API server as this package speaks to it: two REST clients over one transport, with the few types that are
// needed. The whole client set would double the program's size.
type cluster struct {
	config     *rest.Config
	core       *rest.RESTClient
	networking *rest.RESTClient
	params     runtime.ParameterCodec
}

func newCluster(c Config, log *slog.Logger) (*cluster, error) {
	config, err := restConfig(c)
	if err != nil {
		return nil, fmt.Errorf("find the cluster: %w", err)
	}
	if config.BearerTokenFile != "" {
		// As client-go does of itself, but that a token which is refused is read again at once, not a minute later.
		config.Wrap(transport.ResettableTokenSourceWrapTransport(transport.NewCachedFileTokenSource(config.BearerTokenFile)))
		config.BearerToken, config.BearerTokenFile = "", ""
	}
	config.UserAgent = "sallyport"
	config.QPS, config.Burst = requestsPerSecond, requestsBurst
	config.WarningHandler = warnings{log}
	scheme := runtime.NewScheme()
	if err := errors.Join(corev1.AddToScheme(scheme), networkingv1.AddToScheme(scheme)); err != nil {
		return nil, err
	}
	metav1.AddToGroupVersion(scheme, schema.GroupVersion{Version: "v1"})
	config.NegotiatedSerializer = serializer.NewCodecFactory(scheme).WithoutConversion()
	config.ContentType, config.AcceptContentTypes = runtime.ContentTypeJSON, runtime.ContentTypeJSON
	// One connection pool, and one bound on requests, for both.
	client, err := rest.HTTPClientFor(config)
	if err != nil {
		return nil, err
	}
	k := &cluster{config: config, params: runtime.NewParameterCodec(scheme)}
	core := rest.CopyConfig(config)
	core.APIPath, core.GroupVersion = "/api", &corev1.SchemeGroupVersion
	if k.core, err = rest.RESTClientForConfigAndClient(core, client); err != nil {
		return nil, err
	}
	networking := rest.CopyConfig(config)
	networking.APIPath, networking.GroupVersion = "/apis", &networkingv1.SchemeGroupVersion
	networking.RateLimiter = k.core.GetRateLimiter()
	if k.networking, err = rest.RESTClientForConfigAndClient(networking, client); err != nil {
		return nil, err
	}
	return k, nil
}

func restConfig(c Config) (*rest.Config, error) {
	// The service account's token is read again from its file as the kubelet renews it.
	if c.InCluster || c.Kubeconfig == "" && c.Context == "" && os.Getenv(clientcmd.RecommendedConfigPathEnvVar) == "" {
		config, err := rest.InClusterConfig()
		if err == nil || c.InCluster || !errors.Is(err, rest.ErrNotInCluster) {
			return config, err
		}
	}
	rules := clientcmd.NewDefaultClientConfigLoadingRules()
	rules.ExplicitPath = c.Kubeconfig
	return clientcmd.NewNonInteractiveDeferredLoadingClientConfig(rules, &clientcmd.ConfigOverrides{CurrentContext: c.Context}).ClientConfig()
}

func (k *cluster) close() {
	utilnet.CloseIdleConnectionsFor(k.core.Client.Transport)
}

// warnings are the server's, as of Pod Security in its mode "warn".
type warnings struct{ log *slog.Logger }

func (w warnings) HandleWarningHeader(code int, _ string, text string) {
	if code == 299 && text != "" {
		w.log.Warn("cluster", "warning", text)
	}
}

type listOptions struct {
	labels, fields string
	limit          int64
	next           string // the last answer's Continue
}

func (k *cluster) client(resource string) *rest.RESTClient {
	if resource == "networkpolicies" {
		return k.networking
	}
	return k.core
}

// asked bounds a request, and says in an error which of the two bounds it met. One that was refused for a token that is not
// valid any more is made again: the refusal has the file read again that holds the new one.
func asked(ctx context.Context, f func(context.Context) error) error {
	bounded, stop := context.WithTimeoutCause(ctx, answerWait, errNoAnswer)
	defer stop()
	err := f(bounded)
	if apierrors.IsUnauthorized(err) {
		err = f(bounded)
	}
	if err != nil && ctx.Err() == nil && bounded.Err() != nil {
		return fmt.Errorf("%w: %w", errNoAnswer, err)
	}
	return err
}

var errNoAnswer = errors.New("the API server gave no answer in " + answerWait.String())

func (k *cluster) list(ctx context.Context, ns, resource string, o listOptions, into runtime.Object) error {
	return asked(ctx, func(ctx context.Context) error {
		return k.client(resource).Get().NamespaceIfScoped(ns, ns != "").Resource(resource).MaxRetries(tries).VersionedParams(&metav1.ListOptions{
			LabelSelector: o.labels, FieldSelector: o.fields, Limit: o.limit, Continue: o.next,
		}, k.params).Do(ctx).Into(into)
	})
}

func (k *cluster) get(ctx context.Context, ns, resource, name string, into runtime.Object) error {
	return asked(ctx, func(ctx context.Context) error {
		return k.client(resource).Get().NamespaceIfScoped(ns, ns != "").Resource(resource).Name(name).MaxRetries(tries).Do(ctx).Into(into)
	})
}

func (k *cluster) create(ctx context.Context, ns, resource string, o, into runtime.Object) error {
	return asked(ctx, func(ctx context.Context) error {
		return k.client(resource).Post().NamespaceIfScoped(ns, ns != "").Resource(resource).MaxRetries(tries).Body(o).Do(ctx).Into(into)
	})
}

func (k *cluster) update(ctx context.Context, ns, resource, name string, o, into runtime.Object) error {
	return asked(ctx, func(ctx context.Context) error {
		return k.client(resource).Put().NamespaceIfScoped(ns, ns != "").Resource(resource).Name(name).MaxRetries(tries).Body(o).Do(ctx).Into(into)
	})
}

// deletePod deletes one pod at once: the one with that UID and no later one of the same name. One that is gone is deleted.
func (k *cluster) deletePod(ctx context.Context, ns, name string, uid types.UID) error {
	now := int64(0)
	err := asked(ctx, func(ctx context.Context) error {
		return k.core.Delete().NamespaceIfScoped(ns, ns != "").Resource("pods").Name(name).MaxRetries(tries).Body(&metav1.DeleteOptions{
			GracePeriodSeconds: &now, Preconditions: &metav1.Preconditions{UID: &uid},
		}).Do(ctx).Error()
	})
	if apierrors.IsNotFound(err) || apierrors.IsConflict(err) { // a conflict: the name is another pod's by now
		return nil
	}
	return err
}

// watchFor is how long one watch goes on before the next begins where it ended.
const watchFor = 10 * time.Minute

func (k *cluster) watchPods(ctx context.Context, ns, labels, version string) (watch.Interface, error) {
	seconds := int64(watchFor / time.Second)
	return k.core.Get().NamespaceIfScoped(ns, ns != "").Resource("pods").MaxRetries(0).VersionedParams(&metav1.ListOptions{
		Watch: true, LabelSelector: labels, ResourceVersion: version, AllowWatchBookmarks: true, TimeoutSeconds: &seconds,
	}, k.params).Watch(ctx)
}

// patch changes a part of an object, by a strategic merge patch.
func (k *cluster) patch(ctx context.Context, ns, resource, name, part string, patch []byte, into runtime.Object) error {
	return asked(ctx, func(ctx context.Context) error {
		return k.client(resource).Patch(types.StrategicMergePatchType).NamespaceIfScoped(ns, ns != "").Resource(resource).Name(name).
			SubResource(part).MaxRetries(tries).Body(patch).Do(ctx).Into(into)
	})
}

// watchOne watches one pod.
func (k *cluster) watchOne(ctx context.Context, ns, name, version string) (watch.Interface, error) {
	seconds := int64(watchFor / time.Second)
	return k.core.Get().NamespaceIfScoped(ns, ns != "").Resource("pods").MaxRetries(0).VersionedParams(&metav1.ListOptions{
		Watch: true, FieldSelector: "metadata.name=" + name, ResourceVersion: version, TimeoutSeconds: &seconds,
	}, k.params).Watch(ctx)
}

// may asks the API server whether this client has a right.
func (k *cluster) may(ctx context.Context, right authorizationv1.ResourceAttributes) (bool, error) {
	review := authorizationv1.SelfSubjectAccessReview{Spec: authorizationv1.SelfSubjectAccessReviewSpec{ResourceAttributes: &right}}
	review.APIVersion, review.Kind = authorizationv1.SchemeGroupVersion.String(), "SelfSubjectAccessReview"
	body, err := json.Marshal(review)
	if err != nil {
		return false, err
	}
	err = asked(ctx, func(ctx context.Context) error {
		answer, err := k.core.Post().AbsPath("/apis/authorization.k8s.io/v1/selfsubjectaccessreviews").MaxRetries(tries).
			SetHeader("Content-Type", runtime.ContentTypeJSON).Body(body).Do(ctx).Raw()
		if err != nil {
			return err
		}
		return json.Unmarshal(answer, &review)
	})
	return review.Status.Allowed, err
}

// refusal is the API server's refusal in a few words, for the user; empty: it is none that a user can do something about.
func refusal(err error) string {
	var status apierrors.APIStatus
	switch {
	case err == nil:
		return ""
	case apierrors.IsTooManyRequests(err):
		return "the cluster has too much to do: try again"
	case apierrors.IsForbidden(err) && strings.Contains(err.Error(), "exceeded quota"):
		return "the cluster's quota for sandboxes is used up: try again later, or tell an operator"
	case apierrors.IsForbidden(err):
		return "the cluster forbids the sandbox: tell an operator"
	case apierrors.IsUnauthorized(err):
		return "the cluster does not know this gate: tell an operator"
	case apierrors.IsInvalid(err), apierrors.IsBadRequest(err):
		return "the cluster takes the sandbox for invalid: tell an operator"
	case apierrors.IsNotFound(err):
		return "the namespace of the sandboxes is not there: tell an operator"
	case errors.As(err, &status) && status.Status().Code >= http.StatusInternalServerError:
		return "the cluster can't answer: try again, or tell an operator"
	case errors.As(err, &status):
		return ""
	case errors.Is(err, errNoAnswer), utilnet.IsConnectionRefused(err), utilnet.IsConnectionReset(err), utilnet.IsProbableEOF(err), utilnet.IsTimeout(err):
		return "the cluster does not answer: try again, or tell an operator"
	}
	return ""
}
