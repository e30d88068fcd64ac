// Command archive makes an archive of a directory's files for build/release: NAME.zip or NAME.tar.gz. The same files give the same
// bytes on any machine: names are sorted, times are $SOURCE_DATE_EPOCH, owners and modes are not the file system's.
package main

import (
	"archive/tar"
	"archive/zip"
	"compress/gzip"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"time"
)

func main() {
	if len(os.Args) != 3 {
		fmt.Fprintln(os.Stderr, "usage: archive DIR FILE.zip|FILE.tar.gz")
		os.Exit(2)
	}
	if err := run(os.Args[1], os.Args[2]); err != nil {
		fmt.Fprintln(os.Stderr, "archive:", err)
		os.Exit(1)
	}
}

func run(dir, name string) (err error) {
	epoch, err := strconv.ParseInt(os.Getenv("SOURCE_DATE_EPOCH"), 10, 64)
	if err != nil {
		return fmt.Errorf("SOURCE_DATE_EPOCH: %w", err)
	}
	out, err := os.Create(name)
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, out.Close()) }()
	at := time.Unix(epoch, 0).UTC()
	var a archive
	switch {
	case strings.HasSuffix(name, ".zip"):
		a = &zipped{zip.NewWriter(out), at}
	case strings.HasSuffix(name, ".tar.gz"):
		z := gzip.NewWriter(out)
		a = &tarred{z, tar.NewWriter(z), at}
	default:
		return fmt.Errorf("%s: want .zip or .tar.gz", name)
	}
	err = filepath.WalkDir(dir, func(path string, d fs.DirEntry, err error) error { // in the order of names
		if err != nil || d.IsDir() {
			return err
		}
		return add(a, dir, path)
	})
	return errors.Join(err, a.close())
}

func add(a archive, dir, path string) error {
	rel, err := filepath.Rel(dir, path)
	if err != nil {
		return err
	}
	f, err := os.Open(path)
	if err != nil {
		return err
	}
	defer f.Close()
	info, err := f.Stat()
	if err != nil {
		return err
	}
	mode := fs.FileMode(0o644)
	if info.Mode()&0o100 != 0 {
		mode = 0o755
	}
	w, err := a.file(filepath.ToSlash(rel), mode, info.Size())
	if err != nil {
		return err
	}
	_, err = io.Copy(w, f)
	return err
}

type archive interface {
	file(name string, mode fs.FileMode, size int64) (io.Writer, error)
	close() error
}

type zipped struct {
	w  *zip.Writer
	at time.Time
}

func (z *zipped) file(name string, mode fs.FileMode, _ int64) (io.Writer, error) {
	h := &zip.FileHeader{Name: name, Method: zip.Deflate, Modified: z.at}
	h.SetMode(mode)
	return z.w.CreateHeader(h)
}

func (z *zipped) close() error { return z.w.Close() }

type tarred struct {
	z  *gzip.Writer
	w  *tar.Writer
	at time.Time
}

func (t *tarred) file(name string, mode fs.FileMode, size int64) (io.Writer, error) {
	return t.w, t.w.WriteHeader(&tar.Header{Typeflag: tar.TypeReg, Name: name, Mode: int64(mode), Size: size, ModTime: t.at, Format: tar.FormatUSTAR})
}

func (t *tarred) close() error { return errors.Join(t.w.Close(), t.z.Close()) }
