/* SPDX-License-Identifier: GPL-2.0 OR BSD-2-Clause */
/*
 * The kernel's types, as far as the programs read them. Only names matter: CO-RE finds each field's offset in the running
 * kernel's own BTF. Constants are user-space ABI and never change. Written by hand, so that a build needs no kernel
 * headers; the guard's name tells libbpf's bpf_tracing.h which register names to use.
 */
#ifndef __VMLINUX_H__
#define __VMLINUX_H__

typedef unsigned char __u8;
typedef unsigned short __u16;
typedef unsigned int __u32;
typedef unsigned long long __u64;
typedef signed char __s8;
typedef short __s16;
typedef int __s32;
typedef long long __s64;
typedef __u16 __be16;
typedef __u32 __be32;
typedef __u64 __be64;
typedef __u32 __wsum;
typedef __u8 u8;
typedef __u16 u16;
typedef __u32 u32;
typedef __u64 u64;
typedef __s32 s32;
typedef __s64 s64;
typedef _Bool bool;
#define true 1
#define false 0
#define NULL ((void *)0)

enum {
	BPF_ANY = 0,
	BPF_NOEXIST = 1,
	BPF_EXIST = 2,
};

enum {
	BPF_F_NO_PREALLOC = 1U << 0,
	BPF_F_MMAPABLE = 1U << 10,
	BPF_F_INNER_MAP = 1U << 12,
};

enum {
	BPF_F_USER_STACK = 1ULL << 8,
};

enum {
	BPF_RB_NO_WAKEUP = 1ULL << 0,
	BPF_RB_FORCE_WAKEUP = 1ULL << 1,
	BPF_RB_AVAIL_DATA = 0,
};

enum bpf_map_type {
	BPF_MAP_TYPE_HASH = 1,
	BPF_MAP_TYPE_ARRAY = 2,
	BPF_MAP_TYPE_PROG_ARRAY = 3,
	BPF_MAP_TYPE_PERCPU_HASH = 5,
	BPF_MAP_TYPE_PERCPU_ARRAY = 6,
	BPF_MAP_TYPE_LRU_HASH = 9,
	BPF_MAP_TYPE_LPM_TRIE = 11,
	BPF_MAP_TYPE_ARRAY_OF_MAPS = 12,
	BPF_MAP_TYPE_RINGBUF = 27,
};

/* User-space ABI: the numbers of helpers that some kernels lack. */
enum bpf_func_id {
	BPF_FUNC_get_current_task_btf = 158,
	BPF_FUNC_snprintf = 165,
	BPF_FUNC_task_pt_regs = 175,
};

#if defined(__TARGET_ARCH_x86)
/* Without KASAN, on the kernels that need it: those before 5.15. */
#define KERNEL_STACK_BYTES (16 << 10)
#define PT_REGS_ROOM sizeof(struct pt_regs)
struct pt_regs {
	unsigned long r15, r14, r13, r12, bp, bx, r11, r10, r9, r8, ax, cx, dx, si, di, orig_ax, ip, cs, flags, sp, ss;
};
typedef struct pt_regs bpf_user_pt_regs_t;
/* Whether registers are those of user space, and not of the kernel. */
#define OF_USER_MODE(regs) ((regs)->cs & 3)
#elif defined(__TARGET_ARCH_arm64)
#define KERNEL_STACK_BYTES (16 << 10)
/* pt_regs has more than user_regs there: 336 bytes on 5.10 to 5.14. */
#define PT_REGS_ROOM 336
struct user_pt_regs {
	__u64 regs[31];
	__u64 sp;
	__u64 pc;
	__u64 pstate;
};
struct pt_regs {
	struct user_pt_regs user_regs;
};
typedef struct user_pt_regs bpf_user_pt_regs_t;
#define OF_USER_MODE(regs) (!((regs)->pstate & 15))
#else
#error "x86_64 and aarch64 only"
#endif

/* User-space ABI: the argument of a perf_event program. */
struct bpf_perf_event_data {
	bpf_user_pt_regs_t regs;
	__u64 sample_period;
	__u64 addr;
};

/* User-space ABI: the arguments of a raw tracepoint program. */
struct bpf_raw_tracepoint_args {
	__u64 args[0];
};

#pragma clang attribute push(__attribute__((preserve_access_index)), apply_to = record)

typedef struct {
	int counter;
} atomic_t;

struct signal_struct {
	atomic_t live;
	int group_exit_code;
	unsigned int flags;
};

struct kernfs_node {
	u64 id;
	const char *name;
	struct kernfs_node *parent;
};

/* From 6.15 on parent is called __parent. */
struct kernfs_node___6_15 {
	struct kernfs_node *__parent;
};

struct cgroup {
	struct kernfs_node *kn;
};

struct cgroup_subsys_state {
	struct cgroup *cgroup;
};

struct css_set {
	struct cgroup_subsys_state *subsys[16];
	struct cgroup *dfl_cgrp;
};

struct file;

struct mm_struct {
	unsigned long end_code, arg_start;
	struct file *exe_file;
};

struct super_block {
	u32 s_dev;
};

struct inode {
	u64 i_ino;
	s64 i_size;
	struct super_block *i_sb;
	u32 i_generation;
};

struct file {
	struct inode *f_inode;
};

typedef struct {
	unsigned int val;
} kuid_t;

struct cred {
	kuid_t euid;
};

struct sched_entity {
	u64 sum_exec_runtime;
};

/* The thread pointer of user space. */
#if defined(__TARGET_ARCH_x86)
#define THREAD_POINTER fsbase
#else
#define THREAD_POINTER uw.tp_value
#endif
struct thread_struct {
#if defined(__TARGET_ARCH_x86)
	unsigned long fsbase;
#else
	struct {
		unsigned long tp_value;
	} uw;
#endif
};

struct task_struct {
	void *stack;
	unsigned int flags;
	int pid;
	int tgid;
	int exit_code;
	u64 start_boottime;
	u64 self_exec_id;
	char comm[16];
	struct mm_struct *mm;
	struct task_struct *group_leader;
	struct task_struct *real_parent;
	struct signal_struct *signal;
	struct css_set *cgroups;
	const struct cred *cred;
	unsigned int __state;
	struct sched_entity se;
	struct thread_struct thread;
};

/* Before 5.14 __state was called state. */
struct task_struct___before_5_14 {
	long state;
};

struct linux_binprm {
	struct file *file;
	const char *filename;
};

struct timerqueue_node {
	s64 expires;
};

struct hrtimer {
	struct timerqueue_node node;
};

struct hw_perf_event {
	struct hrtimer hrtimer;
};

struct perf_event {
	struct hw_perf_event hw;
	u64 id;
};

struct bpf_perf_event_data_kern {
	struct perf_event *event;
};

struct seq_file;

struct bpf_iter_meta {
	struct seq_file *seq;
};

struct bpf_iter__task {
	struct bpf_iter_meta *meta;
	struct task_struct *task;
};

/* The kernel's configuration decides the numbers of the cgroup v1 controllers. */
enum cgroup_subsys_id {
	cpu_cgrp_id = 1,
	memory_cgrp_id = 4,
};

#pragma clang attribute pop

#endif
