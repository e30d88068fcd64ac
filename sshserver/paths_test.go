package sshserver

import (
	"bytes"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"testing"

	"github.com/pkg/sftp"

	"github.com/sallyport/sallyport/auditlog"
	"github.com/sallyport/sallyport/authz"
)

// treeOf is a directory with something in it that rules forbid, and something that they don't.
func treeOf(t *testing.T) string {
	t.Helper()
	dir, err := filepath.EvalSymlinks(t.TempDir())
	if err != nil {
		t.Fatal(err)
	}
	for name, text := range map[string]string{"denied/secret": "secret", "denied/sub/secret": "secret", "open/file": "file", "open/caf\xe9": "latin"} {
		if err := os.MkdirAll(filepath.Dir(filepath.Join(dir, name)), 0o700); err != nil {
			t.Fatal(err)
		}
		if err := os.WriteFile(filepath.Join(dir, name), []byte(text), 0o600); err != nil {
			t.Fatal(err)
		}
	}
	return dir
}

// state is all that is in a directory, with modes and contents.
func state(t *testing.T, dir string) string {
	t.Helper()
	var b strings.Builder
	err := filepath.WalkDir(dir, func(path string, d fs.DirEntry, err error) error {
		if err != nil {
			return err
		}
		info, err := d.Info()
		if err != nil {
			return err
		}
		fmt.Fprintf(&b, "%s %v", path, info.Mode())
		if info.Mode().IsRegular() {
			text, err := os.ReadFile(path)
			if err != nil {
				return err
			}
			fmt.Fprintf(&b, " %v %q", info.ModTime(), text)
		}
		b.WriteByte('\n')
		return nil
	})
	if err != nil {
		t.Fatal(err)
	}
	return b.String()
}

// Whatever a path is called, and whatever is asked of it, what is denied stays as it is and is not read.
func TestDeniedPaths(t *testing.T) {
	g := newGate(t, nil)
	dir := treeOf(t)
	denied := filepath.Join(dir, "denied")
	g.permitting(authz.Permit{Transfer: &authz.Transfer{DenyPaths: []string{denied}}})
	c := g.dial("alice")
	f, err := sftp.NewClient(c)
	if err != nil {
		t.Fatal(err)
	}
	for text, link := range map[string]string{
		denied: "open/dir", denied + "/secret": "open/link", "../denied": "open/relative", "relative/secret": "open/two", "/": "open/root",
		"loop": "open/loop", "../../../../../../../../../../../..": "open/up",
	} {
		if err := f.Symlink(text, filepath.Join(dir, link)); err != nil {
			t.Fatal(link, err)
		}
	}
	wd, err := f.Getwd()
	if err != nil {
		t.Fatal(err)
	}
	relative, err := filepath.Rel(wd, denied)
	if err != nil {
		t.Fatal(err)
	}
	before := state(t, denied)
	names := []string{
		denied + "/secret", "/" + denied + "//secret/", dir + "/./denied/./secret", dir + "/open/../denied/secret",
		dir + "/open/dir/secret", dir + "/open/dir/../denied/secret", dir + "/open/link", dir + "/open/relative/secret", dir + "/open/two",
		dir + "/open/root" + denied + "/secret", dir + "/open/up" + denied + "/secret", relative + "/secret", "./" + relative + "/secret",
		"/proc/self/root" + denied + "/secret", "/proc/1/root" + denied + "/secret", "/proc/self/cwd/" + relative + "/secret",
		"/proc/self/task/../root" + denied + "/secret", "/dev/fd/../root" + denied + "/secret", "/../.." + denied + "/secret",
		denied + "/sub/secret", denied + "/new",
	}
	refused := 0
	check := func(what, name string, err error) {
		t.Helper()
		// A root that is not this uid's to look at is an error too.
		if !errors.Is(err, os.ErrPermission) && !(strings.HasPrefix(name, "/proc/1/") && err != nil) {
			t.Errorf("%s %q: %v", what, name, err)
		}
		refused++
	}
	for _, name := range names {
		_, err := f.Open(name)
		check("open", name, err)
		_, err = f.OpenFile(name, os.O_WRONLY|os.O_CREATE|os.O_TRUNC)
		check("create", name, err)
		check("truncate", name, f.Truncate(name, 0))
		check("chmod", name, f.Chmod(name, 0o777))
		if strings.HasPrefix(name, dir+"/open/") && (strings.HasSuffix(name, "link") || strings.HasSuffix(name, "two")) {
			continue // what follows is of the link itself
		}
		check("rename", name, f.Rename(name, dir+"/open/got"))
		check("posix-rename", name, f.PosixRename(name, dir+"/open/got"))
		check("rename to", name, f.Rename(dir+"/open/file", name))
		check("posix-rename to", name, f.PosixRename(dir+"/open/file", name))
		check("link", name, f.Link(name, dir+"/open/got"))
		check("link to", name, f.Link(dir+"/open/file", name))
		check("symlink at", name, f.Symlink("x", name))
		check("remove", name, f.Remove(name))
		check("mkdir", name, f.Mkdir(name))
	}
	for _, name := range []string{denied, dir + "/open/dir", dir + "/open/relative/", dir + "/open/root" + denied, "/proc/self/root" + denied} {
		_, err := f.ReadDir(name)
		check("list", name, err)
		if err := f.RemoveDirectory(name + "/sub"); !errors.Is(err, os.ErrPermission) {
			t.Errorf("rmdir %s: %v", name, err)
		}
	}
	for _, name := range []string{dir, filepath.Dir(dir), "/tmp"} {
		check("rename a parent", name, f.Rename(name, name+"-moved"))
		check("posix-rename a parent", name, f.PosixRename(name, name+"-moved"))
	}
	check("rename a directory to a parent", dir, f.PosixRename(dir+"/open", dir))
	for _, name := range []string{dir + "/open/loop", denied + "/secret\x00x", "\x00", strings.Repeat("/a", 2040), dir + "/open/caf\xe9/x"} {
		if _, err := f.Open(name); err == nil {
			t.Errorf("%q was opened", name[:min(len(name), 100)])
		}
	}
	if after := state(t, denied); after != before {
		t.Errorf("it was\n%sand is\n%s", before, after)
	}
	// What is not denied is as ever, whatever its bytes.
	for _, name := range []string{dir + "/open/file", dir + "/open/caf\xe9", dir + "/open/up" + dir + "/open/file"} {
		r, err := f.Open(name)
		if err != nil {
			t.Fatal(err)
		}
		if text, err := io.ReadAll(r); err != nil || len(text) == 0 {
			t.Errorf("%s: %q %v", name, text, err)
		}
		r.Close()
	}
	f.Close()
	c.Close()
	g.stop()
	n := 0
	for _, tr := range bodies[*auditlog.Transfer](g.records()[0]) {
		if tr.Denied {
			n++
		}
		if tr.Read != nil && tr.Read.Bytes > 0 && strings.HasPrefix(string(tr.Resolved), denied) && tr.Op == "file" {
			t.Errorf("read: %s", tr.Resolved)
		}
	}
	if n < refused*9/10 {
		t.Errorf("%d of %d refusals are recorded", n, refused)
	}
}

// A directory that becomes a link while the gate decides, by another channel or by a program inside, opens nothing that is
// denied.
func TestSwappedLinks(t *testing.T) {
	g := newGate(t, nil)
	dir := treeOf(t)
	denied := filepath.Join(dir, "denied")
	g.permitting(authz.Permit{Transfer: &authz.Transfer{DenyPaths: []string{denied}}})
	if err := os.Mkdir(dir+"/d", 0o700); err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(dir+"/d/secret", []byte("public"), 0o600); err != nil {
		t.Fatal(err)
	}
	c := g.dial("alice")
	stop := make(chan struct{})
	var swapper sync.WaitGroup
	swapper.Go(func() {
		for {
			select {
			case <-stop:
				return
			default:
			}
			os.Rename(dir+"/d", dir+"/e")
			os.Symlink("denied", dir+"/d")
			os.Remove(dir + "/d")
			os.Rename(dir+"/e", dir+"/d")
		}
	})
	f, err := sftp.NewClient(c)
	if err != nil {
		t.Fatal(err)
	}
	opened := 0
	before := state(t, denied)
	for range 600 {
		r, err := f.Open(dir + "/d/secret")
		if err != nil {
			continue
		}
		opened++
		if text, err := io.ReadAll(r); err != nil || !bytes.Equal(text, []byte("public")) {
			t.Fatalf("%q %v", text, err)
		}
		r.Close()
		f.Chmod(dir+"/d/secret", 0o640)
		f.Symlink("x", dir+"/d/new")
		f.Remove(dir + "/d/new")
	}
	close(stop)
	swapper.Wait()
	if opened == 0 {
		t.Error("it was never open: nothing was tried")
	}
	if after := state(t, denied); after != before {
		t.Errorf("it was\n%sand is\n%s", before, after)
	}
	f.Close()
	c.Close()
}

// A large upload of which only the hash is kept costs the log next to nothing, by sftp and by scp's old protocol.
func TestUploadsAreNotKept(t *testing.T) {
	g := newGate(t, nil)
	g.permitting(authz.Permit{})
	dir := t.TempDir()
	const size = 50 << 20
	content := bytes.Repeat([]byte("fifty mebibytes of it\n"), size/22+1)[:size]
	c := g.dial("alice")
	f, err := sftp.NewClient(c)
	if err != nil {
		t.Fatal(err)
	}
	w, err := f.Create(filepath.Join(dir, "sftp"))
	if err != nil {
		t.Fatal(err)
	}
	if _, err := w.ReadFrom(bytes.NewReader(content)); err != nil {
		t.Fatal(err)
	}
	w.Close()
	f.Close()
	session, err := c.NewSession()
	if err != nil {
		t.Fatal(err)
	}
	session.Stdin = io.MultiReader(strings.NewReader(fmt.Sprintf("C0600 %d scp\n", size)), bytes.NewReader(content), strings.NewReader("\x00"))
	var out bytes.Buffer
	session.Stdout = &out
	if err := session.Run("scp -t " + dir); err != nil {
		t.Fatal(err, out.String())
	}
	c.Close()
	g.stop()
	var log int64
	filepath.WalkDir(filepath.Join(g.dir, "log"), func(path string, d fs.DirEntry, err error) error {
		if err == nil && d.Type().IsRegular() {
			info, err := d.Info()
			if err != nil {
				t.Error(err)
				return nil
			}
			log += info.Size()
		}
		return nil
	})
	if log == 0 || log >= 100<<10 {
		t.Errorf("100 MiB of uploads are %d bytes of log", log)
	}
	n := 0
	for _, tr := range bodies[*auditlog.Transfer](g.records()[0]) {
		if tr.Written != nil && tr.Written.Whole && tr.Written.Bytes == size && len(tr.Written.SHA256) == 32 {
			n++
		}
	}
	if n != 2 {
		t.Errorf("%d whole uploads are recorded", n)
	}
	for _, name := range []string{"sftp", "scp"} {
		if got, err := os.ReadFile(filepath.Join(dir, name)); err != nil || !bytes.Equal(got, content) {
			t.Errorf("%s: %d bytes arrived: %v", name, len(got), err)
		}
	}
}
