//! Where each version of Ruby keeps what is needed of its structures, in bytes on a 64-bit machine.

/// The layout of one version.
#[derive(Clone, Copy, Debug)]
pub(super) struct Layout {
    /// Its number among the layouts of all runtimes.
    pub(super) number: u8,
    /// From one frame to its caller's.
    pub(super) frame_bytes: u8,
    /// In the body of a function: its first line, and whether that is a Ruby number.
    pub(super) first_line: (usize, bool),
    /// In the body of a function: the lines of its instructions.
    pub(super) lines: usize,
    /// Whether the length of a short string is in its flags.
    pub(super) short_strings: bool,
}

const V3_1: Layout =
    Layout { number: 131, frame_bytes: 64, first_line: (88, true), lines: 120, short_strings: true };

const V3_3: Layout =
    Layout { number: 133, frame_bytes: 56, first_line: (88, false), lines: 112, short_strings: false };

const V3_4: Layout = Layout { number: 134, ..V3_3 };

/// Returns the layout of a version.
pub(super) fn of(version: (u8, u8)) -> Option<&'static Layout> {
    Some(match version {
        (3, 1) => &V3_1,
        (3, 3) => &V3_3,
        (3, 4) => &V3_4,
        _ => return None,
    })
}
