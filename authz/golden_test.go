package authz

import (
	"bytes"
	"context"
	"encoding/json"
	"flag"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"
)

var update = flag.Bool("update", false, "write the golden files anew from what the policy answers")

// goldenTime is when the golden questions are asked.
var goldenTime = time.Date(2026, 3, 1, 12, 0, 0, 0, time.UTC)

// TestGolden asks the default policy the questions testdata/golden/QUERY-NAME.input.json and compares the answers.
func TestGolden(t *testing.T) {
	const dir = "testdata/golden"
	e := open(t, Config{Data: filepath.Join(dir, "data")})
	if err := e.Ready(); err != nil {
		t.Fatal(err)
	}
	inputs, err := filepath.Glob(filepath.Join(dir, "*.input.json"))
	if err != nil || len(inputs) < 20 {
		t.Fatalf("%d inputs, %v", len(inputs), err)
	}
	s := e.current.Load()
	for _, name := range inputs {
		t.Run(strings.TrimSuffix(filepath.Base(name), ".input.json"), func(t *testing.T) {
			text, err := os.ReadFile(name)
			if err != nil {
				t.Fatal(err)
			}
			doc, err := parse(name, text)
			if err != nil {
				t.Fatal(err)
			}
			query, _, _ := strings.Cut(filepath.Base(name), "-")
			if err := matches(query+"-input.json", doc.value); err != nil {
				t.Errorf("input: %v", err)
			}
			// The input is what the gate sends: its Go type holds all of it.
			into := map[string]any{"offer": &OfferInput{}, "login": &LoginInput{}, "request": &RequestInput{}}[query]
			if err := decode(query+"-input.json", doc.value, into); err != nil {
				t.Errorf("input: %v", err)
			}
			q := map[string]question{"offer": s.offer, "login": s.login, "request": s.request}[query]
			answer, err := q.ask(context.Background(), into, goldenTime)
			if err != nil {
				t.Fatal(err)
			}
			if query != "offer" {
				if err := matches(query+"-result.json", answer); err != nil {
					t.Errorf("result: %v", err)
				}
			}
			got, err := json.MarshalIndent(answer, "", "  ")
			if err != nil {
				t.Fatal(err)
			}
			got = append(got, '\n')
			golden := strings.Replace(name, ".input.", ".result.", 1)
			if *update {
				if err := os.WriteFile(golden, got, 0o644); err != nil {
					t.Fatal(err)
				}
				return
			}
			want, err := os.ReadFile(golden)
			if err != nil {
				t.Fatal(err)
			}
			if !bytes.Equal(got, want) {
				t.Errorf("got\n%s\nwant\n%s", got, want)
			}
		})
	}
}

// The Go types and the schemas say the same: all that a type can hold, its schema knows.
func TestSchemasMatchTypes(t *testing.T) {
	all := Login{
		Sandbox: Sandbox{Image: "i", PullPolicy: "never", User: "1:1", Groups: []uint32{1}, Hostname: "h", Home: "/h",
			Env: []string{"A=b"}, Mounts: []Mount{{Type: "bind", Source: "/s", Target: "/t", Write: true}}, Network: "n",
			Memory: "1Gi", CPUs: 1.5, PIDs: 1, TmpSize: "1M", HomeSize: "1k", Scratch: "volume", Caps: []string{"NET_RAW"},
			Runtime: "runsc", ExtraHosts: []string{"a:192.0.2.1"}, Namespace: "n", Nodes: map[string]string{"example.com/pool": "debug"}, Priority: "low",
			Spread: []string{"zone"}, Pod: json.RawMessage(`{"spec":{}}`),
			Target:    &Target{Namespace: "n", Labels: map[string]string{"app": "a"}, Workload: "deployment/a", Name: "a", Container: "c"},
			ExecAudit: "required", ExecStrict: true, ExecStuckLimit: "5s"},
		Permit: Permit{Shell: true, Exec: true, SFTP: true, Env: []string{"LC_*"}, Forward: []string{"db:5432"},
			Listen: []string{"localhost:0"}, Agent: true, X11: true, ForwardContent: "full",
			Target: &TargetPermit{Network: true, Processes: true, Files: true}, Input: "all", MaxDuration: "1h", IdleTimeout: "1m", DataLimit: "1Mi",
			Transfer: &Transfer{DenyUpload: true, DenyDownload: true, DenyPaths: []string{"/p"}, MaxSize: "1Gi", Content: "full",
				ContentFile: "1Mi", ContentSession: "1Gi", Raw: true}},
		Allow: true, Reason: "r", Groups: []string{"g"}, Ticket: "t", Profile: "p", NotBefore: goldenTime,
		NotAfter: goldenTime, Why: "w", Approved: "a", Rule: "r",
	}
	for schema, v := range map[string]any{
		"sandbox.json": all.Sandbox, "permit.json": all.Permit, "login-result.json": all,
		"grant.json": Grant{Profile: "p", NotBefore: "2026-01-01T00:00:00Z", NotAfter: "2026-01-01T00:00:00Z",
			Sources: []string{"::/0"}, Reason: "r", ApprovedBy: "a"},
		"login-input.json":    LoginInput{User: "u", Choice: "c", Target: &LoginTarget{Namespace: "n", Name: "a", Labels: map[string]string{"app": "a"}, Container: "c", Image: "i", Digest: "d"}},
		"offer-input.json":    OfferInput{User: "u"},
		"request-input.json":  RequestInput{Command: "c", Name: "n", Permit: all.Permit, Host: "h", Address: "::1", Port: 1, Path: "/p"},
		"request-result.json": Verdict{Allow: true, Reason: "r"},
	} {
		value, err := plain(v)
		if err != nil {
			t.Fatal(err)
		}
		object := value.(map[string]any)
		for _, ours := range []string{"id", "revision"} { // added by the engine
			if strings.HasSuffix(schema, "-result.json") {
				delete(object, ours)
			}
		}
		if err := matches(schema, object); err != nil {
			t.Errorf("%s: %v", schema, err)
		}
		compiled, err := schemas()
		if err != nil {
			t.Fatal(err)
		}
		for name := range compiled[schema].Properties {
			if _, ok := object[name]; !ok {
				t.Errorf("%s: property %s is in no Go type", schema, name)
			}
		}
	}
	compiled, _ := schemas()
	for name := range compiled["sandbox.json"].Properties {
		if compiled["profile.json"].Properties[name] == nil {
			t.Errorf("profile.json lacks %s", name)
		}
	}
}
