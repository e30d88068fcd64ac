package main

import (
	"cmp"
	"context"
	"crypto/ed25519"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"os"
	"runtime/debug"
	"strings"

	"filippo.io/age"
	"github.com/spf13/cobra"

	"github.com/sallyport/sallyport/auditlog"
	"github.com/sallyport/sallyport/auditlog/file"
	"github.com/sallyport/sallyport/auditlog/s3"
)

const storeEnv = "SALLYPORT_LOG"

// tool is what all commands share.
type tool struct {
	store   string
	bucket  s3.Config // how to reach a store that is a bucket
	output  string
	keyFile string
	utc     bool
	noPager bool

	idFiles []string // of -i
	cache   string   // file of an index that the auditor made
	ids     []age.Identity
	unread  unread
	damage  damage

	indexFailed []error // of the index's logs that could not be read
}

// source is a store that is open for reading.
type source interface {
	auditlog.Source
	io.Closer
}

// command is the program, with all its commands.
func (t *tool) command() *cobra.Command {
	root := &cobra.Command{
		Use:   "sallyport-audit",
		Short: "Read and verify the audit logs of a Sallyport gate",
		Long: `Read and verify the audit logs of a Sallyport gate.

The logs are found in --store, or in $` + storeEnv + `: a directory, or s3://BUCKET/PREFIX. A session is named by its ID, by
the start of it if that is unique, or by "latest".

A bucket is read with a credential from the environment (AWS_ACCESS_KEY_ID, AWS_SECRET_ACCESS_KEY) or from a file in AWS's format
(--credentials-file, AWS_SHARED_CREDENTIALS_FILE, AWS_PROFILE). It needs s3:ListBucket on the bucket and s3:GetObject on the
prefix. AWS_ENDPOINT_URL, AWS_REGION and AWS_CA_BUNDLE are taken where the flags are not given.

A log that is encrypted is read with --identity; list and show say what they can't read. verify needs none, and checks the content
too if it has one.

Exit codes: 0 all is well, 1 an error (nothing found, or a log that can't be read), 2 a log is damaged.`,
		Example: `  sallyport-audit list --store /var/lib/sallyport/log
  sallyport-audit show latest
  sallyport-audit verify /mnt/evidence --key gate.pub
  sallyport-audit list s3://evidence/gate-1 --endpoint https://s3.example.com`,
		SilenceUsage:  true,
		SilenceErrors: true,
		PersistentPreRunE: func(*cobra.Command, []string) error {
			switch t.output {
			case "table":
				t.output = "text"
			case "text", "json":
			default:
				return fmt.Errorf("--output %q: want table, text or json", t.output)
			}
			return nil
		},
	}
	f := root.PersistentFlags()
	f.StringVar(&t.store, "store", "", "the logs: a directory, or s3://BUCKET/PREFIX (default $"+storeEnv+")")
	f.StringVar(&t.bucket.Endpoint, "endpoint", "", "URL of the S3 server (default $AWS_ENDPOINT_URL, or AWS's)")
	f.StringVar(&t.bucket.Region, "region", "", "region of the bucket (default $AWS_REGION, or us-east-1)")
	f.StringVar(&t.bucket.Lookup, "lookup", "", "where a URL has the bucket: path, dns or auto")
	f.StringVar(&t.bucket.CAFile, "ca-file", "", "certificates that may have signed the S3 server's (default $AWS_CA_BUNDLE, or the system's)")
	f.StringVar(&t.bucket.CredentialsFile, "credentials-file", "", "S3 credential in AWS's format (default: the environment's)")
	f.StringVar(&t.bucket.Profile, "profile", "", "section of that file (default $AWS_PROFILE, or default)")
	f.StringVar(&t.bucket.Credentials, "credentials", "", "role: the S3 credential of this machine's or pod's role")
	f.StringVar(&t.bucket.SSE.KeyFile, "sse-key-file", "", "key of a log that the gate puts with sse.type: customer")
	f.BoolVar(&t.bucket.Insecure, "insecure", false, "permit an http:// endpoint on another machine")
	f.StringVarP(&t.output, "output", "o", "table", "table (or text) to read, json to process")
	f.StringVar(&t.keyFile, "key", "", "file of the public keys that may have signed, one \"ed25519 BASE64\" a line")
	f.StringArrayVarP(&t.idFiles, "identity", "i", nil, "file of the identity that an encrypted log is read with, as of age -i; may be repeated (default $"+identityEnv+")")
	f.StringVar(&t.cache, "index-cache", "", "file of an index that \"index rebuild\" made, beside the store's own")
	f.BoolVar(&t.utc, "utc", false, "print, and take, times in UTC, not in the local zone")
	f.BoolVar(&t.noPager, "no-pager", false, "do not start $PAGER, or less, on a terminal")
	_ = root.RegisterFlagCompletionFunc("output", cobra.FixedCompletions([]string{"table", "text", "json"}, cobra.ShellCompDirectiveNoFileComp))
	root.AddCommand(t.listCommand(), t.showCommand(), t.commandsCommand(), t.filesCommand(), t.extractCommand(), t.catCommand(),
		t.searchCommand(), t.playCommand(), t.exportCommand(), t.reportCommand(), t.verifyCommand(), t.checkpointCommand(), t.indexCommand(),
		t.importCommand(), t.manCommand(), t.versionCommand())
	tellUse(root)
	return root
}

// tellUse adds to the error about a command's arguments how it is used.
func tellUse(c *cobra.Command) {
	if check := c.Args; check != nil && c.HasParent() {
		c.Args = func(c *cobra.Command, args []string) error {
			if err := check(c, args); err != nil {
				return fmt.Errorf("%w: want %s", err, c.UseLine())
			}
			return nil
		}
	}
	for _, sub := range c.Commands() {
		tellUse(sub)
	}
}

func (t *tool) versionCommand() *cobra.Command {
	return &cobra.Command{
		Use: "version", Short: "Print the version", Args: cobra.NoArgs,
		RunE: func(c *cobra.Command, _ []string) error {
			v := toolVersion()
			if t.output == "json" {
				return printJSON(c.OutOrStdout(), map[string]any{"version": v, "format": auditlog.FormatVersion})
			}
			_, err := fmt.Fprintf(c.OutOrStdout(), "sallyport-audit %s, reads format %d\n", v, auditlog.FormatVersion)
			return err
		},
	}
}

func toolVersion() string {
	if info, ok := debug.ReadBuildInfo(); ok && version == "devel" {
		return cmp.Or(info.Main.Version, version)
	}
	return version
}

// open opens the source, the store at if that is not empty.
func (t *tool) open(at string) (source, error) {
	at = cmp.Or(at, t.store, os.Getenv(storeEnv))
	switch {
	case at == "":
		return nil, fmt.Errorf("where are the logs? say --store DIR or --store s3://BUCKET/PREFIX, or set %s", storeEnv)
	case strings.HasPrefix(at, bucketScheme):
		return t.openBucket(at)
	case strings.Contains(at, "://"):
		return nil, fmt.Errorf("--store %q: want a directory or s3://BUCKET/PREFIX", at)
	}
	return file.OpenSource(at)
}

const bucketScheme = "s3://"

func (t *tool) openBucket(url string) (source, error) {
	cfg := t.bucket
	var err error
	if cfg.Bucket, cfg.Prefix, err = s3.ParseURL(url); err != nil {
		return nil, err
	}
	cfg.Endpoint = cmp.Or(cfg.Endpoint, os.Getenv("AWS_ENDPOINT_URL_S3"), os.Getenv("AWS_ENDPOINT_URL"))
	cfg.Region = cmp.Or(cfg.Region, os.Getenv("AWS_REGION"), os.Getenv("AWS_DEFAULT_REGION"))
	cfg.CAFile = cmp.Or(cfg.CAFile, os.Getenv("AWS_CA_BUNDLE"))
	if cfg.SSE.KeyFile != "" {
		cfg.SSE.Type = "customer"
	}
	return s3.OpenSource(cfg)
}

func (t *tool) keys() ([]ed25519.PublicKey, error) {
	if t.keyFile == "" {
		return nil, nil
	}
	return auditlog.LoadPublicKeys(t.keyFile)
}

// withSession finds the log that id names and calls f with its reader.
func (t *tool) withSession(ctx context.Context, id string, f func(src auditlog.Source, r *auditlog.SessionReader) error) error {
	src, err := t.open("")
	if err != nil {
		return err
	}
	defer src.Close()
	keys, err := t.keys()
	if err != nil {
		return err
	}
	log, err := find(ctx, src, id)
	if err != nil {
		return err
	}
	r, err := t.reader(src, log, keys...)
	if err != nil {
		return err
	}
	err = f(src, r)
	t.countUnread(r.Report())
	return err
}

// find finds one log: by ID, by the start of one, or the session that began last. Logs of the gate itself are found by ID.
func find(ctx context.Context, src auditlog.Source, id string) (auditlog.Stored, error) {
	latest := id == "latest"
	if !latest && !auditlog.ValidID(id) {
		return auditlog.Stored{}, fmt.Errorf("%q is not a session's ID", id)
	}
	var matches []auditlog.Stored
	for log, err := range auditlog.Logs(ctx, src, "") {
		switch {
		case err != nil:
			return auditlog.Stored{}, err
		case len(log.Segments) == 0:
		case latest && log.Name.Kind == auditlog.SessionLog:
			if len(matches) > 0 && log.Name.Day > matches[0].Name.Day {
				matches = matches[:0] // of an earlier day
			}
			matches = append(matches, log)
		case log.Name.ID == id:
			return log, nil
		case !latest && strings.HasPrefix(log.Name.ID, id) && len(matches) < 10:
			matches = append(matches, log)
		}
	}
	switch {
	case len(matches) == 0 && latest:
		return auditlog.Stored{}, errors.New("there is no session")
	case len(matches) == 0:
		return auditlog.Stored{}, fmt.Errorf("session %s is not there", id)
	case len(matches) == 1:
		return matches[0], nil
	case latest:
		return newest(ctx, src, matches)
	}
	ids := make([]string, len(matches))
	for i, m := range matches {
		ids[i] = m.Name.ID
	}
	return auditlog.Stored{}, fmt.Errorf("session %s is not unique: %s", id, strings.Join(ids, ", "))
}

// newest gives the log that began last.
func newest(ctx context.Context, src auditlog.Source, logs []auditlog.Stored) (auditlog.Stored, error) {
	best := -1
	var bestHeader auditlog.Header
	for i, log := range logs {
		h, err := header(ctx, src, log.Segments[0].Name)
		if err != nil {
			continue // damaged: verify says so
		}
		if best < 0 || h.LogStart.After(bestHeader.LogStart) {
			best, bestHeader = i, h
		}
	}
	if best < 0 {
		return auditlog.Stored{}, errors.New("no session of the last day can be read")
	}
	return logs[best], nil
}

func header(ctx context.Context, src auditlog.Source, name string) (auditlog.Header, error) {
	f, err := src.Open(ctx, name)
	if err != nil {
		return auditlog.Header{}, err
	}
	defer f.Close()
	s, err := auditlog.NewSegmentReader(f)
	if err != nil {
		return auditlog.Header{}, err
	}
	return s.Header(), nil
}

// printJSON prints a line of JSON.
func printJSON(w io.Writer, v any) error { return json.NewEncoder(safeLines{w}).Encode(v) }
