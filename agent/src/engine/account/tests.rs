//! The account with counters of a kernel that the tests make.

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

use super::{
    super::intake::{Intake, StackEnds},
    *,
};
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
        list_layout: 0,
        labels: None,
        raw: None,
    }
}

/// Sends samples, lets `take` decide what the intake gets of them, and closes the window as the engine does.
fn through_window(samples: &[Sample], take: impl Fn(&mut Intake, Sample)) -> Ledger {
    let mut rules = RuleBook::new(Caps::default());
    let rule = ad_hoc("a", Match { comm: vec!["x".into()], ..Match::default() }, 19, &[capture::Kind::OnCpu]);
    let set = SourceRules { rules: vec![rule], ..SourceRules::default() };
    rules.replace(RuleSource::Local, set, SystemTime::now());
    rules.assign_slots(SystemTime::now());
    let processes = ProcessTable::new(CgroupHierarchy::detect(), 100, NonZeroUsize::MIN, None);
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
    for end in [StackEnd::Broken, StackEnd::Unreadable] {
        check_unreadable(end);
    }
}

#[track_caller]
fn check_unreadable(end: StackEnd) {
    let mut unreadable = sample(3, 1);
    unreadable.user.clear();
    unreadable.end = end;
    let mut by_kernel = unreadable.clone();
    by_kernel.kernel = vec![1];
    let samples = [sample(1, 1), unreadable, by_kernel, Sample { end, ..sample(4, 1) }];
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
fn a_stack_counts_once_by_its_end() {
    let of = |end, kernel_truncated, guessed| {
        let mut intake = Intake::new(Duration::from_secs(1));
        let marks = StackMarks { kernel_truncated, guessed_from: guessed };
        intake.add(Sample { end, marks, ..sample(1, 1) });
        let StackEnds { complete, truncated, broken, unreadable, guessed } = intake.stack_ends();
        [complete, truncated, broken, unreadable, guessed]
    };
    let (complete, truncated, broken) = ([1, 0, 0, 0, 0], [0, 1, 0, 0, 0], [0, 0, 1, 0, 0]);
    assert_eq!(of(StackEnd::Complete, false, None), complete);
    assert_eq!(of(StackEnd::None, false, None), complete);
    assert_eq!(of(StackEnd::Complete, false, Some(1)), [0, 0, 0, 0, 1]);
    // A stack that lacks frames is no complete one, whatever it rests on.
    for guessed in [None, Some(1)] {
        assert_eq!(of(StackEnd::Complete, true, guessed), truncated);
        assert_eq!(of(StackEnd::Truncated, false, guessed), truncated);
        for end in [StackEnd::Broken, StackEnd::NotUnwound] {
            assert_eq!(of(end, true, guessed), broken);
        }
        assert_eq!(of(StackEnd::Unreadable, true, guessed), [0, 0, 0, 1, 0]);
    }
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
