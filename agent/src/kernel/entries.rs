//! Entries of single processes in the BPF maps that have one for each process: marks, list frames, label sources and thread contexts.
//!
//! The kernel refuses an entry if the map is full, or if memory is short. A refused entry waits here, and is written again after
//! a pause, which doubles with each refusal. Its owner does not see that: it writes an entry, and removes it when the process
//! ends.

use std::{
    collections::HashMap,
    time::{Duration, Instant},
};

use libbpf_rs::{MapCore, MapFlags};

use super::{Kernel, KernelError, Shortage};
use crate::model::ProcessKey;

/// The pause before the second try. Each further refusal doubles it, up to the longest.
const FIRST_PAUSE: Duration = Duration::from_secs(1);
const MAX_PAUSE: Duration = Duration::from_secs(64);
/// The shortest time between two lines about one map and reason.
const LOG_INTERVAL: Duration = Duration::from_secs(60);
/// Entries that wait at one time. The agent writes others again with the next change of rules, mappings or image.
const MAX_WAITING: usize = 8192;

/// A map with one entry for each process.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub(super) enum EntryMap {
    Marks,
    ListFrames,
    LabelSources,
    ThreadContexts,
}

impl EntryMap {
    const ALL: [Self; 4] = [Self::Marks, Self::ListFrames, Self::LabelSources, Self::ThreadContexts];

    fn name(self) -> &'static str {
        match self {
            Self::Marks => "marks",
            Self::ListFrames => "list_frames",
            Self::LabelSources => "label_sources",
            Self::ThreadContexts => "thread_contexts",
        }
    }

    /// Returns the lack of a process without its entry, for the log.
    fn lack(self) -> &'static str {
        match self {
            Self::Marks => "it is not sampled as its rules ask",
            Self::ListFrames => "its stacks lack the functions of its interpreter",
            Self::LabelSources => "its samples lack the labels of its tasks",
            Self::ThreadContexts => "its samples lack the spans of its threads",
        }
    }
}

/// Refused writes of one map's entries, by what was missing: one for each try.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct RefusedEntries {
    /// The name of the map.
    pub map: &'static str,
    /// The map was full.
    pub entries: u64,
    /// Memory of the kernel, or of the agent's control group.
    pub memory: u64,
    /// The kernel refused for another reason.
    pub other: u64,
}

impl RefusedEntries {
    /// Returns the counts with the names of what was missing.
    pub(crate) fn by_name(&self) -> [(&'static str, u64); 3] {
        let Self { map: _, entries, memory, other } = *self;
        [("entries", entries), ("memory", memory), ("other", other)]
    }
}

fn cure(shortage: Option<Shortage>) -> &'static str {
    match shortage {
        Some(Shortage::Entries) => {
            "raise --processes, or narrow the rules, so that fewer processes are sampled"
        }
        Some(Shortage::Memory) => "raise the memory limit of the agent, or free memory on the node",
        None => "report it, if it stays",
    }
}

/// An entry that the kernel refused.
struct Waiting {
    key: ProcessKey,
    value: Vec<u8>,
    until: Instant,
    pause: Duration,
}

#[derive(Default)]
struct OfMap {
    /// By thread group id.
    waiting: HashMap<u32, Waiting>,
    /// By what was missing: refusals, the last line, and the refusals since.
    refused: [(u64, Option<Instant>, u64); 3],
}

/// The entries that the kernel refused.
#[derive(Default)]
pub(super) struct Entries([OfMap; EntryMap::ALL.len()]);

impl Entries {
    /// Keeps a refused entry for another try. Returns the line to log, at most one a minute for each map and reason.
    fn refuse(
        &mut self,
        map: EntryMap,
        key: ProcessKey,
        value: &[u8],
        error: &KernelError,
        now: Instant,
    ) -> Option<String> {
        let OfMap { waiting, refused } = &mut self.0[map as usize];
        let former = waiting.get(&key.tgid).filter(|former| former.key == key);
        let pause = former.map_or(FIRST_PAUSE, |former| (former.pause * 2).min(MAX_PAUSE));
        if waiting.len() < MAX_WAITING || waiting.contains_key(&key.tgid) {
            waiting.insert(key.tgid, Waiting { key, value: value.to_vec(), until: now + pause, pause });
        }
        let shortage = error.shortage();
        let (count, logged, since) = &mut refused[match shortage {
            Some(Shortage::Entries) => 0,
            Some(Shortage::Memory) => 1,
            None => 2,
        }];
        *count += 1;
        if logged.is_some_and(|last| now.duration_since(last) < LOG_INTERVAL) {
            *since += 1;
            return None;
        }
        *logged = Some(now);
        let others = match std::mem::take(since) {
            0 => String::new(),
            n => format!(" (and {n} others since the last such line)"),
        };
        Some(format!(
            "no entry for process {key}{others}, {}; the agent tries again: {error}; {}",
            map.lack(),
            cure(shortage)
        ))
    }

    /// The kernel has the entry of a process, or does not need it any more.
    fn forget(&mut self, map: EntryMap, tgid: u32) {
        self.0[map as usize].waiting.remove(&tgid);
    }

    /// Returns the entries whose pause is over.
    fn due(&self, now: Instant) -> Vec<(EntryMap, ProcessKey, Vec<u8>)> {
        let of = |map: EntryMap| {
            let waiting = self.0[map as usize].waiting.values();
            waiting.filter(|entry| entry.until <= now).map(move |entry| (map, entry.key, entry.value.clone()))
        };
        EntryMap::ALL.into_iter().flat_map(of).collect()
    }

    fn counts(&self) -> [RefusedEntries; EntryMap::ALL.len()] {
        EntryMap::ALL.map(|map| {
            let [entries, memory, other] = self.0[map as usize].refused.map(|(count, ..)| count);
            RefusedEntries { map: map.name(), entries, memory, other }
        })
    }
}

impl Kernel {
    /// Writes the entry of a process, now or when the kernel has room for it.
    pub(super) fn set_entry(&mut self, map: EntryMap, key: ProcessKey, value: &[u8]) {
        let written = self.entry_map(map).update(&key.tgid.to_ne_bytes(), value, MapFlags::ANY);
        let copied = if map == EntryMap::ThreadContexts {
            written.and_then(|()| self.copy_context(key.tgid))
        } else {
            written
        };
        match copied {
            Ok(()) => {
                self.entries.forget(map, key.tgid);
                self.change_settings(|settings| match map {
                    EntryMap::Marks => settings.marks = 1,
                    EntryMap::LabelSources => settings.labels = 1,
                    EntryMap::ThreadContexts => settings.contexts = 1,
                    EntryMap::ListFrames => {}
                });
            }
            Err(source) => {
                let error = KernelError::Map { map: map.name(), source };
                if let Some(line) = self.entries.refuse(map, key, value, &error, Instant::now()) {
                    tracing::warn!("{line}");
                }
            }
        }
    }

    /// Removes the entry of a process, if it has one.
    pub(super) fn remove_entry(&mut self, map: EntryMap, tgid: u32) {
        self.entries.forget(map, tgid);
        let removed = self.entry_map(map).delete(&tgid.to_ne_bytes());
        if map == EntryMap::ThreadContexts && removed.is_ok() {
            let _ = self.copy_context(tgid);
        }
    }

    /// Forgets the entries of this map that the kernel has refused.
    pub(super) fn forget_refused(&mut self, map: EntryMap) {
        self.entries.0[map as usize].waiting.clear();
    }

    /// Writes the entries again that the kernel refused, as far as their pause is over.
    pub(crate) fn write_refused(&mut self) {
        for (map, key, value) in self.entries.due(Instant::now()) {
            self.set_entry(map, key, &value);
        }
    }

    /// Returns the refused writes since the programs were loaded.
    pub(crate) fn refused_entries(&self) -> Vec<RefusedEntries> {
        self.entries.counts().to_vec()
    }

    fn entry_map(&self, map: EntryMap) -> &dyn MapCore {
        match map {
            EntryMap::Marks => &self.skeleton.maps.marks,
            EntryMap::ListFrames => &self.skeleton.maps.list_frames,
            EntryMap::LabelSources => &self.skeleton.maps.label_sources,
            EntryMap::ThreadContexts => &self.skeleton.maps.thread_contexts,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn key(tgid: u32) -> ProcessKey {
        ProcessKey { tgid, start_boottime_ns: 1 }
    }

    fn error(errno: i32) -> KernelError {
        KernelError::Map { map: "marks", source: libbpf_rs::Error::from_raw_os_error(errno) }
    }

    #[test]
    fn a_full_map_and_missing_memory_are_other_counts_and_cures() {
        let mut entries = Entries::default();
        let now = Instant::now();
        for (errno, part) in [
            (libc::E2BIG, "raise --processes"),
            (libc::ENOMEM, "raise the memory limit"),
            (libc::EPERM, "report it"),
        ] {
            let line = entries.refuse(EntryMap::Marks, key(7), &[1], &error(errno), now).unwrap();
            for part in ["process 7", "BPF map marks", "not sampled", part] {
                assert!(line.contains(part), "{part}: {line}");
            }
        }
        let [marks, lists, labels, contexts] = entries.counts();
        assert_eq!(marks.by_name(), [("entries", 1), ("memory", 1), ("other", 1)]);
        for other in [lists, labels, contexts] {
            assert_eq!(other.by_name().map(|(_, count)| count), [0; 3], "{other:?}");
        }
    }

    #[test]
    fn a_refused_entry_is_written_again_after_longer_pauses() {
        let mut entries = Entries::default();
        let mut now = Instant::now();
        let of = |entries: &Entries, at| {
            entries.due(at).into_iter().map(|(_, _, value)| value).collect::<Vec<_>>()
        };
        for (n, pause) in [1, 2, 4, 8, 16, 32, 64, 64].into_iter().enumerate() {
            let (value, pause) = ([n as u8], Duration::from_secs(pause));
            entries.refuse(EntryMap::ListFrames, key(7), &value, &error(libc::E2BIG), now);
            assert_eq!(of(&entries, now + pause / 2), Vec::<Vec<u8>>::new());
            now += pause;
            assert_eq!(of(&entries, now), [value]);
        }
        // A new process of this number begins again.
        let next = ProcessKey { start_boottime_ns: 2, ..key(7) };
        entries.refuse(EntryMap::ListFrames, next, &[9], &error(libc::E2BIG), now);
        assert_eq!(of(&entries, now + FIRST_PAUSE), [[9]]);
        entries.forget(EntryMap::Marks, 7);
        assert_eq!(of(&entries, now + FIRST_PAUSE).len(), 1, "the entry is in another map");
        entries.forget(EntryMap::ListFrames, 7);
        assert_eq!(of(&entries, now + MAX_PAUSE), Vec::<Vec<u8>>::new());
    }

    #[test]
    fn a_storm_of_refused_entries_is_one_line_a_minute() {
        let mut entries = Entries::default();
        let now = Instant::now();
        let lines = |entries: &mut Entries, at| {
            let refuse =
                |tgid| entries.refuse(EntryMap::LabelSources, key(tgid), &[], &error(libc::E2BIG), at);
            (0..20_000).filter_map(refuse).collect::<Vec<_>>()
        };
        assert_eq!(lines(&mut entries, now).len(), 1);
        assert_eq!(entries.due(now + MAX_PAUSE).len(), MAX_WAITING);
        let next = lines(&mut entries, now + LOG_INTERVAL);
        assert!(next.len() == 1 && next[0].contains("and 19999 others"), "{next:?}");
        assert_eq!(entries.counts()[2].by_name()[0], ("entries", 40_000));
    }
}
