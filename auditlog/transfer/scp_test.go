package transfer

import (
	"bytes"
	"encoding/hex"
	"errors"
	"io"
	"os"
	"reflect"
	"strings"
	"testing"
	"time"
)

// scpClient runs OpenSSH's scp in its old protocol.
func scpClient(t *testing.T, dir string, change func(*Config), args ...string) (*recording, string, bool) {
	t.Helper()
	r := newRecording()
	out, ok := client(t, dir, shell, func(command string, server, client io.Writer) decoder {
		cmd, ok := ParseSCPCommand(command)
		if !ok {
			t.Errorf("not recognised: %s", command)
		}
		c := r.config(server, client)
		if change != nil {
			change(&c)
		}
		return NewSCP(c, cmd)
	}, "scp", append([]string{"-O"}, args...)...)
	return r, out, ok
}

func TestRealSCP(t *testing.T) {
	remote, local := t.TempDir(), t.TempDir()
	put(t, local+"/big", random(3<<20+77))
	put(t, local+"/tree/a/one", []byte("1"))
	put(t, local+"/tree/a/empty", nil)
	put(t, local+"/tree/two", []byte("22"))
	put(t, local+"/with space", []byte("s"))
	check := func(r *recording, dir Direction, names map[string]string) {
		t.Helper()
		for name, file := range names {
			found := false
			for _, e := range r.of(File) {
				f, other := e.Written, e.Read
				if dir == ToClient {
					f, other = other, f
				}
				if e.Name == name {
					found = true
					if hex.EncodeToString(f.SHA256) != sha256sum(t, file) || !f.Whole || other.Bytes != 0 || e.Unfinished ||
						e.Status.Code != StatusOK || e.Attrs.Size != f.Bytes {
						t.Errorf("%+v", e)
					}
				}
			}
			if !found {
				t.Errorf("no %s:\n%s", name, dump(r.events))
			}
		}
		if len(r.of(File)) != len(names) || len(r.of(Undecodable)) > 0 {
			t.Error(dump(r.events))
		}
	}
	r, out, ok := scpClient(t, remote, nil, local+"/big", "host:up")
	if !ok {
		t.Fatal(out)
	}
	check(r, ToServer, map[string]string{"big": remote + "/up"})
	if r.events[0].Path.Asked != "up" {
		t.Error(r.events[0].Path)
	}
	if r, out, ok = scpClient(t, remote, nil, "-r", "-p", local+"/tree", local+"/with space", "host:."); !ok {
		t.Fatal(out)
	}
	check(r, ToServer, map[string]string{"tree/a/one": remote + "/tree/a/one", "tree/a/empty": remote + "/tree/a/empty",
		"tree/two": remote + "/tree/two", "with space": remote + "/with space"})
	if list := r.of(Mkdir); len(list) != 2 || list[0].Attrs.Valid&AttrTimes == 0 || list[0].Attrs.Permissions != 0o755 {
		t.Error(dump(list))
	}
}

func TestRealSCPBack(t *testing.T) {
	remote, local := t.TempDir(), t.TempDir()
	put(t, remote+"/tree/a/one", random(1<<20))
	put(t, remote+"/tree/a/empty", nil)
	put(t, remote+"/tree/two", []byte("22"))
	r, out, ok := scpClient(t, remote, nil, "-r", "-p", "host:tree", local)
	if !ok {
		t.Fatal(out)
	}
	if n := len(r.of(File)); n != 3 || len(r.of(Mkdir)) != 2 || len(r.events) != 5 {
		t.Error(dump(r.events))
	}
	for _, e := range r.of(File) {
		if hex.EncodeToString(e.Read.SHA256) != sha256sum(t, local+"/"+e.Name) || !e.Read.Whole || e.Attrs.Valid&AttrTimes == 0 {
			t.Errorf("%+v", e)
		}
	}
	r, out, ok = scpClient(t, remote, nil, "host:nothing", local+"/x")
	if e := r.one(t, File, "nothing"); ok || e.Status.Code != StatusFailure || !strings.Contains(e.Status.Message, "No such file") {
		t.Errorf("%s %+v", out, e)
	}
	r, out, ok = scpClient(t, remote, nil, remote+"/tree/two", "host:no/such/dir")
	if e := r.one(t, File, "no/such/dir"); ok || e.Status.Code != StatusFailure || e.Written.SHA256 != nil {
		t.Errorf("%s %+v", out, e)
	}
}

// A refused file is an error to the client, and the others pass.
func TestSCPDenied(t *testing.T) {
	deny := func(c *Config) {
		c.Decide = func(op *Op) Verdict {
			if strings.HasSuffix(op.Name, "secret") {
				return Verdict{Deny: "that is secret"}
			}
			return Verdict{MaxSize: 10}
		}
	}
	for _, up := range []bool{true, false} {
		remote, local := t.TempDir(), t.TempDir()
		from, args := local, []string{"-r", local + "/d", "host:."}
		if !up {
			from, args = remote, []string{"-r", "host:d", local}
		}
		put(t, from+"/d/a", []byte("fine"))
		put(t, from+"/d/b-secret", []byte("secret"))
		put(t, from+"/d/c", []byte("much too large"))
		put(t, from+"/d/e", []byte("fine"))
		r, out, ok := scpClient(t, remote, deny, args...)
		if ok || !strings.Contains(out, "Permission denied") {
			t.Errorf("%v %s", ok, out)
		}
		to := remote + "/d/"
		if !up {
			to = local + "/d/"
		}
		for name, want := range map[string]bool{"a": true, "b-secret": false, "c": false, "e": true} {
			if _, err := os.Stat(to + name); (err == nil) != want {
				t.Errorf("%s: %v", name, err)
			}
			for _, e := range r.of(File) {
				if e.Name == "d/"+name && e.Denied == want {
					t.Errorf("%+v", e)
				}
			}
		}
		if len(r.of(File)) != 4 {
			t.Error(dump(r.events))
		}
	}
}

// scpTalk is a hand-made upload; steps of the client and of the server by turns.
func scpTalk(t *testing.T, strict bool, cut int, steps ...string) (*recording, string, string, error) {
	r := newRecording()
	var toS, toC bytes.Buffer
	c := r.config(&toS, &toC)
	now := time.Unix(1e9, 0)
	c.Now = func() time.Time { return now }
	if strict {
		c.Decide = func(*Op) Verdict { return Verdict{} }
	}
	s := NewSCP(c, SCPCommand{Sink: true, Paths: []string{"x"}})
	var first error
	for i, step := range steps {
		give := s.Client
		if i%2 == 1 {
			give = s.Server
		}
		for p := []byte(step); len(p) > 0; {
			n := min(cut, len(p))
			b := bytes.Clone(p[:n])
			if err := give(b); err != nil && first == nil {
				first = err
			}
			clear(b)
			p = p[n:]
		}
	}
	if err := s.Finish(); err != nil {
		t.Error(err)
	}
	return r, toS.String(), toC.String(), first
}

func TestSCPFragments(t *testing.T) {
	steps := []string{"", "\x00", "T1 0 2 0\n", "\x00", "D0755 0 d\n", "\x00", "C0644 5 f\n", "\x00", "hello\x00", "\x00",
		"C0600 3 g\n", "\x01no\n", "C0600 3 h\n", "\x00", "abc\x01read error\n", "\x00", "E\n", "\x00", "C0600 0 i\n", "\x00", "\x00", "\x00",
		"\x01scp: lost\n", ""}
	want := ""
	for cut := 1; cut < 20; cut++ {
		r, toS, toC, err := scpTalk(t, false, cut, steps...)
		got := dump(r.events)
		if want == "" {
			want = got
		}
		var s, c string
		for i, step := range steps {
			if i%2 == 0 {
				s += step
			} else {
				c += step
			}
		}
		if got != want || err != nil || toS != s || toC != c {
			t.Fatalf("cut %d: %v\n%s\nnot\n%s\n%q\n%q", cut, err, got, want, toS, toC)
		}
		if f := r.events[1]; f.Name != "d/f" || string(f.Written.SHA256) != sum("hello") || !f.Written.Whole {
			t.Fatalf("%+v", f)
		}
		if f := r.events[2]; f.Name != "d/g" || f.Status != (Status{StatusFailure, "no"}) {
			t.Fatalf("%+v", f)
		}
		if f := r.events[3]; f.Name != "d/h" || f.Status != (Status{StatusFailure, "read error"}) || f.Written.Whole {
			t.Fatalf("%+v", f)
		}
		if len(r.events) != 6 || r.events[4].Name != "i" || !r.events[4].Written.Whole || r.events[5].Status.Message != "scp: lost" {
			t.Fatal(got)
		}
	}
}

// A client that leaves in a file, and a server that gives up.
func TestSCPUnfinished(t *testing.T) {
	r, _, toC, _ := scpTalk(t, false, 100, "", "\x00", "C0644 5 f\n", "\x00", "hel", "\x01disk full\n")
	if e := r.events[0]; !e.Unfinished || e.Written.Bytes != 3 || e.Written.Whole || e.Status.Message != "disk full" {
		t.Errorf("%+v", e)
	}
	if toC != "\x00\x00\x01disk full\n" {
		t.Errorf("%q", toC)
	}
}

func TestSCPUndecodable(t *testing.T) {
	for name, tc := range map[string]struct {
		steps  []string
		dir    Direction
		offset uint64
	}{
		"a shell":         {[]string{"", "\x00", "id; ls\n"}, ToServer, 0},
		"a banner":        {[]string{"", "hello\n"}, ToClient, 0},
		"a path":          {[]string{"", "\x00", "C0644 5 ../f\n"}, ToServer, 0},
		"dots":            {[]string{"", "\x00", "D0755 0 ..\n"}, ToServer, 0},
		"a size":          {[]string{"", "\x00", "C0644 -5 f\n"}, ToServer, 0},
		"a great size":    {[]string{"", "\x00", "C0644 18446744073709551615 f\n"}, ToServer, 0},
		"E":               {[]string{"", "\x00", "E\n"}, ToServer, 0},
		"a long line":     {[]string{"", "\x00", "C0644 5 " + strings.Repeat("x", maxSCPLine)}, ToServer, 0},
		"after a file":    {[]string{"", "\x00", "C0644 1 f\n", "\x00", "xy"}, ToServer, 11},
		"too much answer": {[]string{"", "\x01" + strings.Repeat("x", 2*maxSCPAhead)}, ToClient, 0},
	} {
		t.Run(name, func(t *testing.T) {
			r, toS, toC, err := scpTalk(t, false, 5, append(tc.steps, "")...)
			list := r.of(Undecodable)
			if err != nil || len(list) != 1 || list[0].Direction != tc.dir || list[0].Offset != tc.offset {
				t.Fatalf("%v %s", err, dump(r.events))
			}
			var in [2]string
			for i, step := range tc.steps {
				in[i%2] += step
			}
			if toS != in[0] || toC != in[1] {
				t.Errorf("not passed: %q %q", toS, toC)
			}
			if got := r.raw[tc.dir].String(); got != in[tc.dir][tc.offset:] {
				t.Errorf("raw: %q", got)
			}
			r, _, _, err = scpTalk(t, true, 5, tc.steps...)
			if !errors.Is(err, ErrUndecodable) || len(r.of(Undecodable)) != 1 {
				t.Error(err)
			}
		})
	}
}

func TestParseSCPCommand(t *testing.T) {
	for in, want := range map[string]*SCPCommand{
		"scp -t x":                       {Sink: true, Paths: []string{"x"}},
		"scp -f -- -x":                   {Paths: []string{"-x"}},
		"scp -r -p -t 'a b'":             {Sink: true, Recursive: true, Preserve: true, Paths: []string{"a b"}},
		"scp -v -rpd -t -- a\\ b":        {Sink: true, Recursive: true, Preserve: true, Directory: true, Paths: []string{"a b"}},
		`/usr/bin/scp -f "a\"b" '*.txt'`: {Paths: []string{`a"b`, "*.txt"}},
		"scp -f ~/x*":                    {Paths: []string{"~/x*"}},
		"scp a b":                        nil,
		"scp -t":                         nil,
		"scp -t a b":                     nil,
		"scp -t -f a":                    nil,
		"scp -t a; id":                   nil,
		"scp -t $(id)":                   nil,
		"scp -t `id`":                    nil,
		`scp -t "$HOME"`:                 nil,
		"scp -t a\nid":                   nil,
		"scp -t a #b":                    nil,
		"scp -t 'a":                      nil,
		`scp -t "a`:                      nil,
		`scp -t a\`:                      nil,
		"scp -S /bin/sh -t a":            nil,
		"X=1 scp -t a":                   nil,
		"./scp -t a":                     nil,
		"scpx -t a":                      nil,
		"":                               nil,
	} {
		got, ok := ParseSCPCommand(in)
		if ok != (want != nil) || ok && !reflect.DeepEqual(got, *want) {
			t.Errorf("%q: %+v %v", in, got, ok)
		}
	}
}

// A source that does not wait for answers is made to, and a sink's answers given in advance are used one by one.
func TestSCPImpatient(t *testing.T) {
	for _, sinkFirst := range []bool{false, true} {
		r := newRecording()
		var toS, toC bytes.Buffer
		s := NewSCP(r.config(&toS, &toC), SCPCommand{Sink: true, Paths: []string{"x"}})
		all, answers := "C0644 3 f\nabc\x00C0644 1 g\nC0600 2 h\nxy\x00", "\x00\x00\x00\x01no\n\x00\x00"
		done := make(chan error)
		if sinkFirst {
			if err := s.Server([]byte(answers)); err != nil || toC.String() != "\x00" {
				t.Fatalf("%v %q", err, toC.String())
			}
		}
		go func() { done <- s.Client([]byte(all)) }()
		if !sinkFirst {
			select {
			case <-done:
				t.Fatal("the source was not made to wait")
			case <-time.After(10 * time.Millisecond):
			}
			for i := range answers {
				if err := s.Server([]byte(answers[i : i+1])); err != nil {
					t.Fatal(err)
				}
			}
		}
		if err := <-done; err != nil {
			t.Fatal(err)
		}
		s.Finish()
		if toS.String() != all || toC.String() != answers || len(r.events) != 3 {
			t.Fatalf("%q %q\n%s", toS.String(), toC.String(), dump(r.events))
		}
		if f, g, h := r.events[0], r.events[1], r.events[2]; string(f.Written.SHA256) != sum("abc") || !f.Written.Whole ||
			g.Status.Message != "no" || g.Written.Bytes != 0 || string(h.Written.SHA256) != sum("xy") || !h.Written.Whole {
			t.Error(dump(r.events))
		}
	}
}
