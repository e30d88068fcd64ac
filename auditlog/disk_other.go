//go:build !linux && !darwin

package auditlog

import (
	"errors"
	"os"
)

// lockDir: no gate runs on these systems, only the auditor's tool.
func lockDir(string) (*os.File, error) { return nil, errors.ErrUnsupported }

// syncDir does nothing: these systems can't sync a directory.
func syncDir(string) error { return nil }
