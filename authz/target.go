package authz

import (
	"errors"
	"regexp"
	"strings"
)

// pickName is the name of a pod or container, of what a user picks among several.
var pickName = regexp.MustCompile(`^[A-Za-z0-9][A-Za-z0-9_.-]{0,252}$`)

// cutPick splits a choice at its last '/' into a profile's name or a ticket and the name of a target; ok is false if it can't
// be one of each.
func cutPick(choice string) (head, pick string, ok bool) {
	i := strings.LastIndexByte(choice, '/')
	if i < 0 {
		return "", "", false
	}
	head, pick = choice[:i], choice[i+1:]
	return head, pick, ticketName.MatchString(head) && pickName.MatchString(pick)
}

// errPickless is told where what follows the '/' has nothing to pick from.
var errPickless = errors.New("what follows the last '/' picks a target, and this profile has none")

// Choose asks about a login whose choice, as ParseUser gives it, may name a target after its last '/'. A ticket may hold a '/',
// too, so the whole is asked about first. pick is the target's name, empty if there is none.
func Choose(in LoginInput, ask func(LoginInput) (Login, error)) (answer Login, pick string, err error) {
	head, pick, splits := cutPick(in.Choice)
	if !splits {
		answer, err = ask(in)
		return answer, "", err
	}
	var whole Login
	if ticketName.MatchString(in.Choice) {
		if whole, err = ask(in); err != nil || whole.Allow {
			return whole, "", err
		}
	}
	in.Choice = head
	answer, err = ask(in)
	switch {
	case err != nil:
		return answer, "", err
	case answer.Allow && answer.Sandbox.Target == nil:
		return Login{Reason: errPickless.Error(), Rule: "no-target", ID: answer.ID, Revision: answer.Revision}, "", nil
	case answer.Allow:
		return answer, pick, nil
	case whole.ID != "" && answer.Rule == "unknown-choice":
		return whole, "", nil // it says what there is
	}
	return answer, "", nil
}

// checkJoin checks that what is joined and what is to be joined fit together. Both are as in a profile.
func checkJoin(target, permit map[string]any) *placeError {
	join, _ := permit["target"].(map[string]any)
	has := func(name string) bool { v, _ := join[name].(bool); return v }
	bad := func(text string, path ...string) *placeError { return &placeError{path: path, text: text} }
	switch {
	case target == nil && len(join) > 0:
		return bad("there is no target to join: name one", "permit", "target")
	case target != nil && !has("network"):
		return bad("joins nothing: write permit: {target: {network: true}}, which docs/targets.md explains", "target")
	case has("files") && !has("processes"):
		return bad("can't be had without processes", "permit", "target", "files")
	}
	return nil
}
