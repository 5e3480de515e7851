//! Metadata of processes: true, bounded, and without secrets in any text.

use std::{
    collections::{BTreeMap, HashMap},
    fmt::Write as _,
    fs, io,
    os::unix::fs::MetadataExt as _,
    path::{Path, PathBuf},
    process::{Command, Stdio},
    sync::{
        Arc, Mutex,
        atomic::{AtomicU64, Ordering},
    },
    time::Duration,
};

use gannet_agent::{
    cgroup::CgroupHierarchy,
    model::ProcessKey,
    process::{
        MetadataError, MetadataOptions, ProcError, ProcFs, ProcessMetadataCache, RealProc, check_identity,
    },
};
use tracing_subscriber::fmt::MakeWriter;

/// A secret that no text may show.
const CANARY: &str = "canary-0f3a";

fn options() -> MetadataOptions {
    MetadataOptions {
        environ: ["SHOWN".to_owned()].into(),
        hierarchy: CgroupHierarchy::V2,
        ..MetadataOptions::default()
    }
}

/// Writes the files of a process into a directory, as `/proc` has them.
fn put(root: &Path, tgid: u32, ticks: u64) -> ProcessKey {
    let directory = root.join(tgid.to_string());
    fs::create_dir_all(directory.join("ns")).unwrap();
    let stat = format!("{tgid} (a (b) c) S 1 1 1 0 -1 4194560 0 0 0 0 0 0 0 0 20 0 1 0 {ticks} 0 0\n");
    fs::write(directory.join("stat"), stat).unwrap();
    fs::write(directory.join("comm"), "worker\n").unwrap();
    fs::write(directory.join("cgroup"), format!("0::/docker/{}\n", "a1".repeat(32))).unwrap();
    fs::write(directory.join("cmdline"), format!("worker\0--password={CANARY}\0")).unwrap();
    fs::write(directory.join("environ"), format!("HIDDEN={CANARY}\0SHOWN={CANARY}-allowed\0")).unwrap();
    for (name, target) in [("exe", "/bin/worker (deleted)"), ("cwd", "/srv"), ("ns/mnt", "mnt:[4026531840]")]
    {
        let link = directory.join(name);
        let _ = fs::remove_file(&link);
        std::os::unix::fs::symlink(target, link).unwrap();
    }
    key(tgid, ticks)
}

fn key(tgid: u32, ticks: u64) -> ProcessKey {
    let hz = rustix::param::clock_ticks_per_second();
    ProcessKey { tgid, start_boottime_ns: ticks * (1_000_000_000 / hz) }
}

fn cache(root: &Path, options: MetadataOptions) -> ProcessMetadataCache {
    ProcessMetadataCache::reading(options, Arc::new(RealProc::at(root)))
}

/// Checks that a process without a readable start time is not stored (R29).
#[test]
fn nothing_is_stored_without_a_start_time() {
    let root = tempfile::tempdir().unwrap();
    let key = put(root.path(), 7, 100);
    fs::remove_file(root.path().join("7/stat")).unwrap();
    let mut cache = cache(root.path(), options());
    let error = cache.get_or_load(key).unwrap_err();
    assert!(matches!(error, MetadataError::Proc(ProcError::Gone(7))), "{error}");
    assert!(cache.is_empty() && cache.get(key).is_none() && cache.get_unchecked(key).is_none());
    fs::write(root.path().join("7/stat"), "7 (x) S 1").unwrap();
    let error = cache.get_or_load(key).unwrap_err();
    assert!(matches!(error, MetadataError::Proc(ProcError::Read { .. })), "{error}");
    assert!(cache.is_empty());
}

/// A `/proc` in which another process gets the PID after some reads.
struct Swapping {
    real: RealProc,
    root: PathBuf,
    left: AtomicU64,
}

impl ProcFs for Swapping {
    fn read(&self, key: ProcessKey, file: &'static str, max: u64) -> io::Result<Vec<u8>> {
        if self.left.fetch_sub(1, Ordering::Relaxed) == 0 {
            put(&self.root, key.tgid, 200);
        }
        self.real.read(key, file, max)
    }

    fn link(&self, key: ProcessKey, file: &'static str) -> io::Result<PathBuf> {
        self.real.link(key, file)
    }

    fn owner(&self, key: ProcessKey) -> io::Result<u32> {
        self.real.owner(key)
    }

    fn now_ns(&self) -> u64 {
        self.real.now_ns()
    }
}

/// Checks that the PID is not reused during a load (R30).
#[test]
fn all_metadata_is_of_one_process() {
    for readings in 0..6 {
        let root = tempfile::tempdir().unwrap();
        let key = put(root.path(), 7, 100);
        let proc = Swapping {
            real: RealProc::at(root.path()),
            root: root.path().to_owned(),
            left: AtomicU64::new(readings),
        };
        let mut cache = ProcessMetadataCache::reading(options(), Arc::new(proc));
        let error = cache.get_or_load(key).unwrap_err();
        assert!(
            matches!(error, MetadataError::Proc(ProcError::Recycled { tgid: 7, .. })),
            "after {readings}: {error}"
        );
        assert!(cache.is_empty());
    }
}

/// Checks the getters after the PID was reused (R31, R35).
#[test]
fn every_getter_checks_that_it_is_the_same_process() {
    let root = tempfile::tempdir().unwrap();
    let first = put(root.path(), 7, 100);
    let mut cache = cache(root.path(), options());
    let known = cache.get_or_load(first).unwrap();
    assert_eq!(cache.get(first).as_ref(), Some(&known));
    assert_eq!(cache.environ_var(first, "SHOWN").as_deref(), Some("canary-0f3a-allowed"));
    assert_eq!(cache.environ_var(first, "HIDDEN"), None, "it is not stored (R45)");
    // Another process has the PID now.
    let second = put(root.path(), 7, 200);
    assert_eq!((cache.get(first), cache.environ_var(first, "SHOWN")), (None, None));
    assert!(cache.get_or_load(first).is_err());
    assert_eq!(cache.get_unchecked(first), Some(known), "for its last samples");
    cache.get_or_load(second).unwrap();
    // The entry of the first process goes, not that of the PID.
    cache.remove(first);
    cache.next_window();
    assert_eq!(cache.len(), 2, "a whole window has not passed");
    cache.next_window();
    assert_eq!((cache.len(), cache.get_unchecked(first)), (1, None));
    assert!(cache.get(second).is_some());
    // After an exec or for a new process it is read again (R36, R39).
    cache.invalidate(second);
    assert!(cache.is_empty());
    assert_eq!(cache.stats().bytes, 0);
}

/// Checks every field against `/proc` (R32).
#[test]
fn metadata_is_what_proc_shows() {
    let mut child = Command::new("sleep")
        .arg("60")
        .env("SHOWN", "yes")
        .env("HIDDEN", "no")
        .current_dir("/tmp")
        .stdin(Stdio::null())
        .spawn()
        .unwrap();
    let pid = child.id();
    // Between fork and exec it is still this program; its arguments come last.
    let begun = std::time::Instant::now();
    while fs::read(format!("/proc/{pid}/cmdline")).unwrap() != b"sleep\x0060\0" {
        assert!(begun.elapsed() < Duration::from_secs(30));
        std::thread::sleep(Duration::from_millis(1));
    }
    let key = ProcessKey::of_running(pid).unwrap();
    check_identity(key).unwrap();
    let mut cache =
        ProcessMetadataCache::new(MetadataOptions { hierarchy: CgroupHierarchy::detect(), ..options() });
    let before = std::time::SystemTime::now();
    let read = cache.get_or_load(key).unwrap();
    assert_eq!(read.key, key);
    assert!(read.loaded >= before && read.loaded <= std::time::SystemTime::now());
    let text = |file: &str| fs::read_to_string(format!("/proc/{pid}/{file}")).unwrap();
    let link =
        |file: &str| fs::read_link(format!("/proc/{pid}/{file}")).unwrap().to_str().unwrap().to_owned();
    assert_eq!(read.comm, text("comm").trim_end());
    assert_eq!(read.exe, link("exe"));
    assert_eq!(read.cwd, "/tmp");
    assert_eq!(read.cmdline, ["sleep", "60"]);
    assert_eq!(read.environ, BTreeMap::from([("SHOWN".to_owned(), "yes".to_owned())]));
    assert_eq!(read.uid, fs::metadata(format!("/proc/{pid}")).unwrap().uid());
    assert_eq!(format!("mnt:[{}]", read.mount_namespace.unwrap()), link("ns/mnt"));
    assert!(text("cgroup").lines().any(|line| line.ends_with(&format!(":{}", read.cgroup))), "{read:?}");
    assert!(!read.kernel_thread);
    child.kill().unwrap();
    child.wait().unwrap();
    assert_eq!(cache.get(key), None, "it has ended");
    assert_eq!(cache.get_unchecked(key), Some(read));
}

#[derive(Clone, Default)]
struct Log(Arc<Mutex<Vec<u8>>>);

impl io::Write for Log {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        self.0.lock().unwrap().extend(bytes);
        Ok(bytes.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

impl MakeWriter<'_> for Log {
    type Writer = Self;

    fn make_writer(&self) -> Self {
        self.clone()
    }
}

/// Runs a closure and returns its log.
fn logged(run: impl FnOnce()) -> String {
    let log = Log::default();
    let subscriber = tracing_subscriber::fmt()
        .with_writer(log.clone())
        .with_max_level(tracing::Level::TRACE)
        .with_ansi(false)
        .finish();
    tracing::subscriber::with_default(subscriber, run);
    String::from_utf8(log.0.lock().unwrap().clone()).unwrap()
}

/// Checks that exited and idle processes make room, and then loads fail (R42).
#[test]
fn exited_and_idle_processes_make_room_then_loads_fail() {
    let root = tempfile::tempdir().unwrap();
    let mut cache = cache(root.path(), MetadataOptions { entries: 2, ..options() });
    let keys: Vec<ProcessKey> = (1..6).map(|tgid| put(root.path(), tgid, 100)).collect();
    cache.get_or_load(keys[0]).unwrap();
    cache.get_or_load(keys[1]).unwrap();
    // One that has exited, though no caller removed it.
    fs::remove_dir_all(root.path().join("1")).unwrap();
    cache.get_or_load(keys[2]).unwrap();
    assert_eq!((cache.len(), cache.stats().pruned), (2, 1));
    let full = cache.get_or_load(keys[3]).unwrap_err();
    assert!(matches!(full, MetadataError::Saturated { entries: 2, .. }), "{full}");
    // One that the caller removed.
    cache.remove(keys[1]);
    cache.get_or_load(keys[3]).unwrap();
    assert_eq!(cache.get_unchecked(keys[1]), None);

    // By bytes.
    let one = cache.stats().bytes / cache.len();
    let mut narrow = self::cache(root.path(), MetadataOptions { bytes: one * 5 / 2, ..options() });
    narrow.get_or_load(keys[1]).unwrap();
    narrow.get_or_load(keys[2]).unwrap();
    assert!(matches!(narrow.get_or_load(keys[3]), Err(MetadataError::Saturated { .. })));
    assert!(narrow.stats().bytes <= one * 5 / 2);

    // By time.
    let idle = MetadataOptions { entries: 1, idle: Duration::ZERO, ..options() };
    let mut brief = self::cache(root.path(), idle);
    brief.get_or_load(keys[1]).unwrap();
    brief.get_or_load(keys[2]).unwrap();
    assert_eq!(brief.len(), 1);
}

/// Checks the log of a full cache (R43).
#[test]
fn a_full_cache_is_logged_once_until_there_is_room_again() {
    let root = tempfile::tempdir().unwrap();
    let mut cache = cache(root.path(), MetadataOptions { entries: 1, ..options() });
    let (one, other) = (put(root.path(), 1, 100), put(root.path(), 2, 100));
    let log = logged(|| {
        cache.get_or_load(one).unwrap();
        for _ in 0..1000 {
            cache.get_or_load(other).unwrap_err();
        }
    });
    assert_eq!(log.matches("no room for the metadata").count(), 1, "{log}");
    assert_eq!(cache.stats().saturated, 1000);
    let log = logged(|| {
        cache.remove(one);
        cache.get_or_load(other).unwrap();
        cache.get_or_load(one).unwrap_err();
    });
    assert_eq!(log.matches("no room for the metadata").count(), 1, "{log}");
}

/// Checks `Debug`, errors and log (R44).
#[test]
fn no_text_shows_arguments_or_environment() {
    let root = tempfile::tempdir().unwrap();
    let key = put(root.path(), 7, 100);
    let mut text = String::new();
    let log = logged(|| {
        let mut cache = cache(root.path(), MetadataOptions { entries: 1, ..options() });
        let metadata = cache.get_or_load(key).unwrap();
        assert!(metadata.cmdline.iter().any(|argument| argument.contains(CANARY)), "the caller gets it");
        write!(text, "{cache:?} {cache:#?} {metadata:?} {metadata:#?} {:?}", cache.stats()).unwrap();
        let known: HashMap<_, _> = [(key, metadata)].into();
        write!(text, "{known:?}").unwrap();
        let other = put(root.path(), 8, 100);
        for error in [cache.get_or_load(other).unwrap_err(), cache.get_or_load(self::key(9, 1)).unwrap_err()]
        {
            let mut source: Option<&dyn std::error::Error> = Some(&error);
            while let Some(error) = source {
                write!(text, "{error} {error:?} ").unwrap();
                source = error.source();
            }
        }
        tracing::error!(?cache, "everything");
    });
    assert!(!text.contains(CANARY), "{text}");
    assert!(!log.contains(CANARY), "{log}");
    assert!(log.contains("everything") && text.contains("<2 arguments>") && text.contains("<1 variables>"));
}
