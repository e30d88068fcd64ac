package authz

import (
	"errors"
	"regexp"
	"strings"
	"unicode"
	"unicode/utf8"
)

var (
	userName    = regexp.MustCompile(`^[a-z_][a-z0-9._-]{0,63}$`)
	profileName = regexp.MustCompile(`^[A-Za-z0-9][A-Za-z0-9._-]{0,63}$`)
	ticketName  = regexp.MustCompile(`^[A-Za-z0-9][A-Za-z0-9._/-]{0,63}$`)
)

// The errors of ParseUser. Their texts may be shown to the client.
var (
	ErrUserName = errors.New("a user name is a letter a-z or _, then at most 63 of a-z, 0-9, '.', '_' and '-'")
	ErrChoice   = errors.New("what follows '+' is a profile's name or a ticket: a letter or digit, then at most 63 of " +
		"A-Z, a-z, 0-9, '.', '_', '-' and '/'")
)

// ParseUser splits an SSH user name (RFC 4252, section 5) at its first '+' into the user and what the user chose: a
// profile's name or a ticket, which the name of a target may follow after a '/' (Choose), empty when there is no '+'. The
// errors are ErrUserName and ErrChoice.
func ParseUser(login string) (user, choice string, err error) {
	user, choice, chosen := strings.Cut(login, "+")
	if !userName.MatchString(user) {
		return "", "", ErrUserName
	}
	if _, _, picks := cutPick(choice); chosen && !picks && !ticketName.MatchString(choice) {
		return "", "", ErrChoice
	}
	return user, choice, nil
}

// ValidTicket says whether s can be the name of a grant.
func ValidTicket(s string) bool { return ticketName.MatchString(s) }

// ValidProfile says whether s can be the name of a profile.
func ValidProfile(s string) bool { return profileName.MatchString(s) }

// Printable makes a text from data safe to print to a terminal or a log, on one line of at most limit characters:
// white space becomes a space; control characters, bidirectional and other invisible formatting and invalid UTF-8 are
// removed. A text that is too long ends in "...".
func Printable(s string, limit int) string {
	if limit <= 0 {
		return ""
	}
	var out []rune
	for len(s) > 0 {
		r, size := utf8.DecodeRuneInString(s)
		s = s[size:]
		switch {
		case r == utf8.RuneError && size == 1:
			continue
		case unicode.IsSpace(r):
			r = ' '
		case !unicode.IsPrint(r), unicode.Is(unicode.Other_Default_Ignorable_Code_Point, r),
			unicode.Is(unicode.Variation_Selector, r):
			continue
		}
		if len(out) == limit {
			for i := max(0, limit-3); i < limit; i++ {
				out[i] = '.'
			}
			break
		}
		out = append(out, r)
	}
	return string(out)
}
