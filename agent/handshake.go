package agent

import (
	"crypto/ed25519"
	"crypto/rand"
	"errors"
	"fmt"
	"io"
)

// ErrNotGate says that who answered on the agent's connection does not hold the session's key.
var ErrNotGate = errors.New("agent: the peer has not proven to be the gate")

// prove is the gate's side of the handshake.
func prove(conn io.ReadWriter, key ed25519.PrivateKey) error {
	var hello [len(magic) + nonceSize]byte
	if _, err := io.ReadFull(conn, hello[:]); err != nil {
		return fmt.Errorf("read the agent's greeting: %w", err)
	}
	if string(hello[:len(magic)]) != magic {
		return errors.New("the agent speaks another version of the protocol")
	}
	if _, err := conn.Write(ed25519.Sign(key, append([]byte(signatureContext), hello[len(magic):]...))); err != nil {
		return fmt.Errorf("answer the agent: %w", err)
	}
	return nil
}

// challenge is the agent's side of the handshake.
func challenge(conn io.ReadWriter, key ed25519.PublicKey) error {
	hello := append([]byte(magic), make([]byte, nonceSize)...)
	nonce := hello[len(magic):]
	if _, err := rand.Read(nonce); err != nil {
		return err
	}
	if _, err := conn.Write(hello); err != nil {
		return err
	}
	var signature [ed25519.SignatureSize]byte
	if _, err := io.ReadFull(conn, signature[:]); err != nil {
		return err
	}
	if !ed25519.Verify(key, append([]byte(signatureContext), nonce...), signature[:]) {
		return ErrNotGate
	}
	return nil
}
