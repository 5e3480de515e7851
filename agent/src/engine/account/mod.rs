//! From the kernel's counters to the ledger of each window. Nothing else in the engine reads counters for it.
//!
//! The two sides of the ledger come from different sources. `taken` comes from the counters that the BPF programs keep on
//! each CPU. Delivered and lost samples come from the parts that hold them. The difference is `unaccounted`.
//!
//! The counters run on while the reader works, so both sides need one point in time at which they meet, the *cut*. On each
//! CPU it is the last sample that the reader has read: each sample carries its CPU and the number of samples sent before it.
//! What the kernel has taken behind the cut belongs to the next window:
//!
//! ```text
//! taken up to the cut = counters.taken - counters.open - (counters.sent - cut)
//! ```
//!
//! A record that is missing shows in the next record of its CPU, whose number jumps. If no record follows, it shows at the
//! first cut at least [`TRANSIT_TIME`] after the kernel counted it as sent.

use std::time::{Duration, Instant};

use gannet_proto::ledger::{Ledger, LossReason};

use super::intake::Flow;
use crate::{
    kernel::{Arrived, Counters, Kernel, KernelError},
    profile::FlushedWindow,
};

/// Readings of the counters until two in succession are equal. A CPU at work changes them every millisecond at most; two
/// readings take some ten microseconds.
const MAX_READINGS: u32 = 16;
/// How long a sample that the kernel has counted as sent may take until the reader has it. It takes microseconds, or as long
/// as a hypervisor stops the CPU that writes a record before it.
const TRANSIT_TIME: Duration = Duration::from_secs(1);

/// Reads the counters of the BPF programs, and how far the ring buffer was read.
pub(super) trait CounterSource {
    fn cpu_counters(&self) -> Result<Vec<Counters>, KernelError>;
    /// Returns an upper bound of the samples that no program saw.
    fn skipped_samples(&self) -> u64;
    fn arrived(&self) -> &Arrived;
}

impl CounterSource for Kernel {
    fn cpu_counters(&self) -> Result<Vec<Counters>, KernelError> {
        Self::cpu_counters(self)
    }

    fn skipped_samples(&self) -> u64 {
        Self::skipped_samples(self)
    }

    fn arrived(&self) -> &Arrived {
        Self::arrived(self)
    }
}

/// The samples of a window that was closed, each once for each rule that asked for it.
#[derive(Clone, Copy, Debug)]
pub(super) struct ClosedSamples {
    /// In its profiles.
    pub(super) delivered: u64,
    /// Of a rule that was removed meanwhile.
    pub(super) removed: u64,
    /// In the backlog: they belong to a later window.
    pub(super) waiting: u64,
}

impl ClosedSamples {
    /// Counts what the profiles of a window really hold. `waiting` samples are in the backlog.
    pub(super) fn of(flushed: &FlushedWindow, waiting: u64) -> Self {
        let delivered = flushed.profiles.iter().map(|profile| profile.samples).sum();
        Self { delivered, removed: flushed.removed, waiting }
    }
}

/// The counters of all CPUs, before the reader reads up to the cut.
pub(super) struct Reading {
    /// `None` for a CPU whose counters did not stand still.
    cpus: Vec<Option<Counters>>,
    skipped: u64,
    at: Instant,
}

pub(super) struct Account {
    cpus: Vec<Cpu>,
    skipped: u64,
    /// When all records up to `Cpu::due` were sent.
    due_at: Instant,
    /// Up to the last window.
    past: Totals,
    /// All windows that are closed.
    closed: Ledger,
    full_rings: Vec<usize>,
}

/// One CPU at the last cut.
#[derive(Clone, Copy, Debug, Default)]
struct Cpu {
    ticks: u64,
    /// Samples that were taken and never sent: lost for a reason, or without one.
    unsent: u64,
    ring_full: u64,
    map_full: u64,
    rate_limit: u64,
    chain: u64,
    /// The cut: the samples that were sent up to it.
    cut: u64,
    /// Samples that had been sent at [`Account::due_at`].
    due: u64,
}

/// Sums since the start, up to a cut.
#[derive(Clone, Debug, Default)]
struct Totals {
    /// Ticks, and samples that were lost before they could be in a window.
    ledger: Ledger,
    /// Samples that were taken for the window: without those of the flight recorder, with those that the agent took itself.
    taken: i64,
    waiting: u64,
}

impl Account {
    /// Starts at the present counters.
    pub(super) fn new(source: &impl CounterSource) -> Result<Self, KernelError> {
        let mut account = Self {
            cpus: vec![Cpu::default(); source.cpu_counters()?.len()],
            skipped: 0,
            due_at: Instant::now(),
            past: Totals::default(),
            closed: Ledger::default(),
            full_rings: Vec::new(),
        };
        let reading = read(source)?;
        account.cpus = account.cpus_at(&reading, source.arrived(), true);
        account.skipped = reading.skipped;
        account.past = totals(&account.cpus, reading.skipped, source.arrived(), &Flow::default(), 0);
        Ok(account)
    }

    /// Reports whether the reader has each sample that was sent before the reading.
    pub(super) fn has_arrived(reading: &Reading, arrived: &Arrived) -> bool {
        reading.cpus.iter().enumerate().all(|(cpu, counters)| {
            counters.is_some_and(|counters| counters.open == 0 && counters.sent <= arrived.of_cpu(cpu))
        })
    }

    /// Closes a window: returns its ledger. With `is_last`, no sample is on its way any more.
    pub(super) fn close(
        &mut self,
        source: &impl CounterSource,
        reading: Option<&Reading>,
        flow: &Flow,
        samples: ClosedSamples,
        is_last: bool,
    ) -> Ledger {
        let ClosedSamples { delivered, removed, waiting } = samples;
        let former: Vec<u64> = self.cpus.iter().map(|cpu| cpu.ring_full).collect();
        if let Some(reading) = reading {
            self.cpus = self.cpus_at(reading, source.arrived(), is_last);
            self.skipped = reading.skipped;
            if self.is_due(reading) {
                self.due_at = reading.at;
                for (cpu, counters) in self.cpus.iter_mut().zip(&reading.cpus) {
                    cpu.due = counters.map_or(cpu.due, |counters| counters.sent);
                }
            }
        } else {
            for (index, cpu) in self.cpus.iter_mut().enumerate() {
                cpu.cut = cpu.cut.max(source.arrived().of_cpu(index));
            }
        }
        let is_fuller =
            |(index, (cpu, former)): (usize, (&Cpu, u64))| (cpu.ring_full > former).then_some(index);
        self.full_rings = self.cpus.iter().zip(former).enumerate().filter_map(is_fuller).collect();
        let totals = totals(&self.cpus, self.skipped, source.arrived(), flow, waiting);
        let mut ledger = totals.since(&self.past);
        let deficit = totals.taken_since(&self.past).min(0);
        self.past = totals;
        // A window cannot take less than nothing: the next one has what this one lacks.
        self.past.taken -= deficit;
        ledger.delivered = delivered;
        ledger.lose(LossReason::RuleRemoved, removed);
        self.closed.merge(&ledger);
        ledger
    }

    /// Returns the CPUs that found the ring buffer full in the last window.
    pub(super) fn full_rings(&self) -> &[usize] {
        &self.full_rings
    }

    /// Returns the ledger since the engine started. `open` counts the samples of the open window, and `awaited` those samples
    /// of the backlog that will be in a window: both are pending.
    pub(super) fn ledger(
        &self,
        source: &impl CounterSource,
        flow: &Flow,
        (open, awaited, waiting): (u64, u64, u64),
    ) -> Ledger {
        let mut ledger = self.closed.clone();
        if let Ok(reading) = read(source) {
            let cpus = self.cpus_at(&reading, source.arrived(), false);
            let totals = totals(&cpus, reading.skipped, source.arrived(), flow, waiting);
            ledger.merge(&totals.since(&self.past));
            ledger.taken += awaited;
        }
        ledger.pending += open + awaited;
        ledger
    }

    /// Returns whether samples that were sent before the last such reading have arrived by now, or never will.
    fn is_due(&self, reading: &Reading) -> bool {
        reading.at.saturating_duration_since(self.due_at) >= TRANSIT_TIME
    }

    fn cpus_at(&self, reading: &Reading, arrived: &Arrived, is_last: bool) -> Vec<Cpu> {
        let is_due = self.is_due(reading);
        let at = |(index, (former, counters)): (usize, (&Cpu, &Option<Counters>))| {
            let mut cpu = *former;
            cpu.cut = cpu.cut.max(arrived.of_cpu(index));
            if is_due {
                cpu.cut = cpu.cut.max(cpu.due);
            }
            if let Some(counters) = counters {
                cpu.ticks = counters.ticks;
                cpu.unsent = counters.taken.wrapping_sub(counters.open).wrapping_sub(counters.sent);
                cpu.ring_full = counters.lost_ring_full;
                cpu.map_full = counters.lost_off_cpu_full;
                cpu.rate_limit = counters.lost_off_cpu_rate;
                cpu.chain = counters.lost_chain;
                if is_last {
                    cpu.cut = cpu.cut.max(counters.sent);
                }
            }
            cpu
        };
        self.cpus.iter().zip(&reading.cpus).enumerate().map(at).collect()
    }
}

fn totals(cpus: &[Cpu], skipped: u64, arrived: &Arrived, flow: &Flow, waiting: u64) -> Totals {
    let sum = |of: fn(&Cpu) -> u64| cpus.iter().map(of).fold(0, u64::wrapping_add);
    let mut ledger = Ledger { ticks: sum(|cpu| cpu.ticks), ..Ledger::default() };
    ledger.lose(LossReason::RingFull, sum(|cpu| cpu.ring_full));
    ledger.lose(LossReason::MapFull, sum(|cpu| cpu.map_full));
    ledger.lose(LossReason::RateLimit, sum(|cpu| cpu.rate_limit));
    ledger.lose(LossReason::StackMissing, sum(|cpu| cpu.chain));
    ledger.lose(LossReason::Skipped, skipped);
    ledger.lose(LossReason::Undecodable, arrived.undecodable());
    for (reason, n) in &flow.lost {
        ledger.lose(*reason, *n);
    }
    let kernel = sum(|cpu| cpu.unsent.wrapping_add(cpu.cut)).wrapping_add(skipped);
    let taken = kernel.wrapping_add(flow.taken).wrapping_sub(flow.recorded);
    Totals { ledger, taken: taken.cast_signed(), waiting }
}

impl Totals {
    /// Returns the ledger of the time between two cuts, with nothing delivered yet.
    fn since(&self, past: &Self) -> Ledger {
        let taken = self.taken_since(past).max(0).cast_unsigned();
        let ticks = self.ledger.ticks.saturating_sub(past.ledger.ticks);
        let mut since = Ledger { ticks, taken, ..Ledger::default() };
        for (reason, n) in &self.ledger.lost {
            since.lose(*reason, n.saturating_sub(past.ledger.lost.get(reason).copied().unwrap_or(0)));
        }
        since
    }

    /// Returns the samples taken between two cuts. Negative if more samples wait than the cut knows.
    fn taken_since(&self, past: &Self) -> i64 {
        self.taken - past.taken + past.waiting.cast_signed() - self.waiting.cast_signed()
    }
}

/// Reads the counters of each CPU at a moment when they stand still. The caller then reads the ring buffer, and closes the
/// window with them.
pub(super) fn read(source: &impl CounterSource) -> Result<Reading, KernelError> {
    let mut before = source.cpu_counters()?;
    let mut cpus = vec![None; before.len()];
    for _ in 0..MAX_READINGS {
        let now = source.cpu_counters()?;
        for (stable, (before, now)) in cpus.iter_mut().zip(before.iter().zip(&now)) {
            if stable.is_none() && samples_of(before) == samples_of(now) {
                *stable = Some(*now);
            }
        }
        if cpus.iter().all(Option::is_some) {
            break;
        }
        before = now;
    }
    Ok(Reading { cpus, skipped: source.skipped_samples(), at: Instant::now() })
}

/// Returns the counters that change with each sample.
fn samples_of(counters: &Counters) -> [u64; 7] {
    let Counters {
        taken, open, sent, lost_ring_full, lost_off_cpu_full, lost_off_cpu_rate, lost_chain, ..
    } = *counters;
    [taken, open, sent, lost_ring_full, lost_off_cpu_full, lost_off_cpu_rate, lost_chain]
}

#[cfg(test)]
mod tests;
