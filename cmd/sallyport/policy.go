package main

import (
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"os"
	"strings"
	"text/tabwriter"
	"time"

	"github.com/spf13/cobra"

	"github.com/sallyport/sallyport/authz"
)

// policyCommand gives `sallyport policy`.
func policyCommand() *cobra.Command {
	c := &cobra.Command{
		Use:   "policy",
		Short: "Explain and print the access policy",
		Args:  usageArgs(cobra.NoArgs),
		RunE:  func(*cobra.Command, []string) error { return usageError(errors.New("policy: say eval or show")) },
	}
	c.AddCommand(policyEvalCommand(), policyShowCommand())
	return c
}

// policyShowCommand gives `sallyport policy show`.
func policyShowCommand() *cobra.Command {
	return &cobra.Command{
		Use:   "show [MODULE]",
		Short: "Print a module of the default policy, or list them",
		Args:  usageArgs(cobra.MaximumNArgs(1)),
		RunE: func(c *cobra.Command, args []string) error {
			_, names, err := authz.DefaultPolicy("")
			if err != nil {
				return err
			}
			if len(args) == 0 {
				_, err := fmt.Fprintln(c.OutOrStdout(), strings.Join(names, "\n"))
				return err
			}
			text, _, err := authz.DefaultPolicy(args[0])
			if err != nil {
				return err
			}
			if text == nil {
				return usageError(fmt.Errorf("no module %s; there is: %s", args[0], strings.Join(names, ", ")))
			}
			_, err = c.OutOrStdout().Write(text)
			return err
		},
	}
}

// policyEvalCommand gives `sallyport policy eval`.
func policyEvalCommand() *cobra.Command {
	var cfg authz.Config
	var login, from, key, at, output string
	c := &cobra.Command{
		Use:   "eval --data DIR --user USER[+CHOICE] --key FILE",
		Short: "Say what a login would get, by which rule, and why",
		Long: `Say what a login would get, by which rule, and why. It reads the policy and data on disk, and asks no gate.

Exit status: 0 admitted, 1 refused or no decision, 2 wrong usage.`,
		Example: `  sallyport policy eval --data /etc/sallyport/data --user alice --from 192.0.2.7 --key alice.pub
  sallyport policy eval --data demo/data --user alice+OPS-4711 --key SHA256:... --output json`,
		Args: usageArgs(cobra.NoArgs),
		RunE: func(c *cobra.Command, _ []string) error {
			user, choice, err := authz.ParseUser(login)
			if err != nil {
				return usageError(fmt.Errorf("--user: %w", err))
			}
			if output != "text" && output != "json" {
				return usageError(errors.New("--output: text or json"))
			}
			now := time.Now()
			if at != "" {
				if now, err = time.Parse(time.RFC3339, at); err != nil {
					return usageError(fmt.Errorf("--at: %q is no RFC 3339 time", at))
				}
			}
			log := slog.New(slog.NewTextHandler(c.ErrOrStderr(), &slog.HandlerOptions{Level: slog.LevelError}))
			engine, err := authz.Load(cfg, log)
			if err != nil {
				return err
			}
			k, err := readKey(engine, user, key)
			if err != nil {
				return err
			}
			in := authz.LoginInput{User: user, Choice: choice, Source: from, Key: k, ClientVersion: "SSH-2.0-sallyport",
				Gate: "policy-eval"}
			var x authz.Explanation
			answer, _, err := authz.Choose(in, func(in authz.LoginInput) (authz.Login, error) {
				x, err = engine.Explain(c.Context(), in, now)
				return x.Login, err
			})
			x.Login = answer
			if err != nil {
				return err
			}
			if output == "json" {
				enc := json.NewEncoder(c.OutOrStdout())
				enc.SetIndent("", "  ")
				err = enc.Encode(x)
			} else {
				err = printExplanation(c.OutOrStdout(), x)
			}
			if err != nil {
				return err
			}
			if !x.Login.Allow {
				return &exitError{code: 1}
			}
			return nil
		},
	}
	f := c.Flags()
	f.StringVar(&cfg.Data, "data", "", "directory of users, profiles and grants")
	f.StringVar(&cfg.Policy, "policy", "", "directory of own Rego modules")
	f.StringVar(&login, "user", "", "user name, as ssh gives it: alice or alice+CHOICE")
	f.StringVar(&from, "from", "127.0.0.1", "client's IP address")
	f.StringVar(&key, "key", "", "the user's .pub file, or a fingerprint SHA256:... of a key in the data")
	f.StringVar(&at, "at", "", "decide as of this time (RFC 3339) instead of now")
	f.StringVarP(&output, "output", "o", "text", "text or json")
	usageChecks(c)
	for _, name := range []string{"data", "user", "key"} {
		_ = c.MarkFlagRequired(name) // the flags exist
	}
	return c
}

// readKey takes a key from a .pub file, or from the data by its fingerprint.
func readKey(engine *authz.Engine, user, from string) (authz.Key, error) {
	if strings.HasPrefix(from, "SHA256:") {
		for _, k := range engine.Keys(user) {
			if k.Fingerprint == from {
				return k, nil
			}
		}
		// Not an error: this is what the gate would see of a key that isn't in the data.
		return authz.Key{Fingerprint: from}, nil
	}
	f, err := os.Open(from)
	if err != nil {
		return authz.Key{}, fmt.Errorf("--key: %w", err)
	}
	defer f.Close()
	text, err := io.ReadAll(io.LimitReader(f, 64<<10))
	if err != nil {
		return authz.Key{}, fmt.Errorf("--key: %w", err)
	}
	k, err := authz.ParseKey(strings.TrimRight(string(text), "\r\n"))
	if err != nil {
		return authz.Key{}, fmt.Errorf("--key: %s: %w", from, err)
	}
	return k, nil
}

func printExplanation(w io.Writer, x authz.Explanation) error {
	t := tabwriter.NewWriter(w, 0, 8, 2, ' ', 0)
	row := func(name, value string) {
		if value != "" {
			fmt.Fprintf(t, "%s\t%s\n", name, authz.Printable(value, 400))
		}
	}
	l := x.Login
	row("answer", map[bool]string{true: "admitted", false: "refused"}[l.Allow])
	row("rule", l.Rule)
	row("reason", l.Reason)
	known := "does not stand in the data: it is never proven"
	if x.Offer {
		known = "stands in the data"
	}
	row("key", known)
	if l.Allow {
		row("ticket", l.Ticket)
		row("profile", l.Profile)
		row("until", l.NotAfter.Format(time.RFC3339))
		row("why", l.Why)
		row("approved by", l.Approved)
		row("groups", strings.Join(l.Groups, " "))
		for name, v := range map[string]any{"sandbox": l.Sandbox, "permit": l.Permit} {
			text, err := json.Marshal(v)
			if err != nil {
				return err
			}
			row(name, string(text))
		}
	}
	row("revision", l.Revision)
	if len(x.Considered) > 0 {
		fmt.Fprintln(t, "\nTICKET\tPROFILE\tFROM\tSTATUS")
		for _, g := range x.Considered {
			fmt.Fprintf(t, "%s\t%s\t%s\t%s\n", authz.Printable(g.Ticket, 64), authz.Printable(g.Profile, 64),
				authz.Printable(g.From, 80), authz.Printable(g.Status, 40))
		}
	}
	return t.Flush()
}
