package authz

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"maps"
	"path"
	"slices"
	"strings"
	"time"

	"github.com/open-policy-agent/opa/v1/ast"
	"github.com/open-policy-agent/opa/v1/rego"
	"github.com/open-policy-agent/opa/v1/storage"

	"github.com/sallyport/sallyport/authz/policy"
)

// reaching are the built-in functions that policy may not call: they reach out of the process, or read what is none of
// a policy's business. A login must not hang on another service, or tell it who logs in.
var reaching = []string{
	"http.send", "net.lookup_ip_addr", "opa.runtime", "json.match_schema", "json.verify_schema", "trace",
	"rego.parse_module", "providers.aws.sign_req",
}

// capabilities is the Rego that policy may use.
func capabilities() *ast.Capabilities {
	c := ast.CapabilitiesForThisVersion()
	c.Builtins = slices.DeleteFunc(slices.Clone(c.Builtins), func(b *ast.Builtin) bool {
		return slices.Contains(reaching, b.Name)
	})
	c.AllowNet = []string{}
	return c
}

// defaultModules gives the default policy's texts by file name, without its tests.
func defaultModules() (map[string][]byte, error) {
	names, err := fs.Glob(policy.Files, "*.rego")
	if err != nil {
		return nil, err
	}
	modules := map[string][]byte{}
	for _, name := range names {
		if strings.HasSuffix(name, "_test.rego") {
			continue
		}
		if modules[name], err = policy.Files.ReadFile(name); err != nil {
			return nil, err
		}
	}
	return modules, nil
}

// newPolicyTree gives the tree of an admin's own modules.
func newPolicyTree(root string) *tree {
	return newTree(root, loadModule, regoSuffix)
}

// loadModule takes a module's text as it is: whether it is good shows only when all modules are compiled together.
func loadModule(f *file, text []byte) error {
	if len(text) > maxModule {
		return &lineError{text: fmt.Sprintf("larger than %d MiB", maxModule>>20)}
	}
	f.value = text
	return nil
}

// ownModules gives the texts of the tree by name, without tests.
func (t *tree) ownModules() map[string][]byte {
	modules := map[string][]byte{}
	for name, f := range t.files {
		if text, ok := f.value.([]byte); ok && f.good && !strings.HasSuffix(name, "_test.rego") {
			modules[name] = text
		}
	}
	return modules
}

// compile compiles the default modules with an admin's own: an own module takes the place of the default one of the
// same file name, any other is added. file gives the path to name in an error.
func compile(own map[string][]byte, file func(name string) string) (*ast.Compiler, []error) {
	texts, err := defaultModules()
	if err != nil {
		return nil, []error{err}
	}
	maps.Copy(texts, own)
	caps := capabilities()
	modules := make(map[string]*ast.Module, len(texts))
	var problems []error
	for _, name := range slices.Sorted(maps.Keys(texts)) {
		at := "default policy " + name
		if _, ok := own[name]; ok {
			at = file(name)
		}
		module, err := ast.ParseModuleWithOpts(at, string(texts[name]),
			ast.ParserOptions{Capabilities: caps, RegoVersion: ast.RegoV1})
		switch {
		case err != nil:
			problems = append(problems, regoErrors(err)...)
		case !strings.HasPrefix(module.Package.Path.String()+".", "data.sallyport."):
			problems = append(problems, &FileError{File: at, Line: module.Package.Location.Row,
				Text: "the package must be sallyport or sallyport.NAME, so that it can't hide data"})
		default:
			modules[at] = module
		}
	}
	if len(problems) > 0 {
		return nil, problems
	}
	compiler := ast.NewCompiler().WithCapabilities(caps).WithDefaultRegoVersion(ast.RegoV1)
	if compiler.Compile(modules); compiler.Failed() {
		return nil, regoErrors(compiler.Errors)
	}
	return compiler, nil
}

func regoErrors(err error) []error {
	var all ast.Errors
	var one *ast.Error
	switch {
	case errors.As(err, &all):
	case errors.As(err, &one):
		all = ast.Errors{one}
	default:
		return []error{err}
	}
	problems := make([]error, 0, len(all))
	for _, e := range all {
		if e.Location == nil {
			problems = append(problems, errors.New(e.Message))
			continue
		}
		problems = append(problems, &FileError{File: e.Location.File, Line: e.Location.Row, Text: Printable(e.Message, 300)})
	}
	return problems
}

// question is one prepared query of the policy.
type question struct {
	name  string
	query rego.PreparedEvalQuery
}

// evalTime bounds one evaluation. A decision takes well under a millisecond.
const evalTime = time.Second

// prepare prepares the query data.sallyport.NAME.
func prepare(ctx context.Context, name string, compiler *ast.Compiler, store storage.Store) (question, error) {
	q, err := rego.New(rego.Query("data.sallyport."+name), rego.Compiler(compiler), rego.Store(store),
		rego.Capabilities(capabilities())).PrepareForEval(ctx)
	if err != nil {
		return question{}, fmt.Errorf("query data.sallyport.%s: %w", name, err)
	}
	return question{name: name, query: q}, nil
}

// ask evaluates the query. No answer and several answers are errors.
func (q question) ask(ctx context.Context, input any, now time.Time) (any, error) {
	ctx, cancel := context.WithTimeout(ctx, evalTime)
	defer cancel()
	results, err := q.query.Eval(ctx, rego.EvalInput(input), rego.EvalTime(now))
	if err == nil {
		err = ctx.Err() // an evaluation may end before it notices
	}
	if err != nil {
		return nil, fmt.Errorf("evaluate data.sallyport.%s: %w", q.name, err)
	}
	if len(results) != 1 || len(results[0].Expressions) != 1 {
		return nil, fmt.Errorf("evaluate data.sallyport.%s: %d answers where one is due", q.name, len(results))
	}
	return results[0].Expressions[0].Value, nil
}

// DefaultPolicy gives the text of a module of the default policy by its file name ("status.rego"), and all their names.
func DefaultPolicy(name string) (text []byte, names []string, err error) {
	modules, err := defaultModules()
	if err != nil {
		return nil, nil, err
	}
	return modules[path.Base(name)], slices.Sorted(maps.Keys(modules)), nil
}
