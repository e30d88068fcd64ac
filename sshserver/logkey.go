package sshserver

import (
	"crypto"
	"crypto/ed25519"
	"errors"
	"fmt"
	"io"
	"net"
	"time"

	"golang.org/x/crypto/ssh"
	"golang.org/x/crypto/ssh/agent"
)

// agentTimeout bounds one signature of an agent; it may have to ask a token or a person's approval of a token's use.
const agentTimeout = 10 * time.Second

// agentSigner signs with a key that an ssh-agent holds. An agent's Ed25519 signature is one of the message itself (RFC 8709), so
// it can sign what is no SSH.
type agentSigner struct {
	socket string
	pub    ed25519.PublicKey
}

// NewAgentSigner gives a signer whose Ed25519 key is in the ssh-agent at a unix socket (draft-ietf-sshm-ssh-agent). It connects for
// each signature, so an agent may be started anew.
func NewAgentSigner(socket string, pub ed25519.PublicKey) crypto.Signer {
	return &agentSigner{socket: socket, pub: pub}
}

// Public is the key's public half, an ed25519.PublicKey.
func (s *agentSigner) Public() crypto.PublicKey { return s.pub }

// Sign has the agent sign message; opts.HashFunc must be zero, as Ed25519 signs messages.
func (s *agentSigner) Sign(_ io.Reader, message []byte, opts crypto.SignerOpts) ([]byte, error) {
	if opts.HashFunc() != 0 {
		return nil, errors.New("ssh-agent: signs messages, not hashes")
	}
	key, err := ssh.NewPublicKey(s.pub)
	if err != nil {
		return nil, fmt.Errorf("ssh-agent: %w", err)
	}
	nc, err := net.DialTimeout("unix", s.socket, agentTimeout)
	if err != nil {
		return nil, fmt.Errorf("ssh-agent: %w", err)
	}
	defer nc.Close()
	if err := nc.SetDeadline(time.Now().Add(agentTimeout)); err != nil {
		return nil, fmt.Errorf("ssh-agent: %w", err)
	}
	sig, err := agent.NewClient(nc).Sign(key, message)
	if err != nil {
		return nil, fmt.Errorf("ssh-agent at %s, key %s: %w", s.socket, ssh.FingerprintSHA256(key), err)
	}
	if sig.Format != ssh.KeyAlgoED25519 || len(sig.Blob) != ed25519.SignatureSize {
		return nil, fmt.Errorf("ssh-agent: a signature of the type %q", sig.Format)
	}
	return sig.Blob, nil
}
