//! A compact table of symbols, for `/proc/kallsyms` and perf maps.

use std::fmt;

use gannet_symbols::MAX_UNSIZED_BYTES;

const _: () = assert!(MAX_UNSIZED_BYTES < UNSIZED as u64, "the mark for an unknown size is not a size");
const UNSIZED: u32 = u32::MAX;
/// Symbols before the nearest one that are tried: some assembly has labels inside of functions.
const MAX_NESTING: usize = 16;

/// Symbols by address.
#[derive(Default)]
pub(crate) struct SymbolTable {
    /// Sorted by `start`, each start once.
    symbols: Box<[Symbol]>,
    /// Each name ends with a zero byte.
    names: Box<[u8]>,
}

#[derive(Clone, Copy)]
struct Symbol {
    start: u64,
    size: u32,
    name: u32,
}

/// Collects symbols for a table, up to a limit of memory.
pub(crate) struct SymbolTableBuilder {
    symbols: Vec<(Symbol, u32)>,
    names: Vec<u8>,
    max_bytes: usize,
}

/// The symbols take more memory than the limit.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct TooManySymbols;

impl SymbolTableBuilder {
    pub(crate) fn new(max_bytes: usize) -> Self {
        Self { symbols: Vec::new(), names: Vec::new(), max_bytes: max_bytes.min(u32::MAX as usize) }
    }

    /// Adds a symbol; `size` 0 is an unknown size. Of several symbols at one address the one of highest rank stays.
    pub(crate) fn push(
        &mut self,
        start: u64,
        size: u64,
        name: &[u8],
        rank: u32,
    ) -> Result<(), TooManySymbols> {
        let taken = self.names.len() + name.len() + 1 + (self.symbols.len() + 1) * size_of::<Symbol>();
        if taken > self.max_bytes {
            return Err(TooManySymbols);
        }
        let size = match size {
            0 => UNSIZED,
            size => u32::try_from(size).unwrap_or(UNSIZED).min(UNSIZED - 1),
        };
        self.symbols.push((Symbol { start, size, name: self.names.len() as u32 }, rank));
        self.names.extend(name.iter().map(|byte| if *byte == 0 { b'?' } else { *byte }));
        self.names.push(0);
        Ok(())
    }

    pub(crate) fn is_empty(&self) -> bool {
        self.symbols.is_empty()
    }

    pub(crate) fn finish(self) -> SymbolTable {
        let Self { mut symbols, names, .. } = self;
        let name = |symbol: &Symbol| c_string(&names, symbol.name as usize).unwrap_or_default();
        symbols.sort_unstable_by(|(a, rank_a), (b, rank_b)| {
            (a.start, std::cmp::Reverse(rank_a))
                .cmp(&(b.start, std::cmp::Reverse(rank_b)))
                .then_with(|| name(a).cmp(name(b)))
        });
        symbols.dedup_by_key(|(symbol, _)| symbol.start);
        SymbolTable {
            symbols: symbols.into_iter().map(|(symbol, _)| symbol).collect(),
            names: names.into_boxed_slice(),
        }
    }
}

impl SymbolTable {
    /// Returns the name of the symbol that holds the address.
    pub(crate) fn find(&self, address: u64) -> Option<&[u8]> {
        let after = self.symbols.partition_point(|symbol| symbol.start <= address);
        let nearest = after.checked_sub(1)?;
        let found = self.symbols[after.saturating_sub(MAX_NESTING)..after].iter().rev().enumerate().find(
            |(distance, symbol)| match symbol.size {
                // A symbol of unknown size ends where the next one begins.
                UNSIZED => *distance == 0 && address - self.symbols[nearest].start < MAX_UNSIZED_BYTES,
                size => address - symbol.start < u64::from(size),
            },
        );
        c_string(&self.names, found?.1.name as usize)
    }

    pub(crate) fn len(&self) -> usize {
        self.symbols.len()
    }

    /// Returns the memory of the table in bytes.
    pub(crate) fn bytes(&self) -> usize {
        size_of_val(&*self.symbols) + self.names.len()
    }
}

/// Returns the zero-terminated string at `offset`.
fn c_string(bytes: &[u8], offset: usize) -> Option<&[u8]> {
    let rest = bytes.get(offset..)?;
    Some(&rest[..rest.iter().position(|byte| *byte == 0)?])
}

impl fmt::Debug for SymbolTable {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "SymbolTable({} symbols, {} bytes)", self.len(), self.bytes())
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn table(symbols: &[(u64, u64, &str, u32)]) -> SymbolTable {
        let mut builder = SymbolTableBuilder::new(1 << 20);
        for (start, size, name, rank) in symbols {
            builder.push(*start, *size, name.as_bytes(), *rank).unwrap();
        }
        builder.finish()
    }

    #[test]
    fn an_address_belongs_to_the_symbol_that_holds_it() {
        let table = table(&[
            (0x100, 0x40, "outer", 0),
            (0x110, 0x8, "inner", 0),
            (0x200, 0, "open", 0),
            (0x300, 1, "one", 0),
        ]);
        let name = |address| table.find(address).map(|name| String::from_utf8_lossy(name).into_owned());
        for (address, expected) in [
            (0, None),
            (0xff, None),
            (0x100, Some("outer")),
            (0x110, Some("inner")),
            (0x117, Some("inner")),
            (0x118, Some("outer")),
            (0x13f, Some("outer")),
            (0x140, None),
            (0x200, Some("open")),
            (0x2ff, Some("open")),
            (0x300, Some("one")),
            (0x301, None),
            (u64::MAX, None),
        ] {
            assert_eq!(name(address).as_deref(), expected, "{address:#x}");
        }
    }

    #[test]
    fn a_symbol_without_size_ends_at_a_limit() {
        let table = table(&[(0x1000, 0, "last", 0)]);
        assert!(table.find(0x1000 + MAX_UNSIZED_BYTES - 1).is_some());
        assert!(table.find(0x1000 + MAX_UNSIZED_BYTES).is_none());
    }

    #[test]
    fn the_alias_of_the_highest_rank_is_shown() {
        let symbols = [(0x10, 4, "__libc_malloc", 2), (0x10, 4, "malloc", 3), (0x10, 4, "local", 0)];
        let mut turned = symbols;
        turned.reverse();
        for symbols in [symbols, turned] {
            assert_eq!(table(&symbols).find(0x11), Some(b"malloc".as_slice()));
        }
    }

    #[test]
    fn memory_is_bounded() {
        let mut builder = SymbolTableBuilder::new(1000);
        let pushed = (0..1000).take_while(|n| builder.push(*n, 1, b"abc", 0).is_ok()).count();
        assert_eq!(pushed, 1000 / (16 + 4));
        assert!(builder.finish().bytes() <= 1000);
    }

    proptest! {
        #[test]
        fn sized_symbols_that_do_not_overlap_are_found_exactly(
            gaps in proptest::collection::vec((1u64..50, 0u64..50), 1..100)
        ) {
            let mut builder = SymbolTableBuilder::new(1 << 20);
            let mut expected = Vec::new();
            let mut at = 0;
            for (index, (size, gap)) in gaps.iter().enumerate() {
                let name = format!("f{index}");
                builder.push(at, *size, name.as_bytes(), 0).unwrap();
                expected.extend((0..*size).map(|_| Some(name.clone())));
                expected.extend((0..*gap).map(|_| None));
                at += size + gap;
            }
            let table = builder.finish();
            for (address, name) in expected.iter().enumerate() {
                prop_assert_eq!(table.find(address as u64), name.as_ref().map(String::as_bytes));
            }
        }
    }
}
