//! Profiles in the OpenTelemetry protocol (OTLP, `v1development`, the layout of opentelemetry-proto 1.10 and 1.11).
//!
//! In OTLP a profile has one sample type. A pprof profile with several becomes as many OTLP profiles, whose samples stand in the
//! same order. All of them share the tables of one dictionary, which has everything once. What only pprof has travels as
//! attributes, so that a profile that Gannet sent comes back equal.

#![cfg_attr(test, allow(clippy::unwrap_used, clippy::expect_used, clippy::panic))]

mod attributes;
mod decode;
mod dictionary;
mod encode;
pub mod rules;
mod tables;
#[cfg(test)]
mod tests;
mod wire;

use gannet_proto::{
    labels::Labels,
    pprof::{PprofError, Profile},
};
use prost::Message as _;
use sha2::{Digest as _, Sha256};
use ulid::Ulid;

pub use self::{
    decode::{Decoded, Incoming, decode},
    encode::{Encoder, Outgoing},
    wire::{from_json, from_protobuf, to_json},
};

/// Name of Gannet's instrumentation scope.
const SCOPE: &str = "gannet";

/// An id made from the content: its time, and a hash.
fn content_id(labels: &Labels, profile: &Profile) -> Ulid {
    let mut hash = Sha256::new();
    for (name, value) in labels {
        hash.update(format!("{}:{name}{}:{value}", name.len(), value.len()));
    }
    hash.update(profile.encode_to_vec());
    let random = hash.finalize()[..16].iter().fold(0_u128, |sum, byte| sum << 8 | u128::from(*byte));
    Ulid::from_parts(u64::try_from(profile.time_nanos).unwrap_or(0) / 1_000_000, random)
}

/// Reasons why a request, or a profile of it, cannot be read.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum OtlpError {
    /// The bytes are no request.
    #[error("not an ExportProfilesServiceRequest of opentelemetry-proto: {why}")]
    Protobuf {
        /// What the decoder found.
        why: String,
    },
    /// The fields of samples have the numbers of an older layout.
    #[error(
        "the request has the layout of opentelemetry-proto 1.9 or older, which numbers the fields of Sample otherwise ({why}): update \
         the sender, this collector reads 1.10 and 1.11"
    )]
    OldLayout {
        /// What the decoder found.
        why: String,
    },
    /// The text is no request.
    #[error("not an ExportProfilesServiceRequest in the JSON of OTLP: {why}")]
    Json {
        /// What is wrong with the text.
        why: String,
    },
    /// Each index would mean another string.
    #[error("string_table[0] of the dictionary is not the empty string")]
    FirstString,
    /// An index has no entry. A sender of layout 1.9 writes the values of a sample where 1.10 has indexes of attributes.
    #[error(
        "index {index} is not in {table}, which has {entries} entries; if the sender writes the layout of opentelemetry-proto 1.9 or \
         older, update it: this collector reads 1.10 and 1.11"
    )]
    Index {
        /// Name of the table in the dictionary.
        table: &'static str,
        /// The index in question.
        index: i32,
        /// Number of entries of the table.
        entries: usize,
    },
    /// The profile does not say what it counts.
    #[error("a profile has no sample_type")]
    NoSampleType,
    /// The time is after the year 2262.
    #[error("time_unix_nano or duration_nano of a profile is larger than 2^63")]
    Time,
    /// A sample counts nothing.
    #[error(
        "sample {sample} of a profile has neither values nor timestamps; if the sender writes the layout of opentelemetry-proto 1.9 \
         or older, update it: this collector reads 1.10 and 1.11"
    )]
    NoValue {
        /// Number of the sample in its profile.
        sample: usize,
    },
    /// Values and times of a sample do not belong together.
    #[error(
        "sample {sample} of a profile has {values} values and {times} timestamps: send as many of both, or only one kind"
    )]
    Shape {
        /// Number of the sample in its profile.
        sample: usize,
        /// Number of its values.
        values: usize,
        /// Number of its timestamps.
        times: usize,
    },
    /// The profiles would take too much memory.
    #[error("the profiles of the request take more than {max} bytes in memory: send fewer in one request")]
    TooLarge {
        /// The limit in bytes.
        max: usize,
    },
    /// The profiles of a series do not fit together.
    #[error(transparent)]
    Profile(PprofError),
}
