package main

import (
	"fmt"
	"os"
	"path/filepath"
	"strings"

	"github.com/spf13/cobra"
	"github.com/spf13/pflag"
)

func (t *tool) manCommand() *cobra.Command {
	return &cobra.Command{
		Use: "man DIR", Short: "Write the man pages into a directory", Args: cobra.ExactArgs(1),
		Long: `Write the man pages, one for each command, into a directory, which is made if it is not there.`,
		Example: `  sallyport-audit man ~/.local/share/man/man1
  man sallyport-audit-search`,
		RunE: func(c *cobra.Command, args []string) error {
			if err := os.MkdirAll(args[0], 0o755); err != nil {
				return err
			}
			return manPages(c.Root(), args[0])
		},
	}
}

// manPages writes the page of a command, and those below it.
func manPages(c *cobra.Command, dir string) error {
	c.InitDefaultHelpFlag()
	name := strings.ReplaceAll(c.CommandPath(), " ", "-")
	if err := os.WriteFile(filepath.Join(dir, name+".1"), []byte(manPage(c, name)), 0o644); err != nil {
		return err
	}
	for _, sub := range c.Commands() {
		if sub.IsAvailableCommand() {
			if err := manPages(sub, dir); err != nil {
				return err
			}
		}
	}
	return nil
}

// manPage is a page in the language of man(7). It has no date: the same version gives the same bytes.
func manPage(c *cobra.Command, name string) string {
	var b strings.Builder
	line := func(format string, args ...any) { fmt.Fprintf(&b, format+"\n", args...) }
	line(`.TH %s 1 "" "sallyport-audit %s" "Sallyport"`, roff(strings.ToUpper(name)), roff(toolVersion()))
	line(".SH NAME\n%s \\- %s", roff(name), roff(lowerFirst(c.Short)))
	line(".SH SYNOPSIS\n.B %s", roff(c.UseLine()))
	line(".SH DESCRIPTION")
	text := c.Long
	if text == "" {
		text = c.Short + "."
	}
	preformatted := false
	for l := range strings.SplitSeq(text, "\n") {
		if indented := strings.HasPrefix(l, "  "); indented != preformatted {
			line(map[bool]string{true: ".nf", false: ".fi"}[indented])
			preformatted = indented
		}
		if l == "" {
			l = ".PP"
		} else {
			l = roff(l)
		}
		line("%s", l)
	}
	if preformatted {
		line(".fi")
	}
	flags(line, "OPTIONS", c.NonInheritedFlags())
	flags(line, "OPTIONS OF ALL COMMANDS", c.InheritedFlags())
	if c.Example != "" {
		line(".SH EXAMPLES\n.nf\n%s\n.fi", roff(c.Example))
	}
	var also []string
	if c.HasParent() {
		also = append(also, strings.ReplaceAll(c.Parent().CommandPath(), " ", "-"))
	}
	for _, sub := range c.Commands() {
		if sub.IsAvailableCommand() {
			also = append(also, strings.ReplaceAll(sub.CommandPath(), " ", "-"))
		}
	}
	for i := range also {
		also[i] = roff(also[i]) + "(1)"
	}
	line(".SH SEE ALSO\n%s", strings.Join(also, ", "))
	return b.String()
}

func flags(line func(string, ...any), title string, set *pflag.FlagSet) {
	if !set.HasAvailableFlags() {
		return
	}
	line(".SH %s", title)
	set.VisitAll(func(f *pflag.Flag) {
		if f.Hidden {
			return
		}
		name, usage := pflag.UnquoteUsage(f)
		head := "--" + f.Name
		if f.Shorthand != "" {
			head = "-" + f.Shorthand + ", " + head
		}
		if name != "" {
			head += " " + name
		}
		switch f.DefValue {
		case "", "false", "[]", "0", "0s":
		default:
			usage += " (default " + f.DefValue + ")"
		}
		line(".TP\n.B %s\n%s", roff(head), roff(usage))
	})
}

// roff escapes text: backslashes, hyphens that are to be copied, and lines that would be requests.
func roff(s string) string {
	s = strings.NewReplacer(`\`, `\e`, "-", `\-`).Replace(s)
	lines := strings.Split(s, "\n")
	for i, l := range lines {
		if strings.HasPrefix(l, ".") || strings.HasPrefix(l, "'") {
			lines[i] = `\&` + l
		}
	}
	return strings.Join(lines, "\n")
}

func lowerFirst(s string) string { return strings.ToLower(s[:1]) + s[1:] }
