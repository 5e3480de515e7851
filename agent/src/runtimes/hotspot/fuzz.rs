//! The readers of HotSpot on any memory, for the fuzzer.

use std::sync::Arc;

use super::{
    super::{
        CodeNeeds, Detected, GeneratedCode, Interpreter, Runtime as _, RuntimeFile,
        hostile::{Hostile, HostileThread, named},
    },
    HotSpot, MAX_READ_BYTES, MAX_READS,
    counts::Counts,
    heap::Heaps,
    layout::{Blob, Compiled, Layout, MethodLayout, Place, Scopes},
    method, perf_data,
    structs::SYMBOLS,
};

/// Address of the memory.
const AT: u64 = 0x1_0000;
/// Places in the memory, each as a number of words: program counter, stack and frame pointer, two more addresses in code, and a
/// method.
type Places = [u8; 6];
/// Reads and bytes of both requests of a run.
const MAX_CODE_READS: usize = 200_100;
const MAX_CODE_BYTES: usize = 17 << 20;

/// Attaches to a process with this memory, in which the symbols stand one behind the other.
pub fn java_structs(bytes: &[u8]) {
    let Some(([kind, major], bytes)) = bytes.split_first_chunk() else { return };
    if bytes.is_empty() {
        return;
    }
    let addresses = (0..SYMBOLS.len() as u64).map(|number| AT + 8 * number).collect();
    let file = file(11 + major % 16, addresses);
    let begin = (kind & 1 == 1).then_some(AT);
    let memory = Hostile::with_limits(bytes, begin, MAX_READS, MAX_READ_BYTES);
    let _ = HotSpot.attach(&file, 0, &memory);
}

/// Reads code and methods of a process with this memory, and unwinds a stack through them.
pub fn java_code(bytes: &[u8]) {
    let _ = unwind(bytes);
}

/// Decodes a table of lines, and finds the lines of all instructions.
pub fn java_lines(bytes: &[u8]) {
    let Some((kind, table)) = bytes.split_first() else { return };
    let lines = method::line_bytes(table, kind & 1 == 1);
    for position in (0..512).chain([u16::MAX.into(), u32::MAX, i32::MAX as u32]) {
        let _ = method::line_at(&lines, position);
    }
}

/// Finds the count of unloaded classes among counters.
pub fn java_counters(bytes: &[u8]) {
    let _ = perf_data::unloaded_in(bytes);
}

fn file(major: u8, addresses: Vec<u64>) -> RuntimeFile {
    let detected = Detected { version: (major, 0), version_text: String::new(), addresses, layout: 0 };
    RuntimeFile { runtime: &HotSpot, detected }
}

/// Returns the functions of the stack, innermost first, with their lines.
fn unwind(bytes: &[u8]) -> Option<Vec<String>> {
    let ([kind, places @ ..], bytes) = bytes.split_first_chunk::<7>()?;
    if bytes.is_empty() {
        return None;
    }
    let places: Places = *places;
    let [pc, sp, fp, first, second, object] = places.map(|words| AT + 8 * u64::from(words));
    let begin = (kind & 1 == 1).then_some(AT);
    let memory = Hostile::with_limits(bytes, begin, MAX_CODE_READS, MAX_CODE_BYTES);
    let code = GeneratedCode::new(Arc::new(Heaps::new(layout(*kind), counts(*kind))));
    let interpreter = Interpreter::new(Arc::new(file(17, Vec::new())), 0).with_code(code);
    let code = interpreter.code.as_ref()?;
    let mut needs = CodeNeeds {
        addresses: [pc, first, second].into(),
        functions: [(object, 0)].into(),
        ..CodeNeeds::default()
    };
    let thread =
        HostileThread::new(pc, sp, fp, [0, 0, 0, object, 0, 0, 0, 0, 0, 0, 0, 0, 0, first, 0, 0], &memory);
    let mut frames = Vec::new();
    for _ in 0..2 {
        needs.add(code.candidates(&thread.stack));
        if code.read(&needs, &interpreter, &memory).is_err() {
            return None;
        }
        (frames, needs) = thread.unwind(code);
    }
    let names = named(&frames, &interpreter).into_iter();
    Some(names.map(|(name, _, line)| format!("{name} {line}")).collect())
}

/// Counts that are any words of the memory.
fn counts(kind: u8) -> Counts {
    let at = |bit: u8, address: u64| (kind & bit == 0).then_some(address);
    Counts {
        unloaded: at(64, AT + 24),
        safepoints: at(64, AT + 32),
        redefinitions: at(128, AT + 40),
        can_redefine: at(1, AT + 48),
    }
}

/// Structures as small as they can be. The bits of `kind` choose among the forms of the versions.
fn layout(kind: u8) -> Layout {
    let scopes = if kind & 4 == 0 {
        Scopes::Inside { metadata: 120, pcs: 124, pcs_end: 128, data: 136 }
    } else {
        Scopes::Outside {
            mutable: 120,
            relocation: 128,
            immutable: 136,
            immutable_size: 144,
            pcs: 148,
            data: 152,
        }
    };
    let (code, code_end) = if kind & 8 == 0 {
        (Place::Address(24), Place::Address(32))
    } else {
        (Place::Offset(24), Place::Offset(32))
    };
    let entry = if kind & 16 == 0 { Place::Address(80) } else { Place::FromCode(80) };
    Layout {
        heaps: AT,
        list_length: 0,
        list_data: 8,
        heap_memory: 0,
        heap_segments: 16,
        heap_log2_segment: 32,
        space_low: 0,
        space_high: 8,
        block_bytes: 16,
        block_used: 8,
        blob: Blob {
            bytes: 64,
            name: 0,
            size: 8,
            frame_size: 12,
            frame_complete: 16,
            frame_complete_is_short: kind & 8 != 0,
            code,
            code_end,
        },
        compiled: Compiled {
            bytes: 160,
            method: 64,
            compile_id: 72,
            orig_pc: 76,
            entries: vec![entry, Place::Address(88)],
            deopt: vec![Place::Address(104)],
            scopes,
        },
        method: MethodLayout {
            bytes: 16,
            constant: 8,
            constant_bytes: 32,
            pool: 8,
            words: 16,
            flags: 20,
            has_lines: 1,
            code_size: 24,
            name: 26,
            pool_bytes: 32,
            holder: 8,
            source_in_pool: kind & 32 == 0,
            source: 16,
            class_name: 0,
            symbol_length: 0,
            symbol_body: 2,
        },
        interpreter: AT + 8,
        codelets: 0,
        codelets_end: 8,
        codelet_size: 0,
        codelet_text: 8,
        codelet_bytes: 16,
        call_stub: AT + 16,
        without_zero: kind & 2 != 0,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// The kept input is a compiled method whose frame stands for two functions, and its caller in the interpreter's way.
    #[test]
    fn a_compiled_method_shows_the_methods_inlined_in_it() {
        let input = include_bytes!("../../../../fuzz/corpus/java_code/inlined");
        assert_eq!(unwind(input).unwrap(), ["Cart.sum 7", "Cart.run 12"]);
    }

    #[test]
    fn the_end_of_a_method_shows_its_last_position() {
        let mut input = *include_bytes!("../../../../fuzz/corpus/java_code/inlined");
        // Behind the last description.
        input[1] += 1;
        assert_eq!(unwind(&input).unwrap(), ["Cart.run 12"]);
    }
}
