//! Captures: which conditions the sensors watch, which captures run, and when each is over.
//!
//! The triggers decide when a capture starts. This owner answers with [`CaptureAction`]s; the worker carries them out, since
//! beginning and ending a capture changes rules, kernel and window.

mod at_exec;

use std::{
    collections::{BTreeMap, BTreeSet, HashMap},
    path::PathBuf,
    sync::Arc,
    time::{Duration, Instant},
};

use gannet_proto::control::{Capture, Match, capture, condition};
use tokio::sync::oneshot;
use ulid::Ulid;

use self::at_exec::{AtExec, Candidate, Grant};
use crate::{
    cgroup::{self, container_part, pod_part},
    conditions::{CaptureStart, SensorTask, Sensors, SuppressedStarts, Triggers, WatchScope},
    model::{ImageKey, Sample},
    process::{Process, ProcessTable},
    profile::slots,
    rules::{CaptureId, CaptureReason, CaptureTarget, RuleBook, RuleId, WatchedRule},
};

/// How long a capture that has ended waits for the unwind tables of its last samples. A short capture of a large program
/// has no others.
const LAST_SAMPLES_TIMEOUT: Duration = Duration::from_secs(8);

/// A capture that a client asks for, instead of a rule.
#[derive(Clone, Debug)]
pub struct ManualCapture {
    /// The processes to sample.
    pub matches: Match,
    /// Samples a second and CPU.
    pub hz: u32,
    /// The kinds of samples: on-CPU, off-CPU.
    pub kinds: Vec<capture::Kind>,
    /// How long the capture runs.
    pub duration: Duration,
    /// The client that asked, human-readable. The profiles carry it as evidence.
    pub evidence: String,
}

impl ManualCapture {
    /// Returns the capture that a rule would ask for, and why it runs.
    pub(super) fn to_capture(&self) -> (Capture, CaptureReason) {
        let capture = Capture {
            hz: self.hz,
            kind: self.kinds.iter().map(|kind| (*kind).into()).collect(),
            duration: self.duration.try_into().ok(),
            ..Capture::default()
        };
        (capture, CaptureReason { kind: "manual", evidence: self.evidence.clone() })
    }
}

/// A capture that runs. It runs to its end even if this is dropped.
#[derive(Debug)]
pub struct RunningCapture {
    /// Its number, which its profiles carry in [`crate::profile::RuleTag::capture`].
    pub capture: u64,
    /// Receives a value when the capture is over and the sink has its last window: the id of the newest window, `None` if
    /// there was none.
    pub over: oneshot::Receiver<Option<Ulid>>,
}

/// A step that the worker has to take for a capture.
#[derive(Debug, PartialEq, Eq)]
pub(super) enum CaptureAction {
    /// Begin a capture.
    Begin(CaptureStart),
    /// Take a rule off an image: its capture is over, or is refused.
    Refuse { key: ImageKey, slot: u32 },
    /// Show with the rules which of their conditions the sensors cannot watch, in place of what was shown before.
    ShowFaults(BTreeMap<RuleId, String>),
}

/// A process that matches a rule at `execve`, or the child of one.
pub(super) struct Matched<'a> {
    pub(super) key: ImageKey,
    pub(super) cgroup_id: u64,
    /// The rules that it matches, exec conditions or not.
    pub(super) rules: u64,
    /// The rules about which the agent must decide: it matches all that the BPF programs compare.
    pub(super) candidates: u64,
    /// The parent's thread group id, if it was forked.
    pub(super) parent: Option<u32>,
    /// The path given to `execve`.
    pub(super) path: &'a str,
}

pub(super) struct Captures {
    triggers: Triggers,
    /// `None` in tests.
    sensors: Option<Sensors>,
    watched: Vec<WatchedRule>,
    /// Paths of the watched control groups, by id.
    groups: HashMap<u64, String>,
    running: HashMap<CaptureId, Running>,
    at_exec: AtExec,
    /// Root of the hierarchy whose control groups tell processes apart.
    root: Option<PathBuf>,
}

struct Running {
    rule: RuleId,
    scope: WatchScope,
    /// Of a client that waits for the end.
    over: Option<oneshot::Sender<Option<Ulid>>>,
    /// When it was first seen to have ended.
    ended: Option<Instant>,
}

impl Captures {
    pub(super) fn new(root: Option<PathBuf>, sensors: Option<Sensors>, now: Duration) -> Self {
        Self {
            triggers: Triggers::new(now),
            sensors,
            watched: Vec::new(),
            groups: HashMap::new(),
            running: HashMap::new(),
            at_exec: AtExec::default(),
            root,
        }
    }

    /// Sets the live rules with conditions.
    pub(super) fn set_rules(&mut self, watched: Vec<WatchedRule>, now: Duration) {
        self.triggers.set_rules(&watched, now);
        let at_exec = watched.iter().filter_map(|watched| watched.at_exec);
        self.at_exec.set_slots(at_exec.fold(0, |bits, slot| bits | 1 << slot));
        self.watched = watched;
    }

    /// Tells the sensors which conditions to watch for the processes that run now.
    pub(super) fn watch(&mut self, processes: &ProcessTable) {
        let tasks = self.tasks(processes);
        let scopes =
            tasks.iter().map(|task| task.scope).chain(self.running.values().map(|running| running.scope));
        let in_use: BTreeSet<u64> = scopes.filter_map(group_id).collect();
        self.groups.retain(|id, _| in_use.contains(id));
        if let Some(sensors) = &self.sensors {
            sensors.watch(tasks);
        }
    }

    /// Returns each condition of each rule once for each scope where a process of the rule runs.
    fn tasks(&mut self, processes: &ProcessTable) -> Vec<SensorTask> {
        let mut tasks: BTreeMap<(RuleId, usize, WatchScope), SensorTask> = BTreeMap::new();
        let mut add = |rule: &RuleId, condition, kind, scope, member| {
            tasks.entry((rule.clone(), condition, scope)).or_insert_with(|| SensorTask {
                rule: rule.clone(),
                condition,
                kind,
                scope,
                member,
            });
        };
        for watched in &self.watched {
            let rule = &watched.rule;
            let conditions = rule.when.iter().enumerate();
            for (number, kind) in conditions.filter_map(|(number, when)| Some((number, when.kind.as_ref()?)))
            {
                let part = match watched_part(kind) {
                    WatchedPart::Nothing => continue,
                    WatchedPart::Node => {
                        add(&rule.id, number, *kind, WatchScope::Node, 0);
                        continue;
                    }
                    WatchedPart::Group(part) => part,
                };
                for process in processes.alive().filter(|process| is_watched(process, watched.slots)) {
                    let path = part(&process.cgroup);
                    let Some(id) = group_of(process, path, self.root.as_ref()) else { continue };
                    self.groups.entry(id).or_insert_with(|| path.to_owned());
                    add(&rule.id, number, *kind, WatchScope::Group(id), process.key.process.tgid);
                }
            }
        }
        tasks.into_values().collect()
    }

    /// Returns the captures that schedules and conditions start now.
    pub(super) fn due(&mut self, now: Duration) -> Vec<CaptureAction> {
        let mut actions: Vec<_> = self.triggers.tick(now).into_iter().map(CaptureAction::Begin).collect();
        for report in self.sensors.iter().flat_map(Sensors::reports) {
            actions.push(CaptureAction::ShowFaults(report.faults));
            let starts = report.observations.iter().filter_map(|seen| self.triggers.observe(seen, now));
            actions.extend(starts.map(CaptureAction::Begin));
        }
        actions
    }

    /// A capture of a rule, or of a client, has begun.
    pub(super) fn begun(
        &mut self,
        capture: CaptureId,
        rule: RuleId,
        scope: WatchScope,
        over: Option<oneshot::Sender<Option<Ulid>>>,
    ) {
        self.running.insert(capture, Running { rule, scope, over, ended: None });
    }

    /// A capture that a trigger started could not begin.
    pub(super) fn not_begun(&mut self, rule: &str, scope: WatchScope, now: Duration) {
        self.triggers.ended(rule, scope, false, now);
    }

    /// Reports whether a capture has ended that is not finished. `running` are those that have not ended, be it by time,
    /// with their rule, or by the governor.
    pub(super) fn has_ended(&self, running: &BTreeSet<CaptureId>) -> bool {
        self.running.keys().any(|id| !running.contains(id))
    }

    /// Returns the captures that have ended and can be finished: no sample of theirs `is_awaited` any more, or that takes
    /// too long.
    pub(super) fn ended(
        &mut self,
        running: &BTreeSet<CaptureId>,
        is_awaited: impl Fn(CaptureId) -> bool,
        now: Instant,
    ) -> Vec<CaptureId> {
        let mut ended = Vec::new();
        for (id, capture) in self.running.iter_mut().filter(|(id, _)| !running.contains(id)) {
            let since = *capture.ended.get_or_insert(now);
            if !is_awaited(*id) || now.duration_since(since) >= LAST_SAMPLES_TIMEOUT {
                ended.push(*id);
            }
        }
        ended
    }

    /// Finishes captures: their last samples are in `window` or before, and the sink has it.
    pub(super) fn finish(&mut self, captures: &[CaptureId], window: Option<Ulid>, now: Duration) {
        for Running { rule, scope, over, ended: _ } in
            captures.iter().filter_map(|id| self.running.remove(id))
        {
            tracing::info!(rule, "a capture is over");
            self.triggers.ended(&rule, scope, false, now);
            if let Some(over) = over {
                // The client may have gone.
                let _ = over.send(window);
            }
        }
    }

    /// Returns the processes that a capture is for, of those that its rule matches.
    pub(super) fn target(
        &self,
        rule: &RuleId,
        scope: WatchScope,
        rules: &RuleBook,
        processes: &ProcessTable,
    ) -> CaptureTarget {
        let WatchScope::Group(id) = scope else { return CaptureTarget::All };
        let watched = self.watched.iter().find(|watched| watched.rule.id == *rule);
        // A rule over pods may select some of a pod's containers only.
        if let (Some(watched), Some(path)) = (watched, self.groups.get(&id))
            && rules.slots().uses_pods(rule)
        {
            let members = processes
                .alive()
                .filter(|process| process.rules & watched.slots != 0 && is_within(&process.cgroup, path));
            let ids = members
                .filter_map(|process| group_of(process, container_part(&process.cgroup), self.root.as_ref()));
            return CaptureTarget::Groups(ids.collect());
        }
        CaptureTarget::Groups(BTreeSet::from([id]))
    }

    /// Reports whether a recorded sample belongs to a capture at this scope.
    pub(super) fn is_at(&self, scope: WatchScope, sample: &Sample, processes: &ProcessTable) -> bool {
        let path = group_id(scope).and_then(|id| self.groups.get(&id));
        path.is_none_or(|path| {
            processes
                .get(&ImageKey::of(&sample.subject))
                .is_some_and(|process| is_within(&process.cgroup, path))
        })
    }

    /// Grants or refuses a process what it matches at `execve`, or inherits. `may_begin`: captures are not refused now.
    pub(super) fn matched(
        &mut self,
        process: &Matched<'_>,
        may_begin: bool,
        now: Duration,
    ) -> Vec<CaptureAction> {
        let Matched { key, cgroup_id, rules, candidates, parent, path } = *process;
        let tgid = key.process.tgid;
        if parent.is_none() {
            self.left(tgid, now);
        }
        let rules = self.at_exec.of(rules);
        let candidates = self.at_exec.of(candidates) & !rules;
        let mut actions = Vec::new();
        for slot in slots(rules) {
            let grant = match parent {
                _ if self.at_exec.has_grant(tgid) => None,
                Some(parent) => self.at_exec.inherited(parent, slot, key),
                None if may_begin => self.grant(slot, key, cgroup_id, path, false, now),
                None => None,
            };
            match grant {
                Some(grant) => self.at_exec.insert(grant),
                None => actions.push(CaptureAction::Refuse { key, slot }),
            }
        }
        match parent {
            None => {
                let (path, since) = (path.to_owned(), Instant::now());
                self.at_exec.add_candidate(Candidate { key, rules: candidates, cgroup_id, path, since });
            }
            // The mark of its parent may be newer than the child.
            Some(parent) => {
                let inherited = slots(candidates).find_map(|slot| self.at_exec.inherited(parent, slot, key));
                if let Some(grant) = inherited.filter(|_| !self.at_exec.has_grant(tgid)) {
                    self.at_exec.insert(grant);
                }
            }
        }
        actions
    }

    /// Returns the rules about which the agent decides for an image, of these candidates: a rule with an exec condition is for
    /// processes that call `execve` under it, and their children.
    pub(super) fn open(&mut self, key: ImageKey, candidates: u64) -> u64 {
        self.at_exec.open(key, candidates)
    }

    /// Grants or refuses what the agent has found a process to match. Returns the refused rules.
    pub(super) fn matched_by_agent(
        &mut self,
        key: ImageKey,
        rules: u64,
        may_begin: bool,
        now: Duration,
    ) -> u64 {
        let Some(candidate) = self.at_exec.take_candidate(key, rules) else { return 0 };
        let mut refused = 0;
        for slot in slots(candidate.rules) {
            let has_room = may_begin && !self.at_exec.has_grant(key.process.tgid);
            let grant =
                has_room.then(|| self.grant(slot, key, candidate.cgroup_id, &candidate.path, true, now));
            match grant.flatten() {
                Some(grant) => self.at_exec.insert(grant),
                None => refused |= 1 << slot,
            }
        }
        refused
    }

    fn grant(
        &mut self,
        slot: u32,
        key: ImageKey,
        cgroup_id: u64,
        path: &str,
        by_agent: bool,
        now: Duration,
    ) -> Option<Grant> {
        let watched = self.watched.iter().find(|watched| watched.at_exec == Some(slot))?;
        let (rule, scope) = (Arc::clone(&watched.rule), WatchScope::Group(cgroup_id));
        let evidence = format!("{path} as process {}", key.process.tgid);
        let start = self.triggers.exec(&rule.id, scope, evidence, now)?;
        Some(Grant::leader(key, slot, start.rule, scope, start.duration, by_agent))
    }

    /// The rules have changed. The kernel reports again which processes they want, but none that wait for an exec condition.
    pub(super) fn begin_round(&mut self) {
        self.at_exec.begin_round();
    }

    /// Returns the images with a capture that began at their `execve`, or that may begin one, about which the agent has not
    /// decided since the rules changed.
    pub(super) fn undecided(&self) -> Vec<ImageKey> {
        self.at_exec.undecided()
    }

    /// A process has ended or replaced its image, and with it the capture that began at its `execve`.
    pub(super) fn left(&mut self, tgid: u32, now: Duration) {
        if let Some(grant) = self.at_exec.remove(tgid) {
            self.end_grant(&grant, now);
        }
    }

    /// Ends the captures of processes whose time is over.
    pub(super) fn end_due_at_exec(&mut self, clock: Instant, now: Duration) -> Vec<CaptureAction> {
        let due = self.at_exec.take_due(clock);
        for grant in &due {
            self.end_grant(grant, now);
        }
        due.into_iter().map(|grant| CaptureAction::Refuse { key: grant.key, slot: grant.slot }).collect()
    }

    fn end_grant(&mut self, grant: &Grant, now: Duration) {
        if grant.is_leader {
            self.triggers.ended(&grant.rule, grant.scope, true, now);
        }
    }

    /// Takes the rules off a sample whose capture is over or refused.
    pub(super) fn strip(&mut self, sample: &mut Sample) {
        self.at_exec.strip(sample);
    }

    /// Counts the rules that were taken off samples.
    pub(super) fn strays(&self) -> u64 {
        self.at_exec.strays()
    }

    /// Counts the captures that triggers did not start, by reason.
    pub(super) fn suppressed(&self) -> SuppressedStarts {
        self.triggers.suppressed()
    }

    /// Counts the conditions in scopes that the sensors do not watch, because there are too many.
    pub(super) fn unwatched(&self) -> u64 {
        self.sensors.as_ref().map_or(0, Sensors::unwatched)
    }

    /// Counts the sensor reports that came faster than the worker took them.
    pub(super) fn dropped_reports(&self) -> u64 {
        self.sensors.as_ref().map_or(0, Sensors::dropped)
    }
}

/// The part of the node at which the sensors watch a condition.
enum WatchedPart {
    /// They do not: exec events and the clock tell.
    Nothing,
    Node,
    /// At the group of this part of a process's control group path.
    Group(fn(&str) -> &str),
}

fn watched_part(kind: &condition::Kind) -> WatchedPart {
    match kind {
        condition::Kind::Pressure(pressure) => match pressure.scope() {
            condition::pressure::Scope::Node => WatchedPart::Node,
            condition::pressure::Scope::Pod => WatchedPart::Group(pod_part),
            _ => WatchedPart::Group(container_part),
        },
        condition::Kind::CpuUsage(_) | condition::Kind::Throttled(_) => WatchedPart::Group(container_part),
        condition::Kind::Exec(_) | condition::Kind::Schedule(_) => WatchedPart::Nothing,
    }
}

fn is_watched(process: &Process, slots: u64) -> bool {
    process.rules & slots != 0 && process.is_alive() && !process.kernel_thread
}

/// Returns the id of the control group at `path`, which is a process's own or above it.
fn group_of(process: &Process, path: &str, root: Option<&PathBuf>) -> Option<u64> {
    if path == process.cgroup {
        return Some(process.cgroup_id);
    }
    cgroup::id_of(&cgroup::directory(root?, path))
}

fn group_id(scope: WatchScope) -> Option<u64> {
    match scope {
        WatchScope::Group(id) => Some(id),
        WatchScope::Node => None,
    }
}

/// Reports whether a control group is `group`, or lies within it.
fn is_within(path: &str, group: &str) -> bool {
    group == "/" || path.strip_prefix(group).is_some_and(|rest| rest.is_empty() || rest.starts_with('/'))
}

#[cfg(test)]
mod tests;
