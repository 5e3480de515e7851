//! Frames that are no functions, but say what a stack lacks.

/// The names of these frames. The agent's symbolizer and the flame graphs write them.
const ERROR_FRAMES: [&str; 6] =
    ["[truncated]", "[broken stack]", "[unreadable stack]", "[unknown]", "[no stack]", "[32-bit program]"];

/// Reports whether a frame of this name says what its stack lacks: frames beyond a limit, frames that the unwinder could not
/// find, or a name. Files and kernel modules in brackets are no such frames.
pub fn is_error_frame(name: &str) -> bool {
    ERROR_FRAMES.contains(&name)
}
