package auditlog

import (
	"bytes"
	"math/rand/v2"
	"testing"

	"github.com/klauspost/compress/s2"
)

// s2Inputs are records as they come, and as nobody would wish them: each length near a part's, and several parts.
func s2Inputs() [][]byte {
	rng := rand.New(rand.NewPCG(1, 1))
	random := make([]byte, 3*s2Part+77)
	for i := range random {
		random[i] = byte(rng.Uint32())
	}
	line := []byte("2026-11-22T10:00:00Z INFO request path=/v1/payments/4711 status=200\n")
	mixed := bytes.Repeat(append(bytes.Clone(line), random[:40]...), 1000)
	var all [][]byte
	for _, content := range [][]byte{random, make([]byte, len(random)), mixed, bytes.Repeat(line, 1000)} {
		for _, n := range []int{0, 1, 5, 31, 32, 127, 128, s2Part - 1, s2Part, s2Part + 1, s2Part + 5, 2 * s2Part, 2*s2Part + 40, len(random)} {
			all = append(all, content[:n], content[len(content)-n:])
		}
	}
	return all
}

// What parts are encoded to apart is one block, that any decoder of S2 reads; it never takes more than the buffers have.
func TestS2Parts(t *testing.T) {
	for _, in := range s2Inputs() {
		checkS2(t, in)
	}
	frame := make([]byte, frameTarget+dataChunk)
	rand.NewChaCha8([32]byte{1}).Read(frame)
	if out := appendS2(getBuffer(), frame); cap(out) != pooledBytes {
		t.Errorf("a frame of %d bytes does not fit a pooled buffer: %d", len(frame), len(out))
	}
}

func FuzzS2Parts(f *testing.F) {
	for _, in := range s2Inputs() {
		f.Add(in)
	}
	f.Fuzz(func(t *testing.T, in []byte) {
		checkS2(t, in)
		checkS2(t, bytes.Repeat(in, 1+2*s2Part/(len(in)+1))) // several parts, each beginning elsewhere in what is repeated
	})
}

func checkS2(t *testing.T, in []byte) {
	t.Helper()
	before := []byte("before")
	out := appendS2(before, in)
	if !bytes.HasPrefix(out, before) {
		t.Fatalf("%d bytes: what was there is %q", len(in), out[:min(len(out), len(before))])
	}
	block := out[len(before):]
	if most := 5 + len(in) + s2PartExtra*(len(in)/s2Part+1); len(block) > most {
		t.Errorf("%d bytes: a block of %d, more than %d", len(in), len(block), most)
	}
	if n, err := s2.DecodedLen(block); err != nil || n != len(in) {
		t.Fatalf("%d bytes: it says %d (%v)", len(in), n, err)
	}
	got, err := s2.Decode(nil, block)
	if err != nil || !bytes.Equal(got, in) {
		t.Fatalf("%d bytes do not come back (%v)", len(in), err)
	}
}
