package authz

import (
	"context"
	"encoding/json"
	"fmt"
	"testing"
	"time"
)

// benchSnapshot is a policy over n users with one grant each.
func benchSnapshot(b *testing.B, n int) *snapshot {
	b.Helper()
	users, grants := map[string]any{}, map[string]any{}
	for i := range n {
		name := fmt.Sprintf("user%d", i)
		users[name] = map[string]any{"keys": []any{aliceKey}, "groups": []any{"ops"}}
		grants[name] = map[string]any{"T-1": map[string]any{"profile": "debug", "not_after": "2200-01-01T00:00:00Z",
			"sources": []any{"192.0.2.0/24"}}}
	}
	var profile any
	if err := json.Unmarshal([]byte(profileText), &profile); err != nil {
		b.Fatal(err)
	}
	compiler, problems := compile(nil, nil)
	if len(problems) > 0 {
		b.Fatal(problems)
	}
	s, err := newSnapshot(compiler, map[string]any{"users": users, "grants": grants,
		"profiles": map[string]any{"debug": profile}}, "bench")
	if err != nil {
		b.Fatal(err)
	}
	return s
}

// BenchmarkLogin shows that a decision costs the same whatever the number of grants.
func BenchmarkLogin(b *testing.B) {
	for _, n := range []int{10, 100_000} {
		b.Run(fmt.Sprintf("grants=%d", n), func(b *testing.B) {
			s := benchSnapshot(b, n)
			in := loginInput(b, "user7")
			b.ReportAllocs()
			for b.Loop() {
				l, err := s.decideLogin(context.Background(), in, time.Now())
				if err != nil || !l.Allow {
					b.Fatal(l, err)
				}
			}
		})
	}
}

// BenchmarkOffer is what an unproven key costs.
func BenchmarkOffer(b *testing.B) {
	s := benchSnapshot(b, 100_000)
	in := loginInput(b, "user7")
	for b.Loop() {
		ok, err := s.decideOffer(context.Background(), OfferInput{User: in.User, Source: in.Source, Key: in.Key}, time.Now())
		if err != nil || !ok {
			b.Fatal(ok, err)
		}
	}
}

// BenchmarkRequest is what each request on a channel costs.
func BenchmarkRequest(b *testing.B) {
	s := benchSnapshot(b, 10)
	e := &Engine{now: time.Now}
	e.current.Store(s)
	for b.Loop() {
		v, err := e.Request(context.Background(), RequestInput{Type: "shell", Permit: Permit{Shell: true}})
		if err != nil || !v.Allow {
			b.Fatal(v, err)
		}
	}
}
