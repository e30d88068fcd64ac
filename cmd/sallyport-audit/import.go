package main

import (
	"bytes"
	"context"
	"crypto/ed25519"
	"crypto/rand"
	"crypto/sha256"
	"encoding/hex"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"os"
	"path/filepath"
	"strings"
	"time"

	"github.com/spf13/cobra"

	"github.com/sallyport/sallyport/auditlog"
	"github.com/sallyport/sallyport/auditlog/containerssh"
	"github.com/sallyport/sallyport/auditlog/file"
)

type importOptions struct {
	to       string
	signing  string
	gate     string
	maxBytes int64
}

func (t *tool) importCommand() *cobra.Command {
	o := importOptions{}
	c := &cobra.Command{
		Use: "import FILE... --to DIR", Short: "Take over audit logs of ContainerSSH", Args: cobra.MinimumNArgs(1),
		Long: `Read audit logs that ContainerSSH has written in its binary format, version 1 or 2, and write each as a log of Sallyport into a
directory, where all commands read it. A directory that is named is read with all below it; files in it that are no such logs are told, and
left out. A log that is there already is left as it is; of one whose import was broken off the directory is named, to be removed.

The first record of such a log says that it was imported: from which file, with which SHA-256, when. Its signatures are those of the
importer (--signing-key), or of a key that is made for this import and thrown away. They prove what was read; what happened before is
proven by nothing: ContainerSSH signs nothing. Passwords and answers that the file has are not taken over, nor are countries.`,
		Example: `  sallyport-audit import /var/lib/containerssh/audit --to /srv/archive
  sallyport-audit import 5f2a --to /srv/archive --signing-key importer.pem
  sallyport-audit list /srv/archive`,
		RunE: func(c *cobra.Command, args []string) error {
			return t.importAll(c.Context(), args, o, c.OutOrStdout(), c.ErrOrStderr())
		},
	}
	f := c.Flags()
	f.StringVar(&o.to, "to", "", "the directory of logs to write to; it is made if it is not there")
	f.StringVar(&o.signing, "signing-key", "", "the importer's own key: PKCS#8 in PEM, Ed25519")
	f.StringVar(&o.gate, "gate", "import", "name that the logs have in place of a gate's")
	f.Int64Var(&o.maxBytes, "max-bytes", 16<<30, "stop reading a file that decompresses to more bytes")
	_ = c.MarkFlagRequired("to")
	_ = c.MarkFlagDirname("to")
	return c
}

// imported is what import says of a file.
type imported struct {
	File    string `json:"file"`
	ID      string `json:"id,omitempty"`
	Records int    `json:"records"`
	Result  string `json:"result"` // imported, already there, not imported
	Why     string `json:"why,omitempty"`
}

// importer imports files, one after the other.
type importer struct {
	o    importOptions
	log  *auditlog.Log
	dest *file.Source
	done map[string]struct{} // IDs of this run: their segments may be on their way
}

func (t *tool) importAll(ctx context.Context, names []string, o importOptions, out, stderr io.Writer) (err error) {
	var key ed25519.PrivateKey
	note := ""
	if o.signing != "" {
		if key, err = auditlog.LoadKey(o.signing); err != nil {
			return err
		}
	} else {
		if _, key, err = ed25519.GenerateKey(rand.Reader); err != nil {
			return err
		}
		note = ", a key that is thrown away now"
	}
	store, err := file.NewStore(o.to)
	if err != nil {
		return err
	}
	dest, err := file.OpenSource(o.to)
	if err != nil {
		return err
	}
	defer dest.Close()
	spool, err := os.MkdirTemp(o.to, ".import-*") // beside the logs: they may be more than a temporary directory holds
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, os.RemoveAll(spool)) }()
	log, err := auditlog.Open(ctx, auditlog.Config{Spool: spool, SegmentAge: time.Hour, Codec: "zstd"}, key, store, o.gate, slog.New(slog.DiscardHandler))
	if err != nil {
		return err
	}
	i := &importer{o: o, log: log, dest: dest, done: make(map[string]struct{})}
	counts := make(map[string]int)
	err = i.walk(ctx, names, func(im imported) error {
		counts[im.Result]++
		if t.output == "json" {
			return printJSON(out, im)
		}
		_, err := fmt.Fprintf(out, "%-13s %s %s, %d records", im.Result, clean(im.File), dash(im.ID), im.Records)
		if im.Why != "" {
			_, err = fmt.Fprintf(out, ": %s", clean(im.Why))
		}
		fmt.Fprintln(out)
		return err
	})
	// What is sealed shall be there, also where the user has enough; a directory that can't be written is not waited for without end.
	closing, cancel := context.WithTimeout(context.WithoutCancel(ctx), time.Minute)
	defer cancel()
	if err := errors.Join(err, log.Close(closing)); err != nil {
		return err
	}
	public, _ := key.Public().(ed25519.PublicKey)
	fmt.Fprintf(stderr, "sallyport-audit: %d imported, %d already there, %d not imported; signed by %s%s\n", counts[wasImported], counts[wasThere], counts[wasNot], auditlog.Fingerprint(public), note)
	if counts[wasNot] > 0 {
		return errSilent
	}
	return nil
}

// errSilent is an error that was told.
var errSilent = errors.New("not all was done")

// The results of an import.
const (
	wasImported = "imported"
	wasThere    = "already there"
	wasNot      = "not imported"
)

func (i *importer) walk(ctx context.Context, names []string, tell func(imported) error) error {
	for _, name := range names {
		err := filepath.WalkDir(name, func(path string, d os.DirEntry, err error) error {
			if err != nil {
				return tell(imported{File: path, Result: wasNot, Why: err.Error()})
			}
			if d.IsDir() {
				return nil
			}
			im := imported{File: path, Result: wasImported}
			if err := i.file(ctx, path, &im); err != nil {
				if cause := context.Cause(ctx); cause != nil {
					return cause
				}
				im.Result, im.Why = wasNot, err.Error()
			}
			return tell(im)
		})
		if err != nil {
			return err
		}
	}
	return nil
}

// file imports a file.
func (i *importer) file(ctx context.Context, path string, im *imported) error {
	info, err := os.Stat(path)
	if err != nil {
		return err
	}
	if !info.Mode().IsRegular() { // to open a FIFO would wait for who writes to it
		return errors.New("not a file")
	}
	f, err := os.Open(path)
	if err != nil {
		return err
	}
	defer f.Close()
	return i.from(ctx, f, info.Size(), path, im)
}

// from imports what a file has at this moment.
func (i *importer) from(ctx context.Context, f io.ReaderAt, length int64, path string, im *imported) error {
	whole := io.NewSectionReader(f, 0, length)
	h := sha256.New()
	size, err := io.Copy(h, whole)
	if err != nil {
		return err
	}
	if _, err := whole.Seek(0, io.SeekStart); err != nil {
		return err
	}
	sum := h.Sum(nil)
	again := sha256.New() // of what is converted
	converted := io.TeeReader(whole, again)
	r, err := containerssh.NewReader(converted, i.o.maxBytes)
	if err != nil {
		return err
	}
	first, err := r.Next()
	if err != nil {
		return fmt.Errorf("no message: %w", err)
	}
	im.ID = first.Connection
	if !auditlog.ValidID(im.ID) || im.ID == "latest" {
		im.ID = "import-" + hex.EncodeToString(sum[:16])
	}
	start := time.Unix(0, first.Time).UTC()
	if y := start.Year(); y < 1 || y > 9999 {
		return fmt.Errorf("it began in the year %d", y)
	}
	if _, now := i.done[im.ID]; now {
		im.Result = wasThere
		return nil
	}
	dir := auditlog.Name{Kind: auditlog.SessionLog, Day: start.Format("2006/01/02"), ID: im.ID}.Dir()
	there, broken, err := i.there(ctx, dir)
	if err != nil {
		return err
	}
	if broken {
		return fmt.Errorf("an import of it was broken off before: remove %s, and import again", filepath.Join(i.o.to, dir))
	}
	if there {
		im.Result = wasThere
		return nil
	}
	i.done[im.ID] = struct{}{}
	head := &auditlog.Import{Format: fmt.Sprintf("ContainerSSH, version %d", r.Version()), File: filepath.Base(path), SHA256: sum, Size: uint64(size), Time: time.Now().UTC(),
		Version: "sallyport-audit " + toolVersion(), Session: short(first.Connection, 200), Statement: auditlog.ImportStatement}
	return i.write(ctx, r, first, head, start, im, func() error {
		if _, err := io.Copy(io.Discard, converted); err != nil {
			return err
		}
		if size != length || !bytes.Equal(again.Sum(nil), sum) {
			return errChanged
		}
		return nil
	})
}

// there says whether a log has objects, and whether they are of an import that did not come to its end.
func (i *importer) there(ctx context.Context, dir string) (there, broken bool, err error) {
	for log, err := range auditlog.Logs(ctx, i.dest, dir) {
		if err != nil || len(log.Segments) == 0 {
			return err == nil, false, err
		}
		broken, err = i.broken(ctx, log)
		return err == nil, broken, err
	}
	return false, false, nil
}

// broken says whether a log is of an import that was broken off. A damaged one is not: verify tells of it, and it shall not be
// removed.
func (i *importer) broken(ctx context.Context, log auditlog.Stored) (bool, error) {
	broken := false
	err := i.records(ctx, log.Segments[0], func(rec auditlog.Record) bool {
		_, broken = rec.Body.(*auditlog.Import)
		return false
	})
	// The end is the last record; the last segment may have none. If the import was killed there is no end.
	empty := true
	for n := len(log.Segments) - 1; err == nil && broken && empty && n >= 0; n-- {
		err = i.records(ctx, log.Segments[n], func(rec auditlog.Record) bool {
			empty = false
			if end, ok := rec.Body.(*auditlog.End); ok {
				broken = strings.HasPrefix(end.Detail, brokenOff)
			}
			return true
		})
	}
	if damage := (*auditlog.DamageError)(nil); errors.As(err, &damage) && damage.Cause == nil {
		return false, nil
	}
	return broken, err
}

// records gives the records of a segment, until each has enough.
func (i *importer) records(ctx context.Context, o auditlog.Object, each func(auditlog.Record) bool) error {
	f, err := i.dest.Open(ctx, o.Name)
	if err != nil {
		return err
	}
	defer f.Close()
	s, err := auditlog.NewSegmentReader(f)
	if err != nil {
		return err
	}
	for {
		rec, err := s.Next()
		if errors.Is(err, io.EOF) {
			return nil
		}
		if err != nil || !each(rec) {
			return err
		}
		if err := context.Cause(ctx); err != nil {
			return err
		}
	}
}

// brokenOff begins the detail of the end of a log whose import did not come to its own.
const brokenOff = "the import was broken off"

// errChanged says that what was converted is not what the first record names.
var errChanged = errors.New("the file changed while it was read")

// write writes the log of a file whose first message was read. same says at the end whether it was the same file all the time.
func (i *importer) write(ctx context.Context, r *containerssh.Reader, m containerssh.Message, head *auditlog.Import, start time.Time, im *imported, same func() error) (err error) {
	w := i.log.New(im.ID)
	c := containerssh.NewConverter()
	end := &auditlog.End{Cause: "interrupted", Detail: brokenOff}
	defer func() {
		if !c.Last().IsZero() {
			w.SetTime(c.Last())
		}
		err = errors.Join(err, w.Close(end))
	}()
	record := func(at time.Time, channel uint32, b auditlog.Body) error {
		w.SetTime(at)
		im.Records++
		return w.Record(channel, b)
	}
	all := func(records []containerssh.Record) error {
		for _, rec := range records {
			if err := record(rec.Time, rec.Channel, rec.Body); err != nil {
				return err
			}
		}
		return nil
	}
	if err := record(start, 0, head); err != nil {
		return err
	}
	if err := w.Begin(); err != nil {
		return err
	}
	for err = error(nil); err == nil; m, err = r.Next() {
		if err := errors.Join(all(c.Add(m)), context.Cause(ctx)); err != nil {
			return err
		}
	}
	if err := all(c.Finish()); err != nil {
		return err
	}
	if !errors.Is(err, io.EOF) { // what came before it is kept
		im.Why = "the rest can't be read: " + err.Error()
		if err := record(c.Last(), 0, &auditlog.ImportNote{Type: -1, Text: strings.ToValidUTF8(im.Why, "?")}); err != nil {
			return err
		}
	}
	if err := same(); err != nil {
		end.Detail = brokenOff + ": " + err.Error()
		return err
	}
	switch {
	case im.Why != "":
		end.Detail = im.Why
	case c.Ended():
		end = &auditlog.End{Cause: "client-left"}
	default:
		end.Detail = "the file ends before the connection did"
	}
	return nil
}
