//! Processes that already ran when a rule came: reading who they are is spread over time, so that a rule that means all
//! of a crowded node's processes neither burns a core nor holds up samples. They are sampled meanwhile; who is sampled is
//! read at once.

use std::{
    collections::{HashMap, VecDeque},
    time::{Duration, Instant},
};

use crate::model::{Origin, Subject};

/// What is read without a pause.
const AT_ONCE: Duration = Duration::from_millis(20);
/// For the rest, so many times longer nothing is read than something.
const PART: u32 = 4;

/// Those that wait, in the order in which they were found; each once, as it was found last.
#[derive(Default)]
pub(super) struct Found {
    /// May name some that do not wait any more.
    order: VecDeque<u32>,
    waiting: HashMap<u32, (Subject, Origin)>,
}

impl Found {
    pub(super) fn push(&mut self, subject: Subject, origin: Origin) {
        let tgid = subject.key.tgid;
        if self.waiting.insert(tgid, (subject, origin)).is_none() {
            self.order.push_back(tgid);
        }
    }

    pub(super) fn pop(&mut self) -> Option<(Subject, Origin)> {
        loop {
            let tgid = self.order.pop_front()?;
            if let Some(found) = self.take(tgid) {
                return Some(found);
            }
        }
    }

    /// What waits with this number; it waits no longer.
    pub(super) fn take(&mut self, tgid: u32) -> Option<(Subject, Origin)> {
        let found = self.waiting.remove(&tgid);
        // What is left in the order is bounded by what waits, twice.
        if self.order.len() > 2 * self.waiting.len() + 16 {
            self.order.retain(|tgid| self.waiting.contains_key(tgid));
        }
        found
    }

    pub(super) fn clear(&mut self) {
        self.order.clear();
        self.waiting.clear();
    }

    pub(super) fn len(&self) -> usize {
        self.waiting.len()
    }
}

/// How long may be read now. One reading may take longer than is left; the next ones wait for that.
pub(super) struct Pace {
    left_ns: i64,
    refilled: Instant,
}

impl Pace {
    pub(super) fn new(now: Instant) -> Self {
        Self { left_ns: nanoseconds(AT_ONCE), refilled: now }
    }

    /// Whether there is time for one more.
    pub(super) fn allows(&mut self, now: Instant) -> bool {
        let more = nanoseconds((now - self.refilled) / PART);
        self.left_ns = self.left_ns.saturating_add(more).min(nanoseconds(AT_ONCE));
        self.refilled = now;
        self.left_ns > 0
    }

    /// It took from `begun` to `now`.
    pub(super) fn spend(&mut self, begun: Instant, now: Instant) {
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
    fn each_waits_once_as_it_was_found_last_and_in_order() {
        let mut found = Found::default();
        for tgid in [3, 1, 2, 3] {
            found.push(subject(tgid, u64::from(tgid) * 10 + found.len() as u64), Origin::default());
        }
        assert_eq!(found.len(), 3);
        assert!(found.take(1).is_some() && found.take(1).is_none());
        // One that ended, and another with its number.
        found.push(subject(1, 7), Origin::default());
        let order: Vec<_> = std::iter::from_fn(|| found.pop()).map(|(subject, _)| subject).collect();
        let seen: Vec<_> = order.iter().map(|subject| (subject.key.tgid, subject.rules)).collect();
        assert_eq!(seen, [(3, 33), (1, 7), (2, 22)]);
        for tgid in 0..1000 {
            found.push(subject(tgid, 0), Origin::default());
            found.take(tgid);
        }
        assert!(found.order.len() <= 16 && found.len() == 0);
    }

    #[test]
    fn some_at_once_and_then_a_part_of_the_time() {
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
}
