// Package agent is both ends of the stream between a gate and its sandbox.
//
// The inside end (Main, run by cmd/sallyport-agent as the sandbox's first process) dials the gate, lets the gate prove
// itself, runs what the gate asks for, and ends with everything it started when the gate is gone. The outside end
// (Client) runs in the gate and gives backends.Sandbox its Exec.
//
// # The stream
//
// Agent to gate: the 8 bytes of magic, then a nonce of 32 bytes. Gate to agent: the Ed25519 signature of
// signatureContext and nonce by the session's key, 64 bytes. The agent knows the public key from its command line, so
// only the gate that made this sandbox can drive it. Everything after is yamux, in which the gate alone opens streams.
//
// The first message of every stream says what the stream is for:
//
//   - control, exactly once in the life of an agent: greeting and answer, then a heartbeat each way every 5 s. Either
//     side ends when it has heard nothing for 15 s: a node that vanished closes no stream.
//   - process: a request, then resizes, signals and the order to kill inwards, and reports outwards: started or failed,
//     terminal states of typed input, exit. Nothing here waits behind bulk data.
//   - data of a process: frames of a type (0 stdin, 1 stdout, 2 stderr), a length and that many bytes. A length of zero
//     is the end of that direction.
//
// Where the stream is a unix socket, a process without a terminal has no data stream: with its proof the gate hands the
// agent a second socket, over which come, for each process, the three pipes that the gate has made for it. Only the
// process's ends leave the gate, so nothing inside can change the flags of the gate's own, and no descriptor ever comes
// from inside. The pipes belong to the agent's uid, so that a program may open /dev/stdout.
//
// Where the gate can't be dialled, the stream is the stdin and stdout of a relay (sallyport-agent relay), which the runtime
// executes in the sandbox before the gate asks for any process. The agent listens for it at a path (--relay), takes one peer in
// its life, removes the path, and gets the two descriptors by SCM_RIGHTS. The relay's end is the agent's.
//
// A message is a big-endian 32-bit length and that many bytes of CBOR. All that the agent sends is hostile input to
// the gate: the guard beneath yamux and the parsers above it bound and check everything, and are fuzzed.
//
// # Processes
//
// The agent never executes anything but itself: a child of it ("stage 2", an agent with an empty environment) gets the
// program, its arguments, environment and directory as data, and becomes the program. What is to hold for each process
// of a session is set there, in one place.
package agent
