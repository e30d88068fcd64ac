package main

import (
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"github.com/spf13/cobra"
)

// Every command explains itself, with an example that its own flags accept.
func TestHelp(t *testing.T) {
	var walk func(c *cobra.Command)
	walk = func(c *cobra.Command) {
		switch c.Name() {
		case "help", "version", "completion", "bash", "zsh", "fish", "powershell":
		default:
			if c.Short == "" || c.Long == "" || c.Example == "" {
				t.Errorf("%s: no help, or no example", c.CommandPath())
			}
		}
		for l := range strings.Lines(c.Example) {
			fields := strings.Fields(l)
			if len(fields) < 2 || fields[0] != "sallyport-audit" {
				continue
			}
			found, rest, err := new(tool).command().Find(fields[1:])
			if err != nil {
				t.Errorf("%s: %q: %v", c.CommandPath(), l, err)
				continue
			}
			for _, word := range rest {
				name, _, _ := strings.Cut(strings.TrimLeft(word, "-"), "=")
				if strings.HasPrefix(word, "--") && found.Flags().Lookup(name) == nil && found.InheritedFlags().Lookup(name) == nil {
					t.Errorf("%s: %q: no flag %s", c.CommandPath(), l, word)
				}
			}
		}
		for _, sub := range c.Commands() {
			walk(sub)
		}
	}
	walk(new(tool).command())
}

func TestCompletion(t *testing.T) {
	for _, shell := range []string{"bash", "zsh", "fish", "powershell"} {
		if out, errs, code := audit(t, "completion", shell); code != 0 || !strings.Contains(out, "sallyport-audit") {
			t.Errorf("%s: code %d %s", shell, code, errs)
		}
	}
	for _, c := range []struct{ args, want string }{
		{"show sample", "sample-0-zstd\nsample-1-s2\nsample-2-none\n"}, {"show l", "latest\n"}, {"export --format asc", "asciicast-v3"}, {"list --output ", "json"}, {"report x y", ":4"},
	} {
		args := strings.Split(c.args, " ")
		out, _, code := audit(t, append([]string{"__complete", "--store", sample}, args...)...)
		if code != 0 || !strings.Contains(out, c.want) {
			t.Errorf("%s: code %d %q, want %q", c.args, code, out, c.want)
		}
	}
}

// The archives have the completion for each shell that there is one for.
func TestReleasedCompletions(t *testing.T) {
	script, err := os.ReadFile("../../build/release")
	if err != nil {
		t.Fatal(err)
	}
	_, loop, ok := strings.Cut(string(script), "for shell in ")
	line, _, _ := strings.Cut(loop, ";")
	released := strings.Fields(line)
	root := new(tool).command()
	root.InitDefaultCompletionCmd()
	c, _, err := root.Find([]string{"completion"})
	if err != nil || !ok || len(c.Commands()) < 4 {
		t.Fatal(err, ok, len(c.Commands()))
	}
	for _, sub := range c.Commands() {
		if !slices.Contains(released, sub.Name()) {
			t.Errorf("%s is in no archive, which have %v", sub.Name(), released)
		}
	}
}

func TestManPages(t *testing.T) {
	dir := filepath.Join(t.TempDir(), "man1")
	if _, errs, code := audit(t, "man", dir); code != 0 {
		t.Fatal(errs)
	}
	b, err := os.ReadFile(filepath.Join(dir, "sallyport-audit-search.1"))
	if err != nil {
		t.Fatal(err)
	}
	for _, want := range []string{".TH SALLYPORT\\-AUDIT\\-SEARCH 1", ".SH NAME\nsallyport\\-audit\\-search \\- find text", ".B \\-I, \\-\\-ignore\\-case\n", ".SH EXAMPLES", "sallyport\\-audit(1)"} {
		if !strings.Contains(string(b), want) {
			t.Errorf("no %q in\n%s", want, b)
		}
	}
	pages, err := filepath.Glob(filepath.Join(dir, "*.1"))
	if err != nil || len(pages) < 15 {
		t.Errorf("%d pages, %v", len(pages), err)
	}
	man, err := exec.LookPath("groff")
	if err != nil {
		if os.Getenv("SALLYPORT_REQUIRE_CLIENTS") != "" {
			t.Fatal("no groff: install groff-base")
		}
		t.Skip("no groff: what it says of the pages can't be asked")
	}
	for _, p := range pages {
		if out, err := exec.Command(man, "-man", "-ww", "-z", p).CombinedOutput(); err != nil || len(out) > 0 {
			t.Errorf("%s: %v %s", p, err, out)
		}
	}
}
