package main

import (
	"context"
	"fmt"
	"log/slog"
	"time"

	"github.com/prometheus/client_golang/prometheus"

	"github.com/sallyport/sallyport/auditlog"
	"github.com/sallyport/sallyport/auditlog/file"
	"github.com/sallyport/sallyport/authz"
)

const (
	pruneInterval = time.Hour
	// storeLag is the wait for the store from which on readiness mentions it.
	storeLag = time.Minute
)

// auditMetrics are the log's state at the time of a scrape.
type auditMetrics struct{ log *auditlog.Log }

var (
	spoolBytesDesc = prometheus.NewDesc("sallyport_audit_spool_bytes", "Bytes of the audit log in the spool now.", nil, nil)
	spoolLimitDesc = prometheus.NewDesc("sallyport_audit_spool_limit_bytes", "Bytes in the spool at which sessions end.", nil, nil)
	waitingDesc    = prometheus.NewDesc("sallyport_audit_waiting_segments", "Segments that wait for the store now.", nil, nil)
	oldestDesc     = prometheus.NewDesc("sallyport_audit_oldest_waiting_seconds", "How long the first of the waiting segments has waited.", nil, nil)
	storedDesc     = prometheus.NewDesc("sallyport_audit_stored_segments_total", "Segments brought to the store.", nil, nil)
	failedDesc     = prometheus.NewDesc("sallyport_audit_store_failures_total", "Tries to store a segment that failed.", nil, nil)
	storeErrorDesc = prometheus.NewDesc("sallyport_audit_store_error", "1 while a segment waits that the store refused, else 0.", nil, nil)
	spoolErrorDesc = prometheus.NewDesc("sallyport_audit_spool_error", "1 while the spool is full or can't be written, else 0.", nil, nil)
)

func (m auditMetrics) Describe(ch chan<- *prometheus.Desc) { prometheus.DescribeByCollect(m, ch) }

func (m auditMetrics) Collect(ch chan<- prometheus.Metric) {
	s := m.log.Stats()
	flag := func(err error) float64 {
		if err != nil {
			return 1
		}
		return 0
	}
	for _, v := range []struct {
		desc  *prometheus.Desc
		kind  prometheus.ValueType
		value float64
	}{
		{spoolBytesDesc, prometheus.GaugeValue, float64(s.SpoolBytes)},
		{spoolLimitDesc, prometheus.GaugeValue, float64(s.SpoolLimit)},
		{waitingDesc, prometheus.GaugeValue, float64(s.Waiting)},
		{oldestDesc, prometheus.GaugeValue, s.Oldest.Seconds()},
		{storedDesc, prometheus.CounterValue, float64(s.Stored)},
		{failedDesc, prometheus.CounterValue, float64(s.Failed)},
		{storeErrorDesc, prometheus.GaugeValue, flag(m.log.StoreErr())},
		{spoolErrorDesc, prometheus.GaugeValue, flag(m.log.Ready())},
	} {
		ch <- prometheus.MustNewConstMetric(v.desc, v.kind, v.value)
	}
}

// policyMetric is 1 while a file of policy or data is not in use as it is on disk.
func policyMetric(policy *authz.Engine) prometheus.Collector {
	return prometheus.NewGaugeFunc(prometheus.GaugeOpts{
		Name: "sallyport_policy_error", Help: "1 while a file of policy or data is not in use as it is on disk, else 0.",
	}, func() float64 {
		if policy.Ready() != nil {
			return 1
		}
		return 0
	})
}

// storeNote says, in a line for readiness, that the store is behind; "" if it is not. Sessions go on meanwhile.
func storeNote(log *auditlog.Log) string {
	s, err := log.Stats(), log.StoreErr()
	switch {
	case err != nil && s.Waiting == 0:
		return fmt.Sprintf("audit: what is in the spool does not go to the store: %v\n", err)
	case err != nil:
		return fmt.Sprintf("audit: the store refuses: %d segments wait, the first for %v: %v\n", s.Waiting,
			s.Oldest.Round(time.Second), err)
	case s.Oldest > storeLag:
		return fmt.Sprintf("audit: the store is slow: %d segments wait, the first for %v\n", s.Waiting,
			s.Oldest.Round(time.Second))
	}
	return ""
}

// prune keeps a log directory within its limits, from the start and then once an hour, until ctx ends.
func prune(ctx context.Context, dir string, limits file.Prune, audit *auditlog.Log, log *slog.Logger) {
	timer := time.NewTimer(0)
	defer timer.Stop()
	for first := true; ; {
		select {
		case <-ctx.Done():
			return
		case <-timer.C:
		}
		if first && audit.Stats().Waiting > 0 {
			// What an earlier gate left may belong to a log that is old enough to go: it has to be there first.
			timer.Reset(time.Second)
			continue
		}
		first = false
		timer.Reset(pruneInterval)
		store, err := file.NewStore(dir)
		if err != nil {
			log.Error("audit log: not pruned", "error", err)
			continue
		}
		done, err := store.Prune(ctx, limits, time.Now(), log)
		switch {
		case ctx.Err() != nil:
			return
		case err != nil:
			log.Error("audit log: not pruned", "error", err)
		case done.Kept > 0:
			log.Warn("audit log: kept what is over the limits, as it is live or damaged", "logs", done.Kept)
		}
		if done.Logs > 0 {
			log.Info("audit log: pruned", "logs", done.Logs, "bytes", done.Bytes, "left_bytes", done.Left)
		}
	}
}
