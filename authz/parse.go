package authz

import (
	"bytes"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"math"
	"path"
	"regexp"
	"strconv"
	"strings"
	"unicode/utf8"

	"go.yaml.in/yaml/v3"
)

// Bounds of one data file. YAML is slower to parse and its tree larger.
const (
	maxJSON  = 64 << 20
	maxYAML  = 4 << 20
	maxDepth = 32
)

// FileError is a policy or data file that can't be used, and where.
type FileError struct {
	File string // path as opened
	Line int    // counted from 1; 0: the file as a whole
	Text string // what is wrong and what to do
}

func (e *FileError) Error() string {
	if e.Line > 0 {
		return fmt.Sprintf("%s:%d: %s", e.File, e.Line, e.Text)
	}
	return e.File + ": " + e.Text
}

// lineError is an error at a line of the text at hand; 0: unknown.
type lineError struct {
	line int
	text string
}

func (e *lineError) Error() string { return e.text }

// document is the content of a data file.
type document struct {
	value any
	// line gives the line of the value at a path, or of the nearest value above it.
	line func(path []string) int
}

// parse reads a data file's text by its name's ending. The error is a *lineError.
func parse(name string, text []byte) (document, error) {
	if !utf8.Valid(text) {
		return document{}, &lineError{text: "not valid UTF-8"}
	}
	text = bytes.TrimPrefix(text, []byte("\ufeff"))
	if path.Ext(name) == ".json" {
		return parseJSON(text)
	}
	return parseYAML(text)
}

// parseJSON is stricter than encoding/json: a key given twice is an error (which of two not_after holds?), and so is a
// second value.
func parseJSON(text []byte) (document, error) {
	if len(text) > maxJSON {
		return document{}, &lineError{text: fmt.Sprintf("larger than %d MiB; split it by user", maxJSON>>20)}
	}
	w := newJSONWalk(text, nil)
	value, err := w.document()
	if err != nil {
		offset := w.dec.InputOffset()
		var syntax *json.SyntaxError
		what := err.Error()
		if errors.As(err, &syntax) {
			offset = syntax.Offset
		}
		if errors.Is(err, io.EOF) || errors.Is(err, io.ErrUnexpectedEOF) {
			what, offset = "the file ends too early", int64(len(text))
		}
		return document{}, &lineError{line: lineAt(text, offset), text: what}
	}
	return document{value: value, line: func(path []string) int {
		again := newJSONWalk(text, path)
		_, _ = again.document() // parsed well the first time
		return lineAt(text, again.found)
	}}, nil
}

func lineAt(text []byte, offset int64) int {
	return 1 + bytes.Count(text[:min(max(offset, 0), int64(len(text)))], []byte("\n"))
}

// jsonWalk builds a value token by token and notes the offset of the value at target.
type jsonWalk struct {
	text    []byte
	dec     *json.Decoder
	target  []string
	matched int   // elements of target found so far
	found   int64 // offset of the deepest of them
}

func newJSONWalk(text []byte, target []string) *jsonWalk {
	dec := json.NewDecoder(bytes.NewReader(text))
	dec.UseNumber()
	return &jsonWalk{text: text, dec: dec, target: target}
}

func (w *jsonWalk) document() (any, error) {
	value, err := w.value(0, true)
	if err != nil {
		return nil, err
	}
	if _, err := w.dec.Token(); !errors.Is(err, io.EOF) {
		return nil, errors.New("more text after the end of the value")
	}
	return value, nil
}

// value reads one value; onPath says that all elements above it are those of target.
func (w *jsonWalk) value(depth int, onPath bool) (any, error) {
	token, err := w.dec.Token()
	if err != nil {
		return nil, err
	}
	delim, ok := token.(json.Delim)
	if !ok {
		return token, nil
	}
	if depth == maxDepth {
		return nil, fmt.Errorf("nested deeper than %d", maxDepth)
	}
	if delim == '[' {
		list := []any{}
		for w.dec.More() {
			below := w.enter(depth, onPath, strconv.Itoa(len(list)))
			if below {
				w.found += int64(len(w.text[w.found:]) - len(bytes.TrimLeft(w.text[w.found:], ", \t\r\n")))
			}
			v, err := w.value(depth+1, below)
			if err != nil {
				return nil, err
			}
			list = append(list, v)
		}
		_, err := w.dec.Token()
		return list, err
	}
	object := map[string]any{}
	for w.dec.More() {
		token, err := w.dec.Token()
		if err != nil {
			return nil, err
		}
		key, ok := token.(string)
		if !ok {
			return nil, errors.New("an object's key must be a string")
		}
		if _, twice := object[key]; twice {
			return nil, fmt.Errorf("key %q is given twice", Printable(key, 64))
		}
		below := w.enter(depth, onPath, key)
		if object[key], err = w.value(depth+1, below); err != nil {
			return nil, err
		}
	}
	_, err = w.dec.Token()
	return object, err
}

func (w *jsonWalk) enter(depth int, onPath bool, element string) bool {
	if !onPath || depth >= len(w.target) || w.target[depth] != element {
		return false
	}
	if depth >= w.matched {
		w.matched, w.found = depth+1, w.dec.InputOffset()
	}
	return true
}

var yamlLine = regexp.MustCompile(`^yaml: line (\d+): `)

// parseYAML reads one YAML document as JSON would have it: no anchors, aliases, merge keys or tags, which no reader of
// a grant expects. (yaml.v3 bounds nesting, where a parser without a bound would overflow its stack on hostile data.)
func parseYAML(text []byte) (_ document, err error) {
	if len(text) > maxYAML {
		return document{}, &lineError{text: fmt.Sprintf("larger than %d MiB; use JSON, or split it", maxYAML>>20)}
	}
	defer func() {
		if p := recover(); p != nil {
			err = &lineError{text: "not valid YAML"}
		}
	}()
	dec := yaml.NewDecoder(bytes.NewReader(text))
	var root yaml.Node
	if err := dec.Decode(&root); err != nil {
		if errors.Is(err, io.EOF) {
			return document{}, &lineError{text: "the file is empty"}
		}
		return document{}, yamlError(err)
	}
	var second yaml.Node
	if err := dec.Decode(&second); !errors.Is(err, io.EOF) {
		if err != nil {
			return document{}, yamlError(err)
		}
		return document{}, &lineError{line: second.Line, text: "a second YAML document begins here"}
	}
	if root.Kind != yaml.DocumentNode || len(root.Content) != 1 {
		return document{}, &lineError{text: "the file is empty"}
	}
	value, err := yamlValue(root.Content[0], 0)
	if err != nil {
		return document{}, err
	}
	return document{value: value, line: func(path []string) int { return yamlLineOf(root.Content[0], path) }}, nil
}

func yamlError(err error) *lineError {
	text := err.Error()
	if m := yamlLine.FindStringSubmatch(text); m != nil {
		line, _ := strconv.Atoi(m[1])
		return &lineError{line: line, text: strings.TrimPrefix(text, m[0])}
	}
	return &lineError{text: strings.TrimPrefix(text, "yaml: ")}
}

func yamlValue(n *yaml.Node, depth int) (any, error) {
	bad := func(text string) (any, error) { return nil, &lineError{line: n.Line, text: text} }
	if depth == maxDepth && n.Kind != yaml.ScalarNode {
		return bad(fmt.Sprintf("nested deeper than %d", maxDepth))
	}
	if n.Kind == yaml.AliasNode || n.Anchor != "" {
		return bad("anchors and aliases are not supported: write the value out")
	}
	if n.Style&yaml.TaggedStyle != 0 {
		return bad("tags are not supported: quote the value to make it a string")
	}
	switch n.Kind {
	case yaml.SequenceNode:
		list := make([]any, 0, len(n.Content))
		for _, item := range n.Content {
			v, err := yamlValue(item, depth+1)
			if err != nil {
				return nil, err
			}
			list = append(list, v)
		}
		return list, nil
	case yaml.MappingNode:
		object := make(map[string]any, len(n.Content)/2)
		for i := 0; i+1 < len(n.Content); i += 2 {
			key := n.Content[i]
			if key.Kind != yaml.ScalarNode || key.Anchor != "" || key.ShortTag() == "!!merge" {
				return nil, &lineError{line: key.Line, text: "a key must be a plain name"}
			}
			if _, twice := object[key.Value]; twice {
				text := fmt.Sprintf("key %q is given twice", Printable(key.Value, 64))
				return nil, &lineError{line: key.Line, text: text}
			}
			v, err := yamlValue(n.Content[i+1], depth+1)
			if err != nil {
				return nil, err
			}
			object[key.Value] = v
		}
		return object, nil
	case yaml.ScalarNode:
		return yamlScalar(n)
	}
	return bad("not a value")
}

func yamlScalar(n *yaml.Node) (any, error) {
	switch n.ShortTag() {
	case "!!null":
		return nil, nil
	case "!!bool":
		var v bool
		if err := n.Decode(&v); err != nil {
			return nil, yamlError(err)
		}
		return v, nil
	case "!!int":
		var signed int64
		if n.Decode(&signed) == nil {
			return json.Number(strconv.FormatInt(signed, 10)), nil
		}
		var unsigned uint64
		if n.Decode(&unsigned) == nil {
			return json.Number(strconv.FormatUint(unsigned, 10)), nil
		}
		return nil, &lineError{line: n.Line, text: "the number is too large"}
	case "!!float":
		var v float64
		if err := n.Decode(&v); err != nil || math.IsNaN(v) || math.IsInf(v, 0) {
			return nil, &lineError{line: n.Line, text: "not a number that JSON has"}
		}
		return json.Number(strconv.FormatFloat(v, 'g', -1, 64)), nil
	default: // !!str, and !!timestamp, which is a string here as it is in JSON
		return n.Value, nil
	}
}

func yamlLineOf(n *yaml.Node, path []string) int {
	line := n.Line
	for _, element := range path {
		var next *yaml.Node
		switch n.Kind {
		case yaml.SequenceNode:
			if i, err := strconv.Atoi(element); err == nil && i >= 0 && i < len(n.Content) {
				next, line = n.Content[i], n.Content[i].Line
			}
		case yaml.MappingNode:
			for i := 0; i+1 < len(n.Content); i += 2 {
				if n.Content[i].Value == element {
					next, line = n.Content[i+1], n.Content[i].Line
				}
			}
		}
		if next == nil {
			break
		}
		n = next
	}
	return line
}
