package main

import (
	"context"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"os/user"
	"strings"
	"time"

	"github.com/sallyport/sallyport/sshserver"
)

// sshd is an OpenSSH server of our own, on a port of its own.
type sshd struct {
	target
	process *process
	pub     string
}

// startSSHD starts it for the user who runs this. It has what a gate has: public keys, a shell, sftp; PAM, which a
// distribution's has too and which only costs time, is off.
func startSSHD(ctx context.Context, b *bench) (*sshd, error) {
	path, err := sshdPath()
	if err != nil {
		return nil, err
	}
	if os.Geteuid() == 0 {
		if err := b.makePrivsep("/run/sshd"); err != nil {
			return nil, err
		}
	}
	u, err := user.Current()
	if err != nil {
		return nil, err
	}
	ports, err := freePorts(1)
	if err != nil {
		return nil, err
	}
	key := b.path("sshd_ed25519_key")
	if err := sshserver.CreateKey(key); err != nil {
		return nil, err
	}
	pub, err := os.ReadFile(key + ".pub")
	if err != nil {
		return nil, err
	}
	client, err := os.ReadFile(b.path("demo", "id_ed25519.pub"))
	if err != nil {
		return nil, err
	}
	// A home with nothing of the user's in it, or their own prompt and programs would be measured.
	for _, dir := range []string{b.path("home"), b.path("home", "remote")} {
		if err := os.Mkdir(dir, 0o700); err != nil {
			return nil, err
		}
	}
	if err := os.WriteFile(b.path("authorized_keys"), client, 0o600); err != nil {
		return nil, err
	}
	sftp := "internal-sftp"
	if _, err := os.Stat("/usr/lib/openssh/sftp-server"); err == nil {
		sftp = "/usr/lib/openssh/sftp-server"
	}
	config := fmt.Sprintf(`ListenAddress 127.0.0.1:%s
HostKey %s
PidFile none
AuthorizedKeysFile %s
StrictModes no
UsePAM no
PasswordAuthentication no
KbdInteractiveAuthentication no
PermitRootLogin prohibit-password
PrintMotd no
PrintLastLog no
MaxStartups 200
SetEnv HOME=%s
LogLevel ERROR
Subsystem sftp %s
`, ports[0], key, b.path("authorized_keys"), b.path("home"), sftp)
	file := b.path("sshd_config")
	if err := os.WriteFile(file, []byte(config), 0o600); err != nil {
		return nil, err
	}
	s := &sshd{pub: string(pub), target: target{
		name: "sshd", addr: "127.0.0.1:" + ports[0], user: u.Username, data: b.path("demo", "production"), tmp: b.memory,
	}}
	s.process, err = startProcess(ctx, s.addr, b.path("sshd.stderr"), path, "-D", "-e", "-f", file)
	if err != nil {
		return nil, err
	}
	s.rest = s.settle
	s.cpu = func() (time.Duration, error) { return familyTime(s.process.pid()) }
	return s, nil
}

func (s *sshd) stop() error { return s.process.stop() }

// settle waits until no connection is left.
func (s *sshd) settle(ctx context.Context, _ *bench) error {
	ctx, cancel := context.WithTimeout(ctx, restWait)
	defer cancel()
	for {
		family, err := family(s.process.pid())
		if err != nil {
			return err
		}
		if len(family) == 1 {
			return nil
		}
		select {
		case <-ctx.Done():
			return fmt.Errorf("after %v, %d processes of sshd are left", restWait, len(family)-1)
		case <-time.After(10 * time.Millisecond):
		}
	}
}

// makePrivsep makes the directory into which sshd locks its unprivileged half; the distribution's service would.
func (b *bench) makePrivsep(dir string) error {
	err := os.Mkdir(dir, 0o755)
	if errors.Is(err, os.ErrExist) {
		return nil
	}
	b.later(func() error { return os.Remove(dir) })
	return err
}

// sshdPath is absolute: sshd executes itself for each connection.
func sshdPath() (string, error) {
	for _, dir := range append(strings.Split(os.Getenv("PATH"), ":"), "/usr/sbin", "/usr/local/sbin") {
		if path, err := exec.LookPath(dir + "/sshd"); err == nil && strings.HasPrefix(path, "/") {
			return path, nil
		}
	}
	return "", errors.New("there is no sshd: install openssh-server (make bench does)")
}
