//! The state machine that decides when a capture starts. It has no side effects and runs in virtual time.
//!
//! A condition is watched in scopes: a container, a pod, or the node. A scope starts a capture when the condition has held
//! there for the rule's time. These suppress a start:
//!
//! - a capture that runs in the scope, and the cooldown after one,
//! - the rule's maximum of concurrent captures,
//! - an empty token bucket: of the rule, of the scope, or of the node.
//!
//! The agent counts suppressed starts. If the condition continues to hold, the capture starts later.

use std::{
    collections::{BTreeMap, HashMap},
    sync::Arc,
    time::Duration,
};

use gannet_proto::control::{Rule, condition};

use super::rate::TokenBucket;
use crate::rules::{
    RuleId, WatchedRule, capture_cooldown, capture_duration, condition_name, max_concurrent_captures,
};

/// Bucket of each rule: captures at once, and the time for one more.
const RULE_BUCKET: (u32, Duration) = (10, Duration::from_secs(10));
/// Bucket of each scope, shared by all rules.
const SCOPE_BUCKET: (u32, Duration) = (5, Duration::from_secs(20));
/// Bucket of the node, shared by all rules and scopes.
const NODE_BUCKET: (u32, Duration) = (20, Duration::from_secs(3));
/// Scopes to remember. Beyond that the agent forgets those without any effect on later captures, so this limit cuts nothing.
/// The others are bounded: sensors watch a limited number of scopes, and the node's bucket limits the scopes with a cooldown.
const MAX_SCOPES: usize = 4096;

/// A scope without a measurement for this time is not watched any more: the sensors measure once a second.
const UNSEEN_TIMEOUT: Duration = Duration::from_secs(30);

/// The processes for which a condition is watched, and which its capture samples.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub(crate) enum WatchScope {
    /// The node: all processes that the rule matches.
    Node,
    /// A container or pod, by the id of its control group.
    Group(u64),
}

/// How a measured value compares with its threshold.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum ConditionLevel {
    /// The condition holds; with the evidence.
    High(String),
    /// Below the threshold, but within the hysteresis: the condition is not over.
    Between,
    /// The condition does not hold.
    Low,
}

/// A measurement of a sensor.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Observation {
    pub(crate) rule: RuleId,
    /// Index of the condition in the rule.
    pub(crate) condition: usize,
    pub(crate) scope: WatchScope,
    pub(crate) level: ConditionLevel,
}

/// A capture that must start now.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct CaptureStart {
    pub(crate) rule: RuleId,
    pub(crate) scope: WatchScope,
    /// The name of the condition.
    pub(crate) kind: &'static str,
    /// The measurement that started it, human-readable.
    pub(crate) evidence: String,
    pub(crate) duration: Duration,
}

/// Captures that did not start although their condition held, since the agent's start.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) struct SuppressedStarts {
    /// During the cooldown of the scope.
    pub(crate) cooldown: u64,
    /// The rule had its maximum of captures.
    pub(crate) max_concurrent: u64,
    /// A token bucket was empty.
    pub(crate) budget: u64,
}

/// The state of all rules with conditions.
pub(crate) struct Triggers {
    rules: BTreeMap<RuleId, RuleState>,
    node: TokenBucket,
    scopes: HashMap<WatchScope, TokenBucket>,
    suppressed: SuppressedStarts,
}

struct RuleState {
    rule: Arc<Rule>,
    bucket: TokenBucket,
    scopes: HashMap<WatchScope, ScopeState>,
    /// When a schedule starts its next capture, by index of the condition.
    schedules: BTreeMap<usize, Duration>,
}

#[derive(Clone, Debug, Default)]
struct ScopeState {
    /// Since when a condition holds, by its index.
    since: BTreeMap<usize, Duration>,
    /// When it was measured last.
    seen: Duration,
    running: usize,
    /// End of the cooldown.
    rests_until: Duration,
}

impl Triggers {
    pub(crate) fn new(now: Duration) -> Self {
        Self {
            rules: BTreeMap::new(),
            node: TokenBucket::new(NODE_BUCKET.0, NODE_BUCKET.1, now),
            scopes: HashMap::new(),
            suppressed: SuppressedStarts::default(),
        }
    }

    /// Replaces the watched rules. An unchanged rule keeps its state.
    pub(crate) fn set_rules(&mut self, watched: &[WatchedRule], now: Duration) {
        let mut former = std::mem::take(&mut self.rules);
        for WatchedRule { rule, .. } in watched {
            let state = match former.remove(&rule.id) {
                Some(state) if state.rule == *rule => state,
                _ => RuleState {
                    rule: Arc::clone(rule),
                    bucket: TokenBucket::new(RULE_BUCKET.0, RULE_BUCKET.1, now),
                    scopes: HashMap::new(),
                    schedules: rule
                        .when
                        .iter()
                        .enumerate()
                        .filter(|(_, when)| matches!(when.kind, Some(condition::Kind::Schedule(_))))
                        .map(|(number, _)| (number, now))
                        .collect(),
                },
            };
            self.rules.insert(rule.id.clone(), state);
        }
    }

    /// Takes a measurement. Returns the capture to start. The caller reports its end, or its failure to start, by
    /// [`Triggers::ended`].
    pub(crate) fn observe(&mut self, observation: &Observation, now: Duration) -> Option<CaptureStart> {
        let Observation { rule, condition, scope, level } = observation;
        let state = self.rules.get_mut(rule)?;
        let kind = state.rule.when.get(*condition)?.kind?;
        let at = state.scopes.entry(*scope).or_default();
        at.seen = now;
        let evidence = match level {
            ConditionLevel::Low => {
                at.since.remove(condition);
                return None;
            }
            ConditionLevel::Between => return None,
            ConditionLevel::High(evidence) => evidence.clone(),
        };
        let since = *at.since.entry(*condition).or_insert(now);
        if now.saturating_sub(since) < hold_time(&kind) {
            return None;
        }
        self.start(rule, *scope, &kind, evidence, now)
    }

    /// Reports that a process which the rule matches has called `execve`.
    pub(crate) fn exec(
        &mut self,
        rule: &RuleId,
        scope: WatchScope,
        evidence: String,
        now: Duration,
    ) -> Option<CaptureStart> {
        let kind = condition::Kind::Exec(condition::Exec {});
        self.start(rule, scope, &kind, evidence, now)
    }

    /// Returns the captures that schedules start until `now`.
    pub(crate) fn tick(&mut self, now: Duration) -> Vec<CaptureStart> {
        self.forget(now);
        let mut due = Vec::new();
        for (id, state) in &mut self.rules {
            for (number, next) in state.schedules.iter_mut().filter(|(_, next)| **next <= now) {
                let Some(kind @ condition::Kind::Schedule(schedule)) =
                    state.rule.when.get(*number).and_then(|when| when.kind.as_ref())
                else {
                    continue;
                };
                let every = duration_or_zero(schedule.every).max(Duration::from_secs(1));
                // Times that passed during suspend are skipped.
                while *next <= now {
                    *next += every;
                }
                due.push((id.clone(), *kind, format!("every {}", humantime::format_duration(every))));
            }
        }
        due.into_iter()
            .filter_map(|(rule, kind, evidence)| self.start(&rule, WatchScope::Node, &kind, evidence, now))
            .collect()
    }

    fn start(
        &mut self,
        rule: &RuleId,
        scope: WatchScope,
        kind: &condition::Kind,
        evidence: String,
        now: Duration,
    ) -> Option<CaptureStart> {
        self.forget(now);
        let state = self.rules.get_mut(rule)?;
        let running: usize = state.scopes.values().map(|at| at.running).sum();
        let at = state.scopes.entry(scope).or_default();
        let is_exec = matches!(kind, condition::Kind::Exec(_));
        let is_schedule = matches!(kind, condition::Kind::Schedule(_));
        // With an exec condition each process is a capture of its own.
        if at.running > 0 && !is_exec {
            return None;
        }
        if now < at.rests_until && !is_schedule {
            self.suppressed.cooldown += 1;
            return None;
        }
        if running >= max_concurrent_captures(&state.rule) {
            self.suppressed.max_concurrent += 1;
            return None;
        }
        let of_scope =
            self.scopes.entry(scope).or_insert_with(|| TokenBucket::new(SCOPE_BUCKET.0, SCOPE_BUCKET.1, now));
        // A start takes a token from all three buckets or from none.
        if !(state.bucket.has(now) && of_scope.has(now) && self.node.has(now)) {
            self.suppressed.budget += 1;
            return None;
        }
        state.bucket.take(now);
        of_scope.take(now);
        self.node.take(now);
        at.running += 1;
        let duration = match kind {
            condition::Kind::Schedule(schedule) => duration_or_zero(schedule.r#for),
            _ => capture_duration(&state.rule),
        };
        Some(CaptureStart { rule: rule.clone(), scope, kind: condition_name(kind), evidence, duration })
    }

    /// Reports that a capture has ended, or could not start.
    pub(crate) fn ended(&mut self, rule: &str, scope: WatchScope, exec: bool, now: Duration) {
        let Some(state) = self.rules.get_mut(rule) else { return };
        let Some(at) = state.scopes.get_mut(&scope) else { return };
        at.running = at.running.saturating_sub(1);
        // After an exec capture there is a cooldown only if the rule sets one: the next process is a different one.
        let has_cooldown = state.rule.capture.as_ref().is_some_and(|capture| capture.cooldown.is_some());
        if !exec || has_cooldown {
            at.rests_until = now + capture_cooldown(&state.rule);
        }
    }

    pub(crate) fn suppressed(&self) -> SuppressedStarts {
        self.suppressed
    }

    /// Bounds the memory of scopes.
    fn forget(&mut self, now: Duration) {
        if self.scopes.len() > MAX_SCOPES {
            self.scopes.retain(|_, bucket| !bucket.is_full(now));
        }
        for state in self.rules.values_mut().filter(|state| state.scopes.len() > MAX_SCOPES) {
            state.scopes.retain(|_, at| {
                let is_watched = !at.since.is_empty() && now.saturating_sub(at.seen) < UNSEEN_TIMEOUT;
                is_watched || at.running > 0 || at.rests_until > now
            });
        }
    }
}

/// Returns how long a condition must hold before a capture starts.
fn hold_time(kind: &condition::Kind) -> Duration {
    match kind {
        condition::Kind::CpuUsage(usage) => duration_or_zero(usage.r#for),
        condition::Kind::Throttled(throttled) => duration_or_zero(throttled.r#for),
        _ => Duration::ZERO,
    }
}

fn duration_or_zero<T>(given: Option<T>) -> Duration
where
    Duration: TryFrom<T>,
{
    given.and_then(|given| Duration::try_from(given).ok()).unwrap_or_default()
}

#[cfg(test)]
mod tests {
    use gannet_proto::rules::parse;
    use proptest::prelude::*;

    use super::*;

    const SCOPE: WatchScope = WatchScope::Group(7);

    fn triggers(rule: &str) -> Triggers {
        let rules = parse(&format!("rules:\n  - id: r\n    match: {{comm: [x]}}\n{rule}"), "test").unwrap();
        let mut triggers = Triggers::new(Duration::ZERO);
        let watched: Vec<WatchedRule> = rules
            .into_iter()
            .map(|rule| WatchedRule { rule: Arc::new(rule), slots: 1, at_exec: None })
            .collect();
        triggers.set_rules(&watched, Duration::ZERO);
        triggers
    }

    const PRESSURE: &str =
        "    when: [{pressure: {resource: cpu, kind: some, stall_us: 150000, window_us: 1000000}}]
    capture: {duration: 10s, cooldown: 60s, max_concurrent: 2}
";
    const USAGE: &str = "    when: [{cpu_usage: {above_millicores: 500, for: 5s}}]
    capture: {duration: 10s, cooldown: 60s}
";

    fn observed(scope: WatchScope, level: ConditionLevel) -> Observation {
        Observation { rule: "r".into(), condition: 0, scope, level }
    }

    fn high(scope: WatchScope) -> Observation {
        observed(scope, ConditionLevel::High("much".into()))
    }

    fn at(seconds: u64) -> Duration {
        Duration::from_secs(seconds)
    }

    /// Runs second by second while the condition holds. Returns the seconds at which captures started.
    fn sustained(triggers: &mut Triggers, seconds: u64) -> Vec<u64> {
        let mut starts = Vec::new();
        let mut ends = None;
        for second in 0..seconds {
            if ends == Some(second) {
                triggers.ended("r", SCOPE, false, at(second));
                ends = None;
            }
            if let Some(start) = triggers.observe(&high(SCOPE), at(second)) {
                starts.push(second);
                ends = Some(second + start.duration.as_secs());
            }
        }
        starts
    }

    #[test]
    fn sustained_pressure_starts_captures_spaced_by_the_cooldown() {
        let mut triggers = triggers(PRESSURE);
        assert_eq!(sustained(&mut triggers, 300), [0, 70, 140, 210, 280]);
        assert!(triggers.suppressed().cooldown > 0);
    }

    #[test]
    fn cpu_use_must_last_and_a_short_dip_does_not_count() {
        let mut triggers = triggers(USAGE);
        assert_eq!(triggers.observe(&high(SCOPE), at(0)), None);
        assert_eq!(triggers.observe(&high(SCOPE), at(4)), None);
        assert_eq!(
            triggers.observe(&observed(SCOPE, ConditionLevel::Between), at(4)),
            None,
            "a dip within the hysteresis"
        );
        assert!(triggers.observe(&high(SCOPE), at(5)).is_some());
        triggers.ended("r", SCOPE, false, at(15));
        triggers.observe(&observed(SCOPE, ConditionLevel::Low), at(70));
        assert_eq!(triggers.observe(&high(SCOPE), at(80)), None, "the condition ended in between");
        assert!(triggers.observe(&high(SCOPE), at(85)).is_some());
    }

    #[test]
    fn a_rule_stays_below_its_maximum_of_concurrent_captures() {
        let mut triggers = triggers(PRESSURE);
        let started: Vec<bool> =
            (1..=4).map(|id| triggers.observe(&high(WatchScope::Group(id)), at(0)).is_some()).collect();
        assert_eq!(started, [true, true, false, false]);
        assert_eq!(triggers.suppressed().max_concurrent, 2);
        triggers.ended("r", WatchScope::Group(1), false, at(10));
        assert!(triggers.observe(&high(WatchScope::Group(1)), at(10)).is_none(), "cooldown");
        assert!(triggers.observe(&high(WatchScope::Group(3)), at(10)).is_some());
    }

    #[test]
    fn a_schedule_starts_on_time_and_skips_missed_times() {
        let mut triggers = triggers("    when: [{schedule: {every: 10m, for: 30s}}]\n");
        let starts = triggers.tick(at(0));
        assert_eq!((starts.len(), starts[0].duration, starts[0].scope), (1, at(30), WatchScope::Node));
        triggers.ended("r", WatchScope::Node, false, at(30));
        assert_eq!(triggers.tick(at(599)), []);
        assert_eq!(triggers.tick(at(600)).len(), 1, "the cooldown does not delay a schedule");
        triggers.ended("r", WatchScope::Node, false, at(630));
        assert_eq!(triggers.tick(at(6000)).len(), 1);
        triggers.ended("r", WatchScope::Node, false, at(6030));
        assert_eq!(triggers.tick(at(6031)), []);
    }

    /// Checks that the limit of scopes takes neither a condition that holds nor a cooldown away, and that it does limit.
    #[test]
    fn more_scopes_than_remembered_change_no_capture() {
        let mut triggers = triggers(USAGE);
        let group = |number: usize| WatchScope::Group(1000 + number as u64);
        // One rests, one holds its condition since second 90, many others are over.
        triggers.observe(&high(WatchScope::Group(1)), at(80));
        assert!(triggers.observe(&high(WatchScope::Group(1)), at(85)).is_some());
        triggers.ended("r", WatchScope::Group(1), false, at(85));
        assert_eq!(triggers.observe(&high(WatchScope::Group(2)), at(90)), None);
        for number in 0..=MAX_SCOPES {
            triggers.observe(&observed(group(number), ConditionLevel::Low), at(90));
        }
        // A start of another one forgets those.
        triggers.observe(&high(WatchScope::Group(3)), at(86));
        assert!(triggers.observe(&high(WatchScope::Group(3)), at(91)).is_some());
        assert_eq!(triggers.rules["r"].scopes.len(), 3);
        triggers.ended("r", WatchScope::Group(3), false, at(91));
        assert!(triggers.observe(&high(WatchScope::Group(2)), at(95)).is_some(), "it has held for 5 s");
        assert_eq!(triggers.observe(&high(WatchScope::Group(1)), at(95)), None, "its cooldown");
        // Scopes that vanished while their condition held are forgotten too.
        for number in 0..=MAX_SCOPES {
            triggers.observe(&high(group(number)), at(200));
        }
        triggers.ended("r", WatchScope::Group(2), false, at(200));
        assert!(triggers.rules["r"].scopes.len() > MAX_SCOPES);
        assert_eq!(triggers.tick(at(300)), []);
        assert_eq!(triggers.rules["r"].scopes.len(), 0);
    }

    #[test]
    fn only_an_unchanged_rule_keeps_its_state() {
        let mut triggers = triggers(PRESSURE);
        assert!(triggers.observe(&high(SCOPE), at(0)).is_some());
        let rule = Arc::clone(&triggers.rules["r"].rule);
        triggers.set_rules(&[WatchedRule { rule: Arc::clone(&rule), slots: 1, at_exec: None }], at(1));
        assert!(triggers.observe(&high(SCOPE), at(1)).is_none(), "a capture runs");
        let other = Arc::new(Rule { priority: 1, ..(*rule).clone() });
        triggers.set_rules(&[WatchedRule { rule: other, slots: 1, at_exec: None }], at(2));
        assert!(triggers.observe(&high(SCOPE), at(2)).is_some());
        triggers.set_rules(&[], at(3));
        assert!(triggers.observe(&high(SCOPE), at(3)).is_none());
    }

    proptest! {
        #[test]
        fn budgets_hold_for_any_sequence_of_execs(
            steps in prop::collection::vec((0_u64..3, 0_u64..3000), 1..400)
        ) {
            let mut triggers = triggers("    when: [{exec: {}}]\n    capture: {duration: 1s, max_concurrent: 3}\n");
            let (mut now, mut started, mut running) = (Duration::ZERO, 0_u128, Vec::new());
            for (scope, pause) in steps {
                now += Duration::from_millis(pause);
                running.retain(|(end, scope)| {
                    if *end <= now { triggers.ended("r", *scope, true, now); }
                    *end > now
                });
                if triggers.exec(&"r".to_owned(), WatchScope::Group(scope), "ran".into(), now).is_some() {
                    started += 1;
                    running.push((now + Duration::from_secs(1), WatchScope::Group(scope)));
                }
                prop_assert!(running.len() <= 3);
                prop_assert!(started <= u128::from(RULE_BUCKET.0) + now.as_nanos() / RULE_BUCKET.1.as_nanos());
            }
        }
    }
}
