//! The flight recorder: the last seconds of what watched processes did, in bounded memory. A capture that starts takes
//! its lead-up from here; what nobody takes is forgotten.

use std::{collections::VecDeque, mem::size_of, time::Duration};

use crate::model::Sample;

/// Samples by time.
#[derive(Debug)]
pub struct Recorder {
    samples: VecDeque<Sample>,
    bytes: usize,
    most_bytes: usize,
    keep: Duration,
    stats: RecorderStats,
}

/// What the recorder has done.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct RecorderStats {
    /// Samples recorded.
    pub recorded: u64,
    /// Forgotten before their time, for want of memory.
    pub crowded_out: u64,
    /// Taken as lead-up.
    pub taken: u64,
    /// Held now.
    pub held: u64,
    /// Bytes held now.
    pub bytes: u64,
}

impl Recorder {
    /// Holds at most so many bytes.
    pub fn new(most_bytes: usize) -> Self {
        let samples = VecDeque::new();
        Self { samples, bytes: 0, most_bytes, keep: Duration::ZERO, stats: RecorderStats::default() }
    }

    /// Holds samples for so long from now on.
    pub fn keep_for(&mut self, keep: Duration) {
        self.keep = keep;
    }

    /// Holds at most so many bytes from now on.
    pub fn set_most_bytes(&mut self, most_bytes: usize) {
        self.most_bytes = most_bytes;
        self.shrink();
    }

    /// Records one. Samples come in the kernel's order, those that waited for tables a little later.
    pub fn add(&mut self, sample: Sample) {
        let now = sample.subject.ktime_ns;
        self.bytes += size_of_sample(&sample);
        self.samples.push_back(sample);
        self.stats.recorded += 1;
        self.shrink();
        self.forget(now);
    }

    /// Drops what is too old at this moment of the boot clock.
    pub fn forget(&mut self, now_ns: u64) {
        let oldest = now_ns.saturating_sub(u64::try_from(self.keep.as_nanos()).unwrap_or(u64::MAX));
        while self.samples.front().is_some_and(|sample| sample.subject.ktime_ns < oldest) {
            self.pop();
        }
    }

    /// The samples since a moment of the boot clock that are of this slot and of whom `of` says; they stay, for other
    /// captures.
    pub fn since(&mut self, since_ns: u64, slot: u32, of: impl Fn(&Sample) -> bool) -> Vec<Sample> {
        let wanted = |sample: &&Sample| {
            sample.subject.ktime_ns >= since_ns && sample.subject.rules >> slot & 1 == 1 && of(sample)
        };
        let taken: Vec<Sample> = self.samples.iter().filter(wanted).cloned().collect();
        self.stats.taken += taken.len() as u64;
        taken
    }

    /// Forgets for which slots samples were taken: these are given to other rules.
    pub fn forget_slots(&mut self, slots: u64) {
        for sample in &mut self.samples {
            sample.subject.rules &= !slots;
        }
    }

    /// Counts.
    pub fn stats(&self) -> RecorderStats {
        RecorderStats { held: self.samples.len() as u64, bytes: self.bytes as u64, ..self.stats }
    }

    fn shrink(&mut self) {
        while self.bytes > self.most_bytes && self.pop() {
            self.stats.crowded_out += 1;
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
            state: 0,
            raw: None,
        }
    }

    #[test]
    fn r19_the_last_seconds_are_there_and_no_more() {
        let mut recorder = Recorder::new(1 << 20);
        recorder.keep_for(Duration::from_secs(10));
        for second in 0..100 {
            recorder.add(sample(second, 1 + (second % 2) as u32, 1 << (second % 3)));
        }
        assert_eq!(recorder.stats().held, 11);
        let lead_up = recorder.since(95 * 1_000_000_000, 0, |sample| sample.subject.key.tgid == 1);
        let times: Vec<u64> = lead_up.iter().map(|sample| sample.subject.ktime_ns / 1_000_000_000).collect();
        assert_eq!(times, [96]);
        recorder.forget(200 * 1_000_000_000);
        assert_eq!((recorder.stats().held, recorder.stats().bytes, recorder.stats().crowded_out), (0, 0, 0));
    }

    #[test]
    fn r19_memory_is_bounded_and_what_it_costs_is_counted() {
        let one = size_of_sample(&sample(0, 1, 1));
        let mut recorder = Recorder::new(10 * one);
        recorder.keep_for(Duration::from_secs(1000));
        for second in 0..100 {
            recorder.add(sample(second, 1, 1));
            assert!(recorder.stats().bytes <= 10 * one as u64);
        }
        assert_eq!((recorder.stats().held, recorder.stats().crowded_out), (10, 90));
        recorder.set_most_bytes(0);
        assert_eq!(recorder.stats().bytes, 0);
    }

    #[test]
    fn a_lead_up_holds_nothing_of_the_rule_that_had_the_place_before() {
        let mut recorder = Recorder::new(1 << 20);
        recorder.keep_for(Duration::from_secs(10));
        recorder.add(sample(1, 1, 0b11));
        recorder.forget_slots(0b01);
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
