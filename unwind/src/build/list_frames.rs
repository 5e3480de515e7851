//! The code of interpreters that keep the frames of their programs in a list: rows there carry [`flags::LIST`].
//!
//! A compiler splits such a function into a hot and several cold parts, each with a description of its own. All of them are
//! reached from the named part by direct jumps.
//!
//! [`flags::LIST`]: crate::format::flags::LIST

use std::collections::{BTreeSet, HashSet};

use gannet_elf::{Arch, Elf};
use iced_x86::{Decoder, DecoderOptions, FlowControl, OpKind};

use super::{BuildOptions, pieces::Piece};
use crate::limits::{Budget, LimitExceeded};

/// Symbol tables larger than this are not read.
const MAX_SYMBOL_BYTES: u64 = 16 << 20;
/// Parts of one function that are followed; compilers make two or three.
const MAX_PARTS: usize = 16;
/// Bytes of one part that are decoded.
const MAX_PART_BYTES: u64 = 1 << 20;
/// Bytes of the section that lists addresses, of an entry, and its kind: the loader adds to the address where the file is.
const MAX_RELOCATION_BYTES: u64 = 16 << 20;
const RELOCATION_BYTES: usize = 24;
const RELATIVE: u64 = 8;
/// Tables with fewer addresses are of other code: a matcher of regular expressions has 98.
const MIN_TABLE: u64 = 128;

/// Returns the indices of the pieces that belong to the functions that the options name.
pub(super) fn parts(
    elf: &Elf<'_>,
    options: &BuildOptions<'_>,
    pieces: &[Piece],
    budget: &mut Budget<'_>,
) -> Result<HashSet<usize>, LimitExceeded> {
    let mut parts = HashSet::new();
    let names = [options.list_functions, options.list_tables].concat();
    // Nearly all files have none of them.
    if names.is_empty() || addresses(elf, &names).is_empty() {
        return Ok(parts);
    }
    let named = addresses(elf, options.list_functions);
    let mut open: Vec<usize> = named.into_iter().filter_map(|address| piece_of(pieces, address)).collect();
    if !addresses(elf, options.list_tables).is_empty() {
        open.extend(owner_of_table(elf, pieces, budget)?);
    }
    while let Some(index) = open.pop() {
        if parts.len() >= MAX_PARTS || !parts.insert(index) {
            continue;
        }
        for target in jumps(elf, &pieces[index], budget)? {
            open.extend(piece_of(pieces, target).filter(|index| !parts.contains(index)));
        }
    }
    Ok(parts)
}

/// Returns the addresses of the exported functions of these names. Interpreters export them, because extensions call them, and the
/// agent recognizes no interpreter by other symbols. The names in `.symtab` take 20 MB in a compiler.
fn addresses(elf: &Elf<'_>, names: &[&str]) -> BTreeSet<u64> {
    let table = elf.symbols(b".dynsym").filter(|table| table.bytes() <= MAX_SYMBOL_BYTES);
    table.map(|table| table.functions_named(names)).unwrap_or_default()
}

/// Returns the piece that the longest table of addresses leads into: an interpreter's loop jumps by a table of its instructions'
/// code. The loader adds to the addresses where the file is.
fn owner_of_table(
    elf: &Elf<'_>,
    pieces: &[Piece],
    budget: &mut Budget<'_>,
) -> Result<Option<usize>, LimitExceeded> {
    if elf.arch() != Arch::X86_64 {
        return Ok(None);
    }
    let section = elf.section(b".rela.dyn");
    let Some(Ok(entries)) = section.map(|section| elf.section_data_within(section, MAX_RELOCATION_BYTES))
    else {
        return Ok(None);
    };
    let (entries, _) = entries.as_chunks::<RELOCATION_BYTES>();
    let (mut longest, mut best) = (MIN_TABLE, None);
    let mut run: Option<(usize, u64, u64)> = None;
    for entry in entries {
        budget.step()?;
        let word = |at: usize| entry[at..].first_chunk().map_or(0, |eight| u64::from_le_bytes(*eight));
        let (place, kind, target) = (word(0), word(8), word(16));
        // The begin of a function is in tables of functions.
        let owner = piece_of(pieces, target).filter(|piece| pieces[*piece].start != target);
        run = match (owner.filter(|_| kind == RELATIVE), run) {
            (Some(owner), Some((piece, next, length))) if (owner, place) == (piece, next) => {
                Some((piece, next.wrapping_add(8), length + 1))
            }
            (Some(owner), _) => Some((owner, place.wrapping_add(8), 1)),
            (None, _) => None,
        };
        if let Some((piece, _, length)) = run.filter(|(_, _, length)| *length > longest) {
            (longest, best) = (length, Some(piece));
        }
    }
    Ok(best)
}

fn piece_of(pieces: &[Piece], address: u64) -> Option<usize> {
    let index = pieces.partition_point(|piece| piece.start <= address).checked_sub(1)?;
    (address < pieces[index].end).then_some(index)
}

/// Returns the targets outside of a piece to which its direct jumps lead.
fn jumps(elf: &Elf<'_>, piece: &Piece, budget: &mut Budget<'_>) -> Result<BTreeSet<u64>, LimitExceeded> {
    let mut targets = BTreeSet::new();
    let bytes = piece.end - piece.start;
    if elf.arch() != Arch::X86_64 || bytes > MAX_PART_BYTES {
        return Ok(targets);
    }
    let Some(code) = elf.bytes_at(piece.start, bytes) else { return Ok(targets) };
    for instruction in Decoder::with_ip(64, &code, piece.start, DecoderOptions::NONE) {
        budget.step()?;
        let is_jump = matches!(
            instruction.flow_control(),
            FlowControl::ConditionalBranch | FlowControl::UnconditionalBranch
        );
        if is_jump && instruction.op0_kind() == OpKind::NearBranch64 {
            let target = instruction.near_branch64();
            if !(piece.start..piece.end).contains(&target) {
                targets.insert(target);
            }
        }
    }
    Ok(targets)
}
