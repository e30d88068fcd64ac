package kubernetes

import (
	"context"
	"fmt"
	"io"
	"slices"
	"testing"
	"time"

	corev1 "k8s.io/api/core/v1"

	"github.com/sallyport/sallyport/backends"
)

// BenchmarkStart compares a sandbox's start to the floor: the creation of the same pod and the first answer of a program in it,
// tried as often. Both in turn, as a machine's load changes.
func BenchmarkStart(b *testing.B) {
	backend := newBackend(b, nil)
	ctx := context.Background()
	var sandboxes, floors []time.Duration
	for b.Loop() {
		began := time.Now()
		s, err := backend.Start(ctx, newSpec(busyboxImage))
		if err != nil {
			b.Fatal(err)
		}
		sandboxes = append(sandboxes, time.Since(began))
		s.Close(ctx)

		spec, err := backend.check(newSpec(busyboxImage))
		if err != nil {
			b.Fatal(err)
		}
		at := slotOf(spec.Template.Namespace, spec.Owner.User, 0)
		// The gate's key is nobody's: no gate comes.
		pod := build(spec, backend.config, "floor", "AAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAA=", at)
		began = time.Now()
		var made corev1.Pod
		if err := fixture.cluster.create(ctx, at.namespace, "pods", pod, &made); err != nil {
			b.Fatal(err)
		}
		for {
			s, err := fixture.cluster.exec(ctx, at, false, "/bin/echo", "hi")
			if err != nil {
				b.Fatal(err)
			}
			out, _ := io.ReadAll(s)
			s.Close()
			if string(out) == "hi\n" {
				break
			}
			time.Sleep(attempts(0))
		}
		floors = append(floors, time.Since(began))
		if err := fixture.cluster.deletePod(ctx, at.namespace, at.name, made.UID); err != nil {
			b.Fatal(err)
		}
	}
	slices.Sort(sandboxes)
	slices.Sort(floors)
	b.ReportMetric(float64(sandboxes[len(sandboxes)/2].Milliseconds()), "ms/median")
	b.ReportMetric(float64(floors[len(floors)/2].Milliseconds()), "floor-ms/median")
	b.Logf("sandbox %v to %v, floor %v to %v", sandboxes[0], sandboxes[len(sandboxes)-1], floors[0], floors[len(floors)-1])
}

// BenchmarkThroughput is what a process writes, and what it reads, through the API server.
func BenchmarkThroughput(b *testing.B) {
	backend := newBackend(b, nil)
	const size = 64 << 20
	s := startSandbox(b, backend, newSpec(busyboxImage))
	b.Run("down", func(b *testing.B) {
		b.SetBytes(size)
		for b.Loop() {
			var n count
			p := backends.Process{Kind: backends.KindExec, Command: fmt.Sprintf("dd if=/dev/zero bs=64k count=%d 2>/dev/null", size>>16), Stdout: &n}
			if _, err := s.Exec(context.Background(), p); err != nil || n != size {
				b.Fatal(n, err)
			}
		}
	})
	b.Run("up", func(b *testing.B) {
		b.SetBytes(size)
		for b.Loop() {
			p := backends.Process{Kind: backends.KindExec, Command: "cat >/dev/null", Stdin: io.LimitReader(zeros{}, size), Stdout: io.Discard}
			if _, err := s.Exec(context.Background(), p); err != nil {
				b.Fatal(err)
			}
		}
	})
	// Beside it: the program itself by pods/exec, as kubectl exec does it.
	b.Run("raw-down", func(b *testing.B) {
		b.SetBytes(size)
		for b.Loop() {
			raw, err := fixture.cluster.exec(context.Background(), s.at, false, "/bin/dd", "if=/dev/zero", "bs=64k", fmt.Sprintf("count=%d", size>>16))
			if err != nil {
				b.Fatal(err)
			}
			n, err := io.Copy(io.Discard, raw)
			raw.Close()
			if n != size || err != nil {
				b.Fatal(n, err)
			}
		}
	})
}

type count int

func (c *count) Write(b []byte) (int, error) { *c += count(len(b)); return len(b), nil }

type zeros struct{}

func (zeros) Read(b []byte) (int, error) { clear(b); return len(b), nil }
