package kubernetes

import (
	"encoding/json"
	"errors"
	"reflect"
	"strings"
	"testing"

	corev1 "k8s.io/api/core/v1"
	"k8s.io/apimachinery/pkg/api/equality"

	"github.com/sallyport/sallyport/backends"
)

// templates is a configuration that permits something of each kind.
func templates() Config {
	return Config{
		PodTemplates: true, PodLabels: []string{"team"}, PodAnnotations: []string{"example.com/note"}, Taints: []string{"debug"},
		Containers: []string{"tools/*"}, AllowHost: []string{"network", "ipc"}, NodeLabels: []string{"pool"},
		NodeSelector: map[string]string{"zone": "a"}, Tolerations: []Toleration{{Key: "own", Operator: "Exists"}},
		Claims: []string{"logs", "work"}, WriteClaims: []string{"work"}, ConfigMaps: []string{"settings"}, Secrets: []string{"ca"},
		Images: []string{"data:1"}, HostPaths: []string{"/var/log"}, CSI: []string{"secrets.example:class=payments", "open.example*"},
		Runtimes: []string{"gvisor"}, Priorities: []string{"low"}, AllowCaps: []string{"NET_RAW"},
	}
}

const sidecar = `{"name":"tool","image":"tools/proxy:1","restartPolicy":"Always","command":["/proxy"],
	"securityContext":{"allowPrivilegeEscalation":false,"readOnlyRootFilesystem":true,"capabilities":{"drop":["ALL"]}},
	"resources":{"limits":{"memory":"64Mi","cpu":"100m","ephemeral-storage":"64Mi"}}}`

// with changes a piece of the sidecar.
func with(old, new string) string {
	if !strings.Contains(sidecar, old) {
		panic(old) // of a test
	}
	return `{"spec":{"initContainers":[` + strings.Replace(sidecar, old, new, 1) + `]}}`
}

// TestTemplates: what a template may set is set, and nothing that the configuration does not permit is, whichever way it is
// written.
func TestTemplates(t *testing.T) {
	add := func(path, value string) string { return `[{"op":"add","path":"` + path + `","value":` + value + `}]` }
	for name, test := range map[string]struct {
		template string
		reason   string // empty: permitted
	}{
		"nothing":                {`{}`, ""},
		"no operations":          {`[]`, ""},
		"label":                  {`{"metadata":{"labels":{"team":"x"}}}`, ""},
		"other label":            {`{"metadata":{"labels":{"app":"db"}}}`, `label "app" is not listed (pod_labels)`},
		"own label":              {`{"metadata":{"labels":{"sallyport.network":"db"}}}`, "is the gate's"},
		"own label removed":      {`{"metadata":{"labels":{"sallyport.network":null}}}`, "is the gate's"},
		"labels removed":         {`[{"op":"remove","path":"/metadata/labels"}]`, "is the gate's"},
		"annotation":             {`{"metadata":{"annotations":{"example.com/note":"x"}}}`, ""},
		"other annotation":       {`{"metadata":{"annotations":{"k8s.v1.cni.cncf.io/networks":"x"}}}`, "pod_annotations"},
		"user's annotation":      {`{"metadata":{"annotations":{"sallyport.user":"bob"}}}`, "is the gate's"},
		"name":                   {`{"metadata":{"name":"x"}}`, "metadata.name"},
		"namespace":              {`{"metadata":{"namespace":"kube-system"}}`, "metadata.namespace"},
		"owner":                  {`{"metadata":{"ownerReferences":[{"apiVersion":"v1","kind":"Pod","name":"x","uid":"y"}]}}`, "metadata.ownerReferences"},
		"finalizer":              {`{"metadata":{"finalizers":["example.com/x"]}}`, "metadata.finalizers"},
		"generated name":         {`{"metadata":{"generateName":"x-"}}`, "metadata.generateName"},
		"node's processes":       {`{"spec":{"hostPID":true}}`, "hostPID"},
		"shared processes":       {`{"spec":{"shareProcessNamespace":true}}`, "shareProcessNamespace"},
		"node's network":         {`{"spec":{"hostNetwork":true,"dnsPolicy":"ClusterFirstWithHostNet","dnsConfig":null}}`, ""},
		"node's IPC":             {`{"spec":{"hostIPC":true}}`, ""},
		"token":                  {`{"spec":{"automountServiceAccountToken":true}}`, "no sandbox has a token"},
		"token by default":       {`{"spec":{"automountServiceAccountToken":null}}`, "no sandbox has a token"},
		"service account":        {`{"spec":{"serviceAccountName":"admin"}}`, "serviceAccountName"},
		"its older name":         {`{"spec":{"serviceAccount":"admin"}}`, "spec.serviceAccount"},
		"restart":                {`{"spec":{"restartPolicy":"Always"}}`, "restartPolicy"},
		"shorter life":           {`{"spec":{"activeDeadlineSeconds":60}}`, ""},
		"longer life":            {`{"spec":{"activeDeadlineSeconds":86401}}`, "activeDeadlineSeconds"},
		"endless life":           {`{"spec":{"activeDeadlineSeconds":null}}`, "activeDeadlineSeconds"},
		"no life":                {`{"spec":{"activeDeadlineSeconds":0}}`, "activeDeadlineSeconds"},
		"grace":                  {`{"spec":{"terminationGracePeriodSeconds":3600}}`, "terminationGracePeriodSeconds"},
		"node by name":           {`{"spec":{"nodeName":"master"}}`, "spec.nodeName"},
		"scheduler":              {`{"spec":{"schedulerName":"own"}}`, "schedulerName"},
		"root":                   {`{"spec":{"securityContext":{"runAsUser":0,"runAsNonRoot":false}}}`, "securityContext"},
		"other user":             {`{"spec":{"securityContext":{"runAsUser":1001}}}`, "securityContext"},
		"maybe root":             {`{"spec":{"securityContext":{"runAsNonRoot":null}}}`, "securityContext"},
		"no security context":    {`[{"op":"remove","path":"/spec/securityContext"}]`, "securityContext"},
		"groups":                 {`{"spec":{"securityContext":{"supplementalGroups":[0]}}}`, "spec.securityContext.supplementalGroups"},
		"fsGroup":                {`{"spec":{"securityContext":{"fsGroup":0}}}`, "spec.securityContext.fsGroup"},
		"unconfined":             {`{"spec":{"securityContext":{"seccompProfile":{"type":"Unconfined"}}}}`, "RuntimeDefault"},
		"no seccomp":             {`{"spec":{"securityContext":{"seccompProfile":null}}}`, "RuntimeDefault"},
		"AppArmor":               {`{"spec":{"securityContext":{"appArmorProfile":{"type":"Unconfined"}}}}`, "appArmorProfile"},
		"SELinux":                {`{"spec":{"securityContext":{"seLinuxOptions":{"type":"spc_t"}}}}`, "seLinuxOptions"},
		"sysctl":                 {`{"spec":{"securityContext":{"sysctls":[{"name":"kernel.shm_rmid_forced","value":"0"}]}}}`, "sysctls"},
		"pull secret":            {`{"spec":{"imagePullSecrets":[{"name":"x"}]}}`, "imagePullSecrets"},
		"user namespace":         {`{"spec":{"hostUsers":true}}`, "hostUsers"},
		"node label":             {`{"spec":{"nodeSelector":{"pool":"x"}}}`, ""},
		"other node label":       {`{"spec":{"nodeSelector":{"kubernetes.io/hostname":"x"}}}`, "node_labels"},
		"operator's node label":  {`{"spec":{"nodeSelector":{"zone":"b"}}}`, "operator's"},
		"no node label":          {`{"spec":{"nodeSelector":null}}`, "operator's"},
		"toleration":             {`{"spec":{"tolerations":[{"key":"debug","operator":"Exists"}]}}`, ""},
		"all tolerations":        {`{"spec":{"tolerations":[{"operator":"Exists"}]}}`, "taints"},
		"other toleration":       {`{"spec":{"tolerations":[{"key":"node-role.kubernetes.io/control-plane"}]}}`, "taints"},
		"runtime":                {`{"spec":{"runtimeClassName":"gvisor"}}`, ""},
		"other runtime":          {`{"spec":{"runtimeClassName":"legacy"}}`, "runtimes"},
		"priority":               {`{"spec":{"priorityClassName":"low"}}`, ""},
		"other priority":         {`{"spec":{"priorityClassName":"system-node-critical"}}`, "priorities"},
		"priority in numbers":    {`{"spec":{"priority":2000000000}}`, "spec.priority"},
		"spread":                 {`{"spec":{"topologySpreadConstraints":[{"topologyKey":"zone","maxSkew":1,"whenUnsatisfiable":"DoNotSchedule"}]}}`, ""},
		"spread over nothing":    {`{"spec":{"topologySpreadConstraints":[{"topologyKey":"zone"}]}}`, "maxSkew"},
		"node affinity":          {`{"spec":{"affinity":{"nodeAffinity":{"requiredDuringSchedulingIgnoredDuringExecution":{"nodeSelectorTerms":[{"matchExpressions":[{"key":"pool","operator":"Exists"}]}]}}}}}`, ""},
		"other node affinity":    {`{"spec":{"affinity":{"nodeAffinity":{"requiredDuringSchedulingIgnoredDuringExecution":{"nodeSelectorTerms":[{"matchExpressions":[{"key":"x","operator":"Exists"}]}]}}}}}`, "node_labels"},
		"preferred affinity":     {`{"spec":{"affinity":{"nodeAffinity":{"preferredDuringSchedulingIgnoredDuringExecution":[{"weight":1,"preference":{"matchExpressions":[{"key":"x","operator":"Exists"}]}}]}}}}`, "node_labels"},
		"affinity to a node":     {`{"spec":{"affinity":{"nodeAffinity":{"requiredDuringSchedulingIgnoredDuringExecution":{"nodeSelectorTerms":[{"matchFields":[{"key":"metadata.name","operator":"In","values":["x"]}]}]}}}}}`, "single nodes"},
		"away from each other":   {`{"spec":{"affinity":{"podAntiAffinity":{"preferredDuringSchedulingIgnoredDuringExecution":[{"weight":1,"podAffinityTerm":{"topologyKey":"zone","labelSelector":{"matchLabels":{"a":"b"}}}}]}}}}`, ""},
		"beside production":      {`{"spec":{"affinity":{"podAffinity":{"requiredDuringSchedulingIgnoredDuringExecution":[{"topologyKey":"zone","namespaces":["prod"]}]}}}}`, "other namespaces"},
		"beside all":             {`{"spec":{"affinity":{"podAffinity":{"requiredDuringSchedulingIgnoredDuringExecution":[{"topologyKey":"zone","namespaceSelector":{}}]}}}}`, "other namespaces"},
		"DNS":                    {`{"spec":{"dnsConfig":{"searches":["prod.svc"]}}}`, ""},
		"hosts":                  {`{"spec":{"hostAliases":[{"ip":"192.0.2.1","hostnames":["db"]}]}}`, ""},
		"second container":       {`{"spec":{"containers":[` + sidecar + `]}}`, "there is one"},
		"renamed container":      {add("/spec/containers/0/name", `"x"`), "there is one"},
		"no container":           {`[{"op":"remove","path":"/spec/containers/0"}]`, "there is one"},
		"ephemeral container":    {`{"spec":{"ephemeralContainers":[{"name":"x"}]}}`, "ephemeralContainers"},
		"other image":            {`{"spec":{"containers":[{"name":"sandbox","image":"evil"}]}}`, "spec.containers[0].image"},
		"other program":          {`{"spec":{"containers":[{"name":"sandbox","command":["/bin/sh"]}]}}`, "spec.containers[0].command"},
		"other key":              {add("/spec/containers/0/args/2", `"AAAA"`), "spec.containers[0].args"},
		"privileged":             {`{"spec":{"containers":[{"name":"sandbox","securityContext":{"privileged":true}}]}}`, "privileged"},
		"escalation":             {`{"spec":{"containers":[{"name":"sandbox","securityContext":{"allowPrivilegeEscalation":true}}]}}`, "allowPrivilegeEscalation"},
		"root of the container":  {`{"spec":{"containers":[{"name":"sandbox","securityContext":{"runAsUser":0}}]}}`, "root is not permitted"},
		"user of the container":  {`{"spec":{"containers":[{"name":"sandbox","securityContext":{"runAsUser":65532}}]}}`, "securityContext.runAsUser"},
		"writable root":          {`{"spec":{"containers":[{"name":"sandbox","securityContext":{"readOnlyRootFilesystem":false}}]}}`, "readOnlyRootFilesystem"},
		"capability":             {`{"spec":{"containers":[{"name":"sandbox","securityContext":{"capabilities":{"add":["NET_RAW"]}}}]}}`, "not permitted"},
		"kept capabilities":      {`{"spec":{"containers":[{"name":"sandbox","securityContext":{"capabilities":{"drop":[]}}}]}}`, "must drop ALL"},
		"proc mount":             {`{"spec":{"containers":[{"name":"sandbox","securityContext":{"procMount":"Unmasked"}}]}}`, "procMount"},
		"seccomp of it":          {`{"spec":{"containers":[{"name":"sandbox","securityContext":{"seccompProfile":{"type":"Unconfined"}}}]}}`, "RuntimeDefault"},
		"lifecycle":              {`{"spec":{"containers":[{"name":"sandbox","lifecycle":{"postStart":{"exec":{"command":["/bin/sh"]}}}}]}}`, "lifecycle"},
		"probe":                  {`{"spec":{"containers":[{"name":"sandbox","livenessProbe":{"httpGet":{"host":"192.0.2.1","port":80}}}]}}`, "livenessProbe"},
		"port":                   {`{"spec":{"containers":[{"name":"sandbox","ports":[{"containerPort":1,"hostPort":1}]}]}}`, "ports"},
		"terminal":               {`{"spec":{"containers":[{"name":"sandbox","tty":true}]}}`, "tty"},
		"memory":                 {`{"spec":{"containers":[{"name":"sandbox","resources":{"limits":{"memory":"64Gi"}}}]}}`, "resources"},
		"no limits":              {`{"spec":{"containers":[{"name":"sandbox","resources":null}]}}`, "resources"},
		"environment":            {`{"spec":{"containers":[{"name":"sandbox","env":[{"name":"A","value":"b"},{"name":"IP","valueFrom":{"fieldRef":{"fieldPath":"status.podIP"}}}]}]}}`, ""},
		"secret as environment":  {`{"spec":{"containers":[{"name":"sandbox","env":[{"name":"A","valueFrom":{"secretKeyRef":{"name":"ca","key":"k"}}}]}]}}`, ""},
		"other secret as such":   {`{"spec":{"containers":[{"name":"sandbox","env":[{"name":"A","valueFrom":{"secretKeyRef":{"name":"x","key":"k"}}}]}]}}`, "secrets"},
		"all of a secret":        {`{"spec":{"containers":[{"name":"sandbox","envFrom":[{"secretRef":{"name":"x"}}]}]}}`, "secrets"},
		"all of a config map":    {`{"spec":{"containers":[{"name":"sandbox","envFrom":[{"configMapRef":{"name":"x"}}]}]}}`, "config_maps"},
		"own volume changed":     {`{"spec":{"volumes":[{"name":"tmp","emptyDir":{"sizeLimit":"64Gi"}}]}}`, `"tmp" is the gate's`},
		"own volume removed":     {`[{"op":"remove","path":"/spec/volumes/0"}]`, "is the gate's"},
		"agent's volume mounted": {`{"spec":{"containers":[{"name":"sandbox","volumeMounts":[{"name":"agent","mountPath":"/x"}]}]}}`, "only the template's own"},
		"agent's mount writable": {`{"spec":{"containers":[{"name":"sandbox","volumeMounts":[{"name":"agent","mountPath":"/.sallyport","readOnly":false}]}]}}`, "is the gate's"},
		"over the agent":         {volumePatch(`{"name":"x","emptyDir":{"sizeLimit":"1Mi"}}`, `"mountPath":"/.sallyport"`), "is the gate's"},
		"above the agent":        {volumePatch(`{"name":"x","emptyDir":{"sizeLimit":"1Mi"}}`, `"mountPath":"/"`), "not the profile's"},
		"below tmp":              {volumePatch(`{"name":"x","emptyDir":{"sizeLimit":"1Mi"}}`, `"mountPath":"/tmp/x"`), "below /tmp"},
		"over proc":              {volumePatch(`{"name":"x","emptyDir":{"sizeLimit":"1Mi"}}`, `"mountPath":"/proc/1"`), "not the profile's"},
		"scratch":                {volumePatch(`{"name":"x","emptyDir":{"sizeLimit":"1Mi"}}`, `"mountPath":"/work"`), ""},
		"scratch without end":    {volumePatch(`{"name":"x","emptyDir":{}}`, `"mountPath":"/work"`), "sizeLimit"},
		"much scratch":           {volumePatch(`{"name":"x","emptyDir":{"sizeLimit":"17Gi"}}`, `"mountPath":"/work"`), "sizeLimit"},
		"claim":                  {volumePatch(`{"name":"x","persistentVolumeClaim":{"claimName":"logs"}}`, `"mountPath":"/l","readOnly":true`), ""},
		"claim to write":         {volumePatch(`{"name":"x","persistentVolumeClaim":{"claimName":"logs"}}`, `"mountPath":"/l"`), "must be readOnly"},
		"claim that may be":      {volumePatch(`{"name":"x","persistentVolumeClaim":{"claimName":"work"}}`, `"mountPath":"/l"`), ""},
		"other claim":            {volumePatch(`{"name":"x","persistentVolumeClaim":{"claimName":"etcd"}}`, `"mountPath":"/l","readOnly":true`), "claims"},
		"host path":              {volumePatch(`{"name":"x","hostPath":{"path":"/var/log/app"}}`, `"mountPath":"/l","readOnly":true`), ""},
		"host path by dots":      {volumePatch(`{"name":"x","hostPath":{"path":"/var/log/../lib"}}`, `"mountPath":"/l","readOnly":true`), "host_paths"},
		"host path made":         {volumePatch(`{"name":"x","hostPath":{"path":"/var/log/app","type":"DirectoryOrCreate"}}`, `"mountPath":"/l","readOnly":true`), "type"},
		"host path to write":     {volumePatch(`{"name":"x","hostPath":{"path":"/var/log/app"}}`, `"mountPath":"/l"`), "must be readOnly"},
		"host path's part":       {volumePatch(`{"name":"x","hostPath":{"path":"/var/log/app"}}`, `"mountPath":"/l","readOnly":true,"subPath":"x"`), "no subPath"},
		"engine's socket":        {volumePatch(`{"name":"x","hostPath":{"path":"/run/containerd/containerd.sock"}}`, `"mountPath":"/l","readOnly":true`), "host_paths"},
		"image":                  {volumePatch(`{"name":"x","image":{"reference":"data:1"}}`, `"mountPath":"/l","readOnly":true`), ""},
		"other volume image":     {volumePatch(`{"name":"x","image":{"reference":"data:2"}}`, `"mountPath":"/l","readOnly":true`), "images"},
		"CSI":                    {volumePatch(`{"name":"x","csi":{"driver":"secrets.example","readOnly":true,"volumeAttributes":{"class":"payments"}}}`, `"mountPath":"/l","readOnly":true`), ""},
		"CSI to write":           {volumePatch(`{"name":"x","csi":{"driver":"secrets.example","volumeAttributes":{"class":"payments"}}}`, `"mountPath":"/l","readOnly":true`), "readOnly"},
		"other CSI":              {volumePatch(`{"name":"x","csi":{"driver":"secrets.example","readOnly":true,"volumeAttributes":{"class":"root"}}}`, `"mountPath":"/l","readOnly":true`), "(csi)"},
		"CSI with a comma":       {volumePatch(`{"name":"x","csi":{"driver":"open.example","readOnly":true,"volumeAttributes":{"a":"b,c=d"}}}`, `"mountPath":"/l","readOnly":true`), "compared"},
		"projected":              {volumePatch(`{"name":"x","projected":{"sources":[{"secret":{"name":"ca"}},{"configMap":{"name":"settings"}},{"downwardAPI":{}}]}}`, `"mountPath":"/l","readOnly":true`), ""},
		"projected token":        {volumePatch(`{"name":"x","projected":{"sources":[{"serviceAccountToken":{"path":"t"}}]}}`, `"mountPath":"/l","readOnly":true`), "only secrets"},
		"projected other":        {volumePatch(`{"name":"x","projected":{"sources":[{"secret":{"name":"x"}}]}}`, `"mountPath":"/l","readOnly":true`), "secrets"},
		"token's secret":         {volumePatch(`{"name":"x","secret":{"secretName":"token"}}`, `"mountPath":"/l","readOnly":true`), "secrets"},
		"NFS":                    {volumePatch(`{"name":"x","nfs":{"server":"192.0.2.1","path":"/"}}`, `"mountPath":"/l","readOnly":true`), "no volume of this kind"},
		"two sources":            {volumePatch(`{"name":"x","emptyDir":{"sizeLimit":"1Mi"},"nfs":{"server":"192.0.2.1","path":"/"}}`, `"mountPath":"/l"`), "no volume of this kind"},
		"propagation":            {volumePatch(`{"name":"x","emptyDir":{"sizeLimit":"1Mi"}}`, `"mountPath":"/l","mountPropagation":"HostToContainer"`), "mountPropagation"},
		"block device":           {`{"spec":{"containers":[{"name":"sandbox","volumeDevices":[{"name":"x","devicePath":"/dev/x"}]}]}}`, "volumeDevices"},
		"sidecar":                {with("tools/proxy:1", "tools/proxy:2"), ""},
		"volume without source":  {volumePatch(`{"name":"x"}`, `"mountPath":"/l"`), "no source"},
		"no such volume":         {`{"spec":{"containers":[{"name":"sandbox","volumeMounts":[{"name":"x","mountPath":"/l"}]}]}}`, "only the template's own"},
		"file as environment":    {`{"spec":{"containers":[{"name":"sandbox","env":[{"name":"A","valueFrom":{"fileKeyRef":{"path":"p","volumeName":"v","key":"k"}}}]}]}}`, "no value of this kind"},
		"map as environment":     {`{"spec":{"containers":[{"name":"sandbox","env":[{"name":"A","valueFrom":{"configMapKeyRef":{"name":"x","key":"k"}}}]}]}}`, "config_maps"},
		"projected other map":    {volumePatch(`{"name":"x","projected":{"sources":[{"configMap":{"name":"x"}}]}}`, `"mountPath":"/l","readOnly":true`), "config_maps"},
		"sidecar that asks more": {with(`"resources":{`, `"resources":{"requests":{"memory":"1Gi"},`), "more memory than its limit"},
		"sidecar on failure":     {with(`"Always"`, `"OnFailure"`), "Always, or none"},
		"sidecar's environment":  {with(`"command"`, `"env":[{"name":"A","valueFrom":{"secretKeyRef":{"name":"x","key":"k"}}}],"command"`), "secrets"},
		"large init container":   {strings.Replace(with(`"memory":"64Mi"`, `"memory":"9Gi"`), `"restartPolicy":"Always",`, ``, 1), "more memory than is permitted"},
		"sidecar of other image": {with("tools/proxy:1", "evil"), "(containers)"},
		"sidecar as root":        {with(`"capabilities"`, `"runAsUser":0,"capabilities"`), "root is not permitted"},
		"sidecar as the agent":   {with(`"capabilities"`, `"runAsUser":65532,"capabilities"`), "agent's own"},
		"sidecar's capability":   {with(`"drop":["ALL"]`, `"drop":["ALL"],"add":["NET_RAW"]`), "not permitted"},
		"privileged sidecar":     {with(`"capabilities"`, `"privileged":true,"capabilities"`), "privileged"},
		"sidecar without limits": {with(`,"ephemeral-storage":"64Mi"`, ``), "ephemeral-storage is missing"},
		"large sidecar":          {with(`"memory":"64Mi"`, `"memory":"8Gi"`), "all containers together"},
		"sidecar's GPU":          {with(`"cpu":"100m"`, `"cpu":"100m","example.com/gpu":"1"`), "only memory"},
		"sidecar's probe":        {with(`"command"`, `"livenessProbe":{"tcpSocket":{"port":1}},"command"`), "livenessProbe"},
		"sidecar's port":         {with(`"command"`, `"ports":[{"containerPort":1}],"command"`), "ports"},
		"sidecar with the agent": {with(`"command"`, `"volumeMounts":[{"name":"agent","mountPath":"/a"}],"command"`), "only the template's own"},
		"sidecar with home":      {with(`"command"`, `"volumeMounts":[{"name":"home","mountPath":"/a"}],"command"`), "only the template's own"},
		"agent's init container": {`{"spec":{"initContainers":[{"name":"agent","command":["/bin/sh"]}]}}`, "is the gate's"},
		"no init container":      {`[{"op":"remove","path":"/spec/initContainers/0"}]`, "is the gate's"},
		"unknown field":          {`{"spec":{"hostnetwork":true}}`, "spec.hostnetwork: there is no such field"},
		"unknown field deep":     {`{"spec":{"affinity":{"nodeaffinity":{}}}}`, "spec.affinity.nodeaffinity: there is no such field"},
		"unknown by patch":       {add("/spec/x", "1"), `unknown field "spec.x"`},
		"unknown at the top":     {`{"status":{}}`, "status: there is no such field"},
		"directive":              {`{"spec":{"$patch":"replace","containers":[]}}`, "directives"},
		"directive in new parts": {`{"spec":{"affinity":{"$patch":"delete"}}}`, "directives"},
		"list without names":     {`{"spec":{"volumes":[{"emptyDir":{}}]}}`, "has no name"},
		"wrong type":             {`{"spec":{"hostNetwork":"yes"}}`, "no pod"},
		"no object":              {`"spec"`, "neither"},
		"nothing left":           {`[{"op":"remove","path":""}]`, "agent must be" /* or any other first refusal */},
		"patch that fails":       {`[{"op":"remove","path":"/spec/nothing"}]`, `operation 0 (remove "/spec/nothing"): there is nothing there`},
		"test that fails":        {`[{"op":"test","path":"/spec/restartPolicy","value":"Always"}]`, "is another value"},
		"unknown operation":      {`[{"op":"merge","path":"/spec","value":1}]`, "no such operation"},
		"copies of copies":       {`[` + strings.Repeat(`{"op":"copy","from":"/spec","path":"/metadata/x"},{"op":"move","from":"/metadata","path":"/spec/y"},{"op":"add","path":"/metadata","value":{}},`, 40) + `{"op":"add","path":"/spec/x","value":1}]`, "makes too much"},
	} {
		t.Run(name, func(t *testing.T) {
			spec := plainSpec()
			spec.Template.Pod = json.RawMessage(test.template)
			b := checker(templates())
			checked, err := b.check(spec)
			var refused *backends.RefusedError
			switch {
			case name == "nothing left" && errors.As(err, &refused):
			case test.reason == "" && err != nil:
				t.Error(err)
			case test.reason != "" && (!errors.As(err, &refused) || !strings.Contains(refused.Reason, test.reason)):
				t.Errorf("%v, want a refusal with %q", err, test.reason)
			}
			if err == nil {
				if _, err := b.pod(checked, "KEY", slotOf("ns", "u", 1), nil); err != nil {
					t.Error(err)
				}
			}
			// With nothing listed, nothing is permitted that changes the pod.
			b = checker(Config{PodTemplates: true})
			if checked, err = b.check(spec); err == nil {
				plain, pod := *build(checked, b.config, "gate", "", slotOf("ns", "u", 1)), new(corev1.Pod)
				if pod, err = b.pod(checked, "", slotOf("ns", "u", 1), nil); err != nil {
					t.Fatal(err)
				}
				harmless := pod.DeepCopy()
				harmless.Spec.TopologySpreadConstraints, harmless.Spec.HostAliases, harmless.Spec.Affinity = nil, nil, nil
				harmless.Spec.DNSConfig, harmless.Spec.ActiveDeadlineSeconds = plain.Spec.DNSConfig, plain.Spec.ActiveDeadlineSeconds
				harmless.Spec.Containers[0].Env = nil
				if name != "scratch" && !equality.Semantic.DeepEqual(*harmless, plain) {
					t.Errorf("permitted with empty lists: %s", differ(reflect.ValueOf(plain), reflect.ValueOf(*harmless), ""))
				}
			}
			if _, err = checker(Config{}).check(spec); !errors.As(err, &refused) || !strings.Contains(refused.Reason, "pod_templates") {
				t.Errorf("pod_templates is off: %v", err)
			}
		})
	}
}

// TestRuntimeKept: the operator's runtime can't be taken away.
func TestRuntimeKept(t *testing.T) {
	spec := plainSpec()
	spec.Template.Pod = json.RawMessage(`{"spec":{"runtimeClassName":null}}`)
	var refused *backends.RefusedError
	if _, err := checker(Config{PodTemplates: true, Runtime: "gvisor"}).check(spec); !errors.As(err, &refused) || !strings.Contains(refused.Reason, "can't be taken away") {
		t.Error(err)
	}
}

func volumePatch(v, mount string) string {
	return `{"spec":{"volumes":[` + v + `],"containers":[{"name":"sandbox","volumeMounts":[{"name":"x",` + mount + `}]}]}}`
}

// TestMerge looks at what comes out.
func TestMerge(t *testing.T) {
	b := checker(templates())
	spec := plainSpec()
	spec.Template.Env = []string{"A=1", "B=2"}
	spec.Template.Spread = []string{"zone"}
	spec.Template.Pod = json.RawMessage(`{"metadata":{"labels":{"team":"x"}},"spec":{"containers":[{"name":"sandbox",
		"env":[{"name":"B","value":"3"},{"name":"C","value":"4"}]}],
		"topologySpreadConstraints":[{"topologyKey":"zone","maxSkew":2}],"nodeSelector":{"pool":"x"},
		"tolerations":[{"key":"debug"}],"activeDeadlineSeconds":60}}`)
	spec, err := b.check(spec)
	if err != nil {
		t.Fatal(err)
	}
	pod, err := b.pod(spec, "KEY", slotOf("ns", "u", 1), nil)
	if err != nil {
		t.Fatal(err)
	}
	p := pod.Spec
	var env []string
	for _, e := range p.Containers[0].Env {
		env = append(env, e.Name+"="+e.Value)
	}
	if strings.Join(env, " ") != "A=1 B=3 C=4" || pod.Labels["team"] != "x" || pod.Labels[labelManaged] != managed {
		t.Errorf("%v %v", env, pod.Labels)
	}
	s := p.TopologySpreadConstraints
	if len(s) != 1 || s[0].MaxSkew != 2 || s[0].WhenUnsatisfiable != corev1.ScheduleAnyway || s[0].LabelSelector == nil {
		t.Errorf("%+v", s)
	}
	if p.NodeSelector["pool"] != "x" || p.NodeSelector["zone"] != "a" || len(p.Tolerations) != 1 || *p.ActiveDeadlineSeconds != 60 {
		t.Errorf("%+v", p)
	}
}

// TestJSONPatch is RFC 6902's own examples (appendix A), and RFC 6901's pointers.
func TestJSONPatch(t *testing.T) {
	for name, test := range map[string]struct{ document, patch, want string }{
		"A.1":  {`{"foo":"bar"}`, `[{"op":"add","path":"/baz","value":"qux"}]`, `{"baz":"qux","foo":"bar"}`},
		"A.2":  {`{"foo":["bar","baz"]}`, `[{"op":"add","path":"/foo/1","value":"qux"}]`, `{"foo":["bar","qux","baz"]}`},
		"A.3":  {`{"baz":"qux","foo":"bar"}`, `[{"op":"remove","path":"/baz"}]`, `{"foo":"bar"}`},
		"A.4":  {`{"foo":["bar","qux","baz"]}`, `[{"op":"remove","path":"/foo/1"}]`, `{"foo":["bar","baz"]}`},
		"A.5":  {`{"baz":"qux","foo":"bar"}`, `[{"op":"replace","path":"/baz","value":"boo"}]`, `{"baz":"boo","foo":"bar"}`},
		"A.6":  {`{"foo":{"bar":"baz","waldo":"fred"},"qux":{"corge":"grault"}}`, `[{"op":"move","from":"/foo/waldo","path":"/qux/thud"}]`, `{"foo":{"bar":"baz"},"qux":{"corge":"grault","thud":"fred"}}`},
		"A.7":  {`{"foo":["all","grass","cows","eat"]}`, `[{"op":"move","from":"/foo/1","path":"/foo/3"}]`, `{"foo":["all","cows","eat","grass"]}`},
		"A.8":  {`{"baz":"qux","foo":["a",2,"c"]}`, `[{"op":"test","path":"/baz","value":"qux"},{"op":"test","path":"/foo/1","value":2}]`, `{"baz":"qux","foo":["a",2,"c"]}`},
		"A.9":  {`{"baz":"qux"}`, `[{"op":"test","path":"/baz","value":"bar"}]`, "another value"},
		"A.10": {`{"foo":"bar"}`, `[{"op":"add","path":"/child","value":{"grandchild":{}}}]`, `{"child":{"grandchild":{}},"foo":"bar"}`},
		"A.11": {`{"foo":"bar"}`, `[{"op":"add","path":"/baz","value":"qux","xyz":123}]`, `{"baz":"qux","foo":"bar"}`},
		"A.12": {`{"foo":"bar"}`, `[{"op":"add","path":"/baz/bat","value":"qux"}]`, "nothing there"},
		"A.14": {`{"/":9,"~1":10}`, `[{"op":"test","path":"/~01","value":10}]`, `{"/":9,"~1":10}`},
		"A.15": {`{"/":9,"~1":10}`, `[{"op":"test","path":"/~01","value":"10"}]`, "another value"},
		"A.16": {`{"foo":["bar"]}`, `[{"op":"add","path":"/foo/-","value":["abc","def"]}]`, `{"foo":["bar",["abc","def"]]}`},

		"whole":             {`{"a":1}`, `[{"op":"replace","path":"","value":{"b":2}}]`, `{"b":2}`},
		"numbers by value":  {`{"a":1.0}`, `[{"op":"test","path":"/a","value":1}]`, `{"a":1.0}`},
		"large numbers":     {`{"a":9007199254740993}`, `[{"op":"test","path":"/a","value":9007199254740992}]`, "another value"},
		"null":              {`{"a":null}`, `[{"op":"test","path":"/a","value":null}]`, `{"a":null}`},
		"copy is its own":   {`{"a":{"x":1}}`, `[{"op":"copy","from":"/a","path":"/b"},{"op":"add","path":"/b/x","value":2}]`, `{"a":{"x":1},"b":{"x":2}}`},
		"into itself":       {`{"a":{"b":1}}`, `[{"op":"move","from":"/a","path":"/a/b/c"}]`, "into itself"},
		"onto itself":       {`{"a":1}`, `[{"op":"move","from":"/a","path":"/a"}]`, `{"a":1}`},
		"past the end":      {`{"a":[1]}`, `[{"op":"add","path":"/a/2","value":1}]`, "nothing there"},
		"dash of no add":    {`{"a":[1]}`, `[{"op":"remove","path":"/a/-"}]`, "no index"},
		"negative":          {`{"a":[1]}`, `[{"op":"remove","path":"/a/-1"}]`, "no index"},
		"leading zero":      {`{"a":[1,2]}`, `[{"op":"remove","path":"/a/01"}]`, "no index"},
		"replace of none":   {`{}`, `[{"op":"replace","path":"/a","value":1}]`, "nothing there"},
		"tilde":             {`{}`, `[{"op":"add","path":"/~2","value":1}]`, "neither ~0 nor ~1"},
		"relative":          {`{}`, `[{"op":"add","path":"a","value":1}]`, "does not begin"},
		"no value":          {`{}`, `[{"op":"add","path":"/a"}]`, "value is needed"},
		"no from":           {`{}`, `[{"op":"copy","path":"/a"}]`, "from is needed"},
		"no path":           {`{}`, `[{"op":"add","value":1}]`, "op and path"},
		"path of no string": {`{}`, `[{"op":"add","path":1,"value":1}]`, "not a string"},
		"no operation":      {`{}`, `[1]`, "not an object"},
		"below a text":      {`{"a":"b"}`, `[{"op":"add","path":"/a/b","value":1}]`, "nothing there"},
	} {
		document, err1 := decodeJSON([]byte(test.document))
		patch, err2 := decodeJSON([]byte(test.patch))
		if err := errors.Join(err1, err2); err != nil {
			t.Fatal(name, err)
		}
		got, err := patchJSON(document, patch.([]any))
		text, _ := json.Marshal(got)
		if want, ok := strings.CutPrefix(test.want, "{"); ok {
			if err != nil || string(text) != "{"+want {
				t.Errorf("%s: %s, %v", name, text, err)
			}
		} else if err == nil || !strings.Contains(err.Error(), test.want) {
			t.Errorf("%s: %s, %v, want %q", name, text, err, test.want)
		}
	}
}

// FuzzTemplate: no template makes a pod that has more than the configuration permits, or makes the gate fail.
func FuzzTemplate(f *testing.F) {
	for _, seed := range []string{
		`{"spec":{"hostPID":true}}`, with("tools/proxy:1", "evil"), volumePatch(`{"name":"x","hostPath":{"path":"/"}}`, `"mountPath":"/l"`),
		`[{"op":"copy","from":"/spec","path":"/metadata/x"},{"op":"test","path":"/a~1b","value":1e400}]`, `[{"op":"add","path":"/spec/volumes/-","value":null}]`,
		`{"metadata":{"labels":{"team":"x"}},"spec":{"containers":[{"name":"sandbox","env":null}]}}`,
	} {
		f.Add([]byte(seed))
	}
	b := checker(Config{PodTemplates: true, Claims: []string{"c"}})
	f.Fuzz(func(t *testing.T, template []byte) {
		spec := plainSpec()
		spec.Template.Pod = template
		checked, err := b.check(spec)
		if err != nil || len(template) == 0 {
			return
		}
		pod, err := b.pod(checked, "KEY", slotOf("ns", "u", 1), nil)
		if err != nil {
			t.Fatal(err)
		}
		text, err := json.Marshal(pod)
		if err != nil {
			t.Fatal(err)
		}
		for _, never := range []string{`"hostPID":true`, `"hostNetwork":true`, `"hostIPC":true`, `"privileged":true`, `"hostPath"`, `"nfs"`,
			`"Unconfined"`, `"serviceAccountToken"`, `"runAsUser":0`, `"ephemeralContainers"`} {
			if strings.Contains(string(text), never) {
				t.Fatalf("%s in %s", never, text)
			}
		}
		if len(pod.Spec.Containers) != 1 || len(pod.Spec.InitContainers) != 1 || pod.Labels[labelUser] != hashed("alice@corp") {
			t.Fatalf("%s", text)
		}
	})
}
