# login: does the user, who has proven the key, get a sandbox, and which?
#
# input: schema/login-input.json. Result: schema/login-result.json, one complete object whatever the answer. "rule"
# names what decided; "reason" is read by the client, so it is built of names and times alone, never of free text.
package sallyport

default login := {"allow": false, "rule": "default", "reason": "access refused"}

login := refuse("key", "this key is not known for this user") if {
	not offer
} else := refuse("deny", concat("; ", deny)) if {
	count(deny) > 0
} else := refuse("no-grant", sprintf("no grant for %s; ask for one to be approved", [input.user])) if {
	count(candidates) == 0
} else := refuse("unknown-choice", sprintf("no grant %s for %s%s", [choice, input.user, alternatives])) if {
	count(chosen) == 0
} else := refuse("ambiguous", sprintf("several grants for %s, choose one: %s", [input.user, choices(live)])) if {
	count(live) > 1
} else := admit(one) if {
	some one in live
} else := refuse("wrong-source", sprintf("%s is not for this address", [named(dead("wrong-source"))])) if {
	count(dead("wrong-source")) > 0
} else := refuse("not-yet", sprintf("not yet: %s starts at %s", [named(soonest), rfc3339(first_start)])) if {
	count(soonest) > 0
} else := refuse("no-profile", sprintf("%s: its profile is missing; tell who made it", [named(dead("no-profile"))])) if {
	count(dead("no-profile")) > 0
} else := refuse("expired", sprintf("expired: %s ended at %s", [named(latest), rfc3339(last_end)])) if {
	count(latest) > 0
} else := refuse("invalid", sprintf("%s has no valid times; tell who made it", [named(dead("invalid"))])) if {
	count(dead("invalid")) > 0
}

refuse(rule, reason) := {"allow": false, "rule": rule, "reason": reason}

admit(candidate) := object.union_n([
	{
		"allow": true,
		"rule": candidate.from,
		"groups": object.get(data.users[input.user], "groups", []),
		"ticket": candidate.ticket,
		"profile": candidate.grant.profile,
		"sandbox": object.remove(profile, ["permit"]),
		"permit": object.get(profile, "permit", {}),
		"not_after": candidate.grant.not_after,
	},
	{name: value |
		some name, key in {"not_before": "not_before", "why": "reason", "approved_by": "approved_by"}
		value := candidate.grant[key]
	},
]) if {
	profile := data.profiles[candidate.grant.profile]
}

# dead is what was chosen and has that status, always in the same order.
dead(wanted) := sort([candidate | some candidate in chosen; status(candidate.grant) == wanted])

# soonest and latest hold the grant to name in a refusal first, or nothing.
soonest := [candidate | some candidate in dead("not-yet"); starts(candidate.grant) == first_start]

first_start := min({starts(candidate.grant) | some candidate in dead("not-yet")})

latest := [candidate | some candidate in dead("expired"); ends(candidate.grant) == last_end]

last_end := max({ends(candidate.grant) | some candidate in dead("expired")})

# named gives the first of them as "grant TICKET".
named(of) := sprintf("grant %s", [of[0].ticket])

# A client's ssh command with its choice, at most 16 of them: a refusal is read by a person.
choices(of) := concat(", ", array.slice(names, 0, 16)) if {
	names := sort([sprintf("%s+%s (%s)", [input.user, candidate.ticket, candidate.grant.profile]) | some candidate in of])
}

# alternatives lists what could have been chosen instead.
alternatives := sprintf("; there is: %s", [choices(others)]) if {
	others := {candidate | some candidate in candidates; status(candidate.grant) == "live"}
	count(others) > 0
} else := ""

rfc3339(ns) := time.format([ns, "UTC", "RFC3339"])
