package main

import (
	"bytes"
	"crypto/ed25519"
	"crypto/sha256"
	"encoding/binary"
	"fmt"
	"hash/crc32"
	"os"
	"path/filepath"
	"testing"

	"github.com/fxamacker/cbor/v2"
	"github.com/klauspost/compress/zstd"
)

// forged is a record as an attacker would write it: by FORMAT.md, but no gate would.
type forged struct {
	channel uint32
	kind    int
	body    any
}

// forge writes a sealed log of frames that no gate would write. They are compressed, and may hold anything.
func forge(t testing.TB, dir, id string, frames ...[]forged) {
	t.Helper()
	castagnoli := crc32.MakeTable(crc32.Castagnoli)
	mode, err := cbor.CoreDetEncOptions().EncMode()
	if err != nil {
		t.Fatal(err)
	}
	encode := func(v any) []byte {
		out, err := mode.Marshal(v)
		if err != nil {
			t.Fatal(err)
		}
		return out
	}
	z, err := zstd.NewWriter(nil, zstd.WithWindowSize(1<<20), zstd.WithEncoderLevel(zstd.SpeedFastest))
	if err != nil {
		t.Fatal(err)
	}
	defer z.Close()
	const start = 1_772_366_400_000_000_000 // 2026-03-01T12:00:00Z
	var seg bytes.Buffer
	head := encode(map[int]any{1: 1, 2: "gate-1", 3: id, 4: start, 5: 0, 6: make([]byte, 32), 7: start, 8: 0})
	seg.WriteString("\x89SALLY\r\n")
	seg.Write(binary.BigEndian.AppendUint16([]byte{0, 1}, uint16(len(head))))
	seg.Write(head)
	seg.Write(binary.BigEndian.AppendUint32(nil, crc32.Checksum(seg.Bytes(), castagnoli)))
	sequence := uint64(0)
	frame := func(kind, codec byte, payload []byte, decoded, count int, first uint64) {
		h := []byte{kind, codec, 0, 0}
		h = binary.BigEndian.AppendUint32(h, uint32(len(payload)))
		h = binary.BigEndian.AppendUint32(h, uint32(decoded))
		h = binary.BigEndian.AppendUint32(h, uint32(count))
		h = binary.BigEndian.AppendUint64(h, first)
		h = binary.BigEndian.AppendUint32(h, crc32.Update(crc32.Checksum(h, castagnoli), castagnoli, payload))
		seg.Write(h)
		seg.Write(payload)
	}
	for _, records := range frames {
		var b []byte
		first := sequence
		for _, r := range records {
			b = append(b, encode([]any{sequence, start + int64(sequence)*1_000_000, r.channel, r.kind, r.body})...)
			sequence++
		}
		frame(1, 1, z.EncodeAll(b, nil), len(b), len(records), first)
	}
	sum := sha256.Sum256(seg.Bytes())
	statement := encode(map[int]any{1: sum[:], 2: sequence, 3: true, 5: []byte(testKey.Public().(ed25519.PublicKey)), 6: start})
	hash := sha256.Sum256(statement)
	frame(2, 0, append(statement, ed25519.Sign(testKey, append([]byte("sallyport auditlog segment footer v1\n"), hash[:]...))...), len(statement)+64, int(sequence), sequence)
	name := filepath.Join(dir, "sessions/2026/03/01", id, fmt.Sprintf("%08d.seg", 0))
	if err := os.MkdirAll(filepath.Dir(name), 0o755); err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(name, seg.Bytes(), 0o644); err != nil {
		t.Fatal(err)
	}
}

// start are the records that a forged session begins with.
func forgedStart(user string) []forged {
	return []forged{{0, 1, map[int]any{2: "192.0.2.7:1"}}, {0, 3, map[int]any{1: user, 5: "proven"}}, {0, 4, map[int]any{3: true, 5: user, 7: "T"}}}
}
