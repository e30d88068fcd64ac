package sftp

import (
	"bytes"
	"encoding/binary"
	"fmt"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"go.uber.org/goleak"
	"golang.org/x/sys/unix"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

// peer is a client that speaks in packets.
type peer struct {
	t   *testing.T
	in  io.WriteCloser
	out io.Reader
	id  uint32
}

// ours and OpenSSH's server answer alike.
var servers = map[string]func(t *testing.T, dir string) *peer{
	"ours": func(t *testing.T, dir string) *peer {
		inR, inW := io.Pipe()
		outR, outW := io.Pipe()
		done := make(chan error, 1)
		go func() {
			done <- Serve(inR, outW, Config{Dir: dir, Home: dir})
			outW.Close()
		}()
		t.Cleanup(func() {
			inW.Close()
			if err := <-done; err != nil {
				t.Errorf("Serve: %v", err)
			}
		})
		return &peer{t: t, in: inW, out: outR}
	},
	"openssh": func(t *testing.T, dir string) *peer {
		const name = "/usr/lib/openssh/sftp-server"
		if _, err := os.Stat(name); err != nil {
			if os.Getenv("SALLYPORT_REQUIRE_CLIENTS") != "" {
				t.Fatal("the package openssh-sftp-server is missing, and SALLYPORT_REQUIRE_CLIENTS is set")
			}
			t.Skip("NOT TESTED: no sftp-server on this machine; the test with our own remains")
		}
		cmd := exec.Command(name)
		cmd.Dir = dir
		in, err := cmd.StdinPipe()
		if err != nil {
			t.Fatal(err)
		}
		out, err := cmd.StdoutPipe()
		if err != nil {
			t.Fatal(err)
		}
		if err := cmd.Start(); err != nil {
			t.Fatal(err)
		}
		t.Cleanup(func() {
			in.Close()
			cmd.Wait()
		})
		return &peer{t: t, in: in, out: out}
	},
}

// answer is a packet of the server's.
type answer struct {
	typ byte
	id  uint32
	f   fields
}

func (a answer) String() string {
	if a.typ == fxpStatus {
		return fmt.Sprintf("status %d", binary.BigEndian.Uint32(a.f.b))
	}
	return fmt.Sprintf("type %d", a.typ)
}

func packed(typ byte, values ...any) []byte {
	b := []byte{0, 0, 0, 0, typ}
	for _, v := range values {
		switch v := v.(type) {
		case int:
			b = binary.BigEndian.AppendUint32(b, uint32(v))
		case uint32:
			b = binary.BigEndian.AppendUint32(b, v)
		case uint64:
			b = binary.BigEndian.AppendUint64(b, v)
		case string:
			b = append(binary.BigEndian.AppendUint32(b, uint32(len(v))), v...)
		}
	}
	binary.BigEndian.PutUint32(b, uint32(len(b)-4))
	return b
}

func (p *peer) receive() answer {
	p.t.Helper()
	var head [4]byte
	if _, err := io.ReadFull(p.out, head[:]); err != nil {
		p.t.Fatal(err)
	}
	b := make([]byte, binary.BigEndian.Uint32(head[:]))
	if _, err := io.ReadFull(p.out, b); err != nil {
		p.t.Fatal(err)
	}
	a := answer{typ: b[0], f: fields{b: b[1:]}}
	a.id = a.f.uint32()
	return a
}

func (p *peer) ask(typ byte, values ...any) answer {
	p.t.Helper()
	p.id++
	if _, err := p.in.Write(packed(typ, append([]any{p.id}, values...)...)); err != nil {
		p.t.Fatal(err)
	}
	a := p.receive()
	if a.id != p.id {
		p.t.Fatalf("an answer to %d, not %d", a.id, p.id)
	}
	return a
}

func (p *peer) begin() map[string]bool {
	p.t.Helper()
	if _, err := p.in.Write(packed(fxpInit, 3)); err != nil {
		p.t.Fatal(err)
	}
	a := p.receive()
	if a.typ != fxpVersion || a.id != 3 {
		p.t.Fatalf("%v %d", a, a.id)
	}
	found := make(map[string]bool)
	for len(a.f.b) > 0 && !a.f.bad {
		name := a.f.string()
		found[name+" "+a.f.string()] = true
	}
	return found
}

// open gives the handle of a file.
func (p *peer) open(name string, flags int) string {
	p.t.Helper()
	a := p.ask(fxpOpen, name, flags, 0)
	if a.typ != fxpHandle {
		p.t.Fatalf("open %s: %v", name, a)
	}
	return a.f.string()
}

// The same questions have the same answers, and the same effect, from OpenSSH's server and from ours.
func TestAsOpenSSH(t *testing.T) {
	for name, start := range servers {
		t.Run(name, func(t *testing.T) {
			dir := t.TempDir()
			p := start(t, dir)
			found := p.begin()
			for i := 0; i < len(extensions); i += 2 {
				if x := extensions[i] + " " + extensions[i+1]; !found[x] && name == "ours" {
					t.Errorf("%s is not announced", x)
				}
			}
			const (
				ok, eof, noSuchFile, denied, failure, badMessage, unsupported = "status 0", "status 1", "status 2", "status 3", "status 4", "status 5", "status 8"
			)
			expect := func(what string, a answer, want string) {
				t.Helper()
				if a.String() != want {
					t.Errorf("%s: %v, want %s", what, a, want)
				}
			}
			expect("mkdir", p.ask(fxpMkdir, "d", attrPermissions, 0o750), ok)
			if st, err := os.Stat(dir + "/d"); err != nil || st.Mode().Perm() != 0o750 {
				t.Errorf("%v %v", st, err)
			}
			expect("mkdir again", p.ask(fxpMkdir, "d", 0), failure)
			expect("mkdir below nothing", p.ask(fxpMkdir, "no/d", 0), noSuchFile)
			h := p.open("d/f", openWrite|openCreate|openTruncate)
			expect("write", p.ask(fxpWrite, h, uint64(0), "hello"), ok)
			expect("write apart", p.ask(fxpWrite, h, uint64(10), "world"), ok)
			expect("read what is not open for it", p.ask(fxpRead, h, uint64(0), 5), noSuchFile)
			expect("fsync", p.ask(fxpExtended, "fsync@openssh.com", h), ok)
			expect("fsetstat", p.ask(fxpFsetstat, h, attrPermissions|attrTimes, 0o604, 1000, 2000), ok)
			expect("close", p.ask(fxpClose, h), ok)
			if st, err := os.Stat(dir + "/d/f"); err != nil || st.Mode().Perm() != 0o604 || !st.ModTime().Equal(time.Unix(2000, 0)) {
				t.Errorf("%v %v", st, err)
			}
			expect("close again", p.ask(fxpClose, h), map[bool]string{true: failure, false: noSuchFile}[name == "ours"])
			expect("write to nothing", p.ask(fxpWrite, h, uint64(0), "x"), failure)
			h = p.open("d/f", openRead)
			a := p.ask(fxpRead, h, uint64(0), 100)
			if got := a.f.string(); a.typ != fxpData || got != "hello\x00\x00\x00\x00\x00world" {
				t.Errorf("read: %v %q", a, got)
			}
			expect("read at the end", p.ask(fxpRead, h, uint64(15), 100), eof)
			a = p.ask(fxpFstat, h)
			if st := a.f.attrs(); a.typ != fxpAttrs || st.size != 15 || st.permissions != unix.S_IFREG|0o604 || st.mtime != 2000 {
				t.Errorf("fstat: %v %+v", a, st)
			}
			expect("an exclusive one that is there", p.ask(fxpOpen, "d/f", openWrite|openCreate|openExclusive, 0), failure)
			expect("open nothing", p.ask(fxpOpen, "d/nothing", openRead, 0), noSuchFile)
			expect("open a directory to write", p.ask(fxpOpen, "d", openWrite, 0), failure)
			expect("opendir of a file", p.ask(fxpOpendir, "d/f"), noSuchFile)
			expect("rename over one", p.ask(fxpMkdir, "e", 0), ok)
			expect("rename over one", p.ask(fxpRename, "d/f", "e"), failure)
			expect("rename", p.ask(fxpRename, "d/f", "d/g"), ok)
			expect("hardlink", p.ask(fxpExtended, "hardlink@openssh.com", "d/g", "d/h"), ok)
			expect("posix-rename", p.ask(fxpExtended, "posix-rename@openssh.com", "d/g", "d/i"), ok)
			expect("remove a directory", p.ask(fxpRemove, "e"), failure)
			expect("rmdir of a file", p.ask(fxpRmdir, "d/i"), noSuchFile)
			expect("rmdir of a full one", p.ask(fxpRmdir, "d"), failure)
			expect("symlink", p.ask(fxpSymlink, "d/h", "link"), ok)
			if text, err := os.Readlink(dir + "/link"); err != nil || text != "d/h" {
				t.Errorf("%q %v", text, err)
			}
			a = p.ask(fxpReadlink, "link")
			if n, text := a.f.uint32(), a.f.string(); a.typ != fxpName || n != 1 || text != "d/h" {
				t.Errorf("readlink: %v %d %q", a, n, text)
			}
			expect("symlink to a directory", p.ask(fxpSymlink, "../d", "e/up"), ok)
			for asked, want := range map[string]string{"link": "/d/h", ".": "", "nothing": "/nothing", "d/../e": "/e", "e/up/../e": "/e"} {
				a = p.ask(fxpRealpath, asked)
				if n, text := a.f.uint32(), a.f.string(); a.typ != fxpName || n != 1 || text != dir+want {
					t.Errorf("realpath %s: %v %d %q", asked, a, n, text)
				}
			}
			a = p.ask(fxpLstat, "link")
			if st := a.f.attrs(); a.typ != fxpAttrs || st.permissions&unix.S_IFMT != unix.S_IFLNK {
				t.Errorf("lstat: %v %+v", a, st)
			}
			a = p.ask(fxpStat, "link")
			if st := a.f.attrs(); a.typ != fxpAttrs || st.permissions&unix.S_IFMT != unix.S_IFREG {
				t.Errorf("stat: %v %+v", a, st)
			}
			expect("lsetstat", p.ask(fxpExtended, "lsetstat@openssh.com", "link", attrTimes, 3000, 4000), ok)
			if st, err := os.Lstat(dir + "/link"); err != nil || !st.ModTime().Equal(time.Unix(4000, 0)) {
				t.Errorf("%v %v", st, err)
			}
			if st, err := os.Stat(dir + "/d/h"); err != nil || !st.ModTime().Equal(time.Unix(2000, 0)) {
				t.Errorf("%v %v", st, err)
			}
			expect("setstat", p.ask(fxpSetstat, "d/h", attrSize|attrPermissions|attrTimes, uint64(5), 0o600, 5000, 6000), ok)
			if st, err := os.Stat(dir + "/d/h"); err != nil || !st.ModTime().Equal(time.Unix(6000, 0)) || st.Size() != 5 || st.Mode().Perm() != 0o600 {
				t.Errorf("%v %v", st, err)
			}
			expect("setstat of nothing", p.ask(fxpSetstat, "nothing", attrTimes, 0, 0), noSuchFile)
			// The handle is that of the file that is called h now: truncated.
			w := p.open("copy", openRead|openWrite|openCreate)
			expect("copy-data", p.ask(fxpExtended, "copy-data", h, uint64(1), uint64(0), w, uint64(2)), ok)
			a = p.ask(fxpRead, w, uint64(0), 100)
			if got := a.f.string(); got != "\x00\x00ello" {
				t.Errorf("copied: %v %q", a, got)
			}
			expect("copy-data to itself", p.ask(fxpExtended, "copy-data", h, uint64(1), uint64(0), h, uint64(2)), failure)
			expect("append", p.ask(fxpOpen, "copy", openWrite|openAppend, 0), "type 102")
			a = p.ask(fxpExtended, "limits@openssh.com")
			if n := [4]uint64{a.f.uint64(), a.f.uint64(), a.f.uint64(), a.f.uint64()}; a.typ != fxpExtendedReply || a.f.bad || n[0] != maxPacket || n[1] != maxData || n[2] != maxData {
				t.Errorf("limits: %v %v", a, n)
			}
			for _, a := range []answer{p.ask(fxpExtended, "statvfs@openssh.com", "."), p.ask(fxpExtended, "fstatvfs@openssh.com", h)} {
				if a.typ != fxpExtendedReply || len(a.f.b) != 88 || a.f.uint64() == 0 {
					t.Errorf("statvfs: %v", a)
				}
			}
			for asked, want := range map[string]string{"~": dir, "~/": dir, "d": dir + "/d", "~root": "/root"} {
				a = p.ask(fxpExtended, "expand-path@openssh.com", asked)
				if n, text := a.f.uint32(), a.f.string(); a.typ != fxpName || n != 1 || text != want {
					t.Errorf("expand-path %s: %v %d %q", asked, a, n, text)
				}
			}
			expect("expand-path of nobody", p.ask(fxpExtended, "expand-path@openssh.com", "~no-such-user/x"), noSuchFile)
			if found["users-groups-by-id@openssh.com 1"] {
				a = p.ask(fxpExtended, "users-groups-by-id@openssh.com", "\x00\x00\x00\x00\x7f\x00\x00\x01", "\x00\x00\x00\x00")
				users, groups := a.f.string(), a.f.string()
				if users != "\x00\x00\x00\x04root\x00\x00\x00\x00" || groups != "\x00\x00\x00\x04root" {
					t.Errorf("users-groups-by-id: %v %q %q", a, users, groups)
				}
			} else if name == "ours" {
				t.Error("no users-groups-by-id")
			}
			a = p.ask(fxpOpendir, ".")
			d := a.f.string()
			var names []string
			for {
				a = p.ask(fxpReaddir, d)
				if a.typ != fxpName {
					break
				}
				for n := a.f.uint32(); n > 0; n-- {
					file, long := a.f.string(), a.f.string()
					st := a.f.attrs()
					if file[0] == '.' {
						continue
					}
					names = append(names, file)
					if want := map[string]string{"link": "lrwxrwxrwx", "d": "drwxr-x---"}[file]; !strings.HasPrefix(long, want) || st.valid == 0 {
						t.Errorf("%s: %q %+v", file, long, st)
					}
				}
			}
			expect("the end of a directory", a, eof)
			slices.Sort(names)
			if want := []string{"copy", "d", "e", "link"}; !slices.Equal(names, want) {
				t.Errorf("%q, want %q", names, want)
			}
			expect("read a directory's handle", p.ask(fxpRead, d, uint64(0), 5), failure)
			expect("an unknown extension", p.ask(fxpExtended, "no-such@example.com"), unsupported)
			_, _, _ = denied, badMessage, h
		})
	}
}

// Requests that change or open something take no path with a link in it, nor follow one that comes in between.
func TestNoLinks(t *testing.T) {
	dir, elsewhere := t.TempDir(), t.TempDir()
	for _, err := range []error{
		os.WriteFile(elsewhere+"/secret", []byte("secret"), 0o600), os.Symlink(elsewhere, dir+"/d"), os.Symlink(elsewhere+"/secret", dir+"/f"),
		os.WriteFile(dir+"/own", nil, 0o600),
	} {
		if err != nil {
			t.Fatal(err)
		}
	}
	p := servers["ours"](t, dir)
	p.begin()
	for what, a := range map[string]answer{
		"open":               p.ask(fxpOpen, "f", openRead, 0),
		"open below":         p.ask(fxpOpen, "d/secret", openRead, 0),
		"open to write":      p.ask(fxpOpen, "f", openWrite|openCreate|openTruncate, 0),
		"create":             p.ask(fxpOpen, "d/new", openWrite|openCreate, 0),
		"open through /proc": p.ask(fxpOpen, "/proc/self/root"+elsewhere+"/secret", openRead, 0),
		"open a descriptor":  p.ask(fxpOpen, "/dev/fd/0", openRead, 0),
		"opendir":            p.ask(fxpOpendir, "d"),
		"setstat":            p.ask(fxpSetstat, "f", attrSize, uint64(0)),
		"chmod":              p.ask(fxpSetstat, "f", attrPermissions, 0o777),
		"times":              p.ask(fxpSetstat, "f", attrTimes, 0, 0),
		"owner":              p.ask(fxpSetstat, "f", attrOwner, 12345, 12345),
		"setstat below":      p.ask(fxpSetstat, "d/secret", attrPermissions, 0o777),
		"lsetstat below":     p.ask(fxpExtended, "lsetstat@openssh.com", "d/secret", attrTimes, 0, 0),
		"remove":             p.ask(fxpRemove, "d/secret"),
		"mkdir":              p.ask(fxpMkdir, "d/new", 0),
		"rename":             p.ask(fxpRename, "d/secret", "x"),
		"rename to":          p.ask(fxpRename, "own", "d/x"),
		"posix-rename":       p.ask(fxpExtended, "posix-rename@openssh.com", "d/secret", "x"),
		"hardlink":           p.ask(fxpExtended, "hardlink@openssh.com", "d/secret", "x"),
		"symlink":            p.ask(fxpSymlink, "x", "d/x"),
	} {
		if a.typ != fxpStatus || a.f.uint32() == 0 {
			t.Errorf("%s: %v", what, a)
		}
	}
	st, err := os.Stat(elsewhere + "/secret")
	if err != nil || st.Size() != 6 || st.Mode().Perm() != 0o600 || st.ModTime().Before(time.Unix(1, 0)) {
		t.Errorf("%v %v", st, err)
	}
	if list, err := os.ReadDir(elsewhere); err != nil || len(list) != 1 {
		t.Errorf("%v %v", list, err)
	}
	// A hard link of a link is one of the link.
	if a := p.ask(fxpExtended, "hardlink@openssh.com", "f", "g"); a.String() != "status 0" {
		t.Error(a)
	}
	if text, err := os.Readlink(dir + "/g"); err != nil || text != elsewhere+"/secret" {
		t.Errorf("%q %v", text, err)
	}
}

// Requests and answers come whole whatever pieces they travel in, and more of them at once than there is room for.
func TestPieces(t *testing.T) {
	dir := t.TempDir()
	content := make([]byte, 3<<20+17)
	for i := range content {
		content[i] = byte(i * i >> 7)
	}
	if err := os.WriteFile(dir+"/f", content, 0o600); err != nil {
		t.Fatal(err)
	}
	for _, piece := range []int{1000, 70_000, 1 << 20} {
		p := servers["ours"](t, dir)
		p.begin()
		from, into := p.open("f", openRead), p.open("g", openWrite|openCreate|openTruncate)
		var requests []byte
		count := 0
		for at := 0; at < len(content); at += 200_000 {
			part := content[at:min(len(content), at+200_000)]
			requests = append(requests, packed(fxpWrite, count, into, uint64(at), string(part))...)
			requests = append(requests, packed(fxpRead, count+1, from, uint64(at), len(part))...)
			count += 2
		}
		go func() {
			for b := range slices.Chunk(requests, piece) {
				p.in.Write(b)
			}
		}()
		var back []byte
		for i := range count {
			a := p.receive()
			if a.id != uint32(i) {
				t.Fatalf("an answer to %d, not %d", a.id, i)
			}
			if a.typ == fxpData {
				back = append(back, a.f.bytes()...)
			} else if a.String() != "status 0" {
				t.Fatal(a)
			}
		}
		if got, err := os.ReadFile(dir + "/g"); err != nil || !bytes.Equal(got, content) || !bytes.Equal(back, content) {
			t.Errorf("pieces of %d: %d bytes were written, %d read: %v", piece, len(got), len(back), err)
		}
	}
}

// What is no packet ends the server; so do a client's end in the middle of one, and nothing it can't bound.
func TestNoPackets(t *testing.T) {
	begin := packed(fxpInit, 3)
	for name, b := range map[string][]byte{
		"large":         {0xff, 0xff, 0xff, 0xff},
		"empty":         {0, 0, 0, 0},
		"no INIT":       packed(fxpStat, 1, "/"),
		"two INITs":     append(bytes.Clone(begin), begin...),
		"no path":       append(bytes.Clone(begin), packed(fxpStat, 1)...),
		"a long path":   append(bytes.Clone(begin), packed(fxpStat, 1, 1<<30)...),
		"half a packet": begin[:6],
	} {
		if err := Serve(bytes.NewReader(b), io.Discard, Config{Dir: "/"}); err == nil {
			t.Errorf("%s: no error", name)
		}
	}
	dir := t.TempDir()
	if err := os.WriteFile(dir+"/f", nil, 0o600); err != nil {
		t.Fatal(err)
	}
	p := servers["ours"](t, dir)
	p.begin()
	for range maxFiles {
		p.open("f", openRead)
	}
	if a := p.ask(fxpOpen, "f", openRead, 0); a.String() != "status 4" {
		t.Error(a)
	}
}

// FuzzServe serves a directory of its own as its root: no request that changes anything leads out of that.
func FuzzServe(f *testing.F) {
	begin := packed(fxpInit, 3)
	for _, x := range [][]byte{
		slices.Concat(packed(fxpOpen, 1, "/f", 0x1a, 0), packed(fxpWrite, 2, "\x00\x00\x00\x00", uint64(3), "abc"), packed(fxpClose, 3, "\x00\x00\x00\x00")),
		slices.Concat(packed(fxpOpen, 1, "/f", openRead, 0), packed(fxpRead, 2, "\x00\x00\x00\x00", uint64(0), 1<<20), packed(fxpFstat, 3, "\x00\x00\x00\x00")),
		slices.Concat(packed(fxpOpendir, 1, "/d/.."), packed(fxpReaddir, 2, "\x00\x00\x00\x00"), packed(fxpReaddir, 3, "\x00\x00\x00\x00")),
		slices.Concat(packed(fxpSymlink, 1, "d", "/l"), packed(fxpSetstat, 2, "/l", 0xf, uint64(1), 1, 1, 1, 1, 1), packed(fxpRename, 3, "/l", "/m")),
		packed(fxpExtended, 1, "users-groups-by-id@openssh.com", "\x00\x00\x00\x00", ""),
		packed(fxpExtended, 1, "lsetstat@openssh.com", "/l", 0x8, 1, 1),
		packed(fxpExtended, 1, "expand-path@openssh.com", "~root/x"),
	} {
		f.Add(slices.Concat(begin, x), uint16(7))
	}
	f.Fuzz(func(t *testing.T, b []byte, piece uint16) {
		if bytes.Contains(b, []byte("copy-data")) { // of a file of any size: for ever
			return
		}
		dir := t.TempDir()
		if err := os.Mkdir(filepath.Join(dir, "d"), 0o700); err != nil {
			t.Fatal(err)
		}
		if err := os.WriteFile(filepath.Join(dir, "f"), []byte("content"), 0o600); err != nil {
			t.Fatal(err)
		}
		root, err := unix.Open(dir, unix.O_PATH|unix.O_DIRECTORY|unix.O_CLOEXEC, 0)
		if err != nil {
			t.Fatal(err)
		}
		defer unix.Close(root)
		defer unix.Chmod(dir, 0o700)
		var out bytes.Buffer
		s := &server{Config: Config{Dir: "/", Home: "/"}, out: &out, root: root}
		s.serve(&pieces{b, int(piece) + 1})
		for out.Len() > 0 { // all that was answered is packets
			head := out.Next(4)
			if len(head) < 4 || len(out.Next(int(binary.BigEndian.Uint32(head)))) != int(binary.BigEndian.Uint32(head)) {
				t.Fatalf("%q", head)
			}
		}
	})
}

// pieces gives bytes in reads of at most n.
type pieces struct {
	b []byte
	n int
}

func (p *pieces) Read(b []byte) (int, error) {
	if len(p.b) == 0 {
		return 0, io.EOF
	}
	n := copy(b, p.b[:min(len(p.b), p.n)])
	p.b = p.b[n:]
	return n, nil
}
