//! The sampling clocks: for each rate in use, a perf event on every online CPU.

use std::{
    collections::{BTreeMap, BTreeSet},
    os::fd::{AsRawFd as _, BorrowedFd},
};

use libbpf_rs::{Link, ProgramMut};
use perf_event::{Builder, Counter, events::Software};

use super::{KernelError, hotplug::WentOffline};
use crate::model;

/// All clocks. It owns the perf events; dropping it stops them.
#[derive(Default)]
pub(super) struct Clocks {
    /// By period and CPU.
    running: BTreeMap<(u64, u32), Clock>,
    periods_ns: BTreeSet<u64>,
    /// Due ticks of clocks that were stopped.
    past_ticks: u64,
}

struct Clock {
    /// Holds the perf event open: closing it would end the sampling.
    _link: Link,
    /// The same event, for reading its count.
    counter: Counter,
    period_ns: u64,
}

impl Clocks {
    /// Runs exactly one clock for each period on each online CPU: starts missing clocks and stops the others.
    pub(super) fn set(
        &mut self,
        program: &ProgramMut<'_>,
        periods_ns: BTreeSet<u64>,
    ) -> Result<(), KernelError> {
        let online = online_cpus()?;
        let wanted: BTreeSet<(u64, u32)> =
            periods_ns.iter().flat_map(|period| online.iter().map(|cpu| (*period, *cpu))).collect();
        let mut failed = None;
        for key in wanted.iter().filter(|key| !self.running.contains_key(key)).copied().collect::<Vec<_>>() {
            match Clock::start(program, key.0, key.1) {
                Ok(clock) => {
                    self.running.insert(key, clock);
                }
                // The CPU went offline after it was listed; the next call sees that.
                Err(KernelError::PerfEvent { source, .. }) if source.raw_os_error() == Some(libc::ENODEV) => {
                }
                // The clocks of the other CPUs start all the same.
                Err(error) => failed = failed.or(Some(error)),
            }
        }
        for key in self.running.keys().filter(|key| !wanted.contains(key)).copied().collect::<Vec<_>>() {
            if let Some(mut clock) = self.running.remove(&key) {
                self.past_ticks += clock.ticks_due();
            }
        }
        self.periods_ns = periods_ns;
        failed.map_or(Ok(()), Err)
    }

    /// Stops the clocks of CPUs that went offline, though these may be online again.
    pub(super) fn close(&mut self, went_offline: &WentOffline) {
        let past_ticks = &mut self.past_ticks;
        self.running.retain(|(_, cpu), clock| {
            let stays = !went_offline.contains(*cpu);
            if !stays {
                *past_ticks += clock.ticks_due();
            }
            stays
        });
    }

    /// Starts clocks on CPUs that came online, stops them on CPUs that went offline.
    pub(super) fn follow_cpus(&mut self, program: &ProgramMut<'_>) -> Result<(), KernelError> {
        self.set(program, self.periods_ns.clone())
    }

    /// Returns the number of ticks that were due so far, by the kernel's count of the events' running time.
    pub(super) fn ticks_due(&mut self) -> u64 {
        self.past_ticks + self.running.values_mut().map(Clock::ticks_due).sum::<u64>()
    }
}

impl Clock {
    fn start(program: &ProgramMut<'_>, period_ns: u64, cpu: u32) -> Result<Self, KernelError> {
        let failed = |source| KernelError::PerfEvent { cpu, source };
        let counter = Builder::new(Software::CPU_CLOCK)
            .any_pid()
            .one_cpu(cpu as usize)
            .include_kernel()
            .include_hv()
            .sample_period(period_ns)
            .build()
            .map_err(failed)?;
        // SAFETY: the counter owns the descriptor and lives as long as the borrow.
        let event = unsafe { BorrowedFd::borrow_raw(counter.as_raw_fd()) };
        let event = event.try_clone_to_owned().map_err(failed)?;
        let link = program
            .attach_perf_event(event.as_raw_fd())
            .map_err(|source| KernelError::Attach { what: "the sampler to a CPU clock", source })?;
        // The link owns the descriptor now and closes it when it is dropped.
        std::mem::forget(event);
        Ok(Self { _link: link, counter, period_ns })
    }

    /// Returns the ticks that were due since it was started. The count of a cpu-clock event is nanoseconds.
    fn ticks_due(&mut self) -> u64 {
        // The CPU may be offline: its event has stopped counting.
        self.counter.read().map_or(0, |nanoseconds| nanoseconds / self.period_ns)
    }
}

/// Returns the numbers of the online CPUs.
pub(super) fn online_cpus() -> Result<Vec<u32>, KernelError> {
    model::online_cpus().map_err(|source| KernelError::Read { path: model::ONLINE_CPUS, source })
}
