package auditlog_test

import (
	"bufio"
	"io"
	"log/slog"
	"math/rand/v2"
	"path/filepath"
	"runtime"
	"strings"
	"testing"

	"context"
	"fmt"

	"github.com/sallyport/sallyport/auditlog"
	"github.com/sallyport/sallyport/auditlog/file"
)

// benchText is text as a program prints it.
func benchText(n int) []byte {
	rng := rand.New(rand.NewPCG(1, 1))
	var b strings.Builder
	w := bufio.NewWriter(&b)
	for b.Len() < n {
		fmt.Fprintf(w, "2026-11-22T10:%02d:%02d.%06dZ INFO request id=%08x path=/v1/payments/%d status=200 took=%dus\n",
			rng.IntN(60), rng.IntN(60), rng.IntN(1e6), rng.Uint32(), rng.IntN(1e5), rng.IntN(1e5))
		w.Flush()
	}
	return []byte(b.String()[:n])
}

// BenchmarkTap is a bulk transfer: what the gate pays for each byte. Report CPU with -cpu and /usr/bin/time.
func BenchmarkTap(b *testing.B) {
	random := make([]byte, 8<<20)
	rng := rand.New(rand.NewPCG(1, 1))
	for i := range random {
		random[i] = byte(rng.Uint32())
	}
	for name, data := range map[string][]byte{"text": benchText(8 << 20), "random": random} {
		for _, codec := range []string{"auto", "zstd", "none"} {
			b.Run(name+"/"+codec, func(b *testing.B) {
				dir := b.TempDir()
				store, err := file.NewStore(filepath.Join(dir, "store"))
				if err != nil {
					b.Fatal(err)
				}
				l, err := auditlog.Open(b.Context(), auditlog.Config{Spool: filepath.Join(dir, "spool"), Codec: codec}, testKey, store, "g",
					slog.New(slog.DiscardHandler))
				if err != nil {
					b.Fatal(err)
				}
				r := l.New("s1")
				if err := r.Begin(); err != nil {
					b.Fatal(err)
				}
				w := r.Tap(1, auditlog.Output, io.Discard)
				const chunk = 32 << 10
				b.SetBytes(chunk)
				b.ReportAllocs()
				b.ResetTimer()
				for i := 0; i < b.N; i++ {
					off := i * chunk % len(data)
					if _, err := w.Write(data[off : off+chunk]); err != nil {
						b.Fatal(err)
					}
				}
				if err := r.Close(&auditlog.End{Cause: "client-left"}); err != nil {
					b.Fatal(err)
				}
				b.StopTimer()
				if err := l.Close(context.Background()); err != nil {
					b.Fatal(err)
				}
			})
		}
	}
}

// An idle session holds little: no buffers, no goroutine.
func TestIdleMemory(t *testing.T) {
	store, _ := newStore(t)
	l := openGate(t, fastConfig(t.TempDir()), store)
	defer closeLog(t, l)
	heap := func() uint64 {
		runtime.GC()
		runtime.GC() // pools are emptied by the second
		var m runtime.MemStats
		runtime.ReadMemStats(&m)
		return m.HeapAlloc
	}
	warm := l.New("warm") // all sessions share the compressor's memory
	login(t, warm)
	must(t, warm.Begin())
	must(t, warm.Record(1, &auditlog.Data{Data: benchText(100 << 10)}))
	must(t, warm.Close(&auditlog.End{Cause: "client-left"}))
	const n = 200
	rs := make([]*auditlog.Recorder, n)
	goroutines := runtime.NumGoroutine()
	before := heap()
	p := benchText(100 << 10)
	for i := range rs {
		rs[i] = l.New(fmt.Sprintf("s%d", i))
		login(t, rs[i])
		must(t, rs[i].Begin())
		must(t, rs[i].Record(1, &auditlog.Data{Data: p}))
	}
	waitFor(t, func() bool { return runtime.NumGoroutine() <= goroutines && l.Stats().Waiting == 0 })
	if each := (int64(heap()) - int64(before)) / n; each > 16<<10 {
		t.Errorf("%d bytes for each idle session", each)
	} else {
		t.Logf("%d bytes for each idle session", each)
	}
	for _, r := range rs {
		must(t, r.Close(&auditlog.End{Cause: "idle"}))
	}
}
