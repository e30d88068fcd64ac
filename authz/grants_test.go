package authz

import (
	"context"
	"encoding/json"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"testing"
	"time"
)

func testGrant() Grant {
	return Grant{Profile: "debug", NotAfter: time.Now().Add(time.Hour).UTC().Format(time.RFC3339), Reason: "why"}
}

// Two who edit one user's grants at once lose nothing, and the gate takes it all.
func TestConcurrentEditsLoseNothing(t *testing.T) {
	dir := world(t)
	e := open(t, Config{Data: dir})
	const writers, each = 4, 25
	var wg sync.WaitGroup
	for w := range writers {
		wg.Add(1)
		go func() {
			defer wg.Done()
			for i := range each {
				ticket := fmt.Sprintf("W%d-%d", w, i)
				name, err := AddGrant(context.Background(), dir, Grantee{User: "alice"}, ticket, testGrant(), false)
				if err != nil || name != "grants/alice.json" {
					t.Errorf("%s %v", name, err)
				}
				if i%5 == 0 {
					if _, err := RevokeGrant(context.Background(), dir, Grantee{User: "alice"}, ticket); err != nil {
						t.Error(err)
					}
				}
			}
		}()
	}
	wg.Wait()
	list, err := ListGrants(dir, Grantee{User: "alice"}, time.Now())
	if err != nil || len(list) != 1+writers*each*4/5 {
		t.Errorf("%d grants, %v", len(list), err)
	}
	want, err := GrantSum(dir, "grants/alice.json")
	if err != nil {
		t.Fatal(err)
	}
	within(t, "taken", func() bool { sum, err := e.Holds("grants/alice.json"); return err == nil && sum == want })
	left, _ := filepath.Glob(filepath.Join(dir, "grants", ".alice*"))
	if len(left) > 0 {
		t.Errorf("left behind: %v", left)
	}
}

func TestEditWaitsForTheLock(t *testing.T) {
	dir := world(t)
	unlock, err := lock(context.Background(), filepath.Join(dir, "grants/.lock"))
	if err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithTimeout(context.Background(), 100*time.Millisecond)
	defer cancel()
	if _, err := AddGrant(ctx, dir, Grantee{User: "alice"}, "T-2", testGrant(), false); err == nil ||
		!strings.Contains(err.Error(), "held by another edit") {
		t.Error(err)
	}
	unlock()
	if _, err := AddGrant(context.Background(), dir, Grantee{User: "alice"}, "T-2", testGrant(), false); err != nil {
		t.Error(err)
	}
}

func TestAddGrantRefuses(t *testing.T) {
	dir := world(t)
	put(t, dir, "grants/alice.yaml", "Y-1: {profile: debug, not_after: 2200-01-01T00:00:00Z}")
	before, err := os.ReadFile(filepath.Join(dir, "grants/alice.json"))
	if err != nil {
		t.Fatal(err)
	}
	change := func(f func(*Grant)) Grant { g := testGrant(); f(&g); return g }
	for name, c := range map[string]struct {
		to     Grantee
		ticket string
		grant  Grant
		want   string
	}{
		"exists":       {Grantee{User: "alice"}, "T-1", testGrant(), "exists already"},
		"elsewhere":    {Grantee{User: "alice"}, "Y-1", testGrant(), "another file"},
		"no user":      {Grantee{}, "T-2", testGrant(), "for a user or for a group"},
		"both":         {Grantee{User: "alice", Group: "ops"}, "T-2", testGrant(), "for a user or for a group"},
		"user name":    {Grantee{User: "../users/alice"}, "T-2", testGrant(), "is no user or group"},
		"unknown user": {Grantee{User: "mallory"}, "T-2", testGrant(), "user mallory does not exist"},
		"ticket":       {Grantee{User: "alice"}, "T 2", testGrant(), "is no ticket"},
		"profile":      {Grantee{User: "alice"}, "T-2", change(func(g *Grant) { g.Profile = "root" }), "there is: debug"},
		"no end":       {Grantee{User: "alice"}, "T-2", change(func(g *Grant) { g.NotAfter = "" }), "not_after"},
		"bad end":      {Grantee{User: "alice"}, "T-2", change(func(g *Grant) { g.NotAfter = "tomorrow" }), "RFC 3339"},
		"begin": {Grantee{User: "alice"}, "T-2", change(func(g *Grant) { g.NotBefore = "2200-01-01T00:00:00Z" }),
			"ends before it begins"},
		"source": {Grantee{User: "alice"}, "T-2", change(func(g *Grant) { g.Sources = []string{"192.0.2.1"} }), "/32"},
	} {
		if _, err := AddGrant(context.Background(), dir, c.to, c.ticket, c.grant, false); err == nil ||
			!strings.Contains(err.Error(), c.want) {
			t.Errorf("%s: %v, want %s", name, err, c.want)
		}
	}
	if _, err := RevokeGrant(context.Background(), dir, Grantee{User: "alice"}, "T-9"); err == nil {
		t.Error("revoked what isn't there")
	}
	if _, err := RevokeGrant(context.Background(), dir, Grantee{User: "alice"}, "Y-1"); err == nil {
		t.Error("revoked what another file holds")
	}
	after, err := os.ReadFile(filepath.Join(dir, "grants/alice.json"))
	if err != nil || string(after) != string(before) {
		t.Errorf("the file changed: %s %v", after, err)
	}
	// A broken file is not written over.
	put(t, dir, "grants/alice.json", "{")
	if _, err := AddGrant(context.Background(), dir, Grantee{User: "alice"}, "T-2", testGrant(), true); err == nil ||
		!strings.Contains(err.Error(), "grants/alice.json:1: the file ends too early") {
		t.Error(err)
	}
}

func TestAddReplaceRevoke(t *testing.T) {
	dir := world(t)
	ctx, file := context.Background(), filepath.Join(dir, "grants/alice.json")
	if err := os.Chmod(file, 0o640); err != nil {
		t.Fatal(err)
	}
	put(t, dir, "grants/.alice.json.123", "left by an edit that was killed")
	g := testGrant()
	g.Reason = "new"
	if _, err := AddGrant(ctx, dir, Grantee{User: "alice"}, "T-1", g, true); err != nil {
		t.Fatal(err)
	}
	list, err := ListGrants(dir, Grantee{User: "alice"}, time.Now())
	if err != nil || len(list) != 1 || list[0].Reason != "new" || list[0].State != "live" || list[0].User != "alice" {
		t.Errorf("%+v %v", list, err)
	}
	if info, err := os.Stat(file); err != nil || info.Mode().Perm() != 0o640 {
		t.Errorf("%v %v", info.Mode(), err)
	}
	if _, err := os.Stat(filepath.Join(dir, "grants/.alice.json.123")); err == nil {
		t.Error("a dead edit's file is still there")
	}
	if _, err := RevokeGrant(ctx, dir, Grantee{User: "alice"}, "T-1"); err != nil {
		t.Fatal(err)
	}
	if _, err := os.Stat(file); !os.IsNotExist(err) {
		t.Errorf("the file of no grants: %v", err)
	}
	for _, to := range []Grantee{{Group: "ops"}, {Group: "data"}} {
		name, err := AddGrant(ctx, dir, to, "G-1", testGrant(), false)
		if err != nil {
			t.Fatal(err)
		}
		text, err := os.ReadFile(filepath.Join(dir, name))
		if err != nil || !json.Valid(text) {
			t.Errorf("%s: %s %v", name, text, err)
		}
	}
	list, err = ListGrants(dir, Grantee{}, time.Now())
	if err != nil || len(list) != 2 || list[0].Group != "data" || list[1].Group != "ops" {
		t.Errorf("%+v %v", list, err)
	}
	put(t, dir, "grants/bob.json", "{")
	if list, err = ListGrants(dir, Grantee{}, time.Now()); err == nil || len(list) != 2 {
		t.Errorf("%+v %v", list, err)
	}
}
