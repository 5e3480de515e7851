// SPDX-License-Identifier: Apache-2.0
/* A library that is seven functions deep. */
volatile long sink;

#define NOINLINE __attribute__((noinline))
#define NESTED(outer, inner) \
	NOINLINE static long outer(long n) \
	{ \
		long result = inner(n); \
		sink += result; \
		return result + 1; \
	}

NOINLINE static long work(long n)
{
	for (long i = 0; i < n; i++)
		sink += i;
	return sink;
}

NESTED(fifth, work)
NESTED(fourth, fifth)
NESTED(third, fourth)
NESTED(second, third)
NESTED(first, second)

long enter(long n)
{
	long result = first(n);

	return result + 1;
}
