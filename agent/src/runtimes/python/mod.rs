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
/// Where musl, from 1.2 on, keeps the address of all such values, from the thread pointer. Each has 8 bytes, and there are 128.
const MUSL_SPECIFIC: i64 = 0x80;
const MUSL_SPECIFIC_BYTES: usize = 128 * 8;
/// Bytes below the thread pointer in which thread-local variables are searched: as many as there are.
const VARIABLE_BYTES: [u64; 4] = [4096, 1024, 256, 64];
/// Bytes of code of [`STATE`] that are read.
const GETTER_BYTES: usize = 16;
/// Bytes of a name or path.
const MAX_TEXT_CHARS: u64 = 512;
const MAX_LINE_TABLE: u64 = 64 << 10;
/// Bytes of a line table that the BPF programs copy at least, if it has more.
const COPIED_LINES: usize = 2048 - 48;
/// Bytes that are read of a code object.
const CODE_BYTES: usize = 160;
/// The text with which the description of an interpreter begins that has one, from 3.13 on.
const DESCRIPTION: [u8; 8] = *b"xdebugpy";

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
        let head = runtime.and_then(|at| elf.bytes_at(at, 24));
        let is_free_threaded =
            head.is_some_and(|head| head.len() == 24 && head[..8] == DESCRIPTION && word(&head, 16) != 0);
        run?;
        Some(Detected {
            version,
            // As Python's own tools name such builds.
            version_text: if is_free_threaded { version_text + "t" } else { version_text },
            addresses,
            layout: layout::number(version.1, is_free_threaded),
        })
    }

    fn attach(&self, file: &RuntimeFile, bias: u64, memory: &dyn Memory) -> Result<Attachment, WhyNot> {
        let Some(layout) = layout_of(file) else {
            let is_free_threaded = layout::is_free_threaded(file.detected.layout);
            return Err(if is_free_threaded { WhyNot::FreeThreaded } else { WhyNot::Version });
        };
        let runtime = address(file, RUNTIME_AT, bias);
        if file.detected.version >= (3, 13) {
            check_debug_offsets(memory, runtime, file, layout)?;
        }
        let interpreter = memory.u64(runtime.wrapping_add(layout.interpreter))?;
        if interpreter == 0 {
            return Err(WhyNot::NotStarted);
        }
        let place = place_of_state(memory, layout, interpreter, address(file, STATE_AT, bias))?;
        let Layout { native_step, words, end, fixed, .. } = *layout;
        let steps: Vec<i32> = place.step.into_iter().chain(layout.steps.iter().copied()).collect();
        let steps_to_state = u8::from(place.step.is_some());
        Ok(Attachment::List(ListLayout {
            thread_offset: place.offset,
            steps: steps.as_slice().into(),
            native_step: if native_step == 0 { 0 } else { native_step + steps_to_state },
            words,
            function: layout.code,
            function_mask: layout.code_mask,
            position: layout.instruction,
            position_is_address: layout.instruction_is_address,
            next: layout.previous,
            end,
            sum: fixed,
            number: file.detected.layout,
            self_at: (steps_to_state, layout.thread_id as i32),
            texts: TextLayout {
                object_bytes: CODE_BYTES as u8,
                // Strings are long by one to four bytes a character, lines by one.
                texts: [
                    (layout.name, layout.text_headers.1, 2),
                    (layout.file_name, layout.text_headers.1, 2),
                    (layout.line_table, layout.head as u64 + 16, 0),
                ]
                .map(|(offset, header, shift)| ((offset / 8) as u8, header as u8, shift)),
                length: (layout.head / 8) as u8,
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
        let layout = layout_of(file).ok_or(WhyNot::Version)?;
        let code: [u8; CODE_BYTES] = memory.array(object)?;
        if word(&code, layout.head - 8) != address(file, CODE_TYPE_AT, bias) {
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
            lines: match line_table(memory, word(&code, layout.line_table), layout) {
                Err(_) if memory.is_partial() => Vec::new(),
                lines => lines?,
            },
        })
    }

    fn line(&self, file: &RuntimeFile, function: &FunctionText, position: u32) -> u32 {
        let Some(layout) = layout_of(file) else { return 0 };
        let position = i64::from(position.cast_signed());
        let offset = position * layout.instruction_bytes - layout.instructions;
        lines::line_at(layout.line_form, &function.lines, function.first_line, offset)
    }
}

/// Returns the layout of an interpreter.
fn layout_of(file: &RuntimeFile) -> Option<&'static Layout> {
    (file.detected.version.0 == 3).then(|| layout::of(file.detected.layout))?
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
    file: &RuntimeFile,
    layout: &Layout,
) -> Result<(), WhyNot> {
    let head: [u8; 24] = memory.array(runtime)?;
    let (found, version) = ((word(&head, 8) >> 16) as u16, file.detected.version);
    if head[..8] != DESCRIPTION || found.to_be_bytes() != [version.0, version.1] {
        return Err(WhyNot::Implausible("no description of the interpreter"));
    }
    if (word(&head, 16) != 0) != layout::is_free_threaded(file.detected.layout) {
        return Err(WhyNot::Implausible("with the global lock in one place, without it in another"));
    }
    for (index, value) in layout.described {
        if memory.u64(runtime.wrapping_add(8 * u64::from(*index)))? != *value {
            return Err(WhyNot::Implausible("another layout than that of its version"));
        }
    }
    Ok(())
}

/// The place of the address of a thread's state.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Place {
    /// Of a word, from the thread pointer.
    offset: i64,
    /// From the address in that word to the place; `None`: the word is the place.
    step: Option<i32>,
}

/// Returns where a thread keeps the address of its state: all threads must have it there. `getter` is the function that reads it.
fn place_of_state(
    memory: &dyn Memory,
    layout: &Layout,
    interpreter: u64,
    getter: u64,
) -> Result<Place, WhyNot> {
    let mut common: Option<Vec<Place>> = None;
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
            let read = code.and_then(|code| variable_of(&code)).map(|offset| Place { offset, step: None });
            Ok(read.filter(|place| places.contains(place)).unwrap_or(*first))
        }
    }
}

/// Returns where a thread has the address of its state.
fn places_of(memory: &dyn Memory, layout: &Layout, thread: u64, state: u64) -> Vec<Place> {
    let read =
        |from: i64, length: usize| Some((from, memory.bytes(thread.wrapping_add_signed(from), length).ok()?));
    let (found, first, step) = if layout.is_variable {
        let longest = VARIABLE_BYTES.iter().find_map(|length| read(-length.cast_signed(), *length as usize));
        (longest, 0, 8)
    } else {
        (read(SPECIFIC as i64, SPECIFIC_BYTES), 8, 16)
    };
    let direct: Vec<Place> = found
        .map(|(from, bytes)| {
            let words = (first..bytes.len()).step_by(step).filter(|at| word(&bytes, *at) == state);
            words.map(|at| Place { offset: from + at as i64, step: None }).collect()
        })
        .unwrap_or_default();
    if direct.is_empty() && !layout.is_variable { musl_places(memory, thread, state) } else { direct }
}

/// Returns where a thread of a process of musl has the address of its state.
fn musl_places(memory: &dyn Memory, thread: u64, state: u64) -> Vec<Place> {
    let values = memory.u64(thread.wrapping_add_signed(MUSL_SPECIFIC)).ok();
    let bytes = values.and_then(|values| memory.bytes(values, MUSL_SPECIFIC_BYTES).ok()).unwrap_or_default();
    let words = (0..bytes.len()).step_by(8).filter(|at| word(&bytes, *at) == state);
    words.map(|at| Place { offset: MUSL_SPECIFIC, step: Some(at as i32) }).collect()
}

/// Decodes a function that returns a thread-local variable of a program: `mov %fs:OFFSET,%rax; ret`.
fn variable_of(code: &[u8]) -> Option<i64> {
    let code = code.strip_prefix(&[0xf3, 0x0f, 0x1e, 0xfa]).unwrap_or(code);
    let (offset, rest) = code.strip_prefix(&[0x64, 0x48, 0x8b, 0x04, 0x25])?.split_first_chunk()?;
    rest.starts_with(&[0xc3]).then(|| i32::from_le_bytes(*offset).into())
}

/// Reads a string object.
fn text(memory: &dyn Memory, object: u64, layout: &Layout) -> Result<String, WhyNot> {
    let header: [u8; 56] = memory.array(object)?;
    let length = word(&header, layout.head).min(MAX_TEXT_CHARS);
    let state = half(&header, layout.head + 16);
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
fn line_table(memory: &dyn Memory, object: u64, layout: &Layout) -> Result<Vec<u8>, WhyNot> {
    let length = memory.u64(object.wrapping_add(layout.head as u64))?.min(MAX_LINE_TABLE) as usize;
    let at = object.wrapping_add(layout.head as u64 + 16);
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
            layout: layout::number(version.1, false),
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

    #[test]
    fn the_state_of_a_thread_of_musl_is_found_in_an_array() {
        let mut memory = process(&[0x8000, 0x9000]);
        for (thread, state, values) in [(0x8000_u64, 0x4000, 0xa000_u64), (0x9000, 0x4400, 0xb000)] {
            memory.set(thread + SPECIFIC + 3 * 16 + 8, 0);
            memory.set(thread + 0x80, values);
            memory.set(values + 8 * 5, state);
        }
        let attached = Python.attach(&file((3, 11)), 0, &memory).unwrap();
        let Attachment::List(layout) = attached else { panic!("{attached:?}") };
        assert_eq!((layout.thread_offset, layout.steps.as_slice()), (0x80, &[40, 56, 8][..]));
        assert_eq!((layout.native_step, layout.self_at), (2, (1, 152)));
        memory.set(0xb000 + 8 * 5, 0);
        memory.set(0xb000 + 8 * 6, 0x4400);
        assert_eq!(Python.attach(&file((3, 11)), 0, &memory).unwrap_err(), WhyNot::NoThreadState);
    }

    #[test]
    fn a_build_without_the_global_lock_has_its_own_layout() {
        let attach = |described: &[(u8, u64)], is_free_threaded: u64| {
            let mut memory = Bytes(0x1000, vec![0; 0x10000]);
            memory.1[..8].copy_from_slice(&DESCRIPTION);
            memory.set(0x1008, 0x030d_05f0);
            memory.set(0x1010, is_free_threaded);
            for (index, value) in described {
                memory.set(0x1000 + 8 * u64::from(*index), *value);
            }
            let (interpreter, state, thread) = (0x3000, 0x8000, 0xa000);
            memory.set(0x1000 + 632, interpreter);
            memory.set(interpreter + 7344, state);
            memory.set(state + STATE_INTERPRETER, interpreter);
            memory.set(state + 152, thread);
            memory.set(thread + SPECIFIC + 8, state);
            let mut file = file((3, 13));
            file.detected.layout = layout::number(13, true);
            Python.attach(&file, 0, &memory)
        };
        let described = layout::of(layout::number(13, true)).unwrap().described;
        let attached = attach(described, 1).unwrap();
        let Attachment::List(layout) = attached else { panic!("{attached:?}") };
        assert_eq!((layout.number, layout.sum, layout.texts.length), (45, (72, 11), 4));
        let other = WhyNot::Implausible("with the global lock in one place, without it in another");
        assert_eq!(attach(described, 0).unwrap_err(), other);
        for left_out in 0..described.len() {
            let part = [&described[..left_out], &described[left_out + 1..]].concat();
            // A code object is the first word of a frame.
            if described[left_out].1 != 0 {
                assert!(attach(&part, 1).is_err(), "{:?}", described[left_out]);
            }
        }
        let mut newer = file((3, 14));
        newer.detected.layout = layout::number(14, true);
        let memory = Bytes(0x1000, vec![0; 0x1000]);
        assert_eq!(Python.attach(&newer, 0, &memory).unwrap_err(), WhyNot::FreeThreaded);
    }

    /// A process of 3.15 that describes itself, with one thread.
    fn process_with_variables() -> Bytes {
        let mut memory = Bytes(0x1000, vec![0; 0x10000]);
        memory.1[..8].copy_from_slice(b"xdebugpy");
        memory.set(0x1008, 0x030f_02f0);
        for (index, value) in layout::of(15).unwrap().described {
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
            is_free_threaded: bool,
        ) {
            let mut memory = Bytes(0x1000, bytes);
            for (at, value) in words {
                memory.set(0x1000 + (at & !7).min(0x3ff0), value);
            }
            let mut file = file((3, minor));
            file.detected.layout = layout::number(minor, is_free_threaded);
            let _ = Python.attach(&file, 0, &memory);
            for sum in [0, 1] {
                let _ = Python.read_function(&file, 0, object, sum, &memory);
            }
            if let Some(layout) = layout::of(file.detected.layout) {
                let _ = (text(&memory, object, layout), line_table(&memory, object, layout));
            }
        }
    }
}
