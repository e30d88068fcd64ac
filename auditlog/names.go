package auditlog

import (
	"encoding/hex"
	"fmt"
	"path"
	"strconv"
	"strings"
	"time"
)

// LogKind says whose log a segment belongs to. The numbers are part of the format.
type LogKind uint8

const (
	SessionLog LogKind = 1 // one session's
	GateLog    LogKind = 2 // the gate's own: what did not become a session
	IndexLog   LogKind = 3 // the gate's index of its sessions
)

func (k LogKind) String() string {
	switch k {
	case SessionLog:
		return "session"
	case GateLog:
		return "gate"
	case IndexLog:
		return "index"
	}
	return "unknown(" + strconv.Itoa(int(k)) + ")"
}

// The prefixes below which the objects of a store lie.
const (
	SessionPrefix = "sessions/"
	GatePrefix    = "gate/"
	IndexPrefix   = "index/"
	// DuplicatePrefix is before what was put under a name that was taken, by a store that could not see by what.
	DuplicatePrefix = "duplicates/"
)

// DuplicateName is the name under DuplicatePrefix for bytes with this hash that were meant to be name.
func DuplicateName(name string, sum Hash) string {
	return DuplicatePrefix + name + "." + hex.EncodeToString(sum[:])
}

// ParseDuplicateName takes such a name apart.
func ParseDuplicateName(s string) (name string, sum Hash, err error) {
	rest, ok := strings.CutPrefix(s, DuplicatePrefix)
	dot := strings.LastIndexByte(rest, '.')
	if !ok || dot < 1 || len(rest)-dot-1 != 2*len(sum) {
		return "", Hash{}, fmt.Errorf("parse name %q: not the name of a duplicate", s)
	}
	if _, err := hex.Decode(sum[:], []byte(rest[dot+1:])); err != nil {
		return "", Hash{}, fmt.Errorf("parse name %q: not the name of a duplicate", s)
	}
	return rest[:dot], sum, nil
}

const segmentSuffix = ".seg"

// maxID bounds session IDs and gate names: they are parts of file names.
const maxID = 64

// ValidID says whether s may be a session's ID or a gate's name: 1 to 64 of a-z A-Z 0-9 _ and -. Anything else could
// leave its directory, or be two names on one file system and one on another.
func ValidID(s string) bool {
	if s == "" || len(s) > maxID {
		return false
	}
	for _, c := range []byte(s) {
		switch {
		case c >= 'a' && c <= 'z', c >= 'A' && c <= 'Z', c >= '0' && c <= '9', c == '_', c == '-':
		default:
			return false
		}
	}
	return true
}

// Name is an object's name, taken apart.
type Name struct {
	Kind   LogKind
	Gate   string // of GateLog and IndexLog
	Day    string // YYYY/MM/DD, UTC, on which the log began
	ID     string // of the session, or of the gate's run
	Number uint32
}

// Dir is the prefix, with a slash at its end, that all segments of the log share.
func (n Name) Dir() string {
	switch n.Kind {
	case GateLog:
		return GatePrefix + n.Gate + "/" + n.Day + "/" + n.ID + "/"
	case IndexLog:
		return IndexPrefix + n.Gate + "/" + n.Day + "/" + n.ID + "/"
	}
	return SessionPrefix + n.Day + "/" + n.ID + "/"
}

// String is the object's name: sessions/YYYY/MM/DD/SESSION/NNNNNNNN.seg, or gate/NAME/YYYY/MM/DD/ID/NNNNNNNN.seg, or
// index/... likewise.
func (n Name) String() string { return n.Dir() + fmt.Sprintf("%08d", n.Number) + segmentSuffix }

// ParseName takes the name of a segment's object apart.
func ParseName(s string) (Name, error) {
	parts := strings.Split(s, "/")
	var n Name
	switch {
	case len(parts) == 6 && parts[0]+"/" == SessionPrefix:
		n.Kind = SessionLog
		parts = parts[1:]
	case len(parts) == 7 && (parts[0]+"/" == GatePrefix || parts[0]+"/" == IndexPrefix):
		n.Kind, n.Gate = GateLog, parts[1]
		if parts[0]+"/" == IndexPrefix {
			n.Kind = IndexLog
		}
		if !ValidID(n.Gate) {
			return Name{}, fmt.Errorf("parse name %q: not the name of a gate", s)
		}
		parts = parts[2:]
	default:
		return Name{}, fmt.Errorf("parse name %q: not the name of a segment", s)
	}
	n.Day, n.ID = path.Join(parts[0], parts[1], parts[2]), parts[3]
	if t, err := time.Parse("2006/01/02", n.Day); err != nil || t.Format("2006/01/02") != n.Day {
		return Name{}, fmt.Errorf("parse name %q: %q is no day", s, n.Day)
	}
	if !ValidID(n.ID) {
		return Name{}, fmt.Errorf("parse name %q: not an ID", s)
	}
	digits, ok := strings.CutSuffix(parts[4], segmentSuffix)
	v, err := parseNumber(digits)
	if !ok || err != nil {
		return Name{}, fmt.Errorf("parse name %q: not a segment's number", s)
	}
	n.Number = v
	return n, nil
}

// maxNumber is the largest segment number that eight digits hold.
const maxNumber = 99_999_999

func parseNumber(digits string) (uint32, error) {
	if len(digits) != 8 {
		return 0, fmt.Errorf("segment number %q: not eight digits", digits)
	}
	v, err := strconv.ParseUint(digits, 10, 32)
	if err != nil || digits[0] == '+' {
		return 0, fmt.Errorf("segment number %q: not eight digits", digits)
	}
	return uint32(v), nil
}

// Name is the name under which a segment with this header is stored.
func (h Header) Name() Name {
	return Name{Kind: h.Kind, Gate: gateOf(h), Day: h.LogStart.UTC().Format("2006/01/02"), ID: h.ID, Number: h.Number}
}

func gateOf(h Header) string {
	if h.Kind != SessionLog {
		return h.Gate
	}
	return ""
}
