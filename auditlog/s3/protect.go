package s3

import (
	"encoding/base64"
	"errors"
	"fmt"
	"io"
	"os"
	"strings"
	"time"

	"github.com/minio/minio-go/v7"
	"github.com/minio/minio-go/v7/pkg/encrypt"
)

// maxRetentionDays bounds a retention: a hundred years. What is locked in compliance mode nobody unlocks.
const maxRetentionDays = 36500

// Retention is the object lock that each object is put with. Without a mode the bucket's own default applies, which a
// credential that may only put can't weaken; it needs no permission more (this one needs s3:PutObjectRetention too).
type Retention struct {
	// Mode is governance or compliance. Empty: none is asked for.
	Mode string `yaml:"mode"`
	// Days is how long, from the moment at which the object is put.
	Days int `yaml:"days"`
}

func (r Retention) validate() error {
	switch {
	case r.Mode == "" && r.Days != 0:
		return errors.New("retention.mode: not set, but days are: write governance or compliance")
	case r.Mode == "":
		return nil
	case r.Mode != "governance" && r.Mode != "compliance":
		return fmt.Errorf("retention.mode: %q is none of governance, compliance", r.Mode)
	case r.Days < 1 || r.Days > maxRetentionDays:
		return fmt.Errorf("retention.days: %d is not between 1 and %d", r.Days, maxRetentionDays)
	}
	return nil
}

// set puts the lock into a request.
func (r Retention) set(opts *minio.PutObjectOptions, now time.Time) {
	if r.Mode != "" {
		opts.Mode = minio.RetentionMode(strings.ToUpper(r.Mode))
		opts.RetainUntilDate = now.AddDate(0, 0, r.Days)
	}
}

// SSE is the encryption that the server does: with the bucket's own keys the server reads the log all the same. See
// auditlog.Config.Recipients for one that it can't.
type SSE struct {
	// Type is s3 (the server's keys), kms (a key of its key service), or customer (a key that is sent with each request and
	// not kept by the server). Empty: what the bucket does by itself.
	Type string `yaml:"type"`
	// KMSKey is the key's ID with kms. Empty: the bucket's, or the account's default.
	KMSKey string `yaml:"kms_key"`
	// KeyFile holds the key with customer: 32 bytes in base64. Auditors need it too.
	KeyFile string `yaml:"key_file"`
}

func (s SSE) validate(https bool) error {
	switch {
	case s.Type != "" && s.Type != "s3" && s.Type != "kms" && s.Type != "customer":
		return fmt.Errorf("sse.type: %q is none of s3, kms, customer", s.Type)
	case s.KMSKey != "" && s.Type != "kms":
		return errors.New("sse.kms_key: only with the type kms")
	case s.KeyFile != "" && s.Type != "customer":
		return errors.New("sse.key_file: only with the type customer")
	case s.Type == "customer" && s.KeyFile == "":
		return errors.New("sse.key_file: the type customer needs one")
	case s.Type == "customer" && !https:
		return errors.New("sse.type: customer sends its key: only to an https:// endpoint")
	}
	return nil
}

// open gives what a Put asks for, and what a Get does: only the customer's key is needed to read.
func (s SSE) open() (put, get encrypt.ServerSide, err error) {
	switch s.Type {
	case "s3":
		return encrypt.NewSSE(), nil, nil
	case "kms":
		put, err = encrypt.NewSSEKMS(s.KMSKey, nil)
		return put, nil, err
	case "customer":
		key, err := s.key()
		if err != nil {
			return nil, nil, fmt.Errorf("sse.key_file: %s: %w", s.KeyFile, err)
		}
		put, err = encrypt.NewSSEC(key)
		return put, put, err
	}
	return nil, nil, nil
}

func (s SSE) key() ([]byte, error) {
	f, err := os.Open(s.KeyFile)
	if err != nil {
		return nil, err
	}
	defer f.Close()
	b, err := io.ReadAll(io.LimitReader(f, 1<<10))
	if err != nil {
		return nil, err
	}
	key, err := base64.StdEncoding.DecodeString(strings.TrimSpace(string(b)))
	if err != nil || len(key) != 32 { // the error would quote the key
		return nil, errors.New("want 32 bytes in base64 (openssl rand -base64 32)")
	}
	return key, nil
}
