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
mod tests {
    use std::{
        cell::{Cell, RefCell},
        num::NonZeroUsize,
        time::SystemTime,
    };

    use gannet_proto::{
        control::{Match, capture},
        rules::Caps,
    };
    use proptest::prelude::*;

    use super::{super::intake::Intake, *};
    use crate::{
        cgroup::CgroupHierarchy,
        model::{ProcessKey, Sample, SampleKind, StackEnd, StackMarks, Subject},
        process::ProcessTable,
        rules::{RuleBook, RuleSource, SourceRules, ad_hoc},
    };

    /// A kernel and its reader, without samples: only what both count.
    #[derive(Default)]
    struct Source {
        cpus: RefCell<Vec<Counters>>,
        arrived: Arrived,
        skipped: u64,
        fails: Cell<bool>,
        /// Samples that are in the ring buffer: CPU, sequence, rules.
        ring: Vec<(usize, u64, u64)>,
        /// Samples that the reader has.
        read: u64,
    }

    impl CounterSource for Source {
        fn cpu_counters(&self) -> Result<Vec<Counters>, KernelError> {
            if self.fails.get() {
                return Err(KernelError::Scan(std::io::Error::other("no counters")));
            }
            Ok(self.cpus.borrow().clone())
        }

        fn skipped_samples(&self) -> u64 {
            self.skipped
        }

        fn arrived(&self) -> &Arrived {
            &self.arrived
        }
    }

    impl Source {
        fn new(cpus: usize) -> Self {
            Self { cpus: RefCell::new(vec![Counters::default(); cpus]), ..Self::default() }
        }

        fn cpu(&mut self, cpu: usize, change: impl FnOnce(&mut Counters)) {
            change(&mut self.cpus.get_mut()[cpu]);
        }

        /// A program takes a sample that this number of rules want, and sends it.
        fn send(&mut self, cpu: usize, rules: u64) {
            let sequence = self.cpus.get_mut()[cpu].sent;
            self.ring.push((cpu, sequence, rules));
            self.cpu(cpu, |counters| {
                counters.ticks += 1;
                counters.taken += rules;
                counters.sent += rules;
            });
        }

        fn lose(&mut self, cpu: usize, of: fn(&mut Counters) -> &mut u64, n: u64) {
            self.cpu(cpu, |counters| {
                counters.taken += n;
                *of(counters) += n;
            });
        }

        fn read_ring(&mut self) {
            for (cpu, sequence, rules) in std::mem::take(&mut self.ring) {
                self.arrived.sample(cpu as u32, sequence, rules);
                self.read += rules;
            }
        }

        /// Closes a window with all samples that were read since the last one.
        fn close(&mut self, account: &mut Account, is_last: bool) -> Ledger {
            let reading = read(self).ok();
            self.read_ring();
            let delivered = std::mem::take(&mut self.read);
            let samples = ClosedSamples { delivered, removed: 0, waiting: 0 };
            account.close(self, reading.as_ref(), &Flow::default(), samples, is_last)
        }
    }

    #[track_caller]
    fn assert_ledger(ledger: &Ledger, taken: u64, delivered: u64, lost: &[(LossReason, u64)], missing: i64) {
        assert_eq!((ledger.taken, ledger.delivered), (taken, delivered), "{ledger}");
        assert_eq!(ledger.lost, lost.iter().copied().collect(), "{ledger}");
        assert_eq!(ledger.unaccounted(), missing, "{ledger}");
    }

    #[test]
    fn a_window_has_what_happened_since_the_last_one() {
        let mut source = Source::new(2);
        source.send(0, 1000);
        source.lose(1, |counters| &mut counters.lost_ring_full, 1000);
        source.read_ring();
        source.read = 0;
        let mut account = Account::new(&source).unwrap();
        (0..20).for_each(|n| source.send(n % 2, 1));
        source.lose(0, |counters| &mut counters.lost_ring_full, 1);
        source.lose(1, |counters| &mut counters.lost_off_cpu_full, 2);
        source.lose(1, |counters| &mut counters.lost_off_cpu_rate, 3);
        source.lose(0, |counters| &mut counters.lost_chain, 4);
        source.skipped += 5;
        let window = source.close(&mut account, false);
        let lost = [
            (LossReason::RingFull, 1),
            (LossReason::MapFull, 2),
            (LossReason::RateLimit, 3),
            (LossReason::StackMissing, 4),
            (LossReason::Skipped, 5),
        ];
        assert_ledger(&window, 35, 20, &lost, 0);
        assert_eq!(window.ticks, 20);
        source.send(0, 5);
        assert_ledger(&source.close(&mut account, false), 5, 5, &[], 0);
        assert_ledger(&account.ledger(&source, &Flow::default(), (0, 0, 0)), 40, 25, &lost, 0);
    }

    /// Checks the point of the whole: what the ring buffer loses is missing, though no part of the agent noticed it.
    #[test]
    fn a_record_that_the_ring_loses_is_unaccounted() {
        for lost in 0..3 {
            let mut source = Source::new(1);
            let mut account = Account::new(&source).unwrap();
            (0..3).for_each(|_| source.send(0, 1));
            source.ring.remove(lost);
            let first = source.close(&mut account, false);
            // The last record is known to be missing only when it is overdue.
            let overdue = lost == 2;
            assert_ledger(&first, if overdue { 2 } else { 3 }, 2, &[], i64::from(!overdue));
            assert_ledger(&source.close(&mut account, false), 0, 0, &[], 0);
            account.due_at -= TRANSIT_TIME;
            source.close(&mut account, false);
            account.due_at -= TRANSIT_TIME;
            source.close(&mut account, false);
            assert_ledger(&account.closed, 3, 2, &[], 1);
        }
    }

    #[test]
    fn a_window_that_lacks_samples_leaves_the_lack_to_the_next() {
        let source = Source::new(1);
        let mut account = Account::new(&source).unwrap();
        let reading = read(&source).unwrap();
        let mut close = |waiting| {
            let samples = ClosedSamples { delivered: 0, removed: 0, waiting };
            account.close(&source, Some(&reading), &Flow::default(), samples, false)
        };
        // Three samples wait that the counters did not know of.
        assert_ledger(&close(3), 0, 0, &[], 0);
        assert_ledger(&close(3), 0, 0, &[], 0);
        assert_ledger(&close(0), 0, 0, &[], 0);
        assert_ledger(&account.closed, 0, 0, &[], 0);
    }

    #[test]
    fn the_last_window_waits_for_no_record() {
        let mut source = Source::new(2);
        let mut account = Account::new(&source).unwrap();
        (0..4).for_each(|n| source.send(n % 2, 2));
        source.ring.pop();
        let reading = read(&source).unwrap();
        assert!(!Account::has_arrived(&reading, &source.arrived));
        let mut working = Source::new(1);
        working.send(0, 1);
        working.read_ring();
        assert!(Account::has_arrived(&read(&working).unwrap(), &working.arrived));
        working.cpu(0, |counters| counters.open = 1);
        assert!(!Account::has_arrived(&read(&working).unwrap(), &working.arrived), "one is in work");
        assert_ledger(&source.close(&mut account, true), 8, 6, &[], 2);
    }

    #[test]
    fn rings_that_were_full_in_the_last_window_are_named() {
        let mut source = Source::new(3);
        let mut account = Account::new(&source).unwrap();
        for full in [&[1][..], &[0, 2], &[]] {
            for cpu in full {
                source.lose(*cpu, |counters| &mut counters.lost_ring_full, 2);
            }
            source.close(&mut account, false);
            assert_eq!(account.full_rings(), full);
        }
    }

    fn sample(tid: u32, rules: u64) -> Sample {
        let key = ProcessKey { tgid: 7, start_boottime_ns: 1 };
        Sample {
            subject: Subject {
                key,
                exec_id: 1,
                ktime_ns: 1,
                cgroup_id: 1,
                comm: "x".into(),
                rules,
                candidates: 0,
            },
            tid,
            kind: SampleKind::OnCpu,
            value_ns: 10,
            kernel: Vec::new(),
            user: vec![0x1000],
            end: StackEnd::Complete,
            end_code: 1,
            marks: StackMarks::default(),
            state: 0,
            raw: None,
        }
    }

    /// Sends samples, lets `take` decide what the intake gets of them, and closes the window as the engine does.
    fn through_window(samples: &[Sample], take: impl Fn(&mut Intake, Sample)) -> Ledger {
        let mut rules = RuleBook::new(Caps::default());
        let rule =
            ad_hoc("a", Match { comm: vec!["x".into()], ..Match::default() }, 19, &[capture::Kind::OnCpu]);
        let set = SourceRules { rules: vec![rule], ..SourceRules::default() };
        rules.replace(RuleSource::Local, set, SystemTime::now());
        rules.assign_slots(SystemTime::now());
        let processes = ProcessTable::new(CgroupHierarchy::detect(), 100, NonZeroUsize::MIN);
        let mut source = Source::new(1);
        let mut account = Account::new(&source).unwrap();
        let mut intake = Intake::new(Duration::from_secs(1));
        for sample in samples {
            source.send(0, sample.subject.rules.count_ones().into());
        }
        let reading = read(&source).unwrap();
        source.read_ring();
        for sample in samples {
            take(&mut intake, sample.clone());
        }
        let flushed = intake.close("n", &processes, &rules).flushed;
        let samples = ClosedSamples::of(&flushed, 0);
        account.close(&source, Some(&reading), intake.flow(), samples, false)
    }

    /// Checks the window itself: a sample that it drops is missing, and one that it cannot flush has a reason.
    #[test]
    fn a_sample_that_the_window_drops_is_unaccounted() {
        let samples: Vec<_> = (0..5).map(|tid| sample(tid, 1)).collect();
        assert_ledger(&through_window(&samples, Intake::add), 5, 5, &[], 0);
        let dropping = through_window(&samples, |intake, sample| {
            let is_last = sample.tid == 4;
            intake.add(sample);
            if is_last {
                intake.drop_one();
            }
        });
        assert_ledger(&dropping, 5, 4, &[], 1);
        // The rule of this slot is gone.
        let removed = [&samples[1..], &[sample(9, 1 << 20)]].concat();
        assert_ledger(&through_window(&removed, Intake::add), 5, 4, &[(LossReason::RuleRemoved, 1)], 0);
    }

    #[test]
    fn a_stack_that_cannot_be_read_is_lost_with_its_reason() {
        let mut unreadable = sample(3, 1);
        unreadable.user.clear();
        unreadable.end = StackEnd::Broken;
        let mut by_kernel = unreadable.clone();
        by_kernel.kernel = vec![1];
        let samples = [sample(1, 1), unreadable, by_kernel, Sample { end: StackEnd::Broken, ..sample(4, 1) }];
        let take = |intake: &mut Intake, sample: Sample| {
            if !intake.lose_unreadable(&sample) {
                intake.add(sample);
            }
        };
        assert_ledger(&through_window(&samples, take), 4, 3, &[(LossReason::StackFault, 1)], 0);
        let silent = |intake: &mut Intake, sample: Sample| {
            if !sample.is_unreadable() {
                intake.add(sample);
            }
        };
        assert_ledger(&through_window(&samples, silent), 4, 3, &[], 1);
    }

    #[test]
    fn a_sample_of_a_capture_that_is_over_is_lost_with_its_reason() {
        // The capture has the second slot; the rule itself goes on.
        let samples = [sample(1, 0b01), sample(2, 0b11), sample(3, 0b10)];
        let strip = |sample: &mut Sample| sample.subject.rules &= 0b01;
        let take = |intake: &mut Intake, mut sample: Sample| {
            intake.lose_rules(LossReason::CaptureOver, &mut sample, strip);
            intake.add(sample);
        };
        assert_ledger(&through_window(&samples, take), 4, 2, &[(LossReason::CaptureOver, 2)], 0);
        let silent = |intake: &mut Intake, mut sample: Sample| {
            strip(&mut sample);
            intake.add(sample);
        };
        assert_ledger(&through_window(&samples, silent), 4, 2, &[], 2);
    }

    /// Counters that change between the two readings that read them.
    struct Busy {
        readings: Cell<u64>,
        still_after: u64,
        arrived: Arrived,
    }

    impl CounterSource for Busy {
        fn cpu_counters(&self) -> Result<Vec<Counters>, KernelError> {
            self.readings.set(self.readings.get() + 1);
            let busy = Counters { sent: self.readings.get().min(self.still_after), ..Counters::default() };
            Ok(vec![busy, Counters { sent: 7, ..Counters::default() }])
        }

        fn skipped_samples(&self) -> u64 {
            3
        }

        fn arrived(&self) -> &Arrived {
            &self.arrived
        }
    }

    #[test]
    fn counters_are_read_when_they_stand_still() {
        let reading = |still_after| {
            let source = Busy { readings: Cell::new(0), still_after, arrived: Arrived::default() };
            let reading = read(&source).unwrap();
            assert_eq!((reading.skipped, reading.cpus[1].map(|cpu| cpu.sent)), (3, Some(7)));
            (reading.cpus[0].map(|cpu| cpu.sent), source.readings.get())
        };
        assert_eq!(reading(1), (Some(1), 2), "no reading more than it takes");
        assert_eq!(reading(5), (Some(5), 6));
        assert_eq!(reading(u64::MAX), (None, 1 + u64::from(MAX_READINGS)));
    }

    #[test]
    fn a_program_that_forgets_a_sample_leaves_it_unaccounted() {
        let mut source = Source::new(1);
        let mut account = Account::new(&source).unwrap();
        source.send(0, 1);
        source.cpu(0, |counters| counters.taken += 1);
        source.send(0, 1);
        assert_ledger(&source.close(&mut account, false), 3, 2, &[], 1);
    }

    #[test]
    fn a_sample_in_work_belongs_to_the_next_window() {
        let mut source = Source::new(1);
        let mut account = Account::new(&source).unwrap();
        source.send(0, 1);
        source.cpu(0, |counters| {
            counters.taken += 3;
            counters.open = 3;
        });
        assert_ledger(&source.close(&mut account, false), 1, 1, &[], 0);
        source.cpu(0, |counters| {
            counters.taken -= 3;
            counters.open = 0;
        });
        source.send(0, 3);
        assert_ledger(&source.close(&mut account, false), 3, 3, &[], 0);
    }

    #[test]
    fn a_record_that_is_read_twice_is_a_negative_difference() {
        let mut source = Source::new(1);
        let mut account = Account::new(&source).unwrap();
        source.send(0, 1);
        source.ring.push(source.ring[0]);
        assert_ledger(&source.close(&mut account, false), 1, 2, &[], -1);
    }

    #[test]
    fn an_undecodable_record_is_lost_under_its_reason() {
        let mut source = Source::new(1);
        let mut account = Account::new(&source).unwrap();
        (0..3).for_each(|_| source.send(0, 1));
        // First without its reason, as if the decoder dropped it without a word.
        source.ring.remove(1);
        assert_ledger(&source.close(&mut account, false), 3, 2, &[], 1);
        source.send(0, 1);
        let Some((cpu, sequence, rules)) = source.ring.pop() else { panic!("a record") };
        source.arrived.sample(cpu as u32, sequence, rules);
        source.arrived.count_undecodable(rules);
        assert_ledger(&source.close(&mut account, false), 1, 0, &[(LossReason::Undecodable, 1)], 0);
    }

    #[test]
    fn samples_of_the_open_window_are_pending() {
        let mut source = Source::new(1);
        let mut account = Account::new(&source).unwrap();
        (0..20).for_each(|_| source.send(0, 1));
        source.close(&mut account, false);
        (0..11).for_each(|_| source.send(0, 1));
        source.lose(0, |counters| &mut counters.lost_ring_full, 3);
        source.read_ring();
        let now = account.ledger(&source, &Flow::default(), (7, 3, 4));
        // One sample of the backlog is for the flight recorder only.
        assert_ledger(&now, 33, 20, &[(LossReason::RingFull, 3)], 0);
        assert_eq!(now.pending, 10);
        // Showing the ledger changes nothing.
        assert_eq!(account.ledger(&source, &Flow::default(), (7, 3, 4)), now);
    }

    #[test]
    fn waiting_and_recorded_samples_move_between_windows_or_out() {
        let mut source = Source::new(1);
        let mut account = Account::new(&source).unwrap();
        (0..10).for_each(|_| source.send(0, 1));
        let reading = read(&source).ok();
        source.read_ring();
        // Four wait, two are recorded, one has lost its rule; the agent adds five blocked threads itself.
        let mut flow = Flow { taken: 5, recorded: 2, ..Flow::default() };
        flow.lose(LossReason::NoRule, 1);
        let samples = ClosedSamples { delivered: 8, removed: 0, waiting: 4 };
        let window = account.close(&source, reading.as_ref(), &flow, samples, false);
        assert_ledger(&window, 9, 8, &[(LossReason::NoRule, 1)], 0);
        let reading = read(&source).ok();
        let samples = ClosedSamples { delivered: 3, removed: 1, waiting: 0 };
        let window = account.close(&source, reading.as_ref(), &flow, samples, false);
        assert_ledger(&window, 4, 3, &[(LossReason::RuleRemoved, 1)], 0);
    }

    #[test]
    fn losses_that_cannot_be_read_go_to_the_next_window() {
        let mut source = Source::new(1);
        let mut account = Account::new(&source).unwrap();
        (0..8).for_each(|_| source.send(0, 1));
        source.lose(0, |counters| &mut counters.lost_ring_full, 1);
        source.fails.set(true);
        assert_ledger(&source.close(&mut account, false), 8, 8, &[], 0);
        source.fails.set(false);
        (0..9).for_each(|_| source.send(0, 1));
        source.lose(0, |counters| &mut counters.lost_ring_full, 1);
        assert_ledger(&source.close(&mut account, false), 11, 9, &[(LossReason::RingFull, 2)], 0);
    }

    #[derive(Clone, Debug)]
    enum Step {
        Send(usize, u64),
        Lose(usize, u64),
        Read,
        DropFromRing(usize),
        Close,
    }

    fn step() -> impl Strategy<Value = Step> {
        prop_oneof![
            8 => (0_usize..3, 1_u64..4).prop_map(|(cpu, rules)| Step::Send(cpu, rules)),
            1 => (0_usize..3, 1_u64..4).prop_map(|(cpu, rules)| Step::Lose(cpu, rules)),
            3 => Just(Step::Read),
            1 => any::<usize>().prop_map(Step::DropFromRing),
            1 => Just(Step::Close),
        ]
    }

    proptest! {
        /// Checks that exactly the dropped records are unaccounted, wherever the windows end.
        #[test]
        fn exactly_the_dropped_records_are_unaccounted(steps in prop::collection::vec(step(), 0..200)) {
            let mut source = Source::new(3);
            let mut account = Account::new(&source).unwrap();
            let (mut sent, mut lost, mut dropped) = (0, 0, 0);
            for step in steps {
                match step {
                    Step::Send(cpu, rules) => {
                        source.send(cpu, rules);
                        sent += rules;
                    }
                    Step::Lose(cpu, rules) => {
                        source.lose(cpu, |counters| &mut counters.lost_ring_full, rules);
                        lost += rules;
                    }
                    Step::Read => source.read_ring(),
                    Step::DropFromRing(at) => {
                        if !source.ring.is_empty() {
                            dropped += source.ring.remove(at % source.ring.len()).2;
                        }
                    }
                    Step::Close => {
                        let window = source.close(&mut account, false);
                        prop_assert!(window.unaccounted() >= 0, "{window}");
                        if dropped == 0 {
                            prop_assert_eq!(window.unaccounted(), 0);
                        }
                    }
                }
            }
            source.close(&mut account, true);
            prop_assert_eq!(account.closed.taken, sent + lost);
            prop_assert_eq!(account.closed.delivered, sent - dropped);
            prop_assert_eq!(account.closed.unaccounted(), dropped.cast_signed());
        }
    }
}
