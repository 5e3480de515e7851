/* SPDX-License-Identifier: GPL-2.0 OR BSD-2-Clause */
/* The span in which a thread works, as its program publishes it (OTEP 4947); see struct thread_context. */
#ifndef CONTEXT_H
#define CONTEXT_H

#include "unwind.h"

/* Where programs keep the spans of their threads, by thread group id. Writer: the agent. Size: by --processes. */
struct {
	__uint(type, BPF_MAP_TYPE_HASH);
	__uint(max_entries, 4096);
	__type(key, u32);
	__type(value, struct thread_context);
} thread_contexts SEC(".maps");

/* Where the programs build a record of a span. Writer and reader: the sampling programs. */
struct {
	__uint(type, BPF_MAP_TYPE_PERCPU_ARRAY);
	__uint(max_entries, 1);
	__type(key, u32);
	__type(value, struct context_record);
} context_scratch SEC(".maps");

/* Reads the head of the current thread's record. Returns the address of the record; 0: there is none that is valid. */
ALWAYS_INLINE u64 read_context(struct context_record *record, u32 tgid, u64 start_boottime, u32 exec_id)
{
	struct thread_context *source = bpf_map_lookup_elem(&thread_contexts, &tgid);
	u64 at;

	if (!source || source->start_boottime != start_boottime || source->exec_id != exec_id)
		return 0;
	if (!read_user(&at, thread_pointer() + source->thread_offset) || !at)
		return 0;
	if (source->by_module) {
		/* A thread that has not touched the variables of the module has no block of them: the word is no address then. */
		if (!read_user(&at, at + source->module_at) || !read_user(&at, at + source->variable_at) || !at)
			return 0;
	}
	if (bpf_probe_read_user(&record->head, sizeof(record->head), (void *)at) || record->head.valid != CONTEXT_VALID)
		return 0;
	return at;
}

/* Whether the current thread works in a span. */
ALWAYS_INLINE bool is_in_span(u32 tgid, u64 start_boottime, u32 exec_id)
{
	u32 zero = 0;
	struct context_record *record = bpf_map_lookup_elem(&context_scratch, &zero);

	if (!record || !read_context(record, tgid, start_boottime, exec_id))
		return false;
	for (u32 i = 0; i < sizeof(record->head.span_id); i++)
		if (record->head.span_id[i])
			return true;
	return false;
}

/* Copies the span of the current thread into the ring buffer, before its sample. */
ALWAYS_INLINE void send_context(struct counters *counters, const struct event *event)
{
	u32 zero = 0;
	struct context_record *record = bpf_map_lookup_elem(&context_scratch, &zero);
	u64 at = 0, size, fill;

	if (record)
		at = read_context(record, event->tgid, event->start_boottime, event->exec_id);
	if (!at)
		return;
	size = record->head.bytes;
	if (size > CONTEXT_BYTES) {
		size = CONTEXT_BYTES;
		counters->labels_cut++;
	}
	barrier_var(size);
	/* The ids count without the attributes too. */
	if (size && size <= CONTEXT_BYTES &&
	    bpf_probe_read_user(record->attributes, size, (void *)(at + sizeof(record->head))))
		size = 0;
	record->event = *event;
	record->event.kind = EVENT_CONTEXT;
	fill = bpf_ringbuf_query(&events, BPF_RB_AVAIL_DATA);
	barrier_var(size);
	if (size > CONTEXT_BYTES || fill + sizeof(*record) > settings.ring_sample_limit ||
	    bpf_ringbuf_output(&events, record, __builtin_offsetof(struct context_record, attributes) + size,
			       BPF_RB_NO_WAKEUP))
		counters->labels_unsent++;
}

#endif
