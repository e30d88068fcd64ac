# deny: reasons to refuse whatever the grants say. None here. A module of your own adds one, without replacing any
# default rule:
#
#   package sallyport
#   deny contains "maintenance until 18:00" if data.maintenance.active
#
# The reason is shown to the client.
package sallyport

deny contains reason if {
	some reason in []
}
