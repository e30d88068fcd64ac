package test

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"time"

	"github.com/minio/minio-go/v7"
	"github.com/rogpeppe/go-internal/testscript"

	"github.com/sallyport/sallyport/auditlog/s3/s3test"
	"github.com/sallyport/sallyport/test/ports"
)

// condition: [s3] there is an S3 server to start, [postgres] a PostgreSQL server. Where there must be one, its absence is an
// error.
func condition(cond string) (bool, error) {
	switch cond {
	case "s3":
		return hasS3()
	case "kubernetes":
		return onKubernetes, nil
	case "postgres":
		return hasPostgres()
	}
	return false, fmt.Errorf("unknown condition %q", cond)
}

func hasS3() (bool, error) {
	_, err := os.Stat(os.Getenv(s3test.BinaryEnv))
	if err != nil && os.Getenv(s3test.RequireEnv) != "" {
		return false, s3test.ErrNoBinary
	}
	return err == nil, nil
}

// cmdS3: s3 start | stop | run | forbidden FILE: an S3 server with the bucket "evidence". start sets S3_ENDPOINT, writes
// the files putter and reader, a credential each, and sets MONITOR to a free address. forbidden tries with the putter's
// all that it may not do, with the object that FILE names.
func cmdS3(ts *testscript.TestScript, neg bool, args []string) {
	s := get(ts)
	switch {
	case len(args) == 1 && args[0] == "start":
		server, err := s3test.Start(filepath.Join(s.dir, "s3"))
		ts.Check(err)
		ts.Defer(func() { server.Stop() })
		s.s3 = server
		ts.Setenv("S3_ENDPOINT", server.Endpoint())
		ts.Check(errors.Join(s3test.Putter.WriteCredentials(ts.MkAbs("putter")), s3test.Reader.WriteCredentials(ts.MkAbs("reader"))))
		port, err := ports.Take()
		ts.Check(err)
		ts.Setenv("MONITOR", fmt.Sprintf("127.0.0.1:%d", port))
	case len(args) == 1 && args[0] == "stop" && s.s3 != nil:
		ts.Check(s.s3.Stop())
	case len(args) == 1 && args[0] == "run" && s.s3 != nil:
		ts.Check(s.s3.Run())
	case len(args) == 2 && args[0] == "forbidden" && s.s3 != nil:
		s.forbidden(ts, strings.TrimSpace(ts.ReadFile(args[1])))
	default:
		ts.Fatalf("usage: s3 start | stop | run | forbidden FILE")
	}
}

func (s *state) forbidden(ts *testscript.TestScript, object string) {
	ctx, cancel := context.WithTimeout(context.Background(), 20*time.Second)
	defer cancel()
	client, done, err := s.s3.Client(s3test.Putter)
	ts.Check(err)
	defer done()
	var list error
	for o := range client.ListObjectsIter(ctx, s3test.Bucket, minio.ListObjectsOptions{Recursive: true}) {
		list = o.Err
		break
	}
	_, stat := client.StatObject(ctx, s3test.Bucket, object, minio.StatObjectOptions{})
	get, err := client.GetObject(ctx, s3test.Bucket, object, minio.GetObjectOptions{})
	if err == nil {
		_, err = get.Read(make([]byte, 1))
	}
	noOverwrite := minio.PutObjectOptions{}
	noOverwrite.SetMatchETagExcept("*")
	_, elsewhere := client.PutObject(ctx, s3test.Bucket, "elsewhere", strings.NewReader("x"), 1, noOverwrite)
	for what, err := range map[string]error{
		"list": list, "stat": stat, "get": err, "put elsewhere": elsewhere,
		"remove":        client.RemoveObject(ctx, s3test.Bucket, object, minio.RemoveObjectOptions{}),
		"remove bucket": client.RemoveBucket(ctx, s3test.Bucket),
	} {
		if code := minio.ToErrorResponse(err).StatusCode; code != 403 {
			ts.Fatalf("s3 forbidden: %s: %v", what, err)
		}
	}
}
