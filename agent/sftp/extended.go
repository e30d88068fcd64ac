package sftp

import (
	"errors"
	"io"
	"math"
	"strings"

	"golang.org/x/sys/unix"
)

// extended is SSH_FXP_EXTENDED; see OpenSSH's PROTOCOL, section 4.
func (s *server) extended(id uint32, f *fields) (bool, error) {
	switch name := f.string(); name {
	case "posix-rename@openssh.com":
		return false, s.two(f, unix.Renameat)
	case "hardlink@openssh.com":
		return false, s.two(f, func(dir1 int, last1 string, dir2 int, last2 string) error {
			return unix.Linkat(dir1, last1, dir2, last2, 0)
		})
	case "lsetstat@openssh.com":
		name, a := f.string(), f.attrs()
		if f.bad {
			return false, nil
		}
		return false, s.at(name, func(dir int, last string) error { return setstat(dir, last, a, true) })
	case "statvfs@openssh.com":
		name := f.string()
		if f.bad {
			return false, nil
		}
		return s.statvfs(id, func(st *unix.Statfs_t) error { return unix.Statfs(s.abs(name), st) })
	case "fstatvfs@openssh.com":
		_, o := s.handle(f)
		if f.bad {
			return false, nil
		}
		if o == nil {
			return false, errHandle
		}
		return s.statvfs(id, func(st *unix.Statfs_t) error { return unix.Fstatfs(o.fd, st) })
	case "fsync@openssh.com":
		_, o := s.handle(f)
		if f.bad {
			return false, nil
		}
		if o == nil {
			return false, errHandle
		}
		return false, unix.Fsync(o.fd)
	case "limits@openssh.com":
		at := s.begin(fxpExtendedReply, id)
		for _, v := range []uint64{maxPacket, maxData, maxData, maxFiles} {
			s.uint64(v)
		}
		s.end(at)
		return true, nil
	case "expand-path@openssh.com":
		name := f.string()
		if f.bad {
			return false, nil
		}
		full, err := s.expand(name)
		if err != nil {
			return false, err
		}
		return s.realpath(id, full)
	case "home-directory":
		user := f.string()
		if f.bad {
			return false, nil
		}
		home, err := s.homeOf(user)
		if err != nil {
			return false, err
		}
		return s.realpath(id, home)
	case "copy-data":
		return false, s.copyData(f)
	case "users-groups-by-id@openssh.com":
		return s.byID(id, f)
	}
	return false, unix.ENOSYS
}

func (s *server) statvfs(id uint32, do func(*unix.Statfs_t) error) (bool, error) {
	var st unix.Statfs_t
	for {
		err := do(&st)
		if errors.Is(err, unix.EINTR) {
			continue
		}
		if err != nil {
			return false, err
		}
		break
	}
	const readOnly, noSUID = 1, 2 // SSH_FXE_STATVFS_ST_*
	var flags uint64
	if st.Flags&unix.ST_RDONLY != 0 {
		flags |= readOnly
	}
	if st.Flags&unix.ST_NOSUID != 0 {
		flags |= noSUID
	}
	fsid := uint64(uint32(st.Fsid.Val[0])) | uint64(uint32(st.Fsid.Val[1]))<<32
	at := s.begin(fxpExtendedReply, id)
	for _, v := range []uint64{uint64(st.Bsize), uint64(st.Frsize), st.Blocks, st.Bfree, st.Bavail, st.Files, st.Ffree, st.Ffree,
		fsid, flags, uint64(st.Namelen)} {
		s.uint64(v)
	}
	s.end(at)
	return true, nil
}

// expand gives a path in which ~ and ~user stand for their homes.
func (s *server) expand(name string) (string, error) {
	rest, ok := strings.CutPrefix(name, "~")
	if !ok {
		return name, nil
	}
	user, below, _ := strings.Cut(rest, "/")
	home, err := s.homeOf(user)
	return home + "/" + below, err
}

// homeOf is a user's home; "" is the session's.
func (s *server) homeOf(user string) (string, error) {
	if user == "" {
		return s.Home, nil
	}
	for _, f := range accounts("/etc/passwd") {
		if f[0] == user && len(f) >= 6 && strings.HasPrefix(f[5], "/") {
			return f[5], nil
		}
	}
	return "", unix.ENOENT
}

// copyData copies from one open file to another (draft-ietf-secsh-filexfer-extensions-00, section 7).
func (s *server) copyData(f *fields) error {
	_, from := s.handle(f)
	at, n := f.uint64(), f.uint64()
	_, into := s.handle(f)
	to := f.uint64()
	switch {
	case f.bad:
		return nil
	case from == nil || into == nil || from.dir != nil || into.dir != nil:
		return errHandle
	case from == into:
		return errSame // it might never come to the end
	case at > math.MaxInt64 || to > math.MaxInt64:
		return unix.EINVAL
	}
	var st [2]unix.Stat_t
	if err := errors.Join(unix.Fstat(from.fd, &st[0]), unix.Fstat(into.fd, &st[1])); err != nil {
		return err
	}
	if st[0].Dev == st[1].Dev && st[0].Ino == st[1].Ino {
		return errSame
	}
	toEnd := n == 0
	b := make([]byte, 256<<10)
	for toEnd || n > 0 {
		part := b
		if !toEnd {
			part = b[:min(uint64(len(b)), n)]
		}
		got, err := unix.Pread(from.fd, part, int64(at))
		switch {
		case errors.Is(err, unix.EINTR):
			continue
		case err != nil:
			return err
		case got == 0 && toEnd:
			return nil
		case got == 0:
			return io.EOF
		}
		if err := writeAt(into.fd, b[:got], int64(to)); err != nil {
			return err
		}
		at, to, n = at+uint64(got), to+uint64(got), n-min(n, uint64(got))
		if at > math.MaxInt64 || to > math.MaxInt64 {
			return unix.EFBIG
		}
	}
	return nil
}

// byID answers with the names of users and groups.
func (s *server) byID(id uint32, f *fields) (bool, error) {
	lists := [2]fields{{b: f.bytes()}, {b: f.bytes()}}
	if f.bad || len(lists[0].b)%4 != 0 || len(lists[1].b)%4 != 0 {
		f.bad = true
		return false, nil
	}
	const most = 16 << 10 // numbers; a name is mostly shorter than four times its number
	if len(lists[0].b)+len(lists[1].b) > 4*most {
		return false, unix.EINVAL
	}
	var names [2][]string
	size := 0
	for kind := range lists {
		for l := &lists[kind]; len(l.b) > 0; {
			name := s.names(kind)[l.uint32()]
			size += 4 + len(name)
			names[kind] = append(names[kind], name)
		}
	}
	if size > maxData {
		return false, unix.EINVAL
	}
	at := s.begin(fxpExtendedReply, id)
	for _, list := range names {
		length := 0
		for _, n := range list {
			length += 4 + len(n)
		}
		s.uint32(uint32(length))
		for _, n := range list {
			s.string(n)
		}
	}
	s.end(at)
	return true, nil
}
