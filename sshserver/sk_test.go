package sshserver

import (
	"crypto/ed25519"
	"crypto/rand"
	"crypto/sha256"
	"encoding/binary"
	"io"
	"testing"

	"golang.org/x/crypto/ssh"

	"github.com/sallyport/sallyport/auditlog"
)

// token is a FIDO token with an ed25519 key, as OpenSSH's PROTOCOL.u2f has it.
type token struct {
	pub     ssh.PublicKey
	key     ed25519.PrivateKey
	flags   byte // 1: a person has touched it
	signed  int
	counter uint32
}

const skApplication = "ssh:"

func newToken(t *testing.T, flags byte) *token {
	t.Helper()
	pub, key, err := ed25519.GenerateKey(rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	p, err := ssh.ParsePublicKey(ssh.Marshal(struct {
		Type        string
		Key         []byte
		Application string
	}{ssh.KeyAlgoSKED25519, pub, skApplication}))
	if err != nil {
		t.Fatal(err)
	}
	return &token{pub: p, key: key, flags: flags}
}

func (k *token) PublicKey() ssh.PublicKey { return k.pub }

func (k *token) Sign(_ io.Reader, data []byte) (*ssh.Signature, error) {
	k.signed++
	k.counter++
	app, msg := sha256.Sum256([]byte(skApplication)), sha256.Sum256(data)
	rest := binary.BigEndian.AppendUint32([]byte{k.flags}, k.counter)
	blob := append(append(append([]byte{}, app[:]...), rest...), msg[:]...)
	return &ssh.Signature{Format: ssh.KeyAlgoSKED25519, Blob: ed25519.Sign(k.key, blob), Rest: rest}, nil
}

// A token's key is taken when it was touched; it is not even asked for a signature where the key is nobody's.
func TestSecurityKey(t *testing.T) {
	for _, tc := range []struct {
		name         string
		flags        byte
		known, works bool
		signed       int
	}{
		{"touched", 1, true, true, 1},
		{"not touched", 0, true, false, 1},
		{"not in the data", 1, false, false, 0},
	} {
		t.Run(tc.name, func(t *testing.T) {
			g := newGate(t, nil)
			k := newToken(t, tc.flags)
			if tc.known {
				g.rules.keys["alice"] = authzKey(k.pub).Line
			}
			cfg := g.config("alice")
			cfg.Auth = []ssh.AuthMethod{ssh.PublicKeys(k)}
			c, err := ssh.Dial("tcp", g.addr, cfg)
			if err == nil {
				c.Close()
			}
			if (err == nil) != tc.works || k.signed != tc.signed {
				t.Errorf("err %v, %d signatures; want works %v, %d signatures", err, k.signed, tc.works, tc.signed)
			}
			if tc.works {
				a := bodies[*auditlog.Authenticate](g.records()[0])
				if a[len(a)-1].KeyType != ssh.KeyAlgoSKED25519 {
					t.Errorf("recorded %+v", a[len(a)-1])
				}
			}
		})
	}
}
