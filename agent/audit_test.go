package agent

import (
	"bytes"
	"context"
	"crypto/sha256"
	"encoding/base64"
	"encoding/hex"
	"fmt"
	"net"
	"net/netip"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/hashicorp/yamux"

	"github.com/sallyport/sallyport/backends"
)

// audited is a real agent with the audit on, and what it has reported.
type audited struct {
	t      testing.TB
	client *Client

	mu      sync.Mutex
	reports []*backends.Report
	hold    chan struct{} // not nil: reports are not taken until it is closed
}

func startAudited(t *testing.T, a backends.ExecAudit) *audited {
	t.Helper()
	public, private := newKey(t)
	conn, _, ended := startAgent(t, public)
	x := &audited{t: t}
	if a.Mode == "" {
		a.Mode = backends.ExecAuditRequired
	}
	var err error
	x.client, err = NewClient(t.Context(), conn, private, Hello{Audit: a, Reports: func(r *backends.Report) error {
		x.mu.Lock()
		hold := x.hold
		x.mu.Unlock()
		if hold != nil {
			<-hold
		}
		x.mu.Lock()
		defer x.mu.Unlock()
		x.reports = append(x.reports, r)
		return nil
	}})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		x.client.Close()
		waitEnd(t, ended, "after the gate")
	})
	return x
}

// run runs a shell command to its end and returns its output.
func (x *audited) run(command string) (string, backends.ExitStatus) {
	x.t.Helper()
	var out lockedBuffer
	status, err := x.client.Exec(context.Background(), backends.Process{
		Channel: 1, Kind: backends.KindExec, Command: command, Stdout: &out, Stderr: &out,
	})
	if err != nil {
		x.t.Errorf("%s: %v", command, err)
	}
	return out.String(), status
}

func (x *audited) all() []*backends.Report {
	x.mu.Lock()
	defer x.mu.Unlock()
	return slices.Clone(x.reports)
}

func argv(a backends.Args) string { return string(bytes.Join(a.List, []byte(" "))) }

// exec finds the one execution with these arguments.
func (x *audited) exec(args string) *backends.Report {
	x.t.Helper()
	var found []*backends.Report
	for _, r := range x.all() {
		if r.Exec != nil && argv(r.Exec.Args) == args && r.Exec.Count == 0 {
			found = append(found, r)
		}
	}
	if len(found) != 1 {
		x.t.Fatalf("%d executions of %q in\n%s", len(found), args, x)
	}
	return found[0]
}

// fate finds the start and the end of an execution.
func (x *audited) fate(exec *backends.Report) (s *backends.Started, e *backends.Ended) {
	for _, r := range x.all() {
		if r.Started != nil && r.Started.Exec == exec.Sequence {
			s = r.Started
		}
		if r.Ended != nil && r.Ended.Exec == exec.Sequence {
			e = r.Ended
		}
	}
	return s, e
}

func (x *audited) String() string {
	var b strings.Builder
	for _, r := range x.all() {
		fmt.Fprintf(&b, "%d channel %d: ", r.Sequence, r.Channel)
		switch {
		case r.Exec != nil:
			fmt.Fprintf(&b, "exec %+v %q\n", *r.Exec, r.Exec.Args.List)
		case r.Started != nil:
			fmt.Fprintf(&b, "started %+v %q\n", *r.Started, r.Started.File)
		case r.Ended != nil:
			fmt.Fprintf(&b, "ended %+v\n", *r.Ended)
		case r.Connect != nil:
			fmt.Fprintf(&b, "connect %+v\n", *r.Connect)
		case r.Script != nil:
			fmt.Fprintf(&b, "script %q %d %q\n", r.Script.Path, r.Script.Size, r.Script.Data)
		case r.Unaudited != nil:
			fmt.Fprintf(&b, "unaudited %+v\n", *r.Unaudited)
		}
	}
	return b.String()
}

// TestAudit has a shell run programs in all the ordinary ways.
func TestAudit(t *testing.T) {
	x := startAudited(t, backends.ExecAudit{})
	if x.client.ExecAudit() != "on" {
		t.Fatal(x.client.ExecAudit())
	}
	dir := t.TempDir()
	script := filepath.Join(dir, "script")
	const text = "#!/bin/sh\nexit 7\n"
	if err := os.WriteFile(script, []byte(text), 0o755); err != nil {
		t.Fatal(err)
	}
	command := fmt.Sprintf("cd %s; /bin/echo one; ./script; /bin/sh -c 'kill -TERM $$'; printf 'x%%s\n' $?; /nowhere/x; "+
		"/bin/echo $(printf 'a\\377b'); /bin/true &\nwait", dir)
	out, _ := x.run(command)
	if !strings.Contains(out, "one\n") || !strings.Contains(out, "x143") {
		t.Errorf("output %q", out)
	}
	for args, want := range map[string]struct {
		code   int
		signal string
		file   string
	}{
		"/bin/echo one":            {0, "", "echo"},
		"./script":                 {7, "", ""},
		"/bin/sh -c kill -TERM $$": {0, "TERM", ""},
		"/bin/echo a\xffb":         {0, "", "echo"},
		"/bin/true":                {0, "", "true"},
		filepath.Base(shell(t)) + " -c " + command: {0, "", ""},
	} {
		e := x.exec(args)
		s, end := x.fate(e)
		if s == nil || end == nil {
			t.Errorf("%q: started %v, ended %v", args, s, end)
			continue
		}
		if end.Code != want.code || end.Signal != want.signal || !strings.HasSuffix(string(s.File), want.file) || e.Channel != 1 ||
			e.Exec.PID != s.PID || s.PID != end.PID || e.Exec.UID != uint32(os.Getuid()) || e.Exec.Error != "" {
			t.Errorf("%q: %+v, %+v %q, %+v", args, e.Exec, s, s.File, end)
		}
		if scripted := args == "./script"; (s.Args != nil) != scripted {
			t.Errorf("%q: really got %v", args, s.Args)
		}
	}
	e := x.exec("./script")
	sum := sha256.Sum256([]byte(text))
	s, _ := x.fate(e)
	if string(e.Exec.Dir) != dir || !bytes.Equal(e.Exec.Script, sum[:]) || argv(*s.Args) != "/bin/sh ./script" {
		t.Errorf("script %+v, %q", e.Exec, argv(*s.Args))
	}
	top := x.exec(filepath.Base(shell(t)) + " -c " + command)
	if e.Exec.Parent != top.Exec.PID {
		t.Errorf("parent %d, want %d", e.Exec.Parent, top.Exec.PID)
	}
	if s, end := x.fate(x.exec("/nowhere/x")); s != nil || end == nil || end.Code != 127 {
		t.Errorf("what is not there: started %v, ended %v", s, end)
	}
	// Once for each content.
	x.run("cp " + script + " " + script + "2; " + script + "; " + script + "2")
	scripts := 0
	for _, r := range x.all() {
		if r.Script != nil {
			scripts++
			if string(r.Script.Data) != text || r.Script.Size != int64(len(text)) || hex.EncodeToString(r.Script.Hash) != hex.EncodeToString(sum[:]) {
				t.Errorf("script %+v", r.Script)
			}
		}
	}
	if scripts != 1 {
		t.Errorf("%d scripts in\n%s", scripts, x)
	}
}

func shell(t *testing.T) string {
	t.Helper()
	f, err := os.Open("/etc/passwd")
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	return findShell(lookUp(f, os.Getuid()).shell)
}

// held runs f while reports are not taken.
func (x *audited) held(f func()) {
	hold := make(chan struct{})
	x.mu.Lock()
	x.hold = hold
	x.mu.Unlock()
	defer func() {
		x.mu.Lock()
		x.hold = nil
		x.mu.Unlock()
		close(hold)
	}()
	f()
}

// TestAuditStrict has an execution wait for the gate; without it, it waits for the agent alone.
func TestAuditStrict(t *testing.T) {
	for _, strict := range []bool{false, true} {
		x := startAudited(t, backends.ExecAudit{Strict: strict})
		done := make(chan struct{})
		out := &lockedBuffer{}
		x.held(func() {
			go func() {
				defer close(done)
				x.client.Exec(context.Background(), backends.Process{Channel: 1, Kind: backends.KindExec, Command: "/bin/echo ran", Stdout: out})
			}()
			for end := time.Now().Add(time.Second); time.Now().Before(end) && out.String() == ""; time.Sleep(5 * time.Millisecond) {
			}
			if ran := out.String() != ""; ran == strict {
				t.Errorf("strict %v: ran %v before its report was taken", strict, ran)
			}
		})
		<-done
		if out.String() != "ran\n" {
			t.Errorf("strict %v: %q", strict, out.String())
		}
		if strict != (x.client.ExecAudit() == "on, strict") {
			t.Error(x.client.ExecAudit())
		}
	}
}

// TestAuditStuck has a gate that takes no reports: what is executed waits, and then the session ends. Without a full
// queue nothing waits.
func TestAuditStuck(t *testing.T) {
	for _, strict := range []bool{false, true} {
		x := startAudited(t, backends.ExecAudit{Strict: strict, StuckLimit: time.Second})
		x.held(func() {
			n := 0
			if !strict {
				n = maxHeld
			}
			command := fmt.Sprintf("i=0; while [ $i -le %d ]; do /nowhere/$i; i=$((i+1)); done 2>/dev/null; /bin/echo never", n)
			var out lockedBuffer
			go x.client.Exec(context.Background(), backends.Process{Channel: 1, Kind: backends.KindExec, Command: command, Stdout: &out})
			waitDone(t, x.client)
			if err := x.client.Err(); err == nil || !strings.Contains(err.Error(), "not recorded within 1s") {
				t.Errorf("strict %v: ended with %v", strict, err)
			}
			if out.String() != "" {
				t.Errorf("strict %v: printed %q", strict, out.String())
			}
		})
	}
}

// oldKernelName is the variable by which a test's agent has oldKernel set.
const oldKernelName = "SALLYPORT_TEST_OLD_KERNEL"

// TestAuditOldKernel has an agent that can rely on less: all but deaths by signals is reported nevertheless.
func TestAuditOldKernel(t *testing.T) {
	t.Setenv(oldKernelName, "1")
	x := startAudited(t, backends.ExecAudit{})
	script := filepath.Join(t.TempDir(), "script")
	if err := os.WriteFile(script, []byte("#!/bin/sh\nexit 7\n"), 0o755); err != nil {
		t.Fatal(err)
	}
	x.run("cd " + filepath.Dir(script) + "; ./script; " + script + " b; /bin/sh -c 'exit 8'; /bin/sh -c 'kill -KILL $$'; /bin/true; /nowhere/x")
	for args, code := range map[string]int{"./script": 7, script + " b": 7, "/bin/sh -c exit 8": 8, "/bin/true": 0} {
		e := x.exec(args)
		isScript := args == "./script" || strings.HasPrefix(args, script)
		if s, end := x.fate(e); s == nil || end == nil || end.Code != code || len(e.Exec.Script) > 0 != isScript || e.Exec.Error != "" {
			t.Errorf("%q: %+v, started %v, ended %v", args, e.Exec, s, end)
		}
	}
	if s, end := x.fate(x.exec("/bin/sh -c kill -KILL $$")); s == nil || end != nil {
		t.Errorf("killed: started %v, ended %v", s, end)
	}
}

// TestAuditStatic has a program that never says that it has started, as the first one: its start is known nevertheless. One
// that was left behind by all its parents is told as of what the gate asked for.
func TestAuditStatic(t *testing.T) {
	x := startAudited(t, backends.ExecAudit{})
	if _, err := x.client.Exec(t.Context(), backends.Process{Channel: 1, Kind: backends.KindSFTP, Stdin: strings.NewReader("")}); err != nil {
		t.Fatal(err)
	}
	e := x.exec(sftpName)
	if s, end := x.fate(e); s == nil || s.Args != nil || end == nil || end.Code != 0 {
		t.Errorf("started %v, ended %v", s, end)
	}
	command := "(sleep 0.2; exec /bin/true left) >/dev/null 2>&1 &"
	x.run(command)
	x.run("until [ -z \"$(pgrep -f '^sleep 0.2')\" ]; do sleep 0.05; done; sleep 0.1")
	top := x.exec(filepath.Base(shell(t)) + " -c " + command)
	if left := x.exec("/bin/true left"); left.Exec.By != top.Sequence {
		t.Errorf("by %d, want %d", left.Exec.By, top.Sequence)
	}
}

// TestAuditScripts executes scripts in ways that hide what they hold, and files that are none.
func TestAuditScripts(t *testing.T) {
	x := startAudited(t, backends.ExecAudit{})
	t.Chdir(t.TempDir())
	dir, _ := os.Getwd()
	data := "not\x00to be seen\n"
	for name, text := range map[string]string{"plain": "echo plain $0\n", "here": "#!/bin/sh\necho here\n", "data": data} {
		if err := os.WriteFile(name, []byte(text), 0o755); err != nil {
			t.Fatal(err)
		}
	}
	os.Chmod("data", 0o644)
	out, _ := x.run(`cd ` + dir + `
		ln -s /proc/self/fd/5 link
		mkdir empty; ln -s ../here empty/to
		perl -e '
			use POSIX ();
			for my $way ("/proc/self/fd/5", "/dev/fd/5", "/proc/thread-self/fd/5", "./link", "at") {
				if (!fork) {
					my ($name, $empty) = ("x", "");
					my $fd = syscall(319, $name, 0); # memfd_create
					open(my $f, ">&=", $fd);
					syswrite($f, "#!/bin/sh\necho hidden $way\n");
					POSIX::dup2($fd, 5);
					my $args = pack("pQ", $name);
					if ($way eq "at") { syscall(322, 5, $empty, $args, 0, 0x1000) } else { exec { $way } $way }
					exit 1;
				}
				wait;
			}'
		./plain; empty/to; ./data; /bin/true`)
	for _, want := range []string{"plain ./plain", "here", "hidden /dev/fd/5", "hidden /proc/self/fd/5", "hidden ./link", "hidden at"} {
		if !strings.Contains(out, want) {
			t.Errorf("no %q in %q", want, out)
		}
	}
	var seen, unseen []string
	for _, r := range x.all() {
		if r.Script != nil {
			seen = append(seen, strings.TrimPrefix(string(r.Script.Data), "#!/bin/sh\n"))
		}
		if r.Exec != nil && r.Exec.Error != "" {
			unseen = append(unseen, string(r.Exec.Path)+": "+r.Exec.Error)
		}
	}
	slices.Sort(seen)
	if want := []string{"echo here\n", "echo hidden /dev/fd/5\n", "echo hidden /proc/self/fd/5\n", "echo hidden /proc/thread-self/fd/5\n",
		"echo hidden at\n", "echo plain $0\n"}; !slices.Equal(seen, want) {
		t.Errorf("scripts %q, want %q", seen, want)
	}
	if want := []string{"./link: the file is behind a link that only its process can follow"}; !slices.Equal(unseen, want) {
		t.Errorf("unseen %q, want %q", unseen, want)
	}
}

// TestAuditLast has the gate close a session in which programs run: all that ran is reported, however late.
func TestAuditLast(t *testing.T) {
	for _, strict := range []bool{false, true} {
		x := startAudited(t, backends.ExecAudit{Strict: strict})
		count := filepath.Join(t.TempDir(), "count")
		x.run("setsid sh -c 'i=0; while :; do i=$((i+1)); echo $i >" + count + "; /bin/true last-$i; done' >/dev/null 2>&1 &")
		ran := 0
		for end := time.Now().Add(10 * time.Second); ran < 50 && time.Now().Before(end); time.Sleep(time.Millisecond) {
			b, _ := os.ReadFile(count)
			fmt.Sscan(string(b), &ran)
		}
		x.client.Close()
		if err := x.client.Err(); err != nil {
			t.Errorf("strict %v: %v", strict, err)
		}
		b, _ := os.ReadFile(count)
		fmt.Sscan(string(b), &ran)
		for i := 1; i < ran; i++ { // the one that was announced last need not have come about
			e := x.exec(fmt.Sprintf("/bin/true last-%d", i))
			if s, end := x.fate(e); s == nil || end == nil {
				t.Fatalf("strict %v: %d of %d: started %v, ended %v", strict, i, ran, s, end)
			}
		}
		for _, r := range x.all() {
			if r.Exec == nil || r.Exec.Error != "" {
				continue
			}
			// What ran to the end was killed.
			if s, end := x.fate(r); s != nil && end == nil && bytes.HasPrefix(r.Exec.Args.List[0], []byte("sh")) {
				t.Errorf("strict %v: no end of %q", strict, r.Exec.Args.List)
			}
		}
	}
}

// TestAuditFolds has identical attempts counted, and others not.
func TestAuditFolds(t *testing.T) {
	for _, strict := range []bool{false, true} {
		x := startAudited(t, backends.ExecAudit{Strict: strict})
		x.run(`perl -e 'exec "/nowhere/x", "a" for 1..300; exec "/nowhere/x", "b"; exec "/nowhere/x", "a" for 1..2; exec "/bin/true"'`)
		count := map[string]int{}
		names := map[uint64]string{}
		records := 0
		for _, r := range x.all() {
			if r.Exec == nil {
				continue
			}
			if r.Exec.Count > 0 {
				count[names[r.Exec.Of]] += int(r.Exec.Count)
				records++
				continue
			}
			if args := argv(r.Exec.Args); strings.HasPrefix(args, "/nowhere/x") {
				count[args]++
				names[r.Sequence] = args
				records++
			}
		}
		if want := map[bool]int{false: 5, true: 303}[strict]; count["/nowhere/x a"] != 302 || count["/nowhere/x b"] != 1 || records != want {
			t.Errorf("strict %v: %v in %d records, want %d", strict, count, records, want)
		}
		x.exec("/bin/true")
	}
}

// TestReportsPace slows a flood and drops nothing.
func TestReportsPace(t *testing.T) {
	r := &reports{tokens: reportBurst, filled: time.Now()}
	for range reportBurst {
		if d := r.pace(); d != 0 {
			t.Fatalf("waited %v within the burst", d)
		}
	}
	var last time.Duration
	for range 2 * reportRate {
		last = r.pace()
	}
	if last < time.Second || last > 3*time.Second {
		t.Errorf("the last of two seconds' worth waits %v", last)
	}
}

// TestReportsQueue bounds what is held, by number and by bytes, and goes on as the gate acknowledges.
func TestReportsQueue(t *testing.T) {
	for name, size := range map[string]int{"number": 0, "bytes": backends.MaxReportScript} {
		t.Run(name, func(t *testing.T) {
			gate, inside := pair(t)
			r := newReports(inside, false, time.Minute)
			defer r.fail(errOver)
			added := make(chan uint64, 4*maxHeld)
			const n = maxHeld + 100
			go func() {
				for range n {
					rep := &backends.Report{Script: &backends.Script{Hash: make([]byte, 32), Data: make([]byte, size)}}
					seq, err := r.add(rep, false)
					if err != nil {
						return
					}
					added <- seq
				}
				close(added)
			}()
			var last uint64
			most := uint64(maxHeld)
			if size > 0 {
				most = maxHeldBytes/backends.MaxReportScript + 1
			}
			held := uint64(0)
			for last < n {
				rep, err := readReport(gate, last)
				if err != nil {
					t.Fatal(err)
				}
				last = rep.Sequence
				r.mu.Lock()
				held = max(held, r.next-1-r.acked)
				r.mu.Unlock()
				if last%64 == 0 || size > 0 || last == n {
					writeMessage(gate, ack{Sequence: last})
				}
			}
			if held > most {
				t.Errorf("held %d, want at most %d", held, most)
			}
			seq := uint64(0)
			for s := range added {
				if seq++; s != seq {
					t.Fatalf("number %d, want %d", s, seq)
				}
			}
			writeMessage(gate, ack{Sequence: n + 1})
			select {
			case <-r.done:
			case <-time.After(10 * time.Second):
				t.Error("an acknowledgement of what was not sent was taken")
			}
		})
	}
}

// TestHostileAudit has an agent send reports that ours never would: each ends the session.
func TestHostileAudit(t *testing.T) {
	ok := backends.Report{Sequence: 1, Ended: &backends.Ended{PID: 7}}
	long := make([]byte, backends.MaxReportPath+1)
	for name, change := range map[string]func(*backends.Report){
		"fine":    func(*backends.Report) {},
		"gap":     func(r *backends.Report) { r.Sequence = 2 },
		"nothing": func(r *backends.Report) { r.Ended = nil },
		"two":     func(r *backends.Report) { r.Unaudited = &backends.Unaudited{} },
		"channel": func(r *backends.Report) { r.Channel = 1 },
		"code":    func(r *backends.Report) { r.Ended.Code = 256 },
		"signal":  func(r *backends.Report) { r.Ended.Signal = "\x1b[2J" },
		"later":   func(r *backends.Report) { r.Ended.Exec = 1 },
		"time":    func(r *backends.Report) { r.Time = -1 },
		"path":    func(r *backends.Report) { r.Ended, r.Exec = nil, &backends.Exec{Path: long} },
		"many arguments": func(r *backends.Report) {
			r.Ended, r.Exec = nil, &backends.Exec{Args: backends.Args{List: make([][]byte, 1025)}}
		},
		"long arguments": func(r *backends.Report) {
			r.Ended, r.Exec = nil, &backends.Exec{Args: backends.Args{List: slices.Repeat([][]byte{long}, 5)}}
		},
		"hash":            func(r *backends.Report) { r.Ended, r.Exec = nil, &backends.Exec{Script: []byte("short")} },
		"script":          func(r *backends.Report) { r.Ended, r.Script = nil, &backends.Script{Hash: make([]byte, 31)} },
		"name of a call":  func(r *backends.Report) { r.Ended, r.Connect = nil, &backends.Connect{Call: string(long)} },
		"later connector": func(r *backends.Report) { r.Ended, r.Connect = nil, &backends.Connect{Exec: 5} },
	} {
		t.Run(name, func(t *testing.T) {
			gate, inside := pair(t)
			public, private := newKey(t)
			go func() {
				if _, err := challenge(inside, public); err != nil {
					return
				}
				session, _ := yamux.Server(inside, muxConfig(insideWindow))
				defer session.Close()
				for {
					s, err := session.AcceptStream()
					if err != nil {
						return
					}
					var o opening
					if readMessage(s, maxRequest, &o) != nil {
						return
					}
					switch o.Op {
					case opControl:
						writeMessage(s, welcome{Version: Version})
					case opReports:
						writeMessage(s, auditing{On: true})
						r := ok
						ended := *ok.Ended
						r.Ended = &ended
						change(&r)
						writeMessage(s, r)
					}
				}
			}()
			taken := make(chan *backends.Report, 2)
			c, err := NewClient(t.Context(), gate, private, Hello{
				Audit: backends.ExecAudit{Mode: backends.ExecAuditRequired}, Reports: func(r *backends.Report) error { taken <- r; return nil },
			})
			if err != nil {
				t.Fatal(err)
			}
			defer c.Close()
			if name == "fine" {
				select {
				case <-taken:
				case <-c.Done():
					t.Error(c.Err())
				}
				return
			}
			waitDone(t, c)
			if len(taken) > 0 {
				t.Errorf("taken: %+v", <-taken)
			}
		})
	}
}

func FuzzReport(f *testing.F) {
	for _, r := range []backends.Report{
		{Sequence: 1, Exec: &backends.Exec{PID: 1, Path: []byte("/bin/x"), Args: backends.Args{List: [][]byte{{0xff}}, Count: 1, Bytes: 2}}},
		{Sequence: 1, Started: &backends.Started{PID: 1, File: []byte("/x")}},
		{Sequence: 1, Ended: &backends.Ended{PID: 1, Signal: "KILL"}},
		{Sequence: 1, Connect: &backends.Connect{PID: 1, Address: netip.MustParseAddr("::1"), Port: 1}},
		{Sequence: 1, Script: &backends.Script{Hash: make([]byte, 32), Data: []byte("#!")}},
		{Sequence: 1, Unaudited: &backends.Unaudited{PID: 2}},
	} {
		var b bytes.Buffer
		writeMessage(&b, r)
		f.Add(b.Bytes())
	}
	f.Fuzz(func(t *testing.T, b []byte) {
		r, err := readReport(bytes.NewReader(b), 0)
		if err != nil {
			return
		}
		if e := r.Exec; e != nil && (len(e.Path) > backends.MaxReportPath || len(e.Args.List) > backends.MaxReportStrings) {
			t.Errorf("%+v", e)
		}
	})
}

// TestArgs gathers arguments within the limits, and the hash of all of them.
func TestArgs(t *testing.T) {
	for name, args := range map[string][]string{
		"none": nil, "empty": {""}, "some": {"a", "", "b"}, "exact": {strings.Repeat("x", backends.MaxReportArgs-1)},
		"long": {"a", strings.Repeat("x", backends.MaxReportArgs), "b"}, "many": slices.Repeat([]string{""}, backends.MaxReportStrings+5),
		"at the limit": slices.Repeat([]string{"y"}, backends.MaxReportStrings),
	} {
		all := ""
		for _, a := range args {
			all += a + "\x00"
		}
		for _, step := range []int{1, 7, 1 << 20} {
			var c argCollector
			for rest := []byte(all); len(rest) > 0; rest = rest[min(step, len(rest)):] {
				c.stream(rest[:min(step, len(rest))])
			}
			a := c.done()
			fits := len(all) <= backends.MaxReportArgs && len(args) <= backends.MaxReportStrings
			var whole []string
			for _, s := range a.List {
				whole = append(whole, string(s))
			}
			if int(a.Count) != len(args) || int(a.Bytes) != len(all) || !argLimits(&a) || fits && !slices.Equal(whole, args) {
				t.Errorf("%s, by %d: %d arguments of %d bytes, %d kept", name, step, a.Count, a.Bytes, len(a.List))
			}
			sum := sha256.Sum256([]byte(all))
			if fits != (a.Hash == nil) || !fits && !bytes.Equal(a.Hash, sum[:]) {
				t.Errorf("%s, by %d: hash %x", name, step, a.Hash)
			}
		}
	}
}

// TestAuditUnavailable has the kernel refuse a listener: the session is refused, or its log says so.
func TestAuditUnavailable(t *testing.T) {
	for _, mode := range []string{backends.ExecAuditRequired, backends.ExecAuditPreferred} {
		public, private := newKey(t)
		// An agent below another one's filter: there is a listener already.
		outer := startAudited(t, backends.ExecAudit{})
		socket := filepath.Join(t.TempDir(), "gate")
		l, err := net.Listen("unix", socket)
		if err != nil {
			t.Fatal(err)
		}
		defer l.Close()
		exe, _ := os.Readlink(self)
		ctx, stop := context.WithCancel(t.Context())
		ended := make(chan struct{})
		go func() {
			defer close(ended)
			outer.client.Exec(ctx, backends.Process{Channel: 1, Kind: backends.KindExec, Command: fmt.Sprintf("exec -a %s %s --socket %s --key %s",
				serveName, exe, socket, base64.StdEncoding.EncodeToString(public))})
		}()
		conn, err := l.Accept()
		if err != nil {
			t.Fatal(err)
		}
		c, err := NewClient(t.Context(), conn, private, Hello{
			Audit: backends.ExecAudit{Mode: mode}, Reports: func(*backends.Report) error { return nil },
		})
		const want = "another program listens"
		if mode == backends.ExecAuditRequired {
			if err == nil || !strings.Contains(err.Error(), want) {
				t.Errorf("required: %v", err)
			}
		} else if err != nil || !strings.HasPrefix(c.ExecAudit(), "off: ") || !strings.Contains(c.ExecAudit(), want) {
			t.Errorf("preferred: %v, %v", c, err)
		} else if _, err := c.Exec(t.Context(), backends.Process{Kind: backends.KindExec, Command: "true"}); err != nil {
			t.Errorf("unaudited: %v", err)
		}
		if c != nil {
			c.Close()
		}
		stop()
		<-ended
	}
}

// The first process is asked for as soon as the agent has said that it reports.
func TestAuditFirstProcess(t *testing.T) {
	for range 5 {
		x := startAudited(t, backends.ExecAudit{})
		x.run("/bin/true first; exit 0")
		x.exec("/bin/true first")
		x.client.Close()
	}
}
