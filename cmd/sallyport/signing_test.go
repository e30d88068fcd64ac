package main

import (
	"bytes"
	"crypto"
	"crypto/ed25519"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"testing"
	"time"

	"github.com/sallyport/sallyport/auditlog"
	"github.com/sallyport/sallyport/config"
)

// script writes a shell script and gives its path.
func script(t *testing.T, text string) string {
	t.Helper()
	name := filepath.Join(t.TempDir(), "sign.sh")
	if err := os.WriteFile(name, []byte("#!/bin/sh\n"+text), 0o700); err != nil {
		t.Fatal(err)
	}
	return name
}

func publicFile(t *testing.T, keys ...ed25519.PublicKey) string {
	t.Helper()
	name := filepath.Join(t.TempDir(), "key.pub")
	var b bytes.Buffer
	for _, k := range keys {
		fmt.Fprintln(&b, auditlog.FormatPublicKey(k))
	}
	if err := os.WriteFile(name, b.Bytes(), 0o600); err != nil {
		t.Fatal(err)
	}
	return name
}

// The signing command is asked with the message, and its answer is believed only if it is a signature by the key that is known.
func TestSigningCommand(t *testing.T) {
	openssl, err := exec.LookPath("openssl")
	if err != nil {
		if os.Getenv("SALLYPORT_REQUIRE_CLIENTS") != "" {
			t.Fatal(err)
		}
		t.Skip("there is no openssl: make test installs it")
	}
	file := filepath.Join(t.TempDir(), "log.key")
	key, err := auditlog.CreateKey(file)
	if err != nil {
		t.Fatal(err)
	}
	pub := key.Public().(ed25519.PublicKey)
	good := script(t, fmt.Sprintf("m=$(mktemp) && cat >$m && %s pkeyutl -sign -inkey $1 -rawin -in $m; s=$?; rm $m; exit $s\n", openssl))
	s, err := logSigner(config.Audit{SigningCommand: []string{good, file}, PublicKey: publicFile(t, pub)}, false)
	if err != nil {
		t.Fatal(err)
	}
	message := []byte("sallyport auditlog segment footer v1\n and what is hashed")
	if sig, err := s.Sign(nil, message, crypto.Hash(0)); err != nil || !ed25519.Verify(pub, message, sig) {
		t.Fatal(err)
	}
	if _, err := s.Sign(nil, message, crypto.SHA256); err == nil {
		t.Error("it would sign a hash")
	}
	stranger := ed25519.NewKeyFromSeed(make([]byte, ed25519.SeedSize)).Public().(ed25519.PublicKey)
	for _, c := range []struct {
		name, command, public, want string
	}{
		{"another key", good, publicFile(t, stranger), "not by the key in audit.public_key"},
		{"too short", script(t, "echo -n abc"), publicFile(t, pub), "want the 64"},
		{"too long", script(t, "head -c 100000 /dev/zero"), publicFile(t, pub), "want the 64"},
		{"fails", script(t, "echo card is out >&2; exit 4"), publicFile(t, pub), `exit status 4: "card is out"`},
		{"is not there", "/nonexistent/sign", publicFile(t, pub), "no such file"},
		{"several keys", good, publicFile(t, pub, stranger), "the gate signs with one"},
		{"no key", good, "/nonexistent/key.pub", "no such file"},
	} {
		_, err := logSigner(config.Audit{SigningCommand: []string{c.command, file}, PublicKey: c.public}, false)
		if err == nil || !strings.Contains(err.Error(), c.want) {
			t.Errorf("%s: want %q: %v", c.name, c.want, err)
		}
	}
}

// A command that hangs is killed with what it has started.
func TestSigningHangs(t *testing.T) {
	mark := filepath.Join(t.TempDir(), "pid")
	// Long enough for a busy machine to start a shell: what it starts is what the test is about.
	s := &commandSigner{argv: []string{script(t, "sleep 600 & echo $! >"+mark+"; wait")}, running: make(chan struct{}, 1), timeout: 10 * time.Second}
	if _, err := s.once([]byte("m")); err == nil || !strings.Contains(err.Error(), "no signature within") {
		t.Error(err)
	}
	b, err := os.ReadFile(mark)
	if err != nil {
		t.Fatal(err)
	}
	pid, err := strconv.Atoi(strings.TrimSpace(string(b)))
	if err != nil || pid < 2 {
		t.Fatalf("it started nothing: %q %v", b, err)
	}
	for end := time.Now().Add(time.Minute); ; time.Sleep(10 * time.Millisecond) {
		// Killed, it is gone, or waits for a parent to look at it.
		stat, err := os.ReadFile(fmt.Sprintf("/proc/%d/stat", pid))
		if err != nil || strings.Contains(string(stat), ") Z ") {
			return
		}
		if time.Now().After(end) {
			t.Fatal("what it started still runs")
		}
	}
}

func TestKeyCommand(t *testing.T) {
	dir := t.TempDir()
	file := filepath.Join(dir, "log.key")
	call := func(args ...string) (string, error) {
		var out bytes.Buffer
		err := run(t.Context(), append([]string{"key"}, args...), strings.NewReader(""), &out, &out)
		return out.String(), err
	}
	made, err := call("new", file)
	if err != nil || !strings.HasPrefix(made, "ed25519 ") || !strings.Contains(made, "\nSHA256:") {
		t.Fatalf("%q %v", made, err)
	}
	if _, err := call("new", file); err == nil || !strings.Contains(err.Error(), "choose another name") {
		t.Error(err)
	}
	line, print, _ := strings.Cut(made, "\n")
	yaml := filepath.Join(dir, "gate.yaml")
	if err := os.WriteFile(yaml, []byte("state: state\npolicy: {data: data}\naudit: {key: log.key}\n"), 0o600); err != nil {
		t.Fatal(err)
	}
	for _, from := range [][]string{{file}, {file + ".pub"}, {"--config", yaml}} {
		if out, err := call(append([]string{"public"}, from...)...); err != nil || out != line+"\n" {
			t.Errorf("public %v: %q %v", from, out, err)
		}
		if out, err := call(append([]string{"fingerprint"}, from...)...); err != nil || out != print {
			t.Errorf("fingerprint %v: %q %v", from, out, err)
		}
	}
	spoilt := filepath.Join(dir, "spoilt.pub") // readable to all, as a public key may be
	if err := os.WriteFile(spoilt, []byte("ed25519 AAAA\n"), 0o644); err != nil {
		t.Fatal(err)
	}
	if _, err := call("fingerprint", spoilt); err == nil || strings.Contains(err.Error(), "mode") {
		t.Errorf("a spoilt public key: %v", err)
	}
	if _, err := call("fingerprints"); err == nil {
		t.Error("key fingerprints is no command")
	}
	if err := os.Remove(file); err != nil {
		t.Fatal(err)
	}
	if _, err := call("public", "--config", yaml); err == nil || !strings.Contains(err.Error(), "there is no key yet") {
		t.Error(err)
	}
}
