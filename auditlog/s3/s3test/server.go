// Package s3test runs a real S3 server for tests: versitygw on a loopback port, with a bucket, a credential that can
// only put, and one that can only read.
package s3test

import (
	"context"
	"crypto/tls"
	"crypto/x509"
	"errors"
	"fmt"
	"net"
	"net/http"
	"os"
	"os/exec"
	"path/filepath"
	"time"

	"github.com/minio/minio-go/v7"
	"github.com/minio/minio-go/v7/pkg/credentials"

	"github.com/sallyport/sallyport/test/ports"
)

// The environment: where the server's binary is, and that tests may not be skipped for want of it.
const (
	BinaryEnv  = "SALLYPORT_TEST_VERSITYGW"
	RequireEnv = "SALLYPORT_REQUIRE_S3"
)

// Bucket is the bucket that Start makes.
const Bucket = "evidence"

// Prefix is the one below which the users of Start may do what they may.
const Prefix = "logs"

// User is an account of the server.
type User struct{ AccessKey, SecretKey string }

// The accounts. Putter may s3:PutObject below Prefix, Reader s3:GetObject below it and s3:ListBucket, Both what those two
// may, Root all.
var (
	Root   = User{"test-root", "test-root-secret"}
	Putter = User{"test-putter", "test-putter-secret"}
	Reader = User{"test-reader", "test-reader-secret"}
	Both   = User{"test-both", "test-both-secret"}
)

const policy = `{"Version": "2012-10-17", "Statement": [
 {"Effect": "Allow", "Principal": {"AWS": ["test-putter", "test-both"]}, "Action": ["s3:PutObject"], "Resource": ["arn:aws:s3:::evidence/logs/*"]},
 {"Effect": "Allow", "Principal": {"AWS": ["test-reader", "test-both"]}, "Action": ["s3:GetObject"], "Resource": ["arn:aws:s3:::evidence/logs/*"]},
 {"Effect": "Allow", "Principal": {"AWS": ["test-reader", "test-both"]}, "Action": ["s3:ListBucket"], "Resource": ["arn:aws:s3:::evidence"]}]}`

// ErrNoBinary says that BinaryEnv names no binary.
var ErrNoBinary = errors.New(BinaryEnv + " names no versitygw (make test builds one)")

// Server is a running server, or one that was stopped and can be run again.
type Server struct {
	binary, dir, addr string
	roots             *x509.CertPool // what has signed its certificate; nil: it speaks no TLS
	locked            bool           // objects are versioned and may be locked
	domain            string         // below which buckets are hosts; "": none
	cmd               *exec.Cmd
	gone              chan struct{}
}

// Start starts a server whose data lie in dir, and makes bucket and users. Stop it.
func Start(dir string) (*Server, error) { return start(&Server{dir: dir}) }

// StartLocked starts one whose bucket has versions and object lock.
func StartLocked(dir string) (*Server, error) { return start(&Server{dir: dir, locked: true}) }

// StartDomain starts one whose buckets are hosts below a domain as well: BUCKET.DOMAIN.
func StartDomain(dir, domain string) (*Server, error) {
	return start(&Server{dir: dir, domain: domain})
}

// StartTLS starts one that speaks TLS, with a certificate for 127.0.0.1 of an authority made for it; see CAFile.
func StartTLS(dir string) (*Server, error) {
	if err := os.MkdirAll(dir, 0o700); err != nil {
		return nil, err
	}
	roots, err := certify(dir)
	if err != nil {
		return nil, fmt.Errorf("certify: %w", err)
	}
	return start(&Server{dir: dir, roots: roots})
}

func start(s *Server) (*Server, error) {
	binary := os.Getenv(BinaryEnv)
	if info, err := os.Stat(binary); binary == "" || err != nil || info.IsDir() {
		return nil, ErrNoBinary
	}
	port, err := ports.Take()
	if err != nil {
		return nil, err
	}
	s.binary, s.addr = binary, fmt.Sprintf("127.0.0.1:%d", port)
	for _, d := range []string{"data", "iam", "sidecar", "versions"} {
		if err := os.MkdirAll(filepath.Join(s.dir, d), 0o700); err != nil {
			return nil, err
		}
	}
	if err := s.Run(); err != nil {
		return nil, err
	}
	if err := s.setUp(); err != nil {
		return nil, errors.Join(err, s.Stop())
	}
	return s, nil
}

// Endpoint is the server's URL.
func (s *Server) Endpoint() string {
	if s.roots != nil {
		return "https://" + s.addr
	}
	return "http://" + s.addr
}

// Addr is where it listens, host:port.
func (s *Server) Addr() string { return s.addr }

// Dir is the directory in which the server keeps what lies below a prefix of the bucket.
func (s *Server) Dir(prefix string) string {
	return filepath.Join(s.dir, "data", Bucket, filepath.FromSlash(prefix))
}

// CAFile holds the certificate of the authority that has signed the server's. It exists if it was started by StartTLS.
func (s *Server) CAFile() string { return filepath.Join(s.dir, caFile) }

// Run runs the server, again after Stop, and waits until it answers.
func (s *Server) Run() error {
	log, err := os.OpenFile(filepath.Join(s.dir, "server.log"), os.O_CREATE|os.O_APPEND|os.O_WRONLY, 0o600)
	if err != nil {
		return err
	}
	defer log.Close()
	args := []string{"--port", s.addr, "--iam-dir", filepath.Join(s.dir, "iam"), "--keep-alive"}
	if s.roots != nil {
		args = append(args, "--cert", filepath.Join(s.dir, certFile), "--key", filepath.Join(s.dir, keyFile))
	}
	if s.domain != "" {
		args = append(args, "--virtual-domain", s.domain)
	}
	args = append(args, "posix", "--sidecar", filepath.Join(s.dir, "sidecar"))
	if s.locked {
		args = append(args, "--versioning-dir", filepath.Join(s.dir, "versions"))
	}
	args = append(args, filepath.Join(s.dir, "data"))
	cmd := exec.Command(s.binary, args...)
	cmd.Env = append(os.Environ(), "ROOT_ACCESS_KEY="+Root.AccessKey, "ROOT_SECRET_KEY="+Root.SecretKey)
	cmd.Stdout, cmd.Stderr = log, log
	if err := cmd.Start(); err != nil {
		return err
	}
	s.cmd, s.gone = cmd, make(chan struct{})
	go func(gone chan struct{}) {
		_ = cmd.Wait() // how it ended is in its log
		close(gone)
	}(s.gone)
	for end := time.Now().Add(20 * time.Second); time.Now().Before(end); time.Sleep(10 * time.Millisecond) {
		if nc, err := net.Dial("tcp", s.addr); err == nil {
			return nc.Close()
		}
		select {
		case <-s.gone:
			b, _ := os.ReadFile(filepath.Join(s.dir, "server.log"))
			return fmt.Errorf("versitygw ended: %s", b)
		default:
		}
	}
	return errors.Join(errors.New("versitygw does not answer"), s.Stop())
}

// Stop kills the server, as a failing machine would; its data stay.
func (s *Server) Stop() error {
	if s.cmd == nil {
		return nil
	}
	err := s.cmd.Process.Kill()
	if errors.Is(err, os.ErrProcessDone) {
		err = nil
	}
	<-s.gone
	s.cmd = nil
	return err
}

func (s *Server) setUp() error {
	ctx, cancel := context.WithTimeout(context.Background(), 20*time.Second)
	defer cancel()
	client, done, err := s.Client(Root)
	if err != nil {
		return err
	}
	defer done()
	if err := client.MakeBucket(ctx, Bucket, minio.MakeBucketOptions{ObjectLocking: s.locked}); err != nil {
		return fmt.Errorf("make bucket: %w", err)
	}
	for _, u := range []User{Putter, Reader, Both} {
		cmd := exec.CommandContext(ctx, s.binary, "admin", "--allow-insecure", "--endpoint-url", s.Endpoint(), "--access", Root.AccessKey,
			"--secret", Root.SecretKey, "create-user", "--access", u.AccessKey, "--secret", u.SecretKey, "--role", "user")
		if out, err := cmd.CombinedOutput(); err != nil {
			return fmt.Errorf("make user %s: %w: %s", u.AccessKey, err, out)
		}
	}
	if err := client.SetBucketPolicy(ctx, Bucket, policy); err != nil {
		return fmt.Errorf("set policy: %w", err)
	}
	return nil
}

// Client gives a client of a user's. Call done when it is not used any more.
func (s *Server) Client(u User) (client *minio.Client, done func(), err error) {
	transport := &http.Transport{TLSClientConfig: &tls.Config{RootCAs: s.roots}}
	client, err = minio.New(s.addr, &minio.Options{
		Secure: s.roots != nil, Creds: credentials.NewStaticV4(u.AccessKey, u.SecretKey, ""), Region: "us-east-1", Transport: transport, MaxRetries: 1})
	return client, transport.CloseIdleConnections, err
}

// WriteCredentials writes a file as AWS's tools have it.
func (u User) WriteCredentials(file string) error {
	return os.WriteFile(file, fmt.Appendf(nil, "[default]\naws_access_key_id = %s\naws_secret_access_key = %s\n",
		u.AccessKey, u.SecretKey), 0o600)
}
