package authz

import (
	"errors"
	"fmt"
	"net/netip"
	"path"
	"regexp"
	"strconv"
	"strings"
)

// checkPermit checks of a permit what a schema can't say.
func checkPermit(permit map[string]any) *placeError {
	if err := checkDurations(permit); err != nil {
		return err
	}
	for _, name := range []string{"forward", "listen"} {
		entries, _ := permit[name].([]any)
		for i, entry := range entries {
			text, _ := entry.(string)
			if err := checkTarget(text, name == "listen"); err != nil {
				text := fmt.Sprintf("%q: %v", Printable(text, 100), err)
				return &placeError{path: []string{name, strconv.Itoa(i)}, text: text}
			}
		}
	}
	return nil
}

// hostPattern is a name in which a * may stand for characters: labels of letters, digits, '-' and '_'.
var hostPattern = regexp.MustCompile(`^[A-Za-z0-9_*-]+(\.[A-Za-z0-9_*-]+)*$`)

// digits is what looks like an IPv4 address, whole or not.
var digits = regexp.MustCompile(`^[0-9.]+$`)

// checkTarget checks an entry of permit.forward, or of permit.listen. Errors say what to write.
func checkTarget(entry string, listen bool) error {
	if p, ok := strings.CutPrefix(entry, "unix:"); ok {
		switch {
		case !path.IsAbs(p) || path.Clean(p) != p || p == "/":
			return errors.New("want the absolute path of a socket, without . and .., as in unix:/run/app.sock")
		case strings.ContainsAny(p, `[]{}\`) || Printable(p, len(p)) != p:
			return errors.New("the path holds a character that can't be part of a pattern: * and ? stand for any")
		}
		return nil
	}
	i := strings.LastIndexByte(entry, ':')
	if i < 1 {
		return errors.New("want host:port, as in db.example:5432, or unix:/path")
	}
	if err := checkPorts(entry[i+1:], listen); err != nil {
		return err
	}
	host := entry[:i]
	if inner, ok := strings.CutPrefix(host, "["); ok {
		inner, ok = strings.CutSuffix(inner, "]")
		if !ok || !strings.Contains(inner, ":") {
			return errors.New("want an IPv6 address or network in brackets, as in [2001:db8::/32]:443")
		}
		return checkNetwork(inner)
	}
	switch {
	case strings.Contains(host, ":"):
		return fmt.Errorf("IPv6 stands in brackets: write [%s]:%s", host, entry[i+1:])
	case strings.Contains(host, "/"), digits.MatchString(host):
		return checkNetwork(host)
	case strings.HasSuffix(host, "."):
		return errors.New("the name ends in a dot: write it without")
	case host != "*" && (len(host) > 253 || !hostPattern.MatchString(host)):
		return errors.New("want a name, a pattern such as *.example, an IP address, a CIDR or * before the port")
	}
	return nil
}

func checkNetwork(s string) error {
	if addr, err := netip.ParseAddr(s); err == nil && addr.Zone() == "" {
		if addr.Is4In6() {
			return fmt.Errorf("IPv4 is written as IPv4: %s", addr.Unmap())
		}
		return nil
	}
	p, err := netip.ParsePrefix(s)
	switch {
	case err != nil:
		return errors.New("want an IP address or a CIDR, as in 10.0.0.0/8")
	case p.Addr().Is4In6():
		return errors.New("IPv4 is written as IPv4, as in 10.0.0.0/8")
	case p != p.Masked():
		return fmt.Errorf("%s has bits beyond its length: write %s", p, p.Masked())
	}
	return nil
}

// checkPorts checks a port: a number, a range, *; 0, which is a free one, where it is to be listened on.
func checkPorts(s string, listen bool) error {
	if s == "*" || listen && s == "0" {
		return nil
	}
	from, to, isRange := strings.Cut(s, "-")
	if !isRange {
		to = from
	}
	a, ok1 := portNumber(from)
	b, ok2 := portNumber(to)
	if !ok1 || !ok2 || a > b {
		return errors.New("want a port of 1 to 65535, a range such as 8000-8010, or * after the last colon")
	}
	return nil
}

// portNumber reads a port in the one way that policy compares: digits without zeros before them.
func portNumber(s string) (uint64, bool) {
	n, err := strconv.ParseUint(s, 10, 16)
	return n, err == nil && n > 0 && strconv.FormatUint(n, 10) == s
}
