//! Names for frames.

mod elf;
mod file;

pub use elf::ElfError;
pub use file::{FileId, FileMapping, FileTable, FileTableStats, MappedFile};
