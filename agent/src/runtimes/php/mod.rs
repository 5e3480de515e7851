//! PHP with one thread in each process (NTS), as distributions build it. `executor_globals` and the loop are exported, so that
//! they are found in stripped files too.
//!
//! Frames of C functions (`usort`) stand in the list beside those of PHP functions. C code that calls a PHP function enters the
//! loop again, and marks the frame of that function.

pub(super) mod fuzz;
mod layout;

use gannet_elf::Elf;

use self::layout::Layout;
use super::{
    Attachment, Detected, FunctionText, Memory, Runtime, RuntimeFile, WhyNot, instruction_lines,
    memory::{half, word},
    printable,
};
use crate::model::{ListEnd, ListLayout, sum_words};

/// The function that runs the instructions of PHP functions.
pub(super) const LOOP: &str = "execute_ex";
const GLOBALS: &str = "executor_globals";
/// Instead of these globals a thread-safe build has their place in the memory of each thread.
const THREAD_GLOBALS: &str = "executor_globals_offset";
/// Behind this text stands the version.
const VERSION: &[u8] = b"X-Powered-By: PHP/";

/// Larger tables of symbols and constants are not read.
const MAX_SYMBOL_BYTES: u64 = 4 << 20;
const MAX_CONSTANT_BYTES: u64 = 32 << 20;
const MAX_VERSION_BYTES: usize = 16;

/// Of a frame, in units of 8 bytes: instruction, function, previous frame, and how many there are up to that.
const INSTRUCTION: u8 = 0;
const FUNCTION: u8 = 3;
const PREVIOUS: u8 = 6;
const FRAME_WORDS: u8 = 7;
/// The byte of a frame with the bit that C code has called the function: `ZEND_CALL_TOP` is bit 17 of the word at 40.
const CALLED_BY_C: ListEnd = ListEnd::LastBit(42, 2);
/// The first byte of a function: written in C, or code of `eval`.
const NATIVE: u8 = 1;
const EVAL: u8 = 4;
/// In a function of any kind.
const NAME: usize = 8;
const CLASS: usize = 16;
/// In a class: the name of it, as in a function.
const CLASS_NAME: u64 = 8;
/// The registers, by DWARF number, in which the loop has its frame and its instruction: r14 and r15 on x86_64.
const REGISTERS: (u8, u8) = if cfg!(target_arch = "x86_64") { (14, 15) } else { (0, 0) };

/// Bytes of a name or path.
const MAX_TEXT_BYTES: u64 = 512;
/// Instructions of a function that are read, and bytes of each.
const MAX_INSTRUCTIONS: u32 = 16 << 10;
const INSTRUCTION_BYTES: usize = 32;
/// In an instruction: its line.
const LINE: usize = 24;
/// The most a stack page of PHP functions has.
const MAX_STACK_PAGE: u64 = 1 << 30;

/// The runtime of PHP 8.2 and 8.4.
#[derive(Debug)]
pub(super) struct Php;

impl Runtime for Php {
    fn name(&self) -> &'static str {
        "php"
    }

    fn mapping(&self) -> &'static str {
        "[php]"
    }

    fn detect(&self, elf: &Elf<'_>, _: &str) -> Option<Detected> {
        let symbols = elf.symbols(b".dynsym").filter(|table| table.bytes() <= MAX_SYMBOL_BYTES)?;
        let [run, globals, thread_globals] = symbols.addresses_of(&[LOOP, GLOBALS, THREAD_GLOBALS]);
        run?;
        if globals.is_none() && thread_globals.is_none() {
            return None;
        }
        let version_text = version_text(elf)?;
        let mut numbers = version_text.split('.').map(str::parse);
        let (Some(Ok(major)), Some(Ok(minor))) = (numbers.next(), numbers.next()) else { return None };
        let layout = layout::of((major, minor)).map_or(0, |layout| layout.number);
        let addresses = globals.filter(|_| thread_globals.is_none());
        Some(Detected {
            version: (major, minor),
            version_text,
            addresses: addresses.into_iter().collect(),
            layout,
        })
    }

    fn attach(&self, file: &RuntimeFile, bias: u64, memory: &dyn Memory) -> Result<Attachment, WhyNot> {
        let layout = layout::of(file.detected.version).ok_or(WhyNot::Version)?;
        let globals = file.detected.addresses.first().ok_or(WhyNot::ThreadSafe)?.wrapping_add(bias);
        // Zero before the first request.
        let page = memory.u64(globals.wrapping_add(layout.stack_page))?;
        if page > MAX_STACK_PAGE || !page.is_multiple_of(16) {
            return Err(WhyNot::Implausible("no stack of PHP functions"));
        }
        Ok(Attachment::List(ListLayout {
            thread_offset: globals.wrapping_add(layout.current_frame).cast_signed(),
            is_absolute: true,
            words: FRAME_WORDS,
            function: FUNCTION,
            function_mask: u64::MAX,
            position: INSTRUCTION,
            position_is_address: true,
            next: PREVIOUS,
            end: CALLED_BY_C,
            native_function: NATIVE,
            registers: REGISTERS,
            sum: (0, layout.sum_words),
            number: layout.number,
            ..ListLayout::default()
        }))
    }

    fn read_function(
        &self,
        file: &RuntimeFile,
        _: u64,
        object: u64,
        sum: u32,
        memory: &dyn Memory,
    ) -> Result<FunctionText, WhyNot> {
        let layout = layout::of(file.detected.version).ok_or(WhyNot::Version)?;
        let fixed = memory.bytes(object, usize::from(layout.sum_words) * 8)?;
        if sum_words((0..fixed.len()).step_by(8).map(|at| word(&fixed, at))) != sum {
            return Err(WhyNot::Implausible("another function than the samples had"));
        }
        let kind = fixed.first().copied().unwrap_or(0);
        let class = match word(&fixed, CLASS) {
            0 => None,
            class => Some(text(memory, memory.u64(class.wrapping_add(CLASS_NAME))?)?),
        };
        let name = match word(&fixed, NAME) {
            0 if kind == NATIVE => return Err(WhyNot::Implausible("a function without a name")),
            0 if kind == EVAL => "eval".to_owned(),
            0 => "{main}".to_owned(),
            name => text(memory, name)?,
        };
        let name = class.into_iter().chain([name]).collect::<Vec<_>>().join("::");
        if kind == NATIVE {
            return Ok(FunctionText { name, ..FunctionText::default() });
        }
        let source: [u8; 16] = memory.array(object.wrapping_add(layout.file_name))?;
        Ok(FunctionText {
            name,
            file: text(memory, word(&source, 0))?,
            first_line: half(&source, 8),
            lines: read_lines(memory, object, &fixed, layout)?,
        })
    }

    fn line(&self, _: &RuntimeFile, function: &FunctionText, position: u32) -> u32 {
        line_at(&function.lines, position)
    }
}

/// Returns the version that a file has among its constants: `8.2.36`.
fn version_text(elf: &Elf<'_>) -> Option<String> {
    let constants = elf.section_data_within(elf.section(b".rodata")?, MAX_CONSTANT_BYTES).ok()?;
    let at = constants.windows(VERSION.len()).position(|bytes| bytes == VERSION)? + VERSION.len();
    let is_of_number = |byte: &&u8| byte.is_ascii_digit() || **byte == b'.';
    let bytes = constants[at..].iter().take(MAX_VERSION_BYTES).take_while(is_of_number).copied();
    String::from_utf8(bytes.collect()).ok()
}

/// Reads a string.
fn text(memory: &dyn Memory, object: u64) -> Result<String, WhyNot> {
    let length = memory.u64(object.wrapping_add(16))?.min(MAX_TEXT_BYTES) as usize;
    let bytes = memory.bytes(object.wrapping_add(24), length)?;
    // Behind the name of a class without a name stands where it was made.
    let bytes = bytes.split(|byte| *byte == 0).next().unwrap_or_default();
    if bytes.is_empty() {
        return Err(WhyNot::Implausible("an empty string"));
    }
    Ok(printable(&String::from_utf8_lossy(bytes)))
}

/// Reads the lines of a function's instructions.
fn read_lines(memory: &dyn Memory, object: u64, fixed: &[u8], layout: &Layout) -> Result<Vec<u8>, WhyNot> {
    let count = half(fixed, layout.instruction_count).min(MAX_INSTRUCTIONS);
    let first = word(fixed, layout.instructions);
    let instructions = memory.bytes(first, count as usize * INSTRUCTION_BYTES)?;
    let lines = instructions.chunks(INSTRUCTION_BYTES).map(|instruction| half(instruction, LINE));
    Ok(instruction_lines::table(first.wrapping_sub(object) as u32, count, lines))
}

/// Returns the line of an instruction, whose distance from its function is given; 0 if it is none of the function's.
fn line_at(lines: &[u8], position: u32) -> u32 {
    instruction_lines::index(lines, position, INSTRUCTION_BYTES as u32)
        .map_or(0, |index| instruction_lines::line(lines, index))
}

#[cfg(test)]
mod tests {
    use std::fs::File;

    use gannet_unwind::limits::TableLimits;
    use proptest::prelude::*;

    use super::{super::hostile::Hostile, *};

    fn file(version: (u8, u8), addresses: Vec<u64>) -> RuntimeFile {
        let detected = Detected { version, version_text: String::new(), addresses, layout: 1 };
        RuntimeFile { runtime: &Php, detected }
    }

    /// Memory from 0x1000 on with a function of 8.2 at 0x1100, whose four instructions are at 0x1800.
    fn function(kind: u8, name: &[u8], class: &[u8]) -> Vec<u8> {
        let mut bytes = vec![0; 0x1000];
        let mut set = |at: usize, value: &[u8]| bytes[at..at + value.len()].copy_from_slice(value);
        let mut string = |at: usize, value: &[u8]| {
            set(at + 16, &(value.len() as u64).to_ne_bytes());
            set(at + 24, value);
        };
        string(0x400, name);
        string(0x500, class);
        string(0x600, b"/srv/app.php");
        let mut word = |at: usize, value: u64| set(at, &value.to_ne_bytes());
        word(0x100, kind.into());
        word(0x100 + NAME, if name.is_empty() { 0 } else { 0x1400 });
        word(0x100 + CLASS, if class.is_empty() { 0 } else { 0x1700 });
        word(0x700 + CLASS_NAME as usize, 0x1500);
        word(0x100 + 80, 4);
        word(0x100 + 88, 0x1800);
        word(0x100 + 152, 0x1600);
        word(0x100 + 160, 11);
        for (index, line) in [11, 12, 12, 14].into_iter().enumerate() {
            word(0x800 + index * INSTRUCTION_BYTES + LINE, line);
        }
        bytes
    }

    fn read(bytes: &[u8]) -> Result<FunctionText, WhyNot> {
        let sum = sum_words((0x100..0x160).step_by(8).map(|at| word(bytes, at)));
        Php.read_function(&file((8, 2), vec![0]), 0, 0x1100, sum, &Hostile::new(bytes, Some(0x1000)))
    }

    #[test]
    fn a_function_has_its_class_and_its_lines() {
        let text = read(&function(2, b"run", b"App\\Job")).unwrap();
        assert_eq!(
            (text.name.as_str(), text.file.as_str(), text.first_line),
            ("App\\Job::run", "/srv/app.php", 11)
        );
        let lines = |text: &FunctionText, positions: &[u32]| -> Vec<u32> {
            positions.iter().map(|position| line_at(&text.lines, *position)).collect()
        };
        // The first instruction is 0x700 behind the function. One between two instructions, before and behind all are none.
        assert_eq!(lines(&text, &[0x700, 0x720, 0x740, 0x760]), [11, 12, 12, 14]);
        assert_eq!(lines(&text, &[0x6e0, 0x708, 0x780, 0, u32::MAX]), [0; 5]);
        for (kind, name, class, shown) in [
            (2, &b""[..], &b""[..], "{main}"),
            (4, b"", b"", "eval"),
            (2, b"{closure}", b"Job", "Job::{closure}"),
            (2, b"run", b"class@anonymous\0/srv/app.php:3$0", "class@anonymous::run"),
        ] {
            assert_eq!(read(&function(kind, name, class)).unwrap().name, shown);
        }
        let text = read(&function(NATIVE, b"usort", b"")).unwrap();
        assert_eq!(text, FunctionText { name: "usort".to_owned(), ..FunctionText::default() });
    }

    #[test]
    fn what_is_no_function_gives_a_reason() {
        assert_eq!(read(&function(NATIVE, b"", b"")), Err(WhyNot::Implausible("a function without a name")));
        let bytes = function(2, b"run", b"");
        let memory = Hostile::new(&bytes, Some(0x1000));
        let read = |version, object| Php.read_function(&file(version, vec![0]), 0, object, 1, &memory);
        assert_eq!(read((8, 2), 0x1100), Err(WhyNot::Implausible("another function than the samples had")));
        assert_eq!(read((8, 2), 0x9000), Err(WhyNot::Unreadable));
        assert_eq!(read((8, 9), 0x1100), Err(WhyNot::Version));
    }

    #[test]
    fn a_process_has_one_list_at_an_address() {
        let mut bytes = vec![0; 0x1000];
        let attach = |bytes: &[u8], version, addresses: &[u64]| {
            let memory = Hostile::new(bytes, Some(0x7000));
            Php.attach(&file(version, addresses.to_vec()), 0x5000, &memory).map(|attached| match attached {
                Attachment::List(layout) => layout,
                other => panic!("PHP has lists: {other:?}"),
            })
        };
        // Before the first request.
        let layout = attach(&bytes, (8, 2), &[0x2000]).unwrap();
        assert_eq!((layout.thread_offset, layout.is_absolute), (0x7000 + 488, true));
        assert_eq!(attach(&bytes, (8, 2), &[]), Err(WhyNot::ThreadSafe));
        assert_eq!(attach(&bytes, (7, 4), &[0x2000]), Err(WhyNot::Version));
        assert_eq!(attach(&bytes, (8, 4), &[0x8000]), Err(WhyNot::Unreadable));
        bytes[480..488].copy_from_slice(&0x7fff_1234_5678_u64.to_ne_bytes());
        assert_eq!(attach(&bytes, (8, 2), &[0x2000]), Err(WhyNot::Implausible("no stack of PHP functions")));
    }

    /// Needs `php8.2` of Debian 12, or of another release in `GANNET_TEST_PHPS`.
    #[test]
    fn the_file_of_php_has_its_version() {
        let path = std::fs::canonicalize("/usr/bin/php").unwrap();
        let elf_of = |path: &std::path::Path| File::open(path).unwrap();
        let (open, limits) = (elf_of(&path), TableLimits::default().elf());
        let detected = Php.detect(&Elf::parse(&open, &limits).unwrap(), "").unwrap();
        let (major, minor) = detected.version;
        assert!(path.ends_with(format!("php{major}.{minor}")), "{detected:?}");
        assert!(detected.version_text.starts_with(&format!("{major}.{minor}.")), "{detected:?}");
        assert_eq!(detected.addresses.len(), 1);
        let other = elf_of("/usr/bin/python3".as_ref());
        assert_eq!(Php.detect(&Elf::parse(&other, &limits).unwrap(), ""), None);
    }

    proptest! {
        /// Checks that no memory makes the readers panic or read without end.
        #[test]
        fn any_memory_is_read_without_panic(bytes in prop::collection::vec(any::<u8>(), 1..4096), kind: u8) {
            fuzz::php(&[&[kind, 3], &bytes[..]].concat());
        }
    }
}
