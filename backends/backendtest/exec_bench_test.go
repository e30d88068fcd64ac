package backendtest

import (
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/sallyport/sallyport/backends"
)

// BenchmarkExecAudit measures what the audit of executed programs costs: the same loads without and with it take turns,
// each in a sandbox of its own, and less than what is let pass without waiting. Reported are medians.
func BenchmarkExecAudit(b *testing.B) {
	const n = 1500
	makefile := filepath.Join(b.TempDir(), "Makefile")
	text := "all:"
	for i := range n {
		text += fmt.Sprintf(" t%d", i)
	}
	text += "\n" + `t%:; @/bin/true $@` + "\n"
	if err := os.WriteFile(makefile, []byte(text), 0o644); err != nil {
		b.Fatal(err)
	}
	for _, load := range []struct{ name, command string }{
		{"serial", fmt.Sprintf(`i=0; while [ $i -lt %d ]; do /bin/true; i=$((i+1)); done`, n)},
		{"parallel", fmt.Sprintf("seq %d | xargs -P 8 -n 1 /bin/true", n)},
		{"make", "make -s -j4 -f " + makefile},
		{"failing", fmt.Sprintf(`perl -e 'for (1..%d) { exec "/nowhere/$_" }'`, n)},
	} {
		b.Run(load.name, func(b *testing.B) {
			took := map[string][]time.Duration{}
			modes := []string{backends.ExecAuditOff, backends.ExecAuditRequired, "strict"}
			for round := 0; b.Loop(); round++ {
				for i := range modes {
					mode := modes[(round+i)%len(modes)]
					took[mode] = append(took[mode], runLoad(b, mode, load.command))
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

func runLoad(b *testing.B, mode, command string) time.Duration {
	spec := backends.Spec{Reports: func(*backends.Report) error { return nil }}
	spec.Template.ExecAudit = backends.ExecAudit{Mode: mode}
	if mode == "strict" {
		spec.Template.ExecAudit = backends.ExecAudit{Mode: backends.ExecAuditRequired, Strict: true}
	}
	s, err := NewMemory().Start(b.Context(), spec)
	if err != nil {
		b.Fatal(err)
	}
	defer s.Close(b.Context())
	began := time.Now()
	if _, err := s.Exec(b.Context(), backends.Process{Channel: 1, Kind: backends.KindExec, Command: command}); err != nil {
		b.Fatal(err)
	}
	return time.Since(began)
}
