//! The name of a file's content, by which equal files share unwind tables and symbol names.

use std::{
    fmt::{self, Debug, Display},
    str::FromStr,
};

use sha2::{Digest, Sha256};

use crate::{
    build_id::{BuildId, ParseHexError, parse_hex},
    file::Elf,
    segments::Segment,
};

/// Bytes at the beginning and at the end of the file that the name depends on. Headers are at the beginning; section
/// headers, symbol names and signatures at the end.
const EDGE_BYTES: u64 = 16 << 10;

/// Names the content of a file: a hash of its GNU build id, its first and last 16 KiB, its length and its segments.
///
/// Two files with one build id but different layout or edges have different names, so a forged build id alone gets no one
/// another program's table. The middle of the file does not count: reading all of a large file costs more than the rest
/// of the work on it.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct ContentId([u8; 16]);

impl ContentId {
    /// Returns the name of a file's content; none if the file cannot be read any more.
    pub fn of(elf: &Elf<'_>) -> Option<Self> {
        let length = elf.file_bytes();
        let edge = length.min(EDGE_BYTES);
        let mut hash = Sha256::new_with_prefix(b"gannet content 1\0");
        let build_id = elf.build_id().map_or(&[][..], BuildId::as_bytes);
        hash.update((build_id.len() as u64).to_le_bytes());
        hash.update(build_id);
        hash.update(length.to_le_bytes());
        hash.update((elf.segments().as_slice().len() as u64).to_le_bytes());
        for segment in elf.segments().as_slice() {
            let Segment { vaddr, file_offset, file_bytes, memory_bytes, executable } = segment;
            for number in [vaddr, file_offset, file_bytes, memory_bytes, &u64::from(*executable)] {
                hash.update(number.to_le_bytes());
            }
        }
        hash.update(elf.data().read(0, edge)?);
        hash.update(elf.data().read(length - edge, edge)?);
        hash.finalize().first_chunk().copied().map(Self)
    }

    /// Builds the name from the bytes that a cache stores.
    pub const fn from_bytes(bytes: [u8; 16]) -> Self {
        Self(bytes)
    }

    /// Returns the bytes that a cache stores.
    pub const fn as_bytes(&self) -> &[u8; 16] {
        &self.0
    }
}

impl Display for ContentId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.iter().try_for_each(|byte| write!(f, "{byte:02x}"))
    }
}

impl Debug for ContentId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "ContentId({self})")
    }
}

impl FromStr for ContentId {
    type Err = ParseHexError;

    fn from_str(text: &str) -> Result<Self, ParseHexError> {
        parse_hex(text)
            .and_then(|bytes| bytes.try_into().ok())
            .map(Self)
            .ok_or_else(|| ParseHexError { text: text.to_owned(), expected: "a content id (32 hex digits)" })
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::error::ElfLimits;

    fn id(bytes: &[u8]) -> ContentId {
        ContentId::of(&Elf::parse(bytes, &ElfLimits::default()).unwrap()).unwrap()
    }

    /// Checks that the name changes with each part of the file that it stands for (R49).
    #[test]
    fn the_name_depends_on_build_id_edges_length_and_layout() {
        let bytes = std::fs::read("/proc/self/exe").unwrap();
        let original = id(&bytes);
        assert_eq!(original.to_string().parse(), Ok(original));
        let mut ids = vec![original];
        let mut longer = bytes.clone();
        longer.push(0);
        ids.push(id(&longer));
        let mut tail = bytes.clone();
        *tail.last_mut().unwrap() ^= 1;
        ids.push(id(&tail));
        // The length in memory of the second program header, which is within the first 16 KiB as well.
        let mut layout = bytes.clone();
        layout[64 + 56 + 40] ^= 1;
        ids.push(id(&layout));
        let all = ids.len();
        ids.sort();
        ids.dedup();
        assert_eq!(ids.len(), all);
    }

    #[test]
    fn a_text_that_is_no_content_id_is_refused() {
        for bad in ["", "00", "0123456789abcdef0123456789abcde", "0123456789abcdef0123456789abcdeg"] {
            let error = bad.parse::<ContentId>().unwrap_err();
            assert!(error.to_string().contains("32 hex digits"), "{error}");
        }
    }
}
