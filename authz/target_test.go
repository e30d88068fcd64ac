package authz

import (
	"errors"
	"strings"
	"testing"
)

func TestChoose(t *testing.T) {
	joins := Login{Allow: true, ID: "1", Sandbox: Sandbox{Target: &Target{Name: "x"}}}
	plain := Login{Allow: true, ID: "1"}
	unknown := func(choice string) Login {
		return Login{ID: "1", Rule: "unknown-choice", Reason: "no grant " + choice}
	}
	expired := Login{ID: "1", Rule: "expired", Reason: "expired"}
	for _, c := range []struct {
		choice  string
		answers map[string]Login // by choice; others are unknown
		allow   bool
		pick    string
		reason  string
	}{
		{"", map[string]Login{"": plain}, true, "", ""},
		{"web", map[string]Login{"web": joins}, true, "", ""},
		{"web/pod-1", map[string]Login{"web": joins}, true, "pod-1", ""},
		{"web/pod-1", map[string]Login{"web": plain}, false, "", errPickless.Error()},
		{"web/pod-1", map[string]Login{"web/pod-1": plain, "web": joins}, true, "", ""}, // a ticket of that name
		{"team/OPS-1/pod-1", map[string]Login{"team/OPS-1": joins}, true, "pod-1", ""},
		{"team/OPS-1", map[string]Login{"team/OPS-1": joins}, true, "", ""},
		{"team/OPS-1", map[string]Login{"team/OPS-1": expired}, false, "", "expired"},
		{"web/pod-1", map[string]Login{"web": expired}, false, "", "expired"},
		{"no/pod-1", nil, false, "", "no grant no/pod-1"},
		{"web/" + strings.Repeat("p", 100), map[string]Login{"web": joins}, true, strings.Repeat("p", 100), ""},
	} {
		answer, pick, err := Choose(LoginInput{User: "alice", Choice: c.choice}, func(in LoginInput) (Login, error) {
			if in.Choice != "" && !ticketName.MatchString(in.Choice) {
				t.Errorf("%q: asked about %q, which can't be a choice", c.choice, in.Choice)
			}
			if l, ok := c.answers[in.Choice]; ok {
				return l, nil
			}
			return unknown(in.Choice), nil
		})
		if err != nil || answer.Allow != c.allow || pick != c.pick || !c.allow && answer.Reason != c.reason {
			t.Errorf("%q: %+v, %q, %v", c.choice, answer, pick, err)
		}
	}
	failure := errors.New("no decision")
	if a, _, err := Choose(LoginInput{Choice: "a/b"}, func(LoginInput) (Login, error) { return Login{}, failure }); err != failure || a.Allow {
		t.Error(a, err)
	}
}

func FuzzParseUser(f *testing.F) {
	for _, s := range []string{"alice", "alice+x", "alice+x/y", "a+b/c/d", "a+/", "a+b/../c"} {
		f.Add(s)
	}
	f.Fuzz(func(t *testing.T, login string) {
		user, choice, err := ParseUser(login)
		if err != nil {
			return
		}
		if choice != "" && user+"+"+choice != login || choice == "" && user != login {
			t.Errorf("%q: %q, %q", login, user, choice)
		}
		if strings.ContainsAny(login, "\x00\n\r \x1b\\%") {
			t.Errorf("%q is a user", login)
		}
		head, pick, ok := cutPick(choice)
		if ok && (head+"/"+pick != choice || strings.Contains(pick, "/") || strings.HasPrefix(pick, ".")) {
			t.Errorf("%q: %q, %q", choice, head, pick)
		}
	})
}

func TestTargetsInProfiles(t *testing.T) {
	for text, want := range map[string]string{
		`{"image": "i", "target": {"name": "api"}}`:                                                                           "target: joins nothing",
		`{"image": "i", "target": {"name": "api"}, "permit": {"target": {"network": false}}}`:                                 "target: joins nothing",
		`{"image": "i", "target": {"name": "api"}, "permit": {"target": {"network": true}}}`:                                  "",
		`{"image": "i", "target": {"namespace": "n", "workload": "deployment/api"}, "permit": {"target": {"network": true}}}`: "",
		`{"image": "i", "target": {"labels": {"app": "a"}}, "permit": {"target": {"network": true, "processes": true}}}`:      "",
		`{"image": "i", "target": {"labels": {"app": "a"}}, "permit": {"target": {"network": true, "files": true}}}`:          "permit.target.files: can't be had without processes",
		`{"image": "i", "target": {"labels": {"app": "a"}}, "permit": {"target": {"processes": true}}}`:                       "target: joins nothing",
		`{"image": "i", "permit": {"target": {"network": true}}}`:                                                             "permit.target: there is no target",
		`{"image": "i", "target": {}, "permit": {"target": {"network": true}}}`:                                               "target",
		`{"image": "i", "target": {"namespace": "n"}, "permit": {"target": {"network": true}}}`:                               "target",
		`{"image": "i", "target": {"labels": {}}, "permit": {"target": {"network": true}}}`:                                   "target.labels",
		`{"image": "i", "target": {"workload": "pod/x"}, "permit": {"target": {"network": true}}}`:                            "target.workload",
		`{"image": "i", "target": {"workload": "deployment/../x"}, "permit": {"target": {"network": true}}}`:                  "target.workload",
		`{"image": "i", "target": {"name": "../x"}, "permit": {"target": {"network": true}}}`:                                 "target.name",
		`{"image": "i", "target": {"name": "x", "other": 1}, "permit": {"target": {"network": true}}}`:                        "target",
		`{"image": "i", "target": {"name": "x"}, "permit": {"target": {"network": true, "write": true}}}`:                     "permit.target",
	} {
		doc, err := parse("p.json", []byte(text))
		if err != nil {
			t.Fatal(err)
		}
		bad := checkProfileEntry([]string{"p"}, doc.value)
		if want == "" && bad != nil || want != "" && (bad == nil || !strings.Contains(bad.Error(), want)) {
			t.Errorf("%s: %v, want %q", text, bad, want)
		}
	}
}
