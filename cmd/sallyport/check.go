package main

import (
	"context"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"log/slog"
	"net"
	"strings"
	"time"

	"github.com/spf13/cobra"

	"github.com/sallyport/sallyport/auditlog/s3"
	"github.com/sallyport/sallyport/authz"
	"github.com/sallyport/sallyport/config"
	"github.com/sallyport/sallyport/sshserver"
)

func checkCommand() *cobra.Command {
	var name string
	cmd := &cobra.Command{
		Use: "check", Short: "Check configuration, keys, policy, engine and store: each ok, or what to do", Args: cobra.NoArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			return check(cmd.Context(), name, cmd.OutOrStdout())
		},
	}
	cmd.Flags().StringVar(&name, "config", defaultConfig, "configuration file")
	return cmd
}

// check looks at each part as serve would use it, and changes nothing but what serve itself would make.
func check(ctx context.Context, name string, out io.Writer) error {
	bad := 0
	say := func(what string, err error) bool {
		if err != nil {
			bad++
			fmt.Fprintf(out, "%-10s NOT OK: %v\n", what, err)
			return false
		}
		fmt.Fprintf(out, "%-10s ok\n", what)
		return true
	}
	cfg, err := config.Load(name)
	if !say("config", err) {
		return errors.New("check failed")
	}
	quiet := slog.New(slog.DiscardHandler)
	stateErr := cfg.MakeState()
	running := false
	if stateErr == nil {
		switch unlock, err := lockState(cfg.State); {
		case err == nil:
			unlock()
		case errors.Is(err, errStateInUse):
			running = true
		default:
			stateErr = err
		}
	}
	say("state", stateErr)
	_, err = sshserver.LoadHostKeys(cfg.SSH.HostKeys, false)
	if cfg.SSH.CreateHostKeys && errors.Is(err, fs.ErrNotExist) {
		err = nil // made by the first start, under the gate's own user
	}
	say("host keys", err)
	policy, err := authz.Open(cfg.Policy, quiet)
	var warnings []string
	if err == nil {
		err = policy.Ready()
		warnings = policy.Warnings()
		policy.Close()
	}
	say("policy", err)
	for _, w := range warnings {
		fmt.Fprintf(out, "%-10s note: %s\n", "policy", w)
	}
	ctx, cancel := context.WithTimeout(ctx, 20*time.Second)
	defer cancel()
	backend, err := openBackend(ctx, cfg, cfg.Gate, quiet)
	way := ""
	if err == nil {
		err = backend.Ready(ctx)
		if joins, ok := backend.(interface{ MayJoin(context.Context) error }); ok && err == nil {
			err = joins.MayJoin(ctx)
		}
		transport, why := backend.Transport()
		way = "sandboxes are reached by " + transport + ": " + why
		backend.Close()
	}
	if say(cfg.Backend, err) {
		fmt.Fprintf(out, "%-10s note: %s\n", cfg.Backend, way)
	}
	_, err = logSigner(cfg.Audit, false)
	if errors.Is(err, fs.ErrNotExist) {
		err = nil // as the host keys
	}
	say("log key", err)
	to, err := cfg.Audit.Config.RecipientTypes()
	if say("log", err) && len(to) > 0 {
		fmt.Fprintf(out, "%-10s note: encrypted to %s\n", "log", strings.Join(to, ", "))
	}
	store, err := openStore(cfg.Audit.Store, quiet)
	if bucket, ok := store.(*s3.Store); ok && err == nil {
		err = bucket.Check(ctx, cfg.Gate)
		bucket.Close()
	}
	say("store", err)
	if running {
		fmt.Fprintf(out, "%-10s a gate runs with this state directory\n", "gate")
	} else {
		l, err := net.Listen("tcp", cfg.SSH.Listen)
		if err == nil {
			l.Close()
		}
		say("listen", err)
	}
	if bad > 0 {
		return fmt.Errorf("check: %d not ok", bad)
	}
	return nil
}
