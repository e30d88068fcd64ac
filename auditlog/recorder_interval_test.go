package auditlog_test

import (
	"os"
	"path/filepath"
	"testing"
	"time"

	"github.com/sallyport/sallyport/auditlog"
)

// A record that comes when all before it is durable, and no segment is due for long, is durable as soon as any other.
func TestDurableAfterQuiet(t *testing.T) {
	cfg := fastConfig(t.TempDir())
	cfg.SegmentAge = time.Hour
	store, _ := newStore(t)
	l := openGate(t, cfg, store)
	defer closeLog(t, l)
	r := l.New("quiet")
	must(t, r.Begin())
	defer r.Close(&auditlog.End{Cause: "client-left"})
	size := func() (n int64) {
		filepath.WalkDir(cfg.Spool, func(_ string, d os.DirEntry, err error) error {
			if err == nil && d.Type().IsRegular() {
				if st, err := d.Info(); err == nil {
					n += st.Size()
				}
			}
			return nil
		})
		return n
	}
	for i := range 3 {
		before := size()
		must(t, r.Record(1, &auditlog.Data{Stream: auditlog.Output, Data: []byte("one more line")}))
		for end := time.Now().Add(time.Minute); size() == before; time.Sleep(5 * time.Millisecond) {
			if time.Now().After(end) {
				t.Fatalf("record %d stays in memory", i)
			}
		}
	}
}
