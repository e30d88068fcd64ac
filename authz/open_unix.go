//go:build unix

package authz

import (
	"fmt"
	"io/fs"
	"syscall"
)

// openNonblock keeps an open of a FIFO from waiting for its writer.
const openNonblock = syscall.O_NONBLOCK

// identity tells a directory from another that took its name.
func identity(info fs.FileInfo) string {
	if stat, ok := info.Sys().(*syscall.Stat_t); ok {
		return fmt.Sprintf("%d:%d", stat.Dev, stat.Ino)
	}
	return ""
}
