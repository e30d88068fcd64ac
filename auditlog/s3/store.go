package s3

import (
	"bytes"
	"context"
	"crypto/sha256"
	"encoding/base64"
	"encoding/hex"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"strings"
	"time"

	"github.com/minio/minio-go/v7"

	"github.com/sallyport/sallyport/auditlog"
)

// conflictTries bounds the tries while the server answers that another request is writing the same name.
const conflictTries = 5

// Store puts objects into a bucket. Safe for concurrent use.
//
// An object is one PutObject with If-None-Match: *, so that nothing is ever overwritten, with its SHA-256, signed, so that what
// arrives is what was sent. A server that does not know If-None-Match must be told otherwise to keep what it has: by
// versioning, or an object lock.
type Store struct {
	b         *bucket
	log       *slog.Logger
	retention Retention
}

// NewStore makes a store. It asks the server nothing: a server that is away shall not keep a gate from starting.
func NewStore(cfg Config, log *slog.Logger) (*Store, error) { return newStore(cfg, log, stallTimeout) }

func newStore(cfg Config, log *slog.Logger, stall time.Duration) (*Store, error) {
	b, err := open(cfg, stall)
	if err != nil {
		return nil, fmt.Errorf("s3 store: %w", err)
	}
	return &Store{b: b, log: log, retention: cfg.Retention}, nil
}

// Close closes idle connections.
func (s *Store) Close() error {
	s.b.transport.CloseIdleConnections()
	return nil
}

// Put stores an object; see auditlog.Store.
//
// If the name is taken, the bytes there are compared, if the credential may read them. If it may only put, it can't
// be known whether they are our own, by a Put whose answer was lost or by a gate that was killed before it heard it,
// or another's. Neither may be lost, and waiting for ever would fill the spool. So the bytes are then put once more,
// as duplicates/NAME.SHA256, and that is success: whatever is under the first name, the bucket has ours. A
// duplicate's name is taken only by the same bytes, unless somebody knew their hash before they were put.
// sallyport-audit compares the two.
func (s *Store) Put(ctx context.Context, name string, r io.Reader, size int64) error {
	if err := s.putOnce(ctx, name, r, size); err != nil {
		return fmt.Errorf("put %s: %w", name, err)
	}
	return nil
}

func (s *Store) putOnce(ctx context.Context, name string, r io.Reader, size int64) error {
	if !validName(name) {
		return errors.New("not a name for an object")
	}
	if err := context.Cause(ctx); err != nil {
		return err
	}
	o, err := newObject(r, size)
	if err != nil {
		return err
	}
	taken, err := s.send(ctx, name, o)
	if err != nil || !taken {
		return err
	}
	same, err := s.same(ctx, name, o)
	for try := 1; code(err) == "NoSuchKey" && try < conflictTries; try++ {
		// Another is just putting it: some servers say so before it can be read. Or it failed, and the name is free again.
		if err := pause(ctx, try); err != nil {
			return err
		}
		if taken, err = s.send(ctx, name, o); err != nil || !taken {
			return err
		}
		same, err = s.same(ctx, name, o)
	}
	switch {
	case code(err) == "AccessDenied":
	case err != nil:
		return fmt.Errorf("compare with what is there: %w", err)
	case !same:
		return auditlog.ErrExists
	default:
		return nil
	}
	other := auditlog.DuplicateName(name, o.sha256)
	if _, err := s.send(ctx, other, o); err != nil {
		return err
	}
	s.log.Warn("audit log: the name was taken, and this credential can't see by what; the segment is kept under another",
		"segment", name, "kept_as", other)
	return nil
}

// Check finds out whether the server takes objects, by one that is put once and stays: check/GATE.
func (s *Store) Check(ctx context.Context, gate string) error {
	o, err := newObject(strings.NewReader(auditlog.CheckText), int64(len(auditlog.CheckText)))
	if err != nil {
		return err
	}
	// Taken is as good: the server looks at the permission first.
	if _, err := s.send(ctx, "check/"+gate, o); err != nil {
		return fmt.Errorf("put check/%s: %w", gate, err)
	}
	return nil
}

// send puts an object, unless the name is taken.
func (s *Store) send(ctx context.Context, name string, o *object) (taken bool, err error) {
	// The content's SHA-256 is given, not left out: without this option a connection in the clear would get signed chunks.
	opts := minio.PutObjectOptions{ContentType: "application/octet-stream", DisableContentSha256: true}
	// S3 wants a checksum where it locks objects. Content-MD5 would do, and cost twice what the SHA-256 does, which is there anyway.
	opts.UserMetadata = map[string]string{"X-Amz-Checksum-Sha256": base64.StdEncoding.EncodeToString(o.sha256[:])}
	opts.SetMatchETagExcept("*")
	opts.ServerSideEncryption = s.b.ssePut
	s.retention.set(&opts, time.Now())
	for try := 1; ; try++ {
		_, err = s.b.core.PutObject(ctx, s.b.name, s.b.prefix+name, o.reader(), o.size, "",
			hex.EncodeToString(o.sha256[:]), opts)
		switch code(err) {
		case "PreconditionFailed":
			return true, nil
		case "NotImplemented":
			return false, fmt.Errorf("the server can't put without overwriting (If-None-Match): %w", err)
		case "ConditionalRequestConflict", "OperationAborted":
			if try < conflictTries {
				if err := pause(ctx, try); err != nil {
					return false, err
				}
				continue
			}
		}
		s.b.renew(err)
		return false, err
	}
}

// pause waits before another try.
func pause(ctx context.Context, try int) error {
	select {
	case <-time.After(time.Duration(try) * 50 * time.Millisecond):
		return nil
	case <-ctx.Done():
		return context.Cause(ctx)
	}
}

// same says whether an object holds these bytes. What the server says of it (ETag, metadata) may be set by who put it,
// or be no hash at all under encryption; so it is read.
func (s *Store) same(ctx context.Context, name string, o *object) (bool, error) {
	r, info, _, err := s.b.core.GetObject(ctx, s.b.name, s.b.prefix+name, minio.GetObjectOptions{ServerSideEncryption: s.b.sseGet})
	if err != nil {
		return false, err
	}
	defer r.Close()
	if info.Size != o.size {
		return false, nil
	}
	h := sha256.New()
	if _, err := io.Copy(h, io.LimitReader(r, o.size+1)); err != nil {
		return false, err
	}
	return bytes.Equal(h.Sum(nil), o.sha256[:]), nil
}

// object is what is to be put. Its bytes can be read several times.
type object struct {
	at     io.ReaderAt
	size   int64
	sha256 auditlog.Hash
}

// newObject reads r once for its hash. What can be read at an offset, such as a file, is not kept in memory.
func newObject(r io.Reader, size int64) (*object, error) {
	if size < 0 || size > auditlog.MaxSegmentBytes {
		return nil, fmt.Errorf("an object of %d bytes", size)
	}
	o := &object{size: size}
	sha := sha256.New()
	var to io.Writer = sha
	seeker, seeks := r.(io.Seeker)
	at, reads := r.(io.ReaderAt)
	var kept bytes.Buffer
	if seeks && reads {
		start, err := seeker.Seek(0, io.SeekCurrent)
		if err != nil {
			return nil, err
		}
		o.at = io.NewSectionReader(at, start, size)
	} else {
		to = io.MultiWriter(sha, &kept)
	}
	n, err := io.Copy(to, io.LimitReader(r, size+1))
	if err != nil {
		return nil, err
	}
	if n != size {
		return nil, fmt.Errorf("%d bytes came where %d were announced", n, size)
	}
	if o.at == nil {
		o.at = bytes.NewReader(kept.Bytes())
	}
	sha.Sum(o.sha256[:0])
	return o, nil
}

// reader reads the bytes from their start. It has no Close, as net/http would close a file that is the caller's.
func (o *object) reader() io.Reader { return io.NewSectionReader(o.at, 0, o.size) }
