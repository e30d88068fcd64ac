package agent

import (
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"os"
	"strconv"
	"syscall"

	"golang.org/x/sys/unix"
)

// Families of Xauthority entries (X11/Xauth.h).
const (
	familyLocal = 0x0100
	familyWild  = 0xffff
)

// maxX11 bounds a protocol's name, a cookie and a display's number, which travel in counts of 16 bits.
const maxX11 = 1 << 10

// authority makes the content of an Xauthority file: who is on this host, and anyone else, gets the cookie for the display.
func (x *x11) authority(hostname string) ([]byte, error) {
	if x.Display < 0 || x.Display > 65535-6000 || len(x.Protocol) > maxX11 || len(x.Cookie) > maxX11 || len(hostname) > maxX11 {
		return nil, errors.New("x11: out of bounds")
	}
	var b []byte
	counted := func(s string) {
		b = append(binary.BigEndian.AppendUint16(b, uint16(len(s))), s...)
	}
	entry := func(family uint16, address string) {
		b = binary.BigEndian.AppendUint16(b, family)
		counted(address)
		counted(strconv.Itoa(x.Display))
		counted(x.Protocol)
		counted(string(x.Cookie))
	}
	entry(familyLocal, hostname)
	entry(familyWild, "")
	return b, nil
}

// environ writes the Xauthority file, in a directory of its own, and gives the variables that lead to it. The function
// removes both.
func (x *x11) environ() ([]string, func(), error) {
	const base = "authority"
	hostname, _ := os.Hostname()
	content, err := x.authority(hostname)
	if err != nil {
		return nil, nil, err
	}
	name, dir, removeDir, err := makePrivate("xauth-")
	if err != nil {
		return nil, nil, fmt.Errorf("x11: %w", err)
	}
	remove := func() {
		unix.Unlinkat(dir.fd, base, 0)
		removeDir()
	}
	fd, err := unix.Openat(dir.fd, base, unix.O_WRONLY|unix.O_CREAT|unix.O_EXCL|unix.O_NOFOLLOW|unix.O_CLOEXEC, 0o600)
	if err == nil {
		var n int
		if n, err = syscall.Write(fd, content); err == nil && n < len(content) {
			err = io.ErrShortWrite
		}
		err = errors.Join(err, unix.Close(fd))
	}
	if err != nil {
		remove()
		return nil, nil, fmt.Errorf("x11: write the authority file: %w", err)
	}
	return []string{
		fmt.Sprintf("DISPLAY=localhost:%d.%d", x.Display, x.Screen), "XAUTHORITY=" + name + "/" + base,
	}, remove, nil
}
