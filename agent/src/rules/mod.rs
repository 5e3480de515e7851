//! The live rule set: which rules are in force on this node, and what they mean for each process.
//!
//! Rules come from two sources, the node's own files and the collector; each source is replaced as a whole. A set is
//! checked against the node's caps first, then given places (slots: one bit each in every sample) and compiled into the
//! form that the kernel side decides by. A rule without conditions has one place and samples all the time. A rule with
//! conditions has a place by which its processes are known, and sampled for the flight recorder if it wants a lead-up;
//! each of its captures has a place of its own, so that its samples are told apart, with what started it.

mod compile;
pub mod containers;
pub mod files;
mod watch_files;

use std::{
    collections::{BTreeMap, BTreeSet},
    sync::Arc,
    time::{Duration, Instant, SystemTime},
};

use gannet_proto::{
    control::{Capture, Match, Rule, RuleError, RuleStatus, capture, condition, rule_status},
    labels::Labels,
    rules as model,
};

use self::{
    compile::{Asked, Compiled, DENY_SLOTS},
    containers::PodRule,
};
pub use self::{
    compile::{Deny, Traits},
    watch_files::Notify,
};
use crate::{
    kernel::{KernelRules, MAX_RULES, Want},
    process::Process,
    profile::RuleTag,
};

/// Places for rules; one with an exec condition and others takes two.
pub const RULE_SLOTS: usize = 48;
/// Captures that can run at one time on this node.
pub const CAPTURE_SLOTS: usize = 12;
const _: () = assert!(RULE_SLOTS + CAPTURE_SLOTS + DENY_SLOTS == MAX_RULES);

/// How long a capture is if the rule does not say.
pub const DEFAULT_DURATION: Duration = Duration::from_secs(30);
/// Rest of a target after a capture if the rule does not say.
pub const DEFAULT_COOLDOWN: Duration = Duration::from_secs(120);
/// Rate of the flight recorder, samples a second and CPU.
pub const RECORDER_HZ: u64 = 19;
/// What captures that people started by hand are filed under.
pub const MANUAL: &str = "manual";

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
    /// A rule that names processes by their numbers alone holds from their next `execve` on, and not for what runs in them
    /// before it.
    pub from_exec: bool,
}

/// Names a rule on this node: no two sources hold rules of one name.
pub type RuleId = String;

/// Names a capture on this node, until the agent ends.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct CaptureId(u64);

impl CaptureId {
    /// As profiles carry it.
    pub fn number(self) -> u64 {
        self.0
    }
}

/// Why a capture runs.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct Reason {
    /// The condition: `pressure`, `schedule`, `manual`.
    pub kind: &'static str,
    /// What was seen: `cpu some 31.2 ms/s at 12:03:07Z`.
    pub evidence: String,
}

/// Whom a capture is for, of those that its rule matches.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Target {
    /// All.
    Everybody,
    /// Those in these control groups, and in what lies within, by id.
    Containers(BTreeSet<u64>),
}

/// Why a capture does not start.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum CaptureError {
    /// All places are taken.
    #[error("{CAPTURE_SLOTS} captures run on this node, which is the cap; wait until one has ended")]
    Full,
    /// The rule is not in force.
    #[error("no rule `{0}` is in force")]
    NoRule(RuleId),
    /// What was asked for by hand is wrong.
    #[error("{}", .0.iter().map(|error| format!("{}: {}", error.field, error.reason)).collect::<Vec<_>>().join("; "))]
    Wrong(Vec<RuleError>),
    /// The governor keeps the agent within its budgets.
    #[error("captures are refused: {0}")]
    Governed(String),
    /// The kernel did not take it.
    #[error("the kernel did not take the capture: {0}")]
    Kernel(String),
}

/// What this node can watch; asked by rule and condition.
pub trait Abilities {
    /// Why this condition cannot be watched here, if it cannot.
    fn missing(&self, kind: &condition::Kind) -> Option<String>;
}

/// A node that can watch everything.
#[derive(Clone, Copy, Debug)]
pub struct AllAbilities;

impl Abilities for AllAbilities {
    fn missing(&self, _: &condition::Kind) -> Option<String> {
        None
    }
}

/// The rules in force.
pub struct RuleBook {
    caps: model::Caps,
    deny: Deny,
    abilities: Box<dyn Abilities + Send>,
    sets: BTreeMap<Source, Set>,
    slots: Vec<Option<Slot>>,
    /// Containers of the rules that ask for pods; none: nobody on this node knows pods.
    pods: Option<BTreeMap<RuleId, BTreeSet<u64>>>,
    /// Periods are so many times longer than asked for: the governor's doing.
    rate_divisor: u32,
    captures: u64,
    /// What cannot be watched at the moment, by rule.
    faults: BTreeMap<RuleId, String>,
    /// What the governor has lowered, in words.
    governed: Option<String>,
}

/// A place. A rule keeps its own, and its counts, as long as it does not change.
#[derive(Clone, Debug)]
struct Slot {
    source: Source,
    revision: u64,
    rule: Arc<Rule>,
    compiled: Arc<Compiled>,
    usage: Usage,
    /// The field that cannot work here, and why.
    unsupported: Option<(&'static str, String)>,
    expires_at: Option<SystemTime>,
    not_before: Option<SystemTime>,
    samples: u64,
    last_sample: Option<SystemTime>,
    /// Of a rule with conditions: captures started, and the last one's end.
    captures: u64,
    last_capture: Option<SystemTime>,
    /// When it got its place, by the boot clock: what began before is not for it.
    since_ns: u64,
    /// No longer in a set, or over; the place is kept until the samples that still name it are through.
    retired: Option<Instant>,
}

#[derive(Clone, Debug)]
enum Usage {
    /// Samples all the time.
    Always,
    /// Knows the processes of a rule with conditions; samples them for the flight recorder if there is a lead-up.
    Watch { lead_up: Duration },
    /// Samples who matches at exec. The agent ends it, process by process.
    AtExec,
    /// One capture.
    Capture { id: CaptureId, target: Target, reason: Reason, ends: Instant },
}

/// How long the place of a rule that is gone is not given to another at least: its last samples may still be in the ring,
/// and are named at the end of their window.
const RETIREMENT: Duration = Duration::from_secs(12);

/// A rule with conditions, for whoever watches them.
#[derive(Clone, Debug, PartialEq)]
pub struct Watched {
    /// The rule.
    pub rule: Arc<Rule>,
    /// The places that know its processes.
    pub slots: u64,
    /// The place of its exec condition.
    pub at_exec: Option<u32>,
}

impl RuleBook {
    /// No rules yet.
    pub fn new(caps: model::Caps) -> Self {
        Self {
            caps,
            deny: Deny::default(),
            abilities: Box::new(AllAbilities),
            sets: BTreeMap::new(),
            slots: vec![None; RULE_SLOTS + CAPTURE_SLOTS],
            pods: None,
            rate_divisor: 1,
            captures: 0,
            faults: BTreeMap::new(),
            governed: None,
        }
    }

    /// What cannot be watched at the moment, by rule: shown with the rule's state.
    pub fn set_faults(&mut self, faults: BTreeMap<RuleId, String>) {
        self.faults = faults;
    }

    /// The shortest period that rules of these places ask for; 0 for none.
    pub fn period_of(&self, places: u64) -> u64 {
        self.active_slots()
            .filter(|(place, _)| places >> place & 1 == 1)
            .map(|(_, slot)| slot.rates().0 * u64::from(self.rate_divisor))
            .filter(|period| *period > 0)
            .min()
            .unwrap_or(0)
    }

    /// Whether a rule names containers by what is known of their pods.
    pub fn asks_for_pods(&self, rule_id: &str) -> bool {
        self.active_slots().any(|(_, slot)| slot.rule.id == rule_id && slot.compiled.pods)
    }

    /// What is never sampled here.
    pub fn set_deny(&mut self, deny: Deny) {
        self.deny = deny;
    }

    /// What can be watched here.
    pub fn set_abilities(&mut self, abilities: impl Abilities + Send + 'static) {
        self.abilities = Box::new(abilities);
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
        for rule in rules.iter().filter(|rule| rule.id == MANUAL) {
            errors.push(error(
                rule,
                "id",
                "captures that are started by hand have this name; give it another name",
            ));
        }
        let kept = |slot: &Slot| {
            slot.source == source && slot.retired.is_none() && rules.iter().any(|rule| *rule == *slot.rule)
        };
        let taken = self.slots[..RULE_SLOTS]
            .iter()
            .flatten()
            .filter(|slot| slot.source != source || slot.retired.is_some() || kept(slot))
            .count();
        let new: usize = rules
            .iter()
            .filter(|rule| self.places_of(source, rule).next().is_none())
            .map(|rule| usages(rule).len())
            .sum();
        if taken + new > RULE_SLOTS {
            errors.push(RuleError {
                rule_id: String::new(),
                field: "rules".into(),
                reason: format!(
                    "they need {new} places more, and of {RULE_SLOTS} only {} are free; a rule with exec and other \
                     conditions takes two; places of removed rules are free with the window after {} s",
                    RULE_SLOTS - taken.min(RULE_SLOTS),
                    RETIREMENT.as_secs()
                ),
            });
        }
        errors
    }

    /// Puts a set in the place of the source's former one. It must have been checked. Gives what cannot work on this
    /// node, by rule.
    pub fn replace(&mut self, source: Source, set: Set, now: SystemTime) -> Vec<RuleError> {
        for slot in self.slots.iter_mut().flatten() {
            if slot.source != source || slot.retired.is_some() || slot.rule.id == MANUAL {
                continue;
            }
            if set.rules.iter().any(|rule| *rule == *slot.rule) {
                slot.revision = set.revision;
            } else {
                slot.retired = Some(Instant::now());
            }
        }
        let applied_at = set.applied_at.unwrap_or(now);
        for rule in &set.rules {
            if self.places_of(source, rule).next().is_some() {
                continue;
            }
            let lifetime = rule.lifetime.unwrap_or_default();
            let compiled = Arc::new(Compiled::of(rule).holding(set.from_exec));
            let shared = Arc::new(rule.clone());
            for usage in usages(rule) {
                let Some(free) = self.slots[..RULE_SLOTS].iter_mut().find(|slot| slot.is_none()) else {
                    break;
                };
                *free = Some(Slot {
                    source,
                    revision: set.revision,
                    rule: Arc::clone(&shared),
                    compiled: Arc::clone(&compiled),
                    usage,
                    unsupported: None,
                    expires_at: lifetime
                        .ttl
                        .and_then(|ttl| applied_at.checked_add(Duration::try_from(ttl).ok()?)),
                    not_before: lifetime.not_before.and_then(|at| SystemTime::try_from(at).ok()),
                    samples: 0,
                    last_sample: None,
                    captures: 0,
                    last_capture: None,
                    since_ns: boot_clock_ns(),
                    retired: None,
                });
            }
        }
        let mut partial = Vec::new();
        for rule in &set.rules {
            let (faults, whole) = self.unsupported(rule);
            for slot in self.slots.iter_mut().flatten() {
                if slot.source == source && slot.retired.is_none() && *slot.rule == *rule {
                    slot.unsupported.clone_from(&whole);
                }
            }
            partial.extend(faults);
        }
        self.sets.insert(source, Set { applied_at: Some(applied_at), ..set });
        partial
    }

    /// What of a rule cannot work here; and why, if nothing of it can.
    fn unsupported(&self, rule: &Rule) -> (Vec<RuleError>, Option<(&'static str, String)>) {
        if Compiled::of(rule).pods && self.pods.is_none() {
            let reason = "this node has no pod metadata, so the rule matches nothing here";
            let field = pod_field(rule);
            return (vec![error(rule, field, reason)], Some((field, reason.to_owned())));
        }
        let mut faults = Vec::new();
        for (number, condition) in rule.when.iter().enumerate() {
            let Some(kind) = &condition.kind else { continue };
            if let Some(reason) = self.abilities.missing(kind) {
                faults.push(error(rule, &format!("when[{number}].{}", kind_name(kind)), &reason));
            }
        }
        let none_works = !faults.is_empty() && faults.len() == rule.when.len();
        let whole = none_works.then(|| ("when", faults[0].reason.clone()));
        (faults, whole)
    }

    /// The set of a source.
    pub fn set(&self, source: Source) -> Option<&Set> {
        self.sets.get(&source)
    }

    /// Somebody knows pods: rules over them work from now on, with the containers that are given.
    pub fn know_pods(&mut self) {
        if self.pods.is_none() {
            self.pods = Some(BTreeMap::new());
            let rules: BTreeSet<usize> = (0..self.slots.len()).collect();
            for place in rules {
                let Some(slot) = self.slots[place].clone() else { continue };
                let (_, whole) = self.unsupported(&slot.rule);
                if let Some(slot) = &mut self.slots[place] {
                    slot.unsupported = whole;
                }
            }
        }
    }

    /// The rules over pods that are in force.
    pub fn pod_rules(&self) -> Vec<PodRule> {
        let mut rules: Vec<PodRule> = Vec::new();
        for (_, slot) in self.active_slots().filter(|(_, slot)| slot.compiled.pods) {
            if rules.iter().all(|known| known.rule_id != slot.rule.id) {
                rules.push(PodRule {
                    rule_id: slot.rule.id.clone(),
                    matches: slot.rule.r#match.clone().unwrap_or_default(),
                });
            }
        }
        rules
    }

    /// The containers that a rule over pods names are now these. True: something changes.
    pub fn select_containers(&mut self, rule_id: &str, containers: BTreeSet<u64>) -> bool {
        let pods = self.pods.get_or_insert_default();
        if pods.get(rule_id) == Some(&containers) {
            return false;
        }
        pods.insert(rule_id.to_owned(), containers);
        true
    }

    /// The containers that must not be profiled are now these. True: something changes.
    pub fn deny_containers(&mut self, containers: BTreeSet<u64>) -> bool {
        let changed = self.deny.containers != containers;
        self.deny.containers = containers;
        changed
    }

    /// Periods are to be so many times longer than asked for. True: something changes.
    pub fn set_rate_divisor(&mut self, divisor: u32) -> bool {
        let changed = self.rate_divisor != divisor;
        self.rate_divisor = divisor.max(1);
        changed
    }

    /// What the kernel side shall decide by, now.
    pub fn kernel_rules(&self, now: SystemTime) -> KernelRules {
        let asked = self.active_slots().filter(|(_, slot)| slot.is_live(now)).map(|(place, slot)| {
            let capture = slot.rule.capture.clone().unwrap_or_default();
            let (period_ns, off_cpu) = slot.rates();
            let target = match &slot.usage {
                Usage::Capture { target: Target::Containers(ids), .. } => Some(ids),
                _ => None,
            };
            Asked {
                slot: place,
                compiled: &slot.compiled,
                period_ns: period_ns * u64::from(self.rate_divisor),
                off_cpu,
                user_stacks: capture.user_stacks.unwrap_or(true),
                kernel_stacks: capture.kernel_stacks.unwrap_or(true),
                at_exec: matches!(slot.usage, Usage::AtExec),
                containers: target.or_else(|| self.containers_of(slot)),
                everybody: matches!(slot.usage, Usage::Always | Usage::Capture { .. }),
            }
        });
        compile::kernel_rules(asked, &self.deny)
    }

    /// The containers that a rule over pods is for; none for any other rule.
    fn containers_of(&self, slot: &Slot) -> Option<&BTreeSet<u64>> {
        static NONE: BTreeSet<u64> = BTreeSet::new();
        let known = || self.pods.as_ref().and_then(|pods| pods.get(&slot.rule.id)).unwrap_or(&NONE);
        slot.compiled.pods.then(known)
    }

    /// What the rules that the kernel side cannot decide ask for of a process. `candidates` are those of which all else
    /// holds.
    pub fn decide(&self, process: &Process, candidates: u64, now: SystemTime) -> Want {
        let mut want = Want::default();
        for (place, slot) in self.active_slots().filter(|(_, slot)| slot.is_live(now)) {
            if candidates >> place & 1 == 0 || !slot.compiled.matches(&traits(process)) {
                continue;
            }
            let (period_ns, _) = slot.rates();
            compile::add(
                &mut want,
                Want { rules: 1 << place, period_ns: period_ns * u64::from(self.rate_divisor) },
            );
        }
        want
    }

    /// For each rule in force why it does, or does not, want this process: in words.
    pub fn explain(
        &self,
        process: &Traits<'_>,
        container: Option<u64>,
        now: SystemTime,
    ) -> Vec<(RuleId, String)> {
        let mut lines: Vec<(RuleId, String)> = Vec::new();
        for (_, slot) in self.active_slots() {
            if lines.iter().any(|(id, _)| *id == slot.rule.id) {
                continue;
            }
            let (state, reason) = self.state(slot, now);
            let in_container =
                self.containers_of(slot).is_none_or(|ids| container.is_some_and(|id| ids.contains(&id)));
            let why = if let Some(mismatch) = slot.compiled.mismatch(process) {
                format!("does not match: {mismatch}")
            } else if !in_container {
                "does not match: it is in none of the containers that the rule names".into()
            } else if state == rule_status::State::Capturing {
                "matches, and samples it".into()
            } else {
                format!("matches, but samples nothing now: {reason}")
            };
            lines.push((slot.rule.id.clone(), why));
        }
        lines
    }

    /// The rules with conditions that are live.
    pub fn watched(&self, now: SystemTime) -> Vec<Watched> {
        let mut watched: BTreeMap<&str, Watched> = BTreeMap::new();
        for (place, slot) in self.active_slots().filter(|(_, slot)| slot.is_live(now)) {
            let at_exec = match slot.usage {
                Usage::Watch { .. } => None,
                Usage::AtExec => Some(place as u32),
                Usage::Always | Usage::Capture { .. } => continue,
            };
            let entry = watched.entry(&slot.rule.id).or_insert_with(|| Watched {
                rule: Arc::clone(&slot.rule),
                slots: 0,
                at_exec: None,
            });
            entry.slots |= 1 << place;
            entry.at_exec = entry.at_exec.or(at_exec);
        }
        watched.into_values().collect()
    }

    /// The places whose samples are for the flight recorder, and the longest lead-up of them.
    pub fn recorded(&self) -> (u64, Duration) {
        self.active_slots().fold((0, Duration::ZERO), |(bits, longest), (place, slot)| match slot.usage {
            Usage::Watch { lead_up } if !lead_up.is_zero() => (bits | 1 << place, longest.max(lead_up)),
            _ => (bits, longest),
        })
    }

    /// How much lead-up a rule wants, and the place whose samples it is made of.
    pub fn lead_up(&self, rule_id: &str) -> Option<(u32, Duration)> {
        self.active_slots().find_map(|(place, slot)| match slot.usage {
            Usage::Watch { lead_up } if slot.rule.id == rule_id && !lead_up.is_zero() => {
                Some((place as u32, lead_up))
            }
            _ => None,
        })
    }

    /// The place of a capture.
    pub fn capture_slot(&self, capture: CaptureId) -> Option<u32> {
        self.slots.iter().enumerate().find_map(|(place, slot)| match slot.as_ref()?.usage {
            Usage::Capture { id, .. } if id == capture => Some(place as u32),
            _ => None,
        })
    }

    /// Gives a capture of a rule its place.
    pub fn start_capture(
        &mut self,
        rule_id: &str,
        target: Target,
        reason: Reason,
        ends: Instant,
        now: SystemTime,
    ) -> Result<CaptureId, CaptureError> {
        let base = self
            .slots
            .iter()
            .position(|slot| {
                slot.as_ref().is_some_and(|slot| {
                    slot.rule.id == rule_id
                        && slot.retired.is_none()
                        && slot.is_live(now)
                        && !matches!(slot.usage, Usage::Capture { .. })
                })
            })
            .ok_or_else(|| CaptureError::NoRule(rule_id.to_owned()))?;
        let slot = self.slots[base].clone().ok_or(CaptureError::Full)?;
        let id = self.enter_capture(slot, target, reason, ends)?;
        if let Some(base) = &mut self.slots[base] {
            base.captures += 1;
        }
        Ok(id)
    }

    /// Gives a capture that somebody asked for by hand its place. The node's caps hold for it too.
    pub fn start_manual(
        &mut self,
        matches: Match,
        capture: Capture,
        reason: Reason,
        ends: Instant,
        now: SystemTime,
    ) -> Result<CaptureId, CaptureError> {
        let rule = Rule {
            id: MANUAL.into(),
            r#match: Some(matches),
            capture: Some(Capture { duration: None, ..capture.clone() }),
            ..Rule::default()
        };
        // As a rule with a condition, so that a duration is in order, and no ttl is asked for.
        let shown = Rule {
            capture: Some(capture),
            when: vec![gannet_proto::control::Condition {
                kind: Some(condition::Kind::Exec(condition::Exec {})),
            }],
            ..rule.clone()
        };
        let errors = model::validate(&[shown], &model::Caps { ttl_above_hz: u32::MAX, ..self.caps.clone() });
        if !errors.is_empty() {
            return Err(CaptureError::Wrong(errors));
        }
        let (faults, whole) = self.unsupported(&rule);
        if whole.is_some() {
            return Err(CaptureError::Wrong(faults));
        }
        let slot = Slot {
            source: Source::Local,
            revision: 0,
            compiled: Arc::new(Compiled::of(&rule)),
            rule: Arc::new(rule),
            usage: Usage::Always,
            unsupported: None,
            expires_at: None,
            not_before: Some(now),
            samples: 0,
            last_sample: None,
            captures: 0,
            last_capture: None,
            since_ns: 0,
            retired: None,
        };
        self.enter_capture(slot, Target::Everybody, reason, ends)
    }

    fn enter_capture(
        &mut self,
        base: Slot,
        target: Target,
        reason: Reason,
        ends: Instant,
    ) -> Result<CaptureId, CaptureError> {
        let free =
            self.slots[RULE_SLOTS..].iter_mut().find(|slot| slot.is_none()).ok_or(CaptureError::Full)?;
        self.captures += 1;
        let id = CaptureId(self.captures);
        *free = Some(Slot {
            usage: Usage::Capture { id, target, reason, ends },
            samples: 0,
            last_sample: None,
            captures: 0,
            since_ns: boot_clock_ns(),
            ..base
        });
        Ok(id)
    }

    /// Ends a capture before its time. True: it ran.
    pub fn end_capture(&mut self, capture: CaptureId, now: SystemTime) -> bool {
        let Some(place) = self.capture_slot(capture) else { return false };
        self.retire_capture(place as usize, now)
    }

    /// Ends the captures whose time is over. True: some were.
    pub fn end_due(&mut self, clock: Instant, now: SystemTime) -> bool {
        let due: Vec<usize> = self
            .active_slots()
            .filter(|(_, slot)| {
                matches!(slot.usage, Usage::Capture { ends, .. } if ends <= clock)
                    || slot.is_expired_capture(now)
            })
            .map(|(place, _)| place)
            .collect();
        due.iter().filter(|place| self.retire_capture(**place, now)).count() > 0
    }

    fn retire_capture(&mut self, place: usize, now: SystemTime) -> bool {
        let Some(slot) = self.slots.get_mut(place).and_then(Option::as_mut) else { return false };
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

    /// The captures that run.
    pub fn running(&self) -> impl Iterator<Item = (CaptureId, &str, &Target)> {
        self.active_slots().filter_map(|(_, slot)| match &slot.usage {
            Usage::Capture { id, target, .. } => Some((*id, slot.rule.id.as_str(), target)),
            _ => None,
        })
    }

    /// Whether any rule that is live wants blocked time.
    pub fn wants_blocked(&self, now: SystemTime) -> bool {
        self.active_slots().any(|(_, slot)| slot.is_live(now) && slot.rates().1)
    }

    /// Whether a rule of these places does.
    pub fn wants_blocked_of(&self, places: u64) -> bool {
        self.active_slots().any(|(place, slot)| places >> place & 1 == 1 && slot.rates().1)
    }

    /// What the governor has lowered, in words, for the profiles that are taken meanwhile.
    pub fn set_governed(&mut self, reason: Option<String>) {
        self.governed = reason;
    }

    /// Of these places those that a rule had already at this moment of the boot clock, and still has.
    pub fn held_since(&self, places: u64, at_ns: u64) -> u64 {
        self.active_slots()
            .filter(|(_, slot)| slot.since_ns <= at_ns)
            .fold(0, |bits, (place, _)| bits | 1 << place)
            & places
    }

    /// When the next capture ends.
    pub fn next_end(&self) -> Option<Instant> {
        self.active_slots()
            .filter_map(|(_, slot)| match slot.usage {
                Usage::Capture { ends, .. } => Some(ends),
                _ => None,
            })
            .min()
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
        let mut bases: u64 = 0;
        for place in crate::profile::slots(bits) {
            let place = place as usize;
            let Some(slot) = self.slots.get_mut(place).and_then(Option::as_mut) else { continue };
            slot.samples += 1;
            slot.last_sample = Some(now);
            if matches!(slot.usage, Usage::Capture { .. }) {
                let id = slot.rule.id.clone();
                let base = self.slots[..RULE_SLOTS].iter().position(|base| {
                    base.as_ref().is_some_and(|base| base.rule.id == id && base.retired.is_none())
                });
                bases |= base.map_or(0, |place| 1 << place);
            }
        }
        for place in crate::profile::slots(bases & !bits) {
            if let Some(slot) = self.slots.get_mut(place as usize).and_then(Option::as_mut) {
                slot.samples += 1;
                slot.last_sample = Some(now);
            }
        }
    }

    /// What profiles say of the rule in a place.
    pub fn tag(&self, place: u32) -> Option<RuleTag> {
        let slot = self.slots.get(place as usize)?.as_ref()?;
        let (reason, evidence, capture) = match &slot.usage {
            Usage::Always => ("always", String::new(), 0),
            Usage::Watch { .. } => ("lead-up", String::new(), 0),
            Usage::AtExec => ("exec", "the process matched at execve".to_owned(), 0),
            Usage::Capture { reason, id, .. } => (reason.kind, reason.evidence.clone(), id.0),
        };
        Some(RuleTag {
            id: slot.rule.id.clone(),
            revision: slot.revision,
            reason: reason.to_owned(),
            evidence,
            capture,
            lead_up: None,
            governed: self.governed.clone(),
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

    /// A window is over: places of rules that are gone become free, but those of which samples are `waited_for`. Gives
    /// these places; what is kept for them anywhere is to be forgotten, or it would be taken for another rule's.
    pub fn next_window(&mut self, now: Instant, waited_for: u64) -> u64 {
        let mut free = 0;
        for (place, slot) in self.slots.iter_mut().enumerate() {
            let gone = slot.as_ref().and_then(|slot| slot.retired);
            let is_over = gone.is_some_and(|since| now.saturating_duration_since(since) > RETIREMENT);
            if is_over && waited_for >> place & 1 == 0 {
                *slot = None;
                free |= 1 << place;
            }
        }
        free
    }

    /// The state of each rule; `armed` counts the processes of a place.
    pub fn statuses(&self, now: SystemTime, armed: impl Fn(u32) -> u64) -> Vec<RuleStatus> {
        let mut statuses: BTreeMap<&str, RuleStatus> = BTreeMap::new();
        for (place, slot) in self.active_slots().filter(|(_, slot)| slot.rule.id != MANUAL) {
            let processes = armed(place as u32);
            if let Some(known) = statuses.get_mut(slot.rule.id.as_str()) {
                known.processes = known.processes.max(processes);
                continue;
            }
            let (state, reason) = self.state(slot, now);
            statuses.insert(
                &slot.rule.id,
                RuleStatus {
                    rule_id: slot.rule.id.clone(),
                    state: state.into(),
                    reason,
                    processes,
                    samples: slot.samples,
                    last_sample: slot.last_sample.map(Into::into),
                    expires_at: slot.expires_at.map(Into::into),
                },
            );
        }
        statuses.into_values().collect()
    }

    fn state(&self, slot: &Slot, now: SystemTime) -> (rule_status::State, String) {
        if let Some(stands) = slot.stands(now) {
            return stands;
        }
        if matches!(slot.usage, Usage::Always) {
            return (rule_status::State::Capturing, String::new());
        }
        let running: Vec<String> = self
            .active_slots()
            .filter_map(|(_, other)| match &other.usage {
                Usage::Capture { reason, .. } if other.rule.id == slot.rule.id => {
                    Some(format!("{} {}", reason.kind, reason.evidence))
                }
                _ => None,
            })
            .collect();
        if !running.is_empty() {
            return (rule_status::State::Capturing, running.join("; "));
        }
        let mut reason = format!("waits for {}", conditions_of(&slot.rule));
        if let Some(fault) = self.faults.get(&slot.rule.id) {
            reason = format!("{reason}; not watched everywhere: {fault}");
        }
        if slot.captures > 0 {
            let ago = slot
                .last_capture
                .and_then(|at| now.duration_since(at).ok())
                .map(|ago| Duration::from_secs(ago.as_secs()));
            let ago = ago.map_or_else(String::new, |ago| {
                format!(", the last ended {} ago", humantime::format_duration(ago))
            });
            reason = format!("{reason}; {} captures so far{ago}", slot.captures);
        }
        (rule_status::State::Waiting, reason)
    }

    fn active_slots(&self) -> impl Iterator<Item = (usize, &Slot)> {
        self.slots
            .iter()
            .enumerate()
            .filter_map(|(place, slot)| Some((place, slot.as_ref()?)))
            .filter(|(_, slot)| slot.retired.is_none())
    }

    fn places_of<'a>(&'a self, source: Source, rule: &'a Rule) -> impl Iterator<Item = usize> + 'a {
        self.active_slots()
            .filter(move |(_, slot)| {
                slot.source == source && *slot.rule == *rule && !matches!(slot.usage, Usage::Capture { .. })
            })
            .map(|(place, _)| place)
    }
}

impl Slot {
    /// Nanoseconds between two ticks, 0 for none; and whether blocked time is wanted.
    fn rates(&self) -> (u64, bool) {
        match &self.usage {
            Usage::Watch { lead_up } if lead_up.is_zero() => (0, false),
            Usage::Watch { .. } => (1_000_000_000 / RECORDER_HZ, false),
            _ => (compile::period_ns(&self.rule), compile::off_cpu(&self.rule)),
        }
    }

    fn is_live(&self, now: SystemTime) -> bool {
        self.stands(now).is_none()
    }

    fn is_expired_capture(&self, now: SystemTime) -> bool {
        matches!(self.usage, Usage::Capture { .. }) && self.expires_at.is_some_and(|at| at <= now)
    }

    /// Why it is not live, if it is not.
    fn stands(&self, now: SystemTime) -> Option<(rule_status::State, String)> {
        if let Some((_, reason)) = &self.unsupported {
            return Some((rule_status::State::Unsupported, reason.clone()));
        }
        if self.expires_at.is_some_and(|at| at <= now) {
            return Some((rule_status::State::Expired, "its ttl is over".into()));
        }
        if self.not_before.is_some_and(|at| at > now) {
            return Some((rule_status::State::Waiting, "its not_before is not reached".into()));
        }
        None
    }
}

/// The places that a rule needs.
fn usages(rule: &Rule) -> Vec<Usage> {
    if rule.when.is_empty() {
        return vec![Usage::Always];
    }
    let lead_up = rule
        .capture
        .as_ref()
        .and_then(|capture| Duration::try_from(capture.lead_up?).ok())
        .unwrap_or_default();
    let is_exec = |kind: &Option<condition::Kind>| matches!(kind, Some(condition::Kind::Exec(_)));
    let mut usages = Vec::new();
    if rule.when.iter().any(|condition| !is_exec(&condition.kind)) {
        usages.push(Usage::Watch { lead_up });
    }
    if rule.when.iter().any(|condition| is_exec(&condition.kind)) {
        usages.push(Usage::AtExec);
    }
    usages
}

/// How long a rule's captures are.
pub fn duration_of(rule: &Rule) -> Duration {
    let given = rule.capture.as_ref().and_then(|capture| capture.duration);
    given.and_then(|given| Duration::try_from(given).ok()).unwrap_or(DEFAULT_DURATION)
}

/// How long a target rests after a capture of this rule.
pub fn cooldown_of(rule: &Rule) -> Duration {
    let given = rule.capture.as_ref().and_then(|capture| capture.cooldown);
    given.and_then(|given| Duration::try_from(given).ok()).unwrap_or(DEFAULT_COOLDOWN)
}

/// Captures of a rule that may run at one time here.
pub fn max_concurrent_of(rule: &Rule) -> usize {
    match rule.capture.as_ref().map_or(0, |capture| capture.max_concurrent) {
        0 => CAPTURE_SLOTS,
        given => given as usize,
    }
}

/// The condition's name, as in the YAML form.
pub fn kind_name(kind: &condition::Kind) -> &'static str {
    match kind {
        condition::Kind::Pressure(_) => "pressure",
        condition::Kind::CpuUsage(_) => "cpu_usage",
        condition::Kind::Throttled(_) => "throttled",
        condition::Kind::Exec(_) => "exec",
        condition::Kind::Schedule(_) => "schedule",
    }
}

fn conditions_of(rule: &Rule) -> String {
    let names: Vec<&str> =
        rule.when.iter().filter_map(|condition| Some(kind_name(condition.kind.as_ref()?))).collect();
    names.join(" or ")
}

fn pod_field(rule: &Rule) -> &'static str {
    let matches = rule.r#match.clone().unwrap_or_default();
    if !matches.namespaces.is_empty() {
        "match.namespaces"
    } else if !matches.pod_labels.is_empty() {
        "match.pod_labels"
    } else if !matches.containers.is_empty() {
        "match.containers"
    } else {
        "match.workloads"
    }
}

fn boot_clock_ns() -> u64 {
    u64::try_from(crate::conditions::boot_clock().as_nanos()).unwrap_or(0)
}

/// What a process is matched by.
pub fn traits(process: &Process) -> Traits<'_> {
    Traits {
        comm: &process.comm,
        exe: &process.exe,
        cgroup: &process.cgroup,
        uid: process.uid,
        tgid: process.key.process.tgid,
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

#[cfg(test)]
mod tests {
    use super::*;

    fn put(book: &mut RuleBook, names: &[&str]) {
        let rules = names
            .iter()
            .map(|name| ad_hoc(name, Match { comm: vec![(*name).into()], ..Match::default() }, 99, &[]));
        let set = Set { rules: rules.collect(), ..Set::default() };
        assert_eq!(book.check(Source::Local, &set.rules), []);
        assert_eq!(book.replace(Source::Local, set, SystemTime::now()), []);
    }

    #[test]
    fn the_place_of_a_rule_that_is_gone_is_not_free_before_its_last_sample_is_named() {
        let mut book = RuleBook::new(model::Caps::default());
        put(&mut book, &["one"]);
        put(&mut book, &["two"]);
        let (soon, later) = (Instant::now(), Instant::now() + RETIREMENT + Duration::from_secs(1));
        assert_eq!(book.next_window(soon, 0), 0);
        assert_eq!(book.next_window(later, 1), 0, "a sample of it waits for tables");
        assert_eq!(book.name(0), Some("one"));
        assert_eq!(book.next_window(later, 2), 1);
        assert_eq!((book.name(0), book.name(1)), (None, Some("two")));
        put(&mut book, &["two", "three"]);
        assert_eq!((book.name(0), book.name(1)), (Some("three"), Some("two")));
    }
}
