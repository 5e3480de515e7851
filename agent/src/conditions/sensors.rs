//! The sensors' thread. The kernel's own triggers report pressure; the thread measures CPU use and throttling once a second.

use std::{
    collections::BTreeMap,
    io,
    os::fd::{AsFd as _, OwnedFd},
    path::PathBuf,
    sync::{
        Arc,
        atomic::{AtomicBool, AtomicU64, Ordering::Relaxed},
        mpsc::{Receiver, SyncSender, sync_channel},
    },
    thread::{self, JoinHandle},
    time::{Duration, SystemTime},
};

use gannet_proto::control::condition::{self, pressure};
use parking_lot::Mutex;
use rustix::event::{EventfdFlags, PollFd, PollFlags, Timespec, eventfd, poll};

use super::{
    psi::PressureFile,
    stat::GroupCpuStat,
    trigger::{ConditionLevel, Observation, WatchScope},
};
use crate::{
    cgroup::{container_part, directory, mount_of, path_of, pod_part},
    model::boot_time,
    rules::RuleId,
};

/// How often the thread measures all conditions.
const PAUSE: Duration = Duration::from_secs(1);
/// Tasks watched at one time. The others are faults of their rules.
const MAX_TASKS: usize = 512;
/// Reports that wait for the engine, which takes them ten times a second.
const MAX_REPORTS: usize = 64;
/// A condition ends below this share of its threshold.
const HYSTERESIS: f64 = 0.8;

/// One condition of one rule in one scope.
#[derive(Clone, Debug, PartialEq)]
pub(crate) struct SensorTask {
    pub(crate) rule: RuleId,
    /// Index of the condition in the rule.
    pub(crate) condition: usize,
    pub(crate) kind: condition::Kind,
    pub(crate) scope: WatchScope,
    /// Thread group id of a process in the scope. Its control groups lead to the files to read.
    pub(crate) member: u32,
}

/// One round of measurements.
#[derive(Debug, Default)]
pub(crate) struct SensorReport {
    pub(crate) observations: Vec<Observation>,
    /// Conditions that could not be watched, by rule.
    pub(crate) faults: BTreeMap<RuleId, String>,
}

/// The handle of the sensors' thread. Dropping it ends the thread.
pub(crate) struct Sensors {
    shared: Arc<Shared>,
    reports: Receiver<SensorReport>,
    thread: Option<JoinHandle<()>>,
}

struct Shared {
    /// A new list of tasks that the thread has not taken yet.
    tasks: Mutex<Option<Vec<SensorTask>>>,
    /// Wakes the thread.
    wake_up: OwnedFd,
    ended: AtomicBool,
    dropped: AtomicU64,
    /// Tasks of the last list beyond [`MAX_TASKS`].
    unwatched: AtomicU64,
}

impl Sensors {
    /// Starts the thread. It calls `on_report` when a report waits.
    pub(crate) fn start(on_report: impl Fn() + Send + 'static) -> io::Result<Self> {
        let shared = Arc::new(Shared {
            tasks: Mutex::new(None),
            wake_up: eventfd(0, EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK)?,
            ended: AtomicBool::new(false),
            dropped: AtomicU64::new(0),
            unwatched: AtomicU64::new(0),
        });
        let (sender, reports) = sync_channel(MAX_REPORTS);
        let sensors = SensorThread {
            shared: Arc::clone(&shared),
            sender,
            on_report: Box::new(on_report),
            sensors: BTreeMap::new(),
            unwatched: BTreeMap::new(),
        };
        let thread = thread::Builder::new().name("gannet-sensors".into()).spawn(move || sensors.run())?;
        Ok(Self { shared, reports, thread: Some(thread) })
    }

    /// Replaces the list of tasks.
    pub(crate) fn watch(&self, tasks: Vec<SensorTask>) {
        *self.shared.tasks.lock() = Some(tasks);
        self.wake();
    }

    /// Returns the reports since the last call.
    pub(crate) fn reports(&self) -> impl Iterator<Item = SensorReport> + '_ {
        self.reports.try_iter()
    }

    /// Returns how many reports the thread dropped because the queue was full.
    pub(crate) fn dropped(&self) -> u64 {
        self.shared.dropped.load(Relaxed)
    }

    /// Returns how many tasks of the last list the thread does not watch, because there are too many.
    pub(crate) fn unwatched(&self) -> u64 {
        self.shared.unwatched.load(Relaxed)
    }

    fn wake(&self) {
        // The write fails only if the counter is full, and then the thread wakes up anyway.
        let _ = rustix::io::write(&self.shared.wake_up, &1_u64.to_ne_bytes());
    }
}

impl Drop for Sensors {
    fn drop(&mut self) {
        self.shared.ended.store(true, Relaxed);
        self.wake();
        if let Some(thread) = self.thread.take() {
            // The panic hook has already printed a panic of the thread.
            let _ = thread.join();
        }
    }
}

type Key = (RuleId, usize, WatchScope);

struct SensorThread {
    shared: Arc<Shared>,
    sender: SyncSender<SensorReport>,
    on_report: Box<dyn Fn() + Send>,
    sensors: BTreeMap<Key, Sensor>,
    /// The number of tasks of each rule beyond [`MAX_TASKS`].
    unwatched: BTreeMap<RuleId, u64>,
}

struct Sensor {
    task: SensorTask,
    /// Path of the control group, for the evidence; empty for the node.
    path: String,
    measurement: Measurement,
}

enum Measurement {
    Pressure {
        file: PressureFile,
        resource: &'static str,
        line: &'static str,
        last_high: Option<Duration>,
    },
    Cpu {
        cpu: PathBuf,
        cpuacct: Option<PathBuf>,
        former: Option<(GroupCpuStat, Duration)>,
    },
    /// The reason. The next list of tasks tries again.
    Broken(String),
}

impl SensorThread {
    fn run(mut self) {
        let mut last_round = Duration::ZERO;
        while !self.shared.ended.load(Relaxed) {
            let ready = self.wait(PAUSE.saturating_sub(boot_time().saturating_sub(last_round)));
            let tasks = self.shared.tasks.lock().take();
            let changed = tasks.is_some();
            if let Some(tasks) = tasks {
                self.set_tasks(tasks);
            }
            let now = boot_time();
            let all = now.saturating_sub(last_round) >= PAUSE;
            if all {
                last_round = now;
            }
            let mut report = SensorReport::default();
            for (key, sensor) in &mut self.sensors {
                let triggered = ready.contains(key);
                if let Some(level) = sensor.measure(triggered, all, now) {
                    let SensorTask { rule, condition, scope, .. } = &sensor.task;
                    let (rule, condition, scope) = (rule.clone(), *condition, *scope);
                    report.observations.push(Observation { rule, condition, scope, level });
                }
                if let Measurement::Broken(why) = &sensor.measurement {
                    report.faults.insert(sensor.task.rule.clone(), why.clone());
                }
            }
            self.add_unwatched(&mut report.faults);
            if (all || changed || !report.observations.is_empty()) && self.sender.try_send(report).is_err() {
                self.shared.dropped.fetch_add(1, Relaxed);
            } else if !ready.is_empty() {
                (self.on_report)();
            }
        }
    }

    /// Waits for the kernel's triggers, a new list, or the timeout. Returns the sensors whose triggers fired.
    fn wait(&self, timeout: Duration) -> Vec<Key> {
        let mut keys: Vec<&Key> = Vec::new();
        let mut ready = vec![PollFd::new(&self.shared.wake_up, PollFlags::IN)];
        for (key, sensor) in &self.sensors {
            if let Measurement::Pressure { file, .. } = &sensor.measurement
                && let Some(fd) = file.fd()
            {
                keys.push(key);
                ready.push(PollFd::from_borrowed_fd(fd, PollFlags::PRI));
            }
        }
        let timeout = Timespec::try_from(timeout.max(Duration::from_millis(10))).ok();
        // An interruption by a signal has the same effect as a timeout.
        let _ = poll(&mut ready, timeout.as_ref());
        let fired: Vec<Key> = keys
            .into_iter()
            .zip(&ready[1..])
            .filter(|(_, fd)| fd.revents().contains(PollFlags::PRI))
            .map(|(key, _)| key.clone())
            .collect();
        let _ = rustix::io::read(self.shared.wake_up.as_fd(), &mut [0_u8; 8]);
        fired
    }

    /// Keeps the sensors of tasks that stay, and opens those of new tasks.
    fn set_tasks(&mut self, tasks: Vec<SensorTask>) {
        let mut former = std::mem::take(&mut self.sensors);
        let mut tasks = tasks.into_iter();
        for task in tasks.by_ref().take(MAX_TASKS) {
            let key = (task.rule.clone(), task.condition, task.scope);
            let sensor = match former.remove(&key) {
                Some(sensor) if sensor.task.kind == task.kind && !sensor.is_broken() => sensor,
                _ => Sensor::open(task),
            };
            self.sensors.insert(key, sensor);
        }
        let mut unwatched: BTreeMap<RuleId, u64> = BTreeMap::new();
        for task in tasks {
            *unwatched.entry(task.rule).or_default() += 1;
        }
        let former = std::mem::replace(&mut self.unwatched, unwatched);
        let count = self.unwatched.values().sum();
        self.shared.unwatched.store(count, Relaxed);
        if let Some((rule, of_rule)) = self.unwatched.first_key_value()
            && former.is_empty()
        {
            tracing::warn!(
                count,
                rule,
                of_rule,
                "not all conditions are watched: the agent watches {MAX_TASKS} conditions of containers at one time; narrow the \
                 rules' match; /debug/rules shows the rules"
            );
        }
    }

    /// Adds the tasks beyond the limit to the faults of their rules.
    fn add_unwatched(&self, faults: &mut BTreeMap<RuleId, String>) {
        for (rule, count) in &self.unwatched {
            let why = format!(
                "the agent watches {MAX_TASKS} conditions of containers at one time, which leaves out {count} of this rule; narrow \
                 its match"
            );
            let fault = faults.entry(rule.clone()).or_default();
            *fault = if fault.is_empty() { why } else { format!("{fault}; {why}") };
        }
    }
}

impl Sensor {
    fn open(task: SensorTask) -> Self {
        let opened = match &task.kind {
            condition::Kind::Pressure(wanted) => open_pressure(&task, wanted),
            condition::Kind::CpuUsage(_) | condition::Kind::Throttled(_) => open_cpu(&task),
            condition::Kind::Exec(_) | condition::Kind::Schedule(_) => Err("nothing to watch".into()),
        };
        let (path, measurement) = opened.unwrap_or_else(|why| (String::new(), Measurement::Broken(why)));
        Self { task, path, measurement }
    }

    fn is_broken(&self) -> bool {
        matches!(self.measurement, Measurement::Broken(_))
    }

    /// Returns the level of the condition; none if there is nothing new. `triggered`: the kernel reports that the threshold
    /// is exceeded.
    fn measure(&mut self, triggered: bool, all: bool, now: Duration) -> Option<ConditionLevel> {
        if !(triggered || all) {
            return None;
        }
        let outcome = match &mut self.measurement {
            Measurement::Broken(_) => return None,
            Measurement::Pressure { file, resource, line, last_high } => {
                file.measure(now).map_err(|error| error.to_string()).map(|(rate, reached)| {
                    let (_, window) = file.threshold();
                    let threshold = file.threshold_rate();
                    if triggered || reached {
                        *last_high = Some(now);
                        // The file's value may be two seconds old; the trigger is up to date.
                        let rate = if rate < threshold {
                            format!("over {threshold:.1}")
                        } else {
                            format!("{rate:.1}")
                        };
                        let place_and_time = evidence_suffix(&self.path);
                        return Some(ConditionLevel::High(format!(
                            "{resource} {line} {rate} ms/s{place_and_time}"
                        )));
                    }
                    let is_over = last_high.is_none_or(|at| now.saturating_sub(at) > window * 2);
                    Some(if is_over && rate < threshold * HYSTERESIS {
                        ConditionLevel::Low
                    } else {
                        ConditionLevel::Between
                    })
                })
            }
            Measurement::Cpu { cpu, cpuacct, former } => {
                let stat = GroupCpuStat::read(cpu, cpuacct.as_deref());
                stat.map_err(|error| format!("cannot read {}: {error}", cpu.display())).map(|stat| {
                    let (before, at) = former.replace((stat, now))?;
                    let time = now.saturating_sub(at);
                    Some(cpu_level(&self.task.kind, &stat, &before, time, &self.path))
                })
            }
        };
        outcome.unwrap_or_else(|why| {
            // Most likely the group was removed. The next list will not contain it.
            self.measurement = Measurement::Broken(why);
            Some(ConditionLevel::Low)
        })
    }
}

fn cpu_level(
    kind: &condition::Kind,
    stat: &GroupCpuStat,
    before: &GroupCpuStat,
    time: Duration,
    path: &str,
) -> ConditionLevel {
    let (value, threshold, text) = match kind {
        condition::Kind::CpuUsage(wanted) => {
            let used = stat.millicores_since(before, time);
            (used, f64::from(wanted.above_millicores), format!("{used:.0} millicores"))
        }
        condition::Kind::Throttled(wanted) => {
            let percent = stat.throttled_percent_since(before).unwrap_or(0.0);
            (percent, f64::from(wanted.above_percent), format!("{percent:.0} % of the periods"))
        }
        _ => return ConditionLevel::Low,
    };
    if value > threshold {
        ConditionLevel::High(format!("{text}{}", evidence_suffix(path)))
    } else if value > threshold * HYSTERESIS {
        ConditionLevel::Between
    } else {
        ConditionLevel::Low
    }
}

/// Returns time and control group, for the end of an evidence text.
fn evidence_suffix(path: &str) -> String {
    let at = humantime::format_rfc3339_seconds(SystemTime::now());
    if path.is_empty() { format!(" at {at}") } else { format!(" at {at} in {path}") }
}

/// Opens the pressure file of a task. Returns the path of the control group with it.
fn open_pressure(task: &SensorTask, wanted: &condition::Pressure) -> Result<(String, Measurement), String> {
    let resource = match wanted.resource() {
        pressure::Resource::Memory => "memory",
        pressure::Resource::Io => "io",
        _ => "cpu",
    };
    let full = wanted.kind() == pressure::Kind::Full;
    let (path, file) = if task.scope == WatchScope::Node {
        (String::new(), PathBuf::from(format!("/proc/pressure/{resource}")))
    } else {
        let root = mount_of("").ok_or("cgroup2 is not mounted; scope: node works")?;
        let path = path_of(task.member, "").ok_or_else(|| format!("process {} has exited", task.member))?;
        let part =
            if wanted.scope() == pressure::Scope::Pod { pod_part(&path) } else { container_part(&path) };
        if part == "/" {
            return Err("its processes are in the root of cgroup2, which has no pressure of its own; scope: node works"
                .into());
        }
        (part.to_owned(), directory(&root, part).join(format!("{resource}.pressure")))
    };
    let (stall, window) = (Duration::from_micros(wanted.stall_us), Duration::from_micros(wanted.window_us));
    let file =
        PressureFile::open(&file, full, stall, window, boot_time()).map_err(|error| error.to_string())?;
    if file.threshold() != (stall, window) {
        let (stall, window) = file.threshold();
        tracing::info!(
            rule = task.rule,
            "the kernel grants no pressure window of {} ms: the agent watches for {} ms within {} ms instead",
            wanted.window_us / 1000,
            stall.as_millis(),
            window.as_millis()
        );
    }
    let line = if full { "full" } else { "some" };
    Ok((path, Measurement::Pressure { file, resource, line, last_high: None }))
}

/// Finds the files with the CPU use of a task's control group. Returns the path of the control group with them.
fn open_cpu(task: &SensorTask) -> Result<(String, Measurement), String> {
    let path_in = |controller: &str| {
        path_of(task.member, controller).ok_or_else(|| format!("process {} has exited", task.member))
    };
    // With version 1 controllers these have the numbers, otherwise the unified hierarchy has them.
    let (root, path, cpuacct) = if let Some(root) = mount_of("cpu") {
        let cpuacct = mount_of("cpuacct")
            .zip(path_of(task.member, "cpuacct"))
            .map(|(root, path)| directory(&root, container_part(&path)));
        (root, path_in("cpu")?, cpuacct)
    } else {
        let root = mount_of("").ok_or("neither cgroup2 nor the cpu controller is mounted")?;
        (root, path_in("")?, None)
    };
    let part = container_part(&path);
    let cpu = directory(&root, part);
    Ok((part.to_owned(), Measurement::Cpu { cpu, cpuacct, former: None }))
}

#[cfg(test)]
mod tests {
    use std::time::Instant;

    use super::*;

    /// Returns the faults of the first report that has the list of tasks, and the number of tasks that are left out.
    #[track_caller]
    fn watched(sensors: &Sensors, tasks: Vec<SensorTask>, unwatched: u64) -> BTreeMap<RuleId, String> {
        let _ = sensors.reports().count();
        sensors.watch(tasks);
        let until = Instant::now() + Duration::from_secs(60);
        while Instant::now() < until {
            if sensors.unwatched() == unwatched
                && let Some(report) = sensors.reports().last()
            {
                return report.faults;
            }
            thread::sleep(Duration::from_millis(10));
        }
        panic!("{} tasks are left out, not {unwatched}", sensors.unwatched());
    }

    #[test]
    fn conditions_beyond_the_limit_are_faults_of_their_rules() {
        let task = |rule: &str, group: usize| SensorTask {
            rule: rule.into(),
            condition: 0,
            kind: condition::Kind::CpuUsage(condition::CpuUsage { above_millicores: u32::MAX, r#for: None }),
            scope: WatchScope::Group(group as u64),
            member: std::process::id(),
        };
        let tasks = |rule: &'static str, count| (0..count).map(move |group| task(rule, group));
        let sensors = Sensors::start(|| {}).unwrap();
        let all = tasks("a", 500).chain(tasks("b", MAX_TASKS - 500)).chain(tasks("c", 3)).collect();
        let faults = watched(&sensors, all, 3);
        assert!(faults["c"].contains("leaves out 3 of this rule"), "{faults:?}");
        assert!(!faults.contains_key("a") && !faults.contains_key("b"), "{faults:?}");
        let fewer = tasks("a", 500).chain(tasks("b", MAX_TASKS - 500)).collect();
        assert_eq!(watched(&sensors, fewer, 0), BTreeMap::new());
    }
}
