//! A token bucket in virtual time.

use std::time::Duration;

/// Allows a burst of `capacity` events, and one more event for each `refill` of time.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct TokenBucket {
    capacity: u32,
    refill: Duration,
    tokens: u32,
    /// When the present tokens were counted.
    counted: Duration,
}

impl TokenBucket {
    /// Builds a full bucket.
    pub(super) fn new(capacity: u32, refill: Duration, now: Duration) -> Self {
        Self { capacity, refill, tokens: capacity, counted: now }
    }

    /// Reports whether there is a token to take.
    pub(super) fn has(&mut self, now: Duration) -> bool {
        let fresh = now.saturating_sub(self.counted).as_nanos() / self.refill.as_nanos().max(1);
        if fresh > 0 {
            let fresh = u32::try_from(fresh).unwrap_or(u32::MAX);
            self.tokens = self.tokens.saturating_add(fresh).min(self.capacity);
            self.counted =
                if self.tokens == self.capacity { now } else { self.counted + self.refill * fresh };
        }
        self.tokens > 0
    }

    /// Takes a token. Returns false if there is none.
    pub(super) fn take(&mut self, now: Duration) -> bool {
        let has = self.has(now);
        self.tokens -= u32::from(has);
        has
    }

    /// Reports whether the bucket has refilled completely.
    pub(super) fn is_full(&mut self, now: Duration) -> bool {
        self.has(now);
        self.tokens == self.capacity
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    proptest! {
        /// Checks that over any steps no more tokens are taken than the capacity and the refills since.
        #[test]
        fn takes_are_bounded_by_capacity_and_refills(steps in prop::collection::vec(0_u64..5_000, 1..300)) {
            let refill = Duration::from_secs(1);
            let mut bucket = TokenBucket::new(3, refill, Duration::ZERO);
            let (mut now, mut taken) = (Duration::ZERO, 0_u128);
            for step in steps {
                now += Duration::from_millis(step);
                taken += u128::from(bucket.take(now));
                prop_assert!(taken <= 3 + now.as_nanos() / refill.as_nanos());
            }
        }
    }

    #[test]
    fn an_empty_bucket_refills() {
        let mut bucket = TokenBucket::new(2, Duration::from_secs(10), Duration::ZERO);
        assert!(bucket.take(Duration::ZERO) && bucket.take(Duration::ZERO) && !bucket.take(Duration::ZERO));
        assert!(!bucket.take(Duration::from_secs(9)) && bucket.take(Duration::from_secs(10)));
        assert!(!bucket.is_full(Duration::from_secs(15)) && bucket.is_full(Duration::from_secs(100)));
    }
}
