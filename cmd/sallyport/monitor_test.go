package main

import (
	"context"
	"errors"
	"testing"
)

// A probe may leave out what would take all gates out of service at once; what it names must be a check.
func TestAllReady(t *testing.T) {
	checks := []readiness{
		{"policy", func(context.Context) error { return errors.New("bad.json") }},
		{"audit", func(context.Context) error { return nil }},
	}
	for _, test := range []struct {
		exclude []string
		want    string // of the error
	}{
		{nil, "policy: bad.json"},
		{[]string{"policy"}, ""},
		{[]string{"policy", "policy"}, ""},
		{[]string{"audit"}, "policy: bad.json"},
		{[]string{"policy", "polcy"}, "exclude: a check of that name is not made here"},
	} {
		got := ""
		if err := allReady(t.Context(), checks, test.exclude); err != nil {
			got = err.Error()
		}
		if got != test.want {
			t.Errorf("exclude %q: %q, want %q", test.exclude, got, test.want)
		}
	}
}

func TestGateOf(t *testing.T) {
	for instance, want := range map[string]string{
		"gw-1-abcdefghij": "gw-1", "sallyport-abcdefghij": "sallyport", "-abcdefghij": "-abcdefghij", "": "", "short": "short", "abcdefghijklm": "abcdefghijklm",
	} {
		if got := gateOf(instance); got != want {
			t.Errorf("%q: %q, want %q", instance, got, want)
		}
	}
}
