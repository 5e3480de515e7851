//! The running agent as its parts share it: engine, ledger, spool counters, recent profiles, pods and health.

use std::{
    collections::BTreeMap,
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering::Relaxed},
    },
    time::SystemTime,
};

use parking_lot::Mutex;

use crate::{
    config::Config,
    engine::Engine,
    export::{SpoolStats, StreamStats},
    ledger::NodeLedger,
    pipeline::RecentProfiles,
    pods::Pods,
    symbols::SymbolizerStats,
    tables::SuppliedTables,
};

/// A running agent.
pub(crate) struct Node {
    /// Options in force.
    pub(crate) config: Config,
    /// Handle to the thread that owns the kernel side.
    pub(crate) engine: Engine,
    /// Account of all samples.
    pub(crate) ledger: NodeLedger,
    /// Counters of the spool.
    pub(crate) spool: Arc<SpoolStats>,
    /// Counters of the stream of profiles.
    pub(crate) stream: Arc<StreamStats>,
    /// Counters of the symbolizer.
    pub(crate) symbols: Arc<SymbolizerStats>,
    /// Profiles of the last windows.
    pub(crate) recent: RecentProfiles,
    /// Pods and their containers.
    pub(crate) pods: Pods,
    /// Start of the agent.
    pub(crate) started: SystemTime,
    /// The engine has applied rules, even if the set was empty.
    pub(crate) rules_loaded: AtomicBool,
    /// The control stream to the collector is up.
    pub(crate) connected: AtomicBool,
    /// Reasons why parts work with limits, by part.
    degraded: Mutex<BTreeMap<&'static str, String>>,
    /// Unwind tables that the operator supplies.
    supplied: Mutex<SuppliedTables>,
}

impl Node {
    pub(crate) fn new(
        config: Config,
        engine: Engine,
        ledger: NodeLedger,
        (spool, stream): (Arc<SpoolStats>, Arc<StreamStats>),
        symbols: Arc<SymbolizerStats>,
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
            stream,
            symbols,
            recent,
            pods,
            started: SystemTime::now(),
            rules_loaded: AtomicBool::new(false),
            connected: AtomicBool::new(false),
            degraded: Mutex::new(degraded),
            supplied: Mutex::default(),
        }
    }

    /// Notes the supplied unwind tables in force, and logs them.
    pub(crate) fn set_supplied(&self, supplied: SuppliedTables) {
        supplied.log();
        self.set_degraded("unwind tables", supplied.degraded());
        *self.supplied.lock() = supplied;
    }

    /// Returns the supplied unwind tables in force.
    pub(crate) fn supplied(&self) -> SuppliedTables {
        self.supplied.lock().clone()
    }

    /// Records why a part works with limits, or with `None` that it works again.
    pub(crate) fn set_degraded(&self, part: &'static str, reason: Option<String>) {
        let mut degraded = self.degraded.lock();
        match reason {
            Some(reason) => degraded.insert(part, reason),
            None => degraded.remove(part),
        };
    }

    /// Returns one line for each part that works with limits.
    pub(crate) fn degraded(&self) -> Vec<String> {
        self.degraded.lock().iter().map(|(part, reason)| format!("{part}: {reason}")).collect()
    }

    /// Returns what the node waits for before it is ready: its rules, and the first list of pods if there is a pod source.
    /// It never waits for the collector, and the kernel side works as soon as there is an engine.
    pub(crate) fn not_ready(&self) -> Option<String> {
        if !self.rules_loaded.load(Relaxed) {
            return Some("no rules have been applied yet".into());
        }
        if self.pods.is_synced() {
            return None;
        }
        let status = self.pods.status();
        let why = status.last_error.map_or_else(String::new, |error| format!(": {error}"));
        Some(format!("the pod source has not sent its first list{why}"))
    }
}
