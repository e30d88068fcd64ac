package auditlog

import (
	"bytes"
	"crypto/cipher"
	"crypto/rand"
	"crypto/sha256"
	"encoding/binary"
	"errors"
	"fmt"
	"io"

	"filippo.io/age"
	"golang.org/x/crypto/chacha20poly1305"

	"github.com/sallyport/sallyport/auditlog/agekeys"
)

// Flags of frames.
const (
	flagEncrypted = 1 << 0 // the payload is encrypted under the segment's key
	flagEnds      = 1 << 1 // of an encrypted frame: its last record is an End, which a restart can't read
)

const (
	tagBytes = chacha20poly1305.Overhead
	// maxWrapped bounds the wrapped key, so that it fits into a header with all else.
	maxWrapped = 60 << 10
)

// frameCipher encrypts and decrypts the frames of one segment: ChaCha20-Poly1305 (RFC 8439) under a key that is made for the
// segment alone.
//
// The nonce is the sequence of the frame's first record. A frame holds at least one record, and sequences only grow, so
// no two frames of a segment share one; a writer whose write failed writes no frame again. A restart has no
// key, and what it adds to a segment is in the clear. The additional data are the hash of the segment's header (log, number,
// segment before, wrapped key) and the frame's header, so a frame decrypts in its own place alone.
type frameCipher struct {
	aead   cipher.AEAD
	header Hash // of the segment's header as stored
}

func newFrameCipher(key []byte, header Hash) (*frameCipher, error) {
	aead, err := chacha20poly1305.New(key)
	if err != nil {
		return nil, err
	}
	return &frameCipher{aead: aead, header: header}, nil
}

func (c *frameCipher) nonce(first uint64) []byte {
	return binary.BigEndian.AppendUint64(make([]byte, chacha20poly1305.NonceSize-8, chacha20poly1305.NonceSize), first)
}

func (c *frameCipher) additional(f frameHeader) []byte {
	return f.appendFields(append(make([]byte, 0, len(c.header)+frameHeaderBytes), c.header[:]...))
}

// seal encrypts a payload, in place if it has room for the tag.
func (c *frameCipher) seal(f frameHeader, payload []byte) []byte {
	return c.aead.Seal(payload[:0], c.nonce(f.first), payload, c.additional(f))
}

// open decrypts a payload in place.
func (c *frameCipher) open(f frameHeader, stored []byte) ([]byte, error) {
	b, err := c.aead.Open(stored[:0], c.nonce(f.first), stored, c.additional(f))
	if err != nil {
		return nil, errors.New("does not decrypt: it is not of this place, or was altered by who could sign it")
	}
	return b, nil
}

// newSegment makes a segment's file, encrypted if the log has recipients, unless it shall be plain.
func (l *Log) newSegment(h Header, plain bool) (*segmentWriter, error) {
	if len(l.recipients) == 0 || plain {
		return createSegment(l.disk, l.cfg.Spool, h)
	}
	key := make([]byte, chacha20poly1305.KeySize)
	rand.Read(key) // never fails (crypto/rand)
	defer clear(key)
	var err error
	if h.Wrapped, err = wrapKey(key, l.recipients); err != nil {
		return nil, err
	}
	header, err := h.encode()
	if err != nil {
		return nil, err
	}
	c, err := newFrameCipher(key, sha256.Sum256(header))
	if err != nil {
		return nil, fmt.Errorf("create segment: %w", err)
	}
	w, err := createSegment(l.disk, l.cfg.Spool, h)
	if w != nil {
		w.cipher = c
	}
	return w, err
}

// wrapKey gives an age file (age-encryption.org/v1) that holds a segment's key.
func wrapKey(key []byte, recipients []age.Recipient) ([]byte, error) {
	var b bytes.Buffer
	w, err := age.Encrypt(&b, recipients...)
	if err == nil {
		_, err = w.Write(key)
	}
	if err == nil {
		err = w.Close()
	}
	if err == nil && b.Len() > maxWrapped {
		err = fmt.Errorf("too many recipients: their wrapped keys take %d bytes, and %d are the most", b.Len(), maxWrapped)
	}
	if err != nil {
		return nil, fmt.Errorf("wrap segment's key: %w", err)
	}
	return b.Bytes(), nil
}

// nobody is an identity that matches nothing.
type nobody struct{}

func (nobody) Unwrap([]*age.Stanza) ([]byte, error) { return nil, age.ErrIncorrectIdentity }

// recipientTypes says for whom a key is wrapped, by age's names ("X25519", "mlkem768x25519", "ssh-ed25519"). An error means that it is
// no age file.
func recipientTypes(wrapped []byte) ([]string, error) {
	_, err := age.Decrypt(bytes.NewReader(wrapped), nobody{})
	var none *age.NoIdentityMatchError
	if errors.As(err, &none) {
		return none.StanzaTypes, nil
	}
	return nil, fmt.Errorf("wrapped key: %w", err)
}

// ErrLocked is the answer to identities of which none is a recipient.
var ErrLocked = errors.New("encrypted, and none of the identities given is one of its recipients")

func unwrapKey(wrapped []byte, ids []age.Identity) ([]byte, error) {
	if len(ids) == 0 {
		return nil, ErrLocked
	}
	r, err := age.Decrypt(bytes.NewReader(wrapped), ids...)
	var none *age.NoIdentityMatchError
	if errors.As(err, &none) {
		return nil, ErrLocked
	}
	if err != nil {
		return nil, fmt.Errorf("unwrap segment's key: %w", err)
	}
	key, err := io.ReadAll(io.LimitReader(r, chacha20poly1305.KeySize+1))
	if err == nil && len(key) != chacha20poly1305.KeySize {
		err = fmt.Errorf("%d bytes, want %d", len(key), chacha20poly1305.KeySize)
	}
	if err != nil {
		return nil, fmt.Errorf("unwrap segment's key: %w", err)
	}
	return key, nil
}

// RecipientTypes checks the configuration of the log, but for its directories, and says of which types its recipients are, as age
// names them; none: the log is not encrypted.
func (c Config) RecipientTypes() ([]string, error) {
	c = c.WithDefaults()
	if err := c.Validate(); err != nil {
		return nil, err
	}
	all, err := c.loadRecipients()
	if err != nil || len(all) == 0 {
		return nil, err
	}
	wrapped, err := wrapKey(make([]byte, chacha20poly1305.KeySize), all)
	if err != nil {
		return nil, err
	}
	return recipientTypes(wrapped)
}

// loadRecipients reads those of the configuration, and sees whether a key can be wrapped to all of them at once.
func (c Config) loadRecipients() ([]age.Recipient, error) {
	var all []age.Recipient
	for i, s := range c.Recipients {
		r, err := agekeys.ParseRecipient(s)
		if err != nil {
			return nil, fmt.Errorf("recipients: number %d: %w", i+1, err)
		}
		all = append(all, r)
	}
	if c.RecipientsFile != "" {
		more, err := agekeys.LoadRecipients(c.RecipientsFile)
		if err != nil {
			return nil, fmt.Errorf("recipients_file: %w", err)
		}
		all = append(all, more...)
	}
	if len(all) == 0 {
		return nil, nil
	}
	if err := agekeys.Compatible(all); err != nil {
		return nil, fmt.Errorf("recipients: %w", err)
	}
	if _, err := wrapKey(make([]byte, chacha20poly1305.KeySize), all); err != nil {
		return nil, fmt.Errorf("recipients: %w", err)
	}
	return all, nil
}
