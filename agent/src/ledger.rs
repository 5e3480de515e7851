//! The node's account of every sample: taken, delivered, lost with a reason, or pending at a stage.
//!
//! The two sides come from different sources. `taken` is the kernel's count, as the engine's account has it for each window.
//! Each stage counts the samples that it received, and takes the number that it passes on from what it really passes on: the
//! profiles of the window, the batches, the collector's acknowledgement. A stage that is done with its samples settles: the
//! rest leaves it without a reason, and shows as `unaccounted`.

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

    /// Counts a window that the engine closed. Its delivered samples enter [`Stage::Window`]: for the node they are pending
    /// until the collector acknowledges them.
    pub fn take_window(&self, window: &Ledger) {
        let Ledger { ticks, taken, delivered, pending: _, lost } = window;
        let mut account = self.account();
        account.ticks += ticks;
        account.taken += taken;
        *account.at(Stage::Window) += delivered;
        for (reason, n) in lost {
            account.add_lost(*reason, *n);
        }
    }

    /// Counts `n` samples as taken, in the open window.
    pub fn take(&self, n: u64) {
        let mut account = self.account();
        account.taken += n;
        *account.at(Stage::Window) += n;
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
        self.deliver_counted(from, n, n);
    }

    /// Settles `n` samples at `from`, of which the receiver has acknowledged this number. The others are unaccounted.
    pub fn deliver_counted(&self, from: Stage, n: u64, acknowledged: u64) {
        let mut account = self.account();
        account.leave(from, n);
        account.delivered += acknowledged;
    }

    /// Settles a stage that had received `received` samples and has passed on or lost `handled` of them. The others leave it
    /// without a reason.
    pub fn settle(&self, stage: Stage, received: u64, handled: u64) {
        if received > handled {
            let missing = received - handled;
            tracing::error!(
                stage = stage.as_str(),
                missing,
                "samples are missing without a reason, which is a fault of the agent; report it"
            );
            self.account().leave(stage, missing);
        }
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
        Window(usize, u64, u64),
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
            (reason.clone(), n.clone(), n.clone()).prop_map(|(r, n, m)| Op::Window(r, n, m)),
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
                    Op::Window(r, n, lost) => {
                        let mut window = Ledger { taken: n + lost, delivered: n, ..Ledger::default() };
                        window.lose(LossReason::ALL[r], lost);
                        ledger.take_window(&window);
                    }
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

    /// Checks each hop: what it does not pass on, and gives no reason for, is missing.
    #[test]
    fn a_sample_that_a_stage_forgets_is_unaccounted() {
        let missing = |ledger: &NodeLedger| ledger.snapshot().unaccounted();
        let ledger = NodeLedger::new();
        // The window has one sample less than the kernel took.
        ledger.take_window(&Ledger { taken: 11, delivered: 10, ..Ledger::default() });
        assert_eq!(missing(&ledger), 1);
        ledger.pass(Stage::Window, Stage::Queue, 9);
        assert_eq!(missing(&ledger), 1, "one is still in the window");
        ledger.settle(Stage::Window, 10, 9);
        assert_eq!(missing(&ledger), 2);
        ledger.pass(Stage::Queue, Stage::Wire, 9);
        ledger.deliver_counted(Stage::Wire, 9, 8);
        assert_eq!(missing(&ledger), 3);
        let now = ledger.snapshot();
        assert_eq!((now.taken, now.delivered, now.pending, now.lost_total()), (11, 8, 0, 0));
    }

    #[test]
    fn clones_share_one_account() {
        let ledger = NodeLedger::new();
        ledger.clone().take(3);
        assert_eq!(ledger.account_now().at_stage(Stage::Window), 3);
    }

    /// Checks a spool of a former run: its samples are taken once, and not at all if the spool holds them twice.
    #[test]
    fn samples_of_a_former_run_are_inherited() {
        let ledger = NodeLedger::new();
        ledger.take(4);
        ledger.inherit(10);
        ledger.inherit(6);
        ledger.disinherit(3);
        let now = ledger.account_now();
        assert_eq!((now.taken, now.inherited, now.at_stage(Stage::Spool)), (17, 13, 13));
        ledger.deliver(Stage::Spool, 13);
        assert_eq!(ledger.snapshot().unaccounted(), 0);
    }

    #[test]
    fn ticks_and_losses_of_windows_add_up() {
        let ledger = NodeLedger::new();
        for ticks in [3, 4] {
            let mut window = Ledger { ticks, taken: 2, delivered: 1, ..Ledger::default() };
            window.lose(LossReason::RingFull, 1);
            ledger.take_window(&window);
        }
        ledger.lose(Stage::Window, LossReason::QueueFull, 0);
        let now = ledger.snapshot();
        assert_eq!((now.ticks, now.taken, now.pending), (7, 4, 2));
        assert_eq!(now.lost, [(LossReason::RingFull, 2)].into(), "no reason without a sample");
    }

    #[test]
    fn a_stage_that_handled_all_its_samples_misses_none() {
        let ledger = NodeLedger::new();
        ledger.take(10);
        ledger.settle(Stage::Window, 10, 10);
        ledger.settle(Stage::Window, 8, 10);
        assert_eq!((ledger.snapshot().pending, ledger.snapshot().unaccounted()), (10, 0));
        ledger.settle(Stage::Window, 10, 8);
        assert_eq!((ledger.snapshot().pending, ledger.snapshot().unaccounted()), (8, 2));
    }

    #[test]
    fn stages_have_the_names_of_the_metrics() {
        assert_eq!(Stage::ALL.map(Stage::as_str), ["window", "queue", "spool", "wire"]);
    }
}
