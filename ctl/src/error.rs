//! Failures of a command, their texts and their exit codes.

use std::io;

use gannet_proto::{connect::DialError, pprof::PprofError};

/// A failed command. Each variant displays as complete sentences for people, one problem a line.
#[derive(Debug, thiserror::Error)]
pub(crate) enum Error {
    /// The connection options cannot work; nothing was sent.
    #[error(transparent)]
    Dial(#[from] DialError),
    /// The collector refused the call or did not answer.
    #[error("{text}{}", lines(.violations))]
    Call {
        /// The collector's message.
        text: String,
        /// Pairs of a request field and the reason why the collector refuses its value.
        violations: Vec<(String, String)>,
    },
    /// A file cannot be read or written.
    #[error("{file}: {source}")]
    File {
        /// Path of the file, or `standard input`.
        file: String,
        /// The error of the operating system.
        source: io::Error,
    },
    /// Rule files hold mistakes: one line for each.
    #[error("{}", .0.join("\n"))]
    Rules(Vec<String>),
    /// A profile is damaged or too large.
    #[error(transparent)]
    Profile(#[from] PprofError),
    /// The output cannot be written, for instance because the reader of a pipe has exited.
    #[error("cannot write the output: {0}")]
    Output(#[from] io::Error),
    /// Any other failure.
    #[error("{0}")]
    Failed(String),
    /// The options contradict each other or leave something out.
    #[error("{0}")]
    Usage(String),
    /// A check found problems and has printed them; no further text follows.
    #[error("the check found problems")]
    CheckFailed,
}

impl Error {
    /// Returns the exit code of the program: 0, 1 (failed) or 2 (wrong usage).
    pub(crate) fn exit_code(&self) -> u8 {
        match self {
            // `gannetctl … | head` succeeds.
            Self::Output(error) if error.kind() == io::ErrorKind::BrokenPipe => 0,
            Self::Usage(_) => 2,
            _ => 1,
        }
    }
}

/// Formats one line for each field.
fn lines(violations: &[(String, String)]) -> String {
    violations.iter().fold(String::new(), |text, (field, reason)| text + "\n  " + field + ": " + reason)
}
