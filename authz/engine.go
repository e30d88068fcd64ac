package authz

import (
	"bytes"
	"cmp"
	"context"
	"crypto/rand"
	"crypto/sha256"
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"log/slog"
	"maps"
	"net/netip"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"
	"time"

	"github.com/fsnotify/fsnotify"
	"github.com/open-policy-agent/opa/v1/ast"
	"github.com/open-policy-agent/opa/v1/storage/inmem"
)

// Config says where policy and data are.
type Config struct {
	// Data is the directory of users, profiles and grants. A file's path is its data path: users/alice.json is
	// data.users.alice, users.json is data.users. Endings: .json, .yaml, .yml.
	Data string `yaml:"data"`
	// Policy is a directory of Rego modules that replace or add to the default policy; empty: the default policy alone.
	Policy string `yaml:"policy"`
}

// Engine answers the gate's questions from the newest good policy and data. It is safe for concurrent use; no question
// waits for a reload.
type Engine struct {
	cfg  Config
	log  *slog.Logger
	now  func() time.Time
	stop context.CancelFunc
	done chan struct{} // closed when watch has ended

	// Used by Open, then by watch alone.
	data   *tree
	policy *tree           // nil: no own modules
	told   map[string]bool // problems logged
	merged merged

	compiler     *ast.Compiler
	compiledFrom map[string][]byte // own modules of compiler
	failedFrom   map[string][]byte // own modules that did not compile, nil: none
	failures     []error           // and why

	current atomic.Pointer[snapshot]
	state   atomic.Pointer[state]

	mu          sync.Mutex // guards subscribers
	subscribers map[chan struct{}]struct{}
}

// snapshot is one policy with one data document; it never changes.
type snapshot struct {
	revision   string
	offer      question
	login      question
	request    question
	considered question
	store      map[string]any
}

// state is what Ready and Holds tell.
type state struct {
	problems []error
	sums     map[string]string // SHA-256 of each data file in use, by name
}

// Open loads policy and data, and watches them: an edit takes effect within a second, a broken one leaves the file's
// last good content in place and shows in Ready. The first load must be good, with one exception: a broken file below
// grants/ or group_grants/ counts as absent, for who may write grants must not be able to keep a gate from starting.
// Errors name file and line. Close ends the watching.
func Open(cfg Config, log *slog.Logger) (*Engine, error) {
	e, err := Load(cfg, log)
	if err != nil {
		return nil, err
	}
	ctx, cancel := context.WithCancel(context.Background())
	e.stop, e.done = cancel, make(chan struct{})
	watcher, err := fsnotify.NewWatcher()
	if err != nil {
		log.Warn("policy: no file notification; looking for changes by polling", "error", err)
		watcher = nil
	}
	go e.watch(ctx, watcher)
	return e, nil
}

// Load is Open without the watching: what is on disk now, for a command that asks one question. Close need not be
// called.
func Load(cfg Config, log *slog.Logger) (*Engine, error) {
	if cfg.Data == "" {
		return nil, errors.New("policy: the data directory is not set (data: DIR)")
	}
	e := newEngine(cfg, log)
	e.reload(nil, true)
	var fatal []error
	for _, problem := range e.state.Load().problems {
		if !e.grantsOnly(problem) {
			fatal = append(fatal, problem)
		}
	}
	if len(fatal) > 0 {
		return nil, fmt.Errorf("policy: %w", joinSome(fatal))
	}
	if e.current.Load() == nil {
		return nil, errors.New("policy: nothing was loaded")
	}
	e.tell()
	return e, nil
}

func newEngine(cfg Config, log *slog.Logger) *Engine {
	e := &Engine{cfg: cfg, log: log, now: time.Now, data: newDataTree(cfg.Data), told: map[string]bool{},
		subscribers: map[chan struct{}]struct{}{}}
	if cfg.Policy != "" {
		e.policy = newPolicyTree(cfg.Policy)
	}
	return e
}

// grantsOnly says whether a problem lies below the directories of grants.
func (e *Engine) grantsOnly(problem error) bool {
	var at *FileError
	if !errors.As(problem, &at) {
		return false
	}
	name, err := filepath.Rel(e.cfg.Data, at.File)
	top, _, below := strings.Cut(filepath.ToSlash(name), "/")
	return err == nil && below && (top == "grants" || top == "group_grants")
}

// joinSome joins the first errors of many.
func joinSome(all []error) error {
	if len(all) > maxProblems {
		all = append(slices.Clone(all[:maxProblems]), fmt.Errorf("and %d more", len(all)-maxProblems))
	}
	return errors.Join(all...)
}

// reload takes over what changed on disk: all of it, or only the dirty paths. It returns true when another look is due
// soon.
func (e *Engine) reload(dirty map[string]bool, all bool) (again bool) {
	now := time.Now()
	changed, young := false, false
	if !all {
		var ok, ok2 bool
		changed, young, ok = e.data.touch(dirty, now)
		ok2 = true
		if e.policy != nil {
			var y bool
			_, y, ok2 = e.policy.touch(dirty, now)
			young = young || y
		}
		all = !ok || !ok2
	}
	if all {
		c, y := e.data.scan(dirty, now)
		changed, young = changed || c, young || y
		if e.policy != nil {
			_, y = e.policy.scan(dirty, now)
			young = young || y
		}
	}
	problems := e.data.problems()
	if changed || e.merged.data == nil {
		e.merged = e.data.merge()
	}
	problems = append(problems, e.merged.conflicts...)

	if e.policy != nil {
		problems = append(problems, e.policy.problems()...)
	}
	recompiled, compileProblems := e.recompile()
	problems = append(problems, compileProblems...)

	if e.compiler != nil && (changed || recompiled || e.current.Load() == nil) {
		if err := e.commit(e.merged.data, revision(e.merged.sums, e.compiledFrom)); err != nil {
			problems = append(problems, err)
		}
	}
	e.state.Store(&state{problems: problems, sums: e.merged.sums})
	return young
}

// recompile compiles the policy if an own module changed. On failure the old policy stays.
func (e *Engine) recompile() (recompiled bool, problems []error) {
	own := map[string][]byte{}
	file := func(name string) string { return name }
	if e.policy != nil {
		if len(e.policy.walk) > 0 && e.compiler != nil {
			return false, nil // what can't be read isn't gone: an own rule must not give way to the default one
		}
		own = e.policy.ownModules()
		file = func(name string) string { return filepath.Join(e.cfg.Policy, filepath.FromSlash(name)) }
	}
	if e.compiler != nil && maps.EqualFunc(own, e.compiledFrom, bytes.Equal) {
		return false, nil
	}
	if e.failedFrom != nil && maps.EqualFunc(own, e.failedFrom, bytes.Equal) {
		return false, e.failures
	}
	compiler, problems := compile(own, file)
	if len(problems) > 0 {
		e.failedFrom, e.failures = own, problems
		return false, problems
	}
	e.compiler, e.compiledFrom, e.failedFrom = compiler, own, nil
	return true, nil
}

// commit makes a snapshot the current one and tells the subscribers, if it differs from the last.
func (e *Engine) commit(data map[string]any, revision string) error {
	if last := e.current.Load(); last != nil && last.revision == revision {
		return nil
	}
	s, err := newSnapshot(e.compiler, data, revision)
	if err != nil {
		return err
	}
	e.current.Store(s)
	e.log.Info("policy: loaded", "revision", revision)
	e.mu.Lock()
	defer e.mu.Unlock()
	for c := range e.subscribers {
		select {
		case c <- struct{}{}:
		default: // one notice is waiting already
		}
	}
	return nil
}

func newSnapshot(compiler *ast.Compiler, data map[string]any, revision string) (*snapshot, error) {
	// Values are stored as they are: nobody changes them after merge.
	store := inmem.NewFromObjectWithOpts(data, inmem.OptRoundTripOnWrite(false))
	s := &snapshot{revision: revision, store: data}
	for name, q := range map[string]*question{"offer": &s.offer, "login": &s.login, "request": &s.request,
		"considered": &s.considered} {
		var err error
		if *q, err = prepare(context.Background(), name, compiler, store); err != nil {
			return nil, err
		}
	}
	return s, nil
}

// revision is a hash over the names and contents of all files in use, and over the default policy.
func revision(sums map[string]string, own map[string][]byte) string {
	hash := sha256.New()
	defaults, _ := defaultModules() // an error would have shown in compile
	for _, modules := range []map[string][]byte{defaults, own} {
		for _, name := range slices.Sorted(maps.Keys(modules)) {
			fmt.Fprintf(hash, "%q %x\n", name, sha256.Sum256(modules[name]))
		}
		fmt.Fprintln(hash)
	}
	for _, name := range slices.Sorted(maps.Keys(sums)) { // quoted, so that no name can look like two
		hash.Write(strconv.AppendQuote(nil, name))
		hash.Write([]byte(" " + sums[name] + "\n"))
	}
	return hex.EncodeToString(hash.Sum(nil)[:16])
}

// tell logs problems that are new and that are over.
func (e *Engine) tell() {
	problems := e.state.Load().problems
	now := make(map[string]bool, len(problems))
	for i, problem := range problems {
		if i == maxProblems {
			break
		}
		text := problem.Error()
		now[text] = true
		if !e.told[text] {
			e.log.Error("policy: a change was not taken; the last good content stays", "error", text)
		}
	}
	if len(e.told) > 0 && len(now) == 0 {
		e.log.Info("policy: all files are good again")
	}
	e.told = now
}

// Times of watch.
const (
	quiet    = 40 * time.Millisecond  // without further events before a reload
	patience = 250 * time.Millisecond // the most a stream of events can delay it
	pollTime = 500 * time.Millisecond // between looks without events
)

// watch reloads on file events, and looks by itself now and then: events are lost when a watch can't be had, on network
// file systems, and behind links that are moved.
func (e *Engine) watch(ctx context.Context, watcher *fsnotify.Watcher) {
	defer close(e.done)
	var events <-chan fsnotify.Event
	var failures <-chan error
	watched := map[string]string{}
	if watcher != nil {
		defer watcher.Close()
		events, failures = watcher.Events, watcher.Errors
		e.watchDirs(watcher, watched)
		// What changed between the first load and the watches shows in the first look.
	}
	timer := time.NewTimer(0)
	defer timer.Stop()
	dirty := map[string]bool{}
	var firstEvent, poll time.Time // poll: when to look at all
	for {
		select {
		case <-ctx.Done():
			return
		case event, ok := <-events:
			if !ok {
				events = nil
				continue
			}
			if len(dirty) < 10_000 {
				dirty[event.Name] = true
			} else {
				poll = time.Time{} // too many to remember: times and sizes must tell
			}
			if firstEvent.IsZero() {
				firstEvent = time.Now()
			}
			timer.Reset(min(quiet, max(0, patience-time.Since(firstEvent))))
		case err, ok := <-failures:
			if !ok {
				failures = nil
				continue
			}
			e.log.Warn("policy: file notification", "error", err)
			poll = time.Time{}
			timer.Reset(0)
		case <-timer.C:
			begin := time.Now()
			all := !begin.Before(poll)
			again := e.reload(dirty, all)
			e.tell()
			if watcher != nil {
				e.watchDirs(watcher, watched)
			}
			firstEvent = time.Time{}
			if !again {
				clear(dirty)
			}
			if all { // a large tree not so often that the looking costs more than a few percent of a processor
				poll = time.Now().Add(max(pollTime, 20*time.Since(begin)))
			}
			next := max(0, time.Until(poll))
			if again {
				next = min(next, settleTime)
			}
			timer.Reset(next)
		}
	}
}

// watchDirs has exactly the directories of the last scan watched. A directory that was replaced is watched anew.
func (e *Engine) watchDirs(watcher *fsnotify.Watcher, watched map[string]string) {
	want := map[string]string{}
	for _, t := range []*tree{e.data, e.policy} {
		if t == nil {
			continue
		}
		for dir, info := range t.dirs {
			want[dir] = identity(info)
		}
	}
	for dir, id := range watched {
		if want[dir] != id {
			_ = watcher.Remove(dir) // it may have gone by itself
			delete(watched, dir)
		}
	}
	for dir, id := range want {
		if _, ok := watched[dir]; ok {
			continue
		}
		if err := watcher.Add(dir); err != nil {
			e.log.Debug("policy: directory is polled, not watched", "dir", dir, "error", err)
		}
		watched[dir] = id // not tried again: polling sees it
	}
}

// Close ends the watching. The engine still answers, from what it has.
func (e *Engine) Close() error {
	if e.stop != nil {
		e.stop()
		<-e.done
	}
	return nil
}

// Revision names the policy and data in use: a hash over both.
func (e *Engine) Revision() string { return e.current.Load().revision }

// Ready is nil while all files are in use as they are on disk; otherwise it names file, line and what is wrong.
func (e *Engine) Ready() error { return joinSome(e.state.Load().problems) }

// Holds gives the SHA-256 (hex) of a data file's content in use, by its slash separated name below the data directory,
// "grants/alice.json"; empty if there is none. The error says why the file as it is on disk is not in use.
func (e *Engine) Holds(name string) (string, error) {
	s := e.state.Load()
	full := filepath.Join(e.cfg.Data, filepath.FromSlash(name))
	for _, problem := range s.problems {
		var at *FileError
		if errors.As(problem, &at) && at.File == full {
			return s.sums[name], problem
		}
	}
	return s.sums[name], nil
}

// Subscribe gives a channel that gets a value after policy or data changed; changes that come while one waits are
// folded into it. cancel ends the subscription; the channel is not closed.
func (e *Engine) Subscribe() (changed <-chan struct{}, cancel func()) {
	c := make(chan struct{}, 1)
	e.mu.Lock()
	defer e.mu.Unlock()
	e.subscribers[c] = struct{}{}
	return c, func() {
		e.mu.Lock()
		defer e.mu.Unlock()
		delete(e.subscribers, c)
	}
}

// undecided is what the client reads when the policy gave no usable answer.
const undecided = "the access policy could not decide; tell an operator"

// Offer says whether a key may be used by a user at all. An error is a refusal.
func (e *Engine) Offer(ctx context.Context, in OfferInput) (bool, error) {
	return e.current.Load().decideOffer(ctx, in, e.now())
}

// Login decides whether a user who has proven a key gets a sandbox. With an error the answer is a refusal, with a
// reason for the client that says nothing about the error.
func (e *Engine) Login(ctx context.Context, in LoginInput) (Login, error) {
	return e.current.Load().decideLogin(ctx, in, e.now())
}

// Request decides whether one request on a channel may be served. With an error the answer is a refusal.
func (e *Engine) Request(ctx context.Context, in RequestInput) (Verdict, error) {
	s := e.current.Load()
	refusal := Verdict{ID: rand.Text(), Reason: undecided}
	answer, err := s.request.ask(ctx, in, e.now())
	if err != nil {
		return refusal, err
	}
	v := Verdict{}
	if err := decode("request-result.json", answer, &v); err != nil {
		return refusal, fmt.Errorf("result of data.sallyport.request: %w", err)
	}
	v.ID, v.Reason = refusal.ID, Printable(v.Reason, maxReason)
	if !v.Allow && v.Reason == "" {
		v.Reason = "not permitted"
	}
	return v, nil
}

// maxReason bounds what a client reads, in characters.
const maxReason = 1500

func (s *snapshot) decideOffer(ctx context.Context, in OfferInput, now time.Time) (bool, error) {
	source, err := address(in.Source)
	if err != nil {
		return false, err
	}
	in.Source = source
	answer, err := s.offer.ask(ctx, in, now)
	if err != nil {
		return false, err
	}
	known, ok := answer.(bool)
	if !ok {
		return false, errors.New("result of data.sallyport.offer: not true or false")
	}
	return known, nil
}

func (s *snapshot) decideLogin(ctx context.Context, in LoginInput, now time.Time) (Login, error) {
	refusal := Login{Reason: undecided, ID: rand.Text(), Revision: s.revision}
	source, err := address(in.Source)
	if err != nil {
		return refusal, err
	}
	in.Source = source
	answer, err := s.login.ask(ctx, in, now)
	if err != nil {
		return refusal, err
	}
	l := Login{}
	if err := decode("login-result.json", answer, &l); err != nil {
		return refusal, fmt.Errorf("result of data.sallyport.login: %w", err)
	}
	l.ID, l.Revision = refusal.ID, refusal.Revision
	if !l.Allow {
		refusal.Rule = Printable(l.Rule, 200)
		refusal.Reason = Printable(l.Reason, maxReason)
		if refusal.Reason == "" {
			refusal.Reason = "access refused"
		}
		return refusal, nil
	}
	// Whatever rule admitted: an end is due, and it lies ahead.
	switch {
	case !now.Before(l.NotAfter):
		return refusal, fmt.Errorf("result of data.sallyport.login: admitted although not_after, %s, is over", l.NotAfter)
	case now.Before(l.NotBefore):
		return refusal, fmt.Errorf("result of data.sallyport.login: admitted before not_before, %s", l.NotBefore)
	}
	if err := checkLogin(l); err != nil {
		return refusal, fmt.Errorf("result of data.sallyport.login: %w", err)
	}
	l.Reason = Printable(l.Reason, maxReason)
	return l, nil
}

// checkLogin checks what the schema of a result can't.
func checkLogin(l Login) error {
	if !ticketName.MatchString(l.Ticket) {
		return errors.New("ticket: no valid name")
	}
	if !profileName.MatchString(l.Profile) {
		return errors.New("profile: no valid name")
	}
	permit, err := plain(l.Permit)
	if err != nil {
		return err
	}
	fields, _ := permit.(map[string]any)
	if err := checkPermit(fields); err != nil {
		return under(err, "permit")
	}
	sandbox, err := plain(l.Sandbox)
	if err != nil {
		return err
	}
	of, _ := sandbox.(map[string]any)
	target, _ := of["target"].(map[string]any)
	if err := checkJoin(target, fields); err != nil {
		return err
	}
	if err := checkDurations(map[string]any{"exec_stuck_limit": l.Sandbox.ExecStuckLimit}); err != nil {
		return under(err, "sandbox")
	}
	return nil
}

// address gives an IP address in the one form that policy sees: without a zone, and IPv4 as IPv4.
func address(source string) (string, error) {
	a, err := netip.ParseAddr(source)
	if err != nil {
		return "", fmt.Errorf("source: %q is no IP address", Printable(source, 64))
	}
	return a.Unmap().WithZone("").String(), nil
}

// decode checks a policy's answer against its schema and decodes it; a field that isn't known is an error.
func decode(schema string, answer, into any) error {
	if err := matches(schema, answer); err != nil {
		return err
	}
	text, err := json.Marshal(answer)
	if err != nil {
		return err
	}
	dec := json.NewDecoder(bytes.NewReader(text))
	dec.DisallowUnknownFields()
	return dec.Decode(into)
}

// Considered is a grant that a login looked at.
type Considered struct {
	Ticket  string `json:"ticket"`
	Profile string `json:"profile"`
	From    string `json:"from"`   // "grants.alice" or "group_grants.payments"
	Status  string `json:"status"` // "live", "expired", "not-yet", "wrong-source", "no-profile", "invalid"
}

// Explanation is a login decision with what led to it.
type Explanation struct {
	Offer      bool         `json:"offer"` // the key stands in the data for the user
	Login      Login        `json:"login"`
	Considered []Considered `json:"considered"`
}

// Explain answers a login question as of a time, for a person to read. It decides nothing.
func (e *Engine) Explain(ctx context.Context, in LoginInput, at time.Time) (Explanation, error) {
	s := e.current.Load()
	var x Explanation
	var err error
	if x.Offer, err = s.decideOffer(ctx, OfferInput{User: in.User, Source: in.Source, Key: in.Key}, at); err != nil {
		return x, err
	}
	if x.Login, err = s.decideLogin(ctx, in, at); err != nil {
		return x, err
	}
	if answer, err := s.considered.ask(ctx, in, at); err == nil { // an own policy may have no such rule
		text, err := json.Marshal(answer)
		if err == nil {
			err = json.Unmarshal(text, &x.Considered)
		}
		if err != nil {
			return x, fmt.Errorf("result of data.sallyport.considered: %w", err)
		}
		slices.SortFunc(x.Considered, func(a, b Considered) int {
			return cmp.Or(cmp.Compare(a.From, b.From), cmp.Compare(a.Ticket, b.Ticket))
		})
	}
	return x, nil
}

// Warnings names what in the data is likely not meant, at most 100 lines: profiles whose rules on transfers leave other ways
// open.
func (e *Engine) Warnings() []string {
	profiles, _ := e.current.Load().store["profiles"].(map[string]any)
	var warnings []string
	for _, name := range slices.Sorted(maps.Keys(profiles)) {
		entry, _ := profiles[name].(map[string]any)
		permit, _ := entry["permit"].(map[string]any)
		rules, _ := permit["transfer"].(map[string]any)
		var denied, open []string
		for _, what := range []string{"deny_upload", "deny_download", "deny_paths", "max_size"} {
			switch v := rules[what].(type) {
			case bool:
				if !v {
					continue
				}
			case nil:
				continue
			}
			denied = append(denied, what)
		}
		for _, way := range []string{"shell", "exec", "forward", "listen", "agent", "x11"} {
			switch v := permit[way].(type) {
			case bool:
				if !v {
					continue
				}
			case []any:
				if len(v) == 0 {
					continue
				}
			case nil:
				continue
			}
			open = append(open, way)
		}
		if len(denied) > 0 && len(open) > 0 && len(warnings) < 100 {
			warnings = append(warnings, fmt.Sprintf("profile %s: transfer.%s holds for sftp and scp alone; %s is permitted too, and carries files past it",
				Printable(name, 64), strings.Join(denied, ", "), strings.Join(open, ", ")))
		}
	}
	return warnings
}

// Keys gives the keys that stand in the data for a user.
func (e *Engine) Keys(user string) []Key {
	users, _ := e.current.Load().store["users"].(map[string]any)
	entry, _ := users[user].(map[string]any)
	lines, _ := entry["keys"].([]any)
	var keys []Key
	for _, line := range lines {
		text, _ := line.(string)
		if key, err := ParseKey(text); err == nil {
			keys = append(keys, key)
		}
	}
	return keys
}
