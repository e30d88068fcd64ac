package authz

import (
	"crypto/sha256"
	"encoding/base64"
	"encoding/binary"
	"errors"
	"fmt"
	"slices"
	"strings"
)

// keyTypes are the public key types a user can have (those OpenSSH makes, without certificates and DSA).
var keyTypes = []string{
	"ssh-ed25519", "ecdsa-sha2-nistp256", "ecdsa-sha2-nistp384", "ecdsa-sha2-nistp521", "ssh-rsa",
	"sk-ssh-ed25519@openssh.com", "sk-ecdsa-sha2-nistp256@openssh.com",
}

// maxKeyLine bounds an authorized_keys line: a 16384 bit RSA key has about 2,800 characters.
const maxKeyLine = 8 << 10

// ParseKey reads one line of an authorized_keys file: a type, the key in base64, and a comment, which is dropped.
// Options are an error, for this gate would not keep them.
func ParseKey(line string) (Key, error) {
	if len(line) > maxKeyLine {
		return Key{}, fmt.Errorf("the line is longer than %d bytes", maxKeyLine)
	}
	if strings.ContainsAny(strings.TrimSpace(line), "\r\n\x00") {
		return Key{}, errors.New("a key is one line")
	}
	fields := strings.FieldsFunc(line, func(r rune) bool { return r == ' ' || r == '\t' })
	if len(fields) == 0 {
		return Key{}, errors.New("the line is empty")
	}
	if !slices.Contains(keyTypes, fields[0]) {
		if slices.ContainsFunc(fields[1:], func(f string) bool { return slices.Contains(keyTypes, f) }) {
			return Key{}, errors.New("options before the key are not supported: remove them")
		}
		return Key{}, fmt.Errorf("%q is no supported key type; it is one of %s", Printable(fields[0], 40),
			strings.Join(keyTypes, ", "))
	}
	if len(fields) < 2 {
		return Key{}, errors.New("the key is missing after its type")
	}
	blob, err := base64.StdEncoding.Strict().DecodeString(fields[1])
	if err != nil {
		return Key{}, errors.New("the key is not base64; copy the whole line of the .pub file")
	}
	// The blob begins with its own type as a string (RFC 4253, section 6.6).
	if len(blob) < 4 {
		return Key{}, errors.New("the key is cut off")
	}
	size := binary.BigEndian.Uint32(blob)
	if uint64(size) > uint64(len(blob)-4) {
		return Key{}, errors.New("the key is cut off")
	}
	if inner := string(blob[4 : 4+size]); inner != fields[0] {
		return Key{}, fmt.Errorf("the key is of type %q, the line says %q", Printable(inner, 40), fields[0])
	}
	if err := wholeStrings(blob[4+size:], blobStrings[fields[0]]); err != nil {
		return Key{}, err
	}
	sum := sha256.Sum256(blob)
	return Key{
		Type:        fields[0],
		Fingerprint: "SHA256:" + base64.RawStdEncoding.EncodeToString(sum[:]),
		Line:        fields[0] + " " + fields[1],
	}, nil
}

// blobStrings is how many strings and mpints follow the type in a key's blob (RFC 8709 section 4, RFC 5656 section 3.1,
// RFC 4253 section 6.6, OpenSSH PROTOCOL.u2f).
var blobStrings = map[string]int{
	"ssh-ed25519": 1, "ecdsa-sha2-nistp256": 2, "ecdsa-sha2-nistp384": 2, "ecdsa-sha2-nistp521": 2, "ssh-rsa": 2,
	"sk-ssh-ed25519@openssh.com": 2, "sk-ecdsa-sha2-nistp256@openssh.com": 3,
}

// wholeStrings checks that b is exactly n length-prefixed strings, none empty.
func wholeStrings(b []byte, n int) error {
	for range n {
		if len(b) < 4 {
			return errors.New("the key is cut off")
		}
		size := binary.BigEndian.Uint32(b)
		if size == 0 || uint64(size) > uint64(len(b)-4) {
			return errors.New("the key is cut off")
		}
		b = b[4+size:]
	}
	if len(b) != 0 {
		return errors.New("there is more after the key's end")
	}
	return nil
}
