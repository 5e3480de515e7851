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
/* Levels of a control group's path, and bytes of it with the NUL, that can be matched: the longest key of a trie. */
#define CGROUP_DEPTH 16
#define CGROUP_PATH_LEN 252
/*
 * bpf_get_stack never says that a stack was cut, so one frame more is asked for than is kept; and it never gives more
 * than the sysctl kernel.perf_event_max_stack, 127 unless somebody raised it.
 */
#define MAX_KERNEL_FRAMES 126
/* Of a stack that is walked by tables, and of one that the kernel walks by frame pointers. */
#define MAX_USER_FRAMES 512
#define MAX_FP_FRAMES 126
/* Of both stacks of a thread that is off the CPU: they are kept until it comes back. */
#define OFF_CPU_FRAMES 320
_Static_assert(MAX_KERNEL_FRAMES + MAX_FP_FRAMES + 2 <= OFF_CPU_FRAMES, "what the kernel walks fits");
/* A raw sample: pc, the registers by DWARF number, then the stack from the stack pointer upwards. */
#define RAW_REGISTERS 33
#define RAW_STACK_PAGES 6
#define RAW_STACK_WORDS (RAW_STACK_PAGES * 4096 / 8)
#define RAW_WORDS (RAW_REGISTERS + RAW_STACK_WORDS)
#define FRAME_SLOTS (MAX_KERNEL_FRAMES + 1 + RAW_WORDS)
_Static_assert(MAX_USER_FRAMES < RAW_WORDS && MAX_FP_FRAMES < RAW_WORDS, "the larger one sizes the buffer");
/* Tail calls: 33 in a chain, one of them the last step that sends. */
#define CHAIN_CALLS 29
#define CHAIN_FRAMES 8
_Static_assert(CHAIN_CALLS *CHAIN_FRAMES >= 232, "depth without bpf_loop");

/*
 * What a process is sampled for: the rules, one bit each, and the shortest time between two ticks that they ask for; 0 if
 * none wants ticks.
 */
struct want {
	u64 rules;
	u64 period_ns;
};

/*
 * Keys of the tries: first the side, then the text. Exact names include the NUL behind them, so that a longer name is
 * another key.
 */
struct comm_key {
	u32 prefixlen;
	u32 side;
	char comm[COMM_LEN];
};
_Static_assert(sizeof(struct comm_key) == 24, "the agent writes these bytes");

struct cgroup_key {
	u32 prefixlen;
	u32 side;
	/* Below the hierarchy's root: `/a/b`; the root itself is `/`. */
	char path[CGROUP_PATH_LEN];
};
_Static_assert(sizeof(struct cgroup_key) == 4 + 256, "a trie's key has at most 256 bytes behind its length");

enum exact_kind {
	EXACT_CGROUP = 1,
	EXACT_PID = 2,
	EXACT_UID = 3,
};

/* Key of `exact_rules`: what is compared as a number. */
struct exact_key {
	u32 side;
	u32 kind;
	u64 number;
};
_Static_assert(sizeof(struct exact_key) == 16, "no padding");

/* Value of `procs`: the processes that the kernel side knows. Written by BPF programs only. */
struct proc {
	u64 start_boottime;
	/* Holds until the next exec: by what it is, and what a fork handed down. */
	struct want want;
	/* Holds over exec too, and goes on to children: by pid. */
	struct want sticky;
	u32 exec_id;
	/* This image has been sampled before. */
	u32 sampled;
	/* Whatever rules ask for: never. */
	u32 denied;
	/* The agent has been told of this image. */
	u32 reported;
};

/* Value of `arms`: what the agent decided for one process. Written by the agent only. */
struct arm {
	u64 start_boottime;
	struct want want;
	/* The image that the decision was made for. Ignored if sticky. */
	u32 exec_id;
	/* Holds over exec, and goes on to children. */
	u32 sticky;
	/* Rules that are over for this image, though the kernel side matched it; and the period of what is left. */
	u64 refused;
	u64 period_ns;
};

/*
 * How rules are matched, one bit for each. A rule holds if all that it asks for holds; each of the masks says which rules
 * do not ask for a property at all. Which side is in force is the lowest bit of settings.generation; the agent fills the
 * other one, then counts on, so that a rule set comes into force as a whole.
 */
struct side {
	/* All that can match. */
	u64 rules;
	u64 any_comm;
	u64 any_cgroup;
	u64 any_container;
	u64 any_uid;
	u64 any_pid;
	/* Of the rules: those that ask for more than the kernel side can see. Who else matches is reported, not armed. */
	u64 by_agent;
	/* Those that ask for a pid and nothing else: they hold over exec, and go on to children. */
	u64 sticky;
	/* Those that are for who matches at exec, not for who runs already. */
	u64 at_exec;
	/* Who matches one of these is never sampled. */
	u64 deny;
};

/* Settings, written by the agent at any time. */
struct settings {
	/* exec and exit handlers do nothing before this is set. */
	u32 lifecycle;
	/* The sampler does nothing before this is set. */
	u32 sampling;
	/* Counts the rule sets; the lowest bit is the side in force. */
	u32 generation;
	/* `arms` is not empty. */
	u32 arms;
	/* User stacks are walked by tables; else the kernel walks them by frame pointers. */
	u32 tables;
	/* Stacks to take. */
	u32 user_stacks;
	u32 kernel_stacks;
	/* What every process is sampled for. */
	struct want all;
	/* Of all, procs and arms: the bits that mean a rule today. */
	u64 live_rules;
	/* Of the rules: those that want ticks, and those that want blocked time. */
	u64 on_cpu_rules;
	u64 off_cpu_rules;
	/* Off-CPU intervals shorter than this are not reported. */
	u64 off_cpu_min_ns;
	/* Stacks of threads that block, a second and CPU; more are counted as lost. */
	u64 off_cpu_rate;
	/* The rates in use, fastest first, each with the rules that ask for it. */
	struct want rates[MAX_RULES];
	/* Samples fill the ring up to here; what is above is for lifecycle events, which must not be lost. */
	u64 ring_sample_limit;
	/* From this fill on the reader is woken, else it comes by itself. */
	u64 ring_wake;
	/* Exec and fork reports a second, for all CPUs together. */
	u64 report_rate;
	/* The agent hears of every executable mapping as it is made, and need not hurry to read /proc. */
	u32 mappings_heard;
	u32 reserved;
	struct side sides[2];
};

#define MAX_TABLES 4096
#define GRANULE_SHIFT 11

/* Key of `exec_mappings`: tgid and address in network order, so that the first bits are the highest. */
struct mapping_key {
	u32 prefixlen;
	__be32 tgid;
	__be64 address;
};
#define MAPPING_KEY_BITS (8 * (sizeof(struct mapping_key) - sizeof(u32)))
_Static_assert(sizeof(struct mapping_key) == 16, "no padding: the trie compares bytes");

enum mapping_kind {
	/* Unwound by table. */
	MAPPING_TABLE = 0,
	/* Code without a table, unwound by frame pointer: made at run time, or of a file that has none. */
	MAPPING_FRAME_POINTER = 1,
};

struct mapping {
	u64 begin;
	u64 end;
	/* Address at run time minus address as the file counts. */
	u64 bias;
	u32 table;
	u32 table_generation;
	u32 kind;
	u32 reserved;
};

struct unwind_table {
	u64 base;
	u32 first_line;
	u32 granules;
	/* Changes when the place is given to another table: who still knows the former one finds nothing. */
	u32 generation;
	u32 reserved;
};

/* As gannet-unwind's `format::Rule`. */
struct unwind_rule {
	u8 cfa_kind;
	u8 fp_kind;
	u8 ra_kind;
	u8 flags;
	s32 cfa_offset;
	s32 fp_offset;
	s32 ra_offset;
};
_Static_assert(sizeof(struct unwind_rule) == 16, "as in Rust");

enum cfa_kind {
	CFA_NONE = 0,
	CFA_SP = 1,
	CFA_FP = 2,
	CFA_SP_DEREF = 3,
	CFA_FP_DEREF = 4,
	CFA_PLT = 5,
	CFA_UNSUPPORTED = 6,
	/* Runs of pushes and pops: see gannet-unwind's `format`. */
	CFA_PUSHES = 7,
	CFA_POPS = 8,
	CFA_REGISTER = 0x40,
};

enum loc_kind {
	LOC_SAME = 0,
	LOC_CFA = 1,
	LOC_SP = 2,
	LOC_FP = 3,
	LOC_UNDEFINED = 4,
	LOC_REGISTER = 0x40,
};

enum rule_flags {
	RULE_SIGNAL = 1,
	RULE_GUESSED = 2,
	RULE_RA_SIGNED = 4,
	/* Three bits: where the caller's rbx is. 0: not known; RBX_SAME; k from 2 on: at the frame address - 8 * k. */
	RULE_RBX_SHIFT = 4,
	RBX_SAME = 1,
};

/* Value of `images`: this image of this process has its mappings in `exec_mappings`. */
struct image {
	u64 start_boottime;
	u32 exec_id;
	u32 reserved;
	/* Another one for each change of its mappings, and for each image: what was found out before holds no longer. */
	u64 epoch;
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
	/* Of a sample: the thread. Else 0. */
	u32 tid;
	/* Of a sample: the thread's name; else the thread group leader's. */
	char comm[COMM_LEN];
	u64 rules;
};

enum sample_kind {
	SAMPLE_ON_CPU = 0,
	SAMPLE_OFF_CPU = 1,
};

/* How the walk over a user stack ended; every sample says it. */
enum user_stack_end {
	USER_STACK_NONE = 0,
	USER_STACK_COMPLETE = 1,
	/* More frames than are kept. */
	USER_STACK_TRUNCATED = 2,
	/* An address that no known mapping holds. */
	USER_STACK_NO_MAPPING = 3,
	/* The mapping's table is not in the kernel. */
	USER_STACK_NO_TABLE = 4,
	/* No function at the address, and no frame pointer to go on by. */
	USER_STACK_NO_RULE = 5,
	/* A rule that the format cannot say, and no frame pointer to go on by. */
	USER_STACK_UNSUPPORTED = 6,
	/* Stack memory that cannot be read now: paged out, or not a stack. */
	USER_STACK_FAULT = 7,
	/* The caller would be below its callee. */
	USER_STACK_NO_PROGRESS = 8,
	/* A 32-bit program. */
	USER_STACK_NOT_64_BIT = 9,
	/* Not walked: registers and stack are in the record, for the agent to walk. */
	USER_STACK_RAW = 10,
};

struct sample {
	struct event event;
	/* On CPU: nanoseconds between two ticks. Off CPU: nanoseconds blocked; until then, what the thread has run in its life. */
	u64 value_ns;
	u16 kernel_frames;
	u16 user_frames;
	u8 kind;
	u8 user_end;
	u8 kernel_truncated;
	/* Of an off-CPU sample: the low bits of the state that it slept in. */
	u8 state;
	/* Some frames were found by frame pointer, though no table said so. */
	u8 guessed;
	u8 reserved[7];
	/* kernel_frames, then user_frames; leaf first. */
	u64 frames[];
};

struct lifecycle {
	struct event event;
	/* EXIT: as wait(2) gives it. */
	u32 exit_code;
	/* EXEC: 1 if another thread than the leader called it. */
	u32 by_thread;
	/* Thread group of the parent, and effective user. */
	u32 parent;
	u32 uid;
	/* EXEC: of the executable; the device as the kernel numbers it: major << 20 | minor. */
	u64 inode;
	u32 device;
	u32 reserved;
	/* Rules of which all holds that the kernel side can see: the agent decides. */
	u64 candidates;
};

struct exec_record {
	struct lifecycle lifecycle;
	/* As given to execve. */
	char path[PATH_LEN];
};

/* Of one kind of event: seen == filtered + sent + lost_rate + lost_ring_full. */
struct lifecycle_counts {
	u64 seen;
	/* No rule wants it. */
	u64 filtered;
	u64 sent;
	u64 lost_rate;
	u64 lost_ring_full;
	/* For which the kernel called no handler, at most; see `dealt_with`. The agent fills it in, from the kernel's count. */
	u64 refused;
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
	u64 lost_off_cpu_rate;
	u64 raw;
	u64 procs_full;
	/* Control groups that lie too deep for their path to be matched. */
	u64 cgroup_too_deep;
	struct lifecycle_counts exec;
	struct lifecycle_counts fork;
	struct lifecycle_counts exit;
	/* Found by the walk, or put into another control group. */
	struct lifecycle_counts found;
};

#endif
