//! Where the structures of one virtual machine have what the agent reads.

use super::{super::WhyNot, structs::Structs};

/// Offsets and sizes in bytes.
#[derive(Clone, Debug)]
pub(super) struct Layout {
    /// Address of the list of code heaps.
    pub(super) heaps: u64,
    pub(super) list_length: u64,
    pub(super) list_data: u64,
    pub(super) heap_memory: u64,
    pub(super) heap_segments: u64,
    pub(super) heap_log2_segment: u64,
    pub(super) space_low: u64,
    pub(super) space_high: u64,
    pub(super) block_bytes: u64,
    pub(super) block_used: u64,
    pub(super) blob: Blob,
    pub(super) compiled: Compiled,
    pub(super) method: MethodLayout,
    /// Address of the pointer to the interpreter's codelets.
    pub(super) interpreter: u64,
    pub(super) codelets: u64,
    pub(super) codelets_end: u64,
    pub(super) codelet_size: u64,
    pub(super) codelet_text: u64,
    pub(super) codelet_bytes: u64,
    /// Address of the return address of calls from native code.
    pub(super) call_stub: u64,
    /// Integers in compressed streams leave the byte 0 out.
    pub(super) without_zero: bool,
}

/// A piece of code in a heap.
#[derive(Clone, Debug)]
pub(super) struct Blob {
    pub(super) bytes: u64,
    pub(super) name: u64,
    pub(super) size: u64,
    pub(super) frame_size: u64,
    pub(super) frame_complete: u64,
    pub(super) frame_complete_is_short: bool,
    pub(super) code: Place,
    pub(super) code_end: Place,
}

/// How a field gives an address.
#[derive(Clone, Copy, Debug)]
pub(super) enum Place {
    /// The field is an address.
    Address(u64),
    /// The field is an offset of 32 bits from the blob.
    Offset(u64),
    /// The field is an offset of 16 bits from the code.
    FromCode(u64),
}

/// A compiled method.
#[derive(Clone, Debug)]
pub(super) struct Compiled {
    pub(super) bytes: u64,
    pub(super) method: u64,
    pub(super) compile_id: u64,
    pub(super) orig_pc: u64,
    pub(super) entries: Vec<Place>,
    pub(super) deopt: Vec<Place>,
    pub(super) scopes: Scopes,
}

/// Offsets of the scopes of a compiled method.
#[derive(Clone, Debug)]
pub(super) enum Scopes {
    /// All in the blob: until 22.
    Inside { metadata: u64, pcs: u64, pcs_end: u64, data: u64 },
    /// In two blocks of memory: from 25 on.
    Outside { mutable: u64, relocation: u64, immutable: u64, immutable_size: u64, pcs: u64, data: u64 },
}

/// A method, its class and its texts.
#[derive(Clone, Debug)]
pub(super) struct MethodLayout {
    pub(super) bytes: u64,
    pub(super) constant: u64,
    pub(super) constant_bytes: u64,
    pub(super) pool: u64,
    pub(super) words: u64,
    pub(super) flags: u64,
    pub(super) has_lines: u32,
    pub(super) code_size: u64,
    pub(super) name: u64,
    pub(super) pool_bytes: u64,
    pub(super) holder: u64,
    /// In the pool, or in the class.
    pub(super) source_in_pool: bool,
    pub(super) source: u64,
    pub(super) class_name: u64,
    pub(super) symbol_length: u64,
    pub(super) symbol_body: u64,
}

impl Layout {
    /// Picks the places out of the virtual machine's own description.
    pub(super) fn new(structs: &Structs, major: u8) -> Result<Self, WhyNot> {
        let at = |kind, field| structs.offset(kind, field);
        let list = ["GrowableArrayBase", "GenericGrowableArray"];
        let list_length = list.iter().find_map(|kind| structs.find(kind, "_len"));
        Ok(Self {
            heaps: structs.address("CodeCache", "_heaps")?,
            list_length: list_length.ok_or(WhyNot::Implausible("_len"))?,
            list_data: at("GrowableArray<int>", "_data")?,
            heap_memory: at("CodeHeap", "_memory")?,
            heap_segments: at("CodeHeap", "_segmap")?,
            heap_log2_segment: at("CodeHeap", "_log2_segment_size")?,
            space_low: at("VirtualSpace", "_low")?,
            space_high: at("VirtualSpace", "_high")?,
            block_bytes: structs.size("HeapBlock")?,
            block_used: at("HeapBlock::Header", "_used")?,
            blob: Blob::new(structs)?,
            compiled: Compiled::new(structs)?,
            method: MethodLayout::new(structs)?,
            interpreter: structs.address("AbstractInterpreter", "_code")?,
            codelets: at("StubQueue", "_stub_buffer")?,
            codelets_end: at("StubQueue", "_queue_end")?,
            codelet_size: at("InterpreterCodelet", "_size")?,
            codelet_text: at("InterpreterCodelet", "_description")?,
            codelet_bytes: structs.size("InterpreterCodelet")?,
            call_stub: structs.address("StubRoutines", "_call_stub_return_address")?,
            without_zero: major >= 20,
        })
    }
}

impl Blob {
    fn new(structs: &Structs) -> Result<Self, WhyNot> {
        let at = |field| structs.offset("CodeBlob", field);
        let (code, code_end) = match structs.find("CodeBlob", "_code_begin") {
            Some(begin) => (Place::Address(begin), Place::Address(at("_code_end")?)),
            None => (Place::Offset(at("_code_offset")?), Place::Offset(at("_data_offset")?)),
        };
        Ok(Self {
            bytes: structs.size("CodeBlob")?,
            name: at("_name")?,
            size: at("_size")?,
            frame_size: at("_frame_size")?,
            frame_complete: at("_frame_complete_offset")?,
            frame_complete_is_short: matches!(code, Place::Offset(_)),
            code,
            code_end,
        })
    }
}

impl Compiled {
    fn new(structs: &Structs) -> Result<Self, WhyNot> {
        let either =
            |field: &str| structs.find("nmethod", field).or_else(|| structs.find("CompiledMethod", field));
        let at = |field: &'static str| either(field).ok_or(WhyNot::Implausible(field));
        let (entries, deopt, scopes) = if let Some(entry) = either("_entry_point") {
            let entries = [entry, at("_verified_entry_point")?, at("_osr_entry_point")?].map(Place::Address);
            let deopt = [at("_deopt_handler_begin")?, at("_deopt_mh_handler_begin")?].map(Place::Address);
            let scopes = Scopes::Inside {
                metadata: at("_metadata_offset")?,
                pcs: at("_scopes_pcs_offset")?,
                pcs_end: at("_dependencies_offset")?,
                data: at("_scopes_data_begin")?,
            };
            (entries, deopt, scopes)
        } else {
            let entries = [
                Place::FromCode(at("_entry_offset")?),
                Place::FromCode(at("_verified_entry_offset")?),
                Place::Address(at("_osr_entry_point")?),
            ];
            let deopt = [at("_deopt_handler_offset")?, at("_deopt_mh_handler_offset")?].map(Place::Offset);
            let scopes = Scopes::Outside {
                mutable: structs.offset("CodeBlob", "_mutable_data")?,
                relocation: structs.offset("CodeBlob", "_relocation_size")?,
                immutable: at("_immutable_data")?,
                immutable_size: at("_immutable_data_size")?,
                pcs: at("_scopes_pcs_offset")?,
                data: at("_scopes_data_offset")?,
            };
            (entries, deopt, scopes)
        };
        Ok(Self {
            bytes: structs.size("nmethod")?,
            method: at("_method")?,
            compile_id: at("_compile_id")?,
            orig_pc: at("_orig_pc_offset")?,
            entries: entries.to_vec(),
            deopt: deopt.to_vec(),
            scopes,
        })
    }
}

impl MethodLayout {
    fn new(structs: &Structs) -> Result<Self, WhyNot> {
        let constant = |field| structs.offset("ConstMethod", field);
        let in_pool = structs.find("ConstantPool", "_source_file_name_index");
        let source = match in_pool {
            Some(at) => at,
            None => structs.offset("InstanceKlass", "_source_file_name_index")?,
        };
        let flags = ["_flags", "_flags._flags"].iter().find_map(|name| structs.find("ConstMethod", name));
        let has_lines = structs
            .constant("ConstMethod::_has_linenumber_table")
            .or_else(|| structs.constant("ConstMethodFlags::_misc_has_linenumber_table"));
        Ok(Self {
            bytes: structs.size("Method")?,
            constant: structs.offset("Method", "_constMethod")?,
            constant_bytes: structs.size("ConstMethod")?,
            pool: constant("_constants")?,
            words: constant("_constMethod_size")?,
            flags: flags.ok_or(WhyNot::Implausible("_flags"))?,
            has_lines: has_lines.ok_or(WhyNot::Implausible("_has_linenumber_table"))?.cast_unsigned(),
            code_size: constant("_code_size")?,
            name: constant("_name_index")?,
            pool_bytes: structs.size("ConstantPool")?,
            holder: structs.offset("ConstantPool", "_pool_holder")?,
            source_in_pool: in_pool.is_some(),
            source,
            class_name: structs.offset("Klass", "_name")?,
            symbol_length: structs.offset("Symbol", "_length")?,
            symbol_body: structs.offset("Symbol", "_body[0]")?,
        })
    }
}
