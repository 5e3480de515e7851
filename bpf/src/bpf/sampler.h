/* SPDX-License-Identifier: GPL-2.0 OR BSD-2-Clause */
/*
 * Samples: whether the current thread is sampled, its stacks, and the sending. The ticks' own part is at the end;
 * off_cpu.h has that of threads that block.
 */
#ifndef SAMPLER_H
#define SAMPLER_H

#include "clock.h"
#include "context.h"
#include "labels.h"
#include "match.h"
#include "task.h"
#include "unwind.h"

struct sample_scratch {
	struct sample sample;
	u64 frames[FRAME_SLOTS];
	/* The record of the thread's span ends in here if the frames take all slots. */
	u64 context[CONTEXT_SLOTS];
	struct unwind_state unwind;
	u32 wake;
	u32 chain_calls;
};
/* The part of it that can be sent. */
#define SAMPLE_BYTES __builtin_offsetof(struct sample_scratch, unwind)
_Static_assert(sizeof(struct sample_scratch) <= 32768, "the largest value of a per-CPU map");

/*
 * Where the programs build a sample, which does not fit the BPF stack. Ticks on one CPU do not interrupt each other, and
 * interrupts are off while the scheduler switches threads. Writers and readers: the sampling programs.
 */
struct {
	__uint(type, BPF_MAP_TYPE_PERCPU_ARRAY);
	__uint(max_entries, 1);
	__type(key, u32);
	__type(value, struct sample_scratch);
} sample_scratch SEC(".maps");

ALWAYS_INLINE struct sample_scratch *this_cpu_scratch(void)
{
	u32 zero = 0;

	return bpf_map_lookup_elem(&sample_scratch, &zero);
}

/* Computes what the current process is sampled for. */
ALWAYS_INLINE void want_of_process(struct want *want, struct proc *proc, u32 tgid, u64 start_boottime, u32 exec_id)
{
	u64 live = settings.live_rules;

	if (proc && proc->start_boottime == start_boottime) {
		if (proc->denied)
			return;
		add_want(want, &proc->want, live);
		add_want(want, &proc->sticky, live);
	}
	if (settings.marks) {
		struct mark *mark = bpf_map_lookup_elem(&marks, &tgid);

		if (mark && mark->start_boottime == start_boottime && (mark->sticky || mark->exec_id == exec_id)) {
			add_want(want, &mark->want, live);
			if (want->rules & mark->refused) {
				want->rules &= ~mark->refused;
				want->period_ns = mark->period_ns;
			}
		}
	}
	add_want(want, &settings.all, live);
}

/* Whether any rule can want `tgid` at all: the one lookup that an unmatched process costs a tick. */
ALWAYS_INLINE bool may_be_wanted(struct proc *proc, u32 tgid)
{
	if (proc || settings.all.rules)
		return true;
	return settings.marks && bpf_map_lookup_elem(&marks, &tgid);
}

/*
 * Reads the registers that the current thread last had in user space. They are at the top of its kernel stack, whether it
 * was interrupted in user space or in the kernel.
 */
ALWAYS_INLINE bool read_user_registers(struct task_struct *task, struct unwind_state *unwind)
{
	if (bpf_core_enum_value_exists(enum bpf_func_id, BPF_FUNC_task_pt_regs))
		return read_registers(unwind, (void *)bpf_task_pt_regs(bpf_get_current_task_btf()));
	/* Before 5.15: they are at the very top of the kernel stack, whose size is fixed there. */
	return read_registers(unwind, (void *)((u64)BPF_CORE_READ(task, stack) + KERNEL_STACK_BYTES - PT_REGS_ROOM));
}

/* The image of a process, if all its mappings are in the kernel. */
ALWAYS_INLINE struct image *image_of(u32 tgid, const struct current *now)
{
	struct image *image = bpf_map_lookup_elem(&images, &tgid);

	if (!image || image->start_boottime != now->start_boottime || image->exec_id != now->exec_id)
		return NULL;
	return image;
}

/* Fills in all of the current thread's sample but its stacks. */
ALWAYS_INLINE void begin_sample(struct sample *sample, u8 flags, u64 rules, u64 value_ns, struct task_struct *task,
				const struct current *now)
{
	u64 id = bpf_get_current_pid_tgid();

	sample->event.kind = EVENT_SAMPLE;
	sample->event.tgid = id >> 32;
	sample->event.tid = id;
	sample->event.ktime = bpf_ktime_get_boot_ns();
	sample->event.start_boottime = now->start_boottime;
	sample->event.exec_id = now->exec_id;
	sample->event.cgroup_id = cgroup_id_of(task);
	sample->event.rules = rules;
	bpf_get_current_comm(sample->event.comm, sizeof(sample->event.comm));
	sample->flags = flags;
	sample->context_words = 0;
	sample->state = 0;
	sample->value_ns = value_ns;
	sample->guessed_from = 0;
	sample->list_layout = 0;
	sample->raw_unread = 0;
	sample->list_words = 0;
	sample->user_frames = 0;
	sample->user_end = USER_STACK_NONE;
}

/* Takes the kernel's part of the stack, without the `skip` frames at the leaf that are our own. */
ALWAYS_INLINE void take_kernel_stack(void *ctx, struct sample *sample, u64 *frames, u64 skip)
{
	long got;

	sample->kernel_frames = 0;
	if (!settings.kernel_stacks)
		return;
	got = bpf_get_stack(ctx, frames, (MAX_KERNEL_FRAMES + 1) * sizeof(u64), skip);
	if (got <= 0)
		return;
	sample->kernel_frames = got / sizeof(u64);
	if (sample->kernel_frames > MAX_KERNEL_FRAMES) {
		sample->kernel_frames = MAX_KERNEL_FRAMES;
		sample->flags |= SAMPLE_KERNEL_TRUNCATED;
	}
}

/*
 * How a stack of `frames` frames ends that the kernel unwound by frame pointers. The kernel stops without a word where it cannot
 * read a frame. At the regular end the frame pointer leads to no address further up the stack.
 */
ALWAYS_INLINE u8 end_of_chain(struct unwind_state *unwind, u64 frames)
{
	u64 below = unwind->sp, at = unwind->fp, next;

	for (u32 i = 1; i <= MAX_FP_FRAMES; i++) {
		if (i >= frames)
			break;
		if (!read_user(&next, at))
			return USER_STACK_FAULT;
		below = at;
		at = next;
	}
	return at > below && at - below < STACK_REACH && !(at & 7) ? USER_STACK_FAULT : USER_STACK_COMPLETE;
}

/* Takes the user's part of the stack by frame pointers, as the kernel unwinds it. */
ALWAYS_INLINE void take_user_stack(void *ctx, struct sample_scratch *scratch, struct task_struct *task,
				   bool kernel_thread)
{
	struct sample *sample = &scratch->sample;
	u64 kernel = sample->kernel_frames;
	u64 *frames = scratch->frames;
	long got;

	/* The compiler knows the bound and would leave the check out; the verifier needs it. */
	barrier_var(kernel);
	if (!settings.user_stacks || kernel > MAX_KERNEL_FRAMES)
		return;
	got = bpf_get_stack(ctx, frames + kernel, (MAX_FP_FRAMES + 1) * sizeof(u64), BPF_F_USER_STACK);
	if (got <= 0) {
		if (got < 0 && !kernel_thread)
			sample->user_end = USER_STACK_FAULT;
		return;
	}
	sample->user_frames = got / sizeof(u64);
	sample->user_end = USER_STACK_COMPLETE;
	/* Each caller is found by frame pointer. */
	sample->guessed_from = 1;
	if (sample->user_frames > MAX_FP_FRAMES) {
		sample->user_frames = MAX_FP_FRAMES;
		sample->user_end = USER_STACK_TRUNCATED;
	} else if (read_user_registers(task, &scratch->unwind)) {
		sample->user_end = end_of_chain(&scratch->unwind, sample->user_frames);
	}
}

/*
 * Takes registers and stack, for the agent to unwind once it has the tables: `pages` parts of the stack, into frames from
 * `first` on. Behind the first thread's stack lie the program's arguments and its environment, which may hold secrets: they are
 * left out.
 */
ALWAYS_INLINE void take_raw(struct sample_scratch *scratch, u64 first, u32 pages)
{
	u64 at, sp = scratch->unwind.start_sp, words = RAW_REGISTERS, part;
	struct task_struct *task = (void *)bpf_get_current_task();
	u64 left = pages * 4096, strings = BPF_CORE_READ(task, mm, arg_start);

	scratch->sample.user_end = USER_STACK_RAW;
	barrier_var(first);
	if (first > MAX_KERNEL_FRAMES + OFF_CPU_FRAMES)
		return;
	scratch->frames[first] = scratch->unwind.start_pc;
	for (u32 i = 0; i < RAW_REGISTERS - 1; i++)
		scratch->frames[first + 1 + i] = scratch->unwind.registers[i];
	/*
	 * Up to the end of the page, then page by page. A page that cannot be read lies behind the end of the stack, or is not
	 * in memory: the program never wrote to it (a large array, used in part), or the kernel swapped it out. If another page
	 * follows the record has zeros in its place, which the agent must not take for memory.
	 */
	at = first + RAW_REGISTERS;
	if (strings > sp && strings - sp < left)
		left = strings - sp;
	part = 4096 - (sp & 4095);
	for (u32 page = 0; page < pages; page++) {
		if (part > left)
			part = left;
		barrier_var(part);
		barrier_var(at);
		if (!part || part > 4096 || at > FRAME_SLOTS - 512)
			break;
		bool present = !bpf_probe_read_user(&scratch->frames[at], part, (void *)sp);

		sp += part;
		at += part / sizeof(u64);
		if (present)
			words = at - first;
		else
			scratch->sample.raw_unread |= 1 << page;
		left -= part;
		part = 4096;
	}
	scratch->sample.user_frames = words;
}

/* Sums up the object of a function, so that it differs from another object at its address. */
ALWAYS_INLINE u64 sum_function(struct unwind_state *unwind, u64 function)
{
	u64 bytes = unwind->how.sum_words * sizeof(u64), sum = 0;

	barrier_var(bytes);
	if (!bytes || bytes > sizeof(unwind->sum_words))
		return 0;
	if (bpf_probe_read_user(unwind->sum_words, bytes, (void *)(function + unwind->how.sum_offset)))
		return 0;
	for (u32 i = 0; i < LIST_SUM_WORDS; i++) {
		if (i >= unwind->how.sum_words)
			break;
		sum = (sum ^ unwind->sum_words[i]) * 0x9e3779b97f4a7c15ULL;
		sum ^= sum >> 32;
	}
	return sum & ((1ULL << LIST_SUM_BITS) - 1);
}

ALWAYS_INLINE void fill_function_key(struct function_key *key, const struct unwind_state *unwind, u64 object, u32 sum)
{
	__builtin_memset(key, 0, sizeof(*key));
	key->object = object;
	key->start_boottime = unwind->start_boottime;
	key->tgid = unwind->tgid;
	key->exec_id = unwind->exec_id;
	key->sum = sum;
}

/* Notes a function of a young process whose texts are not copied yet. */
ALWAYS_INLINE void note_function(struct unwind_state *unwind, u64 object, u32 sum)
{
	struct function_key key;
	u64 number = unwind->new_functions;
	u32 yes = 1;

	fill_function_key(&key, unwind, object, sum);
	if (!unwind->how.object_bytes || number >= MAX_NEW_FUNCTIONS || bpf_map_lookup_elem(&copied_functions, &key))
		return;
	/* If this fails, the texts are copied more than once. */
	bpf_map_update_elem(&copied_functions, &key, &yes, BPF_ANY);
	unwind->new_functions = number + 1;
	barrier_var(number);
	number %= MAX_NEW_FUNCTIONS;
	unwind->new_function[number].object = object;
	unwind->new_function[number].sum = sum;
}

/* The place of a frame's variables in `list_words`. */
#define LIST_VARIABLES (LIST_FRAME_WORDS - 3)

/* Reads the words at the end of a frame's variables. */
ALWAYS_INLINE bool read_variables(struct unwind_state *unwind)
{
	u64 last = unwind->list_words[unwind->how.variables % LIST_FRAME_WORDS];

	return !bpf_probe_read_user(&unwind->list_words[LIST_VARIABLES], 3 * sizeof(u64),
				    (void *)(last - 2 * sizeof(u64)));
}

/* Takes one frame of the open run. */
ALWAYS_INLINE void take_list_frame(struct sample_scratch *scratch, u64 slot)
{
	struct unwind_state *unwind = &scratch->unwind;
	struct list_frames *how = &unwind->how;
	u64 bytes = how->words * sizeof(u64), at = unwind->list, function, position, sum;
	bool is_end;

	barrier_var(bytes);
	if (!bytes || bytes > sizeof(unwind->list_words) ||
	    bpf_probe_read_user(unwind->list_words, bytes, (void *)at)) {
		unwind->list = 0;
		goto over;
	}
	if (how->variables && !read_variables(unwind)) {
		unwind->list = 0;
		goto over;
	}
	unwind->list = how->stride ? at + how->stride : unwind->list_words[how->next % LIST_FRAME_WORDS];
	if (how->oldest_value &&
	    ((u8 *)unwind->list_words)[how->oldest_byte % sizeof(unwind->list_words)] == how->oldest_value) {
		unwind->list = 0;
		goto over;
	}
	is_end = how->end == LIST_END_EACH || (((u8 *)unwind->list_words)[how->end_byte % sizeof(unwind->list_words)] &
					       how->end_mask) == how->end_value;
	if (is_end && how->end == LIST_END_NATIVE) {
		if (unwind->raw) {
			scratch->frames[slot] =
				(u64)LIST_RUN_END << LIST_TAG_SHIFT | (at & ((1ULL << LIST_TAG_SHIFT) - 1));
			unwind->frames++;
		} else if (at < unwind->run_low || at >= unwind->run_high) {
			/* The run is that of a caller. */
			unwind->frames = unwind->run_frames;
			unwind->depth = unwind->run_depth;
			unwind->list = unwind->run_list;
		}
		goto over;
	}
	function = unwind->list_words[how->function % LIST_FRAME_WORDS] & how->function_mask;
	position = unwind->list_words[how->position % LIST_FRAME_WORDS];
	if (how->variables) {
		if (!function)
			function = unwind->list_words[LIST_VARIABLES] & how->function_mask;
		else if (!position)
			function = 0;
	}
	/* A placeholder. */
	if (!function) {
		if (unwind->list)
			return;
		goto over;
	}
	if (how->position_register && unwind->first && !unwind->raw &&
	    unwind->registers[how->frame_register % (RAW_REGISTERS - 1)] == at)
		position = unwind->registers[how->position_register % (RAW_REGISTERS - 1)];
	if (how->position_is_address)
		position -= function;
	sum = sum_function(unwind, function);
	if (how->native_function && (u8)unwind->sum_words[0] == how->native_function)
		is_end = false;
	scratch->frames[slot] = (u64)LIST_FUNCTION << LIST_TAG_SHIFT | (function & ((1ULL << LIST_TAG_SHIFT) - 1));
	scratch->frames[slot + 1] = (u64)LIST_POSITION << LIST_TAG_SHIFT | sum << LIST_SUM_SHIFT | (u32)position;
	unwind->frames += 2;
	unwind->depth++;
	if (unwind->young)
		note_function(unwind, function, sum);
	if (!is_end && unwind->list)
		return;
	if (is_end && unwind->raw) {
		scratch->frames[slot + 2] = (u64)LIST_RUN_END << LIST_TAG_SHIFT;
		unwind->frames++;
	}
over:
	/* Behind a raw stack stand all runs. */
	unwind->run_open = unwind->raw && unwind->list;
	unwind->run_over = 1;
}

/* Unwinds one frame, or takes one list frame. False: the stack is at its end. */
ALWAYS_INLINE bool unwind_frame(struct sample_scratch *scratch, struct rule_cache *cache)
{
	struct unwind_state *unwind = &scratch->unwind;
	u64 slot = scratch->sample.kernel_frames + scratch->sample.user_frames + unwind->frames;
	bool more;

	barrier_var(slot);
	if (slot >= FRAME_SLOTS - 2 || unwind->depth >= MAX_USER_FRAMES ||
	    (unwind->raw && unwind->frames >= RAW_LIST_WORDS - 2)) {
		unwind->end = USER_STACK_TRUNCATED;
		return false;
	}
	if (unwind->run_open) {
		take_list_frame(scratch, slot);
		return unwind->run_open || !unwind->raw;
	}
	/* The agent names a caller one byte back, at its call; a frame that a signal interrupted has made no call. */
	scratch->frames[slot] = unwind->pc + (unwind->exact && unwind->frames);
	more = step(unwind, cache);
	if (unwind->run_open) {
		/* The native frame comes behind its list frames. */
		unwind->run_frames = unwind->frames;
		unwind->run_depth = unwind->depth;
		return true;
	}
	unwind->frames++;
	unwind->depth++;
	return more;
}

/*
 * Takes the stack raw, and begins with its list frames: the agent puts them between the native ones. True: there are some,
 * which unwind_frame takes.
 */
ALWAYS_INLINE bool begin_raw(struct counters *counters, struct sample_scratch *scratch)
{
	struct unwind_state *unwind = &scratch->unwind;
	u64 slot;

	counters->raw++;
	scratch->sample.user_frames = 0;
	scratch->sample.guessed_from = 0;
	take_raw(scratch, scratch->sample.kernel_frames, RAW_STACK_PAGES);
	unwind->raw = 1;
	unwind->run_open = 0;
	unwind->frames = 0;
	unwind->depth = 0;
	read_list_head(unwind);
	slot = scratch->sample.kernel_frames + scratch->sample.user_frames;
	barrier_var(slot);
	if (!unwind->list || slot >= FRAME_SLOTS)
		return false;
	scratch->frames[slot] = unwind->run_native;
	unwind->frames = 1;
	unwind->run_open = 1;
	return true;
}

struct frame_context {
	struct sample_scratch *scratch;
	struct rule_cache *cache;
};

static long each_frame(u32 index, struct frame_context *context)
{
	return !unwind_frame(context->scratch, context->cache);
}

/*
 * Unwinds where the kernel has bpf_loop (5.17). A native frame takes one call, a run of list frames up to two more than it
 * has frames.
 */
ALWAYS_INLINE void unwind_by_loop(struct sample_scratch *scratch, u32 calls)
{
	struct frame_context context = { .scratch = scratch, .cache = this_cpu_rule_cache() };

	if (context.cache)
		bpf_loop(calls, each_frame, &context, 0);
}

/*
 * Unwinds the share of one link in a chain of tail calls, for kernels without bpf_loop. True: the stack goes on, and a call
 * is left for it.
 */
ALWAYS_INLINE bool unwind_link(struct sample_scratch *scratch)
{
	struct rule_cache *cache = this_cpu_rule_cache();
	bool more = cache;

	for (u32 i = 0; i < CHAIN_FRAMES && more; i++)
		more = unwind_frame(scratch, cache);
	return more && ++scratch->chain_calls < CHAIN_CALLS;
}

/* Writes the unwound user stack into the sample. */
ALWAYS_INLINE void end_unwind(struct sample_scratch *scratch)
{
	scratch->sample.list_layout = scratch->unwind.how.layout;
	if (scratch->unwind.raw) {
		scratch->sample.list_words = scratch->unwind.frames;
		return;
	}
	scratch->sample.user_frames = scratch->unwind.frames;
	scratch->sample.user_end = scratch->unwind.end;
	scratch->sample.guessed_from = scratch->unwind.guessed_from;
}

/* Counts a sample as taken. What becomes of it is counted by end_sample. */
ALWAYS_INLINE void take_sample(struct counters *counters, u64 rules)
{
	counters->open = __builtin_popcountll(rules);
	counters->taken += __builtin_popcountll(rules);
}

/* Counts what became of a sample that was taken: `counter` is `sent` or one of those for lost samples. */
ALWAYS_INLINE void end_sample(struct counters *counters, u64 *counter, u64 rules)
{
	*counter += __builtin_popcountll(rules);
	counters->open = 0;
}

/* Words of all frames of a sample. */
ALWAYS_INLINE u64 slots_of(const struct sample *sample)
{
	return sample->kernel_frames + sample->user_frames + sample->list_words;
}

/* Sends a sample, unless it would take the space that lifecycle events need. `max` is the size of its buffer. */
ALWAYS_INLINE void send_sample(struct counters *counters, struct sample *record, u64 max, bool wake)
{
	u64 rules = record->event.rules;
	u64 size = sizeof(*record) + (slots_of(record) + record->context_words) * sizeof(u64);
	u64 fill = bpf_ringbuf_query(&events, BPF_RB_AVAIL_DATA);
	u64 flags = wake || fill >= settings.ring_wake ? BPF_RB_FORCE_WAKEUP : BPF_RB_NO_WAKEUP;

	record->cpu = bpf_get_smp_processor_id();
	record->sequence = counters->sent;
	barrier_var(size);
	if (size > max || fill + size > settings.ring_sample_limit || bpf_ringbuf_output(&events, record, size, flags))
		end_sample(counters, &counters->lost_ring_full, rules);
	else
		end_sample(counters, &counters->sent, rules);
}

/* Where the programs build a record of a function. Writer and reader: the sampling programs. */
struct {
	__uint(type, BPF_MAP_TYPE_PERCPU_ARRAY);
	__uint(max_entries, 1);
	__type(key, u32);
	__type(value, struct function_record);
} function_scratch SEC(".maps");

ALWAYS_INLINE struct function_record *this_cpu_function(void)
{
	u32 zero = 0;

	return bpf_map_lookup_elem(&function_scratch, &zero);
}

/* Copies up to `max` bytes of a text. Returns the bytes that it copied. */
ALWAYS_INLINE u32 copy_text(void *to, u64 max, const struct list_frames *how, u32 text, u64 at)
{
	u64 length = 0, bytes;

	if (!read_user(&length, at + how->text_length * sizeof(u64)))
		return 0;
	if (length > max)
		length = max;
	bytes = how->text_header[text] + (length << (how->text_shift[text] & 3));
	if (bytes > max)
		bytes = max;
	barrier_var(bytes);
	if (bytes <= max && !bpf_probe_read_user(to, bytes, (void *)at))
		return bytes;
	/* The text is near the end of memory, and the shift too large for it. */
	bytes = how->text_header[text] + length;
	if (bytes > max)
		bytes = max;
	barrier_var(bytes);
	if (bytes <= max && !bpf_probe_read_user(to, bytes, (void *)at))
		return bytes;
	return 0;
}

/*
 * Copies the texts of one function of a young process into the ring buffer, before the first sample that has it. False: its
 * memory cannot be read, or the ring buffer has no room.
 */
ALWAYS_INLINE bool send_function(struct sample_scratch *scratch, u32 number, struct function_record *record)
{
	struct list_frames *how = &scratch->unwind.how;
	u64 object = scratch->unwind.new_function[number % MAX_NEW_FUNCTIONS].object, size;
	u64 bytes = how->object_bytes, fill = bpf_ringbuf_query(&events, BPF_RB_AVAIL_DATA);

	record->event = scratch->sample.event;
	record->event.kind = EVENT_FUNCTION;
	record->object = object;
	record->sum = scratch->unwind.new_function[number % MAX_NEW_FUNCTIONS].sum;
	barrier_var(bytes);
	if (bytes > sizeof(record->object_copy) || bpf_probe_read_user(record->object_copy, bytes, (void *)object))
		return false;
	record->object_bytes = bytes;
	for (u32 i = 0; i < LIST_TEXTS; i++) {
		u64 word = how->text[i];

		barrier_var(word);
		if (word >= FUNCTION_OBJECT_BYTES / sizeof(u64))
			return false;
		record->at[i] = ((u64 *)record->object_copy)[word];
	}
	record->bytes[0] = copy_text(record->name, sizeof(record->name), how, 0, record->at[0]);
	record->bytes[1] = copy_text(record->file, sizeof(record->file), how, 1, record->at[1]);
	record->bytes[2] = copy_text(record->lines, sizeof(record->lines), how, 2, record->at[2]);
	size = record->bytes[2];
	barrier_var(size);
	if (size > sizeof(record->lines) || fill + sizeof(*record) > settings.ring_sample_limit)
		return false;
	return !bpf_ringbuf_output(&events, record, __builtin_offsetof(struct function_record, lines) + size,
				   BPF_RB_NO_WAKEUP);
}

/*
 * Does what send_function() does. Global, so that it is verified once and not for each of the functions; returns a number,
 * as a global function must.
 */
__attribute__((noinline)) int call_send_function(u32 number)
{
	struct sample_scratch *scratch = this_cpu_scratch();
	struct function_record *record = this_cpu_function();

	return scratch && record && send_function(scratch, number, record);
}

/* `by_loop`: the kernel has bpf_loop. A chain of tail calls calls no functions: some kernels refuse the mixture. */
ALWAYS_INLINE void send_functions(struct counters *counters, struct sample_scratch *scratch, bool by_loop)
{
	struct function_record *record;
	struct function_key key;

	if (!scratch->unwind.new_functions)
		return;
	record = this_cpu_function();
	for (u32 i = 0; record && i < MAX_NEW_FUNCTIONS; i++) {
		if (i >= scratch->unwind.new_functions)
			break;
		if (by_loop ? call_send_function(i) : send_function(scratch, i, record))
			continue;
		/* The next sample that has it tries again. */
		counters->functions_unsent++;
		fill_function_key(&key, &scratch->unwind, scratch->unwind.new_function[i % MAX_NEW_FUNCTIONS].object,
				  scratch->unwind.new_function[i % MAX_NEW_FUNCTIONS].sum);
		bpf_map_delete_elem(&copied_functions, &key);
	}
}

ALWAYS_INLINE void send_tick(struct counters *counters, struct sample_scratch *scratch)
{
	if (settings.contexts)
		add_context(counters, &scratch->sample, &scratch->unwind.context, scratch->frames,
			    slots_of(&scratch->sample), FRAME_SLOTS + CONTEXT_SLOTS);
	send_sample(counters, &scratch->sample, SAMPLE_BYTES, scratch->wake);
}

/* Notes in `procs` that this image is sampled. True: it was not before, and the agent does not know its mappings. */
ALWAYS_INLINE bool note_sampled(struct counters *counters, struct task_struct *task, u32 tgid, struct proc *proc,
				const struct current *now)
{
	bool first = true;

	if (proc && proc->start_boottime == now->start_boottime) {
		first = !proc->sampled && !(proc->reported && settings.mappings_reported);
		proc->sampled = 1;
	} else if (!is_exiting(task)) {
		/* A thread that is about to exit is not entered: no program would remove the entry again. */
		struct proc fresh = {
			.start_boottime = now->start_boottime,
			.exec_id = now->exec_id,
			.sampled = 1,
		};

		if (bpf_map_update_elem(&procs, &tgid, &fresh, BPF_ANY))
			counters->procs_full++;
	}
	return first;
}

/*
 * Decides whether a tick makes a sample, and takes all of it but the unwound stack. Null: nothing is left to do. `by_loop`: the
 * kernel has bpf_loop.
 */
ALWAYS_INLINE struct sample_scratch *begin_tick(struct bpf_perf_event_data *ctx, struct counters *counters,
						bool by_loop)
{
	struct sample_scratch *scratch;
	struct want want = {};
	struct task_struct *task;
	struct image *image;
	struct proc *proc;
	u32 tgid = bpf_get_current_pid_tgid() >> 32;
	struct current now;
	bool first;

	if (!settings.sampling)
		return NULL;
	counters->ticks++;
	note_tick(ctx, counters);
	if (!tgid) {
		counters->idle_ticks++;
		return NULL;
	}
	task = (void *)bpf_get_current_task();
	proc = bpf_map_lookup_elem(&procs, &tgid);
	if (!proc && is_exiting(task))
		proc = bpf_map_lookup_elem(&exiting, &tgid);
	if (!may_be_wanted(proc, tgid))
		return NULL;

	read_current(&now, task);
	want_of_process(&want, proc, tgid, now.start_boottime, now.exec_id);
	/* There is one clock for each rate in use; a process follows the fastest that a rule asks for. */
	want.rules = rules_of_span(want.rules & settings.on_cpu_rules, tgid, &now);
	if (!want.rules || want.period_ns != ctx->sample_period)
		return NULL;
	take_sample(counters, want.rules);
	first = note_sampled(counters, task, tgid, proc, &now);

	scratch = this_cpu_scratch();
	if (!scratch)
		return NULL;
	begin_sample(&scratch->sample, 0, want.rules, want.period_ns, task, &now);
	/* A process that was not sampled before may soon be gone: the agent must inspect it now. */
	scratch->wake = first;
	scratch->unwind.context.form = CONTEXT_UNREAD;
	if (settings.labels && !now.kernel_thread)
		send_labels(counters, &scratch->sample.event, by_loop);
	if (OF_USER_MODE(&ctx->regs)) {
		scratch->sample.kernel_frames = 0;
	} else {
		take_kernel_stack(ctx, &scratch->sample, scratch->frames, 0);
	}
	if (!settings.tables || !settings.user_stacks) {
		take_user_stack(ctx, scratch, task, now.kernel_thread);
		send_tick(counters, scratch);
		return NULL;
	}

	if (now.kernel_thread || !read_user_registers(task, &scratch->unwind)) {
		if (!now.kernel_thread)
			scratch->sample.user_end = USER_STACK_NOT_64_BIT;
		send_tick(counters, scratch);
		return NULL;
	}
	/* There is a new image without a program counter yet: the registers are zero, or still those of the former image. */
	if (!scratch->unwind.pc || (!OF_USER_MODE(&ctx->regs) && in_execve(task))) {
		send_tick(counters, scratch);
		return NULL;
	}
	begin_lists(&scratch->unwind, tgid, now.start_boottime, now.exec_id,
		    scratch->sample.event.ktime - now.start_boottime < YOUNG_NS);
	scratch->chain_calls = 0;
	image = image_of(tgid, &now);
	if (!image) {
		/* An execve that is not reported yet may still have the former image's registers. */
		if ((OF_USER_MODE(&ctx->regs) || !proc || proc->start_boottime != now.start_boottime ||
		     proc->exec_id == now.exec_id) &&
		    begin_raw(counters, scratch))
			return scratch;
		send_tick(counters, scratch);
		return NULL;
	}
	begin_unwind(&scratch->unwind, image);
	return scratch;
}

/*
 * Takes the stack raw if it reaches a library that the agent does not know yet, or a table that it has evicted. The agent must
 * inspect the process now: after its exit, no source could say what was mapped there. Also takes it raw if it reaches generated
 * code that only the agent can unwind. True: unwind_frame takes the list frames.
 */
ALWAYS_INLINE bool goes_on_raw(struct counters *counters, struct sample_scratch *scratch)
{
	u8 end = scratch->unwind.end;

	if (scratch->unwind.raw ||
	    (end != USER_STACK_NO_MAPPING && end != USER_STACK_NO_TABLE && end != USER_STACK_RAW))
		return false;
	/* The agent knows generated code already. */
	scratch->wake |= end != USER_STACK_RAW;
	return begin_raw(counters, scratch);
}

/* Does what is left to do once the stack is unwound. */
ALWAYS_INLINE void finish_tick(struct counters *counters, struct sample_scratch *scratch, bool by_loop)
{
	end_unwind(scratch);
	send_functions(counters, scratch, by_loop);
	send_tick(counters, scratch);
}

#endif
