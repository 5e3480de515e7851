//! The parts of a file that the loader maps, and the address of each byte of the file.

/// One `PT_LOAD` program header.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Hash)]
pub struct Segment {
    /// ELF virtual address of its first byte.
    pub vaddr: u64,
    /// Offset of that byte in the file.
    pub file_offset: u64,
    /// Bytes that the segment takes from the file.
    pub file_bytes: u64,
    /// Bytes that it has in memory; those beyond the file are zero.
    pub memory_bytes: u64,
    /// Whether its code may be executed.
    pub executable: bool,
}

impl Segment {
    fn vaddr_end(&self) -> u64 {
        self.vaddr.saturating_add(self.memory_bytes)
    }

    fn holds_offset(&self, offset: u64) -> bool {
        offset.checked_sub(self.file_offset).is_some_and(|distance| distance < self.file_bytes)
    }
}

/// The `PT_LOAD` program headers of a file, in the order of the file.
///
/// The distance between offset and address differs from segment to segment in everything that lld links, so each question
/// goes through the segment that it is about.
#[derive(Clone, PartialEq, Eq, Debug, Default, Hash)]
pub struct Segments {
    all: Vec<Segment>,
    /// Addresses of executable segments: ascending, overlapping ones joined.
    code: Vec<(u64, u64)>,
}

impl Segments {
    /// Builds the list from its segments, in the order of the file.
    pub fn new(segments: Vec<Segment>) -> Self {
        let mut code: Vec<(u64, u64)> =
            segments.iter().filter(|s| s.executable).map(|s| (s.vaddr, s.vaddr_end())).collect();
        code.sort_unstable();
        code.dedup_by(|later, earlier| {
            let overlaps = later.0 < earlier.1;
            if overlaps {
                earlier.1 = earlier.1.max(later.1);
            }
            overlaps
        });
        Self { all: segments, code }
    }

    /// Returns all segments.
    pub fn as_slice(&self) -> &[Segment] {
        &self.all
    }

    /// Returns the ELF virtual address of the first byte of an executable mapping that begins at `file_offset`, a multiple
    /// of `page_bytes`. Unwind tables need one distance for a whole mapping.
    ///
    /// The kernel maps whole pages, so a mapping may begin before its segment does, and neighbouring segments may share a
    /// page of the file: of those that reach into the mapping's first page, the one that begins in it is the mapped one,
    /// else the one that spans it.
    pub fn vaddr_of_mapping(&self, file_offset: u64, page_bytes: u64) -> Option<u64> {
        let executable = self.all.iter().filter(|s| s.executable && s.file_bytes > 0);
        let begins = |s: &&Segment| s.file_offset & !(page_bytes - 1) == file_offset;
        let segment = executable
            .clone()
            .find(begins)
            .or_else(|| executable.clone().find(|s| s.holds_offset(file_offset)))?;
        Some(segment.vaddr.wrapping_add(file_offset).wrapping_sub(segment.file_offset))
    }

    /// Returns the number to subtract (wrapping) from an address in an executable mapping to get its ELF virtual address.
    pub fn bias(&self, mapping_start: u64, file_offset: u64, page_bytes: u64) -> Option<u64> {
        Some(mapping_start.wrapping_sub(self.vaddr_of_mapping(file_offset, page_bytes)?))
    }

    /// Returns the ELF virtual address of the byte at `offset` in the file: of its executable segment if there is one. For
    /// each byte of code this is the address that [`Segments::vaddr_of_mapping`] counts from; it also answers where a
    /// mapping holds more than one segment.
    pub fn vaddr_of_offset(&self, offset: u64) -> Option<u64> {
        let holds = |segment: &&Segment| segment.holds_offset(offset);
        let segment = self
            .all
            .iter()
            .filter(|segment| segment.executable)
            .find(holds)
            .or_else(|| self.all.iter().find(holds))?;
        segment.vaddr.checked_add(offset - segment.file_offset)
    }

    /// Returns the end of the executable segment that holds an ELF virtual address.
    pub fn executable_end(&self, vaddr: u64) -> Option<u64> {
        let after = self.code.partition_point(|(start, _)| *start <= vaddr);
        let (_, end) = *self.code.get(after.checked_sub(1)?)?;
        (vaddr < end).then_some(end)
    }

    /// Returns the offset in the file of an ELF virtual address, and the bytes from there to the end of its segment.
    pub(crate) fn file_range(&self, vaddr: u64) -> Option<(u64, u64)> {
        self.all.iter().find_map(|s| {
            let into = vaddr.checked_sub(s.vaddr)?;
            (into < s.file_bytes).then(|| (s.file_offset.wrapping_add(into), s.file_bytes - into))
        })
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    const PAGE: u64 = 0x1000;

    fn segment(vaddr: u64, file_offset: u64, file_bytes: u64, executable: bool) -> Segment {
        Segment { vaddr, file_offset, file_bytes, memory_bytes: file_bytes, executable }
    }

    /// Checks that a mapping takes the address of the segment that its offset belongs to (R47).
    #[test]
    fn a_mapping_belongs_to_the_segment_at_its_offset() {
        // As lld lays out a program: each segment's address runs ahead of its offset by one more page, and segments
        // share pages of the file.
        let lld = Segments::new(vec![
            segment(0x0, 0x0, 0x5a60, false),
            segment(0x6a60, 0x5a60, 0x9f10, true),
            segment(0x11970, 0xf970, 0x800, false),
        ]);
        assert_eq!(lld.vaddr_of_mapping(0x5000, PAGE), Some(0x6000));
        assert_eq!(lld.bias(0x5555_0000_6000, 0x5000, PAGE), Some(0x5555_0000_0000));
        // The second half of a mapping that was split by mprotect.
        assert_eq!(lld.vaddr_of_mapping(0x8000, PAGE), Some(0x9000));
        // An offset that only the read-only segment has.
        assert_eq!(lld.vaddr_of_mapping(0x10000, PAGE), None);
        assert_eq!(lld.vaddr_of_offset(0x10000), Some(0x12000));
        // Two executable segments in one page of the file: the second mapping begins in the page where the first ends.
        let two =
            Segments::new(vec![segment(0x1000, 0x1000, 0x1800, true), segment(0x9800, 0x2800, 0x100, true)]);
        assert_eq!(two.vaddr_of_mapping(0x1000, PAGE), Some(0x1000));
        assert_eq!(two.vaddr_of_mapping(0x2000, PAGE), Some(0x9000));
        assert_eq!((two.vaddr_of_offset(0x27ff), two.vaddr_of_offset(0x2800)), (Some(0x27ff), Some(0x9800)));
        // Not relocatable: the address is far from the offset.
        let fixed = Segments::new(vec![segment(0x40_1000, 0x1000, 0x2000, true)]);
        assert_eq!(fixed.bias(0x40_1000, 0x1000, PAGE), Some(0));
    }

    #[test]
    fn an_address_is_code_up_to_the_end_of_its_segment() {
        let segments = Segments::new(vec![
            segment(0x9000, 0, 0x10, true),
            segment(0x1000, 0, 0x100, true),
            segment(0x1100, 0, 0x100, true),
            segment(0x5000, 0, 0x100, false),
            segment(0x9008, 0, 0x10, true),
            segment(u64::MAX - 8, 0, 0x100, true),
        ]);
        for (vaddr, end) in [
            (0xfff, None),
            (0x1000, Some(0x1100)),
            (0x1100, Some(0x1200)),
            (0x1200, None),
            (0x5000, None),
            (0x9000, Some(0x9018)),
            (0x9017, Some(0x9018)),
            (u64::MAX - 1, Some(u64::MAX)),
        ] {
            assert_eq!(segments.executable_end(vaddr), end, "{vaddr:#x}");
        }
    }

    proptest! {
        /// Checks that names and unwind tables get the same address for each byte of code, in all layouts that linkers
        /// make: segments one behind the other in the file, each at an address that equals its offset modulo the page.
        #[test]
        fn names_and_unwind_tables_count_the_same_addresses(
            parts in prop::collection::vec((1u64..0x3000, any::<bool>(), 0u64..3), 1..8),
        ) {
            let (mut offset, mut vaddr, mut list) = (0x40, 0x40, Vec::new());
            for (bytes, executable, pages) in parts {
                // The next segment gets a page of its own in memory, in the file it may share one.
                vaddr = (vaddr & !(PAGE - 1)) + (pages + 1) * PAGE + offset % PAGE;
                list.push(segment(vaddr, offset, bytes, executable));
                (offset, vaddr) = (offset + bytes, vaddr + bytes);
            }
            let segments = Segments::new(list.clone());
            // A page that begins two executable segments is mapped twice from the same offset: the file cannot tell them
            // apart by the mapping, and linkers make no code that small.
            let first_pages: Vec<u64> =
                list.iter().filter(|s| s.executable).map(|s| s.file_offset / PAGE).collect();
            for one in list.iter().filter(|s| s.executable) {
                let page = one.file_offset & !(PAGE - 1);
                if first_pages.iter().filter(|first| **first == page / PAGE).count() > 1 {
                    continue;
                }
                let mapped = segments.vaddr_of_mapping(page, PAGE).unwrap();
                for at in [one.file_offset, one.file_offset + one.file_bytes / 2, one.file_offset + one.file_bytes - 1] {
                    prop_assert_eq!(segments.vaddr_of_offset(at), Some(mapped + (at - page)));
                }
            }
        }
    }
}
