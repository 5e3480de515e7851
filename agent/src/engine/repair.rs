//! When the worker compares the process table with `/proc`, to repair what lost events and missing tracepoints leave behind.

use std::time::{Duration, Instant};

use crate::kernel::{Counters, Kernel, lifecycle_lost, lifecycle_skipped};

/// After a comparison for lost events no other one is made for so long: each reads all of `/proc`.
const MIN_PAUSE: Duration = Duration::from_secs(2);
/// A comparison is made so often in any case.
const PERIOD: Duration = Duration::from_secs(30);
/// Likewise, if a tracepoint is missing.
const DEGRADED_PERIOD: Duration = Duration::from_secs(2);

/// Events of processes and mappings that the kernel did not report, counted since the start.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
struct Losses {
    lost: u64,
    /// Events for which the kernel called no handler: an upper bound.
    refused: u64,
}

impl Losses {
    fn new(counters: &Counters, mappings_lost: u64) -> Self {
        Self { lost: lifecycle_lost(counters) + mappings_lost, refused: lifecycle_skipped(counters) }
    }
}

/// The comparisons that were made.
#[derive(Debug)]
pub(super) struct Repairs {
    /// The losses that a comparison has repaired.
    repaired: Losses,
    /// The last comparison for lost events.
    repaired_at: Instant,
    /// The last periodic comparison.
    compared_at: Instant,
}

impl Repairs {
    pub(super) fn new(now: Instant) -> Self {
        Self { repaired: Losses::default(), repaired_at: now, compared_at: now }
    }

    /// Reports whether the kernel lost events that no comparison has repaired, so that the caller must make one now.
    pub(super) fn is_due(&mut self, kernel: &Kernel, now: Instant) -> bool {
        let Ok(counters) = kernel.counters() else { return false };
        let due = self.due(Losses::new(&counters, kernel.mappings_lost()), now);
        if let Some(lost @ 1..) = due {
            tracing::warn!(
                lost,
                "the kernel lost events of processes, the agent looks for these in /proc, too late for short ones; raise \
                 --ring-bytes, or let rules select fewer processes"
            );
        }
        due.is_some()
    }

    /// Returns how many events are known to be lost, if a comparison is due; 0 if all of them may have been of threads.
    fn due(&mut self, losses: Losses, now: Instant) -> Option<u64> {
        let lost = losses.lost.saturating_sub(self.repaired.lost);
        let is_repaired = lost == 0 && losses.refused <= self.repaired.refused;
        if is_repaired || now.duration_since(self.repaired_at) < MIN_PAUSE {
            return None;
        }
        (self.repaired, self.repaired_at) = (losses, now);
        Some(lost)
    }

    /// Reports whether the caller must make a periodic comparison now.
    pub(super) fn is_period_over(&mut self, is_degraded: bool, now: Instant) -> bool {
        let period = if is_degraded { DEGRADED_PERIOD } else { PERIOD };
        if now.duration_since(self.compared_at) < period {
            return false;
        }
        self.compared_at = now;
        true
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Checks that each loss and each refusal leads to one comparison (R23).
    #[test]
    fn each_loss_and_each_refusal_is_repaired_once() {
        let start = Instant::now();
        let at = |seconds| start + Duration::from_secs(seconds);
        let mut repairs = Repairs::new(start);
        let none = Losses::default();
        let [lost, refused, both] = [(3, 0), (3, 1), (5, 2)].map(|(lost, refused)| Losses { lost, refused });
        assert_eq!(repairs.due(none, at(10)), None);
        assert_eq!(repairs.due(lost, at(20)), Some(3));
        assert_eq!(repairs.due(lost, at(30)), None);
        assert_eq!(repairs.due(refused, at(40)), Some(0));
        assert_eq!(repairs.due(refused, at(50)), None);
        // Too soon after the last one, which does not mean that it is forgotten.
        assert_eq!(repairs.due(both, at(41)), None);
        assert_eq!(repairs.due(both, at(60)), Some(2));
    }

    /// Checks which counters are losses (R23).
    #[test]
    fn filtered_events_are_no_losses() {
        let mut counters = Counters::default();
        let quiet = Losses::new(&counters, 0);
        assert_eq!(quiet, Losses::default());
        counters.exec.seen = 7;
        counters.exec.filtered = 7;
        assert_eq!(Losses::new(&counters, 0), quiet);
        counters.fork.lost_rate = 1;
        counters.exit.lost_ring_full = 2;
        counters.exec.skipped = 4;
        assert_eq!(Losses::new(&counters, 8), Losses { lost: 11, refused: 4 });
    }

    #[test]
    fn a_missing_tracepoint_makes_the_period_shorter() {
        let start = Instant::now();
        let at = |seconds| start + Duration::from_secs(seconds);
        let mut repairs = Repairs::new(start);
        assert!(!repairs.is_period_over(false, at(29)) && repairs.is_period_over(true, at(29)));
        assert!(!repairs.is_period_over(true, at(30)) && repairs.is_period_over(true, at(31)));
        assert!(!repairs.is_period_over(false, at(60)) && repairs.is_period_over(false, at(61)));
    }
}
