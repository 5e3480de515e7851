/* SPDX-License-Identifier: GPL-2.0 OR BSD-2-Clause */
/*
 * Walks a user stack without frame pointers, by tables that the agent made from .eh_frame. The layout of tables and
 * rules, the search and the step are described in gannet-unwind's module `format`; this is the same in C.
 */
#ifndef UNWIND_H
#define UNWIND_H

#include "kernel.h"
#include <bpf/bpf_helpers.h>
#include <bpf/bpf_core_read.h>
#include <bpf/bpf_endian.h>
#include "gannet.h"

/* One line of a table: directory words or rows. */
struct table_line {
	u32 words[16];
};

/* Where the tables' lines are. Written by the agent through mmap. */
struct {
	__uint(type, BPF_MAP_TYPE_ARRAY);
	__uint(map_flags, BPF_F_MMAPABLE);
	__uint(max_entries, 1);
	__type(key, u32);
	__type(value, struct table_line);
} table_lines SEC(".maps");

/* Rules of all tables, interned for the whole node. Written by the agent through mmap. */
struct {
	__uint(type, BPF_MAP_TYPE_ARRAY);
	__uint(map_flags, BPF_F_MMAPABLE);
	__uint(max_entries, 65536);
	__type(key, u32);
	__type(value, struct unwind_rule);
} unwind_rules SEC(".maps");

/* Tables by number. Written by the agent. */
struct {
	__uint(type, BPF_MAP_TYPE_ARRAY);
	__uint(max_entries, MAX_TABLES);
	__type(key, u32);
	__type(value, struct unwind_table);
} unwind_tables SEC(".maps");

/* Which mapping an address is in. Written by the agent: one key for each aligned block of each executable mapping. */
struct {
	__uint(type, BPF_MAP_TYPE_LPM_TRIE);
	__uint(map_flags, BPF_F_NO_PREALLOC);
	__uint(max_entries, 262144);
	__type(key, struct mapping_key);
	__type(value, struct mapping);
} exec_mappings SEC(".maps");

/* The images whose mappings are in exec_mappings, whole. Written by the agent. */
struct {
	__uint(type, BPF_MAP_TYPE_HASH);
	__uint(max_entries, 16384);
	__type(key, u32);
	__type(value, struct image);
} images SEC(".maps");

/* A walk that goes on: what the step needs and changes. */
struct walk {
	u64 pc, sp, fp;
	struct mapping mapping;
	struct unwind_table table;
	u32 tgid;
	u32 frames;
	u8 end;
	/* pc is where the thread is, not the place behind a call. */
	u8 exact;
	u8 first;
	u8 fp_lost;
	/* Some frame was found by frame pointer where no table said so. */
	u8 guessed;
	/* By DWARF number; good in the first frame only. */
	u64 registers[RAW_REGISTERS - 1];
	/* Where the thread is; pc moves on with the walk. */
	u64 start_pc;
	u64 start_sp;
};

#if defined(__TARGET_ARCH_x86)
#define USER_CS_64 0x33

ALWAYS_INLINE bool take_registers(struct walk *walk, struct pt_regs *from)
{
	struct pt_regs regs = {};

	if (bpf_probe_read_kernel(&regs, sizeof(regs), from))
		return false;
	if (regs.cs != USER_CS_64)
		return false;
	walk->start_pc = walk->pc = regs.ip;
	walk->start_sp = walk->sp = regs.sp;
	walk->fp = regs.bp;
	walk->registers[0] = regs.ax;
	walk->registers[1] = regs.dx;
	walk->registers[2] = regs.cx;
	walk->registers[3] = regs.bx;
	walk->registers[4] = regs.si;
	walk->registers[5] = regs.di;
	walk->registers[6] = regs.bp;
	walk->registers[7] = regs.sp;
	walk->registers[8] = regs.r8;
	walk->registers[9] = regs.r9;
	walk->registers[10] = regs.r10;
	walk->registers[11] = regs.r11;
	walk->registers[12] = regs.r12;
	walk->registers[13] = regs.r13;
	walk->registers[14] = regs.r14;
	walk->registers[15] = regs.r15;
	return true;
}
#else
ALWAYS_INLINE bool take_registers(struct walk *walk, struct pt_regs *from)
{
	struct user_pt_regs regs = {};

	if (bpf_probe_read_kernel(&regs, sizeof(regs), from))
		return false;
	/* The bit says: a 32-bit program. */
	if (regs.pstate & 0x10)
		return false;
	walk->start_pc = walk->pc = regs.pc;
	walk->start_sp = walk->sp = regs.sp;
	walk->fp = regs.regs[29];
	for (int i = 0; i < 31; i++)
		walk->registers[i] = regs.regs[i];
	walk->registers[31] = regs.sp;
	return true;
}
#endif

/* The place of a rule for `address`, as the file counts. 0 is the rule that says: no function here. */
ALWAYS_INLINE u32 find_rule(const struct unwind_table *table, u64 address)
{
	u64 offset = address - table->base;
	u32 granule = offset >> GRANULE_SHIFT, index, word, first, more, key, at = 0, row = 0;
	struct table_line *line;

	if (address < table->base || offset >> GRANULE_SHIFT >= table->granules)
		return 0;
	index = table->first_line + (granule >> 4);
	line = bpf_map_lookup_elem(&table_lines, &index);
	if (!line)
		return 0;
	word = line->words[granule & 15];
	first = table->first_line + (word & 0xffffff);
	more = word >> 24;
	key = (u32)address << 16 | 0xffff;
#pragma unroll
	for (u32 step = 128; step; step >>= 1) {
		if (at + step > more)
			continue;
		index = first + at + step;
		line = bpf_map_lookup_elem(&table_lines, &index);
		if (line && line->words[0] <= key)
			at += step;
	}
	index = first + at;
	line = bpf_map_lookup_elem(&table_lines, &index);
	if (!line)
		return 0;
#pragma unroll
	for (u32 step = 8; step; step >>= 1) {
		if (line->words[(row + step) & 15] <= key)
			row += step;
	}
	return line->words[row & 15] & 0xffff;
}

ALWAYS_INLINE bool read_user(u64 *value, u64 address)
{
	return bpf_probe_read_user(value, sizeof(*value), (void *)address) == 0;
}

/* By convention: the saved frame pointer at fp, the return address above it. Only upwards, only aligned. */
ALWAYS_INLINE bool step_by_frame_pointer(struct walk *walk)
{
	u64 pair[2];

	if (walk->fp_lost || walk->fp < walk->sp || walk->fp & 7)
		return false;
	if (bpf_probe_read_user(pair, sizeof(pair), (void *)walk->fp))
		return false;
	walk->sp = walk->fp + 16;
	walk->fp = pair[0];
	walk->pc = pair[1];
	walk->guessed = 1;
	return true;
}

/* Finds the mapping and the table of an address, unless the last one still holds. */
ALWAYS_INLINE u8 enter_mapping(struct walk *walk, u64 address)
{
	struct mapping_key key = {
		.prefixlen = MAPPING_KEY_BITS,
		.tgid = bpf_htonl(walk->tgid),
		.address = bpf_cpu_to_be64(address),
	};
	struct mapping *mapping;
	struct unwind_table *table;

	if (address - walk->mapping.begin < walk->mapping.end - walk->mapping.begin)
		return USER_STACK_NONE;
	walk->mapping.begin = 0;
	walk->mapping.end = 0;
	mapping = bpf_map_lookup_elem(&exec_mappings, &key);
	if (!mapping)
		return USER_STACK_NO_MAPPING;
	if (mapping->kind == MAPPING_TABLE) {
		table = bpf_map_lookup_elem(&unwind_tables, &mapping->table);
		if (!table || table->generation != mapping->table_generation)
			return USER_STACK_NO_TABLE;
		walk->table = *table;
	}
	walk->mapping = *mapping;
	return USER_STACK_NONE;
}

/* From a frame to its caller. False: the walk is over, and walk->end says how. */
ALWAYS_INLINE bool step(struct walk *walk)
{
	u64 address = walk->exact ? walk->pc : walk->pc - 1, cfa, ra = 0, fp, sp = walk->sp;
	struct unwind_rule *rule;
	u32 number;
	u8 end;

	end = enter_mapping(walk, address);
	if (end == USER_STACK_NO_MAPPING || end == USER_STACK_NO_TABLE) {
		walk->end = end;
		return false;
	}
	if (walk->mapping.kind != MAPPING_TABLE) {
		walk->end = USER_STACK_NO_RULE;
		if (!step_by_frame_pointer(walk))
			return false;
		goto next;
	}
	number = find_rule(&walk->table, address - walk->mapping.bias);
	rule = bpf_map_lookup_elem(&unwind_rules, &number);
	if (!rule)
		return false;
	fp = walk->fp;
	switch (rule->cfa_kind) {
	case CFA_SP:
		cfa = sp + rule->cfa_offset;
		break;
	case CFA_FP:
		if (walk->fp_lost)
			goto fault;
		cfa = fp + rule->cfa_offset;
		break;
	case CFA_SP_DEREF:
		if (!read_user(&cfa, sp + (rule->cfa_offset >> 8)))
			goto fault;
		cfa += rule->cfa_offset & 0xff;
		break;
	case CFA_FP_DEREF:
		if (walk->fp_lost || !read_user(&cfa, fp + (rule->cfa_offset >> 8)))
			goto fault;
		cfa += rule->cfa_offset & 0xff;
		break;
	case CFA_PLT:
		cfa = sp + 8 + ((walk->pc & 15) >= (u32)rule->cfa_offset ? 8 : 0);
		break;
	case CFA_NONE:
	case CFA_UNSUPPORTED:
		walk->end = rule->cfa_kind == CFA_NONE ? USER_STACK_NO_RULE : USER_STACK_UNSUPPORTED;
		if (!step_by_frame_pointer(walk))
			return false;
		goto next;
	default:
		if (!walk->first)
			goto fault;
		cfa = walk->registers[rule->cfa_kind & 31] + rule->cfa_offset;
	}
	switch (rule->ra_kind) {
	case LOC_UNDEFINED:
		walk->end = USER_STACK_COMPLETE;
		return false;
	case LOC_CFA:
		if (!read_user(&ra, cfa + rule->ra_offset))
			goto fault;
		break;
	case LOC_SP:
		if (!read_user(&ra, sp + rule->ra_offset))
			goto fault;
		break;
	case LOC_FP:
		if (walk->fp_lost || !read_user(&ra, fp + rule->ra_offset))
			goto fault;
		break;
	default:
		if (!walk->first)
			goto fault;
		ra = walk->registers[rule->ra_kind & 31];
	}
	switch (rule->fp_kind) {
	case LOC_SAME:
		break;
	case LOC_CFA:
		if (!read_user(&walk->fp, cfa + rule->fp_offset))
			goto fault;
		walk->fp_lost = 0;
		break;
	case LOC_SP:
		if (!read_user(&walk->fp, sp + rule->fp_offset))
			goto fault;
		walk->fp_lost = 0;
		break;
	case LOC_FP:
		if (!read_user(&walk->fp, fp + rule->fp_offset))
			goto fault;
		break;
	case LOC_UNDEFINED:
		walk->fp_lost = 1;
		break;
	default:
		if (!walk->first)
			goto fault;
		walk->fp = walk->registers[rule->fp_kind & 31];
	}
	/* Stacks grow downwards; only a signal handler's caller may be on another stack. */
	if (cfa <= sp && !(rule->flags & RULE_SIGNAL) && !(cfa == sp && walk->first)) {
		walk->end = USER_STACK_NO_PROGRESS;
		return false;
	}
#if !defined(__TARGET_ARCH_x86)
	if (rule->flags & RULE_RA_SIGNED)
		ra &= (1ULL << 48) - 1;
#endif
	walk->sp = cfa;
	walk->pc = ra;
	walk->exact = rule->flags & RULE_SIGNAL;
	walk->first = 0;
	if (!ra) {
		/* What starts a thread leaves no return address. */
		walk->end = USER_STACK_COMPLETE;
		return false;
	}
	return true;
next:
	walk->exact = 0;
	walk->first = 0;
	if (!walk->pc) {
		walk->end = USER_STACK_COMPLETE;
		return false;
	}
	return true;
fault:
	walk->end = USER_STACK_FAULT;
	return false;
}

#endif
