//! The sampling clocks: for each rate in use, a perf event on every online CPU. And the account of their ticks: each tick that
//! was due came, or is missing for a reason.

use std::{
    collections::{BTreeMap, BTreeSet},
    os::fd::{AsRawFd as _, BorrowedFd},
};

use gannet_bpf::types;
use libbpf_rs::{Link, MapCore, MapFlags, ProgramMut};
use perf_event::{Builder, events::Software};

use super::{Counters, Kernel, KernelError, hotplug::WentOffline};
use crate::model;

/// Readings of the ticks until none came meanwhile: between two of them, the process may lose the CPU.
const MAX_READINGS: u32 = 8;
/// `TICK_PARTS` of gannet.h.
const TICK_PARTS: u64 = 1000;

/// The ticks of all clocks since the kernel side started. `due` follows from the time that the clocks ran, and the BPF
/// programs count the others, so that [`unexplained`](Self::unexplained) can differ from 0.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Ticks {
    /// Ticks that were due.
    pub due: u64,
    /// Ticks that came, those of an idle CPU among them.
    pub fired: u64,
    /// Of these, ticks of an idle CPU.
    pub idle: u64,
    /// Interrupts were off or a hypervisor stopped the CPU: one tick came for several.
    pub late: u64,
    /// The kernel stopped the clock: a CPU without any other work had more ticks in a row than
    /// `kernel.perf_event_max_sample_rate` allows, or the rate is above it.
    pub throttled: u64,
    /// The timer ran and the kernel did not call the sampler, for as many ticks as the CPU was idle: some kernels leave an
    /// idle CPU out.
    pub idle_uncalled: u64,
    /// Other ticks for which the kernel did not call the sampler: another BPF program was active on the CPU.
    pub skipped: u64,
    /// The CPU was offline.
    pub offline: u64,
    /// A clock has not ticked since, or was stopped before it ticked again: it is throttled or late.
    pub silent: u64,
}

impl Ticks {
    /// Returns the ticks that are missing, with the name of the reason.
    pub fn missing(&self) -> [(&'static str, u64); 6] {
        let Self { idle_uncalled, late, throttled, skipped, offline, silent, .. } = *self;
        [
            ("idle", idle_uncalled),
            ("late", late),
            ("throttled", throttled),
            ("skipped", skipped),
            ("offline", offline),
            ("silent", silent),
        ]
    }

    /// Returns the ticks that were due, and neither came nor are missing for a reason. At both ends of its time each clock
    /// rounds up to one tick.
    pub fn unexplained(&self) -> i64 {
        let explained = self.missing().iter().map(|(_, count)| count).sum::<u64>() + self.fired;
        self.due.cast_signed() - explained.cast_signed()
    }
}

/// All clocks. It owns the perf events; dropping it stops them.
#[derive(Default)]
pub(super) struct Clocks {
    /// By period and CPU.
    running: BTreeMap<(u64, u32), Clock>,
    periods_ns: BTreeSet<u64>,
    past: PastTicks,
}

/// Ticks of clocks, as far as user space knows them.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
struct PastTicks {
    due: u64,
    late: u64,
    offline: u64,
    silent: u64,
    /// Ticks that were due while the CPU was idle.
    of_idle: u64,
}

struct Clock {
    /// Holds the perf event open: closing it would end the sampling.
    _link: Link,
    /// By the monotonic clock.
    started_ns: u64,
    /// Idle time of its CPU until then.
    idle_ns: u64,
}

/// When the clocks ticked last: the map `clocks`.
pub(super) struct LastTicks<'a>(pub(super) &'a dyn MapCore);

impl LastTicks<'_> {
    /// Returns the times of the first tick of the newest clock and of the last tick; 0 before the first one.
    fn of(&self, period_ns: u64, cpu: u32) -> (u64, u64) {
        let values = self.0.lookup_percpu(&period_ns.to_ne_bytes(), MapFlags::ANY).ok().flatten();
        let value = values.as_ref().and_then(|values| values.get(cpu as usize));
        let word = |at: usize| {
            let bytes = value.and_then(|bytes| bytes.get(at..)?.first_chunk());
            bytes.map_or(0, |bytes| u64::from_ne_bytes(*bytes))
        };
        (word(std::mem::offset_of!(types::clock, first)), word(std::mem::offset_of!(types::clock, last)))
    }

    /// Makes room for clocks of these periods, and removes the others.
    fn set(&self, former: &BTreeSet<u64>, periods_ns: &BTreeSet<u64>) -> Result<(), KernelError> {
        let failed = |source| KernelError::Map { map: "clocks", source };
        for period in former.difference(periods_ns) {
            self.0.delete(&period.to_ne_bytes()).map_err(failed)?;
        }
        let cpus = libbpf_rs::num_possible_cpus().map_err(failed)?;
        let nothing = vec![vec![0; size_of::<types::clock>()]; cpus];
        for period in periods_ns.difference(former) {
            self.0.update_percpu(&period.to_ne_bytes(), &nothing, MapFlags::ANY).map_err(failed)?;
        }
        Ok(())
    }
}

impl Clocks {
    /// Runs exactly one clock for each period on each online CPU: starts missing clocks and stops the others.
    pub(super) fn set(
        &mut self,
        program: &ProgramMut<'_>,
        last_ticks: &LastTicks<'_>,
        periods_ns: BTreeSet<u64>,
    ) -> Result<(), KernelError> {
        let online = online_cpus()?;
        let wanted: BTreeSet<(u64, u32)> =
            periods_ns.iter().flat_map(|period| online.iter().map(|cpu| (*period, *cpu))).collect();
        let now = Now::read();
        for key in self.running.keys().filter(|key| !wanted.contains(key)).copied().collect::<Vec<_>>() {
            if let Some(clock) = self.running.remove(&key) {
                let was_offline = !online.contains(&key.1);
                self.past.add(&clock.ticks(key, last_ticks, &now), was_offline);
            }
        }
        // Without room there the clocks work all the same; only their missing ticks are not counted.
        let mut failed = last_ticks.set(&self.periods_ns, &periods_ns).err();
        for key in wanted.iter().filter(|key| !self.running.contains_key(key)).copied().collect::<Vec<_>>() {
            match Clock::start(program, key.0, key.1, &now) {
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
        self.periods_ns = periods_ns;
        failed.map_or(Ok(()), Err)
    }

    /// Stops the clocks of CPUs that went offline, though these may be online again.
    pub(super) fn close(&mut self, last_ticks: &LastTicks<'_>, went_offline: &WentOffline) {
        let (past, now) = (&mut self.past, Now::read());
        self.running.retain(|key, clock| {
            let stays = !went_offline.contains(key.1);
            if !stays {
                past.add(&clock.ticks(*key, last_ticks, &now), true);
            }
            stays
        });
    }

    /// Starts clocks on CPUs that came online, stops them on CPUs that went offline.
    pub(super) fn follow_cpus(
        &mut self,
        program: &ProgramMut<'_>,
        last_ticks: &LastTicks<'_>,
    ) -> Result<(), KernelError> {
        self.set(program, last_ticks, self.periods_ns.clone())
    }

    /// Returns the account of all ticks so far.
    fn ticks(&self, last_ticks: &LastTicks<'_>, counters: &Counters) -> Ticks {
        let now = Now::read();
        let mut past = self.past;
        for (key, clock) in &self.running {
            past.add(&clock.ticks(*key, last_ticks, &now), false);
        }
        past.account(counters)
    }
}

impl PastTicks {
    /// Adds the ticks of one clock.
    fn add(&mut self, clock: &ClockTicks, was_offline: bool) {
        self.due += clock.due;
        self.late += clock.late;
        self.of_idle += clock.of_idle;
        *(if was_offline { &mut self.offline } else { &mut self.silent }) += clock.silent;
    }

    /// Returns the account, with what the BPF programs counted.
    fn account(&self, counters: &Counters) -> Ticks {
        let of_idle = self.of_idle.saturating_sub(counters.idle_ticks);
        let idle_uncalled = counters.ticks_uncalled.min(of_idle);
        Ticks {
            due: self.due,
            fired: counters.ticks,
            idle: counters.idle_ticks,
            idle_uncalled,
            late: self.late + counters.ticks_late,
            throttled: counters.ticks_throttled.div_ceil(TICK_PARTS),
            skipped: counters.ticks_uncalled - idle_uncalled,
            offline: self.offline,
            silent: self.silent,
        }
    }
}

/// The monotonic clock, and the idle time of each CPU.
struct Now {
    ns: u64,
    idle_ns: Vec<u64>,
}

impl Now {
    fn read() -> Self {
        // Without `/proc/stat` no tick counts as one of an idle CPU.
        Self { idle_ns: model::idle_ns().unwrap_or_default(), ns: model::monotonic_ns() }
    }

    fn idle_ns(&self, cpu: u32) -> u64 {
        self.idle_ns.get(cpu as usize).copied().unwrap_or(0)
    }
}

/// Ticks from the start of a clock until now.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct ClockTicks {
    /// Since it was started.
    due: u64,
    /// Before its first tick.
    late: u64,
    /// Since its last tick.
    silent: u64,
    /// Due while its CPU was idle.
    of_idle: u64,
}

impl ClockTicks {
    /// Returns the ticks of a clock with this period, from `started_ns` to `now_ns`; `first_ns` and `last_ns` are its first and
    /// last tick, unless they are from before its start.
    fn of(period_ns: u64, started_ns: u64, (first_ns, last_ns): (u64, u64), now_ns: u64) -> Self {
        let period_ns = period_ns.max(1);
        let silent_ns = now_ns.saturating_sub(last_ns.max(started_ns));
        // A tick may be on its way.
        let silent = if silent_ns > period_ns + period_ns / 2 { silent_ns / period_ns } else { 0 };
        let before_first = (first_ns.saturating_sub(started_ns) + period_ns / 2) / period_ns;
        Self {
            due: now_ns.saturating_sub(started_ns) / period_ns,
            late: before_first.saturating_sub(1),
            silent,
            of_idle: 0,
        }
    }
}

impl Clock {
    fn start(program: &ProgramMut<'_>, period_ns: u64, cpu: u32, now: &Now) -> Result<Self, KernelError> {
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
        Ok(Self { _link: link, started_ns: model::monotonic_ns(), idle_ns: now.idle_ns(cpu) })
    }

    fn ticks(&self, (period_ns, cpu): (u64, u32), last_ticks: &LastTicks<'_>, now: &Now) -> ClockTicks {
        let idle_ns = now.idle_ns(cpu).saturating_sub(self.idle_ns);
        ClockTicks {
            of_idle: idle_ns / period_ns.max(1),
            ..ClockTicks::of(period_ns, self.started_ns, last_ticks.of(period_ns, cpu), now.ns)
        }
    }
}

impl Kernel {
    /// Returns the account of the clocks' ticks, at a moment without a tick if there is one soon.
    pub fn ticks(&self) -> Result<Ticks, KernelError> {
        let last_ticks = LastTicks(&self.skeleton.maps.clocks);
        let mut before = self.counters()?;
        let mut ticks = self.clocks.ticks(&last_ticks, &before);
        for _ in 1..MAX_READINGS {
            let now = self.counters()?;
            if now.ticks == before.ticks {
                break;
            }
            before = now;
            ticks = self.clocks.ticks(&last_ticks, &before);
        }
        Ok(ticks)
    }
}

/// Returns the numbers of the online CPUs.
pub(super) fn online_cpus() -> Result<Vec<u32>, KernelError> {
    model::online_cpus().map_err(|source| KernelError::Read { path: model::ONLINE_CPUS, source })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_clock_is_silent_after_one_and_a_half_periods() {
        let at = |first, last, now| {
            let ClockTicks { due, late, silent, of_idle: _ } = ClockTicks::of(10, 1000, (first, last), now);
            [due, late, silent]
        };
        assert_eq!(at(0, 0, 1009), [0, 0, 0]);
        assert_eq!(at(1010, 1050, 1065), [6, 0, 0]);
        assert_eq!(at(1010, 1050, 1066), [6, 0, 1]);
        assert_eq!(at(1011, 1050, 1095), [9, 0, 4]);
        assert_eq!(at(1040, 1050, 1055), [5, 3, 0], "three were missing before the first one");
        assert_eq!(at(500, 900, 1095), [9, 0, 9], "the ticks are of a former clock");
    }

    #[test]
    fn a_missing_tick_has_one_reason() {
        let mut past = PastTicks::default();
        past.add(&ClockTicks { due: 30, late: 0, silent: 4, of_idle: 6 }, true);
        past.add(&ClockTicks { due: 30, late: 3, silent: 5, of_idle: 2 }, false);
        let counters = Counters {
            ticks: 30,
            idle_ticks: 3,
            ticks_late: 1,
            ticks_uncalled: 9,
            ticks_throttled: 1001,
            ..Counters::default()
        };
        let ticks = past.account(&counters);
        let missing =
            [("idle", 5), ("late", 4), ("throttled", 2), ("skipped", 4), ("offline", 4), ("silent", 5)];
        assert_eq!(ticks.missing(), missing);
        assert_eq!((ticks.due, ticks.unexplained()), (60, 60 - 30 - 24));
        let fired = Counters { ticks: 37, ..counters };
        assert_eq!(past.account(&fired).unexplained(), -1, "a tick too many shows too");
    }
}
