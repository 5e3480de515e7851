//! What is mapped into a process: the executable image as its samples saw it.

use std::sync::Arc;

use crate::symbols::MappedFile;

/// The executable mappings of one process in one exec generation, as one reading of `/proc/PID/maps` showed them.
#[derive(Debug, Default)]
pub struct Image {
    /// Sorted by `start`, disjoint.
    pub mappings: Vec<Mapping>,
}

/// One executable mapping.
#[derive(Clone, Debug)]
pub struct Mapping {
    /// First address.
    pub start: u64,
    /// Behind the last address.
    pub end: u64,
    /// Where `start` is in the file, in bytes; 0 for what is no file.
    pub offset: u64,
    /// What is mapped.
    pub kind: MappingKind,
}

/// What is mapped.
#[derive(Clone, Debug)]
pub enum MappingKind {
    /// A file, held open so that it can be read after the process is gone or the file is deleted.
    File(Arc<MappedFile>),
    /// The kernel's own shared object.
    Vdso,
    /// Executable memory without a file: the output of a just-in-time compiler.
    Anon,
}

impl Image {
    /// The mapping that holds `address`.
    pub fn find(&self, address: u64) -> Option<&Mapping> {
        let after = self.mappings.partition_point(|mapping| mapping.start <= address);
        self.mappings[..after].last().filter(|mapping| address < mapping.end)
    }
}
