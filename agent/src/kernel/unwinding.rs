//! Writing what the kernel side unwinds by: tables, their rules, and which mapping of which process uses which.

use std::{
    io,
    marker::PhantomData,
    mem::size_of,
    os::fd::{AsFd as _, OwnedFd},
    ptr::NonNull,
};

use gannet_bpf::types;
use gannet_unwind::format::{CacheLine, UnwindRule};
use libbpf_rs::{MapCore, MapFlags, MapMut};
use rustix::{
    io::Errno,
    mm::{MapFlags as Sharing, ProtFlags, mmap, munmap},
};

use super::{Kernel, KernelError, MapValue, bytes_of};
use crate::model::ProcessKey;

/// Bits of a key of the mapping trie: thread group id, then address.
const KEY_BITS: u32 = 8 * (size_of::<types::mapping_key>() - size_of::<u32>()) as u32;
/// Bits before the address.
const TGID_BITS: u32 = u32::BITS;
const _: () = assert!(KEY_BITS == TGID_BITS + u64::BITS);
const _: () = assert!(size_of::<types::mapping_key>() == 16);
const _: () = assert!(size_of::<types::unwind_rule>() == size_of::<UnwindRule>());
const _: () = assert!(size_of::<types::table_line>() == size_of::<CacheLine>());
const _: () = assert!(size_of::<types::mapping>() == 3 * 8 + 4 * 4);
const _: () = assert!(size_of::<types::unwind_table>() == 8 + 4 * 4);
const _: () = assert!(size_of::<types::image>() == 8 + 2 * 4 + 8);

impl MapValue for types::mapping {}
impl MapValue for types::unwind_table {}
impl MapValue for types::image {}

/// Tables that can be resident at one time: MAX_TABLES of gannet.h.
pub const MAX_TABLES: u32 = 4096;

/// What the trie says of a range of addresses.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct KernelMapping {
    /// First address.
    pub begin: u64,
    /// Behind the last.
    pub end: u64,
    /// Address at run time minus address as the file counts.
    pub bias: u64,
    /// The table and its generation; none: by frame pointer.
    pub table: Option<(u32, u32)>,
}

/// Where a table is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct KernelTable {
    /// Address, as the file counts, of its first granule.
    pub base: u64,
    /// Its first line in the arena.
    pub first_line: u32,
    /// Granules in its directory.
    pub granules: u32,
    /// Changes with each table in this place.
    pub generation: u32,
}

/// An aligned block of addresses: what one key of the trie stands for.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Block {
    /// First address; its low `bits` are 0.
    pub address: u64,
    /// The block is 2 to the power of this long; 64 is everything.
    pub bits: u32,
}

/// The range is empty or reversed.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{begin:#x} to {end:#x} is no range of addresses")]
pub struct EmptyRange {
    /// First address.
    pub begin: u64,
    /// Behind the last.
    pub end: u64,
}

/// The least number of aligned blocks that make up `begin..end`, ascending.
pub fn blocks(begin: u64, end: u64) -> Result<Vec<Block>, EmptyRange> {
    if begin >= end {
        return Err(EmptyRange { begin, end });
    }
    let mut blocks = Vec::new();
    let mut at = begin;
    while at < end {
        // As long as its alignment allows and the range has room for: the position 0 is aligned to everything.
        let aligned = at.trailing_zeros();
        let room = (end - at).ilog2();
        let bits = aligned.min(room);
        blocks.push(Block { address: at, bits });
        // PROOF: 2^bits <= end - at, so this is at most `end`.
        at += 1 << bits;
    }
    Ok(blocks)
}

/// The bytes of a key.
pub fn mapping_key(tgid: u32, block: Block) -> [u8; size_of::<types::mapping_key>()] {
    let mut key = [0; size_of::<types::mapping_key>()];
    key[..4].copy_from_slice(&(KEY_BITS - block.bits).to_ne_bytes());
    key[4..8].copy_from_slice(&tgid.to_be_bytes());
    key[8..].copy_from_slice(&block.address.to_be_bytes());
    key
}

/// The memory of an array map. Its pages are mapped only while they are written: for as long as they are mapped, all of
/// them count as memory of the agent, written or not.
pub(super) struct Shared<T> {
    map: OwnedFd,
    name: &'static str,
    entries: usize,
    of: PhantomData<T>,
}

impl<T: Copy> Shared<T> {
    pub(super) fn of(map: &MapMut<'_>, name: &'static str) -> Result<Self, KernelError> {
        debug_assert_eq!(map.value_size() as usize, size_of::<T>());
        let failed = |error: io::Error| KernelError::Map { map: name, source: error.into() };
        let entries = map.max_entries() as usize;
        Ok(Self { map: map.as_fd().try_clone_to_owned().map_err(failed)?, name, entries, of: PhantomData })
    }

    /// Writes entries from `first` on.
    fn write(&self, first: usize, values: &mut dyn ExactSizeIterator<Item = T>) -> Result<(), KernelError> {
        let count = values.len();
        self.window(first, count, |start| {
            for (index, value) in values.take(count).enumerate() {
                // SAFETY: `count` entries are mapped behind `start`; the kernel side only reads them.
                unsafe { start.add(index).write_volatile(value) };
            }
        })
    }

    /// Writes single entries.
    fn write_each(&self, values: &[(usize, T)]) -> Result<(), KernelError> {
        let numbers = || values.iter().map(|(number, _)| *number);
        let (Some(first), Some(last)) = (numbers().min(), numbers().max()) else { return Ok(()) };
        self.window(first, last - first + 1, |start| {
            for (number, value) in values {
                // SAFETY: all entries from the first number to the last are mapped behind `start`; the kernel side only
                // reads them.
                unsafe { start.add(number - first).write_volatile(*value) };
            }
        })
    }

    /// Maps some entries while `write` runs.
    fn window(&self, first: usize, count: usize, write: impl FnOnce(NonNull<T>)) -> Result<(), KernelError> {
        let failed = |errno: Errno| KernelError::Map {
            map: self.name,
            source: libbpf_rs::Error::from(io::Error::from(errno)),
        };
        if count == 0 {
            return Ok(());
        }
        if first.checked_add(count).is_none_or(|end| end > self.entries) {
            return Err(failed(Errno::NOSPC));
        }
        let begin = first * size_of::<T>();
        let offset = begin - begin % rustix::param::page_size();
        let length = begin - offset + count * size_of::<T>();
        // SAFETY: a new mapping at a place of the kernel's choice; the kernel checks its end against the map's.
        let address = unsafe {
            mmap(
                std::ptr::null_mut(),
                length,
                ProtFlags::READ | ProtFlags::WRITE,
                Sharing::SHARED,
                &self.map,
                offset as u64,
            )
        }
        .map_err(failed)?;
        // SAFETY: within the mapping.
        let start = NonNull::new(unsafe { address.byte_add(begin - offset) }.cast::<T>());
        if let Some(start) = start {
            write(start);
        }
        // SAFETY: mapped above with this length; nothing refers to it any more. It can fail only for arguments that were
        // not mapped.
        let _ = unsafe { munmap(address, length) };
        start.map(drop).ok_or_else(|| failed(Errno::NOMEM))
    }
}

/// Everything that is written through shared memory.
pub(super) struct SharedTables {
    pub(super) lines: Shared<CacheLine>,
    pub(super) rules: Shared<UnwindRule>,
}

/// What the kernel side unwinds by, as it is written: the real maps, or a test's.
pub trait UnwindMaps {
    /// Lines that all tables together can have.
    fn table_lines(&self) -> u32;

    /// Writes rules by their numbers. Before any line that names them.
    fn write_rules(&mut self, rules: &[(u16, UnwindRule)]) -> Result<(), KernelError>;

    /// Writes lines from `first` on.
    fn write_lines(
        &mut self,
        first: u32,
        lines: &mut dyn ExactSizeIterator<Item = CacheLine>,
    ) -> Result<(), KernelError>;

    /// Makes a table known, or with `None` unknown.
    fn set_table(
        &mut self,
        table: u32,
        place: Option<KernelTable>,
        generation: u32,
    ) -> Result<(), KernelError>;

    /// Says what a block of a process's addresses is. Overwrites in place, so that no look-up misses meanwhile.
    fn set_mapping(&mut self, tgid: u32, block: Block, mapping: &KernelMapping) -> Result<(), KernelError>;

    /// Takes a block back. Not there is as good.
    fn remove_mapping(&mut self, tgid: u32, block: Block);

    /// All mappings of this image are written: it is walked from now on.
    fn set_image(&mut self, key: ProcessKey, image: KernelImage) -> Result<(), KernelError>;

    /// The process's mappings hold no longer.
    fn remove_image(&mut self, tgid: u32);

    /// Returns when no walk is still at what it was at when this was called.
    fn wait_for_walks(&self);
}

/// One image of a process, all of whose mappings are written.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct KernelImage {
    /// The kernel's count of the process's `execve` calls.
    pub exec_id: u32,
    /// Another number for each change: what the kernel side has found out by an earlier one it forgets.
    pub epoch: u64,
}

impl UnwindMaps for Kernel {
    fn table_lines(&self) -> u32 {
        self.skeleton.maps.table_lines.max_entries()
    }

    fn write_rules(&mut self, rules: &[(u16, UnwindRule)]) -> Result<(), KernelError> {
        let rules: Vec<(usize, UnwindRule)> =
            rules.iter().map(|(number, rule)| ((*number).into(), *rule)).collect();
        self.shared.rules.write_each(&rules)
    }

    fn write_lines(
        &mut self,
        first: u32,
        lines: &mut dyn ExactSizeIterator<Item = CacheLine>,
    ) -> Result<(), KernelError> {
        self.shared.lines.write(first as usize, lines)
    }

    fn set_table(
        &mut self,
        table: u32,
        place: Option<KernelTable>,
        generation: u32,
    ) -> Result<(), KernelError> {
        let value = place.map_or_else(
            || types::unwind_table { generation, ..Default::default() },
            |place| types::unwind_table {
                base: place.base,
                first_line: place.first_line,
                granules: place.granules,
                generation: place.generation,
                reserved: 0,
            },
        );
        self.skeleton
            .maps
            .unwind_tables
            .update(&table.to_ne_bytes(), bytes_of(&value), MapFlags::ANY)
            .map_err(|source| KernelError::Map { map: "unwind_tables", source })
    }

    fn set_mapping(&mut self, tgid: u32, block: Block, mapping: &KernelMapping) -> Result<(), KernelError> {
        let (table, table_generation) = mapping.table.unwrap_or_default();
        let value = types::mapping {
            begin: mapping.begin,
            end: mapping.end,
            bias: mapping.bias,
            table,
            table_generation,
            kind: mapping.table.is_none().into(),
            reserved: 0,
        };
        self.skeleton
            .maps
            .exec_mappings
            .update(&mapping_key(tgid, block), bytes_of(&value), MapFlags::ANY)
            .map_err(|source| KernelError::Map { map: "exec_mappings", source })
    }

    fn remove_mapping(&mut self, tgid: u32, block: Block) {
        let _ = self.skeleton.maps.exec_mappings.delete(&mapping_key(tgid, block));
    }

    fn set_image(&mut self, key: ProcessKey, image: KernelImage) -> Result<(), KernelError> {
        let KernelImage { exec_id, epoch } = image;
        let value = types::image { start_boottime: key.start_boottime_ns, exec_id, reserved: 0, epoch };
        self.skeleton
            .maps
            .images
            .update(&key.tgid.to_ne_bytes(), bytes_of(&value), MapFlags::ANY)
            .map_err(|source| KernelError::Map { map: "images", source })
    }

    fn remove_image(&mut self, tgid: u32) {
        let _ = self.skeleton.maps.images.delete(&tgid.to_ne_bytes());
    }

    fn wait_for_walks(&self) {
        // Each walk is within one read side of the kernel's RCU.
        const MEMBARRIER_CMD_GLOBAL: libc::c_int = 1;
        // SAFETY: takes no pointers.
        let result = unsafe { libc::syscall(libc::SYS_membarrier, MEMBARRIER_CMD_GLOBAL, 0, 0) };
        if result != 0 {
            // Refused on machines with isolated CPUs. A walk takes microseconds.
            std::thread::sleep(std::time::Duration::from_millis(20));
        }
    }
}

impl Kernel {
    /// Whether user stacks are walked by tables.
    pub fn set_tables(&mut self, on: bool) {
        self.change_settings(|settings| settings.tables = on.into());
    }

    /// What the trie says of an address: first address and end of its mapping.
    pub fn mapping_at(&self, tgid: u32, address: u64) -> Option<(u64, u64)> {
        let key = mapping_key(tgid, Block { address, bits: 0 });
        let value = self.skeleton.maps.exec_mappings.lookup(&key, MapFlags::ANY).ok()??;
        let (begin, rest) = value.split_first_chunk()?;
        Some((u64::from_ne_bytes(*begin), u64::from_ne_bytes(*rest.first_chunk()?)))
    }

    /// Keys of the mapping trie and entries of the images, by the kernel's own count.
    pub fn unwind_entries(&self) -> (usize, usize) {
        (self.skeleton.maps.exec_mappings.keys().count(), self.skeleton.maps.images.keys().count())
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[track_caller]
    fn exact(begin: u64, end: u64) {
        let mut at = begin;
        for block in blocks(begin, end).unwrap() {
            assert_eq!(block.address, at, "no gap, no overlap, ascending");
            assert!(block.address.trailing_zeros() >= block.bits, "aligned");
            at = at.saturating_add(1 << block.bits);
        }
        assert_eq!(at, end);
    }

    #[test]
    fn r1_the_bytes_of_a_key() {
        let key = mapping_key(0x0102_0304, Block { address: 0x1112_1314_1516_1000, bits: 12 });
        assert_eq!(key[..4], 84_u32.to_ne_bytes());
        assert_eq!(key[4..], [1, 2, 3, 4, 0x11, 0x12, 0x13, 0x14, 0x15, 0x16, 0x10, 0]);
    }

    #[test]
    fn r2_the_length_of_every_prefix_follows_from_the_layout_of_the_key() {
        let length = |bits| {
            let key = mapping_key(7, Block { address: 0, bits });
            u32::from_ne_bytes(*key.first_chunk().unwrap())
        };
        let (tgid, address) = (
            std::mem::offset_of!(types::mapping_key, tgid),
            std::mem::offset_of!(types::mapping_key, address),
        );
        let whole = 8 * (size_of::<types::mapping_key>() - tgid) as u32;
        assert_eq!(length(0), whole, "one address is the whole key");
        assert_eq!(
            length(u64::BITS),
            8 * (address - tgid) as u32,
            "all addresses are the process's number alone"
        );
        for bits in 0..=u64::BITS {
            assert_eq!(length(bits), whole - bits);
            // What is compared is exactly what the block's addresses have in common.
            let block = Block { address: u64::MAX << (bits % u64::BITS), bits };
            let key = mapping_key(7, block);
            let compared = length(bits) as usize;
            let bit = |at: usize| key[tgid + at / 8] >> (7 - at % 8) & 1;
            let in_address = |at: usize| u64::from(bit(8 * (address - tgid) + at));
            for at in 0..(compared - 8 * (address - tgid)) {
                assert_eq!(in_address(at), block.address >> (63 - at) & 1);
            }
        }
    }

    #[test]
    fn r3_edges_of_the_address_space() {
        exact(0, u64::MAX);
        exact(u64::MAX - 255, u64::MAX);
        exact(0, 1 << 63);
        exact(0x1000, 0x1001);
    }

    #[test]
    fn r4_an_empty_or_reversed_range_is_an_error() {
        for (begin, end) in [(0, 0), (u64::MAX, u64::MAX), (5, 4)] {
            assert_eq!(blocks(begin, end), Err(EmptyRange { begin, end }));
        }
    }

    proptest! {
        #[test]
        fn r3_blocks_are_aligned_disjoint_sorted_and_whole(begin in any::<u64>(), length in 1_u64..1 << 40) {
            exact(begin, begin.saturating_add(length).max(begin.saturating_add(1)));
        }
    }
}
