/* SPDX-License-Identifier: GPL-2.0 OR BSD-2-Clause */
/*
 * The events, map keys and values, and settings that BPF programs and agent share. The build generates the agent's Rust types
 * from them.
 */
#ifndef GANNET_H
#define GANNET_H

#define COMM_LEN 16
#define PATH_LEN 128
#define MAX_RULES 64
/* Levels of a control group's path that rules can match, and its bytes with the NUL: the longest key of a trie. */
#define CGROUP_DEPTH 16
#define CGROUP_PATH_LEN 252
/*
 * bpf_get_stack does not say that it cut a stack, so the programs ask for one frame more than they store. It returns at most
 * as many as the sysctl kernel.perf_event_max_stack, which is 127 by default.
 */
#define MAX_KERNEL_FRAMES 126
/* Of a stack that is unwound by tables, and of one that the kernel unwinds by frame pointers. */
#define MAX_USER_FRAMES 512
#define MAX_FP_FRAMES 126
/* Of both stacks of a thread that is off the CPU: off_cpu holds them until it comes back. */
#define OFF_CPU_FRAMES 320
_Static_assert(MAX_KERNEL_FRAMES + MAX_FP_FRAMES + 2 <= OFF_CPU_FRAMES, "the kernel's own stacks fit");
/* A raw sample: pc, the registers by DWARF number, then the stack from the stack pointer upwards. */
#define RAW_REGISTERS 33
#define RAW_STACK_PAGES 6
_Static_assert(RAW_STACK_PAGES <= 8, "one bit of struct sample's raw_unread for each");
#define RAW_STACK_WORDS (RAW_STACK_PAGES * 4096 / 8)
#define RAW_WORDS (RAW_REGISTERS + RAW_STACK_WORDS)
/*
 * Of a thread that is off the CPU: the page of the stack pointer, and the next ones. libuv's function for files takes 8.6 KB of stack
 * in Node 26, and the frames of JavaScript come behind it.
 */
#define OFF_CPU_RAW_PAGES 5
_Static_assert(OFF_CPU_RAW_PAGES <= RAW_STACK_PAGES, "it fits a raw sample");
#define OFF_CPU_RAW_WORDS (RAW_REGISTERS + OFF_CPU_RAW_PAGES * 4096 / 8)
/* Words of list frames behind a raw stack. */
#define RAW_LIST_WORDS 512
#define FRAME_SLOTS (MAX_KERNEL_FRAMES + 1 + RAW_WORDS + RAW_LIST_WORDS)
_Static_assert(MAX_USER_FRAMES < RAW_WORDS && MAX_FP_FRAMES < RAW_WORDS, "the larger one sizes the buffer");
/* The kernel allows 33 tail calls in a chain. */
#define CHAIN_CALLS 29
#define CHAIN_FRAMES 8
_Static_assert(CHAIN_CALLS *CHAIN_FRAMES >= 232, "depth without bpf_loop");

/*
 * What a process is sampled for: the rules, one bit each, and the shortest time between two ticks that they ask for, or 0 if
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

/* Key of `exact_rules`: a property that is compared as a number. */
struct exact_key {
	u32 side;
	u32 kind;
	u64 number;
};
_Static_assert(sizeof(struct exact_key) == 16, "no padding");

/* Value of `procs`: the processes that the kernel side knows. Written by BPF programs only. */
struct proc {
	u64 start_boottime;
	/* Holds until the next exec: by the properties of the process, or inherited by fork. */
	struct want want;
	/* Holds over exec too, and children inherit it: by PID. */
	struct want sticky;
	u32 exec_id;
	/* This image has been sampled before. */
	u32 sampled;
	/* Never sampled, whatever other rules ask for. */
	u32 denied;
	/* This image has been reported to the agent. */
	u32 reported;
};

/* Value of `marks`: the agent's decision for one process. Writer: the agent only. */
struct mark {
	u64 start_boottime;
	struct want want;
	/* The image that the decision is for. Ignored if sticky. */
	u32 exec_id;
	/* Holds over exec, and children inherit it. */
	u32 sticky;
	/* Rules that no longer hold for this image, though the kernel side matched it; and the period of the others. */
	u64 refused;
	u64 period_ns;
};

/*
 * How rules are matched, one bit for each rule. A rule matches if all its properties do; each mask names the rules that do
 * not ask for a property at all. The lowest bit of settings.generation names the side in force. The agent fills the other
 * side, then increments the generation, so that a rule set comes into force as a whole.
 */
struct side {
	/* All rules of this side. */
	u64 rules;
	u64 any_comm;
	u64 any_cgroup;
	u64 any_container;
	u64 any_uid;
	u64 any_pid;
	/* Rules that ask for more than the kernel side can see. A process that else matches is reported, not sampled. */
	u64 by_agent;
	/* Rules that ask for a PID and nothing else: they hold over exec, and children inherit them. */
	u64 sticky;
	/* Rules for processes that match at exec, not for those that already run. */
	u64 at_exec;
	/* Rules whose processes are never sampled. */
	u64 deny;
};

/* Settings, written by the agent at any time. */
struct settings {
	/* exec and exit handlers do nothing before this is set. */
	u32 lifecycle;
	/* The sampler does nothing before this is set. */
	u32 sampling;
	/* Number of the rule set; the lowest bit is the side in force. */
	u32 generation;
	/* `marks` is not empty. */
	u32 marks;
	/* User stacks are unwound by tables; else the kernel unwinds them by frame pointers. */
	u32 tables;
	/* Stacks to take. */
	u32 user_stacks;
	u32 kernel_stacks;
	/* Every process is sampled for these. */
	struct want all;
	/* The bits of all, procs and marks that stand for a rule of the set in force. */
	u64 live_rules;
	/* Rules that want ticks, and rules that want blocked time. */
	u64 on_cpu_rules;
	u64 off_cpu_rules;
	/* Rules that want ticks only while the thread works in a span. */
	u64 in_span_rules;
	/* Off-CPU intervals shorter than this are not reported. */
	u64 off_cpu_min_ns;
	/* Stacks of threads that block, per second and CPU; more are counted as lost. */
	u64 off_cpu_rate;
	/* The rates in use, fastest first, each with the rules that ask for it. */
	struct want rates[MAX_RULES];
	/* Samples fill the ring buffer up to here; the rest is for lifecycle events, which must not be lost. */
	u64 ring_sample_limit;
	/* From this fill on the programs wake the reader; else it comes by its own timer. */
	u64 ring_wake;
	/* Exec and fork reports per second, for all CPUs together; and as many of renames. */
	u64 report_rate;
	/* Perf events report each executable mapping to the agent, so that it need not hurry to read /proc. */
	u32 mappings_reported;
	/* `label_sources` is not empty, or has been. */
	u32 labels;
	/* `thread_contexts` is not empty, or has been. */
	u32 contexts;
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
	/* Code without a table, unwound by frame pointer: generated at run time, or of a file without unwind rows. */
	MAPPING_FRAME_POINTER = 1,
	/* Code generated at run time that the agent can unwind: the stack is sent raw. */
	MAPPING_RAW = 2,
};

struct mapping {
	u64 begin;
	u64 end;
	/* Address at run time minus address in the file. */
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
	/* Changes when another table takes this slot: mappings that still name the former table find none. */
	u32 generation;
	u32 reserved;
};

/* The same as `format::UnwindRule` of gannet-unwind. */
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
	/* The frame stands for a run of list frames: see struct list_frames. */
	RULE_LIST = 8,
	/* Three bits for the caller's rbx. 0: not known; RBX_SAME; k from 2 on: at the frame address - 8 * k. */
	RULE_RBX_SHIFT = 4,
	RBX_SAME = 1,
};

enum context_form {
	/* Its threads publish no spans. */
	CONTEXT_NONE = 0,
	/* The word at thread pointer + `thread_offset` is the address of the record. */
	CONTEXT_WORD = 1,
	/*
	 * That word leads to the thread's table of modules: the word at + `module_at` there leads to the block of a module, and the
	 * word at + `variable_at` in the block is the address.
	 */
	CONTEXT_BY_MODULE = 2,
	/* In a sample that is being taken: not looked up. */
	CONTEXT_UNREAD = 3,
};

/* Where the threads of an image keep the address of the record of their span. */
struct context_place {
	s64 thread_offset;
	s32 module_at;
	s32 variable_at;
	/* enum context_form */
	u32 form;
	u32 reserved;
};

/* Value of `images`: this image of this process has all its mappings in `exec_mappings`. */
struct image {
	u64 start_boottime;
	u32 exec_id;
	u32 reserved;
	/* Changes with each change of its mappings, and differs for each image: cached rules of another epoch are stale. */
	u64 epoch;
	/* As in `thread_contexts`. It is here too because each unwound sample has this entry at hand: one lookup less. */
	struct context_place context;
};

/*
 * List frames: frames that an interpreter keeps in a linked list of its own. A frame of its loop, by RULE_LIST, stands for a
 * run of them. In a sample each has two words, with a tag in their top four bits. Neither is an address: user addresses have
 * fewer than 60 bits, and those of the kernel's own page begin with ones.
 */
enum list_word {
	/* The function's object. */
	LIST_FUNCTION = 8,
	/* 28 bits of a sum over the object, by which another one at its address differs; 32 bits of the position. */
	LIST_POSITION = 9,
	/* Behind a raw stack: a run ends. An address within its native frame; 0: not known. */
	LIST_RUN_END = 10,
};
#define LIST_TAG_SHIFT 60
#define LIST_SUM_SHIFT 32
#define LIST_SUM_BITS 28
/* Steps from the thread pointer to the head of the list. */
#define LIST_STEPS 4
/* Words that are read of a list frame, and of the object of its function. */
#define LIST_FRAME_WORDS 16
#define LIST_SUM_WORDS 14
/* Objects that the object of a function leads to and that hold its texts: name, file, table of lines. */
#define LIST_TEXTS 3

enum list_end {
	/* The marked frame is the last one of its run. */
	LIST_END_LAST = 0,
	/* The marked entry ends the run and is no frame of the program; it lies in the native frame of the run. */
	LIST_END_NATIVE = 1,
	/* Each frame is a run. */
	LIST_END_EACH = 2,
};

/*
 * Value of `list_frames`: where the interpreter of one image of a process keeps its frames. Data only: no program knows a
 * language. The programs bound every number.
 */
struct list_frames {
	u64 start_boottime;
	u32 exec_id;
	/*
	 * The head: from the word at thread pointer + `thread_offset`, or at the address `thread_offset`, `steps` times to the word
	 * at + `step`.
	 */
	u16 steps;
	/* The word that this step leads to is an object that holds the thread pointer at `self_offset`; 0: the first word is. */
	u16 self_step;
	s64 thread_offset;
	s32 step[LIST_STEPS];
	/* Bits of a function word that are its address. */
	u64 function_mask;
	/* Of the function's object: where the sum begins. */
	u32 sum_offset;
	/* 0: the thread pointer is not checked. */
	s32 self_offset;
	u8 sum_words;
	/* The word that this step leads to lies in the native frame of the newest run; 0: not known. */
	u8 native_step;
	/* Of a list frame: words, and which of them are function, position and next frame. */
	u8 words;
	u8 function;
	u8 position;
	u8 next;
	/* The byte that marks the end of a run, those of its bits that matter, their value, and which end that is. */
	u8 end_byte;
	u8 end_mask;
	u8 end_value;
	u8 end;
	/* The position is an address, and counts from the function's object. */
	u8 position_is_address;
	/* The agent's number of this description, which samples carry. */
	u8 layout;
	/* It is in `file_lists`. Writer: the programs. */
	u8 is_shared;
	/* Bytes of the function's object that its texts need; 0: the programs copy no texts. */
	u8 object_bytes;
	/* Words of the object that lead to its texts, and the word of each text that is its length. */
	u8 text[LIST_TEXTS];
	u8 text_length;
	/* Bytes of a text: header + (length << shift). */
	u8 text_header[LIST_TEXTS];
	u8 text_shift[LIST_TEXTS];
	/* `thread_offset` is an address. */
	u8 is_absolute;
	/* The first byte of the sum in functions of C code, whose frames end no run; 0: there are none. */
	u8 native_function;
	/*
	 * While the thread is in the loop itself: by DWARF number, the registers with the frame that runs and with its position,
	 * which is newer than that in the frame; 0: there are none.
	 */
	u8 frame_register;
	u8 position_register;
	/* Bytes from one frame to the next; 0: word `next` leads there. */
	u8 stride;
	/*
	 * The word that leads to the last of three words, which become the last ones of `list_words`; 0: there are none. The first
	 * of them is the function of a frame that has none. A frame that has a function but no position is a placeholder.
	 */
	u8 variables;
	/* The byte that marks the end of the list, which is no frame, and its value; 0: there is no such mark. */
	u8 oldest_byte;
	u8 oldest_value;
};
_Static_assert(sizeof(struct list_frames) == 88, "no padding: the agent writes these bytes");

/*
 * Labels that a program gives its own tasks: Go's goroutines. Texts are copied at the tick, because the memory is freed with the
 * task. What is beyond a limit is left out or cut, and counted.
 */
#define MAX_LABELS 64
#define LABEL_NAME_BYTES 64
#define LABEL_VALUE_BYTES 256
#define LABEL_TEXT_BYTES 2048
/* Buckets of a hash table that are read: 64 labels are in 16, of which each can overflow. */
#define LABEL_BUCKETS 40
/* In the length of a text in a record: the text is longer. */
#define LABEL_IS_CUT 0x8000

enum label_form {
	/* The address of an array, the number of its entries; of each: address and length of name and of value. */
	LABELS_ARRAY = 1,
	/* The address of a hash table, as up to Go 1.23. */
	LABELS_BUCKETS = 2,
};

/*
 * Value of `label_sources`: where the tasks of one image of a process have their labels. Data only, as in struct list_frames. The
 * word at thread pointer + `thread_offset` is the object on whose stack the thread runs; that has an owner, and the owner has the
 * object whose labels count, which may be another one.
 */
struct label_source {
	u64 start_boottime;
	u32 exec_id;
	u32 form;
	s64 thread_offset;
	/* Offsets in an object: of its owner and of its labels. */
	s32 owner;
	s32 labels;
	/* Offset in the owner of the object whose labels count. */
	s32 current;
	/* The programs have copied it to file_labels. */
	u32 is_shared;
};
_Static_assert(sizeof(struct label_source) == 40, "no padding: the agent writes these bytes");

/* Value of `thread_contexts`: where the threads of one image of a process publish their spans. */
struct thread_context {
	u64 start_boottime;
	u32 exec_id;
	u32 reserved;
	struct context_place place;
};
_Static_assert(sizeof(struct thread_context) == 40, "no padding: the agent writes these bytes");

/*
 * The head of a record of a span (OTEP 4947), as it lies in the process: `bytes` of attributes follow. A sample has the head and the
 * attributes that could be read, and `bytes` says how many these are.
 */
struct context_head {
	u8 trace_id[16];
	u8 span_id[8];
	u8 valid;
	u8 flags;
	u16 bytes;
};
_Static_assert(sizeof(struct context_head) == 28, "no padding: processes write these bytes");
#define CONTEXT_VALID 1
/* Bytes of attributes that are copied: OTEP 4947 recommends 640 for a record. */
#define CONTEXT_BYTES 612
#define CONTEXT_SLOTS ((sizeof(struct context_head) + CONTEXT_BYTES) / sizeof(u64))
_Static_assert(sizeof(struct context_head) + CONTEXT_BYTES == CONTEXT_SLOTS * sizeof(u64), "it ends with a word");

enum cgroup_hierarchy {
	CGROUP_V2 = 0,
	CGROUP_V1_CPU = 1,
	CGROUP_V1_MEMORY = 2,
};

/* Value of `off_cpu_raw`'s map: as in a raw sample. */
struct off_cpu_raw {
	u64 words[OFF_CPU_RAW_WORDS];
};

enum event_kind {
	EVENT_SAMPLE = 1,
	EVENT_EXEC = 2,
	EVENT_FORK = 3,
	EVENT_EXIT = 4,
	/* A process that already ran when rules began or ceased to match it. */
	EVENT_RUNNING = 5,
	/* Copies of the texts of a function. */
	EVENT_FUNCTION = 6,
	/* Labels of the sample that follows with the same thread and time. */
	EVENT_LABELS = 7,
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

/* Bits of a sample's `flags`. Without SAMPLE_OFF_CPU it was taken by a tick of the clock. */
enum sample_flags {
	SAMPLE_OFF_CPU = 1,
	/* The kernel's stack has more frames. */
	SAMPLE_KERNEL_TRUNCATED = 2,
};

/* How the unwind of a user stack ended; every sample has it. */
enum user_stack_end {
	USER_STACK_NONE = 0,
	USER_STACK_COMPLETE = 1,
	/* More frames than the sample holds. */
	USER_STACK_TRUNCATED = 2,
	/* An address outside all known mappings. */
	USER_STACK_NO_MAPPING = 3,
	/* The mapping's table is not in the kernel. */
	USER_STACK_NO_TABLE = 4,
	/* No function at the address, and no frame pointer to go on by. */
	USER_STACK_NO_RULE = 5,
	/* A rule that the format cannot express, and no frame pointer to go on by. */
	USER_STACK_UNSUPPORTED = 6,
	/* Memory of the stack that the program cannot read now: swapped out, never touched, or protected. */
	USER_STACK_FAULT = 7,
	/* The caller would be below its callee. */
	USER_STACK_NO_PROGRESS = 8,
	/* A 32-bit program. */
	USER_STACK_NOT_64_BIT = 9,
	/* Not unwound: registers and stack are in the record, for the agent to unwind. */
	USER_STACK_RAW = 10,
	/* A rule that needs a register whose value is not known there. */
	USER_STACK_NO_REGISTER = 11,
};

/* Addresses of kernel functions that name_symbols names at once, and bytes of a name. */
#define SYMBOL_BATCH 32
#define SYMBOL_TEXT_LEN 576

/* The i-th text becomes `name [module]`, or the i-th address in hex if the kernel has no name for it. */
struct symbol_names {
	u64 count;
	u64 address[SYMBOL_BATCH];
	char texts[SYMBOL_BATCH * SYMBOL_TEXT_LEN];
};

struct sample {
	struct event event;
	/* On CPU: nanoseconds between two ticks. Off CPU: nanoseconds blocked; in off_cpu, nanoseconds that the thread has run. */
	u64 value_ns;
	u16 kernel_frames;
	u16 user_frames;
	u8 flags;
	u8 user_end;
	/* Words of the record of the thread's span behind all frames; 0: the thread publishes none. See struct context_head. */
	u8 context_words;
	/* Of an off-CPU sample: the low bits of the state that it slept in. */
	u8 state;
	/* The index among the user frames' words from which on all frames rest on a guess (see RULE_GUESSED); 0: none does. */
	u16 guessed_from;
	/* Of a raw stack: words of list frames behind it. The first one is `run_native` of struct unwind_state. */
	u16 list_words;
	/* The CPU that sent it, and that CPU's `counters.sent` before it: a jump shows the agent that a record is missing. */
	u16 cpu;
	/* The description by which list frames were taken; 0: there are none. */
	u8 list_layout;
	/*
	 * Of a raw stack: the parts that could not be read, one bit for each, lowest address first. The first part ends with the
	 * page of the stack pointer, each other part is a page.
	 */
	u8 raw_unread;
	u64 sequence;
	/* kernel_frames, then user_frames, then list_words, leaf first; then context_words. */
	u64 frames[];
};

/* Functions of one sample whose texts the programs copy; they copy others with a later sample. */
#define MAX_NEW_FUNCTIONS 16
/* Processes younger than this have the texts of their functions copied: the agent may come too late to read them. */
#define YOUNG_NS 1000000000ULL
#define FUNCTION_OBJECT_BYTES 192
#define FUNCTION_NAME_BYTES 256
#define FUNCTION_FILE_BYTES 384
#define FUNCTION_LINES_BYTES 2048

/* The texts of a function. Copies are cut where they do not fit, or cannot be read. */
struct function_record {
	struct event event;
	u64 object;
	u32 sum;
	u32 object_bytes;
	/* Addresses of the texts, and bytes that were copied of each. */
	u64 at[LIST_TEXTS];
	u32 bytes[LIST_TEXTS];
	u32 reserved;
	u8 object_copy[FUNCTION_OBJECT_BYTES];
	u8 name[FUNCTION_NAME_BYTES];
	u8 file[FUNCTION_FILE_BYTES];
	/* Last, because only the copied part is sent. */
	u8 lines[FUNCTION_LINES_BYTES];
};

/* A text's bytes as far as they were copied, and LABEL_IS_CUT. */
struct label_size {
	u16 name;
	u16 value;
};

struct labels_record {
	struct event event;
	/* Labels in the record, and those that the task has. */
	u32 count;
	u32 all;
	struct label_size sizes[MAX_LABELS];
	/* Name and value of each label, one behind the other. Last, because only the used part is sent. */
	u8 texts[LABEL_TEXT_BYTES];
};

struct lifecycle {
	struct event event;
	/* EXIT: as wait(2) returns it. */
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
	/* Rules that match as far as the kernel side can see: the agent decides. */
	u64 candidates;
};

struct exec_record {
	struct lifecycle lifecycle;
	/* The path that execve was called with. */
	char path[PATH_LEN];
};

/* Counts of one kind of event: seen == filtered + sent + lost_rate + lost_ring_full. */
struct lifecycle_counts {
	u64 seen;
	/* No rule wants it. */
	u64 filtered;
	u64 sent;
	u64 lost_rate;
	u64 lost_ring_full;
	/* Events for which the kernel skipped all handlers, at most; see `handled`. The agent fills it in. */
	u64 skipped;
};

/* The parts of a tick that `ticks_throttled` counts: a clock that was stopped starts anywhere between two ticks. */
#define TICK_PARTS 1000

/* Value of `clocks`: one clock of one CPU. */
struct clock {
	/* When its last tick came, by the monotonic clock; 0 before the first one. */
	u64 last;
	/* When the timer of this perf event expired first. */
	u64 first;
	/* The perf event, and where between two multiples of the period its timer expires, when that was read last. */
	u64 id;
	u64 phase;
};

/*
 * Counters of one CPU; the agent adds them up. A sample that two rules asked for counts twice. Between two samples taken ==
 * sent + all that is lost; the agent checks that, so count each of them on its own and never as the sum of others.
 */
struct counters {
	/* Ticks of clocks that came, those of an idle CPU among them. */
	u64 ticks;
	u64 idle_ticks;
	/*
	 * Ticks that were due and did not come: the CPU was busy with interrupts or stopped by a hypervisor, so that one tick
	 * stands for several; the timer ran and the kernel did not call the program, because another one was active on the CPU
	 * or, on some kernels, because the CPU was idle; the kernel stopped the clock (in parts of a tick).
	 */
	u64 ticks_late;
	u64 ticks_uncalled;
	u64 ticks_throttled;
	u64 taken;
	/* The part of `taken` that a program is working on now; 0 between two samples. */
	u64 open;
	u64 sent;
	u64 lost_ring_full;
	u64 lost_off_cpu_full;
	u64 lost_off_cpu_rate;
	/* The kernel refused to call the next link of the unwinding chain. */
	u64 lost_chain;
	u64 raw;
	u64 procs_full;
	/* Control groups too deep for their path to be matched. */
	u64 cgroup_too_deep;
	/* Functions whose texts could not be copied or sent; the next sample tries again. */
	u64 functions_unsent;
	/* Samples whose task has labels that could not be read or sent, and samples that have a part of them. */
	u64 labels_unsent;
	u64 labels_cut;
	/* Blocked threads whose raw stack found no room, so that their stack ends at generated code. */
	u64 off_cpu_raw_full;
	struct lifecycle_counts exec;
	struct lifecycle_counts fork;
	struct lifecycle_counts exit;
	/* Found by the scan, moved to another control group, or renamed. */
	struct lifecycle_counts running;
};

#endif
