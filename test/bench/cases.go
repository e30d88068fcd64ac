package main

import (
	"bytes"
	"context"
	"crypto/ed25519"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"math/rand/v2"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"sync"
	"time"

	"golang.org/x/crypto/ssh"

	"github.com/sallyport/sallyport/auditlog/transfer"
	"github.com/sallyport/sallyport/authz"
)

const (
	latency = "Latency"
	mib     = 1 << 20
)

func (b *bench) latency() *table {
	return b.report.table(latency, "figure", "sshd", "Sallyport", "ratio", "bare Docker")
}

// turn is what one target does in a round.
type turn struct {
	name string
	rest func(context.Context) error // before
	do   func() error
}

// inTurn lets each have its turn in every round, and begins each round with the next one.
func (b *bench) inTurn(ctx context.Context, rounds int, turns ...turn) error {
	for r := range rounds {
		for i := range turns {
			t := turns[(r+i)%len(turns)]
			if err := ctx.Err(); err != nil {
				return err
			}
			if err := t.rest(ctx); err != nil {
				return fmt.Errorf("%s: %w", t.name, err)
			}
			if err := t.do(); err != nil {
				return fmt.Errorf("%s: %w", t.name, err)
			}
		}
	}
	for _, t := range turns {
		if err := t.rest(ctx); err != nil {
			return fmt.Errorf("%s: %w", t.name, err)
		}
	}
	return nil
}

func (b *bench) turn(t *target, do func(*target) error) turn {
	return turn{t.name, func(ctx context.Context) error { return t.rest(ctx, b) }, func() error { return do(t) }}
}

func (b *bench) bareTurn(do func() error) turn { return turn{"bare Docker", b.engine.settle, do} }

// byTarget holds samples of each target.
type byTarget map[*target]*samples

func (m byTarget) of(t *target) *samples {
	if m[t] == nil {
		m[t] = new(samples)
	}
	return m[t]
}

func caseTrue(ctx context.Context, b *bench) error {
	var (
		whole, total                 = byTarget{}, byTarget{}
		handshake, open, reply, exit = byTarget{}, byTarget{}, byTarget{}, byTarget{}
		create, start, wait, engine  samples
	)
	openSSH := func(t *target) error {
		began := time.Now()
		err := b.client.ssh(ctx, t, aes, nil, nil, nil, "true")
		whole.of(t).duration(time.Since(began))
		return err
	}
	inGo := func(t *target) error {
		began := time.Now()
		c, err := b.client.dial(ctx, t)
		if err != nil {
			return err
		}
		defer c.Close()
		p, err := c.runTrue()
		total.of(t).duration(time.Since(began))
		handshake.of(t).duration(c.handshake)
		open.of(t).duration(p.open)
		reply.of(t).duration(p.reply)
		exit.of(t).duration(p.exit)
		return err
	}
	bare := func() error {
		t, err := b.engine.once(ctx)
		create.duration(t.create)
		start.duration(t.start)
		wait.duration(t.wait)
		engine.duration(t.total())
		return err
	}
	sshd, gate := &b.sshd.target, &b.gate.target
	err := b.inTurn(ctx, b.rounds, b.turn(sshd, openSSH), b.turn(gate, openSSH), b.bareTurn(bare),
		b.turn(sshd, inGo), b.turn(gate, inGo))
	if err != nil {
		return err
	}
	b.latency().row("`ssh target true`, ms",
		whole.of(sshd).ms(), whole.of(gate).ms(), whole.of(gate).ratio(*whole.of(sshd)), engine.ms())

	t := b.report.table("Where the time of `true` goes", "step, ms", "sshd", "Sallyport")
	for _, row := range []struct {
		name string
		m    byTarget
	}{
		{"connect, key exchange, authentication", handshake}, {"channel", open}, {"exec's reply", reply},
		{"exit status", exit}, {"all, client in Go", total}, {"all, OpenSSH's client", whole},
	} {
		t.row(row.name, row.m.of(sshd).ms(), row.m.of(gate).ms())
	}
	t.row("bare Docker: create", "", create.ms())
	t.row("bare Docker: start", "", start.ms())
	t.row("bare Docker: `true` and its end", "", wait.ms())
	own := whole.of(sshd).median() - total.of(sshd).median()
	floor := create.median() + start.median() + handshake.of(gate).median() + own
	t.row("**floor**: create + start + the gate's handshake + the client's own", "", number(floor*1000))
	t.note("The client's own time is what OpenSSH's client takes longer than the one in Go with sshd: %s ms.",
		number(own*1000))
	ratio := whole.of(gate).median() / floor
	b.report.aim(ratio <= 1.15, "`ssh gate true` at most 1.15 × its floor", fmt.Sprintf("%.2f", ratio))
	return nil
}

func casePrompt(ctx context.Context, b *bench) error {
	took := byTarget{}
	prompt := func(t *target) error {
		args := append(b.client.options(t, aes), "-tt", t.login())
		cmd, cancel := command(ctx, "ssh", args...)
		defer cancel()
		out := newTail()
		cmd.Stdout, cmd.Stderr = out, out
		in, err := cmd.StdinPipe()
		if err != nil {
			return err
		}
		began := time.Now()
		if err := cmd.Start(); err != nil {
			return err
		}
		err = out.wait(isPrompt)
		took.of(t).duration(time.Since(began))
		io.WriteString(in, "exit\n") // if it can't be, Wait says so
		return errors.Join(err, cmd.Wait())
	}
	sshd, gate := &b.sshd.target, &b.gate.target
	if err := b.inTurn(ctx, b.rounds, b.turn(sshd, prompt), b.turn(gate, prompt)); err != nil {
		return err
	}
	b.latency().row("connect to prompt, ms",
		took.of(sshd).ms(), took.of(gate).ms(), took.of(gate).ratio(*took.of(sshd)), "")
	return nil
}

func caseEcho(ctx context.Context, b *bench) error {
	took := byTarget{}
	echo := func(t *target) error {
		c, err := b.client.dial(ctx, t)
		if err != nil {
			return err
		}
		defer c.Close()
		sh, err := c.shell()
		if err != nil {
			return err
		}
		for i := range b.keys {
			time.Sleep(20 * time.Millisecond) // as fast as fingers can be
			key := []byte{'a' + byte(i%26)}
			sh.out.clear()
			began := time.Now()
			if _, err := sh.in.Write(key); err != nil {
				return err
			}
			if err := sh.out.wait(func(text []byte) bool { return bytes.Contains(text, key) }); err != nil {
				return err
			}
			took.of(t).duration(time.Since(began))
		}
		return nil
	}
	sshd, gate := &b.sshd.target, &b.gate.target
	if err := b.inTurn(ctx, b.slow(), b.turn(sshd, echo), b.turn(gate, echo)); err != nil {
		return err
	}
	b.latency().row("echo of a typed key, ms",
		took.of(sshd).ms(), took.of(gate).ms(), took.of(gate).ratio(*took.of(sshd)), "")
	return nil
}

func caseBurst(ctx context.Context, b *bench) error {
	took := byTarget{}
	var bare samples
	failed := map[string]int{}
	all := func(name string, one func() error) time.Duration {
		errs := make([]error, b.burst)
		var wg sync.WaitGroup
		began := time.Now()
		for i := range errs {
			wg.Go(func() { errs[i] = one() })
		}
		wg.Wait()
		d := time.Since(began)
		for _, err := range errs {
			if err != nil {
				failed[name]++
				b.say("burst: %s: %v", name, err)
			}
		}
		return d
	}
	login := func(t *target) error {
		took.of(t).duration(all(t.name, func() error { return b.client.ssh(ctx, t, aes, nil, nil, nil, "true") }))
		return nil
	}
	engine := func() error {
		bare.duration(all("bare Docker", func() error { _, err := b.engine.once(ctx); return err }))
		return nil
	}
	sshd, gate := &b.sshd.target, &b.gate.target
	if err := b.inTurn(ctx, b.slow(), b.turn(sshd, login), b.turn(gate, login), b.bareTurn(engine)); err != nil {
		return err
	}
	cell := func(s samples, name string) string {
		return fmt.Sprintf("%s, %d failed", s.text(), failed[name])
	}
	b.latency().row(fmt.Sprintf("%d logins at once, `true`, until the last is over, s", b.burst),
		cell(*took.of(sshd), sshd.name), cell(*took.of(gate), gate.name), took.of(gate).ratio(*took.of(sshd)),
		cell(bare, "bare Docker"))
	return nil
}

// flow is one kind of transfer.
type flow struct {
	content string // a file's name
	cipher  string
	up      bool
	size    int64
}

func (f flow) String() string {
	way := "down"
	if f.up {
		way = "up"
	}
	cipher, _, _ := strings.Cut(f.cipher, "@")
	return fmt.Sprintf("%s of %s %s, %s", size(f.size), f.content, way, cipher)
}

// passed is what was measured of one flow and target.
type passed struct {
	rate samples // MiB a second
	cpu  samples // seconds of the server's processor time for a GiB
	log  samples // KiB of log for a MiB
}

func caseTransfer(ctx context.Context, b *bench) error {
	t := b.report.table("Throughput", "transfer", "sshd, MiB/s", "Sallyport, MiB/s", "ratio", "recording off, MiB/s",
		"on / off", "encrypted, MiB/s", "encrypted / off", "CPU s/GiB: sshd", "gate", "gate, recording off", "gate, encrypted", "log KiB per MiB")
	var flows []flow
	for _, cipher := range []string{aes, chacha} {
		flows = append(flows, flow{"zeros", cipher, false, b.bulk}, flow{"zeros", cipher, true, b.bulk})
	}
	for _, content := range []string{"text", "random"} {
		flows = append(flows, flow{content, aes, false, b.content}, flow{content, aes, true, b.content})
	}
	type ratios struct{ sshd, off, encrypted float64 } // the worst
	bulk, content := ratios{1e9, 1e9, 1e9}, ratios{1e9, 1e9, 1e9}
	sshd, gate, off, encrypted := &b.sshd.target, &b.gate.target, &b.off.target, &b.encrypted.target
	for _, f := range flows {
		if !b.flows.MatchString(f.String()) {
			continue
		}
		got := map[*target]*passed{}
		for _, x := range b.all() {
			got[x] = &passed{}
		}
		do := func(x *target) error { return b.transfer(ctx, f, x, got[x]) }
		if err := b.inTurn(ctx, b.slow(), b.turn(sshd, do), b.turn(gate, do), b.turn(off, do), b.turn(encrypted, do)); err != nil {
			return fmt.Errorf("%v: %w", f, err)
		}
		b.say("  %v: sshd %s, Sallyport %s, recording off %s, encrypted %s MiB/s",
			f, got[sshd].rate.text(), got[gate].rate.text(), got[off].rate.text(), got[encrypted].rate.text())
		t.row(f.String(), got[sshd].rate.text(), got[gate].rate.text(), got[gate].rate.ratio(got[sshd].rate),
			got[off].rate.text(), got[gate].rate.ratio(got[off].rate), got[encrypted].rate.text(), got[encrypted].rate.ratio(got[off].rate),
			number(got[sshd].cpu.median()), number(got[gate].cpu.median()), number(got[off].cpu.median()), number(got[encrypted].cpu.median()),
			number(got[gate].log.median()))
		worst := &content
		if f.content == "zeros" {
			worst = &bulk
		}
		worst.sshd = min(worst.sshd, got[gate].rate.median()/got[sshd].rate.median())
		worst.off = min(worst.off, got[gate].rate.median()/got[off].rate.median())
		worst.encrypted = min(worst.encrypted, got[encrypted].rate.median()/got[off].rate.median())
	}
	t.note("sshd's processor time holds its program's (cat, wc); the gate's sandboxes are apart. " +
		"Log: what lies in the store after one session.")
	for _, a := range []struct {
		of    string
		worst ratios
	}{{size(b.bulk) + " of zeros", bulk}, {"text and random bytes", content}} {
		if a.worst.sshd == 1e9 {
			continue // left out by -flows
		}
		b.report.aim(a.worst.sshd >= 0.6, a.of+": with recording at least 0.6 of sshd's throughput, each way and cipher",
			fmt.Sprintf("%.2f at worst", a.worst.sshd))
		b.report.aim(a.worst.off >= 0.9, a.of+": with recording at least 0.9 of the throughput without it",
			fmt.Sprintf("%.2f at worst", a.worst.off))
		b.report.aim(a.worst.encrypted >= 0.85, a.of+": with recording, encrypted, at least 0.85 of the throughput without it",
			fmt.Sprintf("%.2f at worst", a.worst.encrypted))
	}
	return nil
}

func (b *bench) transfer(ctx context.Context, f flow, t *target, got *passed) error {
	g := b.gateOf(t)
	if g != nil {
		if _, err := g.takeLog(); err != nil {
			return err
		}
	}
	m, err := b.client.connect(ctx, t, f.cipher)
	if err != nil {
		return err
	}
	defer m.close()
	before, err := t.cpu()
	if err != nil {
		return err
	}
	var took time.Duration
	if f.up {
		in, err := os.Open(b.path("demo", "production", f.content))
		if err != nil {
			return err
		}
		defer in.Close()
		var out bytes.Buffer
		began := time.Now()
		if err := m.run(ctx, in, &out, "wc -c"); err != nil {
			return err
		}
		took = time.Since(began)
		if n := strings.TrimSpace(out.String()); n != strconv.FormatInt(f.size, 10) {
			return fmt.Errorf("%s bytes arrived of %d", n, f.size)
		}
	} else {
		null, err := os.OpenFile(os.DevNull, os.O_WRONLY, 0)
		if err != nil {
			return err
		}
		defer null.Close()
		began := time.Now()
		if err := m.run(ctx, nil, null, "cat "+t.data+"/"+f.content); err != nil {
			return err
		}
		took = time.Since(began)
	}
	after, err := t.cpu()
	m.close()
	if err != nil {
		return err
	}
	if g != nil { // what it has still to compress and to store is part of the cost
		if err := g.settle(ctx, b); err != nil {
			return err
		}
		if after, err = t.cpu(); err != nil {
			return err
		}
		n, err := g.takeLog()
		if err != nil {
			return err
		}
		got.log.add(float64(n) / 1024 / (float64(f.size) / mib))
	}
	got.rate.add(float64(f.size) / mib / took.Seconds())
	got.cpu.add((after - before).Seconds() * (1 << 30) / float64(f.size))
	return nil
}

func (b *bench) gateOf(t *target) *gate {
	switch t {
	case &b.gate.target:
		return b.gate
	case &b.off.target:
		return b.off
	case &b.encrypted.target:
		return b.encrypted
	}
	return nil
}

func caseSFTP(ctx context.Context, b *bench) error {
	got := map[string]map[*target]*passed{"put": {}, "get": {}}
	for _, ops := range got {
		for _, x := range b.all() {
			ops[x] = &passed{}
		}
	}
	local, back := filepath.Join(b.memory, "file"), filepath.Join(b.memory, "back")
	if err := writeText(local, b.file); err != nil {
		return err
	}
	defer os.Remove(local)
	defer os.Remove(back)
	do := func(t *target) error {
		m, err := b.client.connect(ctx, t, aes)
		if err != nil {
			return err
		}
		defer m.close()
		remote := t.tmp + "/remote"
		if err := b.sftp(ctx, m, "put "+local+" "+remote, got["put"][t]); err != nil {
			return err
		}
		if err := b.sftp(ctx, m, "get "+remote+" "+back, got["get"][t]); err != nil {
			return err
		}
		if err := b.sftp(ctx, m, "rm "+remote, nil); err != nil {
			return err
		}
		if info, err := os.Stat(back); err != nil || info.Size() != b.file {
			return fmt.Errorf("sftp: what came back is not the file: %w", err)
		}
		if g := b.gateOf(t); g != nil {
			m.close()
			if err := g.settle(ctx, b); err != nil {
				return err
			}
			_, err = g.takeLog()
		}
		return err
	}
	sshd, gate, off := &b.sshd.target, &b.gate.target, &b.off.target
	if err := b.inTurn(ctx, b.slow(), b.turn(sshd, do), b.turn(gate, do), b.turn(off, do)); err != nil {
		return err
	}
	t := b.report.table("sftp",
		"transfer", "sshd, MiB/s", "Sallyport, MiB/s", "ratio", "recording off, MiB/s", "on / off",
		"CPU s/GiB: sshd", "gate", "gate, recording off")
	worst := 1e9
	for _, op := range []string{"put", "get"} {
		m := got[op]
		t.row(fmt.Sprintf("%s %s of text, aes128-gcm", op, size(b.file)), m[sshd].rate.text(), m[gate].rate.text(),
			m[gate].rate.ratio(m[sshd].rate), m[off].rate.text(), m[gate].rate.ratio(m[off].rate),
			number(m[sshd].cpu.median()), number(m[gate].cpu.median()), number(m[off].cpu.median()))
		worst = min(worst, m[gate].rate.median()/m[sshd].rate.median())
	}
	up, err := decoding(b.file, true, transfer.ContentHash)
	if err != nil {
		return err
	}
	down, err := decoding(b.file, false, transfer.ContentHash)
	if err != nil {
		return err
	}
	bare, err := decoding(b.file, false, transfer.ContentNone)
	if err != nil {
		return err
	}
	t.note("Recording off leaves out programs' bytes, not the records of files, which are made in both gates. sshd's processor " +
		"time holds its sftp-server's; the gate's sandboxes are apart.")
	t.note("Of the gate's processor time the decoder takes %s s/GiB of a put and %s of a get, nearly all of it the file's SHA-256: "+
		"without that it is %s.", number(up), number(down), number(bare))
	b.report.aim(worst >= 0.5, "sftp, put and get of "+size(b.file)+" with recording: at least half of sshd's throughput",
		fmt.Sprintf("%.2f at worst", worst))
	return nil
}

// sftp has OpenSSH's client do one thing on a connection that is there.
func (b *bench) sftp(ctx context.Context, m *master, op string, got *passed) error {
	before, err := m.t.cpu()
	if err != nil {
		return err
	}
	const now = "!date +%s%N\n" // run here, between the commands of one batch
	args := append(b.client.options(m.t, m.cipher), "-q", "-o", "ControlPath="+m.socket, "-b", "-", m.t.login())
	cmd, cancel := command(ctx, "sftp", args...)
	defer cancel()
	cmd.Stdin = strings.NewReader(now + op + "\n" + now)
	out, err := cmd.CombinedOutput()
	if err != nil {
		return fmt.Errorf("sftp: %w: %s", err, out)
	}
	after, err := m.t.cpu()
	if err != nil || got == nil {
		return err
	}
	var at []time.Duration
	for _, f := range strings.Fields(string(out)) {
		if n, err := strconv.ParseInt(f, 10, 64); err == nil && n > 1e18 {
			at = append(at, time.Duration(n))
		}
	}
	if len(at) != 2 {
		return fmt.Errorf("sftp: two times were to be printed: %s", out)
	}
	got.rate.add(float64(b.file) / mib / (at[1] - at[0]).Seconds())
	got.cpu.add((after - before).Seconds() * (1 << 30) / float64(b.file))
	return nil
}

// decoding gives the processor seconds that the gate's decoder alone takes for a GiB of one file, in packets as OpenSSH's
// client and the sandbox's server send them.
func decoding(n int64, up bool, mode transfer.ContentMode) (float64, error) {
	const content = 255 << 10
	d := transfer.NewSFTP(transfer.Config{
		Server: io.Discard, Client: io.Discard, Mode: mode, Event: func(*transfer.Event) error { return nil },
		Raw: func(transfer.Direction, uint64, []byte) error { return errors.New("undecodable") },
	})
	packet := func(typ byte, fields ...any) []byte {
		b := []byte{0, 0, 0, 0, typ}
		for _, f := range fields {
			switch f := f.(type) {
			case uint32:
				b = binary.BigEndian.AppendUint32(b, f)
			case uint64:
				b = binary.BigEndian.AppendUint64(b, f)
			case string:
				b = append(binary.BigEndian.AppendUint32(b, uint32(len(f))), f...)
			}
		}
		binary.BigEndian.PutUint32(b, uint32(len(b)-4))
		return b
	}
	one, handle := uint32(1), "hand"
	write, data := packet(6, one, handle, uint64(0), string(make([]byte, content))), packet(103, one, string(make([]byte, content)))
	read, ok := packet(5, one, handle, uint64(0), uint32(content)), packet(101, one, uint32(0), "", "")
	// As the streams give it: 32 KiB at once.
	feed := func(to func([]byte) error, b []byte) (err error) {
		for part := range slices.Chunk(b, 32<<10) {
			err = errors.Join(err, to(part))
		}
		return err
	}
	err := errors.Join(d.Client(packet(1, uint32(3))), d.Server(packet(2, uint32(3))),
		d.Client(packet(3, one, "file", uint32(0x1b), uint32(0))), d.Server(packet(102, one, handle)))
	began, berr := cpuTime(os.Getpid())
	err = errors.Join(err, berr)
	for at := int64(0); at < n && err == nil; at += content {
		question, answer := read, data
		if up {
			question, answer = write, ok
		}
		binary.BigEndian.PutUint64(question[17:], uint64(at))
		err = errors.Join(feed(d.Client, question), feed(d.Server, answer))
	}
	ended, eerr := cpuTime(os.Getpid())
	return (ended - began).Seconds() * (1 << 30) / float64(n), errors.Join(err, eerr, d.Finish())
}

// auditProfiles are the users of caseAudit, by what their profiles differ in.
var auditProfiles = map[string]func(map[string]any){
	"audit-off":    func(p map[string]any) { p["exec_audit"], p["cpus"] = "off", 2 },
	"audit-on":     func(p map[string]any) { p["exec_audit"], p["cpus"] = "required", 2 },
	"audit-strict": func(p map[string]any) { p["exec_audit"], p["exec_strict"], p["cpus"] = "required", true, 2 },
}

// caseAudit measures what the audit of executed programs costs them: the same load without it, with it, and with it strict, each
// in a sandbox of its own, timed inside. A load has fewer executions than a session may make without waiting.
func caseAudit(ctx context.Context, b *bench) error {
	n, many := 1500, 1603
	if b.quick {
		n, many = 50, 50
	}
	timed := func(load string) string {
		return "cd /tmp && s=$(date +%s%N) && " + load + " && e=$(date +%s%N) && echo $((e - s))"
	}
	loads := []struct {
		name, command string
		n             int
	}{
		{"execve of a file that is not there", fmt.Sprintf(`perl -e 'for (1..%d) { exec "/nowhere/$_" }'`, n), n},
		{"fork, execve, exit, wait of `true`, one after the other",
			fmt.Sprintf(`perl -e 'for (1..%d) { if (!fork) { exec "/bin/true" } wait }'`, n), n},
		{"`make -j4` of `true`", fmt.Sprintf("/production/make -s -j4 -f /production/tiny.mk N=%d", many), many},
	}
	dir := b.path("demo", "production")
	binary, err := exec.LookPath("make")
	if err != nil {
		return err
	}
	text, err := os.ReadFile(binary)
	if err != nil {
		return err
	}
	const tiny = "all: $(shell seq -f t%g $(N))\nt%:; @/bin/true $@\n"
	err = errors.Join(os.WriteFile(filepath.Join(dir, "make"), text, 0o755), os.WriteFile(filepath.Join(dir, "tiny.mk"), []byte(tiny), 0o644))
	if err != nil {
		return err
	}
	t := b.report.table("The audit of executed programs", "load in the sandbox", "off, µs each", "on, µs each", "more", "strict, µs each", "more")
	for i, load := range loads {
		took := map[string]*samples{}
		var turns []turn
		for _, mode := range []string{"audit-off", "audit-on", "audit-strict"} {
			x := b.gate.target
			x.user, took[mode] = mode, new(samples)
			turns = append(turns, b.turn(&x, func(x *target) error {
				m, err := b.client.connect(ctx, x, aes)
				if err != nil {
					return err
				}
				defer m.close()
				var out bytes.Buffer
				if err := m.run(ctx, nil, &out, timed(load.command)); err != nil {
					return fmt.Errorf("%s: %w", load.name, err)
				}
				ns, err := strconv.ParseInt(strings.TrimSpace(out.String()), 10, 64)
				took[x.user].add(float64(ns) / 1000 / float64(load.n))
				return err
			}))
		}
		if err := b.inTurn(ctx, b.fewer(), turns...); err != nil {
			return err
		}
		off, on, strict := *took["audit-off"], *took["audit-on"], *took["audit-strict"]
		more := func(s samples) string {
			d := s.median() - off.median()
			return fmt.Sprintf("%s µs, %.0f %%", number(d), 100*d/off.median())
		}
		b.say("  %s: off %s, on %s, strict %s µs", load.name, off.text(), on.text(), strict.text())
		t.row(load.name, off.text(), on.text(), more(on), strict.text(), more(strict))
		switch d := on.median() - off.median(); i {
		case 0:
			b.report.aim(d <= 60, "the audit takes at most 60 µs of an execve", number(d)+" µs")
		case 2:
			b.report.aim(d/off.median() <= 0.3, "the audit takes at most 30 % of the worst load, `make -j4` of nothing but `true`",
				fmt.Sprintf("%.0f %%", 100*d/off.median()))
		}
	}
	t.note("On one machine with the gate, on whose processors the sandbox's agent and the gate record while the load runs. An execution that " +
		"comes about is two calls that wait for the agent, one that fails is one.")
	return nil
}

func caseDecision(_ context.Context, b *bench) error {
	t := b.report.table("Decisions", "users and grants", "load, ms", "one login decision, µs")
	for _, n := range b.grants {
		dir, err := os.MkdirTemp(b.root, "data-")
		if err != nil {
			return err
		}
		key, err := writeGrants(dir, n)
		if err != nil {
			return err
		}
		began := time.Now()
		e, err := authz.Open(authz.Config{Data: dir}, slog.New(slog.DiscardHandler))
		if err != nil {
			return err
		}
		loaded := time.Since(began)
		var took samples
		for i := range b.decision {
			in := authz.LoginInput{User: fmt.Sprintf("user%d", (i*7919)%n), Source: "192.0.2.7", Key: key}
			began := time.Now()
			d, err := e.Login(context.Background(), in)
			took.duration(time.Since(began))
			if err != nil || !d.Allow {
				return errors.Join(fmt.Errorf("the decision was %q", d.Reason), err, e.Close())
			}
		}
		if err := e.Close(); err != nil {
			return err
		}
		t.row(strconv.Itoa(n), number(loaded.Seconds()*1000), took.scaled(1e6).text())
	}
	return nil
}

// writeGrants writes policy data of n users with a grant each; all of them have the key that it gives.
func writeGrants(dir string, n int) (authz.Key, error) {
	// Any ed25519 key will do: nothing is signed.
	pub, err := ssh.NewPublicKey(ed25519.PublicKey(make([]byte, ed25519.PublicKeySize)))
	if err != nil {
		return authz.Key{}, err
	}
	line := strings.TrimSpace(string(ssh.MarshalAuthorizedKey(pub)))
	key := authz.Key{Type: pub.Type(), Fingerprint: ssh.FingerprintSHA256(pub), Line: line}
	until := time.Now().Add(time.Hour).UTC().Format(time.RFC3339)
	var users, grants strings.Builder
	for i := range n {
		sep := ","
		if i == 0 {
			sep = "{"
		}
		fmt.Fprintf(&users, "%s\"user%d\":{\"keys\":[%q]}\n", sep, i, line)
		fmt.Fprintf(&grants, `%s"user%d":{"T-1":{"profile":"debug","not_after":%q,"sources":["192.0.2.0/24"]}}`+"\n",
			sep, i, until)
	}
	for name, text := range map[string]string{
		"users.json": users.String() + "}", "grants.json": grants.String() + "}",
		"profiles.json": `{"debug":{"image":"sallyport/debug:1","permit":{"shell":true,"exec":true}}}`,
	} {
		if err := os.WriteFile(filepath.Join(dir, name), []byte(text), 0o600); err != nil {
			return key, err
		}
	}
	return key, nil
}

func caseIdle(ctx context.Context, b *bench) error {
	type state struct{ rss, pss, goroutines, descriptors, agent, sshd, processes float64 }
	if err := b.gate.settle(ctx, b); err != nil {
		return err
	}
	if err := b.gate.restart(ctx); err != nil { // what earlier cases left in its heap is not an idle session's
		return err
	}
	var conns []*goConn
	var mu sync.Mutex // guards conns
	defer func() {
		for _, c := range conns {
			c.Close()
		}
	}()
	// Eight at a time.
	open := func(t *target, n int) error {
		slots := make(chan struct{}, 8)
		errs := make([]error, n)
		var wg sync.WaitGroup
		for i := range n {
			slots <- struct{}{}
			wg.Go(func() {
				defer func() { <-slots }()
				c, err := b.client.dial(ctx, t)
				if err != nil {
					errs[i] = err
					return
				}
				mu.Lock()
				conns = append(conns, c)
				mu.Unlock()
				_, errs[i] = c.shell()
			})
		}
		wg.Wait()
		return errors.Join(errs...)
	}
	var states []state
	have := 0
	for _, n := range b.idle {
		for _, t := range []*target{&b.gate.target, &b.sshd.target} {
			if err := open(t, n-have); err != nil {
				return fmt.Errorf("%s: %w", t.name, err)
			}
		}
		have = n
		// A segment with data is cut after 5 s; only then is a session as idle as it will be.
		wait := 12 * time.Second
		if b.quick {
			wait = time.Second
		}
		select {
		case <-time.After(wait):
		case <-ctx.Done():
			return ctx.Err()
		}
		var s state
		pid := b.gate.process.pid()
		m, err := readMemory(pid)
		if err != nil {
			return err
		}
		s.rss, s.pss = m.rss/mib, m.pss/mib
		fds, err := descriptors(pid)
		if err != nil {
			return err
		}
		s.descriptors = float64(fds)
		if s.goroutines, err = b.gate.metric(ctx, "go_goroutines"); err != nil {
			return err
		}
		tree, processes, err := familyMemory(b.sshd.process.pid())
		if err != nil {
			return err
		}
		s.sshd, s.processes = tree.pss/mib, float64(processes)
		if s.agent, err = b.agentMemory(ctx); err != nil {
			return err
		}
		states = append(states, s)
	}
	t := b.report.table("Idle sessions, each with a shell at its prompt", "sessions", "gate RSS, MiB", "PSS, MiB",
		"goroutines", "descriptors", "agent in a sandbox, PSS, MiB", "sshd's tree, PSS, MiB", "sshd's processes")
	row := func(name string, s state) {
		t.row(name, number(s.rss), number(s.pss), number(s.goroutines), number(s.descriptors), number(s.agent),
			number(s.sshd), number(s.processes))
	}
	for i, s := range states {
		row(strconv.Itoa(b.idle[i]), s)
	}
	first, last, n := states[0], states[len(states)-1], float64(have-b.idle[0])
	if n > 0 {
		each := state{
			(last.rss - first.rss) / n, (last.pss - first.pss) / n, (last.goroutines - first.goroutines) / n,
			(last.descriptors - first.descriptors) / n, last.agent, (last.sshd - first.sshd) / n,
			(last.processes - first.processes) / n,
		}
		row("**each**", each)
		b.report.aim(max(each.rss, each.pss) < 0.3, "less than 0.3 MiB of the gate's memory for a session",
			fmt.Sprintf("RSS %s, PSS %s MiB", number(each.rss), number(each.pss)))
	}
	t.note("sshd's tree holds the users' shells; the gate's are in the sandboxes.")
	for _, c := range conns {
		c.Close()
	}
	conns = nil
	if err := b.gate.settle(ctx, b); err != nil {
		return err
	}
	after, err := b.gate.metric(ctx, "go_goroutines")
	if err != nil {
		return err
	}
	fds, err := descriptors(b.gate.process.pid())
	t.note("After all of them have ended: %s goroutines, %d descriptors.", number(after), fds)
	return err
}

// agentMemory is the mean of the sandboxes' agents, in MiB; 0 where it may not be read.
func (b *bench) agentMemory(ctx context.Context) (float64, error) {
	instance, err := b.gate.instance()
	if err != nil {
		return 0, err
	}
	all, err := b.engine.list(ctx, serverLabel+"="+instance)
	if err != nil {
		return 0, err
	}
	var sum samples
	for _, c := range all[:min(len(all), 20)] {
		i, err := b.engine.api.ContainerInspect(ctx, c.ID)
		if err != nil {
			return 0, err
		}
		if m, err := readMemory(i.State.Pid); err == nil {
			sum.add(m.pss / mib)
		}
	}
	return sum.median(), nil
}

// makeData makes the files that are transferred.
func (b *bench) makeData() error {
	dir := b.path("demo", "production")
	zeros, err := os.Create(filepath.Join(dir, "zeros"))
	if err != nil {
		return err
	}
	if err := errors.Join(zeros.Truncate(b.bulk), zeros.Close()); err != nil {
		return err
	}
	if err := writeText(filepath.Join(dir, "text"), b.content); err != nil {
		return err
	}
	random, err := os.Create(filepath.Join(dir, "random"))
	if err != nil {
		return err
	}
	_, err = io.CopyN(random, rand.NewChaCha8([32]byte{1}), b.content)
	return errors.Join(err, random.Close())
}

// writeText writes lines as a service's log has them. They begin anew after 16 MiB, further back than any frame of the
// log can look.
func writeText(name string, n int64) error {
	const block = 16 << 20
	r := rand.New(rand.NewPCG(1, 2))
	var text bytes.Buffer
	at := time.Date(2026, 1, 1, 0, 0, 0, 0, time.UTC)
	for text.Len() < block {
		at = at.Add(time.Duration(r.IntN(40)) * time.Millisecond)
		fmt.Fprintf(&text, "%s %s payments[%d]: order %d: %s %s%d from 10.%d.%d.%d took %d ms, id %016x\n",
			at.Format("2006-01-02T15:04:05.000Z"), []string{"INFO", "INFO", "INFO", "WARN", "ERROR"}[r.IntN(5)],
			1000+r.IntN(20), r.IntN(1_000_000), []string{"GET", "POST", "PUT"}[r.IntN(3)],
			[]string{"/v1/orders/", "/v1/cards/", "/v2/customers/", "/health?n="}[r.IntN(4)], r.IntN(100_000),
			r.IntN(4), r.IntN(256), r.IntN(256), r.IntN(900), r.Uint64())
	}
	f, err := os.Create(name)
	if err != nil {
		return err
	}
	for n > 0 && err == nil {
		part := text.Bytes()[:min(n, block)]
		_, err = f.Write(part)
		n -= int64(len(part))
	}
	return errors.Join(err, f.Close())
}
