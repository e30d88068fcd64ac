package main

import (
	"os"

	"golang.org/x/sys/windows"
)

// obeySequences makes a console obey escape sequences.
func obeySequences(out *os.File) (undo func() error, err error) {
	h := windows.Handle(out.Fd())
	var was uint32
	if err := windows.GetConsoleMode(h, &was); err != nil {
		return nil, err
	}
	if err := windows.SetConsoleMode(h, was|windows.ENABLE_PROCESSED_OUTPUT|windows.ENABLE_VIRTUAL_TERMINAL_PROCESSING); err != nil {
		return nil, err
	}
	return func() error { return windows.SetConsoleMode(h, was) }, nil
}
