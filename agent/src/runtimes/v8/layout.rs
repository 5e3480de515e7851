//! Where the objects of one version keep what names a function.

use super::super::{Memory, WhyNot};

/// The number of [`SYMBOLS`] that is the table of the sizes of bytecodes.
pub(super) const BYTECODE_SIZES: usize = 1;
const V8_MAJOR: usize = 0;
const V8_MINOR: usize = 2;
/// The first symbol that describes objects.
const FIRST: usize = 3;

/// Symbols of the file.
pub(super) const SYMBOLS: [&str; 37] = [
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
    "v8dbg_class_SharedFunctionInfo__function_data__Object",
    "v8dbg_class_SharedFunctionInfo__name_or_scope_info__Object",
    "v8dbg_class_SharedFunctionInfo__script_or_debug_info__HeapObject",
    "v8dbg_class_Script__name__Object",
    "v8dbg_class_Script__source__Object",
    "v8dbg_class_BytecodeArray__data__uintptr_t",
    "v8dbg_class_String__length__int32_t",
    "v8dbg_class_SeqOneByteString__chars__char",
    "v8dbg_class_FixedArray__data__uintptr_t",
    "v8dbg_class_ExternalString__resource__Object",
    "v8dbg_CodeKindFieldMask",
    "v8dbg_CodeKindBaseline",
    "v8dbg_DeoptimizationDataLiteralArrayIndex",
    "v8dbg_DeoptimizationDataSharedFunctionInfoIndex",
    "v8dbg_DeoptimizationDataInliningPositionsIndex",
    "v8dbg_type_BytecodeArray__BYTECODE_ARRAY_TYPE",
    "v8dbg_type_SharedFunctionInfo__SHARED_FUNCTION_INFO_TYPE",
    "v8dbg_type_Script__SCRIPT_TYPE",
    "v8dbg_type_ScopeInfo__SCOPE_INFO_TYPE",
    "v8dbg_type_InterpreterData__INTERPRETER_DATA_TYPE",
    "v8dbg_type_Code__CODE_TYPE",
    "v8dbg_type_JSFunction__JS_FUNCTION_TYPE",
    "v8dbg_type_FixedArray__FIXED_ARRAY_TYPE",
    "v8dbg_type_Map__MAP_TYPE",
];

/// Distances in bytes from the begin of an object, and numbers of types.
#[derive(Clone, Debug)]
pub(super) struct Layout {
    pub(super) frame: Frame,
    pub(super) instance_type: u64,
    pub(super) shared: u64,
    pub(super) function_data: u64,
    pub(super) name_or_scope: u64,
    pub(super) script: u64,
    pub(super) script_name: u64,
    pub(super) script_source: u64,
    /// The descriptions of all functions of a script.
    pub(super) script_functions: u64,
    /// Of the first bytecode.
    pub(super) bytecode: u64,
    pub(super) bytecode_positions: u64,
    pub(super) string_length: u64,
    pub(super) chars: u64,
    pub(super) elements: u64,
    pub(super) external_data: u64,
    pub(super) code: CodeLayout,
    pub(super) kind_mask: u32,
    pub(super) baseline: u32,
    pub(super) literals: u64,
    pub(super) optimized_function: u64,
    pub(super) inlining: u64,
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

/// The description of compiled code, which the code refers to.
#[derive(Clone, Copy, Debug)]
pub(super) struct CodeLayout {
    /// From the instructions' object: the reference to the description, and the first instruction.
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
    pub(super) array: u16,
    pub(super) map: u16,
    /// Arrays of bytes: the number before that of bytecode.
    pub(super) bytes: u16,
}

impl CodeLayout {
    /// Returns the layout of a version of V8. Objects of other versions look different where no symbol says so.
    fn of(version: (i32, i32)) -> Result<Self, WhyNot> {
        match version {
            (11, 3) => Ok(Self {
                reference: 8,
                header: 16,
                data: 16,
                positions: 24,
                stream: 32,
                start: 40,
                flags: 48,
                size: 56,
                bytes: 64,
            }),
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
        let code = CodeLayout::of((value(V8_MAJOR)?, value(V8_MINOR)?))?;
        let mut values = [0; SYMBOLS.len() - FIRST];
        for (at, slot) in values.iter_mut().enumerate() {
            *slot = value(FIRST + at)?;
        }
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
            function_data,
            name_or_scope,
            script,
            script_name,
            script_source,
            bytecode,
            string_length,
            chars,
            elements,
            resource,
            kind_mask,
            baseline,
            literals,
            optimized_function,
            inlining,
            types @ ..,
        ] = values;
        // Compressed pointers need another reader.
        if (tagged, smi_shift + smi_value_shift, tag) != (8, 32, 1) {
            return Err(WhyNot::Version);
        }
        let in_object = |distance: i32| {
            u64::try_from(distance).ok().filter(|at| *at < 512).ok_or(WhyNot::Implausible("odd distances"))
        };
        let in_frame = |distance: i32| {
            let is_slot = (-256..0).contains(&distance) && distance % 8 == 0;
            is_slot.then_some(i64::from(distance)).ok_or(WhyNot::Implausible("frames of another shape"))
        };
        let bytecode_sizes = addresses.get(SYMBOLS.len()).copied().unwrap_or(0).min(3 * 256) as usize;
        let table = addresses.get(BYTECODE_SIZES).copied().unwrap_or(0);
        let [bytecode_type, shared_type, script_type, scope, interpreter_data, code_type, js, array, map] =
            types.map(|number| number as u16);
        Ok(Self {
            frame: Frame {
                marker: in_frame(marker)?,
                function: in_frame(function)?,
                bytecode: in_frame(bytecode_slot)?,
                offset: in_frame(offset)?,
            },
            instance_type: in_object(instance_type)?,
            shared: in_object(shared)?,
            function_data: in_object(function_data)?,
            name_or_scope: in_object(name_or_scope)?,
            script: in_object(script)?,
            script_name: in_object(script_name)?,
            script_source: in_object(script_source)?,
            // Behind the place of the call of `eval`.
            script_functions: 88,
            bytecode: in_object(bytecode)?,
            // Behind the pool of constants and the table of handlers.
            bytecode_positions: 32,
            string_length: in_object(string_length)?,
            chars: in_object(chars)?,
            elements: in_object(elements)?,
            external_data: in_object(resource)? + 8,
            code,
            kind_mask: kind_mask.cast_unsigned(),
            baseline: baseline.cast_unsigned(),
            literals: in_object(literals)?,
            optimized_function: in_object(optimized_function)?,
            inlining: in_object(inlining)?,
            types: Types {
                bytecode: bytecode_type,
                shared: shared_type,
                script: script_type,
                scope,
                interpreter_data,
                code: code_type,
                function: js,
                array,
                map,
                bytes: bytecode_type.wrapping_sub(1),
            },
            bytecode_sizes: memory.bytes(table.wrapping_add(bias), bytecode_sizes)?,
        })
    }
}
