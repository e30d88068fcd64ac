package test

import (
	"fmt"
	"io"
	"net"
	"strconv"
	"sync"
	"time"

	"github.com/rogpeppe/go-internal/testscript"

	"github.com/sallyport/sallyport/test/ports"
)

// cmdAnswer: answer NETWORK ADDRESS NAME [BYTES]: listens on the client's side until the script's end; each connection is read
// to its end, or as many bytes, and then answered with "NAME got" and what came.
func cmdAnswer(ts *testscript.TestScript, neg bool, args []string) {
	limit := int64(1 << 20)
	if len(args) == 4 {
		n, err := strconv.ParseInt(args[3], 10, 32)
		ts.Check(err)
		limit = n
	}
	if neg || len(args) < 3 || len(args) > 4 {
		ts.Fatalf("usage: answer NETWORK ADDRESS NAME [BYTES]")
	}
	l, err := net.Listen(args[0], args[1])
	ts.Check(err)
	var wg sync.WaitGroup
	ts.Defer(func() { l.Close(); wg.Wait() })
	wg.Go(func() {
		for {
			nc, err := l.Accept()
			if err != nil {
				return
			}
			wg.Go(func() {
				defer nc.Close()
				nc.SetDeadline(time.Now().Add(30 * time.Second))
				b, _ := io.ReadAll(io.LimitReader(nc, limit))
				fmt.Fprintf(nc, "%s got %s", args[2], b)
			})
		}
	})
}

// cmdAsk: [!] ask NETWORK ADDRESS TEXT ANSWER: connects on the client's side, sends TEXT and the end, and reads ANSWER to
// the end. Negated: there is no answer.
func cmdAsk(ts *testscript.TestScript, neg bool, args []string) {
	if len(args) != 4 {
		ts.Fatalf("usage: ask NETWORK ADDRESS TEXT ANSWER")
	}
	got, err := ask(args[0], args[1], args[2])
	if (got == args[3]) == neg {
		ts.Fatalf("ask: answer %q, %v", got, err)
	}
}

func ask(network, address, text string) (string, error) {
	nc, err := net.DialTimeout(network, address, 10*time.Second)
	if err != nil {
		return "", err
	}
	defer nc.Close()
	nc.SetDeadline(time.Now().Add(30 * time.Second))
	if _, err := io.WriteString(nc, text); err != nil {
		return "", err
	}
	if err := nc.(interface{ CloseWrite() error }).CloseWrite(); err != nil {
		return "", err
	}
	b, err := io.ReadAll(nc)
	return string(b), err
}

// cmdPorts: ports NAME...: sets each to a TCP port on loopback.
func cmdPorts(ts *testscript.TestScript, neg bool, args []string) {
	for _, name := range args {
		port, err := ports.Take()
		ts.Check(err)
		ts.Setenv(name, strconv.Itoa(port))
	}
}
