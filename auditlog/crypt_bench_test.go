//go:build unix

package auditlog_test

import (
	"context"
	"errors"
	"io"
	"log/slog"
	"math/rand/v2"
	"path/filepath"
	"testing"
	"time"

	"github.com/sallyport/sallyport/auditlog"
	"github.com/sallyport/sallyport/auditlog/file"
)

func benchRandom(n int) []byte {
	rng := rand.New(rand.NewPCG(1, 1))
	b := make([]byte, n)
	for i := range b {
		b[i] = byte(rng.Uint32())
	}
	return b
}

// benchLog opens a log, in the clear or encrypted to one recipient (X25519).
func benchLog(b *testing.B, encrypted bool, codec string) (l *auditlog.Log, dir string) {
	b.Helper()
	dir = b.TempDir()
	store, err := file.NewStore(filepath.Join(dir, "store"))
	if err != nil {
		b.Fatal(err)
	}
	cfg := auditlog.Config{Spool: filepath.Join(dir, "spool"), Codec: codec}
	if encrypted {
		cfg.Recipients = []string{recipientOf(b, nativeAuditor)}
	}
	if l, err = auditlog.Open(b.Context(), cfg, testKey, store, "g", slog.New(slog.DiscardHandler)); err != nil {
		b.Fatal(err)
	}
	return l, filepath.Join(dir, "store")
}

func clearOrNot(encrypted bool) string {
	if encrypted {
		return "encrypted"
	}
	return "clear"
}

// BenchmarkEncode is what a transfer's bytes cost until they are on disk: MB/s of processor time (cpu-MB/s) is per core, whatever
// else the machine does.
func BenchmarkEncode(b *testing.B) {
	for name, data := range map[string][]byte{"text": benchText(8 << 20), "random": benchRandom(8 << 20)} {
		for _, encrypted := range []bool{false, true} {
			b.Run(name+"/"+clearOrNot(encrypted), func(b *testing.B) {
				l, _ := benchLog(b, encrypted, "auto")
				r := l.New("s1")
				if err := r.Begin(); err != nil {
					b.Fatal(err)
				}
				w := r.Tap(1, auditlog.Output, io.Discard)
				const chunk = 32 << 10
				b.SetBytes(chunk)
				before := processTime()
				for i := 0; b.Loop(); i++ {
					off := i * chunk % len(data)
					if _, err := w.Write(data[off : off+chunk]); err != nil {
						b.Fatal(err)
					}
				}
				if err := errors.Join(r.Close(&auditlog.End{Cause: "client-left"}), l.Close(context.Background())); err != nil {
					b.Fatal(err)
				}
				b.ReportMetric(float64(b.N)*chunk/1e6/(processTime()-before).Seconds(), "cpu-MB/s")
			})
		}
	}
}

// BenchmarkDecode reads a log of 64 MiB of data from memory: all its records, or, encrypted and without an identity, all that is
// checked of it (verify).
func BenchmarkDecode(b *testing.B) {
	for name, data := range map[string][]byte{"text": benchText(8 << 20), "random": benchRandom(8 << 20)} {
		for _, how := range []string{"clear", "encrypted", "encrypted, verified alone"} {
			b.Run(name+"/"+how, func(b *testing.B) {
				l, dir := benchLog(b, how != "clear", "auto")
				r := l.New("s1")
				if err := r.Begin(); err != nil {
					b.Fatal(err)
				}
				w := r.Tap(1, auditlog.Output, io.Discard)
				const total = 64 << 20
				for i := 0; i < total; i += 32 << 10 {
					off := i % len(data)
					if _, err := w.Write(data[off : off+32<<10]); err != nil {
						b.Fatal(err)
					}
				}
				if err := errors.Join(r.Close(&auditlog.End{Cause: "client-left"}), l.Close(context.Background())); err != nil {
					b.Fatal(err)
				}
				m := load(b, dir)
				var log auditlog.Stored
				for s, err := range auditlog.Logs(b.Context(), m, auditlog.SessionPrefix) {
					if err != nil {
						b.Fatal(err)
					}
					log = s
				}
				ids := identitiesOf(b, nativeAuditor)
				if how == "encrypted, verified alone" {
					ids = nil
				}
				b.SetBytes(total)
				before := processTime()
				for b.Loop() {
					r := auditlog.NewSessionReader(m, log, testPublic())
					r.Decrypt(ids...)
					if rep := r.Verify(b.Context()); rep.State != auditlog.Sealed {
						b.Fatalf("%+v", rep)
					}
				}
				b.ReportMetric(float64(b.N)*total/1e6/(processTime()-before).Seconds(), "cpu-MB/s")
			})
		}
	}
}

// BenchmarkInteractive is a person at a prompt: a key each fifth of a second with its echo, and the output of a command each
// five seconds. It lasts as long as it says, once, and tells what a minute of it takes in the store.
func BenchmarkInteractive(b *testing.B) {
	const long = 10 * time.Second
	output := benchText(1500)
	for _, encrypted := range []bool{false, true} {
		b.Run(clearOrNot(encrypted), func(b *testing.B) {
			for b.Loop() {
				l, dir := benchLog(b, encrypted, "auto")
				r := l.New("s1")
				if err := r.Begin(); err != nil {
					b.Fatal(err)
				}
				tick := time.NewTicker(200 * time.Millisecond)
				for i := range int(long / (200 * time.Millisecond)) {
					<-tick.C
					key := []byte("ls -l /var/log/app | tail")[i%25:][:1]
					err := errors.Join(r.Record(1, &auditlog.Data{Stream: auditlog.Input, Data: key}),
						r.Record(1, &auditlog.Data{Stream: auditlog.Output, Data: key}))
					if i%25 == 24 {
						err = errors.Join(err, r.Record(1, &auditlog.Data{Stream: auditlog.Output, Data: output}))
					}
					if err != nil {
						b.Fatal(err)
					}
				}
				tick.Stop()
				if err := errors.Join(r.Close(&auditlog.End{Cause: "client-left"}), l.Close(context.Background())); err != nil {
					b.Fatal(err)
				}
				var size int
				for _, o := range load(b, dir) {
					size += len(o)
				}
				b.ReportMetric(float64(size)*float64(time.Minute/long)/1024, "KiB/min")
			}
		})
	}
}
