package auditlog

import (
	"errors"
	"fmt"
	"io"
	"math/bits"
	"os"
	"time"
)

// anewSuffix is of a segment's file that is being written anew.
const anewSuffix = openSuffix + ".tmp"

// unsealed is a log that an error of the disk cut.
type unsealed struct {
	unsound bool // a sync of one of its files failed
	tries   int  // to seal it, that failed
}

// sealLater notes a log that nobody writes any more: its recorder has ended, or an earlier gate left it. There are no more of them than
// files in the spool.
func (l *Log) sealLater(id string, unsound bool) {
	l.mu.Lock()
	defer l.mu.Unlock()
	u := l.unsealed[id]
	u.unsound = u.unsound || unsound
	l.unsealed[id] = u
}

func (l *Log) isUnsealed(id string) bool {
	l.mu.Lock()
	defer l.mu.Unlock()
	_, ok := l.unsealed[id]
	return ok
}

// mendLoop seals what an error of the disk cut, once the disk takes files again.
func (l *Log) mendLoop() {
	defer l.mending.Done()
	tick := time.NewTicker(l.cfg.mendEvery)
	defer tick.Stop()
	for {
		select {
		case <-l.stop:
			return
		case <-l.mend:
		case <-tick.C:
		}
		l.mendLogs()
	}
}

// mendLogs tries to seal the logs that are noted, as a start does. A log that is being written is none of them. Files that could not be
// read are looked at once more.
func (l *Log) mendLogs() {
	l.uploads.lookUnread()
	l.mu.Lock()
	todo := make(map[string]unsealed, len(l.unsealed))
	for id, u := range l.unsealed {
		todo[id] = u
	}
	l.mu.Unlock()
	if len(todo) == 0 || l.probe() != nil { // Ready says why
		return
	}
	files, err := l.readSpool(false)
	if err != nil {
		l.log.Error("audit log: spool", "error", err)
		return
	}
	for len(files) > 0 {
		select {
		case <-l.stop:
			return // what is left is the next start's
		default:
		}
		n, id := countLog(files), files[0].id
		if u, ok := todo[id]; ok {
			if err := l.mendLog(files[:n], u.unsound); err != nil {
				delete(todo, id)
				l.notMended(id, err)
			}
		}
		files = files[n:]
	}
	// Queued only when their names are durable.
	if err := l.disk.SyncDir(l.cfg.Spool); err != nil {
		l.spoolFailed(fmt.Errorf("seal logs, which is tried again: %w", err))
		return
	}
	l.mu.Lock()
	for id := range todo {
		delete(l.unsealed, id)
	}
	l.mu.Unlock()
	l.uploads.lookAgain()
}

// mendLog is recoverLog for a log whose files may be unsound.
func (l *Log) mendLog(files []spoolFile, unsound bool) error {
	if unsound {
		for _, f := range files {
			if f.suffix == openSuffix {
				if err := l.writeAnew(f.path(l.cfg.Spool)); err != nil {
					return err
				}
			}
		}
		// Before another name is given to one of them.
		if err := l.disk.SyncDir(l.cfg.Spool); err != nil {
			return err
		}
		l.mu.Lock()
		u := l.unsealed[files[0].id]
		u.unsound = false
		l.unsealed[files[0].id] = u
		l.mu.Unlock()
	}
	return l.recoverLog(files, byMend)
}

// countTorn counts what a segment's file has beside what was written to it for sure: a part of the write that failed, or what could
// not be cut.
func (l *Log) countTorn(w *segmentWriter) {
	if info, err := os.Stat(w.f.Name()); err == nil {
		l.used.Add(info.Size() - w.size)
	}
}

// writeAnew puts a copy in a file's place. Linux forgets what it could not write at a sync, and says at the next one that all is well:
// only what is written once more can be made durable.
func (l *Log) writeAnew(path string) error {
	from, err := l.disk.OpenFile(path, os.O_RDONLY, 0)
	if err != nil {
		return err
	}
	defer from.Close()
	tmp := path[:len(path)-len(openSuffix)] + anewSuffix
	to, err := l.disk.OpenFile(tmp, os.O_WRONLY|os.O_CREATE|os.O_TRUNC, 0o640)
	if err != nil {
		return err
	}
	_, err = io.Copy(to, from)
	if err == nil {
		err = to.Sync()
	}
	if err = errors.Join(err, to.Close()); err == nil {
		err = l.disk.Rename(tmp, path)
	}
	if err != nil {
		l.disk.Remove(tmp) // one that stays is written anew, or removed by the next start
	}
	return err
}

// notMended counts a try that failed. It is said ever more seldom.
func (l *Log) notMended(id string, err error) {
	l.mu.Lock()
	u := l.unsealed[id]
	u.tries++
	l.unsealed[id] = u
	l.mu.Unlock()
	if bits.OnesCount(uint(u.tries)) == 1 {
		l.log.Error("audit log: an interrupted log can't be sealed, which is tried again", "id", id, "tries", u.tries, "error", err)
	}
}
