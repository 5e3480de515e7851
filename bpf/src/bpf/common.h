/* SPDX-License-Identifier: GPL-2.0 OR BSD-2-Clause */
/* Maps and steps that more than one program needs. */
#ifndef COMMON_H
#define COMMON_H

#include "kernel.h"
#include <bpf/bpf_helpers.h>
#include <bpf/bpf_core_read.h>
#include <bpf/bpf_tracing.h>
#include "gannet.h"

#define ALWAYS_INLINE static inline __attribute__((always_inline))

/*
 * Everything that is reported, samples and lifecycle events alike, goes through this one ring: the order of its
 * records is the order in which they were reserved over all CPUs, so an exec or exit takes effect in the agent exactly
 * behind the samples that came before it. Writers: all programs. Reader: one thread of the agent. Size: --ring-bytes.
 */
struct {
	__uint(type, BPF_MAP_TYPE_RINGBUF);
	__uint(max_entries, 4 << 20);
} events SEC(".maps");

/*
 * The processes that the kernel side knows: those that are sampled, and those that were seen. Writers: BPF programs.
 * Reader: the agent, for its debug page. Preallocated, as perf_event programs must before 6.1. Size: --processes.
 */
struct {
	__uint(type, BPF_MAP_TYPE_HASH);
	__uint(max_entries, 16384);
	__type(key, u32);
	__type(value, struct proc);
} procs SEC(".maps");

/*
 * What `procs` held of processes whose last thread has begun to exit: taking their memory apart is time that they use.
 * Writer: on_exit. Reader: the sampler. Size: as many as are at it at one time; the oldest go by themselves.
 */
struct {
	__uint(type, BPF_MAP_TYPE_LRU_HASH);
	__uint(max_entries, 1024);
	__type(key, u32);
	__type(value, struct proc);
} dying SEC(".maps");

/* What the agent decided for single processes: by pid, or by what only user space can see. Writer: the agent. */
struct {
	__uint(type, BPF_MAP_TYPE_HASH);
	__uint(max_entries, 16384);
	__type(key, u32);
	__type(value, struct arm);
} arms SEC(".maps");

/* One for every CPU. Writers: all programs. Reader: the agent, which adds them up. */
struct {
	__uint(type, BPF_MAP_TYPE_PERCPU_ARRAY);
	__uint(max_entries, 1);
	__type(key, u32);
	__type(value, struct counters);
} counters SEC(".maps");

struct settings settings;

/* Which hierarchy the cgroup id is read from. Set before loading. */
const volatile u32 cgroup_hierarchy = CGROUP_V2;

ALWAYS_INLINE struct counters *count(void)
{
	u32 zero = 0;

	return bpf_map_lookup_elem(&counters, &zero);
}

/* The control group of a task, in the hierarchy that groups are told apart by. */
ALWAYS_INLINE struct kernfs_node *cgroup_of(struct task_struct *task)
{
	struct css_set *set = BPF_CORE_READ(task, cgroups);
	struct cgroup *cgroup;

	if (cgroup_hierarchy == CGROUP_V2) {
		cgroup = BPF_CORE_READ(set, dfl_cgrp);
	} else {
		struct cgroup_subsys_state *state = NULL;
		u32 index = bpf_core_enum_value(enum cgroup_subsys_id, cpu_cgrp_id);

		if (cgroup_hierarchy == CGROUP_V1_MEMORY)
			index = bpf_core_enum_value(enum cgroup_subsys_id, memory_cgrp_id);
		index &= 15;
		bpf_core_read(&state, sizeof(state), &set->subsys[index]);
		cgroup = BPF_CORE_READ(state, cgroup);
	}
	return BPF_CORE_READ(cgroup, kn);
}

ALWAYS_INLINE u64 cgroup_id_of(struct task_struct *task)
{
	return BPF_CORE_READ(cgroup_of(task), id);
}

ALWAYS_INLINE u32 state_of(struct task_struct *task)
{
	struct task_struct___before_5_14 *older = (void *)task;

	if (bpf_core_field_exists(task->__state))
		return BPF_CORE_READ(task, __state);
	return BPF_CORE_READ(older, state);
}

#define PF_EXITING 0x4

ALWAYS_INLINE bool is_exiting(struct task_struct *task)
{
	return BPF_CORE_READ(task, flags) & PF_EXITING;
}

/* Adds what `more` asks for. A want without rules asks for nothing. */
ALWAYS_INLINE void want_also(struct want *want, const struct want *more, u64 live)
{
	u64 rules = more->rules & live;

	if (!rules)
		return;
	if (more->period_ns && (!want->period_ns || more->period_ns < want->period_ns))
		want->period_ns = more->period_ns;
	want->rules |= rules;
}

/* What the process that current belongs to is sampled for. */
ALWAYS_INLINE void want_of_process(struct want *want, struct proc *proc, u32 tgid, u64 start_boottime, u32 exec_id)
{
	u64 live = settings.live_rules;

	if (proc && proc->start_boottime == start_boottime) {
		if (proc->denied)
			return;
		want_also(want, &proc->want, live);
		want_also(want, &proc->sticky, live);
	}
	if (settings.arms) {
		struct arm *arm = bpf_map_lookup_elem(&arms, &tgid);

		if (arm && arm->start_boottime == start_boottime && (arm->sticky || arm->exec_id == exec_id)) {
			want_also(want, &arm->want, live);
			if (want->rules & arm->refused) {
				want->rules &= ~arm->refused;
				want->period_ns = arm->period_ns;
			}
		}
	}
	want_also(want, &settings.all, live);
}

/* Whether `tgid` can be of interest at all: the one look-up that an unmatched process costs a tick. */
ALWAYS_INLINE bool may_be_wanted(struct proc *proc, u32 tgid)
{
	if (proc || settings.all.rules)
		return true;
	return settings.arms && bpf_map_lookup_elem(&arms, &tgid);
}

ALWAYS_INLINE void fill_event(struct event *event, u32 kind, struct task_struct *task, u64 start_boottime)
{
	event->kind = kind;
	event->tgid = BPF_CORE_READ(task, tgid);
	event->ktime = bpf_ktime_get_boot_ns();
	event->start_boottime = start_boottime;
	event->cgroup_id = cgroup_id_of(task);
	event->exec_id = BPF_CORE_READ(task, self_exec_id);
	event->tid = 0;
	event->rules = 0;
	bpf_core_read_str(event->comm, sizeof(event->comm), &task->comm);
}

/* `skip` frames at the leaf are our own: they are left out. */
ALWAYS_INLINE void take_kernel_stack(void *ctx, struct sample *sample, u64 *frames, u64 skip)
{
	long got;

	sample->kernel_frames = 0;
	sample->kernel_truncated = 0;
	if (!settings.kernel_stacks)
		return;
	got = bpf_get_stack(ctx, frames, (MAX_KERNEL_FRAMES + 1) * sizeof(u64), skip);
	if (got <= 0)
		return;
	sample->kernel_frames = got / sizeof(u64);
	if (sample->kernel_frames > MAX_KERNEL_FRAMES) {
		sample->kernel_frames = MAX_KERNEL_FRAMES;
		sample->kernel_truncated = 1;
	}
}

/* By frame pointers, as the kernel does it. */
ALWAYS_INLINE void take_user_stack(void *ctx, struct sample *sample, u64 *frames)
{
	u64 kernel = sample->kernel_frames;
	long got;

	sample->user_frames = 0;
	sample->user_end = USER_STACK_NONE;
	sample->guessed = 0;
	/* The compiler knows the bound and would leave the check out; the verifier needs it. */
	barrier_var(kernel);
	if (!settings.user_stacks || kernel > MAX_KERNEL_FRAMES)
		return;
	got = bpf_get_stack(ctx, frames + kernel, (MAX_FP_FRAMES + 1) * sizeof(u64), BPF_F_USER_STACK);
	if (got <= 0)
		return;
	sample->user_frames = got / sizeof(u64);
	sample->user_end = USER_STACK_COMPLETE;
	if (sample->user_frames > MAX_FP_FRAMES) {
		sample->user_frames = MAX_FP_FRAMES;
		sample->user_end = USER_STACK_TRUNCATED;
	}
}

/* Sends a sample, unless it would take the room that lifecycle events need. `most` is the size of its buffer. */
ALWAYS_INLINE void send_sample(struct counters *counters, struct sample *record, u64 most, bool wake)
{
	u64 rules = __builtin_popcountll(record->event.rules);
	u64 size = sizeof(*record) + (record->kernel_frames + record->user_frames) * sizeof(u64);
	u64 fill = bpf_ringbuf_query(&events, BPF_RB_AVAIL_DATA);
	u64 flags = wake || fill >= settings.ring_wake ? BPF_RB_FORCE_WAKEUP : BPF_RB_NO_WAKEUP;

	barrier_var(size);
	if (size > most || fill + size > settings.ring_sample_limit || bpf_ringbuf_output(&events, record, size, flags))
		counters->lost_ring_full += rules;
	else
		counters->sent += rules;
}

#endif
