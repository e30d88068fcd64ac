package agent

import (
	"context"
	"crypto/rand"
	"errors"
	"fmt"
	"net"
	"os"
	"path"
	"strconv"
	"strings"
	"syscall"

	"golang.org/x/sys/unix"

	"github.com/sallyport/sallyport/backends"
)

// maxSocketPath is the longest path of a unix socket.
const maxSocketPath = 107

var (
	errPath = errors.New("not the absolute path of a socket")
	errOwn  = errors.New("a path of the agent's own")

	errLongName = errors.New("too long a name for a socket") // some 85 bytes are left of maxSocketPath
)

// ownDirs gives the directories of an agent's own: its file's, and its socket's if it is reached through one. A relay's socket
// is gone before a session begins.
func ownDirs(socket string) []string {
	var dirs []string
	if socket != "" {
		dirs = append(dirs, path.Dir(path.Clean(socket)))
	}
	if exe, err := os.Readlink(self); err == nil {
		dirs = append(dirs, path.Dir(exe))
	}
	return dirs
}

// checkSocketPath says what is wrong with a path that the gate was given by its client. Abstract names, which begin with
// a zero byte or "@", are among the wrong ones: they belong to a network namespace, not to a file system.
func checkSocketPath(name string) error {
	if !strings.HasPrefix(name, "/") || strings.HasSuffix(name, "/") || len(name) > maxSocketPath || strings.ContainsRune(name, 0) {
		return errPath
	}
	return nil
}

// place is a file or directory that was looked up: what is checked of it is true of what is done with it.
type place struct{ fd int }

// look looks a path up, through all symbolic links, and refuses what is the agent's own or no path at all, as the
// descriptors in /proc. flags say what must be there.
func look(name string, flags int, own []string) (place, error) {
	for {
		fd, err := unix.Open(name, unix.O_PATH|unix.O_CLOEXEC|flags, 0)
		if err == unix.EINTR {
			continue
		}
		if err != nil {
			return place{-1}, err
		}
		p := place{fd}
		if err := p.check(own); err != nil {
			p.close()
			return place{-1}, err
		}
		return p, nil
	}
}

func (p place) close() { unix.Close(p.fd) }

// name is a path that leads to p, and nowhere else.
func (p place) name() string { return "/proc/self/fd/" + strconv.Itoa(p.fd) }

func (p place) check(own []string) error {
	real, err := os.Readlink(p.name())
	if err != nil {
		return err
	}
	if !strings.HasPrefix(real, "/") {
		return errPath
	}
	for _, dir := range own {
		if real == dir || strings.HasPrefix(real, strings.TrimSuffix(dir, "/")+"/") {
			return errOwn
		}
	}
	return nil
}

// dialUnix connects to the socket at a path.
func dialUnix(ctx context.Context, name string, own []string) (backends.HalfCloser, error) {
	if err := checkSocketPath(name); err != nil {
		return nil, err
	}
	p, err := look(name, 0, own)
	if err != nil {
		return nil, err
	}
	defer p.close()
	conn, err := new(net.Dialer).DialContext(ctx, "unix", p.name())
	if err != nil {
		return nil, err
	}
	return conn.(*net.UnixConn), nil
}

// listenUnix listens at a path where nothing is yet. The function removes the socket.
func listenUnix(name string, own []string) (net.Listener, func(), error) {
	if err := checkSocketPath(name); err != nil {
		return nil, nil, err
	}
	dir, err := look(path.Dir(name), unix.O_DIRECTORY, own)
	if err != nil {
		return nil, nil, err
	}
	l, remove, err := listenIn("unix", dir, path.Base(name))
	if err != nil {
		dir.close()
		return nil, nil, err
	}
	return l, func() { remove(); dir.close() }, nil
}

// listenIn listens in a directory that was looked up.
func listenIn(network string, dir place, base string) (net.Listener, func(), error) {
	name := dir.name() + "/" + base
	switch {
	case base == "." || base == ".." || base == "/":
		return nil, nil, errPath
	case len(name) > maxSocketPath:
		return nil, nil, errLongName
	}
	c := net.ListenConfig{Control: func(_, _ string, raw syscall.RawConn) error {
		// Linux makes the socket's file with the mode of the descriptor.
		var err error
		if cerr := raw.Control(func(fd uintptr) { err = unix.Fchmod(int(fd), 0o600) }); cerr != nil {
			return cerr
		}
		return err
	}}
	l, err := c.Listen(context.Background(), network, name)
	if err != nil {
		return nil, nil, err
	}
	l.(*net.UnixListener).SetUnlinkOnClose(false)
	var made unix.Stat_t
	if err := unix.Fstatat(dir.fd, base, &made, unix.AT_SYMLINK_NOFOLLOW); err != nil {
		l.Close()
		return nil, nil, err
	}
	return l, func() {
		// Someone may have put something else there.
		var now unix.Stat_t
		if unix.Fstatat(dir.fd, base, &now, unix.AT_SYMLINK_NOFOLLOW) == nil && now.Dev == made.Dev && now.Ino == made.Ino {
			unix.Unlinkat(dir.fd, base, 0)
		}
	}, nil
}

// tempDir is where directories of the agent's making are.
const tempDir = "/tmp"

// makePrivate makes a directory that only this uid can enter. The function removes it, if it is empty.
func makePrivate(prefix string) (string, place, func(), error) {
	name := tempDir + "/" + prefix + rand.Text()[:10]
	if err := os.Mkdir(name, 0o700); err != nil {
		return "", place{-1}, nil, err
	}
	dir, err := look(name, unix.O_DIRECTORY|unix.O_NOFOLLOW, nil)
	if err != nil {
		os.Remove(name)
		return "", place{-1}, nil, fmt.Errorf("open %s: %w", name, err)
	}
	return name, dir, func() {
		dir.close()
		unix.Rmdir(name)
	}, nil
}

// listenPrivate listens at a socket in a directory of its own.
func listenPrivate(own []string) (net.Listener, func(), string, error) {
	const base = "agent.sock"
	name, dir, removeDir, err := makePrivate("ssh-")
	if err != nil {
		return nil, nil, "", err
	}
	l, remove, err := net.Listener(nil), func() {}, dir.check(own)
	if err == nil {
		l, remove, err = listenIn("unix", dir, base)
	}
	if err != nil {
		removeDir()
		return nil, nil, "", err
	}
	return l, func() { remove(); removeDir() }, name + "/" + base, nil
}
