package main

import (
	"context"
	"errors"
	"fmt"
	"iter"
	"net/netip"
	"slices"
	"strconv"
	"strings"
	"time"
	"unicode/utf8"

	"github.com/spf13/pflag"

	"github.com/sallyport/sallyport/auditlog"
)

// selection says which sessions are wanted. Values of one flag are alternatives; flags restrict each other.
type selection struct {
	users, groups, tickets, sources, images, profiles, causes, states []string

	since, until string
	command      string
	file         string
	alerts       bool
	gateLogs     bool // not the sessions
	limit        int

	after, before time.Time // of since and until; zero: no bound
	networks      []netip.Prefix
}

// flags adds the flags by which sessions are chosen.
func (s *selection) flags(f *pflag.FlagSet) {
	f.StringSliceVarP(&s.users, "user", "u", nil, "only sessions of this `user` (* and ? stand for any text, any character)")
	f.StringSliceVarP(&s.groups, "group", "g", nil, "only of users in this `group`")
	f.StringSliceVar(&s.tickets, "ticket", nil, "only under this `ticket`")
	f.StringSliceVar(&s.sources, "source", nil, "only from this `address` or network (192.0.2.0/24)")
	f.StringSliceVar(&s.images, "image", nil, "only in a sandbox of this `image`, by its name or digest")
	f.StringSliceVar(&s.profiles, "session-profile", nil, "only under this `profile` of policy")
	f.StringSliceVar(&s.causes, "cause", nil, "only that ended by this `cause`: expired, revoked, idle, client-left, ...")
	f.StringSliceVar(&s.states, "state", nil, "only logs in this `state`: sealed, interrupted, live, damaged, unreadable")
	f.StringVar(&s.since, "since", "", "only sessions that began at or after this `time`: 2026-03-01, \"2026-03-01 14:00\", RFC 3339, 90m, 2d, 1w, today, yesterday")
	f.StringVar(&s.until, "until", "", "only sessions that began before this `time`; a day alone is included")
	f.StringVar(&s.command, "has-command", "", "only with a command or program that has this `text` (* and ? as above)")
	f.StringVar(&s.file, "has-file", "", "only with a transfer of a file whose path has this `text`")
	f.BoolVar(&s.alerts, "alerts", false, "only with an alert")
	f.IntVarP(&s.limit, "limit", "n", 0, "stop after this many (0: no limit)")
}

// gateFlag adds the flag by which a command takes the gates' own logs.
func (s *selection) gateFlag(f *pflag.FlagSet) {
	f.BoolVar(&s.gateLogs, "gate-logs", false, "the gates' own logs, not the sessions: who was refused before a key was proven, from where, how often")
}

// choosing are the flags by which sessions are chosen.
var choosing = []string{"user", "group", "ticket", "source", "image", "session-profile", "cause", "state", "since", "until", "has-command", "has-file", "alerts", "limit", "gate-logs"}

// notBoth says that a session was named and others chosen; what a command uses for both is left out.
func notBoth(f *pflag.FlagSet, id string, uses ...string) error {
	for _, name := range choosing {
		if id != "" && f.Changed(name) && !slices.Contains(uses, name) {
			return fmt.Errorf("%s and --%s: name a session, or choose some", clean(id), name)
		}
	}
	return nil
}

// prepare checks what the flags say. Times without a zone are in loc.
func (s *selection) prepare(now time.Time, loc *time.Location) (err error) {
	if s.limit < 0 {
		return fmt.Errorf("--limit %d: want 0 or more", s.limit)
	}
	if s.after, err = parseTime(s.since, now, loc, false); err != nil {
		return fmt.Errorf("--since: %w", err)
	}
	if s.before, err = parseTime(s.until, now, loc, true); err != nil {
		return fmt.Errorf("--until: %w", err)
	}
	if !s.after.IsZero() && !s.before.IsZero() && !s.after.Before(s.before) {
		return errors.New("--since is not before --until")
	}
	for _, v := range s.sources {
		p, err := netip.ParsePrefix(v)
		if err != nil {
			a, err := netip.ParseAddr(v)
			if err != nil {
				return fmt.Errorf("--source %q: want an address or a network (192.0.2.0/24)", v)
			}
			a = a.Unmap() // ::ffff:192.0.2.1 is 192.0.2.1
			p = netip.PrefixFrom(a, a.BitLen())
		}
		s.networks = append(s.networks, p.Masked())
	}
	for _, v := range s.states {
		if !slices.Contains([]auditlog.State{auditlog.Sealed, auditlog.Interrupted, auditlog.Live, auditlog.Damaged, auditlog.Unreadable}, auditlog.State(v)) {
			return fmt.Errorf("--state %q: want sealed, interrupted, live, damaged or unreadable", v)
		}
	}
	return nil
}

// parseTime reads a moment. A day alone is its start, or, as an upper bound, the start of the next.
func parseTime(s string, now time.Time, loc *time.Location, upper bool) (time.Time, error) {
	day := func(t time.Time) time.Time {
		t = t.In(loc)
		if upper {
			t = t.AddDate(0, 0, 1)
		}
		return time.Date(t.Year(), t.Month(), t.Day(), 0, 0, 0, 0, loc)
	}
	switch s {
	case "":
		return time.Time{}, nil
	case "now":
		return now, nil
	case "today":
		return day(now), nil
	case "yesterday":
		return day(now.In(loc).AddDate(0, 0, -1)), nil
	}
	if t, err := time.Parse(time.RFC3339, s); err == nil {
		return t, nil
	}
	if t, err := time.ParseInLocation("2006-01-02", s, loc); err == nil {
		return day(t), nil
	}
	for _, layout := range []string{"2006-01-02 15:04", "2006-01-02T15:04", "2006-01-02 15:04:05", "2006-01-02T15:04:05"} {
		if t, err := time.ParseInLocation(layout, s, loc); err == nil {
			return t, nil
		}
	}
	if d, err := parseAge(s); err == nil {
		return now.Add(-d), nil
	}
	return time.Time{}, fmt.Errorf("%q is no time: want 2026-03-01, \"2026-03-01 14:00\", RFC 3339, an age (90m, 2d, 1w), today or yesterday", s)
}

// parseAge reads a duration that may also be in days and weeks.
func parseAge(s string) (time.Duration, error) {
	for unit, length := range map[string]time.Duration{"d": 24 * time.Hour, "w": 7 * 24 * time.Hour} {
		if digits, ok := strings.CutSuffix(s, unit); ok {
			n, err := strconv.ParseUint(digits, 10, 16)
			return time.Duration(n) * length, err
		}
	}
	d, err := time.ParseDuration(s)
	if err == nil && d < 0 {
		err = errors.New("negative")
	}
	return d, err
}

// logs yields the sessions' logs of the days that the selection needs.
func (s *selection) logs(ctx context.Context, src auditlog.Source) iter.Seq2[auditlog.Stored, error] {
	const day, layout, maxDays = 24 * time.Hour, "2006/01/02", 400
	last := s.before
	if last.IsZero() {
		last = time.Now().Add(day) // a gate's clock may be ahead
	}
	first, end := s.after.UTC().Format(layout), last.UTC().Format(layout)
	prefix := auditlog.SessionPrefix
	if s.gateLogs {
		prefix = auditlog.GatePrefix
	}
	if s.gateLogs || s.after.IsZero() || last.Sub(s.after) > maxDays*day {
		return func(yield func(auditlog.Stored, error) bool) {
			for log, err := range auditlog.Logs(ctx, src, prefix) {
				if err == nil && len(log.Segments) > 0 && (!s.after.IsZero() && log.Name.Day < first || !s.before.IsZero() && log.Name.Day > end) {
					continue
				}
				if !yield(log, err) {
					return
				}
			}
		}
	}
	return func(yield func(auditlog.Stored, error) bool) {
		for at := s.after.UTC(); at.Format(layout) <= end; at = at.Add(day) {
			for log, err := range auditlog.Logs(ctx, src, auditlog.SessionPrefix+at.Format(layout)+"/") {
				if !yield(log, err) || err != nil {
					return
				}
			}
		}
	}
}

// match says whether a session is wanted.
func (s *selection) match(m *summary) bool {
	has := func(want []string, have ...string) bool {
		return len(want) == 0 || slices.ContainsFunc(want, func(w string) bool {
			return slices.ContainsFunc(have, func(h string) bool { return glob(w, h) })
		})
	}
	first := m.Start
	if s.gateLogs { // one goes on all day
		first = m.End
	}
	switch {
	case !s.after.IsZero() && first.Before(s.after), !s.before.IsZero() && !m.Start.Before(s.before):
	case !has(s.users, m.User), !has(s.groups, m.Groups...), !has(s.tickets, append(m.Tickets[:len(m.Tickets):len(m.Tickets)], m.Ticket)...), !has(s.images, m.Image, m.Digest):
	case !has(s.profiles, m.Profile), !has(s.causes, m.Cause), !has(s.states, string(m.State)):
	case s.command != "" && !m.hasCommand, s.file != "" && !m.hasFile, s.alerts && m.Alerts == 0:
	default:
		return len(s.networks) == 0 || s.matchSource(m.Source)
	}
	return false
}

func (s *selection) matchSource(source string) bool {
	at, err := netip.ParseAddrPort(source)
	addr := at.Addr()
	if err != nil {
		if addr, err = netip.ParseAddr(source); err != nil {
			return false
		}
	}
	return slices.ContainsFunc(s.networks, func(p netip.Prefix) bool { return p.Contains(addr.Unmap().WithZone("")) })
}

// watch notes what only a session's records tell.
func (s *selection) watch(m *summary, rec auditlog.Record) {
	if s.command != "" && !m.hasCommand {
		for _, text := range commandTexts(rec) {
			m.hasCommand = m.hasCommand || contains(s.command, text)
		}
	}
	if b, ok := rec.Body.(*auditlog.Transfer); ok && s.file != "" && !m.hasFile {
		for _, p := range fileTexts(b) {
			m.hasFile = m.hasFile || contains(s.file, string(p))
		}
	}
}

// indexed gives what an index has of a session; enough says that it answers the selection. An index has no arguments of programs,
// and lists of bounded length.
func (s *selection) indexed(e auditlog.Entry) (m *summary, enough bool) {
	one := indexedSummary(e)
	has := func(list []string, pattern string) bool {
		return slices.ContainsFunc(list, func(v string) bool { return contains(pattern, v) })
	}
	one.hasCommand = s.command != "" && (has(e.Commands, s.command) || has(e.Names, s.command))
	one.hasFile = s.file != "" && has(e.Paths, s.file)
	unknown := s.command != "" && !one.hasCommand && (e.More || e.Programs > 0) || s.file != "" && !one.hasFile && e.More
	return &one, !unknown || e.Clear
}

// commandTexts are the texts of a record that say what was, or was to be, executed.
func commandTexts(rec auditlog.Record) []string {
	switch b := rec.Body.(type) {
	case *auditlog.Request:
		if c := commandOf(b); c != "" {
			return []string{c}
		}
	case *auditlog.ProgramExec:
		if b.Again == 0 {
			return []string{plainLine(b.Args), string(b.Path)}
		}
	case *auditlog.ProgramStart:
		if b.Differ {
			return []string{plainLine(b.Args), string(b.File)}
		}
	case *auditlog.Unaudited:
		return []string{plainLine(b.Args)}
	}
	return nil
}

// plainLine joins arguments with blanks, as they are.
func plainLine(args [][]byte) string {
	var b strings.Builder
	for i, a := range args {
		if i > 0 {
			b.WriteByte(' ')
		}
		b.Write(a)
	}
	return b.String()
}

func fileTexts(b *auditlog.Transfer) [][]byte {
	return [][]byte{b.Path, b.Resolved, b.Target, b.TargetResolved, b.Name}
}

// contains says whether text has the pattern somewhere in it.
func contains(pattern, text string) bool {
	if !strings.ContainsAny(pattern, "*?") {
		return strings.Contains(text, pattern)
	}
	return glob("*"+pattern+"*", text)
}

// glob says whether text is what pattern says; * stands for any text, ? for any character.
func glob(pattern, text string) bool {
	star, mark := -1, 0 // where the last * is, and what it has taken up to
	p, i := 0, 0
	for i < len(text) {
		switch {
		case p < len(pattern) && pattern[p] == '*':
			star, mark = p, i
			p++
		case p < len(pattern) && pattern[p] == '?':
			_, n := utf8.DecodeRuneInString(text[i:])
			p, i = p+1, i+n
		case p < len(pattern) && pattern[p] == text[i]:
			p, i = p+1, i+1
		case star >= 0:
			mark++
			p, i = star+1, mark
		default:
			return false
		}
	}
	return strings.Trim(pattern[p:], "*") == ""
}
