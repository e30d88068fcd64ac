// Package s3 keeps an audit log's segments in an S3 bucket: as a store for the gate, whose credential needs s3:PutObject
// on the prefix and nothing else, and as a source for auditors, whose credential needs s3:GetObject and s3:ListBucket.
package s3

import (
	"context"
	"crypto/tls"
	"crypto/x509"
	"errors"
	"fmt"
	"io/fs"
	"net"
	"net/http"
	"net/netip"
	"net/url"
	"os"
	"regexp"
	"strings"
	"time"

	"github.com/minio/minio-go/v7"
	"github.com/minio/minio-go/v7/pkg/credentials"
	"github.com/minio/minio-go/v7/pkg/encrypt"
)

const (
	dialTimeout = 10 * time.Second
	// stallTimeout ends a connection on which no byte went or came for so long. Answers to a Put are waited for no longer.
	stallTimeout = time.Minute
)

// Config says where a bucket is and with which credential it is used.
type Config struct {
	// Bucket is the bucket's name. Required; the bucket must exist.
	Bucket string `yaml:"bucket"`
	// Prefix is put, with a slash, before the names of all objects. Empty: none.
	Prefix string `yaml:"prefix"`
	// Region is the bucket's. Default us-east-1, which servers other than AWS mostly take.
	Region string `yaml:"region"`
	// Endpoint is the server's URL, https://HOST[:PORT]. Empty: AWS's of the region.
	Endpoint string `yaml:"endpoint"`
	// Lookup says where the bucket's name stands in a URL: path, dns, or auto (dns at AWS, else path). Default auto.
	Lookup string `yaml:"lookup"`
	// CAFile holds the certificates (PEM) that may have signed the server's. Empty: those of the system.
	CAFile string `yaml:"ca_file"`
	// CredentialsFile is a file in the format of AWS's shared credentials ([default], aws_access_key_id,
	// aws_secret_access_key). It is read for each request, so it can be replaced. Empty: the environment's
	// AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY; without these, the file that AWS_SHARED_CREDENTIALS_FILE names.
	CredentialsFile string `yaml:"credentials_file"`
	// Credentials is role for a credential of the machine's or the pod's role, which is fetched and renewed: by web identity
	// (AWS_WEB_IDENTITY_TOKEN_FILE and AWS_ROLE_ARN in the environment, as IRSA sets them), from a container's agent
	// (AWS_CONTAINER_CREDENTIALS_FULL_URI or _RELATIVE_URI, as EKS Pod Identity and ECS set them), else from EC2's metadata
	// service. Empty: a file or the environment, as below.
	Credentials string `yaml:"credentials"`
	// RoleEndpoint is the URL of the token service or of the metadata service. Empty: AWS's.
	RoleEndpoint string `yaml:"role_endpoint"`
	// Profile is the section of the credentials' file. Default: the environment's AWS_PROFILE, or default.
	Profile string `yaml:"profile"`
	// Insecure permits an http:// endpoint on another machine: whoever is between can read the log. Default false.
	Insecure bool `yaml:"insecure"`
	// Retention locks each object that is put.
	Retention Retention `yaml:"retention"`
	// SSE is the encryption that the server does.
	SSE SSE `yaml:"sse"`
}

// WithDefaults gives the configuration with its unset values set.
func (c Config) WithDefaults() Config {
	if c.Region == "" {
		c.Region = "us-east-1"
	}
	if c.Endpoint == "" {
		c.Endpoint = "https://s3." + c.Region + ".amazonaws.com"
	}
	if c.Lookup == "" {
		c.Lookup = "auto"
	}
	c.Prefix = strings.TrimSuffix(c.Prefix, "/")
	return c
}

var (
	bucketName = regexp.MustCompile(`^[a-z0-9][a-z0-9.-]{1,61}[a-z0-9]$`)
	regionName = regexp.MustCompile(`^[a-z0-9-]{1,64}$`)
)

// Validate says what is wrong with a configuration; call it after WithDefaults.
func (c Config) Validate() error {
	switch {
	case c.Bucket == "":
		return errors.New("bucket: not set")
	case !bucketName.MatchString(c.Bucket):
		return fmt.Errorf("bucket: %q is no name for a bucket", c.Bucket)
	case c.Prefix != "" && !validName(c.Prefix):
		return fmt.Errorf("prefix: %q: want names with slashes between them, none of which begins with a dot", c.Prefix)
	case !regionName.MatchString(c.Region):
		return fmt.Errorf("region: %q is no name for a region", c.Region)
	case c.Lookup != "auto" && c.Lookup != "path" && c.Lookup != "dns":
		return fmt.Errorf("lookup: %q is none of auto, path, dns", c.Lookup)
	}
	u, err := c.endpoint()
	if err != nil {
		return err
	}
	if err := c.validateRole(); err != nil {
		return err
	}
	if err := c.Retention.validate(); err != nil {
		return err
	}
	if err := c.SSE.validate(u.Scheme == "https"); err != nil {
		return err
	}
	if u.Scheme == "http" && !c.Insecure && !loopback(u.Hostname()) {
		return fmt.Errorf("endpoint: %q would send the log in the clear: write https, or set insecure", c.Endpoint)
	}
	return nil
}

func (c Config) endpoint() (*url.URL, error) {
	u, err := url.Parse(c.Endpoint)
	if err != nil || u.Scheme != "https" && u.Scheme != "http" || u.Host == "" || strings.Trim(u.Path, "/") != "" ||
		u.RawQuery != "" || u.User != nil || u.Fragment != "" {
		return nil, fmt.Errorf("endpoint: %q: want https://HOST[:PORT]", c.Endpoint)
	}
	return u, nil
}

func loopback(host string) bool {
	a, err := netip.ParseAddr(host)
	return host == "localhost" || err == nil && a.IsLoopback()
}

// ParseURL takes s3://BUCKET[/PREFIX] apart.
func ParseURL(s string) (bucket, prefix string, err error) {
	rest, ok := strings.CutPrefix(s, "s3://")
	bucket, prefix, _ = strings.Cut(rest, "/")
	if !ok || !bucketName.MatchString(bucket) {
		return "", "", fmt.Errorf("%q: want s3://BUCKET/PREFIX", s)
	}
	return bucket, strings.Trim(prefix, "/"), nil
}

// validName keeps names such that every store and every file system can hold them.
func validName(name string) bool {
	return fs.ValidPath(name) && name != "." && !strings.HasPrefix(name, ".") && !strings.Contains(name, "/.") &&
		!strings.ContainsAny(name, "\\:")
}

// bucket is a bucket that can be asked.
type bucket struct {
	core      *minio.Core
	creds     *credentials.Credentials
	ssePut    encrypt.ServerSide // nil: none is asked for
	sseGet    encrypt.ServerSide // what a Get must send; nil: nothing
	transport *http.Transport
	name      string
	prefix    string // with a slash at its end, or empty
}

// open makes a client. It dials nothing.
func open(c Config, stall time.Duration) (*bucket, error) {
	c = c.WithDefaults()
	if err := c.Validate(); err != nil {
		return nil, err
	}
	u, err := c.endpoint()
	if err != nil {
		return nil, err
	}
	tlsConfig := &tls.Config{MinVersion: tls.VersionTLS12}
	if c.CAFile != "" {
		pem, err := os.ReadFile(c.CAFile)
		if err != nil {
			return nil, fmt.Errorf("ca_file: %w", err)
		}
		tlsConfig.RootCAs = x509.NewCertPool()
		if !tlsConfig.RootCAs.AppendCertsFromPEM(pem) {
			return nil, fmt.Errorf("ca_file: %s holds no certificate", c.CAFile)
		}
	}
	creds, err := c.credentials()
	if err != nil {
		return nil, err
	}
	ssePut, sseGet, err := c.SSE.open()
	if err != nil {
		return nil, err
	}
	dialer := &net.Dialer{Timeout: dialTimeout}
	transport := &http.Transport{
		Proxy:           http.ProxyFromEnvironment,
		TLSClientConfig: tlsConfig,
		DialContext: func(ctx context.Context, network, addr string) (net.Conn, error) {
			nc, err := dialer.DialContext(ctx, network, addr)
			if err != nil {
				return nil, err
			}
			return &stallingConn{Conn: nc, limit: stall}, nil
		},
		TLSHandshakeTimeout:    dialTimeout,
		ResponseHeaderTimeout:  stall,
		MaxIdleConnsPerHost:    8,
		IdleConnTimeout:        stall / 2,
		MaxResponseHeaderBytes: 64 << 10,
		DisableCompression:     true,
	}
	core, err := minio.NewCore(u.Host, &minio.Options{
		Creds: creds, Secure: u.Scheme == "https", Transport: explainer{transport, c.CAFile}, Region: c.Region,
		BucketLookup: map[string]minio.BucketLookupType{"auto": minio.BucketLookupAuto, "path": minio.BucketLookupPath,
			"dns": minio.BucketLookupDNS}[c.Lookup],
		MaxRetries: 1, // who calls retries, and waits between tries
	})
	if err != nil {
		return nil, err
	}
	b := &bucket{core: core, creds: creds, ssePut: ssePut, sseGet: sseGet, transport: transport, name: c.Bucket}
	if c.Prefix != "" {
		b.prefix = c.Prefix + "/"
	}
	return b, nil
}

// explainer says what to do about a certificate that is not trusted.
type explainer struct {
	*http.Transport
	caFile string
}

func (e explainer) RoundTrip(r *http.Request) (*http.Response, error) {
	response, err := e.Transport.RoundTrip(r)
	var authority x509.UnknownAuthorityError
	var name x509.HostnameError
	switch {
	case errors.As(err, &authority) && e.caFile == "":
		err = fmt.Errorf("the server's certificate is signed by no authority that this system knows: "+
			"name a file with the certificate of the one that has signed it (ca_file, or --ca-file): %w", err)
	case errors.As(err, &authority):
		err = fmt.Errorf("the server's certificate is signed by none of those in %s (ca_file): "+
			"put the one there that has signed it: %w", e.caFile, err)
	case errors.As(err, &name):
		err = fmt.Errorf("the server's certificate is not for this name: write the endpoint as the certificate has it: %w", err)
	}
	return response, err
}

// credentials finds the credential, and fails if there is none: an anonymous request is never meant.
func (c Config) credentials() (*credentials.Credentials, error) {
	if c.Credentials == credentialsRole {
		return c.role(), nil
	}
	file := c.CredentialsFile
	if file == "" && (os.Getenv("AWS_ACCESS_KEY_ID") == "" || os.Getenv("AWS_SECRET_ACCESS_KEY") == "") {
		if file = os.Getenv("AWS_SHARED_CREDENTIALS_FILE"); file == "" {
			return nil, errors.New("no credential: name a file that has one, or set AWS_ACCESS_KEY_ID and " +
				"AWS_SECRET_ACCESS_KEY in the environment")
		}
	}
	creds := credentials.NewEnvAWS()
	if file != "" {
		creds = credentials.NewFileAWSCredentials(file, c.Profile)
	}
	v, err := creds.GetWithContext(nil)
	switch {
	case err != nil && file != "":
		return nil, fmt.Errorf("credentials_file: %s: %w", file, err)
	case err != nil:
		return nil, fmt.Errorf("credential of the environment: %w", err)
	case v.AccessKeyID == "" || v.SecretAccessKey == "":
		return nil, fmt.Errorf("credentials_file: %s: no aws_access_key_id and aws_secret_access_key in the profile", file)
	}
	return creds, nil
}

// credentialsRole is the value of Config.Credentials for a role's.
const credentialsRole = "role"

func (c Config) validateRole() error {
	switch {
	case c.Credentials != "" && c.Credentials != credentialsRole:
		return fmt.Errorf("credentials: %q: want role, or nothing", c.Credentials)
	case c.Credentials == credentialsRole && c.CredentialsFile != "":
		return errors.New("credentials: role, and a credentials_file: write one of them")
	case c.Credentials == "" && c.RoleEndpoint != "":
		return errors.New("role_endpoint: only with credentials: role")
	case c.RoleEndpoint != "":
		if u, err := url.Parse(c.RoleEndpoint); err != nil || u.Scheme != "https" && u.Scheme != "http" || u.Host == "" {
			return fmt.Errorf("role_endpoint: %q: want a URL", c.RoleEndpoint)
		}
	}
	return nil
}

// role fetches nothing yet: a service that is away shall not keep a gate from starting.
func (c Config) role() *credentials.Credentials {
	return credentials.New(&credentials.IAM{Client: &http.Client{Timeout: roleTimeout}, Endpoint: c.RoleEndpoint, Region: c.Region})
}

// roleTimeout bounds one request for a role's credential.
const roleTimeout = 10 * time.Second

// renew makes the next request fetch the credential anew, if the server says that this one is none any more.
func (b *bucket) renew(err error) {
	switch code(err) {
	case "ExpiredToken", "ExpiredTokenException", "TokenRefreshRequired", "InvalidToken", "InvalidAccessKeyId", "SignatureDoesNotMatch":
		b.creds.Expire()
	}
}

// code is the error code of S3, "" if err is not an answer of the server.
func code(err error) string {
	var e minio.ErrorResponse
	if !errors.As(err, &e) {
		return ""
	}
	return e.Code
}

// stallingConn ends reads and writes on which nothing moves. net/http has no such limit for a body.
type stallingConn struct {
	net.Conn
	limit time.Duration
}

func (c *stallingConn) Read(p []byte) (int, error) {
	if err := c.SetReadDeadline(time.Now().Add(c.limit)); err != nil {
		return 0, err
	}
	return c.Conn.Read(p)
}

func (c *stallingConn) Write(p []byte) (int, error) {
	if err := c.SetWriteDeadline(time.Now().Add(c.limit)); err != nil {
		return 0, err
	}
	return c.Conn.Write(p)
}
