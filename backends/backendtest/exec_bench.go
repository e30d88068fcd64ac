package backendtest

import (
	"fmt"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/sallyport/sallyport/backends"
)

// BenchmarkExecAudit measures what the audit of executed programs costs: the same loads without it, with it, and with it
// strict take turns, each in a sandbox of its own, and of fewer executions than are let pass without waiting. The figures
// are medians. spec's image has a shell, xargs and perl; the load "make" is left out where there is no make.
func BenchmarkExecAudit(b *testing.B, backend backends.Backend, newSpec func() backends.Spec) {
	const n = 1500
	for _, load := range []struct{ name, command string }{
		{"serial", fmt.Sprintf(`i=0; while [ $i -lt %d ]; do /bin/true; i=$((i+1)); done`, n)},
		{"parallel", fmt.Sprintf("seq %d | xargs -P 8 -n 1 /bin/true", n)},
		{"make", fmt.Sprintf(`{ echo all: $(seq -f t%%g %d); echo 't%%:; @/bin/true $@'; } | make -s -j4 -f - all`, n)},
		{"failing", fmt.Sprintf(`perl -e 'for (1..%d) { exec "/nowhere/$_" }'`, n)},
	} {
		b.Run(load.name, func(b *testing.B) {
			if code, _ := runLoad(b, backend, newSpec(), backends.ExecAuditOff, "command -v make"); load.name == "make" && code != 0 {
				b.Skip("there is no make in the image")
			}
			took := map[string][]time.Duration{}
			modes := []string{backends.ExecAuditOff, backends.ExecAuditRequired, "strict"}
			for round := 0; b.Loop(); round++ {
				for i := range modes {
					mode := modes[(round+i)%len(modes)]
					_, d := runLoad(b, backend, newSpec(), mode, load.command)
					took[mode] = append(took[mode], d)
				}
			}
			median := func(mode string) float64 {
				slices.Sort(took[mode])
				return float64(took[mode][len(took[mode])/2].Microseconds()) / n
			}
			off := median(backends.ExecAuditOff)
			b.ReportMetric(off, "off-µs/exec")
			for _, mode := range modes[1:] {
				name := strings.Replace(mode, backends.ExecAuditRequired, "on", 1)
				b.ReportMetric(median(mode)-off, name+"-more-µs/exec")
				b.ReportMetric(100*(median(mode)/off-1), name+"-%")
			}
			b.ReportMetric(0, "ns/op")
		})
	}
}

func runLoad(b *testing.B, backend backends.Backend, spec backends.Spec, mode, command string) (int, time.Duration) {
	spec.Reports = func(*backends.Report) error { return nil }
	spec.Template.ExecAudit = backends.ExecAudit{Mode: mode}
	if mode == "strict" {
		spec.Template.ExecAudit = backends.ExecAudit{Mode: backends.ExecAuditRequired, Strict: true}
	}
	s, err := backend.Start(b.Context(), spec)
	if err != nil {
		b.Fatal(err)
	}
	defer s.Close(b.Context())
	began := time.Now()
	status, err := s.Exec(b.Context(), backends.Process{Channel: 1, Kind: backends.KindExec, Command: command})
	if err != nil {
		b.Fatal(err)
	}
	return status.Code, time.Since(began)
}
