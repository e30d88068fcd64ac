# forward: which connections may pass between the client and the sandbox's network, and which may be waited for inside?
# They are questions of request.rego, whose rule permitted this adds to.
#
# An entry of permit.forward or permit.listen is host:port or unix:/path, and was checked when it was loaded. A name
# fits by itself, whatever its address; an IP address or a CIDR fits the address, by whatever name.
package sallyport

permitted if {
	input.type == "direct-tcpip"
	some entry in input.permit.forward
	target_fits(entry)
}

permitted if {
	input.type == "direct-streamlocal@openssh.com"
	some entry in input.permit.forward
	path_fits(entry)
}

permitted if {
	input.type == "tcpip-forward"
	some entry in input.permit.listen
	target_fits(entry)
}

permitted if {
	input.type == "streamlocal-forward@openssh.com"
	some entry in input.permit.listen
	path_fits(entry)
}

permitted if {
	input.type == "auth-agent-req@openssh.com"
	input.permit.agent
}

permitted if {
	input.type == "x11-req"
	input.permit.x11
}

# The port comes after the last colon; IPv6 stands in brackets.
target_fits(entry) if {
	not startswith(entry, "unix:")
	parts := split(entry, ":")
	last := count(parts) - 1
	port_fits(parts[last])
	host_fits(trim_suffix(trim_prefix(concat(":", array.slice(parts, 0, last)), "["), "]"))
}

port := object.get(input, "port", 0)

port_fits("*")

port_fits(wanted) if wanted == format_int(port, 10)

port_fits(wanted) if {
	[from, to] := split(wanted, "-")
	to_number(from) <= port
	port <= to_number(to)
}

host_fits("*")

# A * stands for characters of one label, ** for any characters.
host_fits(pattern) if glob.match(lower(pattern), ["."], input.host)

host_fits(network) if net.cidr_contains(prefix(network), input.address)

# Who may listen on localhost may name the address.
host_fits("localhost") if {
	input.type == "tcpip-forward"
	some loopback in ["127.0.0.0/8", "::1/128"]
	net.cidr_contains(loopback, input.address)
}

# prefix is undefined for a name.
prefix(network) := network if {
	contains(network, "/")
} else := sprintf("%s/128", [network]) if {
	contains(network, ":")
} else := sprintf("%s/32", [network]) if {
	regex.match(`^[0-9.]+$`, network)
}

# A * stands for characters of one component, ** for any number of components.
path_fits(entry) if {
	startswith(entry, "unix:/")
	glob.match(trim_prefix(entry, "unix:"), ["/"], input.path)
}

# forwarding says what is refused.
forwarding := sprintf("forwarding to %s", [place]) if {
	input.type in {"direct-tcpip", "direct-streamlocal@openssh.com"}
} else := sprintf("listening on %s", [place]) if {
	input.type in {"tcpip-forward", "streamlocal-forward@openssh.com"}
} else := "agent forwarding" if {
	input.type == "auth-agent-req@openssh.com"
} else := "X11 forwarding" if {
	input.type == "x11-req"
}

place := input.path if {
	input.path
} else := sprintf("%s:%d", [input.host, port]) if {
	input.host
} else := sprintf("[%s]:%d", [input.address, port]) if {
	contains(input.address, ":")
} else := sprintf("%s:%d", [object.get(input, "address", "*"), port])
