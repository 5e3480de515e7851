//! Owns the slots: which rule or capture has which bit, since when, and how many samples it got. Also the rules that wait
//! for a slot.

use std::{
    cmp::Reverse,
    collections::{BTreeMap, BTreeSet},
    mem::discriminant,
    sync::Arc,
    time::{Duration, Instant, SystemTime},
};

use gannet_proto::control::{Rule, condition, rule_status};

use super::{
    CaptureId, CaptureReason, CaptureTarget, RuleSource, SourceRules,
    claims::{Claim, grant},
    compile::{self, Compiled, DENY_SLOTS, ProcessTraits},
    containers::{PodContainers, PodQuery},
};
use crate::{
    kernel::{MAX_RULES, Want},
    model::boot_time_ns,
    process::Process,
    profile::slots,
};

/// Slots for rules. A rule with an exec condition and other conditions takes two.
pub(super) const RULE_SLOTS: usize = 48;
/// Captures that can run at one time on this node.
pub(crate) const CAPTURE_SLOTS: usize = 12;
const _: () = assert!(RULE_SLOTS + CAPTURE_SLOTS + DENY_SLOTS == MAX_RULES);

/// Rate of the flight recorder, samples per second and CPU.
const RECORDER_HZ: u64 = 19;
/// How long the slot of a removed rule stays reserved at least. A BPF program that had read the former rules has ended long
/// before. The slot becomes free at the end of the next window: that window has the last samples in the ring buffer.
pub(super) const RETIREMENT: Duration = Duration::from_secs(2);

/// The slots of this node, [`RULE_SLOTS`] for rules and behind them [`CAPTURE_SLOTS`] for captures.
#[derive(Clone, Debug)]
pub(crate) struct Slots {
    entries: Vec<Option<Slot>>,
    /// The rules without a slot, in the order in which they came.
    waiting: Vec<WaitingRule>,
    /// The governor's factor for all periods.
    rate_divisor: u32,
}

/// A slot in use. A rule keeps its slots and their counts as long as it does not change.
#[derive(Clone, Debug)]
pub(super) struct Slot {
    source: RuleSource,
    pub(super) revision: u64,
    pub(super) rule: Arc<Rule>,
    pub(super) compiled: Arc<Compiled>,
    pub(super) usage: SlotUse,
    /// Why the rule cannot work on this node at all.
    unsupported: Option<String>,
    pub(super) expires_at: Option<SystemTime>,
    not_before: Option<SystemTime>,
    pub(super) samples: u64,
    pub(super) last_sample: Option<SystemTime>,
    /// Captures that a rule with conditions has started.
    pub(super) captures: u64,
    /// When the last of them ended.
    pub(super) last_capture: Option<SystemTime>,
    /// When the rule got the slot, by the boot clock. Off-CPU time that began earlier does not count.
    since_ns: u64,
    /// The rule was removed, or the capture is over. The slot stays reserved for samples that still carry its bit.
    retired: Option<Instant>,
}

/// A rule that has no slot yet, or has none any more.
#[derive(Clone, Debug)]
pub(super) struct WaitingRule {
    /// The rule with its counts. Its use does not count: a rule may need several slots.
    pub(super) entry: Slot,
    /// A slot is its own as soon as one is free. Else rules of the same or a higher priority have all of them.
    granted: bool,
}

#[derive(Clone, Debug)]
pub(super) enum SlotUse {
    /// Samples all the time.
    Always,
    /// Marks the processes of a rule with conditions. Samples them for the flight recorder if there is a pre-trigger window.
    Watch { pre_trigger: Duration },
    /// Samples processes that match at exec. The agent ends it process by process.
    AtExec,
    /// Samples for one capture.
    Capture { id: CaptureId, target: CaptureTarget, reason: CaptureReason, ends: Instant },
}

/// A live rule with conditions, for the sensors and triggers.
#[derive(Clone, Debug, PartialEq)]
pub(crate) struct WatchedRule {
    pub(crate) rule: Arc<Rule>,
    /// Bits of the slots that mark its processes.
    pub(crate) slots: u64,
    /// The slot of its exec condition.
    pub(crate) at_exec: Option<u32>,
}

impl Slots {
    pub(super) fn new() -> Self {
        Self { entries: vec![None; RULE_SLOTS + CAPTURE_SLOTS], waiting: Vec::new(), rate_divisor: 1 }
    }

    /// Returns true if the divisor differs from the former one.
    pub(super) fn set_rate_divisor(&mut self, divisor: u32) -> bool {
        let changed = self.rate_divisor != divisor;
        self.rate_divisor = divisor.max(1);
        changed
    }

    /// Replaces the rules of a source. A rule that stays keeps its slots and counts; manual captures stay. The new rules wait
    /// for [`Self::assign`].
    pub(super) fn replace(&mut self, source: RuleSource, set: &SourceRules, applied_at: SystemTime) {
        let stays = |entry: &Slot| set.rules.iter().any(|rule| *rule == *entry.rule);
        for slot in self.entries.iter_mut().flatten() {
            if slot.source != source || slot.retired.is_some() || slot.rule.id == super::MANUAL_RULE_ID {
                continue;
            }
            if stays(slot) {
                slot.revision = set.revision;
            } else {
                slot.retired = Some(Instant::now());
            }
        }
        self.waiting.retain(|waiting| waiting.entry.source != source || stays(&waiting.entry));
        for waiting in self.waiting.iter_mut().filter(|waiting| waiting.entry.source == source) {
            waiting.entry.revision = set.revision;
        }
        for rule in &set.rules {
            let is_known = self
                .active()
                .filter(|(_, slot)| !slot.is_capture())
                .map(|(_, slot)| slot)
                .chain(self.waiting.iter().map(|waiting| &waiting.entry))
                .any(|entry| entry.source == source && *entry.rule == *rule);
            if !is_known {
                self.waiting
                    .push(WaitingRule { entry: Slot::new(source, rule, set, applied_at), granted: false });
            }
        }
    }

    /// Decides by priority which rules have slots at `now`, and assigns the free ones. Returns true if the rules in slots
    /// differ from the former ones.
    pub(super) fn assign(&mut self, now: SystemTime) -> bool {
        let held = self.held();
        let claim = |entry: &Slot, held: bool| Claim {
            live: entry.is_live(now),
            priority: entry.rule.priority,
            held,
            slots: uses(&entry.rule).len(),
        };
        let holders = held.iter().filter_map(|slots| self.entries[*slots.first()?].as_ref());
        let claims: Vec<Claim> = holders
            .map(|entry| claim(entry, true))
            .chain(self.waiting.iter().map(|waiting| claim(&waiting.entry, false)))
            .collect();
        let granted = grant(&claims, RULE_SLOTS);
        for (waiting, granted) in self.waiting.iter_mut().zip(&granted[held.len()..]) {
            waiting.granted = *granted;
        }
        let displaced = held.iter().zip(&granted).filter(|(_, granted)| !**granted).map(|(slots, _)| slots);
        let displaced = displaced.filter(|slots| self.displace(slots)).count();
        displaced + self.place() > 0
    }

    /// Returns the slots of each rule that has some.
    fn held(&self) -> Vec<Vec<usize>> {
        let mut held: Vec<(&str, Vec<usize>)> = Vec::new();
        for (index, slot) in self.active().filter(|(_, slot)| !slot.is_capture()) {
            match held.iter_mut().find(|(id, _)| *id == slot.rule.id) {
                Some((_, slots)) => slots.push(index),
                None => held.push((&slot.rule.id, vec![index])),
            }
        }
        held.into_iter().map(|(_, slots)| slots).collect()
    }

    /// Takes a rule's slots away, for rules of a higher priority. The rule waits.
    fn displace(&mut self, slots: &[usize]) -> bool {
        let mut entry: Option<Slot> = None;
        for slot in slots {
            let Some(slot) = self.entries[*slot].as_mut() else { continue };
            let samples = slot.samples.max(entry.as_ref().map_or(0, |entry| entry.samples));
            entry = Some(Slot { samples, ..slot.clone() });
            slot.retired = Some(Instant::now());
        }
        let Some(entry) = entry else { return false };
        self.waiting.push(WaitingRule { entry, granted: false });
        true
    }

    /// Assigns free slots to the granted rules, those of a higher priority first. Returns how many rules got theirs.
    fn place(&mut self) -> usize {
        let before = self.waiting.len();
        let mut waiting = std::mem::take(&mut self.waiting);
        waiting.sort_by_key(|waiting| Reverse(waiting.entry.rule.priority));
        waiting.retain(|waiting| !(waiting.granted && self.put(&waiting.entry)));
        self.waiting = waiting;
        before - self.waiting.len()
    }

    /// Assigns all slots that a rule needs: those that it had until lately, or free ones. Returns false if there are not
    /// enough.
    fn put(&mut self, entry: &Slot) -> bool {
        let mut chosen: Vec<(usize, SlotUse)> = Vec::new();
        for usage in uses(&entry.rule) {
            let is_own = |slot: &Slot| {
                slot.source == entry.source
                    && slot.retired.is_some()
                    && *slot.rule == *entry.rule
                    && discriminant(&slot.usage) == discriminant(&usage)
            };
            let is_chosen = |index: usize| chosen.iter().any(|(other, _)| *other == index);
            let slots = || self.entries[..RULE_SLOTS].iter().enumerate();
            let own = slots().find(|(_, slot)| slot.as_ref().is_some_and(is_own));
            let free = own.or_else(|| slots().find(|(index, slot)| slot.is_none() && !is_chosen(*index)));
            let Some((index, _)) = free else { return false };
            chosen.push((index, usage));
        }
        for (index, usage) in chosen {
            self.entries[index] =
                Some(Slot { usage, since_ns: boot_time_ns(), retired: None, ..entry.clone() });
        }
        true
    }

    /// Returns the rules without a slot.
    pub(super) fn waiting(&self) -> &[WaitingRule] {
        &self.waiting
    }

    /// Reports whether a rule waits that a slot could be given to now.
    pub(crate) fn can_assign(&self) -> bool {
        let free = self.entries[..RULE_SLOTS].iter().filter(|slot| slot.is_none()).count();
        self.waiting.iter().any(|waiting| waiting.granted && uses(&waiting.entry.rule).len() <= free)
    }

    /// Reports whether a rule waits for a slot that the end of a window would free: one that was retired long enough ago and
    /// is not in `awaited`.
    pub(crate) fn is_window_awaited(&self, now: Instant, awaited: u64) -> bool {
        self.waiting.iter().any(|waiting| waiting.granted)
            && self.entries[..RULE_SLOTS].iter().enumerate().any(|(index, slot)| {
                awaited >> index & 1 == 0 && slot.as_ref().is_some_and(|slot| slot.is_retired_long(now))
            })
    }

    /// Marks a rule as impossible on this node, or as possible again.
    pub(super) fn set_unsupported(&mut self, source: RuleSource, rule: &Rule, reason: Option<&str>) {
        for slot in self.entries_mut() {
            if slot.source == source && slot.retired.is_none() && *slot.rule == *rule {
                slot.unsupported = reason.map(str::to_owned);
            }
        }
    }

    /// Checks for all slots again whether their rules are possible on this node.
    pub(super) fn update_unsupported(&mut self, check: impl Fn(&Rule) -> Option<String>) {
        for slot in self.entries_mut() {
            slot.unsupported = check(&slot.rule);
        }
    }

    /// Returns all rules and captures, with and without slots.
    fn entries_mut(&mut self) -> impl Iterator<Item = &mut Slot> {
        self.entries.iter_mut().flatten().chain(self.waiting.iter_mut().map(|waiting| &mut waiting.entry))
    }

    /// Returns the slots of rules and captures that are not retired.
    pub(super) fn active(&self) -> impl Iterator<Item = (usize, &Slot)> {
        self.entries
            .iter()
            .enumerate()
            .filter_map(|(index, slot)| Some((index, slot.as_ref()?)))
            .filter(|(_, slot)| slot.retired.is_none())
    }

    /// Returns the active slots whose rules work at `now`.
    pub(super) fn live(&self, now: SystemTime) -> impl Iterator<Item = (usize, &Slot)> {
        self.active().filter(move |(_, slot)| slot.is_live(now))
    }

    fn active_of(&self, bits: u64) -> impl Iterator<Item = (usize, &Slot)> {
        self.active().filter(move |(index, _)| bits >> index & 1 == 1)
    }

    /// Returns a slot, retired or not.
    pub(super) fn get(&self, slot: u32) -> Option<&Slot> {
        self.entries.get(slot as usize)?.as_ref()
    }

    /// Returns the name of the rule in a slot, retired or not.
    pub(crate) fn rule_id(&self, slot: u32) -> Option<&str> {
        Some(self.get(slot)?.rule.id.as_str())
    }

    /// Nanoseconds between two ticks, with the governor's divisor; 0 for no ticks.
    pub(super) fn period_ns(&self, slot: &Slot) -> u64 {
        slot.period_ns() * u64::from(self.rate_divisor)
    }

    /// Returns the shortest period of these slots, nanoseconds; 0 for no ticks.
    pub(crate) fn shortest_period_ns(&self, bits: u64) -> u64 {
        self.active_of(bits)
            .map(|(_, slot)| self.period_ns(slot))
            .filter(|period| *period > 0)
            .min()
            .unwrap_or(0)
    }

    /// Reports whether any live rule measures off-CPU time.
    pub(crate) fn wants_off_cpu(&self, now: SystemTime) -> bool {
        self.live(now).any(|(_, slot)| slot.wants_off_cpu())
    }

    /// Reports whether a rule of these slots measures off-CPU time.
    pub(crate) fn wants_off_cpu_of(&self, bits: u64) -> bool {
        self.active_of(bits).any(|(_, slot)| slot.wants_off_cpu())
    }

    /// Returns those of the slots that have had the same rule since this moment of the boot clock, nanoseconds.
    pub(crate) fn held_since(&self, bits: u64, at_ns: u64) -> u64 {
        self.active_of(bits)
            .filter(|(_, slot)| slot.since_ns <= at_ns)
            .fold(0, |bits, (index, _)| bits | 1 << index)
    }

    /// Reports whether a rule selects containers by pod metadata.
    pub(crate) fn uses_pods(&self, rule_id: &str) -> bool {
        self.active().any(|(_, slot)| slot.rule.id == rule_id && slot.compiled.pods)
    }

    /// Returns the rules over pods, each once, also those that wait for a slot.
    pub(crate) fn pod_queries(&self) -> Vec<PodQuery> {
        let mut queries: Vec<PodQuery> = Vec::new();
        let waiting = self.waiting.iter().map(|waiting| &waiting.entry);
        for slot in self.active().map(|(_, slot)| slot).chain(waiting).filter(|slot| slot.compiled.pods) {
            if queries.iter().all(|known| known.rule_id != slot.rule.id) {
                queries.push(PodQuery {
                    rule_id: slot.rule.id.clone(),
                    matches: slot.rule.r#match.clone().unwrap_or_default(),
                });
            }
        }
        queries
    }

    /// Decides for the rules that the BPF programs cannot decide. `candidates` are the slots of which all other properties
    /// match.
    pub(crate) fn decide(&self, process: &Process, candidates: u64, now: SystemTime) -> Want {
        let mut want = Want::default();
        for (index, slot) in self.live(now) {
            if candidates >> index & 1 == 1 && slot.compiled.matches(&ProcessTraits::of(process)) {
                compile::add(&mut want, Want { rules: 1 << index, period_ns: self.period_ns(slot) });
            }
        }
        want
    }

    /// Returns the slots among `candidates` whose rule compares the language runtime.
    pub(crate) fn comparing_runtime(&self, candidates: u64) -> u64 {
        self.active()
            .filter(|(index, slot)| candidates >> index & 1 == 1 && slot.compiled.compares_runtime())
            .fold(0, |slots, (index, _)| slots | 1 << index)
    }

    /// Returns the slots among `candidates` whose rule compares the service that a process gives.
    pub(crate) fn comparing_service(&self, candidates: u64) -> u64 {
        self.active()
            .filter(|(index, slot)| candidates >> index & 1 == 1 && slot.compiled.compares_service())
            .fold(0, |slots, (index, _)| slots | 1 << index)
    }

    /// Returns the slots whose rule samples threads only while they work in a span.
    pub(crate) fn in_span(&self) -> u64 {
        self.active()
            .filter(|(_, slot)| slot.rule.capture.as_ref().is_some_and(|capture| capture.only_in_span))
            .fold(0, |slots, (index, _)| slots | 1 << index)
    }

    /// Returns the live rules with conditions.
    pub(crate) fn watched(&self, now: SystemTime) -> Vec<WatchedRule> {
        let mut watched: BTreeMap<&str, WatchedRule> = BTreeMap::new();
        for (index, slot) in self.live(now) {
            let at_exec = match slot.usage {
                SlotUse::Watch { .. } => None,
                SlotUse::AtExec => Some(index as u32),
                SlotUse::Always | SlotUse::Capture { .. } => continue,
            };
            let entry = watched.entry(&slot.rule.id).or_insert_with(|| WatchedRule {
                rule: Arc::clone(&slot.rule),
                slots: 0,
                at_exec: None,
            });
            entry.slots |= 1 << index;
            entry.at_exec = entry.at_exec.or(at_exec);
        }
        watched.into_values().collect()
    }

    /// Returns the slots whose samples the flight recorder takes, and their longest pre-trigger window.
    pub(crate) fn recorded(&self) -> (u64, Duration) {
        self.active().fold((0, Duration::ZERO), |(bits, longest), (index, slot)| match slot.usage {
            SlotUse::Watch { pre_trigger } if !pre_trigger.is_zero() => {
                (bits | 1 << index, longest.max(pre_trigger))
            }
            _ => (bits, longest),
        })
    }

    /// Returns the pre-trigger window of a rule, and the slot whose samples fill it.
    pub(crate) fn pre_trigger(&self, rule_id: &str) -> Option<(u32, Duration)> {
        self.active().find_map(|(index, slot)| match slot.usage {
            SlotUse::Watch { pre_trigger } if slot.rule.id == rule_id && !pre_trigger.is_zero() => {
                Some((index as u32, pre_trigger))
            }
            _ => None,
        })
    }

    /// Returns the next moment at which a rule comes into force or expires.
    pub(crate) fn next_change(&self, now: SystemTime) -> Option<SystemTime> {
        self.active()
            .map(|(_, slot)| slot)
            .chain(self.waiting.iter().map(|waiting| &waiting.entry))
            .flat_map(|slot| [slot.not_before, slot.expires_at])
            .flatten()
            .filter(|at| *at > now)
            .min()
    }

    /// Returns the slot of a capture, also while it is retired.
    pub(crate) fn of_capture(&self, capture: CaptureId) -> Option<u32> {
        self.entries.iter().enumerate().find_map(|(index, slot)| match slot.as_ref()?.usage {
            SlotUse::Capture { id, .. } if id == capture => Some(index as u32),
            _ => None,
        })
    }

    /// Returns the captures that run.
    pub(crate) fn running_captures(&self) -> BTreeSet<CaptureId> {
        self.active()
            .filter_map(|(_, slot)| match slot.usage {
                SlotUse::Capture { id, .. } => Some(id),
                _ => None,
            })
            .collect()
    }

    /// Returns when the next capture ends.
    pub(crate) fn next_capture_end(&self) -> Option<Instant> {
        self.active()
            .filter_map(|(_, slot)| match slot.usage {
                SlotUse::Capture { ends, .. } => Some(ends),
                _ => None,
            })
            .min()
    }

    /// Returns a live slot of a rule that captures can start from.
    pub(super) fn live_rule(&mut self, rule_id: &str, now: SystemTime) -> Option<&mut Slot> {
        self.entries.iter_mut().flatten().find(|slot| {
            slot.rule.id == rule_id && slot.retired.is_none() && slot.is_live(now) && !slot.is_capture()
        })
    }

    /// Puts a capture of the rule in `base` into a free slot. Returns false if there is none.
    pub(super) fn add_capture(&mut self, base: Slot, usage: SlotUse) -> bool {
        let Some(free) = self.entries[RULE_SLOTS..].iter_mut().find(|slot| slot.is_none()) else {
            return false;
        };
        *free = Some(Slot {
            usage,
            samples: 0,
            last_sample: None,
            captures: 0,
            since_ns: boot_time_ns(),
            ..base
        });
        true
    }

    /// Ends a capture before its time. Returns true if it ran.
    pub(super) fn end_capture(&mut self, capture: CaptureId, now: SystemTime) -> bool {
        self.of_capture(capture).is_some_and(|slot| self.retire_capture(slot as usize, now))
    }

    /// Ends captures whose time is over, or whose rule has expired. Returns true if there were any.
    pub(super) fn end_due_captures(&mut self, clock: Instant, now: SystemTime) -> bool {
        let due: Vec<usize> = self
            .active()
            .filter(|(_, slot)| match slot.usage {
                SlotUse::Capture { ends, .. } => ends <= clock || slot.is_expired(now),
                _ => false,
            })
            .map(|(index, _)| index)
            .collect();
        due.iter().filter(|index| self.retire_capture(**index, now)).count() > 0
    }

    fn retire_capture(&mut self, index: usize, now: SystemTime) -> bool {
        let Some(slot) = self.entries.get_mut(index).and_then(Option::as_mut) else { return false };
        if slot.retired.is_some() {
            return false;
        }
        slot.retired = Some(Instant::now());
        let id = slot.rule.id.clone();
        let base = self.entries[..RULE_SLOTS].iter_mut().flatten().find(|slot| slot.rule.id == id);
        if let Some(base) = base {
            base.last_capture = Some(now);
        }
        true
    }

    /// Counts a sample that has these slots' bits. A sample of a capture also counts for its rule, once.
    pub(super) fn count_sample(&mut self, bits: u64, now: SystemTime) {
        let mut bases: u64 = 0;
        for index in slots(bits) {
            let Some(slot) = self.entries.get_mut(index as usize).and_then(Option::as_mut) else { continue };
            slot.count(now);
            if slot.is_capture() {
                let id = slot.rule.id.clone();
                let base = self.entries[..RULE_SLOTS].iter().position(|base| {
                    base.as_ref().is_some_and(|base| base.rule.id == id && base.retired.is_none())
                });
                bases |= base.map_or(0, |index| 1 << index);
            }
        }
        for index in slots(bases & !bits) {
            if let Some(slot) = self.entries.get_mut(index as usize).and_then(Option::as_mut) {
                slot.count(now);
            }
        }
    }

    /// Frees the slots that have been retired for longer than [`RETIREMENT`] and are not in `awaited`. Returns their bits.
    pub(super) fn free_retired(&mut self, now: Instant, awaited: u64) -> u64 {
        let mut free = 0;
        for (index, slot) in self.entries.iter_mut().enumerate() {
            let is_over = slot.as_ref().is_some_and(|slot| slot.is_retired_long(now));
            if is_over && awaited >> index & 1 == 0 {
                *slot = None;
                free |= 1 << index;
            }
        }
        free
    }
}

impl Slot {
    /// Builds the entry of a rule, which [`Slots::assign`] gives its slots.
    fn new(source: RuleSource, rule: &Rule, set: &SourceRules, applied_at: SystemTime) -> Self {
        let lifetime = rule.lifetime.unwrap_or_default();
        Self {
            source,
            revision: set.revision,
            rule: Arc::new(rule.clone()),
            compiled: Arc::new(Compiled::of(rule).with_from_exec(set.from_exec)),
            usage: SlotUse::Always,
            unsupported: None,
            expires_at: lifetime.ttl.and_then(|ttl| applied_at.checked_add(Duration::try_from(ttl).ok()?)),
            not_before: lifetime.not_before.and_then(|at| SystemTime::try_from(at).ok()),
            samples: 0,
            last_sample: None,
            captures: 0,
            last_capture: None,
            since_ns: 0,
            retired: None,
        }
    }

    /// Builds the slot that a manual capture starts from. It has no rule slot of its own.
    pub(super) fn for_manual_capture(rule: &Rule, now: SystemTime) -> Self {
        Self {
            expires_at: None,
            not_before: Some(now),
            ..Self::new(RuleSource::Local, rule, &SourceRules::default(), now)
        }
    }

    fn is_capture(&self) -> bool {
        matches!(self.usage, SlotUse::Capture { .. })
    }

    /// Nanoseconds between two ticks that the rule asks for; 0 for no ticks.
    fn period_ns(&self) -> u64 {
        match &self.usage {
            SlotUse::Watch { pre_trigger } if pre_trigger.is_zero() => 0,
            SlotUse::Watch { .. } => 1_000_000_000 / RECORDER_HZ,
            _ => compile::period_ns(&self.rule),
        }
    }

    pub(super) fn wants_off_cpu(&self) -> bool {
        !matches!(self.usage, SlotUse::Watch { .. }) && compile::off_cpu(&self.rule)
    }

    /// Returns the containers of a rule over pods; none for any other rule.
    pub(super) fn containers<'a>(&self, pods: &'a PodContainers) -> Option<&'a BTreeSet<u64>> {
        self.compiled.pods.then(|| pods.of(&self.rule.id))
    }

    fn is_retired_long(&self, now: Instant) -> bool {
        self.retired.is_some_and(|since| now.saturating_duration_since(since) > RETIREMENT)
    }

    fn count(&mut self, now: SystemTime) {
        self.samples += 1;
        self.last_sample = Some(now);
    }

    fn is_live(&self, now: SystemTime) -> bool {
        self.not_live(now).is_none()
    }

    fn is_expired(&self, now: SystemTime) -> bool {
        self.expires_at.is_some_and(|at| at <= now)
    }

    /// Returns why the rule does not work at `now`, if so.
    pub(super) fn not_live(&self, now: SystemTime) -> Option<(rule_status::State, String)> {
        if let Some(reason) = &self.unsupported {
            return Some((rule_status::State::Unsupported, reason.clone()));
        }
        if self.is_expired(now) {
            return Some((rule_status::State::Expired, "its ttl is over".into()));
        }
        if self.not_before.is_some_and(|at| at > now) {
            return Some((rule_status::State::Waiting, "its not_before is not reached".into()));
        }
        None
    }
}

impl WaitingRule {
    pub(super) fn is_of(&self, source: RuleSource) -> bool {
        self.entry.source == source
    }

    /// Returns why the rule has no slot, human-readable.
    pub(super) fn reason(&self) -> String {
        if self.granted {
            return "waits for a free slot: the slots of removed rules become free within a window".into();
        }
        let slots = if uses(&self.entry.rule).len() > 1 { "two free slots" } else { "a free slot" };
        format!(
            "waits for {slots}: this node has {RULE_SLOTS}, and rules of the same or a higher priority have them; raise its \
             priority, or remove rules"
        )
    }
}

/// Returns what a rule needs slots for.
fn uses(rule: &Rule) -> Vec<SlotUse> {
    if rule.when.is_empty() {
        return vec![SlotUse::Always];
    }
    let pre_trigger = rule
        .capture
        .as_ref()
        .and_then(|capture| Duration::try_from(capture.lead_up?).ok())
        .unwrap_or_default();
    let is_exec = |kind: &Option<condition::Kind>| matches!(kind, Some(condition::Kind::Exec(_)));
    let mut uses = Vec::new();
    if rule.when.iter().any(|condition| !is_exec(&condition.kind)) {
        uses.push(SlotUse::Watch { pre_trigger });
    }
    if rule.when.iter().any(|condition| is_exec(&condition.kind)) {
        uses.push(SlotUse::AtExec);
    }
    uses
}
