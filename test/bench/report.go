package main

import (
	"context"
	"fmt"
	"io"
	"math"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"slices"
	"strings"
	"time"
)

// samples are measurements of one thing.
type samples []float64

func (s *samples) add(v float64)            { *s = append(*s, v) }
func (s *samples) duration(d time.Duration) { s.add(d.Seconds()) }
func (s samples) scaled(by float64) samples {
	return s.mapped(func(v float64) float64 { return v * by })
}
func (s samples) ms() string                 { return s.scaled(1000).text() }
func (s samples) ratio(other samples) string { return quotient(s.median(), other.median()) }

func (s samples) mapped(f func(float64) float64) samples {
	out := make(samples, len(s))
	for i, v := range s {
		out[i] = f(v)
	}
	return out
}

// median is 0 where nothing was measured.
func (s samples) median() float64 {
	if len(s) == 0 {
		return 0
	}
	c := slices.Sorted(slices.Values(s))
	if n := len(c); n%2 == 0 {
		return (c[n/2-1] + c[n/2]) / 2
	}
	return c[len(c)/2]
}

// text is the median, with the least and the greatest where there are several.
func (s samples) text() string {
	switch len(s) {
	case 0:
		return "-"
	case 1:
		return number(s[0])
	}
	return fmt.Sprintf("%s (%s–%s)", number(s.median()), number(slices.Min(s)), number(slices.Max(s)))
}

// number has two or three digits that count; whole numbers are given as they are.
func number(v float64) string {
	switch {
	case v == math.Trunc(v):
		return fmt.Sprintf("%.0f", v)
	case v < 0.995:
		return fmt.Sprintf("%.2g", v)
	case v < 9.95:
		return fmt.Sprintf("%.2f", v)
	case v < 99.5:
		return fmt.Sprintf("%.1f", v)
	}
	return fmt.Sprintf("%.0f", v)
}

func quotient(a, b float64) string {
	if a == 0 || b == 0 {
		return "-"
	}
	return fmt.Sprintf("%.2f", a/b)
}

func size(n int64) string {
	if n >= 1<<30 && n%(1<<30) == 0 {
		return fmt.Sprintf("%d GiB", n>>30)
	}
	return fmt.Sprintf("%d MiB", n>>20)
}

// report is what a run prints.
type report struct {
	quick   bool // aims are not spoken of
	machine []string
	loads   []string
	aims    []string
	tables  []*table
}

type table struct {
	title string
	head  []string
	rows  [][]string
	notes []string
}

// table gives the table of that title, and makes it if there is none.
func (r *report) table(title string, head ...string) *table {
	for _, t := range r.tables {
		if t.title == title {
			return t
		}
	}
	t := &table{title: title, head: head}
	r.tables = append(r.tables, t)
	return t
}

func (t *table) row(cells ...string) { t.rows = append(t.rows, cells) }
func (t *table) note(format string, args ...any) {
	t.notes = append(t.notes, fmt.Sprintf(format, args...))
}

// aim notes what was to be reached and whether it was.
func (r *report) aim(reached bool, what string, measured string) {
	word := "**missed**"
	if reached {
		word = "reached"
	}
	r.aims = append(r.aims, fmt.Sprintf("| %s | %s | %s |", what, measured, word))
}

func (r *report) print(w io.Writer) {
	for _, line := range r.machine {
		fmt.Fprintf(w, "- %s\n", line)
	}
	fmt.Fprintf(w, "- load average at the start of each case: %s\n", strings.Join(r.loads, ", "))
	if len(r.aims) > 0 && !r.quick {
		fmt.Fprintf(w, "\n## Aims\n\n| aim | measured | |\n| --- | --- | --- |\n%s\n", strings.Join(r.aims, "\n"))
	}
	for _, t := range r.tables {
		fmt.Fprintf(w, "\n## %s\n\n| %s |\n|%s\n",
			t.title, strings.Join(t.head, " | "), strings.Repeat(" --- |", len(t.head)))
		for _, row := range t.rows {
			fmt.Fprintf(w, "| %s |\n", strings.Join(row, " | "))
		}
		for _, n := range t.notes {
			fmt.Fprintf(w, "\n%s\n", n)
		}
	}
}

// machine describes what was measured, and on what.
func (b *bench) machine(ctx context.Context) ([]string, error) {
	v, err := b.engine.api.ServerVersion(ctx)
	if err != nil {
		return nil, err
	}
	info, err := b.engine.api.Info(ctx)
	if err != nil {
		return nil, err
	}
	kernel, err := os.ReadFile("/proc/sys/kernel/osrelease")
	if err != nil {
		return nil, err
	}
	sshVersion, err := exec.CommandContext(ctx, "ssh", "-V").CombinedOutput()
	if err != nil {
		return nil, fmt.Errorf("ssh -V: %w", err)
	}
	version, err := exec.CommandContext(ctx, filepath.Join(b.bin, "sallyport"), "version").Output()
	if err != nil {
		return nil, fmt.Errorf("sallyport version: %w", err)
	}
	memory, _, _ := strings.Cut(field("/proc/meminfo", "MemTotal"), " ")
	var kib float64
	fmt.Sscan(memory, &kib)
	return []string{
		"measured: " + strings.TrimSpace(string(version)) + ", " + time.Now().UTC().Format("2006-01-02 15:04 MST"),
		fmt.Sprintf("machine: %d × %s, %.0f GiB of memory, log and spool on %s",
			runtime.NumCPU(), field("/proc/cpuinfo", "model name"), kib/(1<<20), fileSystem(b.root)),
		fmt.Sprintf("Linux %s, Docker %s (%s, cgroup v%s), %s, Go %s",
			strings.TrimSpace(string(kernel)), v.Version, info.Driver, info.CgroupVersion,
			strings.TrimSpace(string(sshVersion)), strings.TrimPrefix(runtime.Version(), "go")),
		fmt.Sprintf("rounds: %d, of audit and cluster %d, of transfers, sftp, echo, burst, log and list %d; medians, in parentheses least and greatest",
			b.rounds, b.fewer(), b.slow()),
	}, nil
}

// preamble begins the document.
const preamble = `# Benchmarks

Written by ` + "`make bench BENCHFLAGS=-write`; `make bench`" + ` prints the same. Everything is measured side by side in
one run on one machine: an OpenSSH sshd of its own on loopback, the gate, and the bare Docker API take turns in every
round, each round beginning with the next one, and each waits until the one before has removed its container and stored
its log.

- **Sallyport** is ` + "`bin/sallyport serve` with the configuration that `make demo`" + ` writes: policy, signed log,
  fsync, directory store, sandboxes without network. Only its limits on logins are raised, and its metrics are switched
  on. **Recording off** is a second gate that differs in ` + "`audit.data: none`" + ` alone, **encrypted** a third that has a
  recipient of its log (X25519).
- **sshd** has PAM off; its user is the one who runs the benchmark. It isolates nothing: it is the floor for SSH.
- **Bare Docker** creates and starts a container of the same shape as the gate's, with ` + "`true`" + ` as its program,
  and waits for its end.
- **On Kubernetes** is a gate with the configuration that ` + "`make demo BACKEND=kubernetes`" + ` writes, on the cluster of
  ` + "`KUBECONFIG` or, without one, on that of `build/cluster`" + `, whose one node is this machine. Its profiles mount nothing. The floor is a session's own
  pod made once more, init container included, without a gate.
- The client is OpenSSH's for all, same key, same key exchange (curve25519-sha256), same cipher; phases and echo are told
  by a client in Go. Transfers run on a connection that is there already, so a login's time is not in them.
- Client, servers and sandboxes share the machine's processors; figures are for comparison within this page. A transfer as fast as
  it goes tells processor time, then, whose ever: what a network of 1 Gbit/s leaves of it is in a table of its own.
- **The log** is measured without a gate, by the same code; ` + "`verify` and `list` are `bin/sallyport-audit`" + `.

`
