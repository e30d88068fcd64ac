package main

import (
	"bytes"
	"context"
	"crypto"
	"crypto/ed25519"
	"crypto/rand"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os/exec"
	"strings"
	"syscall"
	"time"

	"github.com/sallyport/sallyport/auditlog"
	"github.com/sallyport/sallyport/config"
	"github.com/sallyport/sallyport/sshserver"
)

const (
	signTimeout  = 8 * time.Second // of one run of the command
	signTries    = 3               // a session waits for its signature up to 30 s
	signPause    = 500 * time.Millisecond
	signAtOnce   = 8
	signStderr   = 1 << 10
	checkMessage = "sallyport signing check v1\n"
)

// logSigner gives what signs the log: an agent, a command, or the key's file, which is made at the first start.
func logSigner(a config.Audit, create bool) (crypto.Signer, error) {
	if len(a.SigningCommand) == 0 && a.SigningAgent == "" {
		key, err := auditlog.LoadKey(a.Key)
		if errors.Is(err, fs.ErrNotExist) && create {
			key, err = auditlog.CreateKey(a.Key)
		}
		if err != nil {
			return nil, err
		}
		return key, nil
	}
	keys, err := auditlog.LoadPublicKeys(a.PublicKey)
	if err != nil {
		return nil, err
	}
	if len(keys) != 1 {
		return nil, fmt.Errorf("audit.public_key: %s has %d keys: the gate signs with one", a.PublicKey, len(keys))
	}
	var s crypto.Signer
	if a.SigningAgent != "" {
		s = sshserver.NewAgentSigner(a.SigningAgent, keys[0])
	} else {
		s = &commandSigner{argv: a.SigningCommand, pub: keys[0], running: make(chan struct{}, signAtOnce),
			timeout: signTimeout}
	}
	return s, checkSigner(s)
}

// checkSigner has something signed that means nothing, so that a wrong key is found at the start and not by a session.
func checkSigner(s crypto.Signer) error {
	message := []byte(checkMessage + rand.Text())
	sig, err := s.Sign(nil, message, crypto.Hash(0))
	if err != nil {
		return fmt.Errorf("log key: %w", err)
	}
	if pub, ok := s.Public().(ed25519.PublicKey); !ok || !ed25519.Verify(pub, message, sig) {
		return errors.New("log key: what signs does not sign with the key in audit.public_key")
	}
	return nil
}

// commandSigner signs by a command: the message on its standard input, the 64 bytes of the Ed25519 signature on its standard output.
type commandSigner struct {
	argv    []string
	pub     ed25519.PublicKey
	running chan struct{} // one for each that runs
	timeout time.Duration // of one run
}

// Public is the key's public half, an ed25519.PublicKey.
func (s *commandSigner) Public() crypto.PublicKey { return s.pub }

// Sign runs the command, and again if it fails.
func (s *commandSigner) Sign(_ io.Reader, message []byte, opts crypto.SignerOpts) ([]byte, error) {
	if opts.HashFunc() != 0 {
		return nil, errors.New("signing command: signs messages, not hashes")
	}
	var err error
	for try := range signTries {
		time.Sleep(time.Duration(try) * signPause)
		var sig []byte
		if sig, err = s.once(message); err == nil {
			return sig, nil
		}
	}
	return nil, fmt.Errorf("signing command %s: %w", s.argv[0], err)
}

func (s *commandSigner) once(message []byte) ([]byte, error) {
	ctx, cancel := context.WithTimeout(context.Background(), s.timeout)
	defer cancel()
	select {
	case s.running <- struct{}{}:
		defer func() { <-s.running }()
	case <-ctx.Done():
		return nil, errors.New("too many wait for it")
	}
	cmd := exec.CommandContext(ctx, s.argv[0], s.argv[1:]...)
	cmd.SysProcAttr = &syscall.SysProcAttr{Setpgid: true}
	cmd.Cancel = func() error { return syscall.Kill(-cmd.Process.Pid, syscall.SIGKILL) } // with what it has started
	cmd.WaitDelay = time.Second
	var stdout, stderr cutBuffer
	stdout.most, stderr.most = ed25519.SignatureSize+1, signStderr
	cmd.Stdin, cmd.Stdout, cmd.Stderr = bytes.NewReader(message), &stdout, &stderr
	if err := cmd.Run(); err != nil {
		if ctx.Err() != nil {
			err = fmt.Errorf("no signature within %s", s.timeout)
		}
		if text := strings.TrimSpace(stderr.String()); text != "" {
			err = fmt.Errorf("%w: %q", err, text)
		}
		return nil, err
	}
	sig := stdout.Bytes()
	if len(sig) != ed25519.SignatureSize {
		return nil, fmt.Errorf("wrote %d bytes or more, want the %d of an Ed25519 signature", len(sig), ed25519.SignatureSize)
	}
	if !ed25519.Verify(s.pub, message, sig) {
		return nil, errors.New("its signature is not by the key in audit.public_key")
	}
	return sig, nil
}

// cutBuffer keeps the first bytes that come.
type cutBuffer struct {
	bytes.Buffer
	most int
}

func (b *cutBuffer) Write(p []byte) (int, error) {
	b.Buffer.Write(p[:min(len(p), b.most-b.Len())])
	return len(p), nil
}
