package sshserver

import (
	"errors"
	"fmt"

	"golang.org/x/crypto/ssh"

	"github.com/sallyport/sallyport/backends"
)

// ptyRequestMsg is RFC 4254, section 6.2.
type ptyRequestMsg struct {
	Term    string
	Columns uint32
	Rows    uint32
	Width   uint32
	Height  uint32
	Modes   string
}

// windowChangeMsg is RFC 4254, section 6.7.
type windowChangeMsg struct{ Columns, Rows, Width, Height uint32 }

// envMsg is RFC 4254, section 6.4.
type envMsg struct{ Name, Value string }

// execMsg and subsystemMsg are RFC 4254, section 6.5, signalMsg section 6.9.
type (
	execMsg      struct{ Command string }
	subsystemMsg struct{ Name string }
	signalMsg    struct{ Name string }
)

// exitStatusMsg and exitSignalMsg are RFC 4254, section 6.10.
type exitStatusMsg struct{ Status uint32 }

type exitSignalMsg struct {
	Signal     string
	CoreDumped bool
	Message    string
	Language   string
}

// What a pty request may hold, well above what any client sends.
const (
	maxTerm    = 64
	maxModes   = 2048
	maxEnvName = 256
	maxEnvVal  = 32 << 10
	maxCommand = 128 << 10 // MAX_ARG_STRLEN, the longest single argument Linux takes
	maxSide    = 4096      // columns and rows; larger ones are cut
)

var errMalformed = errors.New("malformed request")

func parsePty(payload []byte) (*backends.Terminal, error) {
	var m ptyRequestMsg
	if err := ssh.Unmarshal(payload, &m); err != nil {
		return nil, fmt.Errorf("%w: pty-req: %w", errMalformed, err)
	}
	if len(m.Term) > maxTerm || len(m.Modes) > maxModes {
		return nil, fmt.Errorf("%w: pty-req: terminal name or modes too long", errMalformed)
	}
	for _, r := range m.Term {
		if r <= ' ' || r > '~' {
			return nil, fmt.Errorf("%w: pty-req: terminal name has a character that is not printable ASCII", errMalformed)
		}
	}
	return &backends.Terminal{
		Term:  m.Term,
		Size:  backends.WindowSize(cutSize(windowChangeMsg{m.Columns, m.Rows, m.Width, m.Height})),
		Modes: []byte(m.Modes),
	}, nil
}

// cutSize bounds a size that comes from the client: a struct winsize has 16 bits a field.
func cutSize(m windowChangeMsg) windowChangeMsg {
	return windowChangeMsg{min(m.Columns, maxSide), min(m.Rows, maxSide), min(m.Width, 0xffff), min(m.Height, 0xffff)}
}

func parseWindowChange(payload []byte) (backends.WindowSize, error) {
	var m windowChangeMsg
	if err := ssh.Unmarshal(payload, &m); err != nil {
		return backends.WindowSize{}, fmt.Errorf("%w: window-change: %w", errMalformed, err)
	}
	return backends.WindowSize(cutSize(m)), nil
}

func parseEnv(payload []byte) (envMsg, error) {
	var m envMsg
	if err := ssh.Unmarshal(payload, &m); err != nil {
		return m, fmt.Errorf("%w: env: %w", errMalformed, err)
	}
	if len(m.Name) == 0 || len(m.Name) > maxEnvName || len(m.Value) > maxEnvVal {
		return m, fmt.Errorf("%w: env: name or value too long", errMalformed)
	}
	for _, r := range m.Name {
		if r <= ' ' || r > '~' || r == '=' {
			return m, fmt.Errorf("%w: env: bad name", errMalformed)
		}
	}
	if hasNUL(m.Value) {
		return m, fmt.Errorf("%w: env: NUL in the value", errMalformed)
	}
	return m, nil
}

func parseExec(payload []byte) (string, error) {
	var m execMsg
	if err := ssh.Unmarshal(payload, &m); err != nil {
		return "", fmt.Errorf("%w: exec: %w", errMalformed, err)
	}
	if len(m.Command) >= maxCommand {
		return m.Command, &UserError{Text: fmt.Sprintf("the command has %d bytes; Linux takes at most %d", len(m.Command), maxCommand-1)}
	}
	if hasNUL(m.Command) {
		return m.Command, fmt.Errorf("%w: exec: NUL in the command", errMalformed)
	}
	return m.Command, nil
}

func hasNUL(s string) bool {
	for i := range len(s) {
		if s[i] == 0 {
			return true
		}
	}
	return false
}

// signals are the names of RFC 4254, section 6.10, and the local names OpenSSH sends besides.
var signals = map[string]bool{
	"ABRT": true, "ALRM": true, "FPE": true, "HUP": true, "ILL": true, "INT": true, "KILL": true, "PIPE": true,
	"QUIT": true, "SEGV": true, "TERM": true, "USR1": true, "USR2": true, "INFO@openssh.com": true,
}

func parseSignal(payload []byte) (string, error) {
	var m signalMsg
	if err := ssh.Unmarshal(payload, &m); err != nil {
		return "", fmt.Errorf("%w: signal: %w", errMalformed, err)
	}
	if !signals[m.Name] {
		return "", fmt.Errorf("%w: signal: unknown name", errMalformed)
	}
	return m.Name, nil
}
