//! Processes whose unwind data did not fit into the kernel: when the agent tries again, and what it logs.

use std::{
    collections::HashMap,
    time::{Duration, Instant},
};

use super::LoadError;
use crate::{
    kernel::{KernelError, Shortage},
    model::ImageKey,
};

/// The pause before the second try. Each further refusal doubles it, up to the longest.
const FIRST_PAUSE: Duration = Duration::from_secs(1);
const MAX_PAUSE: Duration = Duration::from_secs(64);
/// The shortest time between two lines about one reason.
const LOG_INTERVAL: Duration = Duration::from_secs(60);
/// Processes that are remembered. The agent tries others again at once.
const MAX_PROCESSES: usize = 8192;

/// The reason why the unwind data of a process did not fit into the kernel.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Lack {
    /// Space for its tables.
    TableBytes,
    /// Numbers for the rules of its tables.
    Rules,
    /// Keys of the mapping trie, or entries of another map.
    Entries,
    /// Memory: the kernel has none, or the memory limit of the agent's control group is reached.
    Memory,
    /// The kernel refused for another reason.
    Other,
}

/// Refusals by what was missing: one for each try.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct RefusalCounts {
    /// Space for the tables.
    pub table_bytes: u64,
    /// Numbers for the rules of tables.
    pub rules: u64,
    /// Keys of the mapping trie, or entries of another map.
    pub entries: u64,
    /// Memory of the kernel, or of the agent's control group.
    pub memory: u64,
    /// The kernel refused for another reason.
    pub other: u64,
}

impl RefusalCounts {
    /// Returns the refusals with the names of what was missing.
    pub(crate) fn by_name(&self) -> [(&'static str, u64); 5] {
        let Self { table_bytes, rules, entries, memory, other } = *self;
        [
            ("table_bytes", table_bytes),
            ("rules", rules),
            ("entries", entries),
            ("memory", memory),
            ("other", other),
        ]
    }

    /// Returns all refusals.
    pub(crate) fn total(&self) -> u64 {
        self.by_name().iter().map(|(_, count)| count).sum()
    }
}

impl Lack {
    fn of(error: &LoadError) -> Self {
        match error {
            LoadError::NoRoom { .. } => Self::TableBytes,
            LoadError::Rules { .. } => Self::Rules,
            LoadError::Keys { .. } => Self::Entries,
            LoadError::Kernel(error) | LoadError::Write { source: error, .. } => match error.shortage() {
                Some(Shortage::Entries) => Self::Entries,
                Some(Shortage::Memory) => Self::Memory,
                None => Self::Other,
            },
            LoadError::Range(_) | LoadError::Held => Self::Other,
        }
    }

    fn cure(self) -> &'static str {
        match self {
            Self::TableBytes => "raise --table-bytes",
            Self::Rules => "narrow the rules, so that fewer different programs are sampled",
            Self::Entries => "narrow the rules, so that fewer processes are sampled, or raise --processes",
            Self::Memory => "raise the memory limit of the agent, or free memory on the node",
            Self::Other => "report it, if it stays",
        }
    }
}

#[derive(Default)]
pub(super) struct Refusals {
    /// By thread group id.
    held: HashMap<u32, Held>,
    counts: RefusalCounts,
    /// By reason: the last line, and the refusals since.
    logged: [(Option<Instant>, u64); 5],
}

struct Held {
    key: ImageKey,
    until: Instant,
    pause: Duration,
}

impl Refusals {
    /// Reports whether the process has to wait until the agent tries again.
    pub(super) fn is_held(&self, key: &ImageKey, now: Instant) -> bool {
        self.held.get(&key.process.tgid).is_some_and(|held| held.key == *key && now < held.until)
    }

    /// Counts a refusal. Returns the line to log, at most one a minute for each reason.
    pub(super) fn add(&mut self, key: ImageKey, error: &LoadError, now: Instant) -> Option<String> {
        let former = self.held.get(&key.process.tgid).filter(|held| held.key == key);
        let pause = former.map_or(FIRST_PAUSE, |held| (held.pause * 2).min(MAX_PAUSE));
        if self.held.len() >= MAX_PROCESSES {
            self.held.retain(|_, held| now < held.until);
        }
        if self.held.len() < MAX_PROCESSES {
            self.held.insert(key.process.tgid, Held { key, until: now + pause, pause });
        }
        let lack = Lack::of(error);
        let RefusalCounts { table_bytes, rules, entries, memory, other } = &mut self.counts;
        *match lack {
            Lack::TableBytes => table_bytes,
            Lack::Rules => rules,
            Lack::Entries => entries,
            Lack::Memory => memory,
            Lack::Other => other,
        } += 1;
        let (last, since) = &mut self.logged[lack as usize];
        if last.is_some_and(|last| now.duration_since(last) < LOG_INTERVAL) {
            *since += 1;
            return None;
        }
        *last = Some(now);
        let others = match std::mem::take(since) {
            0 => String::new(),
            n => format!(", and {n} others since the last such line"),
        };
        let process = key.process;
        Some(format!(
            "cannot unwind process {process}{others} in the kernel, unwinding in user space at a higher cost: {error}; {}",
            lack.cure()
        ))
    }

    /// Forgets a process: its data is in the kernel, or it has ended.
    pub(super) fn forget(&mut self, tgid: u32) {
        self.held.remove(&tgid);
    }

    pub(super) fn counts(&self) -> RefusalCounts {
        self.counts
    }
}

impl From<KernelError> for LoadError {
    fn from(error: KernelError) -> Self {
        Self::Kernel(error)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::model::ProcessKey;

    fn key(tgid: u32) -> ImageKey {
        ImageKey { process: ProcessKey { tgid, start_boottime_ns: 1 }, exec_id: 1 }
    }

    fn write(errno: i32) -> LoadError {
        let source = libbpf_rs::Error::from_raw_os_error(errno);
        LoadError::Write {
            begin: 0x1000,
            end: 0x3000,
            source: KernelError::Map { map: "exec_mappings", source },
        }
    }

    #[test]
    fn a_full_map_and_missing_memory_have_different_cures() {
        for (errno, lack) in [
            (libc::ENOSPC, Lack::Entries),
            (libc::E2BIG, Lack::Entries),
            (libc::ENOMEM, Lack::Memory),
            (libc::EPERM, Lack::Other),
        ] {
            let line = Refusals::default().add(key(7), &write(errno), Instant::now()).unwrap();
            assert_eq!(Lack::of(&write(errno)), lack);
            for part in ["process 7", "0x1000-0x3000", "exec_mappings", lack.cure()] {
                assert!(line.contains(part), "{part}: {line}");
            }
        }
    }

    #[test]
    fn a_refused_process_waits_twice_as_long_each_time() {
        let mut refusals = Refusals::default();
        let mut now = Instant::now();
        for pause in [1, 2, 4, 8, 16, 32, 64, 64].map(Duration::from_secs) {
            refusals.add(key(7), &write(libc::ENOSPC), now);
            assert!(refusals.is_held(&key(7), now + pause / 2));
            assert!(!refusals.is_held(&key(7), now + pause));
            assert!(!refusals.is_held(&key(8), now));
            now += pause;
        }
        refusals.add(key(7), &write(libc::ENOSPC), now);
        let next_image = ImageKey { exec_id: 2, ..key(7) };
        assert!(refusals.is_held(&key(7), now));
        assert!(!refusals.is_held(&next_image, now), "another program may fit");
        refusals.forget(7);
        assert!(!refusals.is_held(&key(7), now));
        assert_eq!(refusals.counts(), RefusalCounts { entries: 9, ..RefusalCounts::default() });
    }

    #[test]
    fn a_thousand_refusals_are_one_line_a_minute() {
        let mut refusals = Refusals::default();
        let now = Instant::now();
        let lines = |refusals: &mut Refusals, at| {
            (0..20_000)
                .filter_map(|tgid| refusals.add(key(tgid), &write(libc::ENOSPC), at))
                .collect::<Vec<_>>()
        };
        assert_eq!(lines(&mut refusals, now).len(), 1);
        assert!(refusals.held.len() <= MAX_PROCESSES);
        let next = lines(&mut refusals, now + LOG_INTERVAL);
        assert!(next.len() == 1 && next[0].contains("and 19999 others"), "{next:?}");
        assert_eq!(refusals.counts().total(), 40_000);
    }
}
