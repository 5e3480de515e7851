//! The function table that every Go program carries for its own tracebacks, stripped or not: `.gopclntab`.
//!
//! Its header names the places of its parts. The versions differ in which parts there are; those of Go 1.16, 1.18 and
//! 1.20 (and all after it, so far) are read here.

use std::fs::File;

use super::{
    elf::{self, ElfError, Sections},
    elf_symbols::Finder,
};

/// The largest Go programs have some 300,000 functions in 60 MB.
const MAX_TABLE_BYTES: u64 = 128 << 20;
const POINTER_BYTES: usize = 8;

/// How the parts are laid out, by the first four bytes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Version {
    /// Addresses are absolute and as wide as a pointer.
    Go116,
    /// Addresses are 32 bits wide and count from the start of the text.
    Go118,
}

/// Offers the functions of a Go program; of another one nothing.
pub(super) fn offer(file: &File, sections: &Sections, finder: &mut Finder<'_>) -> Result<(), ElfError> {
    // Position-independent programs have it among the data that is relocated.
    let place = [".gopclntab", ".data.rel.ro.gopclntab"].iter().find_map(|name| sections.find(name));
    let Some(section) = place else { return Ok(()) };
    let text = sections.find(".text").map(|text| text.address).unwrap_or_default();
    let bytes = elf::read_section(file, section, MAX_TABLE_BYTES, "table of Go functions")?;
    offer_functions(&bytes, text, finder)
}

fn offer_functions(bytes: &[u8], text: u64, finder: &mut Finder<'_>) -> Result<(), ElfError> {
    let damaged = || ElfError::Damaged("table of Go functions");
    let header = Header::read(bytes, text).ok_or_else(damaged)?;
    // Each entry ends where the next one begins, and one more ends the last.
    let mut next = header.entry(bytes, 0).ok_or_else(damaged)?;
    for index in 0..header.functions {
        let (start, offset) = next;
        next = header.entry(bytes, index + 1).ok_or_else(damaged)?;
        let size = next.0.saturating_sub(start);
        finder.offer(start, size, 0, || header.name(bytes, offset).map(<[u8]>::to_vec))?;
    }
    Ok(())
}

struct Header {
    version: Version,
    functions: usize,
    text: u64,
    /// Where the names are.
    names: usize,
    /// Where the entries are, and what they refer to.
    entries: usize,
}

impl Header {
    fn read(bytes: &[u8], text_section: u64) -> Option<Self> {
        let version = match word(bytes, 0)? {
            0xffff_fffa => Version::Go116,
            0xffff_fff0 | 0xffff_fff1 => Version::Go118,
            _ => return None,
        };
        if bytes.get(4..6)? != [0, 0] || usize::from(*bytes.get(7)?) != POINTER_BYTES {
            return None;
        }
        let field = |index: usize| pointer(bytes, 8 + index * POINTER_BYTES);
        let at = |index: usize| usize::try_from(field(index)?).ok();
        let (names, entries, text) = match version {
            Version::Go116 => (at(2)?, at(6)?, 0),
            // Some versions leave the start of the text to the linker's section.
            Version::Go118 => {
                (at(3)?, at(7)?, Some(field(2)?).filter(|text| *text != 0).unwrap_or(text_section))
            }
        };
        Some(Self { version, functions: at(0)?, text, names, entries })
    }

    /// Where a function begins and where its description is.
    fn entry(&self, bytes: &[u8], index: usize) -> Option<(u64, usize)> {
        let width = match self.version {
            Version::Go116 => POINTER_BYTES,
            Version::Go118 => size_of::<u32>(),
        };
        let at = self.entries.checked_add(index.checked_mul(2 * width)?)?;
        let start = match self.version {
            Version::Go116 => pointer(bytes, at)?,
            Version::Go118 => self.text.checked_add(u64::from(word(bytes, at)?))?,
        };
        // The last entry has only an address.
        let offset = match self.version {
            _ if index == self.functions => 0,
            Version::Go116 => usize::try_from(pointer(bytes, at + width)?).ok()?,
            Version::Go118 => word(bytes, at + width)? as usize,
        };
        Some((start, offset))
    }

    fn name<'a>(&self, bytes: &'a [u8], description: usize) -> Option<&'a [u8]> {
        // A description begins with the function's address and goes on with the place of its name.
        let address_bytes = match self.version {
            Version::Go116 => POINTER_BYTES,
            Version::Go118 => size_of::<u32>(),
        };
        let at = self.entries.checked_add(description)?.checked_add(address_bytes)?;
        elf::c_string(bytes, self.names.checked_add(word(bytes, at)? as usize)?)
    }
}

fn word(bytes: &[u8], at: usize) -> Option<u32> {
    Some(u32::from_le_bytes(bytes.get(at..at.checked_add(4)?)?.try_into().ok()?))
}

fn pointer(bytes: &[u8], at: usize) -> Option<u64> {
    Some(u64::from_le_bytes(bytes.get(at..at.checked_add(8)?)?.try_into().ok()?))
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    /// Two functions, as Go 1.20 writes them.
    fn table(text: u64) -> Vec<u8> {
        let mut bytes = vec![0xf1, 0xff, 0xff, 0xff, 0, 0, 1, 8];
        for field in [2u64, 0, text, 72, 0, 0, 0, 96] {
            bytes.extend(field.to_le_bytes());
        }
        bytes.extend(b"main.main\0main.work\0");
        bytes.resize(96, 0);
        // Starts and descriptions; the descriptions follow at 20 and 28.
        for value in [0x10u32, 20, 0x40, 28, 0x60, 0x10, 0, 0x40, 10] {
            bytes.extend(value.to_le_bytes());
        }
        bytes
    }

    #[test]
    fn functions_have_their_names_from_start_to_end() {
        for (bytes, text) in [(table(0x1000), 7), (table(0), 0x1000)] {
            let mut finder = Finder::new(&[0x100f, 0x1010, 0x105f, 0x1060]);
            offer_functions(&bytes, text, &mut finder).unwrap();
            let (main, work) = (b"main.main".to_vec(), b"main.work".to_vec());
            assert_eq!(finder.finish(), [None, Some(main), Some(work), None]);
        }
    }

    proptest! {
        #[test]
        fn any_bytes_are_taken_without_harm(
            changes in proptest::collection::vec((0usize..140, any::<u8>()), 0..20),
            length in 0usize..140,
        ) {
            let mut bytes = table(0x1000);
            for (at, value) in changes {
                if let Some(byte) = bytes.get_mut(at) {
                    *byte = value;
                }
            }
            bytes.truncate(length);
            let mut finder = Finder::new(&[0x1010, 0x1040]);
            let _ = offer_functions(&bytes, 0, &mut finder);
            prop_assert_eq!(finder.finish().len(), 2);
        }
    }
}
