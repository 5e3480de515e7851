//! Where the objects of one version keep what names a function.

use super::{
    super::{Memory, WhyNot},
    lines::Steps,
    moves::HeapLayout,
};

/// The number of [`SYMBOLS`] that is the table of the sizes of bytecodes.
pub(super) const BYTECODE_SIZES: usize = 1;
const V8_MAJOR: usize = 0;
const V8_MINOR: usize = 2;
/// The first symbol that describes objects, and the number of those that do.
const FIRST: usize = 3;
pub(super) const VALUES: usize = SYMBOLS.len() - FIRST;
/// The value of a symbol that a version does not have.
pub(super) const ABSENT: i32 = -1;

/// Symbols of the file.
pub(super) const SYMBOLS: [&str; 36] = [
    "_ZN2v88internal7Version6major_E",
    "_ZN2v88internal11interpreter9Bytecodes14kBytecodeSizesE",
    "_ZN2v88internal7Version6minor_E",
    "v8dbg_TaggedSize",
    "v8dbg_SmiShiftSize",
    "v8dbg_SmiValueShift",
    "v8dbg_HeapObjectTag",
    "v8dbg_off_fp_context_or_frame_type",
    "v8dbg_off_fp_function",
    "v8dbg_off_fp_bytecode_array",
    "v8dbg_off_fp_bytecode_offset",
    "v8dbg_class_Map__instance_type__uint16_t",
    "v8dbg_class_JSFunction__shared__SharedFunctionInfo",
    "v8dbg_class_Script__name__Object",
    "v8dbg_class_Script__source__Object",
    "v8dbg_class_BytecodeArray__data__uintptr_t",
    "v8dbg_class_String__length__int32_t",
    "v8dbg_class_SeqOneByteString__chars__char",
    "v8dbg_class_FixedArray__data__uintptr_t",
    "v8dbg_class_ExternalString__resource__Object",
    "v8dbg_CodeKindFieldMask",
    "v8dbg_CodeKindBaseline",
    "v8dbg_type_BytecodeArray__BYTECODE_ARRAY_TYPE",
    "v8dbg_type_SharedFunctionInfo__SHARED_FUNCTION_INFO_TYPE",
    "v8dbg_type_Script__SCRIPT_TYPE",
    "v8dbg_type_ScopeInfo__SCOPE_INFO_TYPE",
    "v8dbg_type_InterpreterData__INTERPRETER_DATA_TYPE",
    "v8dbg_type_Code__CODE_TYPE",
    "v8dbg_type_JSFunction__JS_FUNCTION_TYPE",
    "v8dbg_type_Map__MAP_TYPE",
    "v8dbg_type_FixedArray__FIXED_ARRAY_TYPE",
    "v8dbg_type_ByteArray__BYTE_ARRAY_TYPE",
    "v8dbg_type_TrustedFixedArray__TRUSTED_FIXED_ARRAY_TYPE",
    "v8dbg_type_TrustedByteArray__TRUSTED_BYTE_ARRAY_TYPE",
    "v8dbg_type_ProtectedFixedArray__PROTECTED_FIXED_ARRAY_TYPE",
    "v8dbg_type_SharedFunctionInfoWrapper__SHARED_FUNCTION_INFO_WRAPPER_TYPE",
];
/// How many of the last symbols not all versions have.
const OPTIONAL: usize = 4;

/// Distances in bytes from the begin of an object, and numbers of types.
#[derive(Clone, Debug)]
pub(super) struct Layout {
    pub(super) frame: Frame,
    pub(super) instance_type: u64,
    pub(super) shared: u64,
    pub(super) script_name: u64,
    pub(super) script_source: u64,
    /// Of the first bytecode.
    pub(super) bytecode: u64,
    pub(super) string_length: u64,
    pub(super) chars: u64,
    pub(super) elements: u64,
    pub(super) external_data: u64,
    pub(super) version: VersionLayout,
    pub(super) kind_mask: u32,
    pub(super) baseline: u32,
    pub(super) types: Types,
    /// The sizes of bytecodes: without, with the first and with the second prefix.
    pub(super) bytecode_sizes: Vec<u8>,
}

/// Distances from the frame pointer.
#[derive(Clone, Copy, Debug)]
pub(super) struct Frame {
    pub(super) marker: i64,
    pub(super) function: i64,
    pub(super) bytecode: i64,
    pub(super) offset: i64,
}

/// Distances and numbers that no symbol says, or one of a name that changes.
#[derive(Clone, Copy, Debug)]
pub(super) struct VersionLayout {
    /// In the shared description of a function.
    pub(super) function_data: u64,
    pub(super) name_or_scope: u64,
    pub(super) script: u64,
    /// The number of a script, and the descriptions of all its functions.
    pub(super) script_number: u64,
    pub(super) script_functions: u64,
    /// The table of positions of bytecode.
    pub(super) bytecode_positions: u64,
    /// In tables of positions.
    pub(super) steps: Steps,
    pub(super) scope: ScopeLayout,
    pub(super) code: CodeLayout,
    pub(super) heap: HeapLayout,
    /// Names are given only if the heap's counts prove them. Else a name may be wrong if the collector compacts the heap between a
    /// sample and its reading. Then programs that collect fully keep nearly all names: with a proof, a collection each second took
    /// half of them and more, on a machine with several times the load of its cores.
    pub(super) needs_proof: bool,
    /// Numbers of elements of what optimized code knows.
    pub(super) literals: u64,
    pub(super) optimized_function: u64,
    pub(super) inlining: u64,
}

/// The description of a function's variables.
#[derive(Clone, Copy, Debug)]
pub(super) struct ScopeLayout {
    /// The flags are not a small integer of the engine, but a plain number.
    pub(super) has_plain_flags: bool,
    pub(super) module: u32,
    /// The number of the word that says where the function begins, if it is before the variables.
    pub(super) start: Option<usize>,
    /// The number of the first word of the variables.
    pub(super) variables: u64,
}

/// The description of compiled code.
#[derive(Clone, Copy, Debug)]
pub(super) struct CodeLayout {
    /// The instructions are in the description; else in an object of their own that refers to it.
    pub(super) is_inside: bool,
    /// From the object with the instructions: a reference, that to the description if they are not in it, and the first instruction.
    pub(super) reference: u64,
    pub(super) header: u64,
    /// In the description.
    pub(super) data: u64,
    pub(super) positions: u64,
    pub(super) stream: u64,
    pub(super) start: u64,
    pub(super) flags: u64,
    pub(super) size: u64,
    pub(super) bytes: usize,
}

#[derive(Clone, Copy, Debug)]
pub(super) struct Types {
    pub(super) bytecode: u16,
    pub(super) shared: u16,
    pub(super) script: u16,
    pub(super) scope: u16,
    pub(super) interpreter_data: u16,
    pub(super) code: u16,
    pub(super) function: u16,
    pub(super) map: u16,
    /// Arrays of the facts that optimized code keeps, and tables of positions.
    pub(super) array: u16,
    pub(super) bytes: u16,
    /// Holds a reference to a function's shared description. Not all versions have it.
    pub(super) wrapper: Option<u16>,
}

const SCOPE: ScopeLayout = ScopeLayout { has_plain_flags: false, module: 3, start: None, variables: 4 };
const CODE: CodeLayout = CodeLayout {
    is_inside: false,
    reference: 8,
    header: 32,
    data: 8,
    positions: 16,
    stream: 32,
    start: 40,
    flags: 48,
    size: 52,
    bytes: 64,
};
const NODE_20: VersionLayout = VersionLayout {
    function_data: 8,
    name_or_scope: 16,
    script: 32,
    script_number: 64,
    script_functions: 88,
    bytecode_positions: 32,
    steps: Steps::Signed,
    scope: SCOPE,
    code: CodeLayout { header: 16, data: 16, positions: 24, size: 56, ..CODE },
    heap: HeapLayout { path: &[0x10], collections: 0x240, state: 0x228 },
    needs_proof: false,
    literals: 2,
    optimized_function: 6,
    inlining: 7,
};
const NODE_18: VersionLayout = VersionLayout {
    code: CodeLayout { is_inside: true, reference: 32, header: 128, size: 40, ..NODE_20.code },
    heap: HeapLayout { path: &[0x10], collections: 0x268, state: 0x240 },
    ..NODE_20
};
const NODE_22: VersionLayout = VersionLayout {
    bytecode_positions: 24,
    code: CODE,
    heap: HeapLayout { path: &[0x18], collections: 0x1b0, state: 0x198 },
    ..NODE_20
};
const NODE_24: VersionLayout = VersionLayout {
    name_or_scope: 24,
    script: 40,
    scope: ScopeLayout { has_plain_flags: true, module: 5, start: Some(4), variables: 6 },
    code: CodeLayout { flags: 52, size: 56, ..CODE },
    heap: HeapLayout { path: &[8, 0x40], collections: 0x238, state: 0x220 },
    needs_proof: true,
    literals: 3,
    optimized_function: 7,
    inlining: 8,
    ..NODE_22
};
const NODE_26: VersionLayout = VersionLayout {
    steps: Steps::Flagged,
    heap: HeapLayout { path: &[8, 0x40], collections: 0x240, state: 0x228 },
    needs_proof: false,
    ..NODE_24
};

impl VersionLayout {
    /// Returns the layout of a version of V8 whose sampled stacks are those that programs print. Others look different where no
    /// symbol says so.
    fn of(version: (i32, i32)) -> Result<Self, WhyNot> {
        match version {
            (10, 2) => Ok(NODE_18),
            (11, 3) => Ok(NODE_20),
            (12, 4) => Ok(NODE_22),
            (13, 6) => Ok(NODE_24),
            (14, 6) => Ok(NODE_26),
            _ => Err(WhyNot::Version),
        }
    }
}

impl Layout {
    /// Reads the symbols of a process. `addresses` has those of [`SYMBOLS`], and the bytes of the table of bytecodes.
    pub(super) fn read(addresses: &[u64], bias: u64, memory: &dyn Memory) -> Result<Self, WhyNot> {
        let value = |number: usize| -> Result<i32, WhyNot> {
            let at = addresses.get(number).copied().filter(|at| *at != 0).ok_or(WhyNot::Version)?;
            memory.array(at.wrapping_add(bias)).map(i32::from_ne_bytes)
        };
        let version = (value(V8_MAJOR)?, value(V8_MINOR)?);
        // Before what else the symbols say: those of another version may lack some.
        VersionLayout::of(version)?;
        let mut values = [0; VALUES];
        for (at, slot) in values.iter_mut().enumerate() {
            let is_optional = at >= VALUES - OPTIONAL;
            *slot = match value(FIRST + at) {
                Err(WhyNot::Version) if is_optional => ABSENT,
                value => value?,
            };
        }
        let size = addresses.get(SYMBOLS.len()).copied().unwrap_or(0).min(3 * 256) as usize;
        let table = addresses.get(BYTECODE_SIZES).copied().unwrap_or(0);
        Self::of(version, values, memory.bytes(table.wrapping_add(bias), size)?)
    }

    /// Returns the layout of a version of V8, whose symbols from [`FIRST`] on have these values.
    pub(super) fn of(
        version: (i32, i32),
        values: [i32; VALUES],
        bytecode_sizes: Vec<u8>,
    ) -> Result<Self, WhyNot> {
        let version = VersionLayout::of(version)?;
        let [
            tagged,
            smi_shift,
            smi_value_shift,
            tag,
            marker,
            function,
            bytecode_slot,
            offset,
            instance_type,
            shared,
            script_name,
            script_source,
            bytecode,
            string_length,
            chars,
            elements,
            resource,
            kind_mask,
            baseline,
            types @ ..,
        ] = values;
        // Compressed pointers need another reader.
        if (tagged, smi_shift.saturating_add(smi_value_shift), tag) != (8, 32, 1) {
            return Err(WhyNot::Version);
        }
        let in_object = |distance: i32| {
            u64::try_from(distance).ok().filter(|at| *at < 512).ok_or(WhyNot::Implausible("odd distances"))
        };
        let in_frame = |distance: i32| {
            let is_slot = (-256..0).contains(&distance) && distance % 8 == 0;
            is_slot.then_some(i64::from(distance)).ok_or(WhyNot::Implausible("frames of another shape"))
        };
        let [
            bytecode_type,
            shared_type,
            script_type,
            scope,
            interpreter_data,
            code_type,
            js,
            map,
            array,
            bytes,
            trusted_array,
            trusted_bytes,
            protected_array,
            wrapper,
        ] = types.map(|number| u16::try_from(number).ok());
        let needed = |number: Option<u16>| number.ok_or(WhyNot::Implausible("odd types"));
        // Newer versions keep what optimized code knows apart from what a program may write to, and the newest still more so.
        let array = if wrapper.is_some() { protected_array } else { trusted_array.or(array) };
        Ok(Self {
            frame: Frame {
                marker: in_frame(marker)?,
                function: in_frame(function)?,
                bytecode: in_frame(bytecode_slot)?,
                offset: in_frame(offset)?,
            },
            instance_type: in_object(instance_type)?,
            shared: in_object(shared)?,
            script_name: in_object(script_name)?,
            script_source: in_object(script_source)?,
            bytecode: in_object(bytecode)?,
            string_length: in_object(string_length)?,
            chars: in_object(chars)?,
            elements: in_object(elements)?,
            external_data: in_object(resource)? + 8,
            version,
            kind_mask: kind_mask.cast_unsigned(),
            baseline: baseline.cast_unsigned(),
            types: Types {
                bytecode: needed(bytecode_type)?,
                shared: needed(shared_type)?,
                script: needed(script_type)?,
                scope: needed(scope)?,
                interpreter_data: needed(interpreter_data)?,
                code: needed(code_type)?,
                function: needed(js)?,
                map: needed(map)?,
                array: needed(array)?,
                bytes: needed(trusted_bytes.or(bytes))?,
                wrapper,
            },
            bytecode_sizes,
        })
    }
}
