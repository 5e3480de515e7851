//! Processes that are sampled because they matched a rule at `execve`, each for as long as its capture.
//!
//! The BPF programs match most of them by themselves, from the first instruction on. The agent grants or refuses each
//! afterwards; samples that came before the kernel knew of a refusal are strays. What only the agent can compare, such as the
//! executable, it compares while the process is a candidate. After each change of the rules the agent decides again about
//! these, because the kernel reports for exec conditions no process that already runs.

use std::{
    collections::{HashMap, HashSet},
    time::{Duration, Instant},
};

use crate::{
    conditions::WatchScope,
    model::{ImageKey, Sample},
    rules::RuleId,
};

/// How long a process stays a candidate. An interpreter that it loads later is no part of its start.
const CANDIDATE_TIMEOUT: Duration = Duration::from_secs(30);

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
    /// The agent matched the process, or the parent from which it has the grant.
    pub(super) by_agent: bool,
}

/// A process that called `execve` lately, and matches all that the BPF programs compare of some rules.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Candidate {
    pub(super) key: ImageKey,
    /// The rules that may still begin a capture.
    pub(super) rules: u64,
    pub(super) cgroup_id: u64,
    /// The path given to `execve`.
    pub(super) path: String,
    pub(super) since: Instant,
}

#[derive(Default)]
pub(super) struct AtExec {
    /// By thread group id.
    granted: HashMap<u32, Grant>,
    /// By thread group id.
    candidates: HashMap<u32, Candidate>,
    /// Thread group ids of those about which the agent has decided since the rules changed.
    decided: HashSet<u32>,
    /// The slots of all exec conditions.
    slots: u64,
    strays: u64,
}

impl AtExec {
    /// Sets the slots of all exec conditions. Grants of other slots are gone with their rule.
    pub(super) fn set_slots(&mut self, slots: u64) {
        self.slots = slots;
        self.granted.retain(|_, grant| slots >> grant.slot & 1 == 1);
        self.candidates.retain(|_, candidate| {
            candidate.rules &= slots;
            candidate.rules != 0
        });
    }

    /// The rules have changed: the agent must decide again about each process that depends on it.
    pub(super) fn begin_round(&mut self) {
        self.decided.clear();
    }

    /// Returns the images that depend on the agent, and about which it has not decided since the rules changed.
    pub(super) fn undecided(&self) -> Vec<ImageKey> {
        let granted = self.granted.values().filter(|grant| grant.by_agent).map(|grant| grant.key);
        let candidates = self.candidates.values().map(|candidate| candidate.key);
        let keys: HashSet<ImageKey> = granted.chain(candidates).collect();
        keys.into_iter().filter(|key| !self.decided.contains(&key.process.tgid)).collect()
    }

    /// Returns the rules about which the agent decides for this image: of those with an exec condition only what began a
    /// capture of it or may still do so.
    pub(super) fn open(&mut self, key: ImageKey, rules: u64) -> u64 {
        let tgid = key.process.tgid;
        let candidate = self.candidates.get(&tgid).filter(|candidate| candidate.key == key);
        let granted = self.granted.get(&tgid).filter(|grant| grant.key == key && grant.by_agent);
        let open = candidate.map_or(0, |candidate| candidate.rules) | granted.map_or(0, Grant::bit);
        if open != 0 {
            self.decided.insert(tgid);
        }
        rules & !self.slots | open & self.slots
    }

    pub(super) fn add_candidate(&mut self, candidate: Candidate) {
        if candidate.rules != 0 {
            self.candidates.insert(candidate.key.process.tgid, candidate);
        }
    }

    /// Takes those of these rules off a candidate that it still waits for, and returns them with it.
    pub(super) fn take_candidate(&mut self, key: ImageKey, rules: u64) -> Option<Candidate> {
        let tgid = key.process.tgid;
        let candidate = self.candidates.get_mut(&tgid).filter(|candidate| candidate.key == key)?;
        let taken = Candidate { rules: candidate.rules & rules, ..candidate.clone() };
        candidate.rules &= !rules;
        if candidate.rules == 0 {
            self.candidates.remove(&tgid);
        }
        (taken.rules != 0).then_some(taken)
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

    /// The process has ended or replaced its image. Returns its grant.
    pub(super) fn remove(&mut self, tgid: u32) -> Option<Grant> {
        self.candidates.remove(&tgid);
        self.decided.remove(&tgid);
        self.granted.remove(&tgid)
    }

    /// Takes out the grants whose time is over, and drops old candidates.
    pub(super) fn take_due(&mut self, now: Instant) -> Vec<Grant> {
        self.candidates.retain(|_, candidate| now.duration_since(candidate.since) < CANDIDATE_TIMEOUT);
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
            .map_or(0, Grant::bit);
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
        by_agent: bool,
    ) -> Self {
        Self { key, slot, rule, scope, ends: Instant::now() + duration, is_leader: true, by_agent }
    }

    fn bit(&self) -> u64 {
        1 << self.slot
    }
}
