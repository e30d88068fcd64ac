package auditlog

import "time"

// What an import writes: of a log that was made from another program's.
const (
	KindImport     Kind = 50 // Import
	KindImportNote Kind = 51 // ImportNote
)

// ImportStatement stands in every Import, so that nobody takes an import for more than it is.
const ImportStatement = "Imported: this log was made from the file named here. Its signatures prove what the importer read and when, and nothing of what " +
	"happened before: the file had no signature, and could have been changed by whoever had it."

// Import is the first record of a log that was made from another program's. What follows has the times that the file says; this
// one, the first of them.
type Import struct {
	Format    string    `cbor:"1,keyasint,omitempty" json:"format,omitempty"`  // "ContainerSSH, version 2"
	File      string    `cbor:"2,keyasint,omitempty" json:"file,omitempty"`    // name, without directories
	SHA256    []byte    `cbor:"3,keyasint,omitempty" json:"sha256,omitempty"`  // of the file
	Size      uint64    `cbor:"4,keyasint,omitempty" json:"size"`              // bytes
	Time      time.Time `cbor:"5,keyasint,omitzero" json:"time,omitzero"`      // of the import
	Version   string    `cbor:"6,keyasint,omitempty" json:"version,omitempty"` // of the program that imported
	Session   string    `cbor:"7,keyasint,omitempty" json:"session,omitempty"` // the connection's ID in the file
	Statement string    `cbor:"8,keyasint,omitempty" json:"statement,omitempty"`
}

// ImportNote is what the file says and no other kind of record holds, or what was wrong with it.
type ImportNote struct {
	Type int64  `cbor:"1,keyasint,omitempty" json:"type"` // in the file's format; -1: the importer's own
	Text string `cbor:"2,keyasint,omitempty" json:"text,omitempty"`
}

func (*Import) Kind() Kind     { return KindImport }
func (*ImportNote) Kind() Kind { return KindImportNote }

// SetTime gives the time of the records that come from here on, where that is not now: of an import. Before Begin it is also the
// time at which the log began, and by which it is named. What a segment says of its own making stays true.
func (r *Recorder) SetTime(at time.Time) {
	r.mu.Lock()
	defer r.mu.Unlock()
	r.at = at
	if !r.begun {
		r.start = at
		if r.entry != nil {
			r.entry.Start = at
		}
	}
}

// stamp is the time of a record. The lock is held.
func (r *Recorder) stamp() time.Time {
	if r.at.IsZero() {
		return r.log.wall()
	}
	return r.at
}
