/* SPDX-License-Identifier: GPL-2.0 OR BSD-2-Clause */
/* Facts that the programs read from a task, and the head that every event has of them. */
#ifndef TASK_H
#define TASK_H

#include "maps.h"

#define PF_EXITING 0x4

/* The control group of a task, in the hierarchy that separates containers. */
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

ALWAYS_INLINE bool is_exiting(struct task_struct *task)
{
	return BPF_CORE_READ(task, flags) & PF_EXITING;
}

/*
 * Whether a thread that has memory is in the middle of execve: it has its new memory, and the kernel has not set yet where
 * the code is in it, which is the last thing it does.
 */
ALWAYS_INLINE bool in_execve(struct task_struct *task)
{
	return !BPF_CORE_READ(task, mm, end_code);
}

/* The facts about the current thread that each sample needs. */
struct current {
	/* Of the process. */
	u64 start_boottime;
	u32 exec_id;
	/* It has no memory of its own. */
	bool kernel_thread;
};

ALWAYS_INLINE void read_current(struct current *now, struct task_struct *task)
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

#endif
