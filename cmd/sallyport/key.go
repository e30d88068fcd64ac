package main

import (
	"bytes"
	"crypto/ed25519"
	"errors"
	"fmt"
	"io/fs"
	"os"

	"github.com/spf13/cobra"

	"github.com/sallyport/sallyport/auditlog"
	"github.com/sallyport/sallyport/config"
)

// keyCommand is about the key that signs the log.
func keyCommand() *cobra.Command {
	cmd := &cobra.Command{
		Use: "key", Short: "Make the key that signs the log, and show its public half", Args: usageArgs(cobra.NoArgs),
		RunE: func(*cobra.Command, []string) error {
			return usageError(errors.New("key: say new, public or fingerprint"))
		},
		Long: `Make the key that signs the log, and show its public half.

Auditors pin the public key: they get it, or its fingerprint, from the gate's operator on a way that does not lead through the store.`,
		Example: `  sallyport key new /etc/sallyport/log-2027.key
  sallyport key fingerprint
  sallyport key public >> pinned-keys`,
	}
	var file string
	cmd.AddCommand(&cobra.Command{
		Use: "new FILE", Short: "Make a key (PKCS#8, mode 0600), and FILE.pub beside it; nothing is overwritten", Args: cobra.ExactArgs(1),
		RunE: func(cmd *cobra.Command, args []string) error {
			key, err := auditlog.CreateKey(args[0])
			if errors.Is(err, fs.ErrExist) {
				return fmt.Errorf("%w: choose another name, or move it away", err)
			}
			if err != nil {
				return err
			}
			_, err = fmt.Fprintf(cmd.OutOrStdout(), "%s\n%s\n", auditlog.FormatPublicKey(key.Public().(ed25519.PublicKey)),
				auditlog.Fingerprint(key.Public().(ed25519.PublicKey)))
			return err
		},
	})
	for _, c := range []struct {
		use, short string
		text       func(ed25519.PublicKey) string
	}{
		{"public [FILE]", "Print the public key as auditors pin it", auditlog.FormatPublicKey},
		{"fingerprint [FILE]", "Print the public key's fingerprint, to compare with an auditor's", auditlog.Fingerprint},
	} {
		sub := &cobra.Command{
			Use: c.use, Short: c.short, Args: cobra.MaximumNArgs(1),
			Long: c.short + `.

FILE is a private key or a file of public keys; without it, the key is that of the configuration.`,
			RunE: func(cmd *cobra.Command, args []string) error {
				keys, err := publicKeys(file, args)
				if err != nil {
					return err
				}
				for _, k := range keys {
					if _, err := fmt.Fprintln(cmd.OutOrStdout(), c.text(k)); err != nil {
						return err
					}
				}
				return nil
			},
		}
		sub.Flags().StringVar(&file, "config", defaultConfig, "configuration file")
		cmd.AddCommand(sub)
	}
	return cmd
}

// publicKeys reads the keys of a file, or of the configuration.
func publicKeys(configFile string, args []string) ([]ed25519.PublicKey, error) {
	if len(args) == 0 {
		cfg, err := config.Load(configFile)
		if err != nil {
			return nil, err
		}
		if cfg.Audit.PublicKey != "" {
			return auditlog.LoadPublicKeys(cfg.Audit.PublicKey)
		}
		if _, err := os.Stat(cfg.Audit.Key); errors.Is(err, fs.ErrNotExist) {
			return nil, fmt.Errorf("there is no key yet at %s: the gate's first start makes it, or sallyport key new", cfg.Audit.Key)
		}
		args = []string{cfg.Audit.Key}
	}
	keys, err := auditlog.LoadPublicKeys(args[0])
	if err == nil || errors.Is(err, fs.ErrNotExist) {
		return keys, err
	}
	if b, rerr := os.ReadFile(args[0]); rerr == nil && !bytes.Contains(b, []byte("PRIVATE KEY")) {
		return nil, err // it is none, so what is wrong with it as a public key is what counts
	}
	key, err := auditlog.LoadKey(args[0])
	if err != nil {
		return nil, err
	}
	return []ed25519.PublicKey{key.Public().(ed25519.PublicKey)}, nil
}
