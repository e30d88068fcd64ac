package sshserver

import (
	"crypto"
	"crypto/ecdsa"
	"crypto/ed25519"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/rsa"
	"encoding/pem"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"strings"

	"golang.org/x/crypto/ssh"
)

// HostKeyNames are the files that LoadHostKeys looks for in a directory, named as OpenSSH names them.
var HostKeyNames = []string{"ssh_host_ed25519_key", "ssh_host_ecdsa_key", "ssh_host_rsa_key"}

// LoadHostKeys reads private host keys from files. With create, a file that doesn't exist is made, with the key type
// that its name holds (ed25519, ecdsa or rsa), mode 0600, and its public half beside it.
func LoadHostKeys(files []string, create bool) ([]ssh.Signer, error) {
	var keys []ssh.Signer
	seen := map[string]string{}
	for _, file := range files {
		b, err := readPrivate(file)
		if errors.Is(err, fs.ErrNotExist) && create {
			b, err = createHostKey(file)
		}
		if err != nil {
			return nil, fmt.Errorf("host key: %w", err)
		}
		key, err := ssh.ParsePrivateKey(b)
		if err != nil {
			return nil, fmt.Errorf("host key %s: %w", file, err)
		}
		if other, ok := seen[key.PublicKey().Type()]; ok {
			return nil, fmt.Errorf("host keys %s and %s are both %s: name one", other, file, key.PublicKey().Type())
		}
		seen[key.PublicKey().Type()] = file
		switch key.PublicKey().Type() {
		case ssh.KeyAlgoED25519, ssh.KeyAlgoECDSA256, ssh.KeyAlgoECDSA384, ssh.KeyAlgoECDSA521:
		case ssh.KeyAlgoRSA:
			as, ok := key.(ssh.AlgorithmSigner)
			if !ok {
				return nil, fmt.Errorf("host key %s: can't sign with SHA-2", file)
			}
			// Without this list x/crypto would offer ssh-rsa, whose signatures are SHA-1.
			if key, err = ssh.NewSignerWithAlgorithms(as, []string{ssh.KeyAlgoRSASHA512, ssh.KeyAlgoRSASHA256}); err != nil {
				return nil, fmt.Errorf("host key %s: %w", file, err)
			}
			if ck, ok := key.PublicKey().(ssh.CryptoPublicKey); ok {
				if r, ok := ck.CryptoPublicKey().(*rsa.PublicKey); ok && r.N.BitLen() < minRSA {
					return nil, fmt.Errorf("host key %s: %d bits are too few, at least %d", file, r.N.BitLen(), minRSA)
				}
			}
		default:
			return nil, fmt.Errorf("host key %s: type %s is not supported", file, key.PublicKey().Type())
		}
		keys = append(keys, key)
	}
	return keys, nil
}

// secretMode is what a kubelet gives a file of a Secret in the pod of a gate that is not root: root's, read by the pod's group
// (fsGroup), written by nobody.
const secretMode = 0o440

// readPrivate reads a key file that nobody else may read, as sshd does, or a Secret's.
func readPrivate(file string) ([]byte, error) {
	f, err := os.Open(file)
	if err != nil {
		return nil, err
	}
	defer f.Close()
	st, err := f.Stat()
	if err != nil {
		return nil, err
	}
	if p := st.Mode().Perm(); p&0o077 != 0 && p != secretMode {
		return nil, fmt.Errorf("%s: mode %04o lets others read it: chmod 600", file, p)
	}
	if st.Size() > 64<<10 {
		return nil, fmt.Errorf("%s: too large for a key", file)
	}
	b := make([]byte, st.Size())
	if _, err := f.ReadAt(b, 0); err != nil {
		return nil, err
	}
	return b, nil
}

func createHostKey(file string) ([]byte, error) {
	var key crypto.Signer
	var err error
	switch name := filepath.Base(file); {
	case strings.Contains(name, "ed25519"):
		_, key, err = ed25519.GenerateKey(rand.Reader)
	case strings.Contains(name, "ecdsa"):
		key, err = ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	case strings.Contains(name, "rsa"):
		key, err = rsa.GenerateKey(rand.Reader, 3072)
	default:
		return nil, fmt.Errorf("%s does not exist, and its name says no type: put ed25519, ecdsa or rsa in it, or make it with ssh-keygen", file)
	}
	if err != nil {
		return nil, err
	}
	block, err := ssh.MarshalPrivateKey(key, "sallyport")
	if err != nil {
		return nil, err
	}
	pub, err := ssh.NewPublicKey(key.Public())
	if err != nil {
		return nil, err
	}
	private := pem.EncodeToMemory(block)
	if err := createFile(file, private, 0o600); err != nil {
		return nil, err
	}
	if err := createFile(file+".pub", ssh.MarshalAuthorizedKey(pub), 0o644); err != nil && !errors.Is(err, fs.ErrExist) {
		return nil, err
	}
	return private, nil
}

// createFile writes a new file that is whole or not there.
func createFile(name string, data []byte, mode fs.FileMode) error {
	tmp, err := os.CreateTemp(filepath.Dir(name), ".key-*")
	if err != nil {
		return err
	}
	defer os.Remove(tmp.Name())
	defer tmp.Close()
	if _, err := tmp.Write(data); err != nil {
		return err
	}
	if err := tmp.Chmod(mode); err != nil {
		return err
	}
	if err := tmp.Sync(); err != nil {
		return err
	}
	return os.Link(tmp.Name(), name) // unlike a rename it does not replace
}

// CreateKey makes a private key file in OpenSSH's format, mode 0600, and its public half beside it; the type is taken
// from the name, as for host keys.
func CreateKey(file string) error {
	_, err := createHostKey(file)
	return err
}
