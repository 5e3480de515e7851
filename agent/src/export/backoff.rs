//! How long to wait before dialling again.

use std::time::Duration;

/// The least wait.
const LEAST: Duration = Duration::from_secs(1);
/// The longest wait.
const MOST: Duration = Duration::from_secs(60);

/// Grows with each failure, and is random, so that a fleet does not come back to a restarted collector all at once:
/// each wait lies anywhere between one second and three times the last one.
#[derive(Debug)]
pub(crate) struct Backoff {
    last: Duration,
}

impl Backoff {
    pub(crate) fn new() -> Self {
        Self { last: LEAST }
    }

    /// The connection was of use: the next wait is short again.
    pub(crate) fn reset(&mut self) {
        self.last = LEAST;
    }

    pub(crate) fn next(&mut self) -> Duration {
        let most = (self.last * 3).min(MOST);
        self.last = rand::random_range(LEAST..=most);
        self.last
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn waits_grow_within_their_bounds_and_differ() {
        let mut firsts = Vec::new();
        let mut longest = Duration::ZERO;
        for _ in 0..200 {
            let mut backoff = Backoff::new();
            firsts.push(backoff.next());
            for _ in 0..20 {
                let wait = backoff.next();
                assert!((LEAST..=MOST).contains(&wait), "{wait:?}");
                longest = longest.max(wait);
            }
            backoff.reset();
            assert!(backoff.next() <= LEAST * 3);
        }
        firsts.dedup();
        assert!(firsts.len() > 100, "the waits are not random");
        assert!(longest > MOST / 2, "the waits do not grow: {longest:?}");
    }
}
