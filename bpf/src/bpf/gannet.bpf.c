// SPDX-License-Identifier: GPL-2.0 OR BSD-2-Clause
/*
 * The programs, by the tracepoint or clock that calls them; the headers do their work. maps.h and task.h are the base;
 * clock.h, rate.h, match.h, symbols.h, unwind.h and labels.h stand on it; sampler.h, off_cpu.h and lifecycle.h on those.
 */
#include "lifecycle.h"
#include "off_cpu.h"
#include "sampler.h"
#include "symbols.h"

char LICENSE[] SEC("license") = "Dual BSD/GPL";

/* No program reads these: they bring the types to the agent. */
const volatile struct lifecycle type_of_lifecycle;
const volatile struct exec_record type_of_exec_record;
const volatile struct function_record type_of_function_record;
const volatile struct labels_record type_of_labels_record;

/* A tick of a CPU clock, on kernels with bpf_loop. */
SEC("perf_event")
int on_tick(struct bpf_perf_event_data *ctx)
{
	struct counters *counters = this_cpu_counters();
	struct sample_scratch *scratch = counters ? begin_tick(ctx, counters, true) : NULL;

	if (!scratch)
		return 0;
	unwind_by_loop(scratch, 2 * MAX_USER_FRAMES);
	if (goes_on_raw(counters, scratch))
		unwind_by_loop(scratch, RAW_LIST_WORDS);
	finish_tick(counters, scratch, true);
	return 0;
}

/* The links of a chain of ticks. Written by the agent: the only entry is unwind_tick_chain. */
struct {
	__uint(type, BPF_MAP_TYPE_PROG_ARRAY);
	__uint(max_entries, 1);
	__type(key, u32);
	__type(value, u32);
} tick_chain SEC(".maps");

/* A tick on kernels without bpf_loop. */
SEC("perf_event")
int on_tick_chain(struct bpf_perf_event_data *ctx)
{
	struct counters *counters = this_cpu_counters();

	struct sample_scratch *scratch = counters ? begin_tick(ctx, counters, false) : NULL;

	if (!scratch)
		return 0;
	bpf_tail_call(ctx, &tick_chain, 0);
	/* It returns only if the kernel refused the call. */
	end_sample(counters, &counters->lost_chain, scratch->sample.event.rules);
	return 0;
}

SEC("perf_event")
int unwind_tick_chain(struct bpf_perf_event_data *ctx)
{
	struct counters *counters = this_cpu_counters();
	struct sample_scratch *scratch = this_cpu_scratch();

	if (!counters || !scratch)
		return 0;
	/* If the kernel refuses the call, the sample has the frames so far. */
	if (unwind_link(scratch) || goes_on_raw(counters, scratch))
		bpf_tail_call(ctx, &tick_chain, 0);
	finish_tick(counters, scratch, false);
	return 0;
}

/* A switch of threads, on kernels with bpf_loop. Arguments: preempt, prev, next; from 5.18 on also prev_state. */
SEC("raw_tp/sched_switch")
int on_switch(struct bpf_raw_tracepoint_args *ctx)
{
	struct counters *counters = this_cpu_counters();
	struct sample_scratch *scratch = counters ? begin_switch(ctx, counters) : NULL;

	if (!scratch)
		return 0;
	unwind_by_loop(scratch, OFF_CPU_FRAMES + 1);
	finish_switch(counters, scratch);
	return 0;
}

/* The links of a chain of switches. Written by the agent: the only entry is unwind_switch_chain. */
struct {
	__uint(type, BPF_MAP_TYPE_PROG_ARRAY);
	__uint(max_entries, 1);
	__type(key, u32);
	__type(value, u32);
} switch_chain SEC(".maps");

/* A switch on kernels without bpf_loop. */
SEC("raw_tp/sched_switch")
int on_switch_chain(struct bpf_raw_tracepoint_args *ctx)
{
	struct counters *counters = this_cpu_counters();

	struct sample_scratch *scratch = counters ? begin_switch(ctx, counters) : NULL;

	if (!scratch)
		return 0;
	bpf_tail_call(ctx, &switch_chain, 0);
	/* It returns only if the kernel refused the call. */
	take_sample(counters, scratch->sample.event.rules);
	end_sample(counters, &counters->lost_chain, scratch->sample.event.rules);
	return 0;
}

SEC("raw_tp/sched_switch")
int unwind_switch_chain(struct bpf_raw_tracepoint_args *ctx)
{
	struct counters *counters = this_cpu_counters();
	struct sample_scratch *scratch = this_cpu_scratch();

	if (!counters || !scratch)
		return 0;
	if (unwind_link(scratch))
		bpf_tail_call(ctx, &switch_chain, 0);
	finish_switch(counters, scratch);
	return 0;
}

SEC("raw_tp/sched_process_exec")
int on_exec(struct bpf_raw_tracepoint_args *ctx)
{
	handle_exec(ctx, SCRATCH_EXEC);
	return 0;
}

SEC("raw_tp/sched_process_exec")
int on_exec_again(struct bpf_raw_tracepoint_args *ctx)
{
	handle_exec(ctx, SCRATCH_EXEC_AGAIN);
	return 0;
}

SEC("raw_tp/sched_process_fork")
int on_fork(struct bpf_raw_tracepoint_args *ctx)
{
	handle_fork(ctx, SCRATCH_FORK);
	return 0;
}

SEC("raw_tp/sched_process_fork")
int on_fork_again(struct bpf_raw_tracepoint_args *ctx)
{
	handle_fork(ctx, SCRATCH_FORK_AGAIN);
	return 0;
}

SEC("raw_tp/sched_process_exit")
int on_exit(struct bpf_raw_tracepoint_args *ctx)
{
	handle_exit(ctx);
	return 0;
}

SEC("raw_tp/sched_process_exit")
int on_exit_again(struct bpf_raw_tracepoint_args *ctx)
{
	handle_exit(ctx);
	return 0;
}

SEC("raw_tp/cgroup_attach_task")
int on_attach(struct bpf_raw_tracepoint_args *ctx)
{
	handle_attach(ctx);
	return 0;
}

SEC("raw_tp/task_rename")
int on_rename(struct bpf_raw_tracepoint_args *ctx)
{
	handle_rename(ctx);
	return 0;
}

/*
 * Scans the running processes, because the rules have changed. The handlers already decide by the new rules then, so that
 * no process falls between old and new rules.
 */
SEC("iter/task")
int each_task(struct bpf_iter__task *ctx)
{
	scan_task(ctx->task);
	return 0;
}

/* Names kernel functions. The agent runs it itself; it is attached to nothing. */
SEC("raw_tp")
int name_symbols(void *ctx)
{
	return name_all_symbols();
}
