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
    model::{Image, ImageKey, Sample, SampleKind, StackEnd, StackMarks, TaskLabels},
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
    /// Labels that the program gave the task.
    labels: Option<Arc<TaskLabels>>,
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
    /// Whether its processes tell the name of their service.
    pub names_service: bool,
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
type Series = (RuleTag, Labels, bool, Option<ContainerRef>, SampleKind, u64);

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

    /// Drops one sample without a word, to see that it is missed.
    #[cfg(test)]
    pub(crate) fn drop_one(&mut self) {
        let mut tallies = self.images.values_mut().flat_map(HashMap::values_mut);
        if let Some(tally) = tallies.find(|tally| tally.count > 0) {
            tally.count -= 1;
        }
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
            let names_service = known.is_some_and(|process| process.service.name().is_some());
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
                    start_labels: known.and_then(|process| process.start_labels().cloned()),
                    stacks,
                };
                let key = (rule, labels, names_service, container.clone(), kind, period_ns);
                series.entry(key).or_default().push(process);
            }
        }
        for ((rule, labels, names_service, container, kind, period_ns), processes) in series {
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
                    names_service,
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
                    labels: stack.labels.clone(),
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
            stack.marks.guessed_from = None;
        }
        let RawStack { tid, thread, kernel, user, end, marks, state, labels, count, value_ns } = &stack;
        let (count, value_ns) = (*count, *value_ns);
        let parts =
            (*tid, thread.clone(), kernel.clone(), user.clone(), *end, *marks, *state, labels.clone());
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
    let Sample {
        subject,
        tid,
        kind,
        value_ns,
        kernel,
        user,
        end,
        end_code: _,
        marks,
        state,
        list_layout: _,
        labels,
        raw: _,
    } = sample;
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
        labels,
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
                start_labels: process.start_labels.clone(),
                comm: process.comm.clone(),
                container_id: process.container_id.clone(),
                pod_uid: process.pod_uid.clone(),
                ..process
            };
            process = RawProcess {
                stacks: rest,
                image: Arc::clone(&head.image),
                interpreter: head.interpreter.clone(),
                start_labels: head.start_labels.clone(),
                comm: head.comm.clone(),
                container_id: head.container_id.clone(),
                pod_uid: head.pod_uid.clone(),
                key: head.key,
            };
            if let Some(part) = parts.last_mut().filter(|_| room > 0) {
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
            for (label, value) in process.service.labels() {
                set(label, value);
            }
            // A container's series is that of its pod, and each sample carries its command: commands and containers are
            // unbounded in number. Processes of the host itself are few.
            if process.names.container_id.is_empty() {
                set(name::COMM, &process.comm);
                set(name::EXE, &process.exe);
                set(name::UNIT, &process.names.unit);
                set(CGROUP, &process.cgroup);
            }
            // A container runs few, and their frames differ.
            if let Some(interpreter) = &process.interpreter {
                let (runtime, version) = interpreter.file.names();
                set(name::RUNTIME, runtime);
                set(name::RUNTIME_VERSION, version);
            }
        }
    }
    labels
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{
        model::{ProcessKey, Subject},
        runtimes::Interpreter,
    };

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
            marks: StackMarks { kernel_truncated: true, guessed_from: Some(1) },
            state: 0,
            list_layout: 0,
            labels: None,
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
                    let StackMarks { kernel_truncated, guessed_from } = stack.marks;
                    assert_eq!(
                        (kernel_truncated, guessed_from.is_some()),
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

    fn flush(window: &mut WindowSamples, processes: &[Process]) -> Vec<SeriesProfile> {
        let process = |key: &ImageKey| processes.iter().find(|process| process.key == *key);
        let tag =
            |slot: u32| Some(RuleTag { id: slot.to_string(), reason: "always".into(), ..RuleTag::default() });
        window.flush(START, Duration::from_secs(1), "n", process, tag).profiles
    }

    /// Returns a sample of one rule.
    fn of_rule(user: u64) -> Sample {
        let mut sample = sample(&[], &[user]);
        sample.subject.rules = 1;
        sample
    }

    const START: SystemTime = SystemTime::UNIX_EPOCH;

    #[test]
    fn a_sample_counts_once_for_each_rule() {
        let mut window = WindowSamples::default();
        for user in [1, 1, 2] {
            window.add(sample(&[], &[user]));
        }
        window.add(of_rule(1));
        let image = Arc::new(Image::default());
        for user in [1, 2, 2] {
            window.add_former(&image, sample(&[], &[user]));
        }
        assert_eq!((window.deliveries(), window.stacks()), (3 * 3 + 1 + 3 * 3, 5));
        let profiles = flush(&mut window, &[]);
        let samples = |id: &str| -> u64 {
            profiles.iter().filter(|profile| profile.rule.id == id).map(|profile| profile.samples).sum()
        };
        assert_eq!(["0", "1", "2"].map(samples), [7, 6, 6]);
        assert_eq!((window.deliveries(), window.stacks()), (0, 0), "a flushed window is empty");
    }

    #[test]
    fn samples_of_removed_rules_are_counted() {
        let mut window = WindowSamples::default();
        for user in [1, 2, 2] {
            window.add(sample(&[], &[user]));
        }
        let tag = |slot: u32| (slot == 1).then(RuleTag::default);
        let flushed = window.flush(START, Duration::from_secs(1), "n", |_| None, tag);
        assert_eq!((flushed.profiles.len(), flushed.profiles[0].samples, flushed.removed), (1, 3, 6));
    }

    #[test]
    fn samples_before_a_capture_have_profiles_of_their_own() {
        let mut window = WindowSamples::default();
        let (start, duration) = (START + Duration::from_secs(5), Duration::from_secs(9));
        window.add_pre_trigger(2, start, duration, vec![sample(&[], &[1]), sample(&[], &[1])]);
        let mut sample = sample(&[], &[1]);
        sample.subject.rules = 1 << 2;
        window.add(sample);
        assert_eq!(window.deliveries(), 3, "of the capture alone");
        let profiles = flush(&mut window, &[]);
        let mut seen: Vec<_> = profiles
            .iter()
            .map(|of| {
                let words = of.rule.reason.split(' ').count();
                (of.rule.id.as_str(), words, of.samples, of.raw.start, of.raw.duration)
            })
            .collect();
        seen.sort();
        let second = Duration::from_secs(1);
        assert_eq!(seen, [("2", 1, 1, START, second), ("2", 2, 2, start, duration)], "the reason says it");
    }

    /// Checks that samples of an image stay with the mappings of their time.
    #[test]
    fn samples_keep_the_mappings_of_their_time() {
        let mut window = WindowSamples::default();
        let [first, second] = [1, 2].map(|start| {
            let kind = crate::model::MappingKind::Anon;
            let mapping = crate::model::Mapping { start, end: start + 1, offset: 0, kind };
            Arc::new(Image { mappings: vec![mapping] })
        });
        let other = |mut sample: Sample| {
            sample.subject.exec_id = 2;
            sample
        };
        window.add_former(&first, of_rule(1));
        window.add_former(&second, of_rule(1));
        window.add_former(&first, of_rule(1));
        window.add_former(&first, other(of_rule(1)));
        // What was added so far is split off; what comes later has the mappings of now.
        window.add(of_rule(3));
        let key = ImageKey::of(&of_rule(3).subject);
        window.split_off_former(key, Arc::clone(&second));
        window.add(of_rule(4));
        let mut process = Process::unread(&of_rule(4).subject, 0);
        process.key = key;
        let profiles = flush(&mut window, &[process]);
        let mut seen: Vec<_> = profiles
            .iter()
            .flat_map(|profile| &profile.raw.processes)
            .map(|process| {
                let stacks: Vec<_> =
                    process.stacks.iter().map(|stack| (stack.user[0], stack.count)).collect();
                (process.image.mappings.first().map(|mapping| mapping.start), stacks)
            })
            .collect();
        seen.sort();
        let expected = [
            (None, vec![(4, 1)]),
            (Some(1), vec![(1, 1)]),
            (Some(1), vec![(1, 2)]),
            (Some(2), vec![(1, 1)]),
            (Some(2), vec![(3, 1)]),
        ];
        assert_eq!(seen, expected);
    }

    #[test]
    fn only_ticks_have_a_period() {
        let mut window = WindowSamples::default();
        for (kind, value_ns) in [(SampleKind::OnCpu, 10), (SampleKind::OffCpu, 70), (SampleKind::OffCpu, 80)]
        {
            window.add(Sample { kind, value_ns, ..of_rule(1) });
        }
        let profiles = flush(&mut window, &[]);
        let mut seen: Vec<_> = profiles.iter().map(|of| (of.raw.period_ns, of.samples)).collect();
        seen.sort_unstable();
        assert_eq!(seen, [(1, 2), (10, 1)], "blocked times of one stack are one profile");
    }

    #[test]
    fn large_profiles_are_cut_at_the_limit_of_stacks() {
        const MAX: usize = MAX_STACKS;
        let process = |stacks: usize| RawProcess {
            key: ProcessKey { tgid: stacks as u32, start_boottime_ns: 1 },
            comm: "x".into(),
            container_id: String::new(),
            pod_uid: String::new(),
            image: Arc::default(),
            interpreter: None,
            start_labels: None,
            stacks: vec![
                RawStack {
                    tid: 1,
                    thread: String::new(),
                    kernel: Vec::new(),
                    user: Vec::new(),
                    end: StackEnd::None,
                    marks: StackMarks::default(),
                    state: 0,
                    labels: None,
                    count: 1,
                    value_ns: 1,
                };
                stacks
            ],
        };
        let sizes = |processes: &[usize]| -> Vec<Vec<usize>> {
            let parts = cut(processes.iter().map(|stacks| process(*stacks)).collect());
            for process in parts.iter().flatten() {
                assert!(processes.contains(&(process.key.tgid as usize)) && process.comm == "x");
            }
            parts.iter().map(|part| part.iter().map(|process| process.stacks.len()).collect()).collect()
        };
        assert_eq!(sizes(&[MAX]), [[MAX]]);
        assert_eq!(sizes(&[MAX + 1]), [[MAX], [1]]);
        assert_eq!(sizes(&[2 * MAX + 7, 3]), [vec![MAX], vec![MAX], vec![7, 3]]);
        assert_eq!(sizes(&[MAX - 10, 20]), [vec![MAX - 10, 10], vec![10]]);
        assert_eq!(sizes(&[MAX, MAX]), [[MAX], [MAX]]);
        assert!(sizes(&[]).is_empty());
    }

    #[test]
    fn a_series_has_the_labels_of_its_process() {
        let process = |set: fn(&mut Process)| {
            let mut process = Process::unread(&of_rule(1).subject, 0);
            set(&mut process);
            let labels = labels_of("n", Some(&process));
            labels.into_iter().map(|(name, value)| format!("{name}={value}")).collect::<Vec<_>>().join(" ")
        };
        let of_host = process(|process| {
            process.exe = "/usr/bin/shop".into();
            process.cgroup = "/system.slice/shop.service".into();
            process.names.unit = "shop.service".into();
        });
        assert_eq!(
            of_host,
            "cgroup=/system.slice/shop.service comm=x exe=/usr/bin/shop node=n service_name=shop unit=shop.service"
        );
        let of_container = process(|process| {
            process.exe = "/usr/bin/shop".into();
            process.names.container_id = "abc".into();
        });
        assert_eq!(of_container, "node=n service_name=shop");
        let of_runtime = process(|process| {
            process.names.container_id = "abc".into();
            process.interpreter = Some(Arc::new(Interpreter::of_python()));
        });
        assert_eq!(of_runtime, "node=n runtime=python runtime_version=3.11.2 service_name=x");
        let odd = process(|process| process.exe = "/odd/".into());
        assert_eq!(odd, "comm=x exe=/odd/ node=n service_name=x");
        assert_eq!(process(|process| process.kernel_thread = true), "node=n service_name=kernel");
        let of_unknown = labels_of("n", None);
        assert_eq!(of_unknown.get(name::SERVICE_NAME).map(String::as_str), Some("unknown"));
        assert_eq!(of_unknown.get(name::NODE).map(String::as_str), Some("n"));
    }

    #[test]
    fn profiles_of_containers_name_them() {
        let mut window = WindowSamples::default();
        window.add(of_rule(1));
        let mut process = Process::unread(&of_rule(1).subject, 0);
        assert_eq!(flush(&mut window, std::slice::from_ref(&process))[0].container, None);
        window.add(of_rule(1));
        process.names.container_id = "abc".into();
        process.names.pod_uid = "pod".into();
        let profiles = flush(&mut window, &[process]);
        let container = profiles[0].container.as_ref().map(|of| (of.id.as_str(), of.pod_uid.as_str()));
        assert_eq!(container, Some(("abc", "pod")));
        let raw = &profiles[0].raw.processes[0];
        assert_eq!((raw.comm.as_str(), raw.container_id.as_str(), raw.pod_uid.as_str()), ("x", "abc", "pod"));
    }

    #[test]
    fn the_path_of_a_container_begins_outside() {
        let outer = vec![PathContainer { id: "outer".into(), pod_uid: "pod".into() }];
        let container = ContainerRef { id: "inner".into(), pod_uid: String::new(), outer };
        assert_eq!(container.path(), [("outer", "pod"), ("inner", "")]);
    }

    #[test]
    fn evidence_stands_behind_the_reason() {
        let mut tag = RuleTag { reason: "pressure".into(), ..RuleTag::default() };
        assert_eq!(tag.why(), "pressure");
        tag.evidence = "cpu some 31 ms/s".into();
        assert_eq!(tag.why(), "pressure cpu some 31 ms/s");
    }
}
