package agekeys

import (
	"bytes"
	"crypto/ed25519"
	"crypto/rand"
	"crypto/rsa"
	"encoding/pem"
	"errors"
	"io"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"testing"

	"filippo.io/age"
	"filippo.io/age/armor"
	"golang.org/x/crypto/ssh"
)

const passphrase = "correct horse"

// answers gives a passphrase and counts how often it was asked for.
func answers(n *int, pass string) Ask {
	return func(string) ([]byte, error) { *n++; return []byte(pass), nil }
}

func must(t testing.TB, err error) {
	t.Helper()
	if err != nil {
		t.Fatal(err)
	}
}

// withPassphrase encrypts a file of identities as `age -p` does, but with little work.
func withPassphrase(t testing.TB, plain string, armored bool) []byte {
	t.Helper()
	r, err := age.NewScryptRecipient(passphrase)
	must(t, err)
	r.SetWorkFactor(5)
	var b bytes.Buffer
	var out io.WriteCloser = nopCloser{&b}
	if armored {
		out = armor.NewWriter(&b)
	}
	w, err := age.Encrypt(out, r)
	must(t, err)
	_, err = io.WriteString(w, plain)
	must(t, errors.Join(err, w.Close(), out.Close()))
	return b.Bytes()
}

type nopCloser struct{ io.Writer }

func (nopCloser) Close() error { return nil }

// opens says whether identities read what is encrypted to recipients.
func opens(t *testing.T, ids []age.Identity, to age.Recipient) error {
	t.Helper()
	var b bytes.Buffer
	w, err := age.Encrypt(&b, to)
	must(t, err)
	_, err = io.WriteString(w, "x")
	must(t, errors.Join(err, w.Close()))
	r, err := age.Decrypt(&b, ids...)
	if err != nil {
		return err
	}
	_, err = io.ReadAll(r)
	return err
}

func TestIdentities(t *testing.T) {
	native, err := age.GenerateX25519Identity()
	must(t, err)
	hybrid, err := age.GenerateHybridIdentity()
	must(t, err)
	sshPub, sshKey, err := ed25519.GenerateKey(rand.Reader)
	must(t, err)
	sshPublic, err := ssh.NewPublicKey(sshPub)
	must(t, err)
	sshTo, err := ParseRecipient(string(ssh.MarshalAuthorizedKey(sshPublic)))
	must(t, err)
	block, err := ssh.MarshalPrivateKey(sshKey, "")
	must(t, err)
	locked, err := ssh.MarshalPrivateKeyWithPassphrase(sshKey, "", []byte(passphrase))
	must(t, err)
	rsaKey, err := rsa.GenerateKey(rand.Reader, 2048)
	must(t, err)
	rsaBlock, err := ssh.MarshalPrivateKey(rsaKey, "")
	must(t, err)
	rsaLocked, err := ssh.MarshalPrivateKeyWithPassphrase(rsaKey, "", []byte(passphrase))
	must(t, err)
	nativeFile := "# mine\n\n" + native.String() + "\n"

	for name, c := range map[string]struct {
		file  []byte
		to    age.Recipient
		asked int
	}{
		"X25519":             {[]byte(nativeFile), native.Recipient(), 0},
		"CR LF":              {[]byte(strings.ReplaceAll(nativeFile, "\n", "\r\n")), native.Recipient(), 0},
		"hybrid":             {[]byte(hybrid.String()), hybrid.Recipient(), 0},
		"two":                {[]byte(nativeFile + hybrid.String()), hybrid.Recipient(), 0},
		"passphrase":         {withPassphrase(t, nativeFile, false), native.Recipient(), 1},
		"passphrase armored": {withPassphrase(t, hybrid.String(), true), hybrid.Recipient(), 1},
		"ssh":                {pem.EncodeToMemory(block), sshTo, 0},
		"ssh passphrase":     {pem.EncodeToMemory(locked), sshTo, 1},
	} {
		asked := 0
		ids, err := ParseIdentities(c.file, name, answers(&asked, passphrase))
		if err == nil {
			err = opens(t, ids, c.to)
		}
		if err != nil || asked != c.asked {
			t.Errorf("%s: %v, asked %d times", name, err, asked)
		}
		if c.asked == 0 {
			continue
		}
		if _, err := ParseIdentities(c.file, name, nil); err == nil || !strings.Contains(err.Error(), "nobody to ask") {
			t.Errorf("%s, nobody there: %v", name, err)
		}
		asked = 0
		ids, err = ParseIdentities(c.file, name, answers(&asked, "wrong"))
		for range 5 {
			if err == nil && opens(t, ids, c.to) == nil {
				t.Errorf("%s: opens with a wrong passphrase", name)
			}
		}
		if asked > maxTries {
			t.Errorf("%s: asked %d times", name, asked)
		}
		ids, err = ParseIdentities(c.file, name, answers(&asked, passphrase))
		must(t, err)
		var many sync.WaitGroup
		for range 4 {
			many.Go(func() {
				if err := opens(t, ids, c.to); err != nil {
					t.Errorf("%s, by several at once: %v", name, err)
				}
			})
		}
		many.Wait()
	}

	toOther := func() []byte {
		var b bytes.Buffer
		w, err := age.Encrypt(&b, native.Recipient())
		must(t, err)
		must(t, w.Close())
		return b.Bytes()
	}()
	for want, file := range map[string][]byte{
		"no identity in it":                     []byte("# nothing\n"),
		"line 2: malformed identity":            []byte("\nAGE-SECRET-KEY-1QQQQ\n"),
		"line 1: a recipient, which can't":      []byte(native.Recipient().String()),
		"plugins are not supported":             []byte("AGE-PLUGIN-YUBIKEY-1QQQ\n"),
		"line 1: not an identity":               []byte("hello"),
		"to a recipient and not with a pass":    toOther,
		"only ssh-ed25519 can decrypt":          pem.EncodeToMemory(rsaBlock),
		"of the type ssh-rsa: only ssh-ed25519": pem.EncodeToMemory(rsaLocked),
		"not a private SSH key":                 []byte("-----BEGIN NONSENSE-----\n"),
		"decrypt: ":                             []byte("age-encryption.org/v1\nnonsense"),
	} {
		asked := 0
		_, err := ParseIdentities(file, "x", answers(&asked, passphrase))
		if err == nil || !strings.Contains(err.Error(), want) || strings.Contains(err.Error(), "KEY-1Q") {
			t.Errorf("%v, want %q", err, want)
		}
	}
	if _, err := LoadIdentities(filepath.Join(t.TempDir(), "none"), nil); !errors.Is(err, os.ErrNotExist) {
		t.Errorf("no file: %v", err)
	}
	big := filepath.Join(t.TempDir(), "big")
	must(t, os.WriteFile(big, make([]byte, maxFile+1), 0o600))
	if _, err := LoadIdentities(big, nil); err == nil || !strings.Contains(err.Error(), "larger than") {
		t.Errorf("a large file: %v", err)
	}
}

// FuzzParse: files of both kinds are bytes from outside.
func FuzzParse(f *testing.F) {
	f.Add([]byte("# x\nAGE-SECRET-KEY-1QQ\nage1qq\n"))
	f.Add([]byte("age1pq1qq\nssh-ed25519 AAAA x\n"))
	f.Add([]byte("-----BEGIN OPENSSH PRIVATE KEY-----\nAAAA\n-----END OPENSSH PRIVATE KEY-----\n"))
	f.Add([]byte("age-encryption.org/v1\n-> scrypt AAAA 2\nAAAA\n--- AAAA\n"))
	f.Fuzz(func(t *testing.T, b []byte) {
		n := 0
		if bytes.Contains(b, []byte("scrypt")) {
			return // the work is what the file says, up to a bound that is too much here
		}
		if ids, err := ParseIdentities(b, "x", answers(&n, "p")); err == nil && len(ids) == 0 {
			t.Error("no identity and no error")
		}
		if rs, err := ParseRecipients(b); err == nil && len(rs) == 0 {
			t.Error("no recipient and no error")
		}
	})
}
