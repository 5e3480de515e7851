//! Processes that are sampled because they matched a rule at `execve`, each for as long as its capture.
//!
//! The BPF programs match them by themselves, from the first instruction on. The agent grants or refuses each afterwards;
//! samples that came before the kernel knew of a refusal are strays.

use std::{
    collections::HashMap,
    time::{Duration, Instant},
};

use crate::{
    conditions::WatchScope,
    model::{ImageKey, Sample},
    rules::RuleId,
};

/// A capture of one process.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Grant {
    pub(super) key: ImageKey,
    pub(super) slot: u32,
    pub(super) rule: RuleId,
    pub(super) scope: WatchScope,
    pub(super) ends: Instant,
    /// The process called `execve` itself. Its children belong to the same capture, and do not end it.
    pub(super) is_leader: bool,
}

#[derive(Default)]
pub(super) struct AtExec {
    /// By thread group id.
    granted: HashMap<u32, Grant>,
    /// The slots of all exec conditions.
    slots: u64,
    strays: u64,
}

impl AtExec {
    /// Sets the slots of all exec conditions. Grants of other slots are gone with their rule.
    pub(super) fn set_slots(&mut self, slots: u64) {
        self.slots = slots;
        self.granted.retain(|_, grant| slots >> grant.slot & 1 == 1);
    }

    /// Returns which of these rules are exec conditions.
    pub(super) fn of(&self, rules: u64) -> u64 {
        rules & self.slots
    }

    /// Reports whether a process has a grant. It can have one at a time.
    pub(super) fn has_grant(&self, tgid: u32) -> bool {
        self.granted.contains_key(&tgid)
    }

    /// Returns what a child is granted that `parent` has just made.
    pub(super) fn inherited(&self, parent: u32, slot: u32, child: ImageKey) -> Option<Grant> {
        let grant = self.granted.get(&parent).filter(|grant| grant.slot == slot)?;
        Some(Grant { key: child, is_leader: false, ..grant.clone() })
    }

    pub(super) fn insert(&mut self, grant: Grant) {
        self.granted.insert(grant.key.process.tgid, grant);
    }

    pub(super) fn remove(&mut self, tgid: u32) -> Option<Grant> {
        self.granted.remove(&tgid)
    }

    /// Takes out the grants whose time is over.
    pub(super) fn take_due(&mut self, now: Instant) -> Vec<Grant> {
        self.granted.extract_if(|_, grant| grant.ends <= now).map(|(_, grant)| grant).collect()
    }

    /// Takes the rules off a sample that are not granted to its process, and counts them.
    pub(super) fn strip(&mut self, sample: &mut Sample) {
        let matched = self.of(sample.subject.rules);
        if matched == 0 {
            return;
        }
        let granted = self
            .granted
            .get(&sample.subject.key.tgid)
            .filter(|grant| grant.key == ImageKey::of(&sample.subject))
            .map_or(0, |grant| 1 << grant.slot);
        let strays = matched & !granted;
        self.strays += u64::from(strays.count_ones());
        sample.subject.rules &= !strays;
    }

    pub(super) fn strays(&self) -> u64 {
        self.strays
    }
}

impl Grant {
    /// Grants a process its own capture, which begins now.
    pub(super) fn leader(
        key: ImageKey,
        slot: u32,
        rule: RuleId,
        scope: WatchScope,
        duration: Duration,
    ) -> Self {
        Self { key, slot, rule, scope, ends: Instant::now() + duration, is_leader: true }
    }
}
