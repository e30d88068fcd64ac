package verify_test

import (
	"slices"
	"strings"
	"testing"

	"github.com/sallyport/sallyport/auditlog"
)

// A gate's index is a log like the others: verified, a leaf of the transparency log, and missed when it is gone.
func TestIndex(t *testing.T) {
	s := newStore()
	g := &gate{t: t, dir: t.TempDir(), store: s, key: 7, index: true}
	g.open()
	g.session("s1", 100)
	g.close()
	sum, wrong := check(t, s, pinned)
	if len(wrong) > 0 || sum.Logs[auditlog.Sealed] != 2 || sum.Foreign+sum.Missing+sum.Outside > 0 || sum.Objects != len(s.m) {
		t.Fatalf("%+v: %q", sum, wrong)
	}
	names := s.names("index/gate-1/")
	if len(names) != 1 {
		t.Fatalf("%q", names)
	}
	whole := s.m[names[0]]
	s.m[names[0]] = slices.Clone(whole)
	s.m[names[0]][len(whole)/2] ^= 1
	if sum, wrong := check(t, s, pinned); len(wrong) == 0 || sum.Logs[auditlog.Damaged] != 1 {
		t.Errorf("altered: %+v %q", sum, wrong)
	}
	delete(s.m, names[0])
	if sum, wrong := check(t, s, pinned); sum.Missing != 1 || !strings.Contains(strings.Join(wrong, ""), "index/gate-1/") {
		t.Errorf("gone: %+v %q", sum, wrong)
	}
}
