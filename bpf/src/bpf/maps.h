/* SPDX-License-Identifier: GPL-2.0 OR BSD-2-Clause */
/* The maps and settings that several headers use. A map that only one header uses stands in that header. */
#ifndef MAPS_H
#define MAPS_H

#include "kernel.h"
#include <bpf/bpf_helpers.h>
#include <bpf/bpf_core_read.h>
#include <bpf/bpf_tracing.h>
#include "gannet.h"

#define ALWAYS_INLINE static inline __attribute__((always_inline))

/*
 * All reports, samples and lifecycle events alike, go through this one ring buffer. Its records are in the order in which
 * all CPUs reserved them, so an exec or exit takes effect in the agent exactly behind the samples that came before it.
 * Writers: all programs. Reader: one thread of the agent. Size: --ring-bytes.
 */
struct {
	__uint(type, BPF_MAP_TYPE_RINGBUF);
	__uint(max_entries, 4 << 20);
} events SEC(".maps");

/*
 * The processes that the kernel side knows: those that are sampled, and those that it has reported. Writers: BPF programs.
 * Reader: the agent, for its debug page. Preallocated, because perf_event programs need that before 6.1. Size: --processes.
 */
struct {
	__uint(type, BPF_MAP_TYPE_HASH);
	__uint(max_entries, 16384);
	__type(key, u32);
	__type(value, struct proc);
} procs SEC(".maps");

/*
 * Entries of `procs` whose last thread has begun to exit: freeing the memory of a process still uses CPU time. Writer:
 * on_exit. Reader: the sampler. Size: the processes that exit at one time; the map evicts the oldest by itself.
 */
struct {
	__uint(type, BPF_MAP_TYPE_LRU_HASH);
	__uint(max_entries, 1024);
	__type(key, u32);
	__type(value, struct proc);
} exiting SEC(".maps");

/* The agent's decisions for single processes: by PID, or by facts that only user space can see. Writer: the agent. */
struct {
	__uint(type, BPF_MAP_TYPE_HASH);
	__uint(max_entries, 16384);
	__type(key, u32);
	__type(value, struct mark);
} marks SEC(".maps");

/* One entry for each CPU. Writers: all programs. Reader: the agent, which adds them up. */
struct {
	__uint(type, BPF_MAP_TYPE_PERCPU_ARRAY);
	__uint(max_entries, 1);
	__type(key, u32);
	__type(value, struct counters);
} counters SEC(".maps");

struct settings settings;

/* The hierarchy from which the programs read the cgroup id. Set before loading. */
const volatile u32 cgroup_hierarchy = CGROUP_V2;

ALWAYS_INLINE struct counters *this_cpu_counters(void)
{
	u32 zero = 0;

	return bpf_map_lookup_elem(&counters, &zero);
}

#endif
