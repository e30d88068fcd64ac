package auditlog

import (
	"net/netip"
	"slices"
	"time"
)

// Bounds of what is kept of connections that never proved a key: they cost a stranger nothing, so they must cost little.
const (
	maxSources      = 64 // in one period; the others count as one
	maxRefusedNames = 8  // users, and fingerprints, of one source
	maxRefusedText  = 64 // bytes of a name; 128 of the other texts
)

// otherSources stands for the sources beyond maxSources.
const otherSources = "other"

// fold gathers refusals by source over a period.
type fold struct {
	sources map[string]*Refused
}

// Refused folds a connection that never proved a key into the gate's own log. Count 0 counts as 1; First and Last default
// to now. It never waits for the disk.
func (l *Log) Refused(f Refused) {
	now := l.wall().UTC()
	if f.First.IsZero() {
		f.First = now
	}
	if f.Last.IsZero() {
		f.Last = now
	}
	f.Count = max(f.Count, 1)
	source := foldedSource(f.Source)
	l.mu.Lock()
	defer l.mu.Unlock()
	if l.fold.sources == nil {
		l.fold.sources = make(map[string]*Refused)
	}
	have := l.fold.sources[source]
	if have == nil && len(l.fold.sources) >= maxSources {
		source = otherSources
		have = l.fold.sources[source]
	}
	if have == nil {
		have = &Refused{Source: source, Client: cutText(f.Client, 2*maxRefusedText), Reason: cutText(f.Reason, 2*maxRefusedText),
			First: f.First, Last: f.Last}
		l.fold.sources[source] = have
	}
	have.Count += f.Count
	if f.First.Before(have.First) {
		have.First = f.First
	}
	if f.Last.After(have.Last) {
		have.Last = f.Last
	}
	have.Users = foldNames(have.Users, f.Users)
	have.Fingerprints = foldNames(have.Fingerprints, f.Fingerprints)
}

func foldNames(have, more []string) []string {
	for _, s := range more {
		if len(have) >= maxRefusedNames {
			break
		}
		if s = cutText(s, maxRefusedText); s != "" && !slices.Contains(have, s) {
			have = append(have, s)
		}
	}
	return have
}

// cutText cuts s to n bytes. The copy keeps a short text from holding a long one in memory.
func cutText(s string, n int) string {
	return string([]byte(s[:min(len(s), n)]))
}

// foldedSource is the address without its port; of IPv6 the network of 64 bits, which one host has to itself.
func foldedSource(s string) string {
	addr, err := netip.ParseAddr(s)
	if err != nil {
		ap, err := netip.ParseAddrPort(s)
		if err != nil {
			return cutText(s, maxRefusedText)
		}
		addr = ap.Addr()
	}
	addr = addr.Unmap().WithZone("")
	if addr.Is6() && !addr.IsLoopback() {
		if p, err := addr.Prefix(64); err == nil {
			return p.String()
		}
	}
	return addr.String()
}

// refusedRecords derives a refusal from what a connection that never began had recorded.
func (l *Log) refusedRecords(records []byte, end *End) {
	if len(records) == 0 {
		return
	}
	f := Refused{Reason: end.Detail, Last: l.wall().UTC()}
	if f.Reason == "" {
		f.Reason = end.Cause
	}
	for len(records) > 0 {
		rec, rest, _, err := decodeRecord(records)
		if err != nil {
			l.log.Error("audit log: records of a refused connection", "error", err)
			break
		}
		records = rest
		if f.First.IsZero() {
			f.First = rec.Time
		}
		switch b := rec.Body.(type) {
		case *Connect:
			f.Source = b.Source
		case *Handshake:
			f.Client = b.Client
		case *Authenticate:
			f.Users = foldNames(f.Users, []string{b.User})
			f.Fingerprints = foldNames(f.Fingerprints, []string{b.Fingerprint})
			if b.Reason != "" && end.Detail == "" {
				f.Reason = b.Reason
			}
		}
	}
	l.Refused(f)
}

// foldLoop writes what was folded once in a period, the age at which segments are cut.
func (l *Log) foldLoop() {
	defer l.folding.Done()
	tick := time.NewTicker(l.cfg.SegmentAge)
	defer tick.Stop()
	for {
		select {
		case <-l.stop:
			return
		case <-tick.C:
			l.writeRefused()
		}
	}
}

// writeRefused writes what was folded into the gate's own log, which it begins if need be, and cuts its segment.
func (l *Log) writeRefused() {
	l.mu.Lock()
	sources := l.fold.sources
	l.fold.sources = nil
	own := l.own
	l.mu.Unlock()
	if len(sources) == 0 {
		return
	}
	now := l.wall()
	if own != nil && (own.Err() != nil || own.start.UTC().YearDay() != now.UTC().YearDay()) {
		// A log of its own for each day, so that days can be read, kept and deleted by themselves.
		if err := own.Close(&End{Cause: "shutdown", Detail: "continued in another log"}); err != nil {
			l.log.Error("audit log: gate's own log", "error", err)
		}
		own = nil
	}
	if own == nil {
		own = &Recorder{log: l, kind: GateLog, id: newRunID(now), start: now, lost: make(chan struct{}),
			done: make(chan struct{}), wake: make(chan struct{}, 1)}
		err := own.Record(0, &Connect{Gate: l.gate})
		if err == nil {
			err = own.Begin()
		}
		if err != nil {
			l.log.Error("audit log: gate's own log", "error", err)
			own = nil
		}
	}
	l.mu.Lock()
	l.own = own
	l.mu.Unlock()
	if own == nil {
		for _, f := range sources { // tried again with the next ones
			l.Refused(*f)
		}
		return
	}
	names := make([]string, 0, len(sources))
	for s := range sources {
		names = append(names, s)
	}
	slices.Sort(names)
	for _, s := range names {
		if err := own.Record(0, sources[s]); err != nil {
			l.log.Error("audit log: gate's own log", "error", err)
			return
		}
	}
	own.mu.Lock()
	own.cut = true
	own.notify()
	own.mu.Unlock()
}
