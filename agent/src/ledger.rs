//! The node's account of every sample: taken, delivered, lost and why, or still on its way.
//!
//! Whoever moves samples from one room to the next says so here; nobody else counts. The account stays balanced by
//! construction, and what is on its way is counted where it is, so that a room that forgets to say what became of its
//! samples shows as a stage that never empties, and one that says it twice as an imbalance.

use std::{
    collections::BTreeMap,
    sync::{Arc, Mutex, MutexGuard, PoisonError},
};

use gannet_proto::ledger::{Ledger, LossReason};

/// Where samples are that were taken and are neither delivered nor lost.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Stage {
    /// In a window that is still open, or being turned into profiles.
    Window,
    /// Handed to the exporter, not on disk yet.
    Queue,
    /// In the spool.
    Spool,
    /// Sent to the collector, not answered yet. The spool still has them.
    Wire,
}

impl Stage {
    /// All, in the order in which samples pass through them.
    pub const ALL: [Self; 4] = [Self::Window, Self::Queue, Self::Spool, Self::Wire];

    /// Its name in metrics and on the debug page.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Window => "window",
            Self::Queue => "queue",
            Self::Spool => "spool",
            Self::Wire => "wire",
        }
    }
}

/// The account. Clones share it.
///
/// It counts since the agent started. Samples that a former run left in the spool are *inherited*: they enter as taken
/// when the spool is opened, so that they can be delivered or lost like all others; see [`Account::inherited`].
///
/// A lock and not atomics, so that every snapshot balances exactly; it is taken a few times per window and ring
/// drain, never per sample.
#[derive(Clone, Debug, Default)]
pub struct NodeLedger(Arc<Mutex<Account>>);

/// One consistent reading of the account.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Account {
    /// Clock ticks that reached the sampler.
    pub ticks: u64,
    /// Samples that a rule asked for, the inherited ones included.
    pub taken: u64,
    /// Of `taken`: found in the spool of a former run.
    pub inherited: u64,
    /// Acknowledged by a collector.
    pub delivered: u64,
    /// On their way, in the order of [`Stage::ALL`].
    pub pending: [u64; Stage::ALL.len()],
    /// Lost, by reason.
    pub lost: BTreeMap<LossReason, u64>,
}

impl NodeLedger {
    /// An empty account.
    pub fn new() -> Self {
        Self::default()
    }

    fn account(&self) -> MutexGuard<'_, Account> {
        // Each method leaves the account whole before anything could panic.
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// `n` clock ticks reached the sampler.
    pub fn tick(&self, n: u64) {
        self.account().ticks += n;
    }

    /// `n` samples were taken, and are in the open window.
    pub fn take(&self, n: u64) {
        let mut account = self.account();
        account.taken += n;
        *account.at(Stage::Window) += n;
    }

    /// `n` samples were taken in the kernel and never reached user space.
    pub fn take_lost(&self, reason: LossReason, n: u64) {
        let mut account = self.account();
        account.taken += n;
        account.add_lost(reason, n);
    }

    /// `n` samples of a former run were found in the spool.
    pub fn inherit(&self, n: u64) {
        let mut account = self.account();
        account.taken += n;
        account.inherited += n;
        *account.at(Stage::Spool) += n;
    }

    /// `n` samples went from one stage to another.
    pub fn pass(&self, from: Stage, to: Stage, n: u64) {
        let mut account = self.account();
        account.leave(from, n);
        *account.at(to) += n;
    }

    /// A collector has acknowledged `n` samples.
    pub fn deliver(&self, from: Stage, n: u64) {
        let mut account = self.account();
        account.leave(from, n);
        account.delivered += n;
    }

    /// `n` samples that were at `from` are lost.
    pub fn lose(&self, from: Stage, reason: LossReason, n: u64) {
        let mut account = self.account();
        account.leave(from, n);
        account.add_lost(reason, n);
    }

    /// Everything at one moment.
    pub fn account_now(&self) -> Account {
        self.account().clone()
    }

    /// Everything at one moment, in the form that goes over the wire.
    pub fn snapshot(&self) -> Ledger {
        self.account().to_ledger()
    }
}

impl Account {
    /// Samples at one stage.
    pub fn at_stage(&self, stage: Stage) -> u64 {
        self.pending[stage as usize]
    }

    /// In the form that goes over the wire.
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

    /// Taking out more than is there is a bug of a caller: it is left to show as an imbalance, because a wrong count
    /// is no reason to stop profiling.
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
        fn whatever_happens_to_samples_the_account_balances(ops in prop::collection::vec(op(), 0..100)) {
            let ledger = NodeLedger::new();
            for op in ops {
                // No more than is there can leave a stage: what the rooms do, as long as they have no bug.
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
