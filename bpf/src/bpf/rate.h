/* SPDX-License-Identifier: GPL-2.0 OR BSD-2-Clause */
/* Token buckets: how often a program may do something in a second. */
#ifndef RATE_H
#define RATE_H

#include "maps.h"

#define REFILL_NS 100000000

struct bucket {
	u64 tokens;
	u64 refilled;
};

/*
 * Takes a token out of a bucket that time refills, at `rate` tokens a second. False: the bucket is empty. CPUs may share
 * the bucket: if two refill it at once it is a little too generous, never stuck.
 */
ALWAYS_INLINE bool take_token(struct bucket *bucket, u64 rate)
{
	u64 now = bpf_ktime_get_ns();

	if (now - bucket->refilled >= REFILL_NS) {
		bucket->refilled = now;
		bucket->tokens = rate / 10 + 1;
	}
	if ((s64)bucket->tokens <= 0)
		return false;
	/* Kernels before 5.12 cannot return the former value: CPUs that race may take one token too many. */
	__sync_fetch_and_add(&bucket->tokens, -1);
	return true;
}

#endif
