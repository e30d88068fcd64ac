package main

import (
	"os"
	"path/filepath"
	"testing"

	"github.com/sallyport/sallyport/config"
)

// An instance keeps its name; what a crash left of the file while it was made holds up no start.
func TestInstanceName(t *testing.T) {
	cfg := config.Config{Gate: "gate-1", State: t.TempDir()}
	if err := os.WriteFile(filepath.Join(cfg.State, "instance.tmp"), nil, 0o600); err != nil {
		t.Fatal(err)
	}
	first, err := instanceName(cfg)
	if err != nil || gateOf(first) != "gate-1" {
		t.Fatal(first, err)
	}
	again, err := instanceName(cfg)
	if err != nil || again != first {
		t.Errorf("%s, then %s: %v", first, again, err)
	}
	files, err := os.ReadDir(cfg.State)
	if err != nil || len(files) != 1 {
		t.Errorf("%v %v", files, err)
	}
	if err := os.Truncate(filepath.Join(cfg.State, "instance"), 0); err != nil {
		t.Fatal(err)
	}
	if name, err := instanceName(cfg); err == nil {
		t.Errorf("out of an empty file: %s", name)
	}
}
