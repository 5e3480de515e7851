//! Profiles in the pprof format: writing, reading, checking, merging, and the trees and tables made of them.
//!
//! What is written here is byte-stable: the same content gives the same bytes, in whatever order it was added.

mod builder;
mod check;
mod codec;
mod flame;
mod graph;
mod merge;
mod split;

pub use builder::{Builder, Header, Label, LabelValue, Line, LocationId, Mapping, MappingId};
pub use check::{Summary, check, sample_type_index};
pub use codec::{decode, encode};
pub use flame::{FlameTree, Side, flat, folded};
pub use merge::Merger;
pub use split::split;

pub use crate::profiles::Profile;

/// Why bytes are no profile, or a profile cannot be used.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum PprofError {
    /// More bytes than the caller is ready to hold.
    #[error("the profile is larger than {max} bytes once inflated")]
    TooLarge {
        /// The caller's limit.
        max: usize,
    },
    /// The compressed data ends early.
    #[error("the profile is cut short: its compressed data ends early")]
    Truncated,
    /// Not gzip after all, or damaged.
    #[error("the profile's compressed data is damaged: {0}")]
    Gzip(String),
    /// The bytes are not a pprof message.
    #[error("not a pprof profile: {0}")]
    Protobuf(String),
    /// A profile without values says nothing.
    #[error("the profile has no sample types")]
    NoSampleTypes,
    /// The string table must begin with the empty string.
    #[error("the profile's string 0 is not the empty string")]
    FirstString,
    /// An index that leads nowhere.
    #[error("{what} refers to {to} {index}, which the profile does not have")]
    Dangling {
        /// Who refers.
        what: &'static str,
        /// To what kind of thing.
        to: &'static str,
        /// By which number.
        index: i128,
    },
    /// An id of 0 or one that is used twice.
    #[error("the id {id} of a {what} is 0 or used twice")]
    Id {
        /// Whose id.
        what: &'static str,
        /// The id.
        id: u64,
    },
    /// A sample must have one value for each sample type.
    #[error("sample {sample} has {found} values for {expected} sample types")]
    Values {
        /// Which, counted from 0.
        sample: usize,
        /// Its values.
        found: usize,
        /// The profile's sample types.
        expected: usize,
    },
    /// A count below zero.
    #[error("sample {sample} has a negative value")]
    Negative {
        /// Which, counted from 0.
        sample: usize,
    },
    /// Two labels of one sample share their key.
    #[error("sample {sample} has the label `{key}` twice")]
    DuplicateLabel {
        /// Which, counted from 0.
        sample: usize,
        /// The key.
        key: String,
    },
    /// Profiles of different kinds cannot be added up.
    #[error("a profile of [{other}] cannot be merged with one of [{first}]: select profiles of one kind")]
    DifferentTypes {
        /// The types of the profiles so far.
        first: String,
        /// The types of the one that does not fit.
        other: String,
    },
}

#[cfg(test)]
mod tests;
