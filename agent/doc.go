// Package agent is both ends of the stream between a gate and its sandbox.
//
// The inside end (Main, run by cmd/sallyport-agent as the sandbox's first process) dials the gate, lets the gate prove
// itself, runs what the gate asks for, and ends with everything it started when the gate is gone. The outside end
// (Client) runs in the gate and gives backends.Sandbox its Exec, and the powers of backends.Dialer and
// backends.Listener.
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
//   - reports: what is executed, outwards, and inwards up to which report it is recorded.
//   - resolve: a name, answered by addresses or a failure.
//   - dial: an address, answered by nothing more than success or a failure. Then the stream is the connection: frames both
//     ways, of type 0 with its bytes, or with none at the end of the direction, or of type 1 when it was cut off inside.
//     The stream itself is closed when both directions have ended, or by who hangs up: yamux ends a stream of which one
//     side has been closed for a minute, so its own half-close would not do.
//   - listen: an address, answered by the one it got, or a failure. The agent then tells a number and the originator of each
//     connection that came. When the gate closes its side, the listener ends, and then the agent closes its own.
//   - accept: takes one of those, by listener and number. It is answered as a dial is.
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
// Or the gate dials the agent (--direct): see direct.go.
//
// A message is a big-endian 32-bit length and that many bytes of CBOR. All that the agent sends is hostile input to
// the gate: the guard beneath yamux and the parsers above it bound and check everything, and are fuzzed.
//
// # Processes
//
// The agent never executes anything but itself: a child of it ("stage 2", an agent with an empty environment) gets the
// program, its arguments, environment and directory as data, and becomes the program. What is to hold for each process
// of a session is set there, in one place.
//
// # Forwarding
//
// The gate decides and records; the agent does what was decided, from inside the sandbox's network and with its uid. So
// that nothing else is done than was decided, it dials IP addresses alone, never names, and not the address of nobody, which
// the kernel takes for loopback. Names are looked up on their own, in the sandbox's hosts file and at its name servers;
// localhost is loopback without asking.
//
// The agent may reach more than the session's processes: the file of its own socket, and its own descriptors by way of
// /proc. So there are no abstract unix names, and a path is looked up once, through all its symbolic links, to a
// descriptor that can be used for nothing but naming it (O_PATH). What is checked of that descriptor (it is a path, and not
// one below the agent's own directories) is true of what is then connected to, or listened in, by its name in /proc: a
// link that is changed meanwhile changes nothing. A socket that the agent makes has mode 0600 from its first moment on,
// and what the agent removes is what it made.
//
// All of it is bounded. There are at most maxConnections connections, and in a small sandbox no more than fit half of its
// memory if all stall. Those count that came to a listener and wait for the gate to take them, which at most
// backends.MaxBacklog a listener may do, for half a minute. What comes beyond that is reset. A connection that passes nothing holds two buffers of 4 KiB. One that stalls in both directions holds two of
// 64 KiB, and up to insideWindow that came from the gate and was not taken; the gate holds up to window. As buffers grow by
// doubling, of 100 such connections each held 0.65 MiB in the agent and 1.05 MiB in the gate. Each stalls alone. Looking a
// path up may hold a thread, so few are looked up at a time.
//
// A process that is to reach an X server gets its cookie in a file of its own, in a directory only its uid can enter, which
// goes with the process: the session has no xauth(1) to run, and the cookie is on no command line.
package agent
