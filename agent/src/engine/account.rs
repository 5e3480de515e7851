//! From the kernel's counters and the open window to the ledger. Nothing else in the engine reads counters for it.

use gannet_proto::ledger::{Ledger, LossReason};

use crate::kernel::{Counters, Kernel, KernelError};

/// Reads the counters of the BPF programs.
pub(super) trait CounterSource {
    fn counters(&self) -> Result<Counters, KernelError>;
}

impl CounterSource for Kernel {
    fn counters(&self) -> Result<Counters, KernelError> {
        Self::counters(self)
    }
}

/// The samples of a window that was closed, each once for each rule that asked for it.
#[derive(Clone, Copy, Debug)]
pub(super) struct ClosedSamples {
    /// Added to the window.
    pub(super) added: u64,
    /// In its profiles.
    pub(super) delivered: u64,
    /// Of a rule that was removed meanwhile.
    pub(super) expired: u64,
}

pub(super) struct Account {
    /// The counters when the last window was closed.
    counted: Counters,
    /// All windows that are closed.
    closed: Ledger,
}

impl Account {
    /// Starts at the present counters.
    pub(super) fn new(source: &impl CounterSource) -> Result<Self, KernelError> {
        Ok(Self { counted: source.counters()?, closed: Ledger::default() })
    }

    /// Closes a window: returns its ledger, with what the kernel lost since the last one.
    pub(super) fn close(&mut self, source: &impl CounterSource, samples: ClosedSamples) -> Ledger {
        let ClosedSamples { added, delivered, expired } = samples;
        let mut ledger = match source.counters() {
            Ok(counters) => {
                let ledger = lost_between(&self.counted, &counters);
                self.counted = counters;
                ledger
            }
            // The next window has the losses of both.
            Err(error) => {
                tracing::error!("cannot count the samples that the kernel lost: {error}");
                Ledger::default()
            }
        };
        // What the kernel lost, it had taken; what expired is among the samples that were added.
        ledger.taken = added + ledger.lost_total();
        ledger.delivered = delivered;
        ledger.lose(LossReason::Expired, expired);
        self.closed.merge(&ledger);
        ledger
    }

    /// Returns the ledger since the engine started. `open` counts the samples of the open window and the backlog: they are
    /// pending. Samples in the ring buffer are not counted yet.
    pub(super) fn ledger(&self, source: &impl CounterSource, open: u64) -> Ledger {
        let mut ledger = self.closed.clone();
        if let Ok(counters) = source.counters() {
            let mut since = lost_between(&self.counted, &counters);
            since.taken = open + since.lost_total();
            ledger.merge(&since);
        }
        ledger.pending += open;
        ledger
    }
}

/// The clock ticks and losses between two readings.
fn lost_between(before: &Counters, now: &Counters) -> Ledger {
    let mut ledger = Ledger { ticks: now.ticks - before.ticks, ..Ledger::default() };
    ledger.lose(LossReason::RingFull, now.lost_ring_full - before.lost_ring_full);
    ledger.lose(LossReason::MapFull, now.lost_off_cpu_full - before.lost_off_cpu_full);
    ledger.lose(LossReason::RateLimit, now.lost_off_cpu_rate - before.lost_off_cpu_rate);
    ledger
}

#[cfg(test)]
mod tests {
    use std::cell::{Cell, RefCell};

    use super::*;

    #[derive(Default)]
    struct Source {
        counters: RefCell<Counters>,
        fails: Cell<bool>,
    }

    impl CounterSource for Source {
        fn counters(&self) -> Result<Counters, KernelError> {
            if self.fails.get() {
                return Err(KernelError::Scan(std::io::Error::other("no counters")));
            }
            Ok(*self.counters.borrow())
        }
    }

    impl Source {
        fn count(&self, ticks: u64, ring_full: u64, map_full: u64, rate: u64) {
            let mut counters = self.counters.borrow_mut();
            counters.ticks += ticks;
            counters.lost_ring_full += ring_full;
            counters.lost_off_cpu_full += map_full;
            counters.lost_off_cpu_rate += rate;
        }
    }

    fn samples(added: u64, expired: u64) -> ClosedSamples {
        ClosedSamples { added, delivered: added - expired, expired }
    }

    #[track_caller]
    fn assert_ledger(ledger: &Ledger, ticks: u64, taken: u64, delivered: u64, lost: &[(LossReason, u64)]) {
        ledger.check().unwrap();
        assert_eq!((ledger.ticks, ledger.taken, ledger.delivered), (ticks, taken, delivered));
        assert_eq!(ledger.lost, lost.iter().copied().collect());
    }

    #[test]
    fn a_window_has_what_happened_since_the_last_one() {
        let source = Source::default();
        source.count(1000, 1000, 1000, 1000);
        let mut account = Account::new(&source).unwrap();
        source.count(100, 1, 2, 3);
        let window = account.close(&source, samples(20, 4));
        let lost = [
            (LossReason::RingFull, 1),
            (LossReason::MapFull, 2),
            (LossReason::RateLimit, 3),
            (LossReason::Expired, 4),
        ];
        assert_ledger(&window, 100, 26, 16, &lost);
        source.count(10, 0, 0, 0);
        assert_ledger(&account.close(&source, samples(5, 0)), 10, 5, 5, &[]);
        assert_ledger(&account.ledger(&source, 0), 110, 31, 21, &lost);
    }

    #[test]
    fn samples_of_the_open_window_are_pending() {
        let source = Source::default();
        let mut account = Account::new(&source).unwrap();
        account.close(&source, samples(20, 0));
        source.count(7, 3, 0, 0);
        let now = account.ledger(&source, 11);
        assert_ledger(&now, 7, 34, 20, &[(LossReason::RingFull, 3)]);
        assert_eq!(now.pending, 11);
        // Showing the ledger changes nothing.
        assert_eq!(account.ledger(&source, 11), now);
        assert_ledger(&account.close(&source, samples(11, 0)), 7, 14, 11, &[(LossReason::RingFull, 3)]);
    }

    #[test]
    fn losses_that_cannot_be_read_go_to_the_next_window() {
        let source = Source::default();
        let mut account = Account::new(&source).unwrap();
        source.count(10, 1, 0, 0);
        source.fails.set(true);
        assert_ledger(&account.close(&source, samples(8, 0)), 0, 8, 8, &[]);
        source.fails.set(false);
        source.count(10, 1, 0, 0);
        assert_ledger(&account.close(&source, samples(9, 0)), 20, 11, 9, &[(LossReason::RingFull, 2)]);
    }
}
