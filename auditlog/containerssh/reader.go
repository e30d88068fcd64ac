// Package containerssh reads the binary audit log of ContainerSSH, versions 1 and 2 of its format ("The ContainerSSH Binary Audit
// Log Format"), and turns it into records of ours. A file is a header of 40 bytes, then CBOR in gzip: an array of messages in
// version 1, one message after the other in version 2. Nothing in it is signed or chained.
package containerssh

import (
	"bufio"
	"bytes"
	"compress/gzip"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"math"

	"github.com/fxamacker/cbor/v2"
)

const (
	headerBytes = 40
	magic       = "ContainerSSH-Auditlog" // zeros follow, up to 32 bytes
	// maxItem is the most that one message may have: SSH packets, which they are about, are much smaller.
	maxItem = 4 << 20
)

// ErrTooLarge ends the reading of a file that decompresses to more than was admitted.
var ErrTooLarge = errors.New("it decompresses to more than is admitted")

// Message is a message of the format.
type Message struct {
	Connection string
	Time       int64 // nanoseconds since 1970
	Type       int32
	Channel    int64 // -1: none
	Payload    []byte
}

// Reader reads a file. It needs memory for one message.
type Reader struct {
	r       *bufio.Reader
	version uint64
	array   bool
	left    uint64 // messages that the array still has; MaxUint64: until its end is said
	err     error
}

// NewReader reads the header. limit is how many bytes may come out of the compression.
func NewReader(r io.Reader, limit int64) (*Reader, error) {
	var head [headerBytes]byte
	if _, err := io.ReadFull(r, head[:]); err != nil {
		return nil, fmt.Errorf("not an audit log of ContainerSSH: no header of %d bytes", headerBytes)
	}
	if name, zeros := head[:len(magic)], head[len(magic):32]; string(name) != magic || !bytes.Equal(zeros, make([]byte, len(zeros))) {
		return nil, errors.New("not an audit log of ContainerSSH: wrong magic")
	}
	version := binary.LittleEndian.Uint64(head[32:])
	if version != 1 && version != 2 {
		return nil, fmt.Errorf("an audit log of ContainerSSH in version %d of its format: want 1 or 2", version)
	}
	z, err := gzip.NewReader(r)
	if err != nil {
		return nil, fmt.Errorf("not an audit log of ContainerSSH: %w", err)
	}
	c := &Reader{r: bufio.NewReaderSize(&limited{z, limit}, 64<<10), version: version, left: math.MaxUint64}
	// Version 1 is documented as an array. Files of either form are taken in both versions.
	if b, err := c.r.Peek(1); err == nil && b[0]>>5 == 4 {
		c.array = true
		var item []byte
		_, c.left, _, err = readHead(c.r, &item)
		if err != nil {
			return nil, fmt.Errorf("not an audit log of ContainerSSH: %w", err)
		}
	}
	return c, nil
}

// Version is the format's, as the header says.
func (c *Reader) Version() uint64 { return c.version }

// limited gives an error where io.LimitReader gives an end.
type limited struct {
	r    io.Reader
	left int64
}

func (l *limited) Read(p []byte) (int, error) {
	if l.left <= 0 {
		return 0, ErrTooLarge
	}
	n, err := l.r.Read(p[:min(int64(len(p)), l.left)])
	l.left -= int64(n)
	return n, err
}

// Next gives the next message, io.EOF at the end. ContainerSSH does not finish its compression, so the end of a whole file looks
// like one that was cut between two messages; io.ErrUnexpectedEOF is one that was cut within one. A message that is not what it
// should be is an error too, and none comes after it.
func (c *Reader) Next() (Message, error) {
	if c.err != nil {
		return Message{}, c.err
	}
	m, err := c.next()
	c.err = err
	return m, err
}

func (c *Reader) next() (Message, error) {
	if c.array {
		if c.left == 0 {
			return Message{}, io.EOF
		}
		if b, err := c.r.Peek(1); err == nil && b[0] == 0xff && c.left == math.MaxUint64 {
			return Message{}, io.EOF
		}
	}
	if _, err := c.r.Peek(1); err != nil {
		if errors.Is(err, io.ErrUnexpectedEOF) || errors.Is(err, io.EOF) {
			return Message{}, io.EOF
		}
		return Message{}, err
	}
	item, err := readItem(c.r)
	if errors.Is(err, io.EOF) {
		err = io.ErrUnexpectedEOF
	}
	if err != nil {
		return Message{}, err
	}
	if c.left != math.MaxUint64 {
		c.left--
	}
	return decodeMessage(item)
}

// wireMessage has the names that ContainerSSH writes, and those of its document; case does not count.
type wireMessage struct {
	Connection string          `cbor:"connectionId"`
	Time       int64           `cbor:"timestamp"`
	Type       *int32          `cbor:"type"`
	TypeAs     *int32          `cbor:"messageType"`
	Channel    cbor.RawMessage `cbor:"channelId"`
	Payload    cbor.RawMessage `cbor:"payload"`
}

// decMode is bounded by maxItem, and takes text that is not UTF-8: it was a peer's.
var decMode = func() cbor.DecMode {
	m, err := cbor.DecOptions{MaxNestedLevels: 16, MaxArrayElements: 1 << 16, MaxMapPairs: 1 << 12, UTF8: cbor.UTF8DecodeInvalid, IndefLength: cbor.IndefLengthAllowed,
		TagsMd: cbor.TagsAllowed, FieldNameMatching: cbor.FieldNameMatchingPreferCaseSensitive}.DecMode()
	if err != nil {
		panic(err) // the options are constants
	}
	return m
}()

func decodeMessage(item []byte) (Message, error) {
	var w wireMessage
	if err := decMode.Unmarshal(item, &w); err != nil {
		return Message{}, fmt.Errorf("message: %w", err)
	}
	m := Message{Connection: w.Connection, Time: w.Time, Channel: -1, Payload: w.Payload}
	switch {
	case w.Type != nil:
		m.Type = *w.Type
	case w.TypeAs != nil:
		m.Type = *w.TypeAs
	default:
		return Message{}, errors.New("message: no type")
	}
	if len(w.Channel) > 0 {
		var n *int64
		if err := decMode.Unmarshal(w.Channel, &n); err != nil {
			return Message{}, fmt.Errorf("message: channel: %w", err)
		}
		if n != nil && *n >= 0 {
			m.Channel = *n
		}
	}
	return m, nil
}

// readItem reads one item of CBOR whole (RFC 8949, section 3), without decoding it.
func readItem(r *bufio.Reader) ([]byte, error) {
	var item []byte
	left := []uint64{1}            // items that are still to come, by level
	const endless = math.MaxUint64 // of a level: until its end is said
	for len(left) > 0 {
		top := &left[len(left)-1]
		if *top == 0 {
			left = left[:len(left)-1]
			continue
		}
		major, n, indefinite, err := readHead(r, &item)
		if err != nil {
			return nil, err
		}
		if major == 7 && indefinite { // the end of an endless level
			if *top != endless {
				return nil, errors.New("an end where none can be")
			}
			left = left[:len(left)-1]
			continue
		}
		if *top != endless {
			*top--
		}
		switch {
		case major == 2 || major == 3 || major == 4 || major == 5:
			switch {
			case indefinite:
				n = endless
			case major <= 3:
				if n > maxItem || len(item)+int(n) > maxItem {
					return nil, fmt.Errorf("a message of more than %d bytes", maxItem)
				}
				at := len(item)
				item = append(item, make([]byte, n)...)
				if _, err := io.ReadFull(r, item[at:]); err != nil {
					return nil, err
				}
				continue
			case n > maxItem:
				return nil, fmt.Errorf("a message of more than %d bytes", maxItem)
			case major == 5:
				n *= 2
			}
			left = append(left, n)
		case major == 6:
			left = append(left, 1)
		}
		if len(left) > 64 {
			return nil, errors.New("nested too deep")
		}
	}
	return item, nil
}

// readHead reads an item's head and adds it to item.
func readHead(r *bufio.Reader, item *[]byte) (major byte, n uint64, indefinite bool, err error) {
	if len(*item) > maxItem {
		return 0, 0, false, fmt.Errorf("a message of more than %d bytes", maxItem)
	}
	b, err := r.ReadByte()
	if err != nil {
		return 0, 0, false, err
	}
	*item = append(*item, b)
	major, low := b>>5, b&31
	switch {
	case low < 24:
		return major, uint64(low), false, nil
	case low == 31 && major != 0 && major != 1 && major != 6:
		return major, math.MaxUint64, true, nil
	case low > 27:
		return 0, 0, false, fmt.Errorf("no CBOR: 0x%02x", b)
	}
	var arg [8]byte
	size := 1 << (low - 24)
	if _, err := io.ReadFull(r, arg[8-size:]); err != nil {
		return 0, 0, false, err
	}
	*item = append(*item, arg[8-size:]...)
	return major, binary.BigEndian.Uint64(arg[:]), false, nil
}
