//! Waiting times between attempts to reach the collector.

use std::time::Duration;

use gannet_proto::connect::{Dial, FileStamps};

const MIN_WAIT: Duration = Duration::from_secs(1);
const MAX_WAIT: Duration = Duration::from_secs(60);

/// Waits that grow with each failure. Each is a random time between one second and three times the last wait, so that
/// the agents of a fleet do not all return to a restarted collector at once.
#[derive(Debug)]
pub(crate) struct Backoff {
    last: Duration,
}

impl Backoff {
    pub(crate) fn new() -> Self {
        Self { last: MIN_WAIT }
    }

    /// Makes the next wait short again, after a connection that worked.
    pub(crate) fn reset(&mut self) {
        self.last = MIN_WAIT;
    }

    pub(crate) fn next(&mut self) -> Duration {
        let longest = (self.last * 3).min(MAX_WAIT);
        self.last = rand::random_range(MIN_WAIT..=longest);
        self.last
    }
}

/// Time between two looks at the files of a connection that failed.
const FILES_INTERVAL: Duration = Duration::from_secs(1);

/// Waits until the certificates or the token of a connection are not those of `before` any more. New ones are a reason to
/// try again at once.
pub(crate) async fn files_changed(dial: &Dial, before: &FileStamps) {
    while dial.stamps() == *before {
        tokio::time::sleep(FILES_INTERVAL).await;
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
                assert!((MIN_WAIT..=MAX_WAIT).contains(&wait), "{wait:?}");
                longest = longest.max(wait);
            }
            backoff.reset();
            assert!(backoff.next() <= MIN_WAIT * 3);
        }
        firsts.dedup();
        assert!(firsts.len() > 100, "the waits are not random");
        assert!(longest > MAX_WAIT / 2, "the waits do not grow: {longest:?}");
    }
}
