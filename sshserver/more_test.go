package sshserver

import (
	"bytes"
	"crypto/rand"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"golang.org/x/crypto/ssh"

	"github.com/sallyport/sallyport/auditlog"
	"github.com/sallyport/sallyport/authz"
)

// A client that is connected but answers nothing is gone.
func TestKeepAlive(t *testing.T) {
	g := newGate(t, func(c *Config) { c.KeepAliveInterval, c.KeepAliveCount = time.Second, 2 })
	nc, err := net.Dial("tcp", g.addr)
	if err != nil {
		t.Fatal(err)
	}
	conn, _, reqs, err := ssh.NewClientConn(nc, g.addr, g.config("alice"))
	if err != nil {
		t.Fatal(err)
	}
	defer conn.Close()
	answering := g.dial("alice") // x/crypto answers by itself
	asked := time.Now()
	conn.Wait() // reqs is not served: keepalives wait for ever
	if took := time.Since(asked); took > 20*time.Second {
		t.Errorf("the gate waited %s", took)
	}
	go ssh.DiscardRequests(reqs)
	s, err := answering.NewSession()
	if err != nil {
		t.Fatal("a client that answers was cut off:", err)
	}
	if err := s.Run("true"); err != nil {
		t.Error(err)
	}
}

// Garbage after the login ends that connection alone.
func TestGarbageAfterLogin(t *testing.T) {
	g := newGate(t, nil)
	nc, err := net.Dial("tcp", g.addr)
	if err != nil {
		t.Fatal(err)
	}
	conn, chans, reqs, err := ssh.NewClientConn(nc, g.addr, g.config("alice"))
	if err != nil {
		t.Fatal(err)
	}
	client := ssh.NewClient(conn, chans, reqs)
	defer client.Close()
	other := g.dial("alice")
	garbage := make([]byte, 64<<10)
	rand.Read(garbage)
	nc.Write(garbage)
	client.Wait()
	s, err := other.NewSession()
	if err != nil {
		t.Fatal(err)
	}
	if err := s.Run("true"); err != nil {
		t.Error(err)
	}
}

// A profile may ask for all typed input, or none.
func TestInputModes(t *testing.T) {
	for _, tc := range []struct {
		mode   string
		secret bool // the password's bytes are in the log
		line   bool // the other bytes are
		marker bool
	}{
		{"", false, true, true},
		{inputNoPasswords, false, true, true},
		{inputAll, true, true, false},
		{inputNone, false, false, true},
	} {
		t.Run(tc.mode, func(t *testing.T) {
			g := newGate(t, nil)
			inner := g.rules.login
			g.rules.login = func(in authz.LoginInput) (authz.Login, error) {
				d, err := inner(in)
				d.Permit.Input = tc.mode
				return d, err
			}
			s, err := g.dial("alice").NewSession()
			if err != nil {
				t.Fatal(err)
			}
			if err := s.RequestPty("xterm", 24, 80, ssh.TerminalModes{}); err != nil {
				t.Fatal(err)
			}
			out := &screen{}
			s.Stdout = out
			in, _ := s.StdinPipe()
			if err := s.Start(`read a; echo got $a; stty -echo; printf 'Password: '; read p; stty echo; echo ${#p} keys`); err != nil {
				t.Fatal(err)
			}
			fmt.Fprint(in, "a line\n")
			out.await(t, "Password: ")
			fmt.Fprint(in, "hunter2\n")
			out.await(t, "7 keys")
			if err := s.Wait(); err != nil {
				t.Error(err)
			}
			var typed bytes.Buffer
			marker := false
			var closed *auditlog.ChannelClose
			for _, r := range g.records()[0] {
				switch b := r.Body.(type) {
				case *auditlog.Data:
					if b.Stream == auditlog.Input {
						typed.Write(b.Data)
						marker = marker || b.Hidden
					}
				case *auditlog.ChannelClose:
					closed = b
				}
			}
			got := typed.String()
			if strings.Contains(got, "hunter2") != tc.secret || strings.Contains(got, "a line") != tc.line || marker != tc.marker {
				t.Errorf("recorded %q, marker %v", got, marker)
			}
			// Not even the length of what is hidden may stand anywhere.
			if closed == nil || closed.Input != uint64(len(got)) {
				t.Errorf("close %+v, want %d bytes of input", closed, len(got))
			}
		})
	}
}

func TestLoadHostKeys(t *testing.T) {
	dir := t.TempDir()
	var files []string
	for _, n := range HostKeyNames {
		files = append(files, filepath.Join(dir, n))
	}
	if _, err := LoadHostKeys(files, false); !errors.Is(err, os.ErrNotExist) {
		t.Errorf("without create: %v", err)
	}
	made, err := LoadHostKeys(files, true)
	if err != nil {
		t.Fatal(err)
	}
	again, err := LoadHostKeys(files, true)
	if err != nil {
		t.Fatal(err)
	}
	for i, k := range made {
		if !bytes.Equal(k.PublicKey().Marshal(), again[i].PublicKey().Marshal()) {
			t.Errorf("%s: another key at the second start", files[i])
		}
		st, err := os.Stat(files[i])
		if err != nil || st.Mode().Perm() != 0o600 {
			t.Errorf("%s: mode %v, %v", files[i], st.Mode(), err)
		}
		pub, err := os.ReadFile(files[i] + ".pub")
		if err != nil || !bytes.Equal(pub, ssh.MarshalAuthorizedKey(k.PublicKey())) {
			t.Errorf("%s.pub: %q, %v", files[i], pub, err)
		}
	}
	// As a Secret of Kubernetes' has it for a gate that is not root.
	if err := os.Chmod(files[0], 0o440); err != nil {
		t.Fatal(err)
	}
	if _, err := LoadHostKeys(files, false); err != nil {
		t.Errorf("mode 0440: %v", err)
	}
	for name, change := range map[string]func(file string) error{
		"lets others read it": func(f string) error { return os.Chmod(f, 0o644) },
		"mode 0640":           func(f string) error { return os.Chmod(f, 0o640) },
		"are both":            func(f string) error { return copyKey(f, filepath.Join(dir, "other_rsa")) },
		"no key found":        func(f string) error { return os.WriteFile(f, []byte("garbage"), 0o600) },
	} {
		list := files
		if name == "are both" {
			list = append(append([]string{}, files...), filepath.Join(dir, "other_rsa"))
		}
		before, err := os.ReadFile(files[2])
		if err != nil {
			t.Fatal(err)
		}
		if err := change(files[2]); err != nil {
			t.Fatal(err)
		}
		if _, err := LoadHostKeys(list, true); err == nil || !strings.Contains(err.Error(), name) {
			t.Errorf("error %v, want %q in it", err, name)
		}
		if err := errors.Join(os.WriteFile(files[2], before, 0o600), os.Chmod(files[2], 0o600)); err != nil {
			t.Fatal(err)
		}
	}
	if _, err := LoadHostKeys([]string{filepath.Join(dir, "key")}, true); err == nil || !strings.Contains(err.Error(), "says no type") {
		t.Errorf("a name without a type: %v", err)
	}
}

func copyKey(from, to string) error {
	in, err := os.Open(from)
	if err != nil {
		return err
	}
	defer in.Close()
	out, err := os.OpenFile(to, os.O_CREATE|os.O_WRONLY, 0o600)
	if err != nil {
		return err
	}
	_, err = io.Copy(out, in)
	return errors.Join(err, out.Close())
}

// A client without any of our algorithms is told so, and SHA-1 is not among them.
func TestAlgorithms(t *testing.T) {
	g := newGate(t, nil)
	for name, change := range map[string]func(*ssh.ClientConfig){
		"kex sha1":   func(c *ssh.ClientConfig) { c.KeyExchanges = []string{ssh.InsecureKeyExchangeDH14SHA1} },
		"cipher cbc": func(c *ssh.ClientConfig) { c.Ciphers = []string{ssh.InsecureCipherAES128CBC} },
		"mac sha1": func(c *ssh.ClientConfig) {
			c.Ciphers = []string{ssh.CipherAES128CTR}
			c.MACs = []string{ssh.InsecureHMACSHA196}
		},
		"host key":    func(c *ssh.ClientConfig) { c.HostKeyAlgorithms = []string{ssh.KeyAlgoRSA} },
		"no key type": func(c *ssh.ClientConfig) { c.Auth = nil },
	} {
		cfg := g.config("alice")
		change(cfg)
		if c, err := ssh.Dial("tcp", g.addr, cfg); err == nil {
			c.Close()
			t.Errorf("%s: logged in", name)
		}
	}
}

// The exit status comes before the end of the output: who closes the channel at that, as OpenSSH's shared connections do, has it.
func TestExitStatusBeforeEOF(t *testing.T) {
	g := newGate(t, nil)
	c := g.dial("alice")
	for i := range 20 {
		ch, reqs, err := c.OpenChannel("session", nil)
		if err != nil {
			t.Fatal(err)
		}
		ch.CloseWrite()
		if ok, err := ch.SendRequest("exec", true, ssh.Marshal(struct{ Command string }{"exit 7"})); !ok || err != nil {
			t.Fatal(ok, err)
		}
		io.Copy(io.Discard, ch) //nolint:errcheck // until the EOF
		select {
		case req := <-reqs: // x/crypto hands out in the order in which it reads
			if req == nil || req.Type != "exit-status" || binary.BigEndian.Uint32(req.Payload) != 7 {
				t.Fatalf("%d: %+v", i, req)
			}
		default:
			t.Fatalf("%d: no exit status before the EOF", i)
		}
		ch.Close()
		ssh.DiscardRequests(reqs)
	}
}
