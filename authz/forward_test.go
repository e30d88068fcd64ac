package authz

import (
	"os"
	"path/filepath"
	"strings"
	"testing"
)

// What may stand in permit.forward and permit.listen, and what an error tells to write.
func TestTargets(t *testing.T) {
	for _, tc := range []struct {
		entry  string
		listen bool
		remedy string // in the error; empty: it is good
	}{
		{entry: "db.payments:5432"}, {entry: "DB_1:1"}, {entry: "*.svc:8000-8010"}, {entry: "**.svc:*"}, {entry: "*:*"},
		{entry: "10.0.0.1:22"}, {entry: "10.0.0.0/8:*"}, {entry: "[2001:db8::/32]:443"}, {entry: "[::1]:65535"},
		{entry: "unix:/run/app.sock"}, {entry: "unix:/srv/*/?.sock"}, {entry: "unix:/srv/**/a:80"},
		{entry: "localhost:0", listen: true}, {entry: "*:*", listen: true}, {entry: "unix:/tmp/*", listen: true},

		{entry: "", remedy: "want host:port"},
		{entry: "db", remedy: "want host:port"},
		{entry: ":80", remedy: "want host:port"},
		{entry: "db:", remedy: "want a port"},
		{entry: "db:0", remedy: "want a port of 1 to 65535"},
		{entry: "db:65536", remedy: "want a port"},
		{entry: "db:080", remedy: "want a port"},
		{entry: "db:+80", remedy: "want a port"},
		{entry: "db:90-80", remedy: "want a port"},
		{entry: "db:0-80", remedy: "want a port"},
		{entry: "db:0-80", listen: true, remedy: "want a port"},
		{entry: "db:1-2-3", remedy: "want a port"},
		{entry: "db:http", remedy: "want a port"},
		{entry: "db.:80", remedy: "without"},
		{entry: "d b:80", remedy: "want a name"},
		{entry: "a..b:80", remedy: "want a name"},
		{entry: "{a,b}:80", remedy: "want a name"},
		{entry: "[a]:80", remedy: "in brackets"},
		{entry: "[10.0.0.1]:80", remedy: "in brackets"},
		{entry: "[::1:80", remedy: "in brackets"},
		{entry: "::1:80", remedy: "write [::1]:80"},
		{entry: "2001:db8::/32:443", remedy: "write [2001:db8::/32]:443"},
		{entry: "10.0.0.1/8:80", remedy: "write 10.0.0.0/8"},
		{entry: "10.0.0:80", remedy: "want an IP address"},
		{entry: "10.0.0.0/33:80", remedy: "want an IP address"},
		{entry: "[fe80::1%eth0]:80", remedy: "want an IP address"},
		{entry: "[::ffff:10.0.0.1]:80", remedy: "10.0.0.1"},
		{entry: "[::ffff:10.0.0.0/104]:80", remedy: "IPv4 is written as IPv4"},
		{entry: strings.Repeat("a", 254) + ":80", remedy: "want a name"},
		{entry: "unix:run/app.sock", remedy: "absolute path"},
		{entry: "unix:/run/../app.sock", remedy: "absolute path"},
		{entry: "unix:/run/", remedy: "absolute path"},
		{entry: "unix:/", remedy: "absolute path"},
		{entry: "unix:@abstract", remedy: "absolute path"},
		{entry: "unix:/run/[ab]", remedy: "pattern"},
		{entry: "unix:/run/a\x1bb", remedy: "pattern"},
	} {
		err := checkTarget(tc.entry, tc.listen)
		switch {
		case tc.remedy == "" && err != nil:
			t.Errorf("%q: %v", tc.entry, err)
		case tc.remedy != "" && (err == nil || !strings.Contains(err.Error(), tc.remedy)):
			t.Errorf("%q: error %v, want one with %q", tc.entry, err, tc.remedy)
		}
	}
}

// A bad entry is an error of its file with its place, and profiles that other ways lead around are pointed out.
func TestForwardData(t *testing.T) {
	err := checkData([]string{"profiles"}, map[string]any{"p": map[string]any{
		"image": "i", "permit": map[string]any{"listen": []any{"localhost:0", "2001:db8::1:80"}},
	}})
	if err == nil || err.Error() != `p.permit.listen[1]: "2001:db8::1:80": IPv6 stands in brackets: write [2001:db8::1]:80` {
		t.Errorf("error %v", err)
	}
	dir := t.TempDir()
	text := `{
		"open": {"image": "i", "permit": {"forward": ["db:1"], "listen": ["*:*"], "agent": true, "x11": true, "transfer": {"deny_download": true}}},
		"shut": {"image": "i", "permit": {"forward": [], "listen": [], "agent": false, "transfer": {"deny_download": true}}}}`
	if err := os.WriteFile(filepath.Join(dir, "profiles.json"), []byte(text), 0o600); err != nil {
		t.Fatal(err)
	}
	warnings := open(t, Config{Data: dir}).Warnings()
	if len(warnings) != 1 || !strings.Contains(warnings[0], "profile open: transfer.deny_download holds for sftp and scp alone; forward, listen, agent, x11 is permitted too") {
		t.Errorf("warnings %q", warnings)
	}
}

// A permit of one's own Rego is held to the same form.
func TestForwardOfOwnRego(t *testing.T) {
	l := Login{Ticket: "t", Profile: "p", Permit: Permit{Forward: []string{"db:1", "db"}}}
	if err := checkLogin(l); err == nil || !strings.Contains(err.Error(), "permit.forward[1]") {
		t.Errorf("error %v", err)
	}
}
