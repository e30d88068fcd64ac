package agent

import (
	"slices"
	"testing"
)

// The session's processes have the container's environment, without what tells the cluster whose it is.
func TestOwnEnviron(t *testing.T) {
	t.Setenv("SALLYPORT_OWNERS", "a")
	t.Setenv(OwnerEnv, `{"user":"alice"}`)
	env := ownEnviron()
	if !slices.Contains(env, "SALLYPORT_OWNERS=a") || slices.Contains(env, OwnerEnv+`={"user":"alice"}`) {
		t.Error(env)
	}
}
