// Package schema holds the JSON Schemas (draft 2020-12) of policy data and of the policy's inputs and results.
package schema

import "embed"

// Files holds the schemas by name ("grant.json").
//
//go:embed *.json
var Files embed.FS
