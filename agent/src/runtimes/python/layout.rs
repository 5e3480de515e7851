//! Where each version of CPython keeps what is needed of its structures, in bytes on a 64-bit machine.

use crate::model::ListEnd;

/// The form of the table of lines.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum LineTable {
    /// Up to 3.9.
    Lnotab,
    /// The form of 3.10 only.
    Ranges,
    /// From 3.11 on.
    Locations,
}

/// The layout of one version.
#[derive(Clone, Copy, Debug)]
pub(super) struct Layout {
    /// In `_PyRuntime`: the first interpreter.
    pub(super) interpreter: u64,
    /// In an interpreter: its first thread state.
    pub(super) threads: u64,
    /// In a thread state: the number that `pthread_self` returned to it, which is the thread pointer.
    pub(super) thread_id: u64,
    /// Whether a thread keeps its state in a thread-local variable; else in a value of `pthread_setspecific`.
    pub(super) is_variable: bool,
    /// From a thread state to its newest frame, and the step whose word lies in the C frame of the loop.
    pub(super) steps: &'static [i32],
    pub(super) native_step: u8,
    /// Of a frame, each a number of 8-byte units: code object, previous frame, instruction.
    pub(super) words: u8,
    pub(super) code: u8,
    /// Bits of the word of the code object that are its address; from 3.14 on the lowest are a tag.
    pub(super) code_mask: u64,
    pub(super) previous: u8,
    pub(super) instruction: u8,
    /// Whether the instruction is an address; else a number of units of this many bytes.
    pub(super) instruction_is_address: bool,
    pub(super) instruction_bytes: i64,
    pub(super) end: ListEnd,
    /// In a code object.
    pub(super) first_line: usize,
    pub(super) file_name: usize,
    /// The qualified name, or up to 3.10 the name.
    pub(super) name: usize,
    pub(super) line_table: usize,
    pub(super) line_form: LineTable,
    /// The first instruction; 0 if instructions are in another object.
    pub(super) instructions: i64,
    /// The words that never change while the object lives: offset and number.
    pub(super) fixed: (u32, u8),
    /// Bytes of the head of all objects, whose last word is the type. A length follows in objects that have one.
    pub(super) head: usize,
    /// Bytes of a string's header: of ASCII, and of other text.
    pub(super) text_headers: (u64, u64),
    /// Words of the interpreter's description of itself on which the numbers above depend: index of the 64-bit word, and value.
    pub(super) described: &'static [(u8, u64)],
}

/// Up to 3.10 each Python frame has a C frame of its own, and is an object.
const V3_9: Layout = Layout {
    interpreter: 32,
    threads: 8,
    thread_id: 176,
    is_variable: false,
    steps: &[24],
    native_step: 0,
    words: 14,
    code: 4,
    code_mask: u64::MAX,
    previous: 3,
    // f_lasti has four bytes, and others of no meaning here behind it.
    instruction: 13,
    instruction_is_address: false,
    instruction_bytes: 1,
    end: ListEnd::Each,
    first_line: 40,
    file_name: 104,
    name: 112,
    line_table: 120,
    line_form: LineTable::Lnotab,
    instructions: 0,
    // Argument counts to the first line, code to the table of lines.
    fixed: (16, 4),
    head: 16,
    text_headers: (48, 72),
    described: &[],
};

const V3_10: Layout = Layout { instruction: 12, instruction_bytes: 2, line_form: LineTable::Ranges, ..V3_9 };

/// From 3.11 on a loop runs Python functions that Python functions call. The frame by which C code entered it is marked.
const V3_11: Layout = Layout {
    interpreter: 40,
    threads: 16,
    thread_id: 152,
    is_variable: false,
    // The loop has a variable that points to its newest frame, and the thread state points to that variable.
    steps: &[56, 8],
    native_step: 1,
    words: 10,
    code: 4,
    code_mask: u64::MAX,
    previous: 6,
    instruction: 7,
    instruction_is_address: true,
    instruction_bytes: 1,
    end: ListEnd::Last(68, 1),
    first_line: 72,
    file_name: 112,
    name: 128,
    line_table: 136,
    line_form: LineTable::Locations,
    instructions: 184,
    // Argument counts to the table of lines.
    fixed: (56, 11),
    head: 16,
    text_headers: (48, 72),
    described: &[],
};

/// From 3.12 on a frame without a function, a variable of the loop, ends each run.
const V3_12: Layout = Layout {
    threads: 72,
    thread_id: 136,
    steps: &[56, 0],
    code: 0,
    previous: 1,
    end: ListEnd::Native(70, 3),
    first_line: 68,
    instructions: 192,
    text_headers: (40, 56),
    ..V3_11
};

const V3_13: Layout = Layout {
    interpreter: 632,
    threads: 7344,
    thread_id: 152,
    steps: &[72],
    native_step: 0,
    instructions: 200,
    ..V3_12
};

/// Without the global lock the head of each object has 16 bytes more: its thread, its lock, and two counts of references.
const V3_13T: Layout = Layout {
    first_line: 84,
    file_name: 128,
    name: 144,
    line_table: 152,
    instructions: 216,
    fixed: (72, 11),
    head: 32,
    text_headers: (56, 72),
    // The first interpreter, its threads. Next thread, its interpreter, newest frame, id. Of a frame: previous, code, instruction,
    // owner. Of code: file, qualified name, lines, first line, instructions. The type of an object.
    described: &[
        (5, 632),
        (9, 7344),
        (21, 8),
        (22, 16),
        (23, 72),
        (24, 152),
        (29, 8),
        (30, 0),
        (31, 56),
        (33, 70),
        (35, 128),
        (37, 144),
        (38, 152),
        (39, 84),
        (43, 216),
        (45, 24),
    ],
    ..V3_13
};

const V3_14: Layout =
    Layout { interpreter: 808, code_mask: !3, end: ListEnd::Native(74, 3), instructions: 208, ..V3_13 };

/// From 3.15 on no value of `pthread_setspecific` holds the state.
const V3_15: Layout = Layout {
    interpreter: 936,
    threads: 7336,
    thread_id: 176,
    is_variable: true,
    // The first interpreter, its threads. Next thread, its interpreter, newest frame, id. Of a frame: previous, code, instruction,
    // owner. Of code: file, qualified name, lines, first line, instructions.
    described: &[
        (5, 936),
        (9, 7336),
        (24, 8),
        (25, 16),
        (26, 72),
        (30, 176),
        (40, 8),
        (41, 0),
        (42, 56),
        (44, 74),
        (48, 112),
        (50, 128),
        (51, 136),
        (52, 68),
        (56, 208),
    ],
    ..V3_14
};

/// Added to the minor version, this is the number of the layout without the global lock.
const FREE_THREADED: u8 = 32;

/// Returns the number of the layout of a minor version, among those of all runtimes.
pub(super) fn number(minor: u8, is_free_threaded: bool) -> u8 {
    // No version has such a number yet.
    minor.min(FREE_THREADED - 1) + if is_free_threaded { FREE_THREADED } else { 0 }
}

/// Reports whether a layout is that of a build without the global lock.
pub(super) fn is_free_threaded(number: u8) -> bool {
    number >= FREE_THREADED
}

/// Returns the layout of a version of CPython 3, by its number.
pub(super) fn of(number: u8) -> Option<&'static Layout> {
    const V3_13T_NUMBER: u8 = 13 + FREE_THREADED;
    Some(match number {
        8 | 9 => &V3_9,
        10 => &V3_10,
        11 => &V3_11,
        12 => &V3_12,
        13 => &V3_13,
        14 => &V3_14,
        15 => &V3_15,
        V3_13T_NUMBER => &V3_13T,
        _ => return None,
    })
}
