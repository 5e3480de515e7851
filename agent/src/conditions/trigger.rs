//! The decision when a capture starts: pure, in virtual time.
//!
//! A condition is watched at spots: a container, a pod, the node. A spot where it holds for as long as the rule asks
//! starts a capture, unless one runs there, the last one is too short a while ago (cooldown), the rule has as many as it
//! may, or one of three token buckets (of the rule, of the spot, of the node) is empty. Whatever holds a capture back is
//! counted; it starts later if the condition holds on.

use std::{
    collections::{BTreeMap, HashMap},
    sync::Arc,
    time::Duration,
};

use gannet_proto::control::{Rule, condition};

use super::rate::Bucket;
use crate::rules::{
    RuleId, WatchedRule, capture_cooldown, capture_duration, condition_name, max_concurrent_captures,
};

/// Captures of one rule: so many at once, and one more each so often.
const OF_RULE: (u32, Duration) = (10, Duration::from_secs(10));
/// Of one spot, whatever rule starts them.
const OF_SPOT: (u32, Duration) = (5, Duration::from_secs(20));
/// Of the node.
const OF_NODE: (u32, Duration) = (20, Duration::from_secs(3));
/// Spots that are remembered; those that rest longest are forgotten.
const SPOTS: usize = 4096;

/// Where a condition is watched, and whom a capture is for.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum Spot {
    /// The node: all that the rule matches.
    Node,
    /// A container or pod, by the id of its control group.
    Group(u64),
}

/// How a condition stands.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Level {
    /// It holds; with what was seen.
    High(String),
    /// Below the threshold, but not so far that it counts as over: hysteresis.
    Between,
    /// It does not hold.
    Low,
}

/// What a sensor saw.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Observation {
    /// Whose condition.
    pub rule: RuleId,
    /// Which of its conditions.
    pub condition: usize,
    /// Where.
    pub spot: Spot,
    /// What.
    pub level: Level,
}

/// A capture that is to start.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Start {
    /// Of which rule.
    pub rule: RuleId,
    /// For whom.
    pub spot: Spot,
    /// The condition's name.
    pub kind: &'static str,
    /// What was seen.
    pub evidence: String,
    /// For how long.
    pub duration: Duration,
}

/// What held captures back, since the start.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Held {
    /// The spot rested.
    pub cooldown: u64,
    /// The rule had as many as it may.
    pub max_concurrent: u64,
    /// A token bucket was empty.
    pub budget: u64,
}

/// All rules with conditions.
pub struct Triggers {
    rules: BTreeMap<RuleId, RuleState>,
    node: Bucket,
    spots: HashMap<Spot, Bucket>,
    held: Held,
}

struct RuleState {
    rule: Arc<Rule>,
    bucket: Bucket,
    spots: HashMap<Spot, SpotState>,
    /// By number of the condition: when a schedule starts its next capture.
    schedules: BTreeMap<usize, Duration>,
}

#[derive(Clone, Debug, Default)]
struct SpotState {
    /// By number of the condition: since when it holds.
    since: BTreeMap<usize, Duration>,
    running: usize,
    /// No capture before.
    rests_until: Duration,
}

impl Triggers {
    /// Nothing watched.
    pub fn new(now: Duration) -> Self {
        Self {
            rules: BTreeMap::new(),
            node: Bucket::new(OF_NODE.0, OF_NODE.1, now),
            spots: HashMap::new(),
            held: Held::default(),
        }
    }

    /// Watches exactly these. A rule that stays as it was keeps its state.
    pub(crate) fn set_rules(&mut self, watched: &[WatchedRule], now: Duration) {
        let mut former = std::mem::take(&mut self.rules);
        for WatchedRule { rule, .. } in watched {
            let state = match former.remove(&rule.id) {
                Some(state) if state.rule == *rule => state,
                _ => RuleState {
                    rule: Arc::clone(rule),
                    bucket: Bucket::new(OF_RULE.0, OF_RULE.1, now),
                    spots: HashMap::new(),
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

    /// Takes what a sensor saw. Gives the capture that is to start; whoever cannot start it says [`Triggers::ended`].
    pub fn observe(&mut self, observation: &Observation, now: Duration) -> Option<Start> {
        let Observation { rule, condition, spot, level } = observation;
        let state = self.rules.get_mut(rule)?;
        let kind = state.rule.when.get(*condition)?.kind?;
        let at = state.spots.entry(*spot).or_default();
        let evidence = match level {
            Level::Low => {
                at.since.remove(condition);
                return None;
            }
            Level::Between => return None,
            Level::High(evidence) => evidence.clone(),
        };
        let since = *at.since.entry(*condition).or_insert(now);
        if now.saturating_sub(since) < lasting(&kind) {
            return None;
        }
        self.start(rule, *spot, &kind, evidence, now)
    }

    /// Somebody that a rule names has called `execve`.
    pub fn exec(&mut self, rule: &RuleId, spot: Spot, evidence: String, now: Duration) -> Option<Start> {
        let kind = condition::Kind::Exec(condition::Exec {});
        self.start(rule, spot, &kind, evidence, now)
    }

    /// Time has passed. Gives what schedules start.
    pub fn tick(&mut self, now: Duration) -> Vec<Start> {
        let mut due = Vec::new();
        for (id, state) in &mut self.rules {
            for (number, next) in state.schedules.iter_mut().filter(|(_, next)| **next <= now) {
                let Some(kind @ condition::Kind::Schedule(schedule)) =
                    state.rule.when.get(*number).and_then(|when| when.kind.as_ref())
                else {
                    continue;
                };
                let every = length(schedule.every).max(Duration::from_secs(1));
                // What was slept through is not made up for.
                while *next <= now {
                    *next += every;
                }
                due.push((id.clone(), *kind, format!("every {}", humantime::format_duration(every))));
            }
        }
        due.into_iter()
            .filter_map(|(rule, kind, evidence)| self.start(&rule, Spot::Node, &kind, evidence, now))
            .collect()
    }

    fn start(
        &mut self,
        rule: &RuleId,
        spot: Spot,
        kind: &condition::Kind,
        evidence: String,
        now: Duration,
    ) -> Option<Start> {
        self.forget(now);
        let state = self.rules.get_mut(rule)?;
        let running: usize = state.spots.values().map(|at| at.running).sum();
        let at = state.spots.entry(spot).or_default();
        let is_exec = matches!(kind, condition::Kind::Exec(_));
        let is_schedule = matches!(kind, condition::Kind::Schedule(_));
        // Each process is a capture of its own there.
        if at.running > 0 && !is_exec {
            return None;
        }
        if now < at.rests_until && !is_schedule {
            self.held.cooldown += 1;
            return None;
        }
        if running >= max_concurrent_captures(&state.rule) {
            self.held.max_concurrent += 1;
            return None;
        }
        let of_spot = self.spots.entry(spot).or_insert_with(|| Bucket::new(OF_SPOT.0, OF_SPOT.1, now));
        // All three or none.
        if !(state.bucket.has(now) && of_spot.has(now) && self.node.has(now)) {
            self.held.budget += 1;
            return None;
        }
        state.bucket.take(now);
        of_spot.take(now);
        self.node.take(now);
        at.running += 1;
        let duration = match kind {
            condition::Kind::Schedule(schedule) => length(schedule.r#for),
            _ => capture_duration(&state.rule),
        };
        Some(Start { rule: rule.clone(), spot, kind: condition_name(kind), evidence, duration })
    }

    /// A capture is over, or could not be started.
    pub fn ended(&mut self, rule: &str, spot: Spot, exec: bool, now: Duration) {
        let Some(state) = self.rules.get_mut(rule) else { return };
        let Some(at) = state.spots.get_mut(&spot) else { return };
        at.running = at.running.saturating_sub(1);
        // Who is armed at exec rests only if the rule says so: the next process is another one.
        let says_so = state.rule.capture.as_ref().is_some_and(|capture| capture.cooldown.is_some());
        if !exec || says_so {
            at.rests_until = now + capture_cooldown(&state.rule);
        }
    }

    /// What held captures back.
    pub fn held(&self) -> Held {
        self.held
    }

    /// Bounds what is remembered.
    fn forget(&mut self, now: Duration) {
        if self.spots.len() > SPOTS {
            self.spots.retain(|_, bucket| !bucket.is_full(now));
        }
        for state in self.rules.values_mut().filter(|state| state.spots.len() > SPOTS) {
            state.spots.retain(|_, at| at.running > 0 || at.rests_until > now);
        }
    }
}

/// For how long a condition must hold.
fn lasting(kind: &condition::Kind) -> Duration {
    match kind {
        condition::Kind::CpuUsage(usage) => length(usage.r#for),
        condition::Kind::Throttled(throttled) => length(throttled.r#for),
        _ => Duration::ZERO,
    }
}

fn length<T>(given: Option<T>) -> Duration
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

    const SPOT: Spot = Spot::Group(7);

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

    fn seen(spot: Spot, level: Level) -> Observation {
        Observation { rule: "r".into(), condition: 0, spot, level }
    }

    fn high(spot: Spot) -> Observation {
        seen(spot, Level::High("much".into()))
    }

    fn at(seconds: u64) -> Duration {
        Duration::from_secs(seconds)
    }

    /// Runs second by second with the condition held all the time; gives when captures started.
    fn sustained(triggers: &mut Triggers, seconds: u64) -> Vec<u64> {
        let mut starts = Vec::new();
        let mut ends = None;
        for second in 0..seconds {
            if ends == Some(second) {
                triggers.ended("r", SPOT, false, at(second));
                ends = None;
            }
            if let Some(start) = triggers.observe(&high(SPOT), at(second)) {
                starts.push(second);
                ends = Some(second + start.duration.as_secs());
            }
        }
        starts
    }

    #[test]
    fn sustained_pressure_makes_captures_spaced_by_the_cooldown_and_no_more() {
        let mut triggers = triggers(PRESSURE);
        assert_eq!(sustained(&mut triggers, 300), [0, 70, 140, 210, 280]);
        assert!(triggers.held().cooldown > 0);
    }

    #[test]
    fn use_must_last_and_a_short_dip_does_not_count() {
        let mut triggers = triggers(USAGE);
        assert_eq!(triggers.observe(&high(SPOT), at(0)), None);
        assert_eq!(triggers.observe(&high(SPOT), at(4)), None);
        assert_eq!(triggers.observe(&seen(SPOT, Level::Between), at(4)), None, "a dip within the hysteresis");
        assert!(triggers.observe(&high(SPOT), at(5)).is_some());
        triggers.ended("r", SPOT, false, at(15));
        triggers.observe(&seen(SPOT, Level::Low), at(70));
        assert_eq!(triggers.observe(&high(SPOT), at(80)), None, "it was over in between");
        assert!(triggers.observe(&high(SPOT), at(85)).is_some());
    }

    #[test]
    fn a_rule_has_no_more_captures_at_a_time_than_it_may() {
        let mut triggers = triggers(PRESSURE);
        let started: Vec<bool> =
            (1..=4).map(|id| triggers.observe(&high(Spot::Group(id)), at(0)).is_some()).collect();
        assert_eq!(started, [true, true, false, false]);
        assert_eq!(triggers.held().max_concurrent, 2);
        triggers.ended("r", Spot::Group(1), false, at(10));
        assert!(triggers.observe(&high(Spot::Group(1)), at(10)).is_none(), "rests");
        assert!(triggers.observe(&high(Spot::Group(3)), at(10)).is_some());
    }

    #[test]
    fn a_schedule_starts_on_time_and_makes_nothing_up() {
        let mut triggers = triggers("    when: [{schedule: {every: 10m, for: 30s}}]\n");
        let starts = triggers.tick(at(0));
        assert_eq!((starts.len(), starts[0].duration, starts[0].spot), (1, at(30), Spot::Node));
        triggers.ended("r", Spot::Node, false, at(30));
        assert_eq!(triggers.tick(at(599)), []);
        assert_eq!(triggers.tick(at(600)).len(), 1, "the cooldown does not hold a schedule back");
        triggers.ended("r", Spot::Node, false, at(630));
        assert_eq!(triggers.tick(at(6000)).len(), 1);
        triggers.ended("r", Spot::Node, false, at(6030));
        assert_eq!(triggers.tick(at(6031)), []);
    }

    #[test]
    fn a_rule_that_stays_keeps_its_state_and_one_that_changed_begins_anew() {
        let mut triggers = triggers(PRESSURE);
        assert!(triggers.observe(&high(SPOT), at(0)).is_some());
        let rule = Arc::clone(&triggers.rules["r"].rule);
        triggers.set_rules(&[WatchedRule { rule: Arc::clone(&rule), slots: 1, at_exec: None }], at(1));
        assert!(triggers.observe(&high(SPOT), at(1)).is_none(), "one runs");
        let other = Arc::new(Rule { priority: 1, ..(*rule).clone() });
        triggers.set_rules(&[WatchedRule { rule: other, slots: 1, at_exec: None }], at(2));
        assert!(triggers.observe(&high(SPOT), at(2)).is_some());
        triggers.set_rules(&[], at(3));
        assert!(triggers.observe(&high(SPOT), at(3)).is_none());
    }

    proptest! {
        #[test]
        fn whatever_is_seen_the_budgets_hold(
            steps in prop::collection::vec((0_u64..3, 0_u64..3000), 1..400)
        ) {
            let mut triggers = triggers("    when: [{exec: {}}]\n    capture: {duration: 1s, max_concurrent: 3}\n");
            let (mut now, mut started, mut running) = (Duration::ZERO, 0_u128, Vec::new());
            for (spot, pause) in steps {
                now += Duration::from_millis(pause);
                running.retain(|(end, spot)| {
                    if *end <= now { triggers.ended("r", *spot, true, now); }
                    *end > now
                });
                if triggers.exec(&"r".to_owned(), Spot::Group(spot), "ran".into(), now).is_some() {
                    started += 1;
                    running.push((now + Duration::from_secs(1), Spot::Group(spot)));
                }
                prop_assert!(running.len() <= 3);
                prop_assert!(started <= u128::from(OF_RULE.0) + now.as_nanos() / OF_RULE.1.as_nanos());
            }
        }
    }
}
