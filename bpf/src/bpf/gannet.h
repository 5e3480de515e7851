/* SPDX-License-Identifier: GPL-2.0 OR BSD-2-Clause */
/*
 * What the BPF programs and the agent share: events, map keys and values, settings. The agent's Rust types are
 * generated from these.
 */
#ifndef GANNET_H
#define GANNET_H

#define COMM_LEN 16
#define PATH_LEN 128
#define MAX_RULES 64
/*
 * bpf_get_stack never says that a stack was cut, so one frame more is asked for than is kept; and it never gives more
 * than the sysctl kernel.perf_event_max_stack, 127 unless somebody raised it.
 */
#define MAX_KERNEL_FRAMES 126
#define MAX_USER_FRAMES 126
#define FRAME_MASK 127
#define FRAME_SLOTS (2 * (FRAME_MASK + 1))
_Static_assert(MAX_KERNEL_FRAMES < FRAME_MASK && MAX_USER_FRAMES < FRAME_MASK, "the mask keeps every count");

/* What a process is sampled for: the rules, one bit each, and the shortest time between two ticks that they ask for. */
struct want {
	u64 rules;
	u64 period_ns;
};

/* A command name in the trie: the exact names include the NUL behind them, so that a longer name is another key. */
struct comm_key {
	u32 prefixlen;
	char comm[COMM_LEN];
};
_Static_assert(sizeof(struct comm_key) == 20, "the agent writes these bytes");

/* Value of `procs`: the processes that the kernel side knows. Written by BPF programs only. */
struct proc {
	u64 start_boottime;
	/* Holds until the next exec: by command name, and what a fork handed down. */
	struct want want;
	/* Holds over exec too, and goes on to children: by pid. */
	struct want sticky;
	u32 exec_id;
	/* This image has been sampled before. */
	u32 sampled;
};

/* Value of `arms`: what the agent decided for one process. Written by the agent only. */
struct arm {
	u64 start_boottime;
	struct want want;
	/* The image that the decision was made for. Ignored if sticky. */
	u32 exec_id;
	/* Holds over exec, and goes on to children. */
	u32 sticky;
};

/* Settings, written by the agent at any time. */
struct settings {
	/* exec and exit handlers do nothing before this is set. */
	u32 lifecycle;
	/* The sampler does nothing before this is set. */
	u32 sampling;
	/* Report every exec and every new process, because a rule needs more than the command name. */
	u32 report_all;
	/* Which of the two inner maps of `comm_rules` is in force. */
	u32 active;
	/* `arms` is not empty. */
	u32 arms;
	/* Stacks to take. */
	u32 user_stacks;
	u32 kernel_stacks;
	/* What every process is sampled for. */
	struct want all;
	/* Of all, comm_rules and arms: the bits that mean a rule today. */
	u64 live_rules;
	/* Of the rules: those that want blocked time. */
	u64 off_cpu_rules;
	/* Off-CPU intervals shorter than this are not reported. */
	u64 off_cpu_min_ns;
	/* By bit: nanoseconds between two ticks. */
	u64 rule_period_ns[MAX_RULES];
	/* Samples fill the ring up to here; what is above is for lifecycle events, which must not be lost. */
	u64 ring_sample_limit;
	/* From this fill on the reader is woken, else it comes by itself. */
	u64 ring_wake;
	/* Exec and fork reports a second, for all CPUs together. */
	u64 report_rate;
};

enum cgroup_hierarchy {
	CGROUP_V2 = 0,
	CGROUP_V1_CPU = 1,
	CGROUP_V1_MEMORY = 2,
};

enum event_kind {
	EVENT_SAMPLE = 1,
	EVENT_EXEC = 2,
	EVENT_FORK = 3,
	EVENT_EXIT = 4,
	/* A process that already ran when the rules came. */
	EVENT_FOUND = 5,
};

struct event {
	u32 kind;
	u32 tgid;
	u64 ktime;
	u64 start_boottime;
	u64 cgroup_id;
	u32 exec_id;
	/* Of a sample: the thread. Of a fork: the parent. Else 0. */
	u32 tid;
	/* Of a sample: the thread's name; else the thread group leader's. */
	char comm[COMM_LEN];
	u64 rules;
};

enum sample_kind {
	SAMPLE_ON_CPU = 0,
	SAMPLE_OFF_CPU = 1,
};

enum user_stack_end {
	USER_STACK_NONE = 0,
	USER_STACK_COMPLETE = 1,
	USER_STACK_TRUNCATED = 2,
	USER_STACK_BROKEN = 3,
};

struct sample {
	struct event event;
	/* On CPU: nanoseconds between two ticks. Off CPU: nanoseconds blocked. */
	u64 value_ns;
	u16 kernel_frames;
	u16 user_frames;
	u8 kind;
	u8 user_end;
	u8 kernel_truncated;
	/* Of an off-CPU sample: the low bits of the state that it slept in. */
	u8 state;
	/* kernel_frames, then user_frames; leaf first. */
	u64 frames[];
};

struct lifecycle {
	struct event event;
	/* EXIT: as wait(2) gives it. */
	u32 exit_code;
	/* EXEC: 1 if another thread than the leader called it. */
	u32 by_thread;
	/* EXEC: the path as given to execve. */
	char path[PATH_LEN];
};

/*
 * One for every CPU; the agent adds them up. A sample that two rules asked for counts twice: taken == sent + all that is
 * lost.
 */
struct counters {
	u64 ticks;
	u64 idle_ticks;
	u64 taken;
	u64 sent;
	u64 lost_ring_full;
	u64 lost_off_cpu_full;
	u64 lifecycle_sent;
	u64 lifecycle_lost_ring_full;
	u64 lifecycle_lost_rate;
	u64 procs_full;
	u64 execs;
	u64 forks;
	u64 exits;
};

#endif
