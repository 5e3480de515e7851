//! The facts that processes give about themselves: their service, and where their threads keep their spans.
//!
//! A thread of its own reads them, by workers with a deadline, within a share of one core. It reads the environment of a process at
//! the first sample. SDKs publish later, and publish changes. So it reads processes with new samples again: soon at first, then less
//! and less often; the header alone where there is one. A node without rules has no such thread.

use std::{
    collections::{HashMap, HashSet},
    io,
    sync::{Arc, mpsc},
    thread,
    time::{Duration, Instant},
};

use super::{interpreters::ReadBudget, wake_up::WakeUp};
use crate::{
    access::{Access, Target},
    context::{ContextReader, Depth, Environment, ProcessFacts, Published},
    kernel::Kernel,
    model::{ImageKey, Service, boot_time_ns},
    process::{Process, ProcessTable},
    runtimes::{Guard, WhyNot, read_cpu_time},
};

/// Processes that wait to be read. The next sample of others asks again.
const MAX_REQUESTS: usize = 4096;
/// Processes that may hold up a read before the agent reads no further one.
const MAX_READERS: usize = 4;
const DEADLINE: Duration = Duration::from_millis(500);
/// A process younger than this has nothing but its environment: an SDK starts behind the runtime.
const YOUNG_NS: u64 = 1_000_000_000;
/// Pauses between two checks of a process that publishes nothing: each is twice the former one.
const FIRST_PAUSE: Duration = Duration::from_secs(1);
const LAST_PAUSE: Duration = Duration::from_secs(64);
/// The pause between two checks of the header of a published context.
const HEADER_PAUSE: Duration = Duration::from_secs(5);
/// Different services at one time. A process may take any name, and each is a series.
const MAX_SERVICES: usize = 1024;

pub(super) struct Contexts {
    thread: Option<ReaderThread>,
    wake_up: WakeUp,
    images: HashMap<ImageKey, State>,
    /// Equal ones take memory once.
    services: HashSet<Arc<Service>>,
    left_out: u64,
}

struct ReaderThread {
    requests: mpsc::SyncSender<Request>,
    answers: mpsc::Receiver<Answer>,
}

struct Request {
    key: ImageKey,
    depth: Depth,
    environment: Option<Environment>,
}

/// The outcome of a request. `None`: nothing has changed, or it could not be read.
struct Answer {
    key: ImageKey,
    facts: Option<(ProcessFacts, Environment)>,
}

#[derive(Default)]
struct State {
    is_requested: bool,
    /// When it is read again, if it has new samples by then.
    due: Option<Instant>,
    checks: u32,
    /// Its samples at the last check.
    samples: u64,
    environment: Option<Environment>,
    published: Option<Arc<Published>>,
    /// Its threads' spans are read.
    has_spans: bool,
    /// The facts beside its service, with the reasons for those that cannot be read; human-readable.
    text: String,
    /// Rules that wait for its service: all their other properties match.
    candidates: u64,
    /// A rule samples it only in spans: it is read without samples too.
    is_followed: bool,
}

impl Contexts {
    pub(super) fn new(wake_up: WakeUp) -> Self {
        Self { thread: None, wake_up, images: HashMap::new(), services: HashSet::new(), left_out: 0 }
    }

    /// A process has a sample: has it read if it is a new image.
    pub(super) fn sampled(&mut self, process: &Process) {
        if process.samples > 1 || process.kernel_thread || self.images.contains_key(&process.key) {
            return;
        }
        self.request(process.key, depth_of(process));
    }

    /// Has a process read before its first sample: for the rules that compare its service and whose other properties match, and if
    /// `is_followed`, for those that sample it only in spans.
    pub(super) fn watch(&mut self, process: &Process, candidates: u64, is_followed: bool) {
        let is_known = self.images.contains_key(&process.key);
        let is_wanted = candidates != 0 || is_followed;
        if process.kernel_thread || !(is_wanted || is_known) {
            return;
        }
        let state = self.images.entry(process.key).or_default();
        (state.candidates, state.is_followed) = (candidates, is_followed);
        if !is_known {
            self.request(process.key, depth_of(process));
        }
    }

    /// The rules have changed: the kernel reports again which processes wait.
    pub(super) fn clear_waiting(&mut self) {
        for state in self.images.values_mut() {
            (state.candidates, state.is_followed) = (0, false);
        }
    }

    fn request(&mut self, key: ImageKey, depth: Depth) {
        if self.thread.is_none() {
            match ReaderThread::start(self.wake_up.clone()) {
                Ok(thread) => self.thread = Some(thread),
                Err(error) => {
                    tracing::error!("cannot start the thread that reads the services of processes: {error}");
                    return;
                }
            }
        }
        let state = self.images.entry(key).or_default();
        let request = Request { key, depth, environment: state.environment.clone() };
        state.is_requested =
            self.thread.as_ref().is_some_and(|thread| thread.requests.try_send(request).is_ok());
        state.due = None;
        if !state.is_requested {
            state.due = Some(Instant::now() + FIRST_PAUSE);
        }
    }

    /// Takes the facts that the thread has read: gives the services to the table, and the places of spans to the kernel. Returns the images
    /// whose service has changed, with the rules that wait for it.
    pub(super) fn collect(
        &mut self,
        kernel: &mut Kernel,
        processes: &mut ProcessTable,
    ) -> Vec<(ImageKey, u64)> {
        let mut changed = Vec::new();
        let Some(thread) = &self.thread else { return changed };
        let answers: Vec<Answer> = thread.answers.try_iter().collect();
        for Answer { key, facts } in answers {
            let Some(process) = processes.get(&key) else {
                self.images.remove(&key);
                continue;
            };
            let (is_alive, samples, before) =
                (process.is_alive(), process.samples, Arc::clone(&process.service));
            if let Some((facts, environment)) = &facts {
                let service = self.share(&facts.service);
                processes.set_service(&key, &service);
                self.enter(key, facts, environment, is_alive, kernel);
                let candidates = self.images.get(&key).map_or(0, |state| state.candidates);
                if is_alive && candidates != 0 && before != service {
                    changed.push((key, candidates));
                }
            }
            let state = self.images.entry(key).or_default();
            state.is_requested = false;
            state.samples = samples;
            let pause = if state.published.is_some() && (state.has_spans || state.text.is_empty()) {
                HEADER_PAUSE
            } else {
                FIRST_PAUSE.saturating_mul(1 << state.checks.min(16)).min(LAST_PAUSE)
            };
            state.checks += 1;
            state.due = Some(Instant::now() + pause);
        }
        changed
    }

    fn enter(
        &mut self,
        key: ImageKey,
        facts: &ProcessFacts,
        environment: &Environment,
        is_alive: bool,
        kernel: &mut Kernel,
    ) {
        let text = facts.text();
        let state = self.images.entry(key).or_default();
        if !text.is_empty() && state.text != text {
            tracing::debug!(key = %key.process, "{text}");
        }
        state.environment = Some(environment.clone());
        state.published = facts.published.as_ref().and_then(|found| found.clone().ok());
        let had_spans = std::mem::replace(&mut state.has_spans, matches!(facts.thread, Some(Ok(_))));
        state.text = text;
        match (&facts.thread, &state.published) {
            (Some(Ok(layout)), Some(published)) if is_alive => {
                kernel.set_thread_context(key, layout, published.span_keys());
            }
            _ if had_spans => kernel.remove_thread_context(key.process.tgid),
            _ => {}
        }
    }

    /// Returns the one copy of a service. Beyond the limit a process counts as one that gives none.
    fn share(&mut self, service: &Arc<Service>) -> Arc<Service> {
        if let Some(known) = self.services.get(service) {
            return Arc::clone(known);
        }
        if self.services.len() >= MAX_SERVICES {
            self.services.retain(|service| Arc::strong_count(service) > 1);
        }
        if self.services.len() >= MAX_SERVICES {
            if self.left_out == 0 {
                tracing::warn!(
                    "processes give more than {MAX_SERVICES} different services at one time: the agent leaves out the names of this one \
                     and others; logged once, gannet_agent_services_left_out_total counts further ones"
                );
            }
            self.left_out += 1;
            return Arc::default();
        }
        self.services.insert(Arc::clone(service));
        Arc::clone(service)
    }

    /// Has the processes read again whose time has come. `unknown`: threads of these thread groups have published attributes without
    /// a name.
    pub(super) fn read_again(&mut self, processes: &ProcessTable, unknown: &HashSet<u32>) {
        let now = Instant::now();
        let is_due = |(key, state): &(&ImageKey, &State)| {
            let is_time = state.due.is_some_and(|due| due <= now) || unknown.contains(&key.process.tgid);
            is_time
                && !state.is_requested
                && processes.get(key).is_some_and(|process| process.is_alive() && is_wanted(state, process))
        };
        let due: Vec<_> = self
            .images
            .iter()
            .filter(is_due)
            .map(|(key, state)| {
                let before = state.published.clone().filter(|_| state.has_spans || state.text.is_empty());
                (*key, before.map_or(Depth::All, Depth::Changes))
            })
            .collect();
        for (key, depth) in due {
            self.request(key, depth);
        }
    }

    /// Forgets images that the process table does not know any more.
    pub(super) fn next_window(&mut self, processes: &ProcessTable) {
        self.images.retain(|key, _| processes.get(key).is_some());
    }

    /// Returns the processes whose service was left out because there are too many, since the start.
    pub(super) fn left_out(&self) -> u64 {
        self.left_out
    }

    /// Describes the facts that an image gives; human-readable. Empty without any.
    pub(super) fn status(&self, process: &Process) -> String {
        let text = self.images.get(&process.key).map_or("", |state| state.text.as_str());
        let service = process.service.text();
        [service.as_str(), text].into_iter().filter(|text| !text.is_empty()).collect::<Vec<_>>().join("; ")
    }
}

fn is_wanted(state: &State, process: &Process) -> bool {
    process.samples > state.samples || state.candidates != 0 || state.is_followed
}

/// Returns how much is read of a process first.
fn depth_of(process: &Process) -> Depth {
    let age_ns = boot_time_ns().saturating_sub(process.key.process.start_boottime_ns);
    if age_ns < YOUNG_NS { Depth::Environment } else { Depth::All }
}

impl ReaderThread {
    fn start(wake_up: WakeUp) -> io::Result<Self> {
        let (requests, inbox) = mpsc::sync_channel::<Request>(MAX_REQUESTS);
        // Behind a full channel the thread waits for the engine.
        let (sender, answers) = mpsc::sync_channel(MAX_REQUESTS);
        let work = move || {
            let readers = Access::new(MAX_READERS);
            let reader = Arc::new(ContextReader::default());
            let mut budget = ReadBudget::new(Instant::now(), read_cpu_time());
            while let Ok(request) = inbox.recv() {
                while let Some(pause) = budget.pause(Instant::now(), read_cpu_time()) {
                    thread::sleep(pause);
                }
                let key = request.key;
                let answer = Answer { key, facts: read(&readers, &reader, request) };
                if sender.send(answer).is_err() {
                    return;
                }
                wake_up.wake();
            }
        };
        thread::Builder::new().name("gannet-contexts".into()).spawn(work)?;
        Ok(Self { requests, answers })
    }
}

/// Reads one process. `None`: nothing has changed, or it could not be read.
fn read(
    readers: &Access,
    reader: &Arc<ContextReader>,
    request: Request,
) -> Option<(ProcessFacts, Environment)> {
    let Request { key, depth, environment } = request;
    let theirs = Arc::clone(reader);
    let call = move || {
        let read = || theirs.read(key.process, &depth, environment.as_ref()).map_err(|_| WhyNot::Unreadable);
        Guard::default().read(read)
    };
    let target = Target::Process(key.process.tgid);
    readers.run(target, "reading its service", DEADLINE, call).ok()?.ok()?
}
