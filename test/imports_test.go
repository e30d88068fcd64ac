package test

import (
	"go/parser"
	"go/token"
	"io/fs"
	"path/filepath"
	"strconv"
	"strings"
	"testing"
)

const module = "github.com/sallyport/sallyport/"

// rules say what a package of ours may not import of ours, and why. A rule is for the folder and all below it.
var rules = []struct {
	in, not, why string
}{
	{"backends", "authz", "the ground floor: backends, authz and auditlog know nothing of each other"},
	{"backends", "auditlog", "the ground floor: backends, authz and auditlog know nothing of each other"},
	{"authz", "backends", "the ground floor: backends, authz and auditlog know nothing of each other"},
	{"authz", "auditlog", "the ground floor: backends, authz and auditlog know nothing of each other"},
	{"auditlog", "backends", "the ground floor: backends, authz and auditlog know nothing of each other"},
	{"auditlog", "authz", "the ground floor: backends, authz and auditlog know nothing of each other"},
	{"agent", "authz", "the guest side knows only what a backend is"},
	{"agent", "auditlog", "the guest side knows only what a backend is"},
	{"agent", "sshserver", "the guest side knows only what a backend is"},
	{"sshserver", "backends/docker", "the gate knows backends by their contract"},
	{"sshserver", "backends/kubernetes", "the gate knows backends by their contract"},
	{"backends/docker", "backends/kubernetes", "backends know nothing of each other"},
	{"backends/kubernetes", "backends/docker", "backends know nothing of each other"},
	{"sshserver", "config", "each package has its own Config; config composes them"},
	{"sshserver", "auditlog/file", "the gate knows no store"},
	{"sshserver", "auditlog/s3", "the gate knows no store"},
	{"backends", "sshserver", "SSH is spoken in the gate alone"},
	{"auditlog", "sshserver", "SSH is spoken in the gate alone"},
	{"authz", "sshserver", "SSH is spoken in the gate alone"},
	{"cmd/sallyport-audit", "backends", "the auditor's tool builds on any system, with no engine"},
	{"cmd/sallyport-audit", "authz", "the auditor's tool builds on any system, with no policy"},
	{"cmd/sallyport-audit", "sshserver", "the auditor's tool needs no gate"},
	{"cmd/sallyport-audit", "config", "the auditor's tool needs no gate"},
	{"cmd/sallyport-agent", "sshserver", "the guest binary is as small as it can be"},
	{"cmd/sallyport-agent", "auditlog", "the guest binary is as small as it can be"},
	{"cmd/sallyport-agent", "authz", "the guest binary is as small as it can be"},
	{"cmd/sallyport-agent", "config", "the guest binary is as small as it can be"},
}

// homes are outside trees with one home: moving from one to another is one package's change.
var homes = map[string][]string{
	"github.com/docker/docker/":        {"backends/docker"},
	"k8s.io/":                          {"backends/kubernetes"},
	"github.com/open-policy-agent/opa": {"authz"},
	"github.com/minio/minio-go/":       {"auditlog/s3"},
	"golang.org/x/crypto/ssh":          {"sshserver", "auditlog/agekeys"}, // there for key files alone
	"filippo.io/age":                   {"auditlog", "cmd/sallyport-audit"},
	"golang.org/x/mod/":                {"auditlog/tlog"},
	"github.com/hashicorp/yamux":       {"agent"},
	"github.com/fxamacker/cbor/":       {"auditlog", "agent"},
}

func TestImports(t *testing.T) {
	seen := 0
	err := filepath.WalkDir("..", func(path string, d fs.DirEntry, err error) error {
		if err != nil {
			return err
		}
		if d.IsDir() {
			if name := d.Name(); path != ".." && (strings.HasPrefix(name, ".") || name == "testdata" || name == "demo") {
				return filepath.SkipDir
			}
			return nil
		}
		if !strings.HasSuffix(path, ".go") {
			return nil
		}
		rel := filepath.ToSlash(strings.TrimPrefix(path, "../"))
		dir := filepath.ToSlash(filepath.Dir(rel))
		isTest := strings.HasSuffix(rel, "_test.go") || strings.HasPrefix(dir, "test")
		f, err := parser.ParseFile(token.NewFileSet(), path, nil, parser.ImportsOnly)
		if err != nil {
			return err
		}
		for _, spec := range f.Imports {
			seen++
			imp, err := strconv.Unquote(spec.Path.Value)
			if err != nil {
				return err
			}
			if own, ok := strings.CutPrefix(imp, module); ok {
				for _, r := range rules {
					if within(dir, r.in) && within(own, r.not) && !isTest {
						t.Errorf("%s imports %s: %s", rel, own, r.why)
					}
				}
				if own == "config" && !within(dir, "cmd") && !isTest {
					t.Errorf("%s imports config: only commands do", rel)
				}
			}
			if imp == "testing" && !isTest && !strings.HasPrefix(dir, "backends/backendtest") && !strings.HasPrefix(dir, "auditlog/storetest") {
				t.Errorf("%s imports testing outside a test", rel)
			}
			for tree, at := range homes {
				if !strings.HasPrefix(imp, tree) || isTest {
					continue
				}
				ok := false
				for _, home := range at {
					ok = ok || within(dir, home)
				}
				if !ok {
					t.Errorf("%s imports %s, whose home is %s", rel, imp, strings.Join(at, " and "))
				}
			}
		}
		return nil
	})
	if err != nil {
		t.Fatal(err)
	}
	if seen < 50 {
		t.Errorf("only %d imports were looked at: the walk is broken", seen)
	}
}

func within(dir, root string) bool { return dir == root || strings.HasPrefix(dir, root+"/") }
