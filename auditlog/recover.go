package auditlog

import (
	"cmp"
	"context"
	"crypto/sha256"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"time"
)

// spoolFile is a file of the spool directory.
type spoolFile struct {
	id     string
	number uint32
	suffix string // openSuffix, sealedSuffix or objectSuffix
	size   int64  // -1: the disk does not say
}

func (f spoolFile) path(dir string) string {
	return filepath.Join(dir, spoolName(f.id, f.number, f.suffix))
}

// upload reads the header for the name that the object gets.
func (f spoolFile) upload(d disk, dir string) (upload, error) {
	if f.size < 0 {
		return upload{}, fmt.Errorf("%s: can't be looked at", f.path(dir))
	}
	if f.suffix == objectSuffix {
		return f.object(dir)
	}
	file, err := d.OpenFile(f.path(dir), os.O_RDONLY, 0)
	if err != nil {
		return upload{}, err
	}
	defer file.Close()
	s, err := NewSegmentReader(file)
	if err != nil {
		return upload{}, fmt.Errorf("%s: %w", f.path(dir), err)
	}
	return upload{number: f.number, name: s.Header().Name().String(), size: f.size}, nil
}

// readSpool lists a spool's segments by log and number. It removes what probes left, and at a start also what a crash left of files
// that were being written.
func (l *Log) readSpool(start bool) ([]spoolFile, error) {
	dir := l.cfg.Spool
	d, err := os.Open(dir)
	if err != nil {
		return nil, err
	}
	defer d.Close()
	var files []spoolFile
	for {
		entries, err := d.ReadDir(1024)
		for _, e := range entries {
			if strings.HasSuffix(e.Name(), probeSuffix) || start && (strings.HasSuffix(e.Name(), unfinishedSuffix) ||
				strings.HasSuffix(e.Name(), anewSuffix)) {
				l.disk.Remove(filepath.Join(dir, e.Name())) // one that stays holds up nothing
				continue
			}
			f, ok := parseSpoolName(e.Name())
			if !ok || !e.Type().IsRegular() {
				continue
			}
			info, err := e.Info()
			if errors.Is(err, os.ErrNotExist) {
				continue // stored meanwhile
			}
			f.size = -1 // one that can't be looked at shall not hide the others
			if err == nil {
				f.size = info.Size()
			}
			files = append(files, f)
		}
		if errors.Is(err, io.EOF) {
			break
		}
		if err != nil {
			return nil, err
		}
	}
	slices.SortFunc(files, func(a, b spoolFile) int {
		return cmp.Or(strings.Compare(a.id, b.id), cmp.Compare(a.number, b.number), strings.Compare(a.suffix, b.suffix))
	})
	return files, nil
}

// badSuffix ends the name of a file that was moved aside.
const badSuffix = ".bad"

var suffixes = []string{openSuffix, sealedSuffix, objectSuffix}

func parseSpoolName(name string) (spoolFile, bool) {
	parts := strings.Split(name, ".")
	if len(parts) != 3 || !ValidID(parts[0]) || !slices.Contains(suffixes, "."+parts[2]) {
		return spoolFile{}, false
	}
	number, err := parseNumber(parts[1])
	if err != nil {
		return spoolFile{}, false
	}
	return spoolFile{id: parts[0], number: number, suffix: "." + parts[2]}, true
}

// recover seals what an earlier gate left unsealed and queues all that waits for the store. What can't be sealed, as a file can't be
// read or the disk is full, is tried again (mendLogs): it shall not keep all others from the store, which alone makes room.
func (l *Log) recover(ctx context.Context) error {
	files, err := l.readSpool(true)
	if err != nil {
		return err
	}
	all := files
	for _, f := range all {
		l.used.Add(f.size + fileOverhead)
	}
	for len(files) > 0 {
		if err := context.Cause(ctx); err != nil {
			return err
		}
		n := countLog(files)
		if err := l.recoverLog(files[:n], byStart); err != nil {
			l.spoolFailed(fmt.Errorf("recover log of %s, which is tried again: %w", files[0].id, err))
			l.sealLater(files[0].id, false)
		}
		files = files[n:]
	}
	if err := l.disk.SyncDir(l.cfg.Spool); err != nil {
		l.spoolFailed(fmt.Errorf("recover logs, which is tried again: %w", err))
		for _, f := range all {
			if f.suffix != objectSuffix {
				l.sealLater(f.id, false)
			}
		}
	}
	// Queued only now that all names are durable.
	l.uploads.lookAgain() // locked: the index's segments may be added already
	l.uploads.rescan()
	return nil
}

// countLog says how many of the files are of the first one's log.
func countLog(files []spoolFile) int {
	if n := slices.IndexFunc(files, func(f spoolFile) bool { return f.id != files[0].id }); n > 0 {
		return n
	}
	return len(files)
}

// Who seals a log, as its end says.
const (
	byStart = "the gate ended before the session did; sealed at its next start"
	byMend  = "the gate's disk failed before the session ended; sealed when it took files again"
)

// recoverLog leaves a log's files sealed up to a last segment.
func (l *Log) recoverLog(files []spoolFile, by string) error {
	dir := l.cfg.Spool
	if files[0].suffix == objectSuffix {
		return nil
	}
	for i, f := range files {
		if f.suffix == sealedSuffix && i < len(files)-1 {
			continue
		}
		s, err := scanSegment(l.disk, f.path(dir))
		if err != nil {
			return err
		}
		last := i == len(files)-1
		switch {
		case !s.whole && f.suffix == openSuffix && (f.number == 0 || i > 0):
			// Killed while making the file: nothing is in it, and the segment before is still here.
			if err := l.disk.Remove(f.path(dir)); err != nil {
				return err
			}
			l.used.Add(-f.size - fileOverhead)
			if last && i > 0 {
				return l.sealAfter(files[i-1], by)
			}
		case !s.whole || s.header.ID != f.id || s.header.Number != f.number:
			l.log.Error("audit log: spool holds a file that is no segment; moved aside", "file", f.path(dir))
			if err := l.disk.Rename(f.path(dir), f.path(dir)+badSuffix); err != nil {
				return err
			}
		case s.footer != nil:
			if f.suffix == openSuffix {
				if err := l.disk.Rename(f.path(dir), spoolFile{f.id, f.number, sealedSuffix, 0}.path(dir)); err != nil {
					return err
				}
			}
			if last && !s.footer.Last {
				return l.sealAfter(spoolFile{f.id, f.number, sealedSuffix, 0}, by)
			}
		case f.suffix == sealedSuffix || !last:
			// A disk that lost what it had synced. The reader will say so; the rest is still worth having.
			l.log.Error("audit log: segment in the spool is damaged", "file", f.path(dir), "whole_until", s.good)
		default:
			if err := l.sealOpen(f, s, by); err != nil {
				return err
			}
		}
	}
	return nil
}

// scan is what a segment's file holds that is whole, as far as it can be told without the auditors' keys.
type scan struct {
	whole  bool // the header is
	header Header
	good   int64 // bytes up to the end of the last whole frame
	footer *Footer
	next   uint64
	ended  bool // the last record is an End
	hash   Hash // of all bytes, if there is a footer
}

func scanSegment(d disk, path string) (scan, error) {
	f, err := d.OpenFile(path, os.O_RDONLY, 0)
	if err != nil {
		return scan{}, err
	}
	defer f.Close()
	r, err := NewSegmentReader(f)
	var damage *DamageError
	if errors.As(err, &damage) && damage.Cause == nil {
		return scan{}, nil
	}
	if err != nil {
		return scan{}, err
	}
	s := scan{whole: true, header: r.Header()}
	for {
		_, err := r.Next()
		if errors.As(err, &damage) && damage.Cause == nil || errors.Is(err, io.EOF) {
			break
		}
		if err != nil {
			return scan{}, err
		}
	}
	s.good, s.next, s.ended = r.Whole(), r.NextSequence(), r.ended
	if footer, ok := r.Footer(); ok {
		s.footer, s.hash = &footer, r.Hash()
	}
	return s, nil
}

// sealOpen cuts an open segment back to its last whole frame and seals it as interrupted.
func (l *Log) sealOpen(file spoolFile, s scan, by string) error {
	f, err := l.disk.OpenFile(file.path(l.cfg.Spool), os.O_RDWR, 0)
	if err != nil {
		return err
	}
	w := &segmentWriter{disk: l.disk, dir: l.cfg.Spool, f: f, header: s.header, hash: sha256.New(), size: s.good,
		records: s.next - s.header.First, next: s.next}
	err = f.Truncate(s.good)
	if err == nil {
		_, err = io.Copy(w.hash, f)
	}
	if err == nil {
		err = l.sealInterrupted(w, s.ended, by)
	}
	l.used.Add(w.size - file.size)
	if err != nil {
		f.Close() // the error that counts is here already
		l.countTorn(w)
		l.sealLater(file.id, w.unsound)
	}
	return err
}

// sealAfter adds a last segment after a sealed one that is not the last.
func (l *Log) sealAfter(before spoolFile, by string) error {
	before.suffix = sealedSuffix
	s, err := scanSegment(l.disk, before.path(l.cfg.Spool))
	if err != nil {
		return err
	}
	if s.footer == nil || s.header.Number == maxNumber {
		return nil // damaged: it can't be continued
	}
	if s.footer.Last {
		return nil
	}
	old := segmentWriter{header: s.header, next: s.next}
	w, err := createSegment(l.disk, l.cfg.Spool, old.following(s.hash, l.wall()))
	if w == nil {
		return err
	}
	if err == nil {
		err = l.sealInterrupted(w, s.ended, by)
	}
	l.used.Add(w.size + fileOverhead)
	if err != nil {
		w.f.Close() // the error that counts is here already
		l.countTorn(w)
		l.sealLater(before.id, w.unsound)
	}
	return err
}

// sealInterrupted ends a log for the gate that could not.
func (l *Log) sealInterrupted(w *segmentWriter, ended bool, by string) error {
	now := l.wall()
	if !ended {
		body, err := encodeBody(&End{Cause: "interrupted", Detail: by})
		if err != nil {
			return err
		}
		rec := append(appendHead(nil, w.next, now, 0, KindEnd), body...)
		if err := w.writeFrame(codecNone, rec, len(rec), 1, true); err != nil {
			return err
		}
	}
	whole, err := w.finish(l.key, now, true, true)
	if err != nil {
		return err
	}
	l.indexInterrupted(w, whole)
	l.log.Info("audit log: sealed what was interrupted", "id", w.header.ID, "segment", w.header.Number,
		"since", w.header.LogStart.Format(time.RFC3339))
	return w.rename()
}
