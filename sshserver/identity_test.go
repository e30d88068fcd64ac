package sshserver

import (
	"bufio"
	"bytes"
	"context"
	"crypto/aes"
	"crypto/cipher"
	"crypto/ecdh"
	"crypto/ed25519"
	"crypto/rand"
	"crypto/sha256"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"math/big"
	"net"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"golang.org/x/crypto/ssh"

	"github.com/sallyport/sallyport/auditlog"
	"github.com/sallyport/sallyport/auditlog/file"
	"github.com/sallyport/sallyport/authz"
)

// rawClient is an SSH transport that sends whatever packets it is told to, several in one segment if need be: what
// x/crypto's client never does. It knows one algorithm of each kind: curve25519-sha256, ssh-ed25519 (whose signature it
// does not look at), aes128-gcm@openssh.com.
type rawClient struct {
	nc        net.Conn
	in        *bufio.Reader
	session   []byte
	seal      cipher.AEAD // nil: in the clear
	open      cipher.AEAD
	sealNonce [12]byte
	openNonce [12]byte
}

// Message numbers of RFC 4250, section 4.1.
const (
	msgServiceAccept = 6
	msgKexInit       = 20
	msgECDHReply     = 31
	msgAuthFailure   = 51
	msgAuthSuccess   = 52
	msgAuthPKOK      = 60
	msgOpenConfirm   = 91
	msgChannelData   = 94
)

type kexInit struct {
	Cookie                                                 [16]byte `sshtype:"20"`
	Kex, HostKey, CipherOut, CipherIn, MACOut, MACIn       []string
	CompressionOut, CompressionIn, LanguageOut, LanguageIn []string
	Guess                                                  bool
	Reserved                                               uint32
}

// dialRaw connects and goes as far as the service ssh-userauth.
func dialRaw(t *testing.T, addr string) *rawClient {
	t.Helper()
	nc, err := net.Dial("tcp", addr)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { nc.Close() })
	nc.SetDeadline(time.Now().Add(30 * time.Second))
	c := &rawClient{nc: nc, in: bufio.NewReader(nc)}
	if err := c.handshake(); err != nil {
		t.Fatal("raw client: ", err)
	}
	return c
}

func (c *rawClient) handshake() error {
	const ours = "SSH-2.0-raw"
	init := kexInit{
		Kex: []string{"curve25519-sha256"}, HostKey: []string{"ssh-ed25519"},
		CipherOut: []string{"aes128-gcm@openssh.com"}, CipherIn: []string{"aes128-gcm@openssh.com"},
		CompressionOut: []string{"none"}, CompressionIn: []string{"none"},
	}
	rand.Read(init.Cookie[:])
	key, err := ecdh.X25519().GenerateKey(rand.Reader)
	if err != nil {
		return err
	}
	ourInit := ssh.Marshal(init)
	if _, err := io.WriteString(c.nc, ours+"\r\n"); err != nil {
		return err
	}
	theirs, err := c.in.ReadString('\n')
	if err != nil {
		return err
	}
	if err := c.send(ourInit, ssh.Marshal(struct {
		Public []byte `sshtype:"30"`
	}{key.PublicKey().Bytes()})); err != nil {
		return err
	}
	theirInit, err := c.expect(msgKexInit)
	if err != nil {
		return err
	}
	packet, err := c.expect(msgECDHReply)
	if err != nil {
		return err
	}
	var reply struct {
		HostKey, Public, Signature []byte `sshtype:"31"`
	}
	if err := ssh.Unmarshal(packet, &reply); err != nil {
		return err
	}
	public, err := ecdh.X25519().NewPublicKey(reply.Public)
	if err != nil {
		return err
	}
	shared, err := key.ECDH(public)
	if err != nil {
		return err
	}
	secret := ssh.Marshal(struct{ K *big.Int }{new(big.Int).SetBytes(shared)})
	hash := sha256.Sum256(append(ssh.Marshal(struct {
		Client, Server                                  string
		ClientInit, ServerInit, HostKey, Public, Theirs []byte
	}{ours, strings.TrimRight(theirs, "\r\n"), ourInit, theirInit, reply.HostKey, key.PublicKey().Bytes(), reply.Public}), secret...))
	c.session = hash[:]
	if err := c.send([]byte{msgNewKeys}); err != nil {
		return err
	}
	if _, err := c.expect(msgNewKeys); err != nil {
		return err
	}
	derive := func(letter byte) []byte { // RFC 4253, section 7.2
		k := sha256.Sum256(slices.Concat(secret, c.session, []byte{letter}, c.session))
		return k[:]
	}
	aead := func(letter byte) cipher.AEAD {
		block, _ := aes.NewCipher(derive(letter)[:16])
		a, _ := cipher.NewGCM(block)
		return a
	}
	copy(c.sealNonce[:], derive('A'))
	copy(c.openNonce[:], derive('B'))
	c.seal, c.open = aead('C'), aead('D')
	if err := c.send(ssh.Marshal(struct {
		Service string `sshtype:"5"`
	}{"ssh-userauth"})); err != nil {
		return err
	}
	_, err = c.expect(msgServiceAccept)
	return err
}

// send writes the packets in one segment.
func (c *rawClient) send(packets ...[]byte) error {
	var wire []byte
	for _, p := range packets {
		padding := 8 - (5+len(p))%8
		if c.seal != nil { // the length is in the clear, and not padded for
			padding = 16 - (1+len(p))%16
		}
		if padding < 4 {
			padding += 16
		}
		b := binary.BigEndian.AppendUint32(nil, uint32(1+len(p)+padding))
		b = append(append(append(b, byte(padding)), p...), make([]byte, padding)...)
		if c.seal != nil {
			b = c.seal.Seal(b[:4:4], c.sealNonce[:], b[4:], b[:4])
			count(&c.sealNonce)
		}
		wire = append(wire, b...)
	}
	_, err := c.nc.Write(wire)
	return err
}

// receive gives the next packet.
func (c *rawClient) receive() ([]byte, error) {
	var length [4]byte
	if _, err := io.ReadFull(c.in, length[:]); err != nil {
		return nil, err
	}
	n := binary.BigEndian.Uint32(length[:])
	if n < 5 || n > 1<<16 {
		return nil, fmt.Errorf("a packet of %d bytes", n)
	}
	if c.open != nil {
		n += uint32(c.open.Overhead())
	}
	b := make([]byte, n)
	if _, err := io.ReadFull(c.in, b); err != nil {
		return nil, err
	}
	if c.open != nil {
		var err error
		if b, err = c.open.Open(nil, c.openNonce[:], b, length[:]); err != nil {
			return nil, err
		}
		count(&c.openNonce)
	}
	if int(b[0])+2 > len(b) {
		return nil, errors.New("a packet that is all padding")
	}
	return b[1 : len(b)-int(b[0])], nil
}

// count increments the invocation counter (RFC 5647, section 7.1).
func count(nonce *[12]byte) {
	binary.BigEndian.PutUint64(nonce[4:], binary.BigEndian.Uint64(nonce[4:])+1)
}

func (c *rawClient) expect(number byte) ([]byte, error) {
	p, err := c.receive()
	if err == nil && p[0] != number {
		err = fmt.Errorf("message %d, want %d", p[0], number)
	}
	return p, err
}

type authRequest struct {
	User, Service, Method string `sshtype:"50"`
	HasSignature          bool
	Algorithm             string
	Key                   []byte
}

// query asks whether a key would do (RFC 4252, section 7).
func (c *rawClient) query(user string, key ssh.PublicKey) []byte {
	return ssh.Marshal(authRequest{user, "ssh-connection", "publickey", false, key.Type(), key.Marshal()})
}

// prove is a request with a signature: by signer, over what stands in signed, which an honest client takes from the
// request itself.
func (c *rawClient) prove(user string, key ssh.PublicKey, signer ssh.Signer, signed string) []byte {
	request := authRequest{user, "ssh-connection", "publickey", true, key.Type(), key.Marshal()}
	of := request
	of.User = signed
	sig, err := signer.Sign(rand.Reader, append(ssh.Marshal(struct{ Session []byte }{c.session}), ssh.Marshal(of)...))
	if err != nil {
		panic(err) // of a test
	}
	return append(ssh.Marshal(request), ssh.Marshal(struct{ Signature []byte }{ssh.Marshal(sig)})...)
}

// honest is a request as it should be.
func (c *rawClient) honest(user string, signer ssh.Signer) []byte {
	return c.prove(user, signer.PublicKey(), signer, user)
}

func openSession() []byte {
	return ssh.Marshal(struct {
		Kind               string `sshtype:"90"`
		Channel, Win, Size uint32
	}{"session", 0, 1 << 20, 1 << 15})
}

func newSigner(t *testing.T) ssh.Signer {
	t.Helper()
	_, k, err := ed25519.GenerateKey(rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	s, err := ssh.NewSignerFromKey(k)
	if err != nil {
		t.Fatal(err)
	}
	return s
}

// Who somebody is comes from the key that was proven and the name it was proven for, whatever was asked before, behind or
// meanwhile: x/crypto asks about keys, and keeps answers, in an order that clients choose (CVE-2024-45337), and names may change
// from request to request. Alice has a grant; mallory, whose key the client has, has one or none.
func TestIdentity(t *testing.T) {
	const nobody = "" // no key is proven: there is no session, and the gate's own log has the refusal
	type packets = func(c *rawClient, alice ssh.PublicKey, mallory ssh.Signer) [][]byte
	for _, tc := range []struct {
		name    string
		granted bool   // mallory has a grant
		proven  string // the user whose session it is
		send    packets
	}{
		{"alice asked after mallory is refused", false, "mallory", func(c *rawClient, alice ssh.PublicKey, mallory ssh.Signer) [][]byte {
			return [][]byte{c.honest("mallory", mallory), c.honest("alice", mallory), c.query("alice", alice), openSession()}
		}},
		{"a name that has a grant, after one that has none", false, "mallory", func(c *rawClient, alice ssh.PublicKey, mallory ssh.Signer) [][]byte {
			return [][]byte{c.query("carol", mallory.PublicKey()), c.honest("mallory", mallory), c.honest("carol", mallory), openSession()}
		}},
		{"alice's key asked first, mallory proven", false, "mallory", func(c *rawClient, alice ssh.PublicKey, mallory ssh.Signer) [][]byte {
			return [][]byte{c.query("alice", alice), c.query("mallory", mallory.PublicKey()), c.honest("mallory", mallory), openSession()}
		}},
		{"alice's key asked last, mallory proven", true, "mallory", func(c *rawClient, alice ssh.PublicKey, mallory ssh.Signer) [][]byte {
			return [][]byte{c.query("mallory", mallory.PublicKey()), c.query("alice", alice), c.honest("mallory", mallory), openSession()}
		}},
		{"alice's key asked under mallory's name", true, "mallory", func(c *rawClient, alice ssh.PublicKey, mallory ssh.Signer) [][]byte {
			return [][]byte{c.query("mallory", alice), c.query("alice", mallory.PublicKey()), c.honest("mallory", mallory), openSession()}
		}},
		{"alice asked behind mallory's success", true, "mallory", func(c *rawClient, alice ssh.PublicKey, mallory ssh.Signer) [][]byte {
			return [][]byte{c.honest("mallory", mallory), c.honest("alice", mallory), c.query("alice", alice), openSession()}
		}},
		{"mallory's key accepted for mallory, signs for alice", true, nobody, func(c *rawClient, alice ssh.PublicKey, mallory ssh.Signer) [][]byte {
			return [][]byte{c.query("mallory", mallory.PublicKey()), c.honest("alice", mallory), openSession()}
		}},
		{"alice's key accepted, mallory's signs for alice", true, nobody, func(c *rawClient, alice ssh.PublicKey, mallory ssh.Signer) [][]byte {
			return [][]byte{c.query("alice", alice), c.honest("alice", mallory), openSession()}
		}},
		{"alice's key accepted, mallory's signature under it", true, nobody, func(c *rawClient, alice ssh.PublicKey, mallory ssh.Signer) [][]byte {
			return [][]byte{c.query("alice", alice), c.prove("alice", alice, mallory, "alice"), openSession()}
		}},
		{"a signature for mallory in a request of alice's", true, nobody, func(c *rawClient, alice ssh.PublicKey, mallory ssh.Signer) [][]byte {
			return [][]byte{c.query("mallory", mallory.PublicKey()), c.prove("alice", mallory.PublicKey(), mallory, "mallory"), openSession()}
		}},
		{"a signature for alice in a request of mallory's", true, nobody, func(c *rawClient, alice ssh.PublicKey, mallory ssh.Signer) [][]byte {
			return [][]byte{c.query("mallory", mallory.PublicKey()), c.prove("mallory", mallory.PublicKey(), mallory, "alice"), openSession()}
		}},
		{"a channel behind an accepted offer", true, nobody, func(c *rawClient, alice ssh.PublicKey, mallory ssh.Signer) [][]byte {
			return [][]byte{c.query("alice", alice), openSession(), c.honest("mallory", mallory)}
		}},
		{"a channel before everything", true, nobody, func(c *rawClient, alice ssh.PublicKey, mallory ssh.Signer) [][]byte {
			return [][]byte{openSession(), c.query("alice", alice), c.honest("mallory", mallory)}
		}},
	} {
		for _, together := range []bool{true, false} {
			t.Run(fmt.Sprintf("%s, together %v", tc.name, together), func(t *testing.T) {
				g := newGate(t, nil)
				mallory := newSigner(t)
				g.rules.keys["mallory"] = authzKey(mallory.PublicKey()).Line
				g.rules.keys["carol"] = g.rules.keys["mallory"] // the same key under two names
				inner := g.rules.login
				var asked []authz.LoginInput
				g.rules.login = func(in authz.LoginInput) (authz.Login, error) {
					asked = append(asked, in)
					if in.User == "mallory" && !tc.granted {
						return authz.Login{Reason: "no grant for mallory"}, nil
					}
					return inner(in)
				}
				c := dialRaw(t, g.addr)
				packets := tc.send(c, g.key.PublicKey(), mallory)
				confirmed := false
				if together {
					if err := c.send(packets...); err != nil {
						t.Fatal(err)
					}
					confirmed = c.untilSettled(t)
				} else {
					for _, p := range packets {
						if c.send(p) != nil || !c.answer(&confirmed) {
							break
						}
					}
				}
				c.nc.Close()
				g.ended(t)
				g.checkIdentity(t, tc.proven, tc.granted, mallory.PublicKey(), asked)
				if confirmed && tc.proven == nobody {
					t.Error("a channel was opened")
				}
			})
		}
	}
}

// answer reads until a request has its answer. It reports whether there was one; confirmed is set if a channel opened.
func (c *rawClient) answer(confirmed *bool) bool {
	for {
		p, err := c.receive()
		if err != nil {
			return false
		}
		switch p[0] {
		case msgAuthFailure, msgAuthSuccess, msgAuthPKOK:
			return true
		case msgOpenConfirm:
			*confirmed = true
			return true
		}
	}
}

// untilSettled reads until the gate closes the connection or opens a channel, and reports the latter.
func (c *rawClient) untilSettled(t *testing.T) bool {
	t.Helper()
	for {
		p, err := c.receive()
		var timeout net.Error
		if errors.As(err, &timeout) && timeout.Timeout() {
			t.Fatal("the gate neither serves nor closes")
		}
		if err != nil {
			return false
		}
		if p[0] == msgOpenConfirm {
			return true
		}
	}
}

// checkIdentity looks at what was recorded of one connection: mallory's session, or none.
func (g *gate) checkIdentity(t *testing.T, proven string, granted bool, mallory ssh.PublicKey, asked []authz.LoginInput) {
	t.Helper()
	started := g.backend.Started()
	all := g.records()
	for _, in := range asked {
		if in.User != "mallory" || in.Key != authzKey(mallory) {
			t.Errorf("policy was asked about %s with %s", in.User, in.Key.Fingerprint)
		}
	}
	if proven == "" {
		if len(all) != 0 || started != 0 || len(asked) != 0 {
			t.Errorf("%d sessions in the log, %d sandboxes, policy asked %d times: want nothing", len(all), started, len(asked))
		}
		if r := g.refusedRecords(); len(r) != 1 || r[0].Count != 1 || r[0].Reason == "" {
			t.Errorf("the gate's own log: %+v, want one refusal", r)
		}
		return
	}
	if len(all) != 1 || len(asked) == 0 {
		t.Fatalf("%d sessions in the log, policy asked %d times, want one session", len(all), len(asked))
	}
	if started > 1 || started == 1 && !granted { // a granted connection may end before its sandbox starts
		t.Errorf("%d sandboxes", started)
	}
	fingerprint, proofs := ssh.FingerprintSHA256(mallory), 0
	for _, a := range bodies[*auditlog.Authenticate](all[0]) {
		if a.Result != "proven" {
			continue
		}
		if proofs++; a.User != proven || a.Fingerprint != fingerprint {
			t.Errorf("proven: %+v", a)
		}
	}
	if proofs != 1 {
		t.Errorf("%d keys are recorded as proven", proofs)
	}
	decisions := bodies[*auditlog.Decision](all[0])
	if len(decisions) != 1 || decisions[0].User != proven || decisions[0].Allow != granted {
		t.Errorf("decisions %+v", decisions)
	}
	if end := bodies[*auditlog.End](all[0]); len(end) != 1 || (end[0].Cause == "refused") == granted {
		t.Errorf("end %+v", end)
	}
}

// refusedRecords are what the stopped gate's own log has of connections that proved nothing.
func (g *gate) refusedRecords() (found []*auditlog.Refused) {
	g.t.Helper()
	src, err := file.OpenSource(filepath.Join(g.dir, "log"))
	if err != nil {
		g.t.Fatal(err)
	}
	defer src.Close()
	for log, err := range auditlog.Logs(context.Background(), src, auditlog.GatePrefix) {
		if err != nil {
			g.t.Fatal(err)
		}
		found = append(found, bodies[*auditlog.Refused](readLog(g.t, src, log))...)
	}
	return found
}

// The raw client is one that is served: else TestIdentity would show nothing. Its whole login is in one segment.
func TestPipelinedLogin(t *testing.T) {
	g := newGate(t, nil)
	c := dialRaw(t, g.addr)
	exec := ssh.Marshal(struct {
		Channel   uint32 `sshtype:"98"`
		Kind      string
		WantReply bool
		Command   string
	}{0, "exec", false, "echo served"})
	if err := c.send(c.query("alice", g.key.PublicKey()), c.honest("alice", g.key), openSession()); err != nil {
		t.Fatal(err)
	}
	for {
		p, err := c.receive()
		if err != nil {
			t.Fatal(err)
		}
		if p[0] == msgOpenConfirm { // x/crypto drops what comes for a channel before it is confirmed
			if err := c.send(exec); err != nil {
				t.Fatal(err)
			}
		}
		if p[0] == msgChannelData && bytes.HasSuffix(p, []byte("served\n")) {
			break
		}
	}
	c.nc.Close()
	g.ended(t)
	if d := bodies[*auditlog.Decision](g.records()[0]); len(d) != 1 || d[0].User != "alice" || g.backend.Started() != 1 {
		t.Errorf("decisions %+v, %d sandboxes", d, g.backend.Started())
	}
}
