//! The host's tree of control groups: from the id that the kernel side reports to the path, without `/proc`. So the path of
//! an exited process can still be found.
//!
//! The id is the inode number of the group's directory. The kernel opens a directory by its id (`open_by_handle_at`, which
//! requires CAP_DAC_READ_SEARCH). A thread follows new directories through inotify and remembers their paths, so that the path
//! of a removed group is still known.

use std::{
    collections::HashMap,
    fs, io,
    mem::MaybeUninit,
    num::NonZeroUsize,
    os::{
        fd::{AsRawFd as _, FromRawFd as _, OwnedFd},
        unix::ffi::OsStrExt as _,
    },
    path::{Path, PathBuf},
    sync::{
        Arc,
        atomic::{AtomicBool, AtomicU64, Ordering::Relaxed},
    },
    thread,
    time::{Duration, Instant},
};

use lru::LruCache;
use parking_lot::Mutex;
use rustix::{
    event::{PollFd, PollFlags, Timespec, poll},
    fs::inotify::{self, CreateFlags, ReadFlags, WatchFlags},
    io::Errno,
};

use super::{CgroupHierarchy, id_of, mount_of};

/// Groups whose paths are remembered, removed ones included. The kernel knows the path of a forgotten one while it exists.
const MAX_KNOWN: NonZeroUsize = NonZeroUsize::new(16_384).unwrap();
/// Groups in one scan, and watched directories: a node has some hundreds. The tree counts those beyond.
pub(crate) const MAX_GROUPS: usize = 16_384;
/// Levels below the root. The tree counts the groups on the next one.
pub(crate) const MAX_LEVELS: usize = 32;
/// Without `open_by_handle_at` the tree scans all directories to find an id; the least time between two such scans.
const SCAN_INTERVAL: Duration = Duration::from_secs(1);
/// How often the watching thread checks whether the tree is still in use.
const WATCH_TIMEOUT: Duration = Duration::from_millis(500);
/// `FILEID_KERNFS` of the kernel's exportfs.h: the handle is the id.
const FILEID_KERNFS: i32 = 0xfe;

/// The tree of one hierarchy.
#[derive(Debug)]
pub struct CgroupTree {
    root: PathBuf,
    directory: OwnedFd,
    known: Mutex<LruCache<u64, Arc<str>>>,
    scanned_at: Mutex<Option<Instant>>,
    /// The kernel refuses `open_by_handle_at` to this process.
    no_handles: AtomicBool,
    max_groups: usize,
    cut: CutGroups,
}

/// Groups that the tree leaves out, as atomics.
#[derive(Debug, Default)]
struct CutGroups {
    beyond_count: AtomicU64,
    beyond_levels: AtomicU64,
    unwatched: AtomicU64,
    /// Of the last scan that left groups out, and of the first group without a watch; logged.
    is_scan_logged: AtomicBool,
    is_watch_logged: AtomicBool,
}

/// Groups that a [`CgroupTree`] leaves out.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) struct CgroupTreeStats {
    /// Groups beyond [`MAX_GROUPS`] that the last scan saw and did not read. Groups below them are not counted.
    pub(crate) beyond_count: u64,
    /// Groups below [`MAX_LEVELS`] levels that the last scan saw and did not read. Groups below them are not counted.
    pub(crate) beyond_levels: u64,
    /// Groups that got no watch, since the start: the next scan finds the groups below them.
    pub(crate) unwatched: u64,
}

/// One control group.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct Cgroup {
    /// Below the hierarchy's root, beginning with `/`.
    pub path: Arc<str>,
    /// The inode number of its directory.
    pub id: u64,
}

/// Why a [`CgroupTree`] cannot be opened.
#[derive(Debug, thiserror::Error)]
pub enum CgroupTreeError {
    /// The hierarchy is not mounted.
    #[error(
        "control groups are not mounted; mount the host's /sys/fs/cgroup (in a container: a hostPath volume)"
    )]
    NotMounted,
    /// The mount point cannot be opened.
    #[error("cannot read the control groups at {}: {source}", path.display())]
    Read {
        /// The mount point.
        path: PathBuf,
        /// The error of the system.
        source: io::Error,
    },
}

impl CgroupTree {
    /// Opens the tree of a hierarchy of this host.
    pub(crate) fn of(hierarchy: CgroupHierarchy) -> Result<Self, CgroupTreeError> {
        Self::at(&mount_of(hierarchy.controller()).ok_or(CgroupTreeError::NotMounted)?, MAX_GROUPS)
    }

    /// Opens the tree below a directory, of which scans read at most `max_groups` groups.
    fn at(root: &Path, max_groups: usize) -> Result<Self, CgroupTreeError> {
        use rustix::fs::{Mode, OFlags, open};
        let directory = open(root, OFlags::DIRECTORY | OFlags::RDONLY | OFlags::CLOEXEC, Mode::empty())
            .map_err(|error| CgroupTreeError::Read { path: root.to_owned(), source: error.into() })?;
        Ok(Self {
            root: root.to_owned(),
            directory,
            known: Mutex::new(LruCache::new(MAX_KNOWN)),
            scanned_at: Mutex::default(),
            no_handles: AtomicBool::new(false),
            max_groups,
            cut: CutGroups::default(),
        })
    }

    /// Returns the mount point of the hierarchy.
    pub fn root(&self) -> &Path {
        &self.root
    }

    /// Returns the path of a group, also of a removed one if it was known before.
    pub(crate) fn path(&self, id: u64) -> Option<Arc<str>> {
        if let Some(path) = self.known.lock().get(&id) {
            return Some(Arc::clone(path));
        }
        let found = match self.by_handle(id) {
            Ok(path) => path,
            Err(error) => {
                if matches!(error.raw_os_error(), Some(libc::EPERM | libc::EOPNOTSUPP | libc::ENOSYS)) {
                    self.no_handles.store(true, Relaxed);
                }
                None
            }
        };
        if let Some(path) = found {
            self.known.lock().put(id, Arc::clone(&path));
            return Some(path);
        }
        if self.no_handles.load(Relaxed) && self.may_scan() {
            self.scan();
            return self.known.lock().get(&id).map(Arc::clone);
        }
        None
    }

    /// Returns all groups, parents before children, and remembers their paths. Blocking.
    pub(crate) fn scan(&self) -> Vec<Cgroup> {
        let mut groups = Vec::new();
        let mut ahead = vec![(self.root.clone(), 0)];
        let mut beyond_levels = 0;
        while groups.len() < self.max_groups
            && let Some((directory, level)) = ahead.pop()
        {
            if let Some(group) = self.group(&directory) {
                groups.push(group);
            }
            if level < MAX_LEVELS {
                ahead.extend(subdirectories(&directory).map(|path| (path, level + 1)));
            } else {
                beyond_levels += subdirectories(&directory).count() as u64;
            }
        }
        let (deep, next) = (beyond_levels > 0, ahead.last().map(|(directory, _)| directory));
        self.set_cut(ahead.len() as u64, beyond_levels);
        if (deep || next.is_some()) && !self.cut.is_scan_logged.swap(true, Relaxed) {
            tracing::warn!(
                beyond_count = ahead.len(),
                beyond_levels,
                "not all control groups are read: the agent reads {} of them, down to level {MAX_LEVELS}; rules by pod do not \
                 reach the others{}; remove unused groups; /debug/pods shows the count",
                self.max_groups,
                next.map_or_else(String::new, |next| format!(", one of which is {}", next.display()))
            );
        }
        groups
    }

    fn set_cut(&self, beyond_count: u64, beyond_levels: u64) {
        self.cut.beyond_count.store(beyond_count, Relaxed);
        self.cut.beyond_levels.store(beyond_levels, Relaxed);
        if beyond_count == 0 && beyond_levels == 0 {
            self.cut.is_scan_logged.store(false, Relaxed);
        }
    }

    /// Returns the counts of groups that are left out.
    pub(crate) fn stats(&self) -> CgroupTreeStats {
        CgroupTreeStats {
            beyond_count: self.cut.beyond_count.load(Relaxed),
            beyond_levels: self.cut.beyond_levels.load(Relaxed),
            unwatched: self.cut.unwatched.load(Relaxed),
        }
    }

    /// Counts a group that the watching thread cannot follow.
    fn count_unwatched(&self, directory: &Path, why: &str) {
        self.cut.unwatched.fetch_add(1, Relaxed);
        if !self.cut.is_watch_logged.swap(true, Relaxed) {
            tracing::warn!(
                group = %directory.display(),
                "new control groups below this one and some others are noticed late, at the next scan of all: {why}"
            );
        }
    }

    /// Starts a thread that calls `changed` some milliseconds after groups were created or removed, and remembers the paths
    /// of new groups. It ends when the caller has dropped the last reference to the tree.
    pub fn watch(
        self: &Arc<Self>,
        mut changed: impl FnMut() + Send + 'static,
    ) -> io::Result<thread::JoinHandle<()>> {
        let notices = inotify::init(CreateFlags::CLOEXEC | CreateFlags::NONBLOCK)?;
        let tree = Arc::downgrade(self);
        let mut watched = Watched { notices, paths: HashMap::new() };
        watched.add(self, &self.root);
        thread::Builder::new().name("gannet-cgroups".into()).spawn(move || {
            let timeout = Timespec::try_from(WATCH_TIMEOUT).ok();
            loop {
                let mut ready = [PollFd::new(&watched.notices, PollFlags::IN)];
                // A signal that interrupts the call has the effect of a timeout.
                let _ = poll(&mut ready, timeout.as_ref());
                let Some(tree) = tree.upgrade() else { return };
                if watched.read(&tree) {
                    changed();
                }
            }
        })
    }

    /// Returns the group of a directory and remembers its path.
    fn group(&self, directory: &Path) -> Option<Cgroup> {
        let id = id_of(directory)?;
        let path = self.below(directory)?;
        self.known.lock().put(id, Arc::clone(&path));
        Some(Cgroup { path, id })
    }

    fn below(&self, directory: &Path) -> Option<Arc<str>> {
        let path = directory.strip_prefix(&self.root).ok()?.to_str()?;
        // The group was removed between the two calls.
        let path = path.strip_suffix(" (deleted)").unwrap_or(path);
        Some(format!("/{path}").into())
    }

    fn may_scan(&self) -> bool {
        let mut scanned_at = self.scanned_at.lock();
        let may = scanned_at.is_none_or(|at| at.elapsed() >= SCAN_INTERVAL);
        if may {
            *scanned_at = Some(Instant::now());
        }
        may
    }

    /// Asks the kernel for the directory with this id; `None` if there is none.
    fn by_handle(&self, id: u64) -> io::Result<Option<Arc<str>>> {
        #[repr(C)]
        struct Handle {
            bytes: u32,
            kind: i32,
            id: u64,
        }
        // The kernel reads 8 bytes behind the two numbers.
        const _: () = assert!(size_of::<Handle>() == 16 && std::mem::offset_of!(Handle, id) == 8);
        if self.no_handles.load(Relaxed) {
            return Ok(None);
        }
        let mut handle = Handle { bytes: 8, kind: FILEID_KERNFS, id };
        // SAFETY: the handle lives through the call and is as long as it says; the kernel only reads it.
        let descriptor = unsafe {
            libc::open_by_handle_at(
                self.directory.as_raw_fd(),
                (&raw mut handle).cast(),
                libc::O_PATH | libc::O_CLOEXEC,
            )
        };
        if descriptor < 0 {
            let error = io::Error::last_os_error();
            return if error.raw_os_error() == Some(libc::ESTALE) { Ok(None) } else { Err(error) };
        }
        // SAFETY: the kernel has just made the descriptor; nothing else owns it.
        let directory = unsafe { OwnedFd::from_raw_fd(descriptor) };
        let path = fs::read_link(format!("/proc/self/fd/{}", directory.as_raw_fd()))?;
        Ok(self.below(&path))
    }
}

/// The directories that the watching thread follows through inotify.
struct Watched {
    notices: OwnedFd,
    paths: HashMap<i32, PathBuf>,
}

impl Watched {
    /// Watches a directory and all directories below it.
    fn add(&mut self, tree: &CgroupTree, directory: &Path) {
        let mut ahead = vec![(directory.to_owned(), 0)];
        while let Some((directory, level)) = ahead.pop() {
            let flags = WatchFlags::CREATE | WatchFlags::DELETE | WatchFlags::MOVED_TO | WatchFlags::ONLYDIR;
            if self.paths.len() < tree.max_groups {
                match inotify::add_watch(&self.notices, &directory, flags) {
                    Ok(number) => {
                        self.paths.insert(number, directory.clone());
                    }
                    Err(Errno::NOSPC | Errno::NOMEM) => {
                        tree.count_unwatched(&directory, "fs.inotify.max_user_watches is reached; raise it");
                    }
                    // The directory was removed again.
                    Err(_) => {}
                }
            } else {
                tree.count_unwatched(&directory, "the agent follows no more; remove unused groups");
            }
            // After the watch was added: a directory made meanwhile is in the scan or in the events.
            tree.group(&directory);
            if level < MAX_LEVELS {
                ahead.extend(subdirectories(&directory).map(|path| (path, level + 1)));
            }
        }
    }

    /// Reads the pending events and reports whether any group was created or removed.
    fn read(&mut self, tree: &CgroupTree) -> bool {
        let mut changed = false;
        let mut made = Vec::new();
        let mut lost = false;
        let mut buffer = [MaybeUninit::uninit(); 16 << 10];
        let mut reader = inotify::Reader::new(&self.notices, &mut buffer);
        while let Ok(notice) = reader.next() {
            let flags = notice.events();
            lost |= flags.contains(ReadFlags::QUEUE_OVERFLOW);
            if flags.contains(ReadFlags::IGNORED) {
                self.paths.remove(&notice.wd());
            } else if flags.contains(ReadFlags::ISDIR) {
                changed = true;
                let parent = self.paths.get(&notice.wd());
                if flags.intersects(ReadFlags::CREATE | ReadFlags::MOVED_TO)
                    && let (Some(parent), Some(name)) = (parent, notice.file_name())
                {
                    made.push(parent.join(std::ffi::OsStr::from_bytes(name.to_bytes())));
                }
            }
        }
        for directory in made {
            self.add(tree, &directory);
        }
        if lost {
            let root = tree.root.clone();
            self.add(tree, &root);
        }
        changed | lost
    }
}

fn subdirectories(directory: &Path) -> impl Iterator<Item = PathBuf> {
    fs::read_dir(directory)
        .into_iter()
        .flatten()
        .flatten()
        .filter(|entry| entry.file_type().is_ok_and(|kind| kind.is_dir()))
        .map(|entry| entry.path())
}

#[cfg(test)]
mod tests {
    use std::sync::mpsc;

    use super::*;

    #[test]
    fn groups_beyond_the_limits_are_counted() {
        let root = tempfile::tempdir().unwrap();
        let deep = |levels: usize| (0..levels).map(|_| "d").collect::<PathBuf>();
        fs::create_dir_all(root.path().join(deep(MAX_LEVELS))).unwrap();
        for name in ["a", "b", "c"] {
            fs::create_dir(root.path().join(name)).unwrap();
        }
        // Level by level below the root, the root itself, and three others.
        let all = MAX_LEVELS + 1 + 3;
        let scan = |max| {
            let tree = Arc::new(CgroupTree::at(root.path(), max).unwrap());
            (tree.scan().len(), tree.stats())
        };
        assert_eq!(scan(all), (all, CgroupTreeStats::default()));
        // At least one is ahead; those below it are not known.
        let (read, left_out) = scan(all - 1);
        assert_eq!((read, left_out.beyond_count, left_out.beyond_levels), (all - 1, 1, 0));
        assert_eq!(scan(1), (1, CgroupTreeStats { beyond_count: 4, ..CgroupTreeStats::default() }));
        for name in ["x", "y"] {
            fs::create_dir(root.path().join(deep(MAX_LEVELS)).join(name)).unwrap();
        }
        assert_eq!(scan(all), (all, CgroupTreeStats { beyond_levels: 2, ..CgroupTreeStats::default() }));
        // The count follows the tree.
        let tree = Arc::new(CgroupTree::at(root.path(), all).unwrap());
        tree.scan();
        assert_eq!(tree.stats().beyond_levels, 2);
        fs::remove_dir(root.path().join(deep(MAX_LEVELS)).join("x")).unwrap();
        tree.scan();
        assert_eq!(tree.stats().beyond_levels, 1);
    }

    #[test]
    fn groups_beyond_the_watches_are_counted() {
        let root = tempfile::tempdir().unwrap();
        for name in ["a", "b", "c"] {
            fs::create_dir(root.path().join(name)).unwrap();
        }
        let tree = Arc::new(CgroupTree::at(root.path(), 2).unwrap());
        let thread = tree.watch(|| {}).unwrap();
        assert_eq!(tree.stats().unwatched, 2);
        drop(tree);
        thread.join().unwrap();
    }

    #[test]
    fn any_directory_tree_can_be_scanned_and_watched() {
        let root = tempfile::tempdir().unwrap();
        fs::create_dir_all(root.path().join("kubepods/podU")).unwrap();
        let tree = Arc::new(CgroupTree::at(root.path(), MAX_GROUPS).unwrap());
        let paths = |tree: &CgroupTree| {
            let mut paths: Vec<_> = tree.scan().iter().map(|group| group.path.to_string()).collect();
            paths.sort();
            paths
        };
        assert_eq!(paths(&tree), ["/", "/kubepods", "/kubepods/podU"]);
        let (changed, changes) = mpsc::channel();
        let thread = tree
            .watch(move || {
                let _ = changed.send(());
            })
            .unwrap();
        // Both levels are made at once below a watched directory: none is missed, and the path of a removed one is known.
        let deep = root.path().join("kubepods/podU/c/inner");
        fs::create_dir_all(&deep).unwrap();
        let id = id_of(&deep).unwrap();
        let until = Instant::now() + Duration::from_secs(30);
        while !tree.known.lock().contains(&id) && Instant::now() < until {
            let _ = changes.recv_timeout(Duration::from_secs(1));
        }
        fs::remove_dir_all(root.path().join("kubepods/podU")).unwrap();
        assert_eq!(tree.path(id).as_deref(), Some("/kubepods/podU/c/inner"));
        drop(tree);
        thread.join().unwrap();
    }
}
