package verify_test

import (
	"bytes"
	"fmt"
	"maps"
	"math/rand/v2"
	"os"
	"strings"
	"testing"
	"time"

	"github.com/sallyport/sallyport/auditlog"
	"github.com/sallyport/sallyport/auditlog/agekeys"
	"github.com/sallyport/sallyport/auditlog/storetest"
	"github.com/sallyport/sallyport/auditlog/verify"
)

// indexed is a store of two gates that index their sessions; the first was started twice, and its first index has several batches.
func indexed(t *testing.T, noTree bool, recipients ...string) *store {
	t.Helper()
	s := newStore()
	for name, runs := range map[string]int{"gate-1": 2, "gate-2": 1} {
		g := &gate{t: t, dir: t.TempDir(), store: s, key: 7, name: name, index: true, indexAge: 10 * time.Millisecond, noTree: noTree,
			recipients: recipients}
		if len(recipients) > 0 {
			g.indexClear = []string{"source", "cause"}
		}
		batches := 0
		for run := range runs {
			g.open()
			for i := range runs - run { // each in a batch of its own
				g.session(fmt.Sprintf("%s-%d-%d", name, run, i), 10)
				batches += 1 + len(recipients)
				for end := time.Now().Add(time.Minute); stored(t, s, "index/"+name+"/") < batches; time.Sleep(time.Millisecond) {
					if time.Now().After(end) {
						t.Fatal("its batch is not stored")
					}
				}
			}
			g.close()
			batches = stored(t, s, "index/"+name+"/")
		}
	}
	if sum, wrong := check(t, s, pinned); len(wrong) > 0 || sum.Foreign+sum.Missing > 0 || sum.Objects != len(s.m) {
		t.Fatalf("%+v: %q", sum, wrong)
	}
	return s
}

// stored is the number of objects below a prefix.
func stored(t *testing.T, s *store, prefix string) (n int) {
	t.Helper()
	for _, err := range s.List(t.Context(), prefix) {
		must(t, err)
		n++
	}
	return n
}

// A gate's index is made of logs like the others: each of its objects is verified, is below a leaf of the transparency log, and is
// missed when it is gone.
func TestIndexObjects(t *testing.T) {
	whole := indexed(t, false)
	names := whole.names("index/")
	if len(names) != 7 { // three batches, each run's with an end
		t.Fatalf("%q", names)
	}
	find := func(what, want string, change func(m map[string][]byte)) {
		t.Helper()
		s := whole.clone()
		change(s.m)
		if _, wrong := check(t, s, pinned); !strings.Contains(strings.Join(wrong, "\n"), want) {
			t.Errorf("%s: want %q in %q", what, want, wrong)
		}
	}
	rnd := rand.New(rand.NewPCG(1, 1))
	for i, a := range names {
		for range 5 {
			at := rnd.IntN(len(whole.m[a]))
			find(fmt.Sprintf("%s: byte %d changed", a, at), a[:len(a)-len("00000000.seg")], func(m map[string][]byte) {
				m[a] = bytes.Clone(m[a])
				m[a][at] ^= 1 << rnd.IntN(8)
			})
		}
		find(a+": cut", "cut", func(m map[string][]byte) { m[a] = m[a][:len(m[a])-1] })
		first, last := strings.HasSuffix(a, "/00000000.seg"), i == len(names)-1 || strings.HasSuffix(names[i+1], "/00000000.seg")
		want := "missing before it"
		switch {
		case first && last:
			want = "is missing: 1 segments"
		case last:
			want = "its end is missing"
		}
		find(a+": gone", want, func(m map[string][]byte) { delete(m, a) })
		for _, b := range names[i+1:] { // batches, runs and gates
			find(a+" and "+b+" changed places", "is not in its place", func(m map[string][]byte) { m[a], m[b] = m[b], m[a] })
			find(a+" replaced by "+b, "is not in its place", func(m map[string][]byte) { m[a] = m[b] })
		}
		s1 := whole.names("sessions/")[0]
		find(a+" replaced by a session", "is not in its place", func(m map[string][]byte) { m[a] = m[s1] })
		find("a session replaced by "+a, "is not in its place", func(m map[string][]byte) { m[s1] = m[a] })
	}
	dir := func(name string) string { return name[:strings.LastIndex(name, "/")+1] }
	find("a run's index gone", "is missing", func(m map[string][]byte) {
		maps.DeleteFunc(m, func(n string, _ []byte) bool { return strings.HasPrefix(n, dir(names[0])) })
	})
	find("under another gate's name", "is not in its place", func(m map[string][]byte) {
		for _, n := range names {
			if rest, ok := strings.CutPrefix(n, dir(names[0])); ok {
				m[strings.Replace(dir(names[0]), "gate-1", "gate-3", 1)+rest] = m[n]
			}
		}
	})
	find("under another day", "is not in its place", func(m map[string][]byte) {
		parts := strings.Split(names[0], "/")
		parts[2] = "2001"
		m[strings.Join(parts, "/")] = m[names[0]]
	})
	find("a strange object", "not a segment", func(m map[string][]byte) { m[dir(names[0])+"note.txt"] = nil })
	find("signed by another key", "not pinned", func(m map[string][]byte) {
		s := newStore()
		g := &gate{t: t, dir: t.TempDir(), store: s, key: 8, name: "gate-9", index: true}
		g.open()
		g.session("x", 10)
		g.close()
		for _, n := range s.names("index/") {
			m[n] = s.m[n]
		}
	})
}

// Who has the key can sign an index that says otherwise than the logs. Where the gate keeps a transparency log, the index's leaf tells;
// where it keeps none, the session's log does.
func TestIndexContradicts(t *testing.T) {
	const was, lie = "192.0.2.7:4022", "192.0.2.8:4022"
	change := func(s *store, from, to string) {
		t.Helper()
		resignFirst(t, s, "index/gate-1/", from, func(payload []byte) { copy(payload[bytes.Index(payload, []byte(from)):], to) })
	}
	withTree := indexed(t, false)
	change(withTree, was, lie)
	if _, wrong := check(t, withTree, pinned); len(wrong) == 0 {
		t.Error("with a transparency log: nothing found")
	}
	whole := indexed(t, true)
	for what, to := range map[string][2]string{
		"another source":  {was, lie},
		"another session": {"gate-1-0-0", "gate-1-0-1"},
		"another gate's":  {"gate-1-0-0", "gate-2-0-0"},
		"another cause":   {"client-left", "client-lost"},
		"none that is":    {"gate-1-0-0", "gate-1-9-9"}, // no damage: which sessions there are the leaves say
	} {
		s := whole.clone()
		change(s, to[0], to[1])
		_, wrong := check(t, s, pinned)
		if what == "none that is" {
			if len(wrong) > 0 {
				t.Errorf("%s: %q", what, wrong)
			}
			continue
		}
		if len(wrong) != 1 || !strings.Contains(wrong[0], "otherwise than its log") || !strings.Contains(wrong[0], "index/gate-1/") {
			t.Errorf("%s: %q", what, wrong)
		}
		// Days that are not asked for are neither read nor compared.
		o := pinned
		o.To = "2001/01/01"
		if _, wrong := check(t, s, o); len(wrong) > 0 {
			t.Errorf("%s, another day: %q", what, wrong)
		}
	}
	// The index of another store's session of the same name: all of it is signed, and fits that one.
	other := newStore()
	g := &gate{t: t, dir: t.TempDir(), store: other, key: 7, index: true, noTree: true}
	g.open()
	g.session("gate-1-0-0", 20)
	g.close()
	s := whole.clone()
	for _, n := range other.names("index/") {
		s.m[n] = other.m[n]
	}
	if _, wrong := check(t, s, pinned); len(wrong) != 1 || !strings.Contains(wrong[0], "otherwise than its log") {
		t.Errorf("another's index: %q", wrong)
	}
}

// What a restart writes of a session that it sealed is little, and is held against the log, too.
func TestIndexOfInterrupted(t *testing.T) {
	s := newStore()
	g := &gate{t: t, dir: t.TempDir(), store: s, key: 7, index: true, noTree: true}
	g.open()
	r := g.New("s1")
	must(t, r.Record(0, &auditlog.Connect{Gate: "gate-1"}))
	must(t, r.Begin())
	dir := t.TempDir()
	copyDir(t, g.dir, dir)
	must(t, r.Close(&auditlog.End{Cause: "client-left"}))
	g.close()
	g.dir, g.store = dir, newStore()
	g.open()
	g.close()
	then := g.store.(*store)
	sum, wrong := check(t, then, pinned)
	if len(wrong) > 0 || sum.Logs[auditlog.Interrupted] != 1 || len(then.names("index/")) == 0 {
		t.Fatalf("%+v %q", sum, wrong)
	}
	// The same session as it went on before: the restart's entry is not of that.
	for _, n := range then.names("sessions/") {
		delete(then.m, n)
	}
	for _, n := range s.names("sessions/") {
		then.m[n] = s.m[n]
	}
	if _, wrong := check(t, then, pinned); len(wrong) != 1 || !strings.Contains(wrong[0], "otherwise than its log") {
		t.Errorf("%q", wrong)
	}
}

// There is a bound to the entries that are kept, and what is beyond it is told.
func TestIndexTooLarge(t *testing.T) {
	whole := indexed(t, true)
	const lie = "192.0.2.8"
	for _, n := range []int64{0, 4} {
		defer verify.SetMaxEntries(n)()
		s := whole.clone()
		resignFirst(t, s, "index/gate-1/", "192.0.2.7", func(payload []byte) { copy(payload[bytes.Index(payload, []byte("192.0.2.7")):], lie) })
		sum, wrong := check(t, s, pinned)
		if sum.Skipped+n < 3 || (n == 0) != (len(wrong) == 0) { // an entry went with the batch after the one that was changed
			t.Errorf("%d: %d left out, %q", n, sum.Skipped, wrong)
		}
	}
}

// resignFirst changes the first segment below a prefix whose log begins with it and that has a text, as who has the key could; the
// log's later segments, which have its hash, are taken away.
func resignFirst(t *testing.T, s *store, prefix, text string, change func(payload []byte)) {
	t.Helper()
	for _, n := range s.names(prefix) {
		dir, first := strings.CutSuffix(n, "00000000.seg")
		if !first || !bytes.Contains(s.m[n], []byte(text)) {
			continue
		}
		changed := false
		s.m[n] = storetest.Resign(t, s.m[n], key(7), func(payload []byte) {
			if !changed && bytes.Contains(payload, []byte(text)) {
				change(payload)
				changed = true
			}
		})
		maps.DeleteFunc(s.m, func(other string, _ []byte) bool { return strings.HasPrefix(other, dir) && other != n })
		if !changed {
			t.Fatalf("%s: no %q", n, text)
		}
		return
	}
	t.Fatalf("no %q below %s", text, prefix)
}

// An encrypted store: without an identity, what an index in the clear says is held against what the logs tell of themselves; with one,
// all of both indexes against the content. And the content itself is checked.
func TestEncryptedContent(t *testing.T) {
	recipient, err := os.ReadFile("../testdata/auditor_ed25519.pub")
	must(t, err)
	ids, err := agekeys.LoadIdentities("../testdata/auditor_ed25519", nil)
	must(t, err)
	wrong, err := agekeys.LoadIdentities("../testdata/auditor.age.txt", nil)
	must(t, err)
	whole := indexed(t, true, string(recipient))
	with := func(name string) (o verify.Options) {
		o = pinned
		switch name {
		case "right":
			o.Identities = ids
		case "wrong":
			o.Identities = wrong
		}
		return o
	}
	clear, locked := 0, 0 // logs
	for _, n := range whole.names("/00000000.seg") {
		if strings.HasPrefix(n, "index/") && strings.Contains(n, "-c/") {
			clear++
		} else {
			locked++
		}
	}
	flip := func(payload []byte) { payload[len(payload)/2] ^= 1 }
	for _, c := range []struct {
		what   string
		change func(s *store)
		want   map[string]string // by the identity; "": nothing is found
	}{
		{"whole", func(*store) {}, map[string]string{"none": "", "wrong": "", "right": ""}},
		{"content of a session", func(s *store) { resignFirst(t, s, "sessions/", "", flip) },
			// The session's bytes are others: its index says so.
			map[string]string{"none": "otherwise than its log", "wrong": "otherwise than its log", "right": "does not decrypt"}},
		{"content of the gate's index", func(s *store) {
			maps.DeleteFunc(s.m, func(n string, _ []byte) bool { return strings.Contains(n, "-c/") })
			resignFirst(t, s, "index/gate-1/", "", flip)
		}, map[string]string{"none": "", "wrong": "", "right": "does not decrypt"}},
		{"index in the clear", func(s *store) {
			resignFirst(t, s, "index/gate-1/", "gate-1-0-0", func(payload []byte) {
				copy(payload[bytes.Index(payload, []byte("gate-1-0-0")):], "gate-1-0-1")
			})
		}, map[string]string{"none": "otherwise than its log", "wrong": "otherwise than its log", "right": "otherwise than its log"}},
		{"what of it is configured", func(s *store) {
			resignFirst(t, s, "index/gate-1/", "192.0.2.7", func(payload []byte) {
				copy(payload[bytes.Index(payload, []byte("192.0.2.7")):], "192.0.2.8")
			})
		}, map[string]string{"none": "", "wrong": "", "right": "otherwise than its log"}},
	} {
		for who, want := range c.want {
			s := whole.clone()
			c.change(s)
			sum, wrong := check(t, s, with(who))
			if all := strings.Join(wrong, "\n"); !strings.Contains(all, want) || (want == "") != (all == "") {
				t.Errorf("%s, identity %s: want %q in %q", c.what, who, want, wrong)
			}
			if c.what == "whole" && (who == "right") != (sum.Locked == 0) || c.what == "whole" && who != "right" && (sum.Locked != locked || sum.Total() != clear+locked) {
				t.Errorf("identity %s: %d of %d not looked into, want %d: %+v", who, sum.Locked, sum.Total(), locked, sum)
			}
		}
	}
}
