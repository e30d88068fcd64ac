# make demo     a gate with everything it needs on 127.0.0.1:2222 until Ctrl-C (PORT=, ONCE=1 ends after its proof);
#               BACKEND=kubernetes: sandboxes on the cluster of KUBECONFIG, or on one of its own
# make test     all tests with -race and what they need (PKG=./authz/... TESTFLAGS='-run Login -v'), on the cluster of
#               KUBECONFIG or one of its own, too (KUBERNETES=no: not on that)
# make soak     the tests that kill the gate, cut the power and break disk and store, and of the auditor's tool, in their long form:
#               kill, power, disk, store, auditor, containers, or one of these (SOAK=); 12 GB of disk, an hour or two
# make bench    the benchmarks beside sshd, the bare Docker API, and on Kubernetes (KUBERNETES=no: not on that)
# make build    bin/sallyport, bin/sallyport-audit, bin/sallyport-agent
# make release  archives for Linux, macOS and Windows with SHA256SUMS, in dist/
# make lint     gofmt, go vet, staticcheck      make vuln   known vulnerabilities
# make image    the server's image              make debug-image   the sandbox's
.PHONY: build release demo test soak bench lint vuln image debug-image clean
.DEFAULT_GOAL := build

# Recipes take these from the environment: a value never becomes part of a shell command.
PORT ?= 2222
PKG ?= ./...
export PORT ONCE BACKEND KUBERNETES PKG TESTFLAGS BENCHFLAGS SOAK

build:
	@build/binaries

release:
	@build/release

demo:
	@build/demo

test:
	@build/test

soak:
	@build/soak

bench:
	@build/bench

lint:
	@build/lint

vuln:
	@build/vuln

image:
	@build/server-image

debug-image:
	@images/build debug

clean:
	rm -rf bin demo dist
