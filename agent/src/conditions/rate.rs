//! A token bucket in virtual time.

use std::time::Duration;

/// So many at once, and one more each so often.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Bucket {
    capacity: u32,
    refill: Duration,
    tokens: u32,
    /// When the present tokens were counted.
    counted: Duration,
}

impl Bucket {
    /// Full.
    pub fn new(capacity: u32, refill: Duration, now: Duration) -> Self {
        Self { capacity, refill, tokens: capacity, counted: now }
    }

    /// Whether one can be taken.
    pub fn has(&mut self, now: Duration) -> bool {
        let fresh = now.saturating_sub(self.counted).as_nanos() / self.refill.as_nanos().max(1);
        if fresh > 0 {
            let fresh = u32::try_from(fresh).unwrap_or(u32::MAX);
            self.tokens = self.tokens.saturating_add(fresh).min(self.capacity);
            self.counted =
                if self.tokens == self.capacity { now } else { self.counted + self.refill * fresh };
        }
        self.tokens > 0
    }

    /// Takes one, if there is one.
    pub fn take(&mut self, now: Duration) -> bool {
        let has = self.has(now);
        self.tokens -= u32::from(has);
        has
    }

    /// Nothing was taken of it for so long that it is full.
    pub fn is_full(&mut self, now: Duration) -> bool {
        self.has(now);
        self.tokens == self.capacity
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    proptest! {
        #[test]
        fn no_more_than_the_capacity_and_what_came_since(steps in prop::collection::vec(0_u64..5_000, 1..300)) {
            let refill = Duration::from_secs(1);
            let mut bucket = Bucket::new(3, refill, Duration::ZERO);
            let (mut now, mut taken) = (Duration::ZERO, 0_u128);
            for step in steps {
                now += Duration::from_millis(step);
                taken += u128::from(bucket.take(now));
                prop_assert!(taken <= 3 + now.as_nanos() / refill.as_nanos());
            }
        }
    }

    #[test]
    fn it_fills_again() {
        let mut bucket = Bucket::new(2, Duration::from_secs(10), Duration::ZERO);
        assert!(bucket.take(Duration::ZERO) && bucket.take(Duration::ZERO) && !bucket.take(Duration::ZERO));
        assert!(!bucket.take(Duration::from_secs(9)) && bucket.take(Duration::from_secs(10)));
        assert!(!bucket.is_full(Duration::from_secs(15)) && bucket.is_full(Duration::from_secs(100)));
    }
}
