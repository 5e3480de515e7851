//! The tables in which the virtual machine describes its own structures: `gHotSpotVMStructs` and its like. They are exported for
//! debuggers, and are in every build.

use std::collections::HashMap;

use super::super::{
    Memory, WhyNot,
    memory::{half, word},
    printable,
};

/// The symbols of the tables and of the places in their entries, by number.
pub(super) const SYMBOLS: [&str; 15] = [
    "gHotSpotVMStructs",
    "gHotSpotVMStructEntryTypeNameOffset",
    "gHotSpotVMStructEntryFieldNameOffset",
    "gHotSpotVMStructEntryOffsetOffset",
    "gHotSpotVMStructEntryAddressOffset",
    "gHotSpotVMStructEntryArrayStride",
    "gHotSpotVMTypes",
    "gHotSpotVMTypeEntryTypeNameOffset",
    "gHotSpotVMTypeEntrySizeOffset",
    "gHotSpotVMTypeEntryArrayStride",
    "gHotSpotVMIntConstants",
    "gHotSpotVMIntConstantEntryNameOffset",
    "gHotSpotVMIntConstantEntryValueOffset",
    "gHotSpotVMIntConstantEntryArrayStride",
    "gHotSpotVMStructEntryIsStaticOffset",
];

/// Entries that are read of one table, and bytes of an entry and of a name.
const MAX_ENTRIES: u64 = 20_000;
const MAX_STRIDE: u64 = 128;
const MAX_NAME: usize = 96;
/// Bytes of a structure. Larger ones are none of these.
const MAX_SIZE: u64 = 1024;

/// The types whose fields are kept.
const TYPES: [&str; 20] = [
    "CodeBlob",
    "CodeCache",
    "CodeHeap",
    "HeapBlock",
    "HeapBlock::Header",
    "nmethod",
    "CompiledMethod",
    "Method",
    "ConstMethod",
    "ConstantPool",
    "InstanceKlass",
    "Klass",
    "Symbol",
    "PcDesc",
    "GrowableArrayBase",
    "GenericGrowableArray",
    "GrowableArray<int>",
    "VirtualSpace",
    "AbstractInterpreter",
    "StubQueue",
];
const MORE_TYPES: [&str; 4] = ["InterpreterCodelet", "StubRoutines", "PerfMemory", "JvmtiExport"];

/// Offsets of fields, addresses of static ones, sizes of types and constants.
#[derive(Debug, Default)]
pub(super) struct Structs {
    fields: HashMap<(String, String), (u64, u64)>,
    sizes: HashMap<String, u64>,
    constants: HashMap<String, i32>,
}

impl Structs {
    /// Reads the tables. `symbol` returns the address of a symbol in the process by its number.
    pub(super) fn read(symbol: impl Fn(usize) -> u64, memory: &dyn Memory) -> Result<Self, WhyNot> {
        let at = |number: usize| memory.u64(symbol(number));
        let mut structs = Self::default();
        let mut names = Names { memory, read: HashMap::new() };
        let (kind, field, offset, address) = (at(1)?, at(2)?, at(3)?, at(4)?);
        for_entries(at(0)?, at(5)?, &[kind, field, offset, address], memory, |entry| {
            let Some(kind) = names.get(word(entry, kind as usize)) else { return false };
            if TYPES.contains(&kind.as_str()) || MORE_TYPES.contains(&kind.as_str()) {
                let name = names.get(word(entry, field as usize)).unwrap_or_default();
                let place = (word(entry, offset as usize), word(entry, address as usize));
                structs.fields.insert((kind, name), place);
            }
            true
        })?;
        let (kind, size) = (at(7)?, at(8)?);
        for_entries(at(6)?, at(9)?, &[kind, size], memory, |entry| {
            let Some(kind) = names.get(word(entry, kind as usize)) else { return false };
            if TYPES.contains(&kind.as_str()) || MORE_TYPES.contains(&kind.as_str()) {
                structs.sizes.insert(kind, word(entry, size as usize));
            }
            true
        })?;
        let (name, value) = (at(11)?, at(12)?);
        for_entries(at(10)?, at(13)?, &[name, value], memory, |entry| {
            let Some(name) = names.get(word(entry, name as usize)) else { return false };
            if name.ends_with("_has_linenumber_table") || name.starts_with("frame::") {
                structs.constants.insert(name, half(entry, value as usize).cast_signed());
            }
            true
        })?;
        if structs.fields.is_empty() { Err(WhyNot::NotStarted) } else { Ok(structs) }
    }

    /// Returns the offset of a field.
    pub(super) fn offset(&self, kind: &'static str, field: &'static str) -> Result<u64, WhyNot> {
        self.find(kind, field).ok_or(WhyNot::Implausible(field))
    }

    /// Returns the offset of a field that some versions have.
    pub(super) fn find(&self, kind: &str, field: &str) -> Option<u64> {
        let (offset, _) = self.fields.get(&(kind.to_owned(), field.to_owned()))?;
        (*offset < MAX_SIZE).then_some(*offset)
    }

    /// Returns the address of a static field.
    pub(super) fn address(&self, kind: &str, field: &'static str) -> Result<u64, WhyNot> {
        let found = self.fields.get(&(kind.to_owned(), field.to_owned()));
        found.map(|(_, address)| *address).filter(|at| *at != 0).ok_or(WhyNot::Implausible(field))
    }

    /// Returns the size of a type.
    pub(super) fn size(&self, kind: &'static str) -> Result<u64, WhyNot> {
        self.sizes
            .get(kind)
            .copied()
            .filter(|size| (1..MAX_SIZE).contains(size))
            .ok_or(WhyNot::Implausible(kind))
    }

    /// Returns a constant.
    pub(super) fn constant(&self, name: &str) -> Option<i32> {
        self.constants.get(name).copied()
    }
}

/// Calls `each` with the entries of a table, until it returns false.
fn for_entries(
    table: u64,
    stride: u64,
    places: &[u64],
    memory: &dyn Memory,
    mut each: impl FnMut(&[u8]) -> bool,
) -> Result<(), WhyNot> {
    if table == 0 {
        return Err(WhyNot::NotStarted);
    }
    if stride > MAX_STRIDE || places.iter().any(|place| place.saturating_add(8) > stride) {
        return Err(WhyNot::Implausible("the tables of its structures"));
    }
    for number in 0..MAX_ENTRIES {
        let entry = memory.bytes(table.wrapping_add(number * stride), stride as usize)?;
        if !each(&entry) {
            return Ok(());
        }
    }
    Err(WhyNot::Implausible("the tables of its structures have no end"))
}

/// Names by address.
struct Names<'m> {
    memory: &'m dyn Memory,
    read: HashMap<u64, String>,
}

impl Names<'_> {
    /// Reads a name; none at address 0.
    fn get(&mut self, address: u64) -> Option<String> {
        if address == 0 {
            return None;
        }
        let memory = self.memory;
        let read = || text(memory, address, MAX_NAME).unwrap_or_default();
        Some(self.read.entry(address).or_insert_with(read).clone())
    }
}

/// Reads a text that a NUL ends.
pub(super) fn text(memory: &dyn Memory, address: u64, max: usize) -> Result<String, WhyNot> {
    // The page behind may not be there.
    let in_page = 4096 - (address & 4095) as usize;
    let mut bytes = memory.bytes(address, max.min(in_page))?;
    if !bytes.contains(&0) && in_page < max {
        bytes.extend(memory.bytes(address.wrapping_add(in_page as u64), max - in_page)?);
    }
    let end = bytes.iter().position(|byte| *byte == 0).unwrap_or(bytes.len());
    Ok(printable(&String::from_utf8_lossy(&bytes[..end])))
}
