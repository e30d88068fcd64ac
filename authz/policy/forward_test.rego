package sallyport_test

import data.sallyport

may(permit, question) if asked(permit, question).allow

to_name(host, address, port) := {"type": "direct-tcpip", "host": host, "address": address, "port": port}

to_address(address, port) := {"type": "direct-tcpip", "address": address, "port": port}

listen(question) := object.union({"type": "tcpip-forward"}, question)

test_nothing_named_is_refused if {
	every permit in [{}, {"forward": [], "listen": []}, {"shell": true, "exec": true, "sftp": true, "agent": false, "x11": false}] {
		not may(permit, to_name("db", "10.0.0.1", 5432))
		not may(permit, to_address("10.0.0.1", 5432))
		not may(permit, {"type": "direct-streamlocal@openssh.com", "path": "/run/app.sock"})
		not may(permit, listen({"host": "localhost", "address": "127.0.0.1", "port": 8000}))
		not may(permit, listen({}))
		not may(permit, {"type": "streamlocal-forward@openssh.com", "path": "/tmp/s"})
		not may(permit, {"type": "auth-agent-req@openssh.com"})
		not may(permit, {"type": "x11-req"})
	}
}

test_exact_name if {
	permit := {"forward": ["db.payments:5432"]}
	may(permit, to_name("db.payments", "10.0.0.1", 5432))
	may(permit, {"type": "direct-tcpip", "host": "db.payments", "port": 5432})
	not may(permit, to_name("db.payments", "10.0.0.1", 5433))
	not may(permit, to_name("xdb.payments", "10.0.0.1", 5432))
	not may(permit, to_name("db.payments.evil", "10.0.0.1", 5432))
	not may(permit, to_name("dbxpayments", "10.0.0.1", 5432))
	not may(permit, to_address("10.0.0.1", 5432))
}

test_case_of_an_entry if may({"forward": ["DB.Payments:5432"]}, to_name("db.payments", "10.0.0.1", 5432))

test_star_is_one_label if {
	permit := {"forward": ["*.svc:80", "db-*.local:80", "**.deep:80"]}
	may(permit, to_name("a.svc", "10.0.0.1", 80))
	not may(permit, to_name("a.b.svc", "10.0.0.1", 80))
	not may(permit, to_name("svc", "10.0.0.1", 80))
	may(permit, to_name("db-1.local", "10.0.0.1", 80))
	not may(permit, to_name("db-1.x.local", "10.0.0.1", 80))
	may(permit, to_name("a.b.deep", "10.0.0.1", 80))
	not may(permit, to_name("a.b.deep.evil", "10.0.0.1", 80))
}

# A pattern for names says nothing of addresses.
test_pattern_and_address if not may({"forward": ["*.*.*.*:80", "**.1:80"]}, to_address("10.0.0.1", 80))

test_any_host if {
	permit := {"forward": ["*:80"]}
	may(permit, to_name("a.b.c", "10.0.0.1", 80))
	may(permit, to_address("10.0.0.1", 80))
	may(permit, to_address("2001:db8::1", 80))
	not may(permit, to_address("10.0.0.1", 81))
}

test_address if {
	permit := {"forward": ["10.0.0.1:5432", "[2001:DB8::1]:443"]}
	may(permit, to_address("10.0.0.1", 5432))
	may(permit, to_name("any.name", "10.0.0.1", 5432))
	not may(permit, to_name("10.0.0.1.evil", "10.0.0.2", 5432))
	not may(permit, to_address("10.0.0.11", 5432))
	may(permit, to_address("2001:db8::1", 443))
	not may(permit, to_address("2001:db8::2", 443))
}

test_network if {
	permit := {"forward": ["10.1.0.0/16:*", "[2001:db8::/32]:443"]}
	may(permit, to_address("10.1.2.3", 1))
	may(permit, to_name("any.name", "10.1.2.3", 65535))
	not may(permit, {"type": "direct-tcpip", "host": "any.name", "port": 22})
	not may(permit, to_address("10.2.0.1", 1))
	not may(permit, to_address("::1", 443))
	may(permit, to_address("2001:db8:ffff::1", 443))
	not may(permit, to_address("2001:db9::1", 443))
}

test_ports if {
	permit := {"forward": ["db:8000-8010"]}
	may(permit, to_name("db", "10.0.0.1", 8000))
	may(permit, to_name("db", "10.0.0.1", 8010))
	not may(permit, to_name("db", "10.0.0.1", 7999))
	not may(permit, to_name("db", "10.0.0.1", 8011))
}

test_forward_is_not_listen if {
	not may({"forward": ["*:*", "unix:/**"]}, listen({"host": "localhost", "address": "127.0.0.1", "port": 8000}))
	not may({"forward": ["*:*", "unix:/**"]}, {"type": "streamlocal-forward@openssh.com", "path": "/tmp/s"})
	not may({"listen": ["*:*", "unix:/**"]}, to_name("db", "10.0.0.1", 5432))
	not may({"listen": ["*:*", "unix:/**"]}, {"type": "direct-streamlocal@openssh.com", "path": "/tmp/s"})
}

test_listen_on_loopback if {
	permit := {"listen": ["localhost:8000-9000"]}
	may(permit, listen({"host": "localhost", "address": "127.0.0.1", "port": 8000}))
	may(permit, listen({"host": "localhost", "address": "::1", "port": 8000}))
	may(permit, listen({"address": "127.0.0.1", "port": 9000}))
	may(permit, listen({"address": "::1", "port": 9000}))
	not may(permit, listen({"address": "127.0.0.1", "port": 9001}))
	not may(permit, listen({"address": "0.0.0.0", "port": 8000}))
	not may(permit, listen({"address": "10.0.0.1", "port": 8000}))
	not may(permit, listen({"port": 8000}))
	not may(permit, listen({"address": "127.0.0.1"}))
}

# Loopback by name is for listening alone: a target is what it is called.
test_localhost_as_a_target if {
	permit := {"forward": ["localhost:80"]}
	may(permit, to_name("localhost", "127.0.0.1", 80))
	not may(permit, to_address("127.0.0.1", 80))
}

test_listen_on_a_free_port if {
	may({"listen": ["localhost:0"]}, listen({"address": "127.0.0.1"}))
	may({"listen": ["localhost:*"]}, listen({"address": "127.0.0.1"}))
	not may({"listen": ["localhost:0"]}, listen({"address": "127.0.0.1", "port": 80}))
}

test_listen_on_all if {
	every question in [{"port": 80}, {"address": "0.0.0.0", "port": 80}, {"address": "::", "port": 80}] {
		may({"listen": ["*:80"]}, listen(question))
		not may({"listen": ["127.0.0.1:80", "[::1]:80", "localhost:*"]}, listen(question))
	}
}

test_paths if {
	permit := {"forward": ["unix:/run/app.sock", "unix:/srv/*/s", "unix:/opt/**/t"], "listen": ["unix:/tmp/*.sock"]}
	every path in ["/run/app.sock", "/srv/a/s", "/opt/a/b/t"] {
		may(permit, {"type": "direct-streamlocal@openssh.com", "path": path})
	}
	every path in ["/run/app.sock2", "/run/x/app.sock", "/srv/a/b/s", "/srv/s", "run/app.sock", "/tmp/a.sock"] {
		not may(permit, {"type": "direct-streamlocal@openssh.com", "path": path})
	}
	may(permit, {"type": "streamlocal-forward@openssh.com", "path": "/tmp/a.sock"})
	not may(permit, {"type": "streamlocal-forward@openssh.com", "path": "/tmp/a/b.sock"})
	not may(permit, {"type": "streamlocal-forward@openssh.com", "path": "/run/app.sock"})
}

# An entry for a path is none for a host, and the other way round.
test_kinds_of_entries if {
	not may({"forward": ["unix:/run/app.sock", "unix:/80"]}, to_name("unix", "10.0.0.1", 80))
	not may({"forward": ["*:*"]}, {"type": "direct-streamlocal@openssh.com", "path": "/run/app.sock"})
}

test_agent_and_x11 if {
	may({"agent": true}, {"type": "auth-agent-req@openssh.com"})
	not may({"agent": true}, {"type": "x11-req"})
	may({"x11": true}, {"type": "x11-req"})
	not may({"x11": true}, {"type": "auth-agent-req@openssh.com"})
}

test_refusals_of_forwarding_say_what if {
	asked({}, to_name("db", "10.0.0.1", 5432)).reason == "forwarding to db:5432 is not permitted by profile debug"
	asked({}, to_address("10.0.0.1", 5432)).reason == "forwarding to 10.0.0.1:5432 is not permitted by profile debug"
	asked({}, to_address("::1", 5432)).reason == "forwarding to [::1]:5432 is not permitted by profile debug"
	asked({}, {"type": "direct-streamlocal@openssh.com", "path": "/s"}).reason == "forwarding to /s is not permitted by profile debug"
	asked({}, listen({"port": 80})).reason == "listening on *:80 is not permitted by profile debug"
	asked({}, listen({"host": "localhost", "address": "::1"})).reason == "listening on localhost:0 is not permitted by profile debug"
	asked({}, {"type": "x11-req"}).reason == "X11 forwarding is not permitted by profile debug"
	asked({}, {"type": "auth-agent-req@openssh.com"}).reason == "agent forwarding is not permitted by profile debug"
}
