package agent

import (
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
)

// installedName is what an installed agent's file is called.
const installedName = "agent"

// install copies this program's own file into a directory, where nobody can read it: a process that executes an unreadable
// file can't be traced from its first instruction on.
func install(dir string) (err error) {
	from, err := os.Open(self)
	if err != nil {
		return fmt.Errorf("read the agent: %w", err)
	}
	defer from.Close()
	to, err := os.CreateTemp(dir, ".new-")
	if err != nil {
		return fmt.Errorf("write the agent: %w", err)
	}
	defer func() {
		if err != nil {
			os.Remove(to.Name())
		}
	}()
	_, err = io.Copy(to, from)
	if err == nil {
		err = to.Chmod(0o111)
	}
	err = errors.Join(err, to.Close())
	if err == nil {
		err = os.Rename(to.Name(), filepath.Join(dir, installedName)) // whole or not at all
	}
	if err != nil {
		return fmt.Errorf("write the agent: %w", err)
	}
	return nil
}
