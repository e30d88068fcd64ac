package main

import (
	"context"
	"errors"
	"fmt"
	"net"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"syscall"
	"time"

	"golang.org/x/sync/errgroup"
	"google.golang.org/grpc"
	"google.golang.org/grpc/credentials/insecure"
	cri "k8s.io/cri-api/pkg/apis/runtime/v1"
)

// What the parts make wherever they are told to be, alone or where another containerd may have its sockets by the end,
// and the settings that they change. note writes down what is absent and what is set; clear restores both.
var (
	madeOutside = []string{"/var/lib/kubelet", "/var/lib/cni", "/var/log/containers"}
	madeShared  = []string{"/run/containerd/s", "/run/containerd"}
	changed     = []string{
		"net/ipv4/ip_forward", "vm/overcommit_memory", "vm/panic_on_oom", "kernel/panic", "kernel/panic_on_oops",
		"kernel/keys/root_maxkeys", "kernel/keys/root_maxbytes",
	}
)

// noteFile is written first and removed last, so that a directory with it is a cluster's.
const noteFile = "machine"

func (c cluster) exists() bool {
	_, err := os.Stat(c.path(noteFile))
	return err == nil
}

func (c cluster) note() error {
	var text strings.Builder
	for _, path := range slices.Concat(madeOutside, madeShared) {
		if _, err := os.Stat(path); errors.Is(err, os.ErrNotExist) {
			fmt.Fprintln(&text, "absent", path)
		}
	}
	for _, name := range changed {
		if value, err := os.ReadFile("/proc/sys/" + name); err == nil {
			fmt.Fprintln(&text, "setting", name, strings.TrimSpace(string(value)))
		}
	}
	return c.write(noteFile, []byte(text.String()))
}

// down stops the cluster, if there is one, and leaves nothing of it.
func (c cluster) down() error {
	release, err := lock(context.Background())
	if err != nil {
		return err
	}
	defer release()
	return c.clear()
}

// clear takes away all that a cluster is or has left, in whatever state it is: running, half started, or killed.
func (c cluster) clear() error {
	if !c.exists() {
		return nil
	}
	// The kubelet first: it would start again what is stopped next.
	errs := []error{c.stop(5*time.Second, "kubelet", "kube-proxy", "kube-scheduler", "kube-controller-manager")}
	grace := 5 * time.Second
	if len(c.processes("containerd")) == 0 || c.removePods() != nil {
		grace = 0 // shims that containerd can't reach any more, and pods that it couldn't end
	}
	errs = append(errs, killCgroups(), c.stop(grace, "containerd"),
		c.stop(3*time.Second, "kube-apiserver"), c.stop(3*time.Second, "etcd"), c.stop(0))

	for _, mount := range c.mounts() {
		syscall.Unmount(mount, syscall.MNT_DETACH)
	}
	removeCgroups()
	for strings.Contains(forwardRules(), "-i "+bridge) {
		if err := run(append([]string{"iptables", "-w", "-D"}, forwardRule...)...); err != nil {
			errs = append(errs, err)
			break
		}
	}
	// No error where there is none: what is left is told below.
	run("ip", "link", "delete", bridge)
	run("nft", "delete", "table", "ip", "kube-proxy")
	run("nft", "delete", "table", "ip6", "kube-proxy")

	// The sockets of shims that were killed are in a place of all containerds.
	addresses, _ := filepath.Glob(c.path("containerd/state/io.containerd.runtime.v2.task/k8s.io/*/address"))
	for _, file := range addresses {
		address, _ := os.ReadFile(file)
		if socket, ok := strings.CutPrefix(string(address), "unix:///run/containerd/s/"); ok {
			os.Remove(filepath.Join("/run/containerd/s", filepath.Base(socket)))
		}
	}

	errs = append(errs, c.restore())
	if mounts := c.mounts(); len(mounts) > 0 {
		return errors.Join(append(errs, fmt.Errorf("still mounted: %s", strings.Join(mounts, " ")))...)
	}
	if _, err := net.InterfaceByName(bridge); err == nil {
		errs = append(errs, fmt.Errorf("the link %s can't be deleted", bridge))
	}
	if err := errors.Join(errs...); err != nil {
		return err
	}
	entries, err := os.ReadDir(c.dir)
	if err != nil {
		return err
	}
	for _, e := range entries {
		if e.Name() != noteFile {
			errs = append(errs, os.RemoveAll(c.path(e.Name())))
		}
	}
	if err := errors.Join(errs...); err != nil {
		return err
	}
	return os.RemoveAll(c.dir)
}

// stop ends the processes of the named parts, or of all: SIGTERM, then SIGKILL after the grace.
func (c cluster) stop(grace time.Duration, names ...string) error {
	signal := func(s syscall.Signal, limit time.Duration) error {
		for _, pid := range c.processes(names...) {
			syscall.Kill(pid, s)
		}
		ctx, cancel := context.WithTimeout(context.Background(), limit)
		defer cancel()
		return until(ctx, "processes to end", func() error {
			if pids := c.processes(names...); len(pids) > 0 {
				return fmt.Errorf("still there: %v", pids)
			}
			return nil
		})
	}
	if grace > 0 && signal(syscall.SIGTERM, grace) == nil {
		return nil
	}
	return signal(syscall.SIGKILL, 10*time.Second)
}

// removePods has containerd end every pod at once, which undoes its mounts and its network.
func (c cluster) removePods() error {
	ctx, cancel := context.WithTimeout(context.Background(), time.Minute)
	defer cancel()
	conn, err := grpc.NewClient("unix://"+c.socket(), grpc.WithTransportCredentials(insecure.NewCredentials()))
	if err != nil {
		return err
	}
	defer conn.Close()
	runtime := cri.NewRuntimeServiceClient(conn)
	pods, err := runtime.ListPodSandbox(ctx, &cri.ListPodSandboxRequest{})
	if err != nil {
		return err
	}
	var group errgroup.Group
	group.SetLimit(8)
	for _, pod := range pods.Items {
		group.Go(func() error {
			if _, err := runtime.StopPodSandbox(ctx, &cri.StopPodSandboxRequest{PodSandboxId: pod.Id}); err != nil {
				return err
			}
			_, err := runtime.RemovePodSandbox(ctx, &cri.RemovePodSandboxRequest{PodSandboxId: pod.Id})
			return err
		})
	}
	return group.Wait()
}

// mounts lists what is mounted in the directory, the innermost first.
func (c cluster) mounts() []string {
	var mounts []string
	info, _ := os.ReadFile("/proc/self/mountinfo")
	for line := range strings.Lines(string(info)) {
		if f := strings.Fields(line); len(f) > 4 && strings.HasPrefix(f[4], c.dir+"/") {
			mounts = append(mounts, f[4])
		}
	}
	slices.Sort(mounts)
	slices.Reverse(mounts)
	return mounts
}

func (c cluster) restore() error {
	note, err := os.ReadFile(c.path(noteFile))
	if err != nil {
		return err
	}
	var errs []error
	for line := range strings.Lines(string(note)) {
		f := strings.Fields(line)
		switch {
		case len(f) == 2 && f[0] == "absent" && slices.Contains(madeOutside, f[1]):
			errs = append(errs, os.RemoveAll(f[1]))
		case len(f) == 2 && f[0] == "absent" && slices.Contains(madeShared, f[1]):
			os.Remove(f[1]) // not if there is something in it
		case len(f) == 3 && f[0] == "setting" && slices.Contains(changed, f[1]):
			path := "/proc/sys/" + f[1]
			if now, err := os.ReadFile(path); err == nil && strings.TrimSpace(string(now)) != f[2] {
				errs = append(errs, os.WriteFile(path, []byte(f[2]), 0))
			}
		}
	}
	return errors.Join(errs...)
}

// The cluster's processes have a cgroup of their own below the root, in each hierarchy (v1) or the one (v2).

func cgroupRoots() []string {
	if _, err := os.Stat("/sys/fs/cgroup/cgroup.controllers"); err == nil {
		return []string{"/sys/fs/cgroup"}
	}
	roots, _ := filepath.Glob("/sys/fs/cgroup/*")
	return roots
}

func makeCgroups() error {
	for _, root := range cgroupRoots() {
		// v2: what a controller does is passed on to children by the parent. One that can't be is missed by the kubelet.
		for _, controller := range []string{"cpuset", "cpu", "memory", "pids", "hugetlb", "io"} {
			os.WriteFile(root+"/cgroup.subtree_control", []byte("+"+controller), 0)
		}
		if err := os.Mkdir(filepath.Join(root, cgroup), 0o755); err != nil && !errors.Is(err, os.ErrExist) {
			return err
		}
	}
	return nil
}

// cgroups lists the cgroup and all below it, the innermost first.
func cgroups() []string {
	var all []string
	for _, root := range cgroupRoots() {
		filepath.WalkDir(filepath.Join(root, cgroup), func(path string, d os.DirEntry, err error) error {
			if err == nil && d.IsDir() {
				all = append(all, path)
			}
			return nil // one that goes away meanwhile
		})
	}
	slices.Reverse(all)
	return all
}

// killCgroups ends the processes of pods that containerd didn't end.
func killCgroups() error {
	ctx, cancel := context.WithTimeout(context.Background(), 10*time.Second)
	defer cancel()
	return until(ctx, "the pods' processes to end", func() error {
		left := 0
		for _, dir := range cgroups() {
			processes, _ := os.ReadFile(dir + "/cgroup.procs")
			for _, p := range strings.Fields(string(processes)) {
				if pid, err := strconv.Atoi(p); err == nil && pid > 1 {
					syscall.Kill(pid, syscall.SIGKILL)
					left++
				}
			}
		}
		if left > 0 {
			return fmt.Errorf("%d are left", left)
		}
		return nil
	})
}

func removeCgroups() {
	for _, dir := range cgroups() {
		syscall.Rmdir(dir)
	}
}
