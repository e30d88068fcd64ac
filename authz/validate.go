package authz

import (
	"errors"
	"fmt"
	"io/fs"
	"maps"
	"net/netip"
	"slices"
	"strconv"
	"strings"
	"sync"
	"time"

	"github.com/santhosh-tekuri/jsonschema/v6"

	"github.com/sallyport/sallyport/authz/schema"
)

// schemas compiles the embedded JSON Schemas once; they are part of the program, so an error is the program's.
var schemas = sync.OnceValues(func() (map[string]*jsonschema.Schema, error) {
	names, err := fs.Glob(schema.Files, "*.json")
	if err != nil {
		return nil, err
	}
	const base = "sallyport:///"
	compiler := jsonschema.NewCompiler()
	for _, name := range names {
		file, err := schema.Files.Open(name)
		if err != nil {
			return nil, err
		}
		doc, err := jsonschema.UnmarshalJSON(file)
		_ = file.Close() // embedded
		if err == nil {
			err = compiler.AddResource(base+name, doc)
		}
		if err != nil {
			return nil, fmt.Errorf("schema %s: %w", name, err)
		}
	}
	compiled := make(map[string]*jsonschema.Schema, len(names))
	for _, name := range names {
		if compiled[name], err = compiler.Compile(base + name); err != nil {
			return nil, fmt.Errorf("schema %s: %w", name, err)
		}
	}
	return compiled, nil
})

// placeError is an error at a place in a document.
type placeError struct {
	path []string
	text string
}

func (e *placeError) Error() string {
	if len(e.path) == 0 {
		return e.text
	}
	place := ""
	for _, element := range e.path {
		if _, err := strconv.Atoi(element); err == nil {
			place += "[" + element + "]"
			continue
		}
		if place != "" {
			place += "."
		}
		place += Printable(element, 64)
	}
	return place + ": " + e.text
}

// under returns err with its place moved below path.
func under(err *placeError, path ...string) *placeError {
	if err == nil {
		return nil
	}
	return &placeError{path: slices.Concat(path, err.path), text: err.text}
}

// matches checks a value against one of the embedded schemas.
func matches(name string, value any) *placeError {
	all, err := schemas()
	if err != nil {
		return &placeError{text: err.Error()}
	}
	err = all[name].Validate(value)
	if err == nil {
		return nil
	}
	var invalid *jsonschema.ValidationError
	if !errors.As(err, &invalid) {
		return &placeError{text: err.Error()}
	}
	// The first of the leaves, in an order of our own: a map's is random.
	var leaves []*placeError
	var collect func(*jsonschema.ValidationError)
	collect = func(e *jsonschema.ValidationError) {
		for _, cause := range e.Causes {
			collect(cause)
		}
		if len(e.Causes) == 0 {
			text := e.Error()
			if _, after, ok := strings.Cut(text, "': "); ok && strings.HasPrefix(text, "at '") {
				text = after
			}
			leaves = append(leaves, &placeError{path: e.InstanceLocation, text: Printable(text, 300)})
		}
	}
	collect(invalid)
	return slices.MinFunc(leaves, func(a, b *placeError) int { return strings.Compare(a.Error(), b.Error()) })
}

// checkData checks what a file holds at its data path: names, each entry against its schema, and what a schema can't
// say. The place in the error is relative to the file.
func checkData(path []string, value any) *placeError {
	if len(path) == 0 {
		return each(value, func(root string, v any) *placeError { return checkData([]string{root}, v) })
	}
	switch path[0] {
	case "users":
		return checkEntries(path[1:], value, 1, checkUserEntry)
	case "profiles":
		return checkEntries(path[1:], value, 1, checkProfileEntry)
	case "grants", "group_grants":
		return checkEntries(path[1:], value, 2, checkGrantEntry)
	case "sallyport", "system":
		return &placeError{text: fmt.Sprintf("data.%s is reserved; choose another name", path[0])}
	}
	return nil
}

// checkEntries calls check for each entry depth levels down; path is how much of the way the file's name has gone.
func checkEntries(path []string, value any, depth int, check func(path []string, value any) *placeError) *placeError {
	if len(path) > depth {
		return &placeError{text: "the file's path goes deeper than the data: an entry is one file at the smallest"}
	}
	if len(path) == depth {
		return check(path, value)
	}
	return each(value, func(name string, v any) *placeError {
		return checkEntries(append(slices.Clone(path), name), v, depth, check)
	})
}

func each(value any, check func(name string, v any) *placeError) *placeError {
	object, ok := value.(map[string]any)
	if !ok {
		return &placeError{text: "an object is expected here: {\"name\": ...}"}
	}
	for _, name := range slices.Sorted(maps.Keys(object)) {
		if err := check(name, object[name]); err != nil {
			return under(err, name)
		}
	}
	return nil
}

func checkUserEntry(path []string, value any) *placeError {
	if !userName.MatchString(path[0]) {
		return &placeError{text: fmt.Sprintf("%q is no user name: %v", Printable(path[0], 64), ErrUserName)}
	}
	if err := matches("user.json", value); err != nil {
		return err
	}
	keys, _ := value.(map[string]any)["keys"].([]any)
	for i, key := range keys {
		line, _ := key.(string)
		if _, err := ParseKey(line); err != nil {
			return &placeError{path: []string{"keys", strconv.Itoa(i)}, text: err.Error()}
		}
	}
	return nil
}

func checkProfileEntry(path []string, value any) *placeError {
	if !profileName.MatchString(path[0]) {
		return &placeError{text: fmt.Sprintf("%q is no name for a profile: at most 64 of A-Z, a-z, 0-9, '.', '_' and '-'",
			Printable(path[0], 64))}
	}
	if err := matches("profile.json", value); err != nil {
		return err
	}
	profile, _ := value.(map[string]any)
	if err := checkDurations(profile); err != nil {
		return err
	}
	permit, _ := profile["permit"].(map[string]any)
	target, _ := profile["target"].(map[string]any)
	if err := checkJoin(target, permit); err != nil {
		return err
	}
	return under(checkPermit(permit), "permit")
}

func checkDurations(in map[string]any) *placeError {
	for _, name := range []string{"max_duration", "idle_timeout", "exec_stuck_limit"} {
		text, ok := in[name].(string)
		if !ok || text == "" {
			continue
		}
		if d, err := time.ParseDuration(text); err != nil || d <= 0 {
			text = fmt.Sprintf("%q is no duration: write 1h30m or 15m", Printable(text, 32))
			return &placeError{path: []string{name}, text: text}
		}
	}
	return nil
}

func checkGrantEntry(path []string, value any) *placeError {
	if !userName.MatchString(path[0]) {
		return &placeError{text: fmt.Sprintf("%q is no user or group: %v", Printable(path[0], 64), ErrUserName)}
	}
	if !ticketName.MatchString(path[1]) {
		return &placeError{text: fmt.Sprintf("%q is no ticket: at most 64 of A-Z, a-z, 0-9, '.', '_', '-' and '/'",
			Printable(path[1], 64))}
	}
	if err := matches("grant.json", value); err != nil {
		return err
	}
	grant := value.(map[string]any)
	end, err := grantTime(grant, "not_after")
	if err != nil {
		return err
	}
	if _, ok := grant["not_before"]; ok {
		start, err := grantTime(grant, "not_before")
		if err != nil {
			return err
		}
		if !start.Before(end) {
			return &placeError{path: []string{"not_after"}, text: "the grant ends before it begins"}
		}
	}
	sources, _ := grant["sources"].([]any)
	for i, source := range sources {
		text, _ := source.(string)
		if _, err := netip.ParsePrefix(text); err != nil {
			remedy := "write 192.0.2.0/24 or 2001:db8::/32"
			if _, err := netip.ParseAddr(text); err == nil {
				remedy = "write " + text + "/32 (or /128) for one address"
			}
			text = fmt.Sprintf("%q is no CIDR prefix: %s", Printable(text, 64), remedy)
			return &placeError{path: []string{"sources", strconv.Itoa(i)}, text: text}
		}
	}
	return nil
}

// lastInstant is the last that fits a 64 bit count of nanoseconds, by which the policy compares.
var lastInstant = time.Unix(0, 1<<63-1)

func grantTime(grant map[string]any, name string) (time.Time, *placeError) {
	text, _ := grant[name].(string)
	var t time.Time
	if err := t.UnmarshalText([]byte(text)); err != nil {
		return t, &placeError{path: []string{name}, text: fmt.Sprintf("%q is no RFC 3339 time: write 2006-01-02T15:04:05Z",
			Printable(text, 40))}
	}
	if t.After(lastInstant) || t.Before(time.Unix(0, 0)) {
		text = fmt.Sprintf("%q is out of range: 1970 to 2262", Printable(text, 40))
		return t, &placeError{path: []string{name}, text: text}
	}
	return t, nil
}
