//! The rules in force on this node, and what they mean for each process.
//!
//! Rules come from two sources, the node's own files and the collector. Each source replaces its rules as a whole. The
//! agent checks a set ([`check`]), gives each rule its slots ([`slots`]) and compiles them into the form that the BPF
//! programs decide by ([`compile`]). A slot is one bit in every sample.
//!
//! A rule without conditions has one slot and samples all the time. A rule with conditions has a slot that marks its
//! processes; the flight recorder takes that slot's samples if the rule has a pre-trigger window. Each capture has a slot of
//! its own, so that its samples stay separate and carry the reason of the capture ([`captures`]).
//!
//! A set may have more rules than slots are free. Priorities then decide ([`claims`]). The other rules wait, and their
//! status says so.

mod captures;
mod check;
mod claims;
mod compile;
mod containers;
pub(crate) mod files;
mod slots;
mod status;
mod watch_files;

use std::{
    collections::{BTreeMap, BTreeSet},
    time::{Instant, SystemTime},
};

use gannet_proto::{
    control::{Capture, Match, Rule, RuleError, RuleStatus, capture, condition},
    rules::Caps,
};

pub use self::{
    captures::CaptureError,
    compile::Deny,
    containers::{PodQuery, PodResolver, PodSelection},
    files::RuleFilesError,
};
use self::{
    captures::Captures, check::RuleChecks, compile::SlotRequest, containers::PodContainers, slots::SlotUse,
    status::RuleStatuses,
};
pub(crate) use self::{
    captures::{capture_cooldown, capture_duration, max_concurrent_captures},
    check::ConditionSupport,
    compile::{ProcessTraits, started_by},
    slots::{CAPTURE_SLOTS, Slots, WatchedRule},
    watch_files::FileWatcher,
};
use crate::{kernel::KernelRules, profile::RuleTag};

/// The rule id of captures that people start by hand.
pub(crate) const MANUAL_RULE_ID: &str = "manual";

/// The origin of a rule.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum RuleSource {
    /// A file of the node, or the command line.
    Local,
    /// The collector, over the control stream.
    Remote,
}

/// All rules of one source.
#[derive(Clone, Debug, Default)]
pub struct SourceRules {
    /// The collector's revision number; 0 for the node's own rules.
    pub revision: u64,
    /// When this revision came into force first, by the node's clock. Lifetimes count from then.
    pub applied_at: Option<SystemTime>,
    /// The rules in their given order.
    pub rules: Vec<Rule>,
    /// A rule that names pids alone applies from the next `execve` of those processes on, not to their present images.
    pub from_exec: bool,
}

/// The name of a rule. No two sources of a node may use the same name.
pub type RuleId = String;

/// The number of a capture, unique while the agent runs.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub(crate) struct CaptureId(u64);

impl CaptureId {
    /// Returns the number that profiles carry.
    pub(crate) fn number(self) -> u64 {
        self.0
    }
}

/// Why a capture runs.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) struct CaptureReason {
    /// The name of the condition: `pressure`, `schedule`, `manual`.
    pub(crate) kind: &'static str,
    /// The observation that started the capture: `cpu some 31.2 ms/s at 12:03:07Z`.
    pub(crate) evidence: String,
}

/// The processes that a capture samples, among those that its rule matches.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum CaptureTarget {
    All,
    /// Processes in or below these control groups, by id.
    Groups(BTreeSet<u64>),
}

/// The state of a [`RuleBook`] before a replacement.
pub(crate) struct Checkpoint {
    sources: BTreeMap<RuleSource, SourceRules>,
    slots: Slots,
}

/// The rules in force.
pub struct RuleBook {
    sources: BTreeMap<RuleSource, SourceRules>,
    slots: Slots,
    captures: Captures,
    checks: RuleChecks,
    deny: Deny,
    pods: PodContainers,
    statuses: RuleStatuses,
}

impl RuleBook {
    /// Builds a book without rules.
    pub fn new(caps: Caps) -> Self {
        Self {
            sources: BTreeMap::new(),
            slots: Slots::new(),
            captures: Captures::default(),
            checks: RuleChecks::new(caps),
            deny: Deny::default(),
            pods: PodContainers::default(),
            statuses: RuleStatuses::default(),
        }
    }

    /// Sets what is never sampled on this node.
    pub fn set_deny(&mut self, deny: Deny) {
        self.deny = deny;
    }

    /// Sets which conditions this node can watch. Without a call it can watch all.
    pub(crate) fn set_condition_support(&mut self, support: impl ConditionSupport + Send + 'static) {
        self.checks.set_support(support);
    }

    /// Checks a set against the format, the node's caps, and the rules of the other source. Returns all errors; the set can
    /// be applied if there are none.
    pub fn check(&self, source: RuleSource, rules: &[Rule]) -> Vec<RuleError> {
        self.checks.check(source, rules, &self.sources)
    }

    /// Replaces the rules of a source. The caller has checked them. Returns the parts of rules that have no effect on this
    /// node now.
    pub fn replace(&mut self, source: RuleSource, set: SourceRules, now: SystemTime) -> Vec<RuleError> {
        let applied_at = set.applied_at.unwrap_or(now);
        self.slots.replace(source, &set, applied_at);
        for rule in &set.rules {
            let (_, unsupported) = self.checks.unsupported(rule, self.pods.is_enabled());
            self.slots.set_unsupported(source, rule, unsupported.as_deref());
        }
        self.slots.assign(now);
        self.sources.insert(source, SourceRules { applied_at: Some(applied_at), ..set });
        self.faults_of(source)
    }

    /// Returns the parts of a source's rules that have no effect on this node now, with the reasons.
    pub(crate) fn faults_of(&self, source: RuleSource) -> Vec<RuleError> {
        let rules = self.sources.get(&source).map_or(&[][..], |set| &set.rules);
        let faults = rules.iter().flat_map(|rule| self.checks.unsupported(rule, self.pods.is_enabled()).0);
        let waiting = self.slots.waiting().iter().filter(|waiting| waiting.is_of(source));
        faults
            .chain(waiting.map(|waiting| error(&waiting.entry.rule, "priority", &waiting.reason())))
            .collect()
    }

    /// Returns what [`Self::restore`] needs to take a replacement back.
    pub(crate) fn checkpoint(&self) -> Checkpoint {
        Checkpoint { sources: self.sources.clone(), slots: self.slots.clone() }
    }

    /// Returns to the rules and slots of a checkpoint.
    pub(crate) fn restore(&mut self, checkpoint: Checkpoint) {
        (self.sources, self.slots) = (checkpoint.sources, checkpoint.slots);
    }

    /// Assigns free slots to the rules that wait for one, and decides by priority where there are too few. Returns true if
    /// the rules in force differ from the former ones.
    pub(crate) fn assign_slots(&mut self, now: SystemTime) -> bool {
        self.slots.assign(now)
    }

    /// Returns the rules of a source.
    pub(crate) fn source(&self, source: RuleSource) -> Option<&SourceRules> {
        self.sources.get(&source)
    }

    /// Returns the slots and the rules that have them.
    pub(crate) fn slots(&self) -> &Slots {
        &self.slots
    }

    /// Tells the book that this node has pod metadata: rules over pods work from now on.
    pub fn enable_pods(&mut self) {
        if self.pods.enable() {
            let checks = &self.checks;
            self.slots.update_unsupported(|rule| checks.unsupported(rule, true).1);
        }
    }

    /// Sets the containers that a rule over pods selects. Returns true if they differ from the former ones.
    pub fn select_containers(&mut self, rule_id: &str, containers: BTreeSet<u64>) -> bool {
        self.pods.set(rule_id, containers)
    }

    /// Sets the containers that must not be profiled. Returns true if they differ from the former ones.
    pub(crate) fn deny_containers(&mut self, containers: BTreeSet<u64>) -> bool {
        let changed = self.deny.containers != containers;
        self.deny.containers = containers;
        changed
    }

    /// Multiplies all periods by `divisor`. Returns true if it differs from the former one.
    pub(crate) fn set_rate_divisor(&mut self, divisor: u32) -> bool {
        self.slots.set_rate_divisor(divisor)
    }

    /// Sets the conditions that the sensors cannot watch at the moment, by rule. Statuses show them.
    pub(crate) fn set_faults(&mut self, faults: BTreeMap<RuleId, String>) {
        self.statuses.set_faults(faults);
    }

    /// Sets what the governor has lowered, human-readable. Profiles show it.
    pub(crate) fn set_governed(&mut self, reason: Option<String>) {
        self.statuses.set_governed(reason);
    }

    /// Builds what the BPF programs decide by, for the rules that are live at `now`.
    pub fn kernel_rules(&self, now: SystemTime) -> KernelRules {
        let requests = self.slots.live(now).map(|(slot, entry)| {
            let capture = entry.rule.capture.clone().unwrap_or_default();
            let target = match &entry.usage {
                SlotUse::Capture { target: CaptureTarget::Groups(ids), .. } => Some(ids),
                _ => None,
            };
            SlotRequest {
                slot,
                compiled: &entry.compiled,
                period_ns: self.slots.period_ns(entry),
                off_cpu: entry.wants_off_cpu(),
                user_stacks: capture.user_stacks.unwrap_or(true),
                kernel_stacks: capture.kernel_stacks.unwrap_or(true),
                in_span: capture.only_in_span,
                at_exec: matches!(entry.usage, SlotUse::AtExec),
                containers: target.or_else(|| entry.containers(&self.pods)),
                unknown_too: matches!(entry.usage, SlotUse::Always | SlotUse::Capture { .. }),
            }
        });
        compile::kernel_rules(requests, &self.deny)
    }

    /// Starts a capture of a rule that is live, until `ends`.
    pub(crate) fn start_capture(
        &mut self,
        rule_id: &str,
        target: CaptureTarget,
        reason: CaptureReason,
        ends: Instant,
        now: SystemTime,
    ) -> Result<CaptureId, CaptureError> {
        self.captures.start(&mut self.slots, rule_id, target, reason, ends, now)
    }

    /// Starts a capture that a person asked for. The node's caps hold for it too.
    pub(crate) fn start_manual_capture(
        &mut self,
        matches: Match,
        capture: Capture,
        reason: CaptureReason,
        ends: Instant,
        now: SystemTime,
    ) -> Result<CaptureId, CaptureError> {
        let rule = self.checks.manual_rule(matches, capture, self.pods.is_enabled())?;
        self.captures.start_manual(&mut self.slots, &rule, reason, ends, now)
    }

    /// Ends a capture before its time. Returns true if it ran.
    pub(crate) fn end_capture(&mut self, capture: CaptureId, now: SystemTime) -> bool {
        self.slots.end_capture(capture, now)
    }

    /// Ends captures whose time is over, or whose rule has expired. Returns true if there were any.
    pub(crate) fn end_due_captures(&mut self, clock: Instant, now: SystemTime) -> bool {
        self.slots.end_due_captures(clock, now)
    }

    /// Counts a sample that has these slots' bits.
    pub(crate) fn count_sample(&mut self, bits: u64, now: SystemTime) {
        self.slots.count_sample(bits, now);
    }

    /// Frees slots of removed rules, except those in `awaited`, of which samples still wait for unwind tables. Called at the
    /// end of a window. Returns the free slots: the caller drops what it keeps for them, or the next rule would get it.
    pub(crate) fn free_retired_slots(&mut self, now: Instant, awaited: u64) -> u64 {
        self.slots.free_retired(now, awaited)
    }

    /// Returns what profiles say about the rule in a slot.
    pub(crate) fn tag(&self, slot: u32) -> Option<RuleTag> {
        Some(self.statuses.tag(self.slots.get(slot)?))
    }

    /// Returns the status of each rule. `processes` counts the processes of a slot.
    pub(crate) fn statuses(&self, now: SystemTime, processes: impl Fn(u32) -> u64) -> Vec<RuleStatus> {
        self.statuses.all(&self.slots, now, processes)
    }

    /// Explains for each rule why it samples a process or does not, human-readable. `container` is the id of the control
    /// group of the process's container.
    pub(crate) fn explain(
        &self,
        process: &ProcessTraits<'_>,
        container: Option<u64>,
        now: SystemTime,
    ) -> Vec<(RuleId, String)> {
        self.statuses.explain(&self.slots, &self.pods, process, container, now)
    }
}

/// Returns the condition's name in the YAML form.
pub(crate) fn condition_name(kind: &condition::Kind) -> &'static str {
    match kind {
        condition::Kind::Pressure(_) => "pressure",
        condition::Kind::CpuUsage(_) => "cpu_usage",
        condition::Kind::Throttled(_) => "throttled",
        condition::Kind::Exec(_) => "exec",
        condition::Kind::Schedule(_) => "schedule",
    }
}

fn error(rule: &Rule, field: &str, reason: &str) -> RuleError {
    RuleError { rule_id: rule.id.clone(), field: field.to_owned(), reason: reason.to_owned() }
}

/// Builds a rule for the commands that need no rule file: sample these processes at this rate.
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
    use std::time::Duration;

    use super::{
        slots::{RETIREMENT, RULE_SLOTS},
        *,
    };

    fn rule(name: &str, priority: i32) -> Rule {
        Rule { priority, ..ad_hoc(name, Match { comm: vec![name.into()], ..Match::default() }, 99, &[]) }
    }

    /// Replaces the rules, and returns which of them wait for a slot.
    fn replace(book: &mut RuleBook, rules: Vec<Rule>) -> Vec<String> {
        let set = SourceRules { rules, ..SourceRules::default() };
        assert_eq!(book.check(RuleSource::Local, &set.rules), []);
        let faults = book.replace(RuleSource::Local, set, SystemTime::now());
        assert!(faults.iter().all(|fault| fault.field == "priority"), "{faults:?}");
        faults.into_iter().map(|fault| fault.rule_id).collect()
    }

    fn put(book: &mut RuleBook, names: &[&str]) {
        assert_eq!(replace(book, names.iter().map(|name| rule(name, 0)).collect()), [""; 0]);
    }

    /// Returns the rules that have slots and are not removed.
    fn in_slots(book: &RuleBook) -> BTreeSet<String> {
        book.slots().active().map(|(_, slot)| slot.rule.id.clone()).collect()
    }

    fn names(prefix: &str, count: usize) -> Vec<String> {
        (0..count).map(|number| format!("{prefix}{number}")).collect()
    }

    /// Checks the fault that left 12 of 30 new rules out for ever, without a word.
    #[test]
    fn rules_that_replace_as_many_others_all_come_into_force() {
        let mut book = RuleBook::new(Caps::default());
        let (former, new) = (names("former", 30), names("new", 30));
        assert_eq!(replace(&mut book, former.iter().map(|name| rule(name, 0)).collect()), [""; 0]);
        let waiting = replace(&mut book, new.iter().map(|name| rule(name, 0)).collect());
        assert_eq!(
            (waiting.len(), in_slots(&book).len()),
            (12, 18),
            "the former rules keep theirs for a window"
        );
        let reason = &book.faults_of(RuleSource::Local)[0].reason;
        assert!(reason.contains("waits for a free slot"), "{reason}");
        assert_eq!(book.statuses(SystemTime::now(), |_| 0).len(), 30, "each rule has a status");
        let later = Instant::now() + RETIREMENT + Duration::from_secs(1);
        assert!(book.slots().is_window_awaited(later, 0) && !book.slots().can_assign());
        book.free_retired_slots(later, 0);
        assert!(book.slots().can_assign() && book.assign_slots(SystemTime::now()));
        assert_eq!(in_slots(&book), new.into_iter().collect());
        assert_eq!(book.faults_of(RuleSource::Local), []);
    }

    #[test]
    fn with_too_few_slots_the_rules_of_lower_priority_wait() {
        let mut book = RuleBook::new(Caps::default());
        let low: Vec<Rule> = names("low", RULE_SLOTS).iter().map(|name| rule(name, 0)).collect();
        assert_eq!(replace(&mut book, low.clone()), [""; 0]);
        // A rule of a higher priority displaces one; the slot is free when the last samples of that one are out.
        let more: Vec<Rule> = low.iter().cloned().chain([rule("high", 1), rule("same", 0)]).collect();
        let mut waiting = replace(&mut book, more.clone());
        waiting.sort();
        assert_eq!((waiting.len(), waiting.contains(&"high".to_owned())), (3, true), "{waiting:?}");
        book.free_retired_slots(Instant::now() + RETIREMENT + Duration::from_secs(1), 0);
        assert!(book.assign_slots(SystemTime::now()));
        let faults = book.faults_of(RuleSource::Local);
        assert_eq!(faults.len(), 2, "{faults:?}");
        assert!(
            faults.iter().all(|fault| fault.rule_id != "high" && fault.reason.contains("raise its priority"))
        );
        assert!(!book.assign_slots(SystemTime::now()), "equal rules do not take turns");
        // Without the rule of the higher priority there is room for one more.
        assert_eq!(replace(&mut book, more.into_iter().filter(|rule| rule.id != "high").collect()).len(), 2);
        book.free_retired_slots(Instant::now() + RETIREMENT + Duration::from_secs(1), 0);
        book.assign_slots(SystemTime::now());
        assert_eq!(book.faults_of(RuleSource::Local).len(), 1);
    }

    #[test]
    fn a_checkpoint_restores_rules_and_slots() {
        let mut book = RuleBook::new(Caps::default());
        put(&mut book, &["one", "two"]);
        let before = book.checkpoint();
        put(&mut book, &["three"]);
        book.restore(before);
        assert_eq!(in_slots(&book), BTreeSet::from(["one".into(), "two".into()]));
        assert_eq!(book.source(RuleSource::Local).unwrap().rules.len(), 2);
    }

    /// Checks that another rule gets the slot of a removed rule only after the removed rule's last sample has its tag.
    #[test]
    fn a_removed_rules_slot_stays_reserved_for_its_last_samples() {
        let mut book = RuleBook::new(Caps::default());
        put(&mut book, &["one"]);
        put(&mut book, &["two"]);
        let (soon, later) = (Instant::now(), Instant::now() + RETIREMENT + Duration::from_secs(1));
        let id = |book: &RuleBook, slot| book.slots().rule_id(slot).map(str::to_owned);
        assert_eq!(book.free_retired_slots(soon, 0), 0);
        assert_eq!(book.free_retired_slots(later, 1), 0, "a sample of it waits for tables");
        assert_eq!(id(&book, 0).as_deref(), Some("one"));
        assert_eq!(book.free_retired_slots(later, 2), 1);
        assert_eq!((id(&book, 0), id(&book, 1).as_deref()), (None, Some("two")));
        put(&mut book, &["two", "three"]);
        assert_eq!((id(&book, 0).as_deref(), id(&book, 1).as_deref()), (Some("three"), Some("two")));
    }
}
