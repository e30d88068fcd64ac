package test

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"os/user"
	"path/filepath"
	"strconv"
	"syscall"
	"time"

	"github.com/rogpeppe/go-internal/testscript"
)

// requirePostgres is the environment's word that scripts with a PostgreSQL server may not be skipped.
const requirePostgres = "SALLYPORT_REQUIRE_POSTGRES"

// postgresBinary finds a program of PostgreSQL's server; Debian keeps them off the path, by version.
func postgresBinary(name string) (string, error) {
	if p, err := exec.LookPath(name); err == nil {
		return filepath.EvalSymlinks(p)
	}
	all, err := filepath.Glob("/usr/lib/postgresql/*/bin/" + name)
	if err != nil || len(all) == 0 {
		return "", fmt.Errorf("there is no %s: install Debian's package postgresql (make test does)", name)
	}
	return all[len(all)-1], nil
}

func hasPostgres() (bool, error) {
	_, err := postgresBinary("postgres")
	if err != nil && os.Getenv(requirePostgres) != "" {
		return false, err
	}
	return err == nil, nil
}

// cmdPostgres: postgres start FILE: a PostgreSQL server on a unix socket alone, whose superuser alice has the password that
// stands in FILE. It sets PGSOCKETS to the socket's directory. It runs as Debian's user postgres where we are root, which it
// refuses to be, and ends with the script.
func cmdPostgres(ts *testscript.TestScript, neg bool, args []string) {
	if len(args) != 2 || args[0] != "start" || neg {
		ts.Fatalf("usage: postgres start FILE")
	}
	// Not the script's own directory, which others can't enter.
	dir, err := os.MkdirTemp("", "sallyport-postgres-")
	ts.Check(err)
	ts.Defer(func() { os.RemoveAll(dir) })
	as := &syscall.SysProcAttr{}
	if os.Getuid() == 0 {
		u, err := user.Lookup("postgres")
		ts.Check(err)
		uid, err1 := strconv.ParseUint(u.Uid, 10, 32)
		gid, err2 := strconv.ParseUint(u.Gid, 10, 32)
		ts.Check(errors.Join(err1, err2, os.Chown(dir, int(uid), int(gid))))
		as.Credential = &syscall.Credential{Uid: uint32(uid), Gid: uint32(gid)}
	}
	ts.Check(os.Chmod(dir, 0o755)) // a sandbox's user connects
	password, data := filepath.Join(dir, "password"), filepath.Join(dir, "data")
	ts.Check(os.WriteFile(password, []byte(ts.ReadFile(args[1])), 0o644))

	initdb, err := postgresBinary("initdb")
	ts.Check(err)
	ctx, cancel := context.WithTimeout(context.Background(), time.Minute)
	defer cancel()
	cmd := exec.CommandContext(ctx, initdb, "--pgdata", data, "--username", "alice", "--pwfile", password,
		"--auth-local", "scram-sha-256", "--auth-host", "reject", "--no-sync", "--no-locale", "--encoding", "UTF8")
	cmd.Dir, cmd.SysProcAttr = dir, as
	if out, err := cmd.CombinedOutput(); err != nil {
		ts.Fatalf("initdb: %v\n%s", err, out)
	}
	sockets := filepath.Join(dir, "sockets")
	ts.Check(os.Mkdir(sockets, 0o755))
	if as.Credential != nil {
		ts.Check(os.Chown(sockets, int(as.Credential.Uid), int(as.Credential.Gid)))
	}
	ts.Check(startPostgres(ts, dir, sockets, as))
	ts.Setenv("PGSOCKETS", sockets)
}

// startPostgres starts the server and waits until it takes connections.
func startPostgres(ts *testscript.TestScript, dir, sockets string, as *syscall.SysProcAttr) error {
	binary, err := postgresBinary("postgres")
	if err != nil {
		return err
	}
	var log bytes.Buffer
	cmd := exec.Command(binary, "-D", filepath.Join(dir, "data"), "-c", "listen_addresses=", "-c", "unix_socket_directories="+sockets,
		"-c", "fsync=off", "-c", "max_connections=10", "-c", "shared_buffers=16MB")
	cmd.Dir, cmd.SysProcAttr = dir, as
	cmd.Stdout, cmd.Stderr = &log, &log
	if err := cmd.Start(); err != nil {
		return err
	}
	gone := make(chan struct{})
	go func() {
		_ = cmd.Wait() // how it ended is in its log
		close(gone)
	}()
	ts.Defer(func() {
		_ = cmd.Process.Signal(syscall.SIGINT) // disconnects the clients; its children end with it
		select {
		case <-gone:
		case <-time.After(30 * time.Second):
			_ = cmd.Process.Kill()
			<-gone
		}
	})
	// The last line of this file is its state (PostgreSQL, src/include/utils/pidfile.h).
	for end := time.Now().Add(time.Minute); time.Now().Before(end); time.Sleep(20 * time.Millisecond) {
		pid, err := os.ReadFile(filepath.Join(dir, "data", "postmaster.pid"))
		if err == nil && bytes.HasSuffix(bytes.TrimSpace(pid), []byte("\nready")) {
			return nil
		}
		select {
		case <-gone:
			return fmt.Errorf("postgres ended:\n%s", log.Bytes())
		default:
		}
	}
	return errors.New("postgres does not become ready")
}
