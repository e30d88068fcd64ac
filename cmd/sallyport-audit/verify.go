package main

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"strings"
	"sync"
	"time"

	"github.com/spf13/cobra"

	"github.com/sallyport/sallyport/auditlog"
	"github.com/sallyport/sallyport/auditlog/tlog"
	"github.com/sallyport/sallyport/auditlog/verify"
)

// Exit codes of verify, beside those of all commands.
const (
	exitUnsealed = 3
	exitStale    = 4
)

// codeError is one that has an exit code of its own.
type codeError struct {
	code int
	text string
}

func (e *codeError) Error() string { return e.text }

// verifyOptions are the flags of verify.
type verifyOptions struct {
	day, from, to string
	since         []string
	live, closed  bool
	beat          time.Duration
	gates         []string
	sealed, quiet bool
	identity      bool // one was given
	parallel      int
}

func (t *tool) verifyCommand() *cobra.Command {
	var o verifyOptions
	c := &cobra.Command{
		Use: "verify [ID | STORE]", Short: "Prove a session, the sessions of some days, or all of a store", Args: cobra.MaximumNArgs(1),
		Long: `Check hashes, order, signatures and seal of a session, or of all logs in a directory or bucket, or of all in --store; and that the
gate's transparency log names them: what it names and the store does not have is missing. Of a whole store every object is read.
Nothing but the store is asked, and the pinned keys.

An encrypted log is checked as far as it goes without reading it: hashes, order, signatures. With --identity its content is, too.
What a gate's index says is held against the logs; "index verify" says where it differs.

With --key, every signature must be by one of the keys in the file. Without, a log is checked against the key that it
names itself, and said to be unpinned: that shows damage, but not a forger with a key of his own.

A live log is one that has no last segment yet. That the newest objects were taken away can't be seen from a store by anyone, but by
the age of the newest checkpoint, or from a checkpoint that was kept elsewhere (--since; the command checkpoint prints one). A gate that
stops closes its transparency log: the last checkpoint says so, signed. With --closed each transparency log must either have a
checkpoint that is not older than --beat, or be closed, or end with a checkpoint that was kept: otherwise the gate was killed, or its
newest objects were taken away. --live asks for the same, and for a gate that is alive. If a gate was killed and you know it, keep
the checkpoint of its log. What a gate wrote after it was started again can be taken away back to where it had closed its log before:
name the gates that must be alive (--gate).

Where old logs are deleted, as an expiry rule does, --from names the first day from which they must be there.

Exit codes: 0 all is intact; 1 it could not be found out (usage, a store or an object that can't be read, nothing there, with --identity: content that
it does not open); 2 something is altered, cut, out of order, missing or signed by an unknown key; 3 with --sealed: a log has no end
yet, or no checkpoint has it; 4 with --live: the newest checkpoint is too old, or of the future, and with --live or --closed: a
transparency log neither goes on nor was closed. Of several, 2 comes first, then what can't be read, 4, 3, and content that is not opened.`,
		Example: `  sallyport-audit verify /mnt/evidence --key gate.pub
  sallyport-audit verify latest
  sallyport-audit verify s3://evidence/gate-1 --day 2026-11-24 --sealed --quiet
  sallyport-audit verify s3://evidence/gate-1 --key gate.pub --live --since kept.checkpoint
  sallyport-audit verify s3://evidence/gate-1 --key gate.pub --identity auditor.key`,
		RunE: func(c *cobra.Command, args []string) error {
			arg := ""
			if len(args) > 0 {
				arg = args[0]
			}
			return t.verify(c.Context(), arg, o, c.OutOrStdout(), c.ErrOrStderr())
		},
	}
	f := c.Flags()
	f.StringVar(&o.day, "day", "", "only logs that began on this day, YYYY-MM-DD (UTC)")
	f.StringVar(&o.from, "from", "", "only logs that began on this day or later")
	f.StringVar(&o.to, "to", "", "only logs that began on this day or before")
	f.StringArrayVar(&o.since, "since", nil, "file of checkpoints that were kept: the store must go on from them")
	f.BoolVar(&o.live, "live", false, "fail if the newest checkpoint is older than the beat: the gate is down, or objects were taken away")
	f.BoolVar(&o.closed, "closed", false, "fail if a transparency log neither goes on (--beat), nor was closed by its gate, nor ends where a kept checkpoint does; --live does so too")
	f.DurationVar(&o.beat, "beat", time.Minute, "how old the newest checkpoint of a log that goes on may be")
	f.StringSliceVar(&o.gates, "gate", nil, "with --live: gates that must each have so new a checkpoint (default: any one)")
	f.BoolVar(&o.sealed, "sealed", false, "fail if a log has no end yet, or is in no checkpoint yet")
	f.BoolVarP(&o.quiet, "quiet", "q", false, "print what is wrong, and the sum")
	f.IntVar(&o.parallel, "parallel", 0, "how much is read at once (default: the processors, at least 4)")
	return c
}

func (t *tool) verify(ctx context.Context, arg string, o verifyOptions, out, stderr io.Writer) error {
	dir := ""
	// An ID has no slash: a path that is not there shall be said to be not there.
	if info, err := os.Stat(arg); strings.ContainsAny(arg, `/\`) || arg != "" && arg != "latest" && err == nil && info.IsDir() {
		dir, arg = arg, ""
	}
	options := verify.Options{Parallel: o.parallel, Beat: o.beat}
	var err error
	if options.From, options.To, err = o.days(); err != nil {
		return err
	}
	for _, name := range o.since {
		kept, err := readCheckpoints(name)
		if err != nil {
			return err
		}
		options.Since = append(options.Since, kept...)
	}
	if arg != "" && (options.From != "" || options.To != "") {
		return errors.New("verify: a session and days: name one of them")
	}
	src, err := t.open(dir)
	if err != nil {
		return err
	}
	defer src.Close()
	if options.Keys, err = t.keys(); err != nil {
		return err
	}
	if options.Identities, err = t.identities(); err != nil {
		return err
	}
	p := newVerifyProgress(stderr)
	defer p.end()
	options.Progress = p.show
	options.Log = func(rep auditlog.Report) error {
		if o.quiet && verdict(rep.State) == nil {
			return nil
		}
		p.end()
		return t.printReport(out, rep)
	}
	options.Problem = func(pr auditlog.Problem) error {
		p.end()
		if t.output == "json" {
			return printJSON(out, pr)
		}
		_, err := fmt.Fprintf(out, "%-11s %s\n", auditlog.Damaged, clean(pr.Object()))
		return err
	}
	options.Tree = func(tr verify.Tree) error {
		p.end()
		if o.quiet && len(tr.Problems) == 0 && (tr.End != verify.NotClosed || !o.live && !o.closed) {
			return nil
		}
		return t.printTree(out, tr)
	}
	v := verify.New(src, options)
	var sum verify.Summary
	if arg != "" {
		log, err := find(ctx, src, arg)
		if err != nil {
			return err
		}
		sum, err = v.Log(ctx, log)
		if err != nil {
			return err
		}
	} else if sum, err = v.Store(ctx); err != nil {
		return err
	}
	p.end()
	if err := t.printSummary(out, sum, arg == ""); err != nil {
		return err
	}
	o.identity = len(options.Identities) > 0
	return o.verdict(sum, arg == "", cmp.Or(dir, t.store, os.Getenv(storeEnv)))
}

// verdict is the exit code's error.
func (o verifyOptions) verdict(sum verify.Summary, all bool, store string) error {
	if sum.Damaged() {
		return errDamaged
	}
	if sum.Unread > 0 {
		return unreadError(sum)
	}
	if all && sum.Total() == 0 && len(sum.Trees) == 0 {
		return fmt.Errorf("there is no log in %s", store)
	}
	if o.live {
		if err := o.stale(sum); err != nil {
			return err
		}
	}
	if (o.live || o.closed) && sum.NotClosed > 0 {
		return &codeError{exitStale, openText(sum)}
	}
	if o.sealed && sum.Unsealed() {
		return &codeError{exitUnsealed, fmt.Sprintf("%d logs have no end yet, and %d are in no checkpoint yet", sum.Logs[auditlog.Live], sum.Waiting)}
	}
	if o.identity && sum.Locked > 0 {
		return fmt.Errorf("the content of %d logs was not checked: they are encrypted, and none of the identities given is a recipient", sum.Locked)
	}
	return nil
}

// unreadError says that a store could not be read whole.
func unreadError(sum verify.Summary) error {
	if sum.Unread == 1 {
		return fmt.Errorf("not all was verified: %w", sum.UnreadErr)
	}
	return fmt.Errorf("not all was verified: %d objects or logs can't be read, the first: %w", sum.Unread, sum.UnreadErr)
}

// openText names the transparency logs whose end may be missing.
func openText(sum verify.Summary) string {
	var b strings.Builder
	n := 0
	for _, tr := range sum.Trees {
		if tr.End != verify.NotClosed {
			continue
		}
		if n++; n <= maxListed {
			fmt.Fprintf(&b, "%s neither goes on nor was closed; ", tr.Origin)
		}
	}
	if n > maxListed {
		fmt.Fprintf(&b, "and %d more; ", n-maxListed)
	}
	b.WriteString("the gate was killed, or the newest objects were taken away: if you know that it was killed, keep the log's checkpoint, and give it with --since")
	return b.String()
}

// stale says which gate is not heard of.
func (o verifyOptions) stale(sum verify.Summary) error {
	newest := map[string]verify.Tree{"": {Newest: sum.Newest, Age: sum.Age}}
	for _, tr := range sum.Trees {
		if tr.Newest.After(newest[tr.Gate].Newest) {
			newest[tr.Gate] = tr
		}
	}
	gates := o.gates
	if len(gates) == 0 {
		gates = []string{""}
	}
	for _, g := range gates {
		of := ""
		if g != "" {
			of = " of gate " + g
		}
		tr := newest[g]
		switch age := tr.Age; {
		case tr.Newest.IsZero():
			return &codeError{exitStale, "there is no checkpoint" + of}
		case age < 0:
			return &codeError{exitStale, fmt.Sprintf("the newest checkpoint%s is %s ahead of this machine's clock: that says nothing of the gate now",
				of, -age.Round(time.Second))}
		case age > o.beat:
			return &codeError{exitStale, fmt.Sprintf("the newest checkpoint%s is %s old: the gate is down, or its newest objects were taken away",
				of, age.Round(time.Second))}
		}
	}
	return nil
}

// days gives the bounds as they are in names.
func (o verifyOptions) days() (from, to string, err error) {
	if o.day != "" && (o.from != "" || o.to != "") {
		return "", "", errors.New("--day is a day, --from and --to are a range: write one of them")
	}
	bounds := [2]string{cmp.Or(o.day, o.from), cmp.Or(o.day, o.to)}
	for i, s := range bounds {
		if s == "" {
			continue
		}
		d, err := time.Parse("2006-01-02", strings.ReplaceAll(s, "/", "-"))
		if err != nil {
			return "", "", fmt.Errorf("%q is no day: write YYYY-MM-DD", s)
		}
		bounds[i] = d.Format("2006/01/02")
	}
	return bounds[0], bounds[1], nil
}

func (t *tool) printTree(out io.Writer, tr verify.Tree) error {
	if t.output == "json" {
		return printJSON(out, struct {
			Kind string `json:"kind"`
			verify.Tree
		}{"transparency-log", tr})
	}
	state := "intact"
	switch {
	case len(tr.Problems) > 0:
		state = "damaged"
	case tr.Unread:
		state = string(auditlog.Unreadable)
	}
	newest := "no checkpoint"
	if !tr.Newest.IsZero() {
		newest = fmt.Sprintf("the newest of %s, %s old", t.time(tr.Newest), tr.Age.Round(time.Second))
	}
	newest += map[verify.End]string{verify.Closed: "; closed by its gate", verify.Kept: "; it ends where the kept checkpoint does",
		verify.NotClosed: "; not closed"}[tr.End]
	if tr.Ended {
		newest += "; it ended there: the gate went on with another"
	}
	_, err := fmt.Fprintf(out, "%-11s %s  %d leaves, %d checkpoints, %s, key %s\n", state, tr.Origin, tr.Size, tr.Checkpoints, newest,
		strings.Join(tr.Keys, " "))
	for _, p := range tr.Problems {
		fmt.Fprintf(out, "            %s\n", clean(p.Object()))
	}
	if tr.More > 0 {
		fmt.Fprintf(out, "            and %d problems more\n", tr.More)
	}
	return err
}

func (t *tool) printSummary(out io.Writer, sum verify.Summary, all bool) error {
	if t.output == "json" {
		return printJSON(out, struct {
			Kind string `json:"kind"`
			verify.Summary
		}{"summary", sum})
	}
	var b strings.Builder
	if all {
		fmt.Fprintf(&b, "%d logs: %d sealed, %d interrupted, %d live, %d damaged", sum.Total(), sum.Logs[auditlog.Sealed],
			sum.Logs[auditlog.Interrupted], sum.Logs[auditlog.Live], sum.Logs[auditlog.Damaged])
		if n := sum.Logs[auditlog.Unreadable]; n > 0 {
			fmt.Fprintf(&b, ", %d unreadable", n)
		}
		if sum.Unpinned {
			b.WriteString("; keys not pinned: see --key")
		}
		b.WriteString("\n")
	}
	note := func(n int, one, more string) {
		switch {
		case n == 1:
			fmt.Fprintf(&b, "1 %s\n", one)
		case n > 1:
			fmt.Fprintf(&b, "%d %s\n", n, more)
		}
	}
	note(sum.Unread, "object or log could not be read: that says nothing against it, and nothing for it",
		"objects or logs could not be read: that says nothing against them, and nothing for them")
	note(sum.Missing, "log is missing", "logs are missing")
	note(sum.Waiting, "sealed log is in no checkpoint yet", "sealed logs are in no checkpoint yet")
	note(sum.Late, "log came into the transparency log more than an hour after its end: the store or the gate was away, or it was written later",
		"logs came into the transparency log more than an hour after their end: the store or the gate was away, or they were written later")
	note(sum.Outside, "sealed log has no transparency log: its gate kept none", "sealed logs have no transparency log: their gate kept none")
	note(sum.Silent, "session has no end, and nothing of it came for over a day while its gate, or its key, went on",
		"sessions have no end, and nothing of them came for over a day while their gate, or their key, went on")
	note(sum.NotClosed, "transparency log neither goes on nor was closed: its gate was killed, or its newest objects were taken away (see --closed)",
		"transparency logs neither go on nor were closed: their gates were killed, or their newest objects were taken away (see --closed)")
	note(sum.Locked, "log is encrypted: its content was not looked at, all else was checked", "logs are encrypted: their content was not looked at, all else was checked")
	note(int(sum.Skipped), "entry of the index was not compared with its log: there are too many", "entries of the index were not compared with their logs: there are too many")
	note(sum.Foreign, "object is not a gate's", "objects are not a gate's")
	if !sum.Newest.IsZero() {
		fmt.Fprintf(&b, "newest checkpoint: %s, %s old\n", t.time(sum.Newest), sum.Age.Round(time.Second))
	}
	_, err := io.WriteString(out, b.String())
	return err
}

// checkpointCommand prints what is worth keeping elsewhere.
func (t *tool) checkpointCommand() *cobra.Command {
	return &cobra.Command{
		Use: "checkpoint [STORE]", Short: "Print the newest checkpoint of each transparency log, to keep elsewhere", Args: cobra.MaximumNArgs(1),
		Long: `Print the newest checkpoint of each gate's transparency log, as C2SP signed notes, after proving the logs. Kept where the store's
keeper can't change it, it lets verify --since prove later that nothing up to there was taken away or changed. Logs that have ended are
among them: of one that its gate did not close nothing else shows that its end was taken away, and of no one that all of it was.`,
		Example: `  sallyport-audit checkpoint s3://evidence/gate-1 --key gate.pub > kept.checkpoint`,
		RunE: func(c *cobra.Command, args []string) error {
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
			sum, err := verify.New(src, verify.Options{Keys: keys}).Trees(c.Context())
			if err != nil {
				return err
			}
			for _, tr := range sum.Trees {
				if len(tr.Problems) > 0 || tr.Unread {
					if err := t.printTree(c.ErrOrStderr(), tr); err != nil {
						return err
					}
					continue
				}
				if _, err := c.OutOrStdout().Write(tr.Note); err != nil {
					return err
				}
			}
			switch {
			case sum.Damaged():
				return errDamaged
			case sum.Unread > 0:
				return unreadError(sum)
			case len(sum.Trees) == 0:
				return errors.New("there is no transparency log")
			}
			return nil
		},
	}
}

// readCheckpoints reads kept checkpoints: notes, one after the other, or a checkpoint's object.
func readCheckpoints(name string) ([]*tlog.Checkpoint, error) {
	f, err := os.Open(name)
	if err != nil {
		return nil, fmt.Errorf("--since: %w", err)
	}
	defer f.Close()
	b, err := io.ReadAll(io.LimitReader(f, tlog.MaxCheckpointBytes+1))
	if err != nil {
		return nil, fmt.Errorf("--since: %w", err)
	}
	if c, err := tlog.ParseCheckpoint(b); err == nil {
		return []*tlog.Checkpoint{c}, nil
	}
	notes, err := tlog.ParseNotes(b)
	if err != nil {
		return nil, fmt.Errorf("--since %s: %w", name, err)
	}
	return notes, nil
}

// verifyProgress is a line on a terminal.
type verifyProgress struct {
	w io.Writer // nil: no terminal

	mu    sync.Mutex // guards all below
	last  time.Time
	shown bool
}

func newVerifyProgress(w io.Writer) *verifyProgress {
	p := &verifyProgress{last: time.Now()}
	if f, ok := w.(*os.File); ok {
		if info, err := f.Stat(); err == nil && info.Mode()&os.ModeCharDevice != 0 {
			p.w = w
		}
	}
	return p
}

func (p *verifyProgress) show(objects int, bytes int64) {
	if p.w == nil {
		return
	}
	p.mu.Lock()
	defer p.mu.Unlock()
	if time.Since(p.last) < time.Second/5 {
		return
	}
	p.last, p.shown = time.Now(), true
	fmt.Fprintf(p.w, "\r\x1b[K%d objects, %s", objects, size(uint64(bytes)))
}

// end takes the line away.
func (p *verifyProgress) end() {
	p.mu.Lock()
	defer p.mu.Unlock()
	if p.shown {
		fmt.Fprint(p.w, "\r\x1b[K")
		p.shown = false
	}
}
