//! What the parts of a running agent share: the engine, the account of samples, the last windows, and how it goes.

use std::{
    collections::BTreeMap,
    sync::{
        Arc, Mutex, MutexGuard, PoisonError,
        atomic::{AtomicBool, Ordering::Relaxed},
    },
    time::{Duration, SystemTime},
};

use crate::{
    config::Config, engine::Engine, export::SpoolStats, ledger::NodeLedger, pipeline::RecentProfiles,
    pods::Pods,
};

/// A running agent.
pub struct Node {
    /// What it was told.
    pub config: Config,
    /// The kernel side and everything that lives on its thread.
    pub engine: Engine,
    /// What became of the samples.
    pub ledger: NodeLedger,
    /// What is in the spool.
    pub spool: Arc<SpoolStats>,
    /// The last windows.
    pub recent: RecentProfiles,
    /// Whose containers there are.
    pub pods: Pods,
    /// When it started.
    pub started: SystemTime,
    /// Rules have been applied, be it an empty set.
    pub rules_loaded: AtomicBool,
    /// The control stream stands.
    pub connected: AtomicBool,
    /// What works less well than it should, by part.
    degraded: Mutex<BTreeMap<&'static str, String>>,
}

impl Node {
    /// Puts the parts together.
    pub fn new(
        config: Config,
        engine: Engine,
        ledger: NodeLedger,
        spool: Arc<SpoolStats>,
        recent: RecentProfiles,
        pods: Pods,
    ) -> Self {
        let mut degraded = BTreeMap::new();
        if !engine.degraded().is_empty() {
            degraded.insert("kernel", engine.degraded().join("; "));
        }
        Self {
            config,
            engine,
            ledger,
            spool,
            recent,
            pods,
            started: SystemTime::now(),
            rules_loaded: AtomicBool::new(false),
            connected: AtomicBool::new(false),
            degraded: Mutex::new(degraded),
        }
    }

    /// Says that a part works less well, or with `None` that it works again.
    pub fn set_degraded(&self, part: &'static str, reason: Option<String>) {
        let mut degraded = lock(&self.degraded);
        match reason {
            Some(reason) => degraded.insert(part, reason),
            None => degraded.remove(part),
        };
    }

    /// What works less well, in words.
    pub fn degraded(&self) -> Vec<String> {
        lock(&self.degraded).iter().map(|(part, reason)| format!("{part}: {reason}")).collect()
    }

    /// What the node still waits for before it is ready: rules, and the first list of pods where there is to be one; never
    /// the collector. The kernel side is at work since there is an engine at all.
    pub fn not_ready(&self) -> Option<String> {
        if !self.rules_loaded.load(Relaxed) {
            return Some("no rules have been applied yet".into());
        }
        if self.pods.is_synced() {
            return None;
        }
        let status = self.pods.status();
        let why = status.last_error.map_or_else(String::new, |error| format!(": {error}"));
        Some(format!("no pods have been told of yet{why}"))
    }

    /// Resident memory of this process, in bytes, and the CPU time of all its threads.
    pub fn usage(&self) -> (u64, Duration) {
        let pages = std::fs::read_to_string("/proc/self/statm")
            .ok()
            .and_then(|text| text.split_ascii_whitespace().nth(1)?.parse::<u64>().ok())
            .unwrap_or(0);
        let time = rustix::time::clock_gettime(rustix::time::ClockId::ProcessCPUTime);
        let cpu = Duration::try_from(time).unwrap_or_default();
        (pages * rustix::param::page_size() as u64, cpu)
    }
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}
