package main

import (
	"reflect"

	"github.com/sallyport/sallyport/auditlog"
)

// weight is about how much memory a record's body takes: what a record says of itself is an attacker's, up to a frame's size.
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
		n = v.Len()
	case reflect.Slice:
		elem := v.Type().Elem()
		n = v.Len() * int(elem.Size())
		if elem.Kind() == reflect.Slice || elem.Kind() == reflect.String {
			for i := range v.Len() {
				n += v.Index(i).Len()
			}
		}
	}
	return n
}
