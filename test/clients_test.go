package test

import (
	"os"
	"os/exec"
	"testing"

	"github.com/rogpeppe/go-internal/testscript"
)

// requireClientsEnv says that a missing client is a failure.
const requireClientsEnv = "SALLYPORT_REQUIRE_CLIENTS"

// needClients skips a test, or fails it where the clients must be there, if one of these commands or files is missing.
func needClients(t *testing.T, names ...string) {
	t.Helper()
	if noEngine {
		t.Skip("no Docker engine answers")
	}
	for _, name := range names {
		if _, err := exec.LookPath(name); err == nil {
			continue
		}
		if _, err := os.Stat(name); err == nil {
			continue
		}
		if os.Getenv(requireClientsEnv) != "" {
			t.Fatalf("%s is missing, and %s is set", name, requireClientsEnv)
		}
		t.Skipf("%s is missing (make test installs it)", name)
	}
}

// TestClients runs the clients that people use: docs/clients.md is the table of it.
func TestClients(t *testing.T) {
	needClients(t, "plink", "pscp", "psftp", "puttygen", "dbclient", "dropbearconvert", "rsync", "git", "curl", "openssl",
		"/usr/lib/python3/dist-packages/paramiko")
	testscript.Run(t, params("clients"))
}
