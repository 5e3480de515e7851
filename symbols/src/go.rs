//! Functions of Go programs, stripped or not, from the tables that the Go runtime uses for its own stack traces.

use std::fs::File;

use gannet_elf::{Elf, ElfError, ElfLimits, GoFault, GoLine, GoLines, GoTable, Segments};

use crate::{
    demangle::{self, MAX_NAME_BYTES},
    dwarf::{DebugFrame, DebugLine},
    symbol_search::{Offer, SymbolSearch, TooMuchWork},
};

/// Maximum size of a function table, in bytes. The largest Go programs have some 300,000 functions in 60 MB.
const MAX_TABLE_BYTES: u64 = 128 << 20;

/// The reason why Go's function table gave no names.
#[derive(Debug, thiserror::Error)]
pub(crate) enum GoError {
    /// The table is damaged, or of an unknown version.
    #[error(transparent)]
    Table(#[from] GoFault),
    /// An error of the file system.
    #[error(transparent)]
    Elf(#[from] ElfError),
    /// The search took too long.
    #[error(transparent)]
    TooMuchWork(#[from] TooMuchWork),
}

/// Finds the functions at each of the addresses, with inlined ones and lines; an empty list if an address has no Go function. Returns
/// `None` for a file without a table of Go 1.20 or later, and for a damaged table.
pub fn lines(file: &File, addresses: &[u64]) -> Option<Vec<DebugFrame>> {
    let elf = Elf::parse(file, &ElfLimits::default()).ok()?;
    let lines = GoLines::of(&elf, MAX_TABLE_BYTES).ok()??.ok()?;
    let frame = |address: &u64| {
        let found = lines.at(*address, MAX_NAME_BYTES + 1).unwrap_or_default();
        found.into_iter().map(debug_line).collect()
    };
    Some(addresses.iter().map(frame).collect())
}

fn debug_line(found: GoLine) -> DebugLine {
    let GoLine { name, file, line, start_line } = found;
    let text = |bytes: Vec<u8>| demangle::cut(&String::from_utf8_lossy(&bytes));
    DebugLine { name: text(name), file: text(file), line, column: 0, start_line }
}

/// Offers the functions of a Go program to a search. Offers none of another program.
pub(crate) fn offer(elf: &Elf<'_>, search: &mut SymbolSearch<'_>) -> Result<(), GoError> {
    match elf.go_table(MAX_TABLE_BYTES)? {
        Some(table) => offer_functions(&table?, elf.segments(), search),
        None => Ok(()),
    }
}

fn offer_functions(
    table: &GoTable<'_>,
    segments: &Segments,
    search: &mut SymbolSearch<'_>,
) -> Result<(), GoError> {
    for function in table.functions(segments) {
        let Some(function) = function? else {
            search.spend(1)?;
            continue;
        };
        search.offer(Offer::function(function.start, function.end - function.start), || {
            let name = table.name(&table.record(&function)?, MAX_NAME_BYTES + 1);
            (!name.is_empty()).then(|| name.to_vec())
        })?;
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use gannet_elf::Segment;
    use proptest::prelude::*;

    use super::*;

    /// Two functions, as Go 1.20 writes them.
    fn table() -> Vec<u8> {
        let mut bytes = vec![0xf1, 0xff, 0xff, 0xff, 0, 0, 1, 8];
        for field in [2u64, 0, 0x1000, 72, 0, 0, 0, 96] {
            bytes.extend(field.to_le_bytes());
        }
        bytes.extend(b"main.main\0main.work\0");
        bytes.resize(96, 0);
        // Starts and records; the records follow at 20 and 68.
        for value in [0x10u32, 20, 0x40, 68, 0x60, 0x10, 0] {
            bytes.extend(value.to_le_bytes());
        }
        bytes.resize(96 + 68, 0);
        for value in [0x40u32, 10] {
            bytes.extend(value.to_le_bytes());
        }
        bytes.resize(96 + 68 + 48, 0);
        bytes
    }

    fn names(bytes: &[u8], wanted: &[u64]) -> Result<Vec<Option<Vec<u8>>>, GoError> {
        let code = Segment {
            vaddr: 0x1000,
            file_offset: 0,
            file_bytes: 0x1000,
            memory_bytes: 0x1000,
            executable: true,
        };
        let mut search = SymbolSearch::new(wanted);
        offer_functions(&GoTable::parse(bytes)?, &Segments::new(vec![code]), &mut search)?;
        Ok(search.finish())
    }

    #[test]
    fn functions_have_their_names_from_start_to_end() {
        let (main, work) = (b"main.main".to_vec(), b"main.work".to_vec());
        let found = names(&table(), &[0x100f, 0x1010, 0x105f, 0x1060]).unwrap();
        assert_eq!(found, [None, Some(main), Some(work), None]);
    }

    /// Checks that a function whose name never ends costs no more than the longest allowed name.
    #[test]
    fn a_name_without_end_is_cut() {
        let mut bytes = table();
        bytes.resize(1 << 20, b'x');
        // The name of the second function includes all bytes after the table.
        let end = table().len() as u32 - 72;
        bytes[96 + 68 + 4..][..4].copy_from_slice(&end.to_le_bytes());
        let found = names(&bytes, &[0x1040]).unwrap();
        assert_eq!(found[0].as_ref().map(Vec::len), Some(MAX_NAME_BYTES + 1));
    }

    proptest! {
        #[test]
        fn any_bytes_are_read_without_harm(
            changes in proptest::collection::vec((0usize..212, any::<u8>()), 0..20),
            length in 0usize..=212,
        ) {
            let mut bytes = table();
            for (at, value) in changes {
                bytes[at] = value;
            }
            bytes.truncate(length);
            if let Ok(found) = names(&bytes, &[0x1010, 0x1040]) {
                prop_assert_eq!(found.len(), 2);
            }
        }
    }
}
