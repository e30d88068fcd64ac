package agent

import (
	"crypto/ed25519"
	"crypto/rand"
	"errors"
	"fmt"
	"io"
	"net"
	"os"

	"golang.org/x/sys/unix"
)

// ErrNotGate says that who answered on the agent's connection does not hold the session's key.
var ErrNotGate = errors.New("agent: the peer has not proven to be the gate")

// prove is the gate's side of the handshake. With pipes, which conn then has to be a unix socket for, the agent gets that
// socket with the proof.
func prove(conn net.Conn, key ed25519.PrivateKey, pipes *os.File) error {
	var hello [len(magic) + nonceSize]byte
	if _, err := io.ReadFull(conn, hello[:]); err != nil {
		return fmt.Errorf("read the agent's greeting: %w", err)
	}
	if string(hello[:len(magic)]) != magic {
		return errors.New("the agent speaks another version of the protocol")
	}
	proof := ed25519.Sign(key, append([]byte(signatureContext), hello[len(magic):]...))
	var err error
	if u, ok := conn.(*net.UnixConn); ok && pipes != nil {
		_, _, err = u.WriteMsgUnix(proof, unix.UnixRights(int(rawFd(pipes))), nil)
	} else {
		_, err = conn.Write(proof)
	}
	if err != nil {
		return fmt.Errorf("answer the agent: %w", err)
	}
	return nil
}

// challenge is the agent's side of the handshake. It gives the socket by which pipes come, or nil if there is none.
func challenge(conn net.Conn, key ed25519.PublicKey) (*net.UnixConn, error) {
	hello := append([]byte(magic), make([]byte, nonceSize)...)
	nonce := hello[len(magic):]
	if _, err := rand.Read(nonce); err != nil {
		return nil, err
	}
	if _, err := conn.Write(hello); err != nil {
		return nil, err
	}
	var proof proofReader
	proof.conn = conn
	defer proof.close()
	var signature [ed25519.SignatureSize]byte
	if _, err := io.ReadFull(&proof, signature[:]); err != nil {
		return nil, err
	}
	if !ed25519.Verify(key, append([]byte(signatureContext), nonce...), signature[:]) {
		return nil, ErrNotGate
	}
	return proof.pipes()
}

// proofReader reads the gate's proof, and the descriptor that may come with it.
type proofReader struct {
	conn  net.Conn
	files []*os.File
}

func (r *proofReader) Read(b []byte) (int, error) {
	u, ok := r.conn.(*net.UnixConn)
	if !ok {
		return r.conn.Read(b)
	}
	oob := make([]byte, unix.CmsgSpace(4)) // the kernel closes what else comes
	n, oobn, _, _, err := u.ReadMsgUnix(b, oob)
	if err == nil && n == 0 {
		err = io.EOF
	}
	files, ferr := descriptors(oob[:oobn])
	r.files = append(r.files, files...)
	return n, errors.Join(err, ferr)
}

func (r *proofReader) pipes() (*net.UnixConn, error) {
	if len(r.files) == 0 {
		return nil, nil
	}
	f := r.files[0]
	r.files = r.files[1:]
	return packetConn(f)
}

func (r *proofReader) close() {
	for _, f := range r.files {
		f.Close()
	}
}
