package docker

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"time"

	"github.com/docker/docker/api/types/container"
	"github.com/docker/docker/api/types/events"
	"github.com/docker/docker/api/types/filters"
	"github.com/docker/docker/api/types/volume"

	"github.com/sallyport/sallyport/agent"
)

// reapEvery is the time between looks for what an ended session has left.
const reapEvery = 30 * time.Second

// Run removes what earlier gates of this name and failed removals left, at once and every 30 s, and listens to the
// engine for why containers die, until ctx ends. No other gate may use the state directory meanwhile.
func (b *Backend) Run(ctx context.Context) {
	heard := make(chan struct{})
	go func() {
		defer close(heard)
		b.hear(ctx)
	}()
	defer func() { <-heard }()
	if err := errors.Join(b.pruneAgents(ctx), b.removeOldHelpers(ctx)); err != nil && ctx.Err() == nil {
		b.log.WarnContext(ctx, "remove old agents", "err", err)
	}
	t := time.NewTicker(reapEvery)
	defer t.Stop()
	for {
		if err := b.Reap(ctx); err != nil && ctx.Err() == nil {
			b.log.ErrorContext(ctx, "remove leftovers", "err", err)
		}
		select {
		case <-ctx.Done():
			return
		case <-t.C:
		}
	}
}

// Reap removes every container, socket and scratch directory of this gate that belongs to no sandbox of this Backend.
func (b *Backend) Reap(ctx context.Context) error {
	// Directories first: what is listed before the live sessions are read can't be newer than these.
	var names []string
	var errs []error
	for _, dir := range []string{runDir, scratchDir} {
		entries, err := os.ReadDir(filepath.Join(b.config.StateDir, dir))
		errs = append(errs, err)
		for _, e := range entries {
			names = append(names, filepath.Join(dir, e.Name()))
		}
	}
	containers, err := b.engine.ContainerList(ctx, container.ListOptions{
		All: true, Filters: filters.NewArgs(filters.Arg("label", labelServer+"="+b.gate)),
	})
	errs = append(errs, err)
	volumes, err := b.engine.VolumeList(ctx, volume.ListOptions{Filters: filters.NewArgs(filters.Arg("label", labelServer+"="+b.gate))})
	errs = append(errs, err)
	b.mu.Lock()
	live := make(map[string]bool, len(b.live))
	for session := range b.live {
		live[session] = true
	}
	b.mu.Unlock()
	for _, c := range containers {
		session := c.Labels[labelSession]
		// An image can carry any label: the name, which only a gate gives, must agree.
		if live[session] || len(c.Names) == 0 || strings.TrimPrefix(c.Names[0], "/") != namePrefix+session {
			continue
		}
		b.log.InfoContext(ctx, "removing a leftover sandbox", "session", session, "container", c.ID)
		if err := b.removeContainer(ctx, c.ID); err != nil {
			errs = append(errs, fmt.Errorf("remove container: %w", err))
		}
	}
	errs = append(errs, b.reapVolumes(ctx, volumes.Volumes, live))
	for _, name := range names {
		if !live[filepath.Base(name)] {
			errs = append(errs, os.RemoveAll(filepath.Join(b.config.StateDir, name)))
		}
	}
	return errors.Join(errs...)
}

// hear tells sandboxes why their containers died, until ctx ends.
func (b *Backend) hear(ctx context.Context) {
	for {
		messages, errs := b.engine.Events(ctx, events.ListOptions{Filters: filters.NewArgs(
			filters.Arg("type", string(events.ContainerEventType)),
			filters.Arg("event", string(events.ActionDie)), filters.Arg("event", string(events.ActionOOM)),
			filters.Arg("label", labelServer+"="+b.gate),
		)})
		oom := make(map[string]bool) // containers that met their limit and have not died, by ID
		for listening := true; listening; {
			select {
			case m := <-messages:
				if m.Action == events.ActionOOM {
					oom[m.Actor.ID] = true
					continue
				}
				b.died(m, oom[m.Actor.ID])
				delete(oom, m.Actor.ID)
			case <-errs:
				listening = false
			}
		}
		select {
		case <-ctx.Done():
			return
		case <-time.After(time.Second):
		}
	}
}

func (b *Backend) died(m events.Message, oom bool) {
	why := "the sandbox ended, exit code " + m.Actor.Attributes["exitCode"]
	switch m.Actor.Attributes["exitCode"] {
	case exitShared:
		why = sharedUID
	case strconv.Itoa(agent.ExitRelay):
		why = "the relay into the sandbox ended"
	case "137":
		why = "the sandbox was killed"
		if oom {
			why = "the sandbox was killed: it ran out of memory"
		}
	}
	b.mu.Lock()
	defer b.mu.Unlock()
	if s := b.live[m.Actor.Attributes[labelSession]]; s != nil {
		s.exit.Store(&why)
		select {
		case s.death <- why:
		default:
		}
	}
}
