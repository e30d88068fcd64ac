package agent

import (
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"time"

	"github.com/fxamacker/cbor/v2"
	"github.com/hashicorp/yamux"

	"github.com/sallyport/sallyport/backends"
)

// Version is what gate and agent must have in common. It changes with every change of the stream's meaning.
const Version = "3"

const (
	magic            = "SLYPAGT" + Version
	signatureContext = "sallyport agent stream v" + Version + "\x00"
	nonceSize        = 32

	handshakeLimit = 30 * time.Second

	// window is the yamux window of each stream, and so what a stalled channel may hold in the gate's memory. Through the
	// unix socket on two busy processors the median of 256 KiB was 371 MB/s out and 514 in, of 512 KiB 447 and 613, of
	// 1 MiB 450 and 601, of 4 MiB 426 and 565: more buys nothing.
	window = 512 << 10

	// insideWindow is the agent's own, and so what a stalled stream may hold in the sandbox's memory.
	insideWindow = 256 << 10

	// maxConnections bounds the connections that one agent forwards, those included that wait to be taken; see
	// connectionsIn. The gate's bound on channels is lower.
	maxConnections = 256

	// maxStreams bounds the streams at a time: two a process and one a connection, each a few of which are closing.
	maxStreams = 4*maxProcesses + 2*maxConnections

	// maxFrame is the largest payload of a data frame.
	maxFrame    = 64 << 10
	frameHeader = 5

	// maxReport bounds a message from agent to gate, maxRequest one from gate to agent: a command and an environment of
	// an SSH client, each bounded by the gate.
	maxReport  = 4 << 10
	maxRequest = 1 << 20
)

// pace is the heartbeat's: a beat every so often, and how long none may come.
type pace struct{ every, missed time.Duration }

var normalPace = pace{5 * time.Second, 15 * time.Second}

// What a stream is for.
const (
	opControl = 1
	opProcess = 2
	opData    = 3
	opReports = 4
	opResolve = 5
	opDial    = 6
	opListen  = 7
	opAccept  = 8
)

// What a data frame carries: the number of the file descriptor.
const (
	frameStdin  = 0
	frameStdout = 1
	frameStderr = 2
)

// What a frame of a forwarded connection carries.
const (
	frameBytes = 0 // none of them: the end of the direction
	frameCut   = 1 // nothing: the connection was cut off
)

// opening is the first message of a stream.
type opening struct {
	Op       uint8    `cbor:"1,keyasint"`
	Process  uint64   `cbor:"2,keyasint,omitempty"` // pairs a process with its data
	Greeting greeting `cbor:"3,keyasint,omitempty"`
	Request  request  `cbor:"4,keyasint,omitempty"`
	Audit    terms    `cbor:"5,keyasint,omitempty"`
	Forward  forward  `cbor:"6,keyasint,omitempty"`
}

// forward says what is to be resolved, dialed, listened at or accepted.
type forward struct {
	Network  string `cbor:"1,keyasint,omitempty"`
	Address  string `cbor:"2,keyasint,omitempty"` // for opResolve a host
	Listener uint64 `cbor:"3,keyasint,omitempty"` // a number that the gate gives it
	Arrival  uint64 `cbor:"4,keyasint,omitempty"` // for opAccept: see arrival
}

// response is the agent's answer to opResolve, opDial, opListen and opAccept.
type response struct {
	Failed    *failure `cbor:"1,keyasint,omitempty"`
	Addresses [][]byte `cbor:"2,keyasint,omitempty"` // to opResolve, 4 or 16 bytes each
	Address   string   `cbor:"3,keyasint,omitempty"` // to opListen
}

// arrival says that a listener has taken a connection, which waits for an opAccept.
type arrival struct {
	Number uint64 `cbor:"1,keyasint"`
	Origin string `cbor:"2,keyasint,omitempty"` // address and port, of "tcp"
}

// greeting says whose sandbox it is.
type greeting struct {
	Version  string `cbor:"1,keyasint"`
	User     string `cbor:"2,keyasint,omitempty"`
	Deadline int64  `cbor:"3,keyasint,omitempty"` // Unix seconds, 0: none
}

// welcome answers a greeting.
type welcome struct {
	Version string `cbor:"1,keyasint"`
}

// request is backends.Process as it travels.
type request struct {
	Kind     uint8     `cbor:"1,keyasint"`
	Command  string    `cbor:"2,keyasint,omitempty"`
	Env      []string  `cbor:"3,keyasint,omitempty"`
	Dir      string    `cbor:"4,keyasint,omitempty"`
	Terminal *terminal `cbor:"5,keyasint,omitempty"`
	Typed    bool      `cbor:"6,keyasint,omitempty"`
	Pipes    bool      `cbor:"7,keyasint,omitempty"` // they come from the gate; there is no data stream
	Channel  uint32    `cbor:"8,keyasint,omitempty"` // for reports
	X11      *x11      `cbor:"9,keyasint,omitempty"`
}

// x11 is backends.X11 as it travels.
type x11 struct {
	Display  int    `cbor:"1,keyasint,omitempty"`
	Screen   uint32 `cbor:"2,keyasint,omitempty"`
	Protocol string `cbor:"3,keyasint,omitempty"`
	Cookie   []byte `cbor:"4,keyasint,omitempty"`
}

type terminal struct {
	Term  string     `cbor:"1,keyasint,omitempty"`
	Size  windowSize `cbor:"2,keyasint"`
	Modes []byte     `cbor:"3,keyasint,omitempty"`
}

type windowSize struct {
	Columns uint32 `cbor:"1,keyasint"`
	Rows    uint32 `cbor:"2,keyasint"`
	Width   uint32 `cbor:"3,keyasint"`
	Height  uint32 `cbor:"4,keyasint"`
}

func sizeOf(s backends.WindowSize) windowSize { return windowSize(s) }

// order goes from gate to agent while a process runs. One field is set.
type order struct {
	Resize *windowSize `cbor:"1,keyasint,omitempty"`
	Signal string      `cbor:"2,keyasint,omitempty"`
	Kill   bool        `cbor:"3,keyasint,omitempty"`
}

// report goes from agent to gate. One field is set.
type report struct {
	Started bool     `cbor:"1,keyasint,omitempty"`
	Failed  *failure `cbor:"2,keyasint,omitempty"`
	Typed   *typed   `cbor:"3,keyasint,omitempty"`
	Exit    *exit    `cbor:"4,keyasint,omitempty"`
}

const (
	failedOther       = 0
	failedNoShell     = 1
	failedRefused     = 2
	failedUnreachable = 3
	failedNoHost      = 4
	failedTimeout     = 5
	failedInUse       = 6
)

type failure struct {
	Code uint8  `cbor:"1,keyasint,omitempty"`
	Text string `cbor:"2,keyasint,omitempty"`
}

type typed struct {
	Bytes     uint32 `cbor:"1,keyasint"`
	Echo      bool   `cbor:"2,keyasint,omitempty"`
	Canonical bool   `cbor:"3,keyasint,omitempty"`
}

type exit struct {
	Code       int    `cbor:"1,keyasint,omitempty"`
	Signal     string `cbor:"2,keyasint,omitempty"`
	CoreDumped bool   `cbor:"3,keyasint,omitempty"`
}

var errMessageSize = errors.New("message is too large")

var (
	encoding = must(cbor.EncOptions{}.EncMode())
	// decoding takes any bytes as text: a command or a variable need not be UTF-8.
	decoding = must(cbor.DecOptions{
		DupMapKey:        cbor.DupMapKeyEnforcedAPF,
		IndefLength:      cbor.IndefLengthForbidden,
		TagsMd:           cbor.TagsForbidden,
		UTF8:             cbor.UTF8DecodeInvalid,
		MaxNestedLevels:  8,
		MaxArrayElements: 4096,
		MaxMapPairs:      16,
	}.DecMode())
)

// must is for options that are constants of this package.
func must[T any](v T, err error) T {
	if err != nil {
		panic(err)
	}
	return v
}

// writeMessage writes v in a single Write.
func writeMessage(w io.Writer, v any) error {
	body, err := encoding.Marshal(v)
	if err != nil {
		return err
	}
	b := make([]byte, 4, 4+len(body))
	binary.BigEndian.PutUint32(b, uint32(len(body)))
	_, err = w.Write(append(b, body...))
	return err
}

// readMessage reads one message of at most limit bytes into v. io.EOF means that there was none.
func readMessage(r io.Reader, limit uint32, v any) error {
	var head [4]byte
	if _, err := io.ReadFull(r, head[:]); err != nil {
		return err
	}
	n := binary.BigEndian.Uint32(head[:])
	if n > limit {
		return errMessageSize
	}
	body := make([]byte, n)
	if _, err := io.ReadFull(r, body); err != nil {
		return noEOF(err)
	}
	if err := decoding.Unmarshal(body, v); err != nil {
		return fmt.Errorf("decode message: %w", err)
	}
	return nil
}

// noEOF makes an end in the middle of something an error.
func noEOF(err error) error {
	if errors.Is(err, io.EOF) {
		return io.ErrUnexpectedEOF
	}
	return err
}

// putFrameHeader fills the first frameHeader bytes of b.
func putFrameHeader(b []byte, kind byte, n int) {
	b[0] = kind
	binary.BigEndian.PutUint32(b[1:frameHeader], uint32(n))
}

// frames parses a data stream. It holds no payload: bytes are handed on as they come, in parts of frames too.
type frames struct {
	head [frameHeader]byte
	have int    // bytes of head that are there
	left uint32 // bytes of payload still to come
}

var errFrame = errors.New("bad data frame")

// feed parses b, and calls emit with a part of the payload of a frame, or with nil at the end of a direction.
func (f *frames) feed(b []byte, emit func(kind byte, p []byte) error) error {
	for len(b) > 0 {
		if f.left > 0 {
			n := min(len(b), int(f.left))
			f.left -= uint32(n)
			if err := emit(f.head[0], b[:n]); err != nil {
				return err
			}
			b = b[n:]
			continue
		}
		n := copy(f.head[f.have:], b)
		b = b[n:]
		if f.have += n; f.have < frameHeader {
			return nil
		}
		f.have = 0
		f.left = binary.BigEndian.Uint32(f.head[1:])
		if f.left > maxFrame {
			return errFrame
		}
		if f.left == 0 {
			if err := emit(f.head[0], nil); err != nil {
				return err
			}
		}
	}
	return nil
}

// inFrame says whether a frame has begun and not ended.
func (f *frames) inFrame() bool { return f.have > 0 || f.left > 0 }

// streamCloseLimit is how long a stream of which one side is closed waits for the other side. It is a variable for tests.
var streamCloseLimit = time.Minute

// muxConfig is for an end that takes as much as window of each stream before it is read.
func muxConfig(window uint32) *yamux.Config {
	c := yamux.DefaultConfig()
	c.AcceptBacklog = 2 * maxStreams // streams wait for nothing when they are opened
	c.EnableKeepAlive = false        // the control stream's heartbeat is seen to be answered by the agent's own code
	c.MaxStreamWindowSize = window
	c.StreamOpenTimeout = 0 // its expiry closes the whole session
	c.StreamCloseTimeout = streamCloseLimit
	c.ConnectionWriteTimeout = 2 * normalPace.missed // the heartbeat decides who is dead, and does it earlier
	c.LogOutput = io.Discard
	return c
}
