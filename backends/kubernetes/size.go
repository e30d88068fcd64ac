package kubernetes

import (
	"fmt"

	"k8s.io/apimachinery/pkg/api/resource"
)

// Size is a number of bytes, in text as Kubernetes writes it: "512Mi".
type Size int64

// UnmarshalText implements encoding.TextUnmarshaler.
func (s *Size) UnmarshalText(text []byte) error {
	q, err := resource.ParseQuantity(string(text))
	n, whole := q.AsInt64()
	if err != nil || !whole || n < 0 {
		return fmt.Errorf("%q is not a size, as \"512Mi\"", text)
	}
	*s = Size(n)
	return nil
}

// MarshalText implements encoding.TextMarshaler.
func (s Size) MarshalText() ([]byte, error) { return []byte(s.String()), nil }

func (s Size) String() string { return resource.NewQuantity(int64(s), resource.BinarySI).String() }
