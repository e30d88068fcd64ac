package kubernetes

import (
	"context"
	"errors"
	"fmt"
	"net"
	"strings"
	"syscall"
	"testing"
	"time"

	corev1 "k8s.io/api/core/v1"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/runtime/schema"
	"k8s.io/streaming/pkg/httpstream"
)

func TestFate(t *testing.T) {
	now := metav1.Now()
	disrupted := func(reason string) corev1.PodStatus {
		return corev1.PodStatus{Phase: "Running", Conditions: []corev1.PodCondition{{Type: corev1.DisruptionTarget, Status: "True", Reason: reason, Message: "m"}}}
	}
	for _, test := range []struct {
		name     string
		pod      corev1.Pod
		deleted  bool
		short    string // empty: it lives
		contains string
	}{
		{"running", corev1.Pod{Status: corev1.PodStatus{Phase: "Running"}}, false, "", ""},
		{"pending", corev1.Pod{Status: corev1.PodStatus{Phase: "Pending"}}, false, "", ""},
		{"evicted", corev1.Pod{Status: corev1.PodStatus{Phase: "Failed", Reason: "Evicted", Message: "low on memory"}}, false, "evicted by its node", "low on memory"},
		{"deadline", corev1.Pod{Status: corev1.PodStatus{Phase: "Failed", Reason: "DeadlineExceeded"}}, false, "longest life", "DeadlineExceeded"},
		{"lost", corev1.Pod{Status: corev1.PodStatus{Phase: "Unknown", Reason: "NodeLost"}}, false, "lost with its node", "NodeLost"},
		{"out of memory", corev1.Pod{Status: corev1.PodStatus{Phase: "Failed", ContainerStatuses: []corev1.ContainerStatus{
			{Name: mainContainer, State: corev1.ContainerState{Terminated: &corev1.ContainerStateTerminated{Reason: "OOMKilled", ExitCode: 137}}},
		}}}, false, "out of memory", "exit code 137"},
		{"ended", corev1.Pod{Status: corev1.PodStatus{Phase: "Succeeded"}}, false, "ended", "Succeeded"},
		{"drained", corev1.Pod{Status: disrupted("EvictionByEvictionAPI")}, false, "node is being cleared", "EvictionByEvictionAPI"},
		{"tainted", corev1.Pod{Status: disrupted("DeletionByTaintManager")}, false, "node is lost", "m"},
		{"preempted", corev1.Pod{Status: disrupted("PreemptionByScheduler")}, false, "higher priority", "m"},
		{"collected", corev1.Pod{Status: disrupted("DeletionByPodGC")}, false, "lost with its node", "m"},
		{"being deleted", corev1.Pod{ObjectMeta: metav1.ObjectMeta{DeletionTimestamp: &now}}, false, "is being deleted", ""},
		{"deleted", corev1.Pod{Status: corev1.PodStatus{Phase: "Running"}}, true, "was deleted", ""},
	} {
		short, whole := fate(&test.pod, test.deleted)
		if (test.short == "") != (short == "") || !strings.Contains(short, test.short) || short != "" && !strings.Contains(whole, test.contains) {
			t.Errorf("%s: %q, %q", test.name, short, whole)
		}
	}
}

func TestTrouble(t *testing.T) {
	waiting := func(reason string) *corev1.Pod {
		return &corev1.Pod{Status: corev1.PodStatus{ContainerStatuses: []corev1.ContainerStatus{
			{Name: mainContainer, Image: "i", State: corev1.ContainerState{Waiting: &corev1.ContainerStateWaiting{Reason: reason, Message: "m"}}},
		}}}
	}
	for reason, want := range map[string]string{
		"ContainerCreating": "", "PodInitializing": "", "ErrImagePull": noImage, "ImagePullBackOff": noImage, "ErrImageNeverPull": noImage,
		"InvalidImageName": noImage, "CreateContainerConfigError": noStart, "RunContainerError": noStart,
	} {
		got := ""
		if e := trouble(waiting(reason)); e != nil {
			got = e.Text
		}
		if got != want {
			t.Errorf("%s: %q", reason, got)
		}
	}
	for _, test := range []struct{ reason, message, want string }{
		{"FailedMount", `configmap "x" not found`, "the sandbox's data is not there: tell an operator"},
		{"FailedMount", "timed out waiting", ""},
		{"Failed", `Failed to pull image "x": refused`, noImage},
		{"Failed", "Error: ErrImagePull", noImage},
		{"Failed", `Error: secret "x" not found`, noStart},
		{"ErrImageNeverPull", "", noImage},
		{"FailedScheduling", "0/1 nodes", ""},
		{"FailedCreatePodSandBox", "network", ""},
	} {
		if got := troubleOf(test.reason, test.message); got != test.want {
			t.Errorf("%s %s: %q", test.reason, test.message, got)
		}
	}
}

func TestRefusal(t *testing.T) {
	pods := schema.GroupResource{Resource: "pods"}
	for _, test := range []struct {
		err  error
		want string
	}{
		{nil, ""},
		{apierrors.NewTooManyRequests("x", 1), "too much to do"},
		{apierrors.NewForbidden(pods, "x", errors.New("exceeded quota: q")), "quota"},
		{apierrors.NewForbidden(pods, "x", errors.New("PodSecurity")), "forbids"},
		{apierrors.NewUnauthorized("x"), "does not know this gate"},
		{apierrors.NewBadRequest("x"), "invalid"},
		{apierrors.NewNotFound(schema.GroupResource{Resource: "namespaces"}, "x"), "not there"},
		{apierrors.NewInternalError(errors.New("x")), "can't answer"},
		{fmt.Errorf("x: %w", errNoAnswer), "does not answer"},
		{&net.OpError{Op: "dial", Err: syscall.ECONNREFUSED}, "does not answer"},
		{context.DeadlineExceeded, "does not answer"},
		{errors.New("something else"), ""},
	} {
		if got := refusal(test.err); (got == "") != (test.want == "") || !strings.Contains(got, test.want) {
			t.Errorf("%v: %q, want %q", test.err, got, test.want)
		}
	}
}

func TestNotYet(t *testing.T) {
	for text, want := range map[string]bool{
		`unable to upgrade connection: container not found ("sandbox")`:               true,
		`unable to upgrade connection: pod does not exist`:                            true,
		`unable to upgrade connection: pods "sp-1" not found`:                         false,
		`unable to upgrade connection: pods "sp-1" is forbidden: User "x" cannot ...`: false,
		`unable to upgrade connection: 502 Bad Gateway`:                               false,
		`dial tcp 127.0.0.1:1: connect: connection refused`:                           false,
	} {
		if notYet(errors.New(text)) != want {
			t.Errorf("%s: want %v", text, want)
		}
	}
}

func TestAnswered(t *testing.T) {
	byServer := &httpstream.UpgradeFailureError{Cause: apierrors.NewForbidden(schema.GroupResource{Resource: "pods"}, "x", nil)}
	if s := answered(fmt.Errorf("x: %w", byServer)); s == nil || !apierrors.IsForbidden(s) {
		t.Errorf("%v", s)
	}
}

func TestAttempts(t *testing.T) {
	var n int
	for at := time.Duration(0); at < time.Minute; at += attempts(at) {
		n++
	}
	if n > 400 || attempts(0) > 50*time.Millisecond {
		t.Errorf("%d attempts in a minute", n)
	}
}

func TestTail(t *testing.T) {
	var said tail
	for range 100 {
		if n, err := said.Write(make([]byte, 100)); n != 100 || err != nil {
			t.Fatal(n, err)
		}
	}
	if len(said.b) != maxTail {
		t.Errorf("%d bytes", len(said.b))
	}
}
