// Package authz decides who gets in and what their sandbox may see. It embeds Open Policy Agent (OPA): policy is Rego,
// grants and profiles are data, and an undefined, failed or ambiguous decision is a refusal.
package authz

import (
	"encoding/json"
	"time"
)

// OfferInput is the question whether a public key may be used at all by a user. It is asked for a key that is offered
// and not yet proven, so the answer is only whether a signature is worth asking for.
type OfferInput struct {
	User   string `json:"user"`
	Source string `json:"source"` // client's IP address
	Key    Key    `json:"key"`
}

// Key is a public key.
type Key struct {
	Type        string `json:"type"`        // "ssh-ed25519"
	Fingerprint string `json:"fingerprint"` // "SHA256:..."
	Line        string `json:"line"`        // as in authorized_keys, "type base64", no comment
}

// LoginInput is the question whether a user who has proven a key gets a sandbox, and which.
type LoginInput struct {
	User          string `json:"user"`             // proven, [a-z_][a-z0-9._-]{0,63}
	Choice        string `json:"choice,omitempty"` // a profile's name or a ticket, from alice+CHOICE
	Source        string `json:"source"`           // client's IP address
	Key           Key    `json:"key"`              // proven
	ClientVersion string `json:"client_version"`
	Gate          string `json:"gate"`
	// Target is the pod or container that the sandbox would join, where the profile names a target: the question is asked
	// once more, about this one.
	Target *LoginTarget `json:"target,omitempty"`
}

// LoginTarget is a running pod or container, as the cluster or the engine tells it.
type LoginTarget struct {
	Namespace string            `json:"namespace,omitempty"` // Kubernetes
	Name      string            `json:"name"`                // of the pod, or of the container
	Labels    map[string]string `json:"labels,omitempty"`
	Container string            `json:"container,omitempty"` // Kubernetes: the container in the pod
	Image     string            `json:"image,omitempty"`     // of the container, as it was asked for
	Digest    string            `json:"digest,omitempty"`    // of its image
}

// Login is the answer to a LoginInput.
type Login struct {
	Allow  bool   `json:"allow"`
	Reason string `json:"reason,omitempty"` // for the client: why not, and what to do next

	Groups    []string  `json:"groups,omitempty"`
	Ticket    string    `json:"ticket,omitempty"` // the grant's name
	Profile   string    `json:"profile,omitempty"`
	NotBefore time.Time `json:"not_before,omitzero"`
	NotAfter  time.Time `json:"not_after,omitzero"`
	Why       string    `json:"why,omitempty"`         // the grant's reason, text from data: sanitise where printed
	Approved  string    `json:"approved_by,omitempty"` // text from data
	Sandbox   Sandbox   `json:"sandbox"`
	Permit    Permit    `json:"permit"`

	ID       string `json:"id"`       // of this decision
	Revision string `json:"revision"` // of policy and data together: a hash
	Rule     string `json:"rule,omitempty"`
}

// Sandbox is a profile's half that says what the sandbox is. Sizes are strings as Docker and Kubernetes write them:
// "512Mi", "1Gi", "64M".
type Sandbox struct {
	Image      string   `json:"image"`
	PullPolicy string   `json:"pull_policy,omitempty"`
	User       string   `json:"user,omitempty"`   // "uid:gid"; empty: 1000:1000
	Groups     []uint32 `json:"groups,omitempty"` // supplementary group IDs
	Hostname   string   `json:"hostname,omitempty"`
	Home       string   `json:"home,omitempty"`
	Env        []string `json:"env,omitempty"`
	Mounts     []Mount  `json:"mounts,omitempty"`
	Network    string   `json:"network,omitempty"`
	Memory     string   `json:"memory,omitempty"`
	CPUs       float64  `json:"cpus,omitempty"`
	PIDs       int64    `json:"pids,omitempty"`
	TmpSize    string   `json:"tmp_size,omitempty"`
	HomeSize   string   `json:"home_size,omitempty"`
	Scratch    string   `json:"scratch,omitempty"`
	Caps       []string `json:"caps,omitempty"`
	Runtime    string   `json:"runtime,omitempty"`
	ExtraHosts []string `json:"extra_hosts,omitempty"`
	// Target is what runs already and is to be joined; nil: nothing.
	Target *Target `json:"target,omitempty"`
	// Namespace, Nodes (labels that the node must have), Priority, Spread (labels over whose values sandboxes spread) and Pod (a pod
	// template, or a JSON Patch) are of Kubernetes alone.
	Namespace string            `json:"namespace,omitempty"`
	Nodes     map[string]string `json:"nodes,omitempty"`
	Priority  string            `json:"priority,omitempty"`
	Spread    []string          `json:"spread,omitempty"`
	Pod       json.RawMessage   `json:"pod,omitempty"`
	// ExecAudit says whether what the session executes is reported from inside: "required", "preferred" (default) or "off".
	ExecAudit string `json:"exec_audit,omitempty"`
	// ExecStrict has each execution wait until its report is recorded.
	ExecStrict bool `json:"exec_strict,omitempty"`
	// ExecStuckLimit is how long a program waits for its report to be taken before the session ends; a Go duration.
	ExecStuckLimit string `json:"exec_stuck_limit,omitempty"`
}

// Target says which pods, or containers of a Docker engine, a sandbox may join. At least one of Labels, Workload and Name is
// set. What is joined of it is said by Permit.Target.
type Target struct {
	Namespace string            `json:"namespace,omitempty"` // Kubernetes
	Labels    map[string]string `json:"labels,omitempty"`    // that it must have, all of them
	Workload  string            `json:"workload,omitempty"`  // Kubernetes: "deployment/NAME" and the like, whose pods are meant
	Name      string            `json:"name,omitempty"`      // of the pod, or of the container
	Container string            `json:"container,omitempty"` // Kubernetes: the container in the pod
}

// Mount is one mount of a profile. It is read-only unless Write is true.
type Mount struct {
	// Type is "bind" (default) or "volume"; on Kubernetes "bind", "pvc", "configmap", "secret", "image", "projected" or "csi".
	Type   string `json:"type,omitempty"`
	Source string `json:"source"`
	Target string `json:"target"`
	Write  bool   `json:"write,omitempty"`
}

// Permit is what a session may do. What is not named is refused.
type Permit struct {
	Shell   bool     `json:"shell,omitempty"`
	Exec    bool     `json:"exec,omitempty"`
	SFTP    bool     `json:"sftp,omitempty"`
	Env     []string `json:"env,omitempty"`     // names a client may set; a trailing * matches a prefix
	Forward []string `json:"forward,omitempty"` // what a client may reach from inside: host:port, unix:/path
	Listen  []string `json:"listen,omitempty"`  // what it may listen on inside: address:port, unix:/path
	Agent   bool     `json:"agent,omitempty"`   // forwarding of the client's ssh agent
	X11     bool     `json:"x11,omitempty"`     // forwarding of the client's X server
	// Target says what of the profile's target is joined; nil: nothing.
	Target *TargetPermit `json:"target,omitempty"`
	// ForwardContent says what is kept of forwarded connections' bytes: "" or "none" (default), or "full" within DataLimit.
	ForwardContent string `json:"forward_content,omitempty"`
	// Input says what of typed input is recorded: "" or "no-passwords" (default), "all" or "none".
	Input string `json:"input,omitempty"`
	// MaxDuration and IdleTimeout narrow the gate's own limits; Go durations, "1h30m".
	MaxDuration string `json:"max_duration,omitempty"`
	IdleTimeout string `json:"idle_timeout,omitempty"`
	// Transfer says what of file transfers is refused and kept; nil: nothing is refused, hashes are kept.
	Transfer *Transfer `json:"transfer,omitempty"`
	// DataLimit is a size, "64Mi", beyond which a channel's data is kept as a number and a hash only, in each direction;
	// empty: all is kept.
	DataLimit string `json:"data_limit,omitempty"`
}

// TargetPermit is what of a target a session may join. Each is off by default and weakens more than the one before, without
// which it can't be had; docs/targets.md says what.
type TargetPermit struct {
	Network   bool `json:"network,omitempty"`   // its network namespace
	Processes bool `json:"processes,omitempty"` // its process namespace: the agent is not the first process there
	// Files is /proc/1/root. It needs the target's uid, and with that uid come signals, ptrace and writing.
	Files bool `json:"files,omitempty"`
}

// Transfer is a profile's rules on file transfers by sftp and scp, which the gate reads as they pass.
type Transfer struct {
	DenyUpload   bool     `json:"deny_upload,omitempty"` // nothing may be written, changed or removed
	DenyDownload bool     `json:"deny_download,omitempty"`
	DenyPaths    []string `json:"deny_paths,omitempty"` // absolute paths as resolved inside, with all below; *, ? and ** are patterns
	MaxSize      string   `json:"max_size,omitempty"`   // of a file, "1Gi"
	// Content is what is kept of files: "" or "hash" (default), "full" or "none".
	Content        string `json:"content,omitempty"`
	ContentFile    string `json:"content_file,omitempty"`    // with full: how much of a file, default 16Mi
	ContentSession string `json:"content_session,omitempty"` // with full: how much in a session, default 256Mi
	Raw            bool   `json:"raw,omitempty"`             // the channel's bytes are kept as data too
}

// RequestInput is the question whether one request may be served, or one channel opened. Permit is what the login
// admitted.
type RequestInput struct {
	User    string `json:"user"`
	Ticket  string `json:"ticket"`
	Profile string `json:"profile"`
	Permit  Permit `json:"permit"`
	Type    string `json:"type"`              // of the request or the channel: "shell", "exec", "direct-tcpip", "tcpip-forward", ...
	Command string `json:"command,omitempty"` // for exec
	Name    string `json:"name,omitempty"`    // subsystem, or environment variable

	// For forwarding. A target that the client named is asked about by its name alone first, then with each of its addresses.
	Host    string `json:"host,omitempty"`    // a name in lower case without a dot at its end; empty where the client gave an address
	Address string `json:"address,omitempty"` // an IP address, IPv4 never in IPv6; empty for a listener: all of them
	Port    uint16 `json:"port,omitempty"`    // 0 for a listener: a free one
	Path    string `json:"path,omitempty"`    // of a socket, absolute and clean
}

// Verdict is the answer to a RequestInput.
type Verdict struct {
	Allow  bool   `json:"allow"`
	Reason string `json:"reason,omitempty"` // for the client
	ID     string `json:"id"`
}
