package auditlog

import (
	"os"

	"golang.org/x/sys/unix"
)

// dropPages takes synced bytes of a file out of the page cache. It is a hint: an error changes nothing.
func dropPages(f *os.File, offset, length int64) {
	if c, err := f.SyscallConn(); err == nil {
		c.Control(func(fd uintptr) { unix.Fadvise(int(fd), offset, length, unix.FADV_DONTNEED) })
	}
}
