package agent

import (
	"encoding/binary"
	"fmt"
	"os"
	"strconv"

	"golang.org/x/sys/unix"
)

// openPTY returns both ends of a new pseudo terminal, and its name.
func openPTY() (master, slave *os.File, name string, err error) {
	master, err = os.OpenFile("/dev/ptmx", os.O_RDWR|unix.O_NOCTTY|unix.O_CLOEXEC|unix.O_NONBLOCK, 0)
	if err != nil {
		return nil, nil, "", fmt.Errorf("open a terminal: %w", err)
	}
	var n int
	err = onFd(master, func(fd int) error {
		if err := unix.IoctlSetPointerInt(fd, unix.TIOCSPTLCK, 0); err != nil {
			return err
		}
		var err error
		n, err = unix.IoctlGetInt(fd, unix.TIOCGPTN)
		return err
	})
	if err == nil {
		name = "/dev/pts/" + strconv.Itoa(n)
		slave, err = os.OpenFile(name, os.O_RDWR|unix.O_NOCTTY|unix.O_CLOEXEC, 0)
	}
	if err != nil {
		master.Close()
		return nil, nil, "", fmt.Errorf("open a terminal: %w", err)
	}
	return master, slave, name, nil
}

// onFd calls f with the descriptor, leaving its mode as it is.
func onFd(f *os.File, do func(fd int) error) error {
	c, err := f.SyscallConn()
	if err != nil {
		return err
	}
	var result error
	if err := c.Control(func(fd uintptr) { result = do(int(fd)) }); err != nil {
		return err
	}
	return result
}

func resizePTY(tty *os.File, s windowSize) error {
	short := func(n uint32) uint16 { return uint16(min(n, 0xffff)) }
	return onFd(tty, func(fd int) error {
		return unix.IoctlSetWinsize(fd, unix.TIOCSWINSZ, &unix.Winsize{
			Row: short(s.Rows), Col: short(s.Columns), Xpixel: short(s.Width), Ypixel: short(s.Height),
		})
	})
}

// terminalState reads what the line discipline will do with typed bytes. The master answers for its slave.
func terminalState(master *os.File) (echo, canonical bool) {
	onFd(master, func(fd int) error {
		t, err := unix.IoctlGetTermios(fd, unix.TCGETS)
		if err == nil {
			echo, canonical = t.Lflag&unix.ECHO != 0, t.Lflag&unix.ICANON != 0
		}
		return err
	})
	return echo, canonical
}

// Opcodes of RFC 4254, section 8. The characters 1 to 18 and the flags are each an index or a bit of termios.
var (
	modeChars = map[byte]int{
		1: unix.VINTR, 2: unix.VQUIT, 3: unix.VERASE, 4: unix.VKILL, 5: unix.VEOF, 6: unix.VEOL, 7: unix.VEOL2,
		8: unix.VSTART, 9: unix.VSTOP, 10: unix.VSUSP, 12: unix.VREPRINT, 13: unix.VWERASE, 14: unix.VLNEXT,
		16: unix.VSWTC, 18: unix.VDISCARD, // VDSUSP (11), VFLUSH (15), VSTATUS (17) are unknown to Linux
	}
	modeInput = map[byte]uint32{
		30: unix.IGNPAR, 31: unix.PARMRK, 32: unix.INPCK, 33: unix.ISTRIP, 34: unix.INLCR, 35: unix.IGNCR, 36: unix.ICRNL,
		37: unix.IUCLC, 38: unix.IXON, 39: unix.IXANY, 40: unix.IXOFF, 41: unix.IMAXBEL,
		42: unix.IUTF8, // RFC 8160
	}
	modeLocal = map[byte]uint32{
		50: unix.ISIG, 51: unix.ICANON, 52: unix.XCASE, 53: unix.ECHO, 54: unix.ECHOE, 55: unix.ECHOK, 56: unix.ECHONL,
		57: unix.NOFLSH, 58: unix.TOSTOP, 59: unix.IEXTEN, 60: unix.ECHOCTL, 61: unix.ECHOKE, 62: unix.PENDIN,
	}
	modeOutput = map[byte]uint32{
		70: unix.OPOST, 71: unix.OLCUC, 72: unix.ONLCR, 73: unix.OCRNL, 74: unix.ONOCR, 75: unix.ONLRET,
	}
	modeControl = map[byte]uint32{92: unix.PARENB, 93: unix.PARODD}
	modeSpeed   = map[uint32]uint32{
		0: unix.B0, 50: unix.B50, 75: unix.B75, 110: unix.B110, 134: unix.B134, 150: unix.B150, 200: unix.B200,
		300: unix.B300, 600: unix.B600, 1200: unix.B1200, 1800: unix.B1800, 2400: unix.B2400, 4800: unix.B4800,
		9600: unix.B9600, 19200: unix.B19200, 38400: unix.B38400, 57600: unix.B57600, 115200: unix.B115200,
		230400: unix.B230400,
	}
)

// applyModes changes t as encoded terminal modes say. As RFC 4254, section 8 has it, parsing ends at opcodes 160 and
// above, and unknown opcodes are ignored.
func applyModes(t *unix.Termios, modes []byte) {
	flag := func(f *uint32, bits map[byte]uint32, op byte, on bool) {
		if on {
			*f |= bits[op]
		} else {
			*f &^= bits[op]
		}
	}
	for len(modes) >= 5 {
		op, value := modes[0], binary.BigEndian.Uint32(modes[1:])
		modes = modes[5:]
		if op == 0 || op >= 160 {
			return
		}
		if i, ok := modeChars[op]; ok {
			if value == 255 {
				value = 0 // "255 if none"; Linux: _POSIX_VDISABLE
			}
			t.Cc[i] = uint8(value)
		}
		flag(&t.Iflag, modeInput, op, value != 0)
		flag(&t.Lflag, modeLocal, op, value != 0)
		flag(&t.Oflag, modeOutput, op, value != 0)
		flag(&t.Cflag, modeControl, op, value != 0)
		switch op {
		case 90, 91: // CS7, CS8
			if value != 0 {
				size := uint32(unix.CS7)
				if op == 91 {
					size = unix.CS8
				}
				t.Cflag = t.Cflag&^unix.CSIZE | size
			}
		case 128: // TTY_OP_ISPEED: Linux keeps one speed
			if s, ok := modeSpeed[value]; ok {
				t.Ispeed = s
			}
		case 129: // TTY_OP_OSPEED
			if s, ok := modeSpeed[value]; ok {
				t.Ospeed = s
				t.Cflag = t.Cflag&^unix.CBAUD | s
			}
		}
	}
}

func setModes(tty *os.File, modes []byte) error {
	if len(modes) == 0 {
		return nil
	}
	return onFd(tty, func(fd int) error {
		t, err := unix.IoctlGetTermios(fd, unix.TCGETS)
		if err != nil {
			return err
		}
		applyModes(t, modes)
		return unix.IoctlSetTermios(fd, unix.TCSETS, t)
	})
}
