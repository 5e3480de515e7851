// SPDX-License-Identifier: Apache-2.0
/*
 * Sixty functions deep, compiled without frame pointers: plain ones, some with alloca, some with aligned locals (which
 * move the stack pointer to a multiple of 32), all of them free to use rbp for anything. The innermost one never returns.
 */
#include <alloca.h>
#include <string.h>

#define NOINLINE __attribute__((noinline))

volatile long sink, n = 3;
typedef double v2 __attribute__((vector_size(32)));

NOINLINE long spin(long a)
{
	for (;;) {
		for (int i = 0; i < 1000; i++)
			sink += a * i;
		__asm__ volatile("xor %%ebp, %%ebp" ::: "rbp", "rbx", "r12");
	}
	return a;
}

#define PLAIN(name, callee) \
	NOINLINE long name(long a) { long r = callee(a * 3) * n; sink += r; return r + 1; }
#define ALLOCA(name, callee) \
	NOINLINE long name(long a) \
	{ \
		char *p = alloca(n * 7 + 16); \
		memset(p, a, n); \
		sink += p[1]; \
		long r = callee(a + 1) + p[0]; \
		sink += r; \
		return r + 1; \
	}
#define ALIGNED(name, callee) \
	NOINLINE long name(long a) \
	{ \
		v2 v[4]; \
		for (int i = 0; i < 4; i++) \
			v[i] = (v2){ a, n, i, 1 }; \
		__asm__ volatile("" ::"m"(v)); \
		long r = callee(a + 1); \
		__asm__ volatile("" : "+m"(v)); \
		r += v[n & 3][1]; \
		sink += r; \
		return r + 1; \
	}
#define LARGE(name, callee) \
	NOINLINE long name(long a) \
	{ \
		char big[200]; \
		__asm__ volatile("" ::"r"(big) : "memory"); \
		long r = callee(a + 2); \
		r += big[n]; \
		sink += r; \
		return r + 1; \
	}
#define GREEDY(name, callee) \
	NOINLINE long name(long a) \
	{ \
		__asm__ volatile("mov $1, %%ebp" ::: "rbp", "rbx", "r12", "r13", "r14", "r15"); \
		long r = callee(a) + n; \
		sink += r; \
		return r + 1; \
	}
#define FIVE(p, next) \
	PLAIN(p##4, next) ALLOCA(p##3, p##4) ALIGNED(p##2, p##3) LARGE(p##1, p##2) GREEDY(p##0, p##1)

FIVE(l, spin) FIVE(k, l0) FIVE(j, k0) FIVE(i_, j0) FIVE(h, i_0) FIVE(g, h0)
FIVE(f, g0) FIVE(e, f0) FIVE(d, e0) FIVE(c, d0) FIVE(b, c0) FIVE(a, b0)

int main(int count, char **words)
{
	(void)words;
	/* With an argument: the innermost function alone, for what a sample costs without its frames. */
	return (count > 1 ? spin(1) : a0(1)) & 1;
}
