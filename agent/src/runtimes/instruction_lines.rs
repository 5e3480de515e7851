//! The lines of a function's instructions, as one table of bytes.
//!
//! It has 32-bit numbers: the distance from the function's object to its first instruction, the number of instructions, then the
//! first instruction of each line and that line.

use super::memory::half;

/// Makes the table. `lines` are those of the instructions, in their order.
pub(super) fn table(distance: u32, count: u32, lines: impl Iterator<Item = u32>) -> Vec<u8> {
    let mut numbers = vec![distance, count];
    let mut last = None;
    for (index, line) in (0..).zip(lines) {
        if last != Some(line) {
            numbers.extend([index, line]);
            last = Some(line);
        }
    }
    numbers.into_iter().flat_map(u32::to_ne_bytes).collect()
}

/// Returns the number of the instruction of this size that is at a distance from the function's object; the one behind the last
/// one is `count`.
pub(super) fn index(table: &[u8], position: u32, bytes: u32) -> Option<u32> {
    let offset = position.wrapping_sub(half(table, 0));
    let index = offset / bytes;
    (table.len() >= 8 && offset.is_multiple_of(bytes) && index <= half(table, 4)).then_some(index)
}

/// Returns the line of an instruction; 0 if there is none.
pub(super) fn line(table: &[u8], index: u32) -> u32 {
    let Some(pairs) = table.get(8..).filter(|_| index < half(table, 4)) else { return 0 };
    let (pairs, _) = pairs.as_chunks::<8>();
    let behind = pairs.partition_point(|pair| half(pair, 0) <= index);
    behind.checked_sub(1).map_or(0, |at| half(&pairs[at], 4))
}
