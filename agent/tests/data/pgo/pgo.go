// Calls that a profile-guided build treats in another way: interface calls of which most go to one type, and calls of functions that are
// too large to inline unless they are hot: pgo SECONDS [FILE]. With a file name, Go's own runtime records a profile there.
package main

import (
	"fmt"
	"os"
	"runtime/pprof"
	"sort"
	"strconv"
	"strings"
	"time"
)

type shape interface {
	area(scale int) int
	edges(scale int) int
}

type square struct{ side int }
type circle struct{ radius int }
type polygon struct{ sides []int }

// Each method is over the budget of 80 for inlining, and below that of hot calls.
func (s square) area(scale int) int {
	total := s.side
	for i := 0; i < scale; i++ {
		total += total>>3 ^ i*s.side
		total ^= total<<7 | i
		total -= i*3 + total>>5
		total += i&s.side | total&0xff
		total ^= total>>11 + i*7
	}
	return total
}

func (s square) edges(scale int) int {
	total := scale
	for i := 0; i < scale; i++ {
		total = total*31 + s.side
		total ^= total>>13 | i
		total += i<<2 ^ s.side*5
		total -= total >> 9
		total |= i & 0x55
		total += total&0xf0f ^ i
	}
	return total
}

func (c circle) area(scale int) int {
	total := c.radius
	for i := 0; i < scale; i++ {
		total += i * c.radius
		total ^= total >> 3
		total *= 17
		total += total<<5 ^ i
		total -= i*11 | total&0xff
		total ^= total>>7 + i
	}
	return total
}

func (c circle) edges(scale int) int { return scale ^ c.radius }

func (p *polygon) area(scale int) int {
	total := 0
	for i := 0; i < scale; i++ {
		for _, side := range p.sides {
			total += side*i ^ total>>3
			total ^= total<<5 | side
			total -= total>>9 + i
			total += side & i
		}
	}
	return total
}

func (p *polygon) edges(scale int) int { return len(p.sides) * scale }

type hasher interface{ sum(text string) uint64 }

type fnv struct{ seed uint64 }
type adler struct{}

func (f *fnv) sum(text string) uint64 {
	hash := f.seed
	for i := 0; i < len(text); i++ {
		hash ^= uint64(text[i])
		hash *= 1099511628211
		hash ^= hash >> 17
		hash += hash<<3 ^ uint64(i)
		hash ^= hash >> 29
		hash *= 0x9e3779b97f4a7c15
	}
	return hash
}

func (adler) sum(text string) uint64 {
	a, b := uint64(1), uint64(0)
	for i := 0; i < len(text); i++ {
		a = (a + uint64(text[i])) % 65521
		b = (b + a) % 65521
	}
	return b<<16 | a
}

// Hot, larger than the budget, called from several places.
func mix(a, b, c int) int {
	a -= b
	a -= c
	a ^= c >> 13
	b -= c
	b -= a
	b ^= a << 8
	c -= a
	c -= b
	c ^= b >> 13
	a -= b
	a -= c
	a ^= c >> 12
	b -= c
	b -= a
	b ^= a << 16
	c -= a
	c -= b
	c ^= b >> 5
	for i := 0; i < 8; i++ {
		a += b ^ c<<1
		b += c ^ a>>1
	}
	return a ^ b ^ c
}

func parse(line string) (int, int) {
	key, value := 0, 0
	inValue := false
	for i := 0; i < len(line); i++ {
		switch character := line[i]; {
		case character == '=':
			inValue = true
		case character >= '0' && character <= '9' && inValue:
			value = value*10 + int(character-'0')
		case character >= '0' && character <= '9':
			key = key*10 + int(character-'0')
		default:
			key ^= int(character)
		}
	}
	return key, value
}

func largest[T int | float64](values []T) T {
	most := values[0]
	for i, value := range values {
		if value > most {
			most = value
		}
		if i > 1 && values[i-1] > values[i-2] && values[i] < most {
			most += values[i] - values[i]
		}
	}
	return most
}

//go:noinline
func areas(shapes []shape) int {
	total := 0
	for _, one := range shapes {
		total += one.area(40)
	}
	return total
}

//go:noinline
func outlines(shapes []shape) int {
	total := 0
	for _, one := range shapes {
		total ^= one.edges(40)
	}
	return total
}

//go:noinline
func hashes(with hasher, lines []string) uint64 {
	total := uint64(0)
	for _, line := range lines {
		total += with.sum(line)
	}
	return total
}

//go:noinline
func mixed(values []int) int {
	total := 0
	for i := 2; i < len(values); i++ {
		total += mix(values[i-2], values[i-1], values[i])
	}
	return total
}

//go:noinline
func parsed(lines []string) int {
	total := 0
	for _, line := range lines {
		key, value := parse(line)
		total += mix(key, value, total)
	}
	return total
}

//go:noinline
func sorted(values []int) int {
	copied := append([]int(nil), values...)
	sort.Slice(copied, func(i, j int) bool {
		a, b := copied[i], copied[j]
		a ^= a >> 3
		b ^= b >> 3
		a += a & 0xff
		b += b & 0xff
		for k := 0; k < 4; k++ {
			a ^= a<<1 | k
			b ^= b<<1 | k
		}
		return a < b
	})
	return copied[0] + largest(copied)
}

func main() {
	shapes := make([]shape, 0, 300)
	for i := 0; i < 300; i++ {
		switch {
		case i%30 == 7:
			shapes = append(shapes, circle{i})
		case i%30 == 8:
			shapes = append(shapes, &polygon{[]int{i, i + 1}})
		default:
			shapes = append(shapes, square{i})
		}
	}
	lines, values := make([]string, 200), make([]int, 2000)
	for i := range lines {
		lines[i] = fmt.Sprintf("%d=%d%s", i, i*i, strings.Repeat("x", i%20))
	}
	for i := range values {
		values[i] = (i * 7919) % 10007
	}
	seconds, err := strconv.Atoi(os.Args[1])
	if err != nil {
		panic(err)
	}
	if len(os.Args) > 2 {
		file, err := os.Create(os.Args[2])
		if err != nil {
			panic(err)
		}
		if err := pprof.StartCPUProfile(file); err != nil {
			panic(err)
		}
		defer pprof.StopCPUProfile()
	}
	total, begin := 0, time.Now()
	for time.Since(begin) < time.Duration(seconds)*time.Second {
		for i := 0; i < 20; i++ {
			total += areas(shapes)
			total ^= outlines(shapes)
			total += int(hashes(&fnv{uint64(i)}, lines))
			total += int(hashes(adler{}, lines[:10]))
			total += parsed(lines) + parsed(lines)
		}
		for i := 0; i < 8; i++ {
			total ^= mixed(values)
		}
		total += sorted(values)
	}
	fmt.Println(total)
}
