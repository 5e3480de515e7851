//! Memory of a process that was made to harm its reader, and a thread with such a stack.

use std::cell::Cell;

use gannet_elf::Arch;
use gannet_unwind::{
    format::UnwindRule,
    table::UnwindTable,
    unwind::{GeneratedFrame, TableSource, ThreadSnapshot, unwind_stack},
};

use super::{CodeNeeds, CodeWalk, GeneratedCode, Interpreter, Memory, WalkedCode};
use crate::model::{StackWord, boot_time_ns};

/// Reads and bytes that one call may need.
const MAX_READS: usize = 1000;
pub(super) const MAX_BYTES: usize = 1 << 20;

/// Memory that has these bytes from one address on, or at every address, again and again.
pub(super) struct Hostile<'a> {
    bytes: &'a [u8],
    begin: Option<u64>,
    /// Reads and bytes that are left.
    reads: Cell<usize>,
    read_bytes: Cell<usize>,
}

impl<'a> Hostile<'a> {
    /// `bytes` must not be empty.
    pub(super) fn new(bytes: &'a [u8], begin: Option<u64>) -> Self {
        Self::with_limits(bytes, begin, MAX_READS, MAX_BYTES)
    }

    /// The same with other limits of reads and bytes.
    pub(super) fn with_limits(bytes: &'a [u8], begin: Option<u64>, reads: usize, read_bytes: usize) -> Self {
        Self { bytes, begin, reads: Cell::new(reads), read_bytes: Cell::new(read_bytes) }
    }
}

impl Memory for Hostile<'_> {
    fn read(&self, address: u64, bytes: &mut [u8]) -> bool {
        assert!(self.reads.get() > 0 && self.read_bytes.get() >= bytes.len(), "too much is read");
        self.reads.set(self.reads.get() - 1);
        self.read_bytes.set(self.read_bytes.get() - bytes.len());
        if let Some(begin) = self.begin {
            let from = address.checked_sub(begin).and_then(|from| usize::try_from(from).ok());
            let part = from.and_then(|from| self.bytes.get(from..from.checked_add(bytes.len())?));
            part.map(|part| bytes.copy_from_slice(part)).is_some()
        } else {
            let (_, behind) = self.bytes.split_at((address % self.bytes.len() as u64) as usize);
            let mut all = behind.iter().chain(self.bytes.iter().cycle());
            bytes.fill_with(|| all.next().copied().unwrap_or(0));
            true
        }
    }
}

/// Memory above the stack pointer, as a raw sample has it, and frames of a stack.
const STACK_BYTES: usize = 512;
const FRAMES: usize = 64;
/// DWARF numbers of the frame and stack pointer on x86_64.
const FRAME_POINTER: usize = 6;
const STACK_POINTER: usize = 7;

/// A thread that was stopped in generated code.
pub(super) struct HostileThread {
    pc: u64,
    registers: [u64; 16],
    pub(super) stack: Vec<u8>,
    time_ns: u64,
}

/// The words of functions, by program counter.
type FunctionWords = Vec<(u64, Vec<u64>)>;

impl HostileThread {
    /// `registers` need no frame and stack pointer.
    pub(super) fn new(pc: u64, sp: u64, fp: u64, mut registers: [u64; 16], memory: &dyn Memory) -> Self {
        registers[FRAME_POINTER] = fp;
        registers[STACK_POINTER] = sp;
        let mut stack = vec![0; STACK_BYTES];
        let mut lengths = (1..=STACK_BYTES / 8).rev().map(|words| 8 * words);
        let length = lengths.find(|length| memory.read(sp, &mut stack[..*length])).unwrap_or(0);
        stack.truncate(length);
        Self { pc, registers, stack, time_ns: boot_time_ns() }
    }

    /// A thread at an address, at a time.
    #[cfg(test)]
    pub(super) fn at(pc: u64, time_ns: u64, memory: &dyn Memory) -> Self {
        Self { time_ns, ..Self::new(pc, 0, 0, [0; 16], memory) }
    }

    /// Unwinds the stack through code as far as it is known. Returns its functions, and what else must be read.
    pub(super) fn unwind(&self, code: &GeneratedCode) -> (FunctionWords, CodeNeeds) {
        let WalkedCode { words, needs, .. } = self.walk(code);
        (words, needs)
    }

    /// Returns the functions, and the number of frames that have none because that is not proven.
    #[cfg(test)]
    pub(super) fn unwind_proven(&self, code: &GeneratedCode) -> (FunctionWords, u32) {
        let WalkedCode { words, unproven, .. } = self.walk(code);
        (words, unproven)
    }

    fn walk(&self, code: &GeneratedCode) -> WalkedCode {
        let snapshot = ThreadSnapshot {
            arch: Arch::X86_64,
            pc: self.pc,
            registers: &self.registers,
            stack_start: self.registers[STACK_POINTER],
            stack: &self.stack,
            unread: &[],
        };
        let source = CodeAlone(CodeWalk::new(code, self.time_ns));
        let unwound = unwind_stack(&snapshot, &source, FRAMES);
        assert!(unwound.frames.len() <= FRAMES, "{} frames", unwound.frames.len());
        source.0.finish()
    }
}

/// Name, file and line of a function.
pub(super) type NamedFunction = (String, String, u32);

/// Returns the functions that have names, innermost first.
pub(super) fn named(frames: &FunctionWords, interpreter: &Interpreter) -> Vec<NamedFunction> {
    let mut named = Vec::new();
    for pair in frames.iter().flat_map(|(_, words)| words.as_chunks::<2>().0) {
        let words = pair.map(StackWord::decode);
        assert!(
            matches!(words, [StackWord::Function(_), StackWord::Position { .. }]),
            "{pair:x?} are no function"
        );
        let [StackWord::Function(number), StackWord::Position { position, .. }] = words else { continue };
        let Some(function) = interpreter.function(number) else { continue };
        let Some(text) = function.texts() else { continue };
        assert!(!text.name.contains(char::is_control) && !text.file.contains(char::is_control));
        named.push((text.name.clone(), text.file.clone(), interpreter.line(text, position)));
    }
    named
}

/// No code but the generated one.
struct CodeAlone<'a>(CodeWalk<'a>);

impl TableSource for CodeAlone<'_> {
    fn find(&self, _: u64) -> Option<(&UnwindTable, u64)> {
        None
    }

    fn generated(&self, frame: &GeneratedFrame<'_>) -> Option<UnwindRule> {
        self.0.rule(frame, frame.pc)
    }
}
