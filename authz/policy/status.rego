# status: what a grant is worth now, to this client: "live", or the first reason why it isn't.
package sallyport

status(grant) := "invalid" if {
	not valid_times(grant)
} else := "expired" if {
	time.now_ns() >= ends(grant)
} else := "not-yet" if {
	time.now_ns() < starts(grant)
} else := "no-profile" if {
	not data.profiles[grant.profile]
} else := "wrong-source" if {
	not source_fits(grant)
} else := "live"

# A time that isn't RFC 3339 leaves these undefined, and so does a grant without not_after.
starts(grant) := 0 if not "not_before" in object.keys(grant)

starts(grant) := time.parse_rfc3339_ns(grant.not_before)

ends(grant) := time.parse_rfc3339_ns(grant.not_after)

valid_times(grant) if starts(grant) < ends(grant)

source_fits(grant) if not "sources" in object.keys(grant)

source_fits(grant) if {
	some cidr in grant.sources
	net.cidr_contains(cidr, input.source)
}
