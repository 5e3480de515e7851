//! The engine's part in captures: it says where conditions are to be watched, starts what the triggers decide, and ends
//! everything in time.

use std::{
    collections::{BTreeMap, BTreeSet, HashMap},
    path::PathBuf,
    sync::Arc,
    time::{Duration, Instant, SystemTime},
};

use gannet_proto::control::{Capture, Match, capture, condition};
use tokio::sync::oneshot;
use ulid::Ulid;

use super::{LAST_WAIT, Worker};
use crate::{
    cgroup::{self, CgroupHierarchy, container_part, pod_part},
    conditions::{CaptureStart, SensorTask, Sensors, Triggers, WatchScope},
    kernel::{SamplingMark, Want},
    model::{Image, ImageKey, Sample, Subject, boot_time},
    process::Process,
    profile::{Recorder, WindowSamples, slots},
    rules::{CaptureError, CaptureId, CaptureReason, CaptureTarget, RuleId, WatchedRule},
};

/// Memory of the flight recorder.
pub(super) const RECORDER_BYTES: usize = 16 << 20;

/// A capture that somebody asks for by hand.
#[derive(Clone, Debug)]
pub struct Manual {
    /// Whom.
    pub matches: Match,
    /// Samples a second and CPU.
    pub hz: u32,
    /// What.
    pub kinds: Vec<capture::Kind>,
    /// How long.
    pub duration: Duration,
    /// Who asked, for the profile.
    pub evidence: String,
}

/// A capture that runs. It goes on to its end whether this is kept or not.
#[derive(Debug)]
pub struct RunningCapture {
    /// Its number: [`crate::profile::RuleTag::capture`] of its profiles.
    pub capture: u64,
    /// Answered when it is over and its last window is with the sink: with the name of the newest window, if there was any.
    pub over: oneshot::Receiver<Option<Ulid>>,
}

/// Where finished samples go: to the window, or to the flight recorder.
pub(super) struct Intake {
    pub(super) samples: WindowSamples,
    pub(super) recorder: Recorder,
    /// The places whose samples are for the recorder.
    pub(super) recorded: u64,
}

impl Intake {
    pub(super) fn new() -> Self {
        Self { samples: WindowSamples::default(), recorder: Recorder::new(RECORDER_BYTES), recorded: 0 }
    }

    pub(super) fn add(&mut self, sample: Sample) {
        if let Some(sample) = self.record(sample) {
            self.samples.add(sample);
        }
    }

    /// A sample of an image as it was before another file took the place of one of its files.
    pub(super) fn add_former(&mut self, image: &Arc<Image>, sample: Sample) {
        if let Some(sample) = self.record(sample) {
            self.samples.add_former(image, sample);
        }
    }

    /// Gives the recorder what is for it, and back what is for the window.
    fn record(&mut self, mut sample: Sample) -> Option<Sample> {
        let recorded = sample.subject.rules & self.recorded;
        if recorded != 0 {
            let mut copy = sample.clone();
            copy.subject.rules = recorded;
            self.recorder.add(copy);
        }
        sample.subject.rules &= !recorded;
        (sample.subject.rules != 0).then_some(sample)
    }
}

/// What runs, and what is watched.
pub(super) struct Captures {
    pub(super) triggers: Triggers,
    pub(super) sensors: Option<Sensors>,
    watched: Vec<WatchedRule>,
    /// Paths of the control groups that are watched, by id.
    groups: HashMap<u64, String>,
    running: HashMap<CaptureId, Running>,
    /// Processes that were armed at exec, by thread group id.
    at_exec: HashMap<u32, AtExec>,
    /// The places of exec conditions.
    at_exec_slots: u64,
    /// Rules that are over for an image, by thread group id.
    refused: HashMap<u32, (ImageKey, u64)>,
    /// Samples of rules that were refused: taken before the kernel side heard of it.
    pub(super) strays: u64,
    /// Where the hierarchy that groups are told apart by is.
    root: Option<PathBuf>,
    /// Why no captures start, if so.
    pub(super) governed: Option<String>,
}

struct Running {
    rule: RuleId,
    scope: WatchScope,
    over: Option<oneshot::Sender<Option<Ulid>>>,
    /// Since when nothing is sampled for it any more.
    retired: Option<Instant>,
}

struct AtExec {
    key: ImageKey,
    slot: u32,
    rule: RuleId,
    scope: WatchScope,
    ends: Instant,
    /// It called `execve` itself; its children are part of the same capture.
    leader: bool,
}

impl Captures {
    pub(super) fn new(hierarchy: CgroupHierarchy, sensors: Option<Sensors>) -> Self {
        Self {
            triggers: Triggers::new(boot_time()),
            sensors,
            watched: Vec::new(),
            groups: HashMap::new(),
            running: HashMap::new(),
            at_exec: HashMap::new(),
            at_exec_slots: 0,
            refused: HashMap::new(),
            strays: 0,
            root: cgroup::mount_of(hierarchy.controller()),
            governed: None,
        }
    }

    /// The rules that are over for an image.
    pub(super) fn refused(&self, key: &ImageKey) -> u64 {
        self.refused.get(&key.process.tgid).filter(|(of, _)| of == key).map_or(0, |(_, bits)| *bits)
    }

    /// Takes off a sample what nobody wants any more.
    pub(super) fn strip(&mut self, sample: &mut Sample) {
        let at_exec = sample.subject.rules & self.at_exec_slots;
        if at_exec == 0 {
            return;
        }
        let granted = self
            .at_exec
            .get(&sample.subject.key.tgid)
            .filter(|granted| granted.key == ImageKey::of(&sample.subject))
            .map_or(0, |granted| 1 << granted.slot);
        self.strays += u64::from((at_exec & !granted).count_ones());
        sample.subject.rules &= !(at_exec & !granted);
    }
}

impl Worker {
    /// The rules have changed: so does what is watched.
    pub(super) fn rules_changed(&mut self, now: SystemTime) {
        let watched = self.rules.slots().watched(now);
        self.captures.triggers.set_rules(&watched, boot_time());
        self.captures.at_exec_slots =
            watched.iter().filter_map(|watched| watched.at_exec).fold(0, |bits, slot| bits | 1 << slot);
        let live = self.captures.at_exec_slots;
        self.captures.at_exec.retain(|_, armed| live >> armed.slot & 1 == 1);
        self.captures.watched = watched;
        let (recorded, lead_up) = self.rules.slots().recorded();
        self.intake.recorded = recorded;
        self.intake.recorder.set_max_age(lead_up);
        self.watch();
    }

    /// Tells the sensors where to look.
    pub(super) fn watch(&mut self) {
        let captures = &mut self.captures;
        let Some(sensors) = &captures.sensors else { return };
        let mut tasks: BTreeMap<(RuleId, usize, WatchScope), SensorTask> = BTreeMap::new();
        for watched in &captures.watched {
            let rule = &watched.rule;
            for (number, kind) in
                rule.when.iter().enumerate().filter_map(|(number, when)| Some((number, when.kind.as_ref()?)))
            {
                let part: fn(&str) -> &str = match kind {
                    condition::Kind::Pressure(pressure) => match pressure.scope() {
                        condition::pressure::Scope::Node => {
                            let (scope, member) = (WatchScope::Node, 0);
                            let task = SensorTask {
                                rule: rule.id.clone(),
                                condition: number,
                                kind: *kind,
                                scope,
                                member,
                            };
                            tasks.insert((rule.id.clone(), number, scope), task);
                            continue;
                        }
                        condition::pressure::Scope::Pod => pod_part,
                        _ => container_part,
                    },
                    condition::Kind::CpuUsage(_) | condition::Kind::Throttled(_) => container_part,
                    condition::Kind::Exec(_) | condition::Kind::Schedule(_) => continue,
                };
                for process in self.processes.alive().filter(|process| {
                    process.rules & watched.slots != 0 && process.is_alive() && !process.kernel_thread
                }) {
                    let path = part(&process.cgroup);
                    let id = if path == process.cgroup {
                        Some(process.cgroup_id)
                    } else {
                        captures.root.as_ref().and_then(|root| cgroup::id_of(&cgroup::directory(root, path)))
                    };
                    let Some(id) = id else { continue };
                    captures.groups.entry(id).or_insert_with(|| path.to_owned());
                    let scope = WatchScope::Group(id);
                    tasks.entry((rule.id.clone(), number, scope)).or_insert_with(|| SensorTask {
                        rule: rule.id.clone(),
                        condition: number,
                        kind: *kind,
                        scope,
                        member: process.key.process.tgid,
                    });
                }
            }
        }
        let in_use: BTreeSet<u64> = tasks
            .keys()
            .map(|(_, _, scope)| *scope)
            .chain(captures.running.values().map(|running| running.scope))
            .filter_map(|scope| match scope {
                WatchScope::Group(id) => Some(id),
                WatchScope::Node => None,
            })
            .collect();
        captures.groups.retain(|id, _| in_use.contains(id));
        sensors.watch(tasks.into_values().collect());
    }

    /// Starts and ends what is due. Called at each turn.
    pub(super) fn follow_captures(&mut self) {
        let now = boot_time();
        let mut starts = self.captures.triggers.tick(now);
        if let Some(sensors) = &self.captures.sensors {
            for report in sensors.reports() {
                self.rules.set_faults(report.faults);
                for observation in &report.observations {
                    starts.extend(self.captures.triggers.observe(observation, now));
                }
            }
        }
        for start in starts {
            self.start(start);
        }
        self.end_due();
    }

    fn start(&mut self, start: CaptureStart) {
        let CaptureStart { rule, scope, kind, evidence, duration } = start;
        let reason = CaptureReason { kind, evidence };
        let words = format!("{} {}", reason.kind, reason.evidence);
        match self.try_start(&rule, scope, reason, duration) {
            Ok(id) => {
                tracing::info!(rule, "a capture has started: {words}");
                self.note(SystemTime::now(), || format!("capture of {rule} started: {words}"));
                self.captures.running.insert(id, Running { rule, scope, over: None, retired: None });
            }
            Err(error) => {
                tracing::warn!(rule, "a capture did not start ({words}): {error}");
                self.captures.triggers.ended(&rule, scope, false, boot_time());
            }
        }
    }

    fn try_start(
        &mut self,
        rule: &RuleId,
        scope: WatchScope,
        reason: CaptureReason,
        duration: Duration,
    ) -> Result<CaptureId, CaptureError> {
        if let Some(why) = &self.captures.governed {
            return Err(CaptureError::Governed(why.clone()));
        }
        let now = SystemTime::now();
        let target = self.target(rule, scope);
        // What is sampled from here on is of this capture; the window before is whole by itself.
        self.flush();
        let id = self.rules.start_capture(rule, target, reason, Instant::now() + duration, now)?;
        if let Err(error) = self.enforce(now) {
            self.rules.end_capture(id, now);
            return Err(CaptureError::Kernel(error.to_string()));
        }
        self.take_lead_up(rule, scope, id, now);
        Ok(id)
    }

    /// Whom a capture is for.
    fn target(&self, rule: &RuleId, scope: WatchScope) -> CaptureTarget {
        let WatchScope::Group(id) = scope else { return CaptureTarget::All };
        let watched = self.captures.watched.iter().find(|watched| watched.rule.id == *rule);
        let path = self.captures.groups.get(&id);
        // A rule over pods may mean some of a pod's containers only.
        if let (Some(watched), Some(path)) = (watched, path)
            && self.rules.slots().uses_pods(rule)
        {
            let members = self
                .processes
                .alive()
                .filter(|process| process.rules & watched.slots != 0 && within(&process.cgroup, path));
            let ids = members.filter_map(|process| {
                let part = container_part(&process.cgroup);
                if part == process.cgroup {
                    return Some(process.cgroup_id);
                }
                cgroup::id_of(&cgroup::directory(self.captures.root.as_ref()?, part))
            });
            return CaptureTarget::Groups(ids.collect());
        }
        CaptureTarget::Groups(BTreeSet::from([id]))
    }

    /// Puts what the flight recorder has of a capture's processes into its profile.
    fn take_lead_up(&mut self, rule: &RuleId, scope: WatchScope, capture: CaptureId, now: SystemTime) {
        let Some((recorded, lead_up)) = self.rules.slots().pre_trigger(rule) else { return };
        let Some(slot) = self.rules.slots().of_capture(capture) else { return };
        let since = boot_time().saturating_sub(lead_up);
        let path = match scope {
            WatchScope::Node => None,
            WatchScope::Group(id) => self.captures.groups.get(&id),
        };
        let processes = &self.processes;
        let of = |sample: &Sample| {
            path.is_none_or(|path| {
                processes
                    .get(&ImageKey::of(&sample.subject))
                    .is_some_and(|process| within(&process.cgroup, path))
            })
        };
        let since_ns = u64::try_from(since.as_nanos()).unwrap_or(0);
        let samples = self.intake.recorder.since(since_ns, recorded, of);
        let start = now.checked_sub(lead_up).unwrap_or(now);
        self.intake.samples.add_pre_trigger(slot, start, lead_up, samples);
    }

    /// Starts a capture that somebody asks for.
    pub(super) fn start_manual(&mut self, manual: Manual) -> Result<RunningCapture, CaptureError> {
        let Manual { matches, hz, kinds, duration, evidence } = manual;
        if let Some(why) = &self.captures.governed {
            return Err(CaptureError::Governed(why.clone()));
        }
        let now = SystemTime::now();
        let capture = Capture {
            hz,
            kind: kinds.into_iter().map(Into::into).collect(),
            duration: duration.try_into().ok(),
            ..Capture::default()
        };
        let reason = CaptureReason { kind: "manual", evidence };
        self.flush();
        let id = self.rules.start_manual_capture(matches, capture, reason, Instant::now() + duration, now)?;
        if let Err(error) = self.enforce(now) {
            self.rules.end_capture(id, now);
            return Err(CaptureError::Kernel(error.to_string()));
        }
        let (over, ended) = oneshot::channel();
        let running = Running {
            rule: crate::rules::MANUAL_RULE_ID.into(),
            scope: WatchScope::Node,
            over: Some(over),
            retired: None,
        };
        self.captures.running.insert(id, running);
        Ok(RunningCapture { capture: id.number(), over: ended })
    }

    /// Ends what is over by this node's clock.
    fn end_due(&mut self) {
        let clock = Instant::now();
        self.end_at_exec(clock);
        if self.rules.slots().next_capture_end().is_some_and(|end| end <= clock) {
            // While they still have their places: who has come back since, and who is still off the CPU.
            self.read();
            self.add_blocked();
        }
        if self.rules.end_due_captures(clock, SystemTime::now()) {
            self.enforce_or_say();
        }
        self.settle_captures();
    }

    /// Captures whose place is retired, be it by time, with their rule or by the governor, are over: their last samples go
    /// out. Those whose tables are still being made are waited for: of a large program a short capture has no others.
    pub(super) fn settle_captures(&mut self) {
        let running: BTreeSet<CaptureId> = self.rules.slots().running_captures();
        if self.captures.running.keys().all(|id| running.contains(id)) {
            return;
        }
        self.read();
        self.resolve(false);
        let waited_for = self.waited_for();
        let mut over = Vec::new();
        for (id, capture) in self.captures.running.iter_mut().filter(|(id, _)| !running.contains(id)) {
            let retired = *capture.retired.get_or_insert_with(Instant::now);
            let waits = self.rules.slots().of_capture(*id).is_some_and(|slot| waited_for >> slot & 1 == 1);
            if !waits || retired.elapsed() >= LAST_WAIT {
                over.push(*id);
            }
        }
        if over.is_empty() {
            return;
        }
        self.flush();
        for id in over {
            let Some(Running { rule, scope, over, .. }) = self.captures.running.remove(&id) else { continue };
            tracing::info!(rule, "a capture is over");
            self.captures.triggers.ended(&rule, scope, false, boot_time());
            if let Some(over) = over {
                // Who asked may be gone.
                let _ = over.send(self.last_window);
            }
        }
    }

    /// A process was matched at exec, or is the child of one that was.
    pub(super) fn at_exec(&mut self, process: &Process, subject: &Subject, parent: Option<u32>, path: &str) {
        let tgid = process.key.process.tgid;
        if parent.is_none() {
            self.leave_at_exec(tgid);
        }
        let matched = subject.rules & self.captures.at_exec_slots;
        for slot in slots(matched) {
            let inherited = parent
                .and_then(|parent| self.captures.at_exec.get(&parent))
                .filter(|armed| armed.slot == slot)
                .map(|armed| (armed.rule.clone(), armed.scope, armed.ends, false));
            let granted = if parent.is_some() { inherited } else { self.grant(slot, process, path) };
            match granted {
                Some((rule, scope, ends, leader)) if !self.captures.at_exec.contains_key(&tgid) => {
                    let armed = AtExec { key: process.key, slot, rule, scope, ends, leader };
                    self.captures.at_exec.insert(tgid, armed);
                }
                _ => self.refuse(process.key, slot),
            }
        }
    }

    fn grant(
        &mut self,
        slot: u32,
        process: &Process,
        path: &str,
    ) -> Option<(RuleId, WatchScope, Instant, bool)> {
        if self.captures.governed.is_some() {
            return None;
        }
        let rule = self.captures.watched.iter().find(|watched| watched.at_exec == Some(slot))?;
        let (rule, scope) = (Arc::clone(&rule.rule), WatchScope::Group(process.cgroup_id));
        let evidence = format!("{path} as process {}", process.key.process.tgid);
        let start = self.captures.triggers.exec(&rule.id, scope, evidence, boot_time())?;
        Some((rule.id.clone(), scope, Instant::now() + start.duration, true))
    }

    /// A process has ended, or replaced its image: so has what was armed at its exec.
    pub(super) fn leave_at_exec(&mut self, tgid: u32) {
        self.captures.refused.remove(&tgid);
        if let Some(armed) = self.captures.at_exec.remove(&tgid)
            && armed.leader
        {
            self.captures.triggers.ended(&armed.rule, armed.scope, true, boot_time());
        }
    }

    fn end_at_exec(&mut self, clock: Instant) {
        let due: Vec<u32> = self
            .captures
            .at_exec
            .iter()
            .filter(|(_, armed)| armed.ends <= clock)
            .map(|(tgid, _)| *tgid)
            .collect();
        for tgid in due {
            let Some(armed) = self.captures.at_exec.remove(&tgid) else { continue };
            if armed.leader {
                self.captures.triggers.ended(&armed.rule, armed.scope, true, boot_time());
            }
            self.refuse(armed.key, armed.slot);
        }
    }

    /// The kernel side has matched this image for a rule that is over for it.
    fn refuse(&mut self, key: ImageKey, slot: u32) {
        let tgid = key.process.tgid;
        let refused = self.captures.refused(&key) | 1 << slot;
        self.captures.refused.insert(tgid, (key, refused));
        let want = self
            .armed
            .get(&tgid)
            .filter(|arm| arm.key == key.process)
            .map_or(Want::default(), |arm| arm.want);
        self.set_arm(key, want);
    }

    /// Writes what the agent has decided for an image: what it is sampled for, and what is over.
    pub(super) fn set_arm(&mut self, key: ImageKey, want: Want) {
        let tgid = key.process.tgid;
        let refused = self.captures.refused(&key);
        if want.rules == 0 && refused == 0 {
            if self.armed.remove(&tgid).is_some() {
                self.kernel.unmark(tgid);
            }
            return;
        }
        let left = self.processes.get(&key).map_or(0, |process| process.rules) & !refused;
        let period_ns = self.rules.slots().shortest_period_ns(left);
        let arm =
            SamplingMark { key: key.process, exec_id: key.exec_id, sticky: false, want, refused, period_ns };
        if let Err(error) = self.kernel.mark(&arm) {
            tracing::warn!(key = %key.process, "not armed: {error}; raise --processes");
        }
        self.armed.insert(tgid, arm);
    }
}

/// Whether a control group is this one, or lies within it.
fn within(path: &str, group: &str) -> bool {
    group == "/" || path.strip_prefix(group).is_some_and(|rest| rest.is_empty() || rest.starts_with('/'))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_group_holds_what_lies_within_and_not_its_namesakes() {
        assert!(within("/a/b", "/a/b") && within("/a/b/c", "/a/b") && within("/x", "/"));
        assert!(!within("/a/bc", "/a/b") && !within("/a", "/a/b"));
    }
}
