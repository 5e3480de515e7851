//! The counters that the virtual machine publishes for tools: a head, and behind it entries, each with a name and a value. The
//! machine writes them with its other work, so that a reader needs no help of it.

use super::{
    super::{
        Memory,
        memory::{half, word},
    },
    structs::Structs,
};

/// The count of unloaded classes. The machine counts a class before it frees the class's memory.
pub(super) const UNLOADED: &[u8] = b"java.cls.unloadedClasses";
/// The count of safepoints: stops of all threads, in which alone the machine frees methods that others have replaced. It counts one
/// before it does anything in it.
pub(super) const SAFEPOINTS: &[u8] = b"sun.rt.safepoints";
/// Bytes of all counters. A machine has 32 KiB by default.
const MAX_BYTES: u64 = 1 << 20;
/// The number of counters that are read. A machine has some 250.
const MAX_ENTRIES: usize = 8192;
/// The first bytes of the head, in this order on each machine.
const MAGIC: [u8; 4] = [0xca, 0xfe, 0xc0, 0xc0];
/// Offsets in the head.
const USED: usize = 8;
const FIRST_ENTRY: usize = 24;
const HEAD_BYTES: usize = 32;
/// Offsets in an entry.
const ENTRY_BYTES: usize = 0;
const NAME: usize = 4;
const VECTOR: usize = 8;
const KIND: usize = 12;
const VALUE: usize = 16;
const ENTRY_HEAD_BYTES: usize = 20;
/// The kind of a 64-bit number.
const LONG: u8 = b'J';

/// Returns the addresses of counters by their names. A machine that was started without such counters (`-XX:-UsePerfData`) has none.
pub(super) fn addresses<const N: usize>(
    names: [&[u8]; N],
    structs: &Structs,
    memory: &dyn Memory,
) -> [Option<u64>; N] {
    let read = || -> Option<(u64, Vec<u8>)> {
        let start = memory.u64(structs.address("PerfMemory", "_start").ok()?).ok()?;
        let head = memory.bytes(start, HEAD_BYTES).ok()?;
        let bytes = memory.bytes(start, u64::from(half(&head, USED)).min(MAX_BYTES) as usize).ok()?;
        (start != 0).then_some((start, bytes))
    };
    let Some((start, counters)) = read() else { return [None; N] };
    names.map(|name| start.checked_add(offset_of(name, &counters)? as u64))
}

/// Returns the offset of a counter's value.
pub(super) fn offset_of(name: &[u8], counters: &[u8]) -> Option<usize> {
    if !counters.starts_with(&MAGIC) {
        return None;
    }
    let mut at = half(counters, FIRST_ENTRY) as usize;
    for _ in 0..MAX_ENTRIES {
        let entry = counters.get(at..)?;
        let bytes = half(entry, ENTRY_BYTES) as usize;
        let entry = entry.get(..bytes).filter(|entry| entry.len() >= ENTRY_HEAD_BYTES)?;
        let its_name = entry.get(half(entry, NAME) as usize..).unwrap_or_default();
        let is_wanted = its_name.strip_prefix(name).is_some_and(|rest| rest.first() == Some(&0));
        if is_wanted {
            let value = half(entry, VALUE) as usize;
            let is_number = entry[KIND] == LONG && half(entry, VECTOR) == 0;
            let is_inside = value.checked_add(8).is_some_and(|end| end <= entry.len());
            return (is_number && is_inside && (at + value).is_multiple_of(8)).then_some(at + value);
        }
        at += bytes;
    }
    None
}

/// Returns the value of the counter that [`offset_of`] finds, for the fuzzer.
pub(super) fn unloaded_in(counters: &[u8]) -> Option<u64> {
    let at = offset_of(UNLOADED, counters)?;
    assert!(at + 8 <= counters.len(), "a value outside the counters");
    Some(word(counters, at))
}

#[cfg(test)]
mod tests {
    use super::*;

    /// The first counters of JDK 17.0.15, after it had unloaded 7 classes.
    const COUNTERS: &[u8] = include_bytes!("../../../../fuzz/corpus/java_counters/jdk17");

    #[test]
    fn the_count_of_unloaded_classes_is_found() {
        assert_eq!(unloaded_in(COUNTERS), Some(7));
        let at = offset_of(UNLOADED, COUNTERS).unwrap();
        assert_eq!(unloaded_in(&COUNTERS[..at + 7]), None, "cut in its value");
        let name = COUNTERS.windows(UNLOADED.len()).position(|window| window == UNLOADED).unwrap();
        for (at, byte) in [(0, 0), (name, b'k'), (name + UNLOADED.len(), b'2')] {
            let mut other = COUNTERS.to_vec();
            other[at] = byte;
            assert_eq!(unloaded_in(&other), None);
        }
    }
}
