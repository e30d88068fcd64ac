package main

import (
	"fmt"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/sallyport/sallyport/auditlog"
)

func TestGlob(t *testing.T) {
	for _, c := range []struct {
		pattern, text string
		want          bool
	}{
		{"alice", "alice", true}, {"alice", "alic", false}, {"", "", true}, {"*", "", true}, {"*", "a/b", true}, {"a*c", "abc", true}, {"a*c", "abcd", false},
		{"?", "é", true}, {"?", "", false}, {"OPS-*", "OPS-1", true}, {"*a*b*", "xxaxxbxx", true}, {"a*a*a*a*b", strings.Repeat("a", 1000), false}, {"ab", "abc", false},
	} {
		if got := glob(c.pattern, c.text); got != c.want {
			t.Errorf("glob(%q, %.20q) = %v", c.pattern, c.text, got)
		}
	}
}

func TestParseTime(t *testing.T) {
	zone := time.FixedZone("zone", 2*3600)
	now := time.Date(2026, 3, 10, 1, 30, 0, 0, zone)
	for in, want := range map[string][2]string{ // as a lower, and as an upper bound
		"2026-03-01":           {"2026-03-01T00:00:00+02:00", "2026-03-02T00:00:00+02:00"},
		"2026-03-01 14:05":     {"2026-03-01T14:05:00+02:00", "2026-03-01T14:05:00+02:00"},
		"2026-03-01T14:05:06":  {"2026-03-01T14:05:06+02:00", "2026-03-01T14:05:06+02:00"},
		"2026-03-01T14:05:06Z": {"2026-03-01T14:05:06Z", "2026-03-01T14:05:06Z"},
		"today":                {"2026-03-10T00:00:00+02:00", "2026-03-11T00:00:00+02:00"},
		"yesterday":            {"2026-03-09T00:00:00+02:00", "2026-03-10T00:00:00+02:00"},
		"90m":                  {"2026-03-10T00:00:00+02:00", "2026-03-10T00:00:00+02:00"},
		"2d":                   {"2026-03-08T01:30:00+02:00", "2026-03-08T01:30:00+02:00"},
		"1w":                   {"2026-03-03T01:30:00+02:00", "2026-03-03T01:30:00+02:00"},
	} {
		for i, upper := range []bool{false, true} {
			got, err := parseTime(in, now, zone, upper)
			if w, _ := time.Parse(time.RFC3339, want[i]); err != nil || !got.Equal(w) {
				t.Errorf("%q, upper %v: %v %v, want %v", in, upper, got, err, w)
			}
		}
	}
	for _, bad := range []string{"soon", "-2h", "2026-13-01", "99999999d", "d", "1.5d"} {
		if got, err := parseTime(bad, now, zone, false); err == nil {
			t.Errorf("%q: %v", bad, got)
		}
	}
}

// Each filter finds the session that it should, and no other.
func TestList(t *testing.T) {
	dir := t.TempDir()
	writeLog(t, dir, func(l *auditlog.Log) {
		session(t, l, "plain", nil)
		session(t, l, "rich", map[uint32][]auditlog.Body{
			0: {&auditlog.Connect{Source: "[2001:db8::7]:4022"}, &auditlog.Decision{Allow: true, User: "bob", Groups: []string{"ops", "dba"}, Ticket: "OPS-1", Profile: "debug"},
				&auditlog.Decision{Allow: true, User: "bob", Ticket: "OPS-2", Profile: "debug"}, &auditlog.Sandbox{Image: "registry/debug:1", Digest: "sha256:12ab"}, &auditlog.Alert{Name: "a"}},
			1: {&auditlog.Request{Type: "exec", Command: []byte("make it"), OK: true}, &auditlog.ProgramExec{Exec: 1, Args: [][]byte{[]byte("curl"), []byte("-T"), []byte("x")}, Path: []byte("/usr/bin/curl")},
				&auditlog.Transfer{Op: "file", Path: []byte("up.csv"), Resolved: []byte("/home/up.csv")}},
		})
		session(t, l, "many", func() map[uint32][]auditlog.Body {
			all := make(map[uint32][]auditlog.Body)
			for i := range maxListed + 10 {
				all[2] = append(all[2], &auditlog.Request{Type: "exec", Command: fmt.Append(nil, i), OK: true})
			}
			return all
		}())
	})
	for _, c := range []struct {
		args string
		want string
	}{
		{"", "many plain rich"}, {"--user bob", "rich"}, {"--user al*", "many plain"}, {"--user alice,bob", "many plain rich"}, {"--user nobody", ""},
		{"--group dba", "rich"}, {"--group d?", ""}, {"--ticket OPS-1", "rich"}, {"--ticket OPS-2", "rich"}, {"--ticket OPS-3", ""},
		{"--image *debug:1", "rich"}, {"--image sha256:12ab", "rich"}, {"--image sha256:12", ""}, {"--session-profile debug", "rich"}, {"--source 192.0.2.0/24", "many plain"}, {"--source ::ffff:192.0.2.7", "many plain"}, {"--source 2001:db8::/32", "rich"}, {"--source 192.0.2.8", ""},
		{"--since 1h", "many plain rich"}, {"--until 1h", ""}, {"--until today", "many plain rich"}, {"--since 2001-01-01 --until 2001-02-01", ""}, {"--since 2001-01-01", "many plain rich"},
		{"--has-command curl", "rich"}, {"--has-command curl*x", "rich"}, {"--has-command make", "rich"}, {"--has-command 105", "many"}, {"--has-command wget", ""},
		{"--has-file /home/*.csv", "rich"}, {"--has-file up.csv", "rich"}, {"--has-file .txt", ""}, {"--alerts", "rich"}, {"--cause client-left", "many plain rich"}, {"--cause idle", ""},
		{"--state sealed", "many plain rich"}, {"--state damaged", ""}, {"--limit 2", "many plain"}, {"--alerts --user alice", ""},
	} {
		var got []string
		out, errs, code := audit(t, append([]string{"list", dir, "-o", "json", "--utc"}, strings.Fields(c.args)...)...)
		for l := range strings.Lines(out) {
			got = append(got, strings.Split(l, `"`)[3])
		}
		slices.Sort(got)
		if strings.Join(got, " ") != c.want || code != 0 {
			t.Errorf("list %s: code %d, %v, want %s %s", c.args, code, got, c.want, errs)
		}
	}
	for _, bad := range []string{"--since soon", "--source 300.1.1.1", "--state odd", "--limit -1", "--since 1h --until 2h"} {
		if _, errs, code := audit(t, append([]string{"list", dir}, strings.Fields(bad)...)...); code != 1 || !strings.Contains(errs, "--") {
			t.Errorf("list %s: code %d %s", bad, code, errs)
		}
	}
	for _, both := range []string{"export plain -f text --user bob", "report plain --since today", "files plain --alerts", "search x --session plain --ticket T"} {
		if _, errs, code := audit(t, append(strings.Fields(both), "--store", dir)...); code != 1 || !strings.Contains(errs, "name a session, or choose some") {
			t.Errorf("%s: code %d %s", both, code, errs)
		}
	}
	for _, one := range []string{"files rich --has-file up.csv", "search make --session rich --limit 1"} {
		if out, errs, code := audit(t, append(strings.Fields(one), "--store", dir)...); code != 0 || out == "" {
			t.Errorf("%s: code %d %s", one, code, errs)
		}
	}
	list := new(tool)
	for _, name := range choosing { // none that is not there
		if c, _, err := list.command().Find([]string{"export"}); err != nil || c.Flags().Lookup(name) == nil {
			t.Errorf("no flag %s: %v", name, err)
		}
	}
	if out, _, _ := audit(t, "list", dir, "--user", "bob", "-o", "json"); !strings.Contains(out, `"groups":["ops","dba"],"ticket":"OPS-2","tickets":["OPS-1","OPS-2"]`) {
		t.Errorf("list: %s", out)
	}
	for _, o := range []string{"table", "text"} {
		if out, _, code := audit(t, "list", dir, "-o", o); code != 0 || !strings.HasPrefix(out, "ID ") || strings.Contains(out, "\x1b") {
			t.Errorf("list -o %s: %d %q", o, code, out)
		}
	}
}

// Who never proved a key is in no session: the gates' own logs are listed and exported if asked for, and else not.
func TestGateLogs(t *testing.T) {
	dir := t.TempDir()
	writeLog(t, dir, func(l *auditlog.Log) {
		session(t, l, "s1", nil)
		l.Refused(auditlog.Refused{Source: "203.0.113.9", Users: []string{hostile}, Reason: "no key was proven", Count: 3})
	})
	for _, c := range []struct {
		args      string
		want, not string
	}{
		{"list --gate-logs", "  3 refused  ", "s1"}, {"list --gate-logs -o json", `"refused":3`, "s1"}, {"list", "s1", "refused"},
		{"list --gate-logs --since 1h", "  3 refused  ", "s1"}, {"list --gate-logs --since 2001-01-01 --until 2001-01-02", "CAUSE", "refused"},
		{"export -f ocsf --gate-logs", `"activity_name":"Refuse"`, `"correlation_uid":"s1"`}, {"export -f ocsf", `"correlation_uid":"s1"`, `"activity_name":"Refuse"`},
		{"export -f jsonl --gate-logs", `"source":"203.0.113.9"`, `"session":"s1"`},
	} {
		out, errs, code := audit(t, append(strings.Fields(c.args), "--store", dir)...)
		if code != 0 || !strings.Contains(out, c.want) || strings.Contains(out, c.not) || strings.Contains(out, "\x1b") {
			t.Errorf("%s: code %d %s\n%s", c.args, code, errs, out)
		}
	}
	if _, errs, code := audit(t, "list", "--gate-logs", t.TempDir()); code != 0 || !strings.Contains(errs, "there is no log of a gate's own in /") {
		t.Errorf("code %d %s", code, errs)
	}
	// A gate's log goes on all day: what ended after a time is of that time.
	now := time.Now()
	s := selection{gateLogs: true, after: now.Add(-time.Hour)}
	if m := (&summary{Start: now.Add(-9 * time.Hour), End: now}); !s.match(m) {
		t.Error("a log that goes on is left out")
	}
	if m := (&summary{Start: now.Add(-9 * time.Hour), End: now.Add(-8 * time.Hour)}); s.match(m) {
		t.Error("a log that had ended is taken")
	}
}
