package kubernetes

import (
	"bytes"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"maps"
	"reflect"
	"slices"
	"strconv"
	"strings"

	corev1 "k8s.io/api/core/v1"
	strictjson "sigs.k8s.io/json"
)

// Bounds of a profile's pod template.
const (
	maxTemplate   = 64 << 10 // bytes, as JSON
	maxOperations = 256      // of a JSON Patch
	maxPatched    = 1 << 20  // bytes of what a patch makes, as copies of copies double
	maxNesting    = 64
)

// apply lays a profile's template over a pod: an object is a pod template, merged as kubectl merges; a list is a JSON Patch
// (RFC 6902) of {"metadata": ..., "spec": ...}. What comes out is not judged here.
func apply(pod *corev1.Pod, template []byte) (*corev1.Pod, error) {
	if len(template) > maxTemplate {
		return nil, fmt.Errorf("more than %d bytes", maxTemplate)
	}
	patch, err := decodeJSON(template)
	if err != nil {
		return nil, err
	}
	plain, err := json.Marshal(corev1.PodTemplateSpec{ObjectMeta: pod.ObjectMeta, Spec: pod.Spec})
	if err != nil {
		return nil, err
	}
	document, err := decodeJSON(plain)
	if err != nil {
		return nil, err
	}
	switch p := patch.(type) {
	case map[string]any:
		err = merge(document.(map[string]any), p, reflect.TypeFor[corev1.PodTemplateSpec](), "")
	case []any:
		document, err = patchJSON(document, p)
	default:
		err = errors.New("neither a pod template (an object) nor a JSON Patch (a list)")
	}
	if err != nil {
		return nil, err
	}
	b, err := json.Marshal(document)
	if err != nil {
		return nil, err
	}
	var result corev1.PodTemplateSpec
	strict, err := strictjson.UnmarshalStrict(b, &result)
	if err = errors.Join(append(strict, err)...); err != nil {
		return nil, fmt.Errorf("what it makes is no pod: %w", err)
	}
	changed := *pod
	changed.ObjectMeta, changed.Spec = result.ObjectMeta, result.Spec
	return &changed, nil
}

// decodeJSON reads one JSON text. Numbers stay as written.
func decodeJSON(b []byte) (any, error) {
	d := json.NewDecoder(bytes.NewReader(b))
	d.UseNumber()
	var v any
	if err := d.Decode(&v); err != nil {
		return nil, fmt.Errorf("not JSON: %w", err)
	}
	if _, err := d.Token(); !errors.Is(err, io.EOF) {
		return nil, errors.New("not JSON: more than one value")
	}
	if depth(v) > maxNesting {
		return nil, fmt.Errorf("nested deeper than %d", maxNesting)
	}
	return v, nil
}

func depth(v any) int {
	most := 0
	switch v := v.(type) {
	case map[string]any:
		for _, e := range v {
			most = max(most, depth(e))
		}
	case []any:
		for _, e := range v {
			most = max(most, depth(e))
		}
	default:
		return 0
	}
	return most + 1
}

// merge lays patch over into, as a strategic merge patch does: by the tags of the API's own types, lists whose entries have a
// name are merged by it, other lists are replaced, and null removes. There are no directives ($patch): to remove an
// entry, write a JSON Patch.
func merge(into, patch map[string]any, t reflect.Type, at string) error {
	for _, name := range slices.Sorted(maps.Keys(patch)) {
		value := patch[name]
		where := strings.TrimPrefix(at+"."+name, ".")
		entry, tag, ok := fieldOf(t, name)
		switch {
		case strings.HasPrefix(name, "$"):
			return fmt.Errorf("%s: directives are not known here: write a JSON Patch", where)
		case !ok:
			return fmt.Errorf("%s: there is no such field", where)
		case value == nil:
			delete(into, name)
			continue
		}
		var err error
		into[name], err = mergeValue(into[name], value, entry, tag, where)
		if err != nil {
			return err
		}
	}
	return nil
}

func mergeValue(have, value any, t reflect.Type, tag reflect.StructTag, at string) (any, error) {
	switch value := value.(type) {
	case map[string]any:
		if t.Kind() != reflect.Struct && t.Kind() != reflect.Map {
			break // for the decoder to refuse
		}
		old, ok := have.(map[string]any)
		if !ok {
			old = make(map[string]any) // also what is new is looked at for directives and unknown fields
		}
		return old, merge(old, value, t, at)
	case []any:
		strategy, _, _ := strings.Cut(tag.Get("patchStrategy"), ",")
		key := tag.Get("patchMergeKey")
		if t.Kind() != reflect.Slice || strategy != "merge" || key == "" {
			break
		}
		old, _ := have.([]any)
		return mergeList(old, value, elem(t.Elem()), key, at)
	}
	return value, nil
}

// mergeList merges entries that have the same key, and appends what is new.
func mergeList(have, list []any, t reflect.Type, key, at string) ([]any, error) {
	for i, e := range list {
		where := fmt.Sprintf("%s[%d]", at, i)
		entry, ok := e.(map[string]any)
		if !ok || entry[key] == nil {
			return nil, fmt.Errorf("%s: has no %s, by which this list is merged", where, key)
		}
		n := slices.IndexFunc(have, func(h any) bool {
			m, ok := h.(map[string]any)
			return ok && equalJSON(m[key], entry[key])
		})
		if n < 0 {
			n, have = len(have), append(have, map[string]any{})
		}
		if err := merge(have[n].(map[string]any), entry, t, where); err != nil {
			return nil, err
		}
	}
	return have, nil
}

// fieldOf finds the field that a type has in JSON under a name.
func fieldOf(t reflect.Type, name string) (reflect.Type, reflect.StructTag, bool) {
	if t.Kind() == reflect.Map {
		return elem(t.Elem()), "", true
	}
	for i := range t.NumField() {
		f := t.Field(i)
		jsonName, _, _ := strings.Cut(f.Tag.Get("json"), ",")
		if jsonName == name && name != "" {
			return elem(f.Type), f.Tag, true
		}
		if f.Anonymous && jsonName == "" {
			if found, tag, ok := fieldOf(elem(f.Type), name); ok {
				return found, tag, true
			}
		}
	}
	return nil, "", false
}

func elem(t reflect.Type) reflect.Type {
	if t.Kind() == reflect.Pointer {
		return t.Elem()
	}
	return t
}

// operation is one of a JSON Patch (RFC 6902, section 4).
type operation struct {
	op, path, from string
	value          any
	hasValue       bool
}

// patchJSON applies a JSON Patch to a document: all of it, or nothing. It may change the document when it fails.
func patchJSON(document any, list []any) (any, error) {
	if len(list) > maxOperations {
		return nil, fmt.Errorf("more than %d operations", maxOperations)
	}
	for i, e := range list {
		o, err := readOperation(e)
		if err == nil {
			document, err = o.apply(document)
		}
		if err != nil {
			return nil, fmt.Errorf("operation %d (%s %q): %w", i, o.op, o.path, err)
		}
	}
	return document, nil
}

func readOperation(e any) (o operation, err error) {
	m, ok := e.(map[string]any)
	if !ok {
		return o, errors.New("not an object")
	}
	text := func(name string) (s string, has bool) {
		v, has := m[name]
		s, isText := v.(string)
		if has && !isText {
			err = errors.Join(err, fmt.Errorf("%s is not a string", name))
		}
		return s, has
	}
	var hasOp, hasPath, hasFrom bool
	o.op, hasOp = text("op")
	o.path, hasPath = text("path")
	o.from, hasFrom = text("from")
	o.value, o.hasValue = m["value"]
	switch {
	case err != nil:
	case !hasOp || !hasPath:
		err = errors.New("op and path are needed")
	case (o.op == "add" || o.op == "replace" || o.op == "test") && !o.hasValue:
		err = errors.New("value is needed")
	case (o.op == "move" || o.op == "copy") && !hasFrom:
		err = errors.New("from is needed")
	}
	return o, err
}

func (o operation) apply(document any) (any, error) {
	path, err := pointerOf(o.path)
	if err != nil {
		return nil, err
	}
	switch o.op {
	case "add":
		return putAt(document, path, o.value, true)
	case "replace":
		return putAt(document, path, o.value, false)
	case "remove":
		document, _, err = takeAt(document, path)
		return document, err
	case "test":
		have, err := findAt(document, path)
		if err == nil && !equalJSON(have, o.value) {
			err = errors.New("is another value")
		}
		return document, err
	case "move", "copy":
		from, err := pointerOf(o.from)
		if err != nil {
			return nil, fmt.Errorf("from: %w", err)
		}
		if o.op == "move" {
			if len(from) < len(path) && slices.Equal(from, path[:len(from)]) {
				return nil, errors.New("moves into itself")
			}
			document, value, err := takeAt(document, from)
			if err != nil {
				return nil, fmt.Errorf("from: %w", err)
			}
			return putAt(document, path, value, true)
		}
		value, err := findAt(document, from)
		if err != nil {
			return nil, fmt.Errorf("from: %w", err)
		}
		if document, err = putAt(document, path, cloneJSON(value), true); err != nil {
			return nil, err
		}
		if b, err := json.Marshal(document); err != nil || len(b) > maxPatched || depth(document) > maxNesting {
			return nil, errors.New("makes too much")
		}
		return document, nil
	}
	return nil, errors.New("no such operation")
}

// pointerOf reads a JSON Pointer (RFC 6901).
func pointerOf(s string) ([]string, error) {
	if s == "" {
		return nil, nil
	}
	if s[0] != '/' {
		return nil, fmt.Errorf("%q does not begin with /", s)
	}
	path := strings.Split(s[1:], "/")
	for i, token := range path {
		for rest := token; ; {
			_, after, found := strings.Cut(rest, "~")
			if !found {
				break
			}
			if after == "" || after[0] != '0' && after[0] != '1' {
				return nil, fmt.Errorf("%q has a ~ that is neither ~0 nor ~1", s)
			}
			rest = after[1:]
		}
		path[i] = strings.ReplaceAll(strings.ReplaceAll(token, "~1", "/"), "~0", "~")
	}
	return path, nil
}

var errNotThere = errors.New("there is nothing there")

// indexOf reads a list's index below limit.
func indexOf(token string, limit int) (int, error) {
	if token != "0" && strings.HasPrefix(token, "0") || strings.HasPrefix(token, "+") || strings.HasPrefix(token, "-") {
		return 0, fmt.Errorf("%q is no index", token)
	}
	n, err := strconv.Atoi(token)
	if err != nil {
		return 0, fmt.Errorf("%q is no index", token)
	}
	if n >= limit {
		return 0, errNotThere
	}
	return n, nil
}

func findAt(v any, path []string) (any, error) {
	for _, token := range path {
		switch have := v.(type) {
		case map[string]any:
			next, ok := have[token]
			if !ok {
				return nil, errNotThere
			}
			v = next
		case []any:
			n, err := indexOf(token, len(have))
			if err != nil {
				return nil, err
			}
			v = have[n]
		default:
			return nil, errNotThere
		}
	}
	return v, nil
}

// putAt sets what is at path, or adds it, and returns the changed document.
func putAt(v any, path []string, value any, add bool) (any, error) {
	if len(path) == 0 {
		return value, nil
	}
	token, rest := path[0], path[1:]
	switch have := v.(type) {
	case map[string]any:
		old, ok := have[token]
		if !ok && (len(rest) > 0 || !add) {
			return nil, errNotThere
		}
		changed, err := putAt(old, rest, value, add)
		if err != nil {
			return nil, err
		}
		have[token] = changed
		return have, nil
	case []any:
		if add && len(rest) == 0 {
			n := len(have)
			if token != "-" {
				var err error
				if n, err = indexOf(token, len(have)+1); err != nil {
					return nil, err
				}
			}
			return slices.Insert(have, n, value), nil
		}
		n, err := indexOf(token, len(have))
		if err != nil {
			return nil, err
		}
		if have[n], err = putAt(have[n], rest, value, add); err != nil {
			return nil, err
		}
		return have, nil
	}
	return nil, errNotThere
}

// takeAt removes what is at path, and returns the changed document and what it was.
func takeAt(v any, path []string) (document, taken any, err error) {
	if len(path) == 0 {
		return nil, v, nil
	}
	token, rest := path[0], path[1:]
	switch have := v.(type) {
	case map[string]any:
		old, ok := have[token]
		if !ok {
			return nil, nil, errNotThere
		}
		if len(rest) == 0 {
			delete(have, token)
			return have, old, nil
		}
		if have[token], taken, err = takeAt(old, rest); err != nil {
			return nil, nil, err
		}
		return have, taken, nil
	case []any:
		n, err := indexOf(token, len(have))
		if err != nil {
			return nil, nil, err
		}
		if len(rest) == 0 {
			old := have[n]
			return slices.Delete(have, n, n+1), old, nil
		}
		if have[n], taken, err = takeAt(have[n], rest); err != nil {
			return nil, nil, err
		}
		return have, taken, nil
	}
	return nil, nil, errNotThere
}

func cloneJSON(v any) any {
	switch v := v.(type) {
	case map[string]any:
		m := make(map[string]any, len(v))
		for key, e := range v {
			m[key] = cloneJSON(e)
		}
		return m
	case []any:
		list := make([]any, len(v))
		for i, e := range v {
			list[i] = cloneJSON(e)
		}
		return list
	}
	return v
}

// equalJSON compares as RFC 6902, section 4.6, has it: numbers by their value.
func equalJSON(a, b any) bool {
	switch a := a.(type) {
	case map[string]any:
		b, ok := b.(map[string]any)
		return ok && maps.EqualFunc(a, b, equalJSON)
	case []any:
		b, ok := b.([]any)
		return ok && slices.EqualFunc(a, b, equalJSON)
	case json.Number:
		b, ok := b.(json.Number)
		if !ok || a == b {
			return ok
		}
		x, err1 := a.Float64()
		y, err2 := b.Float64()
		return err1 == nil && err2 == nil && x == y && (x > -1<<53 && x < 1<<53) // above, not all integers are told apart
	}
	return a == b
}
