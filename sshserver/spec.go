package sshserver

import (
	"fmt"
	"math"
	"strconv"
	"strings"
	"time"

	"github.com/sallyport/sallyport/authz"
	"github.com/sallyport/sallyport/backends"
)

// forwardFull is the permit.forward_content that keeps what is forwarded.
const forwardFull = "full"

// defaultID is the user and group of a profile that names none.
const defaultID = 1000

// specOf turns a decision into a sandbox. It is the only place that does. Errors name the profile's field.
func specOf(gate, session, user string, d authz.Login) (backends.Spec, error) {
	p := d.Sandbox
	t := backends.Template{
		Image: p.Image, PullPolicy: p.PullPolicy, UID: defaultID, GID: defaultID, Groups: p.Groups, Hostname: p.Hostname,
		Home: p.Home, Env: p.Env, Network: p.Network, CPUs: p.CPUs, PIDs: p.PIDs, Scratch: p.Scratch, Caps: p.Caps,
		Runtime: p.Runtime, ExtraHosts: p.ExtraHosts, Namespace: p.Namespace, Nodes: p.Nodes, Priority: p.Priority,
		Spread: p.Spread, Pod: p.Pod,
	}
	if p.Image == "" {
		return backends.Spec{}, fmt.Errorf("profile %s: image is missing", d.Profile)
	}
	if p.User != "" {
		var err error
		if t.UID, t.GID, err = parseUser(p.User); err != nil {
			return backends.Spec{}, fmt.Errorf("profile %s: user: %w", d.Profile, err)
		}
	}
	for _, s := range []struct {
		name string
		from string
		to   *int64
	}{{"memory", p.Memory, &t.Memory}, {"tmp_size", p.TmpSize, &t.TmpSize}, {"home_size", p.HomeSize, &t.HomeSize}} {
		if s.from == "" {
			continue
		}
		n, err := parseSize(s.from)
		if err != nil {
			return backends.Spec{}, fmt.Errorf("profile %s: %s: %w", d.Profile, s.name, err)
		}
		*s.to = n
	}
	if p.CPUs < 0 || math.IsNaN(p.CPUs) || math.IsInf(p.CPUs, 0) || p.PIDs < 0 {
		return backends.Spec{}, fmt.Errorf("profile %s: cpus and pids can't be negative", d.Profile)
	}
	for name, v := range map[string]string{"max_duration": d.Permit.MaxDuration, "idle_timeout": d.Permit.IdleTimeout} {
		if v == "" {
			continue
		}
		if t, err := time.ParseDuration(v); err != nil || t <= 0 {
			return backends.Spec{}, fmt.Errorf("profile %s: permit.%s: %q is no duration such as 1h30m", d.Profile, name, v)
		}
	}
	switch d.Permit.Input {
	case "", inputNoPasswords, inputAll, inputNone:
	default:
		return backends.Spec{}, fmt.Errorf("profile %s: permit.input: %q is none of no-passwords, all, none", d.Profile, d.Permit.Input)
	}
	switch d.Permit.ForwardContent {
	case "", "none", forwardFull:
	default:
		return backends.Spec{}, fmt.Errorf("profile %s: permit.forward_content: %q is none of none, full", d.Profile, d.Permit.ForwardContent)
	}
	if _, err := readTransferRules(d.Permit.Transfer); err != nil {
		return backends.Spec{}, fmt.Errorf("profile %s: permit.transfer.%w", d.Profile, err)
	}
	if d.Permit.DataLimit != "" {
		if _, err := parseSize(d.Permit.DataLimit); err != nil {
			return backends.Spec{}, fmt.Errorf("profile %s: permit.data_limit: %w", d.Profile, err)
		}
	}
	if target := p.Target; target != nil {
		permit := d.Permit.Target
		if permit == nil || !permit.Network || permit.Files && !permit.Processes {
			return backends.Spec{}, fmt.Errorf("profile %s: permit.target: network is off, or files is on without processes", d.Profile)
		}
		t.Target = &backends.Target{
			Namespace: target.Namespace, Labels: target.Labels, Workload: target.Workload, Name: target.Name, Container: target.Container,
			Processes: permit.Processes, Files: permit.Files,
		}
	}
	var err error
	if t.ExecAudit, err = execAuditOf(p); err != nil {
		return backends.Spec{}, fmt.Errorf("profile %s: %w", d.Profile, err)
	}
	for _, m := range p.Mounts {
		t.Mounts = append(t.Mounts, backends.Mount{Type: m.Type, Source: m.Source, Target: m.Target, Write: m.Write})
	}
	return backends.Spec{Template: t, Owner: backends.Owner{
		Gate: gate, Session: session, User: user, Profile: d.Profile, Grant: d.Ticket, Expires: d.NotAfter,
	}}, nil
}

// execAuditOf reads how executed programs are to be reported.
func execAuditOf(p authz.Sandbox) (backends.ExecAudit, error) {
	a := backends.ExecAudit{Mode: p.ExecAudit, Strict: p.ExecStrict}
	switch a.Mode {
	case "":
		a.Mode = backends.ExecAuditPreferred
	case backends.ExecAuditRequired, backends.ExecAuditPreferred, backends.ExecAuditOff:
	default:
		return a, fmt.Errorf("exec_audit: %q is none of required, preferred, off", p.ExecAudit)
	}
	if p.ExecStuckLimit != "" {
		var err error
		if a.StuckLimit, err = time.ParseDuration(p.ExecStuckLimit); err != nil || a.StuckLimit <= 0 {
			return a, fmt.Errorf("exec_stuck_limit: %q is no duration such as 30s", p.ExecStuckLimit)
		}
	}
	return a, nil
}

// parseUser reads "uid:gid" or "uid", whose group is then the same number.
func parseUser(s string) (uid, gid uint32, err error) {
	u, g, both := strings.Cut(s, ":")
	if !both {
		g = u
	}
	for _, p := range []struct {
		from string
		to   *uint32
	}{{u, &uid}, {g, &gid}} {
		n, err := strconv.ParseUint(p.from, 10, 31)
		if err != nil {
			return 0, 0, fmt.Errorf("%q is not uid:gid in numbers", s)
		}
		*p.to = uint32(n)
	}
	return uid, gid, nil
}

// dataLimit is how many bytes of a stream are kept as data; 0: all. specOf has checked it.
func dataLimit(p authz.Permit) uint64 {
	if p.DataLimit == "" {
		return 0
	}
	n, err := parseSize(p.DataLimit)
	if err != nil {
		return 0 // more is kept than was asked for, not less
	}
	return uint64(n)
}

// parseSize reads a size as Kubernetes writes it: 512Mi, 2Gi, 500M, or bytes.
func parseSize(s string) (int64, error) {
	units := []struct {
		suffix string
		bytes  float64
	}{
		{"Ki", 1 << 10}, {"Mi", 1 << 20}, {"Gi", 1 << 30}, {"Ti", 1 << 40},
		{"k", 1e3}, {"M", 1e6}, {"G", 1e9}, {"T", 1e12}, {"", 1},
	}
	for _, u := range units {
		num, ok := strings.CutSuffix(s, u.suffix)
		if !ok {
			continue
		}
		n, err := strconv.ParseFloat(num, 64)
		if err != nil || !(n > 0 && n*u.bytes < 1<<62) {
			break
		}
		return int64(n * u.bytes), nil
	}
	return 0, fmt.Errorf("%q is no size such as 512Mi or 2Gi", s)
}
