package s3test

import (
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/pem"
	"errors"
	"math/big"
	"net"
	"os"
	"path/filepath"
	"time"
)

// The files of a server that speaks TLS, in its directory.
const (
	caFile   = "ca.pem"
	certFile = "server.pem"
	keyFile  = "server.key"
)

// certify makes an authority, and a certificate of its for 127.0.0.1, valid for a day.
func certify(dir string) (*x509.CertPool, error) {
	issuer, ca, _, err := sign(authorityTemplate(), nil, nil)
	if err != nil {
		return nil, err
	}
	authority, err := x509.ParseCertificate(ca)
	if err != nil {
		return nil, err
	}
	_, cert, key, err := sign(&x509.Certificate{
		SerialNumber: big.NewInt(2), Subject: pkix.Name{CommonName: "test server"}, IPAddresses: []net.IP{net.IPv4(127, 0, 0, 1)},
		KeyUsage: x509.KeyUsageDigitalSignature, ExtKeyUsage: []x509.ExtKeyUsage{x509.ExtKeyUsageServerAuth},
	}, authority, issuer)
	if err != nil {
		return nil, err
	}
	roots := x509.NewCertPool()
	roots.AddCert(authority)
	return roots, errors.Join(
		writePEM(filepath.Join(dir, caFile), "CERTIFICATE", ca),
		writePEM(filepath.Join(dir, certFile), "CERTIFICATE", cert),
		writePEM(filepath.Join(dir, keyFile), "PRIVATE KEY", key),
	)
}

// WriteAuthority writes the certificate of an authority that has signed nothing.
func WriteAuthority(file string) error {
	_, ca, _, err := sign(authorityTemplate(), nil, nil)
	if err != nil {
		return err
	}
	return writePEM(file, "CERTIFICATE", ca)
}

func authorityTemplate() *x509.Certificate {
	return &x509.Certificate{
		SerialNumber: big.NewInt(1), Subject: pkix.Name{CommonName: "test authority"}, IsCA: true, BasicConstraintsValid: true,
		KeyUsage: x509.KeyUsageCertSign,
	}
}

func writePEM(file, kind string, der []byte) error {
	return os.WriteFile(file, pem.EncodeToMemory(&pem.Block{Type: kind, Bytes: der}), 0o600)
}

// sign makes a key, and a certificate for it that issuer signs, or the key itself where there is none.
func sign(template, parent *x509.Certificate, issuer *ecdsa.PrivateKey) (key *ecdsa.PrivateKey, cert, pkcs8 []byte, err error) {
	if key, err = ecdsa.GenerateKey(elliptic.P256(), rand.Reader); err != nil {
		return nil, nil, nil, err
	}
	if parent == nil {
		parent, issuer = template, key
	}
	template.NotBefore, template.NotAfter = time.Now().Add(-time.Hour), time.Now().Add(24*time.Hour)
	if cert, err = x509.CreateCertificate(rand.Reader, template, parent, key.Public(), issuer); err != nil {
		return nil, nil, nil, err
	}
	pkcs8, err = x509.MarshalPKCS8PrivateKey(key)
	return key, cert, pkcs8, err
}
