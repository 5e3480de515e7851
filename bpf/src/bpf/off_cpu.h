/* SPDX-License-Identifier: GPL-2.0 OR BSD-2-Clause */
/* Blocked time: a thread's sample begins when it leaves the CPU, and is sent when it comes back. */
#ifndef OFF_CPU_H
#define OFF_CPU_H

#include "rate.h"
#include "sampler.h"

#define TASK_DEAD 0x80

/* The first part of sample_scratch, as far as it is stored. */
struct off_cpu_entry {
	struct sample sample;
	u64 frames[OFF_CPU_FRAMES];
};
_Static_assert(sizeof(struct off_cpu_entry) <= sizeof(struct sample) + FRAME_SLOTS * sizeof(u64),
	       "it is the first part of sample_scratch");

/*
 * Threads that are off the CPU, by thread id, with the stacks that they left it by. Writer: on_switch. Reader: the agent,
 * for threads that are still off the CPU when a window ends. Size: the sampled threads that block at one time; the programs
 * count those that do not fit. Preallocated, because a program must not allocate inside the scheduler.
 */
struct {
	__uint(type, BPF_MAP_TYPE_HASH);
	__uint(max_entries, 2048);
	__type(key, u32);
	__type(value, struct off_cpu_entry);
} off_cpu SEC(".maps");

/* The form of the map in off_cpu_raw. The agent's has more entries. */
struct off_cpu_raw_map {
	__uint(type, BPF_MAP_TYPE_HASH);
	__uint(max_entries, 1);
	__uint(key_size, sizeof(u32));
	__uint(value_size, sizeof(struct off_cpu_raw));
};

/*
 * The raw stacks of threads in off_cpu, by thread id: those that reach generated code, which only the agent can unwind. The
 * thread's stack does not change while it is off the CPU, but the programs can read it only as the thread leaves. The map in here
 * is large, and so there is none unless a rule wants blocked time. Writer of the entry: the agent. Writer of the map: on_switch.
 */
struct {
	__uint(type, BPF_MAP_TYPE_ARRAY_OF_MAPS);
	__uint(max_entries, 1);
	__type(key, u32);
	__array(values, struct off_cpu_raw_map);
} off_cpu_raw SEC(".maps");

/* Stacks of threads that block which a CPU may still take. Writer and reader: on_switch. */
struct {
	__uint(type, BPF_MAP_TYPE_PERCPU_ARRAY);
	__uint(max_entries, 1);
	__type(key, u32);
	__type(value, struct bucket);
} off_cpu_bucket SEC(".maps");

ALWAYS_INLINE bool block_allowed(void)
{
	u32 zero = 0;
	struct bucket *bucket = bpf_map_lookup_elem(&off_cpu_bucket, &zero);

	return bucket && take_token(bucket, settings.off_cpu_rate);
}

ALWAYS_INLINE void *off_cpu_raws(void)
{
	u32 zero = 0;

	return bpf_map_lookup_elem(&off_cpu_raw, &zero);
}

/*
 * Takes the stack raw, and stores it until the thread comes back. False: there is no room for it, and the sample has the frames
 * that are unwound.
 */
ALWAYS_INLINE bool store_raw(struct sample_scratch *scratch)
{
	u64 first = scratch->sample.kernel_frames + scratch->sample.user_frames, unwound = scratch->sample.user_frames;
	u32 tid = scratch->sample.event.tid;
	void *raws = off_cpu_raws();

	if (!raws)
		return false;
	/* Behind the frames so far, which count if there is no room. */
	take_raw(scratch, first, OFF_CPU_RAW_PAGES);
	barrier_var(first);
	if (first <= MAX_KERNEL_FRAMES + OFF_CPU_FRAMES &&
	    !bpf_map_update_elem(raws, &tid, &scratch->frames[first], BPF_ANY))
		return true;
	scratch->sample.user_frames = unwound;
	scratch->sample.raw_unread = 0;
	return false;
}

/* Stores the stacks until the thread comes back. */
ALWAYS_INLINE void store_block(struct counters *counters, struct sample_scratch *scratch)
{
	u32 tid = scratch->sample.event.tid;

	if (scratch->sample.user_end != USER_STACK_RAW &&
	    scratch->sample.kernel_frames + scratch->sample.user_frames > OFF_CPU_FRAMES) {
		scratch->sample.user_frames = OFF_CPU_FRAMES - scratch->sample.kernel_frames;
		scratch->sample.user_end = USER_STACK_TRUNCATED;
	}
	/* A raw stack is not stored here. */
	if (settings.contexts)
		add_context(counters, &scratch->sample, &scratch->unwind.context, scratch->frames,
			    scratch->sample.user_end == USER_STACK_RAW ? scratch->sample.kernel_frames :
									 slots_of(&scratch->sample),
			    OFF_CPU_FRAMES);
	if (bpf_map_update_elem(&off_cpu, &tid, scratch, BPF_ANY)) {
		take_sample(counters, scratch->sample.event.rules);
		end_sample(counters, &counters->lost_off_cpu_full, scratch->sample.event.rules);
	}
}

/* Copies the record of the thread's span, which is stored behind the kernel's frames, to its place behind the raw stack. */
ALWAYS_INLINE void add_stored_context(struct sample_scratch *scratch, const struct off_cpu_entry *entry)
{
	u64 from = scratch->sample.kernel_frames, to = slots_of(&scratch->sample);

	barrier_var(from);
	barrier_var(to);
	if (from > OFF_CPU_FRAMES - CONTEXT_SLOTS || to > FRAME_SLOTS ||
	    bpf_probe_read_kernel(&scratch->frames[to], CONTEXT_SLOTS * sizeof(u64), &entry->frames[from]))
		scratch->sample.context_words = 0;
}

/* Sends the sample of a thread whose stack was stored raw, and forgets that. */
ALWAYS_INLINE void send_raw(struct counters *counters, struct off_cpu_entry *entry, u32 tid, bool is_long_enough)
{
	u64 kernel = entry->sample.kernel_frames;
	struct sample_scratch *scratch = this_cpu_scratch();
	void *raws = off_cpu_raws(), *raw;

	raw = raws ? bpf_map_lookup_elem(raws, &tid) : NULL;
	if (is_long_enough) {
		take_sample(counters, entry->sample.event.rules);
		barrier_var(kernel);
		if (raw && scratch && kernel <= MAX_KERNEL_FRAMES) {
			/* The scratch is free: the sample of the thread that leaves has not begun. */
			bpf_probe_read_kernel(scratch, sizeof(scratch->sample) + (MAX_KERNEL_FRAMES + 1) * sizeof(u64),
					      entry);
			bpf_probe_read_kernel(&scratch->frames[kernel], sizeof(struct off_cpu_raw), raw);
			if (scratch->sample.context_words)
				add_stored_context(scratch, entry);
			send_sample(counters, &scratch->sample, SAMPLE_BYTES, false);
		} else {
			/* The agent has taken the map away meanwhile. */
			entry->sample.user_frames = 0;
			entry->sample.user_end = USER_STACK_NO_RULE;
			send_sample(counters, &entry->sample, sizeof(*entry), false);
		}
	}
	if (raw)
		bpf_map_delete_elem(raws, &tid);
}

/*
 * Ends the interval of a thread that is on the CPU, if it left one. The time that it has run since then is subtracted: the
 * programs do not see each switch-in. A sandbox may hide the tracepoints of its own threads, and then also the switch by
 * which one of them hands the CPU over.
 */
ALWAYS_INLINE void end_block(struct counters *counters, u32 tid, struct task_struct *task, u64 now)
{
	struct off_cpu_entry *entry = bpf_map_lookup_elem(&off_cpu, &tid);
	u64 passed, ran;
	bool is_long_enough;

	if (!entry)
		return;
	passed = now - entry->sample.event.ktime;
	ran = BPF_CORE_READ(task, se.sum_exec_runtime) - entry->sample.value_ns;
	/* If it ran longer than that, another thread has reused the TID. */
	is_long_enough = ran <= passed && passed - ran >= settings.off_cpu_min_ns;
	if (is_long_enough)
		entry->sample.value_ns = passed - ran;
	if (entry->sample.user_end == USER_STACK_RAW) {
		send_raw(counters, entry, tid, is_long_enough);
	} else if (is_long_enough) {
		take_sample(counters, entry->sample.event.rules);
		send_sample(counters, &entry->sample, sizeof(*entry), false);
	}
	bpf_map_delete_elem(&off_cpu, &tid);
}

/*
 * Ends the interval of the thread that comes, and begins that of the one that goes. Null: there is no stack to unwind.
 * Interrupts are off, so that no tick uses the scratch meanwhile.
 */
ALWAYS_INLINE struct sample_scratch *begin_switch(struct bpf_raw_tracepoint_args *ctx, struct counters *counters)
{
	struct task_struct *prev = (void *)ctx->args[1];
	struct task_struct *next = (void *)ctx->args[2];
	struct sample_scratch *scratch;
	struct want want = {};
	struct image *image;
	struct proc *proc;
	struct current now;
	/* Read first: on a CPU that was asleep, its caches cold, the rest takes some 20 us (measured). */
	u64 switched = bpf_ktime_get_boot_ns(), id = bpf_get_current_pid_tgid();
	u32 tgid = id >> 32, next_tid, state;

	if (!settings.sampling)
		return NULL;
	next_tid = BPF_CORE_READ(next, pid);
	end_block(counters, next_tid, next, switched);

	/* A preempted or runnable thread did not block; a dead one will not come back. */
	state = state_of(prev);
	if ((u8)ctx->args[0] || !tgid || !state || state & TASK_DEAD)
		return NULL;
	proc = bpf_map_lookup_elem(&procs, &tgid);
	if (!may_be_wanted(proc, tgid))
		return NULL;
	read_current(&now, prev);
	want_of_process(&want, proc, tgid, now.start_boottime, now.exec_id);
	want.rules = rules_of_span(want.rules & settings.off_cpu_rules, tgid, &now);
	if (!want.rules)
		return NULL;
	end_block(counters, id, prev, switched);
	if (!block_allowed()) {
		take_sample(counters, want.rules);
		end_sample(counters, &counters->lost_off_cpu_rate, want.rules);
		return NULL;
	}
	scratch = this_cpu_scratch();
	if (!scratch)
		return NULL;
	/* Until it comes back, the value is the time that the thread has run. */
	begin_sample(&scratch->sample, SAMPLE_OFF_CPU, want.rules, BPF_CORE_READ(prev, se.sum_exec_runtime), prev,
		     &now);
	scratch->sample.state = state;
	scratch->unwind.context.form = CONTEXT_UNREAD;
	/* Without this program and the kernel's call of it. */
	take_kernel_stack(ctx, &scratch->sample, scratch->frames, 2);
	image = image_of(tgid, &now);
	if (!settings.tables || !settings.user_stacks || !image) {
		/* The agent enters the image when it sees the sample. There is no space for a raw sample. */
		take_user_stack(ctx, scratch, prev, now.kernel_thread);
		store_block(counters, scratch);
		return NULL;
	}
	if (now.kernel_thread || !read_user_registers(prev, &scratch->unwind) || !scratch->unwind.pc ||
	    in_execve(prev)) {
		store_block(counters, scratch);
		return NULL;
	}
	begin_lists(&scratch->unwind, tgid, now.start_boottime, now.exec_id, false);
	begin_unwind(&scratch->unwind, image);
	scratch->chain_calls = 0;
	return scratch;
}

/* Does what is left to do once the stack is unwound. */
ALWAYS_INLINE void finish_switch(struct counters *counters, struct sample_scratch *scratch)
{
	end_unwind(scratch);
	if (scratch->sample.user_end == USER_STACK_RAW && !store_raw(scratch)) {
		scratch->sample.user_end = USER_STACK_NO_RULE;
		counters->off_cpu_raw_full++;
	}
	store_block(counters, scratch);
}

#endif
