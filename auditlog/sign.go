package auditlog

import (
	"bytes"
	"crypto/ed25519"
	"crypto/rand"
	"crypto/sha256"
	"crypto/x509"
	"encoding/base64"
	"encoding/pem"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"runtime"
	"strings"
)

const maxKeyFile = 1 << 20

// LoadKey reads the key that signs a gate's log: PKCS#8 in PEM ("PRIVATE KEY"), as CreateKey writes it and as
// `openssl genpkey -algorithm ed25519` does. A file that others than its owner may read or write is refused,
// but for mode 0440, a Secret's.
func LoadKey(path string) (ed25519.PrivateKey, error) {
	f, err := os.Open(path)
	if err != nil {
		return nil, fmt.Errorf("load log key: %w", err)
	}
	defer f.Close()
	info, err := f.Stat()
	if err != nil {
		return nil, fmt.Errorf("load log key: %w", err)
	}
	if !info.Mode().IsRegular() {
		return nil, fmt.Errorf("load log key %s: not a file", path)
	}
	// 0440 is what a kubelet gives a file of a Secret: root's, for the pod's group to read.
	if p := info.Mode().Perm(); runtime.GOOS != "windows" && p&0o077 != 0 && p != 0o440 {
		return nil, fmt.Errorf("load log key %s: mode %#o lets others at it, want 0600", path, p)
	}
	b, err := io.ReadAll(io.LimitReader(f, maxKeyFile))
	if err != nil {
		return nil, fmt.Errorf("load log key: %w", err)
	}
	block, _ := pem.Decode(b)
	if block == nil || block.Type != "PRIVATE KEY" {
		return nil, fmt.Errorf("load log key %s: no PEM block \"PRIVATE KEY\"", path)
	}
	k, err := x509.ParsePKCS8PrivateKey(block.Bytes)
	if err != nil {
		return nil, fmt.Errorf("load log key %s: %w", path, err)
	}
	key, ok := k.(ed25519.PrivateKey)
	if !ok {
		return nil, fmt.Errorf("load log key %s: a %T, want ed25519", path, k)
	}
	return key, nil
}

// CreateKey makes a key, writes it to path (0600) and its public half to path + ".pub", for auditors to pin. It never
// overwrites: a file that is there is an error (fs.ErrExist).
func CreateKey(path string) (ed25519.PrivateKey, error) {
	pub, key, err := ed25519.GenerateKey(rand.Reader)
	if err != nil {
		return nil, fmt.Errorf("create log key: %w", err)
	}
	der, err := x509.MarshalPKCS8PrivateKey(key)
	if err != nil {
		return nil, fmt.Errorf("create log key: %w", err)
	}
	if err := createFile(path, pem.EncodeToMemory(&pem.Block{Type: "PRIVATE KEY", Bytes: der}), 0o600); err != nil {
		return nil, fmt.Errorf("create log key: %w", err)
	}
	// The public half can be made again from the key, so one that lies there from before may go.
	if err := os.Remove(path + ".pub"); err != nil && !errors.Is(err, os.ErrNotExist) {
		return nil, fmt.Errorf("create log key: %w", err)
	}
	if err := createFile(path+".pub", []byte(FormatPublicKey(pub)+"\n"), 0o644); err != nil {
		return nil, fmt.Errorf("create log key: %w", err)
	}
	if err := syncDir(filepath.Dir(path)); err != nil {
		return nil, fmt.Errorf("create log key: %w", err)
	}
	return key, nil
}

// createFile makes a file whole or not at all, also if the power is cut; its directory is the caller's to sync.
func createFile(path string, b []byte, mode os.FileMode) error {
	f, err := os.CreateTemp(filepath.Dir(path), filepath.Base(path)+".tmp-")
	if err != nil {
		return err
	}
	defer os.Remove(f.Name())
	_, err = f.Write(b)
	if err = errors.Join(err, f.Chmod(mode), f.Sync(), f.Close()); err != nil {
		return err
	}
	return os.Link(f.Name(), path) // unlike a rename it does not replace
}

// FormatPublicKey is a public key as one line of a key file: "ed25519 BASE64".
func FormatPublicKey(pub ed25519.PublicKey) string {
	return "ed25519 " + base64.StdEncoding.EncodeToString(pub)
}

// ParsePublicKeys reads a file of public keys: one a line, "ed25519 BASE64", optionally followed by a comment; empty lines
// and lines that start with # are skipped. A file without a key is an error: it would pin nothing.
func ParsePublicKeys(b []byte) ([]ed25519.PublicKey, error) {
	var keys []ed25519.PublicKey
	number := 0
	for line := range bytes.Lines(b) {
		number++
		fields := strings.Fields(string(line))
		if len(fields) == 0 || strings.HasPrefix(fields[0], "#") {
			continue
		}
		if len(fields) < 2 || fields[0] != "ed25519" {
			return nil, fmt.Errorf("parse public keys: line %d: want \"ed25519 BASE64\"", number)
		}
		raw, err := base64.StdEncoding.DecodeString(fields[1])
		if err != nil || len(raw) != ed25519.PublicKeySize {
			return nil, fmt.Errorf("parse public keys: line %d: not an ed25519 key in base64", number)
		}
		keys = append(keys, raw)
	}
	if len(keys) == 0 {
		return nil, errors.New("parse public keys: no key")
	}
	return keys, nil
}

// LoadPublicKeys reads a file of public keys; see ParsePublicKeys.
func LoadPublicKeys(path string) ([]ed25519.PublicKey, error) {
	f, err := os.Open(path)
	if err != nil {
		return nil, fmt.Errorf("load public keys: %w", err)
	}
	defer f.Close()
	b, err := io.ReadAll(io.LimitReader(f, maxKeyFile))
	if err != nil {
		return nil, fmt.Errorf("load public keys: %w", err)
	}
	return ParsePublicKeys(b)
}

// Fingerprint is a public key's short name: "SHA256:" and the base64, without padding, of the SHA-256 of its 32 bytes.
func Fingerprint(pub ed25519.PublicKey) string {
	sum := sha256.Sum256(pub)
	return "SHA256:" + base64.RawStdEncoding.EncodeToString(sum[:])
}
