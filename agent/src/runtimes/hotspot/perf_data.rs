//! The counters that the virtual machine publishes for tools: a head, and behind it entries, each with a name and a value. The
//! machine writes them with its other work, so that a reader needs no help of it.

use super::{
    super::{
        Memory, WhyNot,
        memory::{half, word},
    },
    structs::Structs,
};

/// The count of unloaded classes. The machine counts a class before it frees the class's memory.
const UNLOADED: &[u8] = b"java.cls.unloadedClasses";
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

/// Returns the address of the count of unloaded classes. A machine that was started without such counters (`-XX:-UsePerfData`) has
/// none.
pub(super) fn unloaded_classes(structs: &Structs, memory: &dyn Memory) -> Option<u64> {
    let start = memory.u64(structs.address("PerfMemory", "_start").ok()?).ok().filter(|start| *start != 0)?;
    let read = || -> Result<Vec<u8>, WhyNot> {
        let head = memory.bytes(start, HEAD_BYTES)?;
        memory.bytes(start, u64::from(half(&head, USED)).min(MAX_BYTES) as usize)
    };
    let offset = offset_of(UNLOADED, &read().ok()?)?;
    start.checked_add(offset as u64)
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
