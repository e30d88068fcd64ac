package auditlog

import "time"

// What tests put under a spool.
type (
	Disk     = disk
	DiskFile = diskFile
	OSDisk   = osDisk
)

// OpenOn is Open with another disk.
var OpenOn = openOn

// SetMendEvery sets the time between two tries to seal what an error of the disk cut.
func (c *Config) SetMendEvery(d time.Duration) { c.mendEvery = d }

// SetWall sets the clock that stamps.
func (l *Log) SetWall(wall func() time.Time) { l.wall = wall }

// LastFooter says whether bytes that were written at once are a footer, and whether it ends its log.
func LastFooter(b []byte) (footer, last bool) {
	if len(b) <= frameHeaderBytes || b[0] != frameFooter {
		return false, false
	}
	f, err := decodeFooter(b[frameHeaderBytes:])
	return err == nil, f.Last
}

// TakeOrder gives the queues that n tries of an uploader are of, one after the other, if each of the queues has something waiting.
func TakeOrder(n int, away bool, queues ...string) (order []string) {
	u := newUploader(nil)
	defer u.cancel()
	for _, id := range queues {
		u.add(id, upload{name: id})
	}
	if away {
		u.row = awayAfter
	}
	for range n {
		q, _, _ := u.take()
		order = append(order, q.id)
		q.busy, u.probing = false, nil
	}
	return order
}

// LookAgain has the uploader look at the spool as if it had lost track of what is there.
func (l *Log) LookAgain() { l.uploads.lookAgain() }
