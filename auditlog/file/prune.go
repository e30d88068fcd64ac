package file

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"log/slog"
	"os"
	"path"
	"path/filepath"
	"slices"
	"strings"
	"time"

	"github.com/sallyport/sallyport/auditlog"
)

// pruneGrace is the least age, since its last segment came, of a log that may be removed: a gate that was killed may put
// its newest segments once more.
const pruneGrace = time.Hour

// Prune says which logs a directory store may forget. Nothing is removed unless a limit is set.
type Prune struct {
	// MaxAge is how long a log is kept after its end. 0: for ever. Otherwise at least 1h.
	MaxAge time.Duration `yaml:"max_age"`
	// MaxBytes is how much the store may hold, in bytes; the oldest logs go first. 0: no limit. Otherwise at least 1 MiB.
	MaxBytes int64 `yaml:"max_bytes"`
}

// Enabled says whether a limit is set.
func (p Prune) Enabled() bool { return p != Prune{} }

// Validate says what is wrong with the limits.
func (p Prune) Validate() error {
	switch {
	case p.MaxAge < 0 || p.MaxAge > 0 && p.MaxAge < pruneGrace:
		return fmt.Errorf("max_age: %v is less than %v", p.MaxAge, pruneGrace)
	case p.MaxBytes < 0 || p.MaxBytes > 0 && p.MaxBytes < 1<<20:
		return fmt.Errorf("max_bytes: %d is less than 1048576", p.MaxBytes)
	}
	return nil
}

// Pruned is what a Prune did.
type Pruned struct {
	Logs  int   // removed
	Bytes int64 // of their segments
	Left  int64 // bytes of the logs that are still there
	Kept  int   // logs over a limit that were kept, as they are not sealed or damaged
}

// storedLog is a log in the directory.
type storedLog struct {
	dir     string // its name, with a slash at the end
	last    string // name of the last segment
	bytes   int64
	ended   time.Time // when the last segment came
	session bool
	foreign bool // there are files that are not segments
}

// Prune removes whole logs, sessions' and the gate's own, the oldest first, until the rest is within the limits. It keeps
// each log that is not sealed, that holds what is no segment, or whose last segment came less than an hour ago; and the
// newest session. A log is gone in one step: a reader sees all of it or nothing.
func (s *Store) Prune(ctx context.Context, limits Prune, now time.Time, log *slog.Logger) (done Pruned, err error) {
	defer func() {
		if err != nil {
			err = fmt.Errorf("prune log directory: %w", err)
		}
	}()
	src, err := OpenSource(s.dir)
	if err != nil {
		return done, err
	}
	defer src.Close()
	logs, err := storedLogs(ctx, src)
	if err != nil {
		return done, err
	}
	newest := -1
	for i, l := range logs {
		done.Left += l.bytes
		if l.session {
			newest = i
		}
	}
	for i, l := range logs {
		if err := context.Cause(ctx); err != nil {
			return done, err
		}
		age := now.Sub(l.ended)
		old := limits.MaxAge > 0 && age > limits.MaxAge
		if !old && (limits.MaxBytes <= 0 || done.Left <= limits.MaxBytes) || i == newest || age < pruneGrace {
			continue
		}
		sealed := false
		if !l.foreign {
			if sealed, err = isSealed(ctx, src, l.last); err != nil {
				return done, err
			}
		}
		if !sealed {
			done.Kept++
			continue
		}
		if err := s.remove(l.dir); err != nil {
			return done, err
		}
		done.Logs++
		done.Bytes += l.bytes
		done.Left -= l.bytes
		log.Info("audit log: pruned", "log", l.dir, "bytes", l.bytes, "ended", l.ended.UTC())
	}
	return done, nil
}

// storedLogs gives all logs, the one that ended first first.
func storedLogs(ctx context.Context, src *Source) ([]storedLog, error) {
	var logs []storedLog
	foreign := map[string]bool{}
	for l, err := range auditlog.Logs(ctx, src, "") {
		if err != nil {
			return nil, err
		}
		for _, name := range l.Foreign {
			for dir := path.Dir(name); dir != "."; dir = path.Dir(dir) {
				foreign[dir+"/"] = true
			}
		}
		if len(l.Segments) == 0 {
			continue
		}
		last := l.Segments[len(l.Segments)-1]
		sl := storedLog{dir: l.Name.Dir(), last: last.Name, session: l.Name.Kind == auditlog.SessionLog}
		for _, o := range l.Segments {
			sl.bytes += o.Size
			if o.Modified.After(sl.ended) {
				sl.ended = o.Modified
			}
		}
		logs = append(logs, sl)
	}
	for i := range logs {
		logs[i].foreign = foreign[logs[i].dir]
	}
	slices.SortStableFunc(logs, func(a, b storedLog) int { return cmp.Or(a.ended.Compare(b.ended), strings.Compare(a.dir, b.dir)) })
	return logs, nil
}

// isSealed reads a segment and says whether it is whole, signed, and its log's last.
func isSealed(ctx context.Context, src *Source, name string) (bool, error) {
	f, err := src.Open(ctx, name)
	if err != nil {
		return false, err
	}
	defer f.Close()
	r, err := auditlog.NewSegmentReader(f)
	for err == nil {
		_, err = r.Next()
	}
	var damage *auditlog.DamageError
	if !errors.Is(err, io.EOF) {
		if errors.As(err, &damage) && damage.Cause == nil {
			return false, nil
		}
		return false, err
	}
	footer, ok := r.Footer()
	return ok && footer.Last && r.Header().Name().String() == name, nil
}

// remove takes a log's directory out of sight, then removes it, and the directories above that are empty now.
func (s *Store) remove(dir string) error {
	from := filepath.Join(s.dir, filepath.FromSlash(dir))
	to, err := os.MkdirTemp(s.temp, "prune-*")
	if err != nil {
		return err
	}
	if err := os.Rename(from, filepath.Join(to, "log")); err != nil {
		return errors.Join(err, os.RemoveAll(to))
	}
	if err := os.RemoveAll(to); err != nil {
		return err
	}
	// Not the topmost (sessions, gate). A Put that makes one of these at this moment fails, and is tried again.
	for parent := path.Dir(path.Clean(dir)); strings.Contains(parent, "/"); parent = path.Dir(parent) {
		err := os.Remove(filepath.Join(s.dir, filepath.FromSlash(parent)))
		if errors.Is(err, fs.ErrExist) { // not empty
			return nil
		}
		if err != nil && !errors.Is(err, fs.ErrNotExist) {
			return err
		}
	}
	return nil
}
