//! The sources of names, one file each.

pub(super) mod jitdump;
pub(super) mod kallsyms;
pub(super) mod perf_map;
mod symbol_table;
