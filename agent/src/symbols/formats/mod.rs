//! The sources of names, one file each.

pub(super) mod dwarf;
pub(super) mod elf;
pub(super) mod go;
pub(super) mod jitdump;
pub(super) mod kallsyms;
pub(super) mod perf_map;
mod symbol_search;
mod symbol_table;
