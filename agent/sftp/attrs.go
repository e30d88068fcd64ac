package sftp

import (
	"errors"
	"fmt"
	"os"
	"strconv"
	"strings"
	"time"

	"golang.org/x/sys/unix"
)

// The bits of the flags of ATTRS (draft-ietf-secsh-filexfer-02, section 5).
const (
	attrSize        = 0x01
	attrOwner       = 0x02
	attrPermissions = 0x04
	attrTimes       = 0x08
	attrExtended    = 0x80000000
)

// attributes are a file's, as a client gave them.
type attributes struct {
	valid        uint32
	size         uint64
	uid, gid     uint32
	permissions  uint32
	atime, mtime uint32
}

func (f *fields) attrs() attributes {
	a := attributes{valid: f.uint32()}
	if a.valid&attrSize != 0 {
		a.size = f.uint64()
	}
	if a.valid&attrOwner != 0 {
		a.uid, a.gid = f.uint32(), f.uint32()
	}
	if a.valid&attrPermissions != 0 {
		a.permissions = f.uint32()
	}
	if a.valid&attrTimes != 0 {
		a.atime, a.mtime = f.uint32(), f.uint32()
	}
	if a.valid&attrExtended != 0 {
		for n := f.uint32(); n > 0 && !f.bad; n-- {
			f.bytes()
			f.bytes()
		}
	}
	return a
}

// mode is what a new file has before the umask.
func (a attributes) mode(otherwise uint32) uint32 {
	if a.valid&attrPermissions == 0 {
		return otherwise
	}
	return a.permissions & 0o7777
}

func (a attributes) times() []unix.Timespec {
	return []unix.Timespec{{Sec: int64(a.atime)}, {Sec: int64(a.mtime)}}
}

// attrs adds ATTRS to the answer.
func (s *server) attrs(st *unix.Stat_t) {
	s.uint32(attrSize | attrOwner | attrPermissions | attrTimes)
	s.uint64(uint64(st.Size))
	s.uint32(st.Uid)
	s.uint32(st.Gid)
	s.uint32(st.Mode)
	s.uint32(uint32(st.Atim.Sec))
	s.uint32(uint32(st.Mtim.Sec))
}

// setstat sets what a says of a file, all that can be set. Of a symbolic link that is so only with link.
func setstat(dir int, last string, a attributes, link bool) error {
	var errs []error
	if a.valid&attrSize != 0 {
		errs = append(errs, truncateAt(dir, last, a.size, link))
	}
	if a.valid&attrPermissions != 0 {
		errs = append(errs, chmodAt(dir, last, a.mode(0), link))
	}
	if !link && a.valid&(attrTimes|attrOwner) != 0 {
		if err := noLink(dir, last); err != nil {
			return errors.Join(append(errs, err)...)
		}
	}
	if a.valid&attrTimes != 0 {
		errs = append(errs, unix.UtimesNanoAt(dir, last, a.times(), unix.AT_SYMLINK_NOFOLLOW))
	}
	if a.valid&attrOwner != 0 {
		errs = append(errs, unix.Fchownat(dir, last, int(a.uid), int(a.gid), unix.AT_SYMLINK_NOFOLLOW))
	}
	return errors.Join(errs...)
}

// noLink says that a file is there and no symbolic link. One that becomes a link afterwards is itself changed, not what it
// points to.
func noLink(dir int, last string) error {
	var st unix.Stat_t
	if err := unix.Fstatat(dir, last, &st, unix.AT_SYMLINK_NOFOLLOW); err != nil {
		return err
	}
	if st.Mode&unix.S_IFMT == unix.S_IFLNK {
		return unix.ELOOP
	}
	return nil
}

func truncateAt(dir int, last string, size uint64, link bool) error {
	if link { // as OpenSSH has it
		return unix.EINVAL
	}
	fd, err := openat(dir, last, unix.O_WRONLY|unix.O_NONBLOCK, 0)
	if err != nil {
		return err
	}
	defer unix.Close(fd)
	return unix.Ftruncate(fd, int64(size))
}

// chmodAt changes a file's mode by a descriptor, because chmod(2) follows links.
func chmodAt(dir int, last string, mode uint32, link bool) error {
	fd, err := openat(dir, last, unix.O_PATH, 0)
	if err != nil {
		return err
	}
	defer unix.Close(fd)
	var st unix.Stat_t
	if err := unix.Fstat(fd, &st); err != nil {
		return err
	}
	if st.Mode&unix.S_IFMT == unix.S_IFLNK {
		if link {
			return unix.EOPNOTSUPP // links have no mode
		}
		return unix.ELOOP
	}
	return unix.Chmod("/proc/self/fd/"+strconv.Itoa(fd), mode)
}

func fsetstat(fd int, a attributes) error {
	var errs []error
	if a.valid&attrSize != 0 {
		errs = append(errs, unix.Ftruncate(fd, int64(a.size)))
	}
	if a.valid&attrPermissions != 0 {
		errs = append(errs, unix.Fchmod(fd, a.mode(0)))
	}
	if a.valid&attrTimes != 0 {
		errs = append(errs, unix.Futimes(fd, []unix.Timeval{{Sec: int64(a.atime)}, {Sec: int64(a.mtime)}}))
	}
	if a.valid&attrOwner != 0 {
		errs = append(errs, unix.Fchown(fd, int(a.uid), int(a.gid)))
	}
	return errors.Join(errs...)
}

// long is a line as of ls -l.
func (s *server) long(name string, st *unix.Stat_t) string {
	const half = 180 * 24 * time.Hour
	when := time.Unix(st.Mtim.Sec, 0)
	layout := "Jan _2 15:04"
	if age := time.Since(when); age > half || age < -half {
		layout = "Jan _2  2006"
	}
	return fmt.Sprintf("%s %3d %-8s %-8s %8d %s %s", modeText(st.Mode), st.Nlink, s.nameOf(0, st.Uid), s.nameOf(1, st.Gid),
		st.Size, when.Format(layout), name)
}

// modeText is a mode as ls prints it.
func modeText(mode uint32) string {
	b := []byte("?rwxrwxrwx")
	switch mode & unix.S_IFMT {
	case unix.S_IFREG:
		b[0] = '-'
	case unix.S_IFDIR:
		b[0] = 'd'
	case unix.S_IFLNK:
		b[0] = 'l'
	case unix.S_IFCHR:
		b[0] = 'c'
	case unix.S_IFBLK:
		b[0] = 'b'
	case unix.S_IFIFO:
		b[0] = 'p'
	case unix.S_IFSOCK:
		b[0] = 's'
	}
	for i := range 9 {
		if mode&(1<<(8-i)) == 0 {
			b[1+i] = '-'
		}
	}
	for _, x := range []struct {
		bit uint32
		at  int
		c   byte
	}{{unix.S_ISUID, 3, 's'}, {unix.S_ISGID, 6, 's'}, {unix.S_ISVTX, 9, 't'}} {
		switch {
		case mode&x.bit == 0:
		case b[x.at] == '-':
			b[x.at] = x.c - 'a' + 'A'
		default:
			b[x.at] = x.c
		}
	}
	return string(b)
}

// nameOf is a user's (0) or a group's (1) name, or the number.
func (s *server) nameOf(kind int, id uint32) string {
	if name := s.names(kind)[id]; name != "" {
		return name
	}
	return strconv.FormatUint(uint64(id), 10)
}

// maxAccounts is how much of the files of users and groups is read.
const maxAccounts = 1 << 20

// names are the users (0) or groups (1) by number.
func (s *server) names(kind int) map[uint32]string {
	if s.users[kind] != nil {
		return s.users[kind]
	}
	m := make(map[uint32]string)
	s.users[kind] = m
	for _, f := range accounts([]string{"/etc/passwd", "/etc/group"}[kind]) {
		if id, err := strconv.ParseUint(f[2], 10, 32); err == nil && m[uint32(id)] == "" {
			m[uint32(id)] = f[0]
		}
	}
	return m
}

// accounts are the lines of a file of users or groups that have three fields or more.
func accounts(name string) (lines [][]string) {
	fd, err := unix.Open(name, unix.O_RDONLY|unix.O_NONBLOCK|unix.O_CLOEXEC, 0)
	if err != nil {
		return nil
	}
	f := os.NewFile(uintptr(fd), name)
	defer f.Close()
	b := make([]byte, maxAccounts)
	n, have := 0, 0
	for n < len(b) {
		if have, err = f.Read(b[n:]); have == 0 || err != nil {
			break
		}
		n += have
	}
	for line := range strings.Lines(string(b[:n])) {
		if f := strings.Split(strings.TrimSuffix(line, "\n"), ":"); len(f) >= 3 {
			lines = append(lines, f)
		}
	}
	return lines
}
