package docker

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"regexp"
	"slices"
	"strconv"
	"strings"
	"sync"
	"time"

	"github.com/containerd/errdefs"
	"github.com/docker/docker/api/types/container"
	"github.com/docker/docker/api/types/filters"
	"github.com/docker/docker/api/types/mount"

	"github.com/sallyport/sallyport/agent"
	"github.com/sallyport/sallyport/backends"
)

// Targets says which containers sandboxes may join, whatever profiles ask for, and how.
type Targets struct {
	Containers []string `yaml:"containers"` // by name; one may end in *; default none
	Labels     []string `yaml:"labels"`     // KEY=VALUE: containers that have one of these, too; default none
	Processes  bool     `yaml:"processes"`  // whether their process namespace may be joined
	Files      bool     `yaml:"files"`      // whether the uid of their processes may be had there
	// MaxPerTarget is how many sandboxes may have joined a container at a time; default 4.
	MaxPerTarget int `yaml:"max_per_target"`
}

const defaultPerTarget = 4

// labelTarget is the ID of the container that a sandbox has joined.
const labelTarget = "sallyport.target"

var containerPattern = regexp.MustCompile(`^([A-Za-z0-9][A-Za-z0-9_.-]*\*?|\*)$`)

func (t Targets) validate() (errs []error) {
	for _, name := range t.Containers {
		if !containerPattern.MatchString(name) {
			errs = append(errs, fmt.Errorf("targets.containers: %q is no container's name, nor the beginning of one and *", name))
		}
	}
	for _, label := range t.Labels {
		if key, _, ok := strings.Cut(label, "="); !ok || key == "" {
			errs = append(errs, fmt.Errorf("targets.labels: %q is not KEY=VALUE", label))
		}
	}
	if t.Files && !t.Processes {
		errs = append(errs, errors.New("targets.files: can't be had without processes"))
	}
	if t.MaxPerTarget < 0 {
		errs = append(errs, errors.New("targets.max_per_target: can't be negative"))
	}
	return errs
}

// permit says whether the operator lets this container be joined.
func (t Targets) permit(name string, labels map[string]string) bool {
	return slices.ContainsFunc(t.Containers, func(entry string) bool {
		prefix, open := strings.CutSuffix(entry, "*")
		return entry == name || open && strings.HasPrefix(name, prefix)
	}) || slices.ContainsFunc(t.Labels, func(entry string) bool {
		key, value, _ := strings.Cut(entry, "=")
		v, ok := labels[key]
		return ok && v == value
	})
}

// checkTarget refuses what can't be beside a target, or what the operator's configuration does not permit of it.
func (b *Backend) checkTarget(t backends.Template) error {
	c, target := b.config.Targets, t.Target
	switch {
	case len(c.Containers)+len(c.Labels) == 0:
		return refused("no container may be joined (targets)")
	case target.Namespace != "" || target.Workload != "" || target.Container != "":
		return refused("target: namespace, workload and container are Kubernetes' alone")
	case target.Name == "" && len(target.Labels) == 0:
		return refused("target: neither name nor labels are set")
	case target.Processes && !c.Processes:
		return refused("target: processes are not permitted (targets.processes)")
	case target.Files && (!c.Files || !target.Processes):
		return refused("target: files are not permitted (targets.files)")
	case t.Network != "" || t.Hostname != "" || len(t.ExtraHosts) > 0:
		return refused("target: its network, hostname and hosts are joined; name no network, hostname and extra_hosts")
	case t.UID == 0 && !target.Files:
		return refused("target: uid 0 is what its files are permitted for (permit.target.files)")
	case target.Processes && !target.Files && len(t.Caps) > 0:
		return refused("target: capabilities reach into its processes, as its files' permit does (permit.target.files)")
	}
	return nil
}

// Targets implements backends.Joiner.
func (b *Backend) Targets(ctx context.Context, spec backends.Spec, name string) ([]backends.Running, error) {
	target := spec.Template.Target
	if target == nil {
		return nil, nil
	}
	if err := b.checkTarget(spec.Template); err != nil {
		return nil, fmt.Errorf("docker: %w", err)
	}
	args := filters.NewArgs(filters.Arg("status", "running"))
	for key, value := range target.Labels {
		args.Add("label", key+"="+value)
	}
	list, err := b.engine.ContainerList(ctx, container.ListOptions{Filters: args})
	if err != nil {
		return nil, fmt.Errorf("docker: find the target: %w", err)
	}
	digests := make(map[string]string)
	var found []backends.Running
	for _, c := range list {
		r := backends.Running{ID: c.ID, Labels: c.Labels, Image: c.Image, Digest: c.ImageID}
		if len(c.Names) > 0 {
			r.Name = strings.TrimPrefix(c.Names[0], "/")
		}
		if name != "" && r.Name != name || b.unfit(target, r, c.HostConfig.NetworkMode) != "" {
			continue
		}
		found = append(found, r)
	}
	slices.SortFunc(found, func(a, b backends.Running) int { return cmp.Compare(a.Name, b.Name) })
	found = found[:min(len(found), backends.MaxTargets)]
	for i, r := range found {
		id := r.Digest
		if _, ok := digests[id]; !ok {
			digests[id] = id
			if img, err := b.engine.ImageInspect(ctx, id); err == nil {
				digests[id] = digest(r.Image, img)
			}
		}
		found[i].Digest = digests[id]
	}
	return found, nil
}

// unfit says why a container can't be the target; empty: it can.
func (b *Backend) unfit(target *backends.Target, r backends.Running, network string) string {
	_, ours := r.Labels[labelServer]
	switch {
	case target.Name != "" && r.Name != target.Name, !target.Has(r.Labels):
		return "is not what the profile names"
	case !b.config.Targets.permit(r.Name, r.Labels):
		return "is not listed (targets)"
	case ours:
		return "is a session's sandbox"
	case network == "host":
		return "has the host's network"
	case strings.HasPrefix(network, "container:"):
		return "has another container's network"
	}
	return ""
}

// joining is a target on its way to be joined.
type joining struct {
	backends.Running
	target  *backends.Target
	started string // when the container was; a restarted one is another
	release func() // others may join it; at any time, and again
}

// join looks at the target once more. Until release is called, no other sandbox of this gate is created in a target.
func (b *Backend) join(ctx context.Context, spec backends.Spec) (_ *joining, err error) {
	if spec.Join == nil {
		return nil, errors.New("no target was chosen")
	}
	gone := &backends.TextError{Text: "the target " + spec.Join.String() + " is not there any more: try again", Err: errors.New("target: gone since it was chosen")}
	c, err := b.engine.ContainerInspect(ctx, spec.Join.ID)
	if errdefs.IsNotFound(err) {
		return nil, gone
	}
	if err != nil {
		return nil, fmt.Errorf("look at the target: %w", err)
	}
	if c.ID != spec.Join.ID || c.State == nil || !c.State.Running {
		return nil, gone
	}
	now := *spec.Join
	now.Name, now.Labels = strings.TrimPrefix(c.Name, "/"), c.Config.Labels
	if why := b.unfit(spec.Template.Target, now, string(c.HostConfig.NetworkMode)); why != "" {
		return nil, refused("target %s %s", now.Name, why)
	}
	if m := c.HostConfig.PidMode; spec.Template.Target.Processes && m != "" && m != "private" {
		return nil, refused("target %s has the processes of others (pid mode %s)", now.Name, m)
	}
	b.joins.Lock()
	j := &joining{Running: now, target: spec.Template.Target, started: c.State.StartedAt, release: sync.OnceFunc(b.joins.Unlock)}
	there, err := b.engine.ContainerList(ctx, container.ListOptions{All: true, Filters: filters.NewArgs(filters.Arg("label", labelTarget+"="+c.ID))})
	if err == nil && len(there) >= cmp.Or(b.config.Targets.MaxPerTarget, defaultPerTarget) {
		err = &backends.TextError{
			Text: fmt.Sprintf("%d sessions have joined %s, the most allowed: try again later", len(there), now.Name),
			Err:  errors.New("max_per_target is reached"),
		}
	}
	if err != nil {
		j.release()
		return nil, fmt.Errorf("join the target: %w", err)
	}
	return j, nil
}

// into changes the engine's request of an unjoined sandbox into that of one in the target's namespaces. Hosts file, resolver and
// hostname come with the network.
func (j *joining) into(r *request) {
	r.Config.NetworkDisabled = false
	r.Config.Labels[labelTarget] = j.ID
	r.Host.NetworkMode = container.NetworkMode("container:" + j.ID)
	r.Host.Mounts = slices.DeleteFunc(r.Host.Mounts, func(m mount.Mount) bool { return m.Target == "/etc/hosts" })
	if !j.target.Processes {
		return
	}
	r.Host.PidMode = container.PidMode("container:" + j.ID)
	if !j.target.Files {
		r.Config.Cmd = append(r.Config.Cmd, "--own-uid")
	}
}

// relayPID is what a relay is told of the agent's process.
func (j *joining) relayPID() int {
	if j != nil && j.target.Processes {
		return 0
	}
	return 1
}

// info is what the log is told.
func (j *joining) info() *backends.Joined {
	return &backends.Joined{Running: j.Running, What: j.target.Parts(), Weaker: j.target.Weaknesses()}
}

// sharedUID is the death of an agent that met a process of its own uid.
const sharedUID = "a process of the target has the session's uid, which permit.target.files is for"

// joinFailed adds words for the user to the failure of a start.
func (s *sandbox) joinFailed(ctx context.Context, err error) error {
	if s.joined == nil || err == nil {
		return err
	}
	// What an agent that ended has said is known by its exit code, which the engine tells a moment later.
	for limit := time.Now().Add(deathWait); s.exit.Load() == nil && ctx.Err() == nil && time.Now().Before(limit); {
		time.Sleep(10 * time.Millisecond)
	}
	if why := s.exit.Load(); why == nil || *why != sharedUID {
		if ctx.Err() == nil && s.targetGone(ctx) {
			err = &backends.TextError{Text: "the target " + s.joined.Name + " is not there any more: try again", Err: err}
		}
		return err
	}
	return &backends.TextError{Text: "the target has processes of the session's own user, and the profile does not permit its files: tell an operator", Err: err}
}

// exitShared is the exit code of such an agent, as the engine tells it.
var exitShared = strconv.Itoa(agent.ExitShared)

// inspectLimit bounds a look at the target when a session has ended.
const inspectLimit = 5 * time.Second

// targetGone says that the container is not the one any more that was joined, or does not run.
func (s *sandbox) targetGone(ctx context.Context) bool {
	ctx, stop := context.WithTimeout(ctx, inspectLimit)
	defer stop()
	c, err := s.backend.engine.ContainerInspect(ctx, s.joined.ID)
	if err != nil {
		return errdefs.IsNotFound(err)
	}
	return c.State == nil || !c.State.Running || c.State.StartedAt != s.joined.started
}

// rewait is the time until an engine that did not answer is asked again.
const rewait = time.Second

// waitEnd gives a value when a container has ended (nil), or it can't be known. Somebody always takes the engine's answer: the
// client's goroutine would wait for that for good.
func (b *Backend) waitEnd(ctx context.Context, id string, what container.WaitCondition) <-chan error {
	end := make(chan error, 1)
	go func() {
		ended, failed := b.engine.ContainerWait(ctx, id, what)
		select {
		case <-ended:
			end <- nil
		case err := <-failed:
			end <- err
		}
	}()
	return end
}

// watchTarget ends the session when its target has ended, or its own container: an agent that is not the first process can be
// killed, and an engine may go on with the relay's stream for a while.
func (s *sandbox) watchTarget() {
	ctx, stop := context.WithCancel(context.Background())
	defer stop()
	own := s.backend.waitEnd(ctx, s.id, container.WaitConditionNotRunning)
	for {
		// A restarted one runs again before it can be looked at.
		wait, again := context.WithCancel(ctx)
		ended := s.backend.waitEnd(wait, s.joined.ID, container.WaitConditionNextExit)
		if s.targetGone(ctx) { // before the wait began
			again()
			s.client.Close()
			return
		}
		select {
		case <-s.done:
			again()
			return
		case err := <-own:
			if err == nil || errdefs.IsNotFound(err) {
				again()
				s.client.Close()
				return
			}
			own = nil // a heartbeat that fails says it, later
		case err := <-ended:
			if err != nil {
				select {
				case <-s.done:
				case <-time.After(rewait):
				}
			}
		}
		again()
	}
}

// targetCause is the end of a sandbox, which the end of its target explains.
func (s *sandbox) targetCause(err error) error {
	if s.joined == nil || !s.targetGone(context.Background()) {
		return err
	}
	if err == nil {
		err = errors.New("its container does not run any more")
	}
	return &backends.TextError{Text: "the target " + s.joined.Name + " has ended", Err: err}
}
