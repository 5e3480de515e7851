//! Accesses to files and processes that may never answer: on worker threads, with a deadline.
//!
//! A file system in user space, or a network file system, may stop answering. A call on one of its files then waits without
//! end, and so may reading a process that waits for it. So no thread that others depend on makes such calls itself. It gives
//! them to [`Access::run`], which waits for a short time only. The call that does not answer holds one worker. Until it
//! answers, all calls on the same [`Target`] fail at once.
//!
//! A worker starts when no other is free, so a node whose files answer has one for each calling thread. Each is a process
//! that shares the agent's memory ([`apart`]): it can be left behind if not even SIGKILL ends its call.

mod apart;
mod own_files;

use std::{
    collections::HashMap,
    fmt,
    fs::{self, File},
    io, process,
    sync::{
        Arc, LazyLock, OnceLock,
        atomic::{AtomicU8, AtomicU64, Ordering},
        mpsc::{self, RecvTimeoutError},
    },
    thread,
    time::{Duration, Instant},
};

use parking_lot::Mutex;

pub(crate) use self::own_files::{
    OwnFiles, on_own_files, on_own_files_later, read_own_file, run_apart, spawn_apart,
};
use crate::model::MappedFile;

/// Workers at one time. This number of targets may hang before the agent reads no further process or file.
const MAX_WORKERS: usize = 32;
/// Free workers that stay.
const MAX_IDLE: usize = 3;
/// While this number of targets hang, callers wait only a part of their deadline: the next one probably hangs too.
const MANY_HUNG: usize = 2;
/// The divisor of the deadline while many targets hang.
const HUNG_PART: u32 = 4;

/// The end of the program waits this long for the end of free workers.
const END_TIMEOUT: Duration = Duration::from_millis(200);
/// How long a new agent waits for the sockets and locks of one that was killed. The kernel kills that agent's workers, which share
/// its descriptors, some milliseconds behind it.
pub(crate) const WORKERS_OUTLIVE: Duration = Duration::from_secs(2);
/// The pause between two attempts to have them.
pub(crate) const WORKERS_PAUSE: Duration = Duration::from_millis(20);
/// How long the engine waits. Meanwhile the ring buffer fills.
pub(crate) const ENGINE_DEADLINE: Duration = Duration::from_millis(400);
/// How many times longer a call may take that uses a CPU: a process can have tens of thousands of mappings.
const ENGINE_EXTENSIONS: u32 = 4;
/// How long the threads that build unwind tables and find names wait for one step on one file.
const FILE_DEADLINE: Duration = Duration::from_secs(3);

/// The workers of this program. What hangs is a fact of the node, so all threads share it.
static NODE: LazyLock<Access> = LazyLock::new(|| Access::new(MAX_WORKERS));

/// Returns the workers that all threads of this program share.
pub(crate) fn node() -> &'static Access {
    &NODE
}

/// Opens a file that a process maps, and makes a call with it that computes, all on a worker. The inner error is that of
/// opening the file.
pub(crate) fn read_file<T: Send + 'static>(
    file: &Arc<MappedFile>,
    call: impl FnOnce(&File) -> T + Send + 'static,
) -> Result<io::Result<T>, Unanswered> {
    let theirs = Arc::clone(file);
    let call = move || theirs.open_for_reading().map(|open| call(&open));
    NODE.compute(Target::Device(file.dev), &file.path, call)
}

/// The object that a call may wait for.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(crate) enum Target {
    /// A process, by its thread group id.
    Process(u32),
    /// A file system, by its device number.
    Device(u64),
    /// Files of the agent itself.
    Own(OwnFiles),
}

impl fmt::Display for Target {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Process(tgid) => write!(f, "process {tgid}"),
            Self::Device(device) => {
                let (major, minor) = (rustix::fs::major(*device), rustix::fs::minor(*device));
                write!(f, "file system {major}:{minor}")
            }
            Self::Own(files) => files.fmt(f),
        }
    }
}

/// The target of a call does not answer now.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{0} does not answer")]
pub(crate) struct Unanswered(pub(crate) Target);

/// Counts of an [`Access`].
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) struct AccessStats {
    /// Targets that do not answer now.
    pub(crate) hung: usize,
    /// Calls that did not answer in time.
    pub(crate) timeouts: u64,
    /// Calls that were not made, because their target did not answer before or no worker was free.
    pub(crate) skipped: u64,
    /// Late answers: each ends the hang of a target.
    pub(crate) answered: u64,
}

/// Worker threads for calls that may hang.
#[derive(Clone)]
pub(crate) struct Access(Arc<Shared>);

struct Shared {
    max: usize,
    state: Mutex<State>,
    timeouts: AtomicU64,
    skipped: AtomicU64,
    answered: AtomicU64,
}

#[derive(Default)]
struct State {
    idle: Vec<mpsc::SyncSender<Job>>,
    workers: usize,
    /// With the number of workers that wait for each.
    hung: HashMap<Target, usize>,
}

type Job = Box<dyn FnOnce() + Send>;

/// How long a caller waits.
#[derive(Clone, Copy)]
struct Wait {
    deadline: Duration,
    /// How many times it waits for the same time again, if the worker has used a CPU meanwhile.
    extensions: u32,
}

/// The progress of one call.
#[derive(Default)]
struct Progress {
    /// The side that came first: the answer, or the end of the wait.
    state: AtomicU8,
    /// The target that the call waits for, once the caller has abandoned it.
    blamed: OnceLock<Target>,
    /// The process id of the worker that makes the call.
    worker: OnceLock<u32>,
}

impl Progress {
    /// Reports whether the worker is on a CPU or waits for one, or used one since the last call, after which it had used this
    /// number of clock ticks.
    fn is_busy(&self, used: &mut u64) -> bool {
        let Some(worker) = self.worker.get() else { return true };
        let progress = fs::read_to_string(format!("/proc/{worker}/stat")).ok().and_then(|text| {
            // State, user and system time are the fields 3, 14 and 15 of proc(5); the name before may contain spaces.
            let mut fields = text.get(text.rfind(')')? + 2..)?.split_ascii_whitespace();
            let wants_cpu = fields.next()? == "R";
            let mut times = fields.skip(10);
            Some((wants_cpu, times.next()?.parse::<u64>().ok()? + times.next()?.parse::<u64>().ok()?))
        });
        progress.is_some_and(|(wants_cpu, ticks)| std::mem::replace(used, ticks) < ticks || wants_cpu)
    }
}

/// The states of a call.
const OPEN: u8 = 0;
const ANSWERED: u8 = 1;
const ABANDONED: u8 = 2;

impl Access {
    /// Builds an access without threads, which starts `max` of them at most.
    pub(crate) fn new(max: usize) -> Self {
        Self(Arc::new(Shared {
            max,
            state: Mutex::default(),
            timeouts: AtomicU64::new(0),
            skipped: AtomicU64::new(0),
            answered: AtomicU64::new(0),
        }))
    }

    /// Makes a call on a worker and waits for its answer until the deadline. `name` is the file or process for the log. The
    /// answer of an abandoned call is dropped on the worker.
    pub(crate) fn run<T: Send + 'static>(
        &self,
        target: Target,
        name: &str,
        deadline: Duration,
        call: impl FnOnce() -> T + Send + 'static,
    ) -> Result<T, Unanswered> {
        self.run_and_blame(target, || target, name, deadline, call)
    }

    /// Does the same as [`Access::run`] for a call that computes: it may take longer while its worker uses a CPU.
    pub(crate) fn compute<T: Send + 'static>(
        &self,
        target: Target,
        name: &str,
        call: impl FnOnce() -> T + Send + 'static,
    ) -> Result<T, Unanswered> {
        let wait = Wait { deadline: FILE_DEADLINE, extensions: u32::MAX };
        self.wait_for(target, || target, name, wait, call)
    }

    /// Does the same as [`Access::run`]. If the call does not answer in time, `blame` finds out the target that it waits for.
    pub(crate) fn run_and_blame<T: Send + 'static>(
        &self,
        target: Target,
        blame: impl FnOnce() -> Target,
        name: &str,
        deadline: Duration,
        call: impl FnOnce() -> T + Send + 'static,
    ) -> Result<T, Unanswered> {
        self.wait_for(target, blame, name, Wait { deadline, extensions: ENGINE_EXTENSIONS }, call)
    }

    fn wait_for<T: Send + 'static>(
        &self,
        target: Target,
        blame: impl FnOnce() -> Target,
        name: &str,
        wait: Wait,
        call: impl FnOnce() -> T + Send + 'static,
    ) -> Result<T, Unanswered> {
        let unanswered = Unanswered(target);
        let (worker, deadline) = {
            let mut state = self.0.state.lock();
            if state.hung.contains_key(&target) {
                self.0.skipped.fetch_add(1, Ordering::Relaxed);
                return Err(unanswered);
            }
            let part = if state.hung.len() >= MANY_HUNG { HUNG_PART } else { 1 };
            (self.0.worker(&mut state), wait.deadline / part)
        };
        let Some(worker) = worker else {
            self.0.skipped.fetch_add(1, Ordering::Relaxed);
            return Err(unanswered);
        };
        let (sender, answer) = mpsc::sync_channel(1);
        let progress = Arc::new(Progress::default());
        let (shared, theirs, back) = (Arc::clone(&self.0), Arc::clone(&progress), worker.clone());
        let job: Job = Box::new(move || {
            let _ = theirs.worker.set(process::id());
            let value = call();
            // The channel has room for the one value; its caller may have stopped waiting.
            let _ = sender.send(value);
            if theirs.state.swap(ANSWERED, Ordering::AcqRel) == ABANDONED
                && let Some(blamed) = theirs.blamed.get()
            {
                shared.late_answer(*blamed);
                shared.give_back(back);
            }
        });
        if worker.send(job).is_err() {
            self.0.state.lock().workers -= 1;
            return Err(unanswered);
        }
        let mut received = answer.recv_timeout(deadline);
        let (mut used, mut extensions) = (0, wait.extensions);
        while matches!(received, Err(RecvTimeoutError::Timeout))
            && extensions > 0
            && progress.is_busy(&mut used)
        {
            received = answer.recv_timeout(deadline);
            extensions -= 1;
        }
        let value = match received {
            Ok(value) => value,
            Err(RecvTimeoutError::Disconnected) => {
                self.0.state.lock().workers -= 1;
                return Err(unanswered);
            }
            Err(RecvTimeoutError::Timeout) => {
                let blamed = *progress.blamed.get_or_init(blame);
                let mut state = self.0.state.lock();
                if progress.state.swap(ABANDONED, Ordering::AcqRel) == OPEN {
                    let is_first = Shared::hangs(&mut state, blamed);
                    drop(state);
                    self.0.abandoned(blamed, name, is_first);
                    return Err(Unanswered(blamed));
                }
                drop(state);
                // The answer came between the end of the wait and now.
                answer.try_recv().map_err(|_| unanswered)?
            }
        };
        self.0.give_back(worker);
        Ok(value)
    }

    /// Notes that a call of another thread on this target does not answer: until [`Access::answers`], all calls on it fail.
    pub(crate) fn hangs(&self, target: Target, name: &str) {
        let is_first = Shared::hangs(&mut self.0.state.lock(), target);
        self.0.abandoned(target, name, is_first);
    }

    /// Notes that the call of [`Access::hangs`] has answered.
    pub(crate) fn answers(&self, target: Target) {
        self.0.late_answer(target);
    }

    /// Reports whether a target does not answer now.
    pub(crate) fn is_hung(&self, target: Target) -> bool {
        self.0.state.lock().hung.contains_key(&target)
    }

    /// Ends the free workers at the end of the program, so that their CPU time counts as the program's. If others are left
    /// behind, closes the standard descriptors, which they share.
    pub(crate) fn end(&self) {
        let (hung, names) = {
            let mut state = self.0.state.lock();
            state.idle.clear();
            let names: Vec<_> = state.hung.keys().map(ToString::to_string).collect();
            (state.hung.values().sum::<usize>(), names.join(", "))
        };
        if hung > 0 {
            tracing::warn!(calls = hung, "left behind, because they do not end: calls on {names}");
        }
        let begun = Instant::now();
        while apart::running() > hung && begun.elapsed() < END_TIMEOUT {
            thread::sleep(Duration::from_millis(1));
        }
        if apart::running() > 0
            && let Ok(null) = File::options().read(true).write(true).open("/dev/null")
        {
            let _ = rustix::stdio::dup2_stdin(&null);
            let _ = rustix::stdio::dup2_stdout(&null);
            let _ = rustix::stdio::dup2_stderr(&null);
        }
    }

    /// Returns the counts so far.
    pub(crate) fn stats(&self) -> AccessStats {
        AccessStats {
            hung: self.0.state.lock().hung.len(),
            timeouts: self.0.timeouts.load(Ordering::Relaxed),
            skipped: self.0.skipped.load(Ordering::Relaxed),
            answered: self.0.answered.load(Ordering::Relaxed),
        }
    }
}

impl Shared {
    /// Takes a free worker, or starts one; `None` if there are too many already.
    fn worker(&self, state: &mut State) -> Option<mpsc::SyncSender<Job>> {
        if let Some(worker) = state.idle.pop() {
            return Some(worker);
        }
        if state.workers >= self.max {
            return None;
        }
        // A worker has one job at a time.
        let (sender, jobs) = mpsc::sync_channel::<Job>(1);
        let work = move || jobs.iter().for_each(|job| job());
        apart::spawn("gannet-access", work).ok()?;
        state.workers += 1;
        Some(sender)
    }

    /// Counts a call that waits for a target, and returns whether it is the first.
    fn hangs(state: &mut State, target: Target) -> bool {
        let waiting = state.hung.entry(target).or_default();
        *waiting += 1;
        *waiting == 1
    }

    /// A call has not answered in time.
    fn abandoned(&self, target: Target, name: &str, is_first: bool) {
        self.timeouts.fetch_add(1, Ordering::Relaxed);
        if is_first {
            tracing::warn!(
                "{target} does not answer ({name}): the agent goes on without it, and tries again when it answers"
            );
        }
    }

    /// Keeps a worker for the next call, or lets it end.
    fn give_back(&self, worker: mpsc::SyncSender<Job>) {
        let mut state = self.state.lock();
        if state.idle.len() < MAX_IDLE {
            state.idle.push(worker);
        } else {
            state.workers -= 1;
        }
    }

    /// A call has answered that its caller had abandoned.
    fn late_answer(&self, target: Target) {
        {
            let mut state = self.state.lock();
            if let Some(waiting) = state.hung.get_mut(&target) {
                *waiting -= 1;
                if *waiting == 0 {
                    state.hung.remove(&target);
                    tracing::info!("{target} answers again");
                }
            }
        }
        self.answered.fetch_add(1, Ordering::Relaxed);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const SHORT: Duration = Duration::from_millis(50);
    const FAR: Duration = Duration::from_secs(20);

    #[track_caller]
    fn until(condition: impl Fn() -> bool) {
        let end = Instant::now() + FAR;
        while !condition() {
            assert!(Instant::now() < end, "the condition does not come true");
            thread::sleep(Duration::from_millis(1));
        }
    }

    #[test]
    fn a_hung_target_holds_up_no_other() {
        let access = Access::new(4);
        let (release, held) = mpsc::channel::<()>();
        let hung = Target::Device(7);
        let begin = Instant::now();
        let call = move || {
            let _ = held.recv();
        };
        assert_eq!(access.run(hung, "file", SHORT, call), Err(Unanswered(hung)));
        // It is not asked again, and another target is.
        assert_eq!(access.run(hung, "file", FAR, || 1), Err(Unanswered(hung)));
        assert_eq!(access.run(Target::Process(7), "process", FAR, || 2), Ok(2));
        assert!(begin.elapsed() < FAR / 2);
        let AccessStats { hung: count, timeouts, skipped, answered } = access.stats();
        assert_eq!((count, timeouts, skipped, answered), (1, 1, 1, 0));
        drop(release);
        until(|| !access.is_hung(hung));
        assert_eq!(access.run(hung, "file", FAR, || 3), Ok(3));
        assert_eq!(access.stats().answered, 1);
    }

    /// Checks that a call that waits for a CPU is no call that waits for its target: on a busy machine it may get none for the
    /// whole wait.
    #[test]
    fn a_call_that_wants_a_cpu_is_busy() {
        let (tell, told) = mpsc::channel();
        let stop = AtomicU8::new(0);
        thread::scope(|scope| {
            scope.spawn(|| {
                tell.send(rustix::thread::gettid()).unwrap();
                while stop.load(Ordering::Relaxed) == 0 {}
            });
            // As many clock ticks as no thread has used.
            let is_busy = |thread: rustix::thread::Pid| {
                let worker = thread.as_raw_nonzero().get().cast_unsigned().into();
                Progress { worker, ..Progress::default() }.is_busy(&mut u64::MAX.clone())
            };
            let runs = is_busy(told.recv().unwrap());
            let (release, held) = mpsc::channel::<()>();
            let tell = tell.clone();
            let waiting = scope.spawn(move || {
                tell.send(rustix::thread::gettid()).unwrap();
                held.recv()
            });
            let waits = told.recv().unwrap();
            until(|| !is_busy(waits));
            stop.store(1, Ordering::Relaxed);
            drop(release);
            assert!(runs);
            assert!(waiting.join().unwrap().is_err());
        });
    }

    #[test]
    fn the_number_of_workers_is_bounded() {
        let access = Access::new(2);
        let releases: Vec<_> = (0..2)
            .map(|number| {
                let (release, held) = mpsc::channel::<()>();
                let target = Target::Process(number);
                assert!(
                    access
                        .run(target, "process", SHORT, move || {
                            let _ = held.recv();
                        })
                        .is_err()
                );
                release
            })
            .collect();
        assert!(access.run(Target::Process(9), "process", FAR, || ()).is_err(), "no worker is free");
        assert_eq!((access.stats().hung, access.stats().skipped), (2, 1));
        drop(releases);
        until(|| access.stats().hung == 0);
        until(|| access.run(Target::Process(9), "process", FAR, || ()).is_ok());
    }

    #[test]
    fn answers_in_time_share_one_worker() {
        let access = Access::new(2);
        let names: std::collections::HashSet<_> = (0..1000)
            .map(|_| access.run(Target::Device(1), "file", FAR, || thread::current().id()).unwrap())
            .collect();
        assert_eq!(names.len(), 1);
    }
}
