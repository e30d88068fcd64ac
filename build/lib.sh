# shellcheck shell=bash
# Sourced by the scripts behind make: progress lines, missing packages, children, and a Docker engine to use.
# A script that sources it has set -euo pipefail; one that uses `run` also says `trap pass_on INT TERM HUP`,
# and one that uses `engine` calls engine_stop in its EXIT trap.

# sbin holds dockerd and iptables, and is not on every user's path; Go's own tarball installs to /usr/local/go.
PATH="$PATH:/usr/local/sbin:/usr/sbin:/sbin:/usr/local/go/bin"
export PATH
if [ -z "${HOME:-}" ]; then
	HOME=$(getent passwd "$(id -u)" | cut -d: -f6)
	export HOME
fi
# shellcheck disable=SC2034 # what is built once and kept, for the scripts
cache="${XDG_CACHE_HOME:-$HOME/.cache}/sallyport"

step() { printf '==> %s\n' "$*"; }
die() {
	printf 'error: %s\n' "$*" >&2
	exit 1
}

# --- children ---------------------------------------------------------------------------------------------------------

child=             # pid of the step that runs, which leads a session and process group of its own
child_is_group=yes # a signal goes to the whole group; empty: to the child alone, which stops its own children
stopping=          # set once a signal has been passed on

# run CMD...: runs a step apart from our process group, so that a Ctrl-C, which the terminal sends to everybody in the
# foreground and make sends once more, reaches it exactly once: through pass_on. Its status is run's; after a signal
# the script ends.
run() {
	local rc=0
	[ -z "$stopping" ] || exit 130
	setsid "$@" </dev/null &
	child=$!
	wait "$child" || rc=$?
	while kill -0 "$child" 2>/dev/null; do # wait was interrupted by a trap
		rc=0
		wait "$child" || rc=$?
	done
	child=
	[ -z "$stopping" ] || exit 130
	return "$rc"
}

# pass_on: the trap for INT, TERM and HUP. The child gets SIGTERM whatever we got: a shell starts what runs in the
# background with SIGINT ignored. It gets it once, and 60 seconds to clean up.
pass_on() {
	[ -z "$stopping" ] || return 0
	stopping=yes
	[ -n "$child" ] || exit 130
	if [ -n "$child_is_group" ]; then
		kill -TERM -- "-$child" 2>/dev/null || true
	else
		kill -TERM "$child" 2>/dev/null || true
	fi
	(
		for _ in $(seq 600); do
			kill -0 "$child" 2>/dev/null || exit 0
			sleep 0.1
		done
		kill -KILL -- "-$child" 2>/dev/null || true
	) &
}

# --- packages ---------------------------------------------------------------------------------------------------------

is_root() { [ "$(id -u)" = 0 ]; }
is_debian() { grep -Eq '^ID(_LIKE)?=.*debian' /etc/os-release 2>/dev/null && command -v apt-get >/dev/null; }

# has NAME: a command, or one of the names below for what `command -v` can't tell.
has() {
	case $1 in
	static-busybox) command -v busybox >/dev/null && ! ldd "$(command -v busybox)" >/dev/null 2>&1 ;;
	c-headers) has gcc && echo '#include <stdlib.h>' | gcc -E -x c -o /dev/null - 2>/dev/null ;;
	sftp-server) [ -x /usr/lib/openssh/sftp-server ] || [ -x /usr/libexec/sftp-server ] || [ -x /usr/lib/ssh/sftp-server ] ;;
	sftp-curl) command -v curl >/dev/null && curl -V | grep '^Protocols:.* sftp ' >/dev/null ;;
	paramiko) [ -x /usr/bin/python3 ] && /usr/bin/python3 -c 'import paramiko' 2>/dev/null ;;
	openssh-tests) [ -f /usr/lib/openssh/regress/test-exec.sh ] ;;
	postgres-server) command -v postgres >/dev/null || compgen -G '/usr/lib/postgresql/*/bin/postgres' >/dev/null ;;
	*) command -v "$1" >/dev/null ;;
	esac
}

# need COMMAND=PACKAGE...: installs the packages whose commands are missing; touches nothing if none is.
need() {
	local pair missing=() packages=()
	for pair in "$@"; do
		if ! has "${pair%%=*}"; then
			missing+=("${pair%%=*}")
			packages+=("${pair#*=}")
		fi
	done
	[ ${#missing[@]} -gt 0 ] || return 0
	if ! is_debian || ! is_root; then
		die "missing: ${missing[*]} (Debian: apt-get install ${packages[*]}; as root this is done for you)"
	fi
	step "installing ${packages[*]}"
	apt_install "${packages[@]}"
	for pair in "$@"; do
		has "${pair%%=*}" || die "${pair%%=*} is still missing after installing ${pair#*=}"
	done
}

no_start=/usr/sbin/policy-rc.d # Debian's packages ask it whether to start a service
no_start_made=                 # it is ours

# need_idle COMMAND=PACKAGE...: as need, but no service of the packages is started: their programs are wanted, not a server
# that lets people in. A script that uses it calls need_idle_end in its EXIT trap.
need_idle() {
	local pair missing=
	for pair in "$@"; do has "${pair%%=*}" || missing=yes; done
	[ -n "$missing" ] || return 0
	if is_root && is_debian && [ ! -e "$no_start" ]; then
		printf '#!/bin/sh\nexit 101\n' >"$no_start"
		no_start_made=yes
		chmod 755 "$no_start"
	fi
	need "$@"
	need_idle_end
}

need_idle_end() {
	if [ -n "$no_start_made" ]; then rm -f "$no_start"; fi
	no_start_made=
}

# apt_install PACKAGE...: quiet unless it fails. The lock is waited for: a fresh machine may be at its first upgrade.
apt_install() {
	local log rc=0
	log=$(mktemp)
	{
		run env DEBIAN_FRONTEND=noninteractive apt-get -q -o DPkg::Lock::Timeout=300 update &&
			run env DEBIAN_FRONTEND=noninteractive apt-get -q -y -o DPkg::Lock::Timeout=300 \
				install --no-install-recommends "$@"
	} >"$log" 2>&1 || rc=$?
	[ "$rc" = 0 ] || tail -n 20 "$log" >&2
	rm -f "$log"
	[ "$rc" = 0 ] || die "apt-get install $* failed"
}

# --- the Docker engine ------------------------------------------------------------------------------------------------

engine_dir= # where the log and the pid of an engine that we started are
engine_pid= # of the dockerd that is ours to stop

engine_answers() { timeout 10 docker version --format '{{.Server.Version}}' >/dev/null 2>&1; }

# engine DIR: makes sure that a Docker engine answers. One that is there is used and left alone; otherwise dockerd is
# installed if need be, started, and ended again by engine_stop. Its log is DIR/dockerd.log.
engine() {
	engine_dir=$1
	if has docker && engine_answers; then
		engine_adopt
		return 0
	fi
	if ! is_root; then
		die "no Docker engine answers: start one, join its group, or run this as root"
	fi
	if ! has dockerd || ! has docker; then
		is_debian || die "no Docker engine: install and start one (dockerd and the docker command)"
		step "installing docker.io"
		apt_install docker.io iptables iproute2
		# From Debian 13 on, the client is a package of its own.
		has docker || apt_install docker-cli
		engine_answers && return 0 # the package's service has started it, and it stays the machine's
	fi
	need ip=iproute2 iptables=iptables
	mkdir -p "$engine_dir"
	network_note >"$engine_dir/network-before"
	step "starting dockerd (log: $engine_dir/dockerd.log)"
	# A session of its own: a Ctrl-C must not stop it before the gate has taken its containers away.
	( # nor does it keep open what our caller has: a lock's file, say
		for fd in /proc/"$BASHPID"/fd/*; do
			fd=${fd##*/}
			[ "$fd" -le 2 ] || eval "exec $fd>&-"
		done
		exec setsid dockerd
	) >"$engine_dir/dockerd.log" 2>&1 </dev/null &
	local pid=$!
	engine_pid=$pid
	echo "$pid $(start_time "$pid") $$ $(start_time $$)" >"$engine_dir/dockerd.pid"
	for _ in $(seq 300); do
		engine_answers && return 0
		kill -0 "$pid" 2>/dev/null || break
		[ -z "$stopping" ] || exit 130
		sleep 0.2
	done
	tail -n 5 "$engine_dir/dockerd.log" >&2
	die "dockerd does not start (log: $engine_dir/dockerd.log)"
}

# start_time PID: in clock ticks since boot (proc(5), field 22), so that a pid in a file is not mistaken for another's.
start_time() { sed 's/.*) //' "/proc/$1/stat" 2>/dev/null | cut -d' ' -f20; }

# engine_adopt: an engine that an earlier run started and, killed, could not stop is ours to stop. That of a run which is still
# there is not.
engine_adopt() {
	local pid began owner owner_began
	read -r pid began owner owner_began 2>/dev/null <"$engine_dir/dockerd.pid" || return 0
	if [ -n "$owner_began" ] && [ "$(start_time "$owner")" = "$owner_began" ]; then
		return 0
	fi
	if [ -n "$began" ] && [ "$(start_time "$pid")" = "$began" ]; then
		engine_pid=$pid
	else
		rm -f "$engine_dir/dockerd.pid" "$engine_dir/network-before"
	fi
}

# engine_stop: ends the dockerd that is ours, its containerd with it, and takes away what it added to the network.
engine_stop() {
	[ -n "$engine_pid" ] || return 0
	kill -TERM "$engine_pid" 2>/dev/null || true
	local n=0
	while kill -0 "$engine_pid" 2>/dev/null && [ "$n" -lt 300 ]; do
		n=$((n + 1))
		sleep 0.1
	done
	kill -KILL "$engine_pid" 2>/dev/null || true
	wait "$engine_pid" 2>/dev/null || true
	engine_pid=
	network_restore "$engine_dir/network-before"
	rm -f "$engine_dir/dockerd.pid" "$engine_dir/network-before"
}

# dockerd leaves its bridge, its iptables chains and the forwarding switch behind when it ends. The names it uses:
docker_links='docker0|docker_gwbridge|br-[0-9a-f]{12}'

links() { ip -o link show | sed -E 's/^[0-9]+: ([^:@]+).*/\1/' | grep -Ex "$docker_links" || true; }

# network_note: what is there before dockerd starts, a fact a line.
network_note() {
	links | sed 's/^/link /'
	echo "forwarding $(cat /proc/sys/net/ipv4/ip_forward)"
	local tables
	for tables in iptables ip6tables; do
		echo "$tables forward $($tables -S FORWARD 2>/dev/null | sed -n 's/^-P FORWARD //p')"
		# Not grep -q: it would end the pipe early, which pipefail takes for a failure.
		if $tables -S 2>/dev/null | grep DOCKER >/dev/null; then echo "$tables docker"; fi
	done
}

# network_restore FILE: removes what has come since FILE was noted; rules only if none of Docker's were there.
network_restore() {
	[ -r "$1" ] || return 0
	local link tables table policy
	for link in $(links); do
		grep -qx "link $link" "$1" || ip link delete "$link" 2>/dev/null || true
	done
	for tables in iptables ip6tables; do
		grep -qx "$tables docker" "$1" && continue
		for table in filter nat raw; do
			$tables -t "$table" -S 2>/dev/null | grep -E "^-A .*(DOCKER|$docker_links)" | sed 's/^-A/-D/' |
				xargs -r -L1 "$tables" -t "$table" 2>/dev/null || true
			$tables -t "$table" -S 2>/dev/null | sed -n 's/^-N \(DOCKER.*\)/-X \1/p' |
				xargs -r -L1 "$tables" -t "$table" 2>/dev/null || true
		done
		policy=$(sed -n "s/^$tables forward //p" "$1")
		[ -z "$policy" ] || $tables -P FORWARD "$policy" 2>/dev/null || true
	done
	sed -n 's/^forwarding //p' "$1" >/proc/sys/net/ipv4/ip_forward 2>/dev/null || true
}

# --- the Kubernetes cluster -------------------------------------------------------------------------------------------

cluster=            # the binary of test/cluster
cluster_ours=       # set if the cluster is ours to stop
cluster_kubeconfig= # of the cluster to use
cluster_state=${SALLYPORT_CLUSTER_DIR:-/var/lib/sallyport-cluster}

# cluster_binary: where the binary is kept, by Kubernetes' version and by what it is made of.
cluster_binary() {
	local version inputs
	version=$(sed -n 's|^\tk8s.io/kubernetes \(v[0-9.]*\)$|\1|p' test/cluster/go.mod)
	inputs=$(cat test/cluster/*.go test/cluster/go.mod test/cluster/go.sum | sha256sum | cut -c1-16)
	echo "$cache/cluster-$version/$inputs/cluster"
}

# cluster_is_of NAME: whether a run of that name started the cluster.
cluster_is_of() { [ "$(cat "$cluster_state/owner" 2>/dev/null)" = "$1" ]; }

# kubeconfig_says: which context of the user's it is that pods are about to be made with.
kubeconfig_says() {
	if has kubectl; then
		echo "context $(kubectl config current-context 2>/dev/null || echo -), $(kubectl config view --minify -o 'jsonpath={.clusters[0].cluster.server}' 2>/dev/null || echo "no server")"
	else
		echo "context $(sed -n 's/^current-context: *//p' "$KUBECONFIG" 2>/dev/null || echo -)"
	fi
}

# cluster_up NAME: sets cluster_kubeconfig to a cluster. One that KUBECONFIG gives, or that runs on this machine
# already, is used and left alone; otherwise one is started, and ended again by cluster_down. So is one that an earlier
# run of the same NAME started and, killed, could not end.
cluster_up() {
	if [ -n "${KUBECONFIG:-}" ]; then
		# The tests run in other directories.
		cluster_kubeconfig=$(realpath -e -- "$KUBECONFIG" 2>/dev/null) || die "KUBECONFIG=$KUBECONFIG is not one file"
		step "using the cluster of KUBECONFIG, $cluster_kubeconfig: $(kubeconfig_says)"
		return 0
	fi
	is_root || die "no cluster: set KUBECONFIG, or run this as root, which starts one (test and bench do without: KUBERNETES=no)"
	run build/cluster
	cluster=$(cluster_binary)
	cluster_kubeconfig=$cluster_state/admin.kubeconfig
	if ! cluster_is_of "$1" && [ -e "$cluster_kubeconfig" ] &&
		timeout 10 "$cluster" kubectl get --raw=/readyz >/dev/null 2>&1; then
		step "using the Kubernetes cluster that runs on this machine"
		return 0
	fi
	step "starting a Kubernetes cluster"
	cluster_ours=yes
	local log
	log=$(mktemp)
	if ! run env SALLYPORT_CLUSTER_OWNER="$1" "$cluster" up >"$log" 2>&1; then
		cat "$log" >&2
		rm -f "$log"
		die "the cluster does not start"
	fi
	rm -f "$log"
}

# cluster_images IMAGE...: copies images from the Docker engine to a cluster of this machine, layers that they share once.
cluster_images() {
	[ -n "$cluster" ] || return 0
	# shellcheck disable=SC2016 # for the inner shell
	run bash -c 'set -o pipefail; cluster=$1; shift; docker save "$@" | "$cluster" import -' - "$cluster" "$@" ||
		die "the cluster does not take the images $*"
}

# cluster_down: ends the cluster that is ours.
cluster_down() {
	[ -n "$cluster_ours" ] || return 0
	cluster_ours=
	"$cluster" down || true
}
