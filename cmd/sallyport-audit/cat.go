package main

import (
	"context"
	"encoding/hex"
	"errors"
	"fmt"
	"io"
	"slices"
	"time"
	"unicode/utf8"

	"github.com/spf13/cobra"

	"github.com/sallyport/sallyport/auditlog"
)

// followInterval is how often a live log is looked at for more; its segments come every few seconds.
const followInterval = time.Second

type catOptions struct {
	follow  bool
	raw     bool
	channel int
	stream  string
}

func (t *tool) catCommand() *cobra.Command {
	var o catOptions
	c := &cobra.Command{
		Use: "cat ID", Short: "Print a log's records as JSON lines, or the exact bytes of a stream", Args: cobra.ExactArgs(1),
		Long: `Print a log's records as JSON lines. Bytes are {"text": ...} where they are valid UTF-8 (and less than a MiB), {"base64": ...} where not.

With --raw, the bytes of one stream of one channel are written as they were recorded, and nothing else. They are not made
safe for a terminal: write them to a file.`,
		Example: `  sallyport-audit cat latest
  sallyport-audit cat -f 01JD
  sallyport-audit cat 01JD --channel 1 --stream out --raw > output`,
		ValidArgsFunction: t.completeSessions,
		RunE: func(c *cobra.Command, args []string) error {
			if _, ok := streams[o.stream]; !ok && o.stream != "" {
				return fmt.Errorf("--stream %q: want in, out or err", o.stream)
			}
			if o.raw && (o.channel < 1 || o.stream == "") {
				return errors.New("--raw wants --channel and --stream")
			}
			return t.cat(c.Context(), args[0], o, c.OutOrStdout(), c.ErrOrStderr())
		},
	}
	f := c.Flags()
	f.BoolVarP(&o.follow, "follow", "f", false, "go on while the session is live")
	f.BoolVar(&o.raw, "raw", false, "write the exact bytes of --channel and --stream")
	f.IntVar(&o.channel, "channel", -1, "only this channel (0: the connection)")
	f.StringVar(&o.stream, "stream", "", "only data of this stream: in, out or err")
	return c
}

var streams = map[string]auditlog.Stream{"in": auditlog.Input, "out": auditlog.Output, "err": auditlog.Error}

func streamName(s auditlog.Stream) string {
	for name, v := range streams {
		if v == s {
			return name
		}
	}
	return fmt.Sprint(uint8(s))
}

func (t *tool) cat(ctx context.Context, id string, o catOptions, out, stderr io.Writer) error {
	return t.withSession(ctx, id, func(src auditlog.Source, r *auditlog.SessionReader) error {
		for {
			for rec := range r.Records(ctx) {
				if err := o.print(out, rec); err != nil {
					return err
				}
			}
			if err := context.Cause(ctx); err != nil {
				return err
			}
			rep := r.Report()
			if err := verdict(rep.State); err != nil {
				for _, p := range rep.Problems {
					fmt.Fprintln(stderr, "sallyport-audit:", clean(p.String()))
				}
				return err
			}
			if !o.follow || rep.State != auditlog.Live {
				return nil
			}
			if err := more(ctx, src, r); err != nil {
				return err
			}
		}
	})
}

// more waits until a log has more segments than its reader knows of, and adds them.
func more(ctx context.Context, src auditlog.Source, r *auditlog.SessionReader) error {
	n, err := auditlog.ParseName(r.Last())
	if err != nil {
		return err
	}
	timer := time.NewTimer(followInterval)
	defer timer.Stop()
	for {
		select {
		case <-ctx.Done():
			return context.Cause(ctx)
		case <-timer.C:
		}
		found := false
		for o, err := range src.List(ctx, n.Dir()) {
			if err != nil {
				return err
			}
			if m, err := auditlog.ParseName(o.Name); err == nil && m.Dir() == n.Dir() && m.Number > n.Number {
				r.Add(o)
				found = true
			}
		}
		if found {
			return nil
		}
		timer.Reset(followInterval)
	}
}

// print prints a record, if it is asked for.
func (o catOptions) print(out io.Writer, rec auditlog.Record) error {
	if o.channel >= 0 && rec.Channel != uint32(o.channel) {
		return nil
	}
	data, isData := rec.Body.(*auditlog.Data)
	if o.stream != "" && (!isData || data.Stream != streams[o.stream]) {
		return nil
	}
	if o.raw {
		_, err := out.Write(data.Data)
		return err
	}
	return printJSON(out, newLine(rec))
}

// line is a record's JSON form.
type line struct {
	Sequence uint64    `json:"sequence"`
	Time     time.Time `json:"time"`
	Channel  uint32    `json:"channel"`
	Kind     string    `json:"kind"`
	Body     any       `json:"body"`
}

// maxJSONText is what is written as text; no gate writes more into a record, and as text some bytes take six times their room.
const maxJSONText = 1 << 20

// jsonBytes are bytes as text, where they are that.
type jsonBytes struct {
	Text   *string `json:"text,omitempty"`
	Base64 []byte  `json:"base64,omitempty"`
}

func newBytes(b []byte) *jsonBytes {
	if len(b) == 0 {
		return nil
	}
	if len(b) > maxJSONText || !utf8.Valid(b) {
		return &jsonBytes{Base64: b}
	}
	s := string(b)
	return &jsonBytes{Text: &s}
}

func newLine(rec auditlog.Record) line {
	l := line{Sequence: rec.Sequence, Time: rec.Time, Channel: rec.Channel, Kind: rec.Body.Kind().String(), Body: rec.Body}
	switch b := rec.Body.(type) { // the outer field of a name hides the embedded one
	case *auditlog.Data:
		l.Body = struct {
			*auditlog.Data
			Stream string     `json:"stream"`
			Bytes  *jsonBytes `json:"data,omitempty"`
		}{b, streamName(b.Stream), newBytes(b.Data)}
	case *auditlog.Request:
		l.Body = struct {
			*auditlog.Request
			Command *jsonBytes `json:"command,omitempty"`
			Payload *jsonBytes `json:"payload,omitempty"`
		}{b, newBytes(b.Command), newBytes(b.Payload)}
	case *auditlog.ChannelOpen:
		l.Body = struct {
			*auditlog.ChannelOpen
			Extra *jsonBytes `json:"extra,omitempty"`
		}{b, newBytes(b.Extra)}
	case *auditlog.ProgramExec, *auditlog.ProgramStart, *auditlog.ConnectOut, *auditlog.Script, *auditlog.Unaudited:
		l.Body = jsonBody(b)
	case *auditlog.Transfer:
		l.Body = newTransfer(b)
	case *auditlog.Content:
		l.Body = struct {
			*auditlog.Content
			Stream string     `json:"stream"`
			Data   *jsonBytes `json:"data,omitempty"`
			SHA256 string     `json:"sha256"`
		}{b, streamName(b.Stream), newBytes(b.Data), hex.EncodeToString(b.SHA256)}
	case *auditlog.DataRest:
		l.Body = struct {
			*auditlog.DataRest
			Stream string `json:"stream"`
			SHA256 string `json:"sha256,omitempty"`
		}{b, streamName(b.Stream), hex.EncodeToString(b.SHA256)}
	case *auditlog.Import:
		l.Body = struct {
			*auditlog.Import
			SHA256 string `json:"sha256"`
		}{b, hex.EncodeToString(b.SHA256)}
	case *auditlog.Unknown:
		l.Body = map[string]string{"cbor": hex.EncodeToString(b.Raw)}
	}
	return l
}

// newLines is newLine of several.
func newLines(recs []auditlog.Record) []line {
	lines := make([]line, 0, len(recs))
	for rec := range slices.Values(recs) {
		lines = append(lines, newLine(rec))
	}
	return lines
}
