//! Reading the memory of another process.

use std::{cell::Cell, io::IoSliceMut};

use super::WhyNot;
use crate::model::FunctionCopy;

/// Memory of a process, or of a test.
pub(crate) trait Memory {
    /// Fills `bytes` from an address. False: not all of it can be read.
    fn read(&self, address: u64, bytes: &mut [u8]) -> bool;

    /// Reports whether it has parts of a process's memory only: a table of lines may be missing there.
    fn is_partial(&self) -> bool {
        false
    }
}

impl dyn Memory + '_ {
    /// Reads `N` bytes.
    pub(crate) fn array<const N: usize>(&self, address: u64) -> Result<[u8; N], WhyNot> {
        let mut bytes = [0; N];
        if self.read(address, &mut bytes) { Ok(bytes) } else { Err(WhyNot::Unreadable) }
    }

    pub(crate) fn u64(&self, address: u64) -> Result<u64, WhyNot> {
        self.array(address).map(u64::from_ne_bytes)
    }

    /// Reads `length` bytes. The caller bounds the length.
    pub(crate) fn bytes(&self, address: u64, length: usize) -> Result<Vec<u8>, WhyNot> {
        let mut bytes = vec![0; length];
        if self.read(address, &mut bytes) { Ok(bytes) } else { Err(WhyNot::Unreadable) }
    }
}

impl Memory for FunctionCopy {
    fn read(&self, address: u64, bytes: &mut [u8]) -> bool {
        let part = self.pieces.iter().find_map(|(start, piece)| {
            let from = usize::try_from(address.checked_sub(*start)?).ok()?;
            piece.get(from..from.checked_add(bytes.len())?)
        });
        part.map(|part| bytes.copy_from_slice(part)).is_some()
    }

    fn is_partial(&self) -> bool {
        true
    }
}

/// The memory of a running process.
#[derive(Clone, Copy, Debug)]
pub(crate) struct ProcessMemory {
    /// Thread group id.
    pub(crate) tgid: u32,
}

impl Memory for ProcessMemory {
    fn read(&self, address: u64, bytes: &mut [u8]) -> bool {
        let Ok(address) = usize::try_from(address) else { return false };
        let length = bytes.len();
        let local = IoSliceMut::new(bytes);
        let remote = libc::iovec { iov_base: address as *mut libc::c_void, iov_len: length };
        // SAFETY: the local vector is a borrowed buffer of that length; the kernel checks the remote one.
        let read = unsafe {
            libc::process_vm_readv(
                self.tgid.cast_signed(),
                std::ptr::from_ref(&local).cast::<libc::iovec>(),
                1,
                &raw const remote,
                1,
                0,
            )
        };
        usize::try_from(read).is_ok_and(|read| read == length)
    }
}

/// Memory of which a limited number of bytes is read. Reads beyond fail.
pub(super) struct Limited<'m> {
    memory: &'m dyn Memory,
    reads: Cell<usize>,
    bytes: Cell<usize>,
    is_used_up: Cell<bool>,
}

impl<'m> Limited<'m> {
    pub(super) fn new(memory: &'m dyn Memory, reads: usize, bytes: usize) -> Self {
        Self { memory, reads: Cell::new(reads), bytes: Cell::new(bytes), is_used_up: Cell::default() }
    }

    /// Reports whether a read failed because of the limit.
    pub(super) fn is_used_up(&self) -> bool {
        self.is_used_up.get()
    }
}

impl Memory for Limited<'_> {
    fn read(&self, address: u64, bytes: &mut [u8]) -> bool {
        let left = (self.reads.get().checked_sub(1), self.bytes.get().checked_sub(bytes.len()));
        let (Some(reads), Some(rest)) = left else {
            self.is_used_up.set(true);
            return false;
        };
        self.reads.set(reads);
        self.bytes.set(rest);
        self.memory.read(address, bytes)
    }

    fn is_partial(&self) -> bool {
        self.memory.is_partial()
    }
}

/// Reads one 64-bit word at an offset of bytes that were read before; 0 beyond their end.
pub(super) fn word(bytes: &[u8], offset: usize) -> u64 {
    bytes.get(offset..).and_then(|rest| rest.first_chunk()).map_or(0, |eight| u64::from_ne_bytes(*eight))
}

/// Reads one 32-bit word.
pub(super) fn half(bytes: &[u8], offset: usize) -> u32 {
    bytes.get(offset..).and_then(|rest| rest.first_chunk()).map_or(0, |four| u32::from_ne_bytes(*four))
}
