/* SPDX-License-Identifier: GPL-2.0 OR BSD-2-Clause */
/* Labels that programs give their own tasks, copied at the tick; see struct label_source. */
#ifndef LABELS_H
#define LABELS_H

#include "unwind.h"

/* Where programs keep the labels of their tasks, by thread group id. Writer: the agent. Size: by --processes. */
struct {
	__uint(type, BPF_MAP_TYPE_HASH);
	__uint(max_entries, 4096);
	__type(key, u32);
	__type(value, struct label_source);
} label_sources SEC(".maps");

/*
 * The same by executable, whose build says it all: the next process of it need not wait for the agent. See file_lists. Writer and
 * reader: the programs. Size: the different programs with labels of a node.
 */
struct {
	__uint(type, BPF_MAP_TYPE_LRU_HASH);
	__uint(max_entries, 1024);
	__type(key, struct exe_key);
	__type(value, struct label_source);
} file_labels SEC(".maps");

/* file_labels is not empty. */
u32 has_file_labels;

/* Address and length of name and of value. */
struct label_entry {
	u64 name;
	u64 name_bytes;
	u64 value;
	u64 value_bytes;
};

#define BUCKET_SLOTS 8
/* Marks of slots below this one: empty, or moved to the new buckets of a table that grows. */
#define FIRST_MARK 5

/* A bucket of a hash table whose keys and values are texts. */
struct label_bucket {
	u8 marks[BUCKET_SLOTS];
	u64 names[BUCKET_SLOTS][2];
	u64 values[BUCKET_SLOTS][2];
	u64 overflow;
};
_Static_assert(sizeof(struct label_bucket) == 272, "as Go lays it out");

/* The head of a hash table. */
struct label_table {
	u64 count;
	u8 flags;
	u8 bits;
	u16 overflows;
	u32 seed;
	u64 buckets;
	u64 old_buckets;
};
/* In its flags: it grows to as many buckets as before. */
#define SAME_SIZE_GROW 8

struct label_scratch {
	struct labels_record record;
	struct label_entry entries[MAX_LABELS];
	/* A walk through the buckets: the table, the next bucket, and the buckets that are left of its old or new ones. */
	struct label_table table;
	struct label_bucket bucket;
	u64 at;
	u64 left;
	/* Entries. */
	u32 found;
	/* Bytes of the record's texts. */
	u32 used;
	u32 is_cut;
};

/* More labels than any task has, or a number that cannot be read. */
#define UNKNOWN_LABELS 0xffffff

struct label_loop {
	struct label_scratch *scratch;
};

/* Where the programs build a record of labels. Writer and reader: the sampling programs. */
struct {
	__uint(type, BPF_MAP_TYPE_PERCPU_ARRAY);
	__uint(max_entries, 1);
	__type(key, u32);
	__type(value, struct label_scratch);
} label_scratch SEC(".maps");

/* The compiler must not keep in registers what is in memory: the verifier would tell states apart that are the same. */
#define forget_registers() asm volatile("" ::: "memory")

/*
 * Finds out where the process has its labels. A young one has them where the last process of its executable had them;
 * find_labels checks whether that fits.
 */
ALWAYS_INLINE struct label_source *find_label_source(const struct event *event)
{
	u32 tgid = event->tgid;
	struct label_source *source = bpf_map_lookup_elem(&label_sources, &tgid);
	struct exe_key key;

	if (source && source->start_boottime == event->start_boottime && source->exec_id == event->exec_id) {
		if (!source->is_shared && read_file_key(&key)) {
			/* If this fails, the next process of the file waits for the agent. */
			bpf_map_update_elem(&file_labels, &key, source, BPF_ANY);
			has_file_labels = 1;
			source->is_shared = 1;
		}
		return source;
	}
	if (!has_file_labels || event->ktime - event->start_boottime >= YOUNG_NS || !read_file_key(&key))
		return NULL;
	return bpf_map_lookup_elem(&file_labels, &key);
}

/* Finds the labels of the task that the thread runs; 0: it has none, or runs no task. */
ALWAYS_INLINE u64 find_labels(const struct label_source *source)
{
	u64 object, owner, current, found, labels;

	if (!read_user(&object, thread_pointer() + source->thread_offset) || !object)
		return 0;
	if (!read_user(&owner, object + source->owner) || !owner)
		return 0;
	if (!read_user(&current, owner + source->current) || !current)
		return 0;
	/* The thread is about to change tasks, or these are not the objects that the agent takes them for. */
	if (!read_user(&found, current + source->owner) || found != owner)
		return 0;
	return read_user(&labels, current + source->labels) ? labels : 0;
}

/* Reads where the texts are that an array leads to. */
ALWAYS_INLINE void read_array(struct label_scratch *scratch, u64 labels)
{
	u64 head[3], found, bytes;

	if (bpf_probe_read_user(head, sizeof(head), (void *)labels) || head[1] > head[2] || head[1] > UNKNOWN_LABELS)
		return;
	scratch->record.all = head[1];
	found = head[1] > MAX_LABELS ? MAX_LABELS : head[1];
	bytes = found * sizeof(struct label_entry);
	barrier_var(bytes);
	if (bytes && bytes <= sizeof(scratch->entries) &&
	    !bpf_probe_read_user(scratch->entries, bytes, (void *)head[0]))
		scratch->found = found;
}

/* Takes the texts of one slot of a bucket. */
ALWAYS_INLINE void take_slot(struct label_scratch *scratch, u32 slot)
{
	struct label_bucket *bucket = &scratch->bucket;
	u32 number = scratch->found;

	if (bucket->marks[slot] < FIRST_MARK || number >= MAX_LABELS)
		return;
	scratch->found = number + 1;
	barrier_var(number);
	number %= MAX_LABELS;
	scratch->entries[number].name = bucket->names[slot][0];
	scratch->entries[number].name_bytes = bucket->names[slot][1];
	scratch->entries[number].value = bucket->values[slot][0];
	scratch->entries[number].value_bytes = bucket->values[slot][1];
}

/* Takes the texts of the next bucket. False: there is none, or it cannot be read. */
ALWAYS_INLINE bool take_bucket(struct label_scratch *scratch)
{
	struct label_table *table = &scratch->table;

	if (!scratch->at || bpf_probe_read_user(&scratch->bucket, sizeof(scratch->bucket), (void *)scratch->at))
		return false;
	for (u32 slot = 0; slot < BUCKET_SLOTS; slot++) {
		take_slot(scratch, slot);
		forget_registers();
	}
	scratch->at = scratch->bucket.overflow;
	if (scratch->at)
		return true;
	scratch->left--;
	table->buckets += sizeof(scratch->bucket);
	/* While the table grows, each label is in an old bucket or in a new one. */
	if (!scratch->left && table->old_buckets) {
		scratch->left = 1ULL << (table->bits & 31) >> !(table->flags & SAME_SIZE_GROW);
		table->buckets = table->old_buckets;
		table->old_buckets = 0;
	}
	if (!scratch->left)
		return false;
	scratch->at = table->buckets;
	return true;
}

static long each_bucket(u32 index, struct label_loop *loop)
{
	return !take_bucket(loop->scratch);
}

/* Reads where the texts are that a hash table leads to. */
ALWAYS_INLINE void read_buckets(struct label_scratch *scratch, u64 labels, bool by_loop)
{
	struct label_loop loop = { .scratch = scratch };
	struct label_table *table = &scratch->table;
	u64 at;

	if (!read_user(&at, labels) || bpf_probe_read_user(table, sizeof(*table), (void *)at))
		return;
	scratch->record.all = table->count > UNKNOWN_LABELS ? UNKNOWN_LABELS : table->count;
	scratch->left = 1ULL << (table->bits & 31);
	scratch->at = table->buckets;
	if (by_loop) {
		bpf_loop(LABEL_BUCKETS, each_bucket, &loop, 0);
		return;
	}
	for (u32 i = 0; i < LABEL_BUCKETS; i++) {
		forget_registers();
		if (!take_bucket(scratch))
			break;
	}
}

/*
 * Copies a text behind the others. False: it cannot be read, or there is no room. There are few branches, because the verifier
 * walks through all of them for each text.
 */
ALWAYS_INLINE bool copy_label_text(struct label_scratch *scratch, u64 from, u64 bytes, u64 max, u16 *size)
{
	u64 at = scratch->used;
	/* The smaller one of both; no length has the highest bits. */
	s64 over = (bytes & 0xffffffff) - max;
	u64 is_cut;

	barrier_var(over);
	is_cut = (u64)-over >> 63;
	bytes = max + (over & (over >> 63));
	barrier_var(at);
	barrier_var(bytes);
	if (at > LABEL_TEXT_BYTES - LABEL_VALUE_BYTES)
		return false;
	if (bytes > LABEL_VALUE_BYTES)
		return false;
	if (bpf_probe_read_user(&scratch->record.texts[at], bytes, (void *)from))
		return false;
	scratch->used = at + bytes;
	scratch->is_cut |= is_cut;
	*size = bytes | is_cut * LABEL_IS_CUT;
	forget_registers();
	return true;
}

/* Copies the texts of an entry. False: it was the last one, cannot be read, or there is no room. */
ALWAYS_INLINE bool copy_label(struct label_scratch *scratch, u64 number)
{
	struct label_entry *entry;
	struct label_size *sizes;

	barrier_var(number);
	if (number >= scratch->found || number >= MAX_LABELS)
		return false;
	entry = &scratch->entries[number];
	sizes = &scratch->record.sizes[number];
	if (!copy_label_text(scratch, entry->name, entry->name_bytes, LABEL_NAME_BYTES, &sizes->name))
		return false;
	if (!copy_label_text(scratch, entry->value, entry->value_bytes, LABEL_VALUE_BYTES, &sizes->value))
		return false;
	scratch->record.count = number + 1;
	return true;
}

static long each_label(u32 index, struct label_loop *loop)
{
	return !copy_label(loop->scratch, index);
}

ALWAYS_INLINE void copy_labels(struct label_scratch *scratch, bool by_loop)
{
	struct label_loop loop = { .scratch = scratch };

	if (by_loop) {
		bpf_loop(MAX_LABELS, each_label, &loop, 0);
		return;
	}
	for (u32 i = 0; i < MAX_LABELS; i++) {
		forget_registers();
		if (!copy_label(scratch, i))
			break;
	}
}

/*
 * Copies the labels of the current task into the ring buffer, before its sample. `by_loop`: the kernel has bpf_loop. The verifier
 * walks through a loop of the program's own again for each round.
 */
ALWAYS_INLINE void send_labels(struct counters *counters, const struct event *event, bool by_loop)
{
	u32 zero = 0;
	struct label_source *source = find_label_source(event);
	struct label_scratch *scratch;
	u64 labels, size, fill;

	if (!source)
		return;
	labels = find_labels(source);
	scratch = labels ? bpf_map_lookup_elem(&label_scratch, &zero) : NULL;
	if (!scratch)
		return;
	scratch->found = 0;
	scratch->used = 0;
	scratch->is_cut = 0;
	scratch->record.count = 0;
	scratch->record.all = UNKNOWN_LABELS;
	if (source->form == LABELS_ARRAY)
		read_array(scratch, labels);
	else
		read_buckets(scratch, labels, by_loop);
	forget_registers();
	if (!scratch->record.all)
		return;
	copy_labels(scratch, by_loop);
	forget_registers();
	size = scratch->used;
	barrier_var(size);
	fill = bpf_ringbuf_query(&events, BPF_RB_AVAIL_DATA);
	scratch->record.event = *event;
	scratch->record.event.kind = EVENT_LABELS;
	if (!scratch->record.count || size > LABEL_TEXT_BYTES ||
	    fill + sizeof(scratch->record) > settings.ring_sample_limit ||
	    bpf_ringbuf_output(&events, &scratch->record, __builtin_offsetof(struct labels_record, texts) + size,
			       BPF_RB_NO_WAKEUP))
		counters->labels_unsent++;
	else if (scratch->is_cut || scratch->record.count != scratch->record.all)
		counters->labels_cut++;
}

#endif
