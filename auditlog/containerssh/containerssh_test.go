package containerssh

import (
	"bytes"
	"compress/gzip"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"reflect"
	"strings"
	"testing"

	"github.com/fxamacker/cbor/v2"

	"github.com/sallyport/sallyport/auditlog"
)

// m is a message as the format's document describes it; its names are those that ContainerSSH writes.
type m struct {
	Connection string         `cbor:"connectionId"`
	Time       int64          `cbor:"timestamp"`
	Type       int            `cbor:"type"`
	Payload    map[string]any `cbor:"payload"`
	Channel    *uint64        `cbor:"channelId"`
}

func on(channel uint64) *uint64 { return &channel }

type p = map[string]any

// shell is a connection as one would see it often.
var shell = []m{
	{"c0ffee", 1000, 0, p{"remoteAddr": "192.0.2.7", "country": "XX"}, nil},
	{"c0ffee", 1001, 100, p{"username": "alice", "password": []byte("hunter2")}, nil},
	{"c0ffee", 1002, 102, p{"username": "alice", "password": []byte("hunter2")}, nil},
	{"c0ffee", 1003, 104, p{"username": "alice", "key": "ssh-ed25519 AAAAC3NzaC1lZDI1NTE5AAAAIAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAA"}, nil},
	{"c0ffee", 1004, 105, p{"username": "alice", "key": "ssh-ed25519 AAAAC3NzaC1lZDI1NTE5AAAAIAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAA"}, nil},
	{"c0ffee", 1005, 199, p{"username": "alice"}, nil},
	{"c0ffee", 1006, 300, p{"channelType": "session"}, on(0)},
	{"c0ffee", 1007, 301, p{"channelType": "session"}, on(0)},
	{"c0ffee", 1008, 402, p{"requestId": 0, "name": "LANG", "value": "C"}, on(0)},
	{"c0ffee", 1009, 501, p{"requestId": 0, "reason": "not permitted"}, on(0)},
	{"c0ffee", 1010, 404, p{"requestId": 1, "term": "xterm", "columns": 80, "rows": 25, "modelist": []byte{0}}, on(0)},
	{"c0ffee", 1011, 405, p{"requestId": 2}, on(0)},
	{"c0ffee", 1012, 500, p{"stream": 1, "data": []byte("$ ")}, on(0)},
	{"c0ffee", 1013, 500, p{"stream": 0, "data": []byte("ls\r")}, on(0)},
	{"c0ffee", 1014, 408, p{"requestId": 3, "columns": 100, "rows": 30}, on(0)},
	{"c0ffee", 1015, 500, p{"stream": 2, "data": []byte("err\xff")}, on(0)},
	{"c0ffee", 1016, 499, p{"exitStatus": 3}, on(0)},
	{"c0ffee", 1017, 497, nil, on(0)},
	{"c0ffee", 1018, 1, nil, nil},
}

// file makes a file of a version. Version 1 is an array without a length, as ContainerSSH writes it; whole finishes the compression.
func file(t testing.TB, version uint64, whole bool, messages ...m) []byte {
	t.Helper()
	var b bytes.Buffer
	b.WriteString(magic + strings.Repeat("\x00", 32-len(magic)))
	if err := binary.Write(&b, binary.LittleEndian, version); err != nil {
		t.Fatal(err)
	}
	z := gzip.NewWriter(&b)
	if version == 1 {
		z.Write([]byte{0x9f})
	}
	for _, one := range messages {
		c, err := cbor.Marshal(one)
		if err != nil {
			t.Fatal(err)
		}
		z.Write(c)
		z.Flush()
	}
	if whole {
		if version == 1 {
			z.Write([]byte{0xff})
		}
		z.Close()
	}
	return b.Bytes()
}

func convert(t testing.TB, b []byte) (records []Record, c *Converter, err error) {
	t.Helper()
	r, err := NewReader(bytes.NewReader(b), 1<<30)
	if err != nil {
		return nil, nil, err
	}
	c = NewConverter()
	for {
		message, err := r.Next()
		if err != nil {
			records = append(records, c.Finish()...)
			if errors.Is(err, io.EOF) {
				err = nil
			}
			return records, c, err
		}
		records = append(records, c.Add(message)...)
	}
}

func TestShell(t *testing.T) {
	const key = "SHA256:kmYcvdi2GkPeWxB6XLjrZB8JHsy2Hm8luHMFp9GMvqk" // as ssh-keygen -l prints it
	want := []struct {
		at      int64
		channel uint32
		body    auditlog.Body
	}{
		{1000, 0, &auditlog.Connect{Source: "192.0.2.7"}},
		{1002, 0, &auditlog.Authenticate{User: "alice", Method: "password", Result: "failed"}},
		{1004, 0, &auditlog.Authenticate{User: "alice", Method: "publickey", KeyType: "ssh-ed25519", Result: "proven", Fingerprint: key}},
		{1005, 0, &auditlog.ImportNote{Type: 199, Text: "handshake completed for user alice"}},
		{1007, 1, &auditlog.ChannelOpen{Type: "session"}},
		{1008, 1, &auditlog.Request{Type: "env", Name: "LANG", Value: "C", Reason: "not permitted"}},
		{1010, 1, &auditlog.Request{Type: "pty-req", Term: "xterm", Columns: 80, Rows: 25, OK: true}},
		{1011, 1, &auditlog.Request{Type: "shell", OK: true}},
		{1012, 1, &auditlog.Data{Stream: auditlog.Output, Data: []byte("$ ")}},
		{1013, 1, &auditlog.Data{Stream: auditlog.Input, Data: []byte("ls\r")}},
		{1014, 1, &auditlog.Request{Type: "window-change", Columns: 100, Rows: 30, OK: true}},
		{1015, 1, &auditlog.Data{Stream: auditlog.Error, Data: []byte("err\xff")}},
		{1016, 1, &auditlog.Exit{Code: 3}},
		{1017, 1, &auditlog.ChannelClose{Input: 3, Output: 2, Error: 4}},
	}
	for version := range []uint64{1, 2} {
		for _, whole := range []bool{true, false} {
			got, c, err := convert(t, file(t, uint64(version+1), whole, shell...))
			if err != nil || len(got) != len(want) || !c.Ended() || c.Connection != "c0ffee" || c.Last().UnixNano() != 1018 {
				t.Fatalf("version %d, whole %v: %d records, %v", version+1, whole, len(got), err)
			}
			for i, w := range want {
				g := got[i]
				if g.Time.UnixNano() != w.at || g.Channel != w.channel || !reflect.DeepEqual(g.Body, w.body) {
					t.Errorf("record %d: %d %d %#v, want %d %d %#v", i, g.Time.UnixNano(), g.Channel, g.Body, w.at, w.channel, w.body)
				}
			}
		}
	}
	if all, _, _ := convert(t, file(t, 2, true, shell...)); strings.Contains(fmt.Sprintf("%+v", all), "hunter2") {
		t.Error("a password was taken over")
	}
}

// Each type of message leads to its record.
func TestTypes(t *testing.T) {
	for kind, c := range map[int]struct {
		payload map[string]any
		want    auditlog.Body
	}{
		103: {p{"username": "a", "password": []byte("x"), "reason": "down"}, &auditlog.Authenticate{User: "a", Method: "password", Result: "failed", Reason: "backend: down"}},
		106: {p{"username": "a", "key": "odd"}, &auditlog.Authenticate{User: "a", Method: "publickey", Result: "refused"}},
		108: {p{"username": "a", "instruction": "code?", "questions": []any{p{"question": "q"}}}, &auditlog.ImportNote{Type: 108, Text: "keyboard-interactive: user a was asked; instruction: code?"}},
		109: {p{"username": "a", "answers": []any{p{"answer": "secret"}}}, &auditlog.ImportNote{Type: 109, Text: "keyboard-interactive: user a answered (not taken over)"}},
		110: {p{"username": "a"}, &auditlog.Authenticate{User: "a", Method: "keyboard-interactive", Result: "failed"}},
		198: {p{"reason": "no"}, &auditlog.ImportNote{Type: 198, Text: "handshake failed: no"}},
		199: {p{"username": "a"}, &auditlog.Authenticate{User: "a", Method: "not recorded", Result: "proven"}},
		200: {p{"requestType": "odd"}, &auditlog.Request{Type: "odd", Reason: "not known to the server"}},
		202: {p{"bindHost": "localhost", "bindPort": 8080}, &auditlog.Request{Type: "tcpip-forward", Name: "localhost:8080", OK: true}},
		204: {p{"path": "/s"}, &auditlog.Request{Type: "streamlocal-forward@openssh.com", Name: "/s", OK: true}},
		302: {p{"channelType": "x", "reason": "no"}, &auditlog.ChannelOpen{Type: "x", Error: "no"}},
		303: {p{"hostToConnect": "db", "portToConnect": 5432, "originatorHost": "::1", "originatorPort": 7}, &auditlog.ChannelOpen{Type: "direct-tcpip", Target: "db:5432", Originator: "[::1]:7"}},
		307: {p{"path": "/s"}, &auditlog.ChannelOpen{Type: "forwarded-streamlocal@openssh.com", Target: "/s"}},
		401: {p{"requestType": "exec", "payload": []byte{1}, "reason": "short"}, &auditlog.Request{Type: "exec", Payload: []byte{1}, Reason: "short"}},
		403: {p{"requestId": 1, "program": "ls -l"}, &auditlog.Request{Type: "exec", Command: []byte("ls -l"), OK: true}},
		407: {p{"requestId": 1, "subsystem": "sftp"}, &auditlog.Request{Type: "subsystem", Name: "sftp", OK: true}},
		409: {p{"requestId": 1, "cookie": "secret"}, &auditlog.Request{Type: "x11-req", OK: true}},
		496: {nil, &auditlog.Data{Stream: auditlog.Output, EOF: true}},
		498: {p{"signal": "KILL", "coreDumped": true, "errorMessage": "e"}, &auditlog.Exit{Signal: "KILL", Core: true, Error: "e"}},
		500: {p{"stream": 9, "data": []byte("x")}, &auditlog.ImportNote{Type: 500, Text: "1 bytes of stream 9, which is not known"}},
		501: {p{"requestId": 7, "reason": "no"}, &auditlog.ImportNote{Type: 501, Text: "request 7 failed: no"}},
		999: {p{"x": 1}, &auditlog.ImportNote{Type: 999, Text: "a type that is not known"}},
	} {
		got, _, err := convert(t, file(t, 2, true, m{"c", 1, kind, c.payload, on(4)}))
		if err != nil || len(got) != 1 || !reflect.DeepEqual(got[0].Body, c.want) {
			t.Errorf("type %d: %v %v", kind, err, got)
			if len(got) == 1 {
				t.Errorf("%#v, want %#v", got[0].Body, c.want)
			}
		}
	}
	got, _, err := convert(t, file(t, 2, true, m{"c", 1, 0, p{}, nil}, m{"d", 2, 500, p{"stream": 1, "data": []byte("x")}, on(0)}, m{"c", 3, 500, p{"stream": "x"}, on(0)}, m{"c", 3, 500, p{}, on(1 << 40)}))
	if err != nil || len(got) != 4 || !strings.Contains(fmt.Sprint(got[1].Body, got[2].Body, got[3].Body), "another connection") {
		t.Errorf("%v %v", err, got)
	}
}

func TestBad(t *testing.T) {
	good := file(t, 2, true, shell...)
	nested := append(bytes.Clone(good[:headerBytes]), compressed(bytes.Repeat([]byte{0x81}, 1000))...)
	deep := append(bytes.Clone(good[:headerBytes]), compressed(append([]byte{0xa1}, bytes.Repeat([]byte{0xa1, 0x61, 'a'}, 1000)...))...)
	long := append(bytes.Clone(good[:headerBytes]), compressed([]byte{0x5b, 0, 0, 0, 0xff, 0xff, 0xff, 0xff, 0xff})...)
	claims := append(bytes.Clone(good[:headerBytes]), compressed([]byte{0xbb, 0x7f, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff})...)
	number := append(bytes.Clone(good[:headerBytes]), compressed([]byte{0x07})...)
	for name, c := range map[string]struct {
		b    []byte
		want string
	}{
		"empty": {nil, "no header"}, "short": {good[:20], "no header"}, "another file": {append([]byte("SQLite format 3"), make([]byte, 100)...), "wrong magic"},
		"version 3": {append(append(bytes.Clone(good[:32]), 3, 0, 0, 0, 0, 0, 0, 0), good[40:]...), "version 3"}, "no gzip": {append(bytes.Clone(good[:40]), "plain text here"...), "gzip"},
		"cut within a message": {append(bytes.Clone(good[:headerBytes]), compressed([]byte{0xa5, 0x6c, 'c', 'o'})...), "unexpected EOF"}, "nested": {nested, "nested"}, "deep": {deep, "nested"}, "long": {long, "more than"}, "claims": {claims, "more than"},
		"a number": {number, "message:"}, "no type": {append(bytes.Clone(good[:headerBytes]), compressed([]byte{0xa0})...), "no type"},
	} {
		if _, _, err := convert(t, c.b); err == nil || !strings.Contains(err.Error(), c.want) {
			t.Errorf("%s: %v, want %q", name, err, c.want)
		}
	}
}

func compressed(b []byte) []byte {
	var out bytes.Buffer
	z := gzip.NewWriter(&out)
	z.Write(b)
	z.Close()
	return out.Bytes()
}

// A bomb ends where it was said to.
func TestBomb(t *testing.T) {
	var messages []m
	for range 20 {
		messages = append(messages, m{"c", 1, 500, p{"stream": 1, "data": make([]byte, 1<<20)}, on(0)})
	}
	b := file(t, 2, true, messages...)
	r, err := NewReader(bytes.NewReader(b), 10<<20)
	n := 0
	for err == nil {
		if _, err = r.Next(); err == nil {
			n++
		}
	}
	if !errors.Is(err, ErrTooLarge) || n != 9 || len(b) > 1<<20 {
		t.Errorf("%d messages of a file of %d bytes, %v", n, len(b), err)
	}
}

func FuzzReader(f *testing.F) {
	for version := range uint64(2) {
		f.Add(file(f, version+1, true, shell...))
	}
	f.Fuzz(func(t *testing.T, b []byte) {
		convert(t, b)
	})
}

// FuzzMessages is below the compression, which a fuzzer does not get through.
func FuzzMessages(f *testing.F) {
	for _, one := range shell {
		b, err := cbor.Marshal(one)
		if err != nil {
			f.Fatal(err)
		}
		f.Add(b)
	}
	head := file(f, 2, true)[:headerBytes]
	f.Fuzz(func(t *testing.T, b []byte) {
		records, _, _ := convert(t, append(bytes.Clone(head), compressed(b)...))
		if len(records) > len(b)+1 {
			t.Fatalf("%d records of %d bytes", len(records), len(b))
		}
	})
}
