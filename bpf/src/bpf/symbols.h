/* SPDX-License-Identifier: GPL-2.0 OR BSD-2-Clause */
/* Names of kernel functions, for the agent: the kernel knows them by address, and `/proc/kallsyms` only all at once. */
#ifndef SYMBOLS_H
#define SYMBOLS_H

#include "maps.h"

/* Addresses and their names. Writers: the agent (addresses), name_symbols (texts). Reader: the agent. */
struct {
	__uint(type, BPF_MAP_TYPE_ARRAY);
	__uint(max_entries, 1);
	__type(key, u32);
	__type(value, struct symbol_names);
} symbol_names SEC(".maps");

/* Returns the number of addresses that it has named, 0 on kernels that cannot do it (before 5.13). */
ALWAYS_INLINE u32 name_all_symbols(void)
{
	static const char format[] = "%ps";
	u32 zero = 0, done = 0;
	struct symbol_names *names = bpf_map_lookup_elem(&symbol_names, &zero);

	if (!names || !bpf_core_enum_value_exists(enum bpf_func_id, BPF_FUNC_snprintf))
		return 0;
	for (u32 i = 0; i < SYMBOL_BATCH; i++) {
		u64 address;

		if (i >= names->count)
			break;
		address = names->address[i];
		names->texts[i * SYMBOL_TEXT_LEN] = 0;
		bpf_snprintf(&names->texts[i * SYMBOL_TEXT_LEN], SYMBOL_TEXT_LEN, format, &address, sizeof(address));
		done++;
	}
	return done;
}

#endif
