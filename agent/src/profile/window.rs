//! Adds up the samples of a window, by process image: samples from before an `execve` are symbolized by the image of that
//! time.

use std::{
    collections::{BTreeMap, HashMap},
    sync::Arc,
    time::{Duration, SystemTime},
};

use gannet_proto::labels::{self as name, Labels};

use super::{RawProcess, RawProfile, RawStack};
use crate::{
    cgroup::{PathContainer, containers},
    model::{Image, ImageKey, Sample, SampleKind, StackEnd, StackMarks},
    process::Process,
};

/// Distinct stacks in one profile, by the limits of profile databases; a larger profile is cut into several.
const MAX_STACKS: usize = 16_000;

/// The series label of a host process's control group.
const CGROUP: &str = "cgroup";

/// The samples of the current window.
#[derive(Default)]
pub(crate) struct WindowSamples {
    images: HashMap<ImageKey, Stacks>,
    /// Stacks of images as they were before a mapping was replaced by another file.
    former: Vec<(ImageKey, Arc<Image>, Stacks)>,
    stacks: usize,
    deliveries: u64,
    /// By slot: start and length of the pre-trigger window of its capture.
    pre_triggers: HashMap<u32, (SystemTime, Duration)>,
}

type Stacks = HashMap<Stack, Tally>;

/// A distinct stack: all of a sample but its count and value.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
struct Stack {
    kind: SampleKind,
    /// 0 for off-CPU samples, each of which has its own value.
    period_ns: u64,
    rules: u64,
    tid: u32,
    thread: Arc<str>,
    kernel: Box<[u64]>,
    user: Box<[u64]>,
    end: StackEnd,
    marks: StackMarks,
    /// Of an off-CPU sample: the low bits of the state in which the thread slept.
    state: u8,
    /// Whether it comes from the flight recorder, from before its capture began.
    pre_trigger: bool,
}

#[derive(Clone, Copy, Debug, Default)]
struct Tally {
    count: u64,
    value_ns: u64,
}

/// A profile with the labels of its series.
#[derive(Debug)]
pub struct SeriesProfile {
    /// The labels of the series.
    pub labels: Labels,
    /// The rule that asked for it.
    pub rule: RuleTag,
    /// The number of its samples.
    pub samples: u64,
    /// The samples, not symbolized yet.
    pub raw: RawProfile,
    /// The container of all its processes. Its pod is looked up after the window.
    pub container: Option<ContainerRef>,
}

/// A container, by the path of its control group.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct ContainerRef {
    /// The runtime's id.
    pub id: String,
    /// The pod's uid as in the path of the control group; empty for a container without a pod.
    pub pod_uid: String,
    /// The containers around it, the outermost first.
    pub outer: Vec<PathContainer>,
}

impl ContainerRef {
    /// Returns ids and pod uids of all containers in the path, the outermost first.
    pub(crate) fn path(&self) -> Vec<(&str, &str)> {
        containers(&self.outer, &self.id, &self.pod_uid)
    }
}

/// The facts about a rule that its profiles carry.
#[derive(Clone, Debug, Default, PartialEq, Eq, PartialOrd, Ord)]
pub struct RuleTag {
    /// The rule's id.
    pub id: String,
    /// The revision of its rule set; 0 for a rule of the node's own.
    pub revision: u64,
    /// The kind of trigger in one word: `always`, `pressure`.
    pub reason: String,
    /// The observation that started the capture; empty for a rule that samples all the time.
    pub evidence: String,
    /// The number of the capture; 0 for a rule that samples all the time.
    pub capture: u64,
    /// Start and length of the pre-trigger window, if the samples are from it.
    pub pre_trigger: Option<(SystemTime, Duration)>,
    /// The limits that the governor had lowered, human-readable.
    pub governed: Option<String>,
    /// The labels that the rule adds.
    pub labels: Labels,
    /// The rule wants no user part of stacks, though another rule of the process may.
    pub without_user: bool,
    /// The rule wants no kernel part of stacks.
    pub without_kernel: bool,
}

/// The key by which samples are put into different profiles.
type Series = (RuleTag, Labels, Option<ContainerRef>, SampleKind, u64);

impl RuleTag {
    /// Returns the reason with its evidence.
    pub fn why(&self) -> String {
        if self.evidence.is_empty() {
            self.reason.clone()
        } else {
            format!("{} {}", self.reason, self.evidence)
        }
    }
}

/// The profiles of a window.
#[derive(Debug, Default)]
pub(crate) struct FlushedWindow {
    /// The profiles of the window.
    pub(crate) profiles: Vec<SeriesProfile>,
    /// Samples of removed rules, which are in no profile.
    pub(crate) removed: u64,
}

impl WindowSamples {
    /// Adds a sample.
    pub(crate) fn add(&mut self, sample: Sample) {
        self.add_to(sample, false);
    }

    /// Adds the samples of a capture's pre-trigger window. They get profiles of their own.
    pub(crate) fn add_pre_trigger(
        &mut self,
        slot: u32,
        start: SystemTime,
        duration: Duration,
        samples: Vec<Sample>,
    ) {
        self.pre_triggers.insert(slot, (start, duration));
        for mut sample in samples {
            sample.subject.rules = 1 << slot;
            self.add_to(sample, true);
        }
    }

    /// Adds a sample of an image as it was at an earlier time.
    pub(crate) fn add_former(&mut self, image: &Arc<Image>, sample: Sample) {
        self.deliveries += u64::from(sample.subject.rules.count_ones());
        let key = ImageKey::of(&sample.subject);
        let same = |(of, state, _): &(ImageKey, Arc<Image>, _)| *of == key && Arc::ptr_eq(state, image);
        let index = self.former.iter().position(same).unwrap_or_else(|| {
            self.former.push((key, Arc::clone(image), HashMap::new()));
            self.former.len() - 1
        });
        self.stacks += usize::from(tally(&mut self.former[index].2, sample, false));
    }

    /// Ties the samples that were added of an image so far to this earlier state of it.
    pub(crate) fn split_off_former(&mut self, key: ImageKey, image: Arc<Image>) {
        if let Some(stacks) = self.images.remove(&key) {
            self.former.push((key, image, stacks));
        }
    }

    fn add_to(&mut self, sample: Sample, pre_trigger: bool) {
        self.deliveries += u64::from(sample.subject.rules.count_ones());
        let stacks = self.images.entry(ImageKey::of(&sample.subject)).or_default();
        self.stacks += usize::from(tally(stacks, sample, pre_trigger));
    }

    /// Returns the number of added samples, once for each rule that asked.
    pub(crate) fn deliveries(&self) -> u64 {
        self.deliveries
    }

    /// Returns the number of distinct stacks, which determines the memory.
    pub(crate) fn stacks(&self) -> usize {
        self.stacks
    }

    /// Removes all samples and returns them as profiles: one for each series, rule, kind and rate. `process` returns the
    /// process of an image, `tag` the rule of a slot.
    pub(crate) fn flush<'a>(
        &mut self,
        start: SystemTime,
        duration: Duration,
        node: &str,
        process: impl Fn(&ImageKey) -> Option<&'a Process>,
        tag: impl Fn(u32) -> Option<RuleTag>,
    ) -> FlushedWindow {
        let mut flushed = FlushedWindow::default();
        let mut series: BTreeMap<Series, Vec<RawProcess>> = BTreeMap::new();
        let Self { images, former, pre_triggers, stacks: _, deliveries: _ } = std::mem::take(self);
        let mut images: Vec<_> = former
            .into_iter()
            .map(|(key, image, stacks)| (key, Some(image), stacks))
            .chain(images.into_iter().map(|(key, stacks)| (key, None, stacks)))
            .collect();
        // Sorted, so that the same samples give the same bytes.
        images.sort_by_key(|(key, ..)| *key);
        for (key, former, stacks) in images {
            let known = process(&key);
            let base = labels_of(node, known);
            let container =
                known.filter(|process| !process.names.container_id.is_empty()).map(|process| ContainerRef {
                    id: process.names.container_id.clone(),
                    pod_uid: process.names.pod_uid.clone(),
                    outer: process.names.outer.clone(),
                });
            for ((slot, pre_trigger, kind, period_ns), stacks) in by_slot(stacks) {
                let samples = stacks.iter().map(|stack| stack.count).sum::<u64>();
                let Some(mut rule) = tag(slot) else {
                    flushed.removed += samples;
                    continue;
                };
                if pre_trigger {
                    rule.reason += " lead-up";
                    rule.pre_trigger = pre_triggers.get(&slot).copied();
                }
                let stacks = wanted_parts(stacks, &rule);
                let mut labels = base.clone();
                labels.extend(rule.labels.clone());
                labels.insert(name::RULE_ID.to_owned(), rule.id.clone());
                labels.insert(name::REASON.to_owned(), rule.reason.clone());
                let process = RawProcess {
                    key: key.process,
                    comm: known.map_or_else(String::new, |process| process.comm.clone()),
                    container_id: known
                        .map_or_else(String::new, |process| process.names.container_id.clone()),
                    pod_uid: known.map_or_else(String::new, |process| process.names.pod_uid.clone()),
                    image: former.clone().unwrap_or_else(|| {
                        known.map_or_else(Arc::default, |process| Arc::clone(&process.image))
                    }),
                    interpreter: known.and_then(|process| process.interpreter.clone()),
                    stacks,
                };
                series.entry((rule, labels, container.clone(), kind, period_ns)).or_default().push(process);
            }
        }
        for ((rule, labels, container, kind, period_ns), processes) in series {
            let (start, duration) = rule.pre_trigger.unwrap_or((start, duration));
            for processes in cut(processes) {
                flushed.profiles.push(SeriesProfile {
                    labels: labels.clone(),
                    rule: rule.clone(),
                    samples: processes
                        .iter()
                        .flat_map(|process| &process.stacks)
                        .map(|stack| stack.count)
                        .sum(),
                    raw: RawProfile {
                        kind,
                        period_ns: period_ns.max(1),
                        start,
                        duration,
                        processes,
                        comments: Vec::new(),
                    },
                    container: container.clone(),
                });
            }
        }
        flushed
    }
}

/// Distributes stacks to the slots that asked for them; the key is slot, pre-trigger window or not, kind and period.
fn by_slot(stacks: Stacks) -> BTreeMap<(u32, bool, SampleKind, u64), Vec<RawStack>> {
    let mut by_slot: BTreeMap<_, Vec<RawStack>> = BTreeMap::new();
    for (stack, tally) in stacks {
        for slot in slots(stack.rules) {
            by_slot.entry((slot, stack.pre_trigger, stack.kind, stack.period_ns)).or_default().push(
                RawStack {
                    tid: stack.tid,
                    thread: stack.thread.to_string(),
                    kernel: stack.kernel.to_vec(),
                    user: stack.user.to_vec(),
                    end: stack.end,
                    marks: stack.marks,
                    state: stack.state,
                    count: tally.count,
                    value_ns: tally.value_ns,
                },
            );
        }
    }
    by_slot
}

/// Leaves the parts of stacks that the rule asked for. The kernel side takes what any rule asked for.
fn wanted_parts(stacks: Vec<RawStack>, rule: &RuleTag) -> Vec<RawStack> {
    if !rule.without_user && !rule.without_kernel {
        return stacks;
    }
    let mut wanted: HashMap<_, RawStack> = HashMap::new();
    for mut stack in stacks {
        if rule.without_kernel {
            stack.kernel.clear();
            stack.marks.kernel_truncated = false;
        }
        if rule.without_user {
            stack.user.clear();
            stack.end = StackEnd::None;
            stack.marks.guessed = false;
        }
        let RawStack { tid, thread, kernel, user, end, marks, state, count, value_ns } = &stack;
        let (count, value_ns) = (*count, *value_ns);
        let parts = (*tid, thread.clone(), kernel.clone(), user.clone(), *end, *marks, *state);
        wanted
            .entry(parts)
            .and_modify(|same| {
                same.count += count;
                same.value_ns += value_ns;
            })
            .or_insert(stack);
    }
    wanted.into_values().collect()
}

/// Counts a sample among others of its image. Returns whether its stack is a new one.
fn tally(stacks: &mut Stacks, sample: Sample, pre_trigger: bool) -> bool {
    let Sample { subject, tid, kind, value_ns, kernel, user, end, end_code: _, marks, state, raw: _ } =
        sample;
    let stack = Stack {
        kind,
        period_ns: if kind == SampleKind::OnCpu { value_ns } else { 0 },
        rules: subject.rules,
        tid,
        thread: subject.comm.as_str().into(),
        kernel: kernel.into(),
        user: user.into(),
        end,
        marks,
        state,
        pre_trigger,
    };
    let before = stacks.len();
    let tally = stacks.entry(stack).or_default();
    tally.count += 1;
    tally.value_ns += value_ns;
    stacks.len() > before
}

/// Returns the numbers of the bits that are set.
pub(crate) fn slots(rules: u64) -> impl Iterator<Item = u32> {
    (0..u64::BITS).filter(move |slot| rules >> slot & 1 == 1)
}

/// Cuts processes into profiles of at most [`MAX_STACKS`] stacks.
fn cut(processes: Vec<RawProcess>) -> Vec<Vec<RawProcess>> {
    let mut parts = vec![Vec::new()];
    let mut room = MAX_STACKS;
    for mut process in processes {
        while process.stacks.len() > room {
            let rest = process.stacks.split_off(room);
            let head = RawProcess {
                image: Arc::clone(&process.image),
                interpreter: process.interpreter.clone(),
                comm: process.comm.clone(),
                container_id: process.container_id.clone(),
                pod_uid: process.pod_uid.clone(),
                ..process
            };
            process = RawProcess {
                stacks: rest,
                image: Arc::clone(&head.image),
                interpreter: head.interpreter.clone(),
                comm: head.comm.clone(),
                container_id: head.container_id.clone(),
                pod_uid: head.pod_uid.clone(),
                key: head.key,
            };
            if let Some(part) = parts.last_mut() {
                part.push(head);
            }
            parts.push(Vec::new());
            room = MAX_STACKS;
        }
        room -= process.stacks.len();
        if let Some(part) = parts.last_mut() {
            part.push(process);
        }
    }
    parts.retain(|part| !part.is_empty());
    parts
}

/// Returns the labels of a process's series, without those of the rule.
fn labels_of(node: &str, process: Option<&Process>) -> Labels {
    let mut labels = Labels::from([(name::NODE.to_owned(), node.to_owned())]);
    let mut set = |name: &str, value: &str| {
        if !value.is_empty() {
            labels.insert(name.to_owned(), value.to_owned());
        }
    };
    match process {
        None => set(name::SERVICE_NAME, "unknown"),
        // Kernel threads share one series, because there are hundreds of different names: samples carry the name.
        Some(process) if process.kernel_thread => set(name::SERVICE_NAME, "kernel"),
        Some(process) => {
            let program = process.exe.rsplit('/').next().filter(|program| !program.is_empty());
            set(name::SERVICE_NAME, program.unwrap_or(&process.comm));
            // A container's series is that of its pod, and each sample carries its command: commands and containers are
            // unbounded in number. Processes of the host itself are few.
            if process.names.container_id.is_empty() {
                set(name::COMM, &process.comm);
                set(name::EXE, &process.exe);
                set(name::UNIT, &process.names.unit);
                set(CGROUP, &process.cgroup);
            }
        }
    }
    labels
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::model::{ProcessKey, Subject};

    fn sample(kernel: &[u64], user: &[u64]) -> Sample {
        Sample {
            subject: Subject {
                key: ProcessKey { tgid: 7, start_boottime_ns: 1 },
                exec_id: 1,
                ktime_ns: 1,
                cgroup_id: 1,
                comm: "x".into(),
                rules: 0b111,
                candidates: 0,
            },
            tid: 7,
            kind: SampleKind::OnCpu,
            value_ns: 10,
            kernel: kernel.to_vec(),
            user: user.to_vec(),
            end: StackEnd::Truncated,
            end_code: 1,
            marks: StackMarks { kernel_truncated: true, guessed: true },
            state: 0,
            raw: None,
        }
    }

    #[test]
    fn each_rule_gets_the_parts_of_stacks_that_it_asked_for() {
        let mut window = WindowSamples::default();
        for (kernel, user) in [([1], [2]), ([1], [3]), ([4], [3])] {
            window.add(sample(&kernel, &user));
        }
        let tag = |slot: u32| {
            let (without_user, without_kernel) = (slot == 1, slot == 2);
            Some(RuleTag { id: slot.to_string(), without_user, without_kernel, ..RuleTag::default() })
        };
        let flushed = window.flush(SystemTime::UNIX_EPOCH, Duration::from_secs(1), "n", |_| None, tag);
        assert_eq!(flushed.profiles.iter().map(|profile| profile.samples).sum::<u64>(), 9);
        let stacks = |id: &str| {
            let of_rule = flushed.profiles.iter().filter(|profile| profile.rule.id == id);
            let processes = of_rule.flat_map(|profile| &profile.raw.processes);
            let stacks = processes.flat_map(|process| &process.stacks);
            let mut stacks: Vec<_> = stacks
                .map(|stack| {
                    let StackMarks { kernel_truncated, guessed } = stack.marks;
                    assert_eq!(
                        (kernel_truncated, guessed),
                        (!stack.kernel.is_empty(), !stack.user.is_empty())
                    );
                    (stack.kernel.clone(), stack.user.clone(), stack.count, stack.value_ns, stack.end)
                })
                .collect();
            stacks.sort();
            stacks
        };
        assert_eq!(stacks("0").len(), 3);
        let none = StackEnd::None;
        assert_eq!(stacks("1"), [(vec![1], vec![], 2, 20, none), (vec![4], vec![], 1, 10, none)]);
        let cut = StackEnd::Truncated;
        assert_eq!(stacks("2"), [(vec![], vec![2], 1, 10, cut), (vec![], vec![3], 2, 20, cut)]);
    }
}
