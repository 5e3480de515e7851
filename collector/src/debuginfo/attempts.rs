//! Attempts to use a file after errors. Many errors are of a moment: no memory, no process, a slow disk. So a failed attempt is repeated,
//! after a pause that doubles with each failure.

use std::time::{Duration, Instant};

use parking_lot::Mutex;

/// Longest pause, unless the first one is longer.
const MAX_PAUSE: Duration = Duration::from_secs(600);

/// Returns the pause after this many failures in a row, of which each doubles it.
pub(super) fn pause(first: Duration, failures: u32) -> Duration {
    let doubled = first.saturating_mul(1 << failures.saturating_sub(1).min(20));
    doubled.min(MAX_PAUSE.max(first))
}

/// The state of one source of names in a file. Starts usable.
#[derive(Debug, Default)]
pub(super) struct Attempts(Mutex<State>);

#[derive(Clone, Copy, Debug, Default)]
enum State {
    /// No attempt has failed since the last success.
    #[default]
    Usable,
    Failed {
        failures: u32,
        retry_at: Instant,
    },
    /// The pause is over, and the next attempt decides.
    Retrying {
        failures: u32,
    },
}

impl Attempts {
    /// Reports whether the source may be used: it has not failed, or its next attempt has begun.
    pub(super) fn may_try(&self) -> bool {
        !matches!(*self.0.lock(), State::Failed { .. })
    }

    /// Returns the time of the next attempt, if the last one failed.
    pub(super) fn retry_at(&self) -> Option<Instant> {
        match *self.0.lock() {
            State::Failed { retry_at, .. } => Some(retry_at),
            State::Usable | State::Retrying { .. } => None,
        }
    }

    /// Begins the next attempt if its time has come.
    pub(super) fn begin_retry(&self, now: Instant) {
        let mut state = self.0.lock();
        if let State::Failed { failures, retry_at } = *state
            && now >= retry_at
        {
            *state = State::Retrying { failures };
        }
    }

    pub(super) fn succeeded(&self) {
        *self.0.lock() = State::Usable;
    }

    /// Notes a failed attempt. `first`: the pause after the first failure.
    pub(super) fn failed(&self, first: Duration) {
        let mut state = self.0.lock();
        let failures = match *state {
            State::Usable => 1,
            State::Failed { failures, .. } | State::Retrying { failures } => failures.saturating_add(1),
        };
        *state = State::Failed { failures, retry_at: Instant::now() + pause(first, failures) };
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn each_failure_doubles_the_pause_up_to_a_limit() {
        let first = Duration::from_secs(30);
        let pauses = [1, 2, 3, 5, 6, 1000].map(|failures| pause(first, failures).as_secs());
        assert_eq!(pauses, [30, 60, 120, 480, 600, 600]);
        assert_eq!(pause(Duration::from_secs(7200), 5).as_secs(), 7200);
    }

    #[test]
    fn a_failed_source_rests_until_its_next_attempt() {
        let (attempts, first) = (Attempts::default(), Duration::from_secs(60));
        assert!(attempts.may_try());
        attempts.failed(first);
        let at = attempts.retry_at().unwrap();
        attempts.begin_retry(at.checked_sub(Duration::from_secs(1)).unwrap());
        assert!(!attempts.may_try());
        attempts.begin_retry(at);
        assert!(attempts.may_try());
        attempts.failed(first);
        let again = attempts.retry_at().unwrap();
        assert!(!attempts.may_try() && again >= at + first);
        attempts.begin_retry(again);
        attempts.succeeded();
        attempts.failed(first);
        assert!(attempts.retry_at().unwrap() < again);
    }
}
