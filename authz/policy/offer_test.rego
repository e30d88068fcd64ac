package sallyport_test

import data.sallyport

keys := ["ssh-ed25519 AAAAone alice@laptop", "\tssh-rsa \t BBBBtwo", `from="10.0.0.0/8" ssh-ed25519 CCCCthree`]

offered(user, line) if {
	sallyport.offer with input as {"user": user, "source": "192.0.2.1", "key": {"line": line}}
		with data.users as {"alice": {"keys": keys}, "bob": {"keys": ["ssh-ed25519 DDDDfour"]}, "carol": {"keys": []}}
}

test_known_key if offered("alice", "ssh-ed25519 AAAAone")

test_white_space_and_comment_do_not_count if offered("alice", "ssh-rsa BBBBtwo")

test_other_key if not offered("alice", "ssh-ed25519 AAAAon")

test_other_type if not offered("alice", "ssh-rsa AAAAone")

test_key_of_another_user if not offered("alice", "ssh-ed25519 DDDDfour")

test_line_with_options_is_no_key if not offered("alice", "ssh-ed25519 CCCCthree")

test_options_are_no_key if not offered("alice", `from="10.0.0.0/8" ssh-ed25519`)

test_unknown_user if not offered("mallory", "ssh-ed25519 AAAAone")

test_user_without_keys if not offered("carol", "")

test_false_and_not_undefined if {
	sallyport.offer == false with input as {} with data.users as {}
}
