// Command cluster is a real Kubernetes cluster of one node for the tests, in one binary: etcd, kube-apiserver,
// kube-controller-manager, kube-scheduler, kubelet, kube-proxy and kubectl, each unchanged and a command of its own.
// `up` runs them beside Debian's containerd and runc, `down` takes every trace away. One cluster per machine, as root.
package main

import (
	"context"
	"fmt"
	"os"

	"github.com/spf13/cobra"
	"go.etcd.io/etcd/server/v3/etcdmain"
	"k8s.io/component-base/cli"
	_ "k8s.io/component-base/metrics/prometheus/clientgo"
	_ "k8s.io/component-base/metrics/prometheus/version"
	kubectl "k8s.io/kubectl/pkg/cmd"
	kubectlutil "k8s.io/kubectl/pkg/cmd/util"
	apiserver "k8s.io/kubernetes/cmd/kube-apiserver/app"
	controllers "k8s.io/kubernetes/cmd/kube-controller-manager/app"
	proxy "k8s.io/kubernetes/cmd/kube-proxy/app"
	scheduler "k8s.io/kubernetes/cmd/kube-scheduler/app"
	kubelet "k8s.io/kubernetes/cmd/kubelet/app"
)

const usage = `usage: cluster COMMAND

  up               starts the cluster, waits until it is ready, prints its KUBECONFIG; clears a broken one first
  down             stops it and leaves nothing: no process, mount, cgroup, link, rule or file
  import FILE...   gives the node an image archive (docker save, or OCI); "-" is standard input
  kubectl ...      kubectl on this cluster, or on that of KUBECONFIG

SALLYPORT_CLUSTER_DIR is where everything of it lies (/var/lib/sallyport-cluster).
`

// components are upstream's. Only the one that is asked for is made: their flags would collide.
var components = map[string]func() *cobra.Command{
	"kube-apiserver":          apiserver.NewAPIServerCommand,
	"kube-controller-manager": controllers.NewControllerManagerCommand,
	"kube-scheduler":          func() *cobra.Command { return scheduler.NewSchedulerCommand() },
	"kube-proxy":              proxy.NewProxyCommand,
	"kubelet":                 func() *cobra.Command { return kubelet.NewKubeletCommand(context.Background()) },
}

func main() {
	if len(os.Args) < 2 {
		fmt.Fprint(os.Stderr, usage)
		os.Exit(2)
	}
	dir := os.Getenv("SALLYPORT_CLUSTER_DIR")
	if dir == "" {
		dir = "/var/lib/sallyport-cluster"
	}
	c := cluster{dir: dir}
	os.Args = os.Args[1:] // as the components expect it
	var err error
	switch name := os.Args[0]; name {
	case "up":
		err = c.up(context.Background())
	case "down":
		err = c.down()
	case "import":
		err = c.importImages(os.Args[1:])
	case "kubectl":
		if os.Getenv("KUBECONFIG") == "" {
			os.Setenv("KUBECONFIG", c.kubeconfig("admin"))
		}
		if err := cli.RunNoErrOutput(kubectl.NewDefaultKubectlCommand()); err != nil {
			kubectlutil.CheckErr(err)
		}
	case "etcd":
		etcdmain.Main(os.Args)
	default:
		command, ok := components[name]
		if !ok {
			fmt.Fprint(os.Stderr, usage)
			os.Exit(2)
		}
		os.Exit(cli.Run(command()))
	}
	if err != nil {
		fmt.Fprintf(os.Stderr, "cluster %s: %v\n", os.Args[0], err)
		os.Exit(1)
	}
}
