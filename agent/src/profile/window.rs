//! Adds samples up: one window at a time, by process image, so that what was sampled before an `execve` is named after
//! the image that it was taken of.

use std::{
    collections::{BTreeMap, HashMap},
    sync::Arc,
    time::{Duration, SystemTime},
};

use gannet_proto::labels::{self as name, Labels};

use super::{RawProcess, RawProfile, RawStack};
use crate::{
    model::{Image, ImageKey, Sample, SampleKind, StackEnd},
    process::Process,
};

/// A profile with more different stacks is cut into several: what the profile databases take at most.
const STACKS_PER_PROFILE: usize = 16_000;

/// The series label of a host process's control group.
const CGROUP: &str = "cgroup";

/// The samples of the window that runs.
#[derive(Default)]
pub struct WindowSamples {
    images: HashMap<ImageKey, HashMap<Stack, Tally>>,
    /// Stacks of images as they were before other files took the place of some of theirs.
    former: Vec<(ImageKey, Arc<Image>, HashMap<Stack, Tally>)>,
    stacks: usize,
    deliveries: u64,
    /// By slot: when the lead-up of its capture began, and how long it was.
    lead_ups: HashMap<u32, (SystemTime, Duration)>,
}

/// What is one stack: everything but how often.
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
    /// Of an off-CPU sample: the low bits of the state that the thread slept in.
    state: u8,
    /// From the flight recorder: before its capture began.
    lead_up: bool,
}

#[derive(Clone, Copy, Debug, Default)]
struct Tally {
    count: u64,
    value_ns: u64,
}

/// A profile of one series, and what it is filed under.
#[derive(Debug)]
pub struct SeriesProfile {
    /// The series.
    pub labels: Labels,
    /// The rule that asked for it.
    pub rule: RuleTag,
    /// Samples in it.
    pub samples: u64,
    /// The stacks.
    pub raw: RawProfile,
    /// The container that all its processes are of. What that is called is found out when the window is over.
    pub container: Option<ContainerRef>,
}

/// A container, as the path of its control group tells.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct ContainerRef {
    /// 64 hex digits.
    pub id: String,
    /// As control groups write it; empty for a container that is no pod's.
    pub pod_uid: String,
}

/// What a profile says of the rule that asked for it.
#[derive(Clone, Debug, Default, PartialEq, Eq, PartialOrd, Ord)]
pub struct RuleTag {
    /// The rule's name.
    pub id: String,
    /// Of the set that it came with; 0 for a rule of the node's own.
    pub revision: u64,
    /// Why it was captured, in a word: `always`, `pressure`.
    pub reason: String,
    /// What was seen that started it; empty for a rule that samples all the time.
    pub evidence: String,
    /// The number of the capture; 0 for a rule that samples all the time.
    pub capture: u64,
    /// From the flight recorder: when what it shows began, and how long it was.
    pub lead_up: Option<(SystemTime, Duration)>,
    /// What the governor had lowered, in words.
    pub governed: Option<String>,
    /// What the rule adds to its profiles.
    pub labels: Labels,
}

/// What makes a profile of its own.
type Series = (RuleTag, Labels, Option<ContainerRef>, SampleKind, u64);

impl RuleTag {
    /// The reason with its evidence.
    pub fn why(&self) -> String {
        if self.evidence.is_empty() {
            self.reason.clone()
        } else {
            format!("{} {}", self.reason, self.evidence)
        }
    }
}

/// What a flush gave.
#[derive(Debug, Default)]
pub struct Flushed {
    /// The profiles.
    pub profiles: Vec<SeriesProfile>,
    /// Samples that are in them, once for each rule that asked.
    pub delivered: u64,
    /// Samples whose rule is gone.
    pub expired: u64,
}

impl WindowSamples {
    /// Adds a sample.
    pub fn add(&mut self, sample: Sample) {
        self.add_to(sample, false);
    }

    /// Adds what the flight recorder has of the time before a capture. It makes profiles of its own.
    pub fn add_lead_up(&mut self, slot: u32, start: SystemTime, duration: Duration, samples: Vec<Sample>) {
        self.lead_ups.insert(slot, (start, duration));
        for mut sample in samples {
            sample.subject.rules = 1 << slot;
            self.add_to(sample, true);
        }
    }

    /// Adds a sample that was taken of an image in this former state.
    pub fn add_former(&mut self, image: &Arc<Image>, sample: Sample) {
        self.deliveries += u64::from(sample.subject.rules.count_ones());
        let key = ImageKey::of(&sample.subject);
        let same = |(of, state, _): &(ImageKey, Arc<Image>, _)| *of == key && Arc::ptr_eq(state, image);
        let place = self.former.iter().position(same).unwrap_or_else(|| {
            self.former.push((key, Arc::clone(image), HashMap::new()));
            self.former.len() - 1
        });
        self.stacks += usize::from(tally(&mut self.former[place].2, sample, false));
    }

    /// What was added of an image so far is to be named after this state of it.
    pub fn keep_apart(&mut self, key: ImageKey, image: Arc<Image>) {
        if let Some(stacks) = self.images.remove(&key) {
            self.former.push((key, image, stacks));
        }
    }

    fn add_to(&mut self, sample: Sample, lead_up: bool) {
        self.deliveries += u64::from(sample.subject.rules.count_ones());
        let stacks = self.images.entry(ImageKey::of(&sample.subject)).or_default();
        self.stacks += usize::from(tally(stacks, sample, lead_up));
    }

    /// Samples added, once for each rule that asked.
    pub fn deliveries(&self) -> u64 {
        self.deliveries
    }

    /// Different stacks held: what bounds the memory.
    pub fn stacks(&self) -> usize {
        self.stacks
    }

    /// Takes everything out as profiles: one for each series, rule, kind and rate. `process` knows the images, `tag` the
    /// rules by slot.
    pub fn flush<'a>(
        &mut self,
        start: SystemTime,
        duration: Duration,
        node: &str,
        process: impl Fn(&ImageKey) -> Option<&'a Process>,
        tag: impl Fn(u32) -> Option<RuleTag>,
    ) -> Flushed {
        let mut flushed = Flushed::default();
        let mut series: BTreeMap<Series, Vec<RawProcess>> = BTreeMap::new();
        let Self { images, former, lead_ups, stacks: _, deliveries: _ } = std::mem::take(self);
        let mut images: Vec<_> = former
            .into_iter()
            .map(|(key, image, stacks)| (key, Some(image), stacks))
            .chain(images.into_iter().map(|(key, stacks)| (key, None, stacks)))
            .collect();
        // The same samples make the same bytes.
        images.sort_by_key(|(key, ..)| *key);
        for (key, former, stacks) in images {
            let known = process(&key);
            let base = labels_of(node, known);
            let container =
                known.filter(|process| !process.names.container_id.is_empty()).map(|process| ContainerRef {
                    id: process.names.container_id.clone(),
                    pod_uid: process.names.pod_uid.clone(),
                });
            let mut parts: BTreeMap<(u32, bool, SampleKind, u64), Vec<RawStack>> = BTreeMap::new();
            for (stack, tally) in stacks {
                for slot in slots(stack.rules) {
                    parts.entry((slot, stack.lead_up, stack.kind, stack.period_ns)).or_default().push(
                        RawStack {
                            tid: stack.tid,
                            thread: stack.thread.to_string(),
                            kernel: stack.kernel.to_vec(),
                            user: stack.user.to_vec(),
                            end: stack.end,
                            state: stack.state,
                            count: tally.count,
                            value_ns: tally.value_ns,
                        },
                    );
                }
            }
            for ((slot, lead_up, kind, period_ns), stacks) in parts {
                let samples = stacks.iter().map(|stack| stack.count).sum::<u64>();
                let Some(mut rule) = tag(slot) else {
                    flushed.expired += samples;
                    continue;
                };
                if lead_up {
                    rule.reason += " lead-up";
                    rule.lead_up = lead_ups.get(&slot).copied();
                }
                flushed.delivered += samples;
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
                    stacks,
                };
                series.entry((rule, labels, container.clone(), kind, period_ns)).or_default().push(process);
            }
        }
        for ((rule, labels, container, kind, period_ns), processes) in series {
            let (start, duration) = rule.lead_up.unwrap_or((start, duration));
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

/// Counts a sample among others of its image. True: it is the first of its kind.
fn tally(stacks: &mut HashMap<Stack, Tally>, sample: Sample, lead_up: bool) -> bool {
    let Sample { subject, tid, kind, value_ns, kernel, user, end, end_code: _, state, raw: _ } = sample;
    let stack = Stack {
        kind,
        period_ns: if kind == SampleKind::OnCpu { value_ns } else { 0 },
        rules: subject.rules,
        tid,
        thread: subject.comm.as_str().into(),
        kernel: kernel.into(),
        user: user.into(),
        end,
        state,
        lead_up,
    };
    let before = stacks.len();
    let tally = stacks.entry(stack).or_default();
    tally.count += 1;
    tally.value_ns += value_ns;
    stacks.len() > before
}

/// The numbers of the bits that are set.
pub fn slots(rules: u64) -> impl Iterator<Item = u32> {
    (0..u64::BITS).filter(move |slot| rules >> slot & 1 == 1)
}

/// Cuts what is too much for one profile.
fn cut(processes: Vec<RawProcess>) -> Vec<Vec<RawProcess>> {
    let mut parts = vec![Vec::new()];
    let mut room = STACKS_PER_PROFILE;
    for mut process in processes {
        while process.stacks.len() > room {
            let rest = process.stacks.split_off(room);
            let head = RawProcess {
                image: Arc::clone(&process.image),
                comm: process.comm.clone(),
                container_id: process.container_id.clone(),
                pod_uid: process.pod_uid.clone(),
                ..process
            };
            process = RawProcess {
                stacks: rest,
                image: Arc::clone(&head.image),
                comm: head.comm.clone(),
                container_id: head.container_id.clone(),
                pod_uid: head.pod_uid.clone(),
                key: head.key,
            };
            if let Some(part) = parts.last_mut() {
                part.push(head);
            }
            parts.push(Vec::new());
            room = STACKS_PER_PROFILE;
        }
        room -= process.stacks.len();
        if let Some(part) = parts.last_mut() {
            part.push(process);
        }
    }
    parts.retain(|part| !part.is_empty());
    parts
}

/// The series of a process, without what the rule adds.
fn labels_of(node: &str, process: Option<&Process>) -> Labels {
    let mut labels = Labels::from([(name::NODE.to_owned(), node.to_owned())]);
    let mut set = |name: &str, value: &str| {
        if !value.is_empty() {
            labels.insert(name.to_owned(), value.to_owned());
        }
    };
    match process {
        None => set(name::SERVICE_NAME, "unknown"),
        // There are hundreds of kernel threads, each with a name of its own: the samples tell them apart.
        Some(process) if process.kernel_thread => set(name::SERVICE_NAME, "kernel"),
        Some(process) => {
            let program = process.exe.rsplit('/').next().filter(|program| !program.is_empty());
            set(name::SERVICE_NAME, program.unwrap_or(&process.comm));
            // A container's series are its pod's, and each sample says its command and its container: there is no end of
            // those. What runs on the host itself is few.
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
