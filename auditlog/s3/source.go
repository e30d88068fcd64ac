package s3

import (
	"context"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"iter"
	"strings"
	"time"

	"github.com/minio/minio-go/v7"

	"github.com/sallyport/sallyport/auditlog"
)

// Source reads objects from a bucket.
type Source struct {
	b *bucket
}

// OpenSource makes a source. It asks the server nothing.
func OpenSource(cfg Config) (*Source, error) { return openSource(cfg, stallTimeout) }

func openSource(cfg Config, stall time.Duration) (*Source, error) {
	b, err := open(cfg, stall)
	if err != nil {
		return nil, fmt.Errorf("open log in s3: %w", err)
	}
	return &Source{b: b}, nil
}

// Close closes idle connections.
func (s *Source) Close() error {
	s.b.transport.CloseIdleConnections()
	return nil
}

// List yields objects; see auditlog.Source. Empty objects whose names end in a slash, by which some tools mark a
// directory, are not listed.
func (s *Source) List(ctx context.Context, prefix string) iter.Seq2[auditlog.Object, error] {
	return func(yield func(auditlog.Object, error) bool) {
		ctx, cancel := context.WithCancel(ctx)
		defer cancel()
		at := s.b.prefix + prefix
		for o := range s.b.core.ListObjectsIter(ctx, s.b.name, minio.ListObjectsOptions{Prefix: at, Recursive: true}) {
			if o.Err != nil {
				s.b.renew(o.Err)
				yield(auditlog.Object{}, fmt.Errorf("list s3://%s/%s: %w", s.b.name, at, remedy(o.Err)))
				return
			}
			name, ok := strings.CutPrefix(o.Key, s.b.prefix)
			if !ok || !strings.HasPrefix(name, prefix) {
				yield(auditlog.Object{}, fmt.Errorf("list s3://%s/%s: the server names %.200q, which is not below", s.b.name, at,
					o.Key))
				return
			}
			if o.Size == 0 && strings.HasSuffix(name, "/") || name == "" {
				continue
			}
			if !yield(auditlog.Object{Name: name, Size: o.Size, Modified: o.LastModified}, nil) {
				return
			}
		}
	}
}

// Open opens an object; see auditlog.Source.
func (s *Source) Open(ctx context.Context, name string) (io.ReadCloser, error) {
	if !validName(name) {
		return nil, fmt.Errorf("open %.200q: %w", name, fs.ErrNotExist)
	}
	r, _, _, err := s.b.core.GetObject(ctx, s.b.name, s.b.prefix+name, minio.GetObjectOptions{ServerSideEncryption: s.b.sseGet})
	switch {
	case code(err) == "NoSuchKey":
		return nil, fmt.Errorf("open s3://%s/%s: %w", s.b.name, s.b.prefix+name, fs.ErrNotExist)
	case err != nil:
		s.b.renew(err)
		return nil, fmt.Errorf("open s3://%s/%s: %w", s.b.name, s.b.prefix+name, remedy(err))
	}
	return body{r}, nil
}

// remedy says what a credential lacks that may not read.
func remedy(err error) error {
	if code(err) == "AccessDenied" {
		return fmt.Errorf("%w (to read a store takes s3:ListBucket on the bucket, and s3:GetObject on its objects)", err)
	}
	return err
}

// body tells an answer that was cut off from the end of an object: one is a fault of the network, the other may be
// damage.
type body struct{ io.ReadCloser }

func (b body) Read(p []byte) (int, error) {
	n, err := b.ReadCloser.Read(p)
	if errors.Is(err, io.ErrUnexpectedEOF) {
		err = errors.New("the connection to the store ended before the object did")
	}
	return n, err
}
