//! Rule numbers of the node: each rule of all resident tables has one number, with a count of the tables that use it.
use std::collections::HashMap;

use crate::format::{MAX_RULES, RULE_NONE, UnwindRule};

/// Assigns numbers to rules, and frees a number when the last table that uses it is gone.
///
/// The owner writes [`InternedRules::new`] into the kernel's array of rules before any cache line that names them. It calls
/// [`RuleInterner::release`] only once no kernel program can read the table any more: a number may be reused at once.
#[derive(Debug)]
pub struct RuleInterner {
    numbers: HashMap<UnwindRule, u16>,
    slots: Vec<Slot>,
    free: Vec<u16>,
    capacity: usize,
}

#[derive(Debug)]
struct Slot {
    rule: UnwindRule,
    tables: u32,
}

/// The node's numbers of one table's rules.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct InternedRules {
    /// The node's number for each of the table's own numbers.
    pub numbers: Vec<u16>,
    /// Numbers that were not in use before, with their rules.
    pub new: Vec<(u16, UnwindRule)>,
}

/// Too few numbers are left.
#[derive(Clone, PartialEq, Eq, Debug, thiserror::Error)]
#[error(
    "{needed} new rules do not fit: {used} of {capacity} are in use; evict tables, or make the array of rules larger"
)]
pub struct RuleNumbersFull {
    /// Rules that only this table has.
    pub needed: usize,
    /// Numbers in use.
    pub used: usize,
    /// Size of the array of rules.
    pub capacity: usize,
}

impl RuleInterner {
    /// Starts with an array of `capacity` rules, 1 to [`MAX_RULES`]; number 0 is [`UnwindRule::NONE`].
    pub fn new(capacity: usize) -> Self {
        Self {
            numbers: HashMap::from([(UnwindRule::NONE, RULE_NONE)]),
            slots: vec![Slot { rule: UnwindRule::NONE, tables: 1 }],
            free: Vec::new(),
            capacity: capacity.clamp(1, MAX_RULES),
        }
    }

    /// Returns the numbers in use, with that of [`UnwindRule::NONE`].
    pub fn used(&self) -> usize {
        self.slots.len() - self.free.len()
    }

    /// Assigns numbers to the rules of one table, which are all different. Either all get one or nothing changes.
    pub fn acquire(&mut self, rules: &[UnwindRule]) -> Result<InternedRules, RuleNumbersFull> {
        let needed = rules.iter().filter(|rule| !self.numbers.contains_key(rule)).count();
        if needed > self.capacity - self.used() {
            return Err(RuleNumbersFull { needed, used: self.used(), capacity: self.capacity });
        }
        let mut new = Vec::with_capacity(needed);
        let numbers = rules
            .iter()
            .map(|rule| {
                let number = *self.numbers.entry(*rule).or_insert_with(|| {
                    let number = self.free.pop().unwrap_or(self.slots.len() as u16);
                    let slot = Slot { rule: *rule, tables: 0 };
                    if usize::from(number) == self.slots.len() {
                        self.slots.push(slot);
                    } else {
                        self.slots[usize::from(number)] = slot;
                    }
                    new.push((number, *rule));
                    number
                });
                self.slots[usize::from(number)].tables += 1;
                number
            })
            .collect();
        Ok(InternedRules { numbers, new })
    }

    /// Returns the numbers from [`RuleInterner::acquire`].
    pub fn release(&mut self, numbers: &[u16]) {
        for number in numbers {
            let Some(slot) = self.slots.get_mut(usize::from(*number)) else { continue };
            debug_assert!(slot.tables > 0, "rule {number} released more often than acquired");
            slot.tables = slot.tables.saturating_sub(1);
            if slot.tables == 0 && self.numbers.remove(&slot.rule).is_some() {
                self.free.push(*number);
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn rules(range: std::ops::Range<i32>) -> Vec<UnwindRule> {
        std::iter::once(UnwindRule::NONE).chain(range.map(UnwindRule::x86_64_sp)).collect()
    }

    /// Checks that a rule stays as long as a table uses it (R49).
    #[test]
    fn tables_share_rules_and_the_last_one_frees_them() {
        let mut node = RuleInterner::new(16);
        let a = node.acquire(&rules(0..4)).unwrap();
        assert_eq!((a.numbers.as_slice(), a.new.len()), ([0, 1, 2, 3, 4].as_slice(), 4));
        let b = node.acquire(&rules(2..6)).unwrap();
        assert_eq!((b.numbers.as_slice(), b.new.len()), ([0, 3, 4, 5, 6].as_slice(), 2));
        node.release(&a.numbers);
        assert_eq!(node.used(), 5);
        let c = node.acquire(&rules(10..12)).unwrap();
        assert!(c.numbers.iter().all(|n| *n < 7), "numbers are reused: {c:?}");
        node.release(&b.numbers);
        node.release(&c.numbers);
        assert_eq!(node.used(), 1, "only the rule for gaps stays");
    }

    /// Checks that a refused table takes no numbers (R49).
    #[test]
    fn a_table_that_does_not_fit_changes_nothing() {
        let mut node = RuleInterner::new(4);
        let a = node.acquire(&rules(0..2)).unwrap();
        let full = node.acquire(&rules(1..5)).unwrap_err();
        assert_eq!(full, RuleNumbersFull { needed: 3, used: 3, capacity: 4 });
        assert_eq!(node.used(), 3);
        node.release(&a.numbers);
        assert_eq!(node.used(), 1);
        assert!(node.acquire(&rules(1..4)).is_ok());
    }

    #[test]
    fn every_number_can_be_assigned() {
        let mut node = RuleInterner::new(MAX_RULES);
        let all = node.acquire(&rules(0..65_535)).unwrap();
        assert_eq!(all.numbers.last(), Some(&65_535));
        assert!(node.acquire(&rules(65_535..65_536)).is_err());
    }
}
