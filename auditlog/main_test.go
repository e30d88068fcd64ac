package auditlog_test

import (
	"os"
	"testing"

	"go.uber.org/goleak"
)

func TestMain(m *testing.M) {
	if dir := os.Getenv(writerEnv); dir != "" {
		killedWriter(dir)
		return
	}
	goleak.VerifyTestMain(m)
}
