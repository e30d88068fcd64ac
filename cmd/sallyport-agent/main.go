// Command sallyport-agent is the first process of every sandbox: see package agent.
package main

import (
	"os"

	"github.com/sallyport/sallyport/agent"
)

func main() {
	os.Exit(agent.Main(os.Args, os.Stdout, os.Stderr))
}
