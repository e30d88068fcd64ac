package auditlog

import (
	"context"
	"crypto/ed25519"
	"fmt"
	"log/slog"
	"os"
	"path/filepath"
	"time"
)

// Indexed writes an entry as the end of a session does.
func Indexed(l *Log, e *Entry) { l.indexed(e) }

// FakeStore puts objects of n sessions into a directory store, and their index as a gate would have written it. The objects are
// no segments: what lists by the index does not open them.
func FakeStore(ctx context.Context, spool, dir string, store Store, key ed25519.PrivateKey, n int) error {
	l, err := Open(ctx, Config{Spool: spool, Index: true}, key, store, "gate-1", slog.New(slog.DiscardHandler))
	if err != nil {
		return err
	}
	start := time.Date(2026, 10, 1, 0, 0, 0, 0, time.UTC)
	for i := range n {
		e := &Entry{ID: fmt.Sprintf("session-%06d", i), Gate: "gate-1", Start: start.Add(time.Duration(i) * 26 * time.Second),
			User: fmt.Sprintf("user-%d", i%200), Groups: []string{"payments", "oncall"}, Ticket: fmt.Sprintf("OPS-%d", i/10),
			Profile: "payments-debug", Source: fmt.Sprintf("192.0.2.%d:%d", i%250, 1024+i%60000), Image: "sallyport/debug:1",
			Cause: "client-left", Records: 120, Input: 300, Output: 50_000, Programs: 12, Commands: []string{"shell"},
			Names: []string{"bash", "ls", "cat", "grep", "less"}, Segments: 1, Bytes: 1}
		e.End = e.Start.Add(5 * time.Minute)
		name := Header{Kind: SessionLog, ID: e.ID, LogStart: e.Start}.Name().String()
		path := filepath.Join(dir, filepath.FromSlash(name))
		if err := os.MkdirAll(filepath.Dir(path), 0o755); err != nil {
			return err
		}
		if err := os.WriteFile(path, []byte{0}, 0o600); err != nil {
			return err
		}
		l.indexed(e)
		if (i+1)%indexBatch == 0 { // a gate does not end a thousand sessions in a moment
			for l.Stats().Stored < uint64((i+1)/indexBatch) {
				time.Sleep(time.Millisecond)
			}
		}
	}
	return l.Close(ctx)
}
