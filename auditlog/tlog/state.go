package tlog

import (
	"bufio"
	"bytes"
	"crypto/sha256"
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path/filepath"
)

// The files of the state directory.
const (
	stateFile = "tree.json"    // the tree as of the last checkpoint
	nextFile  = "next.json"    // the same with objects that may not be in the spool yet; takes stateFile's place when they are
	waitFile  = "leaves.jsonl" // leaves for the next checkpoint, appended as they come
)

// Disk is what changes the state directory, and what Open reads of it: everything that must be there after a crash goes through it.
type Disk interface {
	// OpenFile opens a file as os.OpenFile does. Its name is durable after SyncDir, its content after its Sync.
	OpenFile(name string, flag int, perm fs.FileMode) (File, error)
	Rename(from, to string) error
	Remove(name string) error
	// SyncDir makes the names in a directory durable.
	SyncDir(name string) error
}

// File is an open file of a Disk.
type File interface {
	io.ReadWriteCloser
	Sync() error
}

// maxState bounds a state file: 255 entries and at most 7 tiles of 255 hashes, in base64, and the objects of one checkpoint.
const maxState = 64 << 20

// state is what a gate knows of its log.
type state struct {
	Gate     string   `json:"gate"`
	Log      string   `json:"log"`
	Number   uint32   `json:"number"`   // of the next checkpoint
	Sequence uint32   `json:"sequence"` // of the next object
	Tree     *Tree    `json:"tree"`
	Objects  []Object `json:"objects,omitempty"` // in nextFile: those with the sequences before Sequence
}

// waiting is a line of waitFile.
type waiting struct {
	Log   string `json:"log"`
	Index int64  `json:"index"`
	Entry []byte `json:"entry"`
}

// encodeState puts a hash before the content, so that a disk's damage is seen.
func encodeState(s *state) ([]byte, error) {
	b, err := json.Marshal(s)
	if err != nil {
		return nil, err
	}
	sum := sha256.Sum256(b)
	return append(append([]byte(hex.EncodeToString(sum[:])), '\n'), b...), nil
}

func decodeState(b []byte) (*state, error) {
	sum, body, ok := bytes.Cut(b, []byte("\n"))
	want := sha256.Sum256(body)
	if !ok || string(sum) != hex.EncodeToString(want[:]) {
		return nil, errors.New("not as it was written")
	}
	s := &state{}
	if err := json.Unmarshal(body, s); err != nil {
		return nil, err
	}
	if s.Tree == nil || !validPart(s.Gate) || !validPart(s.Log) {
		return nil, errors.New("without a tree or a name")
	}
	return s, s.Tree.check()
}

func (l *Log) readState(name string) (*state, error) {
	path := filepath.Join(l.cfg.Dir, name)
	f, err := l.cfg.Disk.OpenFile(path, os.O_RDONLY, 0)
	if err != nil {
		return nil, err
	}
	defer f.Close()
	b, err := io.ReadAll(io.LimitReader(f, maxState))
	if err != nil {
		return nil, err
	}
	s, err := decodeState(b)
	if err != nil {
		return nil, &damageError{fmt.Errorf("%s: %w", path, err)}
	}
	return s, nil
}

// damageError is of a file that can be read and makes no sense.
type damageError struct{ error }

// writeFile replaces a file in one step, durably.
func (l *Log) writeFile(name string, b []byte) error {
	tmp := filepath.Join(l.cfg.Dir, name+".tmp")
	f, err := l.cfg.Disk.OpenFile(tmp, os.O_WRONLY|os.O_CREATE|os.O_TRUNC, 0o600)
	if err != nil {
		return err
	}
	_, err = f.Write(b)
	if err == nil {
		err = f.Sync()
	}
	if err = errors.Join(err, f.Close()); err != nil {
		l.cfg.Disk.Remove(tmp) // one that stays is written anew
		return err
	}
	return l.rename(name+".tmp", name)
}

// rename gives a file another name, durably.
func (l *Log) rename(from, to string) error {
	if err := l.cfg.Disk.Rename(filepath.Join(l.cfg.Dir, from), filepath.Join(l.cfg.Dir, to)); err != nil {
		return err
	}
	return l.cfg.Disk.SyncDir(l.cfg.Dir)
}

// readWaiting gives the leaves in waitFile that the tree of s does not have yet, in order; all, if s is nil. What a crash or a power
// cut made of lines that were not synced (torn, lost, zeros) was promised to nobody, nor were those after them.
func (l *Log) readWaiting(s *state) ([][]byte, error) {
	f, err := l.cfg.Disk.OpenFile(filepath.Join(l.cfg.Dir, waitFile), os.O_RDONLY, 0)
	if errors.Is(err, fs.ErrNotExist) {
		return nil, nil
	}
	if err != nil {
		return nil, err
	}
	defer f.Close()
	var entries [][]byte
	lines := bufio.NewScanner(f)
	for lines.Scan() {
		var w waiting
		if json.Unmarshal(lines.Bytes(), &w) != nil || len(w.Entry) > MaxEntry {
			continue
		}
		// One of another log: a crash came when that was to begin, and the gate has its old name again.
		if s == nil || w.Log != s.Log || w.Index >= s.Tree.Size {
			entries = append(entries, w.Entry)
		}
	}
	if errors.Is(lines.Err(), bufio.ErrTooLong) { // no line is so long
		return entries, nil
	}
	return entries, lines.Err()
}
