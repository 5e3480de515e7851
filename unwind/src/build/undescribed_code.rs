//! x86_64 code that nothing in the file describes.

use foldhash::{HashSet, HashSetExt};
use gannet_elf::{Arch, Binding, Elf, Symbol};

use super::{
    BuildFault,
    pieces::{MIN_GAP_BYTES, Piece, gaps, gaps_from},
};
use crate::instructions::{self, Found, Function, Gap};
use crate::limits::Budget;

/// With less undescribed code than this, which the start files of a C compiler leave, symbols are not worth reading.
const NAMED_GAP_BYTES: u64 = 2048;
/// Symbol tables larger than this are not read.
const MAX_SYMBOL_BYTES: u64 = 16 << 20;

/// Programs with more code than this keep gaps of a few bytes, which hand-written assembly between two functions leaves.
const MAX_SMALL_CODE_BYTES: u64 = 4 << 20;
/// Described code beyond this is not searched for calls.
const MAX_SEARCHED_BYTES: u64 = 16 << 20;
/// Bytes of described code in memory at a time.
const SEARCHED_AT_ONCE: usize = 256 << 10;

/// The bytes of which `nop`s of all lengths consist, with their prefixes, and `int3`.
const OF_NOPS: [u8; 11] = [0x90, 0x66, 0x2e, 0x0f, 0x1f, 0x84, 0x80, 0x40, 0x44, 0x00, 0xcc];

/// Reads the functions in these gaps off their instructions.
pub(super) fn functions(
    elf: &Elf<'_>,
    pieces: &[Piece],
    budget: &mut Budget<'_>,
) -> Result<Vec<Function>, BuildFault> {
    if elf.arch() != Arch::X86_64 {
        return Ok(Vec::new());
    }
    let code = elf.code();
    let gaps = with_small_gaps(elf, &code, pieces);
    let bytes = gaps.iter().fold(0, |sum: u64, (start, end)| sum.saturating_add(end - start));
    if bytes == 0 || bytes > budget.limits.analyzed_bytes {
        return Ok(Vec::new());
    }
    let mut named = if bytes < NAMED_GAP_BYTES { HashSet::new() } else { function_symbols(elf, &gaps) };
    let ranges = gaps;
    let gaps: Vec<_> = ranges
        .iter()
        .filter_map(|(start, end)| Some(Gap { start: *start, bytes: elf.bytes_at(*start, end - start)? }))
        .collect();
    let Found { functions, unknown } = instructions::functions(&gaps, named.clone(), budget)?;
    // Where functions begin that are not aligned, only their callers and symbols know.
    let mut starts = calls_into(elf, &code, &unknown);
    if bytes < NAMED_GAP_BYTES && !unknown.is_empty() {
        starts.extend(function_symbols(elf, &unknown));
    }
    budget.check()?;
    let known = named.len();
    named.extend(starts);
    if named.len() == known {
        return Ok(functions);
    }
    Ok(instructions::functions(&gaps, named, budget)?.functions)
}

/// Returns the gaps between pieces. Of a small program that includes gaps of a few bytes, unless they are padding.
fn with_small_gaps(elf: &Elf<'_>, code: &[(u64, u64)], pieces: &[Piece]) -> Vec<(u64, u64)> {
    let bytes = code.iter().fold(0, |sum: u64, (start, end)| sum.saturating_add(end - start));
    if bytes > MAX_SMALL_CODE_BYTES {
        return gaps(code.to_vec(), pieces);
    }
    let sections: Vec<_> =
        code.iter().filter_map(|(start, end)| Some((*start, elf.bytes_at(*start, end - start)?))).collect();
    let is_padding = |start: u64, end: u64| {
        let inside = sections.iter().find_map(|(first, bytes)| {
            let offset = usize::try_from(start.checked_sub(*first)?).ok()?;
            bytes.get(offset..offset + usize::try_from(end - start).ok()?)
        });
        inside.is_none_or(|bytes| bytes.iter().all(|byte| OF_NOPS.contains(byte)))
    };
    let mut found = gaps_from(1, code.to_vec(), pieces);
    found.retain(|(start, end)| end - start >= MIN_GAP_BYTES || !is_padding(*start, *end));
    found
}

/// Returns the addresses in these ranges that calls and jumps in all code lead to. It searches bytes, not instructions: that any
/// other bytes lead into a few small ranges is unlikely.
fn calls_into(elf: &Elf<'_>, code: &[(u64, u64)], ranges: &[(u64, u64)]) -> HashSet<u64> {
    const CALL: u8 = 0xe8;
    const JUMP: u8 = 0xe9;
    let mut targets = HashSet::new();
    let (Some((first, _)), Some((_, last))) = (ranges.first(), ranges.last()) else { return targets };
    let mut left = MAX_SEARCHED_BYTES;
    for (start, end) in code {
        let end = start + (end - start).min(left);
        left -= end - start;
        for at in (*start..end).step_by(SEARCHED_AT_ONCE) {
            // An instruction may begin at the last byte of a part.
            let bytes = elf.bytes_at(at, (end - at).min(SEARCHED_AT_ONCE as u64 + 4)).unwrap_or_default();
            for offset in memchr::memchr2_iter(CALL, JUMP, &bytes) {
                let Some(distance) = bytes.get(offset + 1..).and_then(<[u8]>::first_chunk) else { break };
                let next = at + offset as u64 + 5;
                let target = next.wrapping_add_signed(i64::from(i32::from_le_bytes(*distance)));
                if (*first..*last).contains(&target) && is_in(ranges, target) {
                    targets.insert(target);
                }
            }
        }
    }
    targets
}

/// Reports whether one of these ranges, sorted and free of overlaps, holds the address.
fn is_in(ranges: &[(u64, u64)], address: u64) -> bool {
    let before = ranges.partition_point(|(start, _)| *start <= address);
    before.checked_sub(1).is_some_and(|n| address < ranges[n].1)
}

/// Returns the first addresses of functions within these ranges, as far as the symbol tables have them: they only help.
pub(crate) fn function_symbols(elf: &Elf<'_>, ranges: &[(u64, u64)]) -> HashSet<u64> {
    let inside = |address: &u64| is_in(ranges, *address);
    let tables = [&b".symtab"[..], b".dynsym"].into_iter().filter_map(|name| elf.symbols(name));
    let mut starts = HashSet::new();
    for table in tables.filter(|table| table.bytes() <= MAX_SYMBOL_BYTES) {
        // Assembly often gives its functions no type. A local symbol without one is a label within a function, as a rule.
        let is_start = |symbol: &Symbol| {
            symbol.is_function || symbol.is_untyped && symbol.is_defined && symbol.binding != Binding::Local
        };
        let functions = table.iter().map_while(Result::ok).filter(is_start);
        starts.extend(functions.map(|symbol| symbol.address).filter(inside));
    }
    starts
}

#[cfg(test)]
mod tests {
    use std::{fs, process::Command};

    use gannet_elf::ElfLimits;

    use super::*;

    /// Checks calls that lie across the end of a part of the code.
    #[test]
    fn calls_are_found_wherever_parts_end() {
        let directory = tempfile::tempdir().unwrap();
        let (source, path) = (directory.path().join("a.S"), directory.path().join("a"));
        for before_end in 0..6 {
            let filler = SEARCHED_AT_ONCE - before_end;
            fs::write(&source, format!(".text\n.fill {filler}, 1, 0x90\ncall f\nret\n.globl f\nf: ret\n"))
                .unwrap();
            let made = Command::new("gcc")
                .args(["-nostdlib", "-static", "-Wl,-e,f", "-o"])
                .args([&path, &source])
                .status();
            assert!(made.unwrap().success());
            let bytes = fs::read(&path).unwrap();
            let elf = Elf::parse(&bytes, &ElfLimits::default()).unwrap();
            let code = elf.code();
            let f = code[0].0 + filler as u64 + 6;
            assert_eq!(calls_into(&elf, &code, &[(f, f + 1)]), HashSet::from_iter([f]), "{before_end}");
        }
    }
}
