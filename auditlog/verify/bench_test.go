package verify_test

import (
	"bytes"
	"context"
	"fmt"
	"io"
	"log/slog"
	"math/rand/v2"
	"path/filepath"
	"testing"
	"time"

	"github.com/sallyport/sallyport/auditlog"
	"github.com/sallyport/sallyport/auditlog/tlog"
	"github.com/sallyport/sallyport/auditlog/verify"
)

// BenchmarkVerify verifies a store in memory, one log at a time: what one core does. MB/s are of stored bytes; recorded-MB/s
// of what sessions passed.
func BenchmarkVerify(b *testing.B) {
	text := bytes.Repeat([]byte("2026-01-01T00:00:07Z payments: order 4711: card refused (code 51)\n"), 1<<10)
	noise := make([]byte, 64<<10)
	rnd := rand.NewChaCha8([32]byte{1})
	rnd.Read(noise)
	for _, c := range []struct {
		name, codec string
		data        []byte
	}{{"text-s2", "s2", text}, {"text-zstd", "zstd", text}, {"noise", "none", noise}} {
		b.Run(c.name, func(b *testing.B) {
			s, dir := newStore(), b.TempDir()
			l, err := auditlog.Open(context.Background(), auditlog.Config{Spool: filepath.Join(dir, "spool"), Tree: filepath.Join(dir, "tlog"),
				Codec: c.codec, SegmentBytes: 8 << 20}, key(7), s, "gate-1", slog.New(slog.DiscardHandler))
			must(b, err)
			const sessions, size = 4, 32 << 20
			for i := range sessions {
				r := l.New(fmt.Sprint("s", i))
				must(b, r.Record(0, &auditlog.Connect{Gate: "gate-1"}))
				must(b, r.Begin())
				for n := 0; n < size; n += len(c.data) {
					must(b, r.Record(1, &auditlog.Data{Stream: auditlog.Output, Data: c.data}))
				}
				must(b, r.Close(&auditlog.End{Cause: "client-left"}))
			}
			ctx, cancel := context.WithTimeout(context.Background(), time.Minute)
			defer cancel()
			must(b, l.Close(ctx))
			o := pinned
			o.Parallel = 1
			var stored int64
			b.ResetTimer()
			for range b.N {
				sum, err := verify.New(s, o).Store(context.Background())
				must(b, err)
				if sum.Damaged() || sum.Logs[auditlog.Sealed] != sessions {
					b.Fatalf("%+v", sum)
				}
				stored = sum.Bytes
			}
			b.SetBytes(stored)
			b.ReportMetric(float64(b.N)*sessions*size/1e6/b.Elapsed().Seconds(), "recorded-MB/s")
		})
	}
}

// BenchmarkCheckpoints reads a transparency log of 5,000 checkpoints, some two and a half days of a gate: from memory, and from a store that
// takes 20 ms for each object, as a bucket does.
func BenchmarkCheckpoints(b *testing.B) {
	const checkpoints = 5000
	s := newStore()
	for n := range checkpoints {
		c := &tlog.Checkpoint{Gate: "gate-1", Log: "log", Number: uint32(n), Time: time.Now().UTC(), Root: (&tlog.Tree{}).Root()}
		s.m[tlog.CheckpointName(tlog.Dir(c.Gate, c.Log), c.Number)] = signed(b, c)
	}
	for name, wait := range map[string]time.Duration{"memory": 0, "20ms": 20 * time.Millisecond} {
		b.Run(name, func(b *testing.B) {
			for range b.N {
				sum, err := verify.New(&farSource{s, wait}, pinned).Trees(context.Background())
				must(b, err)
				if sum.Damaged() || sum.Trees[0].Checkpoints != checkpoints {
					b.Fatalf("%+v", sum)
				}
			}
			b.ReportMetric(float64(b.N)*checkpoints/b.Elapsed().Seconds(), "checkpoints/s")
		})
	}
}

// farSource takes its time to open an object.
type farSource struct {
	*store
	wait time.Duration
}

func (s *farSource) Open(ctx context.Context, name string) (io.ReadCloser, error) {
	time.Sleep(s.wait)
	return s.store.Open(ctx, name)
}
