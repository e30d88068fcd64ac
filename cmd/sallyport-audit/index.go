package main

import (
	"context"
	"crypto/ed25519"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"iter"
	"os"
	"path/filepath"
	"time"

	"github.com/spf13/cobra"

	"github.com/sallyport/sallyport/auditlog"
)

// fromIndex marks, in a table, a session whose log was not read: what is told of it, its state too, is the index's word.
const fromIndex = " (index)"

// index reads the store's index, and the cache's. Sessions that it does not have, or not as the store has them, are read from their
// logs.
func (t *tool) index(ctx context.Context, src auditlog.Source, keys []ed25519.PublicKey, since time.Time) (*auditlog.Index, error) {
	ids, err := t.identities()
	if err != nil {
		return nil, err
	}
	x, err := auditlog.ReadIndex(ctx, src, auditlog.IndexOptions{Keys: keys, Identities: ids, Since: since})
	if err != nil {
		return nil, err
	}
	t.indexFailed = x.Failed
	if t.cache == "" {
		return x, nil
	}
	f, err := os.Open(t.cache)
	if errors.Is(err, fs.ErrNotExist) {
		return nil, fmt.Errorf("--index-cache %s: not there: make it with sallyport-audit index rebuild", t.cache)
	}
	if err != nil {
		return nil, fmt.Errorf("--index-cache: %w", err)
	}
	defer f.Close()
	if err := x.ReadCache(f); err != nil {
		return nil, fmt.Errorf("--index-cache %s: %w", t.cache, err)
	}
	return x, nil
}

// tellIndexFailed says which of the index's logs could not be read, and gives an error if there is one: the list is whole without them,
// but the store is not as it should be.
func (t *tool) tellIndexFailed(stderr io.Writer) error {
	for i, err := range t.indexFailed {
		if i == maxDamageTold {
			fmt.Fprintf(stderr, "sallyport-audit: and %d more of the index\n", len(t.indexFailed)-i)
			break
		}
		fmt.Fprintf(stderr, "sallyport-audit: index: %s: its entries are not used, the logs are read instead\n", clean(err.Error()))
	}
	if len(t.indexFailed) > 0 {
		return errSilent
	}
	return nil
}

// indexedSummary is what an entry tells of a session.
func indexedSummary(e auditlog.Entry) summary {
	s := summary{ID: e.ID, User: e.User, Groups: e.Groups, Ticket: e.Ticket, Profile: e.Profile, Source: e.Source, Gate: e.Gate, Image: e.Image, Digest: e.Digest,
		Start: e.Start, End: e.End, Seconds: e.End.Sub(e.Start).Seconds(), Commands: e.Commands, Programs: e.Programs, Files: e.Files, Forwards: e.Forwards,
		Alerts: e.Alerts, Input: e.Input, Output: e.Output, Cause: e.Cause, State: auditlog.Sealed, Indexed: true}
	if s.Commands == nil {
		s.Commands = []string{}
	}
	return s
}

func (t *tool) indexCommand() *cobra.Command {
	c := &cobra.Command{
		Use: "index", Short: "Look at a store's index, compare it with the logs, or make one of your own", Args: cobra.NoArgs,
		RunE: func(c *cobra.Command, _ []string) error { return c.Help() }, // without it a mistyped command would be no error
		Long: `Look at a store's index, compare it with the logs, or make one of your own.

A gate indexes its sessions, so that list need not read every log. What comes from an index is the gate's word, signed; list marks
such sessions with "(index)", and reads the log of every session that the index does not have as the store has it.`,
		Example: `  sallyport-audit index status /mnt/evidence
  sallyport-audit index verify s3://evidence/gate-1 --key gate.pub -i auditor.txt
  sallyport-audit index rebuild --index-cache ~/.cache/evidence.index`,
	}
	c.AddCommand(t.indexStatusCommand(), t.indexVerifyCommand(), t.indexRebuildCommand())
	return c
}

func (t *tool) indexStatusCommand() *cobra.Command {
	return &cobra.Command{
		Use: "status [STORE]", Short: "Say how many sessions are indexed, and which the index knows that are not there", Args: cobra.MaximumNArgs(1),
		Long: `Say how many sessions are indexed, and which the index knows that are not there. A session that is indexed and not there was
taken away, or has been deleted by age; verify says which of them must be there.`,
		Example: `  sallyport-audit index status /mnt/evidence
  sallyport-audit index status s3://evidence/gate-1 --utc`,
		RunE: func(c *cobra.Command, args []string) error {
			return t.withIndex(c.Context(), args, func(src source, keys []ed25519.PublicKey, x *auditlog.Index) error {
				seen := make(map[string]struct{})
				sessions, indexed := 0, 0
				for log, err := range auditlog.Logs(c.Context(), src, auditlog.SessionPrefix) {
					if err != nil {
						return err
					}
					if len(log.Segments) == 0 {
						continue
					}
					sessions++
					seen[log.Name.ID] = struct{}{}
					if _, ok := x.Entry(log); ok {
						indexed++
					}
				}
				out := c.OutOrStdout()
				fmt.Fprintf(out, "%d sessions, %d indexed, in %d objects of the index\n", sessions, indexed, x.Objects)
				gone := 0
				for e := range x.Missing(seen, time.Time{}) {
					if gone++; gone <= maxListed {
						fmt.Fprintf(out, "not there: %s of %s, ended %s\n", clean(e.ID), t.time(e.Start), t.time(e.End))
					}
				}
				if gone > maxListed {
					fmt.Fprintf(out, "and %d more\n", gone-maxListed)
				}
				return t.tellDamagedIndex(out, x)
			})
		},
	}
}

func (t *tool) withIndex(ctx context.Context, args []string, f func(src source, keys []ed25519.PublicKey, x *auditlog.Index) error) error {
	dir := ""
	if len(args) > 0 {
		dir = args[0]
	}
	src, err := t.open(dir)
	if err != nil {
		return err
	}
	defer src.Close()
	keys, err := t.keys()
	if err != nil {
		return err
	}
	x, err := t.index(ctx, src, keys, time.Time{})
	if err != nil {
		return err
	}
	return f(src, keys, x)
}

// tellDamagedIndex prints what is wrong with the index's own logs.
func (t *tool) tellDamagedIndex(out io.Writer, x *auditlog.Index) error {
	for _, rep := range x.Reports {
		if err := t.printReport(out, rep); err != nil {
			return err
		}
	}
	if len(x.Reports) > 0 {
		return errDamaged
	}
	return nil
}

func (t *tool) indexVerifyCommand() *cobra.Command {
	return &cobra.Command{
		Use: "verify [STORE]", Short: "Compare the index with every session's log", Args: cobra.MaximumNArgs(1),
		Long: `Compare the index with every session's log. Sessions that the index does not have are counted, and are no damage: the log is
what counts. An encrypted log has to be read for it: give an identity (-i).`,
		Example: `  sallyport-audit index verify /mnt/evidence --key gate.pub
  sallyport-audit index verify s3://evidence/gate-1 -i auditor.txt`,
		RunE: func(c *cobra.Command, args []string) error {
			return t.withIndex(c.Context(), args, func(src source, keys []ed25519.PublicKey, x *auditlog.Index) error {
				out := c.OutOrStdout()
				differ, none, logs := 0, 0, 0
				for log, err := range auditlog.Logs(c.Context(), src, auditlog.SessionPrefix) {
					if err != nil {
						return err
					}
					if len(log.Segments) == 0 {
						continue
					}
					r, err := t.reader(src, log, keys...)
					if err != nil {
						return err
					}
					e, complete := auditlog.EntryOf(c.Context(), r)
					if err := context.Cause(c.Context()); err != nil {
						return err
					}
					t.countUnread(r.Report())
					if !complete {
						if r.Report().State == auditlog.Unreadable {
							t.damage.add(r.Report())
						}
						continue // live or damaged: verify says so
					}
					logs++
					if _, ok := x.Entry(log); !ok {
						none++
					}
					if what := x.CompareIndex(e); what != "" {
						differ++
						fmt.Fprintf(out, "%-11s %s  %s\n", auditlog.Damaged, clean(e.ID), what)
					}
				}
				fmt.Fprintf(out, "%d logs compared: %d otherwise in the index, %d not usable from it\n", logs, differ, none)
				if err := t.tellDamagedIndex(out, x); err != nil || differ > 0 {
					return errDamaged
				}
				return nil
			})
		},
	}
}

func (t *tool) indexRebuildCommand() *cobra.Command {
	return &cobra.Command{
		Use: "rebuild [STORE] --index-cache FILE", Short: "Make an index of your own out of the logs, for a store whose own is lost", Args: cobra.MaximumNArgs(1),
		Long: `Make an index of your own out of the logs that the store's index does not have, and keep it in a file on this machine, which list
--index-cache then takes. The logs are verified on the way. The file holds what the entries tell (users, tickets, commands) and is
not encrypted; it is made with mode 0600.`,
		Example: `  sallyport-audit index rebuild /mnt/evidence --index-cache ~/.cache/evidence.index
  sallyport-audit list /mnt/evidence --index-cache ~/.cache/evidence.index`,
		RunE: func(c *cobra.Command, args []string) error {
			to := t.cache
			if to == "" {
				return errors.New("say --index-cache FILE: where to keep it")
			}
			if _, err := os.Stat(to); errors.Is(err, fs.ErrNotExist) {
				t.cache = "" // a first one
			}
			return t.withIndex(c.Context(), args, func(src source, keys []ed25519.PublicKey, x *auditlog.Index) error {
				n, err := t.rebuild(c.Context(), src, keys, x, to)
				if err != nil {
					return err
				}
				_, err = fmt.Fprintf(c.OutOrStdout(), "%d sessions in %s\n", n, clean(to))
				return err
			})
		},
	}
}

// rebuild writes entries of all sealed sessions to a file, those that the index has and those read from their logs.
func (t *tool) rebuild(ctx context.Context, src source, keys []ed25519.PublicKey, x *auditlog.Index, to string) (n int, err error) {
	f, err := os.CreateTemp(filepath.Dir(to), ".index-*") // 0600
	if err != nil {
		return 0, err
	}
	defer func() {
		if err != nil {
			err = errors.Join(err, f.Close(), os.Remove(f.Name()))
		}
	}()
	var failed error
	var all iter.Seq[auditlog.Entry] = func(yield func(auditlog.Entry) bool) {
		for log, err := range auditlog.Logs(ctx, src, auditlog.SessionPrefix) {
			if failed = err; err != nil {
				return
			}
			if len(log.Segments) == 0 {
				continue
			}
			e, ok := x.Entry(log)
			if !ok || e.Clear {
				r, err := t.reader(src, log, keys...)
				if failed = err; err != nil {
					return
				}
				if e, ok = auditlog.EntryOf(ctx, r); !ok {
					t.countUnread(r.Report())
					if r.Report().State == auditlog.Unreadable {
						t.damage.add(r.Report())
					}
					continue
				}
			}
			if failed = context.Cause(ctx); failed != nil || !yield(e) {
				return
			}
			n++
		}
	}
	err = auditlog.WriteCache(f, all)
	if err = errors.Join(failed, err); err != nil {
		return 0, err
	}
	if err := errors.Join(f.Sync(), f.Close()); err != nil {
		return 0, err
	}
	return n, os.Rename(f.Name(), to)
}
