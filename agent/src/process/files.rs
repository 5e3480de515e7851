//! Files that processes map, held open so that they can be read after the process has exited and the name was deleted or
//! given to another file.

use std::{
    fs::{self, File},
    io,
    num::NonZeroUsize,
    os::{
        fd::{AsFd, AsRawFd},
        unix::fs::{MetadataExt, OpenOptionsExt},
    },
    sync::Arc,
    time::{Duration, Instant},
};

use lru::LruCache;
use rustix::{
    fs::{Mode, OFlags, ResolveFlags},
    io::Errno,
};

use crate::model::MappedFile;

/// How long a file that no image holds stays open, for the next process of a program that starts now and then.
const IDLE_TIMEOUT: Duration = Duration::from_secs(300);

/// A line of `/proc/PID/maps` that maps a file.
#[derive(Clone, Copy, Debug)]
pub struct FileMapping<'a> {
    /// The process that maps it.
    pub tgid: u32,
    /// Its parent; 0 while unknown. The file is searched in its root directory after the process has exited.
    pub parent: u32,
    /// First address, inclusive.
    pub start: u64,
    /// End address, exclusive.
    pub end: u64,
    /// The path as the process sees it, without ` (deleted)`.
    pub path: &'a str,
    /// Device number of its file system.
    pub dev: u64,
    /// Inode number on that device.
    pub inode: u64,
}

/// The files that sampled processes map, each opened once however many processes map it.
///
/// A file stays open while an image holds it, and then until another file needs its slot. So the number of descriptors is
/// bounded, and no image loses a file.
#[derive(Debug)]
pub struct FileTable {
    files: LruCache<Key, Entry>,
    stats: FileTableStats,
}

/// Counts of a [`FileTable`].
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct FileTableStats {
    /// Files that are open now.
    pub open: usize,
    /// Files opened so far.
    pub opened: u64,
    /// Mappings whose file could not be opened: no permission, or process and name were gone.
    pub failed: u64,
    /// Mappings whose file was not opened because images held all slots.
    pub refused: u64,
}

#[derive(Clone, Debug, PartialEq, Eq, Hash)]
struct Key {
    dev: u64,
    inode: u64,
    path: String,
}

#[derive(Debug)]
struct Entry {
    file: Arc<MappedFile>,
    stamp: Stamp,
    used: Instant,
}

/// Distinguishes a file from another one with the same device and inode number (subvolumes of one btrfs share both), and from
/// its own content before a write.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Stamp {
    dev: u64,
    inode: u64,
    size: u64,
    modified: (i64, i64),
    changed: (i64, i64),
}

impl Stamp {
    fn of(metadata: &fs::Metadata) -> Self {
        Self {
            dev: metadata.dev(),
            inode: metadata.ino(),
            size: metadata.size(),
            modified: (metadata.mtime(), metadata.mtime_nsec()),
            changed: (metadata.ctime(), metadata.ctime_nsec()),
        }
    }

    /// Compares all but the change time: unlinking a file changes that, and not its content.
    fn is_same_content(&self, other: &Self) -> bool {
        (self.dev, self.inode, self.size, self.modified)
            == (other.dev, other.inode, other.size, other.modified)
    }
}

impl FileTable {
    /// Builds a table that holds at most `max` files open.
    pub fn new(max: NonZeroUsize) -> Self {
        Self { files: LruCache::new(max), stats: FileTableStats::default() }
    }

    /// Returns the file of a mapping. If it cannot be opened, counts that and returns a file without a descriptor.
    pub fn open(&mut self, mapping: &FileMapping<'_>) -> Arc<MappedFile> {
        let FileMapping { path, dev, inode, .. } = *mapping;
        let key = Key { dev, inode, path: path.to_owned() };
        if let Some(entry) = self.files.get_mut(&key) {
            entry.used = Instant::now();
            // The mapping leads to its file even after the name was deleted. If it cannot be opened, the numbers decide: the
            // kernel does not reuse an inode number while the file is open here.
            let current = fs::metadata(map_files_path(mapping)).map(|metadata| Stamp::of(&metadata));
            if current.map_or(true, |current| current.is_same_content(&entry.stamp)) {
                return Arc::clone(&entry.file);
            }
            self.files.pop(&key);
        }
        let (file, metadata) = match open(mapping) {
            Ok(opened) => opened,
            Err(error) => {
                tracing::debug!(tgid = mapping.tgid, path, %error, "cannot open a mapped file");
                self.stats.failed += 1;
                return Arc::new(MappedFile::unopened(path, dev, inode));
            }
        };
        if self.files.len() == self.files.cap().get() && !self.make_room() {
            self.stats.refused += 1;
            return Arc::new(MappedFile::unopened(path, dev, inode));
        }
        let file = Arc::new(MappedFile::opened(path, dev, inode, file));
        self.stats.opened += 1;
        self.files
            .put(key, Entry { file: Arc::clone(&file), stamp: Stamp::of(&metadata), used: Instant::now() });
        file
    }

    /// Returns the counts so far.
    pub fn stats(&self) -> FileTableStats {
        FileTableStats { open: self.files.len(), ..self.stats }
    }

    /// Closes files that no image has held or asked for since [`IDLE_TIMEOUT`]: a deleted file takes disk space while it is
    /// open.
    pub(crate) fn close_idle(&mut self) {
        while let Some((_, entry)) = self.files.peek_lru()
            && entry.used.elapsed() >= IDLE_TIMEOUT
        {
            let Some((key, mut entry)) = self.files.pop_lru() else { return };
            if Arc::strong_count(&entry.file) > 1 {
                entry.used = Instant::now();
                self.files.put(key, entry);
            }
        }
    }

    /// Closes the least recently used file that no image holds; returns false if there is none.
    fn make_room(&mut self) -> bool {
        let idle = self.files.iter().rev().find(|(_, entry)| Arc::strong_count(&entry.file) == 1);
        match idle.map(|(key, _)| key.clone()) {
            Some(key) => self.files.pop(&key).is_some(),
            None => false,
        }
    }
}

fn map_files_path(mapping: &FileMapping<'_>) -> String {
    format!("/proc/{}/map_files/{:x}-{:x}", mapping.tgid, mapping.start, mapping.end)
}

/// Opens the file of a mapping through the mapping itself, which works for deleted and replaced files and in every mount
/// namespace. If that is forbidden, or the process has exited, opens the path in the root directory of the process, its parent
/// or process 1, if the file there has the numbers of the mapped one.
fn open(mapping: &FileMapping<'_>) -> io::Result<(File, fs::Metadata)> {
    open_exact(mapping).or_else(|error| {
        [mapping.tgid, mapping.parent, 1]
            .into_iter()
            .filter(|root| *root != 0)
            .find_map(|root| {
                let file = open_in_root(root, mapping.path).ok()?;
                let metadata = file.metadata().ok()?;
                let same = (metadata.dev(), metadata.ino()) == (mapping.dev, mapping.inode);
                same.then_some((file, metadata))
            })
            .ok_or(error)
    })
}

fn open_exact(mapping: &FileMapping<'_>) -> io::Result<(File, fs::Metadata)> {
    let path = map_files_path(mapping);
    // A device can be mapped too, and opening a device can have effects.
    regular(&fs::metadata(&path)?)?;
    let file = fs::OpenOptions::new().read(true).custom_flags(libc::O_NONBLOCK).open(&path)?;
    let metadata = file.metadata()?;
    regular(&metadata)?;
    // Another process or image may have the addresses by now. Some file systems show other numbers to stat(2) than to the
    // kernel; then the name decides.
    let same_numbers = metadata.ino() == mapping.inode;
    let same_name = || {
        let name = fs::read_link(&path).unwrap_or_default();
        let name = name.to_string_lossy();
        name.strip_suffix(" (deleted)").unwrap_or(&name) == mapping.path
    };
    if same_numbers || (metadata.dev() != mapping.dev && same_name()) {
        Ok((file, metadata))
    } else {
        Err(Errno::STALE.into())
    }
}

/// Opens a regular file by its path in the root directory of a process. The process controls that directory, so no link may
/// lead out of it, and opening must not block on a pipe or a device.
pub(crate) fn open_in_root(tgid: u32, path: &str) -> io::Result<File> {
    let flags = OFlags::PATH | OFlags::CLOEXEC;
    let root = rustix::fs::open(format!("/proc/{tgid}/root"), flags, Mode::empty())?;
    let resolve = ResolveFlags::IN_ROOT | ResolveFlags::NO_MAGICLINKS;
    let file = File::from(rustix::fs::openat2(root.as_fd(), path, flags, Mode::empty(), resolve)?);
    let metadata = file.metadata()?;
    regular(&metadata)?;
    // A path descriptor cannot be read, but it leads to the inode that was just checked.
    let again = format!("/proc/self/fd/{}", file.as_raw_fd());
    fs::OpenOptions::new().read(true).custom_flags(libc::O_NONBLOCK).open(again)
}

fn regular(metadata: &fs::Metadata) -> io::Result<()> {
    let kind = metadata.file_type();
    if kind.is_file() { Ok(()) } else { Err(Errno::ACCESS.into()) }
}
