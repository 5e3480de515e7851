//! Processes that already ran when a rule came, and that the worker has still to read.
//!
//! Reading them is spread over time, so that a rule that selects all processes of a crowded node neither burns a core nor
//! holds up samples. They are sampled meanwhile; a process with a sample is read at once.

use std::{
    collections::{HashMap, VecDeque},
    time::{Duration, Instant},
};

use crate::model::{Origin, Subject};

/// How long the worker may read without a pause.
const BURST: Duration = Duration::from_millis(20);
/// Beyond the burst, the worker pauses for this many times as long as it has read.
const PAUSE_PARTS: u32 = 4;

pub(super) struct Discovered {
    waiting: Waiting,
    pace: Pace,
}

impl Discovered {
    pub(super) fn new(now: Instant) -> Self {
        Self { waiting: Waiting::default(), pace: Pace::new(now) }
    }

    /// Puts a process behind those that wait; if it waits already, it keeps its position and gets these values.
    pub(super) fn push(&mut self, subject: Subject, origin: Origin) {
        self.waiting.push(subject, origin);
    }

    /// Takes the next process, if there is time to read it now.
    pub(super) fn next(&mut self, now: Instant) -> Option<(Subject, Origin)> {
        if self.waiting.is_empty() || !self.pace.allows(now) {
            return None;
        }
        self.waiting.pop()
    }

    /// Takes the process of this thread group id out of the queue.
    pub(super) fn take(&mut self, tgid: u32) -> Option<(Subject, Origin)> {
        self.waiting.take(tgid)
    }

    /// Empties the queue: the rules have changed, and the kernel reports again which processes they want.
    pub(super) fn clear(&mut self) {
        self.waiting = Waiting::default();
    }

    pub(super) fn len(&self) -> usize {
        self.waiting.by_tgid.len()
    }

    pub(super) fn is_empty(&self) -> bool {
        self.waiting.is_empty()
    }

    /// Reports whether there is time to read a process now that does not wait yet.
    pub(super) fn has_time(&mut self, now: Instant) -> bool {
        self.pace.allows(now)
    }

    /// Enters that reading a process took from `begun` to `now`.
    pub(super) fn spent(&mut self, begun: Instant, now: Instant) {
        self.pace.spend(begun, now);
    }
}

/// Each process once, in the order of first discovery.
#[derive(Default)]
struct Waiting {
    /// May contain thread group ids that do not wait any more.
    order: VecDeque<u32>,
    by_tgid: HashMap<u32, (Subject, Origin)>,
}

impl Waiting {
    fn is_empty(&self) -> bool {
        self.by_tgid.is_empty()
    }

    fn push(&mut self, subject: Subject, origin: Origin) {
        let tgid = subject.key.tgid;
        if self.by_tgid.insert(tgid, (subject, origin)).is_none() {
            self.order.push_back(tgid);
        }
    }

    fn pop(&mut self) -> Option<(Subject, Origin)> {
        loop {
            let tgid = self.order.pop_front()?;
            if let Some(process) = self.take(tgid) {
                return Some(process);
            }
        }
    }

    fn take(&mut self, tgid: u32) -> Option<(Subject, Origin)> {
        let process = self.by_tgid.remove(&tgid);
        // Keeps the order's length at twice the number of waiting processes at most.
        if self.order.len() > 2 * self.by_tgid.len() + 16 {
            self.order.retain(|tgid| self.by_tgid.contains_key(tgid));
        }
        process
    }
}

/// How long the worker may read now. One reading may take longer than is left; the next ones wait for that.
struct Pace {
    left_ns: i64,
    refilled: Instant,
}

impl Pace {
    fn new(now: Instant) -> Self {
        Self { left_ns: nanoseconds(BURST), refilled: now }
    }

    fn allows(&mut self, now: Instant) -> bool {
        let more = nanoseconds((now - self.refilled) / PAUSE_PARTS);
        self.left_ns = self.left_ns.saturating_add(more).min(nanoseconds(BURST));
        self.refilled = now;
        self.left_ns > 0
    }

    fn spend(&mut self, begun: Instant, now: Instant) {
        self.left_ns = self.left_ns.saturating_sub(nanoseconds(now - begun));
        self.refilled = now;
    }
}

fn nanoseconds(time: Duration) -> i64 {
    i64::try_from(time.as_nanos()).unwrap_or(i64::MAX)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::model::ProcessKey;

    fn subject(tgid: u32, rules: u64) -> Subject {
        Subject {
            key: ProcessKey { tgid, start_boottime_ns: 1 },
            exec_id: 0,
            ktime_ns: 0,
            cgroup_id: 0,
            comm: String::new(),
            rules,
            candidates: 0,
        }
    }

    #[test]
    fn each_waits_once_in_order_with_its_latest_values() {
        let mut waiting = Waiting::default();
        for (at, tgid) in [3, 1, 2, 3].into_iter().enumerate() {
            waiting.push(subject(tgid, u64::from(tgid) * 10 + at as u64), Origin::default());
        }
        assert_eq!(waiting.by_tgid.len(), 3);
        assert!(waiting.take(1).is_some() && waiting.take(1).is_none());
        // The process ended, and another one got its number.
        waiting.push(subject(1, 7), Origin::default());
        let order: Vec<_> = std::iter::from_fn(|| waiting.pop()).map(|(subject, _)| subject).collect();
        let seen: Vec<_> = order.iter().map(|subject| (subject.key.tgid, subject.rules)).collect();
        assert_eq!(seen, [(3, 33), (1, 7), (2, 22)]);
        for tgid in 0..1000 {
            waiting.push(subject(tgid, 0), Origin::default());
            waiting.take(tgid);
        }
        assert!(waiting.order.len() <= 16 && waiting.is_empty());
    }

    #[test]
    fn a_burst_at_once_and_then_a_part_of_the_time() {
        let begin = Instant::now();
        let mut pace = Pace::new(begin);
        let one = Duration::from_millis(1);
        let (mut now, mut read) = (begin, 0);
        // A second of readings of a millisecond each, with nothing else to do.
        while now < begin + Duration::from_secs(1) {
            if pace.allows(now) {
                pace.spend(now, now + one);
                read += 1;
            }
            now += one;
        }
        // After the first twenty each costs a millisecond, and four of waiting.
        assert!((200..=230).contains(&read), "{read}");
    }

    #[test]
    fn the_queue_waits_until_there_is_time() {
        let begin = Instant::now();
        let mut discovered = Discovered::new(begin);
        discovered.push(subject(1, 0), Origin::default());
        discovered.push(subject(2, 0), Origin::default());
        assert!(discovered.next(begin).is_some());
        let later = begin + Duration::from_millis(100);
        discovered.spent(begin, later);
        assert!(discovered.next(later).is_none() && !discovered.has_time(later));
        let rested = later + Duration::from_secs(1);
        assert!(discovered.has_time(rested) && discovered.next(rested).is_some());
        assert!(discovered.is_empty() && discovered.next(rested).is_none());
    }
}
