package authz

import (
	"context"
	"io/fs"
	"testing"

	"github.com/open-policy-agent/opa/v1/ast"
	"github.com/open-policy-agent/opa/v1/tester"

	"github.com/sallyport/sallyport/authz/policy"
)

// TestRego runs the policy's own tests as `opa test authz/policy` does.
func TestRego(t *testing.T) {
	names, err := fs.Glob(policy.Files, "*.rego")
	if err != nil {
		t.Fatal(err)
	}
	modules := map[string]*ast.Module{}
	for _, name := range names {
		text, err := policy.Files.ReadFile(name)
		if err != nil {
			t.Fatal(err)
		}
		if modules[name], err = ast.ParseModule(name, string(text)); err != nil {
			t.Fatal(err)
		}
	}
	results, err := tester.NewRunner().SetModules(modules).SetCompiler(ast.NewCompiler()).EnableTracing(true).
		RunTests(context.Background(), nil)
	if err != nil {
		t.Fatal(err)
	}
	ran := 0
	for r := range results {
		ran++
		if r.Error != nil || r.Fail {
			t.Errorf("%s: %s failed: %v", r.Location, r.Name, r.Error)
		}
	}
	if ran < 62 {
		t.Errorf("%d tests ran, want all of them", ran)
	}
}
