package main

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"strings"
	"time"

	"github.com/spf13/cobra"
	"golang.org/x/term"

	"github.com/sallyport/sallyport/auditlog"
	"github.com/sallyport/sallyport/auditlog/screen"
)

type playOptions struct {
	channel int
	speed   float64
	idle    time.Duration
	at      time.Duration
	command string
	raw     bool
}

func (t *tool) playCommand() *cobra.Command {
	o := playOptions{channel: -1}
	c := &cobra.Command{
		Use: "play ID", Short: "Play a terminal again, as it was seen", Args: cobra.ExactArgs(1),
		Long: `Play what a channel printed, in the time in which it came. Without --channel it is the first one with a terminal, or else the
first that printed anything.

What plays is made safe: colours, cursor and screen are as they were; what would set the title or the clipboard of your terminal, make it
answer, ring, print or change its keyboard is left out. --raw passes everything on, unchanged.

Keys, on a terminal:
  space      pause, and go on           .      while paused: the next output
  + and -    faster, slower             = or 0 as fast as it was
  ] or n     to the next command        [ or p to the one before
  right      10 seconds on              left   10 seconds back
  q, Ctrl-C  end

A command is a program that was reported from inside, or, where none was, what the client asked to run. To go back, the recording
is read from its start, and shown without waiting.`,
		Example: `  sallyport-audit play latest
  sallyport-audit play 01JD --speed 4 --idle 1s
  sallyport-audit play 01JD --command 'psql'
  sallyport-audit play 01JD --at 12m30s --channel 2`,
		ValidArgsFunction: t.completeSessions,
		RunE: func(c *cobra.Command, args []string) error {
			switch {
			case !(o.speed >= 0.01 && o.speed <= 1000):
				return fmt.Errorf("--speed %v: want 0.01 to 1000", o.speed)
			case o.idle < 0 || o.at < 0:
				return errors.New("--idle and --at: want no negative time")
			}
			return t.play(c.Context(), args[0], o, c.InOrStdin(), c.OutOrStdout(), c.ErrOrStderr())
		},
	}
	f := c.Flags()
	f.IntVar(&o.channel, "channel", -1, "play this channel")
	f.Float64Var(&o.speed, "speed", 1, "times as fast as it was")
	f.DurationVar(&o.idle, "idle", 2*time.Second, "shorten longer pauses to this (0: leave them)")
	f.DurationVar(&o.at, "at", 0, "begin at this time into the channel")
	f.StringVar(&o.command, "command", "", "begin at the first command that has this text")
	f.BoolVar(&o.raw, "raw", false, "pass on all escape sequences: they can control your terminal")
	return c
}

func (t *tool) play(ctx context.Context, id string, o playOptions, stdin io.Reader, out, stderr io.Writer) (err error) {
	l, err := t.openLogs("")
	if err != nil {
		return err
	}
	defer l.Close()
	log, err := find(ctx, l, id)
	if err != nil {
		return err
	}
	if o.channel < 0 {
		if o.channel, err = l.playable(ctx, log); err != nil {
			return err
		}
	}
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	p := &player{o: o, out: out, sleep: sleepContext, records: func(ctx context.Context) *auditlog.SessionReader { return l.reader(log) }}
	in, terminal := isTerminal(stdin)
	screenFile, shown := isTerminal(out)
	if terminal && shown {
		restore, err := rawTerminal(in, screenFile)
		if err != nil {
			return err
		}
		defer func() { err = errors.Join(err, restore()) }()
		defer func() { // whatever state the recording left
			_, werr := io.WriteString(out, screen.Reset+bottom+"\r\n")
			err = errors.Join(err, werr)
		}()
		p.keys, p.crlf, p.status = readKeys(ctx, in), true, stderr
		if columns, rows, err := term.GetSize(int(screenFile.Fd())); err == nil {
			p.columns, p.rows = columns, rows
		}
	}
	err = p.run(ctx)
	t.countUnread(p.report)
	if errors.Is(err, errQuit) {
		return nil
	}
	if err == nil {
		t.damage.add(p.report)
	}
	return err
}

// playable finds the channel to play.
func (l *logs) playable(ctx context.Context, log auditlog.Stored) (int, error) {
	r := l.reader(log)
	first := -1
	for rec := range r.Records(ctx) {
		switch b := rec.Body.(type) {
		case *auditlog.Request:
			if b.Type == "pty-req" && b.OK {
				return int(rec.Channel), nil
			}
		case *auditlog.Data:
			if first < 0 && b.Stream != auditlog.Input && len(b.Data) > 0 {
				first = int(rec.Channel)
			}
		}
	}
	if err := context.Cause(ctx); err != nil {
		return 0, err
	}
	if first < 0 {
		l.t.countUnread(r.Report())
		l.t.damage.add(r.Report())
		return 0, errors.New("nothing was printed in this session")
	}
	return first, nil
}

// bottom moves the cursor below what was shown: the recording may have left it anywhere.
const bottom = "\x1b[999;1H"

// errQuit is the user's wish to end.
var errQuit = errors.New("quit")

// key is what the auditor pressed.
type key int

const (
	keyPause key = iota
	keyStep
	keyFaster
	keySlower
	keyNormal
	keyNext
	keyPrevious
	keyForward
	keyBack
	keyQuit
)

const seekStep = 10 * time.Second

// player plays one channel.
type player struct {
	o       playOptions
	out     io.Writer
	status  io.Writer // nil: nobody looks
	keys    <-chan key
	sleep   func(ctx context.Context, d time.Duration, keys <-chan key) (key, bool, error)
	records func(context.Context) *auditlog.SessionReader
	columns int // of the auditor's terminal; 0: not known
	rows    int
	report  auditlog.Report

	filter screen.Filter
	crlf   bool // out is a terminal in raw mode
	plain  bool // the recording had no terminal: line feeds have to be completed
	told   bool // that the terminal is smaller
	paused bool
	now    time.Duration // time of the recording that was reached, pauses as they were
	// What is shown without waiting: up to a time, or up to a command by its number or text.
	until   time.Duration
	toCount int
	toText  string
	count   int // commands that were passed
}

// run plays until the end. A jump back begins anew.
func (p *player) run(ctx context.Context) error {
	p.until, p.toText = p.o.at, p.o.command
	for {
		again, err := p.pass(ctx)
		if err != nil || !again {
			return err
		}
		if _, err := io.WriteString(p.out, screen.Reset+"\x1b[H\x1b[2J"); err != nil {
			return err
		}
		p.filter, p.now, p.count, p.paused = screen.Filter{}, 0, 0, false
	}
}

// pass reads the recording from its start; again says that it is to be read once more.
func (p *player) pass(ctx context.Context) (again bool, err error) {
	r := p.records(ctx)
	var start, last time.Time
	programs := false
	p.plain = true
	for rec := range r.Records(ctx) {
		if rec.Channel != uint32(p.o.channel) {
			continue
		}
		if start.IsZero() {
			start, last = rec.Time, rec.Time
		}
		switch b := rec.Body.(type) {
		case *auditlog.Request:
			if (b.Type == "pty-req" || b.Type == "window-change") && b.OK {
				p.plain = false
				p.resized(b)
			}
			if c := commandOf(b); c != "" && b.OK && !programs {
				p.command(c)
			}
		case *auditlog.ProgramExec:
			programs = true
			if b.Again == 0 {
				p.command(plainLine(b.Args))
			}
		case *auditlog.Data:
			if b.Stream == auditlog.Input || len(b.Data) == 0 {
				continue
			}
			pause := max(0, rec.Time.Sub(last)) // clocks jump
			last = rec.Time
			p.now += pause
			if again, err := p.wait(ctx, pause); err != nil || again {
				return again, err
			}
			if err := p.write(b.Data); err != nil {
				return false, err
			}
		}
	}
	if err := context.Cause(ctx); err != nil {
		return false, err
	}
	p.report = r.Report()
	if p.toText != "" {
		return false, fmt.Errorf("no command has %q", p.toText)
	}
	return false, nil
}

// command notes that a command begins.
func (p *player) command(text string) {
	p.count++
	if p.toText != "" && contains(p.toText, text) {
		p.toText = ""
	}
}

func (p *player) resized(b *auditlog.Request) {
	if p.status != nil && !p.told && p.columns > 0 && (int(b.Columns) > p.columns || int(b.Rows) > p.rows) {
		p.told = true
		fmt.Fprintf(p.status, "\r\n(recorded on %d columns and %d rows, more than here: it may look askew)\r\n", b.Columns, b.Rows)
	}
}

// skipping says that what is read is shown without waiting.
func (p *player) skipping() bool {
	return p.toText != "" || p.count < p.toCount || p.now < p.until
}

// wait waits as long as the recording did, at its speed, and obeys keys; again says that the recording is to be read anew.
func (p *player) wait(ctx context.Context, pause time.Duration) (again bool, err error) {
	if p.o.idle > 0 {
		pause = min(pause, p.o.idle)
	}
	for {
		if p.skipping() {
			return false, context.Cause(ctx)
		}
		d := time.Duration(float64(pause) / p.o.speed)
		if p.paused {
			d = -1
		}
		before := time.Now()
		k, pressed, err := p.sleep(ctx, d, p.keys)
		if err != nil || !pressed {
			return false, err
		}
		if !p.paused {
			pause = max(0, pause-time.Duration(float64(time.Since(before))*p.o.speed))
		}
		switch k {
		case keyPause:
			p.paused = !p.paused
		case keyStep:
			p.paused = true
			return false, nil
		case keyFaster:
			p.o.speed = min(1000, p.o.speed*2)
		case keySlower:
			p.o.speed = max(0.01, p.o.speed/2)
		case keyNormal:
			p.o.speed = 1
		case keyNext:
			p.toCount, p.paused = p.count+1, false
		case keyForward:
			p.until = p.now + seekStep
		case keyPrevious:
			p.toCount = max(0, p.count-1)
			return true, nil
		case keyBack:
			p.until, p.toCount = max(0, p.now-seekStep), 0
			return true, nil
		case keyQuit:
			return false, errQuit
		}
	}
}

func (p *player) write(b []byte) error {
	if !p.o.raw {
		b = p.filter.Add(b)
	}
	if p.plain && p.crlf {
		b = bytes.ReplaceAll(b, []byte("\n"), []byte("\r\n"))
	}
	_, err := p.out.Write(b)
	return err
}

// sleepContext waits for d, or without end if it is negative, or until a key.
func sleepContext(ctx context.Context, d time.Duration, keys <-chan key) (key, bool, error) {
	var timer <-chan time.Time
	if d >= 0 {
		t := time.NewTimer(d)
		defer t.Stop()
		timer = t.C
	}
	select {
	case <-timer:
		return 0, false, nil
	case k := <-keys:
		return k, true, nil
	case <-ctx.Done():
		return 0, false, context.Cause(ctx)
	}
}

// rawTerminal makes keys come as they are pressed, unseen.
func rawTerminal(in, out *os.File) (restore func() error, err error) {
	was, err := term.MakeRaw(int(in.Fd()))
	if err != nil {
		return nil, fmt.Errorf("play: %w", err)
	}
	undo, err := obeySequences(out)
	if err != nil {
		return nil, errors.Join(fmt.Errorf("play: %w", err), term.Restore(int(in.Fd()), was))
	}
	return func() error { return errors.Join(undo(), term.Restore(int(in.Fd()), was)) }, nil
}

// readKeys gives the keys that are pressed. Its goroutine ends with the input, or when ctx has and one more key comes.
func readKeys(ctx context.Context, in io.Reader) <-chan key {
	keys := make(chan key)
	go func() {
		b := make([]byte, 64)
		for {
			n, err := in.Read(b)
			for _, k := range parseKeys(string(b[:n])) {
				select {
				case keys <- k:
				case <-ctx.Done():
					return
				}
			}
			if err != nil {
				return
			}
		}
	}()
	return keys
}

// parseKeys reads what a terminal sends for keys.
func parseKeys(s string) []key {
	var keys []key
	for s != "" {
		known := false
		for _, k := range []struct {
			text string
			key  key
		}{{"\x1b[C", keyForward}, {"\x1bOC", keyForward}, {"\x1b[D", keyBack}, {"\x1bOD", keyBack}, {" ", keyPause}, {".", keyStep}, {"+", keyFaster},
			{"-", keySlower}, {"=", keyNormal}, {"0", keyNormal}, {"]", keyNext}, {"n", keyNext}, {"[", keyPrevious}, {"p", keyPrevious}, {"q", keyQuit}, {"\x03", keyQuit}} {
			if strings.HasPrefix(s, k.text) {
				keys, s, known = append(keys, k.key), s[len(k.text):], true
				break
			}
		}
		switch {
		case known:
		case strings.HasPrefix(s, "\x1b[") || strings.HasPrefix(s, "\x1bO"): // another key's
			end := 2
			for end < len(s) && s[end] < 0x40 {
				end++
			}
			s = s[min(end+1, len(s)):]
		default:
			s = s[1:]
		}
	}
	return keys
}
