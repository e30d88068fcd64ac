package auditlog

import (
	"encoding/binary"
	"fmt"
	"reflect"
	"strings"
	"time"
	"unicode/utf8"

	"github.com/fxamacker/cbor/v2"
)

// wireRecord is a record as stored: an array of five.
type wireRecord struct {
	_        struct{} `cbor:",toarray"`
	Sequence uint64
	Time     int64
	Channel  uint32
	Kind     uint64
	Body     cbor.RawMessage
}

// Unknown is a record's body of a kind, or in a form, that this version does not know.
type Unknown struct {
	Number Kind
	Raw    []byte // CBOR
}

// Kind is the number that was stored.
func (u *Unknown) Kind() Kind { return u.Number }

// maxHead is the most that appendHead adds.
const maxHead = 1 + 9 + 9 + 5 + 3

// appendHead adds the start of a record, up to its body.
func appendHead(b []byte, seq uint64, t time.Time, channel uint32, kind Kind) []byte {
	b = append(b, 0x85) // array of five
	b = appendUint(b, 0x00, seq)
	if ns := t.UnixNano(); ns >= 0 {
		b = appendUint(b, 0x00, uint64(ns))
	} else {
		b = appendUint(b, 0x20, uint64(-(ns + 1)))
	}
	b = appendUint(b, 0x00, uint64(channel))
	return appendUint(b, 0x00, uint64(kind))
}

// appendUint adds a head of the major type (in the three high bits) with its argument in the shortest form (RFC 8949,
// section 4.2.1).
func appendUint(b []byte, major byte, v uint64) []byte {
	switch {
	case v < 24:
		return append(b, major|byte(v))
	case v <= 0xff:
		return append(b, major|24, byte(v))
	case v <= 0xffff:
		return binary.BigEndian.AppendUint16(append(b, major|25), uint16(v))
	case v <= 0xffff_ffff:
		return binary.BigEndian.AppendUint32(append(b, major|26), uint32(v))
	}
	return binary.BigEndian.AppendUint64(append(b, major|27), v)
}

// appendData adds a Data body. Written by hand because every byte of every transfer passes here; a test holds it against
// the generic encoder.
func appendData(b []byte, s Stream, data []byte, hidden, eof bool) []byte {
	pairs := byte(0)
	for _, there := range [...]bool{s != 0, len(data) > 0, hidden, eof} {
		if there {
			pairs++
		}
	}
	b = append(b, 0xa0|pairs)
	if s != 0 {
		b = appendUint(append(b, 1), 0x00, uint64(s))
	}
	if len(data) > 0 {
		b = append(appendUint(append(b, 2), 0x40, uint64(len(data))), data...)
	}
	if hidden {
		b = append(b, 3, 0xf5)
	}
	if eof {
		b = append(b, 4, 0xf5)
	}
	return b
}

// encodeBody gives a body as CBOR.
func encodeBody(body Body) ([]byte, error) {
	if u, ok := body.(*Unknown); ok {
		return nil, fmt.Errorf("encode record: kind %d is unknown", u.Number)
	}
	b, err := encMode.Marshal(validText(body))
	if err != nil {
		return nil, fmt.Errorf("encode record: %w", err)
	}
	if len(b) > MaxRecordBytes {
		return nil, fmt.Errorf("encode record: kind %d with %d bytes is too large", body.Kind(), len(b))
	}
	return b, nil
}

// validText gives body, or a copy in which text that is not UTF-8 is escaped: CBOR text must be UTF-8 (RFC 8949, section
// 3.1) and a peer's user name need not be.
func validText(body Body) any {
	v := reflect.ValueOf(body)
	if v.Kind() != reflect.Pointer || v.IsNil() || v.Elem().Kind() != reflect.Struct {
		return body
	}
	v = v.Elem()
	var out reflect.Value
	set := func(i int, f reflect.Value) {
		if !out.IsValid() {
			out = reflect.New(v.Type()).Elem()
			out.Set(v)
		}
		out.Field(i).Set(f)
	}
	for i := range v.NumField() {
		switch f := v.Field(i).Interface().(type) {
		case string:
			if !utf8.ValidString(f) {
				set(i, reflect.ValueOf(escapeInvalid(f)))
			}
		case []string:
			list := make([]string, len(f))
			changed := false
			for j, s := range f {
				list[j] = s
				if !utf8.ValidString(s) {
					list[j], changed = escapeInvalid(s), true
				}
			}
			if changed {
				set(i, reflect.ValueOf(list))
			}
		}
	}
	if out.IsValid() {
		return out.Addr().Interface()
	}
	return body
}

// escapeInvalid writes each byte that is not part of UTF-8 as \xNN.
func escapeInvalid(s string) string {
	var b strings.Builder
	for i := 0; i < len(s); {
		r, n := utf8.DecodeRuneInString(s[i:])
		if r == utf8.RuneError && n <= 1 {
			fmt.Fprintf(&b, `\x%02x`, s[i])
			i++
			continue
		}
		b.WriteString(s[i : i+n])
		i += n
	}
	return b.String()
}

// newBody gives an empty body of a kind, nil if the kind is unknown.
func newBody(k Kind) Body {
	switch k {
	case KindConnect:
		return new(Connect)
	case KindHandshake:
		return new(Handshake)
	case KindAuthenticate:
		return new(Authenticate)
	case KindDecision:
		return new(Decision)
	case KindSandbox:
		return new(Sandbox)
	case KindChannelOpen:
		return new(ChannelOpen)
	case KindRequest:
		return new(Request)
	case KindData:
		return new(Data)
	case KindChannelClose:
		return new(ChannelClose)
	case KindExit:
		return new(Exit)
	case KindAlert:
		return new(Alert)
	case KindEnd:
		return new(End)
	case KindRefused:
		return new(Refused)
	case KindIndex:
		return new(Entry)
	case KindProgramExec:
		return new(ProgramExec)
	case KindProgramStart:
		return new(ProgramStart)
	case KindProgramEnd:
		return new(ProgramEnd)
	case KindConnectOut:
		return new(ConnectOut)
	case KindScript:
		return new(Script)
	case KindUnaudited:
		return new(Unaudited)
	case KindTransfer:
		return new(Transfer)
	case KindContent:
		return new(Content)
	case KindDataRest:
		return new(DataRest)
	case KindForward:
		return new(Forward)
	case KindImport:
		return new(Import)
	case KindImportNote:
		return new(ImportNote)
	}
	return nil
}

// String is the kind's name, as in a record's JSON form.
func (k Kind) String() string {
	switch k {
	case KindConnect:
		return "connect"
	case KindHandshake:
		return "handshake"
	case KindAuthenticate:
		return "authenticate"
	case KindDecision:
		return "decision"
	case KindSandbox:
		return "sandbox"
	case KindChannelOpen:
		return "channel-open"
	case KindRequest:
		return "request"
	case KindData:
		return "data"
	case KindChannelClose:
		return "channel-close"
	case KindExit:
		return "exit"
	case KindAlert:
		return "alert"
	case KindEnd:
		return "end"
	case KindRefused:
		return "refused"
	case KindIndex:
		return "index"
	case KindProgramExec:
		return "program-exec"
	case KindProgramStart:
		return "program-start"
	case KindProgramEnd:
		return "program-end"
	case KindConnectOut:
		return "connect-out"
	case KindScript:
		return "script"
	case KindUnaudited:
		return "unaudited"
	case KindTransfer:
		return "transfer"
	case KindContent:
		return "content"
	case KindDataRest:
		return "data-rest"
	case KindForward:
		return "forward"
	case KindImport:
		return "import"
	case KindImportNote:
		return "import-note"
	}
	return fmt.Sprintf("kind-%d", uint8(k))
}

// decodeRecord takes the first record off b. A body that can't be decoded comes as Unknown, with an error too when its
// kind is known; then rest is valid all the same.
func decodeRecord(b []byte) (rec Record, rest []byte, bodyErr, err error) {
	var w wireRecord
	rest, err = decMode.UnmarshalFirst(b, &w)
	if err != nil {
		return Record{}, nil, nil, err
	}
	if w.Kind > 0xff {
		return Record{}, nil, nil, fmt.Errorf("kind %d is out of range", w.Kind)
	}
	rec = Record{Sequence: w.Sequence, Time: time.Unix(0, w.Time).UTC(), Channel: w.Channel}
	body := newBody(Kind(w.Kind))
	if body != nil {
		if bodyErr = decMode.Unmarshal(w.Body, body); bodyErr == nil {
			rec.Body = body
			return rec, rest, nil, nil
		}
	}
	rec.Body = &Unknown{Number: Kind(w.Kind), Raw: w.Body}
	return rec, rest, bodyErr, nil
}
