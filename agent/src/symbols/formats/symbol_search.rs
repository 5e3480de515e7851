//! The search for the symbols of a few addresses in a large table, in one pass and without a copy of the table.

use super::symbol_table::MAX_UNSIZED_BYTES;

/// Limit of the work of one search: a hostile table can make every symbol hold every address.
const MAX_WORK: u64 = 64 << 20;
/// Work of reading a name. Comparing a symbol with an address is 1.
const NAME_WORK: u64 = 64;

/// The symbols overlap so much that the search would take too long.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("the symbol table takes too long to search")]
pub(crate) struct TooMuchWork;

/// The best symbol so far for each wanted address.
pub(super) struct SymbolSearch<'a> {
    wanted: &'a [u64],
    /// Symbols with a size that hold the address.
    holding: Vec<Option<Candidate>>,
    /// The last symbol at or before each address and behind the address before it. A symbol of unknown size reaches to the
    /// next symbol, so the search has to know the next one whatever its size.
    before: Vec<Option<Candidate>>,
    work: u64,
}

#[derive(Clone, PartialEq, Eq, PartialOrd, Ord)]
struct Candidate {
    start: u64,
    /// Of two symbols at one address, the name that programmers use ranks higher; a size outweighs that.
    rank: u32,
    name: Option<Vec<u8>>,
}

const SIZED: u32 = 1 << 16;

impl<'a> SymbolSearch<'a> {
    /// Starts a search for these addresses, which are sorted.
    pub(super) fn new(wanted: &'a [u64]) -> Self {
        Self { wanted, holding: vec![None; wanted.len()], before: vec![None; wanted.len()], work: MAX_WORK }
    }

    /// Offers a symbol; `size` 0 is an unknown size. Calls `name` only if the symbol may be wanted; a symbol without a name is
    /// no function.
    pub(super) fn offer(
        &mut self,
        start: u64,
        size: u64,
        binding: u32,
        mut name: impl FnMut() -> Option<Vec<u8>>,
    ) -> Result<(), TooMuchWork> {
        let first = self.wanted.partition_point(|address| *address < start);
        let held = self.wanted[first..].iter().take_while(|address| **address - start < size).count();
        self.spend(1 + held as u64)?;
        let is_nearer = |known: &Option<Candidate>| known.as_ref().is_none_or(|known| known.start <= start);
        if first == self.wanted.len() || !(held > 0 || is_nearer(&self.before[first])) {
            return Ok(());
        }
        if size > 0 && held == 0 {
            // It ends the symbol before it; its name is not needed.
            let end = Candidate { start, rank: SIZED, name: None };
            self.before[first] = self.before[first].take().max(Some(end));
            return Ok(());
        }
        self.spend(NAME_WORK)?;
        let Some(name) = name() else { return Ok(()) };
        let underscores = name.iter().take_while(|byte| **byte == b'_').take(15).count() as u32;
        let rank = (15 - underscores) * 16 + binding + if size > 0 { SIZED } else { 0 };
        let candidate = Some(Candidate { start, rank, name: Some(name) });
        for known in &mut self.holding[first..first + held] {
            if *known < candidate {
                known.clone_from(&candidate);
            }
        }
        self.before[first] = self.before[first].take().max(candidate);
        Ok(())
    }

    /// Counts work; an error if there was too much.
    pub(super) fn spend(&mut self, work: u64) -> Result<(), TooMuchWork> {
        self.work = self.work.checked_sub(work).ok_or(TooMuchWork)?;
        Ok(())
    }

    /// Returns the name for each wanted address.
    pub(super) fn finish(self) -> Vec<Option<Vec<u8>>> {
        let mut nearest: Option<Candidate> = None;
        let Self { wanted, holding, before, .. } = self;
        wanted
            .iter()
            .zip(holding.into_iter().zip(before))
            .map(|(address, (holding, before))| {
                nearest = nearest.take().max(before);
                let open = nearest.as_ref().filter(|nearest| {
                    nearest.rank < SIZED
                        && address - nearest.start < MAX_UNSIZED_BYTES
                        && holding.as_ref().is_none_or(|holding| holding.start < nearest.start)
                });
                open.cloned().or(holding)?.name
            })
            .collect()
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn find_in(symbols: &[(u64, u64, &str)], wanted: &[u64]) -> Vec<Option<String>> {
        let mut search = SymbolSearch::new(wanted);
        for (start, size, name) in symbols {
            search.offer(*start, *size, 0, || Some(name.as_bytes().to_vec())).unwrap();
        }
        search.finish().into_iter().map(|name| name.map(|name| String::from_utf8(name).unwrap())).collect()
    }

    const SYMBOLS: [(u64, u64, &str); 5] = [
        (0x100, 0x40, "outer"),
        (0x110, 0x8, "inner"),
        (0x200, 0, "open"),
        (0x300, 1, "one"),
        (0x500, 0x10, "far"),
    ];

    #[test]
    fn an_address_belongs_to_the_symbol_that_holds_it() {
        let expected = [
            (0, None),
            (0xff, None),
            (0x100, Some("outer")),
            (0x117, Some("inner")),
            (0x118, Some("outer")),
            (0x140, None),
            (0x200, Some("open")),
            (0x2ff, Some("open")),
            (0x300, Some("one")),
            (0x301, None),
            (0x50f, Some("far")),
            (u64::MAX, None),
        ];
        let wanted: Vec<u64> = expected.iter().map(|(address, _)| *address).collect();
        let names: Vec<Option<String>> = expected.iter().map(|(_, name)| name.map(str::to_owned)).collect();
        let mut turned = SYMBOLS;
        turned.reverse();
        assert_eq!(find_in(&SYMBOLS, &wanted), names);
        assert_eq!(find_in(&turned, &wanted), names);
        // The result for an address does not depend on the other addresses.
        for (address, name) in wanted.iter().zip(&names) {
            assert_eq!(find_in(&SYMBOLS, &[*address]), std::slice::from_ref(name), "{address:#x}");
        }
    }

    #[test]
    fn a_symbol_without_size_ends_at_a_limit() {
        let last = 0x1000 + MAX_UNSIZED_BYTES - 1;
        assert_eq!(find_in(&[(0x1000, 0, "last")], &[last, last + 1]), [Some("last".to_owned()), None]);
    }

    #[test]
    fn the_alias_that_programmers_use_is_shown() {
        let aliases =
            [(0x10, 4, "__libc_malloc"), (0x10, 4, "malloc"), (0x10, 4, "_malloc"), (0x10, 0, "label")];
        for turn in 0..aliases.len() {
            let mut symbols = aliases;
            symbols.rotate_left(turn);
            assert_eq!(find_in(&symbols, &[0x11]), [Some("malloc".to_owned())]);
        }
    }

    #[test]
    fn a_table_that_takes_too_long_is_given_up() {
        let wanted: Vec<u64> = (0..4096).collect();
        let mut search = SymbolSearch::new(&wanted);
        let result =
            (0..1 << 20).try_for_each(|_| search.offer(0, 1 << 20, 0, || Some(b"everything".to_vec())));
        assert_eq!(result, Err(TooMuchWork));
    }

    proptest! {
        #[test]
        fn the_search_finds_what_a_plain_search_finds(
            symbols in proptest::collection::vec((0u64..200, 0u64..20), 0..40),
            wanted in proptest::collection::btree_set(0u64..230, 0..40),
        ) {
            let named: Vec<(u64, u64, String)> =
                symbols.iter().enumerate().map(|(index, (start, size))| (*start, *size, format!("f{index:02}"))).collect();
            let offered: Vec<(u64, u64, &str)> =
                named.iter().map(|(start, size, name)| (*start, *size, name.as_str())).collect();
            let wanted: Vec<u64> = wanted.into_iter().collect();
            let found = find_in(&offered, &wanted);
            for (address, found) in wanted.iter().zip(found) {
                // The nearest start decides; at one start, symbols with a size that holds the address come first.
                let holding = named.iter().filter(|(start, size, _)| start <= address && address - start < *size);
                let holding = holding.max_by_key(|(start, _, name)| (*start, name.clone()));
                let nearest = named.iter().filter(|(start, _, _)| start <= address);
                let nearest = nearest.max_by_key(|(start, size, name)| (*start, *size > 0, name.clone()));
                let expected = match (holding, nearest) {
                    (holding, Some((start, 0, name))) if holding.is_none_or(|holding| holding.0 < *start) => Some(name),
                    (Some((_, _, name)), _) => Some(name),
                    (None, _) => None,
                };
                prop_assert_eq!(found.as_ref(), expected, "{:#x}", address);
            }
        }
    }
}
