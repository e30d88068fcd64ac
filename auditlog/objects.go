package auditlog

import (
	"bufio"
	"context"
	"crypto"
	"crypto/ed25519"
	"crypto/sha256"
	"encoding/hex"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"slices"
	"strings"

	"github.com/sallyport/sallyport/auditlog/tlog"
)

// objectSuffix is of a file in the spool that is no segment: the object's name, a line feed, and its bytes. Its number orders
// the objects of one queue.
const objectSuffix = ".obj"

// unfinishedSuffix is of an object's file that is being written.
const unfinishedSuffix = objectSuffix + ".tmp"

// maxObjectName bounds an object's name.
const maxObjectName = 1024

// busyObjects is how many objects of the transparency log may wait for the store before it stops to speak without leaves.
const busyObjects = 2

// KeyPrefix is below which public keys are published, for convenience alone: who can write there could write another.
const KeyPrefix = "keys/"

// CheckText is what `sallyport check` puts to see whether a store takes objects.
const CheckText = "Made by sallyport check.\n"

// KeyName is the name under which a gate publishes its public key.
func KeyName(gate string, pub ed25519.PublicKey) string {
	sum := sha256.Sum256(pub)
	return KeyPrefix + gate + "/" + hex.EncodeToString(sum[:]) + ".pub"
}

// signer is who signs, and the transparency log into which what is signed goes ("" for none).
type signer struct {
	crypto.Signer
	tree string
}

// checkKey says whether a key can sign a log.
func checkKey(key crypto.Signer) error {
	if k, ok := key.(ed25519.PrivateKey); ok && len(k) != ed25519.PrivateKeySize || key == nil {
		return errors.New("no key")
	}
	if _, ok := key.Public().(ed25519.PublicKey); !ok {
		return fmt.Errorf("the key is a %T, want ed25519", key.Public())
	}
	return nil
}

// openTree opens the gate's transparency log.
func (l *Log) openTree() error {
	if l.cfg.Tree == "" {
		return nil
	}
	// The directory's name is durable before a leaf is: without its leaves, what they name could not be proven.
	err := makeDir(l.disk, l.cfg.Tree)
	if err != nil {
		return err
	}
	l.tree, err = tlog.Open(tlog.Config{Dir: l.cfg.Tree, Disk: treeDisk{l.disk}, Gate: l.gate, Signer: l.key, Beat: l.cfg.CheckpointInterval,
		Delay: min(l.cfg.SegmentAge, l.cfg.CheckpointInterval), Put: l.putObjects, Slog: l.log,
		Busy: func(queue string) bool { return l.uploads.waitingIn(queue) >= busyObjects }})
	if err != nil {
		return err
	}
	l.key.tree = l.tree.Origin()
	if err := l.publishKey(); err != nil {
		l.log.Warn("audit log: the next start tries again", "error", err) // a convenience: no reason not to start
	}
	return nil
}

// publishKey puts the public key into the store, once.
func (l *Log) publishKey() error {
	pub := l.key.Public().(ed25519.PublicKey) // checkKey has seen to it
	mark := filepath.Join(l.cfg.Tree, "published")
	line := FormatPublicKey(pub) + " " + l.gate + "\n"
	if b, err := os.ReadFile(mark); err == nil && string(b) == line {
		return nil
	} else if err != nil && !errors.Is(err, fs.ErrNotExist) {
		return fmt.Errorf("publish key: %w", err)
	}
	name := KeyName(l.gate, pub)
	err := l.putObjects("key-"+name[len(name)-20:len(name)-4], 0, []tlog.Object{{Name: name, Bytes: []byte(line)}})
	if err == nil {
		err = os.WriteFile(mark, []byte(line), 0o600) // lost in a crash, it is put once more: no harm
	}
	if err != nil {
		return fmt.Errorf("publish key: %w", err)
	}
	return nil
}

// startTree lets the transparency log speak. What it returns ends that, but for Close's last word.
func (l *Log) startTree() (stop func()) {
	l.queueing.Store(true)
	if l.tree == nil {
		return func() {}
	}
	ctx, cancel := context.WithCancel(context.Background())
	done := make(chan struct{})
	go func() { defer close(done); l.tree.Run(ctx) }()
	return func() { cancel(); <-done }
}

// closeTree enters what came to the store while the log closed, and brings that to the store too until ctx is done. The transparency
// log is told to be closed only if no log waits in the spool: whoever reads that it is shall miss nothing.
func (l *Log) closeTree(ctx context.Context) error {
	if l.tree == nil {
		return nil
	}
	l.queueing.Store(false)
	all, err := l.emptied()
	if err != nil {
		l.log.Error("audit log: spool", "error", err)
	}
	err = l.tree.Close(all)
	last := newUploader(l)
	last.overflow, last.objects = true, true // looks at the spool
	last.start()
	last.close(ctx)
	return err
}

// emptied says whether the spool holds no log any more, but objects at most. What was moved aside may be of a log.
func (l *Log) emptied() (bool, error) {
	files, err := l.readSpool(false)
	if err != nil || slices.ContainsFunc(files, func(f spoolFile) bool { return f.suffix != objectSuffix }) {
		return false, err
	}
	aside, err := fs.Glob(os.DirFS(l.cfg.Spool), "*"+badSuffix)
	return err == nil && len(aside) == 0, err
}

// enter adds a log to the transparency log once its last segment is in the store. The segment is in the spool until its leaf is
// durable, so none is forgotten. What this run sealed is entered as it was written, without reading and hashing it once more.
func (l *Log) enter(f *os.File, s upload) error {
	if l.tree == nil {
		return nil
	}
	leaf := s.leaf
	if leaf == nil {
		read, last, err := leafOf(f)
		if err != nil {
			l.log.Error("audit log: segment in the spool is damaged, and gets no leaf", "segment", s.name, "error", err)
			return nil
		}
		if !last {
			return nil
		}
		leaf = &read
	}
	b, err := leaf.Encode()
	if err != nil {
		return err
	}
	return l.tree.Add(b)
}

// putObjects makes objects durable in the spool and queues them. Doing so again is no error.
func (l *Log) putObjects(queue string, number uint32, objects []tlog.Object) error {
	for i, o := range objects {
		if err := l.putObject(spoolName(queue, number+uint32(i), objectSuffix), o); err != nil {
			l.spoolFailed(err)
			return fmt.Errorf("spool object %s: %w", o.Name, err)
		}
	}
	if err := l.disk.SyncDir(l.cfg.Spool); err != nil {
		l.spoolFailed(err)
		return err
	}
	if !l.queueing.Load() {
		return nil // found by a look at the spool
	}
	for i, o := range objects {
		skip := int64(len(o.Name)) + 1
		l.uploads.add(queue, upload{number: number + uint32(i), name: o.Name, size: skip + int64(len(o.Bytes)), skip: skip})
	}
	return nil
}

func (l *Log) putObject(file string, o tlog.Object) error {
	path := filepath.Join(l.cfg.Spool, file)
	unfinished := strings.TrimSuffix(path, objectSuffix) + unfinishedSuffix
	if len(o.Name) > maxObjectName || strings.ContainsAny(o.Name, "\n") {
		return fmt.Errorf("%.80q is no name", o.Name)
	}
	f, err := l.disk.OpenFile(unfinished, os.O_WRONLY|os.O_CREATE|os.O_TRUNC, 0o640)
	if err != nil {
		return err
	}
	_, err = f.Write(append([]byte(o.Name+"\n"), o.Bytes...))
	if err = errors.Join(err, f.Sync(), f.Close()); err != nil {
		l.disk.Remove(unfinished) // what stays is removed by the next start
		return err
	}
	_, err = os.Lstat(path)
	added := errors.Is(err, fs.ErrNotExist)
	if err != nil && !added {
		return err
	}
	if err := l.disk.Rename(unfinished, path); err != nil {
		return err
	}
	if added {
		l.used.Add(int64(len(o.Name)+1+len(o.Bytes)) + fileOverhead)
	}
	return nil
}

// object reads the name of an object in the spool.
func (f spoolFile) object(dir string) (upload, error) {
	file, err := os.Open(f.path(dir))
	if err != nil {
		return upload{}, err
	}
	defer file.Close()
	name, err := bufio.NewReaderSize(file, maxObjectName+1).ReadSlice('\n')
	if err != nil {
		return upload{}, fmt.Errorf("%s: no object: %w", f.path(dir), err)
	}
	return upload{number: f.number, name: string(name[:len(name)-1]), size: f.size, skip: int64(len(name))}, nil
}

// waitingIn counts the segments or objects of a queue that wait.
func (u *uploader) waitingIn(queue string) int {
	u.mu.Lock()
	defer u.mu.Unlock()
	if q := u.queues[queue]; q != nil {
		return len(q.segments)
	}
	return 0
}
