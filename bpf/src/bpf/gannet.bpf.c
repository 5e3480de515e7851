// SPDX-License-Identifier: GPL-2.0 OR BSD-2-Clause
/* The sampler, and the handlers that follow processes through fork, exec and exit. */
#include "common.h"
#include "match.h"
#include "unwind.h"

char LICENSE[] SEC("license") = "Dual BSD/GPL";

/* Never read: they bring the types to the agent. */
const volatile struct lifecycle type_of_lifecycle;
const volatile struct exec_record type_of_exec_record;

struct sample_scratch {
	struct sample sample;
	u64 frames[FRAME_SLOTS];
	struct walk walk;
	u32 wake;
	u32 chain_calls;
};
_Static_assert(sizeof(struct sample_scratch) <= 32768, "the largest value of a per-CPU map");

/* Where a sample is put together: it does not fit the BPF stack. Ticks on one CPU do not interrupt each other. */
struct {
	__uint(type, BPF_MAP_TYPE_PERCPU_ARRAY);
	__uint(max_entries, 1);
	__type(key, u32);
	__type(value, struct sample_scratch);
} sample_scratch SEC(".maps");

/* Reports of exec and fork that may still be sent: a token bucket, refilled by time. */
struct {
	__uint(type, BPF_MAP_TYPE_ARRAY);
	__uint(max_entries, 1);
	__type(key, u32);
	__type(
		value, struct {
			u64 tokens;
			u64 refilled;
		});
} report_bucket SEC(".maps");

ALWAYS_INLINE struct sample_scratch *the_scratch(void)
{
	u32 zero = 0;

	return bpf_map_lookup_elem(&sample_scratch, &zero);
}

/*
 * The registers with which the current thread was in user space last: those at the top of its kernel stack, whether the
 * tick came in user space or in the kernel.
 */
ALWAYS_INLINE bool user_registers(struct task_struct *task, struct walk *walk)
{
	if (bpf_core_enum_value_exists(enum bpf_func_id, BPF_FUNC_task_pt_regs))
		return take_registers(walk, (void *)bpf_task_pt_regs(bpf_get_current_task_btf()));
	/* Before 5.15: they are at the very top of the kernel stack, whose size is fixed there. */
	return take_registers(walk, (void *)((u64)BPF_CORE_READ(task, stack) + KERNEL_STACK_BYTES - PT_REGS_ROOM));
}

/* Whether a thread with memory is in the middle of execve: it has its new memory, and is told last of all where its code is. */
ALWAYS_INLINE bool in_execve(struct task_struct *task)
{
	return !BPF_CORE_READ(task, mm, end_code);
}

/* What each tick asks of the current thread. */
struct current {
	/* Of the process. */
	u64 start_boottime;
	u32 exec_id;
	/* It has no memory of its own. */
	bool kernel_thread;
};

ALWAYS_INLINE void look_at_current(struct current *now, struct task_struct *task)
{
	if (bpf_core_enum_value_exists(enum bpf_func_id, BPF_FUNC_get_current_task_btf)) {
		struct task_struct *self = bpf_get_current_task_btf();

		now->start_boottime = self->group_leader->start_boottime;
		now->exec_id = self->self_exec_id;
		now->kernel_thread = !self->mm;
	} else {
		now->start_boottime = BPF_CORE_READ(task, group_leader, start_boottime);
		now->exec_id = BPF_CORE_READ(task, self_exec_id);
		now->kernel_thread = !BPF_CORE_READ(task, mm);
	}
}

/*
 * Registers and stack, for the agent to walk once it has the tables. Behind the first thread's stack lie the program's
 * arguments and its environment, which may hold secrets: they are not taken.
 */
ALWAYS_INLINE void take_raw(struct sample_scratch *scratch)
{
	u64 kernel = scratch->sample.kernel_frames, at, sp = scratch->walk.start_sp, words = RAW_REGISTERS, part;
	struct task_struct *task = (void *)bpf_get_current_task();
	u64 left = RAW_STACK_PAGES * 4096, strings = BPF_CORE_READ(task, mm, arg_start);

	scratch->sample.user_end = USER_STACK_RAW;
	barrier_var(kernel);
	if (kernel > MAX_KERNEL_FRAMES)
		return;
	scratch->frames[kernel] = scratch->walk.start_pc;
	for (u32 i = 0; i < RAW_REGISTERS - 1; i++)
		scratch->frames[kernel + 1 + i] = scratch->walk.registers[i];
	/*
	 * Up to the end of the page, then page by page. One that cannot be read lies behind the end of the stack, or nothing
	 * was ever written there (a large array, used in part): zeros, as the helper leaves them, if another one follows.
	 */
	at = kernel + RAW_REGISTERS;
	if (strings > sp && strings - sp < left)
		left = strings - sp;
	part = 4096 - (sp & 4095);
	for (u32 page = 0; page < RAW_STACK_PAGES; page++) {
		if (part > left)
			part = left;
		barrier_var(part);
		barrier_var(at);
		if (!part || part > 4096 || at > FRAME_SLOTS - 512)
			break;
		bool present = !bpf_probe_read_user(&scratch->frames[at], part, (void *)sp);

		sp += part;
		at += part / sizeof(u64);
		if (present)
			words = at - kernel;
		left -= part;
		part = 4096;
	}
	scratch->sample.user_frames = words;
}

ALWAYS_INLINE void finish_tick(struct counters *counters, struct sample_scratch *scratch)
{
	send_sample(counters, &scratch->sample, sizeof(scratch->sample) + sizeof(scratch->frames), scratch->wake);
}

/* What is left to do once the walk is over. */
ALWAYS_INLINE void finish_walk(struct counters *counters, struct sample_scratch *scratch)
{
	struct walk *walk = &scratch->walk;

	if (walk->end == USER_STACK_NO_MAPPING || walk->end == USER_STACK_NO_TABLE) {
		/*
		 * A library that the agent has not heard of yet, or a table that had to go. It must look now: once the
		 * process has ended nobody can say what was there.
		 */
		scratch->wake = 1;
		scratch->sample.user_frames = 0;
		counters->raw++;
		take_raw(scratch);
	} else {
		scratch->sample.user_frames = walk->frames;
		scratch->sample.user_end = walk->end;
		scratch->sample.guessed = walk->guessed;
	}
	finish_tick(counters, scratch);
}

/* One frame. False: the walk is over. */
ALWAYS_INLINE bool walk_frame(struct sample_scratch *scratch, struct found_rules *found)
{
	struct walk *walk = &scratch->walk;
	u64 slot = scratch->sample.kernel_frames + walk->frames;

	barrier_var(slot);
	if (slot >= FRAME_SLOTS || walk->frames >= MAX_USER_FRAMES) {
		walk->end = USER_STACK_TRUNCATED;
		return false;
	}
	/* Callers are looked up one byte back, at their call; one that a signal interrupted has made none. */
	scratch->frames[slot] = walk->pc + (walk->exact && walk->frames);
	walk->frames++;
	return step(walk, found);
}

/* Decides whether a tick makes a sample, and takes all of it but the walk. Null: nothing is left to do. */
ALWAYS_INLINE struct sample_scratch *begin_tick(struct bpf_perf_event_data *ctx, struct counters *counters)
{
	struct sample_scratch *scratch;
	struct want want = {};
	struct task_struct *task;
	struct image *image;
	struct proc *proc;
	u64 id = bpf_get_current_pid_tgid();
	struct current now;
	u32 tgid = id >> 32;
	bool first = true;

	counters->ticks++;
	if (!tgid) {
		counters->idle_ticks++;
		return NULL;
	}
	task = (void *)bpf_get_current_task();
	proc = bpf_map_lookup_elem(&procs, &tgid);
	if (!proc && is_exiting(task))
		proc = bpf_map_lookup_elem(&dying, &tgid);
	if (!may_be_wanted(proc, tgid))
		return NULL;

	look_at_current(&now, task);
	want_of_process(&want, proc, tgid, now.start_boottime, now.exec_id);
	/* There is one clock for each rate in use; a process follows the fastest that was asked for. */
	want.rules &= settings.on_cpu_rules;
	if (!want.rules || want.period_ns != ctx->sample_period)
		return NULL;
	counters->taken += __builtin_popcountll(want.rules);

	if (proc && proc->start_boottime == now.start_boottime) {
		first = !proc->sampled && !(proc->reported && settings.mappings_heard);
		proc->sampled = 1;
	} else if (!is_exiting(task)) {
		/* Whoever is about to end is not entered any more: nobody would take the entry out again. */
		struct proc fresh = {
			.start_boottime = now.start_boottime,
			.exec_id = now.exec_id,
			.sampled = 1,
		};

		if (bpf_map_update_elem(&procs, &tgid, &fresh, BPF_ANY))
			counters->procs_full++;
	}

	scratch = the_scratch();
	if (!scratch)
		return NULL;
	scratch->sample.event.kind = EVENT_SAMPLE;
	scratch->sample.event.tgid = tgid;
	scratch->sample.event.tid = id;
	scratch->sample.event.ktime = bpf_ktime_get_boot_ns();
	scratch->sample.event.start_boottime = now.start_boottime;
	scratch->sample.event.exec_id = now.exec_id;
	scratch->sample.event.cgroup_id = cgroup_id_of(task);
	bpf_get_current_comm(scratch->sample.event.comm, sizeof(scratch->sample.event.comm));
	scratch->sample.event.rules = want.rules;
	scratch->sample.kind = SAMPLE_ON_CPU;
	scratch->sample.state = 0;
	scratch->sample.guessed = 0;
	scratch->sample.value_ns = want.period_ns;
	/* A process that was not sampled before may be gone in a moment: the agent must look at it now. */
	scratch->wake = first;
	if (OF_USER_MODE(&ctx->regs)) {
		scratch->sample.kernel_frames = 0;
		scratch->sample.kernel_truncated = 0;
	} else {
		take_kernel_stack(ctx, &scratch->sample, scratch->frames, 0);
	}
	if (!settings.tables || !settings.user_stacks) {
		take_user_stack(ctx, &scratch->sample, scratch->frames);
		finish_tick(counters, scratch);
		return NULL;
	}

	scratch->sample.user_frames = 0;
	scratch->sample.user_end = USER_STACK_NONE;
	if (now.kernel_thread || !user_registers(task, &scratch->walk)) {
		if (!now.kernel_thread)
			scratch->sample.user_end = USER_STACK_NOT_64_BIT;
		finish_tick(counters, scratch);
		return NULL;
	}
	/* There is a new image and no place in it yet: the registers are zero, or still those of the former image. */
	if (!scratch->walk.pc || (!OF_USER_MODE(&ctx->regs) && in_execve(task))) {
		finish_tick(counters, scratch);
		return NULL;
	}
	image = bpf_map_lookup_elem(&images, &tgid);
	if (!image || image->start_boottime != now.start_boottime || image->exec_id != now.exec_id) {
		/* An execve that was not told of yet may still have the former image's registers. */
		if (OF_USER_MODE(&ctx->regs) || !proc || proc->start_boottime != now.start_boottime ||
		    proc->exec_id == now.exec_id) {
			counters->raw++;
			take_raw(scratch);
		}
		finish_tick(counters, scratch);
		return NULL;
	}
	scratch->walk.mapping.begin = 0;
	scratch->walk.mapping.end = 0;
	scratch->walk.tgid = tgid;
	scratch->walk.epoch = image->epoch;
	scratch->walk.piece_bytes = 0;
	scratch->walk.frames = 0;
	scratch->walk.end = USER_STACK_TRUNCATED;
	scratch->walk.exact = 1;
	scratch->walk.first = 1;
	scratch->walk.fp_lost = 0;
	scratch->walk.rbx_lost = 0;
	scratch->walk.guessed = 0;
	return scratch;
}

ALWAYS_INLINE struct found_rules *the_found_rules(void)
{
	u32 zero = 0;

	return bpf_map_lookup_elem(&found_rules, &zero);
}

struct frame_context {
	struct sample_scratch *scratch;
	struct found_rules *found;
};

static long each_frame(u32 index, struct frame_context *context)
{
	return !walk_frame(context->scratch, context->found);
}

/* Where the kernel has bpf_loop (5.17). */
SEC("perf_event")
int on_tick(struct bpf_perf_event_data *ctx)
{
	struct counters *counters = count();
	struct frame_context context = { .found = the_found_rules() };

	if (!counters || !context.found || !settings.sampling)
		return 0;
	context.scratch = begin_tick(ctx, counters);
	if (!context.scratch)
		return 0;
	bpf_loop(MAX_USER_FRAMES + 1, each_frame, &context, 0);
	finish_walk(counters, context.scratch);
	return 0;
}

/* Filled by the agent: the only entry is walk_chain. */
struct {
	__uint(type, BPF_MAP_TYPE_PROG_ARRAY);
	__uint(max_entries, 1);
	__type(key, u32);
	__type(value, u32);
} chain SEC(".maps");

/* Where it has not: some frames in each of a chain of tail calls. True: there are more, and a call is left for them. */
ALWAYS_INLINE bool walk_link(struct sample_scratch *scratch, struct found_rules *found)
{
	bool more = true;

	for (u32 i = 0; i < CHAIN_FRAMES && more; i++)
		more = walk_frame(scratch, found);
	return more && ++scratch->chain_calls < CHAIN_CALLS;
}

SEC("perf_event")
int walk_chain(struct bpf_perf_event_data *ctx)
{
	struct counters *counters = count();
	struct sample_scratch *scratch = the_scratch();
	struct found_rules *found = the_found_rules();

	if (!counters || !scratch || !found)
		return 0;
	if (walk_link(scratch, found))
		bpf_tail_call(ctx, &chain, 0);
	finish_walk(counters, scratch);
	return 0;
}

SEC("perf_event")
int on_tick_chain(struct bpf_perf_event_data *ctx)
{
	struct counters *counters = count();
	struct sample_scratch *scratch;

	if (!counters || !settings.sampling)
		return 0;
	scratch = begin_tick(ctx, counters);
	if (!scratch)
		return 0;
	scratch->chain_calls = 0;
	bpf_tail_call(ctx, &chain, 0);
	return 0;
}

/* The head of sample_scratch, as far as it is kept. */
struct off_cpu_entry {
	struct sample sample;
	u64 frames[OFF_CPU_FRAMES];
};
_Static_assert(sizeof(struct off_cpu_entry) <= sizeof(struct sample) + FRAME_SLOTS * sizeof(u64), "it is its head");

/*
 * Threads that are off the CPU, with the stack that they left it by, by thread id. Writer: on_switch. Reader: the agent,
 * for who is still off the CPU when a window ends. Size: as many armed threads as block at one time; what does not fit is
 * counted. Preallocated: nothing may be allocated inside the scheduler.
 */
struct {
	__uint(type, BPF_MAP_TYPE_HASH);
	__uint(max_entries, 2048);
	__type(key, u32);
	__type(value, struct off_cpu_entry);
} off_cpu SEC(".maps");

struct budget {
	u64 tokens;
	u64 refilled;
};

/* Stacks of threads that block which may still be taken, by CPU. */
struct {
	__uint(type, BPF_MAP_TYPE_PERCPU_ARRAY);
	__uint(max_entries, 1);
	__type(key, u32);
	__type(value, struct budget);
} off_cpu_budget SEC(".maps");

#define TASK_DEAD 0x80

ALWAYS_INLINE bool block_allowed(void)
{
	u32 zero = 0;
	u64 now = bpf_ktime_get_ns();
	struct budget *budget = bpf_map_lookup_elem(&off_cpu_budget, &zero);

	if (!budget)
		return false;
	if (now - budget->refilled >= 100000000) {
		budget->refilled = now;
		budget->tokens = settings.off_cpu_rate / 10 + 1;
	}
	if (!budget->tokens)
		return false;
	budget->tokens--;
	return true;
}

/* Keeps the stacks until the thread comes back. */
ALWAYS_INLINE void keep_block(struct counters *counters, struct sample_scratch *scratch)
{
	u32 tid = scratch->sample.event.tid;

	if (scratch->sample.kernel_frames + scratch->sample.user_frames > OFF_CPU_FRAMES) {
		scratch->sample.user_frames = OFF_CPU_FRAMES - scratch->sample.kernel_frames;
		scratch->sample.user_end = USER_STACK_TRUNCATED;
	}
	if (bpf_map_update_elem(&off_cpu, &tid, scratch, BPF_ANY)) {
		u64 rules = __builtin_popcountll(scratch->sample.event.rules);

		counters->taken += rules;
		counters->lost_off_cpu_full += rules;
	}
}

ALWAYS_INLINE void finish_block(struct counters *counters, struct sample_scratch *scratch)
{
	struct walk *walk = &scratch->walk;

	scratch->sample.user_frames = walk->frames;
	scratch->sample.user_end = walk->end;
	scratch->sample.guessed = walk->guessed;
	keep_block(counters, scratch);
}

/*
 * The interval of a thread that is on the CPU, if it left one, is over. What it has run since then is taken off: the switch
 * by which it came is not always seen (a sandbox may keep its own threads' tracepoints to itself, and then that of whom
 * they hand the CPU to is missing too).
 */
ALWAYS_INLINE void end_block(struct counters *counters, u32 tid, struct task_struct *task, u64 now)
{
	struct off_cpu_entry *entry = bpf_map_lookup_elem(&off_cpu, &tid);
	u64 passed, ran;

	if (!entry)
		return;
	passed = now - entry->sample.event.ktime;
	ran = BPF_CORE_READ(task, se.sum_exec_runtime) - entry->sample.value_ns;
	/* More than that has another thread of this number run. */
	if (ran <= passed && passed - ran >= settings.off_cpu_min_ns) {
		entry->sample.value_ns = passed - ran;
		counters->taken += __builtin_popcountll(entry->sample.event.rules);
		send_sample(counters, &entry->sample, sizeof(*entry), false);
	}
	bpf_map_delete_elem(&off_cpu, &tid);
}

/*
 * Ends the interval of the thread that comes, and begins that of the one that goes. Null: there is no stack to walk.
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
	/* First of all: what follows takes a CPU that was asleep, its caches cold, some 20 us (measured). */
	u64 switched = bpf_ktime_get_boot_ns(), id = bpf_get_current_pid_tgid();
	u32 tgid = id >> 32, next_tid = BPF_CORE_READ(next, pid), state;

	end_block(counters, next_tid, next, switched);

	/* A thread that was pushed aside, or could go on, did not block; one that is dead will not come back. */
	state = state_of(prev);
	if ((u8)ctx->args[0] || !tgid || !state || state & TASK_DEAD)
		return NULL;
	proc = bpf_map_lookup_elem(&procs, &tgid);
	if (!may_be_wanted(proc, tgid))
		return NULL;
	look_at_current(&now, prev);
	want_of_process(&want, proc, tgid, now.start_boottime, now.exec_id);
	want.rules &= settings.off_cpu_rules;
	if (!want.rules)
		return NULL;
	end_block(counters, id, prev, switched);
	if (!block_allowed()) {
		u64 rules = __builtin_popcountll(want.rules);

		counters->taken += rules;
		counters->lost_off_cpu_rate += rules;
		return NULL;
	}
	scratch = the_scratch();
	if (!scratch)
		return NULL;
	fill_event(&scratch->sample.event, EVENT_SAMPLE, prev, now.start_boottime);
	scratch->sample.event.tid = id;
	scratch->sample.event.rules = want.rules;
	scratch->sample.kind = SAMPLE_OFF_CPU;
	scratch->sample.state = state;
	/* Until it comes back. */
	scratch->sample.value_ns = BPF_CORE_READ(prev, se.sum_exec_runtime);
	scratch->sample.guessed = 0;
	/* This program, and the kernel's call of it. */
	take_kernel_stack(ctx, &scratch->sample, scratch->frames, 2);
	image = bpf_map_lookup_elem(&images, &tgid);
	if (!settings.tables || !settings.user_stacks || !image || image->start_boottime != now.start_boottime ||
	    image->exec_id != now.exec_id) {
		/* The agent enters the image when it sees the sample; there is no room for a raw one. */
		take_user_stack(ctx, &scratch->sample, scratch->frames);
		keep_block(counters, scratch);
		return NULL;
	}
	scratch->sample.user_frames = 0;
	scratch->sample.user_end = USER_STACK_NONE;
	if (now.kernel_thread || !user_registers(prev, &scratch->walk) || !scratch->walk.pc || in_execve(prev)) {
		keep_block(counters, scratch);
		return NULL;
	}
	scratch->walk.mapping.begin = 0;
	scratch->walk.mapping.end = 0;
	scratch->walk.tgid = tgid;
	scratch->walk.epoch = image->epoch;
	scratch->walk.piece_bytes = 0;
	scratch->walk.frames = 0;
	scratch->walk.end = USER_STACK_TRUNCATED;
	scratch->walk.exact = 1;
	scratch->walk.first = 1;
	scratch->walk.fp_lost = 0;
	scratch->walk.rbx_lost = 0;
	scratch->walk.guessed = 0;
	return scratch;
}

/* raw tracepoint arguments: preempt, prev, next; from 5.18 on also prev_state */
SEC("raw_tp/sched_switch")
int on_switch(struct bpf_raw_tracepoint_args *ctx)
{
	struct counters *counters = count();
	struct frame_context context = { .found = the_found_rules() };

	if (!counters || !context.found || !settings.sampling)
		return 0;
	context.scratch = begin_switch(ctx, counters);
	if (!context.scratch)
		return 0;
	bpf_loop(OFF_CPU_FRAMES + 1, each_frame, &context, 0);
	finish_block(counters, context.scratch);
	return 0;
}

/* Filled by the agent: the only entry is walk_switch_chain. */
struct {
	__uint(type, BPF_MAP_TYPE_PROG_ARRAY);
	__uint(max_entries, 1);
	__type(key, u32);
	__type(value, u32);
} switch_chain SEC(".maps");

SEC("raw_tp/sched_switch")
int walk_switch_chain(struct bpf_raw_tracepoint_args *ctx)
{
	struct counters *counters = count();
	struct sample_scratch *scratch = the_scratch();
	struct found_rules *found = the_found_rules();

	if (!counters || !scratch || !found)
		return 0;
	if (walk_link(scratch, found))
		bpf_tail_call(ctx, &switch_chain, 0);
	finish_block(counters, scratch);
	return 0;
}

SEC("raw_tp/sched_switch")
int on_switch_chain(struct bpf_raw_tracepoint_args *ctx)
{
	struct counters *counters = count();
	struct sample_scratch *scratch;

	if (!counters || !settings.sampling)
		return 0;
	scratch = begin_switch(ctx, counters);
	if (!scratch)
		return 0;
	scratch->chain_calls = 0;
	bpf_tail_call(ctx, &switch_chain, 0);
	return 0;
}

ALWAYS_INLINE bool report_allowed(void)
{
	u32 zero = 0;
	u64 now = bpf_ktime_get_ns(), rate = settings.report_rate, since;
	struct {
		u64 tokens;
		u64 refilled;
	} *bucket = bpf_map_lookup_elem(&report_bucket, &zero);

	if (!bucket)
		return false;
	since = now - bucket->refilled;
	/* Two CPUs may refill at once: the bucket is then a little too generous, never stuck. */
	if (since >= 100000000) {
		bucket->refilled = now;
		bucket->tokens = rate / 10 + 1;
	}
	/* Taken without its former value, which kernels before 5.12 cannot give: CPUs that race may take one too many. */
	if ((s64)bucket->tokens > 0) {
		__sync_fetch_and_add(&bucket->tokens, -1);
		return true;
	}
	return false;
}

ALWAYS_INLINE void send_lifecycle(struct lifecycle_counts *counts, void *record, u64 size, bool wake)
{
	if (bpf_ringbuf_output(&events, record, size, wake ? BPF_RB_FORCE_WAKEUP : BPF_RB_NO_WAKEUP))
		counts->lost_ring_full++;
	else
		counts->sent++;
}

/* What a process that is not denied is sampled for, as far as the kernel side decides it. */
ALWAYS_INLINE u64 wanted_rules(const struct proc *proc)
{
	return (proc->want.rules | proc->sticky.rules | settings.all.rules) & settings.live_rules;
}

ALWAYS_INLINE void fill_lifecycle(struct lifecycle *record, u32 kind, struct task_struct *task, const struct proc *proc)
{
	fill_event(&record->event, kind, task, proc->start_boottime);
	record->event.exec_id = proc->exec_id;
	record->event.rules = proc->denied ? 0 : wanted_rules(proc);
	record->parent = BPF_CORE_READ(task, real_parent, tgid);
	record->uid = BPF_CORE_READ(task, cred, euid.val);
}

/* A process as it is now, wanted by nobody yet. */
ALWAYS_INLINE void identify(struct proc *fresh, struct task_struct *task)
{
	fresh->start_boottime = BPF_CORE_READ(task, group_leader, start_boottime);
	fresh->exec_id = BPF_CORE_READ(task, self_exec_id);
}

/* What is known of a process, unless it is of an earlier one with the same number. */
ALWAYS_INLINE struct proc *known_proc(u32 tgid, u64 start_boottime)
{
	struct proc *proc = bpf_map_lookup_elem(&procs, &tgid);

	return proc && proc->start_boottime == start_boottime ? proc : NULL;
}

ALWAYS_INLINE struct arm *known_arm(u32 tgid, u64 start_boottime)
{
	struct arm *arm = settings.arms ? bpf_map_lookup_elem(&arms, &tgid) : NULL;

	return arm && arm->start_boottime == start_boottime ? arm : NULL;
}

ALWAYS_INLINE void enter_proc(struct counters *counters, u32 tgid, const struct proc *fresh)
{
	if (bpf_map_update_elem(&procs, &tgid, fresh, BPF_ANY))
		counters->procs_full++;
}

enum handler {
	HANDLER_EXEC = 0,
	HANDLER_FORK = 1,
	HANDLER_EXIT = 2,
	HANDLERS = 3,
};

/* A thread with one of its images: never again another one. */
struct dealt {
	u64 start_boottime;
	u32 tid;
	u32 exec_id;
};

/*
 * From 7.0 on a handler of a tracepoint can be preempted, and for what comes on its CPU meanwhile the kernel does not call
 * it, as if it had called itself. So each of these handlers is attached twice there, as two programs. The kernel calls them
 * one after the other; the one that comes first does the work and takes down here for whom, and its twin has nothing to do.
 * If the first was refused the twin does the work. Should both do it (a third event came between the two, or the thread
 * went to another CPU) the event is told twice, which changes nothing. What both were refused for the agent learns from the
 * kernel's count of refusals. Writers and readers: these handlers.
 */
struct {
	__uint(type, BPF_MAP_TYPE_PERCPU_ARRAY);
	__uint(max_entries, HANDLERS);
	__type(key, u32);
	__type(value, struct dealt);
} dealt_with SEC(".maps");

/* Whether the handlers are there twice. Set before loading. */
const volatile u32 twins;

ALWAYS_INLINE bool is_dealt_with(u32 handler, struct task_struct *task)
{
	struct dealt *last = twins ? bpf_map_lookup_elem(&dealt_with, &handler) : NULL;

	return last && last->tid == (u32)BPF_CORE_READ(task, pid) &&
	       last->exec_id == BPF_CORE_READ(task, self_exec_id) &&
	       last->start_boottime == BPF_CORE_READ(task, start_boottime);
}

/* At the end of the work: whoever preempted it has taken down its own meanwhile. */
ALWAYS_INLINE void deal_with(u32 handler, struct task_struct *task)
{
	struct dealt *last = twins ? bpf_map_lookup_elem(&dealt_with, &handler) : NULL;

	if (!last)
		return;
	last->tid = BPF_CORE_READ(task, pid);
	last->exec_id = BPF_CORE_READ(task, self_exec_id);
	last->start_boottime = BPF_CORE_READ(task, start_boottime);
}

struct file_key {
	u64 inode;
	u32 device;
	u32 generation;
};

/*
 * Executables that the agent has been woken for. Writer and reader: on_exec. Size: different programs that a node starts
 * over and over; for one that has been forgotten the agent is woken once more.
 */
struct {
	__uint(type, BPF_MAP_TYPE_LRU_HASH);
	__uint(max_entries, 2048);
	__type(key, struct file_key);
	__type(value, u32);
} seen_files SEC(".maps");

/* Takes down which file is executed. True: it was before. */
ALWAYS_INLINE bool seen_before(struct lifecycle *record, struct linux_binprm *bprm)
{
	struct inode *inode = BPF_CORE_READ(bprm, file, f_inode);
	struct file_key key = {
		.inode = BPF_CORE_READ(inode, i_ino),
		.device = BPF_CORE_READ(inode, i_sb, s_dev),
		.generation = BPF_CORE_READ(inode, i_generation),
	};
	u32 yes = 1;

	record->inode = key.inode;
	record->device = key.device;
	if (bpf_map_lookup_elem(&seen_files, &key))
		return true;
	/* If it finds no place the agent is woken again. */
	bpf_map_update_elem(&seen_files, &key, &yes, BPF_ANY);
	return false;
}

ALWAYS_INLINE void follow_exec(struct bpf_raw_tracepoint_args *ctx, u32 place)
{
	struct task_struct *task = (void *)ctx->args[0];
	struct linux_binprm *bprm = (void *)ctx->args[2];
	struct exec_record *record;
	struct counters *counters;
	struct proc fresh = {};
	struct proc *old;
	struct arm *arm;
	u64 candidates;
	u32 tgid;
	bool heard, tracked, wanted, entered, seen;

	counters = count();
	if (!counters)
		return;
	counters->exec.seen++;
	tgid = BPF_CORE_READ(task, tgid);
	identify(&fresh, task);
	old = known_proc(tgid, fresh.start_boottime);
	arm = known_arm(tgid, fresh.start_boottime);
	tracked = old || arm;
	/* Of a process that is sampled every exec must be told, or its samples would be named after the old image. */
	heard = arm || (old && (old->sampled || old->want.rules || old->sticky.rules));
	if (old)
		fresh.sticky = old->sticky;
	fresh.reported = 1;
	candidates = decide(counters, task, tgid, &fresh, tracked, place);
	wanted = !fresh.denied && (wanted_rules(&fresh) | candidates);
	if (!tracked && !wanted) {
		counters->exec.filtered++;
		return;
	}
	entered = tracked || fresh.want.rules || fresh.sticky.rules;
	if (!heard && !report_allowed()) {
		counters->exec.lost_rate++;
		fresh.reported = 0;
		if (entered)
			enter_proc(counters, tgid, &fresh);
		return;
	}
	/* What is told is entered, so that its end is told too. */
	if (!entered)
		enter_proc(counters, tgid, &fresh);
	/* Written in the ring: with the path it is too large for a stack that a decision has been made on. */
	record = bpf_ringbuf_reserve(&events, sizeof(*record), 0);
	if (!record) {
		counters->exec.lost_ring_full++;
		return;
	}
	__builtin_memset(record, 0, sizeof(*record));
	fill_lifecycle(&record->lifecycle, EVENT_EXEC, task, &fresh);
	record->lifecycle.candidates = candidates;
	record->lifecycle.by_thread = (u32)ctx->args[1] != tgid;
	bpf_probe_read_kernel_str(record->path, sizeof(record->path), BPF_CORE_READ(bprm, filename));
	/* It may live for milliseconds only: files that are not open yet must be opened now. */
	seen = seen_before(&record->lifecycle, bprm) && settings.mappings_heard;
	counters->exec.sent++;
	bpf_ringbuf_submit(record, candidates || (wanted && !seen) ? BPF_RB_FORCE_WAKEUP : BPF_RB_NO_WAKEUP);
}

/* raw tracepoint arguments: task, old_pid, bprm */
ALWAYS_INLINE int exec_once(struct bpf_raw_tracepoint_args *ctx, u32 place)
{
	struct task_struct *task = (void *)ctx->args[0];

	if (!settings.lifecycle || is_dealt_with(HANDLER_EXEC, task))
		return 0;
	follow_exec(ctx, place);
	deal_with(HANDLER_EXEC, task);
	return 0;
}

SEC("raw_tp/sched_process_exec")
int on_exec(struct bpf_raw_tracepoint_args *ctx)
{
	return exec_once(ctx, PLACE_EXEC);
}

SEC("raw_tp/sched_process_exec")
int on_exec_again(struct bpf_raw_tracepoint_args *ctx)
{
	return exec_once(ctx, PLACE_EXEC_AGAIN);
}

ALWAYS_INLINE void follow_fork(struct bpf_raw_tracepoint_args *ctx, u32 place)
{
	struct task_struct *parent = (void *)ctx->args[0];
	struct task_struct *child = (void *)ctx->args[1];
	u32 child_tgid = BPF_CORE_READ(child, tgid), parent_tgid;
	u64 live = settings.live_rules, candidates = 0;
	struct side *side = &settings.sides[settings.generation & 1];
	struct lifecycle record = {};
	struct counters *counters;
	struct proc fresh = {};
	struct proc *proc;
	struct arm *arm;
	bool heir, entered;

	counters = count();
	if (!counters)
		return;
	counters->fork.seen++;
	identify(&fresh, child);
	fresh.reported = 1;
	parent_tgid = BPF_CORE_READ(parent, tgid);
	proc = bpf_map_lookup_elem(&procs, &parent_tgid);
	if (proc) {
		want_also(&fresh.want, &proc->want, live);
		want_also(&fresh.sticky, &proc->sticky, live);
		fresh.denied = proc->denied;
	}
	arm = settings.arms ? bpf_map_lookup_elem(&arms, &parent_tgid) : NULL;
	if (arm)
		want_also(arm->sticky ? &fresh.sticky : &fresh.want, &arm->want, live);
	heir = fresh.want.rules || fresh.sticky.rules;
	/* A stale entry of an earlier process with this number must not survive. */
	if (!heir && !fresh.denied)
		bpf_map_delete_elem(&procs, &child_tgid);
	else
		enter_proc(counters, child_tgid, &fresh);
	/* A child that is born into another control group (clone3) is another matter than its parent. */
	if ((side->rules & ~(side->any_cgroup & side->any_container)) && cgroup_id_of(parent) != cgroup_id_of(child))
		candidates = decide(counters, child, child_tgid, &fresh, heir, place);
	else if (side->by_agent && !fresh.denied)
		candidates = match_process(child, child_tgid, settings.generation, place) & side->by_agent;
	if (fresh.denied || !(wanted_rules(&fresh) | candidates)) {
		counters->fork.filtered++;
		return;
	}
	entered = heir || fresh.want.rules || fresh.sticky.rules;
	if (!heir && !report_allowed()) {
		counters->fork.lost_rate++;
		fresh.reported = 0;
		if (entered)
			enter_proc(counters, child_tgid, &fresh);
		return;
	}
	if (!entered)
		enter_proc(counters, child_tgid, &fresh);
	fill_lifecycle(&record, EVENT_FORK, child, &fresh);
	/* Its parent may be another by CLONE_PARENT; what it inherits is the image of the one that called. */
	record.parent = parent_tgid;
	record.candidates = candidates;
	send_lifecycle(&counters->fork, &record, sizeof(record), false);
}

/* raw tracepoint arguments: parent, child */
ALWAYS_INLINE int fork_once(struct bpf_raw_tracepoint_args *ctx, u32 place)
{
	struct task_struct *child = (void *)ctx->args[1];

	/* A thread is no child. */
	if (!settings.lifecycle || BPF_CORE_READ(child, tgid) != BPF_CORE_READ(child, pid) ||
	    is_dealt_with(HANDLER_FORK, child))
		return 0;
	follow_fork(ctx, place);
	deal_with(HANDLER_FORK, child);
	return 0;
}

SEC("raw_tp/sched_process_fork")
int on_fork(struct bpf_raw_tracepoint_args *ctx)
{
	return fork_once(ctx, PLACE_FORK);
}

SEC("raw_tp/sched_process_fork")
int on_fork_again(struct bpf_raw_tracepoint_args *ctx)
{
	return fork_once(ctx, PLACE_FORK_AGAIN);
}

#define SIGNAL_GROUP_EXIT 0x4

ALWAYS_INLINE void follow_exit(struct task_struct *task, struct signal_struct *signal)
{
	struct lifecycle record = {};
	struct counters *counters;
	struct proc last = {};
	struct proc *proc;
	struct arm *arm;
	u32 tgid;

	counters = count();
	if (!counters)
		return;
	tgid = BPF_CORE_READ(task, tgid);
	proc = bpf_map_lookup_elem(&procs, &tgid);
	if (proc)
		last = *proc;
	/*
	 * Two last threads may both find nobody alive; the one that removes the entry reports. The number is not given to
	 * another process before both are gone.
	 */
	if (!proc || bpf_map_delete_elem(&procs, &tgid) ||
	    last.start_boottime != BPF_CORE_READ(task, group_leader, start_boottime)) {
		counters->exit.seen++;
		counters->exit.filtered++;
		return;
	}
	counters->exit.seen++;
	fill_lifecycle(&record, EVENT_EXIT, task, &last);
	/* As wait(2) does it: what ended the group, or what its leader gave. */
	if (BPF_CORE_READ(signal, flags) & SIGNAL_GROUP_EXIT)
		record.exit_code = BPF_CORE_READ(signal, group_exit_code);
	else
		record.exit_code = BPF_CORE_READ(task, group_leader, exit_code);
	send_lifecycle(&counters->exit, &record, sizeof(record), false);
	/* It goes on to use the CPU for a while: the sampler finds it there. */
	arm = known_arm(tgid, last.start_boottime);
	if (arm)
		want_also(&last.sticky, &arm->want, settings.live_rules);
	bpf_map_update_elem(&dying, &tgid, &last, BPF_ANY);
}

/* raw tracepoint arguments: task; from 6.16 on also group_dead */
ALWAYS_INLINE int exit_once(struct bpf_raw_tracepoint_args *ctx)
{
	struct task_struct *task = (void *)ctx->args[0];
	struct signal_struct *signal;

	if (!settings.lifecycle)
		return 0;
	signal = BPF_CORE_READ(task, signal);
	/* The leader's own end is not the process's: others of its threads may go on for hours. */
	if (BPF_CORE_READ(signal, live.counter) || is_dealt_with(HANDLER_EXIT, task))
		return 0;
	follow_exit(task, signal);
	deal_with(HANDLER_EXIT, task);
	return 0;
}

SEC("raw_tp/sched_process_exit")
int on_exit(struct bpf_raw_tracepoint_args *ctx)
{
	return exit_once(ctx);
}

SEC("raw_tp/sched_process_exit")
int on_exit_again(struct bpf_raw_tracepoint_args *ctx)
{
	return exit_once(ctx);
}

/* Decides anew for a process that runs. True: nobody needs to hear of it. */
ALWAYS_INLINE bool look_again(struct counters *counters, struct task_struct *leader, u32 place,
			      struct lifecycle *record)
{
	struct proc fresh = {};
	struct proc *old;
	u32 tgid = BPF_CORE_READ(leader, tgid);
	u64 candidates;

	counters->found.seen++;
	/* One whose last thread is gone waits for its parent only: its end has been told. */
	if (!BPF_CORE_READ(leader, signal, live.counter)) {
		counters->found.filtered++;
		return true;
	}
	identify(&fresh, leader);
	old = known_proc(tgid, fresh.start_boottime);
	if (old)
		fresh = *old;
	candidates = decide(counters, leader, tgid, &fresh, old, place);
	if (fresh.denied || !(fresh.want.rules | fresh.sticky.rules | candidates)) {
		counters->found.filtered++;
		return true;
	}
	if (!old && !fresh.want.rules && !fresh.sticky.rules)
		enter_proc(counters, tgid, &fresh);
	fill_lifecycle(record, EVENT_FOUND, leader, &fresh);
	record->candidates = candidates;
	return false;
}

/*
 * A process is put into another control group: what it is matched by has changed.
 * raw tracepoint arguments: destination, its path, task, whether the whole process moves
 */
SEC("raw_tp/cgroup_attach_task")
int on_attach(struct bpf_raw_tracepoint_args *ctx)
{
	struct task_struct *task = (void *)ctx->args[2];
	struct side *side = &settings.sides[settings.generation & 1];
	struct lifecycle record = {};
	struct counters *counters;

	if (!settings.lifecycle || !(side->rules & ~(side->any_cgroup & side->any_container)))
		return 0;
	counters = count();
	if (!counters)
		return 0;
	if (look_again(counters, BPF_CORE_READ(task, group_leader), PLACE_ATTACH, &record))
		return 0;
	if (report_allowed())
		send_lifecycle(&counters->found, &record, sizeof(record), false);
	else
		counters->found.lost_rate++;
	return 0;
}

/*
 * Walks over every process that runs and decides anew what it is sampled for. The agent reads it after the rules have
 * changed: new processes are already decided by the new rules then, so that none falls between.
 */
SEC("iter/task")
int each_task(struct bpf_iter__task *ctx)
{
	struct task_struct *task = ctx->task;
	struct counters *counters = count();
	struct lifecycle record = {};

	/* Asked for by the agent: also where nothing is told by itself. */
	if (!task || !counters)
		return 0;
	if (task->tgid != task->pid)
		return 0;
	if (!look_again(counters, task, PLACE_WALK, &record))
		send_lifecycle(&counters->found, &record, sizeof(record), false);
	return 0;
}
