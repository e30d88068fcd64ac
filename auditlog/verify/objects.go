package verify

import (
	"context"
	"crypto/sha256"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"iter"
	"strings"

	"github.com/sallyport/sallyport/auditlog"
)

// duplicates compares what a store has kept under other names, as it could not see by what the right one was taken. The same
// bytes mean that a gate put an object twice. Others mean that one of the two is not the gate's.
func duplicates(ctx context.Context, v *Run, prefix string) error {
	for o, err := range v.Source.List(ctx, prefix) {
		if err != nil {
			return err
		}
		name, sum, err := auditlog.ParseDuplicateName(o.Name)
		if err != nil {
			v.Foreign(o.Name)
			continue
		}
		kept, err := contentHash(ctx, v.Source, o.Name)
		if err != nil {
			if err := v.notRead(ctx, err); err != nil {
				return err
			}
			continue
		}
		there, err := contentHash(ctx, v.Source, name)
		gone := errors.Is(err, fs.ErrNotExist)
		switch {
		case err != nil && !gone:
			err = v.notRead(ctx, err)
		case kept != sum:
			err = v.Wrong(o.Name, "is not what was put under this name")
		case gone:
			err = v.Wrong(name, "is gone; it was put twice: see %s", o.Name)
		case there != kept:
			err = v.Wrong(name, "two objects were put under this name: see %s", o.Name)
		}
		if err != nil {
			return err
		}
	}
	return nil
}

func contentHash(ctx context.Context, src auditlog.Source, name string) (sum auditlog.Hash, err error) {
	r, err := src.Open(ctx, name)
	if err != nil {
		return sum, err
	}
	defer r.Close()
	h := sha256.New()
	if _, err := io.Copy(h, io.LimitReader(r, auditlog.MaxSegmentBytes+1)); err != nil {
		return sum, fmt.Errorf("read %s: %w", name, err)
	}
	h.Sum(sum[:0])
	return sum, nil
}

// keys looks at the published keys. They prove nothing, but shall be what their names say.
func keys(ctx context.Context, v *Run, prefix string) error {
	for o, err := range v.Source.List(ctx, prefix) {
		if err != nil {
			return err
		}
		b, err := read(ctx, v.Source, o.Name, 64<<10)
		if err != nil {
			if err := v.notRead(ctx, err); err != nil {
				return err
			}
			continue
		}
		gate, _, ok := strings.Cut(strings.TrimPrefix(o.Name, prefix), "/")
		pub, err := auditlog.ParsePublicKeys(b)
		switch {
		case !ok || !strings.HasSuffix(o.Name, ".pub"):
			v.Foreign(o.Name)
		case err != nil || len(pub) != 1 || auditlog.KeyName(gate, pub[0]) != o.Name ||
			string(b) != auditlog.FormatPublicKey(pub[0])+" "+gate+"\n":
			if err := v.Wrong(o.Name, "is not the key that its name says"); err != nil {
				return err
			}
		}
	}
	return nil
}

// checks skips what `sallyport check` has put: a fixed text.
func checks(ctx context.Context, v *Run, prefix string) error {
	for o, err := range v.Source.List(ctx, prefix) {
		if err != nil {
			return err
		}
		b, err := read(ctx, v.Source, o.Name, 1<<10)
		if err != nil {
			if err := v.notRead(ctx, err); err != nil {
				return err
			}
			continue
		}
		if string(b) != auditlog.CheckText {
			v.Foreign(o.Name)
		}
	}
	return nil
}

// counter counts what is read.
type counter struct {
	auditlog.Source
	v *Run
}

func (c *counter) List(ctx context.Context, prefix string) iter.Seq2[auditlog.Object, error] {
	return c.Source.List(ctx, prefix)
}

func (c *counter) Open(ctx context.Context, name string) (io.ReadCloser, error) {
	f, err := c.Source.Open(ctx, name)
	if err != nil {
		return nil, err
	}
	return &countedReader{f, c.v, 0}, nil
}

type countedReader struct {
	io.ReadCloser
	v *Run
	n int64
}

func (r *countedReader) Read(p []byte) (int, error) {
	n, err := r.ReadCloser.Read(p)
	r.n += int64(n)
	return n, err
}

func (r *countedReader) Close() error {
	c := &r.v.count
	c.Lock()
	c.objects++
	c.bytes += r.n
	objects, bytes := c.objects, c.bytes
	c.Unlock()
	if r.v.Options.Progress != nil {
		r.v.Options.Progress(objects, bytes)
	}
	return r.ReadCloser.Close()
}
