//! The ledger: its two sides come from different sources, and a sample that is gone is missing.

use std::{
    os::fd::AsFd as _,
    process::Command,
    ptr, slice,
    sync::{
        atomic::{AtomicU64, Ordering},
        mpsc,
    },
    thread,
    time::{Duration, Instant},
};

use gannet_agent::{
    engine::{Engine, EngineOptions, Window},
    kernel::{Counters, KernelOptions, UnwindDriver},
    model::StackEnd,
    rules::{RuleSource, SourceRules, ad_hoc},
    tables::TableSources,
};
use gannet_proto::{
    control::{
        Match,
        capture::Kind::{self, OffCpu, OnCpu},
    },
    ledger::{Ledger, LossReason},
};
use libbpf_rs::{MapCore as _, MapHandle, query::MapInfoIter};
use rustix::mm::{MapFlags, ProtFlags, mmap};

use crate::common::{MUSL_WITHOUT_TABLES, Running, engine_options, program, slower, with_holes};

/// A program that computes for ever in one thread, and sleeps for some milliseconds again and again in another.
const WORK: &str = r"
#include <pthread.h>
#include <unistd.h>
static void *nap(void *arg) { for (;;) usleep(3000); }
int main(void) {
	pthread_t thread;
	pthread_create(&thread, 0, nap, 0);
	for (volatile long i = 0;; i++)
		;
}
";

struct Account {
    engine: Engine,
    windows: mpsc::Receiver<Window>,
    runtime: tokio::runtime::Runtime,
}

impl Account {
    /// Samples the program by one rule for each list of kinds.
    fn of(comm: &str, rules: &[&[Kind]], kernel: KernelOptions) -> Self {
        Self::with_tables(comm, rules, kernel, Some(TableSources::default()))
    }

    /// Without tables the kernel unwinds by frame pointers.
    fn with_tables(
        comm: &str,
        rules: &[&[Kind]],
        kernel: KernelOptions,
        tables: Option<TableSources>,
    ) -> Self {
        let (send, windows) = mpsc::channel();
        let options =
            EngineOptions { kernel, window: Duration::from_millis(300), tables, ..engine_options() };
        let engine = Engine::start(options, move |window: Window| drop(send.send(window))).unwrap();
        let matches = || Match { comm: vec![comm.to_owned()], ..Match::default() };
        let rule = |(number, kinds): (usize, &&[Kind])| {
            ad_hoc(&format!("rule{number}"), matches(), 499 / slower(), kinds)
        };
        let rules = rules.iter().enumerate().map(rule).collect();
        let runtime = tokio::runtime::Builder::new_current_thread().build().unwrap();
        let set = SourceRules { rules, ..SourceRules::default() };
        assert_eq!(runtime.block_on(engine.replace(RuleSource::Local, set)).unwrap(), []);
        Self { engine, windows, runtime }
    }

    /// Ends the sampling. Returns the sum of the ledgers of all windows, of which each has none or at most one sample missing,
    /// and the kernel's counters.
    fn finish(self) -> (Ledger, Counters) {
        self.runtime.block_on(self.engine.set_sampling(false)).unwrap();
        thread::sleep(Duration::from_millis(100));
        let counters = self.runtime.block_on(self.engine.view()).unwrap().counters.unwrap();
        self.engine.stop();
        let mut sum = Ledger::default();
        for window in &self.windows {
            let samples: u64 = window.profiles.iter().map(|profile| profile.samples).sum();
            assert_eq!(samples, window.ledger.delivered);
            sum.merge(&window.ledger);
        }
        (sum, counters)
    }
}

#[test]
fn every_sample_that_the_kernel_counts_is_accounted_for() {
    let work = program("gannet-account", WORK, &["-pthread"]);
    let account = Account::of("gannet-account", &[&[OnCpu], &[OnCpu]], KernelOptions::default());
    let _running = [Running::start(&mut Command::new(&work)), Running::start(&mut Command::new(&work))];
    thread::sleep(Duration::from_secs(2) * slower());
    let (ledger, counters) = account.finish();
    // Two rules: each sample counts twice.
    assert!(ledger.delivered > 500, "{ledger}");
    assert_eq!((ledger.taken, ledger.unaccounted()), (counters.taken, 0), "{ledger}");
}

#[test]
fn blocked_time_of_several_windows_is_accounted_for() {
    let work = program("gannet-account", WORK, &["-pthread"]);
    let account = Account::of("gannet-account", &[&[OffCpu], &[OnCpu, OffCpu]], KernelOptions::default());
    let _running = [Running::start(&mut Command::new(&work)), Running::start(&mut Command::new(&work))];
    thread::sleep(Duration::from_secs(2) * slower());
    let (ledger, counters) = account.finish();
    assert!(ledger.delivered > 500, "{ledger}");
    // Intervals that last over the end of a window are counted by the agent.
    assert!(ledger.taken >= counters.taken, "{ledger}");
    assert_eq!(ledger.unaccounted(), 0, "{ledger}");
}

/// Checks that a full ring buffer and a busy reader cost samples under their reason only.
#[test]
fn a_full_ring_leaves_nothing_unaccounted() {
    let work = program("gannet-account", WORK, &["-pthread"]);
    let kernel = KernelOptions { ring_bytes: 64 << 10, ..KernelOptions::default() };
    let account = Account::of("gannet-account", &[&[OnCpu], &[OnCpu, OffCpu]], kernel);
    let _running = [Running::start(&mut Command::new(&work)), Running::start(&mut Command::new(&work))];
    thread::sleep(Duration::from_millis(500) * slower());
    let (go, wait) = mpsc::channel::<()>();
    account.runtime.block_on(account.engine.hold(wait)).unwrap();
    thread::sleep(Duration::from_secs(1) * slower());
    drop(go);
    thread::sleep(Duration::from_millis(500) * slower());
    let (ledger, _) = account.finish();
    assert!(ledger.lost[&LossReason::RingFull] > 10, "{ledger}");
    assert_eq!(ledger.unaccounted(), 0, "{ledger}");
}

/// Checks that samples whose stack has a page that cannot be read are delivered, marked, and counted by their end: unwound by
/// both drivers, by the agent (the first ones), and by the kernel.
#[test]
fn stacks_that_end_at_an_unreadable_page_are_counted() {
    let (fp, default) = (&["-fno-omit-frame-pointer"][..], KernelOptions::default().unwind_driver);
    for (name, flags, unwind_driver, has_tables) in [
        ("hole-loop", &[][..], default, true),
        ("hole-chain", &[][..], UnwindDriver::TailCalls, true),
        ("hole-musl", &MUSL_WITHOUT_TABLES[..], default, true),
        ("hole-kernel", fp, default, false),
    ] {
        let running = with_holes(name, flags);
        let kept = running[2].0.id();
        thread::sleep(Duration::from_millis(100) * slower());
        let kernel = KernelOptions { unwind_driver, ..KernelOptions::default() };
        let account = Account::with_tables(name, &[&[OnCpu]], kernel, has_tables.then(TableSources::default));
        // The agent unwinds the first samples; then the kernel has the tables of all three processes.
        let begun = Instant::now();
        let in_kernel = || {
            let view = account.runtime.block_on(account.engine.view()).unwrap();
            view.unwind_tables.is_none_or(|tables| tables.processes == 3)
        };
        while !in_kernel() {
            assert!(begun.elapsed() < Duration::from_secs(60) * slower(), "{name}: the kernel has no tables");
            thread::sleep(Duration::from_millis(20));
        }
        let raw = || account.runtime.block_on(account.engine.view()).unwrap().counters.unwrap().raw;
        let raw_before = raw();
        thread::sleep(Duration::from_secs(1) * slower());
        account.runtime.block_on(account.engine.set_sampling(false)).unwrap();
        thread::sleep(Duration::from_millis(100));
        let view = account.runtime.block_on(account.engine.view()).unwrap();
        account.engine.stop();
        let (mut ledger, mut unreadable, mut others) = (Ledger::default(), 0, 0);
        for window in &account.windows {
            ledger.merge(&window.ledger);
            for process in window.profiles.iter().flat_map(|profile| &profile.raw.processes) {
                let is_kept = process.key.tgid == kept;
                let end = if is_kept { StackEnd::Complete } else { StackEnd::Unreadable };
                assert!(process.stacks.iter().all(|stack| stack.end == end), "{name}: {process:?}");
                let count = if is_kept { &mut others } else { &mut unreadable };
                *count += process.stacks.iter().map(|stack| stack.count).sum::<u64>();
            }
        }
        let ends = view.stack_ends;
        assert!(unreadable > 50 && others > 25, "{name}: {ends:?}");
        assert_eq!(ends.unreadable, unreadable, "{name}: {ends:?}");
        assert_eq!(
            ends.complete + ends.guessed,
            others,
            "{name}: the third program's stacks are complete: {ends:?}"
        );
        assert_eq!(raw_before > 0, has_tables, "{name}: the agent unwinds the first samples");
        assert_eq!(view.counters.unwrap().raw, raw_before, "{name}: the kernel unwinds the others");
        assert_eq!((ledger.delivered, ledger.unaccounted()), (unreadable + others, 0), "{name}: {ledger}");
        assert!(ledger.lost.is_empty(), "{name}: {ledger}");
    }
}

/// Checks the ledger from outside: another reader takes one sample out of the ring buffer, and no part of the agent notices.
#[test]
fn a_sample_taken_out_of_the_ring_is_unaccounted() {
    let work = program("gannet-account", WORK, &["-pthread"]);
    let account = Account::of("gannet-account", &[&[OnCpu]], KernelOptions::default());
    let _running = Running::start(&mut Command::new(&work));
    let ring = Ring::newest();
    let begun = Instant::now();
    let mut stolen = false;
    while !stolen {
        assert!(begun.elapsed() < Duration::from_secs(30) * slower(), "no sample at the head of the ring");
        let (go, wait) = mpsc::channel::<()>();
        account.runtime.block_on(account.engine.hold(wait)).unwrap();
        thread::sleep(Duration::from_millis(100));
        stolen = ring.steal_sample();
        drop(go);
    }
    thread::sleep(Duration::from_secs(1));
    let (ledger, counters) = account.finish();
    assert_eq!((ledger.taken, ledger.unaccounted()), (counters.taken, 1), "{ledger}");
}

/// The ring buffer as any process sees it that has the map.
struct Ring {
    consumer: &'static AtomicU64,
    producer: &'static AtomicU64,
    data: &'static [AtomicU64],
    _map: MapHandle,
}

impl Ring {
    /// Opens the ring buffer of the engine that was started last.
    fn newest() -> Self {
        let maps = MapInfoIter::default().filter(|map| map.name == "events");
        let map = MapHandle::from_map_id(maps.map(|map| map.id).max().unwrap()).unwrap();
        let page = rustix::param::page_size();
        let bytes = map.max_entries() as usize;
        // SAFETY: the kernel chooses the addresses. The first page holds the consumer's position, the second one the
        // producer's; behind it follow the records twice.
        let (consumer, producer) = unsafe {
            let readable = mmap(
                ptr::null_mut(),
                page + 2 * bytes,
                ProtFlags::READ,
                MapFlags::SHARED,
                map.as_fd(),
                page as u64,
            );
            let writable = ProtFlags::READ | ProtFlags::WRITE;
            (
                mmap(ptr::null_mut(), page, writable, MapFlags::SHARED, map.as_fd(), 0).unwrap(),
                readable.unwrap(),
            )
        };
        // SAFETY: the mappings stay until the process ends, are aligned to pages, and are this long.
        unsafe {
            Self {
                consumer: &*consumer.cast(),
                producer: &*producer.cast(),
                data: slice::from_raw_parts(producer.byte_add(page).cast(), bytes / 8),
                _map: map,
            }
        }
    }

    /// Moves the consumer over the first record, if that is a sample.
    fn steal_sample(&self) -> bool {
        let at = self.consumer.load(Ordering::Acquire);
        if at == self.producer.load(Ordering::Acquire) {
            return false;
        }
        let word = |index: u64| self.data[index as usize % self.data.len()].load(Ordering::Acquire);
        // The header: length, two flags, and a page number. A sample's first word holds its kind, which is 1.
        let length = word(at / 8) as u32;
        if length >> 30 != 0 || word(at / 8 + 1) as u32 != 1 {
            return false;
        }
        self.consumer.store(at + u64::from(length).next_multiple_of(8) + 8, Ordering::Release);
        true
    }
}
