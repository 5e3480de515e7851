/* SPDX-License-Identifier: GPL-2.0 OR BSD-2-Clause */
/*
 * Finds the rules that match a process. Each property (command name, control group, user, PID) gives a set of rules, one bit
 * each: those for which this value is right. A rule matches if it is in all sets. A property that none of the remaining
 * rules asks for is not read, so that a process that no rule can match costs one lookup.
 *
 * The agent's module `rules::compile` has the same semantics in Rust.
 */
#ifndef MATCH_H
#define MATCH_H

#include "task.h"

/*
 * Command names of the rules. A lookup finds only the longest key, so the value of a key holds the rules of all shorter
 * keys that match it too. Writer: the agent. Reader: the matcher. Size: far above the names that 64 rules have.
 */
struct {
	__uint(type, BPF_MAP_TYPE_LPM_TRIE);
	__uint(map_flags, BPF_F_NO_PREALLOC);
	__uint(max_entries, 8192);
	__type(key, struct comm_key);
	__type(value, u64);
} comm_rules SEC(".maps");

/* Paths of control groups, in the same form. Writer: the agent. Reader: the matcher. */
struct {
	__uint(type, BPF_MAP_TYPE_LPM_TRIE);
	__uint(map_flags, BPF_F_NO_PREALLOC);
	__uint(max_entries, 8192);
	__type(key, struct cgroup_key);
	__type(value, u64);
} cgroup_rules SEC(".maps");

/*
 * Containers (by the id of their control group), PIDs and users of the rules, for both sides. Writer: the agent. Reader: the
 * matcher. Size: the containers of a crowded node, twice.
 */
struct {
	__uint(type, BPF_MAP_TYPE_HASH);
	__uint(map_flags, BPF_F_NO_PREALLOC);
	__uint(max_entries, 16384);
	__type(key, struct exact_key);
	__type(value, u64);
} exact_rules SEC(".maps");

struct cgroup_match {
	u64 paths;
	u64 containers;
	u32 generation;
	u32 reserved;
};

/* The rules that match a control group, by its id: its path is built once for each rule set. Writers: BPF programs. */
struct {
	__uint(type, BPF_MAP_TYPE_LRU_HASH);
	__uint(max_entries, 4096);
	__type(key, u64);
	__type(value, struct cgroup_match);
} cgroup_matches SEC(".maps");

struct cgroup_scratch {
	struct cgroup_key key;
	/* A name may begin at the last byte of the path. */
	char overflow[256];
	struct kernfs_node *levels[CGROUP_DEPTH];
	/* Used levels. Read from here it has no known value, so that the verifier follows one path and not one for each depth. */
	u32 depth;
	/* The result. Not on the stack: 5.10 counts that of all callers, and allows 512 bytes. */
	struct cgroup_match match;
};

/* A slot of cgroup_scratch for each program. */
enum scratch_slot {
	SCRATCH_EXEC = 0,
	SCRATCH_FORK = 1,
	SCRATCH_ATTACH = 2,
	SCRATCH_SCAN = 3,
	/* Of the redundant handlers, see `handled`. */
	SCRATCH_EXEC_AGAIN = 4,
	SCRATCH_FORK_AGAIN = 5,
	SCRATCH_RENAME = 6,
	SCRATCH_SLOTS = 7,
};

/*
 * Where the programs build a path. Each program has a slot of its own, since one may interrupt another on the same CPU; no
 * program interrupts itself. Writers and readers: the matching programs.
 */
struct {
	__uint(type, BPF_MAP_TYPE_PERCPU_ARRAY);
	__uint(max_entries, SCRATCH_SLOTS);
	__type(key, u32);
	__type(value, struct cgroup_scratch);
} cgroup_scratch SEC(".maps");

/* Adds what `more` is sampled for. A want without rules asks for nothing. */
ALWAYS_INLINE void add_want(struct want *want, const struct want *more, u64 live)
{
	u64 rules = more->rules & live;

	if (!rules)
		return;
	if (more->period_ns && (!want->period_ns || more->period_ns < want->period_ns))
		want->period_ns = more->period_ns;
	want->rules |= rules;
}

ALWAYS_INLINE u64 exact_match(u32 generation, u32 kind, u64 number)
{
	struct exact_key key = { .side = generation & 1, .kind = kind, .number = number };
	u64 *rules = bpf_map_lookup_elem(&exact_rules, &key);

	return rules ? *rules : 0;
}

/* Reads the command name of a task, or the one that it is about to get, unless `next` is null. */
ALWAYS_INLINE void read_comm(char comm[COMM_LEN], struct task_struct *task, const char *next)
{
	if (next)
		bpf_probe_read_kernel_str(comm, COMM_LEN, next);
	else
		bpf_core_read_str(comm, COMM_LEN, &task->comm);
}

ALWAYS_INLINE u64 comm_match(struct task_struct *task, const char *next, u32 generation)
{
	struct comm_key key = { .prefixlen = 8 * (sizeof(u32) + COMM_LEN), .side = generation & 1 };
	u64 *rules;

	read_comm(key.comm, task, next);
	rules = bpf_map_lookup_elem(&comm_rules, &key);
	return rules ? *rules : 0;
}

ALWAYS_INLINE struct kernfs_node *parent_of(struct kernfs_node *node)
{
	struct kernfs_node___6_15 *newer = (void *)node;

	if (bpf_core_field_exists(newer->__parent))
		return BPF_CORE_READ(newer, __parent);
	return BPF_CORE_READ(node, parent);
}

/*
 * Matches a control group by its path, and it and its ancestors as containers, and stores the result in cgroup_matches.
 * Global, so that it is verified once and not with each of its calls, which would take most of the time of loading.
 */
__attribute__((noinline)) int match_cgroup(u64 address, u64 id, u32 generation, u32 slot)
{
	struct cgroup_scratch *scratch = bpf_map_lookup_elem(&cgroup_scratch, &slot);
	struct kernfs_node *node = (void *)address;
	struct counters *counters = this_cpu_counters();
	struct cgroup_match *match;
	u32 depth, at = 0;
	u64 *rules;

	if (!scratch || !counters)
		return 0;
	scratch->depth = 0;
	match = &scratch->match;
	match->paths = 0;
	match->containers = 0;
	match->generation = generation;
	for (u32 i = 0; i < CGROUP_DEPTH; i++) {
		struct kernfs_node *parent = parent_of(node);

		match->containers |= exact_match(generation, EXACT_CGROUP, BPF_CORE_READ(node, id));
		/* The root has no name. */
		if (!parent)
			break;
		scratch->levels[i] = node;
		scratch->depth = i + 1;
		node = parent;
	}
	depth = *(volatile u32 *)&scratch->depth;
	if (depth == CGROUP_DEPTH && parent_of(node)) {
		counters->cgroup_too_deep++;
		goto store;
	}
	for (u32 i = 0; i < CGROUP_DEPTH; i++) {
		u64 level = depth - 1 - i;
		struct kernfs_node *here;
		long got;

		/* The compiler would check a copy of it, from which the verifier learns nothing. */
		barrier_var(level);
		if (i >= depth || level >= CGROUP_DEPTH || at >= CGROUP_PATH_LEN - 1)
			break;
		scratch->key.path[at] = '/';
		at++;
		barrier_var(at);
		if (at >= CGROUP_PATH_LEN)
			break;
		here = scratch->levels[level];
		got = bpf_probe_read_kernel_str(&scratch->key.path[at], 256, BPF_CORE_READ(here, name));
		if (got < 1 || got > 256)
			break;
		at += got - 1;
		barrier_var(at);
	}
	if (!depth) {
		scratch->key.path[0] = '/';
		scratch->key.path[1] = 0;
	}
	scratch->key.path[CGROUP_PATH_LEN - 1] = 0;
	scratch->key.side = generation & 1;
	scratch->key.prefixlen = 8 * (sizeof(u32) + CGROUP_PATH_LEN);
	rules = bpf_map_lookup_elem(&cgroup_rules, &scratch->key);
	if (rules)
		match->paths = *rules;
store:
	bpf_map_update_elem(&cgroup_matches, &id, match, BPF_ANY);
	return 0;
}

/* Returns what matches the control group of a task. Null: the generation has changed meanwhile; decide() tries again. */
ALWAYS_INLINE struct cgroup_match *cgroup_match(struct task_struct *task, u32 generation, u32 slot)
{
	struct kernfs_node *node = cgroup_of(task);
	u64 id = BPF_CORE_READ(node, id);
	struct cgroup_match *known = bpf_map_lookup_elem(&cgroup_matches, &id);

	if (!known || known->generation != generation) {
		match_cgroup((u64)node, id, generation, slot);
		known = bpf_map_lookup_elem(&cgroup_matches, &id);
	}
	return known && known->generation == generation ? known : NULL;
}

/*
 * Returns the rules that match a process, with those that deny it and those that the agent must decide. Takes addresses of a
 * task and of its next command name (0: none). Global for the reason of match_cgroup().
 */
__attribute__((noinline)) u64 match_process(u64 task_address, u64 next_comm, u32 tgid, u32 generation, u32 slot)
{
	struct task_struct *task = (void *)task_address;
	struct side *side = &settings.sides[generation & 1];
	u64 rules = side->rules;

	if (rules & ~side->any_comm)
		rules &= side->any_comm | comm_match(task, (const char *)next_comm, generation);
	if (rules & ~side->any_pid)
		rules &= side->any_pid | exact_match(generation, EXACT_PID, tgid);
	if (rules & ~side->any_uid)
		rules &= side->any_uid | exact_match(generation, EXACT_UID, BPF_CORE_READ(task, cred, euid.val));
	if (rules & ~(side->any_cgroup & side->any_container)) {
		struct cgroup_match *match = cgroup_match(task, generation, slot);

		rules &= side->any_cgroup | (match ? match->paths : 0);
		rules &= side->any_container | (match ? match->containers : 0);
	}
	return rules;
}

/* Returns the shortest period that a rule of the set asks for. Global, so that it is verified once. */
__attribute__((noinline)) u64 period_of(u64 rules)
{
	for (u32 i = 0; i < MAX_RULES; i++) {
		struct want *rate = &settings.rates[i];

		if (!rate->rules)
			break;
		if (rate->rules & rules)
			return rate->period_ns;
	}
	return 0;
}

/* The input and result of one attempt at a decision. */
struct decision {
	/* Rules that were decided at exec hold for this image. */
	u64 kept;
	u32 kept_exec_id;
	u32 slot;
	/* The command name that the process is about to get; null: it keeps the one that it has. */
	const char *next_comm;
	u64 candidates;
	bool tracked;
};

/* Makes one attempt; false if the rules have changed or the process has called execve meanwhile. */
ALWAYS_INLINE bool decide_once(struct counters *counters, struct task_struct *task, u32 tgid, struct proc *fresh,
			       struct decision *decision)
{
	u32 generation = *(volatile u32 *)&settings.generation;
	struct side *side = &settings.sides[generation & 1];
	u64 matched;

	fresh->exec_id = BPF_CORE_READ(task, self_exec_id);
	matched = match_process((u64)task, (u64)decision->next_comm, tgid, generation, decision->slot);
	if (decision->slot != SCRATCH_EXEC && decision->slot != SCRATCH_EXEC_AGAIN)
		matched &= ~side->at_exec | (fresh->exec_id == decision->kept_exec_id ? decision->kept : 0);
	fresh->denied = !!(matched & side->deny);
	decision->candidates = matched & side->by_agent;
	matched &= ~(side->deny | side->by_agent);
	if (fresh->denied) {
		matched = 0;
		decision->candidates = 0;
	}
	fresh->sticky.rules = (fresh->sticky.rules & side->sticky) | (matched & side->sticky);
	fresh->want.rules = matched & ~side->sticky;
	fresh->sticky.period_ns = period_of(fresh->sticky.rules);
	fresh->want.period_ns = period_of(fresh->want.rules);
	/* A process that no rule wants any more stays in `procs`: the agent knows it, and needs its exit. */
	if (decision->tracked || fresh->want.rules || fresh->sticky.rules || fresh->denied) {
		if (bpf_map_update_elem(&procs, &tgid, fresh, BPF_ANY))
			counters->procs_full++;
	}
	return generation == *(volatile u32 *)&settings.generation &&
	       fresh->exec_id == (u32)BPF_CORE_READ(task, self_exec_id);
}

/*
 * Decides what a process is sampled for, from its properties now, and enters it if it is sampled for anything. Returns the
 * rules that the agent must decide. `fresh` holds its key, its sticky rules, and the decision for its last image.
 */
ALWAYS_INLINE u64 decide(struct counters *counters, struct task_struct *task, const char *next_comm, u32 tgid,
			 struct proc *fresh, bool tracked, u32 slot)
{
	struct decision decision = {
		.kept = fresh->want.rules,
		.kept_exec_id = fresh->exec_id,
		.slot = slot,
		.next_comm = next_comm,
		.tracked = tracked,
	};

	/* Three attempts, and no loop: 5.10 and 6.1 refuse a loop whose end the compiler puts before its head. */
	if (!decide_once(counters, task, tgid, fresh, &decision) &&
	    !decide_once(counters, task, tgid, fresh, &decision))
		decide_once(counters, task, tgid, fresh, &decision);
	return decision.candidates;
}

#endif
