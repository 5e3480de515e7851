//! Names for frames.

mod file;

pub use file::MappedFile;
