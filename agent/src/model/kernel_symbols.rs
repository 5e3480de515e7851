//! Changes of the kernel's symbols: the engine's thread reads them as events, the symbolizer's thread names frames by them.

use std::{collections::VecDeque, fmt, io};

use parking_lot::Mutex;

/// Changes that the log keeps. Some tools load a dozen programs in each run, and a window has 10 s.
const MAX_CHANGES: usize = 4096;

/// A change of the kernel's symbols.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum KernelSymbolChange {
    /// The kernel has made a function.
    Added(KernelSymbolRange),
    /// This function is gone.
    Removed(KernelSymbolRange),
}

/// A function that the kernel made at run time.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct KernelSymbolRange {
    /// First address of its code.
    pub start: u64,
    /// Length in bytes.
    pub bytes: u32,
    /// Name, as `/proc/kallsyms` shows it.
    pub name: String,
    /// The module that `/proc/kallsyms` shows behind the name.
    pub module: &'static str,
}

/// The name of a kernel function.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct KernelName {
    /// Name, as `/proc/kallsyms` shows it.
    pub name: String,
    /// The module that it belongs to, or `bpf`; empty for the kernel itself.
    pub module: String,
}

/// Names addresses of kernel code, as the kernel knows them now.
pub trait KernelNamer: Send + fmt::Debug {
    /// Returns the name of each address, `None` for those without one. An error: it cannot name addresses.
    fn names(&mut self, addresses: &[u64]) -> io::Result<Vec<Option<KernelName>>>;
}

/// The latest changes of the kernel's symbols, and who names them. There is one kernel, so there is one log for it; tests make
/// others.
#[derive(Debug)]
pub struct KernelSymbolLog(Mutex<State>);

#[derive(Debug)]
struct State {
    namer: Option<Box<dyn KernelNamer>>,
    changes: VecDeque<KernelSymbolChange>,
    /// The number of the change behind the last one.
    next: u64,
    /// Counts the times when changes may have been missed; 0 before any were followed.
    epoch: u64,
}

/// A position in the log. The default one is before the first change.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct KernelSymbolPosition {
    epoch: u64,
    next: u64,
}

impl KernelSymbolPosition {
    /// Returns whether changes are followed at this position. If not, only `/proc/kallsyms` shows them.
    pub fn is_followed(&self) -> bool {
        self.epoch > 0
    }
}

static OF_THIS_KERNEL: KernelSymbolLog = KernelSymbolLog::new();

impl KernelSymbolLog {
    /// Returns an empty log.
    pub const fn new() -> Self {
        Self(Mutex::new(State { namer: None, changes: VecDeque::new(), next: 0, epoch: 0 }))
    }

    /// Returns the log of the kernel that runs.
    pub fn of_this_kernel() -> &'static Self {
        &OF_THIS_KERNEL
    }

    /// Lets this namer answer from now on.
    pub fn set_namer(&self, namer: Box<dyn KernelNamer>) {
        self.0.lock().namer = Some(namer);
    }

    /// Ends the answers: the namer and its descriptors are gone.
    pub fn forget_namer(&self) {
        self.0.lock().namer = None;
    }

    /// Returns whether addresses can be named one by one.
    pub fn has_namer(&self) -> bool {
        self.0.lock().namer.is_some()
    }

    /// Returns the name of each address. `None`: no namer; after a failure there is none any more.
    pub fn names(&self, addresses: &[u64]) -> Option<Vec<Option<KernelName>>> {
        let mut state = self.0.lock();
        match state.namer.as_mut()?.names(addresses) {
            Ok(names) => Some(names),
            Err(error) => {
                tracing::warn!(%error, "the kernel names single addresses no more: reading /proc/kallsyms instead");
                state.namer = None;
                None
            }
        }
    }

    /// Records that changes were missed: events begin now, or the kernel lost some.
    pub fn missed(&self) {
        let mut state = self.0.lock();
        state.epoch += 1;
        state.changes.clear();
    }

    /// Records a change, and forgets the oldest one if there are too many.
    pub fn push(&self, change: KernelSymbolChange) {
        let mut state = self.0.lock();
        if state.changes.len() == MAX_CHANGES {
            state.changes.pop_front();
        }
        state.changes.push_back(change);
        state.next += 1;
    }

    /// Returns the position behind the last change.
    pub fn end(&self) -> KernelSymbolPosition {
        let state = self.0.lock();
        KernelSymbolPosition { epoch: state.epoch, next: state.next }
    }

    /// Returns the changes since a position, and moves it to the end. `None` if the log does not have all of them; the position
    /// stays then.
    pub fn since(&self, position: &mut KernelSymbolPosition) -> Option<Vec<KernelSymbolChange>> {
        let state = self.0.lock();
        let wanted = usize::try_from(state.next.checked_sub(position.next)?).ok()?;
        let skipped = state.changes.len().checked_sub(wanted)?;
        if position.epoch != state.epoch {
            return None;
        }
        position.next = state.next;
        Some(state.changes.iter().skip(skipped).cloned().collect())
    }
}

impl Default for KernelSymbolLog {
    fn default() -> Self {
        Self::new()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_reader_gets_each_change_once_or_learns_of_a_gap() {
        let log = KernelSymbolLog::new();
        let mut position = log.end();
        assert!(!position.is_followed());
        log.missed();
        assert_eq!(log.since(&mut position), None, "what happened before is unknown");
        position = log.end();
        assert!(position.is_followed());
        let removed = |start: u64| {
            KernelSymbolChange::Removed(KernelSymbolRange {
                start,
                bytes: 1,
                name: "gone".into(),
                module: "bpf",
            })
        };
        log.push(removed(1));
        log.push(removed(2));
        let both = vec![removed(1), removed(2)];
        let mut second = position;
        assert_eq!(log.since(&mut position), Some(both.clone()));
        assert_eq!(log.since(&mut position), Some(vec![]));
        assert_eq!(log.since(&mut second), Some(both), "each reader has a position of its own");
        (0..MAX_CHANGES as u64).for_each(|address| log.push(removed(address)));
        assert_eq!(log.since(&mut position).map(|changes| changes.len()), Some(MAX_CHANGES));
        (0..=MAX_CHANGES as u64).for_each(|address| log.push(removed(address)));
        assert_eq!(log.since(&mut position), None, "one change more than the log keeps");
    }
}
