package authz

import (
	"encoding/json"
	"errors"
	"reflect"
	"strings"
	"testing"
)

func TestParse(t *testing.T) {
	for _, c := range []struct{ name, text, want string }{
		{"a.json", `{"a": [1, {"b": null}], "c": "\u0041"}`, `{"a":[1,{"b":null}],"c":"A"}`},
		{"a.json", "\ufeff{}", `{}`},
		{"a.yaml", "a:\n- 1\n- {b: null}\nc: A\n", `{"a":[1,{"b":null}],"c":"A"}`},
		{"a.yaml", "t: 2026-01-01T00:00:00Z\nu: 1000:1000\nn: 0x10\nf: 1.5\n4711: yes\n",
			`{"4711":"yes","f":1.5,"n":16,"t":"2026-01-01T00:00:00Z","u":"1000:1000"}`},
		{"a.yml", "--- {a: true}\n", `{"a":true}`},
	} {
		doc, err := parse(c.name, []byte(c.text))
		if err != nil {
			t.Errorf("%s: %v", c.text, err)
			continue
		}
		if got, _ := json.Marshal(doc.value); string(got) != c.want {
			t.Errorf("%s: %s, want %s", c.text, got, c.want)
		}
	}
}

func TestParseErrors(t *testing.T) {
	deep := strings.Repeat("[", maxDepth+1) + strings.Repeat("]", maxDepth+1)
	for _, c := range []struct {
		name, text string
		line       int
		want       string
	}{
		{"a.json", "", 1, "ends too early"},
		{"a.json", "{\n\"a\":\n", 3, "ends too early"},
		{"a.json", "{\n\"a\": x}", 2, "invalid character"},
		{"a.json", "{}\n{}", 2, "more text after"},
		{"a.json", "{}\nx", 2, "more text after"},
		{"a.json", "{\"a\": 1,\n\"a\": 2}", 2, `key "a" is given twice`},
		{"a.json", "{\"x\": {\"a\": 1,\n\n\"a\": 2}}", 3, `key "a" is given twice`},
		{"a.json", deep, 1, "nested deeper"},
		{"a.json", strings.Repeat("[", 1<<20), 1, "nested deeper"},
		{"a.json", "\"\xff\"", 0, "UTF-8"},
		{"a.yaml", "", 0, "empty"},
		{"a.yaml", "# nothing\n", 0, "empty"},
		{"a.yaml", "a: 1\na: 2", 2, `key "a" is given twice`},
		{"a.yaml", "a: &x 1\nb: *x", 1, "anchors"},
		{"a.yaml", "a: {b: 1}\nc: {<<: {b: 2}}", 2, "plain name"},
		{"a.yaml", "a: !!binary aGk=", 1, "tags"},
		{"a.yaml", "a: !x 1", 1, "tags"},
		{"a.yaml", "a: .nan", 1, "not a number"},
		{"a.yaml", "a: 1\n---\nb: 2", 2, "second YAML"},
		{"a.yaml", "a: [1", 1, "did not find"},
		{"a.yaml", "a: 1\n\tb: 2", 2, "tab character"},
		{"a.yaml", "[1]: 2", 1, "plain name"},
		{"a.yaml", deep, 1, "nested deeper"},
		{"a.yaml", strings.Repeat("[", 1<<20), 0, "depth"},
		{"a.yaml", strings.Repeat("- ", 1<<20), 0, "depth"},
		{"a.yaml", strings.Repeat("a", maxYAML+1), 0, "larger than"},
	} {
		_, err := parse(c.name, []byte(c.text))
		var at *lineError
		if !errors.As(err, &at) {
			t.Errorf("%s %.30q: %v", c.name, c.text, err)
			continue
		}
		if c.line != 0 && at.line != c.line || !strings.Contains(at.text, c.want) {
			t.Errorf("%s %.30q: line %d: %s; want line %d: %s", c.name, c.text, at.line, at.text, c.line, c.want)
		}
	}
}

func TestLineOfPlace(t *testing.T) {
	docs := map[string]string{
		"a.json": "{\n\"a\": {\n\"b\": [1,\n2]},\n\"c\": {\"b\": 1}\n}",
		"a.yaml": "# first\na:\n  b: [1,\n  2]\nc: {b: 1}\n",
	}
	for name, want := range map[string][]int{"a.json": {1, 2, 3, 4, 5, 5, 2}, "a.yaml": {2, 2, 3, 4, 5, 5, 2}} {
		doc, err := parse(name, []byte(docs[name]))
		if err != nil {
			t.Fatal(err)
		}
		var got []int
		for _, path := range [][]string{{}, {"a"}, {"a", "b"}, {"a", "b", "1"}, {"c"}, {"c", "b"}, {"a", "nosuch", "b"}} {
			got = append(got, doc.line(path))
		}
		if !reflect.DeepEqual(got, want) {
			t.Errorf("%s: lines %v, want %v", name, got, want)
		}
	}
}

func TestCheckData(t *testing.T) {
	const ok = `"profile": "p", "not_after": "2200-01-01T00:00:00Z"`
	for _, c := range []struct{ path, text, want string }{
		{"grants/a", `{"T": {` + ok + `}}`, ""},
		{"grants/a/T", `{` + ok + `, "sources": ["10.0.0.0/8", "::/0"], "not_before": "2199-12-31T23:00:00-05:00"}`,
			"not_after: the grant ends before it begins"},
		{"grants/a/T", `{` + ok + `, "sources": ["10.0.0.0/8", "::/0"], "reason": "x", "approved_by": "y"}`, ""},
		{"grants/a", `{"T": {"profile": "p"}}`, "T: missing property 'not_after'"},
		{"grants/a", `{"T": {"profile": "p", "not_after": "2200-01-01 00:00:00Z"}}`, "no RFC 3339 time"},
		{"grants/a", `{"T": {"profile": "p", "not_after": "2200-01-01T00:00:00"}}`, "T.not_after"},
		{"grants/a", `{"T": {"profile": "p", "not_after": "2300-01-01T00:00:00Z"}}`, "out of range"},
		{"grants/a", `{"T": {"profile": "p", "not_after": 1}}`, "got number, want string"},
		{"grants/a", `{"T": {` + ok + `, "sources": []}}`, "T.sources: minItems"},
		{"grants/a", `{"T": {` + ok + `, "sources": ["x"]}}`, `T.sources[0]: "x" is no CIDR prefix`},
		{"grants/a", `{"T": {` + ok + `, "sources": ["fe80::1%eth0/64"]}}`, "no CIDR prefix"},
		{"grants/a", `{"T": {` + ok + `, "permit": {}}}`, "additional properties 'permit'"},
		{"grants/a", `{"T 1": {` + ok + `}}`, `"T 1" is no ticket`},
		{"grants/a", `{"T\u001b[31m": {}}`, `"T[31m" is no ticket`},
		{"grants/a", `[]`, "an object is expected"},
		{"grants", `{"A": {}}`, ""},
		{"grants", `{"A": {"T": {}}}`, `A.T: "A" is no user or group`},
		{"group_grants/a/T", `{}`, "missing properties"},
		{"profiles/p", `{"image": "x", "memory": "512Mi", "user": "1:2", "pids": 5, "cpus": 0.5}`, ""},
		{"profiles/p", `{"image": "x", "memory": 512}`, "memory"},
		{"profiles/p", `{"image": "x", "memory": "512MB"}`, "memory: '512MB' does not match pattern"},
		{"profiles/p", `{"image": ""}`, "image: "},
		{"profiles/p", `{}`, "missing property 'image'"},
		{"profiles/p", `{"image": "x", "user": "root"}`, "user:"},
		{"profiles/p", `{"image": "x", "groups": [-1]}`, "groups[0]"},
		{"profiles/p", `{"image": "x", "mounts": [{"source": "/a", "target": "b"}]}`, "mounts[0].target"},
		{"profiles/p", `{"image": "x", "mounts": [{"source": "/a", "target": "/b", "readonly": false}]}`, "'readonly'"},
		{"profiles/p", `{"image": "x", "permit": {"max_duration": "1 hour"}}`, "permit.max_duration"},
		{"profiles/p", `{"image": "x", "permit": {"idle_timeout": "-1s"}}`, "permit.idle_timeout"},
		{"profiles/p", `{"image": "x", "permit": {"root": true}}`, "permit: additional properties 'root'"},
		{"profiles/p", `{"image": "x", "privileged": true}`, "'privileged'"},
		{"profiles", `{"../x": {"image": "x"}}`, "is no name for a profile"},
		{"users/a", `{"keys": []}`, ""},
		{"users/a", `{"keys": ["` + aliceKey + ` c"], "groups": ["g"]}`, ""},
		{"users/a", `{"keys": ["no-pty ` + aliceKey + `"]}`, "keys[0]: options"},
		{"users/a", `{"keys": ["` + aliceKey + `", "x"]}`, "keys[1]:"},
		{"users/a", `{"keys": "` + aliceKey + `"}`, "got string, want array"},
		{"users/a", `{}`, "missing property 'keys'"},
		{"users/a", `{"keys": [], "groups": ["G"]}`, "groups[0]"},
		{"users/a b", `{"keys": []}`, "is no user name"},
		{"other/x", `[1]`, ""},
		{"system", `{}`, "reserved"},
	} {
		doc, err := parse("x.json", []byte(c.text))
		if err != nil {
			t.Errorf("%s: %v", c.text, err)
			continue
		}
		got := ""
		if err := checkData(strings.Split(c.path, "/"), doc.value); err != nil {
			got = err.Error()
		}
		if (c.want == "") != (got == "") || !strings.Contains(got, c.want) {
			t.Errorf("%s %s: %q, want %q", c.path, c.text, got, c.want)
		}
	}
}

func FuzzDataFile(f *testing.F) {
	f.Add(true, []byte(`{"T": {"profile": "p", "not_after": "2200-01-01T00:00:00Z", "sources": ["::/0"]}}`))
	f.Add(true, []byte("{\"a\": 1,\n\"a\": 2}"))
	f.Add(false, []byte("T:\n  profile: p\n  not_after: 2200-01-01T00:00:00Z\n"))
	f.Add(false, []byte("a: &x [1, 0x10, .5, ~, true]\nb: *x\n? [1]\n: 2\n"))
	f.Fuzz(func(t *testing.T, isJSON bool, text []byte) {
		name := "x.yaml"
		if isJSON {
			name = "x.json"
		}
		lines := 1 + strings.Count(string(text), "\n")
		doc, err := parse(name, text)
		if err != nil {
			var at *lineError
			// yaml.v3 may count a line more at the end, and counts other line breaks too.
			if !errors.As(err, &at) || at.line < 0 || isJSON && at.line > lines {
				t.Fatalf("%v at line %v of %d", err, at, lines)
			}
			return
		}
		again, err := json.Marshal(doc.value)
		if err != nil {
			t.Fatalf("not JSON: %v", err)
		}
		second, err := parse("x.json", again)
		if err != nil || !reflect.DeepEqual(second.value, doc.value) {
			t.Fatalf("%#v\n%#v\n%v", doc.value, second.value, err)
		}
		for _, root := range []string{"users", "profiles", "grants"} {
			if err := checkData([]string{root}, doc.value); err != nil {
				if line := doc.line(err.path); line < 1 || isJSON && line > lines {
					t.Fatalf("%v: line %d of %d", err, line, lines)
				}
			}
		}
	})
}
