package verify_test

import (
	"context"
	"crypto/sha256"
	"errors"
	"io"
	"maps"
	"slices"
	"strings"
	"testing"

	"github.com/sallyport/sallyport/auditlog"
	"github.com/sallyport/sallyport/auditlog/verify"
)

// brokenStore has objects that can't be read: not opened, or not to their end.
type brokenStore struct {
	*store
	bad  map[string]bool
	late bool
}

var errBroken = errors.New("permission denied")

func (s *brokenStore) Open(ctx context.Context, name string) (io.ReadCloser, error) {
	if s.bad[name] && !s.late {
		return nil, errBroken
	}
	f, err := s.store.Open(ctx, name)
	if s.bad[name] && err == nil {
		return io.NopCloser(io.MultiReader(io.LimitReader(f, 20), failReader{})), nil
	}
	return f, err
}

type failReader struct{}

func (failReader) Read([]byte) (int, error) { return 0, errBroken }

// An object that is there and can't be read is neither intact nor damaged, and hides nothing of the rest.
func TestUnread(t *testing.T) {
	whole := kept(t)
	s2 := whole.names("/s2/")
	whole.m[auditlog.DuplicateName(s2[0], sha256.Sum256(whole.m[s2[0]]))] = whole.m[s2[0]]
	whole.m["check/0123456789abcdef"] = []byte(auditlog.CheckText)
	altered := whole.clone()
	segment := whole.names("/s4/")[0]
	altered.m[segment] = slices.Clone(altered.m[segment])
	altered.m[segment][len(altered.m[segment])/2] ^= 1

	since := pinned
	since.Since = newest(t, whole)
	for _, late := range []bool{false, true} {
		for _, name := range slices.Sorted(maps.Keys(whole.m)) {
			s := &brokenStore{store: whole, bad: map[string]bool{name: true}, late: late}
			sum, err := verify.New(s, quiet(since)).Store(context.Background())
			want := 1
			if name == s2[0] {
				want = 2 // is compared with its duplicate, too
			}
			if err != nil || sum.Damaged() || sum.Unread != want || !errors.Is(sum.UnreadErr, errBroken) {
				t.Errorf("%s (late: %v): %v, damaged: %v, %d unread, %v", name, late, err, sum.Damaged(), sum.Unread, sum.UnreadErr)
			}
			unreadable := 0
			if strings.HasPrefix(name, auditlog.SessionPrefix) || strings.HasPrefix(name, auditlog.GatePrefix) || strings.HasPrefix(name, auditlog.IndexPrefix) {
				unreadable = 1
			}
			if n := sum.Logs[auditlog.Unreadable]; n != unreadable {
				t.Errorf("%s (late: %v): %d logs unreadable, want %d", name, late, n, unreadable)
			}
			if sum.Total() != 4+len(gateLogs(whole)) {
				t.Errorf("%s: only %d logs were looked at", name, sum.Total())
			}
			if name == segment {
				continue
			}
			s.store = altered
			if sum, err := verify.New(s, quiet(since)).Store(context.Background()); err != nil || !sum.Damaged() {
				t.Errorf("%s (late: %v): hides another's damage: %v %+v", name, late, err, sum)
			}
		}
	}
	// Of one log, damage counts beside what can't be read.
	s := &brokenStore{store: whole.clone(), bad: map[string]bool{s2[0]: true}}
	last := s2[len(s2)-1]
	s.m[last] = slices.Clone(s.m[last])
	s.m[last][len(s.m[last])-1] ^= 1
	if sum, err := verify.New(s, quiet(since)).Store(context.Background()); err != nil || !sum.Damaged() || sum.Unread != 2 {
		t.Errorf("damaged and not read: %v %+v", err, sum)
	}
}

// quiet does not print.
func quiet(o verify.Options) verify.Options {
	o.Log = func(auditlog.Report) error { return nil }
	o.Tree = func(verify.Tree) error { return nil }
	o.Problem = func(auditlog.Problem) error { return nil }
	return o
}

// gateLogs are the gate's own logs.
func gateLogs(s *store) []string {
	dirs := make(map[string]bool)
	for _, n := range s.names(auditlog.GatePrefix) {
		if strings.HasPrefix(n, auditlog.GatePrefix) {
			dirs[n[:strings.LastIndexByte(n, '/')]] = true
		}
	}
	return slices.Sorted(maps.Keys(dirs))
}
