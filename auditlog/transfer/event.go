package transfer

import (
	"errors"
	"io"
	"strconv"
	"strings"
	"time"
	"unicode/utf8"
)

// Kind says what an [Event] or an [Op] is about.
type Kind string

// The kinds of events. All but the last two are of operations a client asked for.
const (
	File      Kind = "file"      // a file was opened, read or written, and closed; or could not be opened
	List      Kind = "list"      // a directory was opened and its names read
	Rename    Kind = "rename"    // also posix-rename@openssh.com; Path became Target
	Remove    Kind = "remove"    //
	Mkdir     Kind = "mkdir"     // in scp also a directory that was there
	Rmdir     Kind = "rmdir"     //
	Setstat   Kind = "setstat"   // also fsetstat, and lsetstat@openssh.com; Attrs says what was set
	Symlink   Kind = "symlink"   // Path is the link; Target is its text, never resolved
	Link      Kind = "link"      // hardlink@openssh.com; Target is the new name of Path
	Copy      Kind = "copy"      // copy-data: bytes of Path went to Target without passing here
	Extension Kind = "extension" // a request of an extension that is not known here; Detail is its name

	Undecodable Kind = "undecodable" // the protocol was not kept; Detail says how
)

// Direction is that of bytes in a channel.
type Direction uint8

const (
	ToServer Direction = iota // from the client: uploads
	ToClient                  // from the server: downloads
)

func (d Direction) String() string {
	if d == ToServer {
		return "to-server"
	}
	return "to-client"
}

// Path is one path, as bytes: a reader must escape it before showing it.
type Path struct {
	Asked    string // as the client wrote it
	Resolved string // as the server resolved it before the request: absolute, no symbolic links; "" if that was not asked
}

// The bits of [Event.Flags], those of SSH_FXP_OPEN's pflags (draft-ietf-secsh-filexfer-02, section 6.3).
const (
	FlagRead      = 0x01
	FlagWrite     = 0x02
	FlagAppend    = 0x04
	FlagCreate    = 0x08
	FlagTruncate  = 0x10
	FlagExclusive = 0x20
)

// The bits of [Attrs.Valid] (draft-ietf-secsh-filexfer-02, section 5).
const (
	AttrSize        = 0x01
	AttrOwner       = 0x02
	AttrPermissions = 0x04
	AttrTimes       = 0x08
	AttrExtended    = 0x80000000
)

// Attrs are a file's attributes as a client gave them; Valid says which.
type Attrs struct {
	Valid        uint32
	Size         uint64
	UID, GID     uint32
	Permissions  uint32 // st_mode
	Atime, Mtime uint32 // seconds since 1970
}

// Status is a server's answer (draft-ietf-secsh-filexfer-02, section 7). An scp has StatusOK and StatusFailure only.
type Status struct {
	Code    uint32
	Message string // printable, of at most 256 bytes; "" for StatusOK
}

// The codes of [Status] that are used here.
const (
	StatusOK               = 0
	StatusEOF              = 1
	StatusPermissionDenied = 3
	StatusFailure          = 4
	StatusUnsupported      = 8
)

// Range is the bytes of a file from Start up to but without End.
type Range struct{ Start, End uint64 }

// Flow is what passed of one file in one direction.
type Flow struct {
	// Bytes counts the contents that passed: for reads what the server sent, for writes what it acknowledged as written.
	// What was read or written twice counts twice.
	Bytes uint64
	// Ranges are the offsets the bytes were at, merged and in order; nil where Contiguous says it all. Cut says that
	// there were too many to keep.
	Ranges []Range
	Cut    bool
	// Contiguous says that the bytes are those from offset 0 to Bytes, each once.
	Contiguous bool
	// SHA256 is of the bytes from offset 0 to Bytes or, of a file that was read in parts again, to the end of its only
	// range; then of each byte as it passed first. nil if there are gaps, they came in an order too wild to hash (more
	// than 1 MiB ahead), were none, or may not be what is in the file: one opened for appending, copied into, or with a
	// part written twice.
	SHA256 []byte
	// Whole says that the bytes with this hash are all of the file: of a download, that the server said end of file
	// where they end, or gave that as the open file's size; of an upload, that the file was truncated or new when opened,
	// or had its size set to Bytes. Another process may have changed it all the same.
	Whole bool
	// Kept is how many bytes were handed to Config.Content.
	Kept uint64
}

// Event is one thing that happened: a finished file, another operation with its result, or that nothing more is known.
type Event struct {
	Kind Kind
	ID   uint64 // counts the channel's recorded requests; Content was called with a File's
	// Path is the file. In scp, Asked is the argument of the program's command line and Name what the protocol calls
	// the file below it: whether the server took that as a directory or as the file itself is not known.
	Path   Path
	Target Path
	Name   string
	Start  time.Time // of the request
	End    time.Time // of the answer, or of the channel
	Flags  uint32    // of a File: FlagRead and so on
	Attrs  Attrs     // as given by the client; in scp of a download by the server
	// Read and Written are what passed to the client, and to the server. A List has the size of its listings in Read.
	Read, Written Flow
	Names         uint64   // of a List: how many names the server gave
	Ranges        [2]Range // of a Copy: of Path and of Target; an End of 0 is the source's end of file
	// Status is the result: of the operation, or of a File the first failure of any request on it.
	Status Status
	// Denied says that it was the gate that refused, and the server did not see the request.
	Denied bool
	// Unfinished says that the channel ended first: the file was not closed, or the request not answered.
	Unfinished bool
	Detail     string // more of it, printable; see Kind

	Direction Direction // of Undecodable: the stream that did not keep to the protocol
	Offset    uint64    // of Undecodable: the first byte of that stream that is in no event
}

// Op is what Decide is asked about: a request that names a path, before the server has seen it.
type Op struct {
	Kind        Kind
	Read, Write bool // of a File: which; of a Setstat, Write: the file is open for writing
	Path        Path // Resolved if Config.Resolve; the request that is passed on then names that path, not Asked
	Target      Path // as in Event
	Name        string
	Size        uint64 // of scp's File: the size that was announced
	Attrs       Attrs
}

// Verdict is what Decide says.
type Verdict struct {
	// Deny is why not, in words for the client; "" permits.
	Deny string
	// MaxSize is the size in bytes beyond which a File may neither be read nor written nor set (Setstat); 0 is no limit.
	MaxSize uint64
}

// ContentMode says what is kept of a file's content.
type ContentMode uint8

const (
	ContentHash ContentMode = iota // its hash
	ContentFull                    // its hash, and the bytes up to a limit, through Config.Content
	ContentNone                    // neither
)

// Config is what a decoder needs. The functions are called by the goroutine that feeds the decoder, with no lock held
// that the other goroutine could need; those marked "both" by either, at once.
type Config struct {
	Server, Client io.Writer // where bytes go; Client is written by both goroutines, never at once

	// Event takes an event before the bytes that caused it pass. Its error ends the transfer: recorded first, then
	// passed. (both)
	Event func(*Event) error
	// Raw takes what passes undecoded, before it passes: all bytes after an Undecodable event. The offset is that in the
	// direction's stream. p is the caller's again afterwards. (both)
	Raw func(d Direction, offset uint64, p []byte) error
	// Now is the clock; time.Now if nil. (both)
	Now func() time.Time

	// Decide is asked before a request with a path is passed on. nil permits all. With a Decide, what can't be decoded or
	// is an extension not known here is not passed. Whoever renames a directory moves all that is below it: rules on a
	// path must refuse that of its parents.
	Decide func(*Op) Verdict
	// Resolve asks the server for the target of each symbolic link in a path (SSH_FXP_READLINK; SSH_FXP_REALPATH only for
	// the directory that relative paths begin at, because servers differ in whether it follows links) before passing the
	// request on, with the path as resolved. Costs a round trip or more per request that has a path.
	Resolve bool
	// Timeout is how long such a question may go unanswered while nothing at all comes from the server; a minute if 0.
	Timeout time.Duration

	Mode ContentMode
	// Content takes content in ContentFull: bytes of file id at an offset, as they pass: a write before it is answered,
	// in no order. p is the caller's again afterwards. FileLimit is how many bytes of a file in one direction, and
	// SessionLimit of all files, are handed over. (both)
	Content                 func(id uint64, d Direction, offset uint64, p []byte) error
	FileLimit, SessionLimit uint64
}

func (c Config) now() time.Time {
	if c.Now != nil {
		return c.Now()
	}
	return time.Now()
}

var (
	// ErrUndecodable ends a transfer that has rules to be kept, and does not keep to its protocol.
	ErrUndecodable = errors.New("not decodable, and there are rules for transfers")
	// ErrTimeout ends a transfer whose server does not answer the gate.
	ErrTimeout = errors.New("the server does not answer")
	// ErrFinished is returned after Finish.
	ErrFinished = errors.New("the transfer is finished")
)

// violation is how a stream does not keep to its protocol.
type violation string

func (v violation) Error() string { return string(v) }

// maxMessage is how much of a server's message is kept.
const maxMessage = 256

// printable is s with all escaped that is not printable, cut.
func printable(s string) string {
	cut := len(s) > maxMessage
	if cut {
		s = s[:maxMessage]
	}
	var b strings.Builder
	for i, r := range s {
		switch {
		case r == utf8.RuneError && s[i] >= utf8.RuneSelf && !strings.HasPrefix(s[i:], "\uFFFD"):
			b.WriteString(`\x` + strconv.FormatUint(uint64(s[i]), 16))
		case strconv.IsPrint(r):
			b.WriteRune(r)
		default:
			q := strconv.QuoteRuneToASCII(r)
			b.WriteString(q[1 : len(q)-1])
		}
	}
	out := b.String()
	for len(out) > maxMessage {
		cut = true
		_, n := utf8.DecodeLastRuneInString(out)
		out = out[:len(out)-n]
	}
	if cut {
		out += "..."
	}
	return out
}
