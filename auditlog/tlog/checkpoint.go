package tlog

import (
	"bytes"
	"crypto"
	"crypto/ed25519"
	"encoding/base64"
	"encoding/binary"
	"errors"
	"fmt"
	"strconv"
	"strings"
	"time"

	"golang.org/x/mod/sumdb/note"
)

const (
	checkpointMagic = "sallyport checkpoint v1\n"
	// MaxCheckpointEntries is the most leaves that one checkpoint carries.
	MaxCheckpointEntries = 4096
	// MaxCheckpointBytes is the most bytes that a checkpoint's object has.
	MaxCheckpointBytes = 4 << 20
)

// Checkpoint is a numbered checkpoint with the leaves since the one before.
type Checkpoint struct {
	Gate, Log string
	Number    uint32
	Time      time.Time // UTC, by the gate's clock
	Old       int64     // size of the tree at the checkpoint before
	Size      int64
	Root      Hash
	Key       ed25519.PublicKey // that signed; says nothing of whose it is
	Closed    bool              // the gate stopped, and all of its logs are in the store: nothing follows, unless it starts again
	Entries   [][]byte          // Size - Old of them
	Signature []byte
}

// Origin names the log.
func (c *Checkpoint) Origin() string { return Origin(c.Gate, c.Log) }

// closedLine is the last line of a checkpoint that is Closed.
const closedLine = "closed"

// text is what is signed: a C2SP checkpoint with three lines more, or four.
func (c *Checkpoint) text() string {
	s := fmt.Sprintf("%s\n%d\n%s\nnumber %d\ntime %s\nkey %s\n", c.Origin(), c.Size, base64.StdEncoding.EncodeToString(c.Root[:]),
		c.Number, c.Time.UTC().Format(time.RFC3339Nano), base64.StdEncoding.EncodeToString(c.Key))
	if c.Closed {
		s += closedLine + "\n"
	}
	return s
}

// Note is the checkpoint alone, as a C2SP signed note: what is worth keeping elsewhere.
func (c *Checkpoint) Note() ([]byte, error) {
	v, err := verifier(c.Origin(), c.Key)
	if err != nil {
		return nil, err
	}
	b := append([]byte(c.text()), "\n— "+c.Origin()+" "...)
	sig := append(binary.BigEndian.AppendUint32(nil, v.KeyHash()), c.Signature...)
	return append(base64.StdEncoding.AppendEncode(b, sig), '\n'), nil
}

// Encode gives the object's bytes.
func (c *Checkpoint) Encode() ([]byte, error) {
	b := fmt.Appendf([]byte(checkpointMagic), "old %d\n", c.Old)
	for _, e := range c.Entries {
		b = append(b, "leaf "...)
		b = append(base64.StdEncoding.AppendEncode(b, e), '\n')
	}
	n, err := c.Note()
	if err != nil {
		return nil, err
	}
	return append(append(b, '\n'), n...), nil
}

// Sign signs the checkpoint with an Ed25519 key.
func (c *Checkpoint) Sign(key crypto.Signer) error {
	pub, ok := key.Public().(ed25519.PublicKey)
	if !ok {
		return errors.New("not an ed25519 key")
	}
	c.Key = pub
	sig, err := key.Sign(nil, []byte(c.text()), crypto.Hash(0))
	if err != nil {
		return err
	}
	if !ed25519.Verify(pub, []byte(c.text()), sig) {
		return errors.New("what should sign gave a signature that does not verify")
	}
	c.Signature = sig
	return nil
}

// verifier is the note key: name, algorithm Ed25519, and the key (C2SP signed-note).
func verifier(name string, key ed25519.PublicKey) (note.Verifier, error) {
	vkey, err := note.NewEd25519VerifierKey(name, key)
	if err != nil {
		return nil, err
	}
	return note.NewVerifier(vkey)
}

// ParseCheckpoint reads a checkpoint's object. Every byte counts: what it accepts is exactly what Encode gives, signed by the
// key that it names. Whose key that is, and whether the leaves are the tree's, is for the caller.
func ParseCheckpoint(b []byte) (*Checkpoint, error) {
	if len(b) > MaxCheckpointBytes {
		return nil, fmt.Errorf("checkpoint: larger than %d bytes", MaxCheckpointBytes)
	}
	rest, ok := bytes.CutPrefix(b, []byte(checkpointMagic))
	head, signed, cut := bytes.Cut(rest, []byte("\n\n"))
	if !ok || !cut {
		return nil, errors.New("checkpoint: not one")
	}
	lines := strings.Split(string(head), "\n")
	old, err := parseField(lines[0], "old ")
	if err != nil {
		return nil, err
	}
	if len(lines)-1 > MaxCheckpointEntries {
		return nil, errors.New("checkpoint: too many leaves")
	}
	var entries [][]byte
	for _, l := range lines[1:] {
		text, ok := strings.CutPrefix(l, "leaf ")
		e, err := base64.StdEncoding.DecodeString(text)
		if !ok || err != nil || len(e) > MaxEntry {
			return nil, errors.New("checkpoint: a leaf that is none")
		}
		entries = append(entries, e)
	}
	c, err := ParseNote(signed)
	if err != nil {
		return nil, err
	}
	c.Old, c.Entries = old, entries
	if c.Size-c.Old != int64(len(entries)) {
		return nil, fmt.Errorf("checkpoint: %d leaves, from size %d to %d", len(entries), c.Old, c.Size)
	}
	again, err := c.Encode()
	if err != nil || !bytes.Equal(again, b) {
		return nil, errors.New("checkpoint: not as it was written")
	}
	return c, nil
}

// ParseNote reads a checkpoint without its leaves, as Note gives it. Signatures of others, which a witness may have added, are
// ignored.
func ParseNote(b []byte) (*Checkpoint, error) {
	if len(b) > MaxCheckpointBytes {
		return nil, fmt.Errorf("checkpoint: larger than %d bytes", MaxCheckpointBytes)
	}
	text, _, ok := bytes.Cut(b, []byte("\n\n"))
	lines := strings.Split(string(text), "\n")
	if !ok || len(lines) != 6 && len(lines) != 7 {
		return nil, errors.New("checkpoint: not a note of six lines or seven")
	}
	c := &Checkpoint{Closed: len(lines) == 7} // whether the seventh is the right one is seen below
	var err error
	if c.Gate, c.Log, err = ParseOrigin(lines[0]); err != nil {
		return nil, fmt.Errorf("checkpoint: %w", err)
	}
	if c.Size, err = parseField(lines[1], ""); err != nil {
		return nil, err
	}
	root, err := base64.StdEncoding.DecodeString(lines[2])
	if err != nil || len(root) != len(c.Root) {
		return nil, errors.New("checkpoint: no root hash")
	}
	c.Root = Hash(root)
	number, err := parseField(lines[3], "number ")
	if err != nil || number > maxNumber {
		return nil, errors.New("checkpoint: no number")
	}
	c.Number = uint32(number)
	stamp, ok := strings.CutPrefix(lines[4], "time ")
	if c.Time, err = time.Parse(time.RFC3339Nano, stamp); !ok || err != nil {
		return nil, errors.New("checkpoint: no time")
	}
	key, ok := strings.CutPrefix(lines[5], "key ")
	if c.Key, err = base64.StdEncoding.DecodeString(key); !ok || err != nil || len(c.Key) != ed25519.PublicKeySize {
		return nil, errors.New("checkpoint: no key")
	}
	if c.text() != string(text)+"\n" {
		return nil, errors.New("checkpoint: not as it was written")
	}
	v, err := verifier(c.Origin(), c.Key)
	if err != nil {
		return nil, fmt.Errorf("checkpoint: %w", err)
	}
	n, err := note.Open(b, note.VerifierList(v))
	if err != nil {
		return nil, errors.New("checkpoint: wrong signature")
	}
	sig, err := base64.StdEncoding.DecodeString(n.Sigs[0].Base64)
	if err != nil || len(sig) != 4+ed25519.SignatureSize {
		return nil, errors.New("checkpoint: wrong signature")
	}
	c.Signature = sig[4:]
	return c, nil
}

// ParseNotes reads notes that follow each other.
func ParseNotes(b []byte) ([]*Checkpoint, error) {
	var all []*Checkpoint
	var cur []byte
	signed := false
	flush := func() error {
		c, err := ParseNote(cur)
		all, cur, signed = append(all, c), nil, false
		return err
	}
	for line := range bytes.Lines(b) {
		isSignature := bytes.HasPrefix(line, []byte("— "))
		if signed && !isSignature {
			if err := flush(); err != nil {
				return nil, err
			}
		}
		if len(cur) == 0 && len(bytes.TrimSpace(line)) == 0 {
			continue
		}
		cur, signed = append(cur, line...), signed || isSignature
	}
	if len(cur) > 0 {
		if err := flush(); err != nil {
			return nil, err
		}
	}
	if len(all) == 0 {
		return nil, errors.New("no checkpoint in it")
	}
	return all, nil
}

// parseField reads a number after a word, in the one way to write it.
func parseField(line, word string) (int64, error) {
	text, ok := strings.CutPrefix(line, word)
	v, err := strconv.ParseInt(text, 10, 64)
	if !ok || err != nil || v < 0 || strconv.FormatInt(v, 10) != text {
		return 0, fmt.Errorf("checkpoint: %.80q: want %sNUMBER", line, word)
	}
	return v, nil
}
