package transfer

import (
	"bytes"
	"crypto/sha256"
	"encoding/hex"
	"errors"
	"io"
	"math/rand"
	"os"
	"os/exec"
	"path/filepath"
	"reflect"
	"strings"
	"sync"
	"testing"
	"time"
)

var servers = map[string]server{"openssh": opensshServer, "agent": agentServer}

// sftpClient runs OpenSSH's sftp with a batch of commands.
func sftpClient(t *testing.T, dir string, srv server, batch string, change func(*Config)) (*recording, string, bool) {
	t.Helper()
	r := newRecording()
	file := filepath.Join(t.TempDir(), "batch")
	if err := os.WriteFile(file, []byte(batch), 0o600); err != nil {
		t.Fatal(err)
	}
	out, ok := client(t, dir, srv, func(_ string, server, client io.Writer) decoder {
		c := r.config(server, client)
		if change != nil {
			change(&c)
		}
		return NewSFTP(c)
	}, "sftp", "-b", file, "host")
	return r, out, ok
}

func random(n int) []byte {
	b := make([]byte, n)
	rand.New(rand.NewSource(int64(n))).Read(b)
	return b
}

func put(t *testing.T, path string, b []byte) {
	t.Helper()
	if err := os.MkdirAll(filepath.Dir(path), 0o755); err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(path, b, 0o644); err != nil {
		t.Fatal(err)
	}
}

// sha256sum is what the program of that name says.
func sha256sum(t *testing.T, path string) string {
	t.Helper()
	b, err := exec.Command("sha256sum", "--", path).Output()
	if err != nil {
		t.Fatal(err)
	}
	return string(b[:64])
}

func TestRealClient(t *testing.T) {
	for name, srv := range servers {
		t.Run(name, func(t *testing.T) {
			dir, local := t.TempDir(), t.TempDir()
			big := random(5<<20 + 12345)
			put(t, local+"/big", big)
			put(t, local+"/empty", nil)
			put(t, local+"/tree/a/b", []byte("b"))
			put(t, local+"/tree/c", []byte("c"))
			put(t, local+"/part", random(100000)[:40000])
			put(t, local+"/longer", random(100000))
			put(t, dir+"/short", random(100000)[:60000])
			put(t, dir+"/whole", random(100000))
			r, out, ok := sftpClient(t, dir, srv, strings.ReplaceAll(`
put LOCAL/big big
put -p LOCAL/empty empty
get big LOCAL/back
get empty LOCAL/empty2
put -r LOCAL/tree tree
get -r tree LOCAL/tree2
reget whole LOCAL/part
reput LOCAL/longer short
rename big big2
ln big2 hard
ln -s big2 soft
mkdir d
chmod 700 d
rmdir d
put -f LOCAL/empty synced
chmod -h 640 big2
-get ~/nothing LOCAL/nothing
ls -l
-df
-get nothing LOCAL/nothing
-cp big2 copied
rm hard
get big2 LOCAL/again
`, "LOCAL", local), func(c *Config) { c.Mode = ContentFull })
			if !ok {
				t.Fatal(out)
			}
			if list := r.of(Undecodable); len(list) > 0 {
				t.Fatal(dump(list))
			}
			for _, e := range r.events {
				if e.Unfinished || e.Denied || e.End.Before(e.Start) {
					t.Errorf("%+v", e)
				}
			}
			up := r.events[0]
			if up.Kind != File || up.Path.Asked != dir+"/big" && up.Path.Asked != "big" {
				t.Errorf("the first event: %+v", up)
			}
			want := sha256sum(t, local+"/big")
			if got := hex.EncodeToString(up.Written.SHA256); got != want || !up.Written.Whole ||
				up.Written.Bytes != uint64(len(big)) || up.Read.Bytes != 0 {
				t.Errorf("put: %+v, want %s", up, want)
			}
			if !bytes.Equal(r.content["1to-server"], big) && !bytes.Equal(r.content["1 to-server"], big) {
				t.Error("the content that was kept is not the file's")
			}
			var down *Event
			for _, e := range r.of(File) {
				if strings.HasSuffix(e.Path.Asked, "big") && e.Read.Bytes > 0 {
					down = e
				}
			}
			if down == nil || hex.EncodeToString(down.Read.SHA256) != want || !down.Read.Whole {
				t.Errorf("get: %+v", down)
			}
			for _, e := range r.of(File) {
				if strings.HasSuffix(e.Path.Asked, "empty") {
					f := e.Written
					if e.Flags&FlagRead != 0 {
						f = e.Read
					}
					if f.Bytes != 0 || !f.Whole || hex.EncodeToString(f.SHA256) != sha256sum(t, local+"/empty") {
						t.Errorf("an empty file: %+v", e)
					}
				}
			}
			if e := r.one(t, File, "whole"); e.Read.Whole || e.Read.SHA256 != nil ||
				!reflect.DeepEqual(e.Read.Ranges, []Range{{40000, 100000}}) {
				t.Errorf("reget: %+v", e)
			}
			if e := r.one(t, File, "short"); e.Written.Whole || e.Written.SHA256 != nil ||
				!reflect.DeepEqual(e.Written.Ranges, []Range{{60000, 100000}}) {
				t.Errorf("reput: %+v", e)
			}
			if e := r.one(t, Rename, "big"); !strings.HasSuffix(e.Target.Asked, "big2") || e.Status.Code != StatusOK {
				t.Errorf("rename: %+v", e)
			}
			if e := r.one(t, Link, "big2"); !strings.HasSuffix(e.Target.Asked, "hard") || e.Status.Code != StatusOK {
				t.Errorf("ln: %+v", e)
			}
			if e := r.one(t, Symlink, "soft"); e.Target.Asked != "big2" || e.Status.Code != StatusOK {
				t.Errorf("ln -s: %+v", e)
			}
			if e := r.one(t, Mkdir, "/d"); e.Status.Code != StatusOK {
				t.Errorf("mkdir: %+v", e)
			}
			if e := r.one(t, Setstat, "/d"); e.Attrs.Permissions&0o777 != 0o700 {
				t.Errorf("chmod: %+v", e)
			}
			r.one(t, Rmdir, "/d")
			if e := r.one(t, Setstat, "big2"); e.Detail != "lsetstat@openssh.com" || e.Attrs.Permissions&0o777 != 0o640 || e.Status.Code != StatusOK {
				t.Errorf("chmod -h: %+v", e)
			}
			r.one(t, Remove, "hard")
			var names uint64
			for _, e := range r.of(List) {
				if filepath.Clean(e.Path.Asked) == dir || e.Path.Asked == "." {
					names = e.Names
				}
			}
			if names < 7 {
				t.Errorf("ls: %d names:\n%s", names, dump(r.of(List)))
			}
			copied := r.one(t, Copy, "big2")
			if !strings.HasSuffix(copied.Target.Asked, "copied") || copied.Status.Code != StatusOK {
				t.Errorf("cp: %+v", copied)
			}
			if e := r.one(t, File, "copied"); e.Written.SHA256 != nil || e.Written.Whole {
				t.Errorf("a file that was copied into: %+v", e)
			}
			for _, p := range []string{"tree/a/b", "tree/c"} {
				if n := len(r.of(File)); n < 10 {
					t.Errorf("%s: %d files", p, n)
				}
			}
		})
	}
}

// Each of OpenSSH's extensions that is not recorded passes as it is, is answered, and leaves nothing behind.
func TestExtensions(t *testing.T) {
	for name, srv := range servers {
		t.Run(name, func(t *testing.T) {
			dir := t.TempDir()
			put(t, dir+"/f", []byte("content"))
			in, out, wait := srv(t, "", dir)
			r := newRecording()
			answers, toClient := io.Pipe()
			c := r.config(in, toClient)
			c.Decide, c.Resolve = func(*Op) Verdict { return Verdict{} }, true
			s := NewSFTP(c)
			ended := make(chan error, 1)
			go func() { ended <- feed(out, s.Server) }()
			id := uint32(0)
			ask := func(p *packet) byte {
				t.Helper()
				if err := s.Client(p.bytes()); err != nil {
					t.Fatal(err)
				}
				var head [4]byte
				if _, err := io.ReadFull(answers, head[:]); err != nil {
					t.Fatal(err)
				}
				b := make([]byte, length(head[:]))
				if _, err := io.ReadFull(answers, b); err != nil {
					t.Fatal(err)
				}
				if b[0] == fxpStatus && !bytes.Equal(b[5:9], make([]byte, 4)) {
					t.Errorf("status %d", b[8])
				}
				if b[0] == fxpHandle {
					return b[len(b)-1]
				}
				return b[0]
			}
			next := func(typ byte) *packet { id++; return newPacket(typ).uint32(id) }
			ask(newPacket(fxpInit).uint32(3))
			handle := string([]byte{0, 0, 0, ask(next(fxpOpen).string("f").uint32(FlagRead | FlagWrite).uint32(0))})
			for _, test := range []struct {
				p    *packet
				want byte
			}{
				{next(fxpExtended).string("statvfs@openssh.com").string("f"), fxpExtendedReply},
				{next(fxpExtended).string("fstatvfs@openssh.com").string(handle), fxpExtendedReply},
				{next(fxpExtended).string("fsync@openssh.com").string(handle), fxpStatus},
				{next(fxpExtended).string("limits@openssh.com"), fxpExtendedReply},
				{next(fxpExtended).string("expand-path@openssh.com").string("~/f"), fxpName},
				{next(fxpExtended).string("users-groups-by-id@openssh.com").string("\x00\x00\x00\x00").string(""), fxpExtendedReply},
				{next(fxpStat).string("f"), fxpAttrs}, {next(fxpLstat).string("f"), fxpAttrs}, {next(fxpFstat).string(handle), fxpAttrs},
				{next(fxpRealpath).string("."), fxpName}, {next(fxpClose).string(handle), fxpStatus},
			} {
				if got := ask(test.p); got != test.want {
					t.Errorf("%q: an answer of type %d, not %d", test.p.b, got, test.want)
				}
			}
			in.Close()
			<-ended
			wait()
			if err := s.Finish(); err != nil {
				t.Error(err)
			}
			if len(r.events) != 1 || len(r.of(File)) != 1 || len(s.requests)+len(s.files) != 0 {
				t.Errorf("%d requests, %d files; %s", len(s.requests), len(s.files), dump(r.events))
			}
		})
	}
}

// A file that can't be opened is an event, with the server's word.
func TestOpenFails(t *testing.T) {
	dir := t.TempDir()
	c := newTalk(t, nil)
	c.begin()
	c.ask(newPacket(fxpOpen).uint32(7).string(dir + "/x\x01").uint32(FlagRead).uint32(0).bytes())
	c.answer(statusPacket(7, 2, "no \x1b[31m such\xff file"))
	e := c.r.one(t, File, "/x\x01")
	if e.Status.Code != 2 || e.Status.Message != `no \x1b[31m such\xff file` || e.Unfinished {
		t.Errorf("%+v", e)
	}
}

// talk is a hand-made session.
type talk struct {
	t          *testing.T
	r          *recording
	s          *SFTP
	toS, toC   *bytes.Buffer
	cErr, sErr error
}

func newTalk(t *testing.T, change func(*Config)) *talk {
	k := &talk{t: t, r: newRecording(), toS: &bytes.Buffer{}, toC: &bytes.Buffer{}}
	c := k.r.config(k.toS, k.toC)
	now := time.Unix(1e9, 0)
	c.Now = func() time.Time { return now }
	if change != nil {
		change(&c)
	}
	k.s = NewSFTP(c)
	return k
}

func (k *talk) ask(b ...[]byte)    { k.cErr = k.s.Client(bytes.Join(b, nil)) }
func (k *talk) answer(b ...[]byte) { k.sErr = k.s.Server(bytes.Join(b, nil)) }

func (k *talk) begin() {
	k.ask(newPacket(fxpInit).uint32(3).bytes())
	k.answer(newPacket(fxpVersion).uint32(3).string("limits@openssh.com").string("1").bytes())
}

// open opens a file with a handle.
func (k *talk) open(id uint32, path, handle string, flags uint32) {
	k.ask(openPacket(id, path, flags))
	k.answer(newPacket(fxpHandle).uint32(id).string(handle).bytes())
}

func openPacket(id uint32, path string, flags uint32) []byte {
	return newPacket(fxpOpen).uint32(id).string(path).uint32(flags).uint32(0).bytes()
}
func readPacket(id uint32, handle string, offset uint64, n uint32) []byte {
	return newPacket(fxpRead).uint32(id).string(handle).uint64(offset).uint32(n).bytes()
}
func writePacket(id uint32, handle string, offset uint64, p string) []byte {
	return newPacket(fxpWrite).uint32(id).string(handle).uint64(offset).string(p).bytes()
}
func closePacket(id uint32, handle string) []byte {
	return newPacket(fxpClose).uint32(id).string(handle).bytes()
}
func dataPacket(id uint32, p string) []byte {
	return newPacket(fxpData).uint32(id).string(p).bytes()
}

func sum(p string) string {
	s := sha256.Sum256([]byte(p))
	return string(s[:])
}

// Answers in another order than the questions, and short ones, give the same hash.
func TestOutOfOrder(t *testing.T) {
	k := newTalk(t, nil)
	k.begin()
	k.open(1, "f", "h", FlagRead)
	k.ask(readPacket(2, "h", 0, 4), readPacket(3, "h", 4, 4), readPacket(4, "h", 8, 4), readPacket(5, "h", 12, 4))
	k.answer(dataPacket(4, "ijkl"), statusPacket(5, StatusEOF, ""), dataPacket(2, "ab"))
	k.ask(readPacket(6, "h", 2, 2), closePacket(7, "h"))
	k.answer(dataPacket(3, "efgh"), statusPacket(7, StatusOK, ""))
	if len(k.r.events) != 0 {
		t.Fatalf("an event before the last answer: %s", dump(k.r.events))
	}
	k.answer(dataPacket(6, "cd"))
	e := k.r.one(t, File, "f")
	if string(e.Read.SHA256) != sum("abcdefghijkl") || !e.Read.Whole || e.Read.Bytes != 12 || e.Unfinished {
		t.Errorf("%+v", e)
	}
	if err := k.s.Finish(); err != nil || len(k.r.events) != 1 {
		t.Errorf("%v %s", err, dump(k.r.events))
	}
}

// What is read again changes neither the hash nor that it is of the whole file: paramiko reads ahead, and all but the first piece
// once more when the answers catch up with its questions.
func TestReadAgain(t *testing.T) {
	const text = "abcdefghijkl"
	for name, tc := range map[string]struct {
		reads []Range
		again uint64
		hash  string // of how much; "" if of nothing
		whole bool
	}{
		"all twice":                         {[]Range{{0, 12}, {0, 12}}, 12, text, true},
		"paramiko":                          {[]Range{{0, 4}, {4, 8}, {4, 8}, {8, 12}, {8, 12}}, 8, text, true},
		"across what is hashed":             {[]Range{{0, 4}, {2, 12}}, 2, text, true},
		"in what is hashed":                 {[]Range{{0, 12}, {3, 5}}, 2, text, true},
		"ahead, twice":                      {[]Range{{8, 12}, {8, 12}, {8, 10}, {0, 8}}, 6, text, true},
		"ahead, longer the second time":     {[]Range{{8, 10}, {8, 12}, {0, 8}}, 2, "", false},
		"ahead, and overtaken by an answer": {[]Range{{6, 12}, {0, 8}}, 2, "", false},
		"not all":                           {[]Range{{0, 4}, {0, 4}}, 4, text[:4], false},
		"not the beginning":                 {[]Range{{4, 12}, {4, 12}}, 8, "", false},
		"a hole":                            {[]Range{{0, 4}, {0, 4}, {8, 12}}, 4, "", false},
	} {
		t.Run(name, func(t *testing.T) {
			k := newTalk(t, nil)
			k.begin()
			k.open(1, "f", "h", FlagRead)
			id := uint32(2)
			for _, r := range tc.reads {
				k.ask(readPacket(id, "h", r.Start, uint32(r.End-r.Start)))
				p := dataPacket(id, text[r.Start:r.End])
				k.answer(p[:len(p)-1])
				k.answer(p[len(p)-1:]) // content in two pieces
				id++
			}
			k.ask(readPacket(id, "h", 12, 4), closePacket(id+1, "h"))
			k.answer(statusPacket(id, StatusEOF, ""), statusPacket(id+1, StatusOK, ""))
			f := k.r.one(t, File, "f").Read
			want := ""
			if tc.hash != "" {
				want = sum(tc.hash)
			}
			once := uint64(0)
			for _, r := range f.Ranges {
				once += r.End - r.Start
			}
			if string(f.SHA256) != want || f.Whole != tc.whole || f.Contiguous || f.Bytes-once != tc.again {
				t.Errorf("%+v", f)
			}
			if n := k.s.ahead.Load(); n != 0 {
				t.Errorf("%d bytes are held still", n)
			}
		})
	}
}

// The hash is not known where content came too far ahead, twice, or was not acknowledged.
func TestHashNotKnown(t *testing.T) {
	for name, tc := range map[string]func(k *talk){
		"far ahead": func(k *talk) {
			for i := range uint32(9) {
				k.ask(writePacket(10+i, "h", uint64(i+1)<<17, strings.Repeat("x", 1<<17)))
			}
			k.ask(writePacket(9, "h", 0, strings.Repeat("x", 1<<17)))
			for i := range uint32(10) {
				k.answer(statusPacket(9+i, StatusOK, ""))
			}
		},
		"twice": func(k *talk) {
			k.ask(writePacket(2, "h", 0, "abc"), writePacket(3, "h", 1, "x"))
			k.answer(statusPacket(2, StatusOK, ""), statusPacket(3, StatusOK, ""))
		},
		"the same again": func(k *talk) {
			k.ask(writePacket(2, "h", 0, "abc"), writePacket(3, "h", 0, "abc"))
			k.answer(statusPacket(2, StatusOK, ""), statusPacket(3, StatusOK, ""))
		},
		"failed": func(k *talk) {
			k.ask(writePacket(2, "h", 0, "abc"), writePacket(3, "h", 3, "x"))
			k.answer(statusPacket(2, StatusOK, ""), statusPacket(3, StatusFailure, "full"))
		},
		"a hole": func(k *talk) {
			k.ask(writePacket(2, "h", 0, "abc"), writePacket(3, "h", 10, "x"))
			k.answer(statusPacket(2, StatusOK, ""), statusPacket(3, StatusOK, ""))
		},
		"answered before it was sent": func(k *talk) {
			p := writePacket(2, "h", 0, "abcdef")
			k.ask(p[:len(p)-3])
			k.answer(statusPacket(2, StatusOK, ""))
			k.s.Finish()
		},
	} {
		t.Run(name, func(t *testing.T) {
			k := newTalk(t, nil)
			k.begin()
			k.open(1, "f", "h", FlagWrite|FlagCreate|FlagTruncate)
			tc(k)
			k.ask(closePacket(99, "h"))
			k.answer(statusPacket(99, StatusOK, ""))
			e := k.r.one(t, File, "f")
			if e.Written.SHA256 != nil || e.Written.Whole {
				t.Errorf("%+v", e)
			}
			if k.s.ahead.Load() != 0 {
				t.Errorf("%d bytes are held still", k.s.ahead.Load())
			}
			if name == "failed" && (e.Status != Status{StatusFailure, "full"} || e.Written.Bytes != 3) {
				t.Errorf("%+v", e)
			}
		})
	}
}

func TestWritesOutOfOrder(t *testing.T) {
	k := newTalk(t, nil)
	k.begin()
	k.open(1, "f", "h", FlagWrite|FlagCreate|FlagTruncate)
	k.ask(writePacket(2, "h", 6, "ghi"), writePacket(3, "h", 3, "def"), writePacket(4, "h", 0, "abc"), closePacket(5, "h"))
	k.answer(statusPacket(3, 0, ""), statusPacket(5, 0, ""), statusPacket(4, 0, ""), statusPacket(2, 0, ""))
	if e := k.r.one(t, File, "f"); string(e.Written.SHA256) != sum("abcdefghi") || !e.Written.Whole {
		t.Errorf("%+v", e)
	}
}

// A client that leaves, and one that keeps its handle.
func TestUnfinished(t *testing.T) {
	k := newTalk(t, nil)
	k.begin()
	k.open(1, "f", "h", FlagRead)
	k.ask(readPacket(2, "h", 0, 4), newPacket(fxpRemove).uint32(3).string("g").bytes())
	k.answer(dataPacket(2, "abcd"))
	if err := k.s.Finish(); err != nil {
		t.Fatal(err)
	}
	if e := k.r.one(t, File, "f"); !e.Unfinished || e.Read.Bytes != 4 || string(e.Read.SHA256) != sum("abcd") || e.Read.Whole {
		t.Errorf("%+v", e)
	}
	if e := k.r.one(t, Remove, "g"); !e.Unfinished {
		t.Errorf("%+v", e)
	}
	if err := k.s.Client([]byte{0}); !errors.Is(err, ErrFinished) {
		t.Error(err)
	}
}

// What does not keep to the protocol is said once, and all from there on is raw; with rules it ends.
func TestUndecodable(t *testing.T) {
	for name, tc := range map[string]struct {
		dir  Direction
		made func(k *talk) // before it
		b    []byte
	}{
		"a shell":            {ToServer, nil, []byte("id; uname -a\n")},
		"too long":           {ToServer, nil, []byte{0x7f, 0xff, 0xff, 0xff, fxpOpen}},
		"too short":          {ToServer, nil, []byte{0, 0, 0, 1, fxpOpen}},
		"unknown type":       {ToServer, nil, newPacket(21).uint32(1).bytes()},
		"a long path":        {ToServer, nil, newPacket(fxpRemove).uint32(1).string(strings.Repeat("a", 4097)).bytes()},
		"a long handle":      {ToServer, nil, closePacket(1, strings.Repeat("h", 257))},
		"more in the packet": {ToServer, nil, newPacket(fxpRemove).uint32(1).string("a").string("b").bytes()},
		"no such handle":     {ToServer, nil, writePacket(1, "x", 0, "secret")},
		"a wrong length": {ToServer, nil, newPacket(fxpWrite).uint32(1).string("h").uint64(0).uint32(100).
			raw([]byte("abc")).bytes()},
		"an id twice": {ToServer, func(k *talk) { k.ask(newPacket(fxpRemove).uint32(1).string("a").bytes()) },
			newPacket(fxpRemove).uint32(1).string("b").bytes()},
		"second INIT":    {ToServer, nil, newPacket(fxpInit).uint32(3).bytes()},
		"no question":    {ToClient, nil, dataPacket(1, "secret")},
		"second VERSION": {ToClient, nil, newPacket(fxpVersion).uint32(3).bytes()},
		"too much": {ToClient, func(k *talk) { k.ask(readPacket(1, "h", 0, 2)) },
			dataPacket(1, "secret")},
		"a handle twice": {ToClient, func(k *talk) { k.ask(openPacket(1, "x", FlagRead)) },
			newPacket(fxpHandle).uint32(1).string("h").bytes()},
		"another type": {ToClient, func(k *talk) { k.ask(closePacket(1, "h")) }, dataPacket(1, "")},
		"an OK without a handle": {ToClient, func(k *talk) { k.ask(openPacket(1, "x", FlagRead)) },
			statusPacket(1, StatusOK, "")},
	} {
		for _, strict := range []bool{false, true} {
			t.Run(name, func(t *testing.T) {
				k := newTalk(t, func(c *Config) {
					if strict {
						c.Decide = func(*Op) Verdict { return Verdict{} }
					}
				})
				k.begin()
				k.open(1000, "f", "h", FlagRead|FlagWrite)
				if tc.made != nil {
					tc.made(k)
				}
				out, offset, give := k.toS, k.toS.Len(), k.s.Client
				if tc.dir == ToClient {
					out, offset, give = k.toC, k.toC.Len(), k.s.Server
				}
				err := give(tc.b)
				list := k.r.of(Undecodable)
				if len(list) != 1 || list[0].Direction != tc.dir || list[0].Offset != uint64(offset) || list[0].Detail == "" {
					t.Fatalf("%v: %s", err, dump(k.r.events))
				}
				if strict {
					if !errors.Is(err, ErrUndecodable) || out.Len() != offset {
						t.Errorf("passed, or %v", err)
					}
					if err := k.s.Client([]byte("more")); !errors.Is(err, ErrUndecodable) {
						t.Error(err)
					}
				} else {
					k.ask([]byte("more"))
					k.answer([]byte("other"))
					all := append(append([]byte{}, k.r.raw[0].Bytes()...), k.r.raw[1].Bytes()...)
					for _, p := range [][]byte{tc.b, []byte("more"), []byte("other")} {
						if !bytes.Contains(all, p) {
							t.Errorf("not recorded raw: %q", p)
						}
					}
					if !bytes.Equal(out.Bytes()[offset:], k.r.raw[tc.dir].Bytes()) || k.cErr != nil || k.sErr != nil {
						t.Errorf("not passed: %q %v %v", out.Bytes()[offset:], k.cErr, k.sErr)
					}
				}
				if err := k.s.Finish(); err != nil {
					t.Error(err)
				}
				if e := k.r.one(t, File, "f"); !e.Unfinished {
					t.Errorf("%+v", e)
				}
				if len(k.r.of(Undecodable)) != 1 {
					t.Error("said twice")
				}
			})
		}
	}
}

// session is a small session, as steps of one direction each.
func session() (steps []struct {
	d Direction
	b []byte
}) {
	add := func(d Direction, b ...[]byte) {
		steps = append(steps, struct {
			d Direction
			b []byte
		}{d, bytes.Join(b, nil)})
	}
	add(ToServer, newPacket(fxpInit).uint32(3).bytes())
	add(ToClient, newPacket(fxpVersion).uint32(3).string("a").string("1").bytes())
	add(ToServer, openPacket(1, "f", FlagWrite|FlagTruncate|FlagCreate), newPacket(fxpRename).uint32(2).string("a").string("b").bytes())
	add(ToClient, newPacket(fxpHandle).uint32(1).string("h").bytes(), statusPacket(2, 4, "no"))
	add(ToServer, writePacket(3, "h", 0, "abcdef"), writePacket(4, "h", 6, "ghi"), closePacket(5, "h"),
		newPacket(fxpOpendir).uint32(6).string("d").bytes())
	add(ToClient, statusPacket(4, 0, ""), statusPacket(3, 0, ""), statusPacket(5, 0, ""), newPacket(fxpHandle).uint32(6).string("h").bytes())
	add(ToServer, newPacket(fxpReaddir).uint32(7).string("h").bytes(), newPacket(fxpReaddir).uint32(8).string("h").bytes(),
		closePacket(9, "h"), openPacket(10, "g", FlagRead))
	add(ToClient, newPacket(fxpName).uint32(7).uint32(1).string("n").string("long").uint32(0).bytes(),
		statusPacket(8, StatusEOF, ""), statusPacket(9, 0, ""), newPacket(fxpHandle).uint32(10).string("i").bytes())
	add(ToServer, readPacket(11, "i", 0, 100), readPacket(12, "i", 5, 100))
	add(ToClient, dataPacket(11, "01234"), statusPacket(12, StatusEOF, ""))
	add(ToServer, closePacket(13, "i"))
	add(ToClient, statusPacket(13, 0, ""))
	return steps
}

// However the stream is cut, the events are the same, and so is what passes.
func TestFragments(t *testing.T) {
	run := func(cut func(b []byte) [][]byte) (string, string, string) {
		k := newTalk(t, nil)
		for _, step := range session() {
			for _, p := range cut(step.b) {
				p = bytes.Clone(p)
				give := k.s.Client
				if step.d == ToClient {
					give = k.s.Server
				}
				if err := give(p); err != nil {
					t.Fatal(err)
				}
				clear(p) // the buffer is the caller's
			}
		}
		if err := k.s.Finish(); err != nil {
			t.Fatal(err)
		}
		return dump(k.r.events), k.toS.String(), k.toC.String()
	}
	events, toS, toC := run(func(b []byte) [][]byte { return [][]byte{b} })
	var wantS, wantC string
	for _, step := range session() {
		if step.d == ToServer {
			wantS += string(step.b)
		} else {
			wantC += string(step.b)
		}
	}
	if toS != wantS || toC != wantC {
		t.Fatal("what passed is not what came")
	}
	if strings.Contains(events, "Unfinished:true") || strings.Contains(events, "undecodable") || strings.Count(events, "\n") != 4 {
		t.Fatal(events)
	}
	for n := 1; n < 200; n++ {
		// At each offset once, and in pieces of each size.
		for _, cut := range []func(b []byte) [][]byte{
			func(b []byte) [][]byte { return [][]byte{b[:min(n, len(b))], b[min(n, len(b)):]} },
			func(b []byte) (list [][]byte) {
				for len(b) > n {
					list, b = append(list, b[:n]), b[n:]
				}
				return append(list, b)
			},
		} {
			e, s, c := run(cut)
			if e != events || s != wantS || c != wantC {
				t.Fatalf("cut at %d:\n%s\nnot\n%s", n, e, events)
			}
		}
	}
}

// What a rule refuses is answered in the protocol, between the packets of the server, and does not reach it.
func TestDenied(t *testing.T) {
	k := newTalk(t, func(c *Config) {
		c.Decide = func(op *Op) Verdict {
			if op.Write || op.Kind == Remove {
				return Verdict{Deny: "no uploads"}
			}
			return Verdict{}
		}
	})
	k.begin()
	k.open(1, "f", "h", FlagRead)
	k.ask(readPacket(2, "h", 0, 100))
	sent, b := k.toS.Len(), dataPacket(2, strings.Repeat("x", 100))
	k.answer(b[:50])
	at := k.toC.Len()
	k.ask(openPacket(3, "up", FlagWrite|FlagCreate), newPacket(fxpRemove).uint32(4).string("g").bytes(),
		newPacket(fxpExtended).uint32(5).string("new@example.org").string("x").bytes(), writePacket(6, "h", 0, "abc"))
	if k.cErr != nil || k.toS.Len() != sent {
		t.Fatalf("reached the server: %q, %v", k.toS.Bytes()[sent:], k.cErr)
	}
	if k.toC.Len() != at {
		t.Fatal("injected into a packet")
	}
	k.answer(b[50:])
	want := string(b[50:]) + string(statusPacket(3, 3, "no uploads")) + string(statusPacket(4, 3, "no uploads")) +
		string(statusPacket(5, 8, "the extension is not permitted")) + string(statusPacket(6, 3, "the file is not open for writing"))
	if got := string(k.toC.Bytes()[at:]); got != want {
		t.Fatalf("%q\nnot\n%q", got, want)
	}
	for kind, name := range map[Kind]string{File: "up", Remove: "g", Extension: ""} {
		if e := k.r.one(t, kind, name); !e.Denied || e.Status.Code == StatusOK {
			t.Errorf("%+v", e)
		}
	}
	// With nothing on its way it comes at once; and before the next of many packets in one piece.
	k.ask(openPacket(7, "up2", FlagWrite))
	if !bytes.HasSuffix(k.toC.Bytes(), statusPacket(7, 3, "no uploads")) {
		t.Error("not answered at once")
	}
}

func TestMaxSize(t *testing.T) {
	k := newTalk(t, func(c *Config) { c.Decide = func(op *Op) Verdict { return Verdict{MaxSize: 10} } })
	k.begin()
	k.open(1, "f", "h", FlagWrite|FlagCreate|FlagTruncate)
	k.ask(writePacket(2, "h", 0, "0123456789"))
	n := k.toS.Len()
	k.ask(writePacket(3, "h", 10, "x"), writePacket(4, "h", 5, "123456"),
		newPacket(fxpFsetstat).uint32(5).string("h").uint32(AttrSize).uint64(11).bytes(),
		newPacket(fxpSetstat).uint32(6).string("f").uint32(AttrSize).uint64(11).bytes(), openPacket(7, "a", FlagWrite|FlagAppend))
	if k.toS.Len() != n || k.cErr != nil {
		t.Fatalf("reached the server: %q %v", k.toS.Bytes()[n:], k.cErr)
	}
	k.answer(statusPacket(2, 0, ""))
	k.ask(closePacket(8, "h"))
	k.answer(statusPacket(8, 0, ""))
	if e := k.r.one(t, File, "f"); !e.Denied || e.Status.Code != StatusPermissionDenied || e.Written.Bytes != 10 {
		t.Errorf("%+v", e)
	}
	k.open(9, "g", "h", FlagRead)
	n = k.toS.Len()
	k.ask(readPacket(10, "h", 0, 100))
	if got, want := k.toS.Bytes()[n:], readPacket(10, "h", 0, 11); !bytes.Equal(got, want) {
		t.Errorf("%q, not %q", got, want)
	}
	k.answer(dataPacket(10, "0123456789x"))
	n = k.toS.Len()
	k.ask(readPacket(11, "h", 11, 100))
	if k.toS.Len() != n || !bytes.HasSuffix(k.toC.Bytes(), statusPacket(11, 3, tooLarge)) {
		t.Error("read on")
	}
}

// Rules hold for the path inside, whatever the client calls it, and the server gets the path that was decided upon.
func TestResolve(t *testing.T) {
	for name, srv := range servers {
		t.Run(name, func(t *testing.T) {
			dir, local := t.TempDir(), t.TempDir()
			dir, _ = filepath.EvalSymlinks(dir)
			put(t, dir+"/secret/key", []byte("the key"))
			put(t, dir+"/open/deep/file", []byte("fine"))
			put(t, local+"/up", []byte("up"))
			for link, target := range map[string]string{
				"a": "secret/key", "b": "a", "dir": "secret", "open/up": "..", "abs": dir + "/secret/key", "loop": "loop",
				"deep": "open/deep", "dangling": "secret/new", "proc": "/proc/self/root" + dir + "/secret/key",
			} {
				if err := os.Symlink(target, dir+"/"+link); err != nil {
					t.Fatal(err)
				}
			}
			bad := []string{"secret/key", "a", "b", "dir/key", "open/up/secret/key", "abs", "deep/../../secret/key",
				"./open/../dir/./key", "proc", "//" + dir + "/secret//key"}
			batch := "get open/deep/file LOCAL/1\nget deep/file LOCAL/2\nget deep/../deep/file LOCAL/3\n"
			for _, p := range bad {
				batch += "-get " + p + " LOCAL/stolen\n"
			}
			batch += "-put LOCAL/up dangling\n-put LOCAL/up secret/new\n-get loop LOCAL/stolen\n-ln secret/key open/hard\n" +
				"-rename secret s\nput LOCAL/up deep/new\nln -s " + dir + "/secret/key open/soft\nrm a\nmkdir open/made\n-get open/soft LOCAL/stolen\n"
			var opened sync.Map
			r, out, ok := sftpClient(t, dir, srv, strings.ReplaceAll(batch, "LOCAL", local), func(c *Config) {
				c.Resolve = true
				c.Decide = func(op *Op) Verdict {
					for _, p := range []string{op.Path.Resolved, op.Target.Resolved} {
						if p == dir+"/secret" || strings.HasPrefix(p, dir+"/secret/") {
							return Verdict{Deny: "that is secret"}
						}
					}
					opened.Store(op.Path.Resolved, true)
					return Verdict{}
				}
			})
			if !ok {
				t.Fatal(out)
			}
			if _, err := os.Stat(local + "/stolen"); err == nil {
				b, _ := os.ReadFile(local + "/stolen")
				if len(b) > 0 {
					t.Fatalf("stolen: %q", b)
				}
			}
			if _, err := os.Stat(dir + "/secret/new"); err == nil {
				t.Error("written through a link")
			}
			for _, p := range []string{"/open/deep/new", "/open/soft", "/open/made"} {
				if _, err := os.Lstat(dir + p); err != nil {
					t.Error(err)
				}
			}
			if _, err := os.Lstat(dir + "/a"); err == nil {
				t.Error("rm of a link did not remove the link")
			}
			if _, err := os.Stat(dir + "/secret/key"); err != nil {
				t.Error(err)
			}
			for _, n := range []string{"/1", "/2"} {
				if b, _ := os.ReadFile(local + n); string(b) != "fine" {
					t.Errorf("%s: %q", n, b)
				}
			}
			denied := 0
			for _, e := range r.of(File) {
				if e.Denied {
					denied++
				} else if e.Status.Code == StatusOK && !strings.HasPrefix(e.Path.Resolved, dir+"/open/") {
					t.Errorf("%+v", e)
				}
			}
			if denied < 4 {
				t.Errorf("%d denied:\n%s", denied, dump(r.events))
			}
			if list := r.of(Undecodable); len(list) > 0 {
				t.Error(dump(list))
			}
		})
	}
}

// A server that does not answer the gate ends the transfer.
func TestResolveTimeout(t *testing.T) {
	k := newTalk(t, func(c *Config) { c.Resolve, c.Timeout = true, 20*time.Millisecond })
	k.begin()
	k.ask(openPacket(1, "/a/b", FlagRead))
	if !errors.Is(k.cErr, ErrTimeout) {
		t.Error(k.cErr)
	}
}

// Finish wakes a client that waits.
func TestFinishWakes(t *testing.T) {
	k := newTalk(t, func(c *Config) { c.Resolve = true })
	k.begin()
	done := make(chan error)
	go func() { done <- k.s.Client(openPacket(1, "/a/b", FlagRead)) }()
	time.Sleep(10 * time.Millisecond)
	k.s.Finish()
	if err := <-done; !errors.Is(err, ErrFinished) {
		t.Error(err)
	}
}

func TestContentLimits(t *testing.T) {
	k := newTalk(t, func(c *Config) { c.Mode, c.FileLimit, c.SessionLimit = ContentFull, 5, 8 })
	k.begin()
	for i, want := range []uint64{5, 3, 0} {
		id := uint32(10 * (i + 1))
		k.open(id, "f", "h", FlagWrite|FlagTruncate)
		k.ask(writePacket(id+1, "h", 0, "0123456789"), closePacket(id+2, "h"))
		k.answer(statusPacket(id+1, 0, ""), statusPacket(id+2, 0, ""))
		if e := k.r.events[i]; e.Written.Kept != want || e.Written.SHA256 == nil {
			t.Errorf("%+v", e)
		}
	}
	if k.r.kept != 8 {
		t.Error(k.r.kept)
	}
}

// A client that asks for much and reads nothing is made to wait, in bounded memory.
func TestManyRequests(t *testing.T) {
	k := newTalk(t, nil)
	k.begin()
	k.open(1, "f", "h", FlagRead)
	done := make(chan error)
	go func() {
		var err error
		for i := uint32(0); i < 2*maxRequests && err == nil; i++ {
			err = k.s.Client(readPacket(10+i, "h", uint64(i), 1))
		}
		done <- err
	}()
	for i := uint32(0); i < 2*maxRequests; {
		k.s.mu.Lock()
		n, _ := len(k.s.requests), 0
		_, ok := k.s.requests[10+i]
		k.s.mu.Unlock()
		if n > maxRequests {
			t.Fatal(n)
		}
		if !ok {
			time.Sleep(time.Millisecond)
			continue
		}
		if err := k.s.Server(dataPacket(10+i, "x")); err != nil {
			t.Fatal(err)
		}
		i++
	}
	if err := <-done; err != nil {
		t.Fatal(err)
	}
}

func TestRanges(t *testing.T) {
	var r ranges
	for _, x := range [][2]uint64{{10, 20}, {30, 40}, {0, 5}, {5, 7}, {18, 32}, {7, 10}, {100, 100}} {
		r.add(x[0], x[1])
	}
	if !reflect.DeepEqual(r.list, []Range{{0, 40}}) || r.cut {
		t.Errorf("%+v", r)
	}
	r = ranges{}
	for i := range uint64(100) {
		r.add(i*10, i*10+1)
	}
	if len(r.list) != maxRanges || !r.cut || r.bytes != 100 {
		t.Errorf("%+v", r)
	}
}
