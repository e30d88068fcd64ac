//go:build unix

package auditlog_test

import (
	"syscall"
	"time"
)

// processTime is the processor time of the whole test so far.
func processTime() time.Duration {
	var u syscall.Rusage
	if err := syscall.Getrusage(syscall.RUSAGE_SELF, &u); err != nil {
		panic(err) // of a test
	}
	return time.Duration(u.Utime.Nano() + u.Stime.Nano())
}
