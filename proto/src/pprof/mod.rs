//! Profiles in the pprof format: builds, encodes, decodes, checks, merges and splits them, and makes flame graphs and
//! tables of functions from them.
//!
//! Equal profiles have equal bytes, regardless of the order in which their samples were added.

mod builder;
mod check;
mod codec;
mod distinct;
mod error_frames;
mod export;
mod flame;
mod graph;
mod guessed;
mod interpreters;
mod merge;
mod pieces;
mod select;
mod split;

pub use builder::{Builder, Header, Label, LabelValue, Line, LocationId, Mapping, MappingId};
pub use check::{Summary, check, sample_type_index, samples};
pub use codec::{Encoding, decode, decode_raw, encode, encode_as, inflate, to_gzip, to_zstd};
pub use distinct::{Distinct, DistinctSample, Frame};
pub use error_frames::is_error_frame;
pub use export::{Export, ExportFrame, ExportSample};
pub use flame::{CallNode, FlameTree, Side, flat, folded, folded_name};
pub use guessed::{GUESSED_FROM, sure_frames};
pub use interpreters::{InterpreterFrames, interpreted_name, is_interpreted};
pub use merge::Merger;
pub use pieces::{PIECES, PIECES_WINDOW, PieceDecoder, PieceEncoder, PieceError};
pub use select::{select_type, stacks_below};
pub use split::{halves, needed, split};

pub use crate::profiles::Profile;

/// Frames of one stack, with inlined ones. A flame graph is a tree of this depth, which gRPC encodes by recursion.
pub const MAX_STACK_FRAMES: usize = 1024;

/// Reasons why bytes are not a profile, or why a profile cannot be used.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum PprofError {
    /// The inflated profile is larger than the limit of the caller.
    #[error("the profile is larger than {max} bytes after decompression")]
    TooLarge {
        /// The limit in bytes.
        max: usize,
    },
    /// The compressed data ends early.
    #[error("the profile is cut short: its compressed data ends early")]
    Truncated,
    /// The data starts like gzip but is damaged.
    #[error("the profile's compressed data is damaged: {0}")]
    Gzip(String),
    /// The data starts like zstd but is damaged, or its frame does not state its size.
    #[error("the profile's zstd frame cannot be read: {0}")]
    Zstd(String),
    /// The bytes are not a pprof message.
    #[error("not a pprof profile: {0}")]
    Protobuf(String),
    /// The profile has no values.
    #[error("the profile has no sample types")]
    NoSampleTypes,
    /// The string table does not start with the empty string.
    #[error("the profile's string 0 is not the empty string")]
    FirstString,
    /// An id or index has no target.
    #[error("{what} refers to {to} {index}, which the profile does not have")]
    Dangling {
        /// The referring part, with its article.
        what: &'static str,
        /// The kind of the target.
        to: &'static str,
        /// The id or index.
        index: i128,
    },
    /// An id is 0, or two entries have it.
    #[error("the id {id} of a {what} is 0 or used twice")]
    Id {
        /// The kind of the entry.
        what: &'static str,
        /// The id in question.
        id: u64,
    },
    /// A sample has more or fewer values than the profile has sample types.
    #[error("sample {sample} has {found} values for {expected} sample types")]
    Values {
        /// Index of the sample.
        sample: usize,
        /// Number of its values.
        found: usize,
        /// Number of sample types.
        expected: usize,
    },
    /// A value is negative.
    #[error("sample {sample} has a negative value")]
    Negative {
        /// Index of the sample.
        sample: usize,
    },
    /// Two labels of one sample have the same key.
    #[error("sample {sample} has the label `{key}` twice")]
    DuplicateLabel {
        /// Index of the sample.
        sample: usize,
        /// Key of the label.
        key: String,
    },
    /// Profiles with different sample types cannot be merged.
    #[error("a profile of [{other}] cannot be merged with one of [{first}]: select profiles of one kind")]
    DifferentTypes {
        /// Sample types of the profiles before.
        first: String,
        /// Sample types of the other profile.
        other: String,
    },
}

#[cfg(test)]
mod tests;
