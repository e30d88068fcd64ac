package main

import (
	"bytes"
	"context"
	"crypto/ed25519"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"sync"
	"time"

	"filippo.io/age"

	"github.com/sallyport/sallyport/auditlog"
	"github.com/sallyport/sallyport/auditlog/file"
)

const logTable = "The log"

// caseLog measures the log without a gate: what a core encodes, decodes and verifies. Codec, fsync and signature are as the gate
// has them; what passes comes in pieces of 32 KiB, as from a channel.
func caseLog(ctx context.Context, b *bench) error {
	id, err := age.GenerateX25519Identity()
	if err != nil {
		return err
	}
	t := b.report.table(logTable, "content", "encode, MB/s of a core", "decode, MB/s of a core", "encrypted: encode", "decode",
		"log KiB per MiB", "`verify`, MB/s of recorded bytes", "of stored bytes")
	for _, content := range []string{"text", "random"} {
		data, err := readStart(b.path("demo", "production", content), 16<<20)
		if err != nil {
			return err
		}
		var stored samples
		var verify verified
		encode, decode := map[bool]*samples{false: {}, true: {}}, map[bool]*samples{false: {}, true: {}}
		for range b.slow() {
			for _, encrypted := range []bool{false, true} {
				if err := b.oneLog(ctx, data, id, encrypted, encode[encrypted], decode[encrypted], &stored, &verify); err != nil {
					return fmt.Errorf("%s: %w", content, err)
				}
			}
		}
		t.row(content, encode[false].text(), decode[false].text(), encode[true].text(), decode[true].text(), number(stored.median()),
			verify.recorded.text(), verify.stored.text())
		b.say("  %s: encode %s, decode %s, verify %s MB/s", content, encode[false].text(), decode[false].text(), verify.recorded.text())
	}
	t.note("%s a time, from memory to a spool and a store on disk, and back. MB/s of a core are of recorded bytes by processor time, kernel "+
		"and fsync included; decoding checks all hashes and signatures. `verify` is `sallyport-audit verify DIR` from its start to its end, by the clock.",
		size(b.logged))
	return b.interactive(ctx)
}

// verified is what was measured of verify: MB a second of either kind.
type verified struct{ recorded, stored samples }

// readStart gives the first n bytes of a file, or all if there are fewer.
func readStart(name string, n int64) ([]byte, error) {
	f, err := os.Open(name)
	if err != nil {
		return nil, err
	}
	defer f.Close()
	return io.ReadAll(io.LimitReader(f, n))
}

// oneLog writes a session and reads it.
func (b *bench) oneLog(ctx context.Context, data []byte, id *age.X25519Identity, encrypted bool, encode, decode, stored *samples, verify *verified) error {
	dir, err := os.MkdirTemp(b.root, "log-")
	if err != nil {
		return err
	}
	defer os.RemoveAll(dir)
	public, key, err := ed25519.GenerateKey(nil)
	if err != nil {
		return err
	}
	at := filepath.Join(dir, "store")
	store, err := file.NewStore(at)
	if err != nil {
		return err
	}
	cfg := auditlog.Config{Spool: filepath.Join(dir, "spool")}
	if encrypted {
		cfg.Recipients = []string{id.Recipient().String()}
	}
	began, err := cpuTime(os.Getpid())
	if err != nil {
		return err
	}
	l, err := auditlog.Open(ctx, cfg, key, store, "bench", slog.New(slog.DiscardHandler))
	if err != nil {
		return err
	}
	r := l.New("s1")
	if err := r.Begin(); err != nil {
		return errors.Join(err, l.Close(ctx))
	}
	w := r.Tap(1, auditlog.Output, io.Discard)
	const piece = 32 << 10
	for n := int64(0); n < b.logged && err == nil; n += piece {
		off := int(n % int64(len(data)))
		_, err = w.Write(data[off:min(off+piece, len(data))])
	}
	if err := errors.Join(err, r.Close(&auditlog.End{Cause: "client-left"}), l.Close(ctx)); err != nil {
		return err
	}
	ended, err := cpuTime(os.Getpid())
	if err != nil {
		return err
	}
	mb := float64(b.logged) / 1e6
	encode.add(mb / (ended - began).Seconds())

	src, err := file.OpenSource(at)
	if err != nil {
		return err
	}
	defer src.Close()
	var bytes int64
	if began, err = cpuTime(os.Getpid()); err != nil {
		return err
	}
	for log, err := range auditlog.Logs(ctx, src, auditlog.SessionPrefix) {
		if err != nil {
			return err
		}
		r := auditlog.NewSessionReader(src, log, public)
		if encrypted {
			r.Decrypt(id)
		}
		if rep := r.Verify(ctx); rep.State != auditlog.Sealed || rep.Unread > 0 {
			return fmt.Errorf("what was written is %v: %v", rep.State, rep.Problems)
		}
		bytes = r.Report().Bytes
	}
	if ended, err = cpuTime(os.Getpid()); err != nil {
		return err
	}
	decode.add(mb / (ended - began).Seconds())
	if encrypted {
		return nil
	}
	stored.add(float64(bytes) / 1024 / (float64(b.logged) / mib))
	out, took, err := b.auditor(ctx, "verify", at)
	if err != nil {
		return err
	}
	if !strings.Contains(out, "1 sealed") {
		return fmt.Errorf("verify: %s", out)
	}
	verify.recorded.add(mb / took.Seconds())
	verify.stored.add(float64(bytes) / 1e6 / took.Seconds())
	return nil
}

// auditor runs sallyport-audit, and gives its time by the clock.
func (b *bench) auditor(ctx context.Context, args ...string) (out string, took time.Duration, err error) {
	cmd, cancel := command(ctx, filepath.Join(b.bin, "sallyport-audit"), args...)
	defer cancel()
	var stdout, stderr bytes.Buffer
	cmd.Stdout, cmd.Stderr = &stdout, &stderr
	began := time.Now()
	err = cmd.Run()
	took = time.Since(began)
	if err != nil {
		return "", 0, fmt.Errorf("sallyport-audit %s: %w: %s%s", args[0], err, stdout.Bytes(), stderr.Bytes())
	}
	return stdout.String(), took, nil
}

// interactive measures the log of a person at a prompt: what a session takes that only comes and goes, and what a minute adds to it.
func (b *bench) interactive(ctx context.Context) error {
	t := b.report.table("Bytes of log, a shell at its prompt", "gate", "a session that comes and goes, KiB", "each minute of typing more, KiB", "and each minute idle")
	gates := []*gate{b.gate, b.encrypted}
	// All at once: they wait most of the time.
	all := func(f func(*terminal) error) (sizes []float64, err error) {
		for _, g := range gates {
			if _, err := g.takeLog(); err != nil {
				return nil, err
			}
		}
		errs := make([]error, len(gates))
		var wg sync.WaitGroup
		for i, g := range gates {
			wg.Go(func() {
				c, err := b.client.dial(ctx, &g.target)
				if err != nil {
					errs[i] = err
					return
				}
				defer c.Close()
				sh, err := c.shell()
				if err == nil {
					err = f(sh)
				}
				errs[i] = err
			})
		}
		wg.Wait()
		if err := errors.Join(errs...); err != nil {
			return nil, err
		}
		for _, g := range gates {
			if err := g.settle(ctx, b); err != nil {
				return nil, err
			}
			n, err := g.takeLog()
			if err != nil {
				return nil, err
			}
			sizes = append(sizes, float64(n)/1024)
		}
		return sizes, nil
	}
	wait := func(d time.Duration) error {
		select {
		case <-time.After(d):
			return nil
		case <-ctx.Done():
			return ctx.Err()
		}
	}
	bare, err := all(func(*terminal) error { return nil })
	if err != nil {
		return err
	}
	// A key each fifth of a second, and a command of them each five seconds, whose output is a screen's half.
	const each, keys = 200 * time.Millisecond, 25
	command := fmt.Sprintf("%-*s\n", keys-1, "ls -l /usr/bin | head -n 20")[:keys-1] + "\n"
	typed, err := all(func(sh *terminal) error {
		for i := range int(b.typed / each) {
			if _, err := sh.in.Write([]byte(command)[i%keys : i%keys+1]); err != nil {
				return err
			}
			if err := wait(each); err != nil {
				return err
			}
		}
		return nil
	})
	if err != nil {
		return err
	}
	idle, err := all(func(*terminal) error { return wait(b.typed) })
	if err != nil {
		return err
	}
	for i, g := range gates {
		t.row(g.name, number(bare[i]), number((typed[i]-bare[i])/b.typed.Minutes()), number(max(0, idle[i]-bare[i])/b.typed.Minutes()))
	}
	t.note("Typed: a key each fifth of a second, and a command each five seconds that prints 20 lines, for %v. The audit of executed programs is in it.", b.typed)
	return nil
}

// caseList measures a list over many sessions.
func caseList(ctx context.Context, b *bench) error {
	dir := filepath.Join(b.memory, "list")
	store, err := file.NewStore(dir)
	if err != nil {
		return err
	}
	defer os.RemoveAll(dir)
	_, key, err := ed25519.GenerateKey(nil)
	if err != nil {
		return err
	}
	b.say("  writing %d sessions", b.listed)
	l, err := auditlog.Open(ctx, auditlog.Config{Spool: filepath.Join(b.memory, "list-spool"), Index: true}, key, store, "bench", slog.New(slog.DiscardHandler))
	if err != nil {
		return err
	}
	if err := errors.Join(writeSessions(ctx, l, b.listed), l.Close(ctx)); err != nil {
		return err
	}
	out, _, err := b.auditor(ctx, "index", "status", dir)
	if err != nil {
		return err
	}
	var sessions, indexed, objects int
	if _, err := fmt.Sscanf(out, "%d sessions, %d indexed, in %d objects of the index", &sessions, &indexed, &objects); err != nil || indexed != b.listed {
		return fmt.Errorf("index status: %s", out)
	}
	var took samples
	for range b.slow() {
		out, d, err := b.auditor(ctx, "list", dir, "-o", "json")
		if err != nil {
			return err
		}
		if n := strings.Count(out, "\n"); n != b.listed {
			return fmt.Errorf("list: %d sessions of %d", n, b.listed)
		}
		took.duration(d)
	}
	t := b.report.table("A list of many sessions", "sessions", "`list`, s", "objects read")
	t.row(strconv.Itoa(b.listed), took.text(), strconv.Itoa(objects))
	t.note("From a directory in memory, all of the gate's index. Each object more is a request to a bucket.")
	b.report.aim(objects <= 500, fmt.Sprintf("`list` over %d sessions reads hundreds of objects", b.listed), strconv.Itoa(objects))
	return nil
}

// writeSessions writes n sessions as of a busy gate, two at a time, a login each 26 seconds.
func writeSessions(ctx context.Context, l *auditlog.Log, n int) error {
	start := time.Date(2026, 1, 1, 0, 0, 0, 0, time.UTC)
	one := func(i int) error {
		r := l.New(fmt.Sprintf("session-%06d", i))
		at := start.Add(time.Duration(i) * 26 * time.Second)
		record := func(channel uint32, body auditlog.Body) error {
			r.SetTime(at)
			at = at.Add(time.Second)
			return r.Record(channel, body)
		}
		user := fmt.Sprintf("user-%d", i%200)
		err := errors.Join(record(0, &auditlog.Connect{Source: fmt.Sprintf("192.0.2.%d:%d", i%250, 1024+i%60000)}),
			record(0, &auditlog.Authenticate{User: user, Method: "publickey", Result: "proven"}), r.Begin(),
			record(0, &auditlog.Decision{User: user, Ticket: fmt.Sprintf("OPS-%d", i/10), Profile: "payments-debug", Allow: true}),
			record(1, &auditlog.Request{Type: "exec", Command: []byte("id"), OK: true}),
			record(1, &auditlog.Data{Stream: auditlog.Output, Data: []byte("uid=1000(debug)\n")}))
		r.SetTime(at)
		return errors.Join(err, r.Close(&auditlog.End{Cause: "client-left"}))
	}
	const workers = 2
	errs := make([]error, workers)
	var wg sync.WaitGroup
	for w := range workers {
		wg.Go(func() {
			for i := w; i < n && errs[w] == nil; i += workers {
				for i%100 < workers && l.Stats().Waiting > 500 && ctx.Err() == nil { // the store keeps up
					time.Sleep(time.Millisecond)
				}
				errs[w] = errors.Join(one(i), ctx.Err())
			}
		})
	}
	wg.Wait()
	return errors.Join(errs...)
}

// pace lets bytes pass at a rate: a receiver, or a sender, on a network of its own.
type pace struct {
	io.Reader
	rate  float64 // bytes a second
	began time.Time
	n     int64
}

func (p *pace) wait(n int) {
	if p.began.IsZero() {
		p.began = time.Now()
	}
	p.n += int64(n)
	time.Sleep(time.Until(p.began.Add(time.Duration(float64(p.n) / p.rate * float64(time.Second)))))
}

func (p *pace) Write(b []byte) (int, error) {
	p.wait(len(b))
	return len(b), nil
}

func (p *pace) Read(b []byte) (int, error) {
	n, err := p.Reader.Read(b)
	p.wait(n)
	return n, err
}

// caseRate measures transfers that the network limits, as on most networks: whether the gate keeps up, and how much of a processor
// it takes.
func caseRate(ctx context.Context, b *bench) error {
	const rate = 1e9 / 8
	t := b.report.table("Throughput at 1 Gbit/s", "transfer", "recording off, MiB/s", "Sallyport, MiB/s", "on / off", "encrypted, MiB/s", "encrypted / off",
		"share of a processor: recording off", "on", "encrypted")
	off, on, encrypted := &b.off.target, &b.gate.target, &b.encrypted.target
	worst := [2]float64{1e9, 1e9}
	for _, f := range []flow{{"text", aes, false, b.content}, {"text", aes, true, b.content}, {"random", aes, false, b.content}} {
		got, share := byTarget{}, byTarget{}
		do := func(x *target) error {
			g := b.gateOf(x)
			m, err := b.client.connect(ctx, x, f.cipher)
			if err != nil {
				return err
			}
			defer m.close()
			before, err := x.cpu()
			if err != nil {
				return err
			}
			p := &pace{rate: rate}
			began := time.Now()
			if f.up {
				in, err := os.Open(b.path("demo", "production", f.content))
				if err != nil {
					return err
				}
				defer in.Close()
				var out bytes.Buffer
				p.Reader = in
				err = m.run(ctx, p, &out, "wc -c")
				if n := strings.TrimSpace(out.String()); err == nil && n != strconv.FormatInt(f.size, 10) {
					err = fmt.Errorf("%s bytes arrived of %d", n, f.size)
				}
				if err != nil {
					return err
				}
			} else {
				if err := m.run(ctx, nil, p, "cat "+x.data+"/"+f.content); err != nil {
					return err
				}
				if p.n != f.size {
					return fmt.Errorf("%d bytes arrived of %d", p.n, f.size)
				}
			}
			took := time.Since(began)
			m.close()
			if err := g.settle(ctx, b); err != nil {
				return err
			}
			after, err := x.cpu()
			if err != nil {
				return err
			}
			got.of(x).add(float64(f.size) / mib / took.Seconds())
			share.of(x).add((after - before).Seconds() / took.Seconds())
			_, err = g.takeLog()
			return err
		}
		if err := b.inTurn(ctx, b.slow(), b.turn(off, do), b.turn(on, do), b.turn(encrypted, do)); err != nil {
			return fmt.Errorf("%v: %w", f, err)
		}
		percent := func(x *target) string { return fmt.Sprintf("%.0f %%", 100*share.of(x).median()) }
		t.row(f.String(), got.of(off).text(), got.of(on).text(), got.of(on).ratio(*got.of(off)), got.of(encrypted).text(),
			got.of(encrypted).ratio(*got.of(off)), percent(off), percent(on), percent(encrypted))
		worst[0] = min(worst[0], got.of(on).median()/got.of(off).median())
		worst[1] = min(worst[1], got.of(encrypted).median()/got.of(off).median())
		b.say("  %v: off %s, on %s, encrypted %s MiB/s; of a processor %s, %s, %s", f, got.of(off).text(), got.of(on).text(), got.of(encrypted).text(),
			percent(off), percent(on), percent(encrypted))
	}
	t.note("The receiver takes, or the sender sends, 119 MiB/s at most. The share is of the gate's processor time until all is stored, over the transfer's time.")
	b.report.aim(worst[0] >= 0.9, "at 1 Gbit/s: with recording at least 0.9 of the throughput without it", fmt.Sprintf("%.2f at worst", worst[0]))
	b.report.aim(worst[1] >= 0.85, "at 1 Gbit/s: with recording, encrypted, at least 0.85 of the throughput without it", fmt.Sprintf("%.2f at worst", worst[1]))
	return nil
}
