//! The code of interpreters that keep the frames of their programs in a list: rows there carry [`flags::LIST`].
//!
//! A compiler splits such a function into a hot and several cold parts, each with a description of its own. All of them are
//! reached from the named part by direct jumps.
//!
//! [`flags::LIST`]: crate::format::flags::LIST

use std::collections::{BTreeSet, HashSet};

use gannet_elf::{Arch, Elf};
use iced_x86::{Decoder, DecoderOptions, FlowControl, OpKind};

use super::pieces::Piece;
use crate::limits::{Budget, LimitExceeded};

/// Symbol tables larger than this are not read.
const MAX_SYMBOL_BYTES: u64 = 16 << 20;
/// Parts of one function that are followed; compilers make two or three.
const MAX_PARTS: usize = 16;
/// Bytes of one part that are decoded.
const MAX_PART_BYTES: u64 = 1 << 20;

/// Returns the indices of the pieces that belong to the functions of these names.
pub(super) fn parts(
    elf: &Elf<'_>,
    names: &[&str],
    pieces: &[Piece],
    budget: &mut Budget<'_>,
) -> Result<HashSet<usize>, LimitExceeded> {
    let mut parts = HashSet::new();
    if names.is_empty() {
        return Ok(parts);
    }
    let mut open: Vec<usize> =
        addresses(elf, names).into_iter().filter_map(|address| piece_of(pieces, address)).collect();
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

/// Returns the addresses of the functions of these names.
fn addresses(elf: &Elf<'_>, names: &[&str]) -> BTreeSet<u64> {
    let tables = [&b".dynsym"[..], b".symtab"].into_iter().filter_map(|name| elf.symbols(name));
    let tables = tables.filter(|table| table.bytes() <= MAX_SYMBOL_BYTES);
    tables.map(|table| table.functions_named(names)).find(|found| !found.is_empty()).unwrap_or_default()
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
