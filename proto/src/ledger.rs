//! The loss ledger: each taken sample is delivered, pending, or lost for a named reason.

use std::{collections::BTreeMap, fmt, str::FromStr};

use crate::control;

/// Reasons for lost samples. Their names are the same in metrics, on the wire and on the page.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum LossReason {
    /// The ring buffer was full.
    RingFull,
    /// Neither the kernel stack nor the user stack could be read.
    StackFault,
    /// The kernel refused to call the next part of the unwinder (before Linux 5.17 only).
    StackMissing,
    /// The kernel skipped the handler, because it was still active on the CPU; an upper bound.
    Skipped,
    /// The agent could not decode the record: agent and BPF programs are not of one build.
    Undecodable,
    /// No rule held for the whole off-CPU interval.
    NoRule,
    /// The capture of an exec condition was over, or was for another process.
    CaptureOver,
    /// The rule was removed before the window ended.
    RuleRemoved,
    /// A BPF map had no room for the process or the stack.
    MapFull,
    /// Threads blocked more often than the rate limit of off-CPU samples allows.
    RateLimit,
    /// A queue inside the agent was full.
    QueueFull,
    /// The spool dropped its oldest batches to stay within its size.
    SpoolFull,
    /// A batch in the spool was damaged.
    SpoolCorrupt,
    /// The collector refused the batch.
    Refused,
    /// The batch was older than the maximum age in the spool.
    Expired,
    /// The profile was larger than the collector accepts.
    TooLarge,
    /// The pod opts out of profiling, and the agent learned of it after it took the samples.
    Denied,
    /// The agent exited before the samples were durable.
    Shutdown,
}

impl LossReason {
    /// All reasons, in the order of the path of a sample.
    pub const ALL: [Self; 18] = [
        Self::RingFull,
        Self::StackFault,
        Self::StackMissing,
        Self::MapFull,
        Self::RateLimit,
        Self::Skipped,
        Self::Undecodable,
        Self::NoRule,
        Self::CaptureOver,
        Self::RuleRemoved,
        Self::QueueFull,
        Self::Denied,
        Self::SpoolFull,
        Self::SpoolCorrupt,
        Self::Refused,
        Self::Expired,
        Self::TooLarge,
        Self::Shutdown,
    ];

    /// Returns the name on the wire and in metrics.
    pub const fn as_str(self) -> &'static str {
        match self {
            Self::RingFull => "ring_full",
            Self::StackFault => "stack_fault",
            Self::StackMissing => "stack_missing",
            Self::MapFull => "map_full",
            Self::RateLimit => "rate_limit",
            Self::Skipped => "skipped",
            Self::Undecodable => "undecodable",
            Self::NoRule => "no_rule",
            Self::CaptureOver => "capture_over",
            Self::RuleRemoved => "rule_removed",
            Self::QueueFull => "queue_full",
            Self::Denied => "denied",
            Self::SpoolFull => "spool_full",
            Self::SpoolCorrupt => "spool_corrupt",
            Self::Refused => "refused",
            Self::Expired => "expired",
            Self::TooLarge => "too_large",
            Self::Shutdown => "shutdown",
        }
    }

    /// Returns what an operator can do about it.
    pub const fn cure(self) -> &'static str {
        match self {
            Self::RingFull => "raise --ring-bytes",
            Self::StackFault => "the processes' stacks are not readable; nothing to do",
            Self::StackMissing => "use Linux 5.17 or later, whose unwinder needs no chain of programs",
            Self::MapFull => {
                "lower the rules' off-CPU share or narrow their match: too many threads block at one time"
            }
            Self::RateLimit => {
                "raise the rules' min_block time or narrow their match: threads block too often"
            }
            Self::Skipped => "an upper bound; another tracing program on the node may be the cause",
            Self::Undecodable => "agent and BPF programs differ: install the agent again",
            Self::NoRule => "the rule began or ended while the thread was blocked; nothing to do",
            Self::CaptureOver => "the capture ended before the sample was read; nothing to do",
            Self::RuleRemoved => "the rule was removed before its window ended; nothing to do",
            Self::QueueFull => "raise --cpu-budget, or lower the rules' rates: the agent is too slow",
            Self::SpoolFull => {
                "raise --spool-bytes, free disk space, or check why the collector accepts nothing"
            }
            Self::SpoolCorrupt => "check the disk of --state-dir",
            Self::Refused => "the agent's log has the collector's reason",
            Self::Expired => "check the connection to the collector, or raise --spool-age",
            Self::TooLarge => "raise the collector's --max-batch-bytes",
            Self::Denied => "the pod forbids profiling; nothing to do",
            Self::Shutdown => "give the agent more time to end",
        }
    }
}

impl fmt::Display for LossReason {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(self.as_str())
    }
}

/// A loss reason that this version does not know.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("`{0}` is not a loss reason of this version: is the other end newer?")]
pub struct UnknownReason(pub String);

impl FromStr for LossReason {
    type Err = UnknownReason;

    fn from_str(text: &str) -> Result<Self, UnknownReason> {
        Self::ALL
            .into_iter()
            .find(|reason| reason.as_str() == text)
            .ok_or_else(|| UnknownReason(text.to_owned()))
    }
}

/// Counts of samples. `taken`, `delivered` and `lost` come from different sources, so that `taken == delivered + pending + lost`
/// can fail: see [`unaccounted`](Self::unaccounted).
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Ledger {
    /// Clock ticks that reached the sampler, including those of idle CPUs.
    pub ticks: u64,
    /// Samples that a rule asked for.
    pub taken: u64,
    /// Samples in the profiles of a window, or in the ledger of a node: samples that a collector acknowledged.
    pub delivered: u64,
    /// Samples that are neither delivered nor lost yet; 0 in the ledger of a window.
    pub pending: u64,
    /// Lost samples by reason; a reason without losses has no entry.
    pub lost: BTreeMap<LossReason, u64>,
}

/// A ledger that does not balance: samples disappeared or were counted twice.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error(
    "the ledger does not balance: {taken} samples taken, but {delivered} delivered + {pending} pending + {lost} lost"
)]
pub struct Imbalance {
    /// Samples that the sampler took.
    pub taken: u64,
    /// Samples that the collector acknowledged.
    pub delivered: u64,
    /// Samples between the two.
    pub pending: u64,
    /// Samples lost for all reasons.
    pub lost: u64,
}

impl Ledger {
    /// Counts `n` samples as lost.
    pub fn lose(&mut self, reason: LossReason, n: u64) {
        if n > 0 {
            let count = self.lost.entry(reason).or_default();
            *count = count.saturating_add(n);
        }
    }

    /// Adds another ledger to this one.
    pub fn merge(&mut self, other: &Self) {
        let Self { ticks, taken, delivered, pending, lost } = other;
        self.ticks = self.ticks.saturating_add(*ticks);
        self.taken = self.taken.saturating_add(*taken);
        self.delivered = self.delivered.saturating_add(*delivered);
        self.pending = self.pending.saturating_add(*pending);
        for (reason, n) in lost {
            self.lose(*reason, *n);
        }
    }

    /// Returns the samples lost for all reasons.
    pub fn lost_total(&self) -> u64 {
        self.lost.values().fold(0, |sum, n| sum.saturating_add(*n))
    }

    /// Returns the taken samples that are neither delivered nor pending, and for which there is no reason. Negative if samples
    /// were counted twice.
    pub fn unaccounted(&self) -> i64 {
        let Self { taken, delivered, pending, .. } = *self;
        let known = u128::from(delivered) + u128::from(pending) + u128::from(self.lost_total());
        let difference = i128::from(taken) - known.cast_signed();
        i64::try_from(difference).unwrap_or(if difference < 0 { i64::MIN } else { i64::MAX })
    }

    /// Checks that every taken sample is counted exactly once.
    pub fn check(&self) -> Result<(), Imbalance> {
        let lost = self.lost_total();
        let Self { taken, delivered, pending, .. } = *self;
        if delivered.checked_add(pending).and_then(|sum| sum.checked_add(lost)) == Some(taken) {
            Ok(())
        } else {
            Err(Imbalance { taken, delivered, pending, lost })
        }
    }
}

/// Formats the ledger as in the comment of a profile: `ticks 990, taken 120, delivered 118, lost 2 (ring_full 2), unaccounted
/// 0`.
impl fmt::Display for Ledger {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "ticks {}, taken {}, delivered {}", self.ticks, self.taken, self.delivered)?;
        if self.pending > 0 {
            write!(f, ", pending {}", self.pending)?;
        }
        write!(f, ", lost {}", self.lost_total())?;
        for (i, (reason, n)) in self.lost.iter().enumerate() {
            write!(f, "{}{reason} {n}", if i == 0 { " (" } else { ", " })?;
        }
        if !self.lost.is_empty() {
            f.write_str(")")?;
        }
        write!(f, ", unaccounted {}", self.unaccounted())
    }
}

impl From<&Ledger> for control::Ledger {
    fn from(ledger: &Ledger) -> Self {
        let Ledger { ticks, taken, delivered, pending, lost } = ledger;
        Self {
            ticks: *ticks,
            taken: *taken,
            delivered: *delivered,
            pending: *pending,
            lost: lost.iter().map(|(reason, n)| (reason.as_str().to_owned(), *n)).collect(),
            unaccounted: ledger.unaccounted(),
        }
    }
}

impl From<Ledger> for control::Ledger {
    fn from(ledger: Ledger) -> Self {
        Self::from(&ledger)
    }
}

impl TryFrom<&control::Ledger> for Ledger {
    type Error = UnknownReason;

    fn try_from(ledger: &control::Ledger) -> Result<Self, UnknownReason> {
        // A peer before this field sends 0; the difference follows from the others.
        let control::Ledger { ticks, taken, delivered, pending, lost, unaccounted: _ } = ledger;
        let mut own = Self {
            ticks: *ticks,
            taken: *taken,
            delivered: *delivered,
            pending: *pending,
            lost: BTreeMap::new(),
        };
        for (reason, n) in lost {
            own.lose(reason.parse()?, *n);
        }
        Ok(own)
    }
}

impl TryFrom<control::Ledger> for Ledger {
    type Error = UnknownReason;

    fn try_from(ledger: control::Ledger) -> Result<Self, UnknownReason> {
        Self::try_from(&ledger)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn each_reason_has_its_own_name_and_reads_back() {
        let names: std::collections::BTreeSet<_> = LossReason::ALL.iter().map(|r| r.as_str()).collect();
        assert_eq!(names.len(), LossReason::ALL.len());
        for reason in LossReason::ALL {
            assert_eq!(reason.to_string().parse(), Ok(reason));
        }
        assert_eq!("gone".parse::<LossReason>(), Err(UnknownReason("gone".into())));
    }

    #[test]
    fn a_ledger_balances_only_if_each_sample_is_counted() {
        let mut ledger = Ledger { ticks: 100, taken: 10, delivered: 6, pending: 1, ..Ledger::default() };
        assert_eq!(ledger.check(), Err(Imbalance { taken: 10, delivered: 6, pending: 1, lost: 0 }));
        ledger.lose(LossReason::RingFull, 2);
        ledger.lose(LossReason::Expired, 1);
        ledger.lose(LossReason::Refused, 0);
        assert_eq!(ledger.check(), Ok(()));
        assert_eq!(ledger.lost.len(), 2, "a reason without losses is not listed");
        assert_eq!(
            ledger.to_string(),
            "ticks 100, taken 10, delivered 6, pending 1, lost 3 (ring_full 2, expired 1), unaccounted 0"
        );
        ledger.delivered = u64::MAX;
        assert!(ledger.check().is_err(), "no overflow");
    }

    #[test]
    fn a_sum_of_balanced_ledgers_balances() {
        let mut sum = Ledger::default();
        for reason in LossReason::ALL {
            let mut one = Ledger { ticks: 9, taken: 7, delivered: 4, ..Ledger::default() };
            one.lose(reason, 3);
            sum.merge(&one);
        }
        assert_eq!(sum.check(), Ok(()));
        let n = LossReason::ALL.len() as u64;
        assert_eq!((sum.ticks, sum.taken, sum.lost_total()), (9 * n, 7 * n, 3 * n));
        assert_eq!(Ledger::try_from(control::Ledger::from(&sum)), Ok(sum.clone()));
        let mut newer = control::Ledger::from(sum);
        newer.lost.insert("eaten_by_the_dog".into(), 1);
        assert!(Ledger::try_from(newer).is_err());
    }
}
