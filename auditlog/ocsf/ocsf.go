// Package ocsf gives the records of a session as events of the Open Cybersecurity Schema Framework, version 1.8
// (https://schema.ocsf.io/1.8.0): SSH Activity, Authentication, Process Activity, File Hosting Activity, File System Activity,
// Network Activity and Tunnel Activity.
package ocsf

// Version is the schema's.
const Version = "1.8.0"

// Classes of events, by their class_uid.
const (
	FileSystemActivity = 1001
	ProcessActivity    = 1007
	Authentication     = 3002
	NetworkActivity    = 4001
	SSHActivity        = 4007
	TunnelActivity     = 4014
	FileHosting        = 6006
)

// Identifiers that several classes share.
const (
	statusUnknown = 0
	statusSuccess = 1
	statusFailure = 2

	severityInformational = 1
	severityMedium        = 3
	severityHigh          = 4

	other = 99
)

// Event is one event. What its class does not have is nil.
type Event struct {
	ActivityID   int    `json:"activity_id"`
	ActivityName string `json:"activity_name"`
	CategoryUID  int    `json:"category_uid"`
	CategoryName string `json:"category_name"`
	ClassUID     int    `json:"class_uid"`
	ClassName    string `json:"class_name"`
	TypeUID      int    `json:"type_uid"`
	Time         int64  `json:"time"` // milliseconds
	SeverityID   int    `json:"severity_id"`
	Severity     string `json:"severity"`
	StatusID     int    `json:"status_id"`
	Status       string `json:"status"`
	StatusDetail string `json:"status_detail,omitempty"`
	Message      string `json:"message"`
	Count        uint64 `json:"count,omitempty"`
	StartTime    int64  `json:"start_time,omitempty"`
	EndTime      int64  `json:"end_time,omitempty"`

	Metadata Metadata `json:"metadata"`

	Actor  *Actor  `json:"actor,omitempty"`
	Device *Device `json:"device,omitempty"`

	SrcEndpoint *Endpoint   `json:"src_endpoint,omitempty"`
	DstEndpoint *Endpoint   `json:"dst_endpoint,omitempty"`
	Connection  *Connection `json:"connection_info,omitempty"`
	Traffic     *Traffic    `json:"traffic,omitempty"`

	// SSH Activity.
	ProtocolVersion string `json:"protocol_ver,omitempty"`
	AuthType        string `json:"auth_type,omitempty"`
	AuthTypeID      int    `json:"auth_type_id,omitempty"`
	// Authentication; User and Session are Tunnel Activity's too.
	User           *User    `json:"user,omitempty"`
	Session        *Session `json:"session,omitempty"`
	Service        *Service `json:"service,omitempty"`
	AuthProtocol   string   `json:"auth_protocol,omitempty"`
	AuthProtocolID int      `json:"auth_protocol_id,omitempty"`
	LogonType      string   `json:"logon_type,omitempty"`
	LogonTypeID    int      `json:"logon_type_id,omitempty"`
	IsRemote       bool     `json:"is_remote,omitempty"`
	// Process Activity.
	Process      *Process `json:"process,omitempty"`
	ExitCode     *int64   `json:"exit_code,omitempty"`
	LaunchType   string   `json:"launch_type,omitempty"`
	LaunchTypeID int      `json:"launch_type_id,omitempty"`
	// File Hosting, File System Activity.
	File       *File `json:"file,omitempty"`
	FileResult *File `json:"file_result,omitempty"`
	// Tunnel Activity.
	TunnelType   string `json:"tunnel_type,omitempty"`
	TunnelTypeID int    `json:"tunnel_type_id,omitempty"`

	Unmapped map[string]any `json:"unmapped,omitempty"`
}

// Metadata is about the event itself.
type Metadata struct {
	Version        string   `json:"version"`
	Product        Product  `json:"product"`
	UID            string   `json:"uid"`             // session and sequence
	CorrelationUID string   `json:"correlation_uid"` // session
	Sequence       uint64   `json:"sequence"`
	LogName        string   `json:"log_name"`
	OriginalTime   string   `json:"original_time"`
	EventCode      string   `json:"event_code"` // the record's kind
	Profiles       []string `json:"profiles,omitempty"`
}

// Product wrote the log.
type Product struct {
	Name       string `json:"name"`
	VendorName string `json:"vendor_name"`
	Version    string `json:"version,omitempty"`
}

// Actor did it.
type Actor struct {
	Process *Process `json:"process,omitempty"`
	User    *User    `json:"user,omitempty"`
	Session *Session `json:"session,omitempty"`
}

// User of the gate, or inside the sandbox.
type User struct {
	Name          string  `json:"name,omitempty"`
	UID           string  `json:"uid,omitempty"`
	CredentialUID string  `json:"credential_uid,omitempty"` // fingerprint of the key
	Groups        []Group `json:"groups,omitempty"`
}

// Group of a user.
type Group struct {
	Name string `json:"name"`
}

// Session of the gate.
type Session struct {
	UID         string `json:"uid"`
	CreatedTime int64  `json:"created_time,omitempty"`
	IsRemote    bool   `json:"is_remote"`
	Expires     int64  `json:"expiration_time,omitempty"`
}

// Service that a user logs on to.
type Service struct {
	Name string `json:"name"`
}

// Endpoint of a connection.
type Endpoint struct {
	IP       string `json:"ip,omitempty"`
	Port     int    `json:"port,omitempty"`
	Hostname string `json:"hostname,omitempty"`
	Name     string `json:"name,omitempty"`
	UID      string `json:"uid,omitempty"`
	SvcName  string `json:"svc_name,omitempty"`
}

// Connection says what kind of connection it is.
type Connection struct {
	DirectionID  int    `json:"direction_id"`
	Direction    string `json:"direction"`
	ProtocolName string `json:"protocol_name,omitempty"`
	UID          string `json:"uid,omitempty"`
}

// Traffic is what passed.
type Traffic struct {
	Bytes    uint64 `json:"bytes"`
	BytesIn  uint64 `json:"bytes_in"`
	BytesOut uint64 `json:"bytes_out"`
}

// Device is the sandbox.
type Device struct {
	TypeID   int    `json:"type_id"`
	Type     string `json:"type"`
	UID      string `json:"uid,omitempty"`
	Name     string `json:"name,omitempty"`
	Hostname string `json:"hostname,omitempty"`
	Image    *Image `json:"image,omitempty"`
}

// Image of a sandbox.
type Image struct {
	UID  string `json:"uid"`
	Name string `json:"name,omitempty"`
}

// Process inside the sandbox.
type Process struct {
	PID     int64    `json:"pid"`
	Name    string   `json:"name,omitempty"`
	CmdLine string   `json:"cmd_line,omitempty"`
	Dir     string   `json:"working_directory,omitempty"`
	Created int64    `json:"created_time,omitempty"`
	UID     string   `json:"uid,omitempty"` // number of the execution within the session
	File    *File    `json:"file,omitempty"`
	Parent  *Process `json:"parent_process,omitempty"`
	User    *User    `json:"user,omitempty"`
}

// File is a file, a folder or a link.
type File struct {
	Name   string        `json:"name"`
	Path   string        `json:"path,omitempty"`
	TypeID int           `json:"type_id"`
	Type   string        `json:"type"`
	Size   uint64        `json:"size,omitempty"`
	Hashes []Fingerprint `json:"hashes,omitempty"`
}

// Fingerprint is a file's hash.
type Fingerprint struct {
	AlgorithmID int    `json:"algorithm_id"`
	Algorithm   string `json:"algorithm"`
	Value       string `json:"value"`
}
