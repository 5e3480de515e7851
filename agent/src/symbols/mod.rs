//! Names for frames: the function at an address of a program, a library, the kernel, or code made at run time.
//!
//! [`Symbolizer`] is a handle to the one thread that turns raw profiles into finished ones. `naming` builds the profiles.
//! `finder` decides which source names an address, and `formats` reads the sources. Any user of the node may have written
//! what is read, so every reader here is bounded.

mod debug_file;
mod debug_info;
mod finder;
mod formats;
#[doc(hidden)]
pub mod fuzz;
mod names;
mod naming;
mod offers;
mod options;
mod symbolizer;
mod vdso;

pub(crate) use self::{
    debug_file::find as find_debug_file,
    naming::{KERNEL_MAPPING, OFF_CPU_TYPE},
    offers::offered_files,
    vdso::vdso_image,
};
pub use gannet_symbols::dwarf::{DEBUG_INFO_VERB, read_debug_info};
pub use offers::OfferedFile;

pub use self::{
    options::{DebugCost, Skipped, SymbolizerConfig, SymbolizerStats},
    symbolizer::{Symbolizer, SymbolizerError},
};
