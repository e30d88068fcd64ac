package sshserver

import (
	"context"
	"crypto/rand"
	"crypto/rsa"
	"encoding/base64"
	"encoding/json"
	"errors"
	"fmt"
	"strings"
	"time"

	"golang.org/x/crypto/ssh"

	"github.com/sallyport/sallyport/auditlog"
	"github.com/sallyport/sallyport/authz"
)

// maxOffers is how many keys a client may offer in vain: an agent with many keys is common, and a refused offer costs
// no signature.
const maxOffers = 20

// minRSA is the smallest RSA key accepted, in bits.
const minRSA = 2048

const policyTimeout = 5 * time.Second

const refusedTime = 2 * time.Second // for a refused client to read why and leave

var (
	errKeyNotKnown = errors.New("the key is not one of this user's")
	errRefused     = errors.New("refused by policy")
)

// Algorithms in order of preference: AEAD ciphers and post-quantum key exchange first, nothing with SHA-1 or CBC.
// Strict key exchange is x/crypto's own.
var (
	keyExchanges = []string{
		ssh.KeyExchangeMLKEM768X25519, ssh.KeyExchangeCurve25519,
		"curve25519-sha256@libssh.org", ssh.KeyExchangeECDHP256, ssh.KeyExchangeECDHP384, ssh.KeyExchangeECDHP521,
	}
	ciphers = []string{
		ssh.CipherAES128GCM, ssh.CipherAES256GCM, ssh.CipherChaCha20Poly1305,
		ssh.CipherAES128CTR, ssh.CipherAES192CTR, ssh.CipherAES256CTR,
	}
	macs     = []string{ssh.HMACSHA256ETM, ssh.HMACSHA512ETM, ssh.HMACSHA256, ssh.HMACSHA512}
	userKeys = []string{
		ssh.KeyAlgoED25519, ssh.KeyAlgoSKED25519, ssh.KeyAlgoSKECDSA256,
		ssh.KeyAlgoECDSA256, ssh.KeyAlgoECDSA384, ssh.KeyAlgoECDSA521,
		ssh.KeyAlgoRSASHA512, ssh.KeyAlgoRSASHA256,
	}
)

// serverConfig is x/crypto's configuration for this connection.
func (c *conn) serverConfig(wire *lockstep) *ssh.ServerConfig {
	cfg := &ssh.ServerConfig{
		Config:                    ssh.Config{KeyExchanges: keyExchanges, Ciphers: ciphers, MACs: macs},
		PublicKeyAuthAlgorithms:   userKeys,
		MaxAuthTries:              maxOffers,
		PublicKeyCallback:         c.offer,
		VerifiedPublicKeyCallback: c.proven,
		ServerVersion:             "SSH-2.0-Sallyport",
		PreAuthConnCallback:       func(pre ssh.ServerPreAuthConn) { c.pre = pre; wire.release(); c.handshake(pre) },
		AuthLogCallback:           c.authLog,
	}
	for _, k := range c.s.HostKeys {
		cfg.AddHostKey(k)
	}
	return cfg
}

// handshake records what was negotiated, once.
func (c *conn) handshake(m ssh.ConnMetadata) {
	rec := auditlog.Handshake{
		Client: authz.Printable(string(m.ClientVersion()), 255), Server: string(m.ServerVersion()),
	}
	if am, ok := m.(ssh.AlgorithmsConnMetadata); ok {
		a := am.Algorithms()
		rec.Kex, rec.HostKey = a.KeyExchange, a.HostKey
		rec.CipherIn, rec.MACIn = a.Read.Cipher, a.Read.MAC
		rec.CipherOut, rec.MACOut = a.Write.Cipher, a.Write.MAC
	}
	c.record(0, &rec)
}

// authLog records the attempts that neither offer nor proven sees: other methods, and keys x/crypto can't take.
func (c *conn) authLog(m ssh.ConnMetadata, method string, err error) {
	if err == nil || errors.Is(err, errKeyNotKnown) || errors.Is(err, errRefused) {
		return
	}
	result := "refused"
	if method == "none" {
		result = "asked" // for the methods there are (RFC 4252, section 5.2)
	}
	c.record(0, &auditlog.Authenticate{
		User: authz.Printable(m.User(), 64), Method: authz.Printable(method, 64), Result: result,
		Reason: authz.Printable(err.Error(), 200),
	})
}

// offer answers whether a key is worth a signature: it must stand in the data for the user. The key is not proven.
func (c *conn) offer(m ssh.ConnMetadata, key ssh.PublicKey) (*ssh.Permissions, error) {
	if c.authError != nil { // requests that a client sent without waiting for answers
		return nil, errRefused
	}
	rec := auditlog.Authenticate{
		User: authz.Printable(m.User(), 64), Method: "publickey", KeyType: key.Type(), Fingerprint: ssh.FingerprintSHA256(key),
	}
	err := c.known(m.User(), key)
	if err != nil {
		rec.Result, rec.Reason = "refused", err.Error()
	} else {
		rec.Result = "accepted-offer"
	}
	if lost := c.record(0, &rec); lost != nil {
		return nil, fmt.Errorf("%w: %w", errRefused, lost)
	}
	if err != nil {
		return nil, fmt.Errorf("%w: %w", errKeyNotKnown, err)
	}
	return &ssh.Permissions{}, nil
}

func (c *conn) known(login string, key ssh.PublicKey) error {
	user, _, err := authz.ParseUser(login)
	if err != nil {
		return err
	}
	if ck, ok := key.(ssh.CryptoPublicKey); ok {
		if r, ok := ck.CryptoPublicKey().(*rsa.PublicKey); ok && r.N.BitLen() < minRSA {
			return fmt.Errorf("an RSA key of %d bits is too short: at least %d", r.N.BitLen(), minRSA)
		}
	}
	ctx, cancel := context.WithTimeout(c.ctx, policyTimeout)
	defer cancel()
	ok, err := c.s.Policy.Offer(ctx, authz.OfferInput{User: user, Source: c.source.String(), Key: authzKey(key)})
	if err != nil {
		c.s.Slog.Error("policy: offer", "connection", c.id, "error", err)
		return errors.New("policy gave no decision")
	}
	if !ok {
		return errors.New("not a key of this user")
	}
	return nil
}

func authzKey(key ssh.PublicKey) authz.Key {
	return authz.Key{
		Type: key.Type(), Fingerprint: ssh.FingerprintSHA256(key),
		Line: key.Type() + " " + base64.StdEncoding.EncodeToString(key.Marshal()),
	}
}

// proven is called when the client has signed with key. Who they are comes from nothing but this key and the name it
// was proven for.
func (c *conn) proven(m ssh.ConnMetadata, key ssh.PublicKey, p *ssh.Permissions, _ string) (*ssh.Permissions, error) {
	if c.authError != nil {
		return nil, errRefused
	}
	user, choice, err := authz.ParseUser(m.User())
	if err != nil {
		return nil, fmt.Errorf("%w: %w", errRefused, err) // offer has refused it already
	}
	if err := c.rec.Begin(); err != nil { // refused, not ended: what ends the connection would close it before the reason is told
		c.s.Slog.Error("log can't be opened", "connection", c.id, "error", err)
		return nil, c.refuse("audit-lost", &UserError{Text: "sessions can't be recorded at the moment, so none is given: tell an operator", Err: err})
	}
	c.record(0, &auditlog.Authenticate{
		User: authz.Printable(m.User(), 400), Method: "publickey", KeyType: key.Type(), Fingerprint: ssh.FingerprintSHA256(key), Result: "proven",
	})
	c.mu.Lock()
	c.login = authz.LoginInput{
		User: user, Choice: choice, Source: c.source.String(), Key: authzKey(key),
		ClientVersion: authz.Printable(string(m.ClientVersion()), 255), Gate: c.s.Gate,
	}
	c.mu.Unlock()
	d, pick, err := authz.Choose(c.login, func(in authz.LoginInput) (authz.Login, error) { return c.askLogin(c.ctx, in) })
	if err != nil {
		c.s.Slog.Error("policy: login", "connection", c.id, "error", err)
		c.record(0, &auditlog.Decision{User: user, Choice: choice, Reason: authz.Printable(err.Error(), 500)})
		return nil, c.refuse("refused", &UserError{Text: "policy gave no decision: tell an operator", Err: err})
	}
	if lost := c.recordDecision(c.login, d); lost != nil {
		return nil, fmt.Errorf("%w: %w", errRefused, lost)
	}
	if !d.Allow {
		return nil, c.refuse("refused", &UserError{Text: authz.Printable(d.Reason, 2000)})
	}
	spec, err := specOf(c.s.Gate, c.id, user, d)
	if err != nil {
		return nil, c.refuse("refused", &UserError{Text: "the profile " + d.Profile + " is not valid: tell an operator", Err: err})
	}
	// A grant may be extended while it runs: the gate watches its end, and the sandbox's own deadline is the last belt.
	spec.Owner.Expires = d.NotAfter.Add(24 * time.Hour)
	if m := narrower(c.s.Config.MaxDuration, d.Permit.MaxDuration); m > 0 {
		spec.Owner.Expires = c.started.Add(m)
	}
	if !c.s.proven(c) {
		return nil, c.refuse("refused", &UserError{Text: fmt.Sprintf(
			"%s has %d sessions, the most allowed: end one first", user, c.s.Config.MaxSessionsPerUser)})
	}
	c.mu.Lock()
	c.decision = d
	c.mu.Unlock()
	if c.s.NoData {
		c.record(0, &auditlog.Alert{Name: "data-not-recorded", Detail: "by this gate's configuration (audit.data: none)"})
	}
	if spec.Template.Target != nil {
		c.choice = newChoice(pick)
	}
	c.startSandbox(spec)
	return p, nil
}

func (c *conn) askLogin(ctx context.Context, in authz.LoginInput) (authz.Login, error) {
	ctx, cancel := context.WithTimeout(ctx, policyTimeout)
	defer cancel()
	d, err := c.s.Policy.Login(ctx, in)
	if err != nil {
		return authz.Login{}, err
	}
	if d.Allow && !time.Now().Before(d.NotAfter) {
		// Policy of one's own may forget the clock; a session without an end is none of ours.
		return authz.Login{}, errors.New("the decision allows, but its not_after is missing or past")
	}
	return d, nil
}

func (c *conn) recordDecision(in authz.LoginInput, d authz.Login) error {
	permit, err := json.Marshal(d.Permit)
	if err != nil {
		return c.record(0, &auditlog.Alert{Name: "decision", Detail: err.Error()})
	}
	return c.record(0, &auditlog.Decision{
		ID: d.ID, Revision: d.Revision, Allow: d.Allow, Reason: authz.Printable(d.Reason, 2000), User: in.User, Choice: in.Choice,
		Ticket: d.Ticket, Profile: d.Profile, NotBefore: d.NotBefore, NotAfter: d.NotAfter,
		Why: authz.Printable(d.Why, 1000), Approved: authz.Printable(d.Approved, 200), Permit: string(permit),
	})
}

// refuse tells the client in a banner why a proven key gets no session, and sees to it that the connection closes: no
// other key would fare better. Without it x/crypto lets the client try on.
func (c *conn) refuse(word string, why *UserError) error {
	c.authError = &cause{word: word, detail: why}
	c.nc.SetReadDeadline(time.Now().Add(refusedTime))
	c.s.Metrics.logins.WithLabelValues("refused").Inc()
	lines := strings.Split(why.Text, "\n")
	for i := range lines {
		lines[i] = strings.TrimRight(lines[i], " \r\t")
	}
	c.pre.SendAuthBanner("sallyport: " + strings.Join(lines, "\r\n") + "\r\n(connection " + c.id + ")\r\n")
	if cw, ok := c.nc.(interface{ CloseWrite() error }); ok {
		cw.CloseWrite() // what was sent arrives; all later writes fail, and with them the handshake
	} else {
		c.nc.Close()
	}
	return fmt.Errorf("%w: %w", errRefused, why)
}

// announceHostKeys tells an OpenSSH client all host keys, so that it learns a new one before the old one goes
// (hostkeys-00@openssh.com, OpenSSH PROTOCOL section 2.5).
func (c *conn) announceHostKeys() {
	var payload []byte
	for _, k := range c.s.HostKeys {
		payload = append(payload, ssh.Marshal(struct{ Key []byte }{k.PublicKey().Marshal()})...)
	}
	c.sc.SendRequest("hostkeys-00@openssh.com", false, payload)
}

// proveHostKeys signs for each host key that the client asks about (hostkeys-prove-00@openssh.com).
func (c *conn) proveHostKeys(payload []byte) ([]byte, bool) {
	var answer []byte
	for n := 0; len(payload) > 0; n++ {
		var m struct {
			Key  []byte
			Rest []byte `ssh:"rest"`
		}
		if n >= len(c.s.HostKeys) || ssh.Unmarshal(payload, &m) != nil {
			return nil, false
		}
		payload = m.Rest
		var sig []byte
		for _, k := range c.s.HostKeys {
			if string(k.PublicKey().Marshal()) != string(m.Key) {
				continue
			}
			data := ssh.Marshal(struct {
				What    string
				Session []byte
				Key     []byte
			}{"hostkeys-prove-00@openssh.com", c.sc.SessionID(), m.Key})
			var s *ssh.Signature
			var err error
			if as, ok := k.(ssh.AlgorithmSigner); ok && k.PublicKey().Type() == ssh.KeyAlgoRSA {
				s, err = as.SignWithAlgorithm(rand.Reader, data, ssh.KeyAlgoRSASHA512)
			} else {
				s, err = k.Sign(rand.Reader, data)
			}
			if err != nil {
				return nil, false
			}
			sig = ssh.Marshal(s)
		}
		if sig == nil {
			return nil, false
		}
		answer = append(answer, ssh.Marshal(struct{ Sig []byte }{sig})...)
	}
	return answer, true
}
