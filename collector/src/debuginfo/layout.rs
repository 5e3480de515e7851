//! Addresses of frames as addresses of an ELF file.
//!
//! A profile has the addresses of a process. Its mappings show which part of a file the process had mapped at which addresses. The
//! program headers of the file translate such an address into an ELF virtual address, which symbols and debug information use.

use gannet_elf::{Elf, Segment, Segments};

/// Smallest page of the supported machines. Linkers may align segments to larger ones.
const PAGE_BYTES: u64 = 4096;

/// The address of a frame, and the mapping that holds it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub(crate) struct Place {
    /// Address of the frame.
    pub(crate) address: u64,
    /// Range of the mapping, and the offset of its start in the file. All 0 if unknown.
    pub(crate) start: u64,
    pub(crate) limit: u64,
    pub(crate) offset: u64,
}

impl Place {
    /// Reports whether the address is an address of the file already: in a process, mappings hold their frames, and none starts at 0.
    fn is_of_file(&self) -> bool {
        self.start == 0 || !(self.start..self.limit).contains(&self.address)
    }
}

/// The parts of a file that translate addresses.
#[derive(Clone, Debug)]
pub(crate) struct Layout {
    segments: Segments,
    is_fixed: bool,
    /// The file holds its code, so its program headers have the offsets of the program that ran. A debug file has only the addresses
    /// and sizes of the segments.
    has_code: bool,
}

impl Layout {
    pub(crate) fn of(elf: &Elf<'_>) -> Self {
        let segments = elf.segments().clone();
        let has_code = segments.as_slice().iter().any(|segment| segment.executable && segment.file_bytes > 0)
            && elf.section(b".text").is_none_or(gannet_elf::Section::is_stored);
        Self { segments, is_fixed: elf.is_fixed(), has_code }
    }

    /// Returns the ELF virtual address of a frame. Returns `None` if the file has no code there, or if the address is ambiguous: a wrong
    /// name is worse than none.
    pub(crate) fn address_of(&self, place: &Place) -> Option<u64> {
        let address = if place.is_of_file() {
            Some(place.address)
        } else if self.has_code {
            self.segments.vaddr_of_offset((place.address - place.start).checked_add(place.offset)?)
        } else if self.is_fixed {
            Some(place.address)
        } else {
            self.address_without_offsets(place)
        };
        address.filter(|address| self.segments.executable_end(*address).is_some())
    }

    /// Finds the address by the size of the mapping: the loader maps each segment as whole pages.
    fn address_without_offsets(&self, place: &Place) -> Option<u64> {
        let Place { address, start, limit, offset } = *place;
        let (distance, bytes) = (address - start, limit - start);
        let mut fitting = self.code().filter(|segment| {
            let (first, end) = pages(segment);
            end - first == bytes
        });
        if let Some(segment) = fitting.next() {
            // Two segments of one size would be a guess.
            return fitting.next().is_none().then(|| pages(segment).0 + distance);
        }
        // Some profilers report one mapping for the whole file.
        let first = self.segments.as_slice().iter().map(|segment| segment.vaddr & !(PAGE_BYTES - 1)).min()?;
        let is_whole = offset == 0
            && self.code().all(|segment| {
                segment.vaddr.saturating_add(segment.memory_bytes) <= first.saturating_add(bytes)
            });
        is_whole.then(|| first.checked_add(distance)).flatten()
    }

    fn code(&self) -> impl Iterator<Item = &Segment> {
        self.segments.as_slice().iter().filter(|segment| segment.executable && segment.memory_bytes > 0)
    }
}

/// Returns the range of whole pages that hold a segment.
fn pages(segment: &Segment) -> (u64, u64) {
    let first = segment.vaddr & !(PAGE_BYTES - 1);
    let end = segment.vaddr.saturating_add(segment.memory_bytes);
    (first, end.checked_next_multiple_of(PAGE_BYTES).unwrap_or(end))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn segment(vaddr: u64, file_offset: u64, bytes: u64, executable: bool) -> Segment {
        Segment { vaddr, file_offset, file_bytes: bytes, memory_bytes: bytes, executable }
    }

    /// As lld lays out a library: addresses run ahead of offsets.
    fn segments() -> Vec<Segment> {
        vec![
            segment(0, 0, 0x5a60, false),
            segment(0x6a60, 0x5a60, 0x9f10, true),
            segment(0x1_1970, 0xf970, 0x800, false),
        ]
    }

    fn layout(segments: Vec<Segment>, is_fixed: bool, has_code: bool) -> Layout {
        Layout { segments: Segments::new(segments), is_fixed, has_code }
    }

    /// As `objcopy --only-keep-debug` leaves the headers: no offset is right, and no segment has bytes.
    fn without_code(segments: Vec<Segment>) -> Vec<Segment> {
        segments.into_iter().map(|segment| Segment { file_offset: 0, file_bytes: 0, ..segment }).collect()
    }

    const BASE: u64 = 0x7f00_0000_0000;

    /// The mapping of the code of the library.
    fn place(vaddr: u64) -> Place {
        Place { address: BASE + vaddr, start: BASE + 0x6000, limit: BASE + 0x1_1000, offset: 0x5000 }
    }

    #[test]
    fn a_program_and_its_debug_file_give_the_same_address() {
        for layout in [layout(segments(), false, true), layout(without_code(segments()), false, false)] {
            for vaddr in [0x6a60, 0x7000, 0x1_096f] {
                assert_eq!(layout.address_of(&place(vaddr)), Some(vaddr), "{layout:?}");
            }
            // Behind the code, and in the page before it.
            for vaddr in [0x6000, 0x1_0970] {
                assert_eq!(layout.address_of(&place(vaddr)), None, "{vaddr:#x}");
            }
        }
    }

    #[test]
    fn a_program_at_fixed_addresses_has_them_in_the_process() {
        let parts = vec![segment(0x40_0000, 0, 0x500, false), segment(0x40_1000, 0x1000, 0x2345, true)];
        let place = Place { address: 0x40_2000, start: 0x40_1000, limit: 0x40_4000, offset: 0x1000 };
        for layout in [layout(parts.clone(), true, true), layout(without_code(parts), true, false)] {
            assert_eq!(layout.address_of(&place), Some(0x40_2000));
            assert_eq!(layout.address_of(&Place { address: 0x40_0100, ..place }), None, "no code");
        }
    }

    #[test]
    fn an_address_outside_of_its_mapping_is_one_of_the_file() {
        let layout = layout(segments(), false, true);
        let known = Place { address: 0x7000, start: 0, limit: 0, offset: 0 };
        assert_eq!(layout.address_of(&known), Some(0x7000));
        assert_eq!(layout.address_of(&Place { start: BASE, limit: BASE + 0x1000, ..known }), Some(0x7000));
        assert_eq!(layout.address_of(&Place { address: u64::MAX, ..known }), None);
    }

    #[test]
    fn a_mapping_that_fits_no_segment_gives_no_address() {
        let debug = layout(without_code(segments()), false, false);
        // The second part of a mapping that a call of mprotect split.
        let split = Place { start: BASE + 0x8000, ..place(0x9000) };
        assert_eq!(debug.address_of(&split), None);
        assert_eq!(
            layout(segments(), false, true).address_of(&Place { offset: 0x7000, ..split }),
            Some(0x9000)
        );
        // Two segments have the size of the mapping.
        let twins = vec![segment(0x1000, 0, 0x100, true), segment(0x9000, 0, 0x100, true)];
        let twins = layout(without_code(twins), false, false);
        let place = Place { address: BASE + 0x10, start: BASE, limit: BASE + 0x1000, offset: 0x2000 };
        assert_eq!(twins.address_of(&place), None);
    }

    #[test]
    fn one_mapping_of_the_whole_file_is_accepted() {
        let debug = layout(without_code(segments()), false, false);
        let whole = Place { address: BASE + 0x7000, start: BASE, limit: BASE + 0x1_3000, offset: 0 };
        assert_eq!(debug.address_of(&whole), Some(0x7000));
        assert_eq!(debug.address_of(&Place { limit: BASE + 0x8000, ..whole }), None);
    }

    proptest::proptest! {
        #[test]
        fn no_mapping_overflows(address: u64, start: u64, limit: u64, offset: u64, fixed: bool, code: bool) {
            let all = [segments(), vec![segment(u64::MAX - 8, u64::MAX - 8, u64::MAX, true)]].concat();
            let _ = layout(all, fixed, code).address_of(&Place { address, start, limit, offset });
        }
    }
}
