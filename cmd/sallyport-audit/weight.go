package main

import (
	"reflect"

	"github.com/sallyport/sallyport/auditlog"
)

// weight is about how much memory a record's body takes, in its JSON form if that is more: what a record says of itself is an
// attacker's, up to a frame's size.
func weight(b auditlog.Body) int {
	const record = 200
	return record + weigh(reflect.ValueOf(b))
}

func weigh(v reflect.Value) int {
	n := 0
	switch v.Kind() {
	case reflect.Pointer:
		if !v.IsNil() {
			n = weigh(v.Elem())
		}
	case reflect.Struct:
		for i := range v.NumField() {
			n += weigh(v.Field(i))
		}
	case reflect.String:
		n = written(v.String())
	case reflect.Slice:
		elem := v.Type().Elem()
		switch elem.Kind() {
		case reflect.Uint8:
			n = written(v.Bytes())
		case reflect.Slice, reflect.String:
			for i := range v.Len() {
				n += int(elem.Size()) + weigh(v.Index(i))
			}
		default:
			n = v.Len() * int(elem.Size())
		}
	}
	return n
}

// written is the length of a text as it is written: what must be escaped takes six characters.
func written[T string | []byte](s T) int {
	n := len(s)
	for i := range len(s) {
		if s[i] < 0x20 || s[i] >= 0x7f {
			n += 5
		}
	}
	return n
}
