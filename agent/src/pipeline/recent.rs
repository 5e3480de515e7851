//! The profiles of the newest windows, in memory: for the debug page, and for captures that a client waits for.

use std::{
    collections::{BTreeMap, VecDeque},
    sync::Arc,
    time::SystemTime,
};

use gannet_proto::{
    control::capture,
    labels::Labels,
    ledger::Ledger,
    pprof::{Merger, PprofError},
    profiles::{Label, Profile},
};
use parking_lot::Mutex;
use tokio::sync::Notify;
use ulid::Ulid;

use crate::symbols::OFF_CPU_TYPE;

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

/// A profile of a window.
#[derive(Clone)]
pub(super) struct NewProfile {
    /// The number of its capture; 0: none.
    pub(super) capture: u64,
    /// Its labels, if it is of a capture.
    pub(super) labels: Labels,
    pub(super) profile: Arc<Profile>,
}

/// The profiles of a capture so far, with their labels and the ledger.
#[derive(Clone, Default)]
struct CaptureParts {
    profiles: Vec<Arc<Profile>>,
    /// Labels that all its profiles share; `None` without a profile.
    labels: Option<Labels>,
    ledger: Ledger,
}

impl CaptureParts {
    fn add(&mut self, labels: &Labels, profile: &Arc<Profile>) {
        self.labels
            .get_or_insert_with(|| labels.clone())
            .retain(|name, value| labels.get(name) == Some(value));
        self.profiles.push(Arc::clone(profile));
    }
}

/// Collects the profiles of one capture over all its windows, until dropped.
pub(crate) struct CaptureProfiles {
    recent: RecentProfiles,
    capture: u64,
}

impl RecentProfiles {
    /// Adds the profiles of a window. Drops the oldest windows.
    pub(super) fn add(&self, id: Ulid, start: SystemTime, profiles: Vec<NewProfile>, ledger: &Ledger) {
        let mut captures = self.0.captures.lock();
        for parts in captures.values_mut() {
            parts.ledger.merge(ledger);
        }
        for NewProfile { capture, labels, profile } in &profiles {
            if let Some(parts) = captures.get_mut(capture) {
                parts.add(labels, profile);
            }
        }
        drop(captures);
        let mut windows = self.0.windows.lock();
        windows.push_back((start, profiles.into_iter().map(|new| new.profile).collect()));
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
    /// Waits until the window `last` is added, then merges the capture's profiles to one of each kind. Kinds without
    /// samples are missing. The labels are those that all profiles share. The ledger is that of the whole node, in the windows meanwhile.
    pub(crate) async fn finish(
        self,
        last: Option<Ulid>,
    ) -> Result<(Vec<(capture::Kind, Profile)>, Labels, Ledger), PprofError> {
        loop {
            let added = self.recent.0.added.notified();
            if last.is_none_or(|last| self.recent.0.newest.lock().is_some_and(|newest| newest >= last)) {
                break;
            }
            added.await;
        }
        let parts = self.recent.0.captures.lock().get(&self.capture).cloned().unwrap_or_default();
        let CaptureParts { profiles: parts, labels, ledger } = parts;
        let mut merged = Vec::new();
        for kind in [capture::Kind::OnCpu, capture::Kind::OffCpu] {
            let of_kind: Vec<_> = parts.iter().filter(|part| kind_of(part) == kind).cloned().collect();
            merged.extend(merge(&of_kind, None)?.map(|profile| (kind, profile)));
        }
        Ok((merged, labels.unwrap_or_default(), ledger))
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

/// Returns the kind of an agent's profile.
fn kind_of(profile: &Profile) -> capture::Kind {
    let is_off_cpu = profile.sample_type.iter().any(|sample| text(profile, sample.r#type) == OFF_CPU_TYPE);
    if is_off_cpu { capture::Kind::OffCpu } else { capture::Kind::OnCpu }
}

fn text(profile: &Profile, index: i64) -> &str {
    usize::try_from(index).ok().and_then(|index| profile.string_table.get(index)).map_or("", String::as_str)
}

#[cfg(test)]
mod tests {
    use gannet_proto::pprof::{Builder, Header};

    use super::*;

    fn profile(value_type: &'static str) -> Arc<Profile> {
        let mut builder = Builder::new(Header {
            sample_types: &[("samples", "count"), (value_type, "nanoseconds")],
            period_type: (value_type, "nanoseconds"),
            period: 1,
            time_nanos: 0,
            duration_nanos: 1,
        });
        builder.comment("a part");
        Arc::new(builder.finish())
    }

    #[tokio::test]
    async fn a_capture_returns_both_kinds_and_shared_labels() {
        let recent = RecentProfiles::default();
        let capture = recent.collect(7);
        let new = |capture, kind, pod: &str| {
            let pairs = [("service_name", "shop"), ("pod", pod)];
            let labels = pairs.map(|(name, value)| (name.to_owned(), value.to_owned())).into();
            NewProfile { capture, labels, profile: profile(kind) }
        };
        let id = Ulid::from_parts(1, 1);
        let profiles =
            vec![new(7, "cpu", "a"), new(7, OFF_CPU_TYPE, "a"), new(7, "cpu", "b"), new(8, "cpu", "c")];
        recent.add(id, SystemTime::now(), profiles, &Ledger { ticks: 5, ..Ledger::default() });
        let (merged, labels, ledger) = capture.finish(Some(id)).await.unwrap();
        assert_eq!(ledger.ticks, 5);
        assert_eq!(labels, [("service_name".to_owned(), "shop".to_owned())].into());
        let kinds: Vec<_> = merged.iter().map(|(kind, _)| *kind).collect();
        assert_eq!(kinds, [capture::Kind::OnCpu, capture::Kind::OffCpu]);
        for (kind, profile) in &merged {
            assert_eq!(kind_of(profile), *kind);
        }
    }
}
