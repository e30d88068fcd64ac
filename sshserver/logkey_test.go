package sshserver

import (
	"crypto"
	"crypto/ed25519"
	"net"
	"path/filepath"
	"strings"
	"sync"
	"testing"

	"golang.org/x/crypto/ssh/agent"
)

// An ssh-agent signs the message itself, with the key that was asked for and no other. test/scripts/signing.txtar has OpenSSH's.
func TestAgentSigner(t *testing.T) {
	pub, key, err := ed25519.GenerateKey(nil)
	if err != nil {
		t.Fatal(err)
	}
	other, _, err := ed25519.GenerateKey(nil)
	if err != nil {
		t.Fatal(err)
	}
	ring := agent.NewKeyring()
	if err := ring.Add(agent.AddedKey{PrivateKey: key}); err != nil {
		t.Fatal(err)
	}
	socket := filepath.Join(t.TempDir(), "a.sock")
	l, err := net.Listen("unix", socket)
	if err != nil {
		t.Fatal(err)
	}
	var serving sync.WaitGroup
	serving.Go(func() {
		for {
			nc, err := l.Accept()
			if err != nil {
				return
			}
			serving.Go(func() { agent.ServeAgent(ring, nc); nc.Close() })
		}
	})
	message := []byte("sallyport auditlog segment footer v1\n")
	s := NewAgentSigner(socket, pub)
	sig, err := s.Sign(nil, message, crypto.Hash(0))
	if err != nil || !ed25519.Verify(pub, message, sig) || !pub.Equal(s.Public()) {
		t.Error(err)
	}
	if _, err := s.Sign(nil, message, crypto.SHA512); err == nil {
		t.Error("it would sign a hash")
	}
	if _, err := NewAgentSigner(socket, other).Sign(nil, message, crypto.Hash(0)); err == nil || !strings.Contains(err.Error(), "SHA256:") {
		t.Error("a key that the agent does not have:", err)
	}
	l.Close()
	serving.Wait()
	if _, err := s.Sign(nil, message, crypto.Hash(0)); err == nil || !strings.Contains(err.Error(), "ssh-agent") {
		t.Error("no agent:", err)
	}
}
