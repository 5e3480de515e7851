//! The live rule set: which rules are in force on this node, and what they mean for each process.
//!
//! Rules come from two sources, the node's own files and the collector; each source is replaced as a whole. A set is
//! checked against the node's caps first, then compiled into the form that the kernel side decides by; what the kernel
//! side cannot see (paths, users, control groups) is decided here, process by process, with the same patterns.

mod compile;
pub mod files;

use std::{
    collections::{BTreeMap, BTreeSet},
    time::{Duration, SystemTime},
};

use gannet_proto::{
    control::{Capture, Match, Rule, RuleError, RuleStatus, capture, rule_status},
    labels::Labels,
    rules as model,
};

use crate::{
    kernel::{KernelRules, MAX_RULES, Want},
    process::Process,
    profile::RuleTag,
};

/// Where a rule came from.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Source {
    /// A file of the node, or the command line.
    Local,
    /// The collector.
    Remote,
}

/// One whole set of rules.
#[derive(Clone, Debug, Default)]
pub struct Set {
    /// As the collector numbers them; 0 for the node's own.
    pub revision: u64,
    /// When it came into force first, by the node's clock: lifetimes count from then.
    pub applied_at: Option<SystemTime>,
    /// The rules.
    pub rules: Vec<Rule>,
}

/// The rules in force.
pub struct RuleBook {
    caps: model::Caps,
    sets: BTreeMap<Source, Set>,
    slots: Vec<Option<Slot>>,
}

/// A rule in its place. It keeps the place, and its counts, as long as it does not change.
#[derive(Clone, Debug)]
struct Slot {
    source: Source,
    revision: u64,
    rule: Rule,
    compiled: compile::Compiled,
    expires_at: Option<SystemTime>,
    not_before: Option<SystemTime>,
    samples: u64,
    last_sample: Option<SystemTime>,
    /// No longer in a set; its place is kept until the samples that still name it are through.
    retired: Option<u32>,
}

/// Windows that must pass before the place of a rule that is gone is given to another.
const RETIRED_WINDOWS: u32 = 2;

impl RuleBook {
    /// No rules yet.
    pub fn new(caps: model::Caps) -> Self {
        Self { caps, sets: BTreeMap::new(), slots: vec![None; MAX_RULES] }
    }

    /// Checks a set against the format, the node's caps, and the rules of the other source. Empty: it can be applied.
    pub fn check(&self, source: Source, rules: &[Rule]) -> Vec<RuleError> {
        let mut errors = model::validate(rules, &self.caps);
        let others: BTreeSet<&str> = self
            .sets
            .iter()
            .filter(|(other, _)| **other != source)
            .flat_map(|(_, set)| &set.rules)
            .map(|rule| rule.id.as_str())
            .collect();
        for rule in rules.iter().filter(|rule| others.contains(rule.id.as_str())) {
            let whose = match source {
                Source::Local => "the collector's rules hold",
                Source::Remote => "the node's own rule files hold",
            };
            errors.push(error(
                rule,
                "id",
                &format!("{whose} a rule of this name already; give it another name"),
            ));
        }
        let places =
            self.slots.iter().flatten().filter(|slot| slot.source != source || slot.retired.is_some());
        let kept = rules.iter().filter(|rule| self.place_of(source, rule).is_some()).count();
        let free = MAX_RULES - places.count().min(MAX_RULES);
        if rules.len() > free + kept {
            errors.push(RuleError {
                rule_id: String::new(),
                field: "rules".into(),
                reason: format!(
                    "{} rules are more than the {free} places that are free; those of removed rules are free after two windows",
                    rules.len()
                ),
            });
        }
        errors
    }

    /// Puts a set in the place of the source's former one. It must have been checked. Gives what cannot work on this
    /// node, by rule.
    pub fn replace(&mut self, source: Source, set: Set, now: SystemTime) -> Vec<RuleError> {
        let kept: BTreeMap<usize, &Rule> =
            set.rules.iter().filter_map(|rule| Some((self.place_of(source, rule)?, rule))).collect();
        for (place, slot) in self.slots.iter_mut().enumerate() {
            if let Some(slot) = slot
                && slot.source == source
                && slot.retired.is_none()
            {
                if kept.contains_key(&place) {
                    slot.revision = set.revision;
                } else {
                    slot.retired = Some(0);
                }
            }
        }
        let applied_at = set.applied_at.unwrap_or(now);
        for rule in &set.rules {
            if self.place_of(source, rule).is_some() {
                continue;
            }
            let Some(free) = self.slots.iter_mut().find(|slot| slot.is_none()) else { break };
            let lifetime = rule.lifetime.unwrap_or_default();
            *free = Some(Slot {
                source,
                revision: set.revision,
                compiled: compile::Compiled::of(rule),
                expires_at: lifetime
                    .ttl
                    .and_then(|ttl| applied_at.checked_add(Duration::try_from(ttl).ok()?)),
                not_before: lifetime.not_before.and_then(|at| SystemTime::try_from(at).ok()),
                rule: rule.clone(),
                samples: 0,
                last_sample: None,
                retired: None,
            });
        }
        self.sets.insert(source, Set { applied_at: Some(applied_at), ..set });
        self.active_slots()
            .filter_map(|(_, slot)| {
                Some(error(&slot.rule, slot.compiled.unsupported?.0, slot.compiled.unsupported?.1))
            })
            .collect()
    }

    /// The set of a source.
    pub fn set(&self, source: Source) -> Option<&Set> {
        self.sets.get(&source)
    }

    /// What the kernel side shall decide by, now.
    pub fn kernel_rules(&self, now: SystemTime) -> KernelRules {
        let live: Vec<(usize, &Slot)> = self.active_slots().filter(|(_, slot)| slot.is_live(now)).collect();
        compile::kernel_rules(live.into_iter().map(|(place, slot)| (place, &slot.rule, &slot.compiled)))
    }

    /// What the rules that the kernel side cannot decide ask for of a process, and whether that shall hold over `execve`
    /// and for its children.
    pub fn decide(&self, process: &Process, now: SystemTime) -> (Want, bool) {
        let mut want = Want::default();
        let mut sticky = true;
        for (place, slot) in self.active_slots().filter(|(_, slot)| slot.is_live(now)) {
            let compiled = &slot.compiled;
            if compiled.in_kernel() || !compiled.matches(process) {
                continue;
            }
            compile::add(&mut want, Want { rules: 1 << place, period_ns: compiled.period_ns });
            sticky &= compiled.by_pid_only;
        }
        (want, sticky && want.rules != 0)
    }

    /// The next moment at which a rule comes into force or expires.
    pub fn next_change(&self, now: SystemTime) -> Option<SystemTime> {
        self.active_slots()
            .flat_map(|(_, slot)| [slot.not_before, slot.expires_at])
            .flatten()
            .filter(|at| *at > now)
            .min()
    }

    /// Counts samples of the rules of `bits`.
    pub fn count(&mut self, bits: u64, now: SystemTime) {
        for (place, slot) in self.slots.iter_mut().enumerate() {
            if bits >> place & 1 == 1
                && let Some(slot) = slot
            {
                slot.samples += 1;
                slot.last_sample = Some(now);
            }
        }
    }

    /// What profiles say of the rule in a place.
    pub fn tag(&self, place: u32) -> Option<RuleTag> {
        let slot = self.slots.get(place as usize)?.as_ref()?;
        Some(RuleTag {
            id: slot.rule.id.clone(),
            revision: slot.revision,
            reason: "always".into(),
            labels: slot
                .rule
                .labels
                .iter()
                .map(|(name, value)| (name.clone(), value.clone()))
                .collect::<Labels>(),
        })
    }

    /// The name of the rule in a place.
    pub fn name(&self, place: u32) -> Option<&str> {
        Some(self.slots.get(place as usize)?.as_ref()?.rule.id.as_str())
    }

    /// A window is over: places of rules that are gone become free.
    pub fn next_window(&mut self) {
        for slot in &mut self.slots {
            if let Some(Slot { retired: Some(windows), .. }) = slot {
                *windows += 1;
                if *windows > RETIRED_WINDOWS {
                    *slot = None;
                }
            }
        }
    }

    /// The state of each rule; `armed` counts the processes of a place.
    pub fn statuses(&self, now: SystemTime, armed: impl Fn(u32) -> u64) -> Vec<RuleStatus> {
        let mut statuses: Vec<RuleStatus> = self
            .active_slots()
            .map(|(place, slot)| {
                let (state, reason) = slot.state(now);
                RuleStatus {
                    rule_id: slot.rule.id.clone(),
                    state: state.into(),
                    reason,
                    processes: armed(place as u32),
                    samples: slot.samples,
                    last_sample: slot.last_sample.map(Into::into),
                    expires_at: slot.expires_at.map(Into::into),
                }
            })
            .collect();
        statuses.sort_by(|a, b| a.rule_id.cmp(&b.rule_id));
        statuses
    }

    fn active_slots(&self) -> impl Iterator<Item = (usize, &Slot)> {
        self.slots
            .iter()
            .enumerate()
            .filter_map(|(place, slot)| Some((place, slot.as_ref()?)))
            .filter(|(_, slot)| slot.retired.is_none())
    }

    fn place_of(&self, source: Source, rule: &Rule) -> Option<usize> {
        self.active_slots()
            .find(|(_, slot)| slot.source == source && slot.rule == *rule)
            .map(|(place, _)| place)
    }
}

impl Slot {
    fn is_live(&self, now: SystemTime) -> bool {
        matches!(self.state(now).0, rule_status::State::Capturing)
    }

    fn state(&self, now: SystemTime) -> (rule_status::State, String) {
        if let Some((_, reason)) = self.compiled.unsupported {
            return (rule_status::State::Unsupported, reason.to_owned());
        }
        if self.expires_at.is_some_and(|at| at <= now) {
            return (rule_status::State::Expired, "its ttl is over".into());
        }
        if self.not_before.is_some_and(|at| at > now) {
            return (rule_status::State::Waiting, "its not_before is not reached".into());
        }
        (rule_status::State::Capturing, String::new())
    }
}

fn error(rule: &Rule, field: &str, reason: &str) -> RuleError {
    RuleError { rule_id: rule.id.clone(), field: field.to_owned(), reason: reason.to_owned() }
}

/// A rule for the command line's own use: match these, at this rate.
pub fn ad_hoc(id: &str, matches: Match, hz: u32, kinds: &[capture::Kind]) -> Rule {
    Rule {
        id: id.to_owned(),
        r#match: Some(matches),
        capture: Some(Capture {
            hz,
            kind: kinds.iter().map(|kind| (*kind).into()).collect(),
            ..Capture::default()
        }),
        ..Rule::default()
    }
}
