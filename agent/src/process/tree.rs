//! The host's tree of control groups: from the id that the kernel side reports to the path, without `/proc`, so that a
//! process that is gone already is still placed.
//!
//! The id is the inode number of the group's directory. The kernel finds a directory by it (`open_by_handle_at`, which
//! wants CAP_DAC_READ_SEARCH); and a thread is told of each directory that is made, and remembers it for when it is gone.

use std::{
    collections::HashMap,
    fs, io,
    mem::MaybeUninit,
    num::NonZeroUsize,
    os::{
        fd::{AsRawFd as _, FromRawFd as _, OwnedFd},
        unix::{ffi::OsStrExt as _, fs::MetadataExt as _},
    },
    path::{Path, PathBuf},
    sync::{
        Arc, Mutex, MutexGuard, PoisonError,
        atomic::{AtomicBool, AtomicU64, Ordering::Relaxed},
    },
    thread,
    time::{Duration, Instant},
};

use lru::LruCache;
use rustix::{
    event::{PollFd, PollFlags, Timespec, poll},
    fs::inotify::{self, CreateFlags, ReadFlags, WatchFlags},
    io::Errno,
};

use crate::kernel::CgroupHierarchy;

/// Groups that are remembered, those that are gone included.
const REMEMBERED: NonZeroUsize = NonZeroUsize::new(16_384).unwrap();
/// Groups that are looked at in one walk, and watched: a node has some hundreds.
const MOST_GROUPS: usize = 16_384;
/// Levels below the root.
const MOST_LEVELS: usize = 32;
/// Where the kernel does not find directories by id, the tree is walked instead; this often at most.
const WALK_PAUSE: Duration = Duration::from_secs(1);
/// How soon the watching thread notices that it is not needed any more.
const END_PAUSE: Duration = Duration::from_millis(500);
/// The inode of the root of each hierarchy.
const ROOT_INODE: u64 = 1;
/// `FILEID_KERNFS` of the kernel's exportfs.h: the handle is the id.
const FILEID_KERNFS: i32 = 0xfe;

/// The tree of one hierarchy.
#[derive(Debug)]
pub struct CgroupTree {
    root: PathBuf,
    directory: OwnedFd,
    known: Mutex<LruCache<u64, Arc<str>>>,
    walked: Mutex<Option<Instant>>,
    /// The kernel does not let this process find directories by id.
    no_handles: AtomicBool,
    stats: Counts,
}

#[derive(Debug, Default)]
struct Counts {
    by_handle: AtomicU64,
    walks: AtomicU64,
    missed: AtomicU64,
}

/// How groups were found.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct TreeStats {
    /// By asking the kernel for the id.
    pub by_handle: u64,
    /// Walks over the whole tree.
    pub walks: u64,
    /// Ids that could not be found.
    pub missed: u64,
}

/// One group.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct Group {
    /// Below the hierarchy's root, beginning with `/`.
    pub path: Arc<str>,
    /// The inode number of its directory.
    pub id: u64,
}

/// The hierarchy is not there, or not to be read.
#[derive(Debug, thiserror::Error)]
pub enum TreeError {
    /// Not mounted.
    #[error(
        "the control groups are not mounted here: mount the host's /sys/fs/cgroup (in a container: a hostPath volume)"
    )]
    NotMounted,
    /// Mounted, and not to be read.
    #[error("cannot read the control groups at {}: {source}", path.display())]
    Read {
        /// Where.
        path: PathBuf,
        /// What the system said.
        source: io::Error,
    },
}

impl CgroupTree {
    /// The tree of the hierarchy that the kernel side reads.
    pub fn of(hierarchy: CgroupHierarchy) -> Result<Self, TreeError> {
        let mounts = fs::read_to_string("/proc/self/mountinfo").unwrap_or_default();
        let controller = match hierarchy {
            CgroupHierarchy::V2 => None,
            CgroupHierarchy::V1Cpu => Some("cpu"),
            CgroupHierarchy::V1Memory => Some("memory"),
        };
        let candidates = mount_points(&mounts, controller);
        // In a container its own part of the tree may be mounted too; the host's root has a number that no other has.
        let whole = |path: &&PathBuf| fs::metadata(path).is_ok_and(|found| found.ino() == ROOT_INODE);
        let root = candidates.iter().find(whole).or(candidates.first()).ok_or(TreeError::NotMounted)?;
        Self::at(root)
    }

    /// The tree below a directory.
    pub fn at(root: &Path) -> Result<Self, TreeError> {
        use rustix::fs::{Mode, OFlags, open};
        let directory = open(root, OFlags::DIRECTORY | OFlags::RDONLY | OFlags::CLOEXEC, Mode::empty())
            .map_err(|error| TreeError::Read { path: root.to_owned(), source: error.into() })?;
        Ok(Self {
            root: root.to_owned(),
            directory,
            known: Mutex::new(LruCache::new(REMEMBERED)),
            walked: Mutex::default(),
            no_handles: AtomicBool::new(false),
            stats: Counts::default(),
        })
    }

    /// Where the hierarchy is mounted.
    pub fn root(&self) -> &Path {
        &self.root
    }

    /// The path of a group, of one that is gone too if it was known before.
    pub fn path(&self, id: u64) -> Option<Arc<str>> {
        if let Some(path) = self.known().get(&id) {
            return Some(Arc::clone(path));
        }
        let found = match self.by_handle(id) {
            Ok(path) => {
                self.stats.by_handle.fetch_add(1, Relaxed);
                path
            }
            Err(error) => {
                if matches!(error.raw_os_error(), Some(libc::EPERM | libc::EOPNOTSUPP | libc::ENOSYS)) {
                    self.no_handles.store(true, Relaxed);
                }
                None
            }
        };
        if let Some(path) = found {
            self.known().put(id, Arc::clone(&path));
            return Some(path);
        }
        if self.no_handles.load(Relaxed) && self.may_walk() {
            self.walk();
            if let Some(path) = self.known().get(&id) {
                return Some(Arc::clone(path));
            }
        }
        self.stats.missed.fetch_add(1, Relaxed);
        None
    }

    /// All groups, parents before children. Remembers them.
    pub fn walk(&self) -> Vec<Group> {
        self.stats.walks.fetch_add(1, Relaxed);
        let mut groups = Vec::new();
        let mut ahead = vec![(self.root.clone(), 0)];
        while let Some((directory, level)) = ahead.pop() {
            if groups.len() >= MOST_GROUPS {
                tracing::warn!("more than {MOST_GROUPS} control groups: rules over pods miss some");
                break;
            }
            if let Some(group) = self.group(&directory) {
                groups.push(group);
            }
            if level < MOST_LEVELS {
                ahead.extend(subdirectories(&directory).map(|path| (path, level + 1)));
            }
        }
        groups
    }

    /// Tells of groups that are made and that go, until the tree is not used by anybody else: calls `changed` some
    /// milliseconds after. Groups are remembered as they are made.
    pub fn watch(
        self: &Arc<Self>,
        mut changed: impl FnMut() + Send + 'static,
    ) -> io::Result<thread::JoinHandle<()>> {
        let notices = inotify::init(CreateFlags::CLOEXEC | CreateFlags::NONBLOCK)?;
        let tree = Arc::downgrade(self);
        let mut watched = Watched { notices, paths: HashMap::new(), full: false };
        watched.add(self, &self.root);
        thread::Builder::new().name("gannet-cgroups".into()).spawn(move || {
            let pause = Timespec::try_from(END_PAUSE).ok();
            loop {
                let mut ready = [PollFd::new(&watched.notices, PollFlags::IN)];
                // Interrupted by a signal is as good as a time-out.
                let _ = poll(&mut ready, pause.as_ref());
                let Some(tree) = tree.upgrade() else { return };
                if watched.read(&tree) {
                    changed();
                }
            }
        })
    }

    /// How groups were found.
    pub fn stats(&self) -> TreeStats {
        let Counts { by_handle, walks, missed } = &self.stats;
        TreeStats {
            by_handle: by_handle.load(Relaxed),
            walks: walks.load(Relaxed),
            missed: missed.load(Relaxed),
        }
    }

    /// The group of a directory.
    fn group(&self, directory: &Path) -> Option<Group> {
        let id = fs::metadata(directory).ok()?.ino();
        let path = self.below(directory)?;
        self.known().put(id, Arc::clone(&path));
        Some(Group { path, id })
    }

    fn below(&self, directory: &Path) -> Option<Arc<str>> {
        let path = directory.strip_prefix(&self.root).ok()?.to_str()?;
        // It went while it was looked at.
        let path = path.strip_suffix(" (deleted)").unwrap_or(path);
        Some(format!("/{path}").into())
    }

    fn may_walk(&self) -> bool {
        let mut walked = lock(&self.walked);
        let may = walked.is_none_or(|at| at.elapsed() >= WALK_PAUSE);
        if may {
            *walked = Some(Instant::now());
        }
        may
    }

    fn known(&self) -> MutexGuard<'_, LruCache<u64, Arc<str>>> {
        lock(&self.known)
    }

    /// Asks the kernel for the directory with this id. None: there is none.
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
        // SAFETY: the kernel has just made the descriptor, and nobody else knows of it.
        let directory = unsafe { OwnedFd::from_raw_fd(descriptor) };
        let path = fs::read_link(format!("/proc/self/fd/{}", directory.as_raw_fd()))?;
        Ok(self.below(&path))
    }
}

/// The directories that a thread is told about.
struct Watched {
    notices: OwnedFd,
    paths: HashMap<i32, PathBuf>,
    full: bool,
}

impl Watched {
    /// Watches a directory and all below it.
    fn add(&mut self, tree: &CgroupTree, directory: &Path) {
        let mut ahead = vec![(directory.to_owned(), 0)];
        while let Some((directory, level)) = ahead.pop() {
            let flags = WatchFlags::CREATE | WatchFlags::DELETE | WatchFlags::MOVED_TO | WatchFlags::ONLYDIR;
            if self.paths.len() < MOST_GROUPS {
                match inotify::add_watch(&self.notices, &directory, flags) {
                    Ok(number) => {
                        self.paths.insert(number, directory.clone());
                    }
                    Err(Errno::NOSPC | Errno::NOMEM) if !self.full => {
                        self.full = true;
                        tracing::warn!(
                            "new control groups are noticed late: the limit fs.inotify.max_user_watches is reached"
                        );
                    }
                    // It is gone again.
                    Err(_) => {}
                }
            }
            // Behind the watch, so that what is made meanwhile is in the one or the other.
            tree.group(&directory);
            if level < MOST_LEVELS {
                ahead.extend(subdirectories(&directory).map(|path| (path, level + 1)));
            }
        }
    }

    /// Takes in what was told. Whether anything has changed.
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

/// Where a hierarchy is mounted, from the text of `/proc/self/mountinfo`: cgroup2 for no controller.
fn mount_points(text: &str, controller: Option<&str>) -> Vec<PathBuf> {
    text.lines()
        .filter_map(|line| {
            // … root mountpoint options [optional…] - kind source super-options
            let (before, after) = line.split_once(" - ")?;
            let point = before.split(' ').nth(4)?;
            let mut after = after.split(' ');
            let (kind, options) = (after.next()?, after.nth(1)?);
            let here = match controller {
                None => kind == "cgroup2",
                Some(controller) => kind == "cgroup" && options.split(',').any(|option| option == controller),
            };
            here.then(|| PathBuf::from(point.replace("\\040", " ")))
        })
        .collect()
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

#[cfg(test)]
mod tests {
    use std::sync::mpsc;

    use super::*;

    #[test]
    fn hierarchies_are_found_on_hosts_of_each_kind() {
        let hybrid = "31 23 0:28 / /sys/fs/cgroup rw - tmpfs tmpfs rw\n\
                      32 31 0:29 / /sys/fs/cgroup/cpu,cpuacct rw - cgroup cgroup rw,cpu,cpuacct\n\
                      35 31 0:32 / /sys/fs/cgroup/memory rw shared:3 - cgroup cgroup rw,memory\n\
                      41 31 0:38 / /sys/fs/cgroup/unified rw - cgroup2 cgroup2 rw,nsdelegate\n";
        let pure = "25 22 0:22 / /sys/fs/cgroup rw,nosuid shared:4 master:1 - cgroup2 cgroup2 rw\n\
                    99 22 0:22 /../../.. /host/sys/fs/c\\040g rw - cgroup2 cgroup2 rw\n";
        let show = |text, controller| {
            mount_points(text, controller).iter().map(|p| p.display().to_string()).collect::<Vec<_>>()
        };
        assert_eq!(show(hybrid, Some("cpu")), ["/sys/fs/cgroup/cpu,cpuacct"]);
        assert_eq!(show(hybrid, Some("memory")), ["/sys/fs/cgroup/memory"]);
        assert_eq!(show(hybrid, None), ["/sys/fs/cgroup/unified"]);
        assert_eq!(show(pure, None), ["/sys/fs/cgroup", "/host/sys/fs/c g"]);
        assert_eq!(show(pure, Some("cpu")), [""; 0]);
    }

    #[test]
    fn any_directory_tree_can_be_walked_and_watched() {
        let root = tempfile::tempdir().unwrap();
        fs::create_dir_all(root.path().join("kubepods/podU")).unwrap();
        let tree = Arc::new(CgroupTree::at(root.path()).unwrap());
        let paths = |tree: &CgroupTree| {
            let mut paths: Vec<_> = tree.walk().iter().map(|group| group.path.to_string()).collect();
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
        // Made in one go, below what is watched: nothing is missed, and what is gone is still known.
        let deep = root.path().join("kubepods/podU/c/inner");
        fs::create_dir_all(&deep).unwrap();
        let id = fs::metadata(&deep).unwrap().ino();
        let until = Instant::now() + Duration::from_secs(30);
        while !tree.known().contains(&id) && Instant::now() < until {
            let _ = changes.recv_timeout(Duration::from_secs(1));
        }
        fs::remove_dir_all(root.path().join("kubepods/podU")).unwrap();
        assert_eq!(tree.path(id).as_deref(), Some("/kubepods/podU/c/inner"));
        drop(tree);
        thread.join().unwrap();
    }
}
