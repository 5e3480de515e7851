//! Names for frames: which function an address belongs to, in a program, a library, the kernel, or code made at run time.
//!
//! `file` holds the mapped files open, `symbolizer` is the one thread that turns a raw profile into a finished one. What
//! it reads was written by whoever runs on the node, so every reader here is bounded.

mod debug_file;
mod demangle;
mod dwarf;
mod go;
mod kallsyms;
mod perf_map;
mod symbol_finder;
mod symbolizer;
mod table;

pub(crate) use debug_file::find as find_debug_file;
pub use dwarf::{DEBUG_INFO_VERB, read_debug_info};
pub use symbolizer::{
    ANONYMOUS_MAPPING, BROKEN_FRAME, DebugCost, KERNEL_MAPPING, NOT_WALKED_FRAME, Symbolizer,
    SymbolizerConfig, SymbolizerError, SymbolizerStats, TRUNCATED_FRAME, VDSO_MAPPING,
};
