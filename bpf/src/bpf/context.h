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

/* Bytes that are read at first: the head and a few short attributes, as most programs publish. */
#define CONTEXT_AT_ONCE 96

/* Looks up where an image publishes the spans of its threads. */
ALWAYS_INLINE void find_context(struct context_place *place, u32 tgid, u64 start_boottime, u32 exec_id)
{
	struct thread_context *source = bpf_map_lookup_elem(&thread_contexts, &tgid);

	if (source && source->start_boottime == start_boottime && source->exec_id == exec_id)
		*place = source->place;
	else
		place->form = CONTEXT_NONE;
}

/* Returns where the current thread's record is; 0: it has none. */
ALWAYS_INLINE u64 context_address(const struct context_place *place)
{
	u64 at;

	if (!place->form || !read_user(&at, thread_pointer() + place->thread_offset) || !at)
		return 0;
	if (place->form == CONTEXT_BY_MODULE) {
		/* A thread that has not touched the variables of the module has no block of them: the word is no address then. */
		if (!read_user(&at, at + place->module_at) || !read_user(&at, at + place->variable_at))
			return 0;
	}
	return at;
}

/* Whether the current thread works in a span. */
ALWAYS_INLINE bool is_in_span(u32 tgid, u64 start_boottime, u32 exec_id)
{
	struct context_place place = {};
	struct context_head head;
	u64 at;

	find_context(&place, tgid, start_boottime, exec_id);
	at = context_address(&place);
	if (!at || bpf_probe_read_user(&head, sizeof(head), (void *)at) || head.valid != CONTEXT_VALID)
		return false;
	for (u32 i = 0; i < sizeof(head.span_id); i++)
		if (head.span_id[i])
			return true;
	return false;
}

/* Of these rules, returns those that may sample the current thread: some do so only while it works in a span. */
ALWAYS_INLINE u64 rules_of_span(u64 rules, u32 tgid, const struct current *now)
{
	if (rules & settings.in_span_rules &&
	    !(settings.contexts && is_in_span(tgid, now->start_boottime, now->exec_id)))
		rules &= ~settings.in_span_rules;
	return rules;
}

/*
 * Adds the record of the current thread's span to its sample, behind the first `slot` words of `frames`. The sample may have `end`
 * words; behind them is room for a whole record. `place` is that of the image, if the sample's image was looked up.
 */
ALWAYS_INLINE void add_context(struct counters *counters, struct sample *sample, struct context_place *place,
			       u64 *frames, u64 slot, u64 end)
{
	u64 at, first = CONTEXT_AT_ONCE, size, room;
	struct context_head *head;

	if (place->form == CONTEXT_UNREAD)
		find_context(place, sample->event.tgid, sample->event.start_boottime, sample->event.exec_id);
	at = context_address(place);
	if (!at)
		return;
	barrier_var(slot);
	if (slot > FRAME_SLOTS || slot + sizeof(*head) / sizeof(u64) >= end) {
		counters->labels_unsent++;
		return;
	}
	head = (void *)&frames[slot];
	/* One read costs less than two. Behind a small record there may be no memory. */
	if (bpf_probe_read_user(head, CONTEXT_AT_ONCE, (void *)at)) {
		first = sizeof(*head);
		if (bpf_probe_read_user(head, sizeof(*head), (void *)at))
			return;
	}
	if (head->valid != CONTEXT_VALID)
		return;
	size = head->bytes;
	room = (end - slot) * sizeof(u64) - sizeof(*head);
	if (room > CONTEXT_BYTES)
		room = CONTEXT_BYTES;
	if (size > room) {
		size = room;
		counters->labels_cut++;
	}
	barrier_var(size);
	if (size > CONTEXT_BYTES)
		return;
	/* The ids count without the attributes too. */
	if (size + sizeof(*head) > first && bpf_probe_read_user(head + 1, size, (void *)(at + sizeof(*head))))
		size = 0;
	head->bytes = size;
	sample->context_words = (sizeof(*head) + size + sizeof(u64) - 1) / sizeof(u64);
}

#endif
