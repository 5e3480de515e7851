//! The node's account of every sample: taken, delivered, lost with a reason, or pending at a stage.
//!
//! The part that moves samples from one stage to the next reports the move here, and nothing else counts them. The account
//! balances by construction. A part that forgets to report what became of its samples shows as a stage that never empties;
//! a part that reports them twice shows as an imbalance.

use std::{collections::BTreeMap, sync::Arc};

use gannet_proto::ledger::{Ledger, LossReason};
use parking_lot::{Mutex, MutexGuard};

/// Stage of samples that are taken and neither delivered nor lost.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Stage {
    /// In an open window, or in a window that becomes profiles.
    Window,
    /// In the queue of the exporter, not on disk yet.
    Queue,
    /// On disk, waiting to be sent.
    Spool,
    /// Sent to the collector, which has not answered yet. The spool still holds them.
    Wire,
}

impl Stage {
    /// All stages in the order in which samples pass them.
    pub const ALL: [Self; 4] = [Self::Window, Self::Queue, Self::Spool, Self::Wire];

    /// Returns the name in metrics and on the debug page.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Window => "window",
            Self::Queue => "queue",
            Self::Spool => "spool",
            Self::Wire => "wire",
        }
    }
}

/// The account since the start of the agent. Clones share it.
///
/// Samples that a former run left in the spool are *inherited*: they count as taken when the spool opens, so that they
/// can be delivered or lost like all others.
///
/// A lock instead of atomics makes every snapshot balance exactly. The agent takes it a few times for each window and each
/// read of the ring buffer, never for each sample.
#[derive(Clone, Debug, Default)]
pub struct NodeLedger(Arc<Mutex<Account>>);

/// A consistent copy of the account.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Account {
    /// Clock ticks that reached the sampler.
    pub ticks: u64,
    /// Samples that rules asked for, including inherited ones.
    pub taken: u64,
    /// The part of `taken` that a former run left in the spool.
    pub inherited: u64,
    /// Samples that the collector has acknowledged.
    pub delivered: u64,
    /// Pending samples by stage, in the order of [`Stage::ALL`].
    pub pending: [u64; Stage::ALL.len()],
    /// Lost samples by reason.
    pub lost: BTreeMap<LossReason, u64>,
}

impl NodeLedger {
    /// Creates an empty account.
    pub fn new() -> Self {
        Self::default()
    }

    fn account(&self) -> MutexGuard<'_, Account> {
        self.0.lock()
    }

    /// Counts `n` clock ticks that reached the sampler.
    pub fn tick(&self, n: u64) {
        self.account().ticks += n;
    }

    /// Counts `n` samples as taken, in the open window.
    pub fn take(&self, n: u64) {
        let mut account = self.account();
        account.taken += n;
        *account.at(Stage::Window) += n;
    }

    /// Counts `n` samples as taken and lost: they never reached user space.
    pub fn take_lost(&self, reason: LossReason, n: u64) {
        let mut account = self.account();
        account.taken += n;
        account.add_lost(reason, n);
    }

    /// Counts `n` samples that a former run left in the spool.
    pub fn inherit(&self, n: u64) {
        let mut account = self.account();
        account.taken += n;
        account.inherited += n;
        *account.at(Stage::Spool) += n;
    }

    /// Takes back an [`Self::inherit`] of `n` samples, which are in the spool twice.
    pub fn disinherit(&self, n: u64) {
        let mut account = self.account();
        account.leave(Stage::Spool, n);
        account.taken = account.taken.saturating_sub(n);
        account.inherited = account.inherited.saturating_sub(n);
    }

    /// Moves `n` samples from one stage to another.
    pub fn pass(&self, from: Stage, to: Stage, n: u64) {
        let mut account = self.account();
        account.leave(from, n);
        *account.at(to) += n;
    }

    /// Counts `n` samples at `from` as delivered.
    pub fn deliver(&self, from: Stage, n: u64) {
        let mut account = self.account();
        account.leave(from, n);
        account.delivered += n;
    }

    /// Counts `n` samples at `from` as lost.
    pub fn lose(&self, from: Stage, reason: LossReason, n: u64) {
        let mut account = self.account();
        account.leave(from, n);
        account.add_lost(reason, n);
    }

    /// Returns a copy of the account.
    pub fn account_now(&self) -> Account {
        self.account().clone()
    }

    /// Returns the account in the form that goes over the wire.
    pub fn snapshot(&self) -> Ledger {
        self.account().to_ledger()
    }
}

impl Account {
    /// Returns the pending samples at one stage.
    pub fn at_stage(&self, stage: Stage) -> u64 {
        self.pending[stage as usize]
    }

    /// Returns the form that goes over the wire.
    pub fn to_ledger(&self) -> Ledger {
        let Self { ticks, taken, inherited: _, delivered, pending, lost } = self;
        Ledger {
            ticks: *ticks,
            taken: *taken,
            delivered: *delivered,
            pending: pending.iter().sum(),
            lost: lost.clone(),
        }
    }

    fn at(&mut self, stage: Stage) -> &mut u64 {
        &mut self.pending[stage as usize]
    }

    /// Removes samples from a stage. If the stage holds fewer, a caller has a bug; it shows as an imbalance, because a wrong
    /// count is no reason to stop profiling.
    fn leave(&mut self, stage: Stage, n: u64) {
        let there = self.at(stage);
        if *there < n {
            tracing::error!(stage = stage.as_str(), there = *there, n, "the ledger does not balance");
        }
        *there = there.saturating_sub(n);
    }

    fn add_lost(&mut self, reason: LossReason, n: u64) {
        if n > 0 {
            *self.lost.entry(reason).or_default() += n;
        }
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[derive(Clone, Debug)]
    enum Op {
        Take(u64),
        TakeLost(usize, u64),
        Inherit(u64),
        Pass(usize, usize, u64),
        Deliver(usize, u64),
        Lose(usize, usize, u64),
    }

    fn op() -> impl Strategy<Value = Op> {
        let stage = 0..Stage::ALL.len();
        let reason = 0..LossReason::ALL.len();
        let n = 0_u64..1_000_000;
        prop_oneof![
            n.clone().prop_map(Op::Take),
            (reason.clone(), n.clone()).prop_map(|(r, n)| Op::TakeLost(r, n)),
            n.clone().prop_map(Op::Inherit),
            (stage.clone(), stage.clone(), n.clone()).prop_map(|(a, b, n)| Op::Pass(a, b, n)),
            (stage.clone(), n.clone()).prop_map(|(s, n)| Op::Deliver(s, n)),
            (stage, reason, n).prop_map(|(s, r, n)| Op::Lose(s, r, n)),
        ]
    }

    proptest! {
        #[test]
        fn the_account_balances_after_any_operations(ops in prop::collection::vec(op(), 0..100)) {
            let ledger = NodeLedger::new();
            for op in ops {
                // A part without a bug never moves more samples than a stage holds.
                let there = |s: usize, n: u64| n.min(ledger.account_now().at_stage(Stage::ALL[s]));
                match op {
                    Op::Take(n) => ledger.take(n),
                    Op::TakeLost(r, n) => ledger.take_lost(LossReason::ALL[r], n),
                    Op::Inherit(n) => ledger.inherit(n),
                    Op::Pass(a, b, n) => ledger.pass(Stage::ALL[a], Stage::ALL[b], there(a, n)),
                    Op::Deliver(s, n) => ledger.deliver(Stage::ALL[s], there(s, n)),
                    Op::Lose(s, r, n) => ledger.lose(Stage::ALL[s], LossReason::ALL[r], there(s, n)),
                }
                let snapshot = ledger.snapshot();
                prop_assert!(snapshot.check().is_ok(), "{snapshot:?}");
            }
        }
    }

    #[test]
    fn samples_that_leave_a_stage_twice_show_as_an_imbalance() {
        let ledger = NodeLedger::new();
        ledger.take(10);
        ledger.pass(Stage::Window, Stage::Queue, 10);
        ledger.lose(Stage::Queue, LossReason::QueueFull, 10);
        assert!(ledger.snapshot().check().is_ok());
        ledger.deliver(Stage::Queue, 10);
        assert!(ledger.snapshot().check().is_err());
    }

    #[test]
    fn clones_share_one_account() {
        let ledger = NodeLedger::new();
        ledger.clone().take_lost(LossReason::RingFull, 3);
        let account = ledger.account_now();
        assert_eq!((account.taken, account.lost[&LossReason::RingFull]), (3, 3));
    }
}
