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

/* The stack is read in pieces, since each reading costs as much as the rest of a step. */
#define PIECE_BYTES 512
#define PIECE_WORDS (PIECE_BYTES / sizeof(u64))
/* Below the return address are the registers that the frame saved: as far down a piece begins, if the frame does. */
#define PIECE_BEFORE 56
/* Longest run of pushes or pops, in bytes. */
#define MAX_RUN_BYTES 15

/* A walk that goes on: what the step needs and changes. */
struct walk {
	u64 pc, sp, fp;
	struct mapping mapping;
	struct unwind_table table;
	/* See struct image. */
	u64 epoch;
	u32 tgid;
	u32 frames;
	u8 end;
	/* pc is where the thread is, not the place behind a call. */
	u8 exact;
	u8 first;
	u8 fp_lost;
	u8 rbx_lost;
	/* Some frame was found by frame pointer where no table said so. */
	u8 guessed;
	/* By DWARF number; good in the first frame only, but rbx until it is lost. */
	u64 registers[RAW_REGISTERS - 1];
	/* Where the thread is; pc moves on with the walk. */
	u64 start_pc;
	u64 start_sp;
	u64 piece_start;
	u64 piece_bytes;
	u64 piece[PIECE_WORDS];
};

/* The rule that holds at an address of a process, as it was found. */
struct found_rule {
	u64 address;
	u64 epoch;
	struct unwind_rule rule;
};

#define FOUND_BITS 9
struct found_rules {
	struct found_rule of[1 << FOUND_BITS];
};
_Static_assert(sizeof(struct found_rules) <= 32768, "the largest value of a per-CPU map");

/*
 * Rules that were found lately, by process and address: stacks of one program are alike, and a look here costs a tenth
 * of that into mapping, table and rules. What is there is overwritten by what comes to the same place. Writer and
 * reader: the walk.
 */
struct {
	__uint(type, BPF_MAP_TYPE_PERCPU_ARRAY);
	__uint(max_entries, 1);
	__type(key, u32);
	__type(value, struct found_rules);
} found_rules SEC(".maps");

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

/*
 * The row for `address`, as the file counts: where it begins (the low 16 bits of that), and its rule. Rule 0 says: no
 * function here.
 */
ALWAYS_INLINE u32 find_row(const struct unwind_table *table, u64 address)
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
	return line->words[row & 15];
}

ALWAYS_INLINE bool read_user(u64 *value, u64 address)
{
	return bpf_probe_read_user(value, sizeof(*value), (void *)address) == 0;
}

/* A word of the stack: out of the last piece, or else the next piece is read. */
ALWAYS_INLINE bool read_stack(struct walk *walk, u64 address, u64 *value)
{
	u64 offset = address - walk->piece_start;

	if (offset >= walk->piece_bytes) {
		u64 start = address - PIECE_BEFORE, bytes;

		if (start < walk->sp)
			start = walk->sp;
		/* A piece is within one page, so that all of it can be read, or nothing. */
		if (start > address || (start ^ address) & ~4095ULL)
			start = address & ~4095ULL;
		bytes = 4096 - (start & 4095);
		if (bytes > PIECE_BYTES)
			bytes = PIECE_BYTES;
		walk->piece_bytes = 0;
		if (bpf_probe_read_user(walk->piece, bytes, (void *)start))
			return false;
		walk->piece_start = start;
		walk->piece_bytes = bytes;
		offset = address - start;
	}
	/* Not aligned, or too far from the start: it happens in frames of a kilobyte and in code made by hand. */
	if (offset & 7 || offset + sizeof(u64) > walk->piece_bytes)
		return read_user(value, address);
	*value = walk->piece[offset / sizeof(u64) % PIECE_WORDS];
	return true;
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

/* The plain rule that a run means so many bytes behind its begin. */
ALWAYS_INLINE void rule_in_run(struct unwind_rule *rule, u32 distance)
{
	u32 done = (2U << (distance > MAX_RUN_BYTES ? MAX_RUN_BYTES : distance)) - 1;
	s32 steps = 8 * __builtin_popcount((u32)rule->ra_offset & done);

	rule->cfa_offset += rule->cfa_kind == CFA_PUSHES ? steps : -steps;
	rule->cfa_kind = CFA_SP;
	rule->ra_offset = -8;
	/* The frame pointer's slot is there while the frame is large enough to hold it. */
	if (rule->fp_kind == LOC_CFA && rule->cfa_offset < -rule->fp_offset)
		rule->fp_kind = LOC_SAME;
}

/* The rule for an address, through mapping and table. Says why if there is none. */
ALWAYS_INLINE u8 look_up_rule(struct walk *walk, u64 address, struct unwind_rule *found)
{
	struct unwind_rule *rule;
	u32 row, number;
	u8 end = enter_mapping(walk, address);

	if (end != USER_STACK_NONE)
		return end;
	__builtin_memset(found, 0, sizeof(*found));
	/* As where there is no function: by frame pointer. */
	if (walk->mapping.kind != MAPPING_TABLE)
		return USER_STACK_NONE;
	row = find_row(&walk->table, address - walk->mapping.bias);
	number = row & 0xffff;
	rule = bpf_map_lookup_elem(&unwind_rules, &number);
	if (!rule)
		return USER_STACK_NO_TABLE;
	*found = *rule;
	if (found->cfa_kind == CFA_PUSHES || found->cfa_kind == CFA_POPS)
		rule_in_run(found, (u16)(address - walk->mapping.bias) - (row >> 16));
	return USER_STACK_NONE;
}

/* Where a register was saved, or its value. False: it is not known. */
ALWAYS_INLINE bool locate(struct walk *walk, u8 kind, s32 offset, u64 cfa, u64 *value)
{
	u64 at;

	if (kind == LOC_CFA) {
		at = cfa + offset;
	} else if (kind == LOC_SP) {
		at = walk->sp + offset;
	} else if (kind == LOC_FP) {
		if (walk->fp_lost)
			return false;
		at = walk->fp + offset;
	} else {
		if (!walk->first)
			return false;
		*value = walk->registers[kind & 31];
		return true;
	}
	return read_stack(walk, at, value);
}

#if defined(__TARGET_ARCH_x86)
#define DWARF_RBX 3

/* The caller's rbx, by which the dynamic linker finds its frame while it looks up a function. */
ALWAYS_INLINE void follow_rbx(struct walk *walk, u32 place, u64 cfa)
{
	if (place == RBX_SAME)
		return;
	walk->rbx_lost = !place || !read_stack(walk, cfa - 8 * place, &walk->registers[DWARF_RBX]);
}
#endif

/* From a frame to its caller. False: the walk is over, and walk->end says how. */
ALWAYS_INLINE bool step(struct walk *walk, struct found_rules *found)
{
	u64 address = walk->exact ? walk->pc : walk->pc - 1, cfa, ra = 0, fp = walk->fp;
	u64 place = (address + walk->epoch) * 0x9e3779b97f4a7c15ULL >> (64 - FOUND_BITS);
	struct found_rule *known = &found->of[place & ((1 << FOUND_BITS) - 1)];
	struct unwind_rule *rule = &known->rule;

	if (known->address != address || known->epoch != walk->epoch) {
		known->epoch = 0;
		walk->end = look_up_rule(walk, address, rule);
		if (walk->end != USER_STACK_NONE)
			return false;
		known->address = address;
		known->epoch = walk->epoch;
	}
	switch (rule->cfa_kind) {
	case CFA_SP:
		cfa = walk->sp + rule->cfa_offset;
		break;
	case CFA_FP:
		if (walk->fp_lost)
			goto fault;
		cfa = fp + rule->cfa_offset;
		break;
	case CFA_SP_DEREF:
		if (!read_user(&cfa, walk->sp + (rule->cfa_offset >> 8)))
			goto fault;
		cfa += rule->cfa_offset & 0xff;
		break;
	case CFA_FP_DEREF:
		if (walk->fp_lost || !read_user(&cfa, fp + (rule->cfa_offset >> 8)))
			goto fault;
		cfa += rule->cfa_offset & 0xff;
		break;
	case CFA_PLT:
		cfa = walk->sp + 8 + ((walk->pc & 15) >= (u32)rule->cfa_offset ? 8 : 0);
		break;
	case CFA_NONE:
	case CFA_UNSUPPORTED:
		walk->end = rule->cfa_kind == CFA_NONE ? USER_STACK_NO_RULE : USER_STACK_UNSUPPORTED;
		if (!step_by_frame_pointer(walk))
			return false;
		goto next;
	default:
#if defined(__TARGET_ARCH_x86)
		if (rule->cfa_kind == CFA_REGISTER + DWARF_RBX) {
			if (walk->rbx_lost)
				goto fault;
			cfa = walk->registers[DWARF_RBX] + rule->cfa_offset;
			break;
		}
#endif
		if (!walk->first)
			goto fault;
		cfa = walk->registers[rule->cfa_kind & 31] + rule->cfa_offset;
	}
	if (rule->ra_kind == LOC_UNDEFINED) {
		walk->end = USER_STACK_COMPLETE;
		return false;
	}
	if (!locate(walk, rule->ra_kind, rule->ra_offset, cfa, &ra))
		goto fault;
	if (rule->fp_kind == LOC_UNDEFINED) {
		walk->fp_lost = 1;
	} else if (rule->fp_kind != LOC_SAME) {
		if (!locate(walk, rule->fp_kind, rule->fp_offset, cfa, &fp))
			goto fault;
		walk->fp = fp;
		walk->fp_lost = 0;
	}
	/* Stacks grow downwards; only a signal handler's caller may be on another stack. */
	if (cfa <= walk->sp && !(rule->flags & RULE_SIGNAL) && !(cfa == walk->sp && walk->first)) {
		walk->end = USER_STACK_NO_PROGRESS;
		return false;
	}
#if defined(__TARGET_ARCH_x86)
	follow_rbx(walk, rule->flags >> RULE_RBX_SHIFT & 7, cfa);
#else
	if (rule->flags & RULE_RA_SIGNED)
		ra &= (1ULL << 48) - 1;
#endif
	walk->sp = cfa;
	walk->pc = ra;
	walk->exact = rule->flags & RULE_SIGNAL;
	goto caller;
next:
	walk->exact = 0;
	walk->rbx_lost = 1;
caller:
	walk->first = 0;
	if (!walk->pc) {
		/* What starts a thread leaves no return address. */
		walk->end = USER_STACK_COMPLETE;
		return false;
	}
	return true;
fault:
	walk->end = USER_STACK_FAULT;
	return false;
}

#endif
