package sshserver

import (
	"bytes"
	"crypto/sha256"
	"errors"
	"io"
	"math/rand/v2"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/pkg/sftp"
	"golang.org/x/crypto/ssh"

	"github.com/sallyport/sallyport/auditlog"
	"github.com/sallyport/sallyport/auditlog/transfer"
	"github.com/sallyport/sallyport/authz"
)

func TestPathPatterns(t *testing.T) {
	for _, test := range []struct {
		pattern, path string
		covers, above bool
	}{
		{"/etc/shadow", "/etc/shadow", true, true},
		{"/etc/shadow", "/etc/shadow2", false, false},
		{"/etc/shadow", "/etc", false, true},
		{"/etc/shadow", "/", false, true},
		{"/etc", "/etc/shadow", true, true},
		{"/etc/", "/etc/ssh/key", true, true},
		{"/etc/*.key", "/etc/a.key", true, true},
		{"/etc/*.key", "/etc/sub/a.key", false, false},
		{"/home/*/.ssh", "/home/alice/.ssh/id", true, true},
		{"/home/*/.ssh", "/home/alice", false, true},
		{"/home/*/.ssh", "/home/alice/x", false, false},
		{"/**/secret", "/secret", true, true},
		{"/**/secret", "/a/b/secret/c", true, true},
		{"/**/secret", "/a/b", false, true},
		{"/a/**/z", "/a/z", true, true},
		{"/a/**/z", "/b", false, false},
		{"/", "/anything", true, true},
		{"/**", "/", true, true},
		{"/**/a/**/b", "/a", false, true},
		{"/**/a/**/b", "/x/a/y/b/z", true, true},
		{"/**/a/b", "/a/a/b", true, true},
		{"/a/*", "/a", false, true},
		{"/a/?", "/a/\xff", true, true},
		{"/a/*.KEY", "/a/x.key", false, false},
		{"/**/a/**/a/**/a/**/a/**/a/**/b", strings.Repeat("/a", 256), false, true},
		{"/a", "/b/../a/x", true, true},
	} {
		if got := covers(components(test.pattern), components(test.path)); got != test.covers {
			t.Errorf("%s covers %s: %v", test.pattern, test.path, got)
		}
		if got := above(components(test.pattern), components(test.path)); got != test.above {
			t.Errorf("%s above %s: %v", test.pattern, test.path, got)
		}
	}
}

func TestTransferRules(t *testing.T) {
	file := func(path string, read, write bool) *transfer.Op {
		return &transfer.Op{Kind: transfer.File, Read: read, Write: write, Path: transfer.Path{Asked: "/link", Resolved: path}}
	}
	for _, test := range []struct {
		name  string
		rules authz.Transfer
		op    *transfer.Op
		deny  bool
	}{
		{"nothing", authz.Transfer{}, file("/x", true, true), false},
		{"upload", authz.Transfer{DenyUpload: true}, file("/x", false, true), true},
		{"both ways", authz.Transfer{DenyUpload: true}, file("/x", true, true), true},
		{"read", authz.Transfer{DenyUpload: true}, file("/x", true, false), false},
		{"list", authz.Transfer{DenyUpload: true, DenyDownload: true}, &transfer.Op{Kind: transfer.List}, false},
		{"mkdir", authz.Transfer{DenyUpload: true}, &transfer.Op{Kind: transfer.Mkdir}, true},
		{"remove", authz.Transfer{DenyUpload: true}, &transfer.Op{Kind: transfer.Remove}, true},
		{"download", authz.Transfer{DenyDownload: true}, file("/x", true, false), true},
		{"write only", authz.Transfer{DenyDownload: true}, file("/x", false, true), false},
		{"path", authz.Transfer{DenyPaths: []string{"/etc"}}, file("/etc/x", true, false), true},
		{"another", authz.Transfer{DenyPaths: []string{"/etc"}}, file("/usr/x", true, false), false},
		{"move a parent", authz.Transfer{DenyPaths: []string{"/a/b"}}, &transfer.Op{Kind: transfer.Rename, Path: transfer.Path{Asked: "/a"}}, true},
		{"move to it", authz.Transfer{DenyPaths: []string{"/a/b"}},
			&transfer.Op{Kind: transfer.Rename, Path: transfer.Path{Asked: "/c"}, Target: transfer.Path{Asked: "/a/b"}}, true},
		{"link's text", authz.Transfer{DenyPaths: []string{"/a"}},
			&transfer.Op{Kind: transfer.Symlink, Path: transfer.Path{Asked: "/c"}, Target: transfer.Path{Asked: "/a"}}, false},
		{"hard link", authz.Transfer{DenyPaths: []string{"/a"}},
			&transfer.Op{Kind: transfer.Link, Path: transfer.Path{Asked: "/a"}, Target: transfer.Path{Asked: "/c"}}, true},
	} {
		rules, err := readTransferRules(&test.rules)
		if err != nil {
			t.Fatal(test.name, err)
		}
		if v := rules.decide(test.op); (v.Deny != "") != test.deny {
			t.Errorf("%s: %+v", test.name, v)
		}
	}
	for _, bad := range []authz.Transfer{{MaxSize: "much"}, {Content: "some"}, {DenyPaths: []string{"etc"}}, {DenyPaths: []string{"/[a"}}, {ContentFile: "-1"}} {
		if _, err := readTransferRules(&bad); err == nil {
			t.Errorf("%+v: no error", bad)
		}
	}
}

// permitting has the gate's logins carry a permit.
func (g *gate) permitting(p authz.Permit) {
	g.rules.mu.Lock()
	defer g.rules.mu.Unlock()
	login := g.rules.login
	g.rules.login = func(in authz.LoginInput) (authz.Login, error) {
		l, err := login(in)
		l.Permit = p
		return l, err
	}
}

// Content is kept once, and all of it comes back, whatever the order.
func TestContent(t *testing.T) {
	g := newGate(t, nil)
	g.permitting(authz.Permit{Transfer: &authz.Transfer{Content: "full", ContentFile: "1Mi"}})
	c := g.dial("alice")
	f, err := sftp.NewClient(c)
	if err != nil {
		t.Fatal(err)
	}
	data := bytes.Repeat([]byte("0123456789abcdef"), 25_000) // 400,000 bytes
	for i := range data {
		data[i] ^= byte(i >> 9)
	}
	dir := t.TempDir()
	put := func(name string, data []byte) {
		w, err := f.Create(filepath.Join(dir, name))
		if err != nil {
			t.Fatal(err)
		}
		if _, err := w.ReadFrom(bytes.NewReader(data)); err != nil {
			t.Fatal(err)
		}
		if err := w.Close(); err != nil {
			t.Fatal(err)
		}
	}
	put("one", data)
	put("two", data)
	put("large", bytes.Repeat([]byte("x"), 2<<20))
	r, err := f.Open(filepath.Join(dir, "one"))
	if err != nil {
		t.Fatal(err)
	}
	if got, err := io.ReadAll(r); err != nil || !bytes.Equal(got, data) {
		t.Fatal(len(got), err)
	}
	r.Close()
	f.Close()
	c.Close()
	g.stop()
	records := g.records()[0]
	if n := len(bodies[*auditlog.Data](records)); n > 2 { // the ends of the streams
		t.Errorf("%d records of data", n)
	}
	sum := sha256.Sum256(data)
	kept, stored := map[string][]byte{}, 0
	for _, b := range bodies[*auditlog.Content](records) {
		if len(b.Data) > 0 {
			stored += len(b.Data)
			kept[string(b.SHA256)] = b.Data
		}
	}
	// Half a million bytes of four files: the second and the reading back cost nothing, the large one a single block.
	if stored > len(data)+2*contentBlock {
		t.Errorf("%d bytes are stored", stored)
	}
	for _, tr := range bodies[*auditlog.Transfer](records) {
		flow, stream := tr.Written, auditlog.Input
		if flow == nil {
			flow, stream = tr.Read, auditlog.Output
		}
		if filepath.Base(string(tr.Path)) == "large" {
			if flow.Bytes != 2<<20 || flow.Kept != 1<<20 {
				t.Errorf("%s: %+v", tr.Path, flow)
			}
			continue
		}
		if flow == nil || !bytes.Equal(flow.SHA256, sum[:]) || flow.Kept != uint64(len(data)) {
			t.Errorf("%s: %+v", tr.Path, flow)
			continue
		}
		back := make([]byte, len(data))
		for _, b := range bodies[*auditlog.Content](records) {
			if b.ID == tr.ID && b.Stream == stream {
				copy(back[b.Offset:], kept[string(b.SHA256)])
			}
		}
		if !bytes.Equal(back, data) {
			t.Errorf("%s: the content differs", tr.Path)
		}
	}
	if n := len(bodies[*auditlog.Transfer](records)); n != 4 {
		t.Errorf("%d transfers", n)
	}
}

// What is refused is refused in the client's own protocol, and never reaches the sandbox.
func TestTransferRefused(t *testing.T) {
	g := newGate(t, nil)
	dir := t.TempDir()
	secret := filepath.Join(dir, "secret")
	if err := os.WriteFile(secret, []byte("secret"), 0o600); err != nil {
		t.Fatal(err)
	}
	g.permitting(authz.Permit{Transfer: &authz.Transfer{DenyPaths: []string{secret}, MaxSize: "1Mi"}})
	c := g.dial("alice")
	f, err := sftp.NewClient(c)
	if err != nil {
		t.Fatal(err)
	}
	if err := f.Symlink(secret, filepath.Join(dir, "link")); err != nil {
		t.Fatal(err)
	}
	for _, name := range []string{secret, dir + "/./link", dir + "/../" + filepath.Base(dir) + "/link"} {
		if _, err := f.Open(name); !errors.Is(err, os.ErrPermission) {
			t.Errorf("%s: %v", name, err)
		}
	}
	if err := f.Rename(dir, dir+"2"); !errors.Is(err, os.ErrPermission) {
		t.Errorf("rename: %v", err)
	}
	w, err := f.Create(filepath.Join(dir, "large"))
	if err != nil {
		t.Fatal(err)
	}
	if _, err := w.Write(make([]byte, 3<<20)); err == nil {
		t.Error("a file beyond the limit was written")
	}
	w.Close()
	if info, err := os.Stat(filepath.Join(dir, "large")); err != nil || info.Size() > 1<<20 {
		t.Errorf("%v, %v", info, err)
	}
	// scp's old protocol can't be held to rules on paths.
	session, err := c.NewSession()
	if err != nil {
		t.Fatal(err)
	}
	var stderr bytes.Buffer
	session.Stderr = &stderr
	var exit *ssh.ExitError
	if err := session.Run("scp -f " + secret); !errors.As(err, &exit) || !strings.Contains(stderr.String(), "not permitted") {
		t.Errorf("scp: %v, %s", err, &stderr)
	}
	f.Close()
	c.Close()
	g.stop()
	denied := 0
	for _, tr := range bodies[*auditlog.Transfer](g.records()[0]) {
		if tr.Denied {
			denied++
		}
	}
	if denied < 4 {
		t.Errorf("%d denied", denied)
	}
}

// Beyond the profile's limit data is counted and hashed, not kept.
func TestDataLimit(t *testing.T) {
	g := newGate(t, nil)
	g.permitting(authz.Permit{DataLimit: "100k"})
	c := g.dial("alice")
	session, err := c.NewSession()
	if err != nil {
		t.Fatal(err)
	}
	data := bytes.Repeat([]byte("data"), 100_000)
	session.Stdin = bytes.NewReader(data)
	out, err := session.Output("cat; echo end >&2")
	if err != nil || !bytes.Equal(out, data) {
		t.Fatal(len(out), err)
	}
	c.Close()
	g.stop()
	records := g.records()[0]
	var kept [3][]byte
	for _, b := range bodies[*auditlog.Data](records) {
		kept[b.Stream] = append(kept[b.Stream], b.Data...)
	}
	for _, stream := range []auditlog.Stream{auditlog.Input, auditlog.Output} {
		if !bytes.Equal(kept[stream], data[:100_000]) {
			t.Errorf("stream %d: %d bytes are kept", stream, len(kept[stream]))
		}
	}
	if string(kept[auditlog.Error]) != "end\n" {
		t.Errorf("%q", kept[auditlog.Error])
	}
	sum := sha256.Sum256(data)
	begun, ended := 0, 0
	for _, b := range bodies[*auditlog.DataRest](records) {
		switch {
		case b.Offset != 100_000:
			t.Errorf("%+v", b)
		case !b.End:
			begun++
		case b.Bytes == uint64(len(data)) && bytes.Equal(b.SHA256, sum[:]):
			ended++
		}
	}
	if begun != 2 || ended != 2 {
		t.Errorf("%d began, %d ended", begun, ended)
	}
}

// A stream that is no sftp is kept as the bytes it is, with a record that says so.
func TestUndecodable(t *testing.T) {
	g := newGate(t, nil)
	c := g.dial("alice")
	ch, reqs, err := c.OpenChannel("session", nil)
	if err != nil {
		t.Fatal(err)
	}
	go ssh.DiscardRequests(reqs)
	if ok, err := ch.SendRequest("subsystem", true, ssh.Marshal(subsystemMsg{"sftp"})); !ok || err != nil {
		t.Fatal(ok, err)
	}
	garbage := []byte("\x00\x00\x00\x05\x63garbage that is no packet")
	ch.Write(garbage)
	ch.CloseWrite()
	io.Copy(io.Discard, ch)
	c.Close()
	g.stop()
	records := g.records()[0]
	said := false
	for _, tr := range bodies[*auditlog.Transfer](records) {
		said = said || tr.Op == "undecodable" && tr.Stream == auditlog.Input
	}
	var kept []byte
	for _, b := range bodies[*auditlog.Data](records) {
		if b.Stream == auditlog.Input {
			kept = append(kept, b.Data...)
		}
	}
	if !said || !bytes.HasSuffix(garbage, kept) || len(kept) == 0 {
		t.Errorf("%v, %q", said, kept)
	}
}

// A program inside that only calls itself scp is passed on as the bytes it says, with a record that says so; where there are
// rules, nothing of it passes.
func TestUndecodableServer(t *testing.T) {
	dir := t.TempDir()
	program := filepath.Join(dir, "scp")
	const said = "smuggled in the place of a file\n"
	if err := os.WriteFile(program, []byte("#!/bin/sh\nread -r x\nprintf '"+strings.TrimSuffix(said, "\n")+"\\n'\ncat\n"), 0o700); err != nil {
		t.Fatal(err)
	}
	for _, rules := range []bool{false, true} {
		g := newGate(t, nil)
		permit := authz.Permit{}
		if rules {
			permit.Transfer = &authz.Transfer{MaxSize: "1Gi"}
		}
		g.permitting(permit)
		c := g.dial("alice")
		session, err := c.NewSession()
		if err != nil {
			t.Fatal(err)
		}
		session.Stdin = strings.NewReader("\x00back\n")
		out, err := session.Output(program + " -f x")
		if passed := strings.Contains(string(out), "smuggled"); passed == rules {
			t.Errorf("rules %v: %q passed, %v", rules, out, err)
		}
		c.Close()
		g.stop()
		records := g.records()[0]
		n := 0
		for _, tr := range bodies[*auditlog.Transfer](records) {
			if tr.Op == "undecodable" && tr.Detail != "" && tr.Protocol == "scp" {
				n++
			}
		}
		if n != 1 {
			t.Errorf("rules %v: it is said %d times", rules, n)
		}
		var kept []byte
		for _, b := range bodies[*auditlog.Data](records) {
			if b.Stream == auditlog.Output {
				kept = append(kept, b.Data...)
			}
		}
		if !rules && !strings.Contains(string(kept), said) {
			t.Errorf("kept %q", kept)
		}
	}
}

// Of all files of a session no more content is kept than the profile says; their hashes are.
func TestContentOfSession(t *testing.T) {
	for _, mode := range []string{"full", "none"} {
		g := newGate(t, nil)
		g.permitting(authz.Permit{Transfer: &authz.Transfer{Content: mode, ContentSession: "300k"}})
		c := g.dial("alice")
		f, err := sftp.NewClient(c)
		if err != nil {
			t.Fatal(err)
		}
		dir := t.TempDir()
		const size = 256 << 10
		for i := range byte(3) {
			data := make([]byte, size)
			rand.NewChaCha8([32]byte{i}).Read(data) // no block comes twice
			w, err := f.Create(filepath.Join(dir, string('a'+rune(i))))
			if err != nil {
				t.Fatal(err)
			}
			if _, err := w.Write(data); err != nil {
				t.Fatal(err)
			}
			w.Close()
		}
		f.Close()
		c.Close()
		g.stop()
		records := g.records()[0]
		stored, kept := 0, uint64(0)
		for _, b := range bodies[*auditlog.Content](records) {
			stored += len(b.Data)
		}
		for _, tr := range bodies[*auditlog.Transfer](records) {
			if tr.Written == nil || tr.Written.Bytes != size || (tr.Written.SHA256 == nil) != (mode == "none") {
				t.Errorf("%s: %+v", tr.Path, tr.Written)
				continue
			}
			kept += tr.Written.Kept
		}
		if most := 300_000; mode == "full" && (stored > most || stored < most-contentBlock || kept != uint64(stored)) || mode == "none" && stored > 0 {
			t.Errorf("%s: %d bytes are stored, %d said to be kept", mode, stored, kept)
		}
	}
}
