package tlog

import (
	"context"
	"crypto"
	"crypto/rand"
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"log/slog"
	"os"
	"path/filepath"
	"sync"
	"time"
)

// Config is what a gate's log needs.
type Config struct {
	Dir    string // where its state lies; it is there, and one gate has it
	Disk   Disk
	Gate   string        // name of the gate
	Signer crypto.Signer // Ed25519
	Beat   time.Duration // a checkpoint is made at least so often, even with nothing to say
	Delay  time.Duration // a leaf waits at most so long for its checkpoint
	// Put makes objects durable, to be brought to the store in this order. The number of the first is given; the same numbers may
	// come again after a failure or a crash, with the same objects.
	Put func(queue string, number uint32, objects []Object) error
	// Busy says that so many objects of the queue wait for the store that a checkpoint with nothing to say shall not be made.
	Busy func(queue string) bool
	Slog *slog.Logger
}

// Log is a gate's transparency log, the writing side.
type Log struct {
	cfg  Config
	wake chan struct{} // holds one: leaves wait
	name string        // of the log, which never changes

	// Order of locks: cutting, syncing, mu.
	cutting sync.Mutex // one checkpoint at a time; guards state and next
	state   *state
	next    *state // made and signed, but not yet written or handed on; the same is tried until it is

	syncing sync.Mutex // one fsync at a time; guards synced
	synced  int64      // leaves with an index below are durable

	mu      sync.Mutex // guards all below
	entries [][]byte   // that wait, from index base on
	base    int64
	wait    File  // waitFile; nil: it could not be written since Open
	broken  error // of a write to it: what follows would be no line
	failed  error // of the last try to make a checkpoint
	closed  bool
}

// Open goes on with the log whose state is in cfg.Dir, or begins one, where there is none or it is damaged: the old log has
// ended then. A log that is there is opened also while the disk is full; Err says so, and Add fails, until a checkpoint can be made.
func Open(cfg Config) (*Log, error) {
	l := &Log{cfg: cfg, wake: make(chan struct{}, 1)}
	if err := l.open(); err != nil {
		return nil, fmt.Errorf("open transparency log in %s: %w", cfg.Dir, err)
	}
	return l, nil
}

func (l *Log) open() error {
	dir := l.cfg.Dir
	err := l.load()
	var damage *damageError
	switch {
	case errors.As(err, &damage):
		l.cfg.Slog.Error("transparency log: its state is damaged, and a new log begins; the old files end in .bad", "error", err)
		for _, name := range []string{nextFile, stateFile} {
			if err := l.cfg.Disk.Rename(filepath.Join(dir, name), filepath.Join(dir, name+".bad")); err != nil && !errors.Is(err, fs.ErrNotExist) {
				return err
			}
		}
		l.state = nil
	case err != nil:
		return err
	}
	if l.state != nil && l.state.Gate != l.cfg.Gate {
		l.cfg.Slog.Warn("transparency log: the gate has another name, and a new log begins", "was", l.state.Gate)
		l.state = nil
	}
	begun := l.state == nil
	if begun {
		// The name sorts by time, and nobody else can have taken it.
		id := time.Now().UTC().Format("20060102T150405Z") + "-" + rand.Text()[:10]
		l.state = &state{Gate: l.cfg.Gate, Log: id, Tree: &Tree{}}
		// Leaves that waited go into the new log, even if they are in the old one too.
		if l.entries, err = l.readWaiting(nil); err != nil {
			return err
		}
	}
	l.name, l.base = l.state.Log, l.state.Tree.Size
	if begun {
		// Leaves before the state: a crash between the two finds no state of the gate's, and takes all that wait.
		if err := l.rewriteWaiting(); err != nil {
			return err
		}
		b, err := encodeState(l.state)
		if err == nil {
			err = l.writeFile(stateFile, b)
		}
		if err != nil {
			l.wait.Close() // the error that counts is here already
			return err
		}
		l.cfg.Slog.Info("transparency log: begun", "origin", Origin(l.cfg.Gate, l.name))
		return nil
	}
	if err := l.rewriteWaiting(); err != nil {
		// A disk that is full now: the leaves are in the old file, and the next checkpoint writes it anew.
		l.cfg.Slog.Error("transparency log: takes no leaves until a checkpoint can be made", "error", err)
		l.broken, l.failed = err, err
	}
	return nil
}

// load reads the state and finishes what a crash broke off. Without one, state stays nil.
func (l *Log) load() error {
	next, err := l.readState(nextFile)
	var unfinished error
	switch {
	case err == nil:
		if next.Gate == l.cfg.Gate {
			unfinished = l.finish(next)
		}
	case !errors.Is(err, fs.ErrNotExist):
		return err
	}
	s, err := l.readState(stateFile)
	if errors.Is(err, fs.ErrNotExist) {
		return unfinished
	}
	if err != nil {
		return err
	}
	if unfinished != nil {
		if next.Log != s.Log || next.Number != s.Number+1 {
			return unfinished
		}
		// A disk that is full now: the next try to make a checkpoint goes on with this one.
		l.cfg.Slog.Error("transparency log: a checkpoint can't be handed on yet", "error", unfinished)
		l.next = next
	}
	if l.entries, err = l.readWaiting(s); err != nil {
		return err
	}
	l.state = s
	return nil
}

// finish hands the objects of a written state on, and makes it the state. Doing so twice is as doing so once.
func (l *Log) finish(next *state) error {
	if err := l.cfg.Put(l.queue(next), next.Sequence-uint32(len(next.Objects)), next.Objects); err != nil {
		return err
	}
	return l.rename(nextFile, stateFile)
}

func (l *Log) queue(s *state) string { return QueuePrefix + s.Log }

// Origin names the log.
func (l *Log) Origin() string { return Origin(l.cfg.Gate, l.name) }

// rewriteWaiting writes waitFile anew with the leaves that wait. The locks sync and mu are held, or nobody else is there.
func (l *Log) rewriteWaiting() error {
	var b []byte
	for i, e := range l.entries {
		b = append(b, l.line(l.base+int64(i), e)...)
	}
	if err := l.writeFile(waitFile, b); err != nil {
		return err
	}
	f, err := l.cfg.Disk.OpenFile(filepath.Join(l.cfg.Dir, waitFile), os.O_WRONLY|os.O_APPEND, 0o600)
	if err != nil {
		return err
	}
	if l.wait != nil {
		l.wait.Close() // all of it is in the new file
	}
	l.wait, l.broken, l.synced = f, nil, l.base+int64(len(l.entries))
	return nil
}

func (l *Log) line(index int64, entry []byte) []byte {
	b, _ := json.Marshal(waiting{Log: l.name, Index: index, Entry: entry}) // of these types there is no error
	return append(b, '\n')
}

// Add adds a leaf. When it returns, the leaf is durable, and will be in a checkpoint whatever happens to the gate. Adding one
// twice does no harm.
func (l *Log) Add(entry []byte) error {
	if len(entry) > MaxEntry {
		return fmt.Errorf("add leaf: %d bytes are too many", len(entry))
	}
	index, err := l.append(entry)
	if err == nil {
		err = l.sync(index)
	}
	select {
	case l.wake <- struct{}{}: // after a failure, too: the next checkpoint mends it
	default:
	}
	if err != nil {
		return fmt.Errorf("add leaf: %w", err)
	}
	return nil
}

func (l *Log) append(entry []byte) (index int64, err error) {
	l.mu.Lock()
	defer l.mu.Unlock()
	if l.closed {
		return 0, errors.New("the log is closed")
	}
	if l.broken != nil {
		return 0, l.broken
	}
	index = l.base + int64(len(l.entries))
	if _, err := l.wait.Write(l.line(index, entry)); err != nil {
		l.broken = err // until the next checkpoint writes the file anew
		return 0, err
	}
	l.entries = append(l.entries, entry)
	return index, nil
}

// sync makes a leaf durable, with all that came meanwhile.
func (l *Log) sync(index int64) error {
	l.syncing.Lock()
	defer l.syncing.Unlock()
	if index < l.synced {
		return nil
	}
	l.mu.Lock()
	f, to, broken := l.wait, l.base+int64(len(l.entries)), l.broken
	l.mu.Unlock()
	if broken != nil { // by another's sync: the next would say that all is well, whatever the first one lost
		return broken
	}
	if err := f.Sync(); err != nil {
		l.mu.Lock()
		l.broken = err
		l.mu.Unlock()
		return err
	}
	l.synced = to
	return nil
}

// Run makes checkpoints until ctx ends.
func (l *Log) Run(ctx context.Context) {
	defer l.mend()            // for leaves that come when Run has ended
	timer := time.NewTimer(0) // the first at once: it says that the gate lives
	defer timer.Stop()
	for {
		leaves := false
		select {
		case <-ctx.Done():
			return
		case <-timer.C:
		case <-l.wake:
			leaves = true
		}
		wait := l.cfg.Beat
		if leaves { // those that come soon after go along
			select {
			case <-ctx.Done():
				return
			case <-time.After(l.cfg.Delay):
			}
		}
		if err := l.Cut(); err != nil {
			l.cfg.Slog.Error("transparency log: no checkpoint", "error", err)
			wait = min(wait, retryAfter)
		}
		timer.Reset(wait)
	}
}

// mend makes a checkpoint if leaves could not be taken.
func (l *Log) mend() {
	l.mu.Lock()
	broken := l.broken != nil
	l.mu.Unlock()
	if !broken {
		return
	}
	if err := l.Cut(); err != nil {
		l.cfg.Slog.Error("transparency log: no checkpoint", "error", err)
	}
}

// retryAfter is the wait after a checkpoint that could not be made.
const retryAfter = 5 * time.Second

// Cut makes a checkpoint of what there is, and more if one can't carry it all.
func (l *Log) Cut() error { return l.cutAll(false) }

// cutAll makes checkpoints until all is said; the last says that the log is closed, if it is.
func (l *Log) cutAll(closed bool) error {
	l.cutting.Lock()
	defer l.cutting.Unlock()
	for {
		more, err := l.cut(closed)
		l.mu.Lock()
		l.failed = err
		l.mu.Unlock()
		if err != nil {
			return fmt.Errorf("make checkpoint: %w", err)
		}
		if !more {
			return nil
		}
	}
}

func (l *Log) cut(closed bool) (more bool, err error) {
	said := false // that it is closed
	if l.next == nil {
		l.mu.Lock()
		entries := l.entries[:min(len(l.entries), MaxCheckpointEntries)]
		said = closed && len(entries) == len(l.entries)
		broken := l.broken != nil // then it is to be mended, too
		l.mu.Unlock()
		if len(entries) == 0 && !closed && !broken && l.cfg.Busy(l.queue(l.state)) {
			return false, nil
		}
		if l.next, err = l.make(entries, said); err != nil {
			return false, err
		}
	}
	next := l.next
	b, err := encodeState(next)
	if err != nil {
		return false, err
	}
	// From here on the checkpoint is made: a crash finds it in nextFile.
	if err := l.writeFile(nextFile, b); err != nil {
		return false, err
	}
	if err := l.finish(next); err != nil {
		return false, err
	}
	leaves := int(next.Tree.Size - l.state.Tree.Size)
	next.Objects = nil
	l.state, l.next = next, nil

	l.syncing.Lock()
	defer l.syncing.Unlock()
	l.mu.Lock()
	defer l.mu.Unlock()
	taken := min(leaves, len(l.entries)) // a power cut may have taken some, of a checkpoint that was made before
	l.entries = append([][]byte(nil), l.entries[taken:]...)
	l.base = next.Tree.Size
	if leaves > 0 || l.broken != nil {
		if err := l.rewriteWaiting(); err != nil {
			l.broken = err
			return false, err
		}
	}
	return closed && !said || leaves == MaxCheckpointEntries && len(l.entries) > 0, nil
}

// make gives the state after a checkpoint with these leaves, and its objects: the checkpoint and the tiles that are full now.
func (l *Log) make(entries [][]byte, closed bool) (*state, error) {
	s := l.state
	if s.Number > maxNumber {
		return nil, errors.New("it has no more numbers: remove the directory tlog in the state directory, and a new log begins")
	}
	prefix := Dir(s.Gate, s.Log)
	tree := s.Tree.Clone()
	var tiles []Object
	for _, e := range entries {
		tiles = append(tiles, tree.Append(prefix, e)...)
	}
	c := &Checkpoint{Gate: s.Gate, Log: s.Log, Number: s.Number, Time: time.Now().UTC(), Old: s.Tree.Size, Size: tree.Size,
		Root: tree.Root(), Entries: entries, Closed: closed}
	if err := c.Sign(l.cfg.Signer); err != nil {
		return nil, fmt.Errorf("sign: %w", err)
	}
	b, err := c.Encode()
	if err != nil {
		return nil, err
	}
	objects := append([]Object{{Name: CheckpointName(prefix, c.Number), Bytes: b}}, tiles...)
	return &state{Gate: s.Gate, Log: s.Log, Number: s.Number + 1, Sequence: s.Sequence + uint32(len(objects)), Tree: tree,
		Objects: objects}, nil
}

// Err says why the last checkpoint could not be made, nil if it could.
func (l *Log) Err() error {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.failed
}

// Close makes a last checkpoint and closes the files. all says that everything the gate has recorded is in the store: then the
// checkpoint says that the log is closed. Otherwise there is one only if leaves wait. Run must have ended.
func (l *Log) Close(all bool) error {
	l.mu.Lock()
	l.closed = true
	waits := len(l.entries) > 0
	l.mu.Unlock()
	var err error
	if waits || all {
		err = l.cutAll(all)
	}
	l.mu.Lock()
	defer l.mu.Unlock()
	if l.wait != nil {
		err = errors.Join(err, l.wait.Close())
	}
	return err
}
