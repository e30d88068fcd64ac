package agent

import (
	"crypto/ed25519"
	"encoding/base64"
	"errors"
	"flag"
	"fmt"
	"io"
	"net"
	"os"
	"os/signal"
	"runtime"
	"sync"
	"syscall"

	"golang.org/x/sys/unix"
)

// RunChild must be called at the very start of main, or of TestMain, of every program that serves as an agent: an
// agent starts processes by executing its own file. In such a child it does the child's work and exits; else it
// returns.
func RunChild() {
	hooked = true
	if len(os.Args) == 0 {
		return
	}
	var err error
	switch os.Args[0] {
	case stage2Name:
		os.Exit(stage2())
	case probeName:
		os.Exit(probeChild())
	case sftpName:
		err = serveSFTP()
	case relayName:
		err = relayCommand(os.Args[1:])
	case pinName:
		err = pinCommand(os.Args[1:])
	case serveName:
		// A gate that goes away is how each of these ends: nothing to tell.
		if err := serveCommand(os.Args[1:]); err != nil {
			os.Exit(exitCode(err))
		}
		os.Exit(0)
	default:
		return
	}
	if err != nil {
		fmt.Fprintln(os.Stderr, os.Args[0]+":", err)
		os.Exit(1)
	}
	os.Exit(0)
}

// hooked says that RunChild was called, so that this program's file may be executed as an agent.
var hooked bool

// Hooked says whether RunChild was called in this process.
func Hooked() bool { return hooked }

// Main is the whole of the agent's program. It returns the exit code.
func Main(args []string, stdout, stderr io.Writer) int {
	RunChild()
	var err error
	switch {
	case len(args) == 2 && args[1] == "version":
		fmt.Fprintln(stdout, "sallyport-agent protocol", Version)
	case len(args) > 1 && args[1] == "serve":
		err = serveCommand(args[2:])
	case len(args) > 1 && args[1] == "relay":
		err = relayCommand(args[2:])
	case len(args) > 1 && args[1] == "pin":
		err = pinCommand(args[2:])
	case len(args) == 2 && args[1] == "end":
		err = endContainer()
	case len(args) == 3 && args[1] == "install":
		err = install(args[2])
	default:
		err = errors.New("usage: sallyport-agent serve --key KEY (--socket PATH | --relay PATH [--direct ADDRESS]) | " +
			"relay --socket PATH | pin --socket PATH | install DIRECTORY | end | version")
	}
	if err != nil {
		fmt.Fprintln(stderr, "sallyport-agent:", err)
		return exitCode(err)
	}
	return 0
}

func exitCode(err error) int {
	if errors.Is(err, errRelayGone) {
		return ExitRelay
	}
	if errors.Is(err, errSharedUID) {
		return ExitShared
	}
	return 1
}

// relayCommand parses the command line of a relay.
func relayCommand(args []string) error {
	socket, pid, err := relayFlags(args)
	if err != nil {
		return err
	}
	return relay(socket, pid)
}

// relayFlags says where the agent listens, and which process it is.
func relayFlags(args []string) (socket string, pid int, err error) {
	f := flag.NewFlagSet("relay", flag.ContinueOnError)
	f.SetOutput(io.Discard)
	f.StringVar(&socket, "socket", RelaySocket, "path of the agent's socket")
	f.IntVar(&pid, "pid", 1, "the agent's process; 0: whichever of this container's listens")
	return socket, pid, f.Parse(args)
}

// serveCommand parses the command line of an agent.
func serveCommand(args []string) error {
	f := flag.NewFlagSet("serve", flag.ContinueOnError)
	f.SetOutput(io.Discard)
	var (
		c    Config
		text = f.String("key", "", "public key of the session, base64")
		fd   = f.Int("fd", -1, "descriptor of the stream to the gate, instead of a socket's path")
	)
	f.StringVar(&c.Socket, "socket", "", "path of the gate's socket")
	f.StringVar(&c.Relay, "relay", "", "path of a socket to be made for a relay, instead of the gate's")
	f.StringVar(&c.Direct, "direct", "", "address to wait for the gate at, instead of a relay")
	f.StringVar(&c.Home, "home", "", "home directory")
	alone := f.Bool("own-uid", false, "end if a process of another container in the process namespace has this uid")
	if err := f.Parse(args); err != nil {
		return err
	}
	if *alone {
		if err := refuseSharedUID(); err != nil {
			return err
		}
	}
	b, err := base64.StdEncoding.DecodeString(*text)
	if err != nil || len(b) != ed25519.PublicKeySize {
		return errors.New("--key: not a public key")
	}
	c.Key = b
	if err := takeSlack(); err != nil {
		return err
	}
	if *fd >= 0 {
		file := os.NewFile(uintptr(*fd), "gate")
		syscall.CloseOnExec(*fd)
		c.Conn, err = net.FileConn(file)
		file.Close()
		if err != nil {
			return fmt.Errorf("--fd: %w", err)
		}
	} else if (c.Socket == "") == (c.Relay == "") {
		return errors.New("either --socket or --relay is needed")
	} else if c.Direct != "" && c.Relay == "" {
		return errors.New("--direct needs --relay")
	}
	return Serve(c)
}

// slack is how late a timer of the agent's may come, in nanoseconds; ordinarySlack is what Linux gives to all (prctl(2),
// PR_SET_TIMERSLACK), and what the session's processes have.
const (
	slack         = 1_000_000
	ordinarySlack = 50_000
)

// takeSlack has the timers of this process be less exact: while notifications come, the runtime's monitor wakes up every 20 µs
// and takes processors from threads that wait for the next one. Its thread is there already, and nobody else may change it, so
// the process executes itself once more. An agent that may not do so is slower, and otherwise the same.
func takeSlack() error {
	runtime.LockOSThread()
	defer runtime.UnlockOSThread()
	now, err := unix.PrctlRetInt(unix.PR_GET_TIMERSLACK, 0, 0, 0, 0)
	if err != nil || now >= slack {
		return nil
	}
	if unix.Prctl(unix.PR_SET_TIMERSLACK, slack, 0, 0, 0) != nil {
		return nil
	}
	return fmt.Errorf("execute the agent again: %w", syscall.Exec(self, os.Args, os.Environ()))
}

// takeSignals makes this process take every signal there is and do nothing: the default of most would end it.
func takeSignals() {
	c := make(chan os.Signal, 16)
	for n := syscall.Signal(1); n < 65; n++ {
		switch n {
		case syscall.SIGKILL, syscall.SIGSTOP: // can't be taken
		case syscall.SIGCHLD: // the reaper's
		case syscall.SIGURG: // the runtime's own, thousands of them; its default is to do nothing
		default:
			signal.Notify(c, n)
		}
	}
	go func() {
		for range c {
		}
	}()
}

// startThreads makes the runtime start n threads, which it keeps for later.
func startThreads(n int) {
	var ready, release sync.WaitGroup
	release.Add(1)
	for range n {
		ready.Add(1)
		go func() {
			runtime.LockOSThread()
			defer runtime.UnlockOSThread()
			ready.Done()
			release.Wait()
		}()
	}
	ready.Wait()
	release.Done()
}
