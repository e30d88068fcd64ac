# The server's image: three static binaries on nothing.
#
#   docker build --build-arg VERSION="$(build/version)" -t sallyport .        (or make image)
#
#   docker run --read-only --cap-drop ALL --security-opt no-new-privileges \
#     --group-add "$(stat -c %g /var/run/docker.sock)" -v /var/run/docker.sock:/var/run/docker.sock \
#     -v /etc/sallyport:/etc/sallyport:ro -v sallyport-state:/var/lib/sallyport -p 2222:2222 sallyport
#
# No path need be the same on the engine's host: the gate reaches its sandboxes by relays. With --pid host and a state
# directory of the same path it takes unix sockets, which are faster. See docs/securing-docker.md.
#
# The engine's socket gives whoever holds it the host: read docs/securing-docker.md first.
ARG GO_IMAGE=golang:1.26-bookworm
FROM ${GO_IMAGE} AS build
WORKDIR /src
# Modules come from vendor/ if there is one (make image makes it), else from where GOPROXY says.
ARG GOPROXY
COPY . .
ARG VERSION=unknown
RUN CGO_ENABLED=0 go build -trimpath -buildvcs=false -ldflags "-s -w -X main.version=${VERSION}" -o /out/ \
        ./cmd/sallyport ./cmd/sallyport-audit ./cmd/sallyport-agent \
    && mkdir -p /root-fs/etc/ssl/certs /root-fs/var/lib/sallyport /root-fs/run/sallyport /root-fs/tmp \
    && chmod 0700 /root-fs/var/lib/sallyport && chmod 0755 /root-fs/run/sallyport && chmod 1777 /root-fs/tmp \
    && chown 65532:65532 /root-fs/var/lib/sallyport /root-fs/run/sallyport \
    && echo 'sallyport:x:65532:65532::/var/lib/sallyport:/nonexistent' >/root-fs/etc/passwd \
    && echo 'sallyport:x:65532:' >/root-fs/etc/group \
    && cp /etc/ssl/certs/ca-certificates.crt /root-fs/etc/ssl/certs/ \
    && mkdir -p /root-fs/usr/local/bin && cp /out/* /root-fs/usr/local/bin/

FROM scratch
# One copy of a whole tree: COPY of single directories would lose their owners and modes.
COPY --from=build /root-fs/ /
USER 65532:65532
WORKDIR /var/lib/sallyport
EXPOSE 2222
ENTRYPOINT ["/usr/local/bin/sallyport"]
CMD ["serve", "--config", "/etc/sallyport/sallyport.yaml"]
