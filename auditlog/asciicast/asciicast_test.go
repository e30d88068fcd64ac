package asciicast

import (
	"bytes"
	"encoding/json"
	"strings"
	"testing"
	"time"
	"unicode/utf8"
)

var start = time.Unix(1504467315, 0)

func write(t *testing.T, version int) string {
	t.Helper()
	var b bytes.Buffer
	a, err := NewWriter(&b, version, Header{Columns: 80, Rows: 24, Start: start, Command: "ls <dir>", Title: "s1", Term: "xterm"})
	if err != nil {
		t.Fatal(err)
	}
	at := func(d time.Duration) time.Time { return start.Add(d) }
	for _, err := range []error{a.Data(Output, at(time.Second), []byte("caf\xc3")), a.Data(Output, at(1500*time.Millisecond), []byte("\xa9\x1b[0m\xff")),
		a.Data(Input, at(time.Second), []byte("x")), a.Resize(at(2*time.Second), 100, 30), a.Mark(at(3*time.Second), "ls"),
		a.Data(Output, at(3*time.Second), []byte("\xe2\x82")), a.Exit(at(4*time.Second), "1"), a.Close()} {
		if err != nil {
			t.Fatal(err)
		}
	}
	return b.String()
}

func TestV2(t *testing.T) {
	want := `{"version":2,"width":80,"height":24,"timestamp":1504467315,"command":"ls \u003cdir\u003e","title":"s1","env":{"TERM":"xterm"}}
[1.000000,"o","caf"]
[1.500000,"o","é\u001b[0m\ufffd"]
[1.500000,"i","x"]
[2.000000,"r","100x30"]
[3.000000,"m","ls"]
[3.000000,"o","\ufffd\ufffd"]
`
	if got := write(t, 2); got != want {
		t.Errorf("got\n%s", got)
	}
}

func TestV3(t *testing.T) {
	want := `{"version":3,"term":{"cols":80,"rows":24,"type":"xterm"},"timestamp":1504467315,"command":"ls \u003cdir\u003e","title":"s1"}
[1.000000,"o","caf"]
[0.500000,"o","é\u001b[0m\ufffd"]
[0.000000,"i","x"]
[0.500000,"r","100x30"]
[1.000000,"m","ls"]
[0.000000,"o","\ufffd\ufffd"]
[1.000000,"x","1"]
`
	if got := write(t, 3); got != want {
		t.Errorf("got\n%s", got)
	}
	if _, err := NewWriter(&bytes.Buffer{}, 1, Header{}); err == nil {
		t.Error("version 1")
	}
}

// Whatever passes, each line is JSON, and all valid characters come through.
func FuzzData(f *testing.F) {
	f.Add([]byte("caf\xc3"), []byte("\xa9 \xff\x1b]52"))
	f.Fuzz(func(t *testing.T, one, two []byte) {
		var b bytes.Buffer
		a, err := NewWriter(&b, 2, Header{})
		if err != nil {
			t.Fatal(err)
		}
		for _, p := range [][]byte{one, two} {
			if err := a.Data(Output, start, p); err != nil {
				t.Fatal(err)
			}
		}
		if err := a.Close(); err != nil {
			t.Fatal(err)
		}
		got := ""
		for i, l := range strings.Split(strings.TrimSuffix(b.String(), "\n"), "\n") {
			var event []any
			if i > 0 {
				if err := json.Unmarshal([]byte(l), &event); err != nil {
					t.Fatalf("%q: %v", l, err)
				}
				got += event[2].(string)
			}
		}
		if all := append(bytes.Clone(one), two...); utf8.Valid(all) && got != string(all) {
			t.Fatalf("%q became %q", all, got)
		}
	})
}
