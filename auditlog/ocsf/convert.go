package ocsf

import (
	"cmp"
	"encoding/hex"
	"fmt"
	"net"
	"net/netip"
	"path"
	"strconv"
	"strings"
	"time"

	"github.com/sallyport/sallyport/auditlog"
)

// maxText bounds a text of an event; collectors refuse long ones.
const maxText = 8 << 10

// Converter makes events of one log's records. They come in the log's order.
type Converter struct {
	id      string
	start   time.Time
	product Product
	src     *Endpoint
	dst     *Endpoint
	client  string // version string
	user    *User
	session *Session
	device  *Device
	proven  bool
	in, out uint64
}

// NewConverter makes one for the log of an ID.
func NewConverter(id string) *Converter {
	return &Converter{id: id, product: Product{Name: "Sallyport", VendorName: "Sallyport"}, session: &Session{UID: id, IsRemote: true}}
}

// class names a class and its category.
type class struct {
	name         string
	category     int
	categoryName string
	activities   map[int]string
}

var network = map[int]string{1: "Open", 2: "Close", 4: "Fail", 5: "Refuse", 6: "Traffic", 7: "Listen"}

var classes = map[int]class{
	FileSystemActivity: {"File System Activity", 1, "System Activity", map[int]string{1: "Create", 2: "Read", 3: "Update", 4: "Delete", 5: "Rename", 6: "Set Attributes"}},
	ProcessActivity:    {"Process Activity", 1, "System Activity", map[int]string{1: "Launch", 2: "Terminate"}},
	Authentication:     {"Authentication", 3, "Identity & Access Management", map[int]string{1: "Logon", 2: "Logoff", 6: "Preauth"}},
	NetworkActivity:    {"Network Activity", 4, "Network Activity", network},
	SSHActivity:        {"SSH Activity", 4, "Network Activity", network},
	TunnelActivity:     {"Tunnel Activity", 4, "Network Activity", map[int]string{1: "Open", 2: "Close"}},
	FileHosting:        {"File Hosting Activity", 6, "Application Activity", map[int]string{1: "Upload", 2: "Download", 3: "Update", 6: "Copy"}},
}

var (
	severities = map[int]string{severityInformational: "Informational", severityMedium: "Medium", severityHigh: "High"}
	statuses   = map[int]string{statusUnknown: "Unknown", statusSuccess: "Success", statusFailure: "Failure"}
)

// event makes an event of a class; with the activity other, name says which.
func (c *Converter) event(rec auditlog.Record, uid, activity int, name string, status, severity int, format string, args ...any) *Event {
	cl := classes[uid]
	if activity != other {
		name = cl.activities[activity]
	}
	return &Event{ActivityID: activity, ActivityName: text(name), CategoryUID: cl.category, CategoryName: cl.categoryName, ClassUID: uid, ClassName: cl.name,
		TypeUID: uid*100 + activity, Time: millis(rec.Time), SeverityID: severity, Severity: severities[severity], StatusID: status, Status: statuses[status],
		Message: text(fmt.Sprintf(format, args...)),
		Metadata: Metadata{Version: Version, Product: c.product, UID: fmt.Sprintf("%s/%d", c.id, rec.Sequence), CorrelationUID: c.id, Sequence: rec.Sequence,
			LogName: "sallyport audit log", OriginalTime: rec.Time.UTC().Format(time.RFC3339Nano), EventCode: rec.Body.Kind().String()}}
}

// outcome is the status of what went well or did not, and its severity.
func outcome(ok bool) (status, severity int) {
	if ok {
		return statusSuccess, severityInformational
	}
	return statusFailure, severityMedium
}

// Add gives the events of the next record; most give none or one.
func (c *Converter) Add(rec auditlog.Record) []*Event {
	if c.start.IsZero() {
		c.start = rec.Time
		c.session.CreatedTime = millis(rec.Time)
	}
	switch b := rec.Body.(type) {
	case *auditlog.Connect:
		c.product.Version = text(b.Version)
		c.src, c.dst = endpoint(b.Source), endpoint(b.Local)
		if c.dst == nil {
			c.dst = &Endpoint{}
		}
		c.dst.Name, c.dst.SvcName = text(b.Gate), "ssh"
		return c.ssh(c.event(rec, SSHActivity, 1, "", statusSuccess, severityInformational, "connection from %s", b.Source))
	case *auditlog.Handshake:
		c.client = text(b.Client)
	case *auditlog.Authenticate:
		return c.authenticate(rec, b)
	case *auditlog.Decision:
		return c.decision(rec, b)
	case *auditlog.Sandbox:
		return c.sandbox(rec, b)
	case *auditlog.Request:
		return c.request(rec, b)
	case *auditlog.Data:
		if b.Stream == auditlog.Input {
			c.in += uint64(len(b.Data))
		} else {
			c.out += uint64(len(b.Data))
		}
	case *auditlog.ChannelOpen:
		return c.channelOpen(rec, b)
	case *auditlog.Forward:
		return c.forward(rec, b)
	case *auditlog.Transfer:
		return c.transfer(rec, b)
	case *auditlog.ProgramExec:
		return c.exec(rec, b)
	case *auditlog.ProgramStart:
		if b.Differ || b.Exec == 0 {
			return c.started(rec, b)
		}
	case *auditlog.ProgramEnd:
		return c.ended(rec, b)
	case *auditlog.ConnectOut:
		return c.connectOut(rec, b)
	case *auditlog.Unaudited:
		e := c.event(rec, ProcessActivity, 1, "", statusSuccess, severityHigh, "a process that came from outside, and is not reported: %s", words(b.Args))
		e.Process = &Process{PID: b.PID, CmdLine: words(b.Args), File: file(b.File, false), User: insideUser(b.UID)}
		return c.inside(e, nil)
	case *auditlog.Alert:
		return c.ssh(c.event(rec, SSHActivity, other, "alert", statusUnknown, severityHigh, "alert: %s: %s", b.Name, b.Detail))
	case *auditlog.Refused:
		e := c.event(rec, SSHActivity, 5, "", statusFailure, severityInformational, "%d connections from %s proved no key: %s", b.Count, b.Source, b.Reason)
		e.SrcEndpoint, e.Count, e.StartTime, e.EndTime = endpoint(b.Source), b.Count, millis(b.First), millis(b.Last)
		if e.SrcEndpoint == nil {
			e.SrcEndpoint = &Endpoint{Name: "unknown"}
		}
		e.ProtocolVersion = text(b.Client)
		return []*Event{e}
	case *auditlog.End:
		return c.end(rec, b)
	}
	return nil
}

// ssh completes an event about the connection.
func (c *Converter) ssh(e *Event) []*Event {
	e.SrcEndpoint, e.DstEndpoint, e.ProtocolVersion = c.source(), c.dst, c.client
	e.Connection = &Connection{DirectionID: 1, Direction: "Inbound", ProtocolName: "tcp", UID: c.id}
	if c.proven {
		e.AuthTypeID, e.AuthType = 6, "Public Key"
		c.host(e, &Actor{User: c.user, Session: c.session})
	}
	return []*Event{e}
}

// host adds who did it where, to an event whose class knows that by the profile "host" alone.
func (c *Converter) host(e *Event, a *Actor) {
	if a.User == nil && a.Process == nil {
		return
	}
	e.Metadata.Profiles = []string{"host"}
	e.Actor, e.Device = a, c.device
}

// source is the client's end; it is asked for where nothing is known of it too.
func (c *Converter) source() *Endpoint {
	if c.src == nil {
		return &Endpoint{Name: "unknown"}
	}
	return c.src
}

func (c *Converter) authenticate(rec auditlog.Record, b *auditlog.Authenticate) []*Event {
	activity, status := 1, statusFailure
	switch b.Result {
	case "proven":
		activity, status, c.proven = 6, statusSuccess, true // the decision is what logs on
		c.user = &User{Name: orUnknown(b.User), CredentialUID: text(b.Fingerprint)}
	case "accepted-offer":
		activity, status = 6, statusSuccess
	case "asked": // which methods there are
		activity, status = 6, statusUnknown
	}
	what := []string{b.Method, "of", orUnknown(b.User)}
	if b.Fingerprint != "" {
		what = append(what, "by", b.KeyType, b.Fingerprint)
	}
	e := c.event(rec, Authentication, activity, "", status, severityInformational, "%s: %s", strings.Join(what, " "), b.Result)
	e.User = &User{Name: orUnknown(b.User), CredentialUID: text(b.Fingerprint)}
	e.StatusDetail = text(b.Reason)
	return c.logon(e, b.Method)
}

// logon completes an event of Authentication.
func (c *Converter) logon(e *Event, method string) []*Event {
	e.SrcEndpoint, e.DstEndpoint, e.Session, e.IsRemote = c.source(), c.dst, c.session, true
	e.Service = &Service{Name: "sallyport"}
	e.LogonTypeID, e.LogonType = 3, "Network"
	if method != "" {
		e.AuthProtocolID, e.AuthProtocol = other, text("SSH "+method)
	}
	return []*Event{e}
}

func (c *Converter) decision(rec auditlog.Record, b *auditlog.Decision) []*Event {
	status, severity := outcome(b.Allow)
	word := "refused"
	if b.Allow {
		word = "allowed"
	}
	if c.user == nil {
		c.user = &User{}
	}
	user := *c.user // events that were given before keep theirs
	user.Name = orUnknown(b.User)
	for i, g := range b.Groups {
		if i == 0 {
			user.Groups = nil
		}
		user.Groups = append(user.Groups, Group{text(g)})
	}
	c.user = &user
	if !b.NotAfter.IsZero() {
		s := *c.session
		s.Expires = millis(b.NotAfter)
		c.session = &s
	}
	e := c.event(rec, Authentication, 1, "", status, severity, "policy %s %s under %s", word, b.User, b.Ticket)
	e.User, e.StatusDetail = c.user, text(b.Reason)
	e.Unmapped = map[string]any{"ticket": text(b.Ticket), "profile": text(b.Profile), "policy_revision": text(b.Revision), "decision": text(b.ID), "reason": text(b.Why), "approved_by": text(b.Approved)}
	return c.logon(e, "")
}

func (c *Converter) sandbox(rec auditlog.Record, b *auditlog.Sandbox) []*Event {
	if b.Error != "" {
		e := c.event(rec, SSHActivity, other, "sandbox", statusFailure, severityMedium, "the sandbox could not be started")
		e.StatusDetail = text(b.Error)
		return c.ssh(e)
	}
	c.device = &Device{TypeID: 6, Type: "Virtual", UID: text(b.ID), Name: text(b.Backend + " sandbox")}
	if b.Image != "" || b.Digest != "" {
		c.device.Image = &Image{UID: text(cmp.Or(b.Digest, b.Image)), Name: text(b.Image)}
	}
	e := c.event(rec, SSHActivity, other, "sandbox", statusSuccess, severityInformational, "sandbox %s of %s", b.ID, b.Image)
	e.Unmapped = map[string]any{"exec_audit": text(b.ExecAudit), "node": text(b.Node)}
	return c.ssh(e)
}

func (c *Converter) request(rec auditlog.Record, b *auditlog.Request) []*Event {
	what := text(string(b.Command))
	switch b.Type {
	case "exec":
	case "shell", "pty-req", "x11-req", "auth-agent-req@openssh.com":
		what = text(b.Term)
	case "subsystem", "tcpip-forward", "streamlocal-forward@openssh.com":
		what = text(b.Name)
	default:
		return nil // environment, sizes of windows, signals
	}
	status, severity := outcome(b.OK)
	e := c.event(rec, SSHActivity, other, b.Type, status, severity, "%s %s", b.Type, what)
	e.StatusDetail = text(b.Reason)
	e.Unmapped = map[string]any{"channel": rec.Channel}
	events := c.ssh(e)
	if target, ok := listens(b); ok && b.OK {
		e := c.tunnel(rec, b.Type, target, "", 1, true, "%s", strings.TrimSpace(b.Type+" "+target))
		e.Metadata.UID += second
		events = append(events, e)
	}
	return events
}

// second ends the UID of a record's second event: a collector may take two of the same UID for one.
const second = "/1"

// listens says whether a request makes a listener, whose end is a Forward, and where, as far as that is known by then.
func listens(b *auditlog.Request) (target string, ok bool) {
	switch b.Type {
	case "tcpip-forward", "streamlocal-forward@openssh.com":
		return cmp.Or(b.Value, b.Name), true
	case "x11-req", "auth-agent-req@openssh.com": // once a program is started
		return "", true
	}
	return "", false
}

func (c *Converter) end(rec auditlog.Record, b *auditlog.End) []*Event {
	e := c.event(rec, SSHActivity, 2, "", statusSuccess, severityInformational, "ended: %s", b.Cause)
	e.StatusDetail = text(b.Detail)
	e.Traffic = traffic(c.in, c.out)
	events := c.ssh(e)
	if c.proven {
		off := c.event(rec, Authentication, 2, "", statusSuccess, severityInformational, "%s logged off: %s", c.user.Name, b.Cause)
		off.User = c.user
		off.Metadata.UID += second
		events = append(events, c.logon(off, "")...)
	}
	return events
}

// tunnel makes an event about a forwarded connection.
func (c *Converter) tunnel(rec auditlog.Record, kind, target, originator string, activity int, ok bool, format string, args ...any) *Event {
	status, severity := outcome(ok)
	e := c.event(rec, TunnelActivity, activity, "", status, severity, format, args...)
	e.TunnelTypeID, e.TunnelType, e.Session, e.User, e.Device = other, text("SSH "+kind), c.session, c.user, c.device
	e.SrcEndpoint, e.DstEndpoint = c.source(), endpoint(target)
	e.Unmapped = map[string]any{"channel": rec.Channel, "originator": text(originator)}
	return e
}

func (c *Converter) channelOpen(rec auditlog.Record, b *auditlog.ChannelOpen) []*Event {
	if b.Type == "session" && b.Error == "" {
		return nil
	}
	if b.Target == "" {
		if b.Error == "" {
			return nil
		}
		e := c.event(rec, SSHActivity, other, "channel", statusFailure, severityMedium, "channel %s refused", b.Type)
		e.StatusDetail = text(b.Error)
		return c.ssh(e)
	}
	e := c.tunnel(rec, b.Type, b.Target, b.Originator, 1, b.Error == "", "%s to %s", b.Type, b.Target)
	e.StatusDetail = text(b.Error)
	return []*Event{e}
}

func (c *Converter) forward(rec auditlog.Record, b *auditlog.Forward) []*Event {
	e := c.tunnel(rec, b.Type, cmp.Or(b.Address, b.Target), b.Originator, 2, b.Result != "failed", "%s to %s %s", b.Type, b.Target, b.Result)
	e.StatusDetail = text(b.Detail)
	e.Traffic = traffic(b.Input, b.Output)
	return []*Event{e}
}

// transfer is File Hosting for what went in or out, File System for what changed inside.
func (c *Converter) transfer(rec auditlog.Record, b *auditlog.Transfer) []*Event {
	p := b.Path
	if len(b.Resolved) > 0 {
		p = b.Resolved
	}
	target := b.Target
	if len(b.TargetResolved) > 0 {
		target = b.TargetResolved
	}
	status, severity := outcome(b.Status == 0 && !b.Denied)
	if b.Unfinished {
		status = statusUnknown
	}
	class, activity := FileSystemActivity, other
	switch b.Op {
	case "file":
		class, activity = FileHosting, 2
		if b.Written != nil || b.Read == nil && b.Flags&2 != 0 {
			activity = 1
		}
		if b.Written != nil && b.Read != nil {
			activity = 3
		}
	case "copy":
		class, activity = FileHosting, 6
	case "remove", "rmdir":
		activity = 4
	case "rename":
		activity = 5
	case "mkdir", "symlink", "link":
		activity = 1
	case "setstat":
		activity = 6
	case "list":
		activity = 2
	}
	e := c.event(rec, class, activity, b.Op, status, severity, "%s %s of %s", b.Protocol, b.Op, p)
	e.StatusDetail = text(b.Message)
	if b.Denied {
		e.StatusDetail = text("denied by the gate: " + b.Message)
	}
	e.Actor = &Actor{User: c.user, Session: c.session}
	e.File = file(p, b.Op == "list" || b.Op == "mkdir" || b.Op == "rmdir")
	if len(target) > 0 {
		e.FileResult = file(target, false)
	}
	for _, f := range []*auditlog.TransferFlow{b.Read, b.Written} {
		if f == nil || b.Op != "file" {
			continue
		}
		e.File.Size = f.Bytes
		if n, ok := f.Length(); ok {
			e.File.Size = n
		}
		if f.Whole && len(f.SHA256) > 0 {
			e.File.Hashes = []Fingerprint{{AlgorithmID: 3, Algorithm: "SHA-256", Value: hex.EncodeToString(f.SHA256)}}
		}
	}
	e.Unmapped = map[string]any{"channel": rec.Channel, "protocol": text(b.Protocol), "operation": text(b.Op)}
	if class == FileHosting {
		e.SrcEndpoint, e.DstEndpoint = c.source(), c.dst
	} else {
		e.Device = c.sandboxDevice()
	}
	return []*Event{e}
}

// sandboxDevice is the sandbox, or what stands for it where the log has none.
func (c *Converter) sandboxDevice() *Device {
	if c.device == nil {
		return &Device{TypeID: 0, Type: "Unknown", Name: "sandbox of " + c.id}
	}
	return c.device
}

// inside completes an event about a process inside.
func (c *Converter) inside(e *Event, by *Process) []*Event {
	e.Device = c.sandboxDevice()
	e.Actor = &Actor{Process: by, User: c.user, Session: c.session}
	if e.Process != nil && e.Process.File != nil {
		e.Process.Name = e.Process.File.Name
	}
	if e.Unmapped == nil {
		e.Unmapped = map[string]any{}
	}
	e.Unmapped["reported_by"] = "the agent inside the sandbox"
	return []*Event{e}
}

func (c *Converter) exec(rec auditlog.Record, b *auditlog.ProgramExec) []*Event {
	if b.Again > 0 {
		return nil
	}
	e := c.event(rec, ProcessActivity, 1, "", statusUnknown, severityInformational, "%s", words(b.Args))
	e.LaunchTypeID, e.LaunchType = 3, "Exec"
	e.Process = &Process{PID: b.PID, CmdLine: words(b.Args), Dir: text(string(b.Dir)), Created: millis(b.Time), UID: strconv.FormatUint(b.Exec, 10), File: file(b.Path, false), User: insideUser(b.UID)}
	var parent *Process
	if b.Parent > 0 {
		parent = &Process{PID: b.Parent}
		e.Process.Parent = parent
	}
	e.StatusDetail = text(b.Error)
	e.Unmapped = map[string]any{"channel": rec.Channel}
	if len(b.Script) > 0 {
		e.Unmapped["script_sha256"] = hex.EncodeToString(b.Script)
	}
	return c.inside(e, parent)
}

func (c *Converter) started(rec auditlog.Record, b *auditlog.ProgramStart) []*Event {
	e := c.event(rec, ProcessActivity, 1, "", statusSuccess, severityMedium, "runs with other arguments than it was executed with: %s", words(b.Args))
	e.LaunchTypeID, e.LaunchType = 3, "Exec"
	e.Process = &Process{PID: b.PID, CmdLine: words(b.Args), Created: millis(b.Time), UID: strconv.FormatUint(b.Exec, 10), File: file(b.File, false)}
	return c.inside(e, nil)
}

func (c *Converter) ended(rec auditlog.Record, b *auditlog.ProgramEnd) []*Event {
	status, how := statusSuccess, fmt.Sprintf("code %d", b.Code)
	if b.Code != 0 || b.Signal != "" {
		status = statusFailure
	}
	code := int64(b.Code)
	if b.Signal != "" {
		how = "signal " + b.Signal
	}
	e := c.event(rec, ProcessActivity, 2, "", status, severityInformational, "process %d ended by %s", b.PID, how)
	e.StatusDetail, e.ExitCode = text(how), &code
	e.Process = &Process{PID: b.PID, UID: strconv.FormatUint(b.Exec, 10)}
	return c.inside(e, nil)
}

func (c *Converter) connectOut(rec auditlog.Record, b *auditlog.ConnectOut) []*Event {
	to := net.JoinHostPort(b.Address, strconv.Itoa(int(b.Port)))
	e := c.event(rec, NetworkActivity, 1, "", statusUnknown, severityInformational, "%s of %s to %s (claimed)", b.Call, b.Program, to)
	d := c.sandboxDevice()
	e.SrcEndpoint = &Endpoint{UID: d.UID, Name: d.Name}
	if b.Address != "" {
		e.DstEndpoint = endpoint(to)
	}
	e.StatusDetail = text(b.Error)
	if b.Again > 0 {
		e.Count = uint64(b.Again) + 1
	}
	e.Connection = &Connection{DirectionID: 2, Direction: "Outbound"}
	by := &Process{PID: b.PID, UID: strconv.FormatUint(b.Exec, 10), File: file(b.Program, false)}
	e.Unmapped = map[string]any{"channel": rec.Channel, "reported_by": "the agent inside the sandbox"}
	c.host(e, &Actor{Process: by, User: c.user, Session: c.session})
	return []*Event{e}
}

func traffic(in, out uint64) *Traffic { return &Traffic{Bytes: in + out, BytesIn: in, BytesOut: out} }

// endpoint reads an address with a port, without one, or a socket's path; nil if there is none.
func endpoint(s string) *Endpoint {
	if s == "" {
		return nil
	}
	if a, err := netip.ParseAddrPort(s); err == nil {
		return &Endpoint{IP: a.Addr().Unmap().WithZone("").String(), Port: int(a.Port())}
	}
	if a, err := netip.ParseAddr(s); err == nil {
		return &Endpoint{IP: a.Unmap().WithZone("").String()}
	}
	if host, port, err := net.SplitHostPort(s); err == nil {
		if n, err := strconv.ParseUint(port, 10, 16); err == nil && host != "" {
			return &Endpoint{Hostname: text(host), Port: int(n)}
		}
	}
	return &Endpoint{Name: text(s)}
}

// file describes one by its path.
func file(p []byte, folder bool) *File {
	f := &File{Path: text(string(p)), Name: text(path.Base(string(p))), TypeID: 1, Type: "Regular File"}
	if folder {
		f.TypeID, f.Type = 2, "Folder"
	}
	return f
}

func insideUser(uid uint32) *User { return &User{UID: strconv.FormatUint(uint64(uid), 10)} }

func orUnknown(s string) string { return text(cmp.Or(s, "unknown")) }

func words(args [][]byte) string {
	var b strings.Builder
	for i, a := range args {
		if i > 0 {
			b.WriteByte(' ')
		}
		if b.Len() > maxText {
			break
		}
		b.Write(a[:min(len(a), maxText)])
	}
	return text(b.String())
}

// text is a text of bounded length, and UTF-8.
func text(s string) string {
	if len(s) > maxText {
		s = s[:maxText]
	}
	return strings.ToValidUTF8(s, "\ufffd")
}

func millis(t time.Time) int64 {
	if t.IsZero() {
		return 0
	}
	return t.UnixMilli()
}
