package agent

import (
	"os"

	"github.com/sallyport/sallyport/agent/sftp"
)

// serveSFTP serves the file system, as this process's uid sees it, on stdin and stdout. Relative paths begin at the
// current directory.
func serveSFTP() error {
	dir, err := os.Getwd()
	if err != nil {
		dir = "/"
	}
	home := os.Getenv("HOME")
	if home == "" {
		home = dir
	}
	return sftp.Serve(os.Stdin, os.Stdout, sftp.Config{Dir: dir, Home: home})
}
