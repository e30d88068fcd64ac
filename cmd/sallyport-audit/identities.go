package main

import (
	"crypto/ed25519"
	"errors"
	"fmt"
	"io"
	"os"
	"runtime"
	"slices"
	"strings"
	"sync"

	"filippo.io/age"
	"golang.org/x/term"

	"github.com/sallyport/sallyport/auditlog"
	"github.com/sallyport/sallyport/auditlog/agekeys"
)

// identityEnv names a file of identities where no -i does.
const identityEnv = "SALLYPORT_IDENTITY"

// identities reads the files of -i, once: those that an encrypted log is decrypted with.
func (t *tool) identities() ([]age.Identity, error) {
	if t.ids != nil {
		return t.ids, nil
	}
	var all []age.Identity
	if env := os.Getenv(identityEnv); env != "" && len(t.idFiles) == 0 {
		t.idFiles = []string{env}
	}
	for _, f := range t.idFiles {
		ids, err := agekeys.LoadIdentities(f, askPassphrase)
		if err != nil {
			return nil, fmt.Errorf("--identity: %w", err)
		}
		all = append(all, ids...)
	}
	t.ids = all
	return all, nil
}

// reader reads a log, and decrypts it if one of the identities is a recipient.
func (t *tool) reader(src auditlog.Source, log auditlog.Stored, keys ...ed25519.PublicKey) (*auditlog.SessionReader, error) {
	ids, err := t.identities()
	if err != nil {
		return nil, err
	}
	r := auditlog.NewSessionReader(src, log, keys...)
	r.Decrypt(ids...)
	return r, nil
}

// unread counts what could not be read for want of an identity.
type unread struct {
	mu       sync.Mutex // guards all below
	sessions int
	records  uint64
	types    []string // of the recipients
}

// countUnread takes a log's report once the log is read.
func (t *tool) countUnread(rep auditlog.Report) {
	if rep.Unread == 0 {
		return
	}
	u := &t.unread
	u.mu.Lock()
	defer u.mu.Unlock()
	u.sessions++
	u.records += rep.Unread
	for _, name := range rep.Recipients {
		if !slices.Contains(u.types, name) && len(u.types) < 10 {
			u.types = append(u.types, name)
		}
	}
}

// err says what was not shown, nil if all was: who reads half of the evidence shall know it.
func (u *unread) err(gave bool) error {
	u.mu.Lock()
	defer u.mu.Unlock()
	if u.records == 0 {
		return nil
	}
	why := "give an identity with -i FILE"
	if gave {
		why = "none of the identities given is a recipient"
	}
	to := ""
	if len(u.types) > 0 {
		to = " to " + clean(strings.Join(u.types, ", "))
	}
	return fmt.Errorf("not shown: %d records of %d logs, which are encrypted%s: %s", u.records, u.sessions, to, why)
}

// damage names the logs that are damaged, or can't be read, of commands whose own output does not tell of them.
type damage struct {
	mu      sync.Mutex // guards all below
	worst   error      // errDamaged before errUnreadable
	reports []auditlog.Report
	more    int
}

// maxDamageTold is how many such logs are named: verify has all.
const maxDamageTold = 10

// add takes a log's report once the log is read.
func (d *damage) add(rep auditlog.Report) {
	err := verdict(rep.State)
	if err == nil {
		return
	}
	d.mu.Lock()
	defer d.mu.Unlock()
	if !errors.Is(d.worst, errDamaged) {
		d.worst = err
	}
	if len(d.reports) < maxDamageTold {
		d.reports = append(d.reports, rep)
	} else {
		d.more++
	}
}

// tell names the logs, and gives the error that they are.
func (d *damage) tell(stderr io.Writer) error {
	d.mu.Lock()
	defer d.mu.Unlock()
	for _, rep := range d.reports {
		why := ""
		if len(rep.Problems) > 0 {
			why = ": " + clean(rep.Problems[0].String())
		}
		if rep.State == auditlog.Unreadable {
			why += ": it, or a part of it, is not in what was told"
		}
		fmt.Fprintf(stderr, "sallyport-audit: %s is %s%s (see verify)\n", dash(clean(rep.ID)), rep.State, why)
	}
	if d.more > 0 {
		fmt.Fprintf(stderr, "sallyport-audit: and %d damaged or unreadable logs more\n", d.more)
	}
	return d.worst
}

// unreadText says what of a log is not shown for want of an identity, "" if all is.
func unreadText(rep auditlog.Report) string {
	if rep.Unread == 0 {
		return ""
	}
	return fmt.Sprintf("%d of %d records: they are encrypted, see --identity", rep.Unread, rep.Records)
}

// askPassphrase asks on the terminal, not on standard input: that may be a pipe.
func askPassphrase(what string) ([]byte, error) {
	in, out := "/dev/tty", "/dev/tty"
	if runtime.GOOS == "windows" {
		in, out = "CONIN$", "CONOUT$"
	}
	tty, err := os.OpenFile(in, os.O_RDWR, 0)
	if err != nil {
		return nil, errors.New("has a passphrase, and there is no terminal to ask for it")
	}
	defer tty.Close()
	say, err := os.OpenFile(out, os.O_WRONLY, 0)
	if err != nil {
		return nil, errors.New("has a passphrase, and there is no terminal to ask for it")
	}
	defer say.Close()
	fmt.Fprintf(say, "Passphrase for %s: ", clean(what))
	pass, err := term.ReadPassword(int(tty.Fd()))
	fmt.Fprintln(say)
	if err != nil {
		return nil, fmt.Errorf("passphrase: %w", err)
	}
	return pass, nil
}
