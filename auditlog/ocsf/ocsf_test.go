package ocsf

import (
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/sallyport/sallyport/auditlog"
)

// schema is testdata/requirements.json: what OCSF 1.8 demands of the classes and objects that are used here, restricted to the
// attributes that are written, those that are required, and those of which one is required.
type schema struct {
	Classes map[string]requirement `json:"classes"`
	Objects map[string]requirement `json:"objects"`
}

type requirement struct {
	Name       string               `json:"name"`
	Category   int                  `json:"category"`
	OneOf      []string             `json:"at_least_one"`
	Attributes map[string]attribute `json:"attributes"`
}

type attribute struct {
	Type     string `json:"type"`
	Enum     []int  `json:"enum"`
	Required bool   `json:"required"`
	Profile  string `json:"profile"`
}

func loadSchema(t testing.TB) schema {
	t.Helper()
	b, err := os.ReadFile("testdata/requirements.json")
	if err != nil {
		t.Fatal(err)
	}
	var s schema
	if err := json.Unmarshal(b, &s); err != nil || len(s.Classes) != 7 {
		t.Fatal(len(s.Classes), err)
	}
	return s
}

// validate says what an event lacks, or has and may not have.
func (s schema) validate(event []byte) error {
	var v map[string]any
	if err := json.Unmarshal(event, &v); err != nil {
		return err
	}
	uid, _ := v["class_uid"].(float64)
	c, ok := s.Classes[fmt.Sprint(int(uid))]
	if !ok {
		return fmt.Errorf("class_uid %v is none", v["class_uid"])
	}
	if v["class_name"] != c.Name || v["category_uid"] != float64(c.Category) {
		return fmt.Errorf("class %v, category %v: want %s, %d", v["class_name"], v["category_uid"], c.Name, c.Category)
	}
	if v["type_uid"] != uid*100+v["activity_id"].(float64) {
		return fmt.Errorf("type_uid %v", v["type_uid"])
	}
	metadata, _ := v["metadata"].(map[string]any)
	var profiles []string
	if all, ok := metadata["profiles"].([]any); ok {
		for _, p := range all {
			profiles = append(profiles, p.(string))
		}
	}
	return s.check("event", v, c, profiles)
}

func (s schema) check(at string, v map[string]any, r requirement, profiles []string) error {
	var errs []error
	fail := func(format string, args ...any) {
		errs = append(errs, fmt.Errorf(at+": "+format, args...))
	}
	for name, a := range r.Attributes {
		if _, ok := v[name]; !ok && a.Required && (a.Profile == "" || slices.Contains(profiles, a.Profile)) {
			fail("%s is missing", name)
		}
	}
	if len(r.OneOf) > 0 && !slices.ContainsFunc(r.OneOf, func(name string) bool { return v[name] != nil }) {
		fail("none of %v", r.OneOf)
	}
	for name, value := range v {
		a, ok := r.Attributes[name]
		switch {
		case !ok:
			fail("%s is no attribute", name)
			continue
		case a.Profile != "" && !slices.Contains(profiles, a.Profile):
			fail("%s without the profile %s", name, a.Profile)
		}
		values := []any{value}
		if inner, ok := strings.CutPrefix(a.Type, "["); ok {
			a.Type = strings.TrimSuffix(inner, "]")
			if values, ok = value.([]any); !ok {
				fail("%s is no array", name)
			}
		}
		for _, value := range values {
			switch kind, object, _ := strings.Cut(a.Type, ":"); kind {
			case "string":
				if text, ok := value.(string); !ok {
					fail("%s is no text: %v", name, value)
				} else if text == "" && a.Required {
					fail("%s is empty", name)
				}
			case "boolean":
				if _, ok := value.(bool); !ok {
					fail("%s is no boolean: %v", name, value)
				}
			case "integer":
				if n, ok := value.(float64); !ok || n != float64(int64(n)) {
					fail("%s is no integer: %v", name, value)
				} else if len(a.Enum) > 0 && !slices.Contains(a.Enum, int(n)) {
					fail("%s: %v is none of %v", name, n, a.Enum)
				}
			case "object":
				inner, ok := value.(map[string]any)
				if !ok {
					fail("%s is no object: %v", name, value)
				} else if object != "object" {
					if err := s.check(at+"."+name, inner, s.Objects[object], profiles); err != nil {
						errs = append(errs, err)
					}
				}
			default:
				fail("%s has the type %s", name, a.Type)
			}
		}
	}
	return errors.Join(errs...)
}

var at = time.Date(2026, 3, 1, 12, 0, 0, 0, time.UTC)

// session is one record of each kind that leads to an event, and more of those that lead to several.
var session = []auditlog.Body{
	&auditlog.Connect{Gate: "gate-1", Source: "192.0.2.7:4022", Local: "192.0.2.1:22", Version: "v1"},
	&auditlog.Handshake{Client: "SSH-2.0-OpenSSH_9.2"},
	&auditlog.Authenticate{User: "alice", Method: "none", Result: "asked"}, &auditlog.Authenticate{User: "alice", Method: "publickey", Result: "refused", Reason: "not this key"},
	&auditlog.Authenticate{User: "alice", Method: "publickey", KeyType: "ssh-ed25519", Fingerprint: "SHA256:abc", Result: "accepted-offer"},
	&auditlog.Authenticate{User: "alice", Method: "publickey", KeyType: "ssh-ed25519", Fingerprint: "SHA256:abc", Result: "proven"},
	&auditlog.Decision{ID: "d", Allow: true, User: "alice", Groups: []string{"ops"}, Ticket: "OPS-1", Profile: "debug", NotAfter: at.Add(time.Hour)},
	&auditlog.Decision{Reason: "no grant"},
	&auditlog.Sandbox{ID: "c0ffee", Backend: "docker", Image: "debug:1", Digest: "sha256:00", ExecAudit: "on"},
	&auditlog.Sandbox{Error: "no image"},
	&auditlog.ChannelOpen{Type: "session"}, &auditlog.ChannelOpen{Type: "odd", Error: "unknown channel type"},
	&auditlog.Request{Type: "pty-req", Term: "xterm", OK: true}, &auditlog.Request{Type: "shell", OK: true}, &auditlog.Request{Type: "exec", Command: []byte("rm -rf /\xff"), Reason: "no"},
	&auditlog.Request{Type: "tcpip-forward", Name: "localhost:0", Value: "127.0.0.1:4000", OK: true}, &auditlog.Request{Type: "auth-agent-req@openssh.com", OK: true},
	&auditlog.Request{Type: "subsystem", Name: "sftp", OK: true}, &auditlog.Request{Type: "env", Name: "A", Value: "b"},
	&auditlog.Data{Stream: auditlog.Input, Data: []byte("abc")}, &auditlog.Data{Stream: auditlog.Output, Data: []byte("de")},
	&auditlog.ChannelOpen{Type: "direct-tcpip", Target: "db.payments:5432", Originator: "127.0.0.1:1"}, &auditlog.ChannelOpen{Type: "direct-tcpip", Target: "vault:80", Error: "not permitted"},
	&auditlog.ChannelOpen{Type: "auth-agent@openssh.com", Target: "/tmp/agent"},
	&auditlog.Forward{Type: "direct-tcpip", Target: "db.payments:5432", Address: "10.0.0.7:5432", Input: 1, Output: 2, Result: "ended"}, &auditlog.Forward{Type: "tcpip-forward", Target: "localhost:0", Result: "failed", Detail: "busy"},
	&auditlog.Transfer{Protocol: "sftp", Op: "file", Path: []byte("a.csv"), Resolved: []byte("/home/a.csv"), Written: &auditlog.TransferFlow{Bytes: 3, Whole: true, SHA256: []byte{1}}},
	&auditlog.Transfer{Protocol: "sftp", Op: "file", Path: []byte("b"), Read: &auditlog.TransferFlow{Bytes: 3}}, &auditlog.Transfer{Protocol: "sftp", Op: "file", Path: []byte("b"), Read: &auditlog.TransferFlow{}, Written: &auditlog.TransferFlow{}},
	&auditlog.Transfer{Op: "copy", Path: []byte("a"), Target: []byte("b")}, &auditlog.Transfer{Op: "rename", Path: []byte("a"), Target: []byte("b"), Status: 4, Message: "failure"},
	&auditlog.Transfer{Op: "remove", Path: []byte("a"), Denied: true}, &auditlog.Transfer{Op: "mkdir", Path: []byte("/d")}, &auditlog.Transfer{Op: "list", Path: []byte("/d")}, &auditlog.Transfer{Op: "setstat", Path: []byte("a")},
	&auditlog.Transfer{Op: "undecodable", Detail: "not sftp", Unfinished: true},
	&auditlog.ProgramExec{Time: at, Exec: 1, PID: 12, Parent: 7, UID: 1000, Path: []byte("/usr/bin/curl"), Dir: []byte("/home"), Args: [][]byte{[]byte("curl"), []byte("-T"), []byte("x")}, Script: []byte{1}},
	&auditlog.ProgramExec{Exec: 1, Again: 3}, &auditlog.ProgramExec{Exec: 2, PID: 13, Error: "arguments could not be read"},
	&auditlog.ProgramStart{Exec: 1, PID: 12}, &auditlog.ProgramStart{Time: at, Exec: 1, PID: 12, Differ: true, Args: [][]byte{[]byte("other")}, File: []byte("/bin/x")},
	&auditlog.ConnectOut{Exec: 1, PID: 12, Program: []byte("/usr/bin/curl"), Address: "2001:db8::1", Port: 443, Call: "connect", Again: 2}, &auditlog.ConnectOut{PID: 12, Error: "unix"},
	&auditlog.ProgramEnd{Exec: 1, PID: 12, Code: 3}, &auditlog.ProgramEnd{Exec: 2, PID: 13, Signal: "KILL"},
	&auditlog.Unaudited{Time: at, PID: 99, File: []byte("/bin/sh"), Args: [][]byte{[]byte("sh")}},
	&auditlog.Alert{Name: "stuck", Detail: "exec reports"}, &auditlog.Exit{Code: 1}, &auditlog.ChannelClose{},
	&auditlog.Refused{Source: "198.51.100.9", Client: "SSH-2.0-x", Count: 12, Reason: "no key", First: at, Last: at}, &auditlog.Refused{Source: "other", Count: 1},
	&auditlog.End{Cause: "client-left"},
}

func TestEvents(t *testing.T) {
	s := loadSchema(t)
	for name, from := range map[string]int{"a whole log": 0, "one that lacks its start": 19} {
		c := NewConverter("s1")
		seen, uids := make(map[int]int), make(map[string]bool)
		for i, b := range session[from:] {
			rec := auditlog.Record{Sequence: uint64(i), Time: at.Add(time.Duration(i) * time.Second), Channel: 1, Body: b}
			for _, e := range c.Add(rec) {
				j, err := json.Marshal(e)
				if err != nil {
					t.Fatal(err)
				}
				seen[e.ClassUID]++
				if uids[e.Metadata.UID] {
					t.Errorf("%s: two events of UID %s", name, e.Metadata.UID)
				}
				uids[e.Metadata.UID] = true
				if err := s.validate(j); err != nil {
					t.Errorf("%s: %T: %v\n%s", name, b, err, j)
				}
			}
		}
		for _, class := range []int{FileSystemActivity, ProcessActivity, NetworkActivity, SSHActivity, TunnelActivity, FileHosting} {
			if seen[class] == 0 {
				t.Errorf("%s: no event of class %d", name, class)
			}
		}
		if from == 0 && seen[Authentication] != 7 {
			t.Errorf("%d events of authentication", seen[Authentication])
		}
	}
}

// Each event on its own: what comes first in a damaged log can be any.
func TestAlone(t *testing.T) {
	s := loadSchema(t)
	for _, b := range session {
		for _, e := range NewConverter("s1").Add(auditlog.Record{Time: at, Channel: 1, Body: b}) {
			j, err := json.Marshal(e)
			if err != nil {
				t.Fatal(err)
			}
			if err := s.validate(j); err != nil {
				t.Errorf("%T: %v\n%s", b, err, j)
			}
		}
	}
}

// The validator finds what is wrong.
func TestValidator(t *testing.T) {
	s := loadSchema(t)
	good := NewConverter("s1").Add(auditlog.Record{Time: at, Body: session[0]})[0]
	for what, spoil := range map[string]func(map[string]any){
		"missing metadata":      func(v map[string]any) { delete(v, "metadata") },
		"missing version":       func(v map[string]any) { delete(v["metadata"].(map[string]any), "version") },
		"wrong type_uid":        func(v map[string]any) { v["type_uid"] = 1 },
		"unknown attribute":     func(v map[string]any) { v["colour"] = "red" },
		"text as a number":      func(v map[string]any) { v["time"] = "now" },
		"unknown activity":      func(v map[string]any) { v["activity_id"], v["type_uid"] = 55, 400755 },
		"no endpoint":           func(v map[string]any) { delete(v, "src_endpoint"); delete(v, "dst_endpoint") },
		"an empty endpoint":     func(v map[string]any) { v["src_endpoint"] = map[string]any{"port": 1} },
		"actor without profile": func(v map[string]any) { v["actor"] = map[string]any{"user": map[string]any{"name": "x"}} },
	} {
		j, err := json.Marshal(good)
		if err != nil {
			t.Fatal(err)
		}
		var v map[string]any
		if err := json.Unmarshal(j, &v); err != nil {
			t.Fatal(err)
		}
		spoil(v)
		if j, err = json.Marshal(v); err != nil {
			t.Fatal(err)
		}
		if s.validate(j) == nil {
			t.Errorf("%s is not found", what)
		}
	}
}

// A session logs on once: by the decision. That a key was proven leads there.
func TestLogonOnce(t *testing.T) {
	c := NewConverter("s1")
	var got []int
	for i, b := range []auditlog.Body{
		&auditlog.Authenticate{User: "alice", Method: "none", Result: "asked"},
		&auditlog.Authenticate{User: "alice", Method: "publickey", KeyType: "ssh-ed25519", Fingerprint: "SHA256:abc", Result: "proven"},
		&auditlog.Decision{ID: "d", Allow: true, User: "alice", Ticket: "OPS-1"},
	} {
		for _, e := range c.Add(auditlog.Record{Sequence: uint64(i), Time: at, Body: b}) {
			got = append(got, e.ActivityID)
			if strings.Contains(string(e.Message), "  ") || strings.Contains(string(e.Message), " :") {
				t.Errorf("%q", e.Message)
			}
		}
	}
	if !slices.Equal(got, []int{6, 6, 1}) {
		t.Errorf("activities %v", got)
	}
}

// What closes was opened: a connection by its channel, a listener by the request for it.
func TestTunnels(t *testing.T) {
	s := loadSchema(t)
	c := NewConverter("s1")
	var got []string
	for i, b := range []auditlog.Body{
		&auditlog.Request{Type: "tcpip-forward", Name: "localhost:0", Value: "127.0.0.1:4000", OK: true},
		&auditlog.Request{Type: "tcpip-forward", Name: "localhost:22", Reason: "not permitted"},
		&auditlog.Request{Type: "streamlocal-forward@openssh.com", Name: "/tmp/s", Value: "/tmp/s", OK: true},
		&auditlog.Request{Type: "auth-agent-req@openssh.com", OK: true},
		&auditlog.Request{Type: "x11-req", Name: "MIT-MAGIC-COOKIE-1", Value: "screen 0", OK: true},
		&auditlog.Request{Type: "pty-req", Term: "xterm", OK: true},
		&auditlog.ChannelOpen{Type: "direct-tcpip", Target: "db:5432"},
		&auditlog.Forward{Type: "direct-tcpip", Target: "db:5432", Address: "10.0.0.7:5432", Result: "ended"},
		&auditlog.Forward{Type: "x11-req", Address: "127.0.0.1:6010", Result: "ended"},
		&auditlog.Forward{Type: "auth-agent-req@openssh.com", Result: "failed"},
		&auditlog.Forward{Type: "streamlocal-forward@openssh.com", Target: "/tmp/s", Address: "/tmp/s", Result: "ended"},
		&auditlog.Forward{Type: "tcpip-forward", Target: "localhost:0", Address: "127.0.0.1:4000", Result: "cut-off"},
	} {
		for _, e := range c.Add(auditlog.Record{Sequence: uint64(i), Time: at, Body: b}) {
			if e.ClassUID != TunnelActivity {
				continue
			}
			j, err := json.Marshal(e)
			if err != nil {
				t.Fatal(err)
			}
			if err := s.validate(j); err != nil {
				t.Errorf("%v\n%s", err, j)
			}
			to := ""
			if e.DstEndpoint != nil && e.DstEndpoint.Port > 0 {
				to = fmt.Sprint(" ", e.DstEndpoint.Port)
			} else if e.DstEndpoint != nil {
				to = " " + string(e.DstEndpoint.Name)
			}
			got = append(got, e.ActivityName+" "+strings.TrimPrefix(e.TunnelType, "SSH ")+to)
		}
	}
	want := []string{"Open tcpip-forward 4000", "Open streamlocal-forward@openssh.com /tmp/s", "Open auth-agent-req@openssh.com", "Open x11-req", "Open direct-tcpip 5432",
		"Close direct-tcpip 5432", "Close x11-req 6010", "Close auth-agent-req@openssh.com", "Close streamlocal-forward@openssh.com /tmp/s", "Close tcpip-forward 4000"}
	if !slices.Equal(got, want) {
		t.Errorf("got\n%s\nwant\n%s", strings.Join(got, "\n"), strings.Join(want, "\n"))
	}
}
