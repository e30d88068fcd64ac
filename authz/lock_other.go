//go:build !unix

package authz

import (
	"context"
	"errors"
)

func lock(context.Context, string) (unlock func(), err error) {
	return nil, errors.New("grants can't be edited on this system: it has no flock")
}
