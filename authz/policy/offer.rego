# offer: may this key be used by this user at all? It is asked before the key is proven, so it answers only whether a
# signature is worth asking for: the key stands in data.users[input.user].keys.
#
# input: schema/offer-input.json. Result: true or false.
package sallyport

default offer := false

offer if {
	some line in data.users[input.user].keys
	key_of(line) == input.key.line
}

# key_of gives "type base64" of an authorized_keys line: the comment does not count, and a line that begins with
# options is the line of no key.
key_of(line) := concat(" ", array.slice(fields, 0, 2)) if {
	fields := regex.split(`[ \t]+`, trim_space(line))
	regex.match(`^(ssh|ecdsa|sk)-[a-z0-9@.-]+$`, fields[0])
}
