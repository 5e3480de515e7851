//! Tables of positions: of bytecode, of compiled code, and the lines of a script.

/// A table of lines begins with its kind.
const POSITION_IS_LINE: u8 = 0;
const TABLE: u8 = 1;
/// Entries of one table of positions.
const MAX_ENTRIES: usize = 1 << 16;
/// Bits of a source position.
const OFFSET_SHIFT: u32 = 1;
const OFFSET_BITS: u64 = (1 << 30) - 1;
const INLINING_SHIFT: u32 = 31;
const INLINING_BITS: u64 = (1 << 16) - 1;

/// A place in the source.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Position {
    /// Characters from the begin of the script.
    pub(super) offset: Option<u32>,
    /// The number of the inlined function; `None` in the function itself.
    pub(super) inlined: Option<u32>,
}

impl Position {
    pub(super) fn decode(bits: u64) -> Self {
        let offset = (bits >> OFFSET_SHIFT & OFFSET_BITS) as u32;
        let inlined = (bits >> INLINING_SHIFT & INLINING_BITS) as u32;
        // Lines of code that is not a script's are marked by the lowest bit.
        let is_external = bits & 1 == 1;
        Self { offset: offset.checked_sub(1).filter(|_| !is_external), inlined: inlined.checked_sub(1) }
    }
}

/// Numbers of seven bits each; the highest bit says that more follow.
pub(super) struct Numbers<'a>(pub(super) &'a [u8]);

impl Numbers<'_> {
    pub(super) fn unsigned(&mut self) -> Option<u64> {
        let mut value = 0_u64;
        for shift in (0..64).step_by(7) {
            let (byte, rest) = self.0.split_first()?;
            self.0 = rest;
            value |= u64::from(byte & 0x7f) << shift;
            if byte & 0x80 == 0 {
                return Some(value);
            }
        }
        None
    }

    fn signed(&mut self) -> Option<i64> {
        let value = self.unsigned()?;
        Some((value >> 1).cast_signed() ^ -(value & 1).cast_signed())
    }
}

/// How a table of positions has the distance of each entry from the one before it, and whether a statement begins there.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Steps {
    /// A signed number: negative, and less by one, if no statement begins.
    Signed,
    /// Above two bits of flags.
    Flagged,
}

/// Decodes a table of positions: the offset in the code from which on each holds. It ends where the table is broken.
pub(super) fn positions(table: &[u8], steps: Steps) -> Vec<(u32, Position)> {
    let mut numbers = Numbers(table);
    // The first entry is for the entry of the function, before its first instruction.
    let (mut code, mut source) = (-1_i64, 0_i64);
    let mut found = Vec::new();
    while found.len() < MAX_ENTRIES {
        let step = match steps {
            Steps::Signed => numbers.signed().map(|step| if step >= 0 { step } else { !step }),
            Steps::Flagged => numbers.unsigned().map(|step| (step >> 2).cast_signed()),
        };
        let Some((step, distance)) = step.zip(numbers.signed()) else { break };
        code = code.saturating_add(step);
        source = source.wrapping_add(distance);
        let Ok(at) = u32::try_from(code.max(0)) else { break };
        found.push((at, Position::decode(source.cast_unsigned())));
    }
    found
}

/// Returns the position that holds at an offset of the code.
pub(super) fn position_at(positions: &[(u32, Position)], offset: u32) -> Option<Position> {
    positions.partition_point(|(from, _)| *from <= offset).checked_sub(1).map(|at| positions[at].1)
}

/// A table for functions whose positions are lines.
pub(super) fn plain() -> Vec<u8> {
    vec![POSITION_IS_LINE]
}

/// Makes the table of lines of a function: from each offset of its bytecode on, the line.
pub(super) fn table(entries: impl IntoIterator<Item = (u32, u32)>) -> Vec<u8> {
    let mut bytes = vec![TABLE];
    let mut last = None;
    for (offset, line) in entries {
        if last != Some(line) {
            bytes.extend(offset.to_le_bytes());
            bytes.extend(line.to_le_bytes());
            last = Some(line);
        }
    }
    bytes
}

/// Returns the line of a position; 0 if it is not known.
pub(super) fn line_at(table: &[u8], position: u32) -> u32 {
    match table.split_first() {
        Some((&POSITION_IS_LINE, _)) if position != super::super::NO_POSITION => position,
        Some((&TABLE, rest)) => {
            let entries = rest.as_chunks::<8>().0;
            let number = |entry: &[u8; 8], at: usize| {
                entry[at..].first_chunk().map_or(0, |four| u32::from_le_bytes(*four))
            };
            let next = entries.partition_point(|entry| number(entry, 0) <= position);
            next.checked_sub(1).map_or(0, |at| number(&entries[at], 4))
        }
        _ => 0,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Tables that V8 made of the same function, up to 13 and from 14 on: statements at the offsets 0, 6, 14 and 28, and
    /// expressions at 1, 9, 19 and 23. In the newer one instructions behind the first comparison are a byte further on.
    #[test]
    fn tables_of_positions_are_decoded() {
        let signed = b"\x01\x94\x04\x02\x20\x03\x18\x0a\x1c\x07\x00\x0a\x3c\x0b\x20\x09\x1f\x0a\x38";
        let flagged = b"\x02\x94\x04\x07\x20\x06\x18\x1b\x1c\x0e\x00\x17\x3c\x16\x20\x12\x1f\x17\x38";
        let sources = [132, 140, 146, 153, 153, 168, 176, 168, 182];
        for (table, steps, at) in [
            (signed, Steps::Signed, [0, 0, 1, 6, 9, 14, 19, 23, 28]),
            (flagged, Steps::Flagged, [0, 0, 1, 7, 10, 15, 20, 24, 29]),
        ] {
            let expected = at.into_iter().zip(sources.map(|source| place(source, None)));
            let found = positions(table, steps);
            assert_eq!(found, expected.collect::<Vec<_>>());
            assert_eq!(position_at(&found, 0), Some(place(140, None)), "not that of the entry");
            assert_eq!(position_at(&found, at[4]), Some(place(153, None)));
            assert_eq!(position_at(&found, 90), Some(place(182, None)));
        }
    }

    #[test]
    fn positions_name_inlined_functions() {
        // Character 4 of the inlined function 0, from the second instruction on.
        let bytes = [4, 0x94, 0x80, 0x80, 0x80, 0x10];
        let found = positions(&bytes, Steps::Signed);
        assert_eq!(found, [(1, place(4, Some(0)))]);
        assert_eq!(position_at(&found, 0), None);
    }

    fn place(offset: u32, inlined: Option<u32>) -> Position {
        Position { offset: Some(offset), inlined }
    }

    #[test]
    fn lines_hold_until_the_next() {
        let lines = table([(0, 7), (4, 7), (9, 8)]);
        assert_eq!(lines.len(), 17);
        assert_eq!([0, 8, 9, 500].map(|at| line_at(&lines, at)), [7, 7, 8, 8]);
        assert_eq!(line_at(&plain(), 12), 12);
        assert_eq!((line_at(&[], 12), line_at(&plain(), u32::MAX), line_at(&[9, 9], 1)), (0, 0, 0));
    }
}
