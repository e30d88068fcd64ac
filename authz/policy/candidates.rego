# candidates: the grants that name the user, or a group the user is in. They are looked up by name, never searched for.
package sallyport

candidates contains {"ticket": ticket, "grant": grant, "from": sprintf("grants.%s", [input.user])} if {
	some ticket, grant in data.grants[input.user]
}

candidates contains {"ticket": ticket, "grant": grant, "from": sprintf("group_grants.%s", [group])} if {
	some group in data.users[input.user].groups
	some ticket, grant in data.group_grants[group]
}

# considered explains: each candidate with its status (status.rego), as `sallyport policy eval` prints them.
considered contains {
	"ticket": candidate.ticket,
	"profile": object.get(candidate.grant, "profile", ""),
	"from": candidate.from,
	"status": status(candidate.grant),
} if {
	some candidate in candidates
}
