//! Writing the data by which the kernel side unwinds: unwind tables, their rules, and the table of each mapping.

use std::{
    collections::HashSet,
    io,
    marker::PhantomData,
    mem::{offset_of, size_of},
    os::fd::{AsFd as _, OwnedFd},
    ptr::NonNull,
    sync::Arc,
};

use gannet_bpf::types;
use gannet_unwind::format::{CacheLine, UnwindRule};
use libbpf_rs::{MapCore, MapFlags, MapMut};
use rustix::{
    io::Errno,
    mm::{MapFlags as Sharing, ProtFlags, mmap, munmap},
};

use super::{Kernel, KernelError, MapValue, bytes_of, entries::EntryMap};
use crate::model::{
    ImageKey, LabelForm, LabelLayout, ListEnd, ListLayout, ProcessKey, SpanKeys, ThreadContext,
};

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
const _: () = assert!(size_of::<types::list_frames>() == 8 + 2 * 4 + 8 + 4 * 4 + 8 + 2 * 4 + 32);
const _: () = assert!(size_of::<types::label_source>() == 8 + 2 * 4 + 8 + 4 * 4);
const _: () = assert!(size_of::<types::context_place>() == 8 + 4 * 4);
const _: () = assert!(size_of::<types::thread_context>() == 8 + 2 * 4 + size_of::<types::context_place>());
const _: () = assert!(size_of::<types::image>() == 8 + 2 * 4 + 8 + size_of::<types::context_place>());
// `Kernel::put_context` compares the first bytes of both values, and copies the last ones.
const IMAGE_BYTES: usize = 8 + 4;
const _: () =
    assert!(offset_of!(types::image, exec_id) == 8 && offset_of!(types::thread_context, exec_id) == 8);
const _: () = assert!(offset_of!(types::thread_context, place) == 8 + 2 * 4);
const _: () = assert!(offset_of!(types::image, context) == 8 + 2 * 4 + 8);

impl MapValue for types::mapping {}
impl MapValue for types::unwind_table {}
impl MapValue for types::image {}
impl MapValue for types::list_frames {}
impl MapValue for types::label_source {}
impl MapValue for types::thread_context {}

/// Tables that can be in the kernel at one time: MAX_TABLES of gannet.h.
pub(crate) const MAX_TABLES: u32 = 4096;

/// `enum list_end` of gannet.h.
const LIST_END_LAST: u8 = 0;
const LIST_END_NATIVE: u8 = 1;
const LIST_END_EACH: u8 = 2;
/// `enum label_form` of gannet.h.
const LABELS_ARRAY: u32 = 1;
const LABELS_BUCKETS: u32 = 2;
/// `enum context_form` of gannet.h.
const CONTEXT_WORD: u32 = 1;
const CONTEXT_BY_MODULE: u32 = 2;
/// LIST_STEPS of gannet.h.
const LIST_STEPS: usize = 4;

/// The unwind data of a range of addresses of a process: a value of the mapping trie.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct KernelMapping {
    /// First address, inclusive.
    pub begin: u64,
    /// End address, exclusive.
    pub end: u64,
    /// Address at run time minus address in the file.
    pub bias: u64,
    /// The table and its generation; `None` to unwind by frame pointer. [`SENT_RAW`]: stacks that reach it are sent raw.
    pub table: Option<(u32, u32)>,
}

/// In place of a table: code that only the agent can unwind.
pub(crate) const SENT_RAW: (u32, u32) = (u32::MAX - 1, 0);
/// `enum mapping_kind` of gannet.h.
const MAPPING_TABLE: u32 = 0;
const MAPPING_FRAME_POINTER: u32 = 1;
const MAPPING_RAW: u32 = 2;

/// The location of an unwind table in the arena.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct KernelTable {
    /// Address in the file of its first granule.
    pub base: u64,
    /// Its first cache line in the arena.
    pub first_line: u32,
    /// Granules in its directory.
    pub granules: u32,
    /// Changes with each table in this slot.
    pub generation: u32,
}

/// An aligned block of addresses, which one key of the trie stands for.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Block {
    /// First address; its low `bits` are 0.
    pub address: u64,
    /// The length of the block is 2 to the power of this; 64 is the whole address space.
    pub bits: u32,
}

/// An error: the range is empty or reversed.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{begin:#x} to {end:#x} is no range of addresses")]
pub struct EmptyRange {
    /// First address, inclusive.
    pub begin: u64,
    /// End address, exclusive.
    pub end: u64,
}

/// Returns the least number of aligned blocks that make up `begin..end`, ascending.
pub fn blocks(begin: u64, end: u64) -> Result<Vec<Block>, EmptyRange> {
    if begin >= end {
        return Err(EmptyRange { begin, end });
    }
    let mut blocks = Vec::new();
    let mut at = begin;
    while at < end {
        // As long as alignment and range allow; address 0 is aligned to everything.
        let aligned = at.trailing_zeros();
        let room = (end - at).ilog2();
        let bits = aligned.min(room);
        blocks.push(Block { address: at, bits });
        // PROOF: 2^bits <= end - at, so this is at most `end`.
        at += 1 << bits;
    }
    Ok(blocks)
}

/// Returns the bytes of a key of the mapping trie.
fn mapping_key(tgid: u32, block: Block) -> [u8; size_of::<types::mapping_key>()] {
    let mut key = [0; size_of::<types::mapping_key>()];
    key[..4].copy_from_slice(&(KEY_BITS - block.bits).to_ne_bytes());
    key[4..8].copy_from_slice(&tgid.to_be_bytes());
    key[8..].copy_from_slice(&block.address.to_be_bytes());
    key
}

/// The memory of an array map. Its pages are mapped only while the agent writes them: mapped pages count as memory of the
/// agent, written or not.
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

    /// Maps `count` entries from `first` on while `write` runs.
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
        // SAFETY: a new mapping at an address of the kernel's choice; the kernel checks its end against the map's.
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
        // SAFETY: mapped above with this length; nothing refers to it any more. The call fails only for memory that is not
        // mapped.
        let _ = unsafe { munmap(address, length) };
        start.map(drop).ok_or_else(|| failed(Errno::NOMEM))
    }
}

/// The maps that the agent writes through shared memory.
pub(super) struct SharedTables {
    pub(super) lines: Shared<CacheLine>,
    pub(super) rules: Shared<UnwindRule>,
}

/// The maps by which the kernel side unwinds: those of a [`Kernel`], or a test's.
pub trait UnwindMaps {
    /// Returns the number of cache lines that all tables together can have.
    fn table_lines(&self) -> u32;

    /// Writes rules by their numbers. The caller does so before it writes a line that names them.
    fn write_rules(&mut self, rules: &[(u16, UnwindRule)]) -> Result<(), KernelError>;

    /// Writes cache lines from `first` on.
    fn write_lines(
        &mut self,
        first: u32,
        lines: &mut dyn ExactSizeIterator<Item = CacheLine>,
    ) -> Result<(), KernelError>;

    /// Publishes a table, or with `None` withdraws it.
    fn set_table(
        &mut self,
        table: u32,
        location: Option<KernelTable>,
        generation: u32,
    ) -> Result<(), KernelError>;

    /// Sets the unwind data of a block of a process's addresses. It overwrites the entry, so that no look-up misses it
    /// meanwhile.
    fn set_mapping(&mut self, tgid: u32, block: Block, mapping: &KernelMapping) -> Result<(), KernelError>;

    /// Removes a block, if it is there.
    fn remove_mapping(&mut self, tgid: u32, block: Block);

    /// Marks all mappings of this image as written: the kernel side unwinds it from now on.
    fn set_image(&mut self, key: ProcessKey, image: KernelImage) -> Result<(), KernelError>;

    /// Marks the mappings of a process as no longer valid.
    fn remove_image(&mut self, tgid: u32);

    /// Blocks until every unwind that was running when it was called has ended.
    fn wait_for_unwinds(&self);
}

/// An image whose mappings are all written.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct KernelImage {
    /// The kernel's count of the process's `execve` calls.
    pub exec_id: u32,
    /// Changes with each change of its mappings: the kernel side drops rules that it cached in another epoch.
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
        location: Option<KernelTable>,
        generation: u32,
    ) -> Result<(), KernelError> {
        let value = location.map_or_else(
            || types::unwind_table { generation, ..Default::default() },
            |table| types::unwind_table {
                base: table.base,
                first_line: table.first_line,
                granules: table.granules,
                generation: table.generation,
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
            kind: match mapping.table {
                None => MAPPING_FRAME_POINTER,
                Some(SENT_RAW) => MAPPING_RAW,
                Some(_) => MAPPING_TABLE,
            },
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
        let value =
            types::image { start_boottime: key.start_boottime_ns, exec_id, epoch, ..Default::default() };
        let mut value = bytes_of(&value).to_vec();
        if self.settings().contexts != 0 {
            self.put_context(&mut value, key.tgid);
        }
        self.skeleton
            .maps
            .images
            .update(&key.tgid.to_ne_bytes(), &value, MapFlags::ANY)
            .map_err(|source| KernelError::Map { map: "images", source })
    }

    fn remove_image(&mut self, tgid: u32) {
        let _ = self.skeleton.maps.images.delete(&tgid.to_ne_bytes());
    }

    fn wait_for_unwinds(&self) {
        // Each unwind is within one RCU read-side critical section.
        const MEMBARRIER_CMD_GLOBAL: libc::c_int = 1;
        // SAFETY: takes no pointers.
        let result = unsafe { libc::syscall(libc::SYS_membarrier, MEMBARRIER_CMD_GLOBAL, 0, 0) };
        if result != 0 {
            // The kernel refuses it on machines with isolated CPUs. An unwind takes microseconds.
            std::thread::sleep(std::time::Duration::from_millis(20));
        }
    }
}

impl Kernel {
    /// Switches between unwinding user stacks by tables and by frame pointers.
    pub(crate) fn set_tables(&mut self, on: bool) {
        self.change_settings(|settings| settings.tables = on.into());
    }

    /// Lets the programs take the list frames of this image, now or when the map has room for it.
    pub(crate) fn set_list_frames(&mut self, key: ImageKey, layout: &ListLayout) {
        let mut step = [0; LIST_STEPS];
        let steps = layout.steps.as_slice();
        step[..steps.len()].copy_from_slice(steps);
        let (end, end_byte, end_mask, end_value) = match layout.end {
            ListEnd::Last(byte, value) => (LIST_END_LAST, byte, u8::MAX, value),
            ListEnd::LastBit(byte, bit) => (LIST_END_LAST, byte, bit, bit),
            ListEnd::Native(byte, value) => (LIST_END_NATIVE, byte, u8::MAX, value),
            ListEnd::Each => (LIST_END_EACH, 0, 0, 0),
        };
        let value = types::list_frames {
            start_boottime: key.process.start_boottime_ns,
            exec_id: key.exec_id,
            steps: steps.len() as u16,
            thread_offset: layout.thread_offset,
            step,
            function_mask: layout.function_mask,
            sum_offset: layout.sum.0,
            sum_words: layout.sum.1,
            native_step: layout.native_step,
            words: layout.words,
            function: layout.function,
            position: layout.position,
            next: layout.next,
            end_byte,
            end_mask,
            end_value,
            end,
            position_is_address: layout.position_is_address.into(),
            self_offset: layout.self_at.1,
            self_step: layout.self_at.0.into(),
            layout: layout.number,
            object_bytes: layout.texts.object_bytes,
            text: layout.texts.texts.map(|(word, _, _)| word),
            text_length: layout.texts.length,
            text_header: layout.texts.texts.map(|(_, header, _)| header),
            text_shift: layout.texts.texts.map(|(_, _, shift)| shift),
            is_absolute: layout.is_absolute.into(),
            native_function: layout.native_function,
            frame_register: layout.registers.0,
            position_register: layout.registers.1,
            stride: layout.stride,
            variables: layout.variables,
            oldest_byte: layout.oldest.0,
            oldest_value: layout.oldest.1,
            ..Default::default()
        };
        self.set_entry(EntryMap::ListFrames, key.process, bytes_of(&value));
    }

    /// Takes no list frames of this process any more.
    pub(crate) fn remove_list_frames(&mut self, tgid: u32) {
        self.remove_entry(EntryMap::ListFrames, tgid);
    }

    /// Lets the programs take the labels of this image's tasks, now or when the map has room for it.
    pub(crate) fn set_label_source(&mut self, key: ImageKey, layout: &LabelLayout) {
        let value = types::label_source {
            start_boottime: key.process.start_boottime_ns,
            exec_id: key.exec_id,
            form: match layout.form {
                LabelForm::Array => LABELS_ARRAY,
                LabelForm::Buckets => LABELS_BUCKETS,
            },
            thread_offset: layout.thread_offset,
            owner: layout.owner,
            labels: layout.labels,
            current: layout.current,
            is_shared: 0,
        };
        self.set_entry(EntryMap::LabelSources, key.process, bytes_of(&value));
    }

    /// Takes no labels of this process any more.
    pub(crate) fn remove_label_source(&mut self, tgid: u32) {
        self.remove_entry(EntryMap::LabelSources, tgid);
    }

    /// Lets the programs take the spans of this image's threads, now or when the map has room for it. `keys` names the attributes.
    pub(crate) fn set_thread_context(
        &mut self,
        key: ImageKey,
        context: &ThreadContext,
        keys: &Arc<SpanKeys>,
    ) {
        let [module_at, variable_at] = context.steps.unwrap_or_default();
        let value = types::thread_context {
            start_boottime: key.process.start_boottime_ns,
            exec_id: key.exec_id,
            reserved: 0,
            place: types::context_place {
                thread_offset: context.thread_offset,
                module_at,
                variable_at,
                form: if context.steps.is_some() { CONTEXT_BY_MODULE } else { CONTEXT_WORD },
                reserved: 0,
            },
        };
        self.ring.set_span_keys(key, Arc::clone(keys));
        self.set_entry(EntryMap::ThreadContexts, key.process, bytes_of(&value));
    }

    /// Puts the place of a process's spans, if `thread_contexts` has it for this image, into a value of `images`.
    fn put_context(&self, image: &mut [u8], tgid: u32) {
        let known =
            self.skeleton.maps.thread_contexts.lookup(&tgid.to_ne_bytes(), MapFlags::ANY).ok().flatten();
        let same = known.filter(|context| context.get(..IMAGE_BYTES) == image.get(..IMAGE_BYTES));
        let place = same.and_then(|context| context.last_chunk().copied()).unwrap_or_default();
        if let Some(to) = image.last_chunk_mut::<{ size_of::<types::context_place>() }>() {
            *to = place;
        }
    }

    /// Brings the entry of a process in `images`, if there is one, to what `thread_contexts` has.
    pub(super) fn copy_context(&self, tgid: u32) -> libbpf_rs::Result<()> {
        let (images, key) = (&self.skeleton.maps.images, tgid.to_ne_bytes());
        let Some(former) = images.lookup(&key, MapFlags::ANY)? else { return Ok(()) };
        let mut image = former.clone();
        self.put_context(&mut image, tgid);
        if image == former { Ok(()) } else { images.update(&key, &image, MapFlags::ANY) }
    }

    /// Takes no spans of this process any more.
    pub(crate) fn remove_thread_context(&mut self, tgid: u32) {
        self.ring.remove_span_keys(tgid);
        self.remove_entry(EntryMap::ThreadContexts, tgid);
    }

    /// Takes the thread groups whose threads have published attributes without a name since the last call.
    pub(crate) fn take_unknown_span_keys(&self) -> HashSet<u32> {
        self.ring.take_unknown_keys()
    }

    /// Returns the first address and the exclusive end of the mapping that the trie finds for an address.
    pub fn mapping_at(&self, tgid: u32, address: u64) -> Option<(u64, u64)> {
        let key = mapping_key(tgid, Block { address, bits: 0 });
        let value = self.skeleton.maps.exec_mappings.lookup(&key, MapFlags::ANY).ok()??;
        let (begin, rest) = value.split_first_chunk()?;
        Some((u64::from_ne_bytes(*begin), u64::from_ne_bytes(*rest.first_chunk()?)))
    }

    /// Returns the number of keys of the mapping trie and of entries of the images, by the kernel's own count.
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

    /// Checks that a key holds thread group id and address in network order (R1).
    #[test]
    fn a_key_is_in_network_order() {
        let key = mapping_key(0x0102_0304, Block { address: 0x1112_1314_1516_1000, bits: 12 });
        assert_eq!(key[..4], 84_u32.to_ne_bytes());
        assert_eq!(key[4..], [1, 2, 3, 4, 0x11, 0x12, 0x13, 0x14, 0x15, 0x16, 0x10, 0]);
    }

    /// Checks that a prefix covers exactly the bits that the addresses of its block share (R2).
    #[test]
    fn a_prefix_covers_the_common_bits_of_its_block() {
        let length = |bits| {
            let key = mapping_key(7, Block { address: 0, bits });
            u32::from_ne_bytes(*key.first_chunk().unwrap())
        };
        let (tgid, address) = (
            std::mem::offset_of!(types::mapping_key, tgid),
            std::mem::offset_of!(types::mapping_key, address),
        );
        let whole = 8 * (size_of::<types::mapping_key>() - tgid) as u32;
        assert_eq!(length(0), whole, "one address is the complete key");
        assert_eq!(
            length(u64::BITS),
            8 * (address - tgid) as u32,
            "all addresses are the process's number alone"
        );
        for bits in 0..=u64::BITS {
            assert_eq!(length(bits), whole - bits);
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

    /// Checks the edges of the address space (R3).
    #[test]
    fn blocks_reach_both_ends_of_the_address_space() {
        exact(0, u64::MAX);
        exact(u64::MAX - 255, u64::MAX);
        exact(0, 1 << 63);
        exact(0x1000, 0x1001);
    }

    /// Checks that there are no blocks of nothing (R4).
    #[test]
    fn an_empty_or_reversed_range_is_an_error() {
        for (begin, end) in [(0, 0), (u64::MAX, u64::MAX), (5, 4)] {
            assert_eq!(blocks(begin, end), Err(EmptyRange { begin, end }));
        }
    }

    proptest! {
        /// Checks that the blocks of any range make it up (R3).
        #[test]
        fn blocks_are_aligned_disjoint_sorted_and_complete(begin in any::<u64>(), length in 1_u64..1 << 40) {
            exact(begin, begin.saturating_add(length).max(begin.saturating_add(1)));
        }
    }
}
