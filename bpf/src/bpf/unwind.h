/* SPDX-License-Identifier: GPL-2.0 OR BSD-2-Clause */
/*
 * Unwinds a user stack without frame pointers, by tables that the agent makes from .eh_frame. gannet-unwind's module
 * `format` describes the layout of tables and rules, the search and the step; this is the same in C.
 */
#ifndef UNWIND_H
#define UNWIND_H

#include "maps.h"
#include <bpf/bpf_endian.h>

/* One cache line of a table: directory words or rows. */
struct table_line {
	u32 words[16];
};

/* The cache lines of all tables. Writer: the agent, through mmap. Reader: the unwinder. Size: the agent's table budget. */
struct {
	__uint(type, BPF_MAP_TYPE_ARRAY);
	__uint(map_flags, BPF_F_MMAPABLE);
	__uint(max_entries, 1);
	__type(key, u32);
	__type(value, struct table_line);
} table_lines SEC(".maps");

/* Rules of all tables, each once for the whole node. Writer: the agent, through mmap. Size: rows have 16 bits for them. */
struct {
	__uint(type, BPF_MAP_TYPE_ARRAY);
	__uint(map_flags, BPF_F_MMAPABLE);
	__uint(max_entries, 65536);
	__type(key, u32);
	__type(value, struct unwind_rule);
} unwind_rules SEC(".maps");

/* Tables by number. Writer: the agent. */
struct {
	__uint(type, BPF_MAP_TYPE_ARRAY);
	__uint(max_entries, MAX_TABLES);
	__type(key, u32);
	__type(value, struct unwind_table);
} unwind_tables SEC(".maps");

/* Finds the mapping of an address. Writer: the agent, with one key for each aligned block of each executable mapping. */
struct {
	__uint(type, BPF_MAP_TYPE_LPM_TRIE);
	__uint(map_flags, BPF_F_NO_PREALLOC);
	__uint(max_entries, 262144);
	__type(key, struct mapping_key);
	__type(value, struct mapping);
} exec_mappings SEC(".maps");

/* The images of which all mappings are in exec_mappings. Writer: the agent. */
struct {
	__uint(type, BPF_MAP_TYPE_HASH);
	__uint(max_entries, 16384);
	__type(key, u32);
	__type(value, struct image);
} images SEC(".maps");

/* Where interpreters keep the frames of their programs, by thread group id. Writer: the agent. Size: by --processes. */
struct {
	__uint(type, BPF_MAP_TYPE_HASH);
	__uint(max_entries, 4096);
	__type(key, u32);
	__type(value, struct list_frames);
} list_frames SEC(".maps");

/* An executable. */
struct exe_key {
	u64 inode;
	u64 size;
};

/*
 * The same by executable: where list frames are in one process of it they are in the next one too, which need not wait for the
 * agent. The key has no device, because each container has its own for the files of one image; self_offset shows whether the
 * description fits a process. Writer and reader: the programs. Size: the different interpreters of a node.
 */
struct {
	__uint(type, BPF_MAP_TYPE_LRU_HASH);
	__uint(max_entries, 256);
	__type(key, struct exe_key);
	__type(value, struct list_frames);
} file_lists SEC(".maps");

/* file_lists is not empty. */
u32 has_file_lists;

/* A function of one image of a process. */
struct function_key {
	u64 object;
	u64 start_boottime;
	u32 tgid;
	u32 exec_id;
	u32 sum;
	u32 reserved;
};

/*
 * Functions of young processes whose texts are copied. Writer and reader: the programs. Size: some twenty functions of each
 * process that begins within a second; those of an evicted one are copied again.
 */
struct {
	__uint(type, BPF_MAP_TYPE_LRU_HASH);
	__uint(max_entries, 4096);
	__type(key, struct function_key);
	__type(value, u32);
} copied_functions SEC(".maps");

/* A function whose texts are to be copied. */
struct new_function {
	u64 object;
	u32 sum;
	u32 reserved;
};

/* The stack is read in chunks, since each read costs as much as the rest of a step. */
#define CHUNK_BYTES 512
#define CHUNK_WORDS (CHUNK_BYTES / sizeof(u64))
/* Below the return address are the registers that the frame saved: a chunk begins that far down, if the frame does. */
#define CHUNK_BEFORE 56
/* Longest run of pushes or pops, in bytes. */
#define MAX_RUN_BYTES 15

/* An unwind under way: the values that a step needs and changes. */
struct unwind_state {
	u64 pc, sp, fp;
	struct mapping mapping;
	struct unwind_table table;
	/* See struct image. */
	u64 epoch;
	struct context_place context;
	u32 tgid;
	u32 frames;
	u8 end;
	/* pc is where the thread is, not the address behind a call. */
	u8 exact;
	u8 first;
	u8 fp_lost;
	u8 rbx_lost;
	/* See struct sample. */
	u16 guessed_from;
	/* By DWARF number; good in the first frame only, but rbx until it is lost. */
	u64 registers[RAW_REGISTERS - 1];
	/* Where the thread is; pc moves on from frame to frame. */
	u64 start_pc;
	u64 start_sp;
	u64 chunk_start;
	u64 chunk_bytes;
	u64 chunk[CHUNK_WORDS];
	/* Frames so far, native and of lists; `frames` counts words. */
	u32 depth;
	u32 exec_id;
	u64 start_boottime;
	/* The next list frame; 0 at the end of the list. Its head has been read. */
	u64 list;
	u8 list_read;
	/* The frames of a run are being taken; those of this native frame are all taken. */
	u8 run_open;
	u8 run_over;
	/* An address within the native frame of the newest run; 0: not known. */
	u64 run_native;
	/* When the open run began: the words, depth and list, and the native frame. */
	u32 run_frames;
	u32 run_depth;
	u64 run_list;
	u64 run_low;
	u64 run_high;
	struct list_frames how;
	u64 list_words[LIST_FRAME_WORDS];
	u64 sum_words[LIST_SUM_WORDS];
	/* The stack was taken raw: all runs are taken, one behind the other. */
	u8 raw;
	/* The process is young: texts of its functions are copied. */
	u8 young;
	u32 new_functions;
	struct new_function new_function[MAX_NEW_FUNCTIONS];
};

/* The rule that holds at an address of a process. */
struct cached_rule {
	u64 address;
	u64 epoch;
	struct unwind_rule rule;
};

#define CACHE_BITS 9
struct rule_cache {
	struct cached_rule slots[1 << CACHE_BITS];
};
_Static_assert(sizeof(struct rule_cache) <= 32768, "the largest value of a per-CPU map");

/*
 * The rules that the unwinder used lately, by process and address. Stacks of one program are alike, and a lookup here costs
 * a tenth of one through mapping, table and rules. A new entry overwrites the one in its slot. Writer and reader: the
 * unwinder.
 */
struct {
	__uint(type, BPF_MAP_TYPE_PERCPU_ARRAY);
	__uint(max_entries, 1);
	__type(key, u32);
	__type(value, struct rule_cache);
} rule_cache SEC(".maps");

ALWAYS_INLINE struct rule_cache *this_cpu_rule_cache(void)
{
	u32 zero = 0;

	return bpf_map_lookup_elem(&rule_cache, &zero);
}

/* Prepares for the list frames of an image, whether the stack is unwound or taken raw. */
ALWAYS_INLINE void begin_lists(struct unwind_state *unwind, u32 tgid, u64 start_boottime, u32 exec_id, bool young)
{
	unwind->tgid = tgid;
	unwind->start_boottime = start_boottime;
	unwind->exec_id = exec_id;
	unwind->how.layout = 0;
	unwind->list = 0;
	unwind->list_read = 0;
	unwind->run_open = 0;
	unwind->run_over = 0;
	unwind->raw = 0;
	unwind->young = young;
	unwind->new_functions = 0;
}

/* Prepares for the first frame; read_registers has filled in where the thread is. */
ALWAYS_INLINE void begin_unwind(struct unwind_state *unwind, const struct image *image)
{
	unwind->mapping.begin = 0;
	unwind->mapping.end = 0;
	unwind->epoch = image->epoch;
	if (settings.contexts)
		unwind->context = image->context;
	unwind->chunk_bytes = 0;
	unwind->frames = 0;
	unwind->end = USER_STACK_TRUNCATED;
	unwind->exact = 1;
	unwind->first = 1;
	unwind->fp_lost = 0;
	unwind->rbx_lost = 0;
	unwind->guessed_from = 0;
	unwind->depth = 0;
}

#if defined(__TARGET_ARCH_x86)
#define USER_CS_64 0x33

ALWAYS_INLINE bool read_registers(struct unwind_state *unwind, struct pt_regs *from)
{
	struct pt_regs regs = {};

	if (bpf_probe_read_kernel(&regs, sizeof(regs), from))
		return false;
	if (regs.cs != USER_CS_64)
		return false;
	unwind->start_pc = unwind->pc = regs.ip;
	unwind->start_sp = unwind->sp = regs.sp;
	unwind->fp = regs.bp;
	unwind->registers[0] = regs.ax;
	unwind->registers[1] = regs.dx;
	unwind->registers[2] = regs.cx;
	unwind->registers[3] = regs.bx;
	unwind->registers[4] = regs.si;
	unwind->registers[5] = regs.di;
	unwind->registers[6] = regs.bp;
	unwind->registers[7] = regs.sp;
	unwind->registers[8] = regs.r8;
	unwind->registers[9] = regs.r9;
	unwind->registers[10] = regs.r10;
	unwind->registers[11] = regs.r11;
	unwind->registers[12] = regs.r12;
	unwind->registers[13] = regs.r13;
	unwind->registers[14] = regs.r14;
	unwind->registers[15] = regs.r15;
	return true;
}
#else
ALWAYS_INLINE bool read_registers(struct unwind_state *unwind, struct pt_regs *from)
{
	struct user_pt_regs regs = {};

	if (bpf_probe_read_kernel(&regs, sizeof(regs), from))
		return false;
	/* This bit marks a 32-bit program. */
	if (regs.pstate & 0x10)
		return false;
	unwind->start_pc = unwind->pc = regs.pc;
	unwind->start_sp = unwind->sp = regs.sp;
	unwind->fp = regs.regs[29];
	for (int i = 0; i < 31; i++)
		unwind->registers[i] = regs.regs[i];
	unwind->registers[31] = regs.sp;
	return true;
}
#endif

/*
 * Finds the row for an address in the file: the low 16 bits of where it begins, and its rule. Rule 0 stands for an address
 * without a function.
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

/* Reads a word of the stack: from the last chunk, or else it reads the next chunk. */
ALWAYS_INLINE bool read_stack(struct unwind_state *unwind, u64 address, u64 *value)
{
	u64 offset = address - unwind->chunk_start;

	if (offset >= unwind->chunk_bytes) {
		u64 start = address - CHUNK_BEFORE, bytes;

		if (start < unwind->sp)
			start = unwind->sp;
		/* A chunk is within one page, so that all of it can be read, or nothing. */
		if (start > address || (start ^ address) & ~4095ULL)
			start = address & ~4095ULL;
		bytes = 4096 - (start & 4095);
		if (bytes > CHUNK_BYTES)
			bytes = CHUNK_BYTES;
		unwind->chunk_bytes = 0;
		if (bpf_probe_read_user(unwind->chunk, bytes, (void *)start))
			return false;
		unwind->chunk_start = start;
		unwind->chunk_bytes = bytes;
		offset = address - start;
	}
	/* Not aligned, or too far from the start, as in frames of a kilobyte and in assembly code. */
	if (offset & 7 || offset + sizeof(u64) > unwind->chunk_bytes)
		return read_user(value, address);
	*value = unwind->chunk[offset / sizeof(u64) % CHUNK_WORDS];
	return true;
}

/* The caller is found by a guess, and so its own callers may be wrong too. */
ALWAYS_INLINE void note_guess(struct unwind_state *unwind)
{
	if (!unwind->guessed_from)
		unwind->guessed_from = unwind->frames + 1;
}

/* A frame pointer further above the stack pointer is another value: stacks have 8 MiB, unless someone raised their limit. */
#define STACK_REACH (8ULL << 20)

/*
 * Steps by convention: the saved frame pointer is at fp, the return address above it. Only upwards, only aligned. Returns why it
 * cannot, or USER_STACK_NONE; `otherwise`: fp is no frame pointer.
 */
ALWAYS_INLINE u8 step_by_frame_pointer(struct unwind_state *unwind, u8 otherwise)
{
	u64 pair[2];

	if (unwind->fp_lost || unwind->fp < unwind->sp || unwind->fp & 7)
		return otherwise;
	if (bpf_probe_read_user(pair, sizeof(pair), (void *)unwind->fp))
		return unwind->fp - unwind->sp < STACK_REACH ? USER_STACK_FAULT : otherwise;
	unwind->sp = unwind->fp + 16;
	unwind->fp = pair[0];
	unwind->pc = pair[1];
	note_guess(unwind);
	return USER_STACK_NONE;
}

/* Finds the mapping and the table of an address, unless the last ones still hold. Returns why it cannot. */
ALWAYS_INLINE u8 enter_mapping(struct unwind_state *unwind, u64 address)
{
	struct mapping_key key = {
		.prefixlen = MAPPING_KEY_BITS,
		.tgid = bpf_htonl(unwind->tgid),
		.address = bpf_cpu_to_be64(address),
	};
	struct mapping *mapping;
	struct unwind_table *table;

	if (address - unwind->mapping.begin < unwind->mapping.end - unwind->mapping.begin)
		return USER_STACK_NONE;
	unwind->mapping.begin = 0;
	unwind->mapping.end = 0;
	mapping = bpf_map_lookup_elem(&exec_mappings, &key);
	if (!mapping)
		return USER_STACK_NO_MAPPING;
	if (mapping->kind == MAPPING_RAW)
		return USER_STACK_RAW;
	if (mapping->kind == MAPPING_TABLE) {
		table = bpf_map_lookup_elem(&unwind_tables, &mapping->table);
		if (!table || table->generation != mapping->table_generation)
			return USER_STACK_NO_TABLE;
		unwind->table = *table;
	}
	unwind->mapping = *mapping;
	return USER_STACK_NONE;
}

/* Turns the rule of a run of pushes or pops into the plain rule that holds `distance` bytes behind its begin. */
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

/* Finds the rule for an address, through mapping and table. Returns why there is none, or USER_STACK_NONE. */
ALWAYS_INLINE u8 lookup_rule(struct unwind_state *unwind, u64 address, struct unwind_rule *found)
{
	struct unwind_rule *rule;
	u32 row, number;
	u8 end = enter_mapping(unwind, address);

	if (end != USER_STACK_NONE)
		return end;
	__builtin_memset(found, 0, sizeof(*found));
	/* By frame pointer, as where there is no function. */
	if (unwind->mapping.kind != MAPPING_TABLE)
		return USER_STACK_NONE;
	row = find_row(&unwind->table, address - unwind->mapping.bias);
	number = row & 0xffff;
	rule = bpf_map_lookup_elem(&unwind_rules, &number);
	if (!rule)
		return USER_STACK_NO_TABLE;
	*found = *rule;
	if (found->cfa_kind == CFA_PUSHES || found->cfa_kind == CFA_POPS)
		rule_in_run(found, (u16)(address - unwind->mapping.bias) - (row >> 16));
	return USER_STACK_NONE;
}

/* Reads a register of the caller, from where the frame saved it. Returns why it cannot, or USER_STACK_NONE. */
ALWAYS_INLINE u8 locate(struct unwind_state *unwind, u8 kind, s32 offset, u64 cfa, u64 *value)
{
	u64 at;

	if (kind == LOC_CFA) {
		at = cfa + offset;
	} else if (kind == LOC_SP) {
		at = unwind->sp + offset;
	} else if (kind == LOC_FP) {
		if (unwind->fp_lost)
			return USER_STACK_NO_REGISTER;
		at = unwind->fp + offset;
	} else {
		if (!unwind->first)
			return USER_STACK_NO_REGISTER;
		*value = unwind->registers[kind & 31];
		return USER_STACK_NONE;
	}
	return read_stack(unwind, at, value) ? USER_STACK_NONE : USER_STACK_FAULT;
}

#if defined(__TARGET_ARCH_x86)
#define DWARF_RBX 3

/* Reads the caller's rbx, by which the dynamic linker finds its frame while it resolves a function. */
ALWAYS_INLINE void follow_rbx(struct unwind_state *unwind, u32 slot, u64 cfa)
{
	if (slot == RBX_SAME)
		return;
	unwind->rbx_lost = !slot || !read_stack(unwind, cfa - 8 * slot, &unwind->registers[DWARF_RBX]);
}
#endif

/* Computes the frame's address, the CFA. Returns why it cannot, or USER_STACK_NONE. */
ALWAYS_INLINE u8 frame_address(struct unwind_state *unwind, const struct unwind_rule *rule, u64 *cfa)
{
	switch (rule->cfa_kind) {
	case CFA_SP:
		*cfa = unwind->sp + rule->cfa_offset;
		return USER_STACK_NONE;
	case CFA_FP:
		*cfa = unwind->fp + rule->cfa_offset;
		return unwind->fp_lost ? USER_STACK_NO_REGISTER : USER_STACK_NONE;
	case CFA_SP_DEREF:
		if (!read_user(cfa, unwind->sp + (rule->cfa_offset >> 8)))
			return USER_STACK_FAULT;
		*cfa += rule->cfa_offset & 0xff;
		return USER_STACK_NONE;
	case CFA_FP_DEREF:
		if (unwind->fp_lost)
			return USER_STACK_NO_REGISTER;
		if (!read_user(cfa, unwind->fp + (rule->cfa_offset >> 8)))
			return USER_STACK_FAULT;
		*cfa += rule->cfa_offset & 0xff;
		return USER_STACK_NONE;
	case CFA_PLT:
		*cfa = unwind->sp + 8 + ((unwind->pc & 15) >= (u32)rule->cfa_offset ? 8 : 0);
		return USER_STACK_NONE;
	}
#if defined(__TARGET_ARCH_x86)
	if (rule->cfa_kind == CFA_REGISTER + DWARF_RBX) {
		*cfa = unwind->registers[DWARF_RBX] + rule->cfa_offset;
		return unwind->rbx_lost ? USER_STACK_NO_REGISTER : USER_STACK_NONE;
	}
#endif
	*cfa = unwind->registers[rule->cfa_kind & 31] + rule->cfa_offset;
	return unwind->first ? USER_STACK_NONE : USER_STACK_NO_REGISTER;
}

ALWAYS_INLINE u64 thread_pointer(void)
{
	struct task_struct *task;

	/* A plain load, without the call of a helper; kernels before 5.11 cannot do it. */
	if (bpf_core_enum_value_exists(enum bpf_func_id, BPF_FUNC_get_current_task_btf)) {
		task = bpf_get_current_task_btf();
		return task->thread.THREAD_POINTER;
	}
	task = (void *)bpf_get_current_task();
	return BPF_CORE_READ(task, thread.THREAD_POINTER);
}

/* Returns the file that a process executes, as far as containers share it. */
ALWAYS_INLINE bool read_file_key(struct exe_key *key)
{
	struct task_struct *task = (void *)bpf_get_current_task();
	struct inode *inode = BPF_CORE_READ(task, mm, exe_file, f_inode);

	if (!inode)
		return false;
	key->inode = BPF_CORE_READ(inode, i_ino);
	key->size = BPF_CORE_READ(inode, i_size);
	return true;
}

/* Finds out how the thread's list frames are taken: by its process, or else by the file that this executes. */
ALWAYS_INLINE bool find_list_frames(struct unwind_state *unwind)
{
	struct list_frames *how = bpf_map_lookup_elem(&list_frames, &unwind->tgid);
	struct exe_key key;

	if (how && how->start_boottime == unwind->start_boottime && how->exec_id == unwind->exec_id) {
		unwind->how = *how;
		if (how->self_offset && !how->is_shared && read_file_key(&key)) {
			/* If this fails, the next process of the file waits for the agent. */
			bpf_map_update_elem(&file_lists, &key, how, BPF_ANY);
			has_file_lists = 1;
			how->is_shared = 1;
		}
		unwind->how.self_offset = 0;
		return true;
	}
	if (!has_file_lists || !read_file_key(&key))
		return false;
	how = bpf_map_lookup_elem(&file_lists, &key);
	if (!how || !how->self_offset)
		return false;
	unwind->how = *how;
	return true;
}

/* Finds the newest list frame of the thread. */
ALWAYS_INLINE void read_list_head(struct unwind_state *unwind)
{
	u64 at, self = thread_pointer(), found, object;

	unwind->list_read = 1;
	unwind->run_native = 0;
	if (!find_list_frames(unwind))
		return;
	if (!read_user(&at, (unwind->how.is_absolute ? 0 : self) + unwind->how.thread_offset))
		return;
	object = at;
	for (u32 i = 0; i < LIST_STEPS; i++) {
		if (i >= unwind->how.steps)
			break;
		if (!at || !read_user(&at, at + unwind->how.step[i]))
			return;
		if (i + 1 == unwind->how.native_step)
			unwind->run_native = at;
		if (i + 1 == unwind->how.self_step)
			object = at;
	}
	if (unwind->how.self_offset &&
	    (!object || !read_user(&found, object + unwind->how.self_offset) || found != self))
		return;
	unwind->list = at;
}

/* Begins the run of list frames that a native frame stands for, whose address is `cfa`. False: it stands for none. */
ALWAYS_INLINE bool begin_run(struct unwind_state *unwind, u64 cfa)
{
	if (!unwind->list_read)
		read_list_head(unwind);
	if (!unwind->list)
		return false;
	/* The function has only begun, or is about to return: the newest run is that of a caller. */
	if (unwind->run_native && (unwind->run_native < unwind->sp || unwind->run_native >= cfa))
		return false;
	unwind->run_native = 0;
	unwind->run_open = 1;
	unwind->run_list = unwind->list;
	unwind->run_low = unwind->sp;
	unwind->run_high = cfa;
	return true;
}

/*
 * Goes from a frame to its caller. False: the stack is at its end, and unwind->end says how. One function, because the
 * verifier counts three times the instructions if the part with the cache is another (198,000 for unwind_tick_chain).
 */
ALWAYS_INLINE bool step(struct unwind_state *unwind, struct rule_cache *cache)
{
	u64 address = unwind->exact ? unwind->pc : unwind->pc - 1, cfa, ra = 0, fp = unwind->fp;
	u64 slot = (address + unwind->epoch) * 0x9e3779b97f4a7c15ULL >> (64 - CACHE_BITS);
	struct cached_rule *cached = &cache->slots[slot & ((1 << CACHE_BITS) - 1)];
	struct unwind_rule *rule = &cached->rule;
	u8 end;

	if (cached->address != address || cached->epoch != unwind->epoch) {
		cached->epoch = 0;
		end = lookup_rule(unwind, address, rule);
		if (end != USER_STACK_NONE)
			goto over;
		cached->address = address;
		cached->epoch = unwind->epoch;
	}
	if (rule->cfa_kind == CFA_NONE || rule->cfa_kind == CFA_UNSUPPORTED) {
		end = step_by_frame_pointer(unwind,
					    rule->cfa_kind == CFA_NONE ? USER_STACK_NO_RULE : USER_STACK_UNSUPPORTED);
		if (end != USER_STACK_NONE)
			goto over;
		goto next;
	}
	end = frame_address(unwind, rule, &cfa);
	if (end != USER_STACK_NONE)
		goto over;
	if (rule->flags & RULE_LIST) {
		if (!unwind->run_over && begin_run(unwind, cfa))
			return true;
		unwind->run_over = 0;
	}
	if (rule->ra_kind == LOC_UNDEFINED) {
		end = USER_STACK_COMPLETE;
		goto over;
	}
	end = locate(unwind, rule->ra_kind, rule->ra_offset, cfa, &ra);
	if (end != USER_STACK_NONE)
		goto over;
	if (rule->fp_kind == LOC_UNDEFINED) {
		unwind->fp_lost = 1;
	} else if (rule->fp_kind != LOC_SAME) {
		end = locate(unwind, rule->fp_kind, rule->fp_offset, cfa, &fp);
		if (end != USER_STACK_NONE)
			goto over;
		unwind->fp = fp;
		unwind->fp_lost = 0;
	}
	/* Stacks grow downwards; only a signal handler's caller may be on another stack. */
	if (cfa <= unwind->sp && !(rule->flags & RULE_SIGNAL) && !(cfa == unwind->sp && unwind->first)) {
		end = USER_STACK_NO_PROGRESS;
		goto over;
	}
#if defined(__TARGET_ARCH_x86)
	follow_rbx(unwind, rule->flags >> RULE_RBX_SHIFT & 7, cfa);
#else
	if (rule->flags & RULE_RA_SIGNED)
		ra &= (1ULL << 48) - 1;
#endif
	unwind->sp = cfa;
	unwind->pc = ra;
	unwind->exact = rule->flags & RULE_SIGNAL;
	if (rule->flags & RULE_GUESSED)
		note_guess(unwind);
	goto caller;
next:
	unwind->exact = 0;
	unwind->rbx_lost = 1;
caller:
	unwind->first = 0;
	if (!unwind->pc) {
		/* The function that starts a thread has no return address. */
		end = USER_STACK_COMPLETE;
		goto over;
	}
	return true;
over:
	unwind->end = end;
	return false;
}

#endif
