package transfer

import (
	"path"
	"strings"
)

// SCPCommand is a command line by which a client starts the server's side of scp.
type SCPCommand struct {
	Sink      bool // -t: an upload; otherwise -f, a download
	Recursive bool // -r
	Preserve  bool // -p
	Directory bool // -d: the target must be a directory
	// Paths are the arguments, without the shell's quotes. A source's may be patterns that the shell inside expands.
	Paths []string
}

func (c SCPCommand) asked() string { return strings.Join(c.Paths, " ") }

// ParseSCPCommand recognises such a command line. It says no to whatever a shell could take as more than one plain
// program with plain arguments: that is recorded as what it is, a program with its bytes.
func ParseSCPCommand(command string) (SCPCommand, bool) {
	words, ok := shellWords(command)
	if !ok || len(words) < 3 || path.Base(words[0]) != "scp" || words[0] != "scp" && !strings.HasPrefix(words[0], "/") {
		return SCPCommand{}, false
	}
	var c SCPCommand
	var source bool
	i := 1
	for ; i < len(words) && len(words[i]) > 1 && words[i][0] == '-'; i++ {
		if words[i] == "--" {
			i++
			break
		}
		for _, o := range words[i][1:] {
			switch o {
			case 't':
				c.Sink = true
			case 'f':
				source = true
			case 'r':
				c.Recursive = true
			case 'p':
				c.Preserve = true
			case 'd':
				c.Directory = true
			case 'v', 'q':
			default:
				return SCPCommand{}, false
			}
		}
	}
	c.Paths = words[i:]
	if c.Sink == source || len(c.Paths) == 0 || c.Sink && len(c.Paths) > 1 {
		return SCPCommand{}, false
	}
	return c, true
}

// shellWords splits a command into words as sh does (POSIX.1-2017, Shell Command Language, 2.2), if there is nothing
// else to do with it than to expand patterns of path names and a tilde.
func shellWords(s string) (words []string, ok bool) {
	var w strings.Builder
	in := false // a word
	for i := 0; i < len(s); i++ {
		switch c := s[i]; c {
		case ' ', '\t':
			if in {
				words = append(words, w.String())
				w.Reset()
				in = false
			}
			continue
		case '\'':
			n := strings.IndexByte(s[i+1:], '\'')
			if n < 0 {
				return nil, false
			}
			w.WriteString(s[i+1 : i+1+n])
			i += n + 1
		case '"':
			for i++; ; i++ {
				if i >= len(s) || s[i] == '$' || s[i] == '`' {
					return nil, false
				}
				if s[i] == '"' {
					break
				}
				if s[i] == '\\' && i+1 < len(s) && strings.IndexByte("\"\\$`", s[i+1]) >= 0 {
					i++
				}
				w.WriteByte(s[i])
			}
		case '\\':
			if i++; i >= len(s) || s[i] == '\n' {
				return nil, false
			}
			w.WriteByte(s[i])
		case '|', '&', ';', '<', '>', '(', ')', '$', '`', '\n', '\r', 0, '!':
			return nil, false
		case '#':
			if !in {
				return nil, false
			}
			w.WriteByte(c)
		default:
			w.WriteByte(c)
		}
		in = true
	}
	if in {
		words = append(words, w.String())
	}
	return words, len(words) > 0
}
