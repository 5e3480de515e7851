// A program that sends profiles of Go's own runtime in the form of Pyroscope's client for Go: shop URL.
package main

import (
	"bytes"
	"fmt"
	"mime/multipart"
	"net/http"
	"net/url"
	"os"
	"runtime"
	"runtime/pprof"
	"sync"
	"time"
)

var total float64
var held [][]byte

//go:noinline
func hotGo(end time.Time) {
	for time.Now().Before(end) {
		for i := 0; i < 1e6; i++ {
			total += float64(i)
		}
		held = append(held, make([]byte, 64<<10))
	}
}

// contend makes goroutines wait for a lock, and so profiles of mutexes and of blocking.
func contend(end time.Time) {
	var lock sync.Mutex
	for i := 0; i < 4; i++ {
		go func() {
			for time.Now().Before(end) {
				lock.Lock()
				time.Sleep(time.Millisecond)
				lock.Unlock()
			}
		}()
	}
}

// send posts a profile as a form, with the configuration of its sample types.
func send(server string, begin time.Time, profile []byte, config string) {
	var body bytes.Buffer
	form := multipart.NewWriter(&body)
	for name, content := range map[string][]byte{"profile": profile, "sample_type_config": []byte(config)} {
		part, err := form.CreateFormFile(name, name)
		if err != nil {
			panic(err)
		}
		part.Write(content)
	}
	form.Close()
	query := url.Values{
		"name": {"shop.go{region=eu}"}, "spyName": {"gospy"}, "sampleRate": {"100"},
		"from": {fmt.Sprint(begin.Unix())}, "until": {fmt.Sprint(time.Now().Unix())},
	}
	answer, err := http.Post(server+"/ingest?"+query.Encode(), form.FormDataContentType(), &body)
	if err != nil {
		panic(err)
	}
	defer answer.Body.Close()
	if answer.StatusCode != http.StatusOK {
		var text bytes.Buffer
		text.ReadFrom(answer.Body)
		panic(answer.Status + " " + text.String())
	}
}

func main() {
	runtime.SetMutexProfileFraction(1)
	runtime.SetBlockProfileRate(1)
	begin := time.Now()
	end := begin.Add(5 * time.Second)
	var cpu bytes.Buffer
	if err := pprof.StartCPUProfile(&cpu); err != nil {
		panic(err)
	}
	contend(end)
	hotGo(end)
	pprof.StopCPUProfile()
	runtime.GC()
	send(os.Args[1], begin, cpu.Bytes(), `{"cpu":{"units":"samples","sampled":true}}`)
	for name, config := range map[string]string{
		"heap":      `{"alloc_space":{"units":"bytes"},"inuse_space":{"units":"bytes","aggregation":"average"}}`,
		"goroutine": `{"goroutine":{"display-name":"goroutines","units":"goroutines","aggregation":"average"}}`,
		"mutex":     `{"contentions":{"display-name":"mutex_count","units":"lock_samples"},"delay":{"display-name":"mutex_duration"}}`,
		"block":     `{"contentions":{"display-name":"block_count","units":"lock_samples"},"delay":{"display-name":"block_duration"}}`,
	} {
		var profile bytes.Buffer
		if err := pprof.Lookup(name).WriteTo(&profile, 0); err != nil {
			panic(err)
		}
		send(os.Args[1], begin, profile.Bytes(), config)
	}
}
