//! Off-CPU time already reported for threads that are still blocked.
//!
//! The kernel reports a thread when it returns to a CPU, with all its time off it. At the end of each window the worker
//! also adds the time so far of threads that are still blocked. This owner subtracts what an earlier window reported.

use std::collections::HashMap;

use crate::model::Sample;

/// A thread's time off the CPU, by thread id and by when it left the CPU (boot clock, nanoseconds).
type Interval = (u32, u64);

#[derive(Default)]
pub(super) struct OffCpu {
    /// Nanoseconds already reported of intervals that last.
    reported: HashMap<Interval, u64>,
    /// Likewise, of threads that were not blocked any more when the last window was closed: the kernel may have reported
    /// their return already, but behind what the worker had read of the ring buffer.
    returning: HashMap<Interval, u64>,
    is_paused: bool,
}

impl OffCpu {
    /// Takes off the sample of a thread that has returned what was reported of its interval before.
    pub(super) fn returned(&mut self, sample: &mut Sample) {
        let interval = interval(sample);
        let reported =
            self.reported.remove(&interval).or_else(|| self.returning.remove(&interval)).unwrap_or(0);
        sample.value_ns = sample.value_ns.saturating_sub(reported);
    }

    /// Takes the samples of all threads that are blocked now, with their time so far. Returns them with the time that is
    /// not reported yet, those without any left out; from now on it is reported.
    pub(super) fn still_blocked(&mut self, samples: Vec<Sample>) -> Vec<Sample> {
        if self.is_paused {
            return Vec::new();
        }
        let mut former = std::mem::take(&mut self.reported);
        let mut new = Vec::with_capacity(samples.len());
        for mut sample in samples {
            let reported = former.remove(&interval(&sample)).unwrap_or(0);
            self.reported.insert(interval(&sample), sample.value_ns);
            sample.value_ns = sample.value_ns.saturating_sub(reported);
            if sample.value_ns > 0 {
                new.push(sample);
            }
        }
        self.returning = former;
        new
    }

    /// Forgets which time was reported: no rule wants off-CPU time.
    pub(super) fn clear(&mut self) {
        *self = Self { is_paused: self.is_paused, ..Self::default() };
    }

    /// Everything is detached from the kernel: the threads in its map only seem to be blocked still.
    pub(super) fn pause(&mut self) {
        *self = Self { is_paused: true, ..Self::default() };
    }

    /// Everything is attached again, with an empty map.
    pub(super) fn resume(&mut self) {
        self.is_paused = false;
    }
}

fn interval(sample: &Sample) -> Interval {
    (sample.tid, sample.subject.ktime_ns)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::model::{ProcessKey, SampleKind, StackEnd, Subject};

    /// A thread that left the CPU at a boot time, and has been off it for so long.
    fn sample(tid: u32, left_ns: u64, value_ns: u64) -> Sample {
        Sample {
            subject: Subject {
                key: ProcessKey { tgid: 1, start_boottime_ns: 1 },
                exec_id: 1,
                ktime_ns: left_ns,
                cgroup_id: 0,
                comm: String::new(),
                rules: 1,
                candidates: 0,
            },
            tid,
            kind: SampleKind::OffCpu,
            value_ns,
            kernel: Vec::new(),
            user: Vec::new(),
            end: StackEnd::None,
            end_code: 0,
            marks: crate::model::StackMarks::default(),
            state: 1,
            list_layout: 0,
            labels: None,
            raw: None,
        }
    }

    /// Adds up what is reported of a thread.
    fn returned(off_cpu: &mut OffCpu, mut sample: Sample) -> u64 {
        off_cpu.returned(&mut sample);
        sample.value_ns
    }

    fn times(samples: &[Sample]) -> Vec<(u32, u64)> {
        samples.iter().map(|sample| (sample.tid, sample.value_ns)).collect()
    }

    #[test]
    fn each_nanosecond_of_an_interval_is_reported_once() {
        let mut off_cpu = OffCpu::default();
        let first = off_cpu.still_blocked(vec![sample(1, 1000, 30), sample(2, 1010, 20)]);
        assert_eq!(times(&first), [(1, 30), (2, 20)]);
        let second = off_cpu.still_blocked(vec![sample(1, 1000, 130), sample(2, 1010, 120)]);
        assert_eq!(times(&second), [(1, 100), (2, 100)]);
        assert_eq!(returned(&mut off_cpu, sample(1, 1000, 135)), 5);
        // Its next interval is another one.
        assert_eq!(returned(&mut off_cpu, sample(1, 1140, 7)), 7);
        let third = off_cpu.still_blocked(vec![sample(1, 1200, 1), sample(2, 1010, 120)]);
        assert_eq!(times(&third), [(1, 1)]);
    }

    #[test]
    fn no_time_is_reported_while_everything_is_detached() {
        let mut off_cpu = OffCpu::default();
        off_cpu.still_blocked(vec![sample(1, 1000, 30)]);
        off_cpu.pause();
        off_cpu.clear();
        assert_eq!(times(&off_cpu.still_blocked(vec![sample(1, 1000, 5030)])), []);
        off_cpu.resume();
        assert_eq!(times(&off_cpu.still_blocked(vec![sample(1, 9000, 10)])), [(1, 10)]);
    }

    #[test]
    fn a_thread_that_returns_meanwhile_is_not_reported_twice() {
        let mut off_cpu = OffCpu::default();
        off_cpu.still_blocked(vec![sample(1, 1000, 30), sample(2, 1010, 20)]);
        // Both are in the ring buffer already, and are read behind this.
        assert_eq!(times(&off_cpu.still_blocked(Vec::new())), []);
        assert_eq!(returned(&mut off_cpu, sample(1, 1000, 35)), 5);
        // If the second one's return was lost, it is forgotten with the next window.
        off_cpu.still_blocked(Vec::new());
        assert!(off_cpu.returning.is_empty() && off_cpu.reported.is_empty());
    }
}
