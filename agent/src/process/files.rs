//! Files that are mapped into processes, held open so that they can be read when their process is gone and their name
//! deleted or given to another file.

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

/// How long a file that nobody holds stays open: the next process of a program that is started now and then finds it.
const IDLE: Duration = Duration::from_secs(300);

/// A line of `/proc/PID/maps` that maps a file.
#[derive(Clone, Copy, Debug)]
pub struct FileMapping<'a> {
    /// The process that maps it.
    pub tgid: u32,
    /// Its parent, whose root is looked into when the process is gone; 0 while unknown.
    pub parent: u32,
    /// First address.
    pub start: u64,
    /// Behind the last address.
    pub end: u64,
    /// The path as the process sees it, without ` (deleted)`.
    pub path: &'a str,
    /// Device number.
    pub dev: u64,
    /// Inode number.
    pub inode: u64,
}

/// The files that armed processes map, each opened once however many processes map it.
///
/// A file stays open while some image holds it, and after that until its place is wanted: the number of descriptors is
/// bounded, and no image ever loses a file that it has.
#[derive(Debug)]
pub struct FileTable {
    files: LruCache<Key, Entry>,
    stats: FileTableStats,
}

/// What the table has done.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct FileTableStats {
    /// Open now.
    pub open: usize,
    /// Files opened so far.
    pub opened: u64,
    /// Mappings whose file could not be opened: no permission, or the process was gone and the name with it.
    pub failed: u64,
    /// Mappings whose file was not opened because all places were held by images.
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

/// Tells a file from another that came to have the same device and inode number (the subvolumes of one btrfs share
/// both), and from what it was before it was written to.
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

    /// Unlinking changes the time of change of a file that is the same as before.
    fn is_same_content(&self, other: &Self) -> bool {
        (self.dev, self.inode, self.size, self.modified)
            == (other.dev, other.inode, other.size, other.modified)
    }
}

impl FileTable {
    /// A table that holds at most `most` files open.
    pub fn new(most: NonZeroUsize) -> Self {
        Self { files: LruCache::new(most), stats: FileTableStats::default() }
    }

    /// The file of a mapping. Where it cannot be had, a file without a descriptor, and it is counted.
    pub fn open(&mut self, mapping: &FileMapping<'_>) -> Arc<MappedFile> {
        let FileMapping { path, dev, inode, .. } = *mapping;
        let key = Key { dev, inode, path: path.to_owned() };
        if let Some(entry) = self.files.get_mut(&key) {
            entry.used = Instant::now();
            // The mapping says what file it is even after its name is gone; where it cannot be asked, the numbers must
            // do: an inode number is not given away while the file is open here.
            let current = fs::metadata(map_files_path(mapping)).map(|metadata| Stamp::of(&metadata));
            if current.map_or(true, |current| current.is_same_content(&entry.stamp)) {
                return Arc::clone(&entry.file);
            }
            self.files.pop(&key);
        }
        let (file, metadata) = match open(mapping) {
            Ok(opened) => opened,
            Err(error) => {
                tracing::debug!(tgid = mapping.tgid, path, %error, "a mapped file cannot be opened");
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

    /// What the table has done so far.
    pub fn stats(&self) -> FileTableStats {
        FileTableStats { open: self.files.len(), ..self.stats }
    }

    /// Closes what nobody has held or asked for in a long time: a file that is open keeps its place on the disk after it
    /// is deleted.
    pub fn close_idle(&mut self) {
        while let Some((_, entry)) = self.files.peek_lru()
            && entry.used.elapsed() >= IDLE
        {
            let Some((key, mut entry)) = self.files.pop_lru() else { return };
            if Arc::strong_count(&entry.file) > 1 {
                entry.used = Instant::now();
                self.files.put(key, entry);
            }
        }
    }

    /// Closes the file that was asked for the longest time ago among those that nobody holds.
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

/// By the mapping itself, which is right for deleted and replaced files and in every mount namespace; where that is not
/// allowed, or the process is gone, by the path inside of its root, its parent's, or the first process's, if what stands
/// there is the file that is mapped.
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
    // A device can be mapped too, and opening one can have effects.
    regular(&fs::metadata(&path)?)?;
    let file = fs::OpenOptions::new().read(true).custom_flags(libc::O_NONBLOCK).open(&path)?;
    let metadata = file.metadata()?;
    regular(&metadata)?;
    // What is mapped there may be another process's by now, or another image's. Some file systems show other numbers to
    // stat(2) than to the kernel; then the name must do.
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

/// Opens a regular file by its path inside of a process's root. The process chooses what is there: no link leads out of
/// its root, and a pipe or a device is not waited for.
pub(crate) fn open_in_root(tgid: u32, path: &str) -> io::Result<File> {
    let flags = OFlags::PATH | OFlags::CLOEXEC;
    let root = rustix::fs::open(format!("/proc/{tgid}/root"), flags, Mode::empty())?;
    let resolve = ResolveFlags::IN_ROOT | ResolveFlags::NO_MAGICLINKS;
    let place = rustix::fs::openat2(root.as_fd(), path, flags, Mode::empty(), resolve)?;
    let found = File::from(place);
    let metadata = found.metadata()?;
    regular(&metadata)?;
    // A path descriptor cannot be read, but leads to the very inode that was just looked at.
    let again = format!("/proc/self/fd/{}", found.as_raw_fd());
    fs::OpenOptions::new().read(true).custom_flags(libc::O_NONBLOCK).open(again)
}

fn regular(metadata: &fs::Metadata) -> io::Result<()> {
    let kind = metadata.file_type();
    if kind.is_file() { Ok(()) } else { Err(Errno::ACCESS.into()) }
}
