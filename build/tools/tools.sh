# shellcheck shell=bash
# Sourced: the Go programs that check this project, at the versions of go.mod beside this file, apart from the project's.

# tool NAME: prints the path of a tool, which is built first if this version of go.sum has not been built by this Go.
tool() {
	local dir
	# shellcheck disable=SC2154 # cache is build/lib.sh's
	dir=$cache/tools-$( (go env GOVERSION && cat build/tools/go.mod build/tools/go.sum) | sha256sum | cut -c1-16)
	if [ ! -x "$dir/$1" ]; then
		step "building the checkers" >&2
		mkdir -p "$dir"
		GOBIN=$dir GOFLAGS=-buildvcs=false go -C build/tools install tool
	fi
	echo "$dir/$1"
}
