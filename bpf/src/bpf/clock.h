/* SPDX-License-Identifier: GPL-2.0 OR BSD-2-Clause */
/* Why ticks that were due did not come. */
#ifndef CLOCK_H
#define CLOCK_H

#include "maps.h"

/*
 * The clocks of each CPU, by period. Writers: the agent adds a period before it starts its clocks; note_tick writes the
 * values. Reader: the agent, for clocks that are silent. Size: the rates that rules can ask for.
 */
struct {
	__uint(type, BPF_MAP_TYPE_PERCPU_HASH);
	__uint(max_entries, MAX_RULES);
	__type(key, u64);
	__type(value, struct clock);
} clocks SEC(".maps");

/*
 * Counts the ticks that are missing before this one. The timer of a clock stays on its grid, whatever happens: a tick that
 * comes late stands for all points of the grid that it passed, and a point for which the kernel did not call the program is simply missing.
 * Only if the kernel throttles the clock, it stops the timer and later starts it on another grid.
 */
ALWAYS_INLINE void note_tick(struct bpf_perf_event_data *ctx, struct counters *counters)
{
	struct bpf_perf_event_data_kern *kernel = (void *)ctx;
	u64 period = ctx->sample_period, now = bpf_ktime_get_ns(), passed, until, expires, late, phase, id;
	struct clock *clock = bpf_map_lookup_elem(&clocks, &period);
	struct perf_event *event = NULL;

	if (!clock || !period)
		return;
	passed = now - clock->last;
	/* As usual, or a little late. */
	if (passed - (period - period / 32) < period / 16 || !bpf_core_field_exists(event->hw.hrtimer.node.expires)) {
		clock->last = now;
		return;
	}
	event = BPF_CORE_READ(kernel, event);
	expires = BPF_CORE_READ(event, hw.hrtimer.node.expires);
	id = BPF_CORE_READ(event, id);
	phase = expires % period;
	late = expires < now ? (now - expires) / period : 0;
	/* From the last point of the grid until this one. */
	until = expires - clock->last;
	if (id == clock->id && (s64)until > 0) {
		counters->ticks_late += late;
		if (phase != clock->phase && until > period)
			counters->ticks_throttled += (until - period) * TICK_PARTS / period;
		else if (phase == clock->phase && until > period + period / 2)
			counters->ticks_uncalled += (until - period / 2) / period;
	}
	if (id != clock->id)
		clock->first = expires;
	/* The timer goes on behind the last point that it passed. */
	clock->last = expires + late * period;
	clock->id = id;
	clock->phase = phase;
}

#endif
