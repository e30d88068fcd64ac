// Package policy holds the default policy: Rego modules of package sallyport, one rule of the decision per file. They
// read data and admit nobody whom data does not admit.
package policy

import "embed"

// Files holds the modules by name ("login.rego") and their tests ("login_test.rego").
//
//go:embed *.rego
var Files embed.FS
