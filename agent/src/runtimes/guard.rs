//! Calls of a runtime's module for one process. A module that panics, or takes too much CPU time, is switched off for that
//! process: everything that it reads may be made to break it.

use std::{
    panic::{AssertUnwindSafe, catch_unwind},
    sync::{
        OnceLock,
        atomic::{AtomicU64, Ordering},
    },
    time::{Duration, Instant},
};

use super::WhyNot;

/// CPU time of calls for one process beyond its share. Reading 16,384 functions, the most that a process may have, takes less.
const MAX_CPU: Duration = Duration::from_secs(3);
/// A process's share, in parts of one core: code of a virtual machine is read as long as it is sampled.
const SHARE_PARTS: u32 = 10;

/// CPU time of all modules for reading from all processes, in nanoseconds.
// Not a metric: `read_cpu_time` reads it for one.
static ALL_CPU_NS: AtomicU64 = AtomicU64::new(0);

/// Returns the CPU time of all modules for reading from all processes since the start.
pub(crate) fn read_cpu_time() -> Duration {
    Duration::from_nanos(ALL_CPU_NS.load(Ordering::Relaxed))
}

/// The state of a runtime's module for one process.
#[derive(Debug, Default)]
pub(crate) struct Guard {
    // Not a metric: `read_cpu_time` has the sum over all processes.
    cpu_ns: AtomicU64,
    off: OnceLock<WhyNot>,
    /// The time of the first call.
    begun: OnceLock<Instant>,
}

impl Guard {
    /// Runs a call that reads from the process, and adds its CPU time to that of all processes.
    pub(crate) fn read<T>(&self, call: impl FnOnce() -> Result<T, WhyNot>) -> Result<T, WhyNot> {
        let before = thread_cpu_time();
        let result = self.call(call);
        let used = thread_cpu_time().saturating_sub(before);
        ALL_CPU_NS.fetch_add(nanoseconds(used), Ordering::Relaxed);
        result
    }

    /// Runs a call, unless the module is switched off for this process.
    pub(crate) fn call<T>(&self, call: impl FnOnce() -> Result<T, WhyNot>) -> Result<T, WhyNot> {
        if let Some(reason) = self.off() {
            return Err(reason);
        }
        let before = thread_cpu_time();
        // A broken call leaves nothing behind: it only reads the target's memory, and returns its result by value.
        let result = catch_unwind(AssertUnwindSafe(call)).unwrap_or_else(|_| {
            let _ = self.off.set(WhyNot::Failed);
            Err(WhyNot::Failed)
        });
        self.spend(thread_cpu_time().saturating_sub(before));
        result
    }

    fn spend(&self, time: Duration) {
        let ns = nanoseconds(time);
        let before = self.cpu_ns.fetch_add(ns, Ordering::Relaxed);
        let share = self.begun.get_or_init(Instant::now).elapsed() / SHARE_PARTS;
        if Duration::from_nanos(before.saturating_add(ns)) > MAX_CPU + share {
            let _ = self.off.set(WhyNot::TooCostly);
        }
    }

    /// Returns why the module is switched off for this process; `None` if it is on.
    pub(crate) fn off(&self) -> Option<WhyNot> {
        self.off.get().copied()
    }
}

fn nanoseconds(time: Duration) -> u64 {
    u64::try_from(time.as_nanos()).unwrap_or(u64::MAX)
}

fn thread_cpu_time() -> Duration {
    let time = rustix::time::clock_gettime(rustix::time::ClockId::ThreadCPUTime);
    Duration::try_from(time).unwrap_or_default()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    #[expect(clippy::panic, reason = "the module that fails")]
    fn a_module_that_panics_is_switched_off_for_its_process() {
        let (guard, other) = (Guard::default(), Guard::default());
        assert_eq!(guard.call(|| Ok(1)), Ok(1));
        assert_eq!(guard.call(|| -> Result<(), _> { panic!("a fault of the module") }), Err(WhyNot::Failed));
        assert_eq!(guard.call(|| Ok(1)), Err(WhyNot::Failed), "it is not called again");
        assert_eq!((guard.off(), other.off()), (Some(WhyNot::Failed), None));
        assert_eq!(other.call(|| Ok(2)), Ok(2));
    }

    #[test]
    fn a_module_that_takes_too_long_is_switched_off() {
        let guard = Guard::default();
        guard.spend(MAX_CPU);
        assert_eq!(guard.call(|| Ok(1)), Ok(1), "the limit itself is allowed");
        guard.spend(Duration::from_secs(9));
        assert_eq!(guard.call(|| Ok(1)), Err(WhyNot::TooCostly));
    }

    #[test]
    fn a_process_may_use_its_share_for_ever() {
        let guard = Guard::default();
        let begun = Instant::now().checked_sub(Duration::from_secs(100));
        guard.begun.set(begun.unwrap()).unwrap();
        guard.spend(Duration::from_secs(12));
        assert_eq!(guard.call(|| Ok(1)), Ok(1));
        guard.spend(Duration::from_secs(2));
        assert_eq!(guard.call(|| Ok(1)), Err(WhyNot::TooCostly));
    }

    #[test]
    fn the_cpu_time_of_calls_is_measured() {
        let guard = Guard::default();
        let spin = || {
            let begin = thread_cpu_time();
            while thread_cpu_time() < begin + Duration::from_millis(5) {}
            Ok(())
        };
        let before = read_cpu_time();
        guard.read(spin).unwrap();
        assert!(read_cpu_time() >= before + Duration::from_millis(5));
        let used = Duration::from_nanos(guard.cpu_ns.load(Ordering::Relaxed));
        assert!(used >= Duration::from_millis(5) && used < MAX_CPU, "{used:?}");
    }
}
