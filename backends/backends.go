// Package backends says what a sandbox is and what starts one. A backend starts a sandbox and gives the gate a way to
// run processes in it; it knows nothing of SSH, of policy or of the log. The contract that every backend keeps is the
// test suite in backends/backendtest.
package backends

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net"
	"net/netip"
	"strings"
	"time"
)

// Backend starts sandboxes. It is safe for concurrent use.
type Backend interface {
	// Start creates and starts a sandbox and returns once its agent has been reached and the gate has proven itself to
	// it, so that Exec works at once. When Start fails, or ctx ends first, nothing of the sandbox is left.
	// An error that is a *RefusedError says that the operator's limits forbid the spec: nothing was created.
	Start(ctx context.Context, spec Spec) (Sandbox, error)
}

// Sandbox is one running sandbox, made for one connection. It is safe for concurrent use.
type Sandbox interface {
	// ID names the sandbox for an operator: a container ID, or namespace/pod.
	ID() string
	// Info says what was started, for the log.
	Info() Info
	// Exec runs one process to its end, and returns when it has ended and all its output has been written to p.Stdout
	// and p.Stderr. When ctx ends, the process and its children get SIGHUP, then SIGKILL.
	Exec(ctx context.Context, p Process) (ExitStatus, error)
	// Done is closed when the sandbox has ended, whether by Close or by itself; Err then says why.
	Done() <-chan struct{}
	// Err is nil before Done is closed and after Close; otherwise why the sandbox ended by itself.
	Err() error
	// Close ends the sandbox and removes all that belongs to it. It may be called any number of times.
	Close(ctx context.Context) error
}

// Dialer is implemented by a Sandbox that can open connections from inside its own network. All of it is done by the
// agent, with the session's uid, and is not among its reports.
type Dialer interface {
	// Resolve gives the addresses of a host name as the sandbox sees it (its hosts file, its name servers), at most
	// MaxAddresses, in the order to try them. An IP address in text is itself.
	Resolve(ctx context.Context, host string) ([]netip.Addr, error)
	// DialContext connects. Networks are "tcp", with an address of an IP address and a port, never a name, and "unix", with an
	// absolute path: no abstract name, and nothing of the agent's own. The connection is a HalfCloser.
	DialContext(ctx context.Context, network, address string) (net.Conn, error)
}

// Identified is implemented by a Sandbox whose backend may learn of the image's digest after the start alone.
type Identified interface {
	// Digest asks for the digest. What it returns has to be called once: it waits until the digest is known and returns that, or
	// "" if the sandbox is gone or ctx has ended before. A Close after the question leaves the sandbox known to its backend for a
	// moment, for the digest's sake.
	Digest() (wait func(ctx context.Context) string)
}

// MaxAddresses bounds the answer of Dialer.Resolve.
const MaxAddresses = 16

// Listener is implemented by a Sandbox that can take connections inside its own network.
type Listener interface {
	// Listen listens inside until the net.Listener is closed or the sandbox ends. Networks are "tcp", with an address of an IP
	// address or nothing (all of them) and a port, 0 for a free one; and "unix", with an absolute path that must not exist, or
	// "" for a socket in a new directory that only the session's uid can enter, as for an ssh agent. Addr says which address it
	// got. What Accept returns is a HalfCloser, whose RemoteAddr is the originator's as the agent tells it. At most
	// MaxListeners at a time; at most MaxBacklog connections wait for Accept, more are refused inside.
	Listen(ctx context.Context, network, address string) (net.Listener, error)
}

// Bounds of a Listener.
const (
	MaxListeners = 32
	MaxBacklog   = 64
)

// HalfCloser is a connection whose directions end one by one.
type HalfCloser interface {
	net.Conn
	CloseWrite() error
}

// ErrGone is returned (wrapped) by Exec when the sandbox ended under the process.
var ErrGone = errors.New("the sandbox has ended")

// ErrNoShell is returned (wrapped) by Exec for a KindShell process in an image that has no shell.
var ErrNoShell = errors.New("the image has no shell")

// RefusedError says that the operator's own limits forbid a spec that policy asked for. Reason may be shown to the
// operator and in the log, not to the client.
type RefusedError struct{ Reason string }

func (e *RefusedError) Error() string { return "sandbox refused: " + e.Reason }

// TextError says why a sandbox did not start, or has ended, in words that the client may read.
type TextError struct {
	Text string // one line: what happened and what to do
	Err  error  // all there is to know, for the gate's own log
}

func (e *TextError) Error() string { return e.Text + ": " + e.Err.Error() }

func (e *TextError) Unwrap() error { return e.Err }

// Spec is a sandbox to be started. Template is what the sandbox is, equal for all logins of a profile; Owner is whose
// it is.
type Spec struct {
	Template Template `json:"template"`
	Owner    Owner    `json:"owner"`

	// Join is which one of Template.Target is joined, as Targets gave it; it is set where that is.
	Join *Running `json:"join,omitempty"`

	// Reports gets what the agent reports, in order, as Template.ExecAudit asks for. While it does not return, programs in
	// the sandbox wait; an error ends the sandbox. It must not keep its argument. It is called from Start on until Close
	// has returned.
	Reports func(*Report) error `json:"-"`
}

// Template says what a sandbox is. The zero value of each field is the narrow choice.
type Template struct {
	Image      string    `json:"image"`                 // OCI reference, with tag or digest
	PullPolicy string    `json:"pull_policy"`           // "missing" (default), "always" or "never"
	UID        uint32    `json:"uid"`                   // user of all processes
	GID        uint32    `json:"gid"`                   // its group
	Groups     []uint32  `json:"groups,omitempty"`      // supplementary groups
	Hostname   string    `json:"hostname,omitempty"`    // host name inside; empty: the backend's choice
	Home       string    `json:"home,omitempty"`        // home directory, a tmpfs or Scratch; empty: /home/sandbox
	Env        []string  `json:"env,omitempty"`         // NAME=value added to the image's environment
	Mounts     []Mount   `json:"mounts,omitempty"`      // production data
	Network    string    `json:"network,omitempty"`     // empty: none
	Memory     int64     `json:"memory"`                // bytes; 0: the backend's default
	CPUs       float64   `json:"cpus"`                  // processors; 0: the backend's default
	PIDs       int64     `json:"pids"`                  // processes; 0: the backend's default
	TmpSize    int64     `json:"tmp_size"`              // bytes of /tmp; 0: a quarter of Memory
	HomeSize   int64     `json:"home_size"`             // bytes of the home directory; 0: a quarter of Memory
	Scratch    string    `json:"scratch,omitempty"`     // "volume": home is a disk-backed volume of this sandbox alone
	Caps       []string  `json:"caps,omitempty"`        // added capabilities, as "NET_RAW"; all others are dropped
	Runtime    string    `json:"runtime,omitempty"`     // OCI runtime; empty: the engine's default
	ExtraHosts []string  `json:"extra_hosts,omitempty"` // "name:address" lines for /etc/hosts
	ExecAudit  ExecAudit `json:"exec_audit,omitzero"`   // reports of executed programs

	// Target is what the sandbox is to join: see Joiner. A backend that is none refuses it. Nil: nothing.
	Target *Target `json:"target,omitempty"`

	// Of Kubernetes alone; a backend without them refuses them.
	Namespace string            `json:"namespace,omitempty"` // empty: the backend's default
	Nodes     map[string]string `json:"nodes,omitempty"`     // labels that the node must have
	Priority  string            `json:"priority,omitempty"`  // PriorityClass; empty: the backend's default
	Spread    []string          `json:"spread,omitempty"`    // labels of nodes over whose values sandboxes spread, where they can
	// Pod is JSON: a pod template to be merged, or a JSON Patch (RFC 6902), under the backend's own limits. Empty: none.
	Pod json.RawMessage `json:"pod,omitempty"`
}

// CheckEnv refuses what is no variable of an environment.
func (t *Template) CheckEnv() error {
	for _, v := range t.Env {
		if name, _, ok := strings.Cut(v, "="); !ok || name == "" || strings.ContainsRune(v, 0) {
			return &RefusedError{Reason: fmt.Sprintf("environment: %q is not NAME=value", v)}
		}
	}
	return nil
}

// Mount brings data into a sandbox.
type Mount struct {
	// Type is "bind" (default) or "volume"; on Kubernetes "bind", "pvc", "configmap", "secret", "image", "projected" or "csi".
	Type string `json:"type,omitempty"`
	// Source is a path on the host, a name, an image's reference, "configmap:NAME,secret:NAME" of a projected one, or
	// "DRIVER:NAME=VALUE,NAME=VALUE" of a CSI one.
	Source string `json:"source"`
	Target string `json:"target"`          // absolute path inside
	Write  bool   `json:"write,omitempty"` // false: read-only
}

// Owner says whose sandbox it is.
type Owner struct {
	Gate    string    `json:"gate"`    // name of the gate
	Session string    `json:"session"` // session ID
	User    string    `json:"user"`    // proven identity
	Profile string    `json:"profile"`
	Grant   string    `json:"grant"`   // ticket
	Expires time.Time `json:"expires"` // the latest end there can be; the sandbox ends by itself soon after
}

// Session is a session's sandbox as a Shared backend knows it.
type Session struct {
	Session string    // session ID
	Server  string    // the gate's name in the backend, unique there
	User    string    //
	Profile string    //
	Grant   string    // ticket
	ID      string    // the sandbox's
	Started time.Time // when the sandbox was made
}

// Shared is a Backend that knows the sandboxes of all gates that use it.
type Shared interface {
	// Running lists those whose sessions go on, in the order of the sessions' IDs.
	Running(ctx context.Context) ([]Session, error)
	// EndRunning ends a session by removing its sandbox, and returns it; nil: there is none. The session's own gate records
	// that the sandbox was removed.
	EndRunning(ctx context.Context, session string) (*Session, error)
}

// Info says what a backend started.
type Info struct {
	Backend string `json:"backend"`          // "docker", "kubernetes", "memory"
	Image   string `json:"image"`            // reference asked for
	Digest  string `json:"digest,omitempty"` // resolved: repository digest if there is one, else the image ID; empty: see Identified
	Node    string `json:"node,omitempty"`   // engine or node that runs it
	Spec    any    `json:"spec,omitempty"`   // the backend's own request as sent, without secrets; encodes to JSON
	// ExecAudit says whether executed programs are reported: "on", "on, strict", "off", or "off: " and why they can't be.
	ExecAudit string `json:"exec_audit,omitempty"`
	// Joined is what the sandbox has joined; nil: nothing.
	Joined *Joined `json:"joined,omitempty"`
}

// Kind is how a process is started.
type Kind uint8

const (
	KindShell Kind = iota + 1 // a login shell (RFC 4254, section 6.5, "shell")
	KindExec                  // Command by the shell's -c, or split into words where there is no shell ("exec")
	KindSFTP                  // the agent's own sftp server ("subsystem")
)

// Process is one process to run.
type Process struct {
	Channel  uint32    // the connection's channel number, for reports about the process
	Kind     Kind      //
	Command  string    // for KindExec
	Env      []string  // NAME=value, added last
	Dir      string    // working directory; empty: home
	Terminal *Terminal // nil: no pty; then stdin, stdout and stderr are three pipes
	Stdin    io.Reader // read to its end, which closes the process's stdin; nil: none. It must fail when the caller is done
	Stdout   io.Writer // with a terminal, all output
	Stderr   io.Writer //
	Resize   <-chan WindowSize
	Signals  <-chan string // RFC 4254 names: "INT", "TERM", ...
	X11      *X11          // nil: none
	// Typed, when not nil and Terminal is set, is called in order after the agent has written input to the terminal: n
	// more bytes of Stdin were written while the terminal's line discipline was as the flags say.
	Typed func(n int, state TerminalState)
}

// X11 is what a process needs to reach an X server by way of a Listener (RFC 4254, section 6.3.1): the agent writes the
// cookie into an authority file of the process's own, and sets DISPLAY and XAUTHORITY.
type X11 struct {
	Display  int    // the Listener's port is 6000 more, on 127.0.0.1
	Screen   uint32 //
	Protocol string // "MIT-MAGIC-COOKIE-1"
	Cookie   []byte // what the client's end checks
}

// Terminal is a pty request (RFC 4254, section 6.2).
type Terminal struct {
	Term  string     // TERM
	Size  WindowSize //
	Modes []byte     // encoded terminal modes (RFC 4254, section 8)
}

// WindowSize is a terminal's size in characters and pixels.
type WindowSize struct{ Columns, Rows, Width, Height uint32 }

// TerminalState is what decides whether typed bytes are likely a password.
type TerminalState struct {
	Echo      bool // ECHO set
	Canonical bool // ICANON set
}

// ExitStatus is how a process ended: by exit code, or by a signal when Signal is not empty.
type ExitStatus struct {
	Code       int    // exit code, 0-255
	Signal     string // RFC 4254 signal name without SIG, "KILL"
	CoreDumped bool
}
