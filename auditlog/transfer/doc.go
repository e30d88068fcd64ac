// Package transfer reads file transfers out of a channel's bytes as they pass: [SFTP] is SFTP version 3 with OpenSSH's
// extensions, [SCP] the older protocol of scp and rcp. Both stand between a client and a server that are trusted with
// nothing, hand the bytes on, and say in [Event]s what was transferred; by [Config.Decide] they refuse in the client's
// own protocol. They do no I/O but write to the two writers they were given.
//
// What is seen is the protocol: what a client asked for and what the server inside said of it. Bytes, offsets and hashes
// are those that passed. Not seen: whether the server told the truth about its file system; what a file was before, or
// becomes after; what another process does to it meanwhile; and, but for their number of bytes, the names in a directory
// listing. Fields that mean nothing to a server (the text of an error, a request's id) can carry bytes between a client
// and a server that conspire: the channel's own byte counts are the bound on those.
//
// A stream that does not keep to its protocol is never guessed at. The decoder says so in one [Undecodable] event; from
// then on every byte goes to [Config.Raw] before it passes, or, where there are rules to be kept, nothing passes.
package transfer
