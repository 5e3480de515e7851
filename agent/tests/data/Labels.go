// Spins in goroutines with labels, for a test that compares the labels of each sample with the function that it is in.
// Prints "ready" when all of them have begun.
package main

import (
	"context"
	"fmt"
	"os"
	"runtime"
	"runtime/pprof"
	"strings"
	"sync"
	"time"
)

var begun sync.WaitGroup

//go:noinline
func burn(until time.Duration) uint64 {
	sum := uint64(0)
	for end := time.Now().Add(until); time.Now().Before(end); {
		for i := uint64(0); i < 20000; i++ {
			sum = sum*31 + i
		}
	}
	return sum
}

//go:noinline
func spinPlain(context.Context) { burn(5 * time.Millisecond) }

//go:noinline
func spinTwo(context.Context) { burn(5 * time.Millisecond) }

//go:noinline
func spinNested(context.Context) { burn(5 * time.Millisecond) }

//go:noinline
func spinLong(context.Context) { burn(5 * time.Millisecond) }

//go:noinline
func spinMany(context.Context) { burn(5 * time.Millisecond) }

//go:noinline
func spinInherited() { burn(5 * time.Millisecond) }

//go:noinline
func spinWithout() { burn(5 * time.Millisecond) }

// walk makes the runtime work on another stack, that of the thread: it is still the goroutine's work.
//
//go:noinline
func walk(context.Context) {
	text := make([]byte, 4096)
	for end := time.Now().Add(5 * time.Millisecond); time.Now().Before(end); {
		for i := 0; i < 20; i++ {
			runtime.Stack(text, false)
		}
	}
}

// keep starts a goroutine that does the work again and again.
func keep(work func()) {
	begun.Add(1)
	go func() {
		work()
		begun.Done()
		for {
			work()
			runtime.Gosched()
		}
	}()
}

func main() {
	background := context.Background()
	if len(os.Args) > 1 && os.Args[1] == "once" {
		for i := 0; i < 10; i++ {
			pprof.Do(background, pprof.Labels("case", "plain"), spinPlain)
		}
		return
	}
	digits := strings.Repeat("0123456789", 30)
	keep(spinWithout)
	if len(os.Args) < 2 || os.Args[1] != "without" {
		keep(func() { pprof.Do(background, pprof.Labels("case", "plain"), spinPlain) })
		keep(func() { pprof.Do(background, pprof.Labels("case", "walk"), walk) })
		keep(func() { pprof.Do(background, pprof.Labels("case", "two", "user", "Zoë"), spinTwo) })
		keep(func() {
			pprof.Do(background, pprof.Labels("case", "outer", "kept", "yes"), func(ctx context.Context) {
				pprof.Do(ctx, pprof.Labels("case", "nested"), spinNested)
			})
		})
		keep(func() {
			pprof.Do(background, pprof.Labels("case", "long", "text", digits[:200], "cut", digits), spinLong)
		})
		var many []string
		for i := 0; i < 70; i++ {
			many = append(many, fmt.Sprintf("key%02d", i), fmt.Sprintf("value%d", i))
		}
		keep(func() { pprof.Do(background, pprof.Labels(many...), spinMany) })
		// A goroutine has the labels of the one that starts it.
		pprof.Do(background, pprof.Labels("case", "inherited"), func(context.Context) { keep(spinInherited) })
		// One that ends at once: its object is used again, with other labels.
		go func() {
			for i := 0; ; i++ {
				done := make(chan bool)
				labels := pprof.Labels("case", "short", "number", fmt.Sprint(i%7))
				go pprof.Do(background, labels, func(context.Context) { burn(time.Millisecond); done <- true })
				<-done
			}
		}()
	}
	begun.Wait()
	fmt.Println("ready")
	select {}
}
