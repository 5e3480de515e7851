//! The profiles of the newest windows, in memory: for the debug page, and for captures that a client waits for.

use std::{
    collections::{BTreeMap, VecDeque},
    sync::Arc,
    time::SystemTime,
};

use gannet_proto::{
    ledger::Ledger,
    pprof::{Merger, PprofError},
    profiles::{Label, Profile},
};
use parking_lot::Mutex;
use tokio::sync::Notify;
use ulid::Ulid;

/// Windows in memory.
const MAX_WINDOWS: usize = 6;
/// Profiles in memory, over all windows. The newest window stays complete even if it has more.
const MAX_PROFILES: usize = 256;

/// The profiles of the newest windows. Clones share them.
#[derive(Clone, Default)]
pub struct RecentProfiles(Arc<Shared>);

#[derive(Default)]
struct Shared {
    windows: Mutex<VecDeque<(SystemTime, Vec<Arc<Profile>>)>>,
    /// The window that was added last.
    newest: Mutex<Option<Ulid>>,
    /// The profiles so far of each capture that a client waits for, and the ledger of all windows meanwhile, by capture number. The engine bounds how many
    /// captures run at one time.
    captures: Mutex<BTreeMap<u64, CaptureParts>>,
    added: Notify,
}

type CaptureParts = (Vec<Arc<Profile>>, Ledger);

/// Collects the profiles of one capture over all its windows, until dropped.
pub(crate) struct CaptureProfiles {
    recent: RecentProfiles,
    capture: u64,
}

impl RecentProfiles {
    /// Adds the profiles of a window, each with the number of its capture (0: none). Drops the oldest windows.
    pub(super) fn add(
        &self,
        id: Ulid,
        start: SystemTime,
        profiles: Vec<(u64, Arc<Profile>)>,
        ledger: &Ledger,
    ) {
        let mut captures = self.0.captures.lock();
        for (_, sum) in captures.values_mut() {
            sum.merge(ledger);
        }
        for (capture, profile) in &profiles {
            if let Some((parts, _)) = captures.get_mut(capture) {
                parts.push(Arc::clone(profile));
            }
        }
        drop(captures);
        let mut windows = self.0.windows.lock();
        windows.push_back((start, profiles.into_iter().map(|(_, profile)| profile).collect()));
        while windows.len() > MAX_WINDOWS
            || (windows.len() > 1 && windows.iter().map(|(_, p)| p.len()).sum::<usize>() > MAX_PROFILES)
        {
            windows.pop_front();
        }
        drop(windows);
        *self.0.newest.lock() = Some(id);
        self.0.added.notify_waiters();
    }

    /// Merges the profiles of all windows that started at `since` or later, of one process if `pid` is given. Profiles of
    /// different kinds cannot be merged: the first profile decides which kind counts. Returns `None` without samples.
    pub(crate) fn merged(
        &self,
        since: Option<SystemTime>,
        pid: Option<u32>,
    ) -> Result<Option<Profile>, PprofError> {
        let profiles: Vec<Arc<Profile>> = self
            .0
            .windows
            .lock()
            .iter()
            .filter(|(start, _)| since.is_none_or(|since| *start >= since))
            .flat_map(|(_, profiles)| profiles.iter().cloned())
            .collect();
        merge(&profiles, pid)
    }

    /// Collects the profiles of a capture from now on.
    pub(crate) fn collect(&self, capture: u64) -> CaptureProfiles {
        self.0.captures.lock().insert(capture, <_>::default());
        CaptureProfiles { recent: self.clone(), capture }
    }

    /// Waits until the next window is added.
    pub(crate) async fn next(&self) {
        self.0.added.notified().await;
    }
}

impl CaptureProfiles {
    /// Waits until the window `last` is added, then merges the capture's profiles. Returns `None` without samples. The ledger is
    /// that of the whole node, in the windows meanwhile.
    pub(crate) async fn finish(self, last: Option<Ulid>) -> Result<(Option<Profile>, Ledger), PprofError> {
        loop {
            let added = self.recent.0.added.notified();
            if last.is_none_or(|last| self.recent.0.newest.lock().is_some_and(|newest| newest >= last)) {
                break;
            }
            added.await;
        }
        let (parts, ledger) = self.recent.0.captures.lock().get(&self.capture).cloned().unwrap_or_default();
        Ok((merge(&parts, None)?, ledger))
    }
}

impl Drop for CaptureProfiles {
    fn drop(&mut self) {
        self.recent.0.captures.lock().remove(&self.capture);
    }
}

/// Merges the profiles that are of the first one's kind; of one process if `pid` is given.
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

/// Returns the profile with the samples of one process only.
fn of_process(profile: &Profile, pid: u32) -> Profile {
    let is_pid = |label: &Label| text(profile, label.key) == "pid" && label.num == i64::from(pid);
    let mut only = profile.clone();
    only.sample.retain(|sample| sample.label.iter().any(is_pid));
    only
}

fn text(profile: &Profile, index: i64) -> &str {
    usize::try_from(index).ok().and_then(|index| profile.string_table.get(index)).map_or("", String::as_str)
}
