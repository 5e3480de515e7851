//! Files that processes map, held open so that they can be read after the process has exited and the name was deleted or
//! given to another file.

use std::{
    collections::BTreeMap,
    fs::{self, File},
    io,
    num::NonZeroUsize,
    os::{fd::AsFd as _, unix::fs::MetadataExt as _},
    sync::Arc,
    time::{Duration, Instant},
};

use lru::LruCache;
use rustix::{
    fs::{Mode, OFlags, ResolveFlags},
    io::Errno,
};

use super::proc;
use crate::{
    access::{self, ENGINE_DEADLINE, Target},
    model::{MappedFile, reopen},
};

/// Mappings whose files a worker opens in one call: all of them are done well before the deadline.
const MAX_REQUESTS: usize = 2048;
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
    /// Mappings whose file was not opened because its file system or the process did not answer.
    pub unanswered: u64,
}

/// The files of some mappings.
pub(super) struct OpenedFiles {
    /// One for each mapping.
    pub(super) files: Vec<Arc<MappedFile>>,
    /// A file system or the process did not answer: some files are not open that may be open later.
    pub(super) unanswered: bool,
}

/// A file to open, or to check.
struct Request {
    /// Its position among all.
    index: usize,
    start: u64,
    end: u64,
    key: Key,
    /// The stamp of the file that is open under this key.
    known: Option<Stamp>,
}

impl Request {
    fn copy(&self) -> Self {
        Self { key: self.key.clone(), ..*self }
    }

    fn mapping(&self, tgid: u32, parent: u32) -> FileMapping<'_> {
        let Key { dev, inode, path } = &self.key;
        FileMapping { tgid, parent, start: self.start, end: self.end, path, dev: *dev, inode: *inode }
    }
}

/// The result of a [`Request`].
enum Answer {
    /// The file that is open already.
    Same,
    Opened(Box<MappedFile>, Stamp),
    Failed(io::Error),
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
        let opened = self.open_all(mapping.tgid, mapping.parent, std::iter::once(*mapping)).files.pop();
        opened.unwrap_or_else(|| Arc::new(MappedFile::unopened(mapping.path, mapping.dev, mapping.inode)))
    }

    /// Returns the files of mappings of one process, in their order. Workers make the calls on the files, in a bounded time.
    pub(super) fn open_all<'a>(
        &mut self,
        tgid: u32,
        parent: u32,
        mappings: impl Iterator<Item = FileMapping<'a>>,
    ) -> OpenedFiles {
        let mut requests: BTreeMap<u64, Vec<Request>> = BTreeMap::new();
        let mut files = Vec::new();
        for (index, mapping) in mappings.enumerate() {
            let FileMapping { start, end, path, dev, inode, .. } = mapping;
            let key = Key { dev, inode, path: path.to_owned() };
            let known = self.files.get_mut(&key).map(|entry| {
                entry.used = Instant::now();
                entry.stamp
            });
            requests.entry(dev).or_default().push(Request { index, start, end, key, known });
            files.push(None);
        }
        let mut opened = OpenedFiles { files: Vec::with_capacity(files.len()), unanswered: false };
        for (dev, mut requests) in requests {
            while !requests.is_empty() {
                let part = requests.split_off(requests.len().saturating_sub(MAX_REQUESTS));
                match open_part(tgid, parent, dev, part) {
                    Ok(answers) => {
                        for (request, answer) in answers {
                            files[request.index] = Some(self.take(request.key, answer));
                        }
                    }
                    Err(part) => {
                        opened.unanswered = true;
                        self.stats.unanswered += part.len() as u64;
                        for Request { index, key: Key { dev, inode, path }, .. } in part {
                            files[index] = Some(Arc::new(MappedFile::unopened(&path, dev, inode)));
                        }
                    }
                }
            }
        }
        opened.files.extend(files.into_iter().flatten());
        opened
    }

    /// Enters the answer of a worker. Returns the file of the mapping.
    fn take(&mut self, key: Key, answer: Answer) -> Arc<MappedFile> {
        let unopened = |key: &Key| Arc::new(MappedFile::unopened(&key.path, key.dev, key.inode));
        let (file, stamp) = match answer {
            Answer::Same => match self.files.get(&key) {
                Some(entry) => return Arc::clone(&entry.file),
                None => return unopened(&key),
            },
            Answer::Failed(error) => {
                tracing::debug!(path = key.path, %error, "cannot open a mapped file");
                self.stats.failed += 1;
                return unopened(&key);
            }
            Answer::Opened(file, stamp) => (file, stamp),
        };
        // Another mapping of the same file may have come before in the same answer.
        if let Some(entry) = self.files.get(&key)
            && stamp.is_same_content(&entry.stamp)
        {
            return Arc::clone(&entry.file);
        }
        self.files.pop(&key);
        if self.files.len() == self.files.cap().get() && !self.make_room() {
            self.stats.refused += 1;
            return unopened(&key);
        }
        let file = Arc::new(*file);
        self.stats.opened += 1;
        self.files.put(key, Entry { file: Arc::clone(&file), stamp, used: Instant::now() });
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

/// Opens and checks files of one file system on a worker. Returns the requests without answers if there is none in time.
fn open_part(
    tgid: u32,
    parent: u32,
    dev: u64,
    part: Vec<Request>,
) -> Result<Vec<(Request, Answer)>, Vec<Request>> {
    let (process, device) = (Target::Process(tgid), Target::Device(dev));
    if access::node().is_hung(process) {
        return Err(part);
    }
    let part = Arc::new(part);
    let (theirs, name) =
        (Arc::clone(&part), part.first().map_or(String::new(), |request| request.key.path.clone()));
    let call = move || theirs.iter().map(|request| answer(request, tgid, parent)).collect::<Vec<_>>();
    let link = part.first().map_or(String::new(), |request| map_files_path(&request.mapping(tgid, parent)));
    // A call that hangs may hang on the process, before it comes to the file.
    let blame = || match access::node().run(process, &name, ENGINE_DEADLINE, || fs::read_link(link)) {
        Ok(_) => device,
        Err(_) => process,
    };
    match access::node().run_and_blame(device, blame, &name, ENGINE_DEADLINE, call) {
        Ok(answers) => {
            // The worker has dropped its requests with its call.
            let part =
                Arc::try_unwrap(part).unwrap_or_else(|shared| shared.iter().map(Request::copy).collect());
            Ok(part.into_iter().zip(answers).collect())
        }
        Err(_) => Err(part.iter().map(Request::copy).collect()),
    }
}

/// Opens the file of a request, unless it is the one that is open already.
fn answer(request: &Request, tgid: u32, parent: u32) -> Answer {
    let mapping = request.mapping(tgid, parent);
    if let Some(known) = &request.known {
        // The mapping leads to its file even after the name was deleted. If it cannot be opened, the numbers decide: the
        // kernel does not reuse an inode number while the file is open here.
        let current = fs::metadata(map_files_path(&mapping)).map(|metadata| Stamp::of(&metadata));
        if current.map_or(true, |current| current.is_same_content(known)) {
            return Answer::Same;
        }
    }
    match open(&mapping) {
        Ok((file, metadata)) => {
            let file = MappedFile::opened(mapping.path, mapping.dev, mapping.inode, file);
            Answer::Opened(Box::new(file), Stamp::of(&metadata))
        }
        Err(error) => Answer::Failed(error),
    }
}

fn map_files_path(mapping: &FileMapping<'_>) -> String {
    format!("/proc/{}/map_files/{:x}-{:x}", mapping.tgid, mapping.start, mapping.end)
}

/// Opens the file of a mapping through the mapping itself, which works for deleted and replaced files and in every mount
/// namespace. If that is forbidden, or the process has exited, opens the path in the root directory of the process, its parent
/// or process 1, if the file there has the numbers of the mapped one. A process whose first thread has ended shows its mappings
/// and its root through its other threads only. Returns a path descriptor.
fn open(mapping: &FileMapping<'_>) -> io::Result<(File, fs::Metadata)> {
    let same = |file: File| {
        let metadata = file.metadata().ok()?;
        let same = (metadata.dev(), metadata.ino()) == (mapping.dev, mapping.inode);
        same.then_some((file, metadata))
    };
    let in_root = |directory: &str| same(open_in(directory, mapping.path).ok()?);
    let by_thread = || {
        let thread = proc::live_thread(mapping.tgid)?;
        let exe = || same(rustix::fs::open(format!("{thread}/exe"), PATH_ONLY, Mode::empty()).ok()?.into());
        in_root(&thread).or_else(exe)
    };
    open_exact(mapping).or_else(|error| {
        [mapping.tgid, mapping.parent, 1]
            .into_iter()
            .filter(|root| *root != 0)
            .find_map(|root| in_root(&format!("/proc/{root}")))
            .or_else(by_thread)
            .ok_or(error)
    })
}

/// A path descriptor has no effects on a device or pipe, and holds the file like any other.
const PATH_ONLY: OFlags = OFlags::PATH.union(OFlags::CLOEXEC);

fn open_exact(mapping: &FileMapping<'_>) -> io::Result<(File, fs::Metadata)> {
    let path = map_files_path(mapping);
    let file = File::from(rustix::fs::open(&path, PATH_ONLY, Mode::empty())?);
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
    open_in(&format!("/proc/{tgid}"), path).and_then(|file| reopen(&file))
}

/// Opens a path descriptor of a regular file, by its path in the root directory of the process or thread with this directory
/// in `/proc`.
fn open_in(directory: &str, path: &str) -> io::Result<File> {
    let root = rustix::fs::open(format!("{directory}/root"), PATH_ONLY, Mode::empty())?;
    let resolve = ResolveFlags::IN_ROOT | ResolveFlags::NO_MAGICLINKS;
    let file = File::from(rustix::fs::openat2(root.as_fd(), path, PATH_ONLY, Mode::empty(), resolve)?);
    regular(&file.metadata()?)?;
    Ok(file)
}

fn regular(metadata: &fs::Metadata) -> io::Result<()> {
    let kind = metadata.file_type();
    if kind.is_file() { Ok(()) } else { Err(Errno::ACCESS.into()) }
}
