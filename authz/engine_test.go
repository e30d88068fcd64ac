package authz

import (
	"context"
	"encoding/base64"
	"encoding/binary"
	"fmt"
	"io"
	"log/slog"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/fsnotify/fsnotify"
	"go.uber.org/goleak"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

// keyLine makes an ed25519 line of any 32 bytes: policy compares keys and never uses them.
func keyLine(seed byte) string {
	var blob []byte
	for _, s := range []string{"ssh-ed25519", strings.Repeat(string(rune(seed)), 32)} {
		blob = binary.BigEndian.AppendUint32(blob, uint32(len(s)))
		blob = append(blob, s...)
	}
	return "ssh-ed25519 " + base64.StdEncoding.EncodeToString(blob)
}

var aliceKey = keyLine('a')

const profileText = `{"image": "debug:1", "permit": {"shell": true}}`

func grantText(ticket, profile string, length time.Duration) string {
	return fmt.Sprintf(`{%q: {"profile": %q, "not_after": %q}}`, ticket, profile,
		time.Now().Add(length).UTC().Format(time.RFC3339))
}

// put writes a file as an editor does that renames: whole or not at all.
func put(t testing.TB, dir, name, text string) {
	t.Helper()
	full := filepath.Join(dir, name)
	if err := os.MkdirAll(filepath.Dir(full), 0o755); err != nil {
		t.Fatal(err)
	}
	tmp := filepath.Join(filepath.Dir(full), ".tmp")
	if err := os.WriteFile(tmp, []byte(text), 0o644); err != nil {
		t.Fatal(err)
	}
	if err := os.Rename(tmp, full); err != nil {
		t.Fatal(err)
	}
}

// world is data with alice, a profile and a grant.
func world(t testing.TB) string {
	t.Helper()
	dir := t.TempDir()
	put(t, dir, "users/alice.json", fmt.Sprintf(`{"keys": [%q], "groups": ["ops"]}`, aliceKey+" alice@laptop"))
	put(t, dir, "profiles/debug.json", profileText)
	put(t, dir, "grants/alice.json", grantText("T-1", "debug", time.Hour))
	return dir
}

func open(t testing.TB, cfg Config) *Engine {
	t.Helper()
	e, err := Open(cfg, slog.New(slog.NewTextHandler(io.Discard, nil)))
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := e.Close(); err != nil {
			t.Error(err)
		}
	})
	return e
}

func loginInput(t testing.TB, user string) LoginInput {
	t.Helper()
	key, err := ParseKey(aliceKey)
	if err != nil {
		t.Fatal(err)
	}
	return LoginInput{User: user, Source: "192.0.2.1", Key: key, ClientVersion: "SSH-2.0-test", Gate: "test"}
}

func login(t testing.TB, e *Engine) Login {
	t.Helper()
	l, err := e.Login(context.Background(), loginInput(t, "alice"))
	if err != nil {
		t.Fatal(err)
	}
	return l
}

// within waits for a condition as long as an edit may take to have effect, and a little for a busy machine.
func within(t testing.TB, what string, condition func() bool) {
	t.Helper()
	begin := time.Now()
	for !condition() {
		if time.Since(begin) > 5*time.Second {
			t.Fatalf("%s: not within 5 s", what)
		}
		time.Sleep(5 * time.Millisecond)
	}
	if took := time.Since(begin); took > time.Second {
		t.Logf("%s: took %s", what, took)
	}
}

// IPv4 is IPv4, also where a client's address or a grant's source has it in IPv6; and it is in no IPv6 network.
func TestSources(t *testing.T) {
	for _, tc := range []struct {
		cidr, source string
		allow        bool
	}{
		{"192.0.2.0/24", "192.0.2.1", true},
		{"192.0.2.0/24", "::ffff:192.0.2.1", true},
		{"192.0.2.0/24", "::ffff:198.51.100.1", false},
		{"::ffff:192.0.2.0/120", "192.0.2.1", true},
		{"::ffff:192.0.2.0/120", "::ffff:192.0.2.1", true},
		{"::ffff:192.0.2.0/120", "198.51.100.1", false},
		{"::/0", "::ffff:192.0.2.1", false},
		{"0.0.0.0/0", "::ffff:192.0.2.1", true},
		{"0.0.0.0/0", "2001:db8::1", false},
		{"2001:db8:0:1::/64", "2001:db8:0:1::7", true},
		{"2001:db8:0:1::/64", "2001:db8:0:2::7", false},
		{"fe80::/10", "fe80::1%eth0", true},
		{"::1/128", "::1", true},
		{"127.0.0.0/8", "::1", false},
	} {
		data := world(t)
		put(t, data, "grants/alice.json", fmt.Sprintf(`{"T-1": {"profile": "debug", "not_after": "2200-01-01T00:00:00Z", "sources": [%q]}}`, tc.cidr))
		in := loginInput(t, "alice")
		in.Source = tc.source
		l, err := open(t, Config{Data: data}).Login(context.Background(), in)
		if err != nil || l.Allow != tc.allow || l.Allow == (l.Rule == "wrong-source") {
			t.Errorf("grant for %s, client from %s: %+v %v, want allow %v", tc.cidr, tc.source, l, err, tc.allow)
		}
	}
}

func TestOpenAndAsk(t *testing.T) {
	e := open(t, Config{Data: world(t)})
	if err := e.Ready(); err != nil {
		t.Fatal(err)
	}
	a, b := login(t, e), login(t, e)
	if !a.Allow || a.Ticket != "T-1" || a.Sandbox.Image != "debug:1" || !a.Permit.Shell || a.Groups[0] != "ops" {
		t.Errorf("login: %+v", a)
	}
	if a.ID == "" || a.ID == b.ID || a.Revision != e.Revision() || len(a.Revision) != 32 {
		t.Errorf("IDs %q %q, revision %q", a.ID, b.ID, a.Revision)
	}
	in := loginInput(t, "alice")
	offer := OfferInput{User: in.User, Source: in.Source, Key: in.Key}
	if ok, err := e.Offer(context.Background(), offer); !ok || err != nil {
		t.Errorf("own key: %v %v", ok, err)
	}
	offer.User = "bob"
	if ok, err := e.Offer(context.Background(), offer); ok || err != nil {
		t.Errorf("key of another: %v %v", ok, err)
	}
	v, err := e.Request(context.Background(), RequestInput{Type: "exec", Profile: "debug", Permit: a.Permit})
	if err != nil || v.Allow || v.Reason == "" || v.ID == "" {
		t.Errorf("exec: %+v %v", v, err)
	}
	if v, err = e.Request(context.Background(), RequestInput{Type: "shell", Permit: a.Permit}); err != nil || !v.Allow {
		t.Errorf("shell: %+v %v", v, err)
	}
	in.Source = "nowhere"
	if l, err := e.Login(context.Background(), in); err == nil || l.Allow || l.Reason == "" {
		t.Errorf("source that is no address: %+v %v", l, err)
	}
	in.Source = "::ffff:192.0.2.1"
	if l, err := e.Login(context.Background(), in); err != nil || !l.Allow {
		t.Errorf("mapped address: %+v %v", l, err)
	}
	ctx, cancel := context.WithCancel(context.Background())
	cancel()
	if l, err := e.Login(ctx, loginInput(t, "alice")); err == nil || l.Allow {
		t.Errorf("cancelled: %+v %v", l, err)
	}
}

func TestExpiryNeedsNoReload(t *testing.T) {
	e := open(t, Config{Data: world(t)})
	e.now = func() time.Time { return time.Now().Add(59 * time.Minute) }
	if !login(t, e).Allow {
		t.Error("refused before its end")
	}
	e.now = func() time.Time { return time.Now().Add(61 * time.Minute) }
	if l := login(t, e); l.Allow || !strings.HasPrefix(l.Reason, "expired: grant T-1 ended at 20") {
		t.Errorf("%+v", l)
	}
}

// An edit by whatever means has effect, and subscribers hear of it.
func TestWatchData(t *testing.T) {
	dir := world(t)
	e := open(t, Config{Data: dir})
	changed, cancel := e.Subscribe()
	defer cancel()
	heard := func(what string) {
		t.Helper()
		select {
		case <-changed:
		case <-time.After(5 * time.Second):
			t.Fatalf("%s: no notice", what)
		}
	}
	ticket := func(want string) func() bool { return func() bool { return login(t, e).Ticket == want } }
	grants := filepath.Join(dir, "grants/alice.json")

	put(t, dir, "grants/alice.json", grantText("T-2", "debug", time.Hour))
	within(t, "rename", ticket("T-2"))
	heard("rename")

	if err := os.WriteFile(grants, []byte(grantText("T-3", "debug", time.Hour)), 0o644); err != nil {
		t.Fatal(err)
	}
	within(t, "write in place", ticket("T-3"))
	heard("write in place")

	if err := os.Remove(grants); err != nil {
		t.Fatal(err)
	}
	within(t, "removed file", func() bool { return login(t, e).Rule == "no-grant" })
	heard("removed file")

	put(t, dir, "grants/alice/T-4.json",
		fmt.Sprintf(`{"profile": "debug", "not_after": %q}`, time.Now().Add(time.Hour).Format(time.RFC3339)))
	within(t, "new directory", ticket("T-4"))
	heard("new directory")

	put(t, dir, "grants/alice/data.yaml", "T-5: {profile: debug, not_after: 2200-01-01T00:00:00Z}")
	within(t, "second file", func() bool { return login(t, e).Rule == "ambiguous" })

	if err := os.RemoveAll(filepath.Join(dir, "grants")); err != nil {
		t.Fatal(err)
	}
	within(t, "removed directory", func() bool { return login(t, e).Rule == "no-grant" })

	put(t, dir, "group_grants/ops.yaml", "G-1: {profile: debug, not_after: 2200-01-01T00:00:00Z}")
	within(t, "group grant", ticket("G-1"))
	if err := e.Ready(); err != nil {
		t.Error(err)
	}

	if err := os.RemoveAll(dir); err != nil {
		t.Fatal(err)
	}
	within(t, "removed root", func() bool { return !login(t, e).Allow && e.Ready() != nil })
}

func TestNoticesAreFolded(t *testing.T) {
	dir := world(t)
	e := open(t, Config{Data: dir})
	changed, cancel := e.Subscribe()
	for i := range 3 {
		before := e.Revision()
		put(t, dir, "grants/alice.json", grantText(fmt.Sprint("T-", i+10), "debug", time.Hour))
		within(t, "edit", func() bool { return e.Revision() != before })
	}
	if len(changed) != 1 {
		t.Errorf("%d notices wait, want 1", len(changed))
	}
	<-changed
	cancel()
	before := e.Revision()
	put(t, dir, "grants/alice.json", grantText("T-20", "debug", time.Hour))
	within(t, "edit", func() bool { return e.Revision() != before })
	if len(changed) != 0 {
		t.Error("a notice after cancel")
	}
}

// A mounted ConfigMap swaps a link to a hidden directory; the files' own links never change.
func TestWatchConfigMap(t *testing.T) {
	dir := world(t)
	if err := os.RemoveAll(filepath.Join(dir, "grants")); err != nil {
		t.Fatal(err)
	}
	link := func(to, name string) {
		t.Helper()
		tmp := filepath.Join(dir, "grants", ".link")
		if err := os.Symlink(to, tmp); err != nil {
			t.Fatal(err)
		}
		if err := os.Rename(tmp, filepath.Join(dir, "grants", name)); err != nil {
			t.Fatal(err)
		}
	}
	put(t, dir, "grants/..1/alice.json", grantText("T-1", "debug", time.Hour))
	link("..1", "..data")
	link("..data/alice.json", "alice.json")
	e := open(t, Config{Data: dir})
	if l := login(t, e); l.Ticket != "T-1" {
		t.Fatalf("%+v", l)
	}
	put(t, dir, "grants/..2/alice.json", grantText("T-2", "debug", time.Hour))
	link("..2", "..data")
	within(t, "swap", func() bool { return login(t, e).Ticket == "T-2" })
	if err := e.Ready(); err != nil {
		t.Error(err)
	}
}

// Without file notification the engine looks by itself.
func TestPollingAlone(t *testing.T) {
	dir := world(t)
	e, err := Load(Config{Data: dir}, slog.New(slog.DiscardHandler))
	if err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithCancel(context.Background())
	e.stop, e.done = cancel, make(chan struct{})
	go e.watch(ctx, nil)
	defer e.Close()
	put(t, dir, "grants/alice.json", grantText("T-2", "debug", time.Hour))
	within(t, "rename", func() bool { return login(t, e).Ticket == "T-2" })
	text := []byte(grantText("T-3", "debug", time.Hour))
	if err := os.WriteFile(filepath.Join(dir, "grants/alice.json"), text, 0o644); err != nil {
		t.Fatal(err)
	}
	within(t, "in place, same size", func() bool { return login(t, e).Ticket == "T-3" })
}

func TestBrokenEditKeepsLastGood(t *testing.T) {
	dir := world(t)
	e := open(t, Config{Data: dir})
	revision := e.Revision()
	for name, broken := range map[string]struct{ text, want string }{
		"grants/alice.json": {"{\"T-1\": {\n\"profile\": ", "grants/alice.json:2: the file ends too early"},
		"users/alice.json": {"{\n\"keys\": [\n\"command=\\\"x\\\" " + aliceKey + "\"]}",
			"users/alice.json:3: keys[0]: options"},
		"profiles/debug.json": {"{\"image\": \"x\",\n \"privileged\": true}",
			"profiles/debug.json:1: additional properties 'privileged'"},
	} {
		good, err := os.ReadFile(filepath.Join(dir, name))
		if err != nil {
			t.Fatal(err)
		}
		put(t, dir, name, broken.text)
		within(t, name+" broken", func() bool { return e.Ready() != nil })
		if err := e.Ready(); !strings.Contains(err.Error(), broken.want) {
			t.Errorf("%s: %v, want %s", name, err, broken.want)
		}
		if l := login(t, e); !l.Allow || l.Revision != revision {
			t.Errorf("%s broken: %+v", name, l)
		}
		if _, err := e.Holds(name); err == nil {
			t.Errorf("%s broken: Holds tells nothing", name)
		}
		// Another file is taken all the same.
		put(t, dir, "grants/bob.json", grantText("B-1", "debug", time.Hour))
		within(t, "another file", func() bool { return e.Revision() != revision })
		if err := os.Remove(filepath.Join(dir, "grants/bob.json")); err != nil {
			t.Fatal(err)
		}
		within(t, "back", func() bool { return e.Revision() == revision })
		put(t, dir, name, string(good))
		within(t, name+" mended", func() bool { return e.Ready() == nil })
	}
	// A file that is new and broken counts as absent; removed, it is forgotten.
	put(t, dir, "grants/bob.json", "[]")
	within(t, "new and broken", func() bool { return e.Ready() != nil })
	if err := os.Remove(filepath.Join(dir, "grants/bob.json")); err != nil {
		t.Fatal(err)
	}
	within(t, "forgotten", func() bool { return e.Ready() == nil })
}

func TestOpenRefusesBroken(t *testing.T) {
	for name, c := range map[string]struct{ file, text, want string }{
		"user":     {"users/alice.json", "{\n\"keys\": 1}", "users/alice.json:2: keys: got number, want array"},
		"profile":  {"profiles/debug.yaml", "image: x\nuser: root\n", "profiles/debug.yaml:2: user:"},
		"root":     {"data.json", "[]", "data.json:1: an object is expected"},
		"reserved": {"sallyport/x.json", "{}", "data.sallyport is reserved"},
		"twice":    {"users.json", fmt.Sprintf(`{"alice": {"keys": [%q]}}`, aliceKey), "data.users.alice is already given"},
		"deep":     {"users/alice/keys.json", "[]", "the file's path goes deeper"},
		"name":     {"users/Alice.json", `{"keys": []}`, `"Alice" is no user name`},
	} {
		t.Run(name, func(t *testing.T) {
			dir := world(t)
			put(t, dir, c.file, c.text)
			e, err := Open(Config{Data: dir}, slog.New(slog.DiscardHandler))
			if err == nil {
				e.Close()
				t.Fatal("opened")
			}
			if !strings.Contains(err.Error(), c.want) {
				t.Errorf("%v, want %s", err, c.want)
			}
		})
	}
	if _, err := Open(Config{Data: "/nonexistent"}, slog.New(slog.DiscardHandler)); err == nil {
		t.Error("opened a directory that isn't there")
	}
	if _, err := Open(Config{}, slog.New(slog.DiscardHandler)); err == nil {
		t.Error("opened nothing")
	}
	if _, err := Open(Config{Data: world(t), Policy: "/nonexistent"}, slog.New(slog.DiscardHandler)); err == nil {
		t.Error("opened without the policy that the setting names")
	}
}

// Who may write grants can't keep the gate from starting, and one broken grant stops no other.
func TestOpenWithBrokenGrants(t *testing.T) {
	dir := world(t)
	put(t, dir, "grants/bob.json", "{")
	put(t, dir, "grants/alice2.json", `{"T-1": {"profile": "debug"}}`)
	if err := os.Symlink(".", filepath.Join(dir, "grants/loop")); err != nil {
		t.Fatal(err)
	}
	e := open(t, Config{Data: dir})
	if l := login(t, e); !l.Allow {
		t.Errorf("%+v", l)
	}
	err := e.Ready()
	for _, want := range []string{"grants/bob.json:1", "grants/alice2.json:1: T-1: missing property 'not_after'",
		"grants/loop: a link"} {
		if err == nil || !strings.Contains(err.Error(), want) {
			t.Errorf("%v, want %s", err, want)
		}
	}
}

// A user's entry can't be split over files, nor can a grant be given twice; the first file holds.
func TestConflictKeepsFirst(t *testing.T) {
	dir := world(t)
	e := open(t, Config{Data: dir})
	put(t, dir, "grants/alice.yaml", "T-1: {profile: other, not_after: 2200-01-01T00:00:00Z}")
	within(t, "conflict", func() bool { return e.Ready() != nil })
	if l := login(t, e); l.Profile != "debug" {
		t.Errorf("%+v", l)
	}
	if err := e.Ready(); !strings.Contains(err.Error(), "grants/alice.yaml: data.grants.alice.T-1 is already given") {
		t.Error(err)
	}
}

func TestPathsOfFiles(t *testing.T) {
	dir := t.TempDir()
	put(t, dir, "data.yaml", "site: {name: x}")
	put(t, dir, "users.json", fmt.Sprintf(`{"alice": {"keys": [%q]}}`, aliceKey))
	put(t, dir, "users/bob.smith.json", `{"keys": []}`)
	put(t, dir, "profiles/data.json", `{"debug": `+profileText+`}`)
	put(t, dir, "grants/alice/data.json", grantText("T-1", "debug", time.Hour))
	put(t, dir, "grants/alice/T-2.json", `{"profile": "debug", "not_after": "2000-01-01T00:00:00Z"}`)
	put(t, dir, "oncall/rota.yml", "week: [alice]")
	put(t, dir, ".git/config.json", "broken")
	put(t, dir, "README.md", "broken")
	e := open(t, Config{Data: dir})
	if err := e.Ready(); err != nil {
		t.Error(err)
	}
	if l := login(t, e); l.Ticket != "T-1" {
		t.Errorf("%+v", l)
	}
	for _, path := range [][]string{{"users", "bob.smith"}, {"oncall", "rota", "week"}, {"site", "name"},
		{"grants", "alice", "T-2"}} {
		if _, ok := lookup(e.current.Load().store, path...); !ok {
			t.Errorf("data.%s is missing", strings.Join(path, "."))
		}
	}
}

func TestSpecialFilesDoNotBlock(t *testing.T) {
	dir := world(t)
	if err := os.Symlink("/dev/zero", filepath.Join(dir, "grants/zero.json")); err != nil {
		t.Fatal(err)
	}
	if err := os.Symlink("/etc/hostname-that-is-not-there", filepath.Join(dir, "grants/nowhere.json")); err != nil {
		t.Fatal(err)
	}
	e := open(t, Config{Data: dir})
	if err := e.Ready(); err == nil || !strings.Contains(err.Error(), "zero.json: not a regular file") {
		t.Error(err)
	}
	if !login(t, e).Allow {
		t.Error("refused")
	}
}

func TestOwnPolicy(t *testing.T) {
	dir, own := world(t), t.TempDir()
	put(t, own, "hours.rego", "package sallyport\n\ndeny contains \"closed\" if data.site.closed\n")
	put(t, own, "hours_test.rego", "package nonsense\n\nthis is not read by the gate\n")
	e := open(t, Config{Data: dir, Policy: own})
	if !login(t, e).Allow {
		t.Fatal("refused")
	}
	put(t, dir, "site.json", `{"closed": true}`)
	within(t, "deny", func() bool { return login(t, e).Reason == "closed" })

	// A module of a default module's name takes its place.
	put(t, own, "request.rego", "package sallyport\n\nrequest := {\"allow\": input.command == \"id\"}\n")
	asked := func(command string) Verdict {
		v, err := e.Request(context.Background(), RequestInput{Type: "exec", Command: command})
		if err != nil {
			t.Fatal(err)
		}
		return v
	}
	within(t, "replaced", func() bool { return asked("id").Allow })
	if v := asked("ls"); v.Allow || v.Reason == "" {
		t.Errorf("%+v", v)
	}

	// A broken one changes nothing.
	put(t, own, "request.rego", "package sallyport\n\nrequest := {\"allow\": true}\n\nrequest := )\n")
	within(t, "broken", func() bool { return e.Ready() != nil })
	if err := e.Ready(); !strings.Contains(err.Error(), "request.rego:5: ") {
		t.Error(err)
	}
	if asked("ls").Allow {
		t.Error("a broken module was taken")
	}
	for text, want := range map[string]string{
		"package users\n\nalice := {}\n":                                "request.rego:1: the package must be sallyport",
		"package sallyportx\n":                                          "request.rego:1: the package must be sallyport",
		"package sallyport\n\nrequest := nosuch(input)\n":               "request.rego:3: undefined function nosuch",
		"package sallyport\n\nrequest := http.send({\"method\": \"\"})": "request.rego:3: undefined function http.send",
		"package sallyport\n\nrequest := opa.runtime()":                 "request.rego:3: undefined function opa.runtime",
		"package sallyport\n\nrequest := net.lookup_ip_addr(\"x\")":     "request.rego:3: undefined function net.lookup",
		"# nothing": "request.rego: empty module",
	} {
		put(t, own, "request.rego", text)
		within(t, text, func() bool { err := e.Ready(); return err != nil && strings.Contains(err.Error(), want) })
	}

	// Removed, the default is back.
	for _, name := range []string{"request.rego", "hours.rego"} {
		if err := os.Remove(filepath.Join(own, name)); err != nil {
			t.Fatal(err)
		}
	}
	within(t, "removed", func() bool { return e.Ready() == nil && !asked("id").Allow && login(t, e).Allow })

	// A directory that can't be read is no reason to fall back to the defaults.
	put(t, own, "hours.rego", "package sallyport\n\ndeny contains \"closed\"\n")
	within(t, "deny", func() bool { return login(t, e).Reason == "closed" })
	if err := os.Rename(own, own+".away"); err != nil { // at once, with its files
		t.Fatal(err)
	}
	within(t, "directory gone", func() bool { return e.Ready() != nil })
	if login(t, e).Allow {
		t.Error("the default policy took over")
	}
}

// Whatever a rule answers, only a whole and valid admission admits.
func TestBadAnswersAreRefusals(t *testing.T) {
	const good = `"allow": true, "ticket": "T", "profile": "p", "not_after": "2200-01-01T00:00:00Z", "permit": {}`
	admit := func(members string) string { return "login := {" + members + "}" }
	for name, c := range map[string]struct {
		rule  string
		allow bool
		err   string
	}{
		"good":           {admit(good + `, "sandbox": {"image": "x"}`), true, ""},
		"refusal":        {admit(`"allow": false, "reason": "a\u001b[31m\nb"`), false, ""},
		"unknown field":  {admit(good + `, "sandbox": {"image": "x"}, "root": true`), false, "additional properties 'root'"},
		"unknown inside": {admit(good + `, "sandbox": {"image": "x", "privileged": true}`), false, "'privileged'"},
		"no sandbox":     {admit(good), false, "missing property 'sandbox'"},
		"no image":       {admit(good + `, "sandbox": {}`), false, "missing property 'image'"},
		"wrong type":     {admit(`"allow": "true"`), false, "allow"},
		"no reason":      {admit(`"allow": false`), false, "reason"},
		"no end": {admit(`"allow": true, "ticket": "T", "profile": "p", "permit": {}, "sandbox": {"image": "x"}`),
			false, "not_after"},
		"end is over": {admit(strings.Replace(good, "2200", "2001", 1) + `, "sandbox": {"image": "x"}`), false, "is over"},
		"bad end": {admit(strings.Replace(good, "2200-01", "2200", 1) + `, "sandbox": {"image": "x"}`),
			false, "parsing time"},
		"bad permit": {admit(strings.Replace(good, `"permit": {}`, `"permit": {"max_duration": "1"}`, 1) +
			`, "sandbox": {"image": "x"}`), false, "permit.max_duration"},
		"bad ticket": {admit(strings.Replace(good, `"T"`, `"T\u001b"`, 1) + `, "sandbox": {"image": "x"}`), false, "ticket"},
		"true":       {"login := true", false, "got boolean"},
		"undefined":  {"login := {\"allow\": true} if false", false, "0 answers"},
		"two":        {"login := {\"allow\": true}\n\nlogin := {\"allow\": false}", false, "evaluate"},
		"failed":     {"login := {\"allow\": true, \"x\": 1 / 0}", false, "0 answers"},
		"endless": {`login := {"allow": true} if {
			count([1 | some i in numbers.range(1, 100000); some j in numbers.range(i, 100000); i < j]) > 0
		}`, false, "evaluate"},
	} {
		t.Run(name, func(t *testing.T) {
			own := t.TempDir()
			put(t, own, "login.rego", "package sallyport\n\n"+c.rule+"\n")
			e := open(t, Config{Data: world(t), Policy: own})
			begin := time.Now()
			l, err := e.Login(context.Background(), loginInput(t, "alice"))
			if l.Allow != c.allow || (err == nil) != (c.err == "") || err != nil && !strings.Contains(err.Error(), c.err) {
				t.Errorf("%+v %v, want %v %s", l, err, c.allow, c.err)
			}
			if !l.Allow && (l.Reason == "" || l.Ticket != "" || l.Sandbox.Image != "") || l.ID == "" {
				t.Errorf("refusal: %+v", l)
			}
			if err != nil && l.Reason != undecided || strings.ContainsAny(l.Reason, "\x1b\n") {
				t.Errorf("reason: %q", l.Reason)
			}
			if took := time.Since(begin); took > 10*time.Second {
				t.Errorf("took %s", took)
			}
		})
	}
	for name, rule := range map[string]string{
		"offer":   "offer := 1",
		"request": "request := {\"allow\": true, \"also\": true}",
	} {
		own := t.TempDir()
		put(t, own, name+".rego", "package sallyport\n\n"+rule+"\n")
		if name == "offer" { // the default login asks it, and so does this one
			put(t, own, "login.rego", "package sallyport\n\nlogin := {\"allow\": false, \"reason\": \"x\"}\n")
		}
		e := open(t, Config{Data: world(t), Policy: own})
		if name == "offer" {
			in := loginInput(t, "alice")
			offer := OfferInput{User: "alice", Source: in.Source, Key: in.Key}
			if ok, err := e.Offer(context.Background(), offer); ok || err == nil {
				t.Errorf("offer: %v %v", ok, err)
			}
			continue
		}
		v, err := e.Request(context.Background(), RequestInput{Type: "shell"})
		if v.Allow || err == nil || v.Reason == "" {
			t.Errorf("request: %+v %v", v, err)
		}
	}
}

func TestRevision(t *testing.T) {
	dir, own := world(t), t.TempDir()
	a := open(t, Config{Data: dir})
	b := open(t, Config{Data: dir, Policy: own})
	if a.Revision() != b.Revision() {
		t.Error("an empty directory of own policy changes the revision")
	}
	put(t, own, "x.rego", "package sallyport.x\n\ny := 1\n")
	within(t, "own module", func() bool { return a.Revision() != b.Revision() })
}

func TestHolds(t *testing.T) {
	dir := world(t)
	e := open(t, Config{Data: dir})
	want, err := GrantSum(dir, "grants/alice.json")
	if err != nil || want == "" {
		t.Fatal(want, err)
	}
	if sum, err := e.Holds("grants/alice.json"); sum != want || err != nil {
		t.Errorf("%q %v, want %q", sum, err, want)
	}
	if sum, err := e.Holds("grants/bob.json"); sum != "" || err != nil {
		t.Errorf("%q %v", sum, err)
	}
}

// touch does what a scan would, or says that it can't.
func TestTouch(t *testing.T) {
	dir := world(t)
	tree := newDataTree(dir)
	tree.scan(nil, time.Now())
	touch := func(names ...string) (changed, ok bool) {
		dirty := map[string]bool{}
		for _, name := range names {
			dirty[filepath.Join(dir, name)] = true
		}
		changed, _, ok = tree.touch(dirty, time.Now())
		return changed, ok
	}
	check := func(what string, changed, ok, wantChanged, wantOK bool) {
		t.Helper()
		if changed != wantChanged || ok != wantOK {
			t.Errorf("%s: changed %v ok %v", what, changed, ok)
		}
	}
	changed, ok := touch("grants/alice.json", "grants/.tmp", "grants/README", "elsewhere/x.json")
	check("nothing", changed, ok, false, true)

	put(t, dir, "grants/alice.json", grantText("T-2", "debug", time.Hour))
	put(t, dir, "grants/bob.json", grantText("T-3", "debug", time.Hour))
	put(t, dir, "grants/README", "text")
	changed, ok = touch("grants/alice.json", "grants/bob.json", "grants/README", "grants/.tmp")
	check("changed and new", changed, ok, true, true)
	data := tree.merge().data
	for _, path := range [][]string{{"grants", "alice", "T-2"}, {"grants", "bob", "T-3"}} {
		if _, ok := lookup(data, path...); !ok {
			t.Errorf("%v is missing", path)
		}
	}
	put(t, dir, "grants/bob.json", "{")
	changed, ok = touch("grants/bob.json")
	check("broken", changed, ok, false, true)
	if len(tree.problems()) != 1 {
		t.Error(tree.problems())
	}
	if err := os.Remove(filepath.Join(dir, "grants/bob.json")); err != nil {
		t.Fatal(err)
	}
	changed, ok = touch("grants/bob.json")
	check("removed", changed, ok, true, true)
	if _, ok := lookup(tree.merge().data, "grants", "bob"); ok || len(tree.problems()) != 0 {
		t.Error("a removed file is still there")
	}
	put(t, dir, "grants/carol/T-1.json", "{}")
	_, ok = touch("grants/carol")
	check("new directory", false, ok, false, false)
	if err := os.Symlink("alice.json", filepath.Join(dir, "grants/dave.json")); err != nil {
		t.Fatal(err)
	}
	_, ok = touch("grants/dave.json")
	check("link", false, ok, false, false)
	_, ok = touch("grants/..data")
	check("ConfigMap", false, ok, false, false)
	if err := os.Mkdir(filepath.Join(dir, "grants/..data"), 0o755); err != nil {
		t.Fatal(err)
	}
	_, ok = touch("grants/..data")
	check("ConfigMap", false, ok, false, false)
	_, ok = touch("grants")
	check("a directory itself", false, ok, false, false)
}

// What can't be looked at isn't gone.
func TestUnreadableDirectoryKeepsLastGood(t *testing.T) {
	dir := world(t)
	e := open(t, Config{Data: dir})
	if err := os.Rename(filepath.Join(dir, "grants"), filepath.Join(dir, ".grants")); err != nil {
		t.Fatal(err)
	}
	// A link to itself fails as a directory without permission does, also for root.
	if err := os.Symlink("grants", filepath.Join(dir, "grants.link")); err != nil {
		t.Fatal(err)
	}
	if err := os.Rename(filepath.Join(dir, "grants.link"), filepath.Join(dir, "grants")); err != nil {
		t.Fatal(err)
	}
	within(t, "unreadable", func() bool { return e.Ready() != nil })
	// In between there was no such name, which a look may have seen.
	tree := newDataTree(dir)
	tree.files["grants/alice.json"] = &file{name: "grants/alice.json", path: []string{"grants", "alice"}, good: true}
	if changed, _ := tree.scan(nil, time.Now()); !changed || tree.files["grants/alice.json"] == nil {
		t.Errorf("a file below a directory that can't be read was taken for removed: %v", tree.problems())
	}
	if err := os.Remove(filepath.Join(dir, "grants")); err != nil {
		t.Fatal(err)
	}
	if tree.scan(nil, time.Now()); tree.files["grants/alice.json"] != nil {
		t.Error("a file that is gone is still there")
	}
}

// Two writes in one tick of the file system's clock, of the same length, are two writes.
func TestSameTimeAndSize(t *testing.T) {
	dir := world(t)
	name := filepath.Join(dir, "grants/alice.json")
	info, err := os.Stat(name)
	if err != nil {
		t.Fatal(err)
	}
	tree := newDataTree(dir)
	tree.scan(nil, time.Now())
	if err := os.WriteFile(name, []byte(grantText("T-2", "debug", time.Hour)), 0o644); err != nil {
		t.Fatal(err)
	}
	if err := os.Chtimes(name, info.ModTime(), info.ModTime()); err != nil {
		t.Fatal(err)
	}
	if changed, _ := tree.scan(nil, time.Now()); !changed {
		t.Error("the second write was not seen")
	}
	if changed, _ := tree.scan(nil, time.Now()); changed {
		t.Error("the second write was seen twice")
	}
}

// YAML that is cut short may be valid and mean more than it says: it is left alone while it is being written.
func TestYAMLIsReadWhenQuiet(t *testing.T) {
	dir := world(t)
	name := filepath.Join(dir, "profiles/debug.yaml")
	write := func(text string, age time.Duration) {
		t.Helper()
		if err := os.WriteFile(name, []byte(text), 0o644); err != nil {
			t.Fatal(err)
		}
		if err := os.Chtimes(name, time.Time{}, time.Now().Add(-age)); err != nil {
			t.Fatal(err)
		}
	}
	if err := os.Remove(filepath.Join(dir, "profiles/debug.json")); err != nil {
		t.Fatal(err)
	}
	write("image: x\nmemory: 1Gi\n", time.Minute)
	tree := newDataTree(dir)
	now := time.Now()
	tree.scan(nil, now)
	write("image: x\n", 0)
	info, err := os.Stat(name)
	if err != nil {
		t.Fatal(err)
	}
	if changed, young := tree.scan(nil, info.ModTime().Add(settleTime/2)); changed || !young {
		t.Errorf("changed %v young %v", changed, young)
	}
	if changed, young := tree.scan(nil, info.ModTime().Add(settleTime)); !changed || young {
		t.Errorf("changed %v young %v", changed, young)
	}
}

func TestAddress(t *testing.T) {
	for in, want := range map[string]string{
		"192.0.2.1": "192.0.2.1", "::ffff:192.0.2.1": "192.0.2.1", "fe80::1%eth0": "fe80::1", "2001:DB8::1": "2001:db8::1",
		"": "", "localhost": "", "192.0.2.1:22": "", "192.0.2.0/24": "",
	} {
		if got, err := address(in); got != want || (err == nil) != (want != "") {
			t.Errorf("%q: %q %v, want %q", in, got, err, want)
		}
	}
}

// New directories are watched, and one that took another's name is watched in its place.
func TestWatchedDirectories(t *testing.T) {
	dir := world(t)
	e, err := Load(Config{Data: dir}, slog.New(slog.DiscardHandler))
	if err != nil {
		t.Fatal(err)
	}
	watcher, err := fsnotify.NewWatcher()
	if err != nil {
		t.Fatal(err)
	}
	defer watcher.Close()
	watched := map[string]string{}
	look := func() int {
		e.reload(nil, true)
		e.watchDirs(watcher, watched)
		return len(watcher.WatchList())
	}
	if n := look(); n != 4 {
		t.Errorf("%d directories are watched, want 4: %v", n, watcher.WatchList())
	}
	put(t, dir, "grants/bob/T-1.json", "{}")
	if n := look(); n != 5 {
		t.Errorf("%d directories are watched, want 5: %v", n, watcher.WatchList())
	}
	grants := filepath.Join(dir, "grants")
	before := watched[grants]
	if err := os.Rename(grants, filepath.Join(dir, ".away")); err != nil {
		t.Fatal(err)
	}
	put(t, dir, "grants/alice.json", grantText("T-1", "debug", time.Hour))
	if n := look(); n != 4 || watched[grants] == before {
		t.Errorf("%d directories are watched, want 4: %v", n, watcher.WatchList())
	}
	for len(watcher.Events) > 0 {
		<-watcher.Events
	}
	put(t, dir, "grants/carol.json", "{}")
	deadline := time.After(5 * time.Second)
	for {
		select {
		case event := <-watcher.Events:
			if event.Name == filepath.Join(grants, "carol.json") {
				return
			}
		case <-deadline:
			t.Fatal("no event from the new directory")
		}
	}
}
