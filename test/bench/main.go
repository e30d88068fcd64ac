// Command bench measures a gate beside OpenSSH's sshd and the bare Docker API, in one run on one machine, and prints
// tables with medians and ratios. make bench builds what it needs and runs it; see docs/benchmarks.md for what each
// figure means.
//
//	main.go     flags, rounds and cases
//	gate.go     the measured gates, with the demo's configuration
//	sshd.go     the sshd beside them
//	engine.go   the bare container
//	kubernetes.go  the gate on a cluster, the bare pod, kubectl
//	cluster.go  what is measured on the cluster
//	client.go   OpenSSH's client, and one in Go that tells the phases apart
//	cases.go    what is measured
//	log.go      what is measured of the log, and at a network's rate
//	report.go   samples, tables, the document
//	proc.go     memory, descriptors, processor time
package main

import (
	"context"
	"errors"
	"flag"
	"fmt"
	"io"
	"os"
	"os/signal"
	"path/filepath"
	"regexp"
	"runtime"
	"strings"
	"syscall"
	"time"
)

const document = "docs/benchmarks.md"

// options are the flags.
type options struct {
	rounds int
	only   *regexp.Regexp
	flows  *regexp.Regexp
	quick  bool
	write  bool
	bin    string
	image  string
	dir    string
	list   bool

	kubeconfig string
	kubectl    string
	agentImage string
	carried    string
}

func main() {
	// A reader of our output that leaves must not keep us from cleaning up: the write fails instead.
	signal.Notify(make(chan os.Signal, 1), syscall.SIGPIPE)
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt, syscall.SIGTERM, syscall.SIGHUP)
	err := run(ctx, os.Args[1:], os.Stdout, os.Stderr)
	stop()
	switch {
	case errors.Is(err, flag.ErrHelp):
	case err != nil:
		fmt.Fprintln(os.Stderr, "bench:", err)
		os.Exit(1)
	}
}

func parse(args []string, stderr io.Writer) (options, error) {
	var o options
	var only, flows string
	f := flag.NewFlagSet("bench", flag.ContinueOnError)
	f.SetOutput(stderr)
	f.IntVar(&o.rounds, "rounds", 15, "rounds of the short cases; audit and cluster have half as many, transfers a fifth")
	f.StringVar(&only, "only", "", "measure the cases whose name matches this expression")
	f.StringVar(&flows, "flows", "", "of transfer, measure those whose name matches, as in \"text up\"")
	f.BoolVar(&o.quick, "quick", false, "one round, small sizes: shows that it works, measures nothing")
	f.BoolVar(&o.write, "write", false, "write "+document+" with the result")
	f.StringVar(&o.kubeconfig, "kubeconfig", "", "of the cluster for the cluster's cases; without it they are left out")
	f.StringVar(&o.kubectl, "kubectl", "kubectl", "kubectl and its first arguments")
	f.StringVar(&o.agentImage, "agent-image", "sallyport/agent:1", "the image that brings the agent to the cluster's pods")
	f.StringVar(&o.carried, "carried", "sallyport/target:1", "on the cluster, the sandbox's image with the agent in it")
	f.BoolVar(&o.list, "list", false, "list the cases")
	f.StringVar(&o.bin, "bin", "bin", "directory of the binaries to measure")
	f.StringVar(&o.image, "image", "sallyport/debug:1", "the sandbox's image; it needs bash, cat, wc and true")
	f.StringVar(&o.dir, "dir", "", "directory for keys, logs and data, on a disk (default: where temporary files go)")
	if err := f.Parse(args); err != nil {
		return o, err
	}
	if f.NArg() > 0 {
		return o, fmt.Errorf("unexpected argument %q", f.Arg(0))
	}
	if o.rounds < 1 || o.rounds > 1000 {
		return o, fmt.Errorf("-rounds: %d is not between 1 and 1000", o.rounds)
	}
	if o.write && (o.quick || only != "" || flows != "") {
		return o, errors.New("-write is for a whole run: without -quick, -only and -flows")
	}
	if o.write && o.kubeconfig == "" {
		return o, errors.New("-write is for a whole run: with -kubeconfig")
	}
	var err error
	if o.flows, err = regexp.Compile(flows); err != nil {
		return o, fmt.Errorf("-flows: %w", err)
	}
	if o.only, err = regexp.Compile(only); err != nil {
		return o, fmt.Errorf("-only: %w", err)
	}
	return o, nil
}

// oneCase is something to measure. It adds its samples to the report.
type oneCase struct {
	name string
	what string
	run  func(context.Context, *bench) error
}

// cases in the order in which they run. idle is last: it restarts the gate.
func cases() []oneCase {
	return []oneCase{
		{"true", "a whole `ssh target true`, what its phases take, and what the engine alone would", caseTrue},
		{"prompt", "from the start of ssh to the shell's prompt", casePrompt},
		{"echo", "from a typed key to its echo at the prompt", caseEcho},
		{"burst", "many logins at once, until the last has ended", caseBurst},
		{"transfer", "bytes through one program, both ways, by cipher and by content", caseTransfer},
		{"rate", "bytes through one program at 1 Gbit/s: whether the gate keeps up, and its share of a processor", caseRate},
		{"sftp", "put and get of one file", caseSFTP},
		{"log", "what a core encodes, decodes and verifies of the log, and bytes of it for a minute at a prompt", caseLog},
		{"list", "the auditor's list over many sessions", caseList},
		{"audit", "what executed programs take with their audit and without it", caseAudit},
		{"decision", "one decision of the policy, few grants and many", caseDecision},
		{"idle", "memory, goroutines and descriptors by number of idle sessions", caseIdle},
		{"cluster", "on Kubernetes: a whole `ssh target true`, kubectl run, and what the cluster alone would", caseCluster},
		{"cluster-transfer", "on Kubernetes: bytes through one program, both ways, beside kubectl exec", caseClusterTransfer},
		{"cluster-idle", "on Kubernetes: memory and requests to the API server by number of idle sessions", caseClusterIdle},
	}
}

func run(ctx context.Context, args []string, stdout, stderr io.Writer) (err error) {
	o, err := parse(args, stderr)
	if err != nil {
		return err
	}
	if o.list {
		for _, c := range cases() {
			fmt.Fprintf(stdout, "%-16s %s\n", c.name, c.what)
		}
		return nil
	}
	var wanted []oneCase
	onCluster := false
	for _, c := range cases() {
		if !o.only.MatchString(c.name) {
			continue
		}
		if strings.HasPrefix(c.name, "cluster") {
			if o.kubeconfig == "" {
				fmt.Fprintf(stderr, "==> NOT MEASURED: %s (no -kubeconfig)\n", c.name)
				continue
			}
			onCluster = true
		}
		wanted = append(wanted, c)
	}
	if len(wanted) == 0 {
		return errors.New("nothing to measure: see -list")
	}
	b := &bench{options: o, sizes: full, report: &report{quick: o.quick}, progress: stderr}
	if o.quick {
		b.rounds, b.sizes = 1, small
	}
	defer func() { err = errors.Join(err, b.close()) }()
	if err := b.setUp(ctx); err != nil {
		return fmt.Errorf("set up: %w", err)
	}
	if onCluster {
		if err := b.setUpCluster(ctx); err != nil {
			return fmt.Errorf("set up the cluster: %w", err)
		}
	}
	for _, c := range wanted {
		b.say("%s: %s (load %s)", c.name, c.what, load())
		b.report.loads = append(b.report.loads, c.name+" "+load())
		began := time.Now()
		if err := c.run(ctx, b); err != nil {
			if ctx.Err() != nil {
				return errors.New("interrupted")
			}
			return fmt.Errorf("%s: %w", c.name, err)
		}
		b.say("%s: took %s", c.name, time.Since(began).Round(time.Second))
	}
	var text strings.Builder
	b.report.print(&text)
	if _, err := io.WriteString(stdout, text.String()); err != nil {
		return err
	}
	if o.write {
		return os.WriteFile(document, []byte(preamble+text.String()), 0o644)
	}
	return nil
}

// sizes are how much is measured.
type sizes struct {
	bulk     int64 // bytes of a transfer of zeros
	content  int64 // bytes of a transfer of text, and of random bytes
	file     int64 // bytes of the file for sftp
	keys     int   // typed in one session
	burst    int   // logins at once
	idle     []int // sessions
	grants   []int
	decision int           // asked
	logged   int64         // bytes of the session that is encoded and decoded
	typed    time.Duration // how long is typed at a prompt
	listed   int           // sessions that are listed

	stream int64         // bytes of a transfer on the cluster
	watch  time.Duration // how long requests of idle sessions are counted
}

var (
	full = sizes{bulk: 1 << 30, content: 256 << 20, file: 1 << 30, keys: 40, burst: 50, idle: []int{0, 20, 100},
		grants: []int{10, 100_000}, decision: 2000, logged: 256 << 20, typed: 20 * time.Second, listed: 100_000, stream: 256 << 20, watch: 2 * time.Minute}
	small = sizes{bulk: 32 << 20, content: 16 << 20, file: 16 << 20, keys: 5, burst: 4, idle: []int{0, 2, 4},
		grants: []int{10, 1000}, decision: 50, logged: 32 << 20, typed: 2 * time.Second, listed: 1000, stream: 8 << 20, watch: 5 * time.Second}
)

// bench is one run. What it made is undone by close, in reverse order.
type bench struct {
	options
	sizes
	report   *report
	progress io.Writer

	root      string // of all files of this run
	memory    string // directory whose files cost no disk
	client    *sshClient
	engine    *engine
	sshd      *sshd
	gate      *gate
	off       *gate // with audit.data: none
	encrypted *gate // with audit.recipients
	cluster   *cluster
	onCluster *gate
	cleanUp   []func() error
}

func (b *bench) later(f func() error) { b.cleanUp = append(b.cleanUp, f) }

func (b *bench) close() error {
	var errs []error
	for i := len(b.cleanUp) - 1; i >= 0; i-- {
		errs = append(errs, b.cleanUp[i]())
	}
	b.cleanUp = nil
	return errors.Join(errs...)
}

func (b *bench) say(format string, args ...any) { fmt.Fprintf(b.progress, "==> "+format+"\n", args...) }

// fewer is the number of rounds of the cases that have many turns in a round, and slow that of those that take long.
func (b *bench) fewer() int { return max(1, (b.rounds+1)/2) }
func (b *bench) slow() int  { return max(1, b.rounds/5) }

func (b *bench) setUp(ctx context.Context) (err error) {
	if runtime.GOOS != "linux" {
		return errors.New("it reads /proc: Linux only")
	}
	if b.root, err = os.MkdirTemp(b.dir, "sallyport-bench-"); err != nil {
		return err
	}
	b.later(func() error { return os.RemoveAll(b.root) })
	if b.memory, err = os.MkdirTemp("/dev/shm", "sallyport-bench-"); err != nil {
		return err
	}
	b.later(func() error { return os.RemoveAll(b.memory) })
	if b.engine, err = newEngine(ctx); err != nil {
		return err
	}
	b.later(b.engine.close)
	b.say("setting up the gates with sallyport demo")
	if err := b.setUpGates(ctx); err != nil {
		return err
	}
	b.say("starting an sshd")
	if b.sshd, err = startSSHD(ctx, b); err != nil {
		return fmt.Errorf("sshd: %w", err)
	}
	b.later(b.sshd.stop)
	if b.client, err = newClient(b); err != nil {
		return err
	}
	if err := b.makeData(); err != nil {
		return err
	}
	b.say("checking every target: %s both ways, byte for byte", size(checkBytes))
	for _, t := range b.all() {
		if err := b.check(ctx, t); err != nil {
			return fmt.Errorf("%s: %w", t.name, err)
		}
	}
	if b.engine.shape, err = b.shape(ctx); err != nil {
		return fmt.Errorf("the sandbox's shape: %w", err)
	}
	b.report.machine, err = b.machine(ctx)
	return err
}

// target is what ssh connects to.
type target struct {
	name string
	addr string
	user string
	data string                              // directory of the data files, as its programs see it
	tmp  string                              // a directory in memory with room for the file of sftp, as its programs see it
	cpu  func() (time.Duration, error)       // processor time so far
	rest func(context.Context, *bench) error // waits until what went before is over
}

func (b *bench) all() []*target {
	return []*target{&b.sshd.target, &b.gate.target, &b.off.target, &b.encrypted.target}
}

// path is a file of this run.
func (b *bench) path(name ...string) string {
	return filepath.Join(append([]string{b.root}, name...)...)
}
