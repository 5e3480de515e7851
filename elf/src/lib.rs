//! A bounded reader of ELF files: the one reader of this repository.
//!
//! Unwind tables and symbol names come from files that any user of the node may have written. Every size in such a file is a
//! claim. So each read is checked against the file's length and against a limit before it allocates memory. No input makes this
//! crate panic or loop. The crate never maps a file into memory: the owner of a file can cut it short at any time, and touching
//! a page that is gone kills the process.
//!
//! [`Headers`] has the parts that the loader needs: segments and build ids. [`Elf`] adds the sections. [`Symbols`] and [`GoTable`]
//! read function names, [`GoLines`] also files and lines; [`ContentId`] identifies the content of a file, so that equal files share their results.
#![cfg_attr(test, allow(clippy::unwrap_used, clippy::expect_used, clippy::panic))]

mod build_id;
mod content_id;
mod data;
mod debug_file;
mod error;
mod file;
mod file_header;
mod go;
mod go_lines;
mod go_search;
mod headers;
mod sections;
mod segments;
mod symbols;
mod thread_local;

pub use build_id::{BuildId, BuildIds, ParseHexError};
pub use content_id::ContentId;
pub use data::Data;
pub use debug_file::{AlternateLink, DebugLink, checksum};
pub use error::{ElfError, ElfLimits, ElfQuantity, TooLarge};
pub use file::Elf;
pub use file_header::Arch;
pub use go::{GoFault, GoFunction, GoFunctions, GoRecord, GoTable};
pub use go_lines::{GoLine, GoLines};
pub use headers::Headers;
pub use sections::Section;
pub use segments::{Segment, Segments};
pub use symbols::{Binding, Symbol, Symbols};
pub use thread_local::{ThreadLocal, ThreadLocalAccess};
