//! Decides which rules have slots, where a node has more rules than slots.
//!
//! The rules that can sample now come first, then those of a higher priority, then those that have their slots already, so
//! that equal rules do not take turns. What remains is decided by the order in which the rules came.

use std::cmp::Reverse;

/// The claim of one rule to its slots.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Claim {
    /// The rule can sample now: this node supports it, it has begun, and it has not expired.
    pub(super) live: bool,
    pub(super) priority: i32,
    /// The rule has its slots.
    pub(super) held: bool,
    /// The number of slots that the rule needs; it gets all of them or none.
    pub(super) slots: usize,
}

/// Returns for each claim whether it is granted, with `room` slots for all of them.
pub(super) fn grant(claims: &[Claim], mut room: usize) -> Vec<bool> {
    let mut order: Vec<usize> = (0..claims.len()).collect();
    order.sort_by_key(|number| {
        let Claim { live, priority, held, slots: _ } = claims[*number];
        (Reverse(live), Reverse(priority), Reverse(held), *number)
    });
    let mut granted = vec![false; claims.len()];
    for number in order {
        if claims[number].slots <= room {
            room -= claims[number].slots;
            granted[number] = true;
        }
    }
    granted
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn claim(priority: i32) -> Claim {
        Claim { live: true, priority, held: false, slots: 1 }
    }

    #[test]
    fn the_highest_priorities_get_the_slots() {
        let claims = [claim(0), claim(5), claim(-1), claim(5), claim(1)];
        assert_eq!(grant(&claims, 3), [false, true, false, true, true]);
        assert_eq!(grant(&claims, 0), [false; 5]);
        assert_eq!(grant(&claims, 9), [true; 5]);
    }

    #[test]
    fn a_rule_keeps_its_slot_against_its_equals_only() {
        let held = Claim { held: true, ..claim(0) };
        assert_eq!(grant(&[claim(0), held], 1), [false, true]);
        assert_eq!(grant(&[claim(1), held], 1), [true, false]);
        assert_eq!(grant(&[claim(0), claim(0)], 1), [true, false], "the first one of two");
    }

    #[test]
    fn a_rule_that_cannot_sample_now_comes_last() {
        let expired = Claim { live: false, held: true, priority: 1000, slots: 1 };
        assert_eq!(grant(&[expired, claim(-1000)], 1), [false, true]);
        assert_eq!(grant(&[expired, claim(-1000)], 2), [true, true]);
    }

    #[test]
    fn a_rule_gets_all_its_slots_or_leaves_them_to_others() {
        let wide = Claim { slots: 2, ..claim(1) };
        assert_eq!(grant(&[wide, claim(0), claim(0)], 2), [true, false, false]);
        assert_eq!(grant(&[claim(2), wide, claim(0)], 2), [true, false, true]);
    }

    proptest! {
        /// Checks that the granted claims fit, and that no claim waits for the sake of a lower one.
        #[test]
        fn no_claim_waits_for_the_sake_of_a_lower_one(
            claims in prop::collection::vec((any::<bool>(), -2..3_i32, any::<bool>(), 1..3_usize), 0..20),
            room in 0..12_usize,
        ) {
            let claims: Vec<Claim> = claims
                .into_iter()
                .map(|(live, priority, held, slots)| Claim { live, priority, held, slots })
                .collect();
            let granted = grant(&claims, room);
            let used: usize = claims.iter().zip(&granted).filter(|(_, is)| **is).map(|(claim, _)| claim.slots).sum();
            prop_assert!(used <= room);
            for (waits, _) in claims.iter().zip(&granted).filter(|(_, is)| !**is) {
                let rank = |claim: &Claim| (claim.live, claim.priority, claim.held);
                let above: usize = claims
                    .iter()
                    .zip(&granted)
                    .filter(|(other, is)| **is && rank(other) >= rank(waits))
                    .map(|(other, _)| other.slots)
                    .sum();
                prop_assert!(above + waits.slots > room, "{waits:?} waits in {claims:?}: {granted:?}");
            }
        }
    }
}
