package docker

import (
	"context"
	"crypto/sha256"
	"encoding/hex"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strings"
)

// Below the state directory.
const (
	agentDir   = "agent"
	runDir     = "run"
	scratchDir = "scratch"
	hostsFile  = "hosts" // of sandboxes without a network
	agentName  = "sallyport-agent"
	socketName = "gate"
)

// agentLimit bounds the agent's file; ours has 5 MB.
const agentLimit = 64 << 20

// agentFile is the agent, and its SHA-256.
type agentFile struct {
	content []byte // nil once it is installed where only this gate can remove it
	hash    string
}

func readAgent(source string) (agentFile, error) {
	info, err := os.Stat(source)
	if err != nil {
		return agentFile{}, err
	}
	if !info.Mode().IsRegular() || info.Size() > agentLimit {
		return agentFile{}, fmt.Errorf("%s is not the agent", source)
	}
	b, err := os.ReadFile(source)
	if err != nil {
		return agentFile{}, err
	}
	if !strings.HasPrefix(string(b), "\x7fELF") {
		return agentFile{}, fmt.Errorf("%s is not an executable", source)
	}
	hash := sha256.Sum256(b)
	return agentFile{b, hex.EncodeToString(hash[:])}, nil
}

// installAgent copies the agent to dir, under its hash, and returns the copy's path. The copy can be executed but read
// by nobody: a process that executes an unreadable file can't be traced from its first instruction on.
func installAgent(a agentFile, dir string) (string, error) {
	home := filepath.Join(dir, a.hash)
	if err := os.MkdirAll(home, 0o700); err != nil {
		return "", err
	}
	// Always anew: a crash may have left anything, and it can't be read to see. Running sandboxes keep the old file.
	f, err := os.CreateTemp(home, "new-")
	if err != nil {
		return "", err
	}
	_, err = f.Write(a.content)
	if err == nil {
		err = f.Chmod(0o111)
	}
	if err == nil {
		err = f.Sync()
	}
	if cerr := f.Close(); err == nil {
		err = cerr
	}
	to := filepath.Join(home, agentName)
	if err == nil {
		err = os.Rename(f.Name(), to)
	}
	if err != nil {
		return "", errors.Join(err, os.Remove(f.Name()))
	}
	return to, nil
}

// pruneAgents removes what there is of other versions. Running sandboxes keep theirs.
func (b *Backend) pruneAgents(ctx context.Context) error {
	if b.relay {
		return b.pruneVolumes(ctx)
	}
	return pruneCopies(b.agent)
}

func pruneCopies(current string) error {
	home := filepath.Dir(current)
	entries, err := os.ReadDir(filepath.Dir(home))
	if err != nil {
		return err
	}
	var errs []error
	for _, e := range entries {
		if e.Name() != filepath.Base(home) {
			errs = append(errs, os.RemoveAll(filepath.Join(filepath.Dir(home), e.Name())))
		}
	}
	return errors.Join(errs...)
}
