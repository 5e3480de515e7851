//! How many classes a process has unloaded, and when the agent has read that.
//!
//! The address of a function's object says what the function is only as long as the object lives. A virtual machine that unloads
//! a class may put another one in its place. So the agent reads the machine's own count of unloaded classes before a sample and
//! behind the reading of its names. If both counts are equal, the machine has replaced no class in between: the names that the agent
//! has read are those of the sample. V8 moves objects instead, and counts the collections that may do so: the same holds for them.

use std::collections::VecDeque;

/// The count of classes that a process has unloaded, or of collections that may have moved its objects.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Unloads {
    /// The number since it started. The machine counts a class before it frees its memory, and a
    /// collection before it moves something.
    Count(u64),
    /// Its count cannot be read.
    Unknown,
}

/// Counts of functions that a process has replaced by others while their class lives on.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Replacements {
    /// How often it has replaced functions. Only a function that was replaced is freed.
    pub(crate) replaced: Unloads,
    /// How often it may have freed replaced functions. It counts before it frees one.
    pub(crate) freed: Unloads,
}

impl Replacements {
    /// It has replaced nothing so far.
    pub(crate) const NONE: Self = Self { replaced: Unloads::Count(0), freed: Unloads::Count(0) };
}

/// The number of periods that are kept: those that samples on their way may belong to.
const MAX_PERIODS: usize = 16;

/// The readings of one process.
#[derive(Debug, Default)]
pub(super) struct UnloadHistory {
    last: Option<Unloads>,
    /// The newest is the last.
    periods: VecDeque<Period>,
    /// Two readings differed.
    has_moved: bool,
}

/// A time in which nothing was unloaded.
#[derive(Debug)]
struct Period {
    count: u64,
    since_ns: u64,
    /// When the last request began that was over in this time.
    last_request_ns: u64,
}

impl UnloadHistory {
    /// Enters a reading that was over at a time.
    pub(super) fn enter(&mut self, reading: Unloads, now_ns: u64) {
        if self.last == Some(reading) {
            return;
        }
        let from_begin = self.is_unknown() && reading == Unloads::Count(0);
        self.has_moved |= self.last.is_some() && !from_begin;
        self.last = Some(reading);
        let (count, since_ns) = match reading {
            // It has never unloaded one.
            Unloads::Count(0) => (0, 0),
            Unloads::Count(count) => (count, now_ns),
            Unloads::Unknown => return,
        };
        if self.periods.len() == MAX_PERIODS {
            self.periods.pop_front();
        }
        self.periods.push_back(Period { count, since_ns, last_request_ns: 0 });
    }

    /// A request is over that began at a time. The last reading was behind it.
    pub(super) fn end_request(&mut self, begin_ns: u64) {
        let is_known = !self.is_unknown();
        if let Some(period) = self.periods.back_mut().filter(|_| is_known) {
            period.last_request_ns = begin_ns;
        }
    }

    /// Reports whether nothing was unloaded between a time and the end of a later request that began at `begin_ns`.
    pub(super) fn covers(&self, time_ns: u64, begin_ns: u64) -> bool {
        self.periods.iter().any(|period| period.since_ns <= time_ns && begin_ns <= period.last_request_ns)
    }

    /// Reports whether the count went up by one between two requests that began at these times, and did not change in either.
    pub(super) fn is_one_between(&self, before_ns: u64, behind_ns: u64) -> bool {
        let holds =
            |period: &Period, begin_ns: u64| (period.since_ns..=period.last_request_ns).contains(&begin_ns);
        self.periods.iter().zip(self.periods.iter().skip(1)).any(|(one, next)| {
            holds(one, before_ns) && holds(next, behind_ns) && one.count.checked_add(1) == Some(next.count)
        })
    }

    /// Reports whether nothing was unloaded in the time between all readings so far.
    pub(super) fn is_steady(&self) -> bool {
        !self.has_moved && !self.is_unknown()
    }

    /// Returns the last reading.
    pub(super) fn last(&self) -> Option<Unloads> {
        self.last
    }

    /// Reports whether the process does not say what it unloads.
    fn is_unknown(&self) -> bool {
        self.last.is_none_or(|last| last == Unloads::Unknown)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_time_is_covered_while_the_count_stays() {
        let mut history = UnloadHistory::default();
        assert!(!history.covers(5, 5) && !history.is_steady() && history.is_unknown());
        history.enter(Unloads::Count(0), 10);
        assert!(!history.covers(5, 10), "the request is not over");
        history.end_request(10);
        assert!(history.covers(5, 10), "nothing was unloaded since the start");
        // The count changed in the request that began at 20.
        history.enter(Unloads::Count(3), 22);
        history.end_request(20);
        assert!(history.covers(5, 10) && !history.covers(15, 20) && !history.is_steady());
        assert!(!history.covers(25, 30), "no request is over since");
        history.end_request(30);
        assert!(history.covers(25, 30) && !history.covers(21, 30) && !history.covers(15, 30));
        history.enter(Unloads::Unknown, 40);
        history.end_request(40);
        assert!(history.covers(25, 30) && !history.covers(35, 40) && history.is_unknown());
        // As before, but not known for the time between.
        history.enter(Unloads::Count(3), 50);
        history.end_request(50);
        assert!(!history.covers(35, 50) && history.covers(50, 50));
    }

    #[test]
    fn a_process_found_late_is_covered_from_its_first_reading_on() {
        let mut late = UnloadHistory::default();
        late.enter(Unloads::Count(7), 10);
        late.end_request(9);
        assert!(!late.covers(9, 9) && late.covers(10, 9) && late.is_steady());
        let mut never = UnloadHistory::default();
        never.enter(Unloads::Unknown, 8);
        never.enter(Unloads::Count(0), 10);
        never.end_request(9);
        assert!(never.covers(0, 9) && never.is_steady());
    }

    #[test]
    fn one_unloading_between_two_requests_is_not_several() {
        let mut history = UnloadHistory::default();
        let mut request = |count, begin_ns| {
            history.enter(Unloads::Count(count), begin_ns);
            history.end_request(begin_ns);
        };
        request(4, 10);
        request(4, 20);
        request(5, 30);
        request(7, 40);
        assert!(history.is_one_between(10, 30) && history.is_one_between(20, 30));
        assert!(!history.is_one_between(10, 20) && !history.is_one_between(5, 30), "no one, or not known");
        assert!(!history.is_one_between(30, 40) && !history.is_one_between(20, 40), "more than one");
        // The count goes up in the request that began at 45.
        history.enter(Unloads::Count(8), 47);
        history.end_request(45);
        assert!(!history.is_one_between(40, 45));
    }

    #[test]
    fn the_periods_of_a_process_have_a_limit() {
        let mut history = UnloadHistory::default();
        for count in 0..1000 {
            history.enter(Unloads::Count(count), 10 * count);
            history.end_request(10 * count + 1);
        }
        assert_eq!(history.periods.len(), MAX_PERIODS);
        assert!(history.covers(9990, 9991));
    }
}
