package agent

import (
	"errors"
	"io"
	"os"

	"github.com/pkg/sftp"
)

// serveSFTP serves the file system, as this process's uid sees it, on stdin and stdout. Relative paths begin at the
// current directory.
func serveSFTP() error {
	dir, err := os.Getwd()
	if err != nil {
		dir = "/"
	}
	s, err := sftp.NewServer(struct {
		io.Reader
		io.WriteCloser
	}{os.Stdin, os.Stdout}, sftp.WithServerWorkingDirectory(dir))
	if err != nil {
		return err
	}
	if err := s.Serve(); err != nil && !errors.Is(err, io.EOF) {
		return err
	}
	return nil
}
