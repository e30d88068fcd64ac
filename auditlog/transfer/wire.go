package transfer

import "encoding/binary"

// The packet types of SFTP version 3 (draft-ietf-secsh-filexfer-02, section 3).
const (
	fxpInit          = 1
	fxpVersion       = 2
	fxpOpen          = 3
	fxpClose         = 4
	fxpRead          = 5
	fxpWrite         = 6
	fxpLstat         = 7
	fxpFstat         = 8
	fxpSetstat       = 9
	fxpFsetstat      = 10
	fxpOpendir       = 11
	fxpReaddir       = 12
	fxpRemove        = 13
	fxpMkdir         = 14
	fxpRmdir         = 15
	fxpRealpath      = 16
	fxpStat          = 17
	fxpRename        = 18
	fxpReadlink      = 19
	fxpSymlink       = 20
	fxpStatus        = 101
	fxpHandle        = 102
	fxpData          = 103
	fxpName          = 104
	fxpAttrs         = 105
	fxpExtended      = 200
	fxpExtendedReply = 201
)

const (
	// maxPacket is the greatest length a packet may announce; OpenSSH takes 256 KiB (SFTP_MAX_MSG_LENGTH), some send that
	// much of content.
	maxPacket = 256<<10 + 1024
	maxPath   = 4096 // PATH_MAX
	maxHandle = 256  // draft-ietf-secsh-filexfer-02, section 6.2
)

// reader takes a packet's fields apart. After the first that isn't there all are zero, and bad is set.
type reader struct {
	b   []byte
	bad bool
}

func (r *reader) take(n uint64) []byte {
	if r.bad || uint64(len(r.b)) < n {
		r.bad = true
		return nil
	}
	p := r.b[:n]
	r.b = r.b[n:]
	return p
}

func (r *reader) uint32() uint32 {
	if p := r.take(4); p != nil {
		return binary.BigEndian.Uint32(p)
	}
	return 0
}

func (r *reader) uint64() uint64 {
	if p := r.take(8); p != nil {
		return binary.BigEndian.Uint64(p)
	}
	return 0
}

func (r *reader) string() []byte { return r.take(uint64(r.uint32())) }

// limited is a string of at most n bytes.
func (r *reader) limited(n int) []byte {
	p := r.string()
	if len(p) > n {
		r.bad = true
		return nil
	}
	return p
}

func (r *reader) path() string { return string(r.limited(maxPath)) }

func (r *reader) handle() []byte { return r.limited(maxHandle) }

// attrs reads ATTRS (draft-ietf-secsh-filexfer-02, section 5).
func (r *reader) attrs() Attrs {
	a := Attrs{Valid: r.uint32()}
	if a.Valid&^(AttrSize|AttrOwner|AttrPermissions|AttrTimes|AttrExtended) != 0 {
		r.bad = true
	}
	if a.Valid&AttrSize != 0 {
		a.Size = r.uint64()
	}
	if a.Valid&AttrOwner != 0 {
		a.UID, a.GID = r.uint32(), r.uint32()
	}
	if a.Valid&AttrPermissions != 0 {
		a.Permissions = r.uint32()
	}
	if a.Valid&AttrTimes != 0 {
		a.Atime, a.Mtime = r.uint32(), r.uint32()
	}
	if a.Valid&AttrExtended != 0 {
		for n := r.uint32(); n > 0 && !r.bad; n-- {
			r.string()
			r.string()
		}
	}
	return a
}

// end says whether all was there, and nothing more.
func (r *reader) end() bool { return !r.bad && len(r.b) == 0 }

// packet builds a packet.
type packet struct{ b []byte }

func newPacket(typ byte) *packet { return &packet{[]byte{0, 0, 0, 0, typ}} }

func (p *packet) uint32(v uint32) *packet {
	p.b = binary.BigEndian.AppendUint32(p.b, v)
	return p
}

func (p *packet) uint64(v uint64) *packet {
	p.b = binary.BigEndian.AppendUint64(p.b, v)
	return p
}

func (p *packet) string(s string) *packet {
	p.b = append(binary.BigEndian.AppendUint32(p.b, uint32(len(s))), s...)
	return p
}

func (p *packet) raw(b []byte) *packet {
	p.b = append(p.b, b...)
	return p
}

func (p *packet) bytes() []byte {
	binary.BigEndian.PutUint32(p.b, uint32(len(p.b)-4))
	return p.b
}

// statusPacket is an SSH_FXP_STATUS (section 7).
func statusPacket(id, code uint32, message string) []byte {
	return newPacket(fxpStatus).uint32(id).uint32(code).string(message).string("en").bytes()
}
