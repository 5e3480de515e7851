//! CPython. Its main structure `_PyRuntime` and its loop are exported, so that they are found in stripped files too.

pub(super) mod fuzz;
mod layout;
mod lines;
#[cfg(test)]
mod live;

use gannet_elf::Elf;

use self::layout::Layout;
use super::{
    Attachment, Detected, FunctionText, Memory, Runtime, RuntimeFile, WhyNot,
    memory::{half, word},
    printable,
};
use crate::model::{ListLayout, TextLayout, sum_words};

/// The function that runs the instructions of Python functions.
pub(super) const LOOP: &str = "_PyEval_EvalFrameDefault";
const RUNTIME: &str = "_PyRuntime";
const CODE_TYPE: &str = "PyCode_Type";
const VERSION: &str = "Py_Version";
/// Returns the thread's state, also while the thread does not hold the global lock.
const STATE: &str = "PyGILState_GetThisThreadState";
/// Places in [`Detected::addresses`].
const RUNTIME_AT: usize = 0;
const CODE_TYPE_AT: usize = 1;
const STATE_AT: usize = 2;

/// Symbol tables larger than this are not read.
const MAX_SYMBOL_BYTES: u64 = 4 << 20;
/// Thread states that attaching inspects.
const MAX_THREADS: usize = 16;
/// In a thread state: its interpreter, and the next thread state.
const STATE_NEXT: u64 = 8;
const STATE_INTERPRETER: u64 = 16;
/// Where glibc keeps the first 32 values of `pthread_setspecific`, from the thread pointer: it has been there since 2.4 on
/// x86_64. Each has 16 bytes, the value last.
const SPECIFIC: u64 = 0x310;
const SPECIFIC_BYTES: usize = 32 * 16;
/// Bytes below the thread pointer in which thread-local variables are searched: as many as there are.
const VARIABLE_BYTES: [u64; 4] = [4096, 1024, 256, 64];
/// Bytes of code of [`STATE`] that are read.
const GETTER_BYTES: usize = 16;
/// Bytes of a name or path.
const MAX_TEXT_CHARS: u64 = 512;
const MAX_LINE_TABLE: u64 = 64 << 10;
/// Bytes of a line table that the BPF programs copy at least, if it has more.
const COPIED_LINES: usize = 2048 - 32;
/// Bytes that are read of a code object.
const CODE_BYTES: usize = 144;

/// The runtime of CPython, from 3.8 on.
#[derive(Debug)]
pub(super) struct Python;

impl Runtime for Python {
    fn name(&self) -> &'static str {
        "python"
    }

    fn mapping(&self) -> &'static str {
        "[cpython]"
    }

    fn detect(&self, elf: &Elf<'_>, path: &str) -> Option<Detected> {
        let symbols = elf.symbols(b".dynsym").filter(|table| table.bytes() <= MAX_SYMBOL_BYTES)?;
        let [runtime, code_type, state, version, run] =
            symbols.addresses_of(&[RUNTIME, CODE_TYPE, STATE, VERSION, LOOP]);
        let addresses = vec![runtime?, code_type?, state.unwrap_or(0)];
        let of_symbol = version.and_then(|at| elf.bytes_at(at, 4)).map(|bytes| half(&bytes, 0));
        let (version, version_text) = if let Some(hex) = of_symbol {
            let [micro, minor, major] = [hex >> 8, hex >> 16, hex >> 24].map(|number| number as u8);
            ((major, minor), format!("{major}.{minor}.{micro}"))
        } else {
            let version = version_of_path(path)?;
            (version, format!("{}.{}", version.0, version.1))
        };
        // One layout for each minor version.
        run.map(|_| Detected { version, version_text, addresses, layout: version.1 })
    }

    fn attach(&self, file: &RuntimeFile, bias: u64, memory: &dyn Memory) -> Result<Attachment, WhyNot> {
        let layout = layout::of(file.detected.version).ok_or(WhyNot::Version)?;
        let runtime = address(file, RUNTIME_AT, bias);
        if file.detected.version >= (3, 13) {
            check_debug_offsets(memory, runtime, file.detected.version, layout)?;
        }
        let interpreter = memory.u64(runtime.wrapping_add(layout.interpreter))?;
        if interpreter == 0 {
            return Err(WhyNot::NotStarted);
        }
        let thread_offset = thread_offset(memory, layout, interpreter, address(file, STATE_AT, bias))?;
        let Layout { steps, native_step, words, end, fixed, .. } = *layout;
        Ok(Attachment::List(ListLayout {
            thread_offset,
            steps: steps.into(),
            native_step,
            words,
            function: layout.code,
            function_mask: layout.code_mask,
            position: layout.instruction,
            position_is_address: layout.instruction_is_address,
            next: layout.previous,
            end,
            sum: fixed,
            number: file.detected.layout,
            self_offset: layout.thread_id as i32,
            texts: TextLayout {
                object_bytes: CODE_BYTES as u8,
                // Strings are long by one to four bytes a character, lines by one.
                texts: [(layout.name, 72, 2), (layout.file_name, 72, 2), (layout.line_table, 32, 0)]
                    .map(|(offset, header, shift)| ((offset / 8) as u8, header, shift)),
                length: 2,
            },
            ..ListLayout::default()
        }))
    }

    fn read_function(
        &self,
        file: &RuntimeFile,
        bias: u64,
        object: u64,
        sum: u32,
        memory: &dyn Memory,
    ) -> Result<FunctionText, WhyNot> {
        let layout = layout::of(file.detected.version).ok_or(WhyNot::Version)?;
        let code: [u8; CODE_BYTES] = memory.array(object)?;
        if word(&code, 8) != address(file, CODE_TYPE_AT, bias) {
            return Err(WhyNot::Implausible("no code object"));
        }
        let (fixed, words) = (layout.fixed.0 as usize, usize::from(layout.fixed.1));
        if sum_words((0..words).map(|index| word(&code, fixed + 8 * index))) != sum {
            return Err(WhyNot::Implausible("another code object than the samples had"));
        }
        Ok(FunctionText {
            name: text(memory, word(&code, layout.name), layout)?,
            file: text(memory, word(&code, layout.file_name), layout)?,
            first_line: half(&code, layout.first_line),
            lines: match line_table(memory, word(&code, layout.line_table)) {
                Err(_) if memory.is_partial() => Vec::new(),
                lines => lines?,
            },
        })
    }

    fn line(&self, file: &RuntimeFile, function: &FunctionText, position: u32) -> u32 {
        let Some(layout) = layout::of(file.detected.version) else { return 0 };
        let position = i64::from(position.cast_signed());
        let offset = position * layout.instruction_bytes - layout.instructions;
        lines::line_at(layout.line_form, &function.lines, function.first_line, offset)
    }
}

fn address(file: &RuntimeFile, place: usize, bias: u64) -> u64 {
    file.detected.addresses.get(place).copied().unwrap_or(0).wrapping_add(bias)
}

/// Reads the version off a path: `python3.9`, `libpython3.9.so.1.0`.
fn version_of_path(path: &str) -> Option<(u8, u8)> {
    let name = path.rsplit('/').next()?;
    let (_, rest) = name.split_once("python")?;
    let mut numbers = rest.splitn(2, '.');
    let major = numbers.next()?.parse().ok()?;
    let minor = numbers.next()?;
    let digits = minor.find(|c: char| !c.is_ascii_digit()).unwrap_or(minor.len());
    Some((major, minor[..digits].parse().ok()?))
}

/// Checks the description of itself that the interpreter has from 3.13 on.
fn check_debug_offsets(
    memory: &dyn Memory,
    runtime: u64,
    version: (u8, u8),
    layout: &Layout,
) -> Result<(), WhyNot> {
    let head: [u8; 24] = memory.array(runtime)?;
    let found = (word(&head, 8) >> 16) as u16;
    if head[..8] != *b"xdebugpy" || found.to_be_bytes() != [version.0, version.1] {
        return Err(WhyNot::Implausible("no description of the interpreter"));
    }
    if word(&head, 16) != 0 {
        return Err(WhyNot::FreeThreaded);
    }
    for (index, value) in layout.described {
        if memory.u64(runtime.wrapping_add(8 * u64::from(*index)))? != *value {
            return Err(WhyNot::Implausible("another layout than that of its version"));
        }
    }
    Ok(())
}

/// Returns where a thread keeps the address of its state, from its thread pointer: all threads must have it there. `getter` is the
/// function that reads it.
fn thread_offset(memory: &dyn Memory, layout: &Layout, interpreter: u64, getter: u64) -> Result<i64, WhyNot> {
    let mut common: Option<Vec<i64>> = None;
    let mut state = memory.u64(interpreter.wrapping_add(layout.threads))?;
    for _ in 0..MAX_THREADS {
        if state == 0 {
            break;
        }
        if memory.u64(state.wrapping_add(STATE_INTERPRETER))? != interpreter {
            return Err(WhyNot::Implausible("a thread state of another interpreter"));
        }
        let thread = memory.u64(state.wrapping_add(layout.thread_id))?;
        // A thread that has just begun or is about to end has no state of its own.
        let places = if thread == 0 { Vec::new() } else { places_of(memory, layout, thread, state) };
        if !places.is_empty() {
            common = Some(match common {
                None => places,
                Some(before) => before.into_iter().filter(|at| places.contains(at)).collect(),
            });
        }
        state = memory.u64(state.wrapping_add(STATE_NEXT))?;
    }
    match common.as_deref() {
        None => Err(WhyNot::NotStarted),
        Some([]) => Err(WhyNot::NoThreadState),
        Some(places @ [first, ..]) => {
            // A second variable has it too, but only while the thread holds the global lock.
            let code = if layout.is_variable { memory.bytes(getter, GETTER_BYTES).ok() } else { None };
            let read = code.and_then(|code| variable_of(&code)).filter(|offset| places.contains(offset));
            Ok(read.unwrap_or(*first))
        }
    }
}

/// Returns where a thread has the address of its state, from its thread pointer.
fn places_of(memory: &dyn Memory, layout: &Layout, thread: u64, state: u64) -> Vec<i64> {
    let read =
        |from: i64, length: usize| Some((from, memory.bytes(thread.wrapping_add_signed(from), length).ok()?));
    let (found, first, step) = if layout.is_variable {
        let longest = VARIABLE_BYTES.iter().find_map(|length| read(-length.cast_signed(), *length as usize));
        (longest, 0, 8)
    } else {
        (read(SPECIFIC as i64, SPECIFIC_BYTES), 8, 16)
    };
    let Some((from, bytes)) = found else { return Vec::new() };
    let words = (first..bytes.len()).step_by(step).filter(|at| word(&bytes, *at) == state);
    words.map(|at| from + at as i64).collect()
}

/// Decodes a function that returns a thread-local variable of a program: `mov %fs:OFFSET,%rax; ret`.
fn variable_of(code: &[u8]) -> Option<i64> {
    let code = code.strip_prefix(&[0xf3, 0x0f, 0x1e, 0xfa]).unwrap_or(code);
    let (offset, rest) = code.strip_prefix(&[0x64, 0x48, 0x8b, 0x04, 0x25])?.split_first_chunk()?;
    rest.starts_with(&[0xc3]).then(|| i32::from_le_bytes(*offset).into())
}

/// Reads a string object.
fn text(memory: &dyn Memory, object: u64, layout: &Layout) -> Result<String, WhyNot> {
    let header: [u8; 40] = memory.array(object)?;
    let length = word(&header, 16).min(MAX_TEXT_CHARS);
    let state = half(&header, 32);
    let (kind, is_compact, is_ascii) = (state >> 2 & 7, state >> 5 & 1 == 1, state >> 6 & 1 == 1);
    if !is_compact {
        return Err(WhyNot::Implausible("a string of an old kind"));
    }
    let at = object.wrapping_add(if is_ascii { layout.text_headers.0 } else { layout.text_headers.1 });
    let bytes = memory.bytes(at, length as usize * kind.clamp(1, 4) as usize)?;
    let chars: String = match kind {
        1 => bytes.iter().map(|byte| char::from(*byte)).collect(),
        2 => char::decode_utf16(bytes.as_chunks().0.iter().map(|two| u16::from_ne_bytes(*two)))
            .map(|c| c.unwrap_or(char::REPLACEMENT_CHARACTER))
            .collect(),
        4 => bytes
            .as_chunks()
            .0
            .iter()
            .map(|four| char::from_u32(u32::from_ne_bytes(*four)).unwrap_or(char::REPLACEMENT_CHARACTER))
            .collect(),
        _ => return Err(WhyNot::Implausible("a string of an unknown kind")),
    };
    if chars.is_empty() {
        return Err(WhyNot::Implausible("an empty string"));
    }
    Ok(printable(&chars))
}

/// Reads a bytes object. Of a copy that is not whole it reads the part that is there, which has the lines of the first positions.
fn line_table(memory: &dyn Memory, object: u64) -> Result<Vec<u8>, WhyNot> {
    let length = memory.u64(object.wrapping_add(16))?.min(MAX_LINE_TABLE) as usize;
    let at = object.wrapping_add(32);
    memory.bytes(at, length).or_else(|_| memory.bytes(at, length.min(COPIED_LINES)))
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    /// Memory that begins at an address.
    struct Bytes(u64, Vec<u8>);

    impl Memory for Bytes {
        fn read(&self, address: u64, bytes: &mut [u8]) -> bool {
            let from = address.checked_sub(self.0).and_then(|from| usize::try_from(from).ok());
            let part = from.and_then(|from| self.1.get(from..from.checked_add(bytes.len())?));
            part.map(|part| bytes.copy_from_slice(part)).is_some()
        }
    }

    impl Bytes {
        fn set(&mut self, address: u64, value: u64) {
            let at = (address - self.0) as usize;
            self.1[at..at + 8].copy_from_slice(&value.to_ne_bytes());
        }
    }

    fn file(version: (u8, u8)) -> RuntimeFile {
        let detected = Detected {
            version,
            version_text: String::new(),
            addresses: vec![0x1000, 0x2000],
            layout: version.1,
        };
        RuntimeFile { runtime: &Python, detected }
    }

    /// A process of 3.11 with threads at these addresses, whose states lie in the value number 3 of each.
    fn process(threads: &[u64]) -> Bytes {
        let mut memory = Bytes(0x1000, vec![0; 0x10000]);
        let (interpreter, state) = (0x3000, |n: usize| 0x4000 + 0x400 * n as u64);
        memory.set(0x1000 + 40, interpreter);
        memory.set(interpreter + 16, state(0));
        for (n, thread) in threads.iter().enumerate() {
            memory.set(state(n) + STATE_INTERPRETER, interpreter);
            memory.set(state(n) + 152, *thread);
            memory.set(thread + SPECIFIC + 3 * 16 + 8, state(n));
            if n + 1 < threads.len() {
                memory.set(state(n) + STATE_NEXT, state(n + 1));
            }
        }
        memory
    }

    #[test]
    fn the_state_of_a_thread_is_found_by_its_place() {
        let mut memory = process(&[0x8000, 0x9000]);
        // Another value of one thread happens to be the same.
        memory.set(0x8000 + SPECIFIC + 8, 0x4000);
        let attached = Python.attach(&file((3, 11)), 0, &memory).unwrap();
        let Attachment::List(layout) = attached else { panic!("{attached:?}") };
        assert_eq!(layout.thread_offset, SPECIFIC as i64 + 3 * 16 + 8);
        assert_eq!((layout.steps.as_slice(), layout.native_step), (&[56, 8][..], 1));
    }

    /// A process of 3.15 that describes itself, with one thread.
    fn process_with_variables() -> Bytes {
        let mut memory = Bytes(0x1000, vec![0; 0x10000]);
        memory.1[..8].copy_from_slice(b"xdebugpy");
        memory.set(0x1008, 0x030f_02f0);
        for (index, value) in layout::of((3, 15)).unwrap().described {
            memory.set(0x1000 + 8 * u64::from(*index), *value);
        }
        let (interpreter, state, thread) = (0x3000, 0x8000, 0xa000);
        memory.set(0x1000 + 936, interpreter);
        memory.set(interpreter + 7336, state);
        memory.set(state + STATE_INTERPRETER, interpreter);
        memory.set(state + 176, thread);
        memory.set(thread - 40, state);
        memory.set(thread - 48, state);
        memory
    }

    #[test]
    fn the_state_of_a_thread_is_found_in_a_variable() {
        let code = [0xf3, 0x0f, 0x1e, 0xfa, 0x64, 0x48, 0x8b, 4, 0x25, 0xd8, 0xff, 0xff, 0xff, 0xc3];
        let offset = |memory: &Bytes| {
            let mut file = file((3, 15));
            file.detected.addresses.push(0xb000);
            Python.attach(&file, 0, memory).map(|attached| match attached {
                Attachment::List(layout) => layout.thread_offset,
                other => panic!("{other:?}"),
            })
        };
        let mut memory = process_with_variables();
        assert_eq!(offset(&memory).unwrap(), -48, "without the function, the first of two");
        memory.1[0xa000..0xa000 + code.len()].copy_from_slice(&code);
        assert_eq!(offset(&memory).unwrap(), -40, "the variable that the function returns");
        memory.set(0xa000 - 40, 0);
        assert_eq!(offset(&memory).unwrap(), -48, "never one that does not hold the state");
        memory.set(0x1000 + 8 * 42, 64);
        let other = WhyNot::Implausible("another layout than that of its version");
        assert_eq!(offset(&memory).unwrap_err(), other);
    }

    #[test]
    fn a_process_that_is_not_what_it_seems_gives_a_reason() {
        let attach = |memory: &Bytes, version| Python.attach(&file(version), 0, memory).unwrap_err();
        assert_eq!(
            attach(&process(&[]), (3, 11)),
            WhyNot::Implausible("a thread state of another interpreter")
        );
        assert_eq!(attach(&Bytes(0x1000, vec![0; 0x10000]), (3, 11)), WhyNot::NotStarted);
        assert_eq!(attach(&Bytes(0x1000, Vec::new()), (3, 11)), WhyNot::Unreadable);
        assert_eq!(attach(&process(&[0x8000]), (3, 7)), WhyNot::Version);
        // A list of thread states that never ends.
        let mut memory = process(&[0x8000, 0x9000]);
        memory.set(0x4400 + STATE_NEXT, 0x4000);
        assert!(Python.attach(&file((3, 11)), 0, &memory).is_ok());
        // Two threads whose states lie at different places.
        let mut memory = process(&[0x8000, 0x9000]);
        memory.set(0x9000 + SPECIFIC + 3 * 16 + 8, 0);
        memory.set(0x9000 + SPECIFIC + 5 * 16 + 8, 0x4400);
        assert_eq!(attach(&memory, (3, 11)), WhyNot::NoThreadState);
    }

    #[test]
    fn versions_are_read_off_paths() {
        for (path, version) in [
            ("/usr/bin/python3.9", Some((3, 9))),
            ("/opt/lib/libpython3.10.so.1.0", Some((3, 10))),
            ("/usr/lib/libpython3.8d.so", Some((3, 8))),
            ("/usr/bin/python3", None),
            ("/usr/bin/uwsgi", None),
            ("/python3.x/app", None),
        ] {
            assert_eq!(version_of_path(path), version, "{path}");
        }
    }

    proptest! {
        /// Checks that no memory makes the readers panic or read without end.
        #[test]
        fn any_memory_is_read_without_panic(
            bytes in prop::collection::vec(any::<u8>(), 0x4000),
            words in prop::collection::vec((0_u64..0x4000, 0x1000_u64..0x4000), 0..200),
            object in 0x1000_u64..0x5000,
            minor in 8_u8..16,
        ) {
            let mut memory = Bytes(0x1000, bytes);
            for (at, value) in words {
                memory.set(0x1000 + (at & !7).min(0x3ff0), value);
            }
            let file = file((3, minor));
            let _ = Python.attach(&file, 0, &memory);
            for sum in [0, 1] {
                let _ = Python.read_function(&file, 0, object, sum, &memory);
            }
            if let Some(layout) = layout::of((3, minor)) {
                let _ = (text(&memory, object, layout), line_table(&memory, object));
            }
        }
    }
}
