package auditlog_test

import (
	"fmt"
	"os"
	"testing"

	"go.uber.org/goleak"

	"github.com/sallyport/sallyport/agent"
)

func TestMain(m *testing.M) {
	agent.RunChild()
	if plan := os.Getenv(gateEnv); plan != "" {
		if err := killedGate(plan); err != nil {
			fmt.Fprintln(os.Stderr, err)
			os.Exit(1)
		}
		return
	}
	if dir := os.Getenv(writerEnv); dir != "" {
		killedWriter(dir)
		return
	}
	goleak.VerifyTestMain(m)
}
