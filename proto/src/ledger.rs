//! The loss ledger: every sample that was taken is delivered, still on its way, or lost for a reason that has a name.

use std::{collections::BTreeMap, fmt, str::FromStr};

use crate::control;

/// Why samples were lost. The words are the same in metrics, on the wire and on the page.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum LossReason {
    /// The kernel's ring buffer had no room.
    RingFull,
    /// The stack could not be read.
    StackFault,
    /// The kernel handed out a stack id whose stack was gone.
    StackMissing,
    /// A kernel map had no room for the process or the stack.
    MapFull,
    /// Threads blocked more often than their stacks may be taken.
    RateLimit,
    /// A queue inside the agent had no room.
    QueueFull,
    /// The spool dropped its oldest batches to stay within its bytes.
    SpoolFull,
    /// A batch in the spool was damaged.
    SpoolCorrupt,
    /// The collector refused the batch.
    Refused,
    /// The batch was older than the spool keeps.
    Expired,
    /// The profile was larger than the collector takes.
    TooLarge,
    /// The pod does not want to be profiled; taken before that was known.
    Denied,
    /// The agent ended before the samples were safe.
    Shutdown,
}

impl LossReason {
    /// Every reason, in the order in which samples meet them on their way.
    pub const ALL: [Self; 13] = [
        Self::RingFull,
        Self::StackFault,
        Self::StackMissing,
        Self::MapFull,
        Self::RateLimit,
        Self::QueueFull,
        Self::Denied,
        Self::SpoolFull,
        Self::SpoolCorrupt,
        Self::Refused,
        Self::Expired,
        Self::TooLarge,
        Self::Shutdown,
    ];

    /// The name on the wire and in metrics.
    pub const fn as_str(self) -> &'static str {
        match self {
            Self::RingFull => "ring_full",
            Self::StackFault => "stack_fault",
            Self::StackMissing => "stack_missing",
            Self::MapFull => "map_full",
            Self::RateLimit => "rate_limit",
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

/// Counts of samples. `taken == delivered + pending + lost`.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Ledger {
    /// Clock ticks that reached the sampler, idle ones included.
    pub ticks: u64,
    /// Samples that a rule asked for.
    pub taken: u64,
    /// In profiles (a window's ledger), or acknowledged by a collector (a node's ledger).
    pub delivered: u64,
    /// Taken, and neither delivered nor lost yet. Zero in a window's ledger.
    pub pending: u64,
    /// By reason; a reason without losses has no entry.
    pub lost: BTreeMap<LossReason, u64>,
}

/// A ledger whose sides differ: samples vanished or were counted twice.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error(
    "the ledger does not balance: {taken} samples taken, but {delivered} delivered + {pending} pending + {lost} lost"
)]
pub struct Imbalance {
    /// Samples taken.
    pub taken: u64,
    /// Samples delivered.
    pub delivered: u64,
    /// Samples on their way.
    pub pending: u64,
    /// Samples lost, all reasons.
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

    /// Samples lost, all reasons.
    pub fn lost_total(&self) -> u64 {
        self.lost.values().fold(0, |sum, n| sum.saturating_add(*n))
    }

    /// That every sample is accounted for.
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

/// As in a profile's comment: `ticks 990, taken 120, delivered 118, lost 2 (ring_full 2)`.
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
        if self.lost.is_empty() { Ok(()) } else { f.write_str(")") }
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
        let control::Ledger { ticks, taken, delivered, pending, lost } = ledger;
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
    fn every_reason_reads_back_from_its_name_and_no_two_share_one() {
        let names: std::collections::BTreeSet<_> = LossReason::ALL.iter().map(|r| r.as_str()).collect();
        assert_eq!(names.len(), LossReason::ALL.len());
        for reason in LossReason::ALL {
            assert_eq!(reason.to_string().parse(), Ok(reason));
        }
        assert_eq!("gone".parse::<LossReason>(), Err(UnknownReason("gone".into())));
    }

    #[test]
    fn a_ledger_balances_only_if_each_sample_is_somewhere() {
        let mut ledger = Ledger { ticks: 100, taken: 10, delivered: 6, pending: 1, ..Ledger::default() };
        assert_eq!(ledger.check(), Err(Imbalance { taken: 10, delivered: 6, pending: 1, lost: 0 }));
        ledger.lose(LossReason::RingFull, 2);
        ledger.lose(LossReason::Expired, 1);
        ledger.lose(LossReason::Refused, 0);
        assert_eq!(ledger.check(), Ok(()));
        assert_eq!(ledger.lost.len(), 2, "a reason without losses is not listed");
        assert_eq!(
            ledger.to_string(),
            "ticks 100, taken 10, delivered 6, pending 1, lost 3 (ring_full 2, expired 1)"
        );
        ledger.delivered = u64::MAX;
        assert!(ledger.check().is_err(), "no overflow");
    }

    #[test]
    fn the_sum_of_balanced_ledgers_balances_and_survives_the_wire() {
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
