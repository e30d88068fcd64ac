// Command hello is the only program of a test image without a shell.
package main

import (
	"fmt"
	"io"
	"os"
)

func main() {
	fmt.Printf("%q\n", os.Args[1:])
	io.Copy(os.Stdout, os.Stdin)
	if len(os.Args) > 1 && os.Args[1] == "fail" {
		os.Exit(9)
	}
}
