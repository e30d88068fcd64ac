package auditlog

import (
	"errors"
	"fmt"
	"slices"
	"strings"
	"time"
)

// Values of Config.Sync.
const (
	syncInterval   = "interval"
	syncBeforePass = "before-pass"
)

// Config says where and how a gate writes its log.
type Config struct {
	// Spool is the directory in which segments are written and wait for the store. Required; on a disk of its own file
	// system if the gate shall outlive a full one.
	Spool string `yaml:"spool"`
	// SegmentBytes is the size at which a segment is cut. Default 32 MiB, at least 4 KiB, at most 64 MiB.
	SegmentBytes int64 `yaml:"segment_bytes"`
	// SegmentAge is the time after which a segment that holds data is cut. Default 5s.
	SegmentAge time.Duration `yaml:"segment_age"`
	// Sync says when a record is durable: "interval", at most SyncInterval and SyncBytes behind, or "before-pass", before
	// what it describes happens: Record and Tap return when it is on the disk. Default "interval".
	Sync string `yaml:"sync"`
	// SyncInterval is how long a record may wait to be durable, the disk's own time aside. Default 250ms.
	SyncInterval time.Duration `yaml:"sync_interval"`
	// SyncBytes is how many bytes of a session may wait to be durable; then the session waits. Default 8 MiB, at least
	// 64 KiB.
	SyncBytes int64 `yaml:"sync_bytes"`
	// SpoolLimit is how many bytes the spool may take; then sessions end and new ones are refused. Default 4 GiB.
	SpoolLimit int64 `yaml:"spool_limit"`
	// Codec compresses frames: "auto" (zstd, but s2 for what comes fast), "zstd", "s2" or "none". Default "auto".
	Codec string `yaml:"codec"`
	// Tree is the directory of the transparency log's state, in the gate's state directory. Empty: there is none.
	Tree string `yaml:"-"`
	// CheckpointInterval is the time between two checkpoints of the transparency log when there is nothing to say. Default 45s,
	// at most 1m, so that one is in the store each minute.
	CheckpointInterval time.Duration `yaml:"checkpoint_interval"`
	// Recipients are whom the log is encrypted to, as age writes them: age1..., age1pq1... or ssh-ed25519 .... The gate can't read
	// back what it wrote. RecipientsFile is a file of more, one a line. Neither: the log is not encrypted.
	Recipients     []string `yaml:"recipients"`
	RecipientsFile string   `yaml:"recipients_file"`
	// Index says that the sessions are indexed: batches of entries, so that a list need not read every session.
	Index bool `yaml:"index"`
	// IndexAge is the time after which a batch is cut that is not full (1,000 sessions). Default 5m.
	IndexAge time.Duration `yaml:"index_age"`
	// IndexClear is what an encrypted log's index tells in the clear, beside what the logs' names and headers do: of ClearFields.
	IndexClear []string `yaml:"index_clear"`

	mendEvery time.Duration // between two tries to seal what an error of the disk cut; 30s, but in tests
}

// WithDefaults gives the configuration with its unset values set.
func (c Config) WithDefaults() Config {
	set := func(v *int64, d int64) {
		if *v == 0 {
			*v = d
		}
	}
	set(&c.SegmentBytes, 32<<20)
	set(&c.SyncBytes, 8<<20)
	set(&c.SpoolLimit, 4<<30)
	set((*int64)(&c.SegmentAge), int64(5*time.Second))
	set((*int64)(&c.CheckpointInterval), int64(45*time.Second))
	set((*int64)(&c.SyncInterval), int64(250*time.Millisecond))
	set((*int64)(&c.IndexAge), int64(5*time.Minute))
	set((*int64)(&c.mendEvery), int64(30*time.Second))
	if c.Codec == "" {
		c.Codec = "auto"
	}
	if c.Sync == "" {
		c.Sync = syncInterval
	}
	return c
}

// Validate says what is wrong with a configuration; call it after WithDefaults.
func (c Config) Validate() error {
	switch {
	case c.Sync != syncInterval && c.Sync != syncBeforePass:
		return fmt.Errorf("sync: %q is none of interval, before-pass", c.Sync)
	case c.Spool == "":
		return errors.New("spool: not set")
	case c.SegmentBytes < 4<<10 || c.SegmentBytes > 64<<20:
		return fmt.Errorf("segment_bytes: %d is not between 4096 and 67108864", c.SegmentBytes)
	case c.SegmentAge < 10*time.Millisecond:
		return fmt.Errorf("segment_age: %v is less than 10ms", c.SegmentAge)
	case c.SyncInterval < time.Millisecond:
		return fmt.Errorf("sync_interval: %v is less than 1ms", c.SyncInterval)
	case c.CheckpointInterval < 100*time.Millisecond || c.CheckpointInterval > time.Minute:
		return fmt.Errorf("checkpoint_interval: %v is not between 100ms and 1m", c.CheckpointInterval)
	case c.SyncBytes < 64<<10:
		return fmt.Errorf("sync_bytes: %d is less than 65536", c.SyncBytes)
	case c.SpoolLimit < 1<<20:
		return fmt.Errorf("spool_limit: %d is less than 1048576", c.SpoolLimit)
	}
	if err := c.validateIndex(); err != nil {
		return err
	}
	switch c.Codec {
	case "auto", "zstd", "s2", "none":
		return nil
	}
	return fmt.Errorf("codec: %q is none of auto, zstd, s2, none", c.Codec)
}

func (c Config) validateIndex() error {
	switch {
	case c.IndexAge < 10*time.Millisecond:
		return fmt.Errorf("index_age: %v is less than 10ms", c.IndexAge)
	case len(c.IndexClear) > 0 && len(c.Recipients) == 0 && c.RecipientsFile == "":
		return errors.New("index_clear: nothing is encrypted: it is for logs with recipients")
	}
	for _, f := range c.IndexClear {
		if !slices.Contains(ClearFields, f) {
			return fmt.Errorf("index_clear: %q is none of %s", f, strings.Join(ClearFields, ", "))
		}
	}
	return nil
}
