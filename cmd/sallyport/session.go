package main

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"log/slog"
	"net/http"
	"net/url"
	"sort"
	"text/tabwriter"
	"time"

	"github.com/spf13/cobra"

	"github.com/sallyport/sallyport/authz"
	"github.com/sallyport/sallyport/backends"
	"github.com/sallyport/sallyport/config"
	"github.com/sallyport/sallyport/sshserver"
)

// sessions is what the admin socket tells of sessions, and does to them.
type sessions struct {
	server  *sshserver.Server
	backend backends.Backend
	log     *slog.Logger
}

func (s sessions) serve(mux *http.ServeMux) {
	mux.HandleFunc("GET /sessions", func(w http.ResponseWriter, r *http.Request) {
		list := s.server.Sessions()
		if r.URL.Query().Has("all") {
			var err error
			if list, err = s.all(r.Context()); err != nil {
				http.Error(w, err.Error(), http.StatusBadGateway)
				return
			}
		}
		writeAnswer(w, list)
	})
	mux.HandleFunc("POST /sessions/{id}/end", func(w http.ResponseWriter, r *http.Request) {
		var body struct{ Reason string }
		if err := json.NewDecoder(http.MaxBytesReader(w, r.Body, 4096)).Decode(&body); err != nil {
			http.Error(w, "body: "+err.Error(), http.StatusBadRequest)
			return
		}
		id := r.PathValue("id")
		var answer ended
		if !s.server.End(id, body.Reason) {
			other, err := s.endOther(r.Context(), id)
			switch {
			case err != nil:
				http.Error(w, err.Error(), http.StatusBadGateway)
				return
			case other == nil:
				http.Error(w, "no such session", http.StatusNotFound)
				return
			}
			answer.Gate = gateOf(other.Server)
		}
		s.log.Info("session ended by an operator", "session", id, "reason", authz.Printable(body.Reason, 200), "of_gate", answer.Gate)
		writeAnswer(w, answer)
	})
}

// ended is the answer to the end of a session.
type ended struct {
	Gate string `json:"gate"` // whose session it was, if it was another gate's
}

func writeAnswer(w http.ResponseWriter, v any) {
	w.Header().Set("Content-Type", "application/json")
	json.NewEncoder(w).Encode(v)
}

var errNotShared = errors.New("this gate knows its own sessions alone: its backend is not shared with other gates")

// all are the sessions of this gate, and of other gates those that have a sandbox.
func (s sessions) all(ctx context.Context) ([]sshserver.SessionInfo, error) {
	shared, ok := s.backend.(backends.Shared)
	if !ok {
		return nil, errNotShared
	}
	running, err := shared.Running(ctx)
	if err != nil {
		return nil, err
	}
	// Of its own the gate knows more than the cluster does.
	list := s.server.Sessions()
	own := make(map[string]bool, len(list))
	for _, one := range list {
		own[one.ID] = true
	}
	for _, r := range running {
		if !own[r.Session] {
			list = append(list, sshserver.SessionInfo{
				ID: r.Session, Gate: gateOf(r.Server), User: r.User, Ticket: r.Grant, Profile: r.Profile, Sandbox: r.ID, Started: r.Started,
			})
		}
	}
	sort.Slice(list, func(i, j int) bool { return list[i].ID < list[j].ID })
	return list, nil
}

// endOther ends a session of another gate by removing its sandbox. Nothing of the operator's reason reaches that gate.
func (s sessions) endOther(ctx context.Context, id string) (*backends.Session, error) {
	shared, ok := s.backend.(backends.Shared)
	if !ok {
		return nil, nil
	}
	return shared.EndRunning(ctx, id)
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
	cmd := &cobra.Command{Use: "session", Short: "List and end running sessions", Args: usageArgs(cobra.NoArgs),
		RunE: func(*cobra.Command, []string) error { return usageError(errors.New("session: say list or end")) }}
	cmd.PersistentFlags().StringVar(&file, "config", defaultConfig, "the gate's configuration file")
	cmd.PersistentFlags().StringVar(&socket, "socket", "", "the gate's admin socket (default: from the configuration)")
	all := false
	list := &cobra.Command{
		Use: "list", Short: "List running sessions", Args: cobra.NoArgs,
		Long: `List running sessions: this gate's, with --all those of all gates on the cluster, as their pods show them, and the containers of those
that have joined a target.`,
		RunE: func(cmd *cobra.Command, _ []string) error {
			c, err := client()
			if err != nil {
				return err
			}
			path := "/sessions"
			if all {
				path += "?all"
			}
			var sessions []sshserver.SessionInfo
			if err := c.do(cmd.Context(), "GET", path, nil, &sessions); err != nil {
				return err
			}
			if output == "json" {
				enc := json.NewEncoder(cmd.OutOrStdout())
				enc.SetIndent("", "  ")
				return enc.Encode(sessions)
			}
			w := tabwriter.NewWriter(cmd.OutOrStdout(), 0, 0, 2, ' ', 0)
			fmt.Fprintln(w, "SESSION\tUSER\tSOURCE\tTICKET\tPROFILE\tSTARTED\tEXPIRES\tGATE")
			for _, s := range sessions {
				// Of another gate's session the cluster tells neither source nor end.
				source, expires := "-", "-"
				if s.Source != "" {
					source = s.Source
				}
				if !s.Expires.IsZero() {
					expires = s.Expires.UTC().Format(time.RFC3339)
				}
				fmt.Fprintf(w, "%s\t%s\t%s\t%s\t%s\t%s\t%s\t%s\n", s.ID, authz.Printable(s.User, 64), source, authz.Printable(s.Ticket, 64),
					authz.Printable(s.Profile, 64), s.Started.UTC().Format(time.RFC3339), expires, authz.Printable(s.Gate, 64))
			}
			return w.Flush()
		},
	}
	list.Flags().StringVar(&output, "output", "text", "text or json")
	list.Flags().BoolVar(&all, "all", false, "of all gates on the cluster, not of this one alone (Kubernetes)")
	var reason string
	end := &cobra.Command{
		Use: "end ID", Short: "End a running session, on Kubernetes also another gate's", Args: cobra.ExactArgs(1),
		Long: `End a running session, on Kubernetes also another gate's, by removing its pod. A session that has joined a target has no pod of its
own: only its own gate ends it, which list --all names.`,
		RunE: func(cmd *cobra.Command, args []string) error {
			c, err := client()
			if err != nil {
				return err
			}
			var answer ended
			err = c.do(cmd.Context(), "POST", "/sessions/"+url.PathEscape(args[0])+"/end", map[string]string{"reason": reason}, &answer)
			if err == nil && answer.Gate != "" {
				fmt.Fprintf(cmd.OutOrStdout(), "It was gate %s's, which records that the sandbox was deleted; the reason stands in this gate's log alone.\n",
					authz.Printable(answer.Gate, 64))
			}
			return err
		},
	}
	end.Flags().StringVar(&reason, "reason", "", "told to the user and recorded, if the session is this gate's own")
	cmd.AddCommand(list, end)
	return cmd
}
