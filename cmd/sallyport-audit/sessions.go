package main

import (
	"context"
	"crypto/ed25519"
	"errors"
	"iter"
	"sync"
	"time"

	"filippo.io/age"
	"github.com/spf13/cobra"

	"github.com/sallyport/sallyport/auditlog"
)

// jobs is how many sessions are read at once. Each may need three times a frame's bytes (auditlog.MaxFrameBytes), and all
// together shall stay under 200 MiB.
const jobs = 4

// logs is a store that is open, with the keys that may have signed what is in it, and those that it can be decrypted with.
type logs struct {
	source
	t     *tool
	keys  []ed25519.PublicKey
	ids   []age.Identity
	index *auditlog.Index // nil: logs are read, whatever the store's index has
	again bool            // a second time: what can't be read has been told
}

// openLogs opens the store at, or that of the flags if that is empty.
func (t *tool) openLogs(at string) (*logs, error) {
	src, err := t.open(at)
	if err != nil {
		return nil, err
	}
	l := &logs{source: src, t: t}
	if l.keys, err = t.keys(); err == nil {
		l.ids, err = t.identities()
	}
	if err != nil {
		return nil, errors.Join(err, src.Close())
	}
	return l, nil
}

// reader reads a log from its start.
func (l *logs) reader(log auditlog.Stored) *auditlog.SessionReader {
	r := auditlog.NewSessionReader(l.source, log, l.keys...)
	r.Decrypt(l.ids...)
	return r
}

// summary gives what a list shows of a session: what the index has, if that is enough for the selection, or else what the log says.
func (l *logs) summary(ctx context.Context, log auditlog.Stored, s *selection) *summary {
	if l.index != nil {
		// What is in the clear is little: who may decrypt the log is told what it says.
		if e, ok := l.index.Entry(log); ok && (!e.Clear || len(l.ids) == 0) {
			if m, enough := s.indexed(e); enough {
				if e.Clear {
					m.Unread = e.Records
					l.t.countUnread(auditlog.Report{Unread: e.Records})
				}
				return m
			}
		}
	}
	r := l.reader(log)
	m := summarize(ctx, r, s)
	l.t.countUnread(r.Report())
	return m
}

// zone is where times without a zone are meant, and printed.
func (t *tool) zone() *time.Location {
	if t.utc {
		return time.UTC
	}
	return time.Local
}

// chosen yields the sessions that are asked for: the one named by an ID, or those of the selection.
func (l *logs) chosen(ctx context.Context, id string, s *selection) iter.Seq2[auditlog.Stored, error] {
	if id == "" {
		return s.logs(ctx, l.source)
	}
	return func(yield func(auditlog.Stored, error) bool) { yield(find(ctx, l.source, id)) }
}

// each works on several logs at once, and gives the results to emit in the logs' order, one after the other. Logs without
// segments are left out: verify speaks of them. It ends with the first error of the list, of emit, or of ctx.
func each[T any](ctx context.Context, all iter.Seq2[auditlog.Stored, error], work func(context.Context, auditlog.Stored) T, emit func(T) error) error {
	ctx, cancel := context.WithCancel(ctx)
	var working sync.WaitGroup
	defer working.Wait()
	defer cancel()
	type answer struct {
		value T
		err   error
	}
	pending := make(chan chan answer, jobs-1) // and one whose answer is waited for
	go func() {
		defer close(pending)
		for log, err := range all {
			if err == nil && len(log.Segments) == 0 {
				continue
			}
			one := make(chan answer, 1)
			select {
			case pending <- one:
			case <-ctx.Done():
				return
			}
			if err != nil {
				one <- answer{err: err}
				return
			}
			working.Add(1)
			go func() {
				defer working.Done()
				one <- answer{value: work(ctx, log)}
			}()
		}
	}()
	var failed error
	for one := range pending {
		if failed != nil {
			continue // the list's goroutine ends with ctx
		}
		a := <-one
		if failed = a.err; failed == nil {
			failed = context.Cause(ctx)
		}
		if failed == nil {
			failed = emit(a.value)
		}
		if failed != nil {
			cancel()
		}
	}
	if failed == nil {
		failed = context.Cause(ctx)
	}
	return failed
}

// errEnough ends each when the limit is reached.
var errEnough = errors.New("enough")

// summarizeAll gives the summaries of the sessions that are wanted, in order.
func (l *logs) summarizeAll(ctx context.Context, all iter.Seq2[auditlog.Stored, error], s *selection, emit func(auditlog.Stored, *summary) error) error {
	type found struct {
		log auditlog.Stored
		sum *summary
	}
	n := 0
	err := each(ctx, all, func(ctx context.Context, log auditlog.Stored) found {
		return found{log, l.summary(ctx, log, s)}
	}, func(f found) error {
		if f.sum.State == auditlog.Unreadable && !l.again { // whatever is asked for: it may be in it
			l.t.damage.add(*f.sum.Report)
		}
		if !s.match(f.sum) {
			return nil
		}
		if err := emit(f.log, f.sum); err != nil {
			return err
		}
		if n++; n == s.limit {
			return errEnough
		}
		return nil
	})
	if errors.Is(err, errEnough) {
		return nil
	}
	return err
}

// count takes note of what of a log could not be read, and of damage; not again, if that was done when it was chosen.
func (l *logs) count(r *auditlog.SessionReader, chosen *summary) {
	if chosen == nil {
		l.t.countUnread(r.Report())
	}
	if chosen == nil || chosen.State != auditlog.Unreadable {
		l.t.damage.add(r.Report())
	}
}

// oneOrMany is what commands say that take a session, or a selection of them.
func oneOrMany(args []string) string {
	if len(args) > 0 {
		return args[0]
	}
	return ""
}

// completeSessions completes a session's ID.
func (t *tool) completeSessions(c *cobra.Command, args []string, start string) ([]string, cobra.ShellCompDirective) {
	if len(args) > 0 {
		return nil, cobra.ShellCompDirectiveNoFileComp
	}
	src, err := t.open("")
	if err != nil {
		return nil, cobra.ShellCompDirectiveNoFileComp
	}
	defer src.Close()
	const most, patience = 200, 3 * time.Second // a store may be large, or far away
	ctx, cancel := context.WithTimeout(c.Context(), patience)
	defer cancel()
	names := []string{"latest"}
	for log, err := range auditlog.Logs(ctx, src, auditlog.SessionPrefix) {
		if err != nil || len(names) >= most {
			break
		}
		if len(log.Name.ID) >= len(start) && log.Name.ID[:len(start)] == start {
			names = append(names, log.Name.ID)
		}
	}
	return names, cobra.ShellCompDirectiveNoFileComp
}
