package main

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"log/slog"
	"net"
	"net/http"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/sallyport/sallyport/authz"
)

const testKey = "ssh-ed25519 AAAAC3NzaC1lZDI1NTE5AAAAIIDgyR6ZfIDgm5aXwHYAiJ3UGJXbSvQeVnFSlMmdnwpC"

// policyData is a data directory with alice, a profile and no grants.
func policyData(t *testing.T) string {
	t.Helper()
	dir := t.TempDir()
	for name, text := range map[string]string{
		"users/alice.json":    fmt.Sprintf(`{"keys": [%q], "groups": ["ops"]}`, testKey),
		"profiles/debug.json": `{"image": "debug:1"}`,
		"alice.pub":           testKey + " alice@laptop\n",
	} {
		name = filepath.Join(dir, name)
		if err := os.MkdirAll(filepath.Dir(name), 0o755); err != nil {
			t.Fatal(err)
		}
		if err := os.WriteFile(name, []byte(text), 0o644); err != nil {
			t.Fatal(err)
		}
	}
	return dir
}

// command runs sallyport and gives its output, its exit code and its error.
func command(t *testing.T, args ...string) (stdout string, code int, text string) {
	t.Helper()
	var out, errOut bytes.Buffer
	err := run(context.Background(), args, strings.NewReader(""), &out, &errOut)
	if err == nil {
		return out.String(), 0, ""
	}
	code = 1
	var with interface{ ExitCode() int }
	if errors.As(err, &with) {
		code = with.ExitCode()
	}
	return out.String(), code, err.Error()
}

func TestGrantCommand(t *testing.T) {
	dir := policyData(t)
	add := []string{"grant", "add", "--data", dir, "--user", "alice", "--profile", "debug"}
	for _, c := range []struct {
		args []string
		code int
		want string // in the output, or in the error
	}{
		{append(add, "--ticket", "T-1", "--for", "1h", "--reason", "a\x1bb", "--source", "192.0.2.0/24"), 0,
			"granted T-1 to alice until 20"},
		{append(add, "--ticket", "T-1", "--for", "1h"), 1, "exists already"},
		{append(add, "--ticket", "T-1", "--for", "2h", "--replace"), 0, "granted T-1"},
		{append(add, "--ticket", "T-2", "--not-before", "2199-01-01T00:00:00Z", "--for", "1h"), 0,
			"until 2199-01-01T01:00:00Z"},
		{append(add, "--ticket", "T-3", "--not-after", "tomorrow"), 1, "no RFC 3339 time"},
		{append(add, "--ticket", "T-3"), 2, "for not-after"},
		{append(add, "--ticket", "T-3", "--for", "1h", "--not-after", "2199-01-01T00:00:00Z"), 2, "for not-after"},
		{append(add, "--ticket", "T-3", "--for", "-1h"), 2, "--for"},
		{append(add, "--ticket", "T-3", "--for", "soon"), 2, "--for"},
		{append(add, "--for", "1h"), 2, `"ticket" not set`},
		{append(add, "--ticket", "T-3", "--for", "1h", "--nosuch"), 2, "nosuch"},
		{append(add, "--ticket", "T-3", "--for", "1h", "more"), 2, "more"},
		{append(add, "--ticket", "T-3", "--for", "1h", "--group", "ops"), 2, "group user"},
		{append(add, "--ticket", "T-3", "--for", "1h", "--source", "all"), 1, "no CIDR prefix"},
		{append(add, "--ticket", "T-3", "--for", "1h", "--wait=50ms", "--socket", dir+"/none"), 3, "has not taken it"},
		{[]string{"grant", "list", "--data", dir}, 0, "T-1"},
		{[]string{"grant", "list", "--data", dir, "--user", "bob"}, 0, "TICKET"},
		{[]string{"grant", "list"}, 2, "data"},
		{[]string{"grant", "revoke", "--data", dir, "--user", "alice", "--ticket", "T-2"}, 0, "revoked T-2 of alice"},
		{[]string{"grant", "revoke", "--data", dir, "--user", "alice", "--ticket", "T-2"}, 1, "has no grant T-2"},
		{[]string{"grant", "revoke", "--data", dir + "/nowhere", "--user", "alice", "--ticket", "T-2"}, 1,
			"no data directory"},
		{[]string{"grant"}, 2, "add, list or revoke"},
		{[]string{"grant", "nosuch"}, 2, "nosuch"},
	} {
		out, code, text := command(t, c.args...)
		if code != c.code || !strings.Contains(out+text, c.want) {
			t.Errorf("%q: exit %d, %q %q; want %d, %q", c.args[1:], code, out, text, c.code, c.want)
		}
	}
	out, _, _ := command(t, "grant", "list", "--data", dir, "--output", "json")
	var list []authz.ListedGrant
	if err := json.Unmarshal([]byte(out), &list); err != nil || len(list) != 2 || list[0].Ticket != "T-1" ||
		list[0].State != "live" {
		t.Errorf("%s %v", out, err)
	}
}

// --wait returns when the gate uses the file, and says why it doesn't.
func TestGrantWait(t *testing.T) {
	dir := policyData(t)
	engine, err := authz.Open(authz.Config{Data: dir}, slog.New(slog.DiscardHandler))
	if err != nil {
		t.Fatal(err)
	}
	defer engine.Close()
	socket := filepath.Join(dir, "admin.sock")
	listener, err := net.Listen("unix", socket)
	if err != nil {
		t.Fatal(err)
	}
	mux := http.NewServeMux()
	mux.HandleFunc("GET /policy/holds", holdsHandler(engine))
	server := &http.Server{Handler: mux}
	done := make(chan struct{})
	go func() { defer close(done); _ = server.Serve(listener) }()
	defer func() { _ = server.Close(); <-done }()

	args := []string{"--data", dir, "--user", "alice", "--ticket", "T-1", "--wait=10s", "--socket", socket}
	_, code, text := command(t, append([]string{"grant", "add", "--profile", "debug", "--for", "1h"}, args...)...)
	if sum, _ := engine.Holds("grants/alice.json"); code != 0 || sum == "" {
		t.Errorf("exit %d, %s", code, text)
	}
	_, code, text = command(t, append([]string{"grant", "revoke"}, args...)...)
	if sum, _ := engine.Holds("grants/alice.json"); code != 0 || sum != "" {
		t.Errorf("exit %d, %s", code, text)
	}
	if err := engine.Close(); err != nil { // from now on it takes nothing
		t.Fatal(err)
	}
	args = append(args, "--profile", "debug", "--for", "1h", "--wait=200ms")
	_, code, text = command(t, append([]string{"grant", "add"}, args...)...)
	if code != 3 || !strings.Contains(text, "still uses the old file") {
		t.Errorf("exit %d, %s", code, text)
	}
}

func TestPolicyEval(t *testing.T) {
	dir := policyData(t)
	eval := []string{"policy", "eval", "--data", dir, "--key", filepath.Join(dir, "alice.pub")}
	if out, code, text := command(t, append(eval, "--user", "alice")...); code != 1 || text != "" ||
		!strings.Contains(out, "refused") || !strings.Contains(out, "no-grant") {
		t.Errorf("exit %d, %s, %s", code, out, text)
	}
	if _, code, text := command(t, "grant", "add", "--data", dir, "--user", "alice", "--ticket", "T-1",
		"--profile", "debug", "--not-after", "2026-03-01T12:00:00Z"); code != 0 {
		t.Fatal(text)
	}
	out, code, text := command(t, append(eval, "--user", "alice+T-1", "--at", "2026-03-01T11:59:59Z", "-o", "json")...)
	var x authz.Explanation
	if err := json.Unmarshal([]byte(out), &x); err != nil || code != 0 || !x.Offer || !x.Login.Allow ||
		len(x.Considered) != 1 || x.Considered[0].Status != "live" {
		t.Errorf("exit %d, %s %s %v", code, out, text, err)
	}
	out, code, _ = command(t, append(eval, "--user", "alice", "--at", "2026-03-01T12:00:00Z")...)
	for _, want := range []string{"expired: grant T-1 ended at 2026-03-01T12:00:00Z", "stands in the data",
		"grants.alice  expired"} {
		if code != 1 || !strings.Contains(out, want) {
			t.Errorf("exit %d, %s, want %s", code, out, want)
		}
	}
	key, err := authz.ParseKey(testKey)
	if err != nil {
		t.Fatal(err)
	}
	for fingerprint, want := range map[string]string{key.Fingerprint: "expired", "SHA256:none": "this key is not known"} {
		out, code, _ := command(t, append(eval, "--user", "alice", "--at", "2026-03-01T12:00:00Z", "--key", fingerprint)...)
		if code != 1 || !strings.Contains(out, want) {
			t.Errorf("%s: exit %d, %s", fingerprint, code, out)
		}
	}
	for _, wrong := range [][]string{{"--user", "Alice"}, {}, {"--user", "alice", "--at", "now"},
		{"--user", "alice", "-o", "xml"}} {
		if _, code, text := command(t, append(eval, wrong...)...); code != 2 || text == "" {
			t.Errorf("%q: exit %d, %s", wrong, code, text)
		}
	}
	out, code, _ = command(t, "policy", "show", "status.rego")
	if code != 0 || !strings.Contains(out, "package sallyport") {
		t.Errorf("exit %d, %s", code, out)
	}
	out, code, _ = command(t, "policy", "show")
	if code != 0 || !strings.Contains(out, "login.rego\n") || strings.Contains(out, "_test") {
		t.Errorf("exit %d, %s", code, out)
	}
}
