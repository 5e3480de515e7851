//! The cache lines that tables take in the kernel's array.

use std::{collections::BTreeMap, ops::Range};

/// The free ranges of an array, first fit.
#[derive(Debug)]
pub(super) struct Arena {
    /// Start to length; neighbours are always joined.
    free: BTreeMap<u32, u32>,
    size: u32,
}

impl Arena {
    pub(super) fn new(size: u32) -> Self {
        let free = if size > 0 { BTreeMap::from([(0, size)]) } else { BTreeMap::new() };
        Self { free, size }
    }

    /// Takes a range of this length, if one is free in one piece.
    pub(super) fn take(&mut self, length: u32) -> Option<Range<u32>> {
        let (start, room) = self.free.iter().find(|(_, room)| **room >= length).map(|(a, b)| (*a, *b))?;
        self.free.remove(&start);
        if room > length {
            self.free.insert(start + length, room - length);
        }
        Some(start..start + length)
    }

    /// Returns a range from [`Arena::take`]; joins it with its free neighbours.
    pub(super) fn give_back(&mut self, range: &Range<u32>) {
        let (mut start, mut end) = (range.start, range.end);
        if let Some((before, length)) = self.free.range(..start).next_back().map(|(a, b)| (*a, *b))
            && before + length == start
        {
            self.free.remove(&before);
            start = before;
        }
        if let Some(length) = self.free.remove(&end) {
            end += length;
        }
        if end > start {
            self.free.insert(start, end - start);
        }
    }

    pub(super) fn size(&self) -> u32 {
        self.size
    }

    pub(super) fn used(&self) -> u32 {
        self.size - self.free.values().sum::<u32>()
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    proptest! {
        /// Checks that no line belongs to two tables and none is lost (R49).
        #[test]
        fn ranges_never_overlap_and_all_come_back(actions in prop::collection::vec((1_u32..40, any::<prop::sample::Index>(), any::<bool>()), 1..200)) {
            let mut arena = Arena::new(256);
            let mut taken: Vec<Range<u32>> = Vec::new();
            for (length, which, give) in actions {
                if give && !taken.is_empty() {
                    arena.give_back(&taken.swap_remove(which.index(taken.len())));
                } else if let Some(range) = arena.take(length) {
                    prop_assert_eq!(range.len() as u32, length);
                    prop_assert!(range.end <= 256);
                    prop_assert!(taken.iter().all(|other| other.end <= range.start || range.end <= other.start));
                    taken.push(range);
                }
                prop_assert_eq!(arena.used(), taken.iter().map(|range| range.len() as u32).sum::<u32>());
            }
            for range in taken {
                arena.give_back(&range);
            }
            prop_assert_eq!(arena.take(256), Some(0..256));
        }
    }
}
