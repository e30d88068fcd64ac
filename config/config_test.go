package config

import (
	"os"
	"path/filepath"
	"reflect"
	"slices"
	"strings"
	"testing"

	"github.com/goccy/go-yaml"
)

// The documentation has every key, and the code's defaults.
func TestDocumented(t *testing.T) {
	doc, err := os.ReadFile("../docs/configuration.md")
	if err != nil {
		t.Fatal(err)
	}
	_, block, ok := strings.Cut(string(doc), "```yaml\n")
	block, _, ok2 := strings.Cut(block, "```")
	if !ok || !ok2 {
		t.Fatal("docs/configuration.md has no yaml block")
	}
	var got Config
	if err := yaml.UnmarshalWithOptions([]byte(block), &got, yaml.Strict()); err != nil {
		t.Fatalf("docs/configuration.md: %s", yaml.FormatError(err, false, true))
	}
	compare(t, "", reflect.ValueOf(got), reflect.ValueOf(Default()))

	var keys map[string]any
	if err := yaml.Unmarshal([]byte(block), &keys); err != nil {
		t.Fatal(err)
	}
	documented(t, "", keys, reflect.TypeFor[Config]())
}

// compare takes an empty list for none.
func compare(t *testing.T, path string, doc, code reflect.Value) {
	if doc.Kind() == reflect.Pointer {
		if doc.IsNil() || code.IsNil() {
			return // a part that is there only when it is asked for
		}
		doc, code = doc.Elem(), code.Elem()
	}
	if doc.Kind() == reflect.Struct {
		for i := range doc.NumField() {
			if doc.Type().Field(i).IsExported() && doc.Type().Field(i).Tag.Get("yaml") != "-" {
				compare(t, path+"."+doc.Type().Field(i).Name, doc.Field(i), code.Field(i))
			}
		}
		return
	}
	if (doc.Kind() == reflect.Slice || doc.Kind() == reflect.Map) && doc.Len() == 0 && code.Len() == 0 {
		return
	}
	if !reflect.DeepEqual(doc.Interface(), code.Interface()) {
		t.Errorf("%s: documented as %v, is %v", path, doc.Interface(), code.Interface())
	}
}

func documented(t *testing.T, path string, keys map[string]any, typ reflect.Type) {
	for i := range typ.NumField() {
		f := typ.Field(i)
		name, opts, _ := strings.Cut(f.Tag.Get("yaml"), ",")
		if name == "-" || !f.IsExported() {
			continue
		}
		ft := f.Type
		if ft.Kind() == reflect.Pointer {
			ft = ft.Elem()
		}
		if strings.Contains(opts, "inline") {
			documented(t, path, keys, ft)
			continue
		}
		if name == "" {
			t.Errorf("%s%s: no yaml name", path, f.Name)
			continue
		}
		v, ok := keys[name]
		if !ok {
			t.Errorf("%s%s is not in docs/configuration.md", path, name)
			continue
		}
		if sub, ok := v.(map[string]any); ok && ft.Kind() == reflect.Struct {
			documented(t, path+name+".", sub, ft)
		}
	}
}

func TestParse(t *testing.T) {
	good := "policy: {data: data}\n"
	c, err := Parse([]byte(good), "/etc/sallyport")
	if err != nil {
		t.Fatal(err)
	}
	if c.Policy.Data != "/etc/sallyport/data" || c.Audit.Spool != "/var/lib/sallyport/spool" || len(c.SSH.HostKeys) != 3 {
		t.Errorf("paths: %+v", c)
	}
	for _, p := range []string{c.State, c.Policy.Data, c.Audit.Store.Directory} {
		found := false
		for _, q := range c.Docker.ProtectedPaths {
			found = found || p == q
		}
		if !found {
			t.Errorf("%s is not protected from sandboxes", p)
		}
	}
	c, err = Parse([]byte(good+"audit: {store: {s3: {bucket: evidence, credentials_file: put.ini}}}\n"), "/etc/sallyport")
	if err != nil || c.Audit.Store.Directory != "" || c.Audit.Store.S3.CredentialsFile != "/etc/sallyport/put.ini" {
		t.Errorf("s3: %v %+v", err, c.Audit.Store)
	}
	if !slices.Contains(c.Docker.ProtectedPaths, "/etc/sallyport/put.ini") || slices.Contains(c.Docker.ProtectedPaths, "") {
		t.Errorf("s3: protected are %q", c.Docker.ProtectedPaths)
	}
	c, err = Parse([]byte(good+"docker: {host: 'tcp://engine:2376', transport: relay, tls: {ca: ca.pem, cert: cert.pem, key: /k/key.pem}}\n"), "/etc/sallyport")
	if err != nil || c.Docker.TLS.CA != "/etc/sallyport/ca.pem" || c.Docker.TLS.Key != "/k/key.pem" || c.Docker.Transport != "relay" ||
		!slices.Contains(c.Docker.ProtectedPaths, "/etc/sallyport/cert.pem") || !slices.Contains(c.Docker.ProtectedPaths, "/k/key.pem") {
		t.Errorf("tls: %v %+v", err, c.Docker)
	}
	for _, tc := range []struct{ yaml, want string }{
		{"", "policy.data"},
		{good + "nosuch: 1\n", "nosuch"},
		{good + "ssh: {max_channels: many}\n", "2:"},
		{good + "ssh: {max_channels: 0}\n", "ssh.max_channels"},
		{good + "ssh: {listen: nonsense}\n", "ssh.listen"},
		{good + "ssh: {login_grace_time: 0s}\n", "login_grace_time"},
		{good + "gate: ../x\n", "gate"},
		{good + "logging: {level: loud}\n", "logging.level"},
		{good + "logging: {format: xml}\n", "logging.format"},
		{good + "monitor: {listen: x}\n", "monitor.listen"},
		{good + "audit: {data: some}\n", "audit.data"},
		{good + "audit: {signing_command: [/bin/sign]}\n", "audit.public_key"},
		{good + "audit: {signing_command: [sign], public_key: a.pub}\n", "whole path"},
		{good + "audit: {signing_agent: a.sock}\n", "audit.public_key"},
		{good + "audit: {signing_agent: a.sock, signing_command: [/bin/sign], public_key: a.pub}\n", "write one of them"},
		{good + "audit: {signing_agent: a.sock, public_key: a.pub, key: log.key}\n", "write one of them"},
		{good + "audit: {public_key: a.pub}\n", "audit.public_key"},
		{good + "audit: {store: {directory: a, s3: {bucket: evidence}}}\n", "write one of them"},
		{good + "audit: {store: {s3: {bucket: evidence}, prune: {max_age: 24h}}}\n", "lifecycle"},
		{good + "audit: {store: {s3: {bucket: ''}}}\n", "audit.store.s3.bucket"},
		{good + "audit: {store: {s3: {bucket: evidence, nosuch: 1}}}\n", "nosuch"},
		{good + "audit: {store: {s3: {bucket: evidence, endpoint: 'http://s3.example.com'}}}\n", "audit.store.s3.endpoint"},
		{good + "audit: {store: {prune: {max_age: 1s}}}\n", "audit.store.prune.max_age"},
		{good + "docker: {memory: lots}\n", "docker.memory"},
		{good + "backend: podman\n", "backend"},
		{good + "kubernetes: {storage: lots}\n", "kubernetes.storage"},
		{good + "backend: kubernetes\nkubernetes: {namespace: A}\n", "kubernetes.namespaces"},
		{good + "backend: kubernetes\nkubernetes: {networks: {db: {egress: [{cidr: 10.0.0.1/8}]}}}\n", "kubernetes.networks.db.egress"},
		{good + "kubernetes: {networks: {db: {egres: []}}}\n", "egres"},
		{good + "docker: {transport: pigeon}\n", "docker.transport"},
		{good + "docker: {host: 'tcp://engine:2375'}\n", "docker.tls"},
		{good + "docker: {tls: {nosuch: x}}\n", "nosuch"},
		{"policy: {data: a}\npolicy: {data: b}\n", "2:"},
		{"\tpolicy:", "1:"},
		{"- 1\n- 2\n", "1:"},
		{strings.Repeat("x", maxFile+1), "1 MiB"},
	} {
		_, err := Parse([]byte(tc.yaml), "/")
		if err == nil || !strings.Contains(err.Error(), tc.want) {
			t.Errorf("%.40q: error %v, want %q in it", tc.yaml, err, tc.want)
		}
	}
}

// The file itself is protected from sandboxes: it names keys and credentials.
func TestLoad(t *testing.T) {
	file := filepath.Join(t.TempDir(), "gate.yaml")
	if err := os.WriteFile(file, []byte("policy: {data: data}\n"), 0o600); err != nil {
		t.Fatal(err)
	}
	c, err := Load(file)
	if err != nil {
		t.Fatal(err)
	}
	if !slices.Contains(c.Docker.ProtectedPaths, file) {
		t.Errorf("%s is not among %v", file, c.Docker.ProtectedPaths)
	}
	if _, err := Load(file + ".none"); err == nil || !strings.Contains(err.Error(), "gate.yaml.none") {
		t.Errorf("a file that is not there: %v", err)
	}
}

func FuzzParse(f *testing.F) {
	f.Add([]byte("policy: {data: data}\n"))
	f.Fuzz(func(t *testing.T, b []byte) { Parse(b, "/") })
}
