package sallyport_test

import data.sallyport

asked(permit, question) := answer if {
	answer := sallyport.request with input as object.union({"profile": "debug", "permit": permit}, question)
}

test_each_needs_its_own_permit if {
	asked({"shell": true}, {"type": "shell"}) == {"allow": true}
	asked({"exec": true}, {"type": "exec", "command": "id"}) == {"allow": true}
	asked({"sftp": true}, {"type": "subsystem", "name": "sftp"}) == {"allow": true}
	not asked({"exec": true, "sftp": true}, {"type": "shell"}).allow
	not asked({"shell": true, "sftp": true}, {"type": "exec", "command": "id"}).allow
	not asked({"shell": true, "exec": true}, {"type": "subsystem", "name": "sftp"}).allow
}

test_refusal_says_what if {
	asked({}, {"type": "shell"}) == {"allow": false, "reason": "shell is not permitted by profile debug"}
	asked({}, {"type": "subsystem", "name": "netconf"}).reason == "subsystem netconf is not permitted by profile debug"
}

test_false_is_not_permitted if not asked({"shell": false, "exec": false}, {"type": "shell"}).allow

test_other_subsystem if not asked({"sftp": true, "shell": true}, {"type": "subsystem", "name": "netconf"}).allow

test_pty_and_signal_come_with_programs if {
	every type in ["pty-req", "signal"] {
		asked({"shell": true}, {"type": type}).allow
		asked({"exec": true}, {"type": type}).allow
		not asked({"sftp": true}, {"type": type}).allow
	}
}

test_env if {
	permit := {"shell": true, "env": ["TZ", "LC_*"]}
	asked(permit, {"type": "env", "name": "TZ"}).allow
	asked(permit, {"type": "env", "name": "LC_ALL"}).allow
	not asked(permit, {"type": "env", "name": "TZX"}).allow
	not asked(permit, {"type": "env", "name": "LD_PRELOAD"}).allow
	not asked(permit, {"type": "env", "name": "lc_ALL"}).allow
	not asked({"shell": true}, {"type": "env", "name": "TZ"}).allow
}

test_unknown_type if {
	permit := {"shell": true, "exec": true, "sftp": true, "env": ["*"], "forward": ["*:*"], "listen": ["*:*"], "agent": true, "x11": true}
	not asked(permit, {"type": "tun@openssh.com"}).allow
}

test_no_question_is_a_refusal if {
	answer := sallyport.request with input as {}
	not answer.allow
}
