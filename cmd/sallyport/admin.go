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
	"net/url"
	"os"
	"text/tabwriter"
	"time"

	"github.com/spf13/cobra"

	"github.com/sallyport/sallyport/authz"
	"github.com/sallyport/sallyport/config"
	"github.com/sallyport/sallyport/sshserver"
)

// admin serves the operator's socket, which only the gate's own user can open: mode 0600 in a directory of mode 0700.
func admin(socket string, server *sshserver.Server, policy *authz.Engine, log *slog.Logger) (stop func(), err error) {
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
	mux.HandleFunc("GET /sessions", func(w http.ResponseWriter, _ *http.Request) {
		w.Header().Set("Content-Type", "application/json")
		json.NewEncoder(w).Encode(server.Sessions())
	})
	mux.HandleFunc("POST /sessions/{id}/end", func(w http.ResponseWriter, r *http.Request) {
		var body struct{ Reason string }
		if err := json.NewDecoder(http.MaxBytesReader(w, r.Body, 4096)).Decode(&body); err != nil {
			http.Error(w, "body: "+err.Error(), http.StatusBadRequest)
			return
		}
		if !server.End(r.PathValue("id"), body.Reason) {
			http.Error(w, "no such session", http.StatusNotFound)
			return
		}
		log.Info("session ended by an operator", "session", r.PathValue("id"), "reason", authz.Printable(body.Reason, 200))
	})
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

func sessionCommand() *cobra.Command {
	var file, socket, output string
	client := func() (*adminClient, error) {
		if socket == "" {
			cfg, err := config.Load(file)
			if err != nil {
				return nil, err
			}
			socket = cfg.Admin.Socket
		}
		return newAdminClient(socket), nil
	}
	cmd := &cobra.Command{Use: "session", Short: "List and end running sessions"}
	cmd.PersistentFlags().StringVar(&file, "config", defaultConfig, "the gate's configuration file")
	cmd.PersistentFlags().StringVar(&socket, "socket", "", "the gate's admin socket (default: from the configuration)")
	list := &cobra.Command{
		Use: "list", Short: "List running sessions", Args: cobra.NoArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			c, err := client()
			if err != nil {
				return err
			}
			var sessions []sshserver.SessionInfo
			if err := c.do(cmd.Context(), "GET", "/sessions", nil, &sessions); err != nil {
				return err
			}
			if output == "json" {
				enc := json.NewEncoder(cmd.OutOrStdout())
				enc.SetIndent("", "  ")
				return enc.Encode(sessions)
			}
			w := tabwriter.NewWriter(cmd.OutOrStdout(), 0, 0, 2, ' ', 0)
			fmt.Fprintln(w, "SESSION\tUSER\tSOURCE\tTICKET\tPROFILE\tSTARTED\tEXPIRES")
			for _, s := range sessions {
				fmt.Fprintf(w, "%s\t%s\t%s\t%s\t%s\t%s\t%s\n", s.ID, s.User, s.Source, authz.Printable(s.Ticket, 64),
					authz.Printable(s.Profile, 64), s.Started.UTC().Format(time.RFC3339), s.Expires.UTC().Format(time.RFC3339))
			}
			return w.Flush()
		},
	}
	list.Flags().StringVar(&output, "output", "text", "text or json")
	var reason string
	end := &cobra.Command{
		Use: "end ID", Short: "End a running session", Args: cobra.ExactArgs(1),
		RunE: func(cmd *cobra.Command, args []string) error {
			c, err := client()
			if err != nil {
				return err
			}
			return c.do(cmd.Context(), "POST", "/sessions/"+url.PathEscape(args[0])+"/end", map[string]string{"reason": reason}, nil)
		},
	}
	end.Flags().StringVar(&reason, "reason", "", "told to the user and recorded")
	cmd.AddCommand(list, end)
	return cmd
}
