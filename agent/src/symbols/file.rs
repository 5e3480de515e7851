//! Files that are mapped into processes.

use std::fs::File;

/// An executable file that some process maps, held open: what it is called may be deleted or replaced.
#[derive(Debug)]
pub struct MappedFile {
    /// The path as the process sees it, without ` (deleted)`.
    pub path: String,
    /// Device number of the file system.
    pub dev: u64,
    /// Inode number.
    pub inode: u64,
    /// The open file; none where it could not be opened.
    pub file: Option<File>,
    /// Lower-case hex of the GNU build id, else the Go build id, else empty.
    pub build_id: String,
}
