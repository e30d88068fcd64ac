package transfer

import (
	"bytes"
	"io"
	"testing"
	"time"
)

// fuzzed feeds a decoder with both directions interleaved: each piece is a byte that says whose it is and how long, and
// the bytes. It returns what came in of each. Errors end the channel, as in the gate; Finish must return.
func fuzzed(t *testing.T, data []byte, d decoder) (in [2][]byte) {
	type piece struct {
		d Direction
		b []byte
	}
	var pieces []piece
	for len(data) > 0 {
		n := min(int(data[0]>>1)+1, len(data)-1)
		pieces = append(pieces, piece{Direction(data[0] & 1), data[1 : 1+n]})
		data = data[1+n:]
	}
	// A call can wait for the other direction, so each has its goroutine; a piece waits only a moment for the one before.
	passed := make(chan struct{}, len(pieces))
	done := [2]chan struct{}{make(chan struct{}), make(chan struct{})}
	queue := [2]chan []byte{make(chan []byte, len(pieces)), make(chan []byte, len(pieces))}
	var took [2][]byte
	for i, give := range []func([]byte) error{d.Client, d.Server} {
		go func() {
			defer close(done[i])
			for b := range queue[i] {
				err := give(b)
				passed <- struct{}{}
				if err != nil {
					return
				}
				took[i] = append(took[i], b...)
			}
		}()
	}
	for _, p := range pieces {
		queue[p.d] <- bytes.Clone(p.b)
		select {
		case <-passed:
		case <-time.After(200 * time.Microsecond):
		}
	}
	close(queue[0])
	close(queue[1])
	for _, c := range done {
		select {
		case <-c:
		case <-time.After(time.Millisecond): // one each: it may wait for what only Finish ends
		}
	}
	if err := d.Finish(); err != nil {
		t.Fatal(err)
	}
	<-done[0]
	<-done[1]
	return took
}

// consistent checks what holds of all events.
func consistent(t *testing.T, r *recording) {
	if len(r.of(Undecodable)) > 1 {
		t.Fatal("undecodable twice")
	}
	ids := map[uint64]bool{}
	for _, e := range r.events {
		if e.Kind == "" || e.End.Before(e.Start) || e.Kind != Undecodable && ids[e.ID] {
			t.Fatalf("%+v", e)
		}
		ids[e.ID] = e.Kind != Undecodable
		for _, f := range []Flow{e.Read, e.Written} {
			n, ok := f.length()
			if f.Whole && f.SHA256 == nil || f.SHA256 != nil && !ok || f.Contiguous && n != f.Bytes || len(f.Ranges) > maxRanges {
				t.Fatalf("%+v", e)
			}
		}
	}
}

// interleaved is the seed of a session.
func interleaved(steps ...[]byte) (seed []byte) {
	for i, b := range steps {
		for len(b) > 0 {
			n := min(len(b), 128)
			seed = append(append(seed, byte(n-1)<<1|byte(i&1)), b[:n]...)
			b = b[n:]
		}
	}
	return seed
}

func FuzzSFTP(f *testing.F) {
	var steps [][]byte
	for _, s := range session() {
		steps = append(steps, s.b)
	}
	for mode := range byte(4) {
		f.Add(mode, interleaved(steps...))
		f.Add(mode, []byte{7, 'i', 'd'})
	}
	f.Fuzz(func(t *testing.T, mode byte, data []byte) {
		if len(data) > 1<<16 {
			return
		}
		r := newRecording()
		var out [2]bytes.Buffer
		c := r.config(&out[0], &out[1])
		c.Content = func(uint64, Direction, uint64, []byte) error { return nil } // an offset is no size
		c.Mode, c.Resolve = ContentFull, mode&1 != 0
		if mode&2 != 0 {
			c.Decide = func(op *Op) Verdict { return Verdict{MaxSize: 100} }
		}
		in := fuzzed(t, data, NewSFTP(c))
		consistent(t, r)
		if mode&3 == 0 { // what passes is what came, but for an incomplete head
			for d := range in {
				if !bytes.HasPrefix(in[d], out[d].Bytes()) && !bytes.HasPrefix(out[d].Bytes(), in[d]) {
					t.Fatalf("%d: %q became %q", d, in[d], out[d].Bytes())
				}
			}
		}
	})
}

func FuzzSCP(f *testing.F) {
	for mode := range byte(4) {
		f.Add(mode, interleaved([]byte{}, []byte("\x00"), []byte("T1 0 2 0\nD0755 0 d\nC0644 5 f\n"), []byte("\x00\x00\x00"),
			[]byte("hello\x00E\n"), []byte("\x00\x00"), []byte("\x01error\n"), []byte("\x01lost\n")))
	}
	f.Fuzz(func(t *testing.T, mode byte, data []byte) {
		if len(data) > 1<<16 {
			return
		}
		r := newRecording()
		var out [2]bytes.Buffer
		c := r.config(&out[0], &out[1])
		if mode&2 != 0 {
			c.Decide = func(op *Op) Verdict { return Verdict{MaxSize: 100} }
		}
		in := fuzzed(t, data, NewSCP(c, SCPCommand{Sink: mode&1 == 0, Paths: []string{"x"}}))
		consistent(t, r)
		if mode&2 == 0 {
			for d := range in {
				if !bytes.HasPrefix(in[d], out[d].Bytes()) && !bytes.HasPrefix(out[d].Bytes(), in[d]) {
					t.Fatalf("%d: %q became %q", d, in[d], out[d].Bytes())
				}
			}
		}
	})
}

func FuzzParseSCPCommand(f *testing.F) {
	f.Add(`scp -r -p -t -- 'a b' "c\"" d\ e`)
	f.Fuzz(func(t *testing.T, s string) {
		if c, ok := ParseSCPCommand(s); ok && len(c.Paths) == 0 {
			t.Fatal(s)
		}
	})
}

// benchmarkSFTP passes 32 KiB of content a packet, as OpenSSH's client does, in pieces as ssh gives them.
func benchmarkSFTP(b *testing.B, mode ContentMode, upload bool) {
	const n = 32 << 10
	c := newRecording().config(io.Discard, io.Discard)
	c.Mode = mode
	s := NewSFTP(c)
	must := func(err error) {
		if err != nil {
			b.Fatal(err)
		}
	}
	must(s.Client(newPacket(fxpInit).uint32(3).bytes()))
	must(s.Server(newPacket(fxpVersion).uint32(3).bytes()))
	must(s.Client(openPacket(1, "f", FlagRead|FlagWrite)))
	must(s.Server(newPacket(fxpHandle).uint32(1).string("hand").bytes()))
	content := string(make([]byte, n))
	write, data := writePacket(2, "hand", 0, content), dataPacket(2, content)
	read, ok := readPacket(2, "hand", 0, n), statusPacket(2, 0, "")
	b.SetBytes(n)
	b.ReportAllocs()
	b.ResetTimer()
	for i := range uint64(b.N) {
		question, answer := read, data
		if upload {
			question, answer = write, ok
		}
		for j := range 8 {
			question[4+1+4+4+4+j] = byte(i * n >> (56 - 8*j))
		}
		must(s.Client(question))
		must(s.Server(answer))
	}
	b.StopTimer()
	must(s.Finish())
}

func BenchmarkSFTP(b *testing.B) {
	for name, mode := range map[string]ContentMode{"hash": ContentHash, "none": ContentNone} {
		b.Run("upload/"+name, func(b *testing.B) { benchmarkSFTP(b, mode, true) })
		b.Run("download/"+name, func(b *testing.B) { benchmarkSFTP(b, mode, false) })
	}
	b.Run("sha256", func(b *testing.B) { // for comparison
		p := make([]byte, 32<<10)
		h := hasher{}
		b.SetBytes(int64(len(p)))
		for b.Loop() {
			h.begin(h.next, len(p))
			h.part(p)
			h.end()
		}
	})
}
