//! The thread that looks: pressure by the kernel's own triggers, CPU use and throttling once a second.

use std::{
    collections::BTreeMap,
    io,
    os::fd::{AsFd as _, OwnedFd},
    path::PathBuf,
    sync::{
        Arc, Mutex, PoisonError,
        atomic::{AtomicBool, AtomicU64, Ordering::Relaxed},
        mpsc::{Receiver, SyncSender, sync_channel},
    },
    thread::{self, JoinHandle},
    time::{Duration, SystemTime},
};

use gannet_proto::control::condition::{self, pressure};
use rustix::event::{EventfdFlags, PollFd, PollFlags, Timespec, eventfd, poll};

use super::{
    psi::Pressure,
    stat::Usage,
    trigger::{Level, Observation, Spot},
};
use crate::{
    cgroup::{container_part, directory, mount_of, path_of, pod_part},
    model::boot_time,
    rules::RuleId,
};

/// How often everything is looked at.
const PAUSE: Duration = Duration::from_secs(1);
/// Spots that are watched at one time, each for one condition; more are counted and said.
const MOST: usize = 512;
/// Reports that wait for the engine; it takes them ten times a second.
const QUEUE: usize = 64;
/// Below this share of its threshold a condition is over.
const HYSTERESIS: f64 = 0.8;

/// One condition of one rule at one spot.
#[derive(Clone, Debug, PartialEq)]
pub struct Task {
    /// Whose condition.
    pub rule: RuleId,
    /// Which of its conditions.
    pub condition: usize,
    /// What is to be watched.
    pub kind: condition::Kind,
    /// Where.
    pub spot: Spot,
    /// A process that is there: its control groups tell where to look.
    pub member: u32,
}

/// What the sensors saw.
#[derive(Debug, Default)]
pub struct Report {
    /// Conditions.
    pub observations: Vec<Observation>,
    /// What could not be watched, by rule; a rule that is not in it is watched.
    pub faults: BTreeMap<RuleId, String>,
}

/// The handle of the thread. Dropping it ends the thread.
pub struct Sensors {
    shared: Arc<Shared>,
    reports: Receiver<Report>,
    thread: Option<JoinHandle<()>>,
}

struct Shared {
    tasks: Mutex<Option<Vec<Task>>>,
    bell: OwnedFd,
    over: AtomicBool,
    dropped: AtomicU64,
}

impl Sensors {
    /// Starts the thread. `ring` is called when there is a report.
    pub fn start(ring: impl Fn() + Send + 'static) -> io::Result<Self> {
        let shared = Arc::new(Shared {
            tasks: Mutex::new(None),
            bell: eventfd(0, EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK)?,
            over: AtomicBool::new(false),
            dropped: AtomicU64::new(0),
        });
        let (sender, reports) = sync_channel(QUEUE);
        let worker =
            Worker { shared: Arc::clone(&shared), sender, ring: Box::new(ring), sensors: BTreeMap::new() };
        let thread = thread::Builder::new().name("gannet-sensors".into()).spawn(move || worker.run())?;
        Ok(Self { shared, reports, thread: Some(thread) })
    }

    /// Watches exactly these from now on.
    pub fn watch(&self, tasks: Vec<Task>) {
        *self.shared.tasks.lock().unwrap_or_else(PoisonError::into_inner) = Some(tasks);
        self.ring();
    }

    /// What was seen since the last call.
    pub fn reports(&self) -> impl Iterator<Item = Report> + '_ {
        self.reports.try_iter()
    }

    /// Reports that were dropped because nobody took them.
    pub fn dropped(&self) -> u64 {
        self.shared.dropped.load(Relaxed)
    }

    fn ring(&self) {
        // A bell that is full rings already.
        let _ = rustix::io::write(&self.shared.bell, &1_u64.to_ne_bytes());
    }
}

impl Drop for Sensors {
    fn drop(&mut self) {
        self.shared.over.store(true, Relaxed);
        self.ring();
        if let Some(thread) = self.thread.take() {
            // A panic there has been printed; there is nothing to add.
            let _ = thread.join();
        }
    }
}

type Key = (RuleId, usize, Spot);

struct Worker {
    shared: Arc<Shared>,
    sender: SyncSender<Report>,
    ring: Box<dyn Fn() + Send>,
    sensors: BTreeMap<Key, Sensor>,
}

struct Sensor {
    task: Task,
    /// Of the group, for people.
    place: String,
    how: How,
}

enum How {
    Pressure {
        pressure: Pressure,
        resource: &'static str,
        line: &'static str,
        last_high: Option<Duration>,
    },
    Usage {
        cpu: PathBuf,
        cpuacct: Option<PathBuf>,
        former: Option<(Usage, Duration)>,
    },
    /// Tried again with the next list.
    Broken(String),
}

impl Worker {
    fn run(mut self) {
        let mut looked = Duration::ZERO;
        while !self.shared.over.load(Relaxed) {
            let ready = self.wait(PAUSE.saturating_sub(boot_time().saturating_sub(looked)));
            let tasks = self.shared.tasks.lock().unwrap_or_else(PoisonError::into_inner).take();
            let changed = tasks.is_some();
            if let Some(tasks) = tasks {
                self.take(tasks);
            }
            let now = boot_time();
            let all = now.saturating_sub(looked) >= PAUSE;
            if all {
                looked = now;
            }
            let mut report = Report::default();
            for (key, sensor) in &mut self.sensors {
                let triggered = ready.contains(key);
                if let Some(level) = sensor.look(triggered, all, now) {
                    let Task { rule, condition, spot, .. } = &sensor.task;
                    let (rule, condition, spot) = (rule.clone(), *condition, *spot);
                    report.observations.push(Observation { rule, condition, spot, level });
                }
                if let How::Broken(why) = &sensor.how {
                    report.faults.insert(sensor.task.rule.clone(), why.clone());
                }
            }
            if (all || changed || !report.observations.is_empty()) && self.sender.try_send(report).is_err() {
                self.shared.dropped.fetch_add(1, Relaxed);
            } else if !ready.is_empty() {
                (self.ring)();
            }
        }
    }

    /// Waits for the kernel's triggers, a new list, or the time. Gives whose triggers fired.
    fn wait(&self, pause: Duration) -> Vec<Key> {
        let mut keys: Vec<&Key> = Vec::new();
        let mut ready = vec![PollFd::new(&self.shared.bell, PollFlags::IN)];
        for (key, sensor) in &self.sensors {
            if let How::Pressure { pressure, .. } = &sensor.how
                && let Some(fd) = pressure.fd()
            {
                keys.push(key);
                ready.push(PollFd::from_borrowed_fd(fd, PollFlags::PRI));
            }
        }
        let timeout = Timespec::try_from(pause.max(Duration::from_millis(10))).ok();
        // Interrupted by a signal is as good as a time-out.
        let _ = poll(&mut ready, timeout.as_ref());
        let fired: Vec<Key> = keys
            .into_iter()
            .zip(&ready[1..])
            .filter(|(_, fd)| fd.revents().contains(PollFlags::PRI))
            .map(|(key, _)| key.clone())
            .collect();
        let _ = rustix::io::read(self.shared.bell.as_fd(), &mut [0_u8; 8]);
        fired
    }

    /// Keeps the sensors of tasks that stay, opens those of new ones.
    fn take(&mut self, tasks: Vec<Task>) {
        let mut former = std::mem::take(&mut self.sensors);
        let more = tasks.len().saturating_sub(MOST);
        for task in tasks.into_iter().take(MOST) {
            let key = (task.rule.clone(), task.condition, task.spot);
            let sensor = match former.remove(&key) {
                Some(sensor) if sensor.task.kind == task.kind && !matches!(sensor.how, How::Broken(_)) => {
                    sensor
                }
                _ => Sensor::open(task),
            };
            self.sensors.insert(key, sensor);
        }
        if more > 0 {
            tracing::warn!(
                more,
                "containers are not watched: {MOST} at a time is the most; narrow the rules' match"
            );
        }
    }
}

impl Sensor {
    fn open(task: Task) -> Self {
        let (place, how) = match place(&task) {
            Ok((place, how)) => (place, how),
            Err(why) => (String::new(), How::Broken(why)),
        };
        Self { task, place, how }
    }

    /// How the condition stands; none: nothing new. `triggered`: the kernel says that the threshold was passed.
    fn look(&mut self, triggered: bool, all: bool, now: Duration) -> Option<Level> {
        if !(triggered || all) {
            return None;
        }
        let outcome = match &mut self.how {
            How::Broken(_) => return None,
            How::Pressure { pressure, resource, line, last_high } => {
                pressure.look(now).map_err(|error| error.to_string()).map(|(rate, passed)| {
                    let (_, window) = pressure.threshold();
                    let least = pressure.threshold_rate();
                    if triggered || passed {
                        *last_high = Some(now);
                        // What the file tells may be two seconds old; the trigger is not.
                        let rate =
                            if rate < least { format!("over {least:.1}") } else { format!("{rate:.1}") };
                        return Some(Level::High(format!(
                            "{resource} {line} {rate} ms/s{}",
                            seen(&self.place)
                        )));
                    }
                    let rests = last_high.is_none_or(|at| now.saturating_sub(at) > window * 2);
                    Some(if rests && rate < least * HYSTERESIS { Level::Low } else { Level::Between })
                })
            }
            How::Usage { cpu, cpuacct, former } => {
                let usage = Usage::read(cpu, cpuacct.as_deref());
                usage.map_err(|error| format!("cannot read {}: {error}", cpu.display())).map(|usage| {
                    let (before, at) = former.replace((usage, now))?;
                    let time = now.saturating_sub(at);
                    Some(level_of(&self.task.kind, &usage, &before, time, &self.place))
                })
            }
        };
        outcome.unwrap_or_else(|why| {
            // The group is gone, most likely; the next list tells.
            self.how = How::Broken(why);
            Some(Level::Low)
        })
    }
}

fn level_of(kind: &condition::Kind, usage: &Usage, before: &Usage, time: Duration, place: &str) -> Level {
    let (value, threshold, text) = match kind {
        condition::Kind::CpuUsage(wanted) => {
            let used = usage.millicores_since(before, time);
            (used, f64::from(wanted.above_millicores), format!("{used:.0} millicores"))
        }
        condition::Kind::Throttled(wanted) => {
            let percent = usage.throttled_percent_since(before).unwrap_or(0.0);
            (percent, f64::from(wanted.above_percent), format!("{percent:.0} % of the periods"))
        }
        _ => return Level::Low,
    };
    if value > threshold {
        Level::High(format!("{text}{}", seen(place)))
    } else if value > threshold * HYSTERESIS {
        Level::Between
    } else {
        Level::Low
    }
}

/// When and where, for the evidence.
fn seen(place: &str) -> String {
    let at = humantime::format_rfc3339_seconds(SystemTime::now());
    if place.is_empty() { format!(" at {at}") } else { format!(" at {at} in {place}") }
}

/// Where a task is to look.
fn place(task: &Task) -> Result<(String, How), String> {
    match &task.kind {
        condition::Kind::Pressure(wanted) => {
            let resource = match wanted.resource() {
                pressure::Resource::Memory => "memory",
                pressure::Resource::Io => "io",
                _ => "cpu",
            };
            let full = wanted.kind() == pressure::Kind::Full;
            let (place, file) = if task.spot == Spot::Node {
                (String::new(), PathBuf::from(format!("/proc/pressure/{resource}")))
            } else {
                let root = mount_of("").ok_or("cgroup2 is not mounted; scope: node works")?;
                let path =
                    path_of(task.member, "").ok_or_else(|| format!("process {} is gone", task.member))?;
                let part = if wanted.scope() == pressure::Scope::Pod {
                    pod_part(&path)
                } else {
                    container_part(&path)
                };
                if part == "/" {
                    return Err(
                        "its processes are in the root of cgroup2, which has no pressure of its own; \
                                scope: node works"
                            .into(),
                    );
                }
                (part.to_owned(), directory(&root, part).join(format!("{resource}.pressure")))
            };
            let (stall, window) =
                (Duration::from_micros(wanted.stall_us), Duration::from_micros(wanted.window_us));
            let pressure =
                Pressure::open(&file, full, stall, window, boot_time()).map_err(|error| error.to_string())?;
            if pressure.threshold() != (stall, window) {
                let (stall, window) = pressure.threshold();
                tracing::info!(
                    rule = task.rule,
                    "the kernel grants no window of {} ms: {} ms within {} ms are watched instead",
                    wanted.window_us / 1000,
                    stall.as_millis(),
                    window.as_millis()
                );
            }
            let line = if full { "full" } else { "some" };
            Ok((place, How::Pressure { pressure, resource, line, last_high: None }))
        }
        condition::Kind::CpuUsage(_) | condition::Kind::Throttled(_) => {
            let gone = || format!("process {} is gone", task.member);
            // On a host with version 1 controllers these have the figures, else the unified hierarchy.
            let (cpu, place, cpuacct) = if let Some(root) = mount_of("cpu") {
                let path = path_of(task.member, "cpu").ok_or_else(gone)?;
                let cpuacct = mount_of("cpuacct")
                    .zip(path_of(task.member, "cpuacct"))
                    .map(|(root, path)| directory(&root, container_part(&path)));
                (directory(&root, container_part(&path)), container_part(&path).to_owned(), cpuacct)
            } else {
                let root = mount_of("").ok_or("neither cgroup2 nor the cpu controller is mounted")?;
                let path = path_of(task.member, "").ok_or_else(gone)?;
                (directory(&root, container_part(&path)), container_part(&path).to_owned(), None)
            };
            Ok((place, How::Usage { cpu, cpuacct, former: None }))
        }
        condition::Kind::Exec(_) | condition::Kind::Schedule(_) => Err("nothing to watch".into()),
    }
}
