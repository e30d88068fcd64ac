package docker

import (
	"context"
	"fmt"
	"io"
	"sort"
	"testing"
	"time"

	"github.com/docker/docker/api/types/container"
	"github.com/docker/docker/api/types/network"

	"github.com/sallyport/sallyport/backends"
	"github.com/sallyport/sallyport/backends/backendtest"
)

// BenchmarkStart compares a sandbox, from Start to the first process's end, with what the engine alone takes to create
// and start the same container; the two take turns.
func BenchmarkStart(b *testing.B) {
	eachTransport(b, benchmarkStart)
}

// eachTransport runs a benchmark with each way to the agents.
func eachTransport(b *testing.B, run func(*testing.B, *Backend)) {
	for _, transport := range []string{transportSocket, transportRelay} {
		b.Run(transport, func(b *testing.B) {
			run(b, newBackend(b, func(c *Config) { c.Transport, c.CPUs = transport, 2 }))
		})
	}
}

func benchmarkStart(b *testing.B, backend *Backend) {
	engine := fixture.engine
	ctx := context.Background()
	var bare, start, first []time.Duration
	for b.Loop() {
		spec := newSpec(busyboxImage)
		begin := time.Now()
		s, err := backend.Start(ctx, spec)
		if err != nil {
			b.Fatal(err)
		}
		start = append(start, time.Since(begin))
		if _, err := s.Exec(ctx, backends.Process{Kind: backends.KindExec, Command: "true"}); err != nil {
			b.Fatal(err)
		}
		first = append(first, time.Since(begin))
		r := s.Info().Spec.(request)
		s.Close(ctx)

		r.Host.Mounts = nil // the directories are gone
		r.Config.Entrypoint, r.Config.Cmd = []string{"/bin/sleep"}, []string{"60"}
		begin = time.Now()
		c, err := engine.ContainerCreate(ctx, &r.Config, &r.Host, &network.NetworkingConfig{}, nil, r.Name+"-bare")
		if err != nil {
			b.Fatal(err)
		}
		if err := engine.ContainerStart(ctx, c.ID, container.StartOptions{}); err != nil {
			b.Fatal(err)
		}
		bare = append(bare, time.Since(begin))
		if err := backend.removeContainer(ctx, c.ID); err != nil {
			b.Fatal(err)
		}
	}
	b.ReportMetric(median(bare), "bare-ms")
	b.ReportMetric(median(start), "start-ms")
	b.ReportMetric(median(first), "first-exec-ms")
	b.ReportMetric(median(start)/median(bare), "start/bare")
}

func median(d []time.Duration) float64 {
	sort.Slice(d, func(i, j int) bool { return d[i] < d[j] })
	return float64(d[len(d)/2].Microseconds()) / 1000
}

// BenchmarkClose measures the end of a sandbox.
func BenchmarkClose(b *testing.B) {
	backend := newBackend(b, nil)
	ctx := context.Background()
	for b.Loop() {
		b.StopTimer()
		s, err := backend.Start(ctx, newSpec(busyboxImage))
		if err != nil {
			b.Fatal(err)
		}
		b.StartTimer()
		s.Close(ctx)
	}
}

// BenchmarkExec measures one short process.
func BenchmarkExec(b *testing.B) {
	s := startSandbox(b, newBackend(b, nil), newSpec(busyboxImage))
	for b.Loop() {
		if _, err := s.Exec(b.Context(), backends.Process{Kind: backends.KindExec, Command: "true"}); err != nil {
			b.Fatal(err)
		}
	}
}

// BenchmarkBytes measures bytes through one process, out of and into the sandbox.
func BenchmarkBytes(b *testing.B) {
	eachTransport(b, benchmarkBytes)
}

func benchmarkBytes(b *testing.B, backend *Backend) {
	const size = 256 << 20
	s := startSandbox(b, backend, newSpec(busyboxImage))
	b.Run("out", func(b *testing.B) {
		b.SetBytes(size)
		for b.Loop() {
			_, err := s.Exec(b.Context(), backends.Process{
				Kind: backends.KindExec, Command: fmt.Sprintf("dd if=/dev/zero bs=64k count=%d 2>/dev/null", size>>16),
				Stdout: io.Discard,
			})
			if err != nil {
				b.Fatal(err)
			}
		}
	})
	b.Run("in", func(b *testing.B) {
		b.SetBytes(size)
		for b.Loop() {
			_, err := s.Exec(b.Context(), backends.Process{
				Kind: backends.KindExec, Command: "dd of=/dev/null bs=64k 2>/dev/null",
				Stdin: io.LimitReader(zeros{}, size),
			})
			if err != nil {
				b.Fatal(err)
			}
		}
	})
}

// BenchmarkEngineBytes measures the same through a bare exec of the engine's: the relay's floor.
func BenchmarkEngineBytes(b *testing.B) {
	const size = 256 << 20
	s := startSandbox(b, newBackend(b, func(c *Config) { byRelay(c); c.CPUs = 2 }), newSpec(busyboxImage))
	for name, command := range map[string]string{
		"out": fmt.Sprintf("dd if=/dev/zero bs=64k count=%d 2>/dev/null", size>>16), "in": "dd of=/dev/null bs=64k 2>/dev/null; echo",
	} {
		b.Run(name, func(b *testing.B) {
			b.SetBytes(size)
			for b.Loop() {
				c, err := fixture.engine.ContainerExecCreate(b.Context(), s.ID(), container.ExecOptions{
					Cmd: []string{"/bin/sh", "-c", command}, AttachStdin: true, AttachStdout: true,
				})
				if err != nil {
					b.Fatal(err)
				}
				stream, err := fixture.engine.ContainerExecAttach(b.Context(), c.ID, container.ExecAttachOptions{})
				if err != nil {
					b.Fatal(err)
				}
				want := int64(size)
				if name == "in" {
					want = 1
					if _, err := io.CopyBuffer(stream.Conn, io.LimitReader(zeros{}, size), make([]byte, 256<<10)); err != nil {
						b.Fatal(err)
					}
				}
				stream.CloseWrite()
				if n, err := io.CopyBuffer(struct{ io.Writer }{io.Discard}, newExecConn(stream), make([]byte, 64<<10)); n != want || err != nil {
					b.Fatal(n, err)
				}
				stream.Close()
			}
		})
	}
}

type zeros struct{}

func (zeros) Read(p []byte) (int, error) { return len(p), nil }

// BenchmarkPrograms measures the audit of executed programs in the debug image, where the engine's own filter is at work
// in any case.
func BenchmarkPrograms(b *testing.B) {
	const image = "sallyport/debug:1"
	if _, err := requireEngine(b).ImageInspect(b.Context(), image); err != nil {
		b.Skip("there is no image ", image)
	}
	backendtest.BenchmarkExecAudit(b, newBackend(b, nil), func() backends.Spec {
		spec := newSpec(image)
		spec.Template.CPUs, spec.Template.PIDs = 2, 512
		return spec
	})
}
