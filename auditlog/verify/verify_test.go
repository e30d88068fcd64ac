package verify_test

import (
	"bytes"
	"context"
	"crypto/ed25519"
	"encoding/base64"
	"encoding/binary"
	"fmt"
	"io"
	"maps"
	"math/rand/v2"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/sallyport/sallyport/auditlog"
	"github.com/sallyport/sallyport/auditlog/tlog"
	"github.com/sallyport/sallyport/auditlog/verify"
)

var pinned = verify.Options{Keys: []ed25519.PublicKey{public(7)}, Parallel: 2}

func TestIntact(t *testing.T) {
	s := kept(t)
	sum, wrong := check(t, s, pinned)
	if len(wrong) > 0 || sum.Logs[auditlog.Sealed] != 4 || sum.Unsealed() || sum.Outside+sum.Foreign+sum.Missing > 0 || sum.Objects != len(s.m) {
		t.Errorf("%+v of %d objects: %q", sum, len(s.m), wrong)
	}
	if tr := sum.Trees; len(tr) != 1 || tr[0].Size != 4 || tr[0].Ended || time.Since(sum.Newest) > time.Minute {
		t.Errorf("%+v", tr)
	}
	if n := len(s.names("s2/")); n < 3 {
		t.Fatalf("s2 has %d segments", n)
	}
	since := pinned
	since.Since = newest(t, s)
	if _, wrong := check(t, s, since); len(wrong) > 0 {
		t.Error(wrong)
	}
	day := pinned
	day.From, day.To = "2001/01/01", "2001/01/02"
	if sum, wrong := check(t, s, day); len(wrong) > 0 || sum.Total() != 0 {
		t.Errorf("another day: %+v %q", sum, wrong)
	}
	day.From, day.To = time.Now().UTC().AddDate(0, 0, -1).Format("2006/01/02"), time.Now().UTC().AddDate(0, 0, 1).Format("2006/01/02")
	if sum, wrong := check(t, s, day); len(wrong) > 0 || sum.Total() != 4 {
		t.Errorf("today: %+v %q", sum, wrong)
	}
}

// Every byte of every object is changed in turn, and each object is cut at every byte: each is found.
func TestEveryByte(t *testing.T) {
	s := newStore()
	g := &gate{t: t, dir: t.TempDir(), store: s, key: 7}
	g.open()
	g.session("s1", 5000) // two segments
	g.close()
	every, n := 1, 0
	if testing.Short() {
		every = 11
	}
	for _, name := range slices.Sorted(maps.Keys(s.m)) {
		whole := s.m[name]
		for i := 0; i < len(whole); i += every {
			n++
			s.m[name] = slices.Clone(whole)
			s.m[name][i] ^= 1 << (i % 8)
			if _, wrong := check(t, s, pinned); len(wrong) == 0 {
				t.Errorf("%s: byte %d of %d changed, and nothing found", name, i, len(whole))
			}
			if i%7 == 0 {
				s.m[name] = whole[:i]
				if _, wrong := check(t, s, pinned); len(wrong) == 0 {
					t.Errorf("%s: cut at %d of %d, and nothing found", name, i, len(whole))
				}
			}
		}
		s.m[name] = whole
	}
	t.Logf("%d bytes changed", n)
}

// A larger store, with full tiles, and sampled.
func TestSampled(t *testing.T) {
	s := tiled(t)
	if _, wrong := check(t, s, pinned); len(wrong) > 0 {
		t.Fatal(wrong)
	}
	seed := rand.Uint64()
	t.Logf("seed %d", seed)
	rnd := rand.New(rand.NewPCG(seed, 1))
	names := slices.Sorted(maps.Keys(s.m))
	for range 15 {
		name := names[rnd.IntN(len(names))]
		whole := s.m[name]
		i := rnd.IntN(len(whole))
		s.m[name] = slices.Clone(whole)
		s.m[name][i] ^= 1 << rnd.IntN(8)
		if _, wrong := check(t, s, pinned); len(wrong) == 0 {
			t.Errorf("%s: byte %d of %d changed, and nothing found", name, i, len(whole))
		}
		s.m[name] = whole
	}
	for _, name := range s.names("/tile/") {
		whole := s.m[name]
		delete(s.m, name)
		if _, wrong := check(t, s, pinned); len(wrong) == 0 {
			t.Errorf("%s: gone, and nothing found", name)
		}
		s.m[name] = slices.Clone(whole)
		s.m[name][rnd.IntN(len(whole))] ^= 1
		if _, wrong := check(t, s, pinned); len(wrong) == 0 {
			t.Errorf("%s: changed, and nothing found", name)
		}
		s.m[name] = whole
	}
	// What a missing checkpoint carried is in the bundle: the rest is proven all the same.
	for _, name := range s.names("/checkpoint/") {
		whole := s.m[name]
		c, err := tlog.ParseCheckpoint(whole)
		must(t, err)
		if c.Size > 256 {
			continue
		}
		delete(s.m, name)
		_, wrong := check(t, s, pinned)
		if len(wrong) != 1 || !strings.Contains(wrong[0], "missing before it") {
			t.Errorf("%s: gone: %q", name, wrong)
		}
		s.m[name] = whole
	}
}

// tiled is a store of more than 256 sessions.
func tiled(t testing.TB) *store {
	s := newStore()
	g := &gate{t: t, dir: t.TempDir(), store: s, key: 7}
	g.open()
	g.session("first", 10)
	g.close()
	g.open()
	var all sync.WaitGroup
	for w := range 8 {
		all.Go(func() {
			for i := range 33 {
				g.session(fmt.Sprintf("s-%d-%d", w, i), 10)
			}
		})
	}
	all.Wait()
	g.close()
	g.open() // says something after the tiles
	g.session("last", 10)
	g.close()
	return s
}

func TestObjects(t *testing.T) {
	whole := kept(t)
	segments := whole.names(".seg")
	s2, s3 := whole.names("/s2/"), whole.names("/s3/")
	checkpoints := whole.names("/checkpoint/")
	for _, name := range slices.Sorted(maps.Keys(whole.m)) {
		s := whole.clone()
		delete(s.m, name)
		_, wrong := check(t, s, pinned)
		switch {
		case strings.HasPrefix(name, "keys/"): // proves nothing, so nothing is lost
		case name == checkpoints[len(checkpoints)-1]:
			// Nobody can see this from a bucket alone; from a kept checkpoint it can be seen.
			since := pinned
			since.Since = newest(t, whole)
			if _, wrong := check(t, s, since); !strings.Contains(strings.Join(wrong, "\n"), "newest objects were taken away") {
				t.Errorf("%s: gone, and the kept checkpoint does not tell: %q", name, wrong)
			}
		case len(wrong) == 0:
			t.Errorf("%s: gone, and nothing found", name)
		}
	}
	find := func(what string, change func(m map[string][]byte), want string) {
		t.Helper()
		s := whole.clone()
		change(s.m)
		if _, wrong := check(t, s, pinned); !strings.Contains(strings.Join(wrong, "\n"), want) {
			t.Errorf("%s: want %q in %q", what, want, wrong)
		}
	}
	for i, a := range segments {
		for _, b := range segments[i+1:] {
			find(a+" and "+b+" changed places", func(m map[string][]byte) { m[a], m[b] = m[b], m[a] }, "is not in its place")
		}
		find(a+" twice", func(m map[string][]byte) { m[next(a, 1)] = m[a] }, "not in its place")
		find(a+" far away", func(m map[string][]byte) { m[next(a, 7)] = m[a] }, "missing before it")
	}
	for i, a := range checkpoints {
		for _, b := range checkpoints[i+1:] {
			find(a+" and "+b+" changed places", func(m map[string][]byte) { m[a], m[b] = m[b], m[a] }, "is not in its place")
		}
	}
	find("s2 replaced by s3", func(m map[string][]byte) {
		for i := range s2 {
			m[s2[i]] = m[s3[min(i, len(s3)-1)]]
		}
	}, "is not in its place")
	remove := func(part string) func(m map[string][]byte) {
		return func(m map[string][]byte) {
			for _, n := range whole.names(part) {
				delete(m, n)
			}
		}
	}
	find("s2 gone, and its leaf another's", func(m map[string][]byte) {
		remove("/s2/")(m)
		var s1 string
		for _, name := range checkpoints {
			lines := strings.Split(string(m[name]), "\n")
			for i, l := range lines {
				b, _ := base64.StdEncoding.DecodeString(strings.TrimPrefix(l, "leaf "))
				leaf, err := auditlog.ParseLeaf(b)
				switch {
				case err != nil:
				case strings.Contains(leaf.Dir, "/s1/"):
					s1 = l
				case strings.Contains(leaf.Dir, "/s2/"):
					lines[i] = s1
				}
			}
			m[name] = []byte(strings.Join(lines, "\n"))
		}
	}, "the leaves do not make its root hash")
	find("s2 gone", remove("/s2/"), fmt.Sprintf("/s2/: offset 0: is missing: %d segments", len(s2)))
	find("the transparency log gone", remove("tlog/"), "is not in the store")
	find("end of s2 gone", func(m map[string][]byte) { delete(m, s2[len(s2)-1]) }, "its end is missing")
	find("a strange object among sessions", func(m map[string][]byte) { m["sessions/2026/01/01/s9/note.txt"] = nil }, "not a segment")
	find("a strange object in the log", func(m map[string][]byte) { m[checkpoints[0]+".bak"] = nil }, "not the name of an object")
	find("another duplicate", func(m map[string][]byte) { m[auditlog.DuplicateName(s2[0], auditlog.Hash{1})] = m[s2[0]] }, "is not what was put")

	s := whole.clone()
	s.m["README.txt"] = nil
	if sum, wrong := check(t, s, pinned); len(wrong) > 0 || sum.Foreign != 1 {
		t.Errorf("a foreign object: %+v %q", sum, wrong)
	}
}

// next is the name of the segment n after name.
func next(name string, n int) string {
	p, _ := auditlog.ParseName(name)
	p.Number += uint32(n)
	return p.String()
}

// Cut at the end of every frame, a segment is not taken for a whole one.
func TestFrames(t *testing.T) {
	s := kept(t)
	frames := 0
	for _, name := range s.names(".seg") {
		whole := s.m[name]
		at := 12 + int(binary.BigEndian.Uint16(whole[10:])) + 4
		for at < len(whole) {
			frames++
			s.m[name] = whole[:at]
			if _, wrong := check(t, s, pinned); len(wrong) == 0 {
				t.Errorf("%s: cut at %d of %d, and nothing found", name, at, len(whole))
			}
			at += 28 + int(binary.BigEndian.Uint32(whole[at+4:]))
		}
		s.m[name] = whole
	}
	if frames < 20 {
		t.Errorf("only %d frames", frames)
	}
}

// What who has the key and the bucket later writes into the past has no leaf there.
func TestForged(t *testing.T) {
	s := kept(t)
	other := newStore()
	g := &gate{t: t, dir: t.TempDir(), store: other, key: 7}
	g.open()
	g.session("forged", 10)
	g.close()
	for _, n := range other.names("/forged/") {
		s.m[n] = other.m[n]
	}
	if _, wrong := check(t, s, pinned); !strings.Contains(strings.Join(wrong, "\n"), "is not in the store") {
		t.Errorf("a session without its transparency log: %q", wrong)
	}
	// The same without naming one, and later than the gate's began.
	g = &gate{t: t, dir: t.TempDir(), store: newStore(), key: 7, noTree: true}
	g.open()
	g.session("forged", 10)
	g.close()
	s = kept(t)
	sum, wrong := check(t, g.store.(*store), pinned)
	if len(wrong) > 0 || sum.Outside != 1 {
		t.Errorf("a gate without a transparency log: %+v %q", sum, wrong)
	}
	later := newStore()
	g.store, g.dir = later, t.TempDir()
	g.open()
	g.session("forged", 10)
	g.close()
	for _, n := range later.names("/forged/") {
		s.m[n] = later.m[n]
	}
	if _, wrong := check(t, s, pinned); !strings.Contains(strings.Join(wrong, "\n"), "names no transparency log") {
		t.Errorf("a session that names no transparency log: %q", wrong)
	}
	// The same ID written anew, all signed.
	g = &gate{t: t, dir: t.TempDir(), store: newStore(), key: 7}
	g.open()
	g.session("s1", 99)
	g.close()
	s = kept(t)
	for _, n := range g.store.(*store).names("/s1/") {
		s.m[n] = g.store.(*store).m[n]
	}
	if _, wrong := check(t, s, pinned); !strings.Contains(strings.Join(wrong, "\n"), "is not the log that the transparency log names") {
		t.Errorf("a session written anew: %q", wrong)
	}
	// Taken out of the log, by a log written anew with the same key: the kept checkpoint tells.
	s = kept(t)
	since := pinned
	since.Since = newest(t, s)
	since.Since[0].Root[3] ^= 1
	if _, wrong := check(t, s, since); !strings.Contains(strings.Join(wrong, "\n"), "is not the log of the kept checkpoint") {
		t.Errorf("a log written anew: %q", wrong)
	}
	since.Since[0].Log = "another"
	if _, wrong := check(t, s, since); !strings.Contains(strings.Join(wrong, "\n"), "the kept checkpoint is not in the store") {
		t.Errorf("another log: %q", wrong)
	}
}

// A sealed session that later checkpoints do not have is told of, and one that none can have yet is not.
func TestNoLeaf(t *testing.T) {
	s := newStore()
	g := &gate{t: t, dir: t.TempDir(), store: s, key: 7}
	g.open()
	g.session("s1", 10)
	g.close()
	// Its checkpoint is taken away: it may as well be on its way.
	c := s.names("/checkpoint/")
	last := s.m[c[len(c)-1]]
	delete(s.m, c[len(c)-1])
	if sum, wrong := check(t, s, pinned); len(wrong) > 0 || sum.Waiting != 1 || !sum.Unsealed() {
		t.Errorf("%+v %q", sum, wrong)
	}
	// A checkpoint of the same number, an hour later, and without it.
	was, err := tlog.ParseCheckpoint(last)
	must(t, err)
	later := *was
	later.Time, later.Entries, later.Size, later.Root = was.Time.Add(time.Hour), nil, 0, (&tlog.Tree{}).Root()
	s.m[c[len(c)-1]] = signed(t, &later)
	if _, wrong := check(t, s, pinned); !strings.Contains(strings.Join(wrong, "\n"), "is not in its transparency log, which went on after its end") {
		t.Errorf("%q", wrong)
	}
	// Two leaves of one log that differ.
	leaf, err := auditlog.ParseLeaf(was.Entries[0])
	must(t, err)
	leaf.Records++
	b, err := leaf.Encode()
	must(t, err)
	two := *was
	two.Entries, two.Size = append(slices.Clone(was.Entries), b), 2
	tree := &tlog.Tree{}
	for _, e := range two.Entries {
		tree.Append("", e)
	}
	two.Root = tree.Root()
	s.m[c[len(c)-1]] = signed(t, &two)
	if _, wrong := check(t, s, pinned); !strings.Contains(strings.Join(wrong, "\n"), "two leaves that differ") {
		t.Errorf("%q", wrong)
	}
	// The same leaf twice, as after a crash, is one.
	two.Entries = append(slices.Clone(was.Entries), was.Entries[0])
	tree = &tlog.Tree{}
	for _, e := range two.Entries {
		tree.Append("", e)
	}
	two.Root = tree.Root()
	s.m[c[len(c)-1]] = signed(t, &two)
	if _, wrong := check(t, s, pinned); len(wrong) > 0 {
		t.Errorf("%q", wrong)
	}
}

func signed(t testing.TB, c *tlog.Checkpoint) []byte {
	t.Helper()
	must(t, c.Sign(key(7)))
	b, err := c.Encode()
	must(t, err)
	return b
}

// A key that is changed: what the old one signed verifies with it, what the new one did with that, and all with both.
func TestRotation(t *testing.T) {
	s := newStore()
	g := &gate{t: t, dir: t.TempDir(), store: s, key: 7}
	g.open()
	g.session("old", 10)
	g.close()
	before := s.clone()
	g.key = 8
	g.open()
	g.session("new", 10)
	g.close()
	both := verify.Options{Keys: []ed25519.PublicKey{public(7), public(8)}}
	sum, wrong := check(t, s, both)
	if len(wrong) > 0 || len(sum.Trees) != 1 || len(sum.Trees[0].Keys) != 2 || sum.Trees[0].Size != 2 || len(s.names("keys/")) != 2 {
		t.Errorf("both keys: %+v %q", sum, wrong)
	}
	if _, wrong := check(t, before, pinned); len(wrong) > 0 {
		t.Errorf("the old key: %q", wrong)
	}
	for k, want := range map[byte]string{7: "/new/", 8: "/old/"} {
		_, wrong := check(t, s, verify.Options{Keys: []ed25519.PublicKey{public(k)}})
		if all := strings.Join(wrong, "\n"); !strings.Contains(all, want) || !strings.Contains(all, "not pinned") {
			t.Errorf("one key: %q", wrong)
		}
	}
}

// The state is lost: a new log begins, and the old one is said to have ended.
func TestLostState(t *testing.T) {
	s := newStore()
	g := &gate{t: t, dir: t.TempDir(), store: s, key: 7}
	g.open()
	g.session("s1", 10)
	g.close()
	g.dir = t.TempDir()
	g.open()
	g.session("s2", 10)
	g.close()
	sum, wrong := check(t, s, pinned)
	if len(wrong) > 0 || len(sum.Trees) != 2 || sum.Trees[0].Ended == sum.Trees[1].Ended {
		t.Errorf("%+v %q", sum.Trees, wrong)
	}
}

// Kept checkpoints of several gates do not speak against a session of one of them; that its own gate's is not there does.
func TestSinceOfSeveralGates(t *testing.T) {
	s := kept(t)
	g := &gate{t: t, dir: t.TempDir(), store: s, key: 7, name: "gate-10"}
	g.open()
	g.session("s9", 10)
	g.close()
	o := pinned
	o.Since = newest(t, s)
	if len(o.Since) != 2 {
		t.Fatalf("%d logs", len(o.Since))
	}
	verifyEach := func(s *store, want map[string]bool) {
		t.Helper()
		for log, err := range auditlog.Logs(t.Context(), s, auditlog.SessionPrefix) {
			must(t, err)
			sum, err := verify.New(s, o).Log(t.Context(), log)
			must(t, err)
			if sum.Damaged() != want[log.Name.ID] || len(sum.Trees) > 1 {
				t.Errorf("%s: damaged %v, want %v: %+v", log.Name.ID, sum.Damaged(), want[log.Name.ID], sum)
			}
		}
	}
	verifyEach(s, nil)
	for _, n := range s.names("tlog/gate-10/") {
		delete(s.m, n)
	}
	verifyEach(s, map[string]bool{"s9": true})
	if _, wrong := check(t, s, o); !strings.Contains(strings.Join(wrong, "\n"), "the kept checkpoint is not in the store") {
		t.Errorf("all of the store: %q", wrong)
	}
}

// Checkpoints are many and small, and a bucket takes its time for each: many are asked for at once, the large ones one by one.
func TestCheckpointsAtOnce(t *testing.T) {
	s := newStore()
	g := &gate{t: t, dir: t.TempDir(), store: s, key: 7}
	g.open()
	g.session("s1", 10)
	g.close()
	c := s.names("/checkpoint/")
	last, err := tlog.ParseCheckpoint(s.m[c[len(c)-1]])
	must(t, err)
	for n := len(c); n < 32; n++ {
		beat := *last
		beat.Number, beat.Old, beat.Entries = uint32(n), last.Size, nil
		s.m[tlog.CheckpointName(tlog.Dir(beat.Gate, beat.Log), beat.Number)] = signed(t, &beat)
	}
	slow := &slowSource{store: s, all: make(chan struct{}), want: 32}
	if _, wrong := check(t, slow, pinned); len(wrong) > 0 || slow.gaveUp.Load() {
		t.Errorf("%d at once: %q", slow.open.Load(), wrong)
	}

	// However many large ones a store has, one is in memory at a time.
	whole := s.m[c[0]]
	for _, n := range s.names("/checkpoint/") {
		s.m[n] = append(bytes.Clone(whole), make([]byte, 1<<20)...)
	}
	large := &slowSource{store: s}
	if _, err := verify.New(large, pinned).Trees(t.Context()); err != nil || large.most.Load() != 1 {
		t.Errorf("%d large ones at once: %v", large.most.Load(), err)
	}
}

// slowSource is a store that opens checkpoints when want of them are asked for, if it is not 0, and counts how many are open.
type slowSource struct {
	*store
	all        chan struct{}
	want       int32
	open, most atomic.Int32
	gaveUp     atomic.Bool
}

func (s *slowSource) Open(ctx context.Context, name string) (io.ReadCloser, error) {
	f, err := s.store.Open(ctx, name)
	if err != nil || !strings.Contains(name, "/checkpoint/") {
		return f, err
	}
	now := s.open.Add(1)
	for most := s.most.Load(); now > most && !s.most.CompareAndSwap(most, now); most = s.most.Load() {
	}
	if s.want == 0 {
		return &openObject{f, s}, nil
	}
	if now == s.want {
		close(s.all)
	}
	select {
	case <-s.all:
	case <-time.After(time.Minute):
		s.gaveUp.Store(true)
	}
	return f, nil
}

type openObject struct {
	io.ReadCloser
	s *slowSource
}

func (o *openObject) Close() error {
	o.s.open.Add(-1)
	return o.ReadCloser.Close()
}

// A killed gate's session is sealed by the next start, and has a leaf.
func TestInterrupted(t *testing.T) {
	s := newStore()
	g := &gate{t: t, dir: t.TempDir(), store: s, key: 7}
	g.open()
	r := g.New("s1")
	must(t, r.Record(0, &auditlog.Connect{Gate: "gate-1"}))
	must(t, r.Begin())
	g.begun()
	dir, then := t.TempDir(), s.clone()
	copyDir(t, g.dir, dir)
	must(t, r.Close(&auditlog.End{Cause: "client-left"}))
	g.close()
	g.dir, g.store = dir, then
	g.open()
	g.close()
	sum, wrong := check(t, then, pinned)
	if len(wrong) > 0 || sum.Logs[auditlog.Interrupted] != 1 || sum.Trees[0].Size != 1 || sum.Waiting > 0 {
		t.Errorf("%+v %q", sum, wrong)
	}
}

// A store that is away gets all of it later, in order; none of it twice.
func TestStoreAway(t *testing.T) {
	s := newStore()
	away := &awayStore{store: s}
	away.set(true)
	g := &gate{t: t, dir: t.TempDir(), store: away, key: 7}
	g.open()
	g.session("s1", 10)
	if len(s.m) > 0 {
		t.Fatal("not away")
	}
	away.set(false)
	for end := time.Now().Add(time.Minute); g.Stats().Waiting > 0; time.Sleep(5 * time.Millisecond) {
		if time.Now().After(end) {
			t.Fatal("not stored")
		}
	}
	g.close()
	if sum, wrong := check(t, s, pinned); len(wrong) > 0 || sum.Logs[auditlog.Sealed] != 1 || sum.Waiting > 0 {
		t.Errorf("%+v %q", sum, wrong)
	}
}

// While a gate writes, a verifier beside it sees nothing wrong, ever.
func TestBesideGate(t *testing.T) {
	s := newStore()
	g := &gate{t: t, dir: t.TempDir(), store: s, key: 7, index: true, indexAge: 10 * time.Millisecond}
	g.open()
	g.begun() // this store's objects came long ago: a log without any checkpoint would be excused by nothing
	done := make(chan struct{})
	go func() {
		defer close(done)
		for i := range 60 {
			g.session(fmt.Sprint("s", i), 5000)
		}
	}()
	o := pinned
	for n := 0; ; n++ {
		if _, wrong := check(t, s, o); len(wrong) > 0 {
			t.Errorf("round %d: %q", n, wrong)
		}
		select {
		case <-done:
			g.close()
			if sum, wrong := check(t, s, o); len(wrong) > 0 || sum.Logs[auditlog.Sealed] < 61 || sum.Trees[0].End != verify.Closed || sum.Waiting > 0 {
				t.Errorf("%+v %q", sum, wrong)
			}
			return
		default:
		}
	}
}

func TestCancelled(t *testing.T) {
	ctx, cancel := context.WithCancel(t.Context())
	cancel()
	if _, err := verify.New(kept(t), pinned).Store(ctx); err == nil {
		t.Error("no error")
	}
}
