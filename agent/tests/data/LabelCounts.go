// Spins with labels that are too long beside labels that are not; with the argument "unreadable" in a goroutine whose labels
// are in memory that cannot be read.
package main

import (
	"context"
	"os"
	"runtime/pprof"
	"strings"
	"syscall"
	"time"
	"unsafe"
)

//go:linkname setLabels runtime/pprof.runtime_setProfLabel
func setLabels(labels unsafe.Pointer)

func burn() {
	for end := time.Now().Add(5 * time.Millisecond); time.Now().Before(end); {
	}
}

func main() {
	if len(os.Args) > 1 {
		memory, _, _ := syscall.Syscall6(syscall.SYS_MMAP, 0, 4096, syscall.PROT_NONE,
			syscall.MAP_PRIVATE|syscall.MAP_ANON, ^uintptr(0), 0)
		setLabels(*(*unsafe.Pointer)(unsafe.Pointer(&memory)))
		for {
			burn()
		}
	}
	long := pprof.Labels("case", "long", "text", strings.Repeat("0123456789", 30))
	short := pprof.Labels("case", "short")
	for {
		for _, labels := range []pprof.LabelSet{long, short} {
			pprof.Do(context.Background(), labels, func(context.Context) { burn() })
		}
	}
}
