package main

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"net/http"
	"net/url"
	"text/tabwriter"
	"time"

	"github.com/spf13/cobra"

	"github.com/sallyport/sallyport/authz"
	"github.com/sallyport/sallyport/config"
)

// Exit codes of the commands that scripts use.
const (
	exitRefused  = 1 // refused, invalid, or failed: nothing was changed
	exitUsage    = 2 // wrong flags or arguments
	exitNotTaken = 3 // changed on disk, but no gate has confirmed that it uses the change
)

// exitError is an error with the process's exit code. An err of nil prints nothing.
type exitError struct {
	code int
	err  error
}

func (e *exitError) Error() string {
	if e.err == nil {
		return ""
	}
	return e.err.Error()
}

func (e *exitError) Unwrap() error { return e.err }

// ExitCode is the code to exit with.
func (e *exitError) ExitCode() int { return e.code }

func usageError(err error) error { return &exitError{code: exitUsage, err: err} }

// usageArgs gives a cobra argument check whose error has the exit code of wrong usage.
func usageArgs(check cobra.PositionalArgs) cobra.PositionalArgs {
	return func(c *cobra.Command, args []string) error {
		if err := check(c, args); err != nil {
			return usageError(err)
		}
		return nil
	}
}

// usageChecks gives the errors of missing and clashing flags the exit code of wrong usage.
func usageChecks(c *cobra.Command) {
	c.SetFlagErrorFunc(func(_ *cobra.Command, err error) error { return usageError(err) })
	c.PreRunE = func(c *cobra.Command, _ []string) error {
		err := c.ValidateRequiredFlags()
		if err == nil {
			err = c.ValidateFlagGroups()
		}
		if err != nil {
			return usageError(err)
		}
		return nil
	}
}

// holdsAnswer is the admin socket's answer on a data file.
type holdsAnswer struct {
	SHA256 string `json:"sha256"`          // of the content in use; empty: none
	Error  string `json:"error,omitempty"` // why the file on disk is not in use
}

// holdsHandler serves GET /policy/holds?name=grants/alice.json on the admin socket: which content of a data file the
// gate uses.
func holdsHandler(policy *authz.Engine) http.HandlerFunc {
	return func(w http.ResponseWriter, r *http.Request) {
		var answer holdsAnswer
		var err error
		if answer.SHA256, err = policy.Holds(r.URL.Query().Get("name")); err != nil {
			answer.Error = err.Error()
		}
		w.Header().Set("Content-Type", "application/json")
		_ = json.NewEncoder(w).Encode(answer) // a client that left needs no answer
	}
}

// grantCommand gives `sallyport grant`.
func grantCommand() *cobra.Command {
	c := &cobra.Command{
		Use:   "grant",
		Short: "Add, list and revoke grants in the data directory",
		Long: `Add, list and revoke grants in the data directory. A gate that watches the directory takes a change within a
second. Edits are locked and atomic: several may run at once.

Exit status: 0 done, 1 refused, invalid or failed (nothing was changed), 2 wrong usage,
3 changed on disk, but the gate has not taken it (with --wait).`,
		Args: usageArgs(cobra.NoArgs),
		RunE: func(*cobra.Command, []string) error { return usageError(errors.New("grant: say add, list or revoke")) },
	}
	c.AddCommand(grantAddCommand(), grantListCommand(), grantRevokeCommand())
	return c
}

// grantFlags are those that add and revoke share.
type grantFlags struct {
	dir    string
	to     authz.Grantee
	ticket string
	wait   time.Duration
	config string
	socket string
}

func (g *grantFlags) register(c *cobra.Command) {
	f := c.Flags()
	f.StringVar(&g.dir, "data", "", "directory of users, profiles and grants")
	f.StringVar(&g.to.User, "user", "", "user the grant is for")
	f.StringVar(&g.to.Group, "group", "", "group the grant is for, instead of --user")
	f.StringVar(&g.ticket, "ticket", "", "the grant's name")
	f.DurationVar(&g.wait, "wait", 0, "wait this long until the gate has taken the change")
	f.Lookup("wait").NoOptDefVal = "10s"
	f.StringVar(&g.config, "config", defaultConfig, "the gate's configuration file, for --wait")
	f.StringVar(&g.socket, "socket", "", "the gate's admin socket, for --wait (default: from the configuration)")
	usageChecks(c)
	c.MarkFlagsOneRequired("user", "group")
	c.MarkFlagsMutuallyExclusive("user", "group")
	for _, name := range []string{"data", "ticket"} {
		_ = c.MarkFlagRequired(name) // the flags exist
	}
}

// grantAddCommand gives `sallyport grant add`.
func grantAddCommand() *cobra.Command {
	var g grantFlags
	var grant authz.Grant
	var length time.Duration
	var replace bool
	c := &cobra.Command{
		Use:   "add --data DIR --user USER --ticket TICKET --profile PROFILE --for 1h",
		Short: "Add a grant",
		Example: `  sallyport grant add --data /etc/sallyport/data --user alice --ticket OPS-4711 \
      --profile payments-debug --for 1h --reason "queue is stuck" --approved-by bob --source 192.0.2.0/24 --wait`,
		Args: usageArgs(cobra.NoArgs),
		RunE: func(c *cobra.Command, _ []string) error {
			if length != 0 {
				if length < 0 {
					return usageError(errors.New("--for: must be more than 0"))
				}
				start := time.Now()
				if grant.NotBefore != "" {
					var err error
					if start, err = time.Parse(time.RFC3339, grant.NotBefore); err != nil {
						return usageError(fmt.Errorf("--not-before: %q is no RFC 3339 time", grant.NotBefore))
					}
				}
				grant.NotAfter = start.Add(length).UTC().Truncate(time.Second).Format(time.RFC3339)
			}
			name, err := authz.AddGrant(c.Context(), g.dir, g.to, g.ticket, grant, replace)
			if err != nil {
				return &exitError{code: exitRefused, err: fmt.Errorf("grant add: %w", err)}
			}
			fmt.Fprintf(c.OutOrStdout(), "granted %s to %s%s until %s\n", g.ticket, g.to.User, g.to.Group, grant.NotAfter)
			return g.waitTaken(c.Context(), name)
		},
	}
	g.register(c)
	f := c.Flags()
	f.StringVar(&grant.Profile, "profile", "", "profile that is granted")
	f.DurationVar(&length, "for", 0, "how long, from now or from --not-before: 1h")
	f.StringVar(&grant.NotAfter, "not-after", "", "end (RFC 3339), instead of --for")
	f.StringVar(&grant.NotBefore, "not-before", "", "begin (RFC 3339)")
	f.StringVar(&grant.Reason, "reason", "", "why it is given")
	f.StringVar(&grant.ApprovedBy, "approved-by", "", "who gives it")
	f.StringSliceVar(&grant.Sources, "source", nil, "CIDR prefix the client must come from; may be repeated")
	f.BoolVar(&replace, "replace", false, "replace a grant of the same ticket")
	c.MarkFlagsOneRequired("for", "not-after")
	c.MarkFlagsMutuallyExclusive("for", "not-after")
	_ = c.MarkFlagRequired("profile") // the flag exists
	return c
}

// grantRevokeCommand gives `sallyport grant revoke`.
func grantRevokeCommand() *cobra.Command {
	var g grantFlags
	c := &cobra.Command{
		Use:   "revoke --data DIR --user USER --ticket TICKET",
		Short: "Remove a grant; its sessions end",
		Args:  usageArgs(cobra.NoArgs),
		RunE: func(c *cobra.Command, _ []string) error {
			name, err := authz.RevokeGrant(c.Context(), g.dir, g.to, g.ticket)
			if err != nil {
				return &exitError{code: exitRefused, err: fmt.Errorf("grant revoke: %w", err)}
			}
			fmt.Fprintf(c.OutOrStdout(), "revoked %s of %s%s\n", g.ticket, g.to.User, g.to.Group)
			return g.waitTaken(c.Context(), name)
		},
	}
	g.register(c)
	return c
}

// grantListCommand gives `sallyport grant list`.
func grantListCommand() *cobra.Command {
	var dir, output string
	var of authz.Grantee
	c := &cobra.Command{
		Use:   "list --data DIR [--user USER]",
		Short: "List grants with their state",
		Args:  usageArgs(cobra.NoArgs),
		RunE: func(c *cobra.Command, _ []string) error {
			if output != "text" && output != "json" {
				return usageError(errors.New("--output: text or json"))
			}
			list, broken := authz.ListGrants(dir, of, time.Now())
			if output == "json" {
				enc := json.NewEncoder(c.OutOrStdout())
				enc.SetIndent("", "  ")
				if err := enc.Encode(append([]authz.ListedGrant{}, list...)); err != nil {
					return err
				}
			} else {
				t := tabwriter.NewWriter(c.OutOrStdout(), 0, 8, 2, ' ', 0)
				fmt.Fprintln(t, "FOR\tTICKET\tPROFILE\tFROM\tUNTIL\tSTATE\tREASON")
				for _, g := range list {
					who := g.User
					if g.Group != "" {
						who = "group " + g.Group
					}
					begin := g.NotBefore
					if begin == "" {
						begin = "-"
					}
					fmt.Fprintf(t, "%s\t%s\t%s\t%s\t%s\t%s\t%s\n", who, g.Ticket, g.Profile, begin, g.NotAfter, g.State,
						authz.Printable(g.Reason, 60))
				}
				if err := t.Flush(); err != nil {
					return err
				}
			}
			if broken != nil {
				return &exitError{code: exitRefused, err: fmt.Errorf("grant list: not all could be read: %w", broken)}
			}
			return nil
		},
	}
	f := c.Flags()
	f.StringVar(&dir, "data", "", "directory of users, profiles and grants")
	f.StringVar(&of.User, "user", "", "only this user's")
	f.StringVar(&of.Group, "group", "", "only this group's")
	f.StringVarP(&output, "output", "o", "text", "text or json")
	usageChecks(c)
	_ = c.MarkFlagRequired("data") // the flag exists
	c.MarkFlagsMutuallyExclusive("user", "group")
	return c
}

// waitTaken waits until the gate uses the file as it is on disk. It compares with the disk anew each time: another edit
// of the same file may come between, and holds this one too.
func (g *grantFlags) waitTaken(ctx context.Context, name string) error {
	if g.wait <= 0 {
		return nil
	}
	notTaken := func(err error) error {
		return &exitError{code: exitNotTaken, err: fmt.Errorf("written, but the gate has not taken it: %w", err)}
	}
	if g.socket == "" {
		cfg, err := config.Load(g.config)
		if err != nil {
			return notTaken(err)
		}
		g.socket = cfg.Admin.Socket
	}
	gate := newAdminClient(g.socket)
	ctx, cancel := context.WithTimeout(ctx, g.wait)
	defer cancel()
	last := errors.New("it still uses the old file")
	for {
		want, err := authz.GrantSum(g.dir, name)
		if err != nil {
			return notTaken(err)
		}
		var has holdsAnswer
		err = gate.do(ctx, http.MethodGet, "/policy/holds?name="+url.QueryEscape(name), nil, &has)
		switch {
		case err == nil && has.SHA256 == want:
			return nil
		case err == nil && has.Error != "":
			last = errors.New(has.Error)
		case err != nil && ctx.Err() == nil:
			last = err
		}
		select {
		case <-ctx.Done():
			return notTaken(last)
		case <-time.After(50 * time.Millisecond):
		}
	}
}
