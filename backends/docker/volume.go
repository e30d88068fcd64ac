package docker

import (
	"archive/tar"
	"bytes"
	"context"
	"crypto/rand"
	"crypto/sha256"
	"encoding/hex"
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"path/filepath"
	"strings"
	"time"

	"github.com/containerd/errdefs"
	"github.com/docker/docker/api/types/container"
	"github.com/docker/docker/api/types/filters"
	"github.com/docker/docker/api/types/image"
	"github.com/docker/docker/api/types/mount"
	"github.com/docker/docker/api/types/volume"
)

// An engine that does not see the gate's files gets the agent's into a volume: one for each version, which all gates of
// the engine share and which stays. Files are put into it, and read from it, through a helper: a container of an empty
// image, which is never started and is removed at once.

const (
	// volumePrefix begins the name of a volume that holds an agent; the beginning of the agent's hash follows.
	volumePrefix = "sallyport-agent-"

	labelAgent  = "sallyport.agent"  // of a volume: the agent's SHA-256
	labelMade   = "sallyport.made"   // of a volume: a random word, by which it is told from another of its name
	labelHelper = "sallyport.helper" // of a helper and its image: the gate's name

	// helperAge is what no helper reaches that is at work.
	helperAge = time.Minute
)

func (a agentFile) volume() string { return volumePrefix + a.hash[:32] }

// mount is the agent's volume in a container. Should there be none, the engine makes it when it makes the container,
// with these labels; if there is one, they change nothing.
func (a agentFile) mount() mount.Mount {
	return mount.Mount{
		Type: mount.TypeVolume, Source: a.volume(), Target: insideDir, ReadOnly: true,
		VolumeOptions: &mount.VolumeOptions{NoCopy: true, Labels: map[string]string{labelAgent: a.hash, labelMade: rand.Text()}},
	}
}

// helper makes a container of that name with one mount at /mnt, and calls use with its ID. Who has the name is alone.
func (b *Backend) helper(ctx context.Context, name string, m mount.Mount, use func(ctx context.Context, id string) error) error {
	m.Target = "/mnt"
	for {
		id, remove, err := b.makeHelper(ctx, name, m)
		if err == nil {
			working, done := context.WithTimeout(ctx, b.helperAge)
			defer done()
			return errors.Join(use(working, id), remove())
		}
		// Another has the name. The image is made when it is free: whoever waits here with one would find it too old.
		for errdefs.IsConflict(err) {
			if rerr := b.removeOldHelpers(ctx); rerr != nil {
				return rerr
			}
			select {
			case <-ctx.Done():
				return errors.Join(context.Cause(ctx), err)
			case <-time.After(100 * time.Millisecond):
			}
			if _, ierr := b.engine.ContainerInspect(ctx, name); errdefs.IsNotFound(ierr) {
				err = nil
			}
		}
		if err != nil {
			return err
		}
	}
}

// makeHelper makes a helper and its image, and says how to remove them.
func (b *Backend) makeHelper(ctx context.Context, name string, m mount.Mount) (id string, remove func() error, err error) {
	empty, err := b.emptyImage(ctx)
	if err != nil {
		return "", nil, fmt.Errorf("make an empty image: %w", err)
	}
	created, err := b.engine.ContainerCreate(ctx,
		&container.Config{Image: empty, Cmd: []string{"/none"}, NetworkDisabled: true, Labels: map[string]string{labelHelper: b.gate}},
		&container.HostConfig{NetworkMode: "none", LogConfig: container.LogConfig{Type: "none"}, Mounts: []mount.Mount{m}},
		nil, nil, name)
	remove = func() (err error) {
		ctx, stop := detached(ctx)
		defer stop()
		if created.ID != "" {
			err = b.removeContainer(ctx, created.ID)
		}
		if _, ierr := b.engine.ImageRemove(ctx, empty, image.RemoveOptions{Force: true}); ierr != nil && !errdefs.IsNotFound(ierr) {
			err = errors.Join(err, fmt.Errorf("remove the empty image: %w", ierr))
		}
		return err
	}
	if err != nil {
		if rerr := remove(); rerr != nil {
			return "", nil, fmt.Errorf("%w; %v", err, rerr)
		}
		return "", nil, err
	}
	return created.ID, remove, nil
}

// emptyImage makes an image with nothing in it, so that no other need be there, and gives its ID.
func (b *Backend) emptyImage(ctx context.Context) (string, error) {
	reference := "sallyport-helper:" + strings.ToLower(rand.Text())
	r, err := b.engine.ImageImport(ctx, image.ImportSource{Source: bytes.NewReader(make([]byte, 1024)), SourceName: "-"}, reference,
		image.ImportOptions{Changes: []string{"LABEL " + labelHelper + "=" + b.gate}})
	if err != nil {
		return "", err
	}
	_, err = io.Copy(io.Discard, r)
	r.Close()
	if err != nil {
		return "", err
	}
	// An import fails in the middle of an answer that began as a success: then there is no such image.
	img, err := b.engine.ImageInspect(ctx, reference)
	return img.ID, err
}

// removeOldHelpers removes what killed gates have left in the middle of their work, whosoever they were.
func (b *Backend) removeOldHelpers(ctx context.Context) error {
	info, err := b.engine.Info(ctx)
	if err != nil {
		return err
	}
	now, err := time.Parse(time.RFC3339Nano, info.SystemTime) // the engine's clock, as all times below
	if err != nil {
		return fmt.Errorf("the engine's time: %w", err)
	}
	old := now.Add(-b.helperAge).Unix()
	containers, err := b.engine.ContainerList(ctx, container.ListOptions{All: true, Filters: filters.NewArgs(filters.Arg("label", labelHelper))})
	if err != nil {
		return err
	}
	var errs []error
	for _, c := range containers {
		if c.State == container.StateCreated && c.Created < old {
			errs = append(errs, b.removeContainer(ctx, c.ID))
		}
	}
	images, err := b.engine.ImageList(ctx, image.ListOptions{Filters: filters.NewArgs(filters.Arg("label", labelHelper))})
	errs = append(errs, err)
	for _, i := range images {
		if i.Created >= old {
			continue
		}
		if _, err := b.engine.ImageRemove(ctx, i.ID, image.RemoveOptions{Force: true}); err != nil && !errdefs.IsNotFound(err) {
			errs = append(errs, err)
		}
	}
	return errors.Join(errs...)
}

// fillVolume sees to it that the agent's volume is there and holds the agent, and remembers which one that was. It says
// whether something had to be written.
func (b *Backend) fillVolume(ctx context.Context) (wrote bool, err error) {
	m := b.file.mount()
	m.ReadOnly = false
	err = b.helper(ctx, b.file.volume()+"-fill", m, func(ctx context.Context, id string) error {
		// The helper has the volume: nobody can remove it, or put another in its place.
		made, err := b.volumeMade(ctx)
		if err != nil {
			return err
		}
		// A gate that was killed may have left a part of it.
		if b.holdsAgent(ctx, id) != nil {
			wrote = true
			if err := b.copyAgent(ctx, id); err != nil {
				return err
			}
			if err := b.holdsAgent(ctx, id); err != nil {
				return err
			}
		}
		b.mu.Lock()
		b.filled = made
		b.mu.Unlock()
		return nil
	})
	return wrote, err
}

// copyAgent puts the agent into a helper's mount.
func (b *Backend) copyAgent(ctx context.Context, helper string) error {
	var packed bytes.Buffer
	w := tar.NewWriter(&packed)
	// Readable by nobody, and not the session's own: see installAgent.
	err := w.WriteHeader(&tar.Header{Typeflag: tar.TypeReg, Name: insideName, Mode: 0o111, Size: int64(len(b.file.content))})
	if err == nil {
		_, err = w.Write(b.file.content)
	}
	if err == nil {
		err = w.Close()
	}
	if err != nil {
		return err
	}
	if err := b.engine.CopyToContainer(ctx, helper, "/mnt", &packed, container.CopyToContainerOptions{}); err != nil {
		return fmt.Errorf("copy the agent into its volume: %w", err)
	}
	return nil
}

// holdsAgent says what is wrong with the agent in a helper's mount.
func (b *Backend) holdsAgent(ctx context.Context, helper string) error {
	r, _, err := b.engine.CopyFromContainer(ctx, helper, "/mnt/"+insideName)
	if err != nil {
		return fmt.Errorf("read the agent's volume: %w", err)
	}
	defer r.Close()
	t := tar.NewReader(r)
	h, err := t.Next()
	if err != nil {
		return fmt.Errorf("read the agent's volume: %w", err)
	}
	hash := sha256.New()
	if _, err := io.Copy(hash, io.LimitReader(t, agentLimit)); err != nil {
		return fmt.Errorf("read the agent's volume: %w", err)
	}
	if h.Typeflag != tar.TypeReg || h.Mode&0o7777 != 0o111 || h.Uid != 0 || h.Gid != 0 || hex.EncodeToString(hash.Sum(nil)) != b.file.hash {
		return errors.New("the agent's volume holds something else")
	}
	return nil
}

// volumeMade gives the word by which the agent's volume is known, "" if it has none.
func (b *Backend) volumeMade(ctx context.Context) (string, error) {
	v, err := b.engine.VolumeInspect(ctx, b.file.volume())
	if err != nil {
		return "", fmt.Errorf("find the agent's volume: %w", err)
	}
	return v.Labels[labelMade], nil
}

// keepVolume fills the agent's volume unless it is known to hold the agent. The caller has made a container with it, so
// it is the one that the container will see: until then the gate of another version may have removed it, as no sandbox
// had it. One without a word, which others have made, is looked at each time.
func (b *Backend) keepVolume(ctx context.Context) error {
	known := func() (bool, error) {
		made, err := b.volumeMade(ctx)
		b.mu.Lock()
		defer b.mu.Unlock()
		return made != "" && made == b.filled, err
	}
	if ok, err := known(); ok || err != nil {
		return err
	}
	b.filling.Lock()
	defer b.filling.Unlock()
	if ok, err := known(); ok || err != nil {
		return err // another session has done it
	}
	_, err := b.fillVolume(ctx)
	return err
}

// forgetVolume has the next sandbox look into the agent's volume.
func (b *Backend) forgetVolume() {
	b.mu.Lock()
	defer b.mu.Unlock()
	b.filled = ""
}

// refillVolume looks into the agent's volume whatever is known of it, and says whether it did not hold the agent.
func (b *Backend) refillVolume(ctx context.Context) (bool, error) {
	b.filling.Lock()
	defer b.filling.Unlock()
	return b.fillVolume(ctx)
}

// replaceVolume removes the agent's volume if others have made it, it has no word, and nobody uses it.
func (b *Backend) replaceVolume(ctx context.Context) error {
	made, err := b.volumeMade(ctx)
	if errdefs.IsNotFound(err) || err == nil && made != "" {
		return nil
	}
	if err == nil {
		err = b.engine.VolumeRemove(ctx, b.file.volume(), false)
	}
	if errdefs.IsConflict(err) {
		return nil
	}
	return err
}

// makeScratchVolume makes a home on the engine's disk, which belongs to the uid.
func (b *Backend) makeScratchVolume(ctx context.Context, session string, uid, gid uint32) error {
	name := namePrefix + session
	_, err := b.engine.VolumeCreate(ctx, volume.CreateOptions{Name: name, Labels: map[string]string{labelServer: b.gate, labelSession: session}})
	if err != nil {
		return err
	}
	m := mount.Mount{Type: mount.TypeVolume, Source: name, VolumeOptions: &mount.VolumeOptions{NoCopy: true}}
	return b.helper(ctx, name+"-scratch", m, func(ctx context.Context, id string) error {
		var packed bytes.Buffer
		w := tar.NewWriter(&packed)
		err := w.WriteHeader(&tar.Header{Typeflag: tar.TypeDir, Name: "mnt/", Mode: 0o700, Uid: int(uid), Gid: int(gid)})
		if err = errors.Join(err, w.Close()); err != nil {
			return err
		}
		return b.engine.CopyToContainer(ctx, id, "/", &packed, container.CopyToContainerOptions{})
	})
}

// removeVolume returns when there is no such volume. An engine that does not know a container any more may still hold its
// volumes for a moment.
func (b *Backend) removeVolume(ctx context.Context, name string) error {
	for end := time.Now().Add(10 * time.Second); ; {
		err := b.engine.VolumeRemove(ctx, name, true)
		if err == nil || errdefs.IsNotFound(err) {
			return nil
		}
		if !errdefs.IsConflict(err) || time.Now().After(end) {
			return err
		}
		select {
		case <-ctx.Done():
			return err
		case <-time.After(10 * time.Millisecond):
		}
	}
}

// reapVolumes removes the volumes of this gate that belong to no session of live.
func (b *Backend) reapVolumes(ctx context.Context, volumes []*volume.Volume, live map[string]bool) error {
	var errs []error
	for _, v := range volumes {
		if session := v.Labels[labelSession]; !live[session] && v.Name == namePrefix+session {
			errs = append(errs, b.removeVolume(ctx, v.Name))
		}
	}
	return errors.Join(errs...)
}

// pruneVolumes removes the volumes of other agents that no container has.
func (b *Backend) pruneVolumes(ctx context.Context) error {
	volumes, err := b.engine.VolumeList(ctx, volume.ListOptions{Filters: filters.NewArgs(filters.Arg("label", labelAgent))})
	if err != nil {
		return err
	}
	var errs []error
	for _, v := range volumes.Volumes {
		if !strings.HasPrefix(v.Name, volumePrefix) || v.Name == b.file.volume() {
			continue
		}
		// A conflict: it is in use.
		if err := b.engine.VolumeRemove(ctx, v.Name, false); err != nil && !errdefs.IsConflict(err) && !errdefs.IsNotFound(err) {
			errs = append(errs, err)
		}
	}
	return errors.Join(errs...)
}

// Transports.
const (
	transportAuto   = "auto"
	transportSocket = "socket"
	transportRelay  = "relay"
)

// Transport says how the gate reaches its agents, "socket" or "relay", and why so.
func (b *Backend) Transport() (way, why string) {
	if b.relay {
		return transportRelay, b.why
	}
	return transportSocket, b.why
}

// choose finds out how agents are to be reached. A socket in a bind mount needs an engine on the same file system, and
// in a pid namespace that this process sees: the agent is known by its pid.
func (b *Backend) choose(ctx context.Context) error {
	path, local := strings.CutPrefix(b.config.Host, "unix://")
	switch {
	case b.config.Transport != transportAuto:
		b.relay, b.why = b.config.Transport == transportRelay, "docker.transport says so"
		return nil
	case !local:
		b.relay, b.why = true, "the engine is reached over the network"
		return nil
	}
	pid, err := listenerOf(ctx, path)
	if err != nil {
		return fmt.Errorf("who is the engine: %w", err)
	}
	if pid == 0 {
		b.relay, b.why = true, "the engine's processes are not visible here: the gate runs in a container"
		return nil
	}
	switch shared, err := b.shares(ctx); {
	case err != nil:
		return fmt.Errorf("find out whether the engine sees the state directory (docker.transport: socket or relay spares it): %w", err)
	case shared:
		b.why = "the engine sees the gate's state directory and processes"
	default:
		b.relay, b.why = true, "the engine does not see the gate's state directory"
	}
	return nil
}

// listenerOf gives the process that listens on a unix socket, as this one sees it: 0 if it can't.
func listenerOf(ctx context.Context, path string) (int, error) {
	c, err := new(net.Dialer).DialContext(ctx, "unix", path)
	if err != nil {
		return 0, err
	}
	defer c.Close()
	return peerPID(c.(*net.UnixConn))
}

// shares says whether the engine sees the state directory: it is to show a file that was just written there.
func (b *Backend) shares(ctx context.Context) (shared bool, err error) {
	dir, err := os.MkdirTemp(b.config.StateDir, "probe-")
	if err != nil {
		return false, err
	}
	defer func() { err = errors.Join(err, os.RemoveAll(dir)) }()
	word := rand.Text()
	if err := os.WriteFile(filepath.Join(dir, "word"), []byte(word), 0o600); err != nil {
		return false, err
	}
	err = b.helper(ctx, namePrefix+"probe-"+rand.Text(), bind(dir, "", false), func(ctx context.Context, id string) error {
		r, _, err := b.engine.CopyFromContainer(ctx, id, "/mnt/word")
		if errdefs.IsNotFound(err) {
			return nil
		}
		if err != nil {
			return err
		}
		defer r.Close()
		t := tar.NewReader(r)
		if _, err := t.Next(); err != nil {
			return err
		}
		got, err := io.ReadAll(io.LimitReader(t, 64))
		shared = string(got) == word
		return err
	})
	if errdefs.IsInvalidArgument(err) {
		return false, nil // the engine has no such path to mount
	}
	return shared, err
}
