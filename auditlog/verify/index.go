package verify

import (
	"context"
	"sync/atomic"

	"github.com/sallyport/sallyport/auditlog"
)

// maxEntries bounds how many entries of the index are kept to be held against their logs: about 200 bytes each.
var maxEntries int64 = 1 << 20 // a variable for its test

// entries are what the index says of sessions, by the session's ID. It is filled before the sessions' logs are read.
type entries struct {
	of      map[[16]byte][]entry
	dirs    []string // of the logs that have entries
	kept    atomic.Int64
	skipped atomic.Int64
}

type entry struct {
	mark auditlog.EntryMark
	id   [16]byte
	dir  int // in dirs
}

// read reads a log. Of an index it notes the entries; of a session, which of these do not fit it.
func (v *Run) read(ctx context.Context, r *auditlog.SessionReader, log auditlog.Stored, c *checked) {
	var has []entry
	if log.Name.Kind == auditlog.SessionLog { // read after all of the index, which is not added to any more
		has = v.index.of[short(log.Name.ID)]
	}
	switch {
	case log.Name.Kind == auditlog.IndexLog:
		for rec := range r.Records(ctx) {
			if e, ok := rec.Body.(*auditlog.Entry); ok && v.within(e.Start.UTC().Format("2006/01/02")) {
				v.note(e, c)
			}
		}
	case len(has) > 0:
		e, complete := auditlog.EntryOf(ctx, r)
		for _, in := range has {
			if !in.mark.Fits(e, complete) {
				c.told = append(c.told, in)
			}
		}
	default:
		r.Verify(ctx)
	}
	c.report = r.Report()
}

func (v *Run) note(e *auditlog.Entry, c *checked) {
	if v.index.kept.Add(1) > maxEntries {
		v.index.skipped.Add(1)
		return
	}
	mark, err := e.Mark()
	if err != nil {
		c.err = err
		return
	}
	c.says = append(c.says, entry{mark: mark, id: short(e.ID)})
}

// compareIndex tells what an index says otherwise than a log, if both are whole by themselves.
func (v *Run) compareIndex(c *checked) error {
	if c.report.State == auditlog.Damaged || c.report.State == auditlog.Unreadable {
		return nil
	}
	if len(c.says) > 0 {
		v.index.dirs = append(v.index.dirs, c.dir)
		for _, e := range c.says {
			e.dir = len(v.index.dirs) - 1
			v.index.of[e.id] = append(v.index.of[e.id], e)
		}
	}
	if c.report.State == auditlog.Live {
		return nil // the rest may be on its way
	}
	for _, e := range c.told {
		if err := v.problem(v.index.dirs[e.dir], "says of session %s otherwise than its log, which is what counts", c.report.ID); err != nil {
			return err
		}
	}
	return nil
}
