//! The search for the symbols of a few addresses in a large table, in one pass and without a copy of the table.

/// Maximum size of a symbol of unknown size, which reaches up to the next symbol. The longest functions are shorter.
pub const MAX_UNSIZED_BYTES: u64 = 256 << 10;

/// Maximum work of one search. In a hostile table, every symbol can hold every address.
const MAX_WORK: u64 = 64 << 20;
/// Work to read a name. The comparison of a symbol with an address counts as 1.
const NAME_WORK: u64 = 64;

/// The symbols overlap so much that the search would take too long.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("the symbol table takes too long to search")]
pub struct TooMuchWork;

/// A symbol that a caller offers to a search.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Offer {
    pub(crate) start: u64,
    /// Size of the symbol in bytes; 0 if unknown.
    pub(crate) size: u64,
    /// True if the symbol has the type of a function. Other symbols are labels of hand-written assembly.
    pub(crate) is_function: bool,
    /// The visibility of the symbol; 0 within its own object file. Of two aliases, the search takes the more visible one.
    pub(crate) visibility: u32,
}

impl Offer {
    /// Builds the offer of a function of known size.
    pub(crate) fn function(start: u64, size: u64) -> Self {
        Self { start, size, is_function: true, visibility: 0 }
    }
}

/// The best symbol so far for each wanted address.
///
/// A symbol with a size names the addresses that it holds. If several hold an address, the innermost function names it. Assembly often
/// has no sizes. There a function or a visible label reaches up to the next one, and a local label inside it names nothing.
pub(crate) struct SymbolSearch<'a> {
    wanted: &'a [u64],
    /// The innermost symbols with a size that hold each address.
    holding: Vec<Option<Candidate>>,
    /// The last functions and visible labels without a size at or before each address and behind the address before it.
    entries: Vec<Option<Candidate>>,
    /// The same for local labels.
    labels: Vec<Option<Candidate>>,
    /// The last end, at or before each address and behind the address before it, of a symbol with a size. No symbol from
    /// before it reaches the address.
    ends: Vec<u64>,
    work: u64,
}

#[derive(Clone, PartialEq, Eq, PartialOrd, Ord)]
struct Candidate {
    is_function: bool,
    start: u64,
    /// The rank of a symbol. Of two symbols at one address, the name that programmers use ranks higher.
    rank: u32,
    name: Vec<u8>,
}

impl<'a> SymbolSearch<'a> {
    /// Starts a search for these sorted addresses.
    pub(crate) fn new(wanted: &'a [u64]) -> Self {
        let none = vec![None; wanted.len()];
        let (holding, entries, labels) = (none.clone(), none.clone(), none);
        Self { wanted, holding, entries, labels, ends: vec![0; wanted.len()], work: MAX_WORK }
    }

    /// Offers a symbol. Calls `name` only if the symbol may match; a symbol without a name is not a function.
    pub(crate) fn offer(
        &mut self,
        offer: Offer,
        mut name: impl FnMut() -> Option<Vec<u8>>,
    ) -> Result<(), TooMuchWork> {
        let Offer { start, size, is_function, visibility } = offer;
        let first = self.wanted.partition_point(|address| *address < start);
        let held = self.wanted[first..].iter().take_while(|address| **address - start < size).count();
        self.spend(1 + held as u64)?;
        if let Some(end) = self.ends.get_mut(first + held).filter(|_| size > 0) {
            *end = start.saturating_add(size).max(*end);
        }
        let slots = if size > 0 {
            &mut self.holding[first..first + held]
        } else {
            let open = if is_function || visibility > 0 { &mut self.entries } else { &mut self.labels };
            let is_nearer =
                |known: &&mut Option<Candidate>| known.as_ref().is_none_or(|known| known.start <= start);
            open.get_mut(first).filter(is_nearer).map(std::slice::from_mut).unwrap_or_default()
        };
        if slots.is_empty() {
            return Ok(());
        }
        self.work = self.work.checked_sub(NAME_WORK).ok_or(TooMuchWork)?;
        let Some(name) = name() else { return Ok(()) };
        let underscores = name.iter().take_while(|byte| **byte == b'_').take(15).count() as u32;
        let rank = (15 - underscores) * 16 + visibility;
        // A label is not a function in code with sizes. In code without sizes it can be one.
        let candidate = Some(Candidate { is_function: is_function || size == 0, start, rank, name });
        for known in slots {
            if *known < candidate {
                known.clone_from(&candidate);
            }
        }
        Ok(())
    }

    /// Adds work. Returns an error above the limit.
    pub(crate) fn spend(&mut self, work: u64) -> Result<(), TooMuchWork> {
        self.work = self.work.checked_sub(work).ok_or(TooMuchWork)?;
        Ok(())
    }

    /// Returns the name for each wanted address.
    pub(crate) fn finish(self) -> Vec<Option<Vec<u8>>> {
        let (mut entry, mut label, mut end) = (None, None, 0);
        let Self { wanted, holding, entries, labels, ends, .. } = self;
        let unsized_symbols = entries.into_iter().zip(labels).zip(ends);
        wanted
            .iter()
            .zip(holding.into_iter().zip(unsized_symbols))
            .map(|(address, (holding, ((last_entry, last_label), last_end)))| {
                (entry, label, end) =
                    (entry.take().max(last_entry), label.take().max(last_label), end.max(last_end));
                let reaches =
                    |symbol: &&Candidate| symbol.start >= end && address - symbol.start < MAX_UNSIZED_BYTES;
                let open = || entry.as_ref().filter(reaches).or(label.as_ref().filter(reaches)).cloned();
                Some(holding.or_else(open)?.name)
            })
            .collect()
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn find_offers(symbols: &[(Offer, &str)], wanted: &[u64]) -> Vec<Option<String>> {
        let mut search = SymbolSearch::new(wanted);
        for (offer, name) in symbols {
            search.offer(*offer, || Some(name.as_bytes().to_vec())).unwrap();
        }
        search.finish().into_iter().map(|name| name.map(|name| String::from_utf8(name).unwrap())).collect()
    }

    /// Searches among functions.
    fn find_in(symbols: &[(u64, u64, &str)], wanted: &[u64]) -> Vec<Option<String>> {
        let offers: Vec<_> =
            symbols.iter().map(|(start, size, name)| (Offer::function(*start, *size), *name)).collect();
        find_offers(&offers, wanted)
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

    /// Checks the symbols that assemblers write for hand-written code: with sizes, with types alone, with neither.
    #[test]
    fn a_label_inside_a_function_is_no_function() {
        let function = |start, size| Offer { visibility: 2, ..Offer::function(start, size) };
        let global = |start| Offer { is_function: false, ..function(start, 0) };
        let label = |start, size| Offer { start, size, is_function: false, visibility: 0 };
        let symbols = [
            (function(0x100, 0x40), "sized"),
            (label(0x110, 0), "sized.loop"),
            (label(0x118, 8), "sized.table"),
            (function(0x120, 0), "second_entry"),
            (function(0x200, 0), "typed"),
            (label(0x210, 0), "typed.loop"),
            (global(0x300), "visible"),
            (label(0x310, 0), "visible.loop"),
            (function(0x400, 0x10), "last"),
            (label(0x500, 0), "helper"),
            (label(0x510, 8), "table"),
        ];
        let expected = [
            (0x110, Some("sized")),
            (0x118, Some("sized")),
            (0x120, Some("sized")),
            (0x13f, Some("sized")),
            (0x140, None),
            (0x1ff, None),
            (0x210, Some("typed")),
            (0x2ff, Some("typed")),
            (0x300, Some("visible")),
            (0x3ff, Some("visible")),
            (0x400, Some("last")),
            (0x410, None),
            (0x500, Some("helper")),
            (0x517, Some("table")),
            (0x518, None),
        ];
        for turn in 0..symbols.len() {
            let mut symbols = symbols;
            symbols.rotate_left(turn);
            for (address, name) in expected {
                assert_eq!(find_offers(&symbols, &[address]), [name.map(str::to_owned)], "{address:#x}");
            }
            let wanted = expected.map(|(address, _)| address);
            let names = expected.map(|(_, name)| name.map(str::to_owned));
            assert_eq!(find_offers(&symbols, &wanted), names);
        }
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
        let result = (0..1 << 20)
            .try_for_each(|_| search.offer(Offer::function(0, 1 << 20), || Some(b"everything".to_vec())));
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
                // The innermost symbol with a size that holds the address, else the nearest one without.
                let holding = named.iter().filter(|(start, size, _)| start <= address && address - start < *size);
                let holding = holding.max_by_key(|(start, _, name)| (*start, name.clone()));
                let ended = named.iter().filter(|(start, size, _)| *size > 0 && start + size <= *address);
                let end = ended.map(|(start, size, _)| start + size).max().unwrap_or(0);
                let open = named.iter().filter(|(start, size, _)| *size == 0 && start <= address && *start >= end);
                let open = open.max_by_key(|(start, _, name)| (*start, name.clone()));
                let expected = holding.or(open).map(|(_, _, name)| name);
                prop_assert_eq!(found.as_ref(), expected, "{:#x}", address);
            }
        }
    }
}
