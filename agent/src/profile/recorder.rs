//! The flight recorder: the samples of the last seconds, in bounded memory. A capture takes the samples of its pre-trigger
//! window from here; others are dropped when they are old.

use std::{collections::VecDeque, mem::size_of, time::Duration};

use crate::model::Sample;

/// The flight recorder.
#[derive(Debug)]
pub(crate) struct Recorder {
    /// In the order in which they came.
    samples: VecDeque<Sample>,
    bytes: usize,
    max_bytes: usize,
    max_age: Duration,
    stats: RecorderStats,
}

/// Counts of a [`Recorder`].
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct RecorderStats {
    /// Number of recorded samples.
    pub recorded: u64,
    /// Samples dropped early for lack of memory.
    pub evicted: u64,
    /// Samples that captures took.
    pub taken: u64,
    /// Samples that it holds now.
    pub held: u64,
    /// Bytes that it holds now.
    pub bytes: u64,
}

impl Recorder {
    /// Builds a recorder that holds at most `max_bytes` bytes. It drops every sample at once until
    /// [`set_max_age`](Self::set_max_age) is called.
    pub(crate) fn new(max_bytes: usize) -> Self {
        let samples = VecDeque::new();
        Self { samples, bytes: 0, max_bytes, max_age: Duration::ZERO, stats: RecorderStats::default() }
    }

    /// Sets the age at which samples are dropped.
    pub(crate) fn set_max_age(&mut self, max_age: Duration) {
        self.max_age = max_age;
    }

    /// Sets the memory bound, and drops the oldest samples beyond it.
    pub(crate) fn set_max_bytes(&mut self, max_bytes: usize) {
        self.max_bytes = max_bytes;
        self.shrink();
    }

    /// Records a sample. Samples come in the kernel's order; those that waited for unwind tables come a little later.
    pub(crate) fn add(&mut self, sample: Sample) {
        let now = sample.subject.ktime_ns;
        self.bytes += size_of_sample(&sample);
        self.samples.push_back(sample);
        self.stats.recorded += 1;
        self.shrink();
        self.drop_old(now);
    }

    /// Drops samples that are too old at this boot time.
    pub(crate) fn drop_old(&mut self, now_ns: u64) {
        let oldest = now_ns.saturating_sub(u64::try_from(self.max_age.as_nanos()).unwrap_or(u64::MAX));
        while self.samples.front().is_some_and(|sample| sample.subject.ktime_ns < oldest) {
            self.pop();
        }
    }

    /// Returns the samples since this boot time that are of this slot and that `of` selects. They stay, for other captures.
    pub(crate) fn since(&mut self, since_ns: u64, slot: u32, of: impl Fn(&Sample) -> bool) -> Vec<Sample> {
        let wanted = |sample: &&Sample| {
            sample.subject.ktime_ns >= since_ns && sample.subject.rules >> slot & 1 == 1 && of(sample)
        };
        let taken: Vec<Sample> = self.samples.iter().filter(wanted).cloned().collect();
        self.stats.taken += taken.len() as u64;
        taken
    }

    /// Takes these slots from all samples, before the slots are given to other rules.
    pub(crate) fn clear_slots(&mut self, slots: u64) {
        for sample in &mut self.samples {
            sample.subject.rules &= !slots;
        }
    }

    /// Returns the counts so far.
    pub(crate) fn stats(&self) -> RecorderStats {
        RecorderStats { held: self.samples.len() as u64, bytes: self.bytes as u64, ..self.stats }
    }

    fn shrink(&mut self) {
        while self.bytes > self.max_bytes && self.pop() {
            self.stats.evicted += 1;
        }
    }

    fn pop(&mut self) -> bool {
        let Some(sample) = self.samples.pop_front() else { return false };
        self.bytes -= size_of_sample(&sample);
        true
    }
}

fn size_of_sample(sample: &Sample) -> usize {
    size_of::<Sample>()
        + 8 * (sample.kernel.capacity() + sample.user.capacity())
        + sample.subject.comm.capacity()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::model::{ProcessKey, SampleKind, StackEnd, Subject};

    fn sample(at_s: u64, tgid: u32, rules: u64) -> Sample {
        Sample {
            subject: Subject {
                key: ProcessKey { tgid, start_boottime_ns: 1 },
                exec_id: 1,
                ktime_ns: at_s * 1_000_000_000,
                cgroup_id: 1,
                comm: "x".into(),
                rules,
                candidates: 0,
            },
            tid: tgid,
            kind: SampleKind::OnCpu,
            value_ns: 1,
            kernel: vec![1; 10],
            user: vec![2; 30],
            end: StackEnd::Complete,
            end_code: 1,
            marks: crate::model::StackMarks::default(),
            state: 0,
            list_layout: 0,
            labels: None,
            raw: None,
        }
    }

    /// Checks the age bound (R19).
    #[test]
    fn it_holds_the_last_seconds_and_no_more() {
        let mut recorder = Recorder::new(1 << 20);
        recorder.set_max_age(Duration::from_secs(10));
        for second in 0..100 {
            recorder.add(sample(second, 1 + (second % 2) as u32, 1 << (second % 3)));
        }
        assert_eq!(recorder.stats().held, 11);
        let taken = recorder.since(95 * 1_000_000_000, 0, |sample| sample.subject.key.tgid == 1);
        let times: Vec<u64> = taken.iter().map(|sample| sample.subject.ktime_ns / 1_000_000_000).collect();
        assert_eq!(times, [96]);
        recorder.drop_old(200 * 1_000_000_000);
        assert_eq!((recorder.stats().held, recorder.stats().bytes, recorder.stats().evicted), (0, 0, 0));
    }

    /// Checks the memory bound (R19).
    #[test]
    fn memory_is_bounded_and_evictions_are_counted() {
        let one = size_of_sample(&sample(0, 1, 1));
        let mut recorder = Recorder::new(10 * one);
        recorder.set_max_age(Duration::from_secs(1000));
        for second in 0..100 {
            recorder.add(sample(second, 1, 1));
            assert!(recorder.stats().bytes <= 10 * one as u64);
        }
        assert_eq!((recorder.stats().held, recorder.stats().evicted), (10, 90));
        recorder.set_max_bytes(0);
        assert_eq!(recorder.stats().bytes, 0);
    }

    #[test]
    fn a_capture_takes_nothing_of_the_former_rule_of_its_slot() {
        let mut recorder = Recorder::new(1 << 20);
        recorder.set_max_age(Duration::from_secs(10));
        recorder.add(sample(1, 1, 0b11));
        recorder.clear_slots(0b01);
        recorder.add(sample(2, 1, 0b01));
        let of = |recorder: &mut Recorder, slot| -> Vec<u64> {
            recorder
                .since(0, slot, |_| true)
                .iter()
                .map(|sample| sample.subject.ktime_ns / 1_000_000_000)
                .collect()
        };
        assert_eq!((of(&mut recorder, 0), of(&mut recorder, 1)), (vec![2], vec![1]));
    }
}
