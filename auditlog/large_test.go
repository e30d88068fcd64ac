package auditlog_test

import (
	"context"
	"errors"
	"fmt"
	"testing"
	"time"

	"github.com/sallyport/sallyport/auditlog"
)

// Of segments with frames that no gate writes, one is read at a time: who has it holds up a second until he has done with it,
// or gives up, and nobody else.
func TestLargeFrames(t *testing.T) {
	store, dir := newStore(t)
	l := openGate(t, fastConfig(t.TempDir()), store)
	for i := range 3 {
		r := l.New(fmt.Sprint("large", i))
		login(t, r)
		must(t, r.Begin())
		must(t, r.Record(1, &auditlog.Request{Type: "exec", Command: make([]byte, 3<<20)}))
		must(t, r.Record(1, &auditlog.Data{Data: []byte("x")}))
		must(t, r.Close(&auditlog.End{Cause: "client-left"}))
	}
	closeLog(t, l)
	m := load(t, dir)
	all := logs(t, m, auditlog.SessionPrefix)
	if len(all) != 3 {
		t.Fatal(len(all))
	}
	// begin reads a log up to its large record, and to its end when it is let.
	begin := func(ctx context.Context, log auditlog.Stored, within chan<- error, end <-chan bool) {
		r := auditlog.NewSessionReader(m, log, testPublic())
		told := false
		for rec := range r.Records(ctx) {
			if b, ok := rec.Body.(*auditlog.Request); ok && len(b.Command) > 2<<20 {
				within <- nil
				told = true
				if !<-end {
					return
				}
			}
		}
		if !told {
			within <- errors.Join(errors.New("no large record"), r.Err())
		}
	}
	within, end := make(chan error, 3), make(chan bool)
	go begin(t.Context(), all[0], within, end)
	must(t, <-within)
	ctx, cancel := context.WithCancel(t.Context())
	second := make(chan error, 1)
	go begin(ctx, all[2], second, end)
	select {
	case err := <-second:
		t.Fatalf("a second was read beside it: %v", err)
	case <-time.After(100 * time.Millisecond):
	}
	cancel()
	if err := <-second; !errors.Is(err, context.Canceled) {
		t.Errorf("who waits for its turn does not give up: %v", err)
	}
	go begin(t.Context(), all[2], within, end)
	end <- false // one leaves in the middle
	must(t, <-within)
	end <- true
	if r := auditlog.NewSessionReader(m, all[0], testPublic()).Verify(t.Context()); r.State != auditlog.Sealed {
		t.Errorf("%+v", r)
	}
}
