//! The sampling clocks: for each rate in use, a perf event on every online CPU.

use std::{
    collections::{BTreeMap, BTreeSet},
    fs,
    io::{self, Read as _},
    os::fd::{AsRawFd as _, FromRawFd as _, OwnedFd},
};

use libbpf_rs::{Link, ProgramMut};
use perf_event_open_sys::bindings;

use super::KernelError;
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
    event: fs::File,
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
        for key in wanted.iter().filter(|key| !self.running.contains_key(key)).copied().collect::<Vec<_>>() {
            match Clock::start(program, key.0, key.1) {
                Ok(clock) => {
                    self.running.insert(key, clock);
                }
                // The CPU went offline after it was listed; the next call sees that.
                Err(KernelError::PerfEvent { source, .. }) if source.raw_os_error() == Some(libc::ENODEV) => {
                }
                Err(error) => return Err(error),
            }
        }
        for key in self.running.keys().filter(|key| !wanted.contains(key)).copied().collect::<Vec<_>>() {
            if let Some(mut clock) = self.running.remove(&key) {
                self.past_ticks += clock.ticks_due();
            }
        }
        self.periods_ns = periods_ns;
        Ok(())
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
        let mut attr = bindings::perf_event_attr {
            type_: bindings::PERF_TYPE_SOFTWARE,
            size: size_of::<bindings::perf_event_attr>() as u32,
            config: u64::from(bindings::PERF_COUNT_SW_CPU_CLOCK),
            ..Default::default()
        };
        attr.__bindgen_anon_1.sample_period = period_ns;
        attr.set_disabled(1);
        // SAFETY: the attribute structure is valid for the call and its size is set.
        let fd = unsafe {
            perf_event_open_sys::perf_event_open(
                &raw mut attr,
                -1,
                cpu.cast_signed(),
                -1,
                bindings::PERF_FLAG_FD_CLOEXEC.into(),
            )
        };
        if fd < 0 {
            return Err(failed(io::Error::last_os_error()));
        }
        // SAFETY: a new descriptor that nothing else owns.
        let event = unsafe { OwnedFd::from_raw_fd(fd) };
        let reader = event.try_clone().map_err(failed)?;
        // The link owns the descriptor now and closes it when it is dropped.
        let link = program
            .attach_perf_event(event.as_raw_fd())
            .map_err(|source| KernelError::Attach { what: "the sampler to a CPU clock", source })?;
        std::mem::forget(event);
        Ok(Self { _link: link, event: reader.into(), period_ns })
    }

    /// Returns the ticks that were due since it was started. The count of a cpu-clock event is nanoseconds.
    fn ticks_due(&mut self) -> u64 {
        let mut count = [0; 8];
        match self.event.read_exact(&mut count) {
            Ok(()) => u64::from_ne_bytes(count) / self.period_ns,
            // The CPU is offline: its event has stopped counting.
            Err(_) => 0,
        }
    }
}

/// Returns the numbers of the online CPUs.
pub(super) fn online_cpus() -> Result<Vec<u32>, KernelError> {
    model::online_cpus().map_err(|source| KernelError::Read { path: model::ONLINE_CPUS, source })
}
