//! Where each version of PHP keeps what is needed of its structures, in bytes on a 64-bit machine.

/// The layout of one version.
#[derive(Clone, Copy, Debug)]
pub(super) struct Layout {
    /// Its number among the layouts of all runtimes.
    pub(super) number: u8,
    /// In `executor_globals`: the size of a page of the stack, and the newest frame.
    pub(super) stack_page: u64,
    pub(super) current_frame: u64,
    /// In a function: the number of its instructions, the first one, and the name of its file, behind which its first line stands.
    pub(super) instruction_count: usize,
    pub(super) instructions: usize,
    pub(super) file_name: u64,
    /// The words of a function, from its begin on, that never change while it runs: up to its instructions, by which closures
    /// differ.
    pub(super) sum_words: u8,
}

const V8_2: Layout = Layout {
    number: 82,
    stack_page: 480,
    current_frame: 488,
    instruction_count: 80,
    instructions: 88,
    file_name: 152,
    sum_words: 12,
};

const V8_4: Layout =
    Layout { number: 84, instruction_count: 96, instructions: 104, file_name: 168, sum_words: 14, ..V8_2 };

/// Returns the layout of a version.
pub(super) fn of(version: (u8, u8)) -> Option<&'static Layout> {
    Some(match version {
        (8, 2) => &V8_2,
        (8, 4) => &V8_4,
        _ => return None,
    })
}
