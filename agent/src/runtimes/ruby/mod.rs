//! Ruby, in stripped files too. Its loop is found by the table of its instructions ([`BESIDE`]), and the state of a thread by the
//! code of a small function that is part of the interface for extensions.
//!
//! Frames are an array that grows downwards. Those of C functions (`each`) stand among those of Ruby functions. C code that calls
//! a block enters the loop again, and marks the frame of that block in the words below its variables.

pub(super) mod fuzz;
mod layout;

use gannet_elf::{Arch, Elf};

use self::layout::Layout;
use super::{
    Attachment, Detected, FunctionText, Memory, Runtime, RuntimeFile, WhyNot, instruction_lines,
    memory::{half, word},
    printable,
};
use crate::model::{ListEnd, ListLayout, sum_words};

/// A file that exports this function has the loop: the function that its largest table of addresses leads into.
pub(super) const BESIDE: &str = "ruby_run_node";
const VERSION: &str = "ruby_version";
/// A function that begins with a read of the thread's state.
const READS_STATE: &str = "rb_current_receiver";

/// Places in [`Detected::addresses`]: where the module number of the thread's state stands, what is added to the offset behind
/// that, and begin and size of the variables.
const MODULE_AT: usize = 0;
const OFFSET_AT: usize = 1;
const VARIABLES_AT: usize = 2;
const VARIABLE_BYTES_AT: usize = 3;

/// Larger tables of symbols are not read.
const MAX_SYMBOL_BYTES: u64 = 4 << 20;
const MAX_VERSION_BYTES: u64 = 16;
/// Bytes of the function that reads the state.
const STATE_CODE_BYTES: u64 = 48;
/// Numbers of modules with variables of threads, and the bytes of such variables.
const MAX_MODULE: u64 = 1024;
const MAX_THREAD_BYTES: u64 = 1 << 20;

/// From the thread pointer: where glibc has the table of the modules' variables. Each entry has 16 bytes.
const THREAD_MODULES: i64 = 8;
const MODULE_BYTES: i32 = 16;
/// In the state of a thread: its newest frame.
const NEWEST: i32 = 16;
/// Of a frame, in units of 8 bytes: instruction, function, the end of its variables, and how many there are up to that.
const INSTRUCTION: u8 = 0;
const FUNCTION: u8 = 2;
const VARIABLES: u8 = 4;
const FRAME_WORDS: u8 = 5;
/// The bytes of the words at the end of the variables, as the programs place them. C code has called the function:
/// `VM_FRAME_FLAG_FINISH`. The third byte of the oldest frame's kind, which is no frame of the program: `VM_FRAME_MAGIC_DUMMY`.
const CALLED_BY_C: ListEnd = ListEnd::LastBit(120, 0x20);
const OLDEST: (u8, u8) = (122, 0x99);

/// In the first word of an object: its type, and the kind of an internal object. Functions are such objects.
const TYPE_MASK: u64 = 0x1f;
const STRING: u64 = 0x05;
const ARRAY: u64 = 0x07;
const INTERNAL: u64 = 0x1a;
const KIND_SHIFT: u32 = 12;
const METHOD_ENTRY: u64 = 6;
const INSTRUCTIONS: u64 = 7;
/// Of strings: it is stored elsewhere. Of arrays: it is stored in the object. Where the length of a short string is.
const ELSEWHERE: u64 = 1 << 13;
const INSIDE: u64 = 1 << 13;
const SHORT_LENGTH_SHIFT: u32 = 14;
/// In the object of a function: its body, or its definition. Both stay where they are.
const BODY: usize = 16;
/// In a method entry: the number of its name.
const NAME: u64 = 24;
/// In a body.
const COUNT: usize = 4;
const ENCODED: usize = 8;
const PATHS: usize = 64;
const LABEL: usize = 80;
const BODY_BYTES: usize = 152;

/// Bytes of a name or path, of the variables of the file, and instructions of a function.
const MAX_TEXT_BYTES: u64 = 512;
const MAX_VARIABLE_BYTES: u64 = 64 << 10;
const MAX_INSTRUCTIONS: u32 = 64 << 10;
const INSTRUCTION_BYTES: u32 = 8;
/// Bytes of an entry of lines.
const LINE_BYTES: usize = 12;

/// The numbers of names: those of operators are the number of their entry, of the others it is behind these bits. The entries
/// are in arrays of this many.
const LAST_OPERATOR: u64 = 1023;
const SCOPE_BITS: u32 = 4;
const ENTRIES: u64 = 512;
const ENTRY_BYTES: u64 = 16;
/// The name of this operator shows that a table is that of the names.
const PLUS: (u64, &str) = (0x2b, "+");
const MAX_NAMES: u64 = 1 << 24;
/// Places that may be that of the table of names.
const MAX_CANDIDATES: usize = 16;

/// The runtime of Ruby 3.1, 3.3 and 3.4.
#[derive(Debug)]
pub(super) struct Ruby;

impl Runtime for Ruby {
    fn name(&self) -> &'static str {
        "ruby"
    }

    fn mapping(&self) -> &'static str {
        "[ruby]"
    }

    fn detect(&self, elf: &Elf<'_>, _: &str) -> Option<Detected> {
        let symbols = elf.symbols(b".dynsym").filter(|table| table.bytes() <= MAX_SYMBOL_BYTES)?;
        let [run, version, reads_state] = symbols.addresses_of(&[BESIDE, VERSION, READS_STATE]);
        run?;
        let bytes = elf.bytes_at(version?, MAX_VERSION_BYTES)?;
        let end = bytes.iter().position(|byte| *byte == 0)?;
        let version_text = str::from_utf8(&bytes[..end]).ok()?.to_owned();
        let mut numbers = version_text.split('.').map(str::parse);
        let (Some(Ok(major)), Some(Ok(minor))) = (numbers.next(), numbers.next()) else { return None };
        let layout = layout::of((major, minor)).map_or(0, |layout| layout.number);
        let state = reads_state.filter(|_| elf.arch() == Arch::X86_64).and_then(|at| {
            let code = elf.bytes_at(at, STATE_CODE_BYTES)?;
            thread_state(&code, at)
        });
        let variables = elf.section(b".data").map_or((0, 0), |data| (data.vaddr, data.bytes));
        let addresses =
            state.map_or_else(Vec::new, |(module, offset)| vec![module, offset, variables.0, variables.1]);
        Some(Detected { version: (major, minor), version_text, addresses, layout })
    }

    fn attach(&self, file: &RuntimeFile, bias: u64, memory: &dyn Memory) -> Result<Attachment, WhyNot> {
        let layout = layout::of(file.detected.version).ok_or(WhyNot::Version)?;
        let module_at = file.detected.addresses.get(MODULE_AT).ok_or(WhyNot::NoThreadState)?;
        let place: [u8; 16] = memory.array(module_at.wrapping_add(bias))?;
        let (module, offset) = (word(&place, 0), word(&place, 8).wrapping_add(number(file, OFFSET_AT)));
        if module == 0 {
            return Err(WhyNot::NotStarted);
        }
        if module > MAX_MODULE || offset > MAX_THREAD_BYTES {
            return Err(WhyNot::Implausible("no place of a thread's state"));
        }
        Ok(Attachment::List(ListLayout {
            thread_offset: THREAD_MODULES,
            steps: [module as i32 * MODULE_BYTES, offset as i32, NEWEST].as_slice().into(),
            words: FRAME_WORDS,
            function: FUNCTION,
            function_mask: u64::MAX,
            position: INSTRUCTION,
            position_is_address: true,
            stride: layout.frame_bytes,
            variables: VARIABLES,
            oldest: OLDEST,
            end: CALLED_BY_C,
            sum: (BODY as u32, 1),
            number: layout.number,
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
        let head: [u8; 24] = memory.array(object)?;
        let body = word(&head, BODY);
        if sum_words([body].into_iter()) != sum {
            return Err(WhyNot::Implausible("another function than the samples had"));
        }
        let flags = word(&head, 0);
        match (flags & TYPE_MASK, flags >> KIND_SHIFT & 0xf) {
            (INTERNAL, METHOD_ENTRY) => {
                let name = name(memory, layout, file, bias, memory.u64(object.wrapping_add(NAME))?)?;
                Ok(FunctionText { name, ..FunctionText::default() })
            }
            (INTERNAL, INSTRUCTIONS) => {
                let bytes: [u8; BODY_BYTES] = memory.array(body)?;
                let (first_line, is_number) = layout.first_line;
                let first_line = half(&bytes, first_line) >> u32::from(is_number);
                let paths = word(&bytes, PATHS);
                Ok(FunctionText {
                    name: text(memory, layout, word(&bytes, LABEL))?,
                    file: match text(memory, layout, paths) {
                        Ok(path) => path,
                        // The path as it was given, behind which the absolute one stands.
                        Err(_) => text(memory, layout, memory.u64(elements(memory, paths)?)?)?,
                    },
                    first_line,
                    lines: read_lines(memory, object, &bytes, layout)?,
                })
            }
            _ => Err(WhyNot::Implausible("no function")),
        }
    }

    fn line(&self, _: &RuntimeFile, function: &FunctionText, position: u32) -> u32 {
        // A frame has the next instruction.
        instruction_lines::index(&function.lines, position, INSTRUCTION_BYTES)
            .map_or(0, |index| instruction_lines::line(&function.lines, index.saturating_sub(1)))
    }
}

fn number(file: &RuntimeFile, place: usize) -> u64 {
    file.detected.addresses.get(place).copied().unwrap_or(0)
}

/// Returns where the module number of the thread's state stands, and what is added to the offset behind it, from the code of a
/// function that reads the state: `lea rdi, [place]`, `call __tls_get_addr`, `mov rax, [rax + offset]`.
fn thread_state(code: &[u8], at: u64) -> Option<(u64, u64)> {
    let lea = code.windows(3).position(|bytes| bytes == [0x48, 0x8d, 0x3d])?;
    let place = at.wrapping_add(lea as u64 + 7).wrapping_add_signed(displacement(code, lea + 3)?);
    // The linker fills the call up with prefixes.
    let call = lea + 7 + code.get(lea + 7..)?.iter().take(4).position(|byte| *byte == 0xe8)?;
    let offset = match code.get(call + 5..call + 8)? {
        [0x48, 0x8b, 0x00] => 0,
        [0x48, 0x8b, 0x40] => i64::from(code.get(call + 8)?.cast_signed()),
        [0x48, 0x8b, 0x80] => displacement(code, call + 8)?,
        _ => return None,
    };
    Some((place, offset.cast_unsigned()))
}

fn displacement(code: &[u8], at: usize) -> Option<i64> {
    code.get(at..)?.first_chunk().map(|four| i32::from_le_bytes(*four).into())
}

/// Reads a string.
fn text(memory: &dyn Memory, layout: &Layout, object: u64) -> Result<String, WhyNot> {
    let head: [u8; 32] = memory.array(object)?;
    let flags = word(&head, 0);
    if flags & TYPE_MASK != STRING {
        return Err(WhyNot::Implausible("no string"));
    }
    let is_elsewhere = flags & ELSEWHERE != 0;
    let (length, at) = match (is_elsewhere, layout.short_strings) {
        (true, _) => (word(&head, 16), word(&head, 24)),
        (false, true) => (flags >> SHORT_LENGTH_SHIFT & 0x1f, object.wrapping_add(16)),
        (false, false) => (word(&head, 16), object.wrapping_add(24)),
    };
    let bytes = memory.bytes(at, length.min(MAX_TEXT_BYTES) as usize)?;
    if bytes.is_empty() {
        return Err(WhyNot::Implausible("an empty string"));
    }
    Ok(printable(&String::from_utf8_lossy(&bytes)))
}

/// Returns where the elements of an array are.
fn elements(memory: &dyn Memory, object: u64) -> Result<u64, WhyNot> {
    let flags = memory.u64(object)?;
    if flags & TYPE_MASK != ARRAY {
        return Err(WhyNot::Implausible("no array"));
    }
    if flags & INSIDE != 0 { Ok(object.wrapping_add(16)) } else { memory.u64(object.wrapping_add(32)) }
}

/// Reads the name that has a number.
fn name(
    memory: &dyn Memory,
    layout: &Layout,
    file: &RuntimeFile,
    bias: u64,
    id: u64,
) -> Result<String, WhyNot> {
    let begin = number(file, VARIABLES_AT).wrapping_add(bias);
    let bytes = number(file, VARIABLE_BYTES_AT).min(MAX_VARIABLE_BYTES) as usize;
    let variables = memory.bytes(begin, bytes)?;
    let entry = |table: u64, number: u64| {
        let names = memory.u64(elements(memory, table)?.wrapping_add(number / ENTRIES * 8))?;
        let at = elements(memory, names)?.wrapping_add(number % ENTRIES * ENTRY_BYTES);
        text(memory, layout, memory.u64(at)?)
    };
    // The number of the last name, then their numbers by names, then the names by their numbers.
    let table = (0..bytes.saturating_sub(16))
        .step_by(8)
        .filter(|at| (PLUS.0..MAX_NAMES).contains(&word(&variables, *at)))
        .map(|at| word(&variables, at + 16))
        .take(MAX_CANDIDATES)
        .find(|table| entry(*table, PLUS.0).is_ok_and(|name| name == PLUS.1))
        .ok_or(WhyNot::Implausible("no table of names"))?;
    let number = if id > LAST_OPERATOR { id >> SCOPE_BITS } else { id };
    if number > MAX_NAMES {
        return Err(WhyNot::Implausible("no name"));
    }
    entry(table, number)
}

/// Reads the lines of a function's instructions.
fn read_lines(memory: &dyn Memory, object: u64, body: &[u8], layout: &Layout) -> Result<Vec<u8>, WhyNot> {
    let count = half(body, COUNT).min(MAX_INSTRUCTIONS);
    let distance = word(body, ENCODED).wrapping_sub(object) as u32;
    let entry_count = half(body, layout.lines + 16).min(count) as usize;
    let entries = memory.bytes(word(body, layout.lines), entry_count * LINE_BYTES)?;
    let line = |entry: usize| half(&entries, entry * LINE_BYTES);
    if entry_count <= 1 {
        return Ok(instruction_lines::table(distance, count, (0..count).map(|_| line(0))));
    }
    let ranks = Ranks::read(memory, word(body, layout.lines + 24), count)?;
    let lines =
        (0..count).map(|index| ranks.of(index).checked_sub(1).map_or(0, |entry| line(entry as usize)));
    Ok(instruction_lines::table(distance, count, lines))
}

/// A set of instructions: for each instruction, how many of the set are before it or it. The first 54 have seven bits each, nine
/// in a word. Each block of 512 others has the number before it, that before each of its eight words but the first, nine bits
/// each, and the words with one bit for each instruction.
struct Ranks {
    bytes: Vec<u8>,
}

impl Ranks {
    const FIRST: u32 = 54;
    const FIRST_BYTES: usize = 48;
    const BLOCK: u32 = 512;
    const BLOCK_BYTES: usize = 80;

    fn read(memory: &dyn Memory, at: u64, count: u32) -> Result<Self, WhyNot> {
        let bytes = if count < Self::FIRST {
            (count as usize).div_ceil(9) * 8
        } else {
            Self::FIRST_BYTES + (count - Self::FIRST).div_ceil(Self::BLOCK) as usize * Self::BLOCK_BYTES
        };
        Ok(Self { bytes: memory.bytes(at, bytes)? })
    }

    fn of(&self, index: u32) -> u32 {
        let Some(behind) = index.checked_sub(Self::FIRST) else {
            return (word(&self.bytes, (index / 9 * 8) as usize) >> (index % 9 * 7) & 0x7f) as u32;
        };
        let block = Self::FIRST_BYTES + (behind / Self::BLOCK) as usize * Self::BLOCK_BYTES;
        let (part, bit) = (behind % Self::BLOCK / 64, behind % 64);
        let before = match part {
            0 => 0,
            part => word(&self.bytes, block + 8) >> ((part - 1) * 9) & 0x1ff,
        };
        let bits = word(&self.bytes, block + 16 + part as usize * 8) << (63 - bit);
        half(&self.bytes, block).wrapping_add(before as u32).wrapping_add(bits.count_ones())
    }
}

#[cfg(test)]
mod tests {
    use std::fs::File;

    use gannet_unwind::limits::TableLimits;
    use proptest::prelude::*;

    use super::{super::hostile::Hostile, *};

    fn file(version: (u8, u8), addresses: Vec<u64>) -> RuntimeFile {
        let detected = Detected { version, version_text: String::new(), addresses, layout: 1 };
        RuntimeFile { runtime: &Ruby, detected }
    }

    const AT: u64 = 0x1000;
    const FUNCTION_OBJECT: u64 = 0x1100;
    const ENTRY_OBJECT: u64 = 0x1140;

    /// Memory from 0x1000 on with a function of 3.3 and one of C.
    fn functions() -> Vec<u8> {
        let mut bytes = vec![0; 0x5000];
        let mut set = |at: u64, value: &[u8]| {
            let at = (at - AT) as usize;
            bytes[at..at + value.len()].copy_from_slice(value);
        };
        let mut string = |at: u64, value: &[u8]| {
            set(at, &STRING.to_ne_bytes());
            set(at + 16, &(value.len() as u64).to_ne_bytes());
            set(at + 24, value);
        };
        string(0x1200, b"block in run");
        string(0x1240, b"/srv/app.rb");
        string(0x1280, b"+");
        string(0x12c0, b"each");
        let mut word = |at: u64, value: u64| set(at, &value.to_ne_bytes());
        let internal = |kind: u64| INTERNAL | kind << KIND_SHIFT;
        word(FUNCTION_OBJECT, internal(INSTRUCTIONS));
        word(FUNCTION_OBJECT + 16, 0x1300);
        // The body: 60 instructions from 0x1700 on, three entries of lines.
        word(0x1300, 60 << 32);
        word(0x1300 + 8, 0x1700);
        word(0x1300 + 64, 0x1400);
        word(0x1300 + 80, 0x1200);
        word(0x1300 + 88, 11);
        word(0x1300 + 112, 0x1440);
        word(0x1300 + 128, 3);
        word(0x1300 + 136, 0x1480);
        // The paths.
        word(0x1400, ARRAY | INSIDE);
        word(0x1410, 0x1240);
        for (entry, line) in [11, 12, 14].into_iter().enumerate() {
            word(0x1440 + entry as u64 * LINE_BYTES as u64, line);
        }
        // The entries begin at the instructions 0, 3 and 57.
        let ranks = |from: u64| (0..9).map(|bit| (if from + bit < 3 { 1 } else { 2 }) << (7 * bit)).sum();
        for part in 0..6 {
            word(0x1480 + part * 8, ranks(part * 9));
        }
        word(0x1480 + 48, 2);
        word(0x1480 + 64, 1 << (57 - 54));
        // A function of C.
        word(ENTRY_OBJECT, internal(METHOD_ENTRY));
        word(ENTRY_OBJECT + 16, 0x9999);
        word(ENTRY_OBJECT + 24, 600 << SCOPE_BITS | 1);
        // The table of names is the third variable.
        word(0x1010, 1);
        word(0x1018, 1000);
        word(0x1028, 0x1600);
        word(0x1600, ARRAY | INSIDE);
        word(0x1610, 0x1640);
        word(0x1618, 0x1680);
        for (array, entries) in [(0x1640, 0x2000), (0x1680, 0x4000)] {
            word(array, ARRAY);
            word(array + 32, entries);
        }
        word(0x2000 + 0x2b * 16, 0x1280);
        word(0x4000 + (600 - 512) * 16, 0x12c0);
        bytes
    }

    fn read(bytes: &[u8], object: u64) -> Result<FunctionText, WhyNot> {
        let sum = sum_words([word(bytes, (object - AT) as usize + BODY)].into_iter());
        let file = file((3, 3), vec![AT, 0, AT, 0x80]);
        Ruby.read_function(&file, 0, object, sum, &Hostile::new(bytes, Some(AT)))
    }

    #[test]
    fn a_function_has_its_label_and_its_lines() {
        let text = read(&functions(), FUNCTION_OBJECT).unwrap();
        assert_eq!(
            (text.name.as_str(), text.file.as_str(), text.first_line),
            ("block in run", "/srv/app.rb", 11)
        );
        // The first instruction is 0x600 behind the object. A frame has the one behind that which runs.
        let lines: Vec<u32> = [0, 1, 3, 4, 57, 58, 60, 61]
            .into_iter()
            .map(|index| Ruby.line(&file((3, 3), vec![]), &text, 0x600 + index * 8))
            .collect();
        assert_eq!(lines, [11, 11, 11, 12, 12, 14, 14, 0]);
        for position in [0, 0x5f8, 0x601, u32::MAX] {
            assert_eq!(Ruby.line(&file((3, 3), vec![]), &text, position), 0);
        }
    }

    #[test]
    fn a_function_of_c_has_its_name() {
        let bytes = functions();
        let text = read(&bytes, ENTRY_OBJECT).unwrap();
        assert_eq!(text, FunctionText { name: "each".to_owned(), ..FunctionText::default() });
        let mut without = bytes.clone();
        without[0x280 + 24] = b'-';
        assert_eq!(read(&without, ENTRY_OBJECT), Err(WhyNot::Implausible("no table of names")));
    }

    #[test]
    fn what_is_no_function_gives_a_reason() {
        let mut bytes = functions();
        assert_eq!(read(&bytes, 0x1200), Err(WhyNot::Implausible("no function")));
        let memory = Hostile::new(&bytes, Some(AT));
        let read_as =
            |version, object| Ruby.read_function(&file(version, vec![]), 0, object, 1, &memory).unwrap_err();
        let other = WhyNot::Implausible("another function than the samples had");
        assert_eq!(read_as((3, 3), FUNCTION_OBJECT), other);
        assert_eq!(read_as((3, 3), 0x9000), WhyNot::Unreadable);
        assert_eq!(read_as((3, 2), FUNCTION_OBJECT), WhyNot::Version);
        bytes[0x300 + 64..0x300 + 72].copy_from_slice(&0x1140_u64.to_ne_bytes());
        assert_eq!(read(&bytes, FUNCTION_OBJECT), Err(WhyNot::Implausible("no array")));
    }

    #[test]
    fn a_process_has_the_place_of_its_threads_states() {
        let mut bytes = vec![0; 0x1000];
        let attach = |bytes: &[u8], version, addresses: &[u64]| {
            let memory = Hostile::new(bytes, Some(0x7000));
            Ruby.attach(&file(version, addresses.to_vec()), 0x5000, &memory).map(|attached| match attached {
                Attachment::List(layout) => layout,
                other => panic!("Ruby has lists: {other:?}"),
            })
        };
        // The dynamic linker has not come that far.
        assert_eq!(attach(&bytes, (3, 3), &[0x2100, 16]), Err(WhyNot::NotStarted));
        bytes[0x100] = 3;
        let layout = attach(&bytes, (3, 3), &[0x2100, 16]).unwrap();
        assert_eq!((layout.thread_offset, layout.steps.as_slice()), (8, &[48, 16, 16][..]));
        bytes[0x108] = 8;
        assert_eq!(attach(&bytes, (3, 1), &[0x2100, 0]).unwrap().steps.as_slice(), [48, 8, 16]);
        assert_eq!(attach(&bytes, (3, 1), &[]), Err(WhyNot::NoThreadState));
        assert_eq!(attach(&bytes, (3, 2), &[0x2100, 0]), Err(WhyNot::Version));
        bytes[0x107] = 1;
        assert_eq!(
            attach(&bytes, (3, 1), &[0x2100, 0]),
            Err(WhyNot::Implausible("no place of a thread's state"))
        );
    }

    #[test]
    fn the_place_of_a_threads_state_is_in_code() {
        // sub rsp, 8; lea rdi, [rip + 0x100]; call; mov rax, [rax + 0x10]
        let local = [
            &[0x48, 0x83, 0xec, 8, 0x48, 0x8d, 0x3d, 0, 1, 0, 0, 0xe8, 1, 2, 3, 4][..],
            &[0x48, 0x8b, 0x80, 0x10, 0, 0, 0],
        ]
        .concat();
        assert_eq!(thread_state(&local, 0x1000), Some((0x100b + 0x100, 0x10)));
        // data16 lea rdi, [rip + 0x100]; data16 data16 rex.W call; mov rax, [rax]
        let global =
            [&[0x66, 0x48, 0x8d, 0x3d, 0, 1, 0, 0, 0x66, 0x66, 0x48, 0xe8, 1, 2, 3, 4][..], &[0x48, 0x8b, 0]]
                .concat();
        assert_eq!(thread_state(&global, 0x1000), Some((0x1008 + 0x100, 0)));
        for length in 0..local.len() {
            assert_eq!(thread_state(&local[..length], 0), None, "{length}");
        }
    }

    /// Needs `ruby3.1` of Debian 12.
    #[test]
    fn the_file_of_ruby_has_version_and_thread_state() {
        let elf_of = |path: &str| File::open(path).unwrap();
        let limits = TableLimits::default().elf();
        let open = elf_of("/usr/lib/x86_64-linux-gnu/libruby-3.1.so.3.1");
        let detected = Ruby.detect(&Elf::parse(&open, &limits).unwrap(), "").unwrap();
        assert_eq!(detected.version, (3, 1));
        assert!(detected.version_text.starts_with("3.1."), "{detected:?}");
        assert_eq!((detected.addresses.len(), detected.layout), (4, 131));
        let other = elf_of("/usr/bin/python3");
        assert_eq!(Ruby.detect(&Elf::parse(&other, &limits).unwrap(), ""), None);
    }

    proptest! {
        /// Checks that no memory makes the readers panic or read without end.
        #[test]
        fn any_memory_is_read_without_panic(bytes in prop::collection::vec(any::<u8>(), 1..4096), kind: u8) {
            fuzz::ruby(&[&[kind, 3], &bytes[..]].concat());
        }
    }
}
