//! Executable files that processes map.

use std::{
    fs::{self, File},
    io,
    os::{fd::AsRawFd as _, unix::fs::OpenOptionsExt as _},
    sync::atomic::{AtomicU64, Ordering},
};

use gannet_elf::{Headers, Segments};

/// The number of one opened file. Caches of symbols and unwind tables use it as their key: unlike a path, an inode or a
/// descriptor it never names another file later.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct FileId(u64);

impl FileId {
    fn next() -> Self {
        // Not a metric: the next number.
        static NEXT: AtomicU64 = AtomicU64::new(1);
        Self(NEXT.fetch_add(1, Ordering::Relaxed))
    }
}

/// An executable file that a process maps. It is held open, so that it can be read after its name was deleted or replaced.
#[derive(Debug)]
pub struct MappedFile {
    /// The key of its symbols and unwind tables.
    pub id: FileId,
    /// The path as the process sees it, without ` (deleted)`.
    pub path: String,
    /// Device number of the file system, as `/proc/PID/maps` shows it.
    pub dev: u64,
    /// Inode number, as `/proc/PID/maps` shows it.
    pub inode: u64,
    /// Holds the file; `None` if it could not be opened. It may be a path descriptor, which cannot be read: closing a readable
    /// one waits for some file systems, and the end of the agent must not.
    pub file: Option<File>,
    /// Lower-case hex of the GNU build id, else the Go build id, else empty.
    pub build_id: String,
    /// Locations of the bytes of an ELF file in memory; `None` for a file that is no ELF file of a supported kind.
    segments: Option<Segments>,
}

impl MappedFile {
    /// Builds a file that cannot be read: its frames keep their mapping and have no names.
    pub(crate) fn unopened(path: &str, dev: u64, inode: u64) -> Self {
        Self {
            id: FileId::next(),
            path: path.to_owned(),
            dev,
            inode,
            file: None,
            build_id: String::new(),
            segments: None,
        }
    }

    /// Builds a file from a descriptor, of any kind, and reads its ELF headers.
    pub fn opened(path: &str, dev: u64, inode: u64, file: File) -> Self {
        let headers = reopen(&file).ok().and_then(|readable| Headers::read(&readable).ok());
        let build_id = headers.as_ref().map(|headers| headers.build_ids.text()).unwrap_or_default();
        let segments = headers.map(|headers| headers.segments);
        Self { file: Some(file), build_id, segments, ..Self::unopened(path, dev, inode) }
    }

    /// Opens the file for reading. This, reading and closing it may wait for its file system without end.
    pub(crate) fn open_for_reading(&self) -> io::Result<File> {
        self.file.as_ref().map_or(Err(io::ErrorKind::NotFound.into()), reopen)
    }

    /// Reports whether it is an ELF file of this machine's kind.
    pub fn is_elf(&self) -> bool {
        self.segments.is_some()
    }

    /// Returns the virtual address, as the ELF file counts, of the byte at `offset` in the file. It is found through the
    /// loadable segment that holds the offset.
    pub(crate) fn address_of(&self, offset: u64) -> Option<u64> {
        self.segments.as_ref()?.vaddr_of_offset(offset)
    }
}

/// Opens the file of a descriptor again, for reading. Opening does not wait for a pipe or a device.
pub(crate) fn reopen(file: &File) -> io::Result<File> {
    let path = format!("/proc/self/fd/{}", file.as_raw_fd());
    fs::OpenOptions::new().read(true).custom_flags(libc::O_NONBLOCK).open(path)
}
