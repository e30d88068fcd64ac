package transfer

import (
	"slices"
	"strings"
)

const (
	maxLinks = 40 // Linux's MAXSYMLINKS
	maxAsked = 64 // questions at once
	maxNames = 256
)

// answer takes the answer to one of the gate's questions.
func (a *ask) answer(typ byte, i int, r *reader, payload int) error {
	switch typ {
	case fxpStatus:
	case fxpName:
		if r.uint32() != 1 {
			return errAnswer
		}
		name := r.path()
		a.replies[i] = reply{ok: true, name: name, bad: r.bad || name == "" || strings.ContainsRune(name, 0)}
	default:
		return errAnswer
	}
	a.left--
	return nil
}

// ask asks the server about paths, and waits for the answers.
func (s *SFTP) ask(typ byte, paths []string) ([]reply, error) {
	if err := s.client.flush(); err != nil { // what came before has its effect before
		return nil, err
	}
	a := &ask{replies: make([]reply, len(paths)), left: len(paths)}
	var b []byte
	s.mu.Lock()
	id := uint32(1<<32 - 1)
	for i, p := range paths {
		for {
			if _, ok := s.requests[id]; !ok {
				break
			}
			id--
		}
		s.requests[id] = request{typ: typ, ask: a, n: uint32(i)}
		b = append(b, newPacket(typ).uint32(id).string(p).bytes()...)
	}
	s.mu.Unlock()
	if err := s.toServer(b); err != nil {
		return nil, err
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	err := s.wait(func() bool { return a.left == 0 }, s.c.Timeout)
	return a.replies, err
}

// resolveEvent resolves the paths of an event. why is the reason if one can't be.
func (s *SFTP) resolveEvent(e *Event, follow, two bool) (why string, err error) {
	e.Path.Resolved, why, err = s.resolve(e.Path.Asked, follow)
	if two && why == "" && err == nil {
		e.Target.Resolved, why, err = s.resolve(e.Target.Asked, false)
	}
	return why, err
}

// resolve follows the symbolic links of a path as the kernel would (path_resolution(7)), of its last name only if follow.
// A name that does not exist stays as it is. SSH_FXP_REALPATH is not asked: OpenSSH's follows links, others take it as a
// question about the text, and would make link/../x an x.
func (s *SFTP) resolve(asked string, follow bool) (resolved, why string, err error) {
	if strings.ContainsRune(asked, 0) {
		return "", "a path with a NUL", nil
	}
	if !strings.HasPrefix(asked, "/") {
		if s.home == "" {
			replies, err := s.ask(fxpRealpath, []string{"."})
			if err != nil {
				return "", "", err
			}
			if !replies[0].ok || replies[0].bad || replies[0].name[0] != '/' {
				return "", "the server does not say where relative paths begin", nil
			}
			s.home = replies[0].name
		}
		asked = s.home + "/" + asked
	}
	var done []string // without links
	todo := names(asked)
	for links := 0; len(todo) > 0; {
		if todo[0] == ".." { // of a directory without links, so that the text says where it is
			if len(done) > 0 {
				done = done[:len(done)-1]
			}
			todo = todo[1:]
			continue
		}
		if len(done)+len(todo) > maxNames {
			return "", "a path of too many names", nil
		}
		// All names up to a "..", at once.
		n := 0
		var paths []string
		for n < len(todo) && n < maxAsked && todo[n] != ".." {
			n++
			if n == len(todo) && !follow {
				break
			}
			p := "/" + strings.Join(slices.Concat(done, todo[:n]), "/")
			if len(p) > maxPath {
				return "", "a path that is too long", nil
			}
			paths = append(paths, p)
		}
		var replies []reply
		if len(paths) > 0 {
			if replies, err = s.ask(fxpReadlink, paths); err != nil {
				return "", "", err
			}
		}
		i := slices.IndexFunc(replies, func(r reply) bool { return r.ok })
		if i < 0 {
			done, todo = append(done, todo[:n]...), todo[n:]
			continue
		}
		if replies[i].bad {
			return "", "a symbolic link that can't be read", nil
		}
		if links++; links > maxLinks {
			return "", "too many symbolic links", nil
		}
		done = append(done, todo[:i]...)
		if replies[i].name[0] == '/' {
			done = nil
		}
		todo = slices.Concat(names(replies[i].name), todo[i+1:])
	}
	resolved = "/" + strings.Join(done, "/")
	if len(resolved) > maxPath {
		return "", "a path that is too long", nil
	}
	return resolved, "", nil
}

// names are the names of a path.
func names(p string) []string {
	return slices.DeleteFunc(strings.Split(p, "/"), func(n string) bool { return n == "" || n == "." })
}
