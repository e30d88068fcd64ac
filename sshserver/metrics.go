package sshserver

import "github.com/prometheus/client_golang/prometheus"

// Metrics are the gate's counters.
type Metrics struct {
	refused       *prometheus.CounterVec // connections closed before the handshake
	logins        *prometheus.CounterVec // proven keys, by result
	ended         *prometheus.CounterVec // connections, by cause
	sandboxStart  prometheus.Histogram   // seconds
	sandboxErrors prometheus.Counter
	panics        prometheus.Counter
}

// NewMetrics registers the gate's metrics with r; nil: nowhere.
func NewMetrics(r prometheus.Registerer) *Metrics {
	m := &Metrics{
		refused: prometheus.NewCounterVec(prometheus.CounterOpts{
			Name: "sallyport_connections_refused_total", Help: "Connections closed before the handshake, by reason.",
		}, []string{"reason"}),
		logins: prometheus.NewCounterVec(prometheus.CounterOpts{
			Name: "sallyport_logins_total", Help: "Logins with a proven key, by result.",
		}, []string{"result"}),
		ended: prometheus.NewCounterVec(prometheus.CounterOpts{
			Name: "sallyport_connections_ended_total", Help: "Connections ended, by cause.",
		}, []string{"cause"}),
		sandboxStart: prometheus.NewHistogram(prometheus.HistogramOpts{
			Name: "sallyport_sandbox_start_seconds", Help: "Time from the decision until a sandbox takes commands.",
			Buckets: []float64{.05, .1, .2, .3, .5, .75, 1, 2, 5, 10, 30, 60},
		}),
		sandboxErrors: prometheus.NewCounter(prometheus.CounterOpts{
			Name: "sallyport_sandbox_errors_total", Help: "Sandboxes that could not be started.",
		}),
		panics: prometheus.NewCounter(prometheus.CounterOpts{
			Name: "sallyport_panics_total", Help: "Panics contained in one connection.",
		}),
	}
	if r != nil {
		r.MustRegister(m.refused, m.logins, m.ended, m.sandboxStart, m.sandboxErrors, m.panics)
	}
	return m
}

// Describe and Collect make a Server a prometheus.Collector of what is running now.
var (
	sessionsDesc = prometheus.NewDesc("sallyport_sessions", "Sessions now.", nil, nil)
	startupsDesc = prometheus.NewDesc("sallyport_startups", "Connections that have not authenticated now.", nil, nil)
)

// Describe implements prometheus.Collector.
func (s *Server) Describe(ch chan<- *prometheus.Desc) { ch <- sessionsDesc; ch <- startupsDesc }

// Collect implements prometheus.Collector.
func (s *Server) Collect(ch chan<- prometheus.Metric) {
	s.mu.Lock()
	sessions, startups := 0, s.unproven
	for _, n := range s.users {
		sessions += n
	}
	s.mu.Unlock()
	ch <- prometheus.MustNewConstMetric(sessionsDesc, prometheus.GaugeValue, float64(sessions))
	ch <- prometheus.MustNewConstMetric(startupsDesc, prometheus.GaugeValue, float64(startups))
}
