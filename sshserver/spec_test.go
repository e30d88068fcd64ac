package sshserver

import (
	"encoding/json"
	"strings"
	"testing"
	"time"

	"github.com/sallyport/sallyport/authz"
)

func TestSpecOf(t *testing.T) {
	d := authz.Login{
		Allow: true, Ticket: "OPS-1", Profile: "p", NotAfter: time.Unix(2e9, 0),
		Sandbox: authz.Sandbox{
			Image: "debug:1", User: "1001:4", Memory: "512Mi", TmpSize: "1G", Groups: []uint32{4},
			Mounts:    []authz.Mount{{Source: "/var/log/x", Target: "/logs"}},
			Namespace: "debug", Nodes: map[string]string{"pool": "debug"}, Priority: "low",
			Spread: []string{"zone"}, Pod: json.RawMessage(`{"spec":{}}`),
		},
	}
	spec, err := specOf("gate", "session", "alice", d)
	if err != nil {
		t.Fatal(err)
	}
	tpl, o := spec.Template, spec.Owner
	if tpl.UID != 1001 || tpl.GID != 4 || tpl.Memory != 512<<20 || tpl.TmpSize != 1e9 || len(tpl.Mounts) != 1 || tpl.Mounts[0].Write {
		t.Errorf("template %+v", tpl)
	}
	if tpl.Namespace != "debug" || tpl.Nodes["pool"] != "debug" || tpl.Priority != "low" || tpl.Spread[0] != "zone" || string(tpl.Pod) != `{"spec":{}}` {
		t.Errorf("template %+v", tpl)
	}
	if o.User != "alice" || o.Session != "session" || o.Grant != "OPS-1" || !o.Expires.Equal(d.NotAfter) {
		t.Errorf("owner %+v", o)
	}
	for want, change := range map[string]func(*authz.Login){
		"image":               func(d *authz.Login) { d.Sandbox.Image = "" },
		"user":                func(d *authz.Login) { d.Sandbox.User = "root" },
		"memory":              func(d *authz.Login) { d.Sandbox.Memory = "512m" },
		"tmp_size":            func(d *authz.Login) { d.Sandbox.TmpSize = "-1" },
		"cpus":                func(d *authz.Login) { d.Sandbox.CPUs = -1 },
		"permit.input":        func(d *authz.Login) { d.Permit.Input = "some" },
		"permit.max_duration": func(d *authz.Login) { d.Permit.MaxDuration = "an hour" },
		"exec_audit":          func(d *authz.Login) { d.Sandbox.ExecAudit = "maybe" },
		"exec_stuck_limit":    func(d *authz.Login) { d.Sandbox.ExecStuckLimit = "-3s" },
		"permit.idle_timeout": func(d *authz.Login) { d.Permit.IdleTimeout = "-1s" },
	} {
		bad := d
		change(&bad)
		if _, err := specOf("g", "s", "u", bad); err == nil || !strings.Contains(err.Error(), want) {
			t.Errorf("%s: error %v does not name it", want, err)
		}
	}
}

func TestParseSize(t *testing.T) {
	for s, want := range map[string]int64{
		"1": 1, "1k": 1000, "1Ki": 1024, "1.5Gi": 3 << 29, "2M": 2e6, "1Ti": 1 << 40,
		"": -1, "Mi": -1, "-1Mi": -1, "1 Mi": -1, "1mb": -1, "NaN": -1, "Inf": -1, "9999999999Ti": -1, "0": -1, "0x10": -1,
	} {
		n, err := parseSize(s)
		if (err != nil) != (want < 0) || (err == nil && n != want) {
			t.Errorf("parseSize(%q) = %d, %v, want %d", s, n, err, want)
		}
	}
}

func FuzzRequests(f *testing.F) {
	f.Add([]byte("\x00\x00\x00\x05xterm\x00\x00\x00\x50\x00\x00\x00\x18\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00"))
	f.Add([]byte("\x00\x00\x00\x04LANG\x00\x00\x00\x01C"))
	f.Fuzz(func(t *testing.T, b []byte) {
		if p, err := parsePty(b); err == nil && (p.Size.Columns > maxSide || p.Size.Rows > maxSide || len(p.Modes) > maxModes) {
			t.Errorf("pty %+v", p)
		}
		if m, err := parseEnv(b); err == nil && (strings.ContainsAny(m.Name, "=\x00") || hasNUL(m.Value) || m.Name == "") {
			t.Errorf("env %+v", m)
		}
		if c, err := parseExec(b); err == nil && (hasNUL(c) || len(c) >= maxCommand) {
			t.Errorf("exec %q", c)
		}
		if s, err := parseSignal(b); err == nil && !signals[s] {
			t.Errorf("signal %q", s)
		}
		parseWindowChange(b)
	})
}
