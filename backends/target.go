package backends

import "context"

// Joiner is implemented by a Backend that can start a sandbox inside what runs already: in the network of a pod or container,
// with its processes in sight if the target says so.
type Joiner interface {
	// Targets lists what spec.Template.Target means now and may be joined by the operator's limits, in the order of their
	// names and at most MaxTargets; with a name, only the one called that. None is no error. One of them goes into spec.Join,
	// and Start fails if it is not there any more.
	Targets(ctx context.Context, spec Spec, name string) ([]Running, error)
}

// MaxTargets bounds the answer of Joiner.Targets.
const MaxTargets = 256

// Target says which pods or containers are meant, those that fit all that is set, and what of them is joined. Their network
// always is.
type Target struct {
	Namespace string            `json:"namespace,omitempty"` // Kubernetes
	Labels    map[string]string `json:"labels,omitempty"`    // that it must have
	Workload  string            `json:"workload,omitempty"`  // Kubernetes: "deployment/NAME", whose pods are meant
	Name      string            `json:"name,omitempty"`      // of the pod or container
	Container string            `json:"container,omitempty"` // Kubernetes: the container in the pod; empty: as kubectl takes it
	// Processes joins the process namespace, too. The agent is not the first process there.
	Processes bool `json:"processes,omitempty"`
	// Files permits the uid of a process that is there, by which /proc/1/root is reached, and signals, ptrace and writing.
	// Without it such a uid is refused.
	Files bool `json:"files,omitempty"`
}

// Running is one pod or container that runs.
type Running struct {
	ID        string            `json:"id"` // that no other ever has: a pod's UID, a container's ID
	Namespace string            `json:"namespace,omitempty"`
	Name      string            `json:"name"`
	Labels    map[string]string `json:"labels,omitempty"`
	Container string            `json:"container,omitempty"` // Kubernetes: the container in the pod
	Image     string            `json:"image,omitempty"`     // of the container, as it was asked for
	Digest    string            `json:"digest,omitempty"`    // of its image, as far as it is known
}

// String names it for a person: NAMESPACE/NAME, or NAME.
func (r Running) String() string {
	if r.Namespace == "" {
		return r.Name
	}
	return r.Namespace + "/" + r.Name
}

// Joined is what a sandbox has joined, and what that costs.
type Joined struct {
	Running
	What   []string `json:"what"`             // "network", "processes", "files"
	Weaker []string `json:"weaker,omitempty"` // guarantees of a sandbox of one's own that do not hold, in words
}

// Weaknesses are the guarantees that do not hold in any sandbox that has joined a target, for Joined.Weaker; a backend adds
// those of its own.
func (t *Target) Weaknesses() []string {
	weaker := []string{"its network, and what listens on its loopback, is the target's"}
	if t.Processes {
		weaker = append(weaker,
			"the agent is not the first process: the session's user can kill or stop it; then execs fail and the session ends; "+
				"processes that enter the session's container from outside are not noticed",
			"the target's processes, their arguments and their users are seen")
	}
	if t.Files {
		weaker = append(weaker, "with the target's uid come signals to its processes, ptrace of them, and reading and writing of its files")
	}
	return weaker
}

// Parts says what is joined, for Joined.What.
func (t *Target) Parts() []string {
	what := []string{"network"}
	if t.Processes {
		what = append(what, "processes")
	}
	if t.Files {
		what = append(what, "files")
	}
	return what
}

// Has says whether all of the target's labels are among those given.
func (t *Target) Has(labels map[string]string) bool {
	for key, value := range t.Labels {
		if v, ok := labels[key]; !ok || v != value {
			return false
		}
	}
	return true
}
