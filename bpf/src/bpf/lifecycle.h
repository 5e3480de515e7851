/* SPDX-License-Identifier: GPL-2.0 OR BSD-2-Clause */
/* Follows processes through exec, fork, exit and changes of their control group and name, and reports those that rules want. */
#ifndef LIFECYCLE_H
#define LIFECYCLE_H

#include "match.h"
#include "rate.h"

/* Renames have a bucket of their own: a process that renames itself without end must not use up the reports of others. */
enum report_kind {
	REPORT_LIFE = 0,
	REPORT_RENAME = 1,
	REPORT_KINDS = 2,
};

/* Reports that may still be sent, for all CPUs together. Writers and readers: these handlers. */
struct {
	__uint(type, BPF_MAP_TYPE_ARRAY);
	__uint(max_entries, REPORT_KINDS);
	__type(key, u32);
	__type(value, struct bucket);
} report_bucket SEC(".maps");

ALWAYS_INLINE bool report_allowed(u32 kind)
{
	struct bucket *bucket = bpf_map_lookup_elem(&report_bucket, &kind);

	return bucket && take_token(bucket, settings.report_rate);
}

ALWAYS_INLINE void send_lifecycle(struct lifecycle_counts *counts, void *record, u64 size, bool wake)
{
	if (bpf_ringbuf_output(&events, record, size, wake ? BPF_RB_FORCE_WAKEUP : BPF_RB_NO_WAKEUP))
		counts->lost_ring_full++;
	else
		counts->sent++;
}

/* Returns the rules that a process which is not denied is sampled for, as far as the kernel side decides it. */
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

/* Reads the key of a process as it is now. */
ALWAYS_INLINE void identify(struct proc *fresh, struct task_struct *task)
{
	fresh->start_boottime = BPF_CORE_READ(task, group_leader, start_boottime);
	fresh->exec_id = BPF_CORE_READ(task, self_exec_id);
}

/* Returns the entry of a process, unless it is that of an earlier one with the same PID. */
ALWAYS_INLINE struct proc *known_proc(u32 tgid, u64 start_boottime)
{
	struct proc *proc = bpf_map_lookup_elem(&procs, &tgid);

	return proc && proc->start_boottime == start_boottime ? proc : NULL;
}

ALWAYS_INLINE struct mark *known_mark(u32 tgid, u64 start_boottime)
{
	struct mark *mark = settings.marks ? bpf_map_lookup_elem(&marks, &tgid) : NULL;

	return mark && mark->start_boottime == start_boottime ? mark : NULL;
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

/* A thread with one of its images: no other thread or image ever has the same three numbers. */
struct handled_event {
	u64 start_boottime;
	u32 tid;
	u32 exec_id;
};

/*
 * From 7.0 on the kernel can preempt a handler of a tracepoint. For an event on the same CPU meanwhile it does not call the
 * handler, as if it had called itself. So each of these handlers is attached twice there, as two programs, which the kernel
 * calls one after the other. The first does the work and notes the thread here; the second finds the note and returns. If
 * the kernel skipped the first, the second does the work. Both do it if a third event came between them, or if the thread
 * went to another CPU: the agent then receives the event twice, which changes nothing. The agent learns from the kernel's
 * skip counters how many events both missed. Writers and readers: these handlers.
 */
struct {
	__uint(type, BPF_MAP_TYPE_PERCPU_ARRAY);
	__uint(max_entries, HANDLERS);
	__type(key, u32);
	__type(value, struct handled_event);
} handled SEC(".maps");

/* Whether the redundant handlers are attached. Set before loading. */
const volatile u32 redundant_handlers;

ALWAYS_INLINE bool is_handled(u32 handler, struct task_struct *task)
{
	struct handled_event *last = redundant_handlers ? bpf_map_lookup_elem(&handled, &handler) : NULL;

	return last && last->tid == (u32)BPF_CORE_READ(task, pid) &&
	       last->exec_id == BPF_CORE_READ(task, self_exec_id) &&
	       last->start_boottime == BPF_CORE_READ(task, start_boottime);
}

/* Notes the thread, at the end of the work: a handler that preempted this one has noted its own meanwhile. */
ALWAYS_INLINE void note_handled(u32 handler, struct task_struct *task)
{
	struct handled_event *last = redundant_handlers ? bpf_map_lookup_elem(&handled, &handler) : NULL;

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
 * Executables for which on_exec has woken the agent. Writer and reader: on_exec. Size: the different programs that a node
 * starts again and again; for an evicted one on_exec wakes the agent once more.
 */
struct {
	__uint(type, BPF_MAP_TYPE_LRU_HASH);
	__uint(max_entries, 2048);
	__type(key, struct file_key);
	__type(value, u32);
} seen_files SEC(".maps");

/* Writes the executed file into the record. True: on_exec has seen it before. */
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
	/* If this fails, the next exec of the file wakes the agent again. */
	bpf_map_update_elem(&seen_files, &key, &yes, BPF_ANY);
	return false;
}

ALWAYS_INLINE void follow_exec(struct bpf_raw_tracepoint_args *ctx, u32 slot)
{
	struct task_struct *task = (void *)ctx->args[0];
	struct linux_binprm *bprm = (void *)ctx->args[2];
	struct exec_record *record;
	struct counters *counters;
	struct proc fresh = {};
	struct proc *old;
	struct mark *mark;
	u64 candidates;
	u32 tgid;
	bool known, tracked, wanted, entered, seen;

	counters = this_cpu_counters();
	if (!counters)
		return;
	counters->exec.seen++;
	tgid = BPF_CORE_READ(task, tgid);
	identify(&fresh, task);
	old = known_proc(tgid, fresh.start_boottime);
	mark = known_mark(tgid, fresh.start_boottime);
	tracked = old || mark;
	/* Each exec of a sampled process must be reported, or its samples would be named after the old image. */
	known = mark || (old && (old->sampled || old->want.rules || old->sticky.rules));
	if (old)
		fresh.sticky = old->sticky;
	fresh.reported = 1;
	candidates = decide(counters, task, NULL, tgid, &fresh, tracked, slot);
	wanted = !fresh.denied && (wanted_rules(&fresh) | candidates);
	if (!tracked && !wanted) {
		counters->exec.filtered++;
		return;
	}
	entered = tracked || fresh.want.rules || fresh.sticky.rules;
	if (!known && !report_allowed(REPORT_LIFE)) {
		counters->exec.lost_rate++;
		fresh.reported = 0;
		if (entered)
			enter_proc(counters, tgid, &fresh);
		return;
	}
	/* A reported process is entered, so that its exit is reported too. */
	if (!entered)
		enter_proc(counters, tgid, &fresh);
	/* Written in the ring buffer: with its path the record is too large for the stack that decide() used. */
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
	/* It may live for milliseconds only: the agent must open files now that it does not hold open yet. */
	seen = seen_before(&record->lifecycle, bprm) && settings.mappings_reported;
	counters->exec.sent++;
	bpf_ringbuf_submit(record, candidates || (wanted && !seen) ? BPF_RB_FORCE_WAKEUP : BPF_RB_NO_WAKEUP);
}

/* raw tracepoint arguments: task, old_pid, bprm */
ALWAYS_INLINE void handle_exec(struct bpf_raw_tracepoint_args *ctx, u32 slot)
{
	struct task_struct *task = (void *)ctx->args[0];

	if (!settings.lifecycle || is_handled(HANDLER_EXEC, task))
		return;
	follow_exec(ctx, slot);
	note_handled(HANDLER_EXEC, task);
}

/* Whether a new child may match other rules than the process of the thread that forked it. */
ALWAYS_INLINE bool differs(struct task_struct *parent, struct task_struct *child, const struct side *side)
{
	u64 of_parent[2] = {}, of_child[2] = {};

	/* clone3 can put it into another control group. */
	if ((side->rules & ~(side->any_cgroup & side->any_container)) && cgroup_id_of(parent) != cgroup_id_of(child))
		return true;
	/* It gets the name of the thread, which may not be that of the process. */
	if (!(side->rules & ~side->any_comm) || BPF_CORE_READ(parent, pid) == BPF_CORE_READ(parent, tgid))
		return false;
	_Static_assert(sizeof(of_parent) == COMM_LEN, "compared as two words");
	read_comm((char *)of_parent, BPF_CORE_READ(parent, group_leader), NULL);
	read_comm((char *)of_child, child, NULL);
	return of_parent[0] != of_child[0] || of_parent[1] != of_child[1];
}

ALWAYS_INLINE void follow_fork(struct bpf_raw_tracepoint_args *ctx, u32 slot)
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
	struct mark *mark;
	bool inherits, entered;

	counters = this_cpu_counters();
	if (!counters)
		return;
	counters->fork.seen++;
	identify(&fresh, child);
	fresh.reported = 1;
	parent_tgid = BPF_CORE_READ(parent, tgid);
	proc = bpf_map_lookup_elem(&procs, &parent_tgid);
	if (proc) {
		add_want(&fresh.want, &proc->want, live);
		add_want(&fresh.sticky, &proc->sticky, live);
		fresh.denied = proc->denied;
	}
	mark = settings.marks ? bpf_map_lookup_elem(&marks, &parent_tgid) : NULL;
	if (mark)
		add_want(mark->sticky ? &fresh.sticky : &fresh.want, &mark->want, live);
	inherits = fresh.want.rules || fresh.sticky.rules;
	/* A stale entry of an earlier process with this PID must not survive. */
	if (!inherits && !fresh.denied)
		bpf_map_delete_elem(&procs, &child_tgid);
	else
		enter_proc(counters, child_tgid, &fresh);
	if (differs(parent, child, side))
		candidates = decide(counters, child, NULL, child_tgid, &fresh, inherits, slot);
	else if (side->by_agent && !fresh.denied)
		candidates = match_process((u64)child, 0, child_tgid, settings.generation, slot) & side->by_agent;
	if (fresh.denied || !(wanted_rules(&fresh) | candidates)) {
		counters->fork.filtered++;
		return;
	}
	entered = inherits || fresh.want.rules || fresh.sticky.rules;
	if (!inherits && !report_allowed(REPORT_LIFE)) {
		counters->fork.lost_rate++;
		fresh.reported = 0;
		if (entered)
			enter_proc(counters, child_tgid, &fresh);
		return;
	}
	if (!entered)
		enter_proc(counters, child_tgid, &fresh);
	fill_lifecycle(&record, EVENT_FORK, child, &fresh);
	/* By CLONE_PARENT its parent may be another process; it inherits the image of its caller. */
	record.parent = parent_tgid;
	record.candidates = candidates;
	send_lifecycle(&counters->fork, &record, sizeof(record), false);
}

/* raw tracepoint arguments: parent, child */
ALWAYS_INLINE void handle_fork(struct bpf_raw_tracepoint_args *ctx, u32 slot)
{
	struct task_struct *child = (void *)ctx->args[1];

	/* A thread is no child. */
	if (!settings.lifecycle || BPF_CORE_READ(child, tgid) != BPF_CORE_READ(child, pid) ||
	    is_handled(HANDLER_FORK, child))
		return;
	follow_fork(ctx, slot);
	note_handled(HANDLER_FORK, child);
}

#define SIGNAL_GROUP_EXIT 0x4

ALWAYS_INLINE void follow_exit(struct task_struct *task, struct signal_struct *signal)
{
	struct lifecycle record = {};
	struct counters *counters;
	struct proc last = {};
	struct proc *proc;
	struct mark *mark;
	u32 tgid;

	counters = this_cpu_counters();
	if (!counters)
		return;
	tgid = BPF_CORE_READ(task, tgid);
	proc = bpf_map_lookup_elem(&procs, &tgid);
	if (proc)
		last = *proc;
	/*
	 * Two last threads may both see that no thread is left; the one that removes the entry reports. The kernel does not
	 * reuse the PID before both are gone.
	 */
	if (!proc || bpf_map_delete_elem(&procs, &tgid) ||
	    last.start_boottime != BPF_CORE_READ(task, group_leader, start_boottime)) {
		counters->exit.seen++;
		counters->exit.filtered++;
		return;
	}
	counters->exit.seen++;
	fill_lifecycle(&record, EVENT_EXIT, task, &last);
	/* As wait(2) does it: the status that ended the group, or that of its leader. */
	if (BPF_CORE_READ(signal, flags) & SIGNAL_GROUP_EXIT)
		record.exit_code = BPF_CORE_READ(signal, group_exit_code);
	else
		record.exit_code = BPF_CORE_READ(task, group_leader, exit_code);
	send_lifecycle(&counters->exit, &record, sizeof(record), false);
	/* It still uses the CPU for a while: the sampler finds it there. */
	mark = known_mark(tgid, last.start_boottime);
	if (mark)
		add_want(&last.sticky, &mark->want, settings.live_rules);
	bpf_map_update_elem(&exiting, &tgid, &last, BPF_ANY);
}

/* raw tracepoint arguments: task; from 6.16 on also group_dead */
ALWAYS_INLINE void handle_exit(struct bpf_raw_tracepoint_args *ctx)
{
	struct task_struct *task = (void *)ctx->args[0];
	struct signal_struct *signal;

	if (!settings.lifecycle)
		return;
	signal = BPF_CORE_READ(task, signal);
	/* The exit of the leader is not that of the process: its other threads may go on for hours. */
	if (BPF_CORE_READ(signal, live.counter) || is_handled(HANDLER_EXIT, task))
		return;
	follow_exit(task, signal);
	note_handled(HANDLER_EXIT, task);
}

/*
 * Decides again for a process that runs. True: it needs no report. `next_comm` is the command name that it is about to get,
 * or null.
 */
ALWAYS_INLINE bool decide_again(struct counters *counters, struct task_struct *leader, const char *next_comm, u32 slot,
				struct lifecycle *record)
{
	struct proc fresh = {};
	struct proc *old;
	u32 tgid = BPF_CORE_READ(leader, tgid);
	bool must_report = false;
	u64 candidates;

	counters->running.seen++;
	/* A process whose last thread is gone only waits for its parent: its exit has been reported. */
	if (!BPF_CORE_READ(leader, signal, live.counter)) {
		counters->running.filtered++;
		return true;
	}
	identify(&fresh, leader);
	old = known_proc(tgid, fresh.start_boottime);
	if (old)
		fresh = *old;
	/*
	 * After a scan the agent forgets what no report confirms. A single change it must receive too if no rule matches any
	 * more, and a change of the name in any case, because the agent shows it.
	 */
	if (slot == SCRATCH_RENAME)
		must_report = old && !old->denied;
	if (slot != SCRATCH_SCAN)
		must_report |= (old && wanted_rules(old)) || known_mark(tgid, fresh.start_boottime);
	candidates = decide(counters, leader, next_comm, tgid, &fresh, old, slot);
	if (!must_report && (fresh.denied || !(fresh.want.rules | fresh.sticky.rules | candidates))) {
		counters->running.filtered++;
		return true;
	}
	if (!old && !fresh.want.rules && !fresh.sticky.rules)
		enter_proc(counters, tgid, &fresh);
	fill_lifecycle(record, EVENT_RUNNING, leader, &fresh);
	read_comm(record->event.comm, leader, next_comm);
	record->candidates = candidates;
	return false;
}

ALWAYS_INLINE void send_running(struct counters *counters, struct lifecycle *record, u32 kind)
{
	if (report_allowed(kind))
		send_lifecycle(&counters->running, record, sizeof(*record), record->candidates);
	else
		counters->running.lost_rate++;
}

/*
 * Decides again for a process that moves to another control group, because other rules may match it now.
 * raw tracepoint arguments: destination, its path, task, whether the whole process moves
 */
ALWAYS_INLINE void handle_attach(struct bpf_raw_tracepoint_args *ctx)
{
	struct task_struct *task = (void *)ctx->args[2];
	struct side *side = &settings.sides[settings.generation & 1];
	struct lifecycle record = {};
	struct counters *counters;

	if (!settings.lifecycle || !(side->rules & ~(side->any_cgroup & side->any_container)))
		return;
	counters = this_cpu_counters();
	if (!counters)
		return;
	if (!decide_again(counters, BPF_CORE_READ(task, group_leader), NULL, SCRATCH_ATTACH, &record))
		send_running(counters, &record, REPORT_LIFE);
}

/*
 * Decides again for a process that changes its command name (PR_SET_NAME, /proc/PID/comm): a rule holds for the name that a
 * process has now. The kernel writes the name behind this call. A scan that reads the old name and decides behind this
 * handler is repaired by the next scan.
 * raw tracepoint arguments: task, its next name
 */
ALWAYS_INLINE void handle_rename(struct bpf_raw_tracepoint_args *ctx)
{
	struct task_struct *task = (void *)ctx->args[0];
	struct side *side = &settings.sides[settings.generation & 1];
	struct lifecycle record = {};
	struct counters *counters;
	u32 tgid;

	/* The name of another thread is not that of its process. execve sets a name too, and on_exec decides behind it. */
	if (!settings.lifecycle || BPF_CORE_READ(task, tgid) != BPF_CORE_READ(task, pid) || in_execve(task))
		return;
	tgid = BPF_CORE_READ(task, tgid);
	/* A process in procs or marks may be sampled: the agent must know its name. */
	if (!(side->rules & ~side->any_comm) && !bpf_map_lookup_elem(&procs, &tgid) &&
	    !(settings.marks && bpf_map_lookup_elem(&marks, &tgid)))
		return;
	counters = this_cpu_counters();
	if (!counters)
		return;
	if (!decide_again(counters, task, (const char *)ctx->args[1], SCRATCH_RENAME, &record))
		send_running(counters, &record, REPORT_RENAME);
}

/* Decides again for one task of a scan that the agent asked for, also if the handlers are off. */
ALWAYS_INLINE void scan_task(struct task_struct *task)
{
	struct counters *counters = this_cpu_counters();
	struct lifecycle record = {};

	if (!task || !counters)
		return;
	if (task->tgid != task->pid)
		return;
	/* It is its own leader. This pointer is a number to the verifier, as match_process() takes it; `task` is not. */
	if (!decide_again(counters, BPF_CORE_READ(task, group_leader), NULL, SCRATCH_SCAN, &record))
		send_lifecycle(&counters->running, &record, sizeof(record), false);
}

#endif
