# chosen: the candidates that input.choice names: exactly a ticket or, if there is no such ticket, a profile. All of
# them when nothing is chosen.
package sallyport

chosen := candidates if {
	choice == ""
} else := by_ticket if {
	count(by_ticket) > 0
} else := by_profile

choice := object.get(input, "choice", "")

by_ticket := {candidate | some candidate in candidates; candidate.ticket == choice}

by_profile := {candidate | some candidate in candidates; candidate.grant.profile == choice}

# live is what admits. Of a ticket that is granted both to the user and to a group, the user's own counts.
live := {candidate |
	some candidate in chosen
	status(candidate.grant) == "live"
	not own_instead(candidate)
}

own_instead(candidate) if {
	candidate.from != own
	some other in candidates
	other.from == own
	other.ticket == candidate.ticket
	status(other.grant) == "live"
}

own := sprintf("grants.%s", [input.user])
