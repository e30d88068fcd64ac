package agekeys

import (
	"bufio"
	"bytes"
	"errors"
	"fmt"
	"io"
	"strings"
	"sync"

	"filippo.io/age"
	"filippo.io/age/agessh"
	"filippo.io/age/armor"
	"golang.org/x/crypto/ssh"
)

// maxWork is the most that a passphrase's derivation may take (scrypt, 2 to this power): seconds, not hours.
const maxWork = 22

// maxTries is how often the passphrase of an SSH key is asked for.
const maxTries = 3

// Ask asks the user for the passphrase of what; see LoadIdentities.
type Ask func(what string) ([]byte, error)

// LoadIdentities reads a file of identities, as `age -i` takes it: AGE-SECRET-KEY-... lines, the same encrypted with a
// passphrase (`age -p`, armored or not), or a private SSH key of the type ed25519. ask is called for a passphrase: at once for a file of
// identities, and when it is first needed for an SSH key. Without ask, what has a passphrase is an error.
func LoadIdentities(path string, ask Ask) ([]age.Identity, error) {
	b, err := readFile(path)
	if err != nil {
		return nil, err
	}
	ids, err := ParseIdentities(b, path, ask)
	if err != nil {
		return nil, fmt.Errorf("%s: %w", path, err)
	}
	return ids, nil
}

const (
	ageMagic = "age-encryption.org/"
	sshBegin = "-----BEGIN"
)

// ParseIdentities reads the content of such a file; name is what ask calls it.
func ParseIdentities(b []byte, name string, ask Ask) ([]age.Identity, error) {
	switch {
	case bytes.HasPrefix(b, []byte(ageMagic)):
		return decryptIdentities(bytes.NewReader(b), name, ask)
	case bytes.HasPrefix(bytes.TrimSpace(b), []byte(armor.Header)):
		return decryptIdentities(armor.NewReader(bytes.NewReader(bytes.TrimSpace(b))), name, ask)
	case bytes.HasPrefix(b, []byte(sshBegin)):
		return sshIdentity(b, name, ask)
	}
	return nativeIdentities(b)
}

func nativeIdentities(b []byte) ([]age.Identity, error) {
	var ids []age.Identity
	scan := bufio.NewScanner(bytes.NewReader(b))
	for number := 1; scan.Scan(); number++ {
		line := strings.TrimSpace(scan.Text())
		var id age.Identity
		var err error
		switch {
		case line == "" || strings.HasPrefix(line, "#"):
			continue
		case strings.HasPrefix(line, "AGE-SECRET-KEY-PQ-1"):
			id, err = age.ParseHybridIdentity(line)
		case strings.HasPrefix(line, "AGE-SECRET-KEY-1"):
			id, err = age.ParseX25519Identity(line)
		case strings.HasPrefix(line, "AGE-PLUGIN-"):
			return nil, fmt.Errorf("line %d: an identity of a plugin: plugins are not supported", number)
		case strings.HasPrefix(line, "age1"), strings.HasPrefix(line, "ssh-"):
			return nil, fmt.Errorf("line %d: a recipient, which can't decrypt: want the identity that belongs to it", number)
		default:
			return nil, fmt.Errorf("line %d: not an identity: want AGE-SECRET-KEY-..., or an SSH key's file", number)
		}
		if err != nil { // not passed on: it may quote the secret
			return nil, fmt.Errorf("line %d: malformed identity", number)
		}
		ids = append(ids, id)
	}
	if err := scan.Err(); err != nil {
		return nil, fmt.Errorf("not a file of identities: %w", err)
	}
	if len(ids) == 0 {
		return nil, errors.New("no identity in it")
	}
	return ids, nil
}

// decryptIdentities reads a file of identities that is encrypted with a passphrase.
func decryptIdentities(r io.Reader, name string, ask Ask) ([]age.Identity, error) {
	if ask == nil {
		return nil, errors.New("encrypted with a passphrase, and there is nobody to ask for it")
	}
	pass, err := ask(name)
	if err != nil {
		return nil, err
	}
	defer clear(pass)
	id, err := age.NewScryptIdentity(string(pass))
	if err != nil {
		return nil, errors.New("no passphrase was given")
	}
	id.SetMaxWorkFactor(maxWork)
	plain, err := age.Decrypt(r, id)
	var none *age.NoIdentityMatchError
	if errors.As(err, &none) {
		if len(none.StanzaTypes) != 1 || none.StanzaTypes[0] != "scrypt" {
			return nil, errors.New("an age file that is encrypted to a recipient and not with a passphrase: decrypt it first")
		}
		return nil, errors.New("wrong passphrase")
	}
	if err != nil {
		return nil, fmt.Errorf("decrypt: %w", err)
	}
	b, err := io.ReadAll(io.LimitReader(plain, maxFile))
	if err != nil {
		return nil, fmt.Errorf("decrypt: %w", err)
	}
	defer clear(b)
	return nativeIdentities(b)
}

// oneAtATime lets several goroutines use an identity that keeps its key once it is decrypted.
type oneAtATime struct {
	mu sync.Mutex
	id age.Identity
}

func (o *oneAtATime) Unwrap(stanzas []*age.Stanza) ([]byte, error) {
	o.mu.Lock()
	defer o.mu.Unlock()
	return o.id.Unwrap(stanzas)
}

func sshIdentity(b []byte, name string, ask Ask) ([]age.Identity, error) {
	id, err := agessh.ParseIdentity(b)
	var locked *ssh.PassphraseMissingError
	switch {
	case errors.As(err, &locked):
		if ask == nil {
			return nil, errors.New("the SSH key has a passphrase, and there is nobody to ask for it")
		}
		if locked.PublicKey == nil {
			return nil, errors.New("an SSH key in an old format: write it anew with ssh-keygen -p -f FILE")
		}
		if locked.PublicKey.Type() != ssh.KeyAlgoED25519 {
			return nil, fmt.Errorf("an SSH key of the type %s: only ssh-ed25519 can decrypt", locked.PublicKey.Type())
		}
		tries := 0
		id, err := agessh.NewEncryptedSSHIdentity(locked.PublicKey, b, func() ([]byte, error) {
			if tries++; tries > maxTries {
				return nil, fmt.Errorf("%s: wrong passphrase", name) // not asked again for each of many logs
			}
			return ask(name)
		})
		if err != nil {
			return nil, errors.New("not an SSH key that can decrypt")
		}
		return []age.Identity{&oneAtATime{id: id}}, nil
	case err != nil:
		return nil, errors.New("not a private SSH key of the type ed25519")
	}
	if _, ok := id.(*agessh.Ed25519Identity); !ok {
		return nil, errors.New("an SSH key of another type: only ssh-ed25519 can decrypt")
	}
	return []age.Identity{id}, nil
}
