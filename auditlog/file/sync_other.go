//go:build !linux && !darwin

package file

// syncDir does nothing: these systems can't sync a directory.
func syncDir(string) error { return nil }
