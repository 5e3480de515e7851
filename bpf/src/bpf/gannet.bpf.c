// SPDX-License-Identifier: GPL-2.0 OR BSD-2-Clause
/* The sampler, and the handlers that follow processes through fork, exec and exit. */
#include "common.h"

char LICENSE[] SEC("license") = "Dual BSD/GPL";

/* Never read: it brings the type to the agent. */
const volatile struct lifecycle type_of_lifecycle;

struct sample_scratch {
	struct sample sample;
	u64 frames[FRAME_SLOTS];
};

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
	__type(value, struct {
		u64 tokens;
		u64 refilled;
	});
} report_bucket SEC(".maps");

SEC("perf_event")
int on_tick(struct bpf_perf_event_data *ctx)
{
	struct counters *counters = count();
	struct sample_scratch *scratch;
	struct want want = {};
	struct task_struct *task;
	struct proc *proc;
	u64 id = bpf_get_current_pid_tgid();
	u64 start_boottime, size;
	u32 tgid = id >> 32, zero = 0, exec_id;
	bool first;

	if (!counters || !settings.sampling)
		return 0;
	counters->ticks++;
	if (!tgid) {
		counters->idle_ticks++;
		return 0;
	}
	proc = bpf_map_lookup_elem(&procs, &tgid);
	if (!may_be_wanted(proc, tgid))
		return 0;

	task = (void *)bpf_get_current_task();
	start_boottime = BPF_CORE_READ(task, group_leader, start_boottime);
	exec_id = BPF_CORE_READ(task, self_exec_id);
	want_of_process(&want, proc, tgid, start_boottime, exec_id);
	/* There is one clock for each rate in use; a process follows the fastest that was asked for. */
	if (!want.rules || want.period_ns != ctx->sample_period)
		return 0;
	counters->taken += __builtin_popcountll(want.rules);

	first = true;
	if (proc && proc->start_boottime == start_boottime) {
		first = !proc->sampled;
		proc->sampled = 1;
	} else {
		struct proc fresh = { .start_boottime = start_boottime, .exec_id = exec_id, .sampled = 1 };

		if (bpf_map_update_elem(&procs, &tgid, &fresh, BPF_ANY))
			counters->procs_full++;
	}

	scratch = bpf_map_lookup_elem(&sample_scratch, &zero);
	if (!scratch)
		return 0;
	fill_event(&scratch->sample.event, EVENT_SAMPLE, task, start_boottime);
	scratch->sample.event.tid = id;
	scratch->sample.event.rules = want.rules;
	scratch->sample.kind = SAMPLE_ON_CPU;
	scratch->sample.state = 0;
	scratch->sample.value_ns = want.period_ns;
	size = take_stacks(ctx, &scratch->sample, scratch->frames);
	/* A process that was not sampled before may be gone in a moment: the agent must look at it now. */
	send_sample(counters, &scratch->sample, size, first);
	return 0;
}

/* What the command name of a task asks for. */
ALWAYS_INLINE void want_by_comm(struct want *want, struct task_struct *task)
{
	struct comm_key key = { .prefixlen = 8 * COMM_LEN };
	struct want *found;

	bpf_core_read_str(key.comm, sizeof(key.comm), &task->comm);
	if (settings.active)
		found = bpf_map_lookup_elem(&comm_rules_1, &key);
	else
		found = bpf_map_lookup_elem(&comm_rules_0, &key);
	if (found)
		*want = *found;
}

/* The period of a set of rules: the shortest that one of them asks for. */
ALWAYS_INLINE u64 period_of(u64 rules)
{
	u64 period = 0;

	for (u32 i = 0; i < MAX_RULES; i++) {
		u64 candidate = settings.rule_period_ns[i];

		if ((rules >> i & 1) && candidate && (!period || candidate < period))
			period = candidate;
	}
	return period;
}

ALWAYS_INLINE bool report_allowed(struct counters *counters)
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
	if ((s64)__sync_fetch_and_add(&bucket->tokens, -1) > 0)
		return true;
	counters->lifecycle_lost_rate++;
	return false;
}

ALWAYS_INLINE void send_lifecycle(struct counters *counters, struct lifecycle *record, bool wake)
{
	if (bpf_ringbuf_output(&events, record, sizeof(*record), wake ? BPF_RB_FORCE_WAKEUP : BPF_RB_NO_WAKEUP))
		counters->lifecycle_lost_ring_full++;
	else
		counters->lifecycle_sent++;
}

/* raw tracepoint arguments: task, old_pid, bprm */
SEC("raw_tp/sched_process_exec")
int on_exec(struct bpf_raw_tracepoint_args *ctx)
{
	struct task_struct *task = (void *)ctx->args[0];
	struct linux_binprm *bprm = (void *)ctx->args[2];
	struct counters *counters;
	struct lifecycle record = {};
	struct proc fresh = {};
	struct proc *old;
	u32 tgid, pid;
	bool tracked, wanted;

	if (!settings.lifecycle)
		return 0;
	counters = count();
	if (!counters)
		return 0;
	counters->execs++;
	tgid = BPF_CORE_READ(task, tgid);
	pid = ctx->args[1];
	fresh.start_boottime = BPF_CORE_READ(task, group_leader, start_boottime);
	fresh.exec_id = BPF_CORE_READ(task, self_exec_id);
	old = bpf_map_lookup_elem(&procs, &tgid);
	tracked = old && old->start_boottime == fresh.start_boottime;
	if (tracked)
		fresh.sticky = old->sticky;
	if (settings.arms) {
		struct arm *arm = bpf_map_lookup_elem(&arms, &tgid);

		tracked |= arm && arm->start_boottime == fresh.start_boottime;
	}
	want_by_comm(&fresh.want, task);
	wanted = (fresh.want.rules | fresh.sticky.rules) & settings.live_rules;
	if (!tracked && !wanted && !settings.report_all)
		return 0;
	/*
	 * A process that no rule wants any more stays in the table: it is known, and its exit will be reported. One that
	 * is only reported so that the agent may decide is not entered: its samples or the agent's decision do that.
	 */
	if ((tracked || wanted) && bpf_map_update_elem(&procs, &tgid, &fresh, BPF_ANY))
		counters->procs_full++;
	/* What is tracked must be told, or its samples would be named after the old image. */
	if (!tracked && !report_allowed(counters))
		return 0;
	fill_event(&record.event, EVENT_EXEC, task, fresh.start_boottime);
	record.event.rules = (fresh.want.rules | fresh.sticky.rules) & settings.live_rules;
	record.by_thread = pid != tgid;
	bpf_probe_read_kernel_str(record.path, sizeof(record.path), BPF_CORE_READ(bprm, filename));
	/* It may live for milliseconds only: its files must be opened now. */
	send_lifecycle(counters, &record, wanted || settings.report_all);
	return 0;
}

/* raw tracepoint arguments: parent, child */
SEC("raw_tp/sched_process_fork")
int on_fork(struct bpf_raw_tracepoint_args *ctx)
{
	struct task_struct *parent = (void *)ctx->args[0];
	struct task_struct *child = (void *)ctx->args[1];
	u32 child_tgid = BPF_CORE_READ(child, tgid), parent_tgid;
	u64 live = settings.live_rules;
	struct lifecycle record = {};
	struct counters *counters;
	struct proc fresh = {};
	struct proc *proc;
	struct arm *arm;

	if (!settings.lifecycle || child_tgid != (u32)BPF_CORE_READ(child, pid))
		return 0;
	counters = count();
	if (!counters)
		return 0;
	counters->forks++;
	parent_tgid = BPF_CORE_READ(parent, tgid);
	fresh.start_boottime = BPF_CORE_READ(child, start_boottime);
	fresh.exec_id = BPF_CORE_READ(child, self_exec_id);
	proc = bpf_map_lookup_elem(&procs, &parent_tgid);
	if (proc) {
		want_also(&fresh.want, &proc->want, live);
		want_also(&fresh.sticky, &proc->sticky, live);
	}
	if (settings.arms) {
		arm = bpf_map_lookup_elem(&arms, &parent_tgid);
		if (arm && arm->sticky)
			want_also(&fresh.sticky, &arm->want, live);
		else if (arm)
			want_also(&fresh.want, &arm->want, live);
	}
	/* A stale entry of an earlier process with this number must not survive. */
	if (!fresh.want.rules && !fresh.sticky.rules) {
		bpf_map_delete_elem(&procs, &child_tgid);
		if (!settings.report_all || !report_allowed(counters))
			return 0;
	} else if (bpf_map_update_elem(&procs, &child_tgid, &fresh, BPF_ANY)) {
		counters->procs_full++;
	}
	fill_event(&record.event, EVENT_FORK, child, fresh.start_boottime);
	record.event.tid = parent_tgid;
	record.event.rules = fresh.want.rules | fresh.sticky.rules;
	send_lifecycle(counters, &record, false);
	return 0;
}

/* raw tracepoint arguments: task; from 6.16 on also group_dead */
SEC("raw_tp/sched_process_exit")
int on_exit(struct bpf_raw_tracepoint_args *ctx)
{
	struct task_struct *task = (void *)ctx->args[0];
	struct counters *counters;
	struct lifecycle record = {};
	struct signal_struct *signal;
	u32 tgid;

	if (!settings.lifecycle)
		return 0;
	signal = BPF_CORE_READ(task, signal);
	/* The leader's own end is not the process's: others of its threads may go on for hours. */
	if (BPF_CORE_READ(signal, live.counter))
		return 0;
	counters = count();
	if (!counters)
		return 0;
	counters->exits++;
	tgid = BPF_CORE_READ(task, tgid);
	/* Two last threads may both find nobody alive; the one that removes the entry reports. */
	if (bpf_map_delete_elem(&procs, &tgid))
		return 0;
	fill_event(&record.event, EVENT_EXIT, task, BPF_CORE_READ(task, group_leader, start_boottime));
	record.exit_code = BPF_CORE_READ(signal, group_exit_code);
	if (!record.exit_code)
		record.exit_code = BPF_CORE_READ(task, exit_code);
	send_lifecycle(counters, &record, false);
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
	u64 live = settings.live_rules;
	struct lifecycle record = {};
	struct proc fresh = {};
	struct proc *old;
	bool armed;
	u32 tgid;

	if (!task || !counters || !settings.lifecycle)
		return 0;
	tgid = task->tgid;
	if (tgid != (u32)task->pid)
		return 0;
	fresh.start_boottime = task->start_boottime;
	old = bpf_map_lookup_elem(&procs, &tgid);
	if (old && old->start_boottime != fresh.start_boottime)
		old = NULL;
	/* An exec on another CPU between reading the name and writing the decision: decide again, from the new name. */
	for (u32 attempt = 0; attempt < 3; attempt++) {
		fresh.exec_id = BPF_CORE_READ(task, self_exec_id);
		fresh.want.rules = 0;
		fresh.want.period_ns = 0;
		want_by_comm(&fresh.want, task);
		fresh.want.rules &= live;
		if (old) {
			fresh.sampled = old->sampled;
			fresh.sticky.rules = old->sticky.rules & live;
			fresh.sticky.period_ns = period_of(fresh.sticky.rules);
		}
		if (old || fresh.want.rules) {
			if (bpf_map_update_elem(&procs, &tgid, &fresh, BPF_ANY))
				counters->procs_full++;
		}
		if (fresh.exec_id == (u32)BPF_CORE_READ(task, self_exec_id))
			break;
	}
	armed = fresh.want.rules || fresh.sticky.rules;
	if (!armed && !settings.report_all)
		return 0;
	fill_event(&record.event, EVENT_FOUND, task, fresh.start_boottime);
	record.event.rules = fresh.want.rules | fresh.sticky.rules;
	send_lifecycle(counters, &record, false);
	return 0;
}
