//! When the table of processes is compared with what runs because events of them were lost.

use std::time::{Duration, Instant};

use crate::kernel::{Counters, lifecycle_lost, lifecycle_skipped};

/// So long nothing is repaired again: one comparison reads all of /proc.
const PAUSE: Duration = Duration::from_secs(2);

/// Events of processes and mappings that were not told of, each count since the start.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(super) struct Losses {
    lost: u64,
    /// For which the kernel called no handler, at most.
    refused: u64,
}

impl Losses {
    pub(super) fn new(counters: &Counters, mappings_lost: u64) -> Self {
        Self { lost: lifecycle_lost(counters) + mappings_lost, refused: lifecycle_skipped(counters) }
    }
}

/// What has been repaired.
#[derive(Debug)]
pub(super) struct Repairs {
    losses: Losses,
    at: Instant,
}

impl Repairs {
    pub(super) fn new(now: Instant) -> Self {
        Self { losses: Losses::default(), at: now }
    }

    /// Whether events were lost that no comparison has made good: it is to be made now. How many are known to be lost; 0 if
    /// they may all have been of threads.
    pub(super) fn due(&mut self, losses: Losses, now: Instant) -> Option<u64> {
        let lost = losses.lost.saturating_sub(self.losses.lost);
        if lost == 0 && losses.refused <= self.losses.refused || now.duration_since(self.at) < PAUSE {
            return None;
        }
        *self = Self { losses, at: now };
        Some(lost)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn r23_each_loss_and_each_refusal_leads_to_a_comparison_once() {
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
        // Too soon; it is not forgotten for that.
        assert_eq!(repairs.due(both, at(41)), None);
        assert_eq!(repairs.due(both, at(60)), Some(2));
    }

    #[test]
    fn r23_what_counts_as_a_loss() {
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
}
