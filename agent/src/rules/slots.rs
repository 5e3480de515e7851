//! Owns the slots: which rule or capture has which bit, since when, and how many samples it got.

use std::{
    collections::{BTreeMap, BTreeSet},
    sync::Arc,
    time::{Duration, Instant, SystemTime},
};

use gannet_proto::control::{Rule, condition, rule_status};

use super::{
    CaptureId, CaptureReason, CaptureTarget, RuleSource, SourceRules,
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
pub(crate) const RULE_SLOTS: usize = 48;
/// Captures that can run at one time on this node.
pub(crate) const CAPTURE_SLOTS: usize = 12;
const _: () = assert!(RULE_SLOTS + CAPTURE_SLOTS + DENY_SLOTS == MAX_RULES);

/// Rate of the flight recorder, samples per second and CPU.
const RECORDER_HZ: u64 = 19;
/// How long the slot of a removed rule stays reserved at least. Its last samples may still be in the ring buffer, and get
/// their tag at the end of their window.
pub(super) const RETIREMENT: Duration = Duration::from_secs(12);

/// The slots of this node, [`RULE_SLOTS`] for rules and behind them [`CAPTURE_SLOTS`] for captures.
pub(crate) struct Slots {
    slots: Vec<Option<Slot>>,
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
        Self { slots: vec![None; RULE_SLOTS + CAPTURE_SLOTS], rate_divisor: 1 }
    }

    /// Returns true if the divisor differs from the former one.
    pub(super) fn set_rate_divisor(&mut self, divisor: u32) -> bool {
        let changed = self.rate_divisor != divisor;
        self.rate_divisor = divisor.max(1);
        changed
    }

    /// Returns how many rule slots a source's rules would leave to new rules: those of other sources, of retired rules, and
    /// of rules that stay, are taken.
    pub(super) fn available(&self, source: RuleSource, rules: &[Rule]) -> usize {
        let stays = |slot: &Slot| rules.iter().any(|rule| *rule == *slot.rule);
        let taken = self.slots[..RULE_SLOTS]
            .iter()
            .flatten()
            .filter(|slot| slot.source != source || slot.retired.is_some() || stays(slot))
            .count();
        RULE_SLOTS - taken
    }

    /// Returns how many new slots a rule needs: none if it has its slots already.
    pub(super) fn needed(&self, source: RuleSource, rule: &Rule) -> usize {
        if self.has(source, rule) { 0 } else { uses(rule).len() }
    }

    fn has(&self, source: RuleSource, rule: &Rule) -> bool {
        self.active().any(|(_, slot)| slot.source == source && *slot.rule == *rule && !slot.is_capture())
    }

    /// Retires the slots of the source's rules that are not in `set`. Manual captures stay.
    pub(super) fn retire_changed(&mut self, source: RuleSource, set: &SourceRules) {
        for slot in self.slots.iter_mut().flatten() {
            if slot.source != source || slot.retired.is_some() || slot.rule.id == super::MANUAL_RULE_ID {
                continue;
            }
            if set.rules.iter().any(|rule| *rule == *slot.rule) {
                slot.revision = set.revision;
            } else {
                slot.retired = Some(Instant::now());
            }
        }
    }

    /// Assigns slots to a rule, unless it has them already.
    pub(super) fn add(&mut self, source: RuleSource, rule: &Rule, set: &SourceRules, applied_at: SystemTime) {
        if self.has(source, rule) {
            return;
        }
        let lifetime = rule.lifetime.unwrap_or_default();
        let first = Slot {
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
            since_ns: boot_time_ns(),
            retired: None,
        };
        for usage in uses(rule) {
            let Some(free) = self.slots[..RULE_SLOTS].iter_mut().find(|slot| slot.is_none()) else { return };
            *free = Some(Slot { usage, ..first.clone() });
        }
    }

    /// Marks a rule as impossible on this node, or as possible again.
    pub(super) fn set_unsupported(&mut self, source: RuleSource, rule: &Rule, reason: Option<&str>) {
        for slot in self.slots.iter_mut().flatten() {
            if slot.source == source && slot.retired.is_none() && *slot.rule == *rule {
                slot.unsupported = reason.map(str::to_owned);
            }
        }
    }

    /// Checks for all slots again whether their rules are possible on this node.
    pub(super) fn update_unsupported(&mut self, check: impl Fn(&Rule) -> Option<String>) {
        for slot in self.slots.iter_mut().flatten() {
            slot.unsupported = check(&slot.rule);
        }
    }

    /// Returns the slots of rules and captures that are not retired.
    pub(super) fn active(&self) -> impl Iterator<Item = (usize, &Slot)> {
        self.slots
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
        self.slots.get(slot as usize)?.as_ref()
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

    /// Returns the rules over pods, each once.
    pub(crate) fn pod_queries(&self) -> Vec<PodQuery> {
        let mut queries: Vec<PodQuery> = Vec::new();
        for (_, slot) in self.active().filter(|(_, slot)| slot.compiled.pods) {
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
            .flat_map(|(_, slot)| [slot.not_before, slot.expires_at])
            .flatten()
            .filter(|at| *at > now)
            .min()
    }

    /// Returns the slot of a capture, also while it is retired.
    pub(crate) fn of_capture(&self, capture: CaptureId) -> Option<u32> {
        self.slots.iter().enumerate().find_map(|(index, slot)| match slot.as_ref()?.usage {
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
        self.slots.iter_mut().flatten().find(|slot| {
            slot.rule.id == rule_id && slot.retired.is_none() && slot.is_live(now) && !slot.is_capture()
        })
    }

    /// Puts a capture of the rule in `base` into a free slot. Returns false if there is none.
    pub(super) fn add_capture(&mut self, base: Slot, usage: SlotUse) -> bool {
        let Some(free) = self.slots[RULE_SLOTS..].iter_mut().find(|slot| slot.is_none()) else {
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
        let Some(slot) = self.slots.get_mut(index).and_then(Option::as_mut) else { return false };
        if slot.retired.is_some() {
            return false;
        }
        slot.retired = Some(Instant::now());
        let id = slot.rule.id.clone();
        let base = self.slots[..RULE_SLOTS].iter_mut().flatten().find(|slot| slot.rule.id == id);
        if let Some(base) = base {
            base.last_capture = Some(now);
        }
        true
    }

    /// Counts a sample that has these slots' bits. A sample of a capture also counts for its rule, once.
    pub(super) fn count_sample(&mut self, bits: u64, now: SystemTime) {
        let mut bases: u64 = 0;
        for index in slots(bits) {
            let Some(slot) = self.slots.get_mut(index as usize).and_then(Option::as_mut) else { continue };
            slot.count(now);
            if slot.is_capture() {
                let id = slot.rule.id.clone();
                let base = self.slots[..RULE_SLOTS].iter().position(|base| {
                    base.as_ref().is_some_and(|base| base.rule.id == id && base.retired.is_none())
                });
                bases |= base.map_or(0, |index| 1 << index);
            }
        }
        for index in slots(bases & !bits) {
            if let Some(slot) = self.slots.get_mut(index as usize).and_then(Option::as_mut) {
                slot.count(now);
            }
        }
    }

    /// Frees the slots that have been retired for longer than [`RETIREMENT`] and are not in `awaited`. Returns their bits.
    pub(super) fn free_retired(&mut self, now: Instant, awaited: u64) -> u64 {
        let mut free = 0;
        for (index, slot) in self.slots.iter_mut().enumerate() {
            let retired = slot.as_ref().and_then(|slot| slot.retired);
            let is_over = retired.is_some_and(|since| now.saturating_duration_since(since) > RETIREMENT);
            if is_over && awaited >> index & 1 == 0 {
                *slot = None;
                free |= 1 << index;
            }
        }
        free
    }
}

impl Slot {
    /// Builds the slot that a manual capture starts from. It has no rule slot of its own.
    pub(super) fn for_manual_capture(rule: Rule, now: SystemTime) -> Self {
        Self {
            source: RuleSource::Local,
            revision: 0,
            compiled: Arc::new(Compiled::of(&rule)),
            rule: Arc::new(rule),
            usage: SlotUse::Always,
            unsupported: None,
            expires_at: None,
            not_before: Some(now),
            samples: 0,
            last_sample: None,
            captures: 0,
            last_capture: None,
            since_ns: 0,
            retired: None,
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
