package tlog

import (
	"fmt"
	"strconv"
	"strings"
)

// Prefix is before the names of all objects of transparency logs.
const Prefix = "tlog/"

// QueuePrefix is before a log's name in the name of its queue (Config.Put).
const QueuePrefix = "tlog-"

// originPrefix is before the gate's name in a log's origin, so that it is unlike any other log's.
const originPrefix = "sallyport/"

// maxNumber is the largest number of a checkpoint that eight digits hold.
const maxNumber = 99_999_999

// Kinds of objects.
const (
	KindCheckpoint = "checkpoint"
	KindTile       = "tile"
	KindEntries    = "entries"
)

// Name is an object's name, taken apart.
type Name struct {
	Gate, Log string
	Kind      string
	Level     int   // of a tile
	Number    int64 // of the checkpoint, tile or bundle
}

// Dir is the prefix of all the objects of one log, with a slash at its end.
func Dir(gate, log string) string { return Prefix + gate + "/" + log + "/" }

// Dir is the prefix of the log that the object belongs to.
func (n Name) Dir() string { return Dir(n.Gate, n.Log) }

// Origin names a log, in its checkpoints and as the name of the key that signs them (C2SP tlog-checkpoint).
func Origin(gate, log string) string { return originPrefix + gate + "/" + log }

// ParseOrigin takes an origin apart.
func ParseOrigin(s string) (gate, log string, err error) {
	rest, ok := strings.CutPrefix(s, originPrefix)
	gate, log, cut := strings.Cut(rest, "/")
	if !ok || !cut || !validPart(gate) || !validPart(log) {
		return "", "", fmt.Errorf("%.200q is not the origin of a gate's log", s)
	}
	return gate, log, nil
}

// validPart is as auditlog.ValidID.
func validPart(s string) bool {
	if s == "" || len(s) > 64 {
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

// CheckpointName is the name of a numbered checkpoint of the log at prefix (Dir).
func CheckpointName(prefix string, number uint32) string {
	return fmt.Sprintf("%scheckpoint/%08d", prefix, number)
}

// TileName is the name of a full tile of hashes.
func TileName(prefix string, level int, n int64) string {
	return fmt.Sprintf("%stile/%d/%s", prefix, level, tileNumber(n))
}

// EntriesName is the name of a full bundle of entries.
func EntriesName(prefix string, n int64) string { return prefix + "tile/entries/" + tileNumber(n) }

// tileNumber is C2SP's: digits in threes, all but the last three with an x before them.
func tileNumber(n int64) string {
	s := fmt.Sprintf("%03d", n%1000)
	for n >= 1000 {
		n /= 1000
		s = fmt.Sprintf("x%03d/", n%1000) + s
	}
	return s
}

func (n Name) String() string {
	switch n.Kind {
	case KindCheckpoint:
		return CheckpointName(n.Dir(), uint32(n.Number))
	case KindTile:
		return TileName(n.Dir(), n.Level, n.Number)
	}
	return EntriesName(n.Dir(), n.Number)
}

// ParseName takes the name of an object below Prefix apart.
func ParseName(s string) (Name, error) {
	bad := fmt.Errorf("parse name %.300q: not the name of an object of a transparency log", s)
	rest, ok := strings.CutPrefix(s, Prefix)
	parts := strings.Split(rest, "/")
	if !ok || len(parts) < 4 || len(parts) > 16 || !validPart(parts[0]) || !validPart(parts[1]) {
		return Name{}, bad
	}
	n := Name{Gate: parts[0], Log: parts[1]}
	switch {
	case parts[2] == "checkpoint":
		n.Kind = KindCheckpoint
		v, err := strconv.ParseUint(parts[3], 10, 32)
		if err != nil || v > maxNumber {
			return Name{}, bad
		}
		n.Number = int64(v)
	case len(parts) < 5 || parts[2] != "tile":
		return Name{}, bad
	default:
		n.Kind = KindEntries
		if parts[3] != "entries" {
			n.Kind = KindTile
			v, err := strconv.ParseUint(parts[3], 10, 8)
			if err != nil || v >= 63/tileHeight {
				return Name{}, bad
			}
			n.Level = int(v)
		}
		for _, p := range parts[4:] {
			v, err := strconv.ParseUint(strings.TrimPrefix(p, "x"), 10, 32)
			if err != nil || v > 999 || n.Number > 1<<40 {
				return Name{}, bad
			}
			n.Number = n.Number*1000 + int64(v)
		}
	}
	if n.String() != s { // one name for each object
		return Name{}, bad
	}
	return n, nil
}
