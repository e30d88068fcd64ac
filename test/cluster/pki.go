package main

import (
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/base64"
	"encoding/pem"
	"fmt"
	"net"
	"time"
)

// An authority signs every certificate of the cluster. Its key is nowhere but in the process that starts it.
type authority struct {
	cert *x509.Certificate
	key  *ecdsa.PrivateKey
}

// issue makes a key and its certificate, both in PEM. Without an authority to sign it, it is one, and becomes that.
func (a *authority) issue(name, group string, hosts ...string) (cert, key []byte, err error) {
	private, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		return nil, nil, err
	}
	template := &x509.Certificate{
		Subject:     pkix.Name{CommonName: name},
		NotBefore:   time.Now().Add(-time.Hour),
		NotAfter:    time.Now().AddDate(1, 0, 0),
		KeyUsage:    x509.KeyUsageDigitalSignature,
		ExtKeyUsage: []x509.ExtKeyUsage{x509.ExtKeyUsageClientAuth, x509.ExtKeyUsageServerAuth},
	}
	if group != "" {
		template.Subject.Organization = []string{group}
	}
	for _, host := range hosts {
		if ip := net.ParseIP(host); ip != nil {
			template.IPAddresses = append(template.IPAddresses, ip)
		} else {
			template.DNSNames = append(template.DNSNames, host)
		}
	}
	if a.cert == nil {
		template.IsCA, template.BasicConstraintsValid, template.ExtKeyUsage = true, true, nil
		template.KeyUsage = x509.KeyUsageCertSign
		a.cert, a.key = template, private
	}
	der, err := x509.CreateCertificate(rand.Reader, template, a.cert, private.Public(), a.key)
	if err != nil {
		return nil, nil, err
	}
	if template.IsCA {
		if a.cert, err = x509.ParseCertificate(der); err != nil {
			return nil, nil, err
		}
	}
	key, err = encodeKey(private)
	return pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: der}), key, err
}

func encodeKey(private *ecdsa.PrivateKey) ([]byte, error) {
	der, err := x509.MarshalECPrivateKey(private)
	return pem.EncodeToMemory(&pem.Block{Type: "EC PRIVATE KEY", Bytes: der}), err
}

// writePKI writes the certificates and keys of the servers into pki, and a kubeconfig for each client.
func (c cluster) writePKI() error {
	var a authority
	ca, _, err := a.issue(node+"-ca", "")
	if err != nil {
		return err
	}
	if err := c.write("pki/ca.crt", ca); err != nil {
		return err
	}
	const kubelet = "system:node:" + node
	for _, s := range []struct {
		file, name, group string
		hosts             []string
	}{
		{"etcd", "etcd", "", []string{"127.0.0.1"}},
		{"apiserver", "kube-apiserver", "", []string{nodeIP, serviceIP, "kubernetes", "kubernetes.default",
			"kubernetes.default.svc", "kubernetes.default.svc.cluster.local"}},
		{"apiserver-kubelet", "kube-apiserver", "system:masters", nil}, // what it shows the kubelet, for exec and logs
		{"kubelet-server", kubelet, "system:nodes", []string{node, nodeIP}},
	} {
		cert, key, err := a.issue(s.name, s.group, s.hosts...)
		if err != nil {
			return err
		}
		if err := c.write("pki/"+s.file+".crt", cert); err != nil {
			return err
		}
		if err := c.write("pki/"+s.file+".key", key); err != nil {
			return err
		}
	}
	private, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		return err
	}
	key, err := encodeKey(private)
	if err != nil {
		return err
	}
	if err := c.write("pki/service-accounts.key", key); err != nil {
		return err
	}
	for _, u := range []struct{ file, name, group string }{
		{"admin", "admin", "system:masters"},
		{"kubelet", kubelet, "system:nodes"},
		{"kube-controller-manager", "system:kube-controller-manager", ""},
		{"kube-scheduler", "system:kube-scheduler", ""},
		{"kube-proxy", "system:kube-proxy", ""},
	} {
		cert, key, err := a.issue(u.name, u.group)
		if err != nil {
			return err
		}
		b64 := base64.StdEncoding.EncodeToString
		text := fmt.Sprintf(`apiVersion: v1
kind: Config
current-context: %[1]s
contexts:
- {name: %[1]s, context: {cluster: %[1]s, user: %[2]s}}
clusters:
- {name: %[1]s, cluster: {server: "%[3]s", certificate-authority-data: %[4]s}}
users:
- {name: %[2]s, user: {client-certificate-data: %[5]s, client-key-data: %[6]s}}
`, node, u.file, apiURL, b64(ca), b64(cert), b64(key))
		if err := c.write(u.file+".kubeconfig", []byte(text)); err != nil {
			return err
		}
	}
	return nil
}
