package agent

import (
	"bufio"
	"errors"
	"io"
	"os"
	"path"
	"slices"
	"strconv"
	"strings"

	"golang.org/x/sys/unix"
)

const (
	defaultPath = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"

	// passwdLimit bounds what is read of the image's /etc/passwd.
	passwdLimit = 1 << 20
)

// OwnerEnv is the variable by which a container without labels of its own says whose it is, to who reads its specification. The session's
// processes don't get it.
const OwnerEnv = "SALLYPORT_OWNER"

// ownEnviron is the environment that the agent was started with, for the session's processes.
func ownEnviron() []string {
	return slices.DeleteFunc(os.Environ(), func(v string) bool { return strings.HasPrefix(v, OwnerEnv+"=") })
}

// account is what the image knows of the session's uid. All may be empty.
type account struct{ name, home, shell string }

// lookUp finds uid in passwd(5).
func lookUp(passwd io.Reader, uid int) account {
	lines := bufio.NewScanner(io.LimitReader(passwd, passwdLimit))
	for lines.Scan() {
		f := strings.Split(lines.Text(), ":")
		if len(f) == 7 && f[2] == strconv.Itoa(uid) {
			return account{name: f[0], home: f[5], shell: f[6]}
		}
	}
	return account{}
}

// findShell returns the account's shell, or the best there is, or "".
func findShell(wanted string) string {
	switch path.Base(wanted) {
	case "nologin", "false": // those of system accounts, whose uid a profile may well name
		wanted = ""
	}
	for _, s := range []string{wanted, "/bin/bash", "/bin/sh"} {
		if path.IsAbs(s) && unix.Access(s, unix.X_OK) == nil {
			if info, err := os.Stat(s); err == nil && info.Mode().IsRegular() {
				return s
			}
		}
	}
	return ""
}

// environ joins lists of NAME=value: a later one replaces an earlier one of the same name. What can't be a variable
// is left out.
func environ(lists ...[]string) []string {
	var all []string
	at := make(map[string]int)
	for _, list := range lists {
		for _, v := range list {
			name, _, ok := strings.Cut(v, "=")
			if !ok || name == "" || strings.ContainsRune(v, 0) {
				continue
			}
			if i, ok := at[name]; ok {
				all[i] = v
			} else {
				at[name] = len(all)
				all = append(all, v)
			}
		}
	}
	return all
}

func getenv(env []string, name string) string {
	for _, v := range env {
		if value, ok := strings.CutPrefix(v, name+"="); ok {
			return value
		}
	}
	return ""
}

// splitWords splits a command for an image without a shell: at blanks, with quotes and backslashes as in sh(1), and
// without any expansion.
func splitWords(s string) ([]string, error) {
	var (
		words  []string
		word   []byte
		inWord bool
		quote  byte
	)
	for i := 0; i < len(s); i++ {
		c := s[i]
		switch {
		case quote == '\'' && c != '\'':
			word = append(word, c)
		case c == '\\' && quote != '\'':
			if i++; i == len(s) {
				return nil, errors.New("the command ends in a backslash")
			}
			if quote == '"' && !strings.ContainsRune("\"\\$`", rune(s[i])) {
				word = append(word, c)
			}
			word, inWord = append(word, s[i]), true
		case quote != 0 && c == quote:
			quote = 0
		case quote != 0:
			word = append(word, c)
		case c == '\'' || c == '"':
			quote, inWord = c, true
		case c == ' ' || c == '\t' || c == '\n':
			if inWord {
				words, word, inWord = append(words, string(word)), nil, false
			}
		default:
			word, inWord = append(word, c), true
		}
	}
	if quote != 0 {
		return nil, errors.New("the command has an unclosed quote")
	}
	if inWord {
		words = append(words, string(word))
	}
	if len(words) == 0 {
		return nil, errors.New("the command is empty")
	}
	return words, nil
}
