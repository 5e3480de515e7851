//! The tables by which CPython finds the line of an instruction.

use super::layout::LineTable;

/// Returns the line of the instruction at this byte offset; 0 if it has none. Before the first instruction it is `first_line`.
pub(super) fn line_at(form: LineTable, table: &[u8], first_line: u32, offset: i64) -> u32 {
    if offset < 0 {
        return first_line;
    }
    let line = match form {
        LineTable::Lnotab => Some(by_lnotab(table, first_line.into(), offset)),
        LineTable::Ranges => by_ranges(table, first_line.into(), offset),
        LineTable::Locations => by_locations(table, first_line.into(), offset),
    };
    u32::try_from(line.unwrap_or(0)).unwrap_or(0)
}

/// Up to 3.9: pairs of a step in bytes and a signed step in lines.
fn by_lnotab(table: &[u8], first_line: i64, offset: i64) -> i64 {
    let (mut at, mut line) = (0, first_line);
    for [bytes, lines] in table.as_chunks().0 {
        at += i64::from(*bytes);
        if at > offset {
            break;
        }
        line += i64::from(lines.cast_signed());
    }
    line
}

/// 3.10: pairs of the bytes of a range and a signed step in lines to it; -128 is a range without line.
fn by_ranges(table: &[u8], first_line: i64, offset: i64) -> Option<i64> {
    let (mut end, mut line) = (0, first_line);
    for [bytes, lines] in table.as_chunks().0 {
        let has_line = lines.cast_signed() != -128;
        if has_line {
            line += i64::from(lines.cast_signed());
        }
        end += i64::from(*bytes);
        if offset < end {
            return has_line.then_some(line);
        }
    }
    None
}

/// From 3.11 on: entries of a first byte `1kkkkeee` (kind, instructions less one), and numbers in groups of six bits.
fn by_locations(table: &[u8], first_line: i64, offset: i64) -> Option<i64> {
    const INSTRUCTION_BYTES: i64 = 2;
    let (mut end, mut line) = (0, first_line);
    let mut bytes = table.iter().copied();
    while let Some(first) = bytes.next() {
        if first & 0x80 == 0 {
            return None;
        }
        end += (i64::from(first & 7) + 1) * INSTRUCTION_BYTES;
        let kind = first >> 3 & 15;
        let mut number = || -> Option<u64> {
            let mut value = 0;
            for shift in (0..u64::BITS).step_by(6) {
                let byte = bytes.next()?;
                value |= u64::from(byte & 0x3f).checked_shl(shift)?;
                if byte & 0x40 == 0 {
                    return Some(value);
                }
            }
            None
        };
        let signed = |value: u64| {
            let size = i64::try_from(value >> 1).unwrap_or(0);
            if value & 1 == 1 { -size } else { size }
        };
        let mut has_line = true;
        match kind {
            // One byte of columns.
            0..=9 => {
                bytes.next()?;
            }
            // Two bytes of columns.
            10..=12 => {
                line += i64::from(kind) - 10;
                bytes.nth(1)?;
            }
            13 => line = line.checked_add(signed(number()?))?,
            // Then the last line, and the columns.
            14 => {
                line = line.checked_add(signed(number()?))?;
                for _ in 0..3 {
                    number()?;
                }
            }
            _ => has_line = false,
        }
        if offset < end {
            return has_line.then_some(line);
        }
    }
    None
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    /// Checks the table that CPython 3.11 made of a function on lines 3 to 8, whose last expression has its second operand on
    /// line 8; the lines are those of its `co_lines()`.
    #[test]
    fn a_table_of_3_11_gives_the_lines_of_its_interpreter() {
        let table =
            [128, 0, 224, 8, 9, 128, 65, 224, 12, 13, 216, 10, 11, 241, 3, 1, 13, 12, 240, 0, 1, 5, 13];
        let at = |offset| line_at(LineTable::Locations, &table, 3, offset);
        assert_eq!([-2, 0, 2, 4, 6, 8, 10, 12, 14, 16].map(at), [3, 3, 5, 5, 7, 8, 7, 7, 7, 0]);
    }

    /// Checks the same of 3.10, of a function from line 2 on with `try` and `finally`.
    #[test]
    fn a_table_of_3_10_gives_the_lines_of_its_interpreter() {
        let table = [4, 2, 2, 1, 2, 1, 2, 1, 4, 255, 12, 3];
        let at = |offset| line_at(LineTable::Ranges, &table, 2, offset);
        assert_eq!([0, 2, 4, 6, 8, 10, 12, 14, 24, 26].map(at), [4, 4, 5, 6, 7, 6, 6, 9, 9, 0]);
    }

    #[test]
    fn older_tables_give_lines_up_and_down() {
        let pairs = [4, 2, 6, 0xff, 2, 0x80];
        assert_eq!([0, 3, 4, 9, 10].map(|at| line_at(LineTable::Lnotab, &pairs, 7, at)), [7, 7, 9, 9, 8]);
        assert_eq!(
            [0, 3, 4, 9, 10, 12].map(|at| line_at(LineTable::Ranges, &pairs, 7, at)),
            [9, 9, 8, 8, 0, 0]
        );
    }

    proptest! {
        #[test]
        fn any_table_is_read_to_an_end(table in prop::collection::vec(any::<u8>(), 0..300), first: u32, offset: i32) {
            for form in [LineTable::Lnotab, LineTable::Ranges, LineTable::Locations] {
                let _ = line_at(form, &table, first, offset.into());
            }
        }
    }
}
