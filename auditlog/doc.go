// Package auditlog writes, stores and reads the record of everything that happens in a session.
//
// Writing: Open gives a Log; Log.New gives each connection a Recorder, which is in memory until Begin. Records become
// frames, frames fill segments in a spool directory, and a sealed segment (signed, hash-chained to the one before) is put
// into a Store and then deleted from the spool.
//
// Reading: a Source gives the stored segments back; a SessionReader yields a session's records in order and says, by a
// Report, whether all of it is there and as it was written.
//
// FORMAT.md, beside this file, describes the bytes.
package auditlog
