//! Ranges of code, and the source that knows the rows of each.

use crate::cfi;
use crate::format::UnwindRule;

/// Gaps shorter than this are padding between functions, as a rule.
pub(super) const MIN_GAP_BYTES: u64 = 64;

/// A range of addresses and the source that knows its rows.
#[derive(Clone, Copy, Debug)]
pub(super) struct Piece {
    pub(super) start: u64,
    pub(super) end: u64,
    pub(super) source: Source,
}

/// A source of rows; a number is the index of one of its functions.
#[derive(Clone, Copy, Debug)]
pub(super) enum Source {
    EhFrame(u32),
    Go(u32),
    DebugFrame(u32),
    Fixed(UnwindRule),
    Code(u32),
}

/// Returns the pieces of functions, which are sorted and free of overlaps.
pub(super) fn of_ranges(
    ranges: impl Iterator<Item = (u64, u64)>,
    source: fn(u32) -> Source,
) -> impl Iterator<Item = Piece> {
    ranges.enumerate().map(move |(index, (start, end))| Piece { start, end, source: source(index as u32) })
}

/// Returns the pieces of the functions of call frame information.
pub(super) fn of_entries(
    functions: &[cfi::Function],
    source: fn(u32) -> Source,
) -> impl Iterator<Item = Piece> {
    of_ranges(functions.iter().map(|function| (function.start, function.end)), source)
}

/// Adds to `have` the parts of `more` that lie between its pieces. Both are sorted and free of overlaps. A large program has
/// hundreds of thousands of pieces, so they are never in memory twice.
pub(super) fn fill(mut have: Vec<Piece>, more: impl Iterator<Item = Piece>) -> Vec<Piece> {
    let parts = parts_between(&have, more);
    let Some(filler) = parts.last().copied() else { return have };
    let (mut from, mut to) = (have.len(), have.len() + parts.len());
    have.reserve_exact(parts.len());
    have.resize(to, filler);
    // From the last one on, so that each piece moves to its place once.
    for part in parts.into_iter().rev() {
        while from > 0 && have[from - 1].start > part.start {
            (from, to) = (from - 1, to - 1);
            have[to] = have[from];
        }
        to -= 1;
        have[to] = part;
    }
    have
}

/// Returns the parts of `more` that lie between the pieces of `have`.
fn parts_between(have: &[Piece], more: impl Iterator<Item = Piece>) -> Vec<Piece> {
    let mut parts = Vec::new();
    let mut have = have.iter().peekable();
    let mut covered = 0;
    for piece in more {
        let mut start = piece.start.max(covered);
        while start < piece.end {
            match have.peek() {
                Some(next) if next.start <= start => {
                    covered = next.end;
                    start = start.max(covered);
                    have.next();
                }
                Some(next) => {
                    let end = next.start.min(piece.end);
                    parts.push(Piece { start, end, ..piece });
                    start = end;
                }
                None => {
                    parts.push(Piece { start, ..piece });
                    start = piece.end;
                }
            }
        }
    }
    parts
}

/// Returns the ranges of code that no piece covers, ascending.
pub(super) fn gaps(code: Vec<(u64, u64)>, pieces: &[Piece]) -> Vec<(u64, u64)> {
    gaps_from(MIN_GAP_BYTES, code, pieces)
}

/// Returns the ranges of code of at least this many bytes that no piece covers.
pub(super) fn gaps_from(min_bytes: u64, code: Vec<(u64, u64)>, pieces: &[Piece]) -> Vec<(u64, u64)> {
    let mut found = Vec::new();
    let mut pieces = pieces.iter().peekable();
    let mut at = 0;
    for (start, end) in code {
        at = at.max(start);
        while at < end {
            let covered = pieces.peek().map_or((end, end), |piece| (piece.start, piece.end));
            if covered.0 > at && covered.0.min(end) - at >= min_bytes {
                found.push((at, covered.0.min(end)));
            }
            if covered.0 >= end {
                at = end;
            } else {
                at = at.max(covered.1);
                pieces.next();
            }
        }
    }
    found
}
