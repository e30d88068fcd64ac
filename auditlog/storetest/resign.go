package storetest

import (
	"bytes"
	"crypto/ed25519"
	"crypto/sha256"
	"encoding/binary"
	"hash/crc32"
	"testing"
)

// Resign gives a segment whose frames' payloads were changed, and all sums and the signature made to fit: what who has the gate's key
// could write. change keeps the length.
func Resign(t testing.TB, segment []byte, key ed25519.PrivateKey, change func(payload []byte)) []byte {
	t.Helper()
	const prefix, frameHeader, crcBytes = 12, 28, 4
	b := bytes.Clone(segment)
	castagnoli := crc32.MakeTable(crc32.Castagnoli)
	for at := prefix + int(binary.BigEndian.Uint16(b[10:])) + crcBytes; at < len(b); {
		head := b[at : at+frameHeader]
		payload := b[at+frameHeader:][:binary.BigEndian.Uint32(head[4:])]
		if head[0] == 1 {
			change(payload)
		} else {
			statement := payload[:len(payload)-ed25519.SignatureSize]
			if !bytes.Equal(statement[1:4], []byte{0x01, 0x58, sha256.Size}) { // key 1: a string of so many bytes
				t.Fatalf("footer: %x", statement)
			}
			sum := sha256.Sum256(b[:at])
			copy(statement[4:], sum[:])
			sum = sha256.Sum256(statement)
			copy(payload[len(statement):], ed25519.Sign(key, append([]byte("sallyport auditlog segment footer v1\n"), sum[:]...)))
		}
		crc := crc32.Update(crc32.Checksum(head[:frameHeader-crcBytes], castagnoli), castagnoli, payload)
		binary.BigEndian.PutUint32(head[frameHeader-crcBytes:], crc)
		at += frameHeader + len(payload)
	}
	return b
}
