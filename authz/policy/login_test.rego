package sallyport_test

import data.sallyport

now := "2026-03-01T12:00:00Z"

line := "ssh-ed25519 AAAAone"

users := {"alice": {"keys": [line], "groups": ["payments", "ops"]}, "bob": {"keys": [line]}}

profiles := {
	"debug": {"image": "debug:1", "network": "net", "permit": {"shell": true}},
	"db": {"image": "db:1"},
}

# login answers for alice's grants.
login(grants) := login_of({}, grants, {})

login_of(override, grants, group_grants) := answer if {
	question := object.union({"user": "alice", "source": "192.0.2.1", "key": {"line": line}}, override)
	answer := sallyport.login with input as question
		with data.users as users
		with data.profiles as profiles
		with data.grants as {"alice": grants}
		with data.group_grants as group_grants
		with time.now_ns as time.parse_rfc3339_ns(now)
}

refused(answer, rule, reason) if {
	answer == {"allow": false, "rule": rule, "reason": reason}
}

# grant is a live one, with changes.
grant(override) := object.union({"profile": "debug", "not_after": "2026-03-01T13:00:00Z"}, override)

test_admitted if {
	login({"T-1": grant({"reason": "why", "approved_by": "bob", "not_before": "2026-03-01T12:00:00Z"})}) == {
		"allow": true,
		"rule": "grants.alice",
		"groups": ["payments", "ops"],
		"ticket": "T-1",
		"profile": "debug",
		"not_before": "2026-03-01T12:00:00Z",
		"not_after": "2026-03-01T13:00:00Z",
		"why": "why",
		"approved_by": "bob",
		"sandbox": {"image": "debug:1", "network": "net"},
		"permit": {"shell": true},
	}
}

test_profile_without_permit_permits_nothing if login({"T-1": grant({"profile": "db"})}).permit == {}

test_no_grant if refused(login({}), "no-grant", "no grant for alice; ask for one to be approved")

test_grant_of_another if {
	answer := login_of({"user": "bob"}, {"T-1": grant({})}, {})
	refused(answer, "no-grant", "no grant for bob; ask for one to be approved")
}

test_unknown_user_and_wrong_key_read_the_same if {
	refused(login_of({"user": "mallory"}, {"T-1": grant({})}, {}), "key", "this key is not known for this user")
	answer := login_of({"key": {"line": "ssh-ed25519 AAAAtwo"}}, {"T-1": grant({})}, {})
	refused(answer, "key", "this key is not known for this user")
}

test_expired if {
	answer := login({"T-1": grant({"not_after": "2026-03-01T13:00:00+02:00"})})
	refused(answer, "expired", "expired: grant T-1 ended at 2026-03-01T11:00:00Z")
}

test_ends_at_the_instant if login({"T-1": grant({"not_after": now})}).rule == "expired"

test_instants_are_compared_and_not_texts if {
	login({"T-1": grant({"not_after": "2026-03-01T11:30:00-01:00"})}).allow
	not login({"T-1": grant({"not_after": "2026-03-01T12:30:00+01:00"})}).allow
}

test_the_latest_expired_is_named if {
	answer := login({
		"T-1": grant({"not_after": "2026-02-01T00:00:00Z"}),
		"T-2": grant({"not_after": "2026-02-03T00:00:00Z"}),
	})
	refused(answer, "expired", "expired: grant T-2 ended at 2026-02-03T00:00:00Z")
}

test_not_yet if {
	answer := login({
		"T-1": grant({"not_before": "2026-03-01T12:30:00Z"}),
		"T-2": grant({"not_before": "2026-03-01T12:20:00Z"}),
		"T-3": grant({"not_after": "2026-02-01T00:00:00Z"}),
	})
	refused(answer, "not-yet", "not yet: grant T-2 starts at 2026-03-01T12:20:00Z")
}

test_bad_times_are_refused if {
	every change in [
		{"not_after": "tomorrow"}, {"not_after": 2000000000}, {"not_after": null}, {"not_after": ""},
		{"not_before": "soon"}, {"not_before": null}, {"not_before": ""},
		{"not_before": "2026-03-01T13:00:00Z"}, {"not_after": "9999-12-31T00:00:00Z"},
	] {
		login({"T-1": grant(change)}).rule == "invalid"
	}
}

test_no_end_is_refused if {
	answer := login({"T-1": {"profile": "debug"}})
	refused(answer, "invalid", "grant T-1 has no valid times; tell who made it")
}

test_one_bad_grant_hides_no_good_one if login({"T-1": {"profile": "debug"}, "T-2": grant({})}).ticket == "T-2"

test_profile_missing if {
	answer := login({"T-1": grant({"profile": "gone"})})
	refused(answer, "no-profile", "grant T-1: its profile is missing; tell who made it")
}

test_source if {
	login({"T-1": grant({"sources": ["2001:db8::/32", "192.0.2.0/24"]})}).allow
	login_of({"source": "2001:db8::7"}, {"T-1": grant({"sources": ["2001:db8::/32"]})}, {}).allow
	answer := login({"T-1": grant({"sources": ["198.51.100.0/24"]})})
	refused(answer, "wrong-source", "grant T-1 is not for this address")
}

test_bad_sources_fit_nobody if {
	every sources in [[], null, "192.0.2.0/24", ["all"], ["192.0.2.1"], [7]] {
		login({"T-1": grant({"sources": sources})}).rule == "wrong-source"
	}
}

test_several_and_none_chosen if {
	answer := login({"T-2": grant({}), "T-1": grant({"profile": "db"}), "T-3": grant({"not_after": now})})
	refused(answer, "ambiguous", "several grants for alice, choose one: alice+T-1 (db), alice+T-2 (debug)")
}

test_choice if {
	grants := {"T-2": grant({}), "T-1": grant({"profile": "db"}), "debug": grant({"profile": "db"})}
	login_of({"choice": "T-2"}, grants, {}).profile == "debug"
	login_of({"choice": "T-1"}, grants, {}).ticket == "T-1"

	# A ticket goes before a profile of the same name.
	login_of({"choice": "debug"}, grants, {}).ticket == "debug"
	login_of({"choice": "db"}, grants, {}).rule == "ambiguous"
}

test_choice_of_profile if {
	login_of({"choice": "db"}, {"T-2": grant({}), "T-1": grant({"profile": "db"})}, {}).ticket == "T-1"
}

test_choice_is_exact if {
	every choice in ["t-1", "T-", "T-1 ", "T-1/"] {
		answer := login_of({"choice": choice}, {"T-1": grant({})}, {})
		answer.rule == "unknown-choice"
		answer.reason == sprintf("no grant %s for alice; there is: alice+T-1 (debug)", [choice])
	}
}

test_unknown_choice_and_nothing_live if {
	answer := login_of({"choice": "T-9"}, {"T-1": grant({"not_after": now})}, {})
	refused(answer, "unknown-choice", "no grant T-9 for alice")
}

test_an_expired_choice_is_not_replaced_by_a_live_grant if {
	login_of({"choice": "T-1"}, {"T-1": grant({"not_after": now}), "T-2": grant({})}, {}).rule == "expired"
}

test_group_grant if {
	answer := login_of({}, {}, {"ops": {"G-1": grant({})}, "others": {"G-2": grant({})}})
	answer.ticket == "G-1"
	answer.rule == "group_grants.ops"
}

test_own_grant_goes_before_a_group_grant_of_the_same_ticket if {
	login_of({}, {"T-1": grant({})}, {"ops": {"T-1": grant({"profile": "db"})}}).profile == "debug"
	login_of({}, {"T-1": grant({"not_after": now})}, {"ops": {"T-1": grant({"profile": "db"})}}).profile == "db"
	login_of({}, {"T-1": grant({})}, {"ops": {"T-2": grant({})}}).rule == "ambiguous"
}

test_deny if {
	answer := login({"T-1": grant({})}) with sallyport.deny as {"maintenance", "audit"}
	refused(answer, "deny", "audit; maintenance")
}

test_nothing_at_all_is_a_refusal if {
	answer := sallyport.login with input as {}
	answer.allow == false
}

test_considered if {
	answer := sallyport.considered with input as {"user": "alice", "source": "192.0.2.1", "key": {"line": line}}
		with data.users as users
		with data.profiles as profiles
		with data.grants as {"alice": {"T-1": grant({}), "T-2": {"profile": "db"}}}
		with time.now_ns as time.parse_rfc3339_ns(now)
	answer == {
		{"ticket": "T-1", "profile": "debug", "from": "grants.alice", "status": "live"},
		{"ticket": "T-2", "profile": "db", "from": "grants.alice", "status": "invalid"},
	}
}

joining := {"web": {"image": "i", "target": {"labels": {"app": "web"}}, "permit": {"target": {"network": true}}}}

# A rule of one's own says who may join what: it is asked again with the target.
test_target_is_decided_by_deny if {
	answers := [answer |
		some labels in [{"app": "web"}, {"app": "web", "tier": "ledger"}]
		answer := sallyport.login with input as {
			"user": "alice", "source": "192.0.2.1", "key": {"line": line}, "choice": "OPS-1",
			"target": {"name": "web-1", "labels": labels},
		}
			with data.users as users
			with data.profiles as joining
			with data.grants as {"alice": {"OPS-1": {"profile": "web", "not_after": "2026-03-01T13:00:00Z"}}}
			with data.group_grants as {}
			with time.now_ns as time.parse_rfc3339_ns(now)
			with sallyport.deny as {"not the ledger" | labels.tier == "ledger"}
	]
	answers[0].allow
	answers[0].sandbox.target.labels.app == "web"
	refused(answers[1], "deny", "not the ledger")
}
