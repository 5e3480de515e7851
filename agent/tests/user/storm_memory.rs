//! An endless storm of short processes: the process table takes no more memory than in the first windows.

use std::{
    alloc::{GlobalAlloc, Layout, System},
    env, io,
    num::NonZeroUsize,
    path::PathBuf,
    process::Command,
    sync::{
        Arc,
        atomic::{AtomicUsize, Ordering::Relaxed},
    },
};

use gannet_agent::{
    cgroup::CgroupHierarchy,
    model::{ExitStatus, FileNumbers, MappingEvent, NewMapping, Origin, ProcessKey, Subject},
    process::{ProcFs, ProcessTable},
};

/// Counts the bytes that all threads hold: workers read for the table.
struct Counting;

static HELD: AtomicUsize = AtomicUsize::new(0);
/// Set in the child that runs the test by itself: other tests of this binary may run on other threads.
const ALONE: &str = "GANNET_TEST_ALONE";

// SAFETY: the system's allocator does the work; the counter needs no allocation and has no destructor.
unsafe impl GlobalAlloc for Counting {
    unsafe fn alloc(&self, layout: Layout) -> *mut u8 {
        HELD.fetch_add(layout.size(), Relaxed);
        // SAFETY: the caller's promise.
        unsafe { System.alloc(layout) }
    }

    unsafe fn dealloc(&self, pointer: *mut u8, layout: Layout) {
        HELD.fetch_sub(layout.size(), Relaxed);
        // SAFETY: the caller's promise.
        unsafe { System.dealloc(pointer, layout) }
    }
}

#[global_allocator]
static ALLOCATOR: Counting = Counting;

/// A `/proc` in which every process has exited.
struct Exited;

impl ProcFs for Exited {
    fn read(&self, _: ProcessKey, _: &'static str, _: u64) -> io::Result<Vec<u8>> {
        Err(io::ErrorKind::NotFound.into())
    }

    fn link(&self, _: ProcessKey, _: &'static str) -> io::Result<PathBuf> {
        Err(io::ErrorKind::NotFound.into())
    }

    fn owner(&self, _: ProcessKey) -> io::Result<u32> {
        Err(io::ErrorKind::NotFound.into())
    }

    fn now_ns(&self) -> u64 {
        0
    }
}

/// Passes the events of one process to the table: mappings, exec, a sample of every tenth process, exit.
fn live(table: &mut ProcessTable, number: u64) {
    let subject = |ktime_ns| Subject {
        // Above the PIDs that a kernel assigns.
        key: ProcessKey { tgid: 5_000_000 + (number % 30_000) as u32, start_boottime_ns: number },
        exec_id: 2,
        ktime_ns,
        cgroup_id: 1,
        comm: "storm-child".into(),
        rules: 1,
        candidates: 0,
    };
    let (now, tgid) = (number * 1_000, subject(0).key.tgid);
    table.mapping_event(MappingEvent::Cleared { tgid, ktime_ns: now });
    for (number, path) in (1..).zip(["/bin/storm-child", "/lib/ld.so", "/lib/libc.so", "/lib/libm.so"]) {
        let mapping = NewMapping {
            start: number << 20,
            end: (number << 20) + 4096,
            offset: 0,
            dev: 2049,
            inode: number,
            path: path.into(),
        };
        table.mapping_event(MappingEvent::Mapped { tgid, ktime_ns: now + 1, mapping });
    }
    table.exec(&subject(now + 2), Origin::default(), "/bin/storm-child", FileNumbers::default()).unwrap();
    if number.is_multiple_of(10) {
        table.sampled(&subject(now + 3), &[]).unwrap();
    }
    table.exit(&subject(now + 4), ExitStatus(0));
}

#[test]
fn an_endless_storm_takes_no_more_memory() {
    const WINDOWS: u64 = 60;
    if env::var_os(ALONE).is_none() {
        let name = "storm_memory::an_endless_storm_takes_no_more_memory";
        let alone = Command::new(env::current_exe().unwrap())
            .args(["--exact", name, "--nocapture"])
            .env(ALONE, "1")
            .output()
            .unwrap();
        let text = String::from_utf8_lossy(&alone.stdout);
        assert!(
            alone.status.success() && text.contains("1 passed"),
            "{text}{}",
            String::from_utf8_lossy(&alone.stderr)
        );
        return;
    }
    // The fill of the map of past images decides when it grows, so several sizes of storms are tried.
    for a_window in [300, 700, 1_300, 1_700] {
        let files = NonZeroUsize::new(64).unwrap();
        let before = HELD.load(Relaxed);
        let mut table = ProcessTable::reading(CgroupHierarchy::V2, 40_000, files, Arc::new(Exited));
        let mut held = Vec::new();
        for window in 0..WINDOWS {
            for number in 0..a_window {
                live(&mut table, window * a_window + number);
            }
            held.push(HELD.load(Relaxed).wrapping_sub(before));
            table.next_window(|_| false);
        }
        // The table holds the past images of two windows.
        let (early, max) = (held[1], *held.iter().max().unwrap());
        eprintln!("{a_window} in a window: {early} bytes after two, at most {max} after {WINDOWS}");
        assert!(max < early + early / 10, "{a_window} in a window: {held:?}");
    }
}
