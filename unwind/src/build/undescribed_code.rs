//! x86_64 code that nothing in the file describes.

use std::collections::HashSet;

use gannet_elf::{Arch, Elf};

use super::{
    BuildFault,
    pieces::{Piece, gaps},
};
use crate::instructions::{self, Function, Gap};
use crate::limits::Budget;

/// With less undescribed code than this, which the start files of a C compiler leave, symbols are not worth reading.
const NAMED_GAP_BYTES: u64 = 2048;
/// Symbol tables larger than this are not read.
const MAX_SYMBOL_BYTES: u64 = 16 << 20;

/// Reads the functions in these gaps off their instructions.
pub(super) fn functions(
    elf: &Elf<'_>,
    pieces: &[Piece],
    budget: &mut Budget<'_>,
) -> Result<Vec<Function>, BuildFault> {
    let gaps = gaps(elf.code(), pieces);
    let bytes = gaps.iter().fold(0, |sum: u64, (start, end)| sum.saturating_add(end - start));
    if elf.arch() != Arch::X86_64 || bytes == 0 || bytes > budget.limits.analyzed_bytes {
        return Ok(Vec::new());
    }
    let named = if bytes < NAMED_GAP_BYTES { HashSet::new() } else { function_symbols(elf, &gaps) };
    let gaps: Vec<_> = gaps
        .into_iter()
        .filter_map(|(start, end)| Some(Gap { start, bytes: elf.bytes_at(start, end - start)? }))
        .collect();
    Ok(instructions::functions(&gaps, named, budget)?)
}

/// Returns the first addresses of functions within these ranges, as far as the symbol tables have them: they only help.
pub(crate) fn function_symbols(elf: &Elf<'_>, ranges: &[(u64, u64)]) -> HashSet<u64> {
    let inside = |address: &u64| {
        let before = ranges.partition_point(|(start, _)| start <= address);
        before.checked_sub(1).is_some_and(|n| *address < ranges[n].1)
    };
    let tables = [&b".symtab"[..], b".dynsym"].into_iter().filter_map(|name| elf.symbols(name));
    let mut starts = HashSet::new();
    for table in tables.filter(|table| table.bytes() <= MAX_SYMBOL_BYTES) {
        let functions = table.iter().map_while(Result::ok).filter(|symbol| symbol.is_function);
        starts.extend(functions.map(|symbol| symbol.address).filter(inside));
    }
    starts
}
