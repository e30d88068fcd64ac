package auditlog

import (
	"bytes"
	"reflect"
	"strings"
	"testing"
	"time"
)

// The hand-written encoding of Data and of a record's head is the generic encoder's.
func TestDataEncoding(t *testing.T) {
	var sizes = []int{0, 1, 23, 24, 255, 256, 65535, 65536, 70000}
	for _, n := range sizes {
		for bits := range 12 {
			d := Data{Stream: Stream(bits % 3), Data: bytes.Repeat([]byte{0xa5}, n), Hidden: bits&4 != 0, EOF: bits&8 != 0}
			want, err := encMode.Marshal(&d)
			if err != nil {
				t.Fatal(err)
			}
			if got := appendData(nil, d.Stream, d.Data, d.Hidden, d.EOF); !bytes.Equal(got, want) {
				t.Errorf("%d bytes, %+v: %x, want %x", n, d.Stream, got[:min(16, len(got))], want[:min(16, len(want))])
			}
		}
	}
	for _, w := range []wireRecord{
		{}, {Sequence: 23, Time: 24, Channel: 255, Kind: 8}, {Sequence: 256, Time: -1, Channel: 1 << 31, Kind: 255},
		{Sequence: 1<<64 - 1, Time: 1<<63 - 1, Channel: 1<<32 - 1, Kind: 24}, {Sequence: 1 << 32, Time: -1 << 63, Channel: 65536, Kind: 12},
	} {
		w.Body = []byte{0xa0}
		want, err := encMode.Marshal(w)
		if err != nil {
			t.Fatal(err)
		}
		got := append(appendHead(nil, w.Sequence, time.Unix(0, w.Time), w.Channel, Kind(w.Kind)), 0xa0)
		if !bytes.Equal(got, want) {
			t.Errorf("%+v: %x, want %x", w, got, want)
		}
		if len(got)-1 > maxHead {
			t.Errorf("head of %d bytes", len(got)-1)
		}
	}
}

// Every kind comes back as it was, and none is missing from the tables.
func TestKinds(t *testing.T) {
	kinds := []Kind{KindProgramExec, KindProgramStart, KindProgramEnd, KindConnectOut, KindScript, KindUnaudited,
		KindTransfer, KindContent, KindDataRest, KindForward}
	for k := KindConnect; k <= KindRefused; k++ {
		kinds = append(kinds, k)
	}
	for _, k := range kinds {
		body := newBody(k)
		if body == nil || body.Kind() != k || strings.HasPrefix(k.String(), "kind-") {
			t.Fatalf("kind %d: %T %s", k, body, k)
		}
		v := reflect.ValueOf(body).Elem()
		for i := range v.NumField() {
			switch f := v.Field(i); f.Interface().(type) {
			case string:
				f.SetString("text " + v.Type().Field(i).Name)
			case []string:
				f.Set(reflect.ValueOf([]string{"one", "two"}))
			case []byte:
				f.SetBytes([]byte{0, 0xff})
			case [][]byte:
				f.Set(reflect.ValueOf([][]byte{{0, 0xff}, {}}))
			case []uint64:
				f.Set(reflect.ValueOf([]uint64{1, 1 << 40}))
			case *TransferAttrs:
				f.Set(reflect.ValueOf(&TransferAttrs{1, 1 << 40, 3, 4, 5, 6, 7}))
			case *TransferFlow:
				f.Set(reflect.ValueOf(&TransferFlow{1 << 40, []uint64{1, 2}, true, true, []byte{1}, true, 7}))
			case bool:
				f.SetBool(true)
			case time.Time:
				f.Set(reflect.ValueOf(time.Unix(1_700_000_000, 123_456_789).UTC()))
			default:
				if f.CanInt() {
					f.SetInt(77)
				} else {
					f.SetUint(2)
				}
			}
		}
		b, err := encodeBody(body)
		if err != nil {
			t.Fatal(err)
		}
		rec, rest, bodyErr, err := decodeRecord(append(appendHead(nil, 5, time.Unix(0, 6), 7, k), b...))
		if err != nil || bodyErr != nil || len(rest) != 0 || !reflect.DeepEqual(rec.Body, body) {
			t.Errorf("%s: %+v, want %+v (%v, %v)", k, rec.Body, body, bodyErr, err)
		}
		if rec.Sequence != 5 || !rec.Time.Equal(time.Unix(0, 6)) || rec.Channel != 7 {
			t.Errorf("%s: %+v", k, rec)
		}
	}
	rec, _, bodyErr, err := decodeRecord([]byte{0x85, 0, 0, 0, 0x18, 200, 0xa1, 1, 2})
	if u, ok := rec.Body.(*Unknown); err != nil || bodyErr != nil || !ok || u.Number != 200 || !bytes.Equal(u.Raw, []byte{0xa1, 1, 2}) {
		t.Errorf("unknown kind: %+v %v %v", rec, bodyErr, err)
	}
	// A later version's field is passed over.
	if rec, _, bodyErr, err := decodeRecord([]byte{0x85, 0, 0, 0, byte(KindExit), 0xa2, 1, 3, 0x18, 99, 0x61, 'x'}); err != nil || bodyErr != nil ||
		rec.Body.(*Exit).Code != 3 {
		t.Errorf("unknown field: %+v %v %v", rec, bodyErr, err)
	}
}

func TestInvalidText(t *testing.T) {
	body := &Authenticate{User: "caf\xe9 \xff", Method: "publickey"}
	b, err := encodeBody(body)
	if err != nil {
		t.Fatal(err)
	}
	var got Authenticate
	if err := decMode.Unmarshal(b, &got); err != nil || got.User != `caf\xe9 \xff` || got.Method != "publickey" {
		t.Errorf("%+v %v", got, err)
	}
	if body.User != "caf\xe9 \xff" {
		t.Error("the caller's body was changed")
	}
	if b, err = encodeBody(&Refused{Users: []string{"a", "\xff"}}); err != nil || !bytes.Contains(b, []byte(`\xff`)) {
		t.Errorf("%x %v", b, err)
	}
}

func TestNames(t *testing.T) {
	for _, s := range []string{"sessions/2026/11/22/s-1/00000000.seg", "gate/gate-1/2026/02/28/20260228T000000Z-AB/00000107.seg"} {
		if n, err := ParseName(s); err != nil || n.String() != s {
			t.Errorf("%s: %v %v", s, n, err)
		}
	}
	for _, s := range []string{"", "sessions/2026/11/22/s/00000000.se", "sessions/2026/13/22/s/00000000.seg", "sessions/2026/1/22/s/00000000.seg",
		"sessions/2026/11/22/../00000000.seg", "sessions/2026/11/22/s/0000000.seg", "sessions/2026/11/22/s/+0000000.seg", "other/2026/11/22/s/00000000.seg",
		"gate/2026/11/22/s/00000000.seg", "gate/a.b/2026/11/22/s/00000000.seg", "sessions/2026/11/22/s/x/00000000.seg"} {
		if n, err := ParseName(s); err == nil {
			t.Errorf("%s: parsed as %v", s, n)
		}
	}
}

func TestFoldedSource(t *testing.T) {
	for in, want := range map[string]string{"192.0.2.1:22": "192.0.2.1", "192.0.2.1": "192.0.2.1", "[2001:db8::1]:22": "2001:db8::/64",
		"2001:db8:0:1::5": "2001:db8:0:1::/64", "[::ffff:192.0.2.1]:9": "192.0.2.1", "[::1]:9": "::1", "pipe": "pipe"} {
		if got := foldedSource(in); got != want {
			t.Errorf("%s: %s, want %s", in, got, want)
		}
	}
}

// However many sources there are, a period holds a bounded number.
func TestFoldBounded(t *testing.T) {
	l := &Log{now: time.Now, wall: time.Now}
	var sum uint64
	for i := range 1000 {
		l.Refused(Refused{Source: "10.0." + string(rune('0'+i%8)) + "." + time.Duration(i).String()[:1], Users: []string{strings.Repeat("u", i)}})
		l.Refused(Refused{Source: "other source " + time.Duration(i).String()})
	}
	for _, f := range l.fold.sources {
		sum += f.Count
	}
	if len(l.fold.sources) > 65 || sum != 2000 {
		t.Errorf("%d sources, %d connections", len(l.fold.sources), sum)
	}
}
