package main

import (
	"context"
	"crypto/ed25519"
	"errors"
	"io"
	"log/slog"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/prometheus/client_golang/prometheus"

	"github.com/sallyport/sallyport/auditlog"
)

type refusingStore struct{}

func (refusingStore) Put(context.Context, string, io.Reader, int64) error {
	return errors.New("no such bucket")
}

// A store that refuses shows in metrics and readiness, and the gate is ready all the same.
func TestStoreRefuses(t *testing.T) {
	l, err := auditlog.Open(t.Context(), auditlog.Config{Spool: filepath.Join(t.TempDir(), "spool"), SegmentAge: time.Hour},
		ed25519.NewKeyFromSeed(make([]byte, ed25519.SeedSize)), refusingStore{}, "gate-1", slog.New(slog.DiscardHandler))
	if err != nil {
		t.Fatal(err)
	}
	if note := storeNote(l); note != "" {
		t.Errorf("says %q of a store that was never asked", note)
	}
	r := l.New("s1")
	if err := errors.Join(r.Record(0, &auditlog.Connect{}), r.Begin(), r.Close(&auditlog.End{Cause: "client-left"})); err != nil {
		t.Fatal(err)
	}
	for end := time.Now().Add(time.Minute); l.StoreErr() == nil && time.Now().Before(end); time.Sleep(time.Millisecond) {
	}
	if note := storeNote(l); !strings.Contains(note, "refuses: 1 segments wait") || !strings.Contains(note, "no such bucket") {
		t.Errorf("note: %q", note)
	}
	if err := l.Ready(); err != nil {
		t.Error(err)
	}
	registry := prometheus.NewPedanticRegistry()
	registry.MustRegister(auditMetrics{l})
	families, err := registry.Gather()
	if err != nil {
		t.Fatal(err)
	}
	got := map[string]float64{}
	for _, f := range families {
		m := f.GetMetric()[0]
		got[f.GetName()] = m.GetGauge().GetValue() + m.GetCounter().GetValue()
	}
	if got["sallyport_audit_store_error"] != 1 || got["sallyport_audit_waiting_segments"] != 1 || got["sallyport_audit_store_failures_total"] < 1 ||
		got["sallyport_audit_spool_bytes"] < 1 || got["sallyport_audit_spool_error"] != 0 || got["sallyport_audit_oldest_waiting_seconds"] <= 0 {
		t.Errorf("%v", got)
	}
	ctx, cancel := context.WithCancel(t.Context())
	cancel()
	if err := l.Close(ctx); err != nil && !errors.Is(err, context.Canceled) {
		t.Error(err)
	}
}
