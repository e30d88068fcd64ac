package main

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"log/slog"
	"net"
	"net/http"
	"os"
	"time"

	"github.com/sallyport/sallyport/authz"
	"github.com/sallyport/sallyport/backends"
	"github.com/sallyport/sallyport/sshserver"
)

// admin serves the operator's socket, which only the gate's own user can open: mode 0600 in a directory of mode 0700.
func admin(socket string, server *sshserver.Server, backend backends.Backend, policy *authz.Engine, log *slog.Logger) (stop func(), err error) {
	// The state directory is locked, so a socket that lies here is a dead gate's; anything else is not ours to remove.
	if st, err := os.Lstat(socket); err == nil {
		if st.Mode().Type() != fs.ModeSocket {
			return nil, fmt.Errorf("admin: %s is there and no socket: choose another admin.socket", socket)
		}
		if nc, err := net.DialTimeout("unix", socket, time.Second); err == nil {
			nc.Close()
			return nil, fmt.Errorf("admin: another program answers on %s: choose another admin.socket", socket)
		}
		if err := os.Remove(socket); err != nil {
			return nil, fmt.Errorf("admin: %w", err)
		}
	}
	l, err := net.Listen("unix", socket)
	if err != nil {
		return nil, fmt.Errorf("admin: %w", err)
	}
	if err := os.Chmod(socket, 0o600); err != nil {
		l.Close()
		return nil, fmt.Errorf("admin: %w", err)
	}
	mux := http.NewServeMux()
	sessions{server, backend, log}.serve(mux)
	mux.HandleFunc("GET /policy/holds", holdsHandler(policy))
	stopHTTP := serveHTTP(l, mux, log, "admin")
	return func() { stopHTTP(); os.Remove(socket) }, nil
}

// adminClient speaks to a gate's admin socket.
type adminClient struct{ http http.Client }

func newAdminClient(socket string) *adminClient {
	return &adminClient{http.Client{
		Timeout: 10 * time.Second,
		Transport: &http.Transport{
			DisableKeepAlives: true,
			DialContext: func(ctx context.Context, _, _ string) (net.Conn, error) {
				return (&net.Dialer{}).DialContext(ctx, "unix", socket)
			},
		},
	}}
}

func (c *adminClient) do(ctx context.Context, method, path string, in, out any) error {
	var body io.Reader
	if in != nil {
		b, err := json.Marshal(in)
		if err != nil {
			return err
		}
		body = bytes.NewReader(b)
	}
	req, err := http.NewRequestWithContext(ctx, method, "http://gate"+path, body)
	if err != nil {
		return err
	}
	resp, err := c.http.Do(req)
	if err != nil {
		return fmt.Errorf("no gate answers on its admin socket (is it running, and are you its user?): %w", err)
	}
	defer resp.Body.Close()
	b, err := io.ReadAll(io.LimitReader(resp.Body, 64<<20))
	if err != nil {
		return fmt.Errorf("admin socket: %w", err)
	}
	if resp.StatusCode != http.StatusOK {
		return errors.New(string(bytes.TrimSpace(b)))
	}
	if out == nil {
		return nil
	}
	return json.Unmarshal(b, out)
}
