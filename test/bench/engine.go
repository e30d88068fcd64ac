package main

import (
	"context"
	"errors"
	"fmt"
	"strings"
	"sync"
	"time"

	"github.com/docker/docker/api/types/container"
	"github.com/docker/docker/api/types/filters"
	"github.com/docker/docker/api/types/mount"
	"github.com/docker/docker/client"
)

const (
	serverLabel = "sallyport.server" // on a gate's containers
	benchLabel  = "sallyport.bench"  // on ours
)

// engine is the Docker engine, used without a gate.
type engine struct {
	api   *client.Client
	shape shape
	run   string // value of benchLabel
}

// shape is a sandbox's container as a gate made it, with true as its program.
type shape struct {
	config *container.Config
	host   *container.HostConfig
}

func newEngine(ctx context.Context) (*engine, error) {
	api, err := client.NewClientWithOpts(client.FromEnv, client.WithAPIVersionNegotiation())
	if err != nil {
		return nil, err
	}
	if _, err := api.Ping(ctx); err != nil {
		return nil, errors.Join(err, api.Close())
	}
	return &engine{api: api, run: fmt.Sprint(time.Now().UnixNano())}, nil
}

func (e *engine) close() error {
	return errors.Join(e.remove(benchLabel+"="+e.run), e.api.Close())
}

func (e *engine) list(ctx context.Context, label string) ([]container.Summary, error) {
	only := filters.NewArgs(filters.Arg("label", label))
	return e.api.ContainerList(ctx, container.ListOptions{All: true, Filters: only})
}

// count counts a gate's containers.
func (e *engine) count(ctx context.Context, g *gate) (int, error) {
	instance, err := g.instance()
	if err != nil {
		return 0, err
	}
	all, err := e.list(ctx, serverLabel+"="+instance)
	return len(all), err
}

// removeAll stops a gate and removes what it has left, should it have failed.
func (e *engine) removeAll(g *gate) error {
	err := g.stop()
	instance, ierr := g.instance()
	if ierr != nil {
		return errors.Join(err, ierr)
	}
	return errors.Join(err, e.remove(serverLabel+"="+instance))
}

func (e *engine) remove(label string) error {
	ctx, cancel := context.WithTimeout(context.Background(), restWait)
	defer cancel()
	all, err := e.list(ctx, label)
	if err != nil {
		return err
	}
	var wg sync.WaitGroup
	for _, c := range all {
		wg.Go(func() {
			// It may be going by itself.
			e.api.ContainerRemove(ctx, c.ID, container.RemoveOptions{Force: true, RemoveVolumes: true})
		})
	}
	wg.Wait()
	for len(all) > 0 {
		if all, err = e.list(ctx, label); err != nil {
			return err
		}
		time.Sleep(10 * time.Millisecond)
	}
	return nil
}

// shape looks at a running sandbox of the gate.
func (b *bench) shape(ctx context.Context) (shape, error) {
	conn, err := b.client.dial(ctx, &b.gate.target)
	if err != nil {
		return shape{}, err
	}
	defer conn.Close()
	if _, err := conn.runTrue(); err != nil { // then the sandbox is there
		return shape{}, err
	}
	instance, err := b.gate.instance()
	if err != nil {
		return shape{}, err
	}
	all, err := b.engine.list(ctx, serverLabel+"="+instance)
	if err != nil {
		return shape{}, err
	}
	if len(all) != 1 {
		return shape{}, fmt.Errorf("there are %d sandboxes where one should be", len(all))
	}
	c, err := b.engine.api.ContainerInspect(ctx, all[0].ID)
	if err != nil {
		return shape{}, err
	}
	s := shape{config: c.Config, host: c.HostConfig}
	s.config.Entrypoint, s.config.Cmd = []string{"/bin/true"}, nil
	s.config.Labels = map[string]string{benchLabel: b.engine.run} // a gate's would have it reap them
	// The session's own socket is gone with it.
	var mounts []mount.Mount
	for _, m := range s.host.Mounts {
		if !strings.Contains(m.Source, all[0].Labels["sallyport.session"]) {
			mounts = append(mounts, m)
		}
	}
	s.host.Mounts = mounts
	return s, nil
}

// bare is what the engine takes for one container.
type bare struct{ create, start, wait time.Duration }

func (t bare) total() time.Duration { return t.create + t.start + t.wait }

// once creates and starts a container and waits for its program's end. The engine removes it.
func (e *engine) once(ctx context.Context) (bare, error) {
	var t bare
	ctx, cancel := context.WithTimeout(ctx, restWait)
	defer cancel()
	began := time.Now()
	c, err := e.api.ContainerCreate(ctx, e.shape.config, e.shape.host, nil, nil, "")
	if err != nil {
		return t, fmt.Errorf("create container: %w", err)
	}
	t.create = time.Since(began)
	ended, failed := e.api.ContainerWait(ctx, c.ID, container.WaitConditionNextExit)
	began = time.Now()
	if err := e.api.ContainerStart(ctx, c.ID, container.StartOptions{}); err != nil {
		return t, fmt.Errorf("start container: %w", err)
	}
	t.start = time.Since(began)
	began = time.Now()
	select {
	case r := <-ended:
		if r.StatusCode != 0 {
			return t, fmt.Errorf("the container's true ended with %d", r.StatusCode)
		}
	case err := <-failed:
		return t, fmt.Errorf("wait for the container: %w", err)
	}
	t.wait = time.Since(began)
	return t, nil
}

// settle waits until our containers are gone.
func (e *engine) settle(ctx context.Context) error {
	ctx, cancel := context.WithTimeout(ctx, restWait)
	defer cancel()
	for {
		all, err := e.list(ctx, benchLabel+"="+e.run)
		if err != nil || len(all) == 0 {
			return err
		}
		time.Sleep(10 * time.Millisecond)
	}
}
