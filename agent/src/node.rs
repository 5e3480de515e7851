//! What the parts of a running agent share: the engine, the account of samples, the last windows, and how it goes.

use std::{
    collections::{BTreeMap, VecDeque},
    sync::{
        Arc, Mutex, MutexGuard, PoisonError,
        atomic::{AtomicBool, Ordering::Relaxed},
    },
    time::{Duration, SystemTime},
};

use gannet_proto::{
    pprof::{Merger, PprofError},
    profiles::{Label, Profile},
};
use tokio::sync::Notify;
use ulid::Ulid;

use crate::{config::Config, engine::Engine, export::SpoolStats, ledger::NodeLedger, pods::Pods};

/// Windows that are kept for the debug page.
const RECENT_WINDOWS: usize = 6;
/// Profiles that are kept for it, whatever the windows.
const RECENT_PROFILES: usize = 256;

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
    pub recent: Recent,
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
        recent: Recent,
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

/// The profiles of the last windows, for the node's own page.
#[derive(Clone, Default)]
pub struct Recent(Arc<RecentInner>);

#[derive(Default)]
struct RecentInner {
    windows: Mutex<VecDeque<(SystemTime, Vec<Arc<Profile>>)>>,
    /// The newest window that was added.
    newest: Mutex<Option<Ulid>>,
    /// Captures that somebody waits for, with what they have so far. As many as may be asked for at one time.
    collecting: Mutex<BTreeMap<u64, Vec<Arc<Profile>>>>,
    more: Notify,
}

/// Collects the profiles of one capture, however many windows it goes over.
pub struct Collecting {
    recent: Recent,
    capture: u64,
}

impl Recent {
    /// A window has been turned into profiles, each with the number of its capture.
    pub fn add(&self, id: Ulid, start: SystemTime, profiles: Vec<(u64, Arc<Profile>)>) {
        let mut collecting = lock(&self.0.collecting);
        for (capture, profile) in &profiles {
            if let Some(parts) = collecting.get_mut(capture) {
                parts.push(Arc::clone(profile));
            }
        }
        drop(collecting);
        let mut windows = lock(&self.0.windows);
        windows.push_back((start, profiles.into_iter().map(|(_, profile)| profile).collect()));
        while windows.len() > RECENT_WINDOWS
            || (windows.len() > 1 && windows.iter().map(|(_, p)| p.len()).sum::<usize>() > RECENT_PROFILES)
        {
            windows.pop_front();
        }
        drop(windows);
        *lock(&self.0.newest) = Some(id);
        self.0.more.notify_waiters();
    }

    /// All profiles since `since`, merged; of one process if `pid` is given. Only profiles of one kind make a whole: the
    /// first one's kind is taken. None: there is no sample.
    pub fn merged(&self, since: Option<SystemTime>, pid: Option<u32>) -> Result<Option<Profile>, PprofError> {
        let profiles: Vec<Arc<Profile>> = lock(&self.0.windows)
            .iter()
            .filter(|(start, _)| since.is_none_or(|since| *start >= since))
            .flat_map(|(_, profiles)| profiles.iter().cloned())
            .collect();
        merge(&profiles, pid)
    }

    /// Keeps the profiles of a capture from now on.
    pub fn collect(&self, capture: u64) -> Collecting {
        lock(&self.0.collecting).insert(capture, Vec::new());
        Collecting { recent: self.clone(), capture }
    }

    /// Returns when the next window is there.
    pub async fn next(&self) {
        self.0.more.notified().await;
    }
}

impl Collecting {
    /// Waits until this window is there, then merges what the capture has. None: there is no sample.
    pub async fn finish(self, last: Option<Ulid>) -> Result<Option<Profile>, PprofError> {
        loop {
            let more = self.recent.0.more.notified();
            if last.is_none_or(|last| lock(&self.recent.0.newest).is_some_and(|newest| newest >= last)) {
                break;
            }
            more.await;
        }
        let parts = lock(&self.recent.0.collecting).get(&self.capture).cloned().unwrap_or_default();
        merge(&parts, None)
    }
}

impl Drop for Collecting {
    fn drop(&mut self) {
        lock(&self.recent.0.collecting).remove(&self.capture);
    }
}

/// Merges profiles of one kind, the first one's; of one process if `pid` is given.
fn merge(profiles: &[Arc<Profile>], pid: Option<u32>) -> Result<Option<Profile>, PprofError> {
    let mut merger = Merger::new();
    let mut kind = None;
    for profile in profiles {
        let this = profile.sample_type.iter().map(|t| text(profile, t.r#type).to_owned()).collect::<Vec<_>>();
        if *kind.get_or_insert_with(|| this.clone()) != this {
            continue;
        }
        match pid {
            None => merger.add(profile)?,
            Some(pid) => {
                let only = of_process(profile, pid);
                if !only.sample.is_empty() {
                    merger.add(&only)?;
                }
            }
        }
    }
    Ok(merger.finish())
}

/// The samples of one process.
fn of_process(profile: &Profile, pid: u32) -> Profile {
    let is_pid = |label: &Label| text(profile, label.key) == "pid" && label.num == i64::from(pid);
    let mut only = profile.clone();
    only.sample.retain(|sample| sample.label.iter().any(is_pid));
    only
}

fn text(profile: &Profile, index: i64) -> &str {
    usize::try_from(index).ok().and_then(|index| profile.string_table.get(index)).map_or("", String::as_str)
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}
