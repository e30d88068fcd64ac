package main

import (
	"archive/tar"
	"bytes"
	"crypto/sha256"
	"encoding/json"
	"fmt"
	"os"
	"os/exec"
	"runtime"
	"strings"
)

// busyboxImage is this machine's busybox, for tests. The sandbox that holds a pod's namespaces is one too: its command
// does nothing for ever.
const busyboxImage = "sallyport/busybox:1"

// writeImage writes that image in the format of docker save.
func writeImage(file string) error {
	binary, err := exec.LookPath("busybox")
	if err != nil {
		return err
	}
	content, err := os.ReadFile(binary)
	if err != nil {
		return err
	}
	applets, err := exec.Command(binary, "--list").Output()
	if err != nil {
		return err
	}
	var layer bytes.Buffer
	w := tar.NewWriter(&layer)
	headers := []*tar.Header{
		{Typeflag: tar.TypeDir, Name: "bin/", Mode: 0o755},
		{Typeflag: tar.TypeDir, Name: "etc/", Mode: 0o755},
		{Typeflag: tar.TypeDir, Name: "tmp/", Mode: 0o1777},
		{Typeflag: tar.TypeReg, Name: "bin/busybox", Mode: 0o755, Size: int64(len(content))},
	}
	for _, name := range strings.Fields(string(applets)) {
		if name != "busybox" {
			headers = append(headers, &tar.Header{
				Typeflag: tar.TypeSymlink, Name: "bin/" + name, Linkname: "busybox", Mode: 0o777,
			})
		}
	}
	for _, h := range headers {
		if err := w.WriteHeader(h); err != nil {
			return err
		}
		if h.Size > 0 {
			if _, err := w.Write(content); err != nil {
				return err
			}
		}
	}
	if err := w.Close(); err != nil {
		return err
	}

	type object = map[string]any
	diffID := fmt.Sprintf("sha256:%x", sha256.Sum256(layer.Bytes()))
	config, err := json.Marshal(object{
		"architecture": runtime.GOARCH,
		"os":           "linux",
		"config":       object{"Cmd": []string{"/bin/sleep", "inf"}, "Env": []string{"PATH=/bin"}},
		"rootfs":       object{"type": "layers", "diff_ids": []string{diffID}},
	})
	if err != nil {
		return err
	}
	manifest, err := json.Marshal([]object{
		{"Config": "config.json", "RepoTags": []string{busyboxImage}, "Layers": []string{"layer.tar"}},
	})
	if err != nil {
		return err
	}
	var archive bytes.Buffer
	w = tar.NewWriter(&archive)
	for _, f := range []struct {
		name    string
		content []byte
	}{{"config.json", config}, {"layer.tar", layer.Bytes()}, {"manifest.json", manifest}} {
		if err := w.WriteHeader(&tar.Header{Name: f.name, Mode: 0o644, Size: int64(len(f.content))}); err != nil {
			return err
		}
		if _, err := w.Write(f.content); err != nil {
			return err
		}
	}
	if err := w.Close(); err != nil {
		return err
	}
	return os.WriteFile(file, archive.Bytes(), 0o600)
}

// importImages gives archives to the node's containerd.
func (c cluster) importImages(files []string) error {
	for _, file := range files {
		cmd := exec.Command("ctr", "-a", c.socket(), "-n", "k8s.io", "images", "import", file)
		cmd.Stdin = os.Stdin // "-" is ctr's name for it
		if out, err := cmd.CombinedOutput(); err != nil {
			return fmt.Errorf("%s: %w: %s", file, err, bytes.TrimSpace(out))
		}
	}
	return nil
}
