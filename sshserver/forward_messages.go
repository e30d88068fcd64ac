package sshserver

import (
	"encoding/hex"
	"errors"
	"fmt"
	"net"
	"net/netip"
	"path"
	"strconv"
	"strings"

	"golang.org/x/crypto/ssh"

	"github.com/sallyport/sallyport/authz"
	"github.com/sallyport/sallyport/backends"
)

// Types of channels and requests that forward. RFC 4254, sections 6.3 and 7; OpenSSH PROTOCOL, sections 2.4 and 2.1.
const (
	typeDirectTCP       = "direct-tcpip"
	typeDirectUnix      = "direct-streamlocal@openssh.com"
	typeForwardedTCP    = "forwarded-tcpip"
	typeForwardedUnix   = "forwarded-streamlocal@openssh.com"
	typeListenTCP       = "tcpip-forward"
	typeListenUnix      = "streamlocal-forward@openssh.com"
	typeCancelTCP       = "cancel-tcpip-forward"
	typeCancelUnix      = "cancel-streamlocal-forward@openssh.com"
	typeAgentRequest    = "auth-agent-req@openssh.com"
	typeAgentChannel    = "auth-agent@openssh.com"
	typeX11Request      = "x11-req"
	typeX11Channel      = "x11"
	localhost           = "localhost"
	maxHost             = 253 // a name's length (RFC 1035, section 2.3.4, as text)
	maxSocketPath       = 107 // of sun_path, unix(7), with its zero byte
	maxX11Protocol      = 64
	maxX11Cookie        = 256 // in hexadecimal digits
	maxX11Screen        = 255
	unknownOriginator   = "127.0.0.1" // as OpenSSH writes what it does not know
	unknownOriginatorAt = 65535
)

// directTCPMsg is a direct-tcpip channel's data, and a forwarded-tcpip one's (RFC 4254, section 7.2).
type directTCPMsg struct {
	Host           string
	Port           uint32
	Originator     string
	OriginatorPort uint32
}

// directUnixMsg is a direct-streamlocal@openssh.com channel's data (OpenSSH PROTOCOL, section 2.4).
type directUnixMsg struct {
	Path     string
	Reserved string
	Unused   uint32
}

// forwardedUnixMsg is a forwarded-streamlocal@openssh.com channel's data.
type forwardedUnixMsg struct{ Path, Reserved string }

// x11ChannelMsg is an x11 channel's data (RFC 4254, section 6.3.2).
type x11ChannelMsg struct {
	Originator     string
	OriginatorPort uint32
}

// listenTCPMsg is what a tcpip-forward asks for, and its cancel (RFC 4254, section 7.1); listenUnixMsg the same of
// streamlocal-forward@openssh.com.
type (
	listenTCPMsg struct {
		Host string
		Port uint32
	}
	listenUnixMsg struct{ Path string }
)

// x11RequestMsg is RFC 4254, section 6.3.1.
type x11RequestMsg struct {
	Single   bool
	Protocol string
	Cookie   string // in hexadecimal digits
	Screen   uint32
}

// parseDirectTCP reads a target as policy is asked about it: by name, or by address.
func parseDirectTCP(extra []byte) (q authz.RequestInput, originator string, err error) {
	var m directTCPMsg
	if err := ssh.Unmarshal(extra, &m); err != nil {
		return q, "", fmt.Errorf("%w: direct-tcpip: %w", errMalformed, err)
	}
	if m.Port == 0 || m.Port > 65535 {
		return q, "", fmt.Errorf("%w: direct-tcpip: port %d", errMalformed, m.Port)
	}
	q = authz.RequestInput{Type: typeDirectTCP, Port: uint16(m.Port)}
	if q.Host, q.Address, err = parseHost(m.Host); err != nil {
		return q, "", fmt.Errorf("%w: direct-tcpip: %w", errMalformed, err)
	}
	return q, originatorText(m.Originator, m.OriginatorPort), nil
}

// originatorText writes what the other end says about where a connection began.
func originatorText(host string, port uint32) string {
	if host == "" {
		return ""
	}
	return net.JoinHostPort(authz.Printable(host, 64), strconv.FormatUint(uint64(port), 10))
}

// parseHost reads a host: a name in lower case without a dot at its end, or an address, IPv4 as IPv4.
func parseHost(host string) (name, address string, err error) {
	bare := host
	if inner, ok := strings.CutPrefix(host, "["); ok {
		bare = strings.TrimSuffix(inner, "]")
	}
	if addr, err := netip.ParseAddr(bare); err == nil {
		if addr.Zone() != "" {
			return "", "", errors.New("an address with a zone")
		}
		return "", addr.Unmap().String(), nil
	}
	name = strings.ToLower(strings.TrimSuffix(host, "."))
	if name == "" || len(name) > maxHost {
		return "", "", errors.New("a host name that is empty or too long")
	}
	for _, r := range name {
		if (r < 'a' || r > 'z') && (r < '0' || r > '9') && r != '.' && r != '-' && r != '_' {
			return "", "", errors.New("a host name may hold letters, digits, '.', '-' and '_' alone")
		}
	}
	return name, "", nil
}

func parseDirectUnix(extra []byte) (authz.RequestInput, error) {
	var m directUnixMsg
	q := authz.RequestInput{Type: typeDirectUnix}
	if err := ssh.Unmarshal(extra, &m); err != nil {
		return q, fmt.Errorf("%w: direct-streamlocal: %w", errMalformed, err)
	}
	q.Path = m.Path
	return q, checkSocketPath(m.Path)
}

// checkSocketPath refuses what could be written in several ways: policy compares paths as text.
func checkSocketPath(p string) error {
	switch {
	case len(p) > maxSocketPath:
		return fmt.Errorf("%w: a socket's path of more than %d bytes", errMalformed, maxSocketPath)
	case !path.IsAbs(p) || path.Clean(p) != p || p == "/" || hasNUL(p):
		return fmt.Errorf("%w: a socket's path must be absolute, without . and .. in it", errMalformed)
	}
	return nil
}

// listenRequest is a listener that a client asks for, or asks to be closed.
type listenRequest struct {
	kind string // typeListenTCP, typeListenUnix
	host string // as the client wrote it
	port uint32 // 0: a free one
	path string
}

// target is the listener as the log has it.
func (l listenRequest) target() string {
	if l.kind == typeListenUnix {
		return authz.Printable(l.path, maxSocketPath)
	}
	host := l.host
	if host == "" {
		host = "*"
	}
	return net.JoinHostPort(authz.Printable(host, 64), strconv.FormatUint(uint64(l.port), 10))
}

// parseListenTCP reads a tcpip-forward or its cancel.
func parseListenTCP(payload []byte) (listenRequest, error) {
	var m listenTCPMsg
	if err := ssh.Unmarshal(payload, &m); err != nil {
		return listenRequest{}, fmt.Errorf("%w: tcpip-forward: %w", errMalformed, err)
	}
	l := listenRequest{kind: typeListenTCP, host: m.Host, port: m.Port}
	if m.Port > 65535 {
		return l, fmt.Errorf("%w: tcpip-forward: port %d", errMalformed, m.Port)
	}
	_, err := l.questions()
	return l, err
}

// questions are what policy is asked before the listener is made: one for each address that is to be listened on (RFC 4254,
// section 7.1). The first has to work out, the others may not exist inside.
func (l listenRequest) questions() ([]authz.RequestInput, error) {
	q := authz.RequestInput{Type: l.kind, Port: uint16(l.port)}
	if l.kind == typeListenUnix {
		q.Path = l.path
		return []authz.RequestInput{q}, nil
	}
	switch l.host {
	case "":
		return []authz.RequestInput{q}, nil
	case localhost:
		q.Host, q.Address = localhost, "127.0.0.1"
		q6 := q
		q6.Address = "::1"
		return []authz.RequestInput{q, q6}, nil
	}
	addr, err := netip.ParseAddr(l.host)
	if err != nil || addr.Zone() != "" {
		return nil, fmt.Errorf("%w: tcpip-forward: the address to listen on must be an IP address, localhost or empty", errMalformed)
	}
	q.Address = addr.Unmap().String()
	return []authz.RequestInput{q}, nil
}

// parseListenUnix reads a streamlocal-forward@openssh.com or its cancel.
func parseListenUnix(payload []byte) (listenRequest, error) {
	var m listenUnixMsg
	if err := ssh.Unmarshal(payload, &m); err != nil {
		return listenRequest{}, fmt.Errorf("%w: streamlocal-forward: %w", errMalformed, err)
	}
	return listenRequest{kind: typeListenUnix, path: m.Path}, checkSocketPath(m.Path)
}

// parseX11 reads an x11-req. Errors don't hold the cookie, which is a secret.
func parseX11(payload []byte) (x *backends.X11, single bool, err error) {
	var m x11RequestMsg
	if ssh.Unmarshal(payload, &m) != nil {
		return nil, false, fmt.Errorf("%w: x11-req", errMalformed)
	}
	if len(m.Protocol) == 0 || len(m.Protocol) > maxX11Protocol || len(m.Cookie) > maxX11Cookie || m.Screen > maxX11Screen {
		return nil, false, fmt.Errorf("%w: x11-req: protocol, cookie or screen out of bounds", errMalformed)
	}
	for _, r := range m.Protocol {
		if (r < 'a' || r > 'z') && (r < 'A' || r > 'Z') && (r < '0' || r > '9') && r != '-' {
			return nil, false, fmt.Errorf("%w: x11-req: bad name of a protocol", errMalformed)
		}
	}
	cookie, err := hex.DecodeString(m.Cookie)
	if err != nil || len(cookie) == 0 {
		return nil, false, fmt.Errorf("%w: x11-req: the cookie is not hexadecimal", errMalformed)
	}
	return &backends.X11{Screen: m.Screen, Protocol: m.Protocol, Cookie: cookie}, m.Single, nil
}
