package main

import (
	"bytes"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"time"
)

// tick is the unit of times in /proc/PID/stat: USER_HZ is 100 on every architecture that Go and Docker run on.
const tick = time.Second / 100

// stat holds the fields of /proc/PID/stat that are used, see proc(5).
type stat struct {
	parent     int
	own, ended time.Duration // user and system time: its own, and of its children that were waited for
}

func readStat(pid int) (stat, error) {
	text, err := os.ReadFile("/proc/" + strconv.Itoa(pid) + "/stat")
	if err != nil {
		return stat{}, err
	}
	return parseStat(string(text))
}

func parseStat(text string) (stat, error) {
	// The command's name is in parentheses and may hold any byte.
	open, end := strings.IndexByte(text, '('), strings.LastIndexByte(text, ')')
	if open < 0 || end < open {
		return stat{}, errors.New("stat: no command")
	}
	fields := strings.Fields(text[end+1:])
	if len(fields) < 15 {
		return stat{}, errors.New("stat: too few fields")
	}
	var n [5]int64
	for i, at := range [...]int{1, 11, 12, 13, 14} { // ppid, utime, stime, cutime, cstime
		var err error
		if n[i], err = strconv.ParseInt(fields[at], 10, 64); err != nil {
			return stat{}, fmt.Errorf("stat: %w", err)
		}
	}
	return stat{
		parent: int(n[0]), own: time.Duration(n[1]+n[2]) * tick, ended: time.Duration(n[3]+n[4]) * tick,
	}, nil
}

// cpuTime is the processor time of one process.
func cpuTime(pid int) (time.Duration, error) {
	s, err := readStat(pid)
	return s.own, err
}

// familyTime is the processor time of a process and of all that are or were below it.
func familyTime(pid int) (time.Duration, error) {
	all, err := family(pid)
	var sum time.Duration
	for _, p := range all {
		if s, err := readStat(p); err == nil { // it may just have ended
			sum += s.own + s.ended
		}
	}
	return sum, err
}

// family is a process and all below it.
func family(pid int) ([]int, error) {
	entries, err := os.ReadDir("/proc")
	if err != nil {
		return nil, err
	}
	children := map[int][]int{}
	for _, e := range entries {
		child, err := strconv.Atoi(e.Name())
		if err != nil {
			continue
		}
		if s, err := readStat(child); err == nil { // it may just have ended
			children[s.parent] = append(children[s.parent], child)
		}
	}
	all := []int{pid}
	for i := 0; i < len(all); i++ {
		all = append(all, children[all[i]]...)
	}
	return all, nil
}

// memory is what a process takes, in bytes: resident, and its share where pages are shared.
type memory struct{ rss, pss float64 }

func readMemory(pid int) (memory, error) {
	text, err := os.ReadFile("/proc/" + strconv.Itoa(pid) + "/smaps_rollup")
	if err != nil {
		return memory{}, err
	}
	var m memory
	for line := range strings.Lines(string(text)) {
		f := strings.Fields(line)
		if len(f) != 3 || f[2] != "kB" {
			continue
		}
		n, err := strconv.ParseFloat(f[1], 64)
		if err != nil {
			return m, err
		}
		switch f[0] {
		case "Rss:":
			m.rss = n * 1024
		case "Pss:":
			m.pss = n * 1024
		}
	}
	if m.rss == 0 {
		return m, errors.New("smaps_rollup: no size")
	}
	return m, nil
}

// familyMemory adds up a process and all below it.
func familyMemory(pid int) (memory, int, error) {
	all, err := family(pid)
	var sum memory
	for _, p := range all {
		m, err := readMemory(p)
		if err != nil {
			if errors.Is(err, fs.ErrNotExist) {
				continue
			}
			return sum, 0, err
		}
		sum.rss += m.rss
		sum.pss += m.pss
	}
	return sum, len(all), err
}

func descriptors(pid int) (int, error) {
	entries, err := os.ReadDir("/proc/" + strconv.Itoa(pid) + "/fd")
	return len(entries), err
}

// load is the machine's load average over a minute.
func load() string {
	text, err := os.ReadFile("/proc/loadavg")
	if err != nil {
		return "unknown"
	}
	one, _, _ := strings.Cut(string(text), " ")
	return one
}

// fileSystem is the type of the file system that holds a path.
func fileSystem(path string) string {
	text, err := os.ReadFile("/proc/self/mounts")
	if err != nil {
		return "unknown"
	}
	best, kind := "", "unknown"
	for line := range strings.Lines(string(text)) {
		f := strings.Fields(line)
		if len(f) < 3 {
			continue
		}
		if (path == f[1] || strings.HasPrefix(path, strings.TrimSuffix(f[1], "/")+"/")) && len(f[1]) >= len(best) {
			best, kind = f[1], f[2]
		}
	}
	return kind
}

// field reads "name : value" of a file such as /proc/cpuinfo.
func field(file, name string) string {
	text, err := os.ReadFile(filepath.Clean(file))
	if err != nil {
		return "unknown"
	}
	for line := range bytes.Lines(text) {
		k, v, ok := strings.Cut(string(line), ":")
		if ok && strings.TrimSpace(k) == name {
			return strings.TrimSpace(v)
		}
	}
	return "unknown"
}
