package test

import (
	"bytes"
	"encoding/json"
	"fmt"
	"regexp"
	"strconv"
	"strings"

	"github.com/rogpeppe/go-internal/testscript"
)

// ranProgram is a program that is known to have run, with the arguments that it really got.
type ranProgram struct {
	args  string
	asked string // what the report before it said
}

// ran reads the programs that the newest session has run.
func ran(ts *testscript.TestScript) []ranProgram {
	out, err := get(ts).audit("cat", ts.Getenv("SESSION"))
	ts.Check(err)
	type text struct {
		Text   string `json:"text"`
		Base64 []byte `json:"base64"`
	}
	join := func(list []text) string {
		var all []string
		for _, t := range list {
			all = append(all, t.Text+string(t.Base64))
		}
		return strings.Join(all, " ")
	}
	asked := map[uint64]string{}
	var all []ranProgram
	for line := range bytes.Lines(out) {
		var rec struct {
			Kind string `json:"kind"`
			Body struct {
				Exec   uint64 `json:"exec"`
				Args   []text `json:"args"`
				Again  int    `json:"again"`
				Differ bool   `json:"differ"`
			} `json:"body"`
		}
		if !bytes.Contains(line, []byte(`"kind":"program-`)) {
			continue
		}
		ts.Check(json.Unmarshal(line, &rec))
		switch b := rec.Body; {
		case rec.Kind == "program-exec" && b.Again == 0:
			asked[b.Exec] = join(b.Args)
		case rec.Kind == "program-start" && b.Differ:
			all = append(all, ranProgram{join(b.Args), asked[b.Exec]})
		case rec.Kind == "program-start":
			all = append(all, ranProgram{asked[b.Exec], asked[b.Exec]})
		}
	}
	return all
}

// cmdRan: ran N TEXT: the newest session has run N programs with TEXT, unquoted as Go does, in their arguments.
func cmdRan(ts *testscript.TestScript, neg bool, args []string) {
	if len(args) != 2 {
		ts.Fatalf("usage: ran N TEXT")
	}
	text, err := strconv.Unquote(`"` + args[1] + `"`)
	ts.Check(err)
	n := 0
	for _, p := range ran(ts) {
		// Not who started it: a shell's or an interpreter's own arguments.
		if strings.Contains(p.args, text) && !strings.HasPrefix(p.args, "bash -c") && !strings.HasPrefix(p.args, "strace") &&
			!strings.HasPrefix(p.args, "gdb") && !strings.HasPrefix(p.args, "xargs") && !strings.HasPrefix(p.args, "tmux") &&
			!strings.Contains(p.args, " -c ") && !strings.Contains(p.args, "-ic ") {
			n++
		}
	}
	if strconv.Itoa(n) != args[0] {
		ts.Fatalf("ran: %d programs with %q, want %s, in\n%q", n, text, args[0], ran(ts))
	}
}

// cmdFlipped: flipped FILE: as many programs of the newest session are in the log with toctou-evil as FILE has lines
// with it, and the same of toctou-good.
func cmdFlipped(ts *testscript.TestScript, neg bool, args []string) {
	out := ts.ReadFile(args[0])
	changed := 0
	for _, word := range []string{"toctou-evil", "toctou-good"} {
		n := 0
		for _, p := range ran(ts) {
			if strings.HasSuffix(p.args, word) {
				n++
				if p.args != p.asked {
					changed++
				}
			}
		}
		if printed := len(regexp.MustCompile("(?m)^"+word+"$").FindAllString(out, -1)); printed != n {
			ts.Fatalf("flipped: %d programs printed %s, the log has %d", printed, word, n)
		}
	}
	ts.Logf("arguments of %d programs changed between report and start", changed)
}

// cmdBigargv: bigargv OUTPUT COMMANDS: the number, bytes and hash of the arguments that the attacker printed are those
// of the log.
func cmdBigargv(ts *testscript.TestScript, neg bool, args []string) {
	m := regexp.MustCompile(`(?m)^big (\d+) (\d+) ([0-9a-f]{64})`).FindStringSubmatch(ts.ReadFile(args[0]))
	if m == nil {
		ts.Fatalf("bigargv: nothing was printed")
	}
	want := fmt.Sprintf("%s arguments of %s bytes in all, SHA-256 %s", m[1], m[2], m[3])
	if !strings.Contains(ts.ReadFile(args[1]), want) {
		ts.Fatalf("bigargv: no %q", want)
	}
}
