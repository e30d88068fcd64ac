# request: may one request be served, or one channel opened? input.permit is what the login admitted; what it doesn't
# name is refused. forward.rego has the rules on forwarding.
#
# input: schema/request-input.json. Result: schema/request-result.json.
package sallyport

default request := {"allow": false, "reason": "not permitted"}

request := {"allow": true} if {
	permitted
} else := {"allow": false, "reason": sprintf("%s is not permitted by profile %s", [what, input.profile])}

permitted if {
	input.type == "shell"
	input.permit.shell
}

permitted if {
	input.type == "exec"
	input.permit.exec
}

permitted if {
	input.type == "subsystem"
	input.name == "sftp"
	input.permit.sftp
}

permitted if {
	input.type in {"pty-req", "signal"}
	runs_programs
}

permitted if {
	input.type == "env"
	some pattern in input.permit.env
	name_fits(pattern, input.name)
}

runs_programs if input.permit.shell

runs_programs if input.permit.exec

name_fits(pattern, name) if pattern == name

# A trailing * matches a prefix.
name_fits(pattern, name) if {
	endswith(pattern, "*")
	startswith(name, trim_suffix(pattern, "*"))
}

what := sprintf("%s %s", [input.type, input.name]) if {
	input.type in {"subsystem", "env"}
} else := text if {
	text := forwarding
} else := input.type
