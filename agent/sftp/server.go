// Package sftp serves files: SFTP version 3 (draft-ietf-secsh-filexfer-02) with the extensions of OpenSSH's PROTOCOL
// file, section 4, and copy-data and home-directory of draft-ietf-secsh-filexfer-extensions-00.
//
// It takes no path that has a symbolic link in it, but for the requests that only ask about names and attributes: the gate
// resolves links, decides on what it found, and passes that on. So a directory that is made a link in between, by a
// program inside or on another channel, is an error here, and not another file than the one that was decided upon.
//
// One goroutine does everything, in the order of the requests. Answers gather while there are more requests to read, and
// contents are neither copied nor allocated on the way.
package sftp

import (
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"math"
	"os"
	"path"
	"path/filepath"
	"strings"

	"golang.org/x/sys/unix"
)

// The packet types (draft-ietf-secsh-filexfer-02, section 3).
const (
	fxpInit          = 1
	fxpVersion       = 2
	fxpOpen          = 3
	fxpClose         = 4
	fxpRead          = 5
	fxpWrite         = 6
	fxpLstat         = 7
	fxpFstat         = 8
	fxpSetstat       = 9
	fxpFsetstat      = 10
	fxpOpendir       = 11
	fxpReaddir       = 12
	fxpRemove        = 13
	fxpMkdir         = 14
	fxpRmdir         = 15
	fxpRealpath      = 16
	fxpStat          = 17
	fxpRename        = 18
	fxpReadlink      = 19
	fxpSymlink       = 20
	fxpStatus        = 101
	fxpHandle        = 102
	fxpData          = 103
	fxpName          = 104
	fxpAttrs         = 105
	fxpExtended      = 200
	fxpExtendedReply = 201
)

// The bits of SSH_FXP_OPEN's pflags (section 6.3).
const (
	openRead      = 0x01
	openWrite     = 0x02
	openAppend    = 0x04
	openCreate    = 0x08
	openTruncate  = 0x10
	openExclusive = 0x20
)

const (
	maxPacket = 256 << 10        // the length that a packet may have; OpenSSH's too
	maxData   = maxPacket - 1024 // of content in one
	maxFiles  = 1000             // open
	maxNames  = 100              // of a directory in one answer
	enough    = 64 << 10         // of answers, to be written before more is read
)

// extensions are what VERSION announces, each with its version.
var extensions = []string{
	"posix-rename@openssh.com", "1", "statvfs@openssh.com", "2", "fstatvfs@openssh.com", "2", "hardlink@openssh.com", "1",
	"fsync@openssh.com", "1", "lsetstat@openssh.com", "1", "limits@openssh.com", "1", "expand-path@openssh.com", "1",
	"copy-data", "1", "home-directory", "1", "users-groups-by-id@openssh.com", "1",
}

// Config says what relative paths mean.
type Config struct {
	Dir  string // where they begin; absolute
	Home string // what ~ is
}

// file is an open file or directory.
type file struct {
	fd  int
	dir *os.File // of a directory: fd is its
}

func (f *file) close() error {
	if f.dir != nil {
		return f.dir.Close()
	}
	return unix.Close(f.fd)
}

// server is one run of Serve.
type server struct {
	Config
	out   io.Writer
	root  int // descriptor of "/"
	files []*file
	o     []byte // answers that are not written
	began bool
	users [2]map[uint32]string // names of users and of groups by number; nil until asked for
}

// Serve serves the file system, as this process's uid sees it, until in ends. An error is a packet that is none, or one
// of in or out.
func Serve(in io.Reader, out io.Writer, c Config) error {
	root, err := unix.Open("/", unix.O_PATH|unix.O_DIRECTORY|unix.O_CLOEXEC, 0)
	if err != nil {
		return fmt.Errorf("open /: %w", err)
	}
	defer unix.Close(root)
	return (&server{Config: c, out: out, root: root}).serve(in)
}

func (s *server) serve(in io.Reader) error {
	defer func() {
		for _, f := range s.files {
			if f != nil {
				f.close()
			}
		}
	}()
	s.o = make([]byte, 0, enough+4+maxPacket)
	b := make([]byte, 2*(4+maxPacket))
	from, to := 0, 0 // b[from:to] is not looked at
	for {
		for to-from >= 4 {
			n := int(binary.BigEndian.Uint32(b[from:]))
			if n < 1 || n > maxPacket {
				return fmt.Errorf("a packet of %d bytes", uint32(n))
			}
			if to-from < 4+n {
				break
			}
			if err := s.packet(b[from+4 : from+4+n]); err != nil {
				return err
			}
			from += 4 + n
			if len(s.o) >= enough {
				if err := s.flush(); err != nil {
					return err
				}
			}
		}
		if err := s.flush(); err != nil {
			return err
		}
		if from == to {
			from, to = 0, 0
		} else if len(b)-from < 4+maxPacket {
			from, to = 0, copy(b, b[from:to])
		}
		n, err := in.Read(b[to:])
		to += n
		if n == 0 && err != nil {
			if errors.Is(err, io.EOF) && to == from {
				return nil
			}
			return fmt.Errorf("read requests: %w", err)
		}
	}
}

func (s *server) flush() error {
	if len(s.o) == 0 {
		return nil
	}
	_, err := s.out.Write(s.o)
	s.o = s.o[:0]
	if err != nil {
		return fmt.Errorf("write answers: %w", err)
	}
	return nil
}

// fields takes a packet's fields apart. After the first that isn't there all are zero, and bad is set.
type fields struct {
	b   []byte
	bad bool
}

func (f *fields) take(n uint64) []byte {
	if f.bad || uint64(len(f.b)) < n {
		f.bad = true
		return nil
	}
	p := f.b[:n]
	f.b = f.b[n:]
	return p
}

func (f *fields) uint32() uint32 {
	if p := f.take(4); p != nil {
		return binary.BigEndian.Uint32(p)
	}
	return 0
}

func (f *fields) uint64() uint64 {
	if p := f.take(8); p != nil {
		return binary.BigEndian.Uint64(p)
	}
	return 0
}

func (f *fields) bytes() []byte  { return f.take(uint64(f.uint32())) }
func (f *fields) string() string { return string(f.bytes()) }

func (s *server) uint32(v uint32) { s.o = binary.BigEndian.AppendUint32(s.o, v) }
func (s *server) uint64(v uint64) { s.o = binary.BigEndian.AppendUint64(s.o, v) }
func (s *server) string(v string) {
	s.o = append(binary.BigEndian.AppendUint32(s.o, uint32(len(v))), v...)
}

// begin begins an answer, and gives where; end ends it.
func (s *server) begin(typ byte, id uint32) int {
	at := len(s.o)
	s.o = binary.BigEndian.AppendUint32(append(s.o, 0, 0, 0, 0, typ), id)
	return at
}

func (s *server) end(at int) { binary.BigEndian.PutUint32(s.o[at:], uint32(len(s.o)-at-4)) }

var (
	errHandle = errors.New("not the handle of an open file of that kind")
	errSame   = errors.New("a file is not copied into itself")
)

var errPacket = errors.New("a packet whose fields are not as they must be")

// packet answers one packet. An error is that it is none.
func (s *server) packet(p []byte) error {
	typ, f := p[0], &fields{b: p[1:]}
	if typ == fxpInit {
		if f.uint32() < 3 || s.began {
			return errors.New("an INIT that is none")
		}
		s.began = true
		at := s.begin(fxpVersion, 3)
		for _, x := range extensions {
			s.string(x)
		}
		s.end(at)
		return nil
	}
	if !s.began {
		return errors.New("no INIT")
	}
	id := f.uint32()
	answered, err := s.request(typ, id, f)
	if f.bad {
		return errPacket
	}
	if !answered || err != nil {
		s.status(id, err)
	}
	return nil
}

// request does what is asked. It takes all fields before it does anything, and does nothing when one was missing. It says
// whether it has answered; if not, or if there is an error, the answer is a status.
func (s *server) request(typ byte, id uint32, f *fields) (answered bool, err error) {
	switch typ {
	case fxpRead:
		return s.read(id, f)
	case fxpWrite:
		return false, s.write(f)
	case fxpOpen:
		return s.open(id, f)
	case fxpOpendir:
		return s.opendir(id, f)
	case fxpReaddir:
		return s.readdir(id, f)
	case fxpClose:
		i, o := s.handle(f)
		if o == nil {
			return false, errHandle
		}
		s.files[i] = nil
		return false, o.close()
	case fxpStat, fxpLstat:
		return s.stat(id, f, typ == fxpStat)
	case fxpFstat:
		return s.fstat(id, f)
	case fxpSetstat:
		name, a := f.string(), f.attrs()
		if f.bad {
			return false, nil
		}
		return false, s.at(name, func(dir int, last string) error { return setstat(dir, last, a, false) })
	case fxpFsetstat:
		_, o := s.handle(f)
		a := f.attrs()
		if f.bad {
			return false, nil
		}
		if o == nil {
			return false, errHandle
		}
		return false, fsetstat(o.fd, a)
	case fxpRemove, fxpRmdir:
		name, flags := f.string(), 0
		if typ == fxpRmdir {
			flags = unix.AT_REMOVEDIR
		}
		if f.bad {
			return false, nil
		}
		return false, s.at(name, func(dir int, last string) error { return unix.Unlinkat(dir, last, flags) })
	case fxpMkdir:
		name, a := f.string(), f.attrs()
		if f.bad {
			return false, nil
		}
		return false, s.at(name, func(dir int, last string) error { return unix.Mkdirat(dir, last, a.mode(0o777)) })
	case fxpRename:
		return false, s.two(f, rename)
	case fxpSymlink:
		// The draft has the link first; OpenSSH, and with it all others, has it second (PROTOCOL, section 4.1).
		text, name := f.string(), f.string()
		if f.bad {
			return false, nil
		}
		return false, s.at(name, func(dir int, last string) error { return unix.Symlinkat(text, dir, last) })
	case fxpReadlink:
		name := f.string()
		if f.bad {
			return false, nil
		}
		text, err := os.Readlink(s.abs(name))
		if err != nil {
			return false, err
		}
		s.name(id, text)
		return true, nil
	case fxpRealpath:
		name := f.string()
		if f.bad {
			return false, nil
		}
		return s.realpath(id, name)
	case fxpExtended:
		return s.extended(id, f)
	}
	return false, unix.ENOSYS
}

// abs is a path as the kernel would take it in the session's directory.
func (s *server) abs(name string) string {
	if strings.HasPrefix(name, "/") {
		return name
	}
	return s.Dir + "/" + name
}

// at calls do with the directory that a path's last name is in. No name before that may be a symbolic link, and do must not
// follow one. Dots are taken as text, which without links is the same.
func (s *server) at(name string, do func(dir int, last string) error) error {
	if strings.ContainsRune(name, 0) || name == "" {
		return unix.ENOENT
	}
	names := strings.Split(strings.TrimPrefix(path.Clean(s.abs(name)), "/"), "/")
	dir := s.root
	for _, n := range names[:len(names)-1] {
		next, err := openat(dir, n, unix.O_PATH|unix.O_DIRECTORY, 0)
		if dir != s.root {
			unix.Close(dir)
		}
		if err != nil {
			return err
		}
		dir = next
	}
	last := names[len(names)-1]
	if last == "" {
		last = "." // of the root
	}
	err := do(dir, last)
	if dir != s.root {
		unix.Close(dir)
	}
	return err
}

// two calls do with the directories of two paths.
func (s *server) two(f *fields, do func(dir1 int, last1 string, dir2 int, last2 string) error) error {
	from, to := f.string(), f.string()
	if f.bad {
		return nil
	}
	return s.at(from, func(dir1 int, last1 string) error {
		return s.at(to, func(dir2 int, last2 string) error { return do(dir1, last1, dir2, last2) })
	})
}

// openat opens a file that is no symbolic link.
func openat(dir int, name string, flags int, mode uint32) (int, error) {
	for {
		fd, err := unix.Openat(dir, name, flags|unix.O_NOFOLLOW|unix.O_NOCTTY|unix.O_CLOEXEC, mode)
		if !errors.Is(err, unix.EINTR) {
			return fd, err
		}
	}
}

// rename is the draft's: nothing is replaced (section 6.5).
func rename(dir1 int, last1 string, dir2 int, last2 string) error {
	err := unix.Renameat2(dir1, last1, dir2, last2, unix.RENAME_NOREPLACE)
	if !errors.Is(err, unix.EINVAL) && !errors.Is(err, unix.ENOSYS) {
		return err
	}
	// A file system, or a kernel, that can't say so at once.
	var st unix.Stat_t
	if err := unix.Fstatat(dir2, last2, &st, unix.AT_SYMLINK_NOFOLLOW); err == nil {
		return unix.EEXIST
	}
	return unix.Renameat(dir1, last1, dir2, last2)
}

// handle is the open file that a handle names.
func (s *server) handle(f *fields) (int, *file) {
	p := f.bytes()
	if len(p) != 4 {
		return 0, nil
	}
	i := binary.BigEndian.Uint32(p)
	if uint64(i) >= uint64(len(s.files)) {
		return 0, nil
	}
	return int(i), s.files[i]
}

// opened gives a file a handle.
func (s *server) opened(id uint32, f *file) bool {
	i := 0
	for i < len(s.files) && s.files[i] != nil {
		i++
	}
	if i == len(s.files) {
		s.files = append(s.files, nil)
	}
	s.files[i] = f
	at := s.begin(fxpHandle, id)
	s.uint32(4)
	s.uint32(uint32(i))
	s.end(at)
	return true
}

// full says whether no file more may be open.
func (s *server) full() bool {
	n := 0
	for _, f := range s.files {
		if f != nil {
			n++
		}
	}
	return n >= maxFiles
}

func (s *server) open(id uint32, f *fields) (bool, error) {
	name, pflags, a := f.string(), f.uint32(), f.attrs()
	if f.bad {
		return false, nil
	}
	var flags int
	switch pflags & (openRead | openWrite) {
	case openRead:
		flags = unix.O_RDONLY
	case openWrite:
		flags = unix.O_WRONLY
	case openRead | openWrite:
		flags = unix.O_RDWR
	default:
		return false, unix.EINVAL
	}
	for _, x := range []struct {
		pflag uint32
		flag  int
	}{{openAppend, unix.O_APPEND}, {openCreate, unix.O_CREAT}, {openTruncate, unix.O_TRUNC}, {openExclusive, unix.O_EXCL}} {
		if pflags&x.pflag != 0 {
			flags |= x.flag
		}
	}
	if s.full() {
		return false, unix.EMFILE
	}
	o := &file{}
	err := s.at(name, func(dir int, last string) (err error) {
		o.fd, err = openat(dir, last, flags, a.mode(0o666))
		return err
	})
	return err == nil && s.opened(id, o), err
}

func (s *server) read(id uint32, f *fields) (bool, error) {
	_, o := s.handle(f)
	offset, n := f.uint64(), min(f.uint32(), maxData)
	if f.bad {
		return false, nil
	}
	if o == nil || o.dir != nil {
		return false, errHandle
	}
	if offset > math.MaxInt64 {
		return false, unix.EINVAL
	}
	if cap(s.o)-len(s.o) < 13+int(n) {
		if err := s.flush(); err != nil {
			return false, err
		}
	}
	at := s.begin(fxpData, id)
	s.uint32(0)
	for {
		got, err := unix.Pread(o.fd, s.o[at+13:at+13+int(n)], int64(offset))
		if errors.Is(err, unix.EINTR) {
			continue
		}
		if err == nil && got == 0 && n > 0 {
			err = io.EOF
		}
		if err != nil {
			s.o = s.o[:at]
			return false, err
		}
		binary.BigEndian.PutUint32(s.o[at+9:], uint32(got))
		s.o = s.o[:at+13+got]
		s.end(at)
		return true, nil
	}
}

func (s *server) write(f *fields) error {
	_, o := s.handle(f)
	offset, p := f.uint64(), f.bytes()
	if f.bad {
		return nil
	}
	if o == nil || o.dir != nil {
		return errHandle
	}
	if offset > math.MaxInt64 {
		return unix.EINVAL
	}
	return writeAt(o.fd, p, int64(offset))
}

func writeAt(fd int, p []byte, offset int64) error {
	for len(p) > 0 {
		n, err := unix.Pwrite(fd, p, offset)
		if errors.Is(err, unix.EINTR) {
			continue
		}
		if err != nil {
			return err
		}
		p, offset = p[n:], offset+int64(n)
	}
	return nil
}

func (s *server) opendir(id uint32, f *fields) (bool, error) {
	name := f.string()
	if f.bad {
		return false, nil
	}
	if s.full() {
		return false, unix.EMFILE
	}
	o := &file{}
	err := s.at(name, func(dir int, last string) (err error) {
		o.fd, err = openat(dir, last, unix.O_RDONLY|unix.O_DIRECTORY, 0)
		return err
	})
	if err != nil {
		return false, err
	}
	o.dir = os.NewFile(uintptr(o.fd), "directory")
	return s.opened(id, o), nil
}

func (s *server) readdir(id uint32, f *fields) (bool, error) {
	_, o := s.handle(f)
	if f.bad {
		return false, nil
	}
	if o == nil || o.dir == nil {
		return false, errHandle
	}
	for {
		names, err := o.dir.Readdirnames(maxNames)
		if len(names) == 0 {
			return false, err
		}
		at, count := s.begin(fxpName, id), uint32(0)
		s.uint32(0)
		for _, n := range names {
			var st unix.Stat_t
			if unix.Fstatat(o.fd, n, &st, unix.AT_SYMLINK_NOFOLLOW) != nil {
				continue // it is gone
			}
			s.string(n)
			s.string(s.long(n, &st))
			s.attrs(&st)
			count++
		}
		if count == 0 {
			s.o = s.o[:at]
			continue
		}
		binary.BigEndian.PutUint32(s.o[at+9:], count)
		s.end(at)
		return true, nil
	}
}

func (s *server) stat(id uint32, f *fields, follow bool) (bool, error) {
	name := f.string()
	if f.bad {
		return false, nil
	}
	flags := unix.AT_SYMLINK_NOFOLLOW
	if follow {
		flags = 0
	}
	var st unix.Stat_t
	if err := unix.Fstatat(unix.AT_FDCWD, s.abs(name), &st, flags); err != nil {
		return false, err
	}
	s.sendAttrs(id, &st)
	return true, nil
}

func (s *server) fstat(id uint32, f *fields) (bool, error) {
	_, o := s.handle(f)
	if f.bad {
		return false, nil
	}
	if o == nil {
		return false, errHandle
	}
	var st unix.Stat_t
	if err := unix.Fstat(o.fd, &st); err != nil {
		return false, err
	}
	s.sendAttrs(id, &st)
	return true, nil
}

func (s *server) sendAttrs(id uint32, st *unix.Stat_t) {
	at := s.begin(fxpAttrs, id)
	s.attrs(st)
	s.end(at)
}

// name is an answer of one name, whose attributes nobody asked for.
func (s *server) name(id uint32, name string) {
	at := s.begin(fxpName, id)
	s.uint32(1)
	s.string(name)
	s.string(name)
	s.uint32(0)
	s.end(at)
}

// realpath gives a path without links; its last name need not exist.
func (s *server) realpath(id uint32, name string) (bool, error) {
	if strings.ContainsRune(name, 0) {
		return false, unix.ENOENT
	}
	full := s.abs(name)
	resolved, err := filepath.EvalSymlinks(full)
	if errors.Is(err, unix.ENOENT) {
		base := path.Base(full)
		if dir, derr := filepath.EvalSymlinks(path.Dir(full)); derr == nil && base != ".." {
			resolved, err = path.Join(dir, base), nil
		}
	}
	if err != nil {
		return false, err
	}
	s.name(id, resolved)
	return true, nil
}

// status answers with how it went.
func (s *server) status(id uint32, err error) {
	code, text := statusOf(err)
	at := s.begin(fxpStatus, id)
	s.uint32(code)
	s.string(text)
	s.string("en")
	s.end(at)
}

// statusOf is an error as section 7 of the draft has it.
func statusOf(err error) (code uint32, text string) {
	const (
		ok, eof, noSuchFile, denied, failure, badMessage, unsupported = 0, 1, 2, 3, 4, 5, 8
	)
	switch {
	case err == nil:
		return ok, "Success"
	case errors.Is(err, io.EOF):
		return eof, "End of file"
	}
	var errno unix.Errno
	if !errors.As(err, &errno) {
		return failure, err.Error()
	}
	switch errno {
	case unix.ENOENT, unix.ENOTDIR, unix.EBADF, unix.ELOOP:
		code = noSuchFile
	case unix.EPERM, unix.EACCES, unix.EFAULT:
		code = denied
	case unix.ENAMETOOLONG, unix.EINVAL:
		code = badMessage
	case unix.ENOSYS, unix.EOPNOTSUPP:
		code = unsupported
	default:
		code = failure
	}
	return code, errno.Error()
}
