//! The bytes of an ELF file, in memory or in an open file.

use std::{borrow::Cow, fs::File, os::unix::fs::FileExt};

/// The bytes of an ELF file.
///
/// Bytes in memory are borrowed; a file is read piece by piece, without moving its position.
#[derive(Clone, Copy, Debug)]
pub enum Data<'d> {
    /// A file that is in memory as a whole, such as the vDSO.
    Bytes(&'d [u8]),
    /// An open file.
    File(&'d File),
}

impl<'d> From<&'d [u8]> for Data<'d> {
    fn from(bytes: &'d [u8]) -> Self {
        Self::Bytes(bytes)
    }
}

impl<'d> From<&'d Vec<u8>> for Data<'d> {
    fn from(bytes: &'d Vec<u8>) -> Self {
        Self::Bytes(bytes)
    }
}

impl<'d> From<&'d File> for Data<'d> {
    fn from(file: &'d File) -> Self {
        Self::File(file)
    }
}

impl<'d> Data<'d> {
    /// Returns the length in bytes as it is now: a file may change while it is read.
    pub(crate) fn len(self) -> Option<u64> {
        match self {
            Self::Bytes(bytes) => Some(bytes.len() as u64),
            Self::File(file) => Some(file.metadata().ok()?.len()),
        }
    }

    /// Reads exactly `size` bytes. Checks the length of the file first, so that a claim alone takes no memory; the caller
    /// has checked `size` against its limit.
    pub(crate) fn read(self, offset: u64, size: u64) -> Option<Cow<'d, [u8]>> {
        let end = offset.checked_add(size).filter(|end| self.len().is_some_and(|length| *end <= length))?;
        match self {
            Self::Bytes(bytes) => Some(Cow::Borrowed(&bytes[offset as usize..end as usize])),
            Self::File(_) if size == 0 => Some(Cow::Borrowed(&[])),
            Self::File(file) => {
                let mut bytes = vec![0; usize::try_from(size).ok()?];
                file.read_exact_at(&mut bytes, offset).ok()?;
                Some(Cow::Owned(bytes))
            }
        }
    }

    /// Reads into the buffer as much as there is from `offset` on; returns the number of bytes.
    pub(crate) fn read_into(self, offset: u64, buffer: &mut [u8]) -> Option<usize> {
        match self {
            Self::Bytes(bytes) => {
                let rest = bytes.get(usize::try_from(offset).ok()?..)?;
                let count = rest.len().min(buffer.len());
                buffer[..count].copy_from_slice(&rest[..count]);
                Some(count)
            }
            Self::File(file) => file.read_at(buffer, offset).ok(),
        }
    }
}

/// Returns the little-endian number at an offset.
pub(crate) fn read_u32(bytes: &[u8], at: usize) -> Option<u32> {
    Some(u32::from_le_bytes(*bytes.get(at..)?.first_chunk()?))
}

/// Returns the little-endian number at an offset.
pub(crate) fn read_u64(bytes: &[u8], at: usize) -> Option<u64> {
    Some(u64::from_le_bytes(*bytes.get(at..)?.first_chunk()?))
}
