package authz

import (
	"strings"
	"testing"
	"unicode"
	"unicode/utf8"
)

func TestParseUser(t *testing.T) {
	long := strings.Repeat("a", 64)
	for _, c := range []struct {
		login, user, choice string
		err                 error
	}{
		{"alice", "alice", "", nil},
		{"_svc.a-b_9", "_svc.a-b_9", "", nil},
		{long, long, "", nil},
		{long + "+" + long, long, long, nil},
		{"alice+payments-debug", "alice", "payments-debug", nil},
		{"alice+OPS-4711", "alice", "OPS-4711", nil},
		{"alice+team/OPS.1_2", "alice", "team/OPS.1_2", nil},
		{"alice+payments-debug/payments-7f9c", "alice", "payments-debug/payments-7f9c", nil},
		{"alice+" + long + "/" + strings.Repeat("p", 253), "alice", long + "/" + strings.Repeat("p", 253), nil},
		{"alice+team/OPS-1/web_1.x", "alice", "team/OPS-1/web_1.x", nil},
		{"alice+" + long + "/" + strings.Repeat("p", 254), "", "", ErrChoice},
		{"alice+" + long + "/-p", "", "", ErrChoice},
		{"alice+" + long + "/..", "", "", ErrChoice},
		{"alice+" + long + "/p/../../x", "", "", ErrChoice},
		{"alice+x/p%2e", "", "", ErrChoice},
		{"alice+x/p\n", "", "", ErrChoice},
		{"", "", "", ErrUserName},
		{"+x", "", "", ErrUserName},
		{"Alice", "", "", ErrUserName},
		{"9a", "", "", ErrUserName},
		{"-a", "", "", ErrUserName},
		{".a", "", "", ErrUserName},
		{"a b", "", "", ErrUserName},
		{"alice\n", "", "", ErrUserName},
		{"alice\x00", "", "", ErrUserName},
		{"älice", "", "", ErrUserName},
		{"../etc", "", "", ErrUserName},
		{"alice@gate", "", "", ErrUserName},
		{long + "a", "", "", ErrUserName},
		{"alice+", "", "", ErrChoice},
		{"alice++x", "", "", ErrChoice},
		{"alice+x+y", "", "", ErrChoice},
		{"alice+x y", "", "", ErrChoice},
		{"alice+x\n", "", "", ErrChoice},
		{"alice+-x", "", "", ErrChoice},
		{"alice+" + long + "a", "", "", ErrChoice},
	} {
		user, choice, err := ParseUser(c.login)
		if user != c.user || choice != c.choice || err != c.err {
			t.Errorf("%q: %q %q %v", c.login, user, choice, err)
		}
	}
}

func TestPrintable(t *testing.T) {
	for _, c := range []struct {
		in    string
		limit int
		want  string
	}{
		{"plain ünï 日本 🙂", 100, "plain ünï 日本 🙂"},
		{"a\x1b[31mred\x1b]0;title\x07", 100, "a[31mred]0;title"},
		{"a\u009b31mb", 100, "a31mb"},
		{"one\r\ntwo\tthree\u2028four\u00a0five", 100, "one  two three four five"},
		{"a\u202egnp.exe\u2066\u200f\u061c", 100, "agnp.exe"},
		{"zero\u200b\u200d\ufeff\u00ad\u3164\u115f\ufe0f", 100, "zero"},
		{"tag\U000e0041", 100, "tag"},
		{"bad\xff\xfeutf8\xed\xa0\x80", 100, "badutf8"},
		{"\x00\x7f\x08", 100, ""},
		{"abcdefgh", 8, "abcdefgh"},
		{"abcdefghi", 8, "abcde..."},
		{"abc", 2, ".."},
		{"日本日本日", 4, "日..."},
		{"abc", 0, ""},
		{"abc", -1, ""},
		{"abc\x1b\x1b", 3, "abc"},
	} {
		if got := Printable(c.in, c.limit); got != c.want {
			t.Errorf("%q: %q, want %q", c.in, got, c.want)
		}
	}
}

func FuzzPrintable(f *testing.F) {
	f.Add("a\x1b[31m\u202e", 5)
	f.Fuzz(func(t *testing.T, s string, limit int) {
		got := Printable(s, limit)
		if !utf8.ValidString(got) || utf8.RuneCountInString(got) > max(limit, 0) {
			t.Fatalf("%q", got)
		}
		for _, r := range got {
			if !unicode.IsPrint(r) || unicode.Is(unicode.Cf, r) {
				t.Fatalf("%q holds %U", got, r)
			}
		}
	})
}

func TestParseKey(t *testing.T) {
	const ed = "ssh-ed25519 AAAAC3NzaC1lZDI1NTE5AAAAIIDgyR6ZfIDgm5aXwHYAiJ3UGJXbSvQeVnFSlMmdnwpC"
	key, err := ParseKey(" \t" + ed + " \t a comment with ssh-rsa in it")
	if err != nil {
		t.Fatal(err)
	}
	if key.Type != "ssh-ed25519" || key.Line != ed || !strings.HasPrefix(key.Fingerprint, "SHA256:") ||
		len(key.Fingerprint) != 50 {
		t.Errorf("%+v", key)
	}
	blob := strings.Fields(ed)[1]
	for line, want := range map[string]string{
		"":                "empty",
		"  \t":            "empty",
		"# comment":       "no supported key type",
		"ssh-ed25519":     "missing",
		"ssh-dss " + blob: "no supported key type",
		"ssh-ed25519-cert-v01@openssh.com " + blob: "no supported key type",
		"no-pty " + ed:                                   "options",
		`command="echo hi",no-pty ` + ed:                 "options",
		"ssh-rsa " + blob:                                `of type "ssh-ed25519", the line says "ssh-rsa"`,
		"ssh-ed25519 " + blob[:40]:                       "cut off",
		"ssh-ed25519 " + blob[:41]:                       "not base64",
		"ssh-ed25519 AAAA":                               "cut off",
		"ssh-ed25519 /////w==":                           "cut off",
		"ssh-ed25519 " + blob + "AAAA":                   "more after",
		"ssh-ed25519 " + blob + "\n" + ed:                "one line",
		"ssh-ed25519 " + strings.Repeat("A", maxKeyLine): "longer",
	} {
		if _, err := ParseKey(line); err == nil || !strings.Contains(err.Error(), want) {
			t.Errorf("%.60q: %v, want %s", line, err, want)
		}
	}
}

func FuzzParseKey(f *testing.F) {
	f.Add(aliceKey + " comment")
	f.Add("no-pty " + aliceKey)
	f.Fuzz(func(t *testing.T, line string) {
		key, err := ParseKey(line)
		if err != nil {
			return
		}
		again, err := ParseKey(key.Line)
		if err != nil || again != key {
			t.Fatalf("%+v %+v %v", key, again, err)
		}
		if strings.Fields(line)[0] != key.Type || strings.Count(key.Line, " ") != 1 {
			t.Fatalf("%+v", key)
		}
	})
}
