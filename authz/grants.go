package authz

import (
	"context"
	"crypto/sha256"
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"maps"
	"os"
	"path"
	"path/filepath"
	"slices"
	"strings"
	"time"
)

// Grant is an entry of data.grants or data.group_grants, as its file has it.
type Grant struct {
	Profile    string   `json:"profile"`
	NotBefore  string   `json:"not_before,omitempty"` // RFC 3339
	NotAfter   string   `json:"not_after"`            // RFC 3339
	Sources    []string `json:"sources,omitempty"`    // CIDR prefixes
	Reason     string   `json:"reason,omitempty"`
	ApprovedBy string   `json:"approved_by,omitempty"`
}

// Grantee is whom a grant is for: a user or a group, never both.
type Grantee struct {
	User  string
	Group string
}

func (g Grantee) root() (root, name string) {
	if g.Group != "" {
		return "group_grants", g.Group
	}
	return "grants", g.User
}

func (g Grantee) check() error {
	if (g.User == "") == (g.Group == "") {
		return errors.New("a grant is for a user or for a group: name one of them")
	}
	if _, name := g.root(); !userName.MatchString(name) {
		return fmt.Errorf("%q is no user or group: %w", Printable(name, 64), ErrUserName)
	}
	return nil
}

// file is the name of the one file in which grants of this grantee are written.
func (g Grantee) file() string {
	root, name := g.root()
	if name == "data" { // data.json is its directory's own content
		return path.Join(root, name, "data.json")
	}
	return path.Join(root, name+".json")
}

// ListedGrant is a grant with its names and state.
type ListedGrant struct {
	User   string `json:"user,omitempty"`
	Group  string `json:"group,omitempty"`
	Ticket string `json:"ticket"`
	Grant
	State string `json:"state"` // "live", "not-yet", "expired", "no-profile"
}

// AddGrant writes a grant into the data directory: in USER's (or the group's) own file, under a lock, by an atomic
// rename, on disk when it returns. A ticket that is there already is an error unless replace is set. It returns the
// file's name below dir, for Engine.Holds.
func AddGrant(ctx context.Context, dir string, to Grantee, ticket string, grant Grant, replace bool) (string, error) {
	if err := to.check(); err != nil {
		return "", err
	}
	root, name := to.root()
	value, err := plain(grant)
	if err != nil {
		return "", err
	}
	if err := checkGrantEntry([]string{name, ticket}, value); err != nil {
		return "", fmt.Errorf("grant %s: %w", Printable(ticket, 64), err)
	}
	return to.file(), edit(ctx, dir, to, func(mine map[string]any, all merged) error {
		if _, ok := lookup(all.data, "profiles", grant.Profile); !ok {
			return fmt.Errorf("profile %s does not exist; there is: %s", grant.Profile, names(all.data, "profiles"))
		}
		if to.User != "" {
			if _, ok := lookup(all.data, "users", to.User); !ok {
				return fmt.Errorf("user %s does not exist in the data: add users/%s.json with their keys first",
					to.User, to.User)
			}
		}
		if _, exists := lookup(all.data, root, name, ticket); exists {
			if _, here := mine[ticket]; !here {
				return fmt.Errorf("grant %s of %s stands in another file than %s", ticket, name, to.file())
			}
			if !replace {
				return fmt.Errorf("grant %s of %s exists already", ticket, name)
			}
		}
		mine[ticket] = value
		return nil
	})
}

// RevokeGrant removes a grant, as AddGrant adds one. The file goes with its last grant.
func RevokeGrant(ctx context.Context, dir string, of Grantee, ticket string) (string, error) {
	if err := of.check(); err != nil {
		return "", err
	}
	root, name := of.root()
	return of.file(), edit(ctx, dir, of, func(mine map[string]any, all merged) error {
		if _, here := mine[ticket]; !here {
			if _, exists := lookup(all.data, root, name, ticket); exists {
				return fmt.Errorf("grant %s of %s stands in another file than %s: remove it there",
					Printable(ticket, 64), name, of.file())
			}
			return fmt.Errorf("%s has no grant %s", name, Printable(ticket, 64))
		}
		delete(mine, ticket)
		return nil
	})
}

// ListGrants lists the grants of one grantee, or all of them for the zero Grantee, as of a time. Files that can't be
// used are named in the error; the list holds the others.
func ListGrants(dir string, of Grantee, at time.Time) ([]ListedGrant, error) {
	only := func(path []string) bool { return true }
	if of != (Grantee{}) {
		if err := of.check(); err != nil {
			return nil, err
		}
		only = concerns(of)
	}
	t := newDataTree(dir)
	t.only = only
	t.scan(nil, time.Now())
	m := t.merge()
	var list []ListedGrant
	for _, root := range []string{"grants", "group_grants"} {
		all, _ := m.data[root].(map[string]any)
		for _, name := range slices.Sorted(maps.Keys(all)) {
			tickets, _ := all[name].(map[string]any)
			for _, ticket := range slices.Sorted(maps.Keys(tickets)) {
				entry := ListedGrant{Ticket: ticket}
				who := Grantee{User: name}
				if entry.User = name; root == "group_grants" {
					entry.User, entry.Group = "", name
					who = Grantee{Group: name}
				}
				if of != (Grantee{}) && of != who {
					continue
				}
				if err := convert(tickets[ticket], &entry.Grant); err != nil {
					return nil, err
				}
				_, profile := lookup(m.data, "profiles", entry.Profile)
				entry.State = entry.Grant.state(at, profile)
				list = append(list, entry)
			}
		}
	}
	return list, joinSome(append(t.problems(), m.conflicts...))
}

// state is what policy/status.rego says without a client.
func (g Grant) state(at time.Time, profile bool) string {
	end, err := time.Parse(time.RFC3339, g.NotAfter)
	if err != nil {
		return "invalid"
	}
	start := time.Unix(0, 0)
	if g.NotBefore != "" {
		if start, err = time.Parse(time.RFC3339, g.NotBefore); err != nil {
			return "invalid"
		}
	}
	switch {
	case !at.Before(end):
		return "expired"
	case at.Before(start):
		return "not-yet"
	case !profile:
		return "no-profile"
	}
	return "live"
}

// GrantSum gives the SHA-256 (hex) of a grantee's file on disk, to compare with Engine.Holds; empty if there is none.
func GrantSum(dir, name string) (string, error) {
	text, err := readFile(filepath.Join(dir, filepath.FromSlash(name)))
	if errors.Is(err, fs.ErrNotExist) {
		return "", nil
	}
	if err != nil {
		return "", fmt.Errorf("read %s: %w", name, err)
	}
	sum := sha256.Sum256(text)
	return hex.EncodeToString(sum[:]), nil
}

// concerns limits a scan to what an edit of one grantee's grants needs.
func concerns(of Grantee) func(path []string) bool {
	root, name := of.root()
	return func(path []string) bool {
		if len(path) == 0 {
			return true
		}
		switch path[0] {
		case "users":
			return len(path) == 1 || path[1] == of.User
		case "profiles":
			return true
		case root:
			return len(path) == 1 || path[1] == name
		}
		return false
	}
}

// edit changes the one file of a grantee while nobody else does.
func edit(ctx context.Context, dir string, of Grantee, change func(mine map[string]any, all merged) error) error {
	if info, err := os.Stat(dir); err != nil || !info.IsDir() {
		return fmt.Errorf("%s is no data directory", dir)
	}
	target := filepath.Join(dir, filepath.FromSlash(of.file()))
	if err := os.MkdirAll(filepath.Dir(target), 0o755); err != nil {
		return fmt.Errorf("create the directory of grants: %w", err)
	}
	root, _ := of.root()
	unlock, err := lock(ctx, filepath.Join(dir, root, ".lock"))
	if err != nil {
		return err
	}
	defer unlock()

	// What an edit that was killed has left: under the lock nobody else is writing one.
	if left, err := filepath.Glob(filepath.Join(filepath.Dir(target), "."+filepath.Base(target)+".*")); err == nil {
		for _, name := range left {
			_ = os.Remove(name) // it is never read
		}
	}
	t := newDataTree(dir)
	t.only = concerns(of)
	t.scan(nil, time.Now())
	all := t.merge()
	mine := map[string]any{}
	if f := t.files[of.file()]; f != nil {
		if f.bad != nil {
			return fmt.Errorf("the file is broken, nothing was changed: %w", f.bad)
		}
		old, _ := f.value.(map[string]any)
		mine = maps.Clone(old)
	}
	if len(t.walk) > 0 {
		return joinSome(t.walk)
	}
	if err := change(mine, all); err != nil {
		return err
	}
	if len(mine) == 0 {
		if err := os.Remove(target); err != nil && !errors.Is(err, fs.ErrNotExist) {
			return fmt.Errorf("remove: %w", err)
		}
		return syncDir(filepath.Dir(target))
	}
	text, err := json.MarshalIndent(mine, "", "  ")
	if err != nil {
		return fmt.Errorf("encode: %w", err)
	}
	if err := replaceFile(target, append(text, '\n')); err != nil {
		return fmt.Errorf("write %s: %w", target, err)
	}
	return nil
}

// replaceFile puts a file in place as a whole, on disk when it returns. The temporary name begins with a dot, which the
// gate doesn't read.
func replaceFile(target string, text []byte) (err error) {
	mode := fs.FileMode(0o644)
	if info, err := os.Stat(target); err == nil {
		mode = info.Mode().Perm()
	}
	f, err := os.CreateTemp(filepath.Dir(target), "."+filepath.Base(target)+".*")
	if err != nil {
		return err
	}
	defer func() {
		if err != nil {
			_ = f.Close()
			_ = os.Remove(f.Name())
		}
	}()
	if _, err := f.Write(text); err != nil {
		return err
	}
	if err := f.Chmod(mode); err != nil {
		return err
	}
	if err := f.Sync(); err != nil {
		return err
	}
	if err := f.Close(); err != nil {
		return err
	}
	if err := os.Rename(f.Name(), target); err != nil {
		return err
	}
	return syncDir(filepath.Dir(target))
}

func syncDir(dir string) error {
	d, err := os.Open(dir)
	if err != nil {
		return err
	}
	defer d.Close()
	return d.Sync()
}

func lookup(data map[string]any, path ...string) (any, bool) {
	var value any = data
	for _, element := range path {
		object, ok := value.(map[string]any)
		if !ok {
			return nil, false
		}
		if value, ok = object[element]; !ok {
			return nil, false
		}
	}
	return value, true
}

func names(data map[string]any, root string) string {
	object, _ := data[root].(map[string]any)
	all := slices.Sorted(maps.Keys(object))
	if len(all) == 0 {
		return "none"
	}
	if len(all) > 20 {
		all = append(all[:20], "...")
	}
	return strings.Join(all, ", ")
}

// plain gives a value as JSON decodes it.
func plain(v any) (any, error) {
	text, err := json.Marshal(v)
	if err != nil {
		return nil, err
	}
	doc, err := parseJSON(text)
	return doc.value, err
}

func convert(from, into any) error {
	text, err := json.Marshal(from)
	if err != nil {
		return err
	}
	return json.Unmarshal(text, into)
}
