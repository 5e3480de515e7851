//! Memory of a process that was made to harm its reader.

use std::cell::Cell;

use super::Memory;

/// Reads and bytes that one call may need.
const MAX_READS: usize = 1000;
pub(super) const MAX_BYTES: usize = 1 << 20;

/// Memory that has these bytes from one address on, or at every address, again and again.
pub(super) struct Hostile<'a> {
    bytes: &'a [u8],
    begin: Option<u64>,
    /// Reads and bytes that are left.
    reads: Cell<usize>,
    read_bytes: Cell<usize>,
}

impl<'a> Hostile<'a> {
    /// `bytes` must not be empty.
    pub(super) fn new(bytes: &'a [u8], begin: Option<u64>) -> Self {
        Self::with_limits(bytes, begin, MAX_READS, MAX_BYTES)
    }

    /// The same with other limits of reads and bytes.
    pub(super) fn with_limits(bytes: &'a [u8], begin: Option<u64>, reads: usize, read_bytes: usize) -> Self {
        Self { bytes, begin, reads: Cell::new(reads), read_bytes: Cell::new(read_bytes) }
    }
}

impl Memory for Hostile<'_> {
    fn read(&self, address: u64, bytes: &mut [u8]) -> bool {
        assert!(self.reads.get() > 0 && self.read_bytes.get() >= bytes.len(), "too much is read");
        self.reads.set(self.reads.get() - 1);
        self.read_bytes.set(self.read_bytes.get() - bytes.len());
        if let Some(begin) = self.begin {
            let from = address.checked_sub(begin).and_then(|from| usize::try_from(from).ok());
            let part = from.and_then(|from| self.bytes.get(from..from.checked_add(bytes.len())?));
            part.map(|part| bytes.copy_from_slice(part)).is_some()
        } else {
            let (_, behind) = self.bytes.split_at((address % self.bytes.len() as u64) as usize);
            let mut all = behind.iter().chain(self.bytes.iter().cycle());
            bytes.fill_with(|| all.next().copied().unwrap_or(0));
            true
        }
    }
}
