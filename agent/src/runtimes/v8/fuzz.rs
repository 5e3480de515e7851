//! The readers of V8 on any memory, for the fuzzer.

use std::sync::Arc;

use super::{
    super::{
        CodeNeeds, Detected, GeneratedCode, Interpreter, Runtime as _, RuntimeFile,
        hostile::{Hostile, HostileThread, named},
    },
    MAX_READ_BYTES, MAX_READS, V8,
    code::{Builtin, Isolates},
    layout::{ABSENT, Layout, SYMBOLS, VALUES},
    lines::{self, Steps},
};

/// Address of the memory, where a page of V8 begins.
const AT: u64 = 0x4_0000;
/// Places in the memory, each as a number of words: program counter, stack and frame pointer, begin and length of a builtin.
type Places = [u8; 5];
const REQUESTS: usize = 4;
/// Reads and bytes of all requests of a run, with those of the counts of all heaps.
const MAX_CODE_READS: usize = REQUESTS * 100_400;
const MAX_CODE_BYTES: usize = REQUESTS * (9 << 20);
/// Bytes of the table of bytecodes, in the memory behind the symbols.
const BYTECODE_BYTES: u64 = 24;
/// The version of V8, and what the symbols of its objects say.
type Version = ((i32, i32), [i32; VALUES]);
const VERSIONS: &[Version] = &[
    (
        (11, 3),
        [
            8, 31, 1, 1, -8, -16, -32, -40, 12, 24, 16, 8, 54, 12, 16, 16, 16, 15, 11, 191, 262, 167, 261,
            159, 245, 2066, 255, 175, 190, ABSENT, ABSENT, ABSENT, ABSENT,
        ],
    ),
    (
        (10, 2),
        [
            8, 31, 1, 1, -8, -16, -32, -40, 12, 24, 16, 8, 56, 12, 16, 16, 16, 15, 11, 195, 257, 170, 256,
            162, 240, 2065, 250, 179, 194, ABSENT, ABSENT, ABSENT, ABSENT,
        ],
    ),
    (
        (12, 4),
        [
            8, 31, 1, 1, -8, -16, -32, -40, 12, 32, 16, 8, 64, 12, 16, 16, 16, 15, 10, 205, 274, 167, 272,
            207, 206, 2066, 264, 174, 186, 213, 212, 211, ABSENT,
        ],
    ),
    (
        (13, 6),
        [
            8, 31, 1, 1, -8, -16, -32, -40, 12, 32, 16, 8, 64, 12, 16, 16, 16, 15, 10, 186, 282, 167, 280,
            188, 187, 2065, 272, 205, 217, 197, 196, 193, 195,
        ],
    ),
    (
        (14, 6),
        [
            8, 31, 1, 1, -8, -16, -32, -40, 12, 32, 16, 8, 64, 12, 16, 16, 16, 15, 11, 185, 288, 166, 286,
            187, 186, 2066, 278, 205, 218, 197, 196, 193, 195,
        ],
    ),
];

/// Attaches to a process with this memory, in which the values of the symbols stand one behind the other.
pub fn v8_layout(bytes: &[u8]) {
    let Some((kind, bytes)) = bytes.split_first() else { return };
    if bytes.is_empty() {
        return;
    }
    let begin = (kind & 1 == 1).then_some(AT);
    let memory = Hostile::with_limits(bytes, begin, MAX_READS, MAX_READ_BYTES);
    let _ = V8.attach(&file(), 0, &memory);
}

/// Reads code and functions of a process with this memory, and unwinds a stack through them.
pub fn v8_code(bytes: &[u8]) {
    let _ = unwind(bytes);
}

/// Decodes a table of positions, and finds those of all instructions.
pub fn v8_lines(bytes: &[u8]) {
    let Some((kind, bytes)) = bytes.split_first() else { return };
    let steps = if kind & 1 == 0 { Steps::Signed } else { Steps::Flagged };
    let found = lines::positions(bytes, steps);
    assert!(found.is_sorted_by_key(|(from, _)| *from), "{found:?}");
    let entries = || found.iter().filter_map(|(from, position)| Some((*from, position.offset?)));
    let table = lines::table(entries());
    for offset in (0..256).chain([u16::MAX.into(), u32::MAX - 1, u32::MAX]) {
        let last = entries().take_while(|(from, _)| *from <= offset).last();
        assert_eq!(lines::line_at(&table, offset), last.map_or(0, |(_, line)| line), "at {offset}");
        let position = lines::position_at(&found, offset);
        assert!(position.is_none_or(|position| found.iter().any(|(_, known)| *known == position)));
        let _ = lines::line_at(bytes, offset);
    }
}

fn file() -> RuntimeFile {
    let mut addresses: Vec<u64> = (0..SYMBOLS.len() as u64).map(|number| AT + 4 * number).collect();
    addresses.push(BYTECODE_BYTES);
    addresses.extend([AT, AT + 64, 1]);
    let detected = Detected { version: (20, 0), version_text: String::new(), addresses, layout: 0 };
    RuntimeFile { runtime: &V8, detected }
}

/// Returns the functions of the stack, innermost first, with their lines.
fn unwind(bytes: &[u8]) -> Option<Vec<String>> {
    let ([kind, places @ ..], bytes) = bytes.split_first_chunk::<6>()?;
    if bytes.is_empty() {
        return None;
    }
    let places: Places = *places;
    let [pc, sp, fp, builtin, _] = places.map(|words| AT + 8 * u64::from(words));
    let builtin = Builtin { code: builtin..builtin + 8 * u64::from(places[4]), is_interpreter: true };
    let begin = (kind & 1 == 1).then_some(AT);
    let memory = Hostile::with_limits(bytes, begin, MAX_CODE_READS, MAX_CODE_BYTES);
    let (version, values) = VERSIONS[usize::from(kind >> 1) % VERSIONS.len()];
    let mut layout = Layout::of(version, values, vec![2; BYTECODE_BYTES as usize]).ok()?;
    layout.version.needs_proof = true;
    let code = GeneratedCode::new(Arc::new(Isolates::new(layout, vec![builtin])));
    let interpreter = Interpreter::new(Arc::new(file()), 0).with_code(code);
    let code = interpreter.code.as_ref()?;
    let mut needs = CodeNeeds { addresses: [pc].into(), ..CodeNeeds::default() };
    let thread = HostileThread::new(pc, sp, fp, [0; 16], &memory);
    let mut frames = Vec::new();
    for _ in 0..REQUESTS {
        if code.read(&needs, &interpreter, &memory).is_err() {
            return None;
        }
        (frames, needs) = thread.unwind(code);
    }
    let names = named(&frames, &interpreter).into_iter();
    Some(names.map(|(name, file, line)| format!("{name} {file}:{line}")).collect())
}

#[cfg(test)]
mod tests {
    use super::*;

    // Objects of the program below, from the begin of the memory.
    const FUNCTION: usize = 0x240;
    const SUM: usize = 0x260;
    const RUN: usize = 0x2a0;
    const SCRIPT_FUNCTIONS: usize = 0x2e0 + 88;
    const CODE: usize = 0x380;
    const INLINED: usize = 0x430;
    const STATE: usize = 0x5e8;
    const COUNTS: usize = 0x600;
    /// From an object of a function to its shared description, and from that to its bytecode.
    const SHARED: usize = 24;
    const DATA: usize = 8;

    /// A process that was stopped in optimized code: `sum` is inlined in `run`, which an interpreted frame of `run` has called.
    struct Program(Vec<u8>);

    impl Program {
        fn node_20() -> Self {
            const START: usize = 0x140;
            const BUILTIN: usize = 0x180;
            const PROLOGUE: u64 = u64::from_le_bytes([0x55, 0x48, 0x89, 0xe5, 0x90, 0x90, 0x90, 0x90]);
            const NOPS: u64 = u64::from_le_bytes([0x90; 8]);
            let smi = |number: u64| number << 32;
            let [map, code, shared, script, scope, bytecode, bytes, array, function, text] =
                [0, 0x5d0, 0x20, 0x30, 0x40, 0x50, 0x60, 0x70, 0x80, 0x90];
            let mut program = Self(vec![0; 0x620]);
            let types: [(usize, u64); 10] = [
                (map, 255),
                (code, 245),
                (shared, 262),
                (script, 167),
                (scope, 261),
                (bytecode, 191),
                (bytes, 190),
                (array, 175),
                (function, 2066),
                (text, 8),
            ];
            for (of, number) in types {
                program.words(of, &[reference(map), number << 32]);
            }
            // The page leads to its heap, whose counts and state of the collector are in the last words.
            program.words(0x10, &[AT + COUNTS as u64 - 0x240]);
            let [source, file, sum, more] = [0x4a0, 0x4c0, 0x4e0, 0x500];
            let [of_code, of_bytecode, parts, literals, names, other] =
                [0x450, 0x470, 0x3c0, 0x410, 0x520, 0x5a0];
            // The instructions, behind their description's reference.
            program.words(START - 16, &[reference(code), reference(CODE), PROLOGUE]);
            program.words(START + 8, &[NOPS; 7]);
            program.words(BUILTIN, &[PROLOGUE, NOPS, NOPS, NOPS, NOPS, NOPS, NOPS, NOPS]);
            // The stack: a saved frame pointer and a return address; offset, bytecode, arguments, function and context.
            program.words(0x1d0, &[AT + 0x220, AT + BUILTIN as u64 + 24]);
            program.words(0x1f8, &[smi(53 + 5), reference(0x340), 0, reference(FUNCTION), reference(0x340)]);
            program.words(FUNCTION, &[reference(function), 0, 0, reference(RUN)]);
            program.words(SUM, &[reference(shared), reference(other), reference(sum), 0, reference(0x2e0)]);
            program.words(RUN, &[reference(shared), reference(0x340), reference(names), 0, reference(0x2e0)]);
            program.words(0x2e0, &[reference(script), reference(source), reference(file), 0]);
            program.words(SCRIPT_FUNCTIONS, &[reference(more)]);
            program.words(more, &[reference(array), smi(2), reference(SUM), reference(RUN)]);
            let positions = |at: usize| [reference(bytecode), smi(2), 0, 0, reference(at)];
            program.words(0x340, &positions(of_bytecode));
            program.words(other, &positions(of_bytecode));
            let start = AT + START as u64;
            let description = [reference(parts), reference(of_code), reference(START - 16), start, 12, 64];
            program.words(CODE, &[reference(code), 0]);
            program.words(CODE + 16, &description);
            // Literals, the function itself, and what is inlined.
            let parts_words = [0, 0, reference(literals), 0, 0, 0, reference(RUN), reference(INLINED)];
            program.words(parts, &[reference(array), smi(8)]);
            program.words(parts + 16, &parts_words);
            program.words(literals, &[reference(array), smi(1), reference(SUM)]);
            // `sum` was called at character 14, and is the first literal.
            program.words(INLINED, &[reference(bytes), smi(16), 15 << 1, 0]);
            // From the begin on: character 4 of the function that was inlined first.
            program.text(of_code, bytes, &positions_at(&[(0, 1 << 31 | 5 << 1)]));
            // Character 0 from the begin on, 14 from offset 3 on.
            program.text(of_bytecode, bytes, &positions_at(&[(0, 1 << 1), (3, 15 << 1)]));
            program.string(source, text, "sum\nbody\n\nrun sum()");
            program.string(file, text, "file:///cart.js");
            program.string(sum, text, "sum");
            program.string(0x580, text, "run");
            // A scope with the function's variable, and where it begins.
            program.words(names, &[reference(scope), smi(3 << 12), 0, smi(0), reference(0x580), 0, smi(10)]);
            program
        }

        fn words(&mut self, at: usize, words: &[u64]) {
            for (number, word) in words.iter().enumerate() {
                self.0[at + 8 * number..][..8].copy_from_slice(&word.to_le_bytes());
            }
        }

        fn text(&mut self, at: usize, map: usize, bytes: &[u8]) {
            self.words(at, &[reference(map), (bytes.len() as u64) << 32]);
            self.0[at + 16..][..bytes.len()].copy_from_slice(bytes);
        }

        fn string(&mut self, at: usize, map: usize, text: &str) {
            self.text(at, map, text.as_bytes());
        }

        /// Returns the input of the fuzzer.
        fn input(&self) -> Vec<u8> {
            let header = [1, 0x2c, 0x38, 0x3a, 0x30, 8];
            [&header[..], &self.0].concat()
        }

        fn names(&self) -> Vec<String> {
            unwind(&self.input()).unwrap()
        }
    }

    fn reference(at: usize) -> u64 {
        AT + at as u64 + 1
    }

    /// Encodes a table of positions.
    fn positions_at(entries: &[(i64, i64)]) -> Vec<u8> {
        let mut bytes = Vec::new();
        let mut last = (-1, 0);
        for (code, source) in entries {
            for step in [code - last.0, source - last.1] {
                let mut rest = (step << 1 ^ step >> 63).cast_unsigned();
                while rest >= 0x80 {
                    bytes.push(rest as u8 | 0x80);
                    rest >>= 7;
                }
                bytes.push(rest as u8);
            }
            last = (*code, *source);
        }
        bytes
    }

    const ALL: [&str; 3] = ["sum /cart.js:2", "run /cart.js:4", "run /cart.js:4"];

    #[test]
    fn optimized_and_interpreted_functions_have_names_and_lines() {
        let program = Program::node_20();
        assert_eq!(program.names(), ALL);
        assert!(program.input() == include_bytes!("../../../../fuzz/corpus/v8_code/node_20"));
    }

    #[test]
    fn a_function_that_has_come_into_anothers_place_gives_no_name() {
        // The collector has moved `run` away, and `sum` is there now: the description of `run` is found by its script.
        let mut program = Program::node_20();
        program.words(FUNCTION + SHARED, &[reference(SUM)]);
        assert_eq!(program.names(), ALL);
        // Nothing leads to the bytecode of the frame any more.
        program.words(SCRIPT_FUNCTIONS, &[0]);
        assert_eq!(program.names(), ALL[..2]);
        // The function has other bytecode than it had.
        let mut program = Program::node_20();
        program.words(RUN + DATA, &[reference(0x5a0)]);
        assert_eq!(program.names(), ALL[..2]);
    }

    #[test]
    fn objects_that_the_collector_may_have_moved_give_no_names() {
        // It had counted a full collection when it was asked first, which was behind the sample.
        let mut program = Program::node_20();
        program.words(COUNTS, &[1 << 32 | 1]);
        assert_eq!(program.names(), Vec::<String>::new());
        // It had moved young objects alone.
        program.words(COUNTS, &[1 << 32]);
        assert_eq!(program.names(), ALL);
        // It moves others now.
        program.words(STATE, &[2]);
        assert_eq!(program.names(), Vec::<String>::new());
        // What the page leads to is no heap: it has counted more full collections than collections.
        let mut program = Program::node_20();
        program.words(COUNTS, &[1]);
        assert_eq!(program.names(), Vec::<String>::new());
    }

    #[test]
    fn code_whose_description_is_of_other_code_has_no_names() {
        let mut program = Program::node_20();
        program.words(CODE + 32, &[reference(0x1b0)]);
        assert_eq!(program.names(), Vec::<String>::new());
        let mut program = Program::node_20();
        program.words(CODE + 40, &[AT + 0x100]);
        assert_eq!(program.names(), Vec::<String>::new());
    }

    #[test]
    fn inlined_functions_that_call_each_other_give_no_names() {
        let mut program = Program::node_20();
        program.words(INLINED + 16, &[1 << 31 | 15 << 1]);
        assert_eq!(program.names(), ALL[2..]);
    }
}
