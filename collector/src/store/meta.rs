//! Metadata of stored batches, as objects hold it.

use gannet_proto::ingest::Batch;

/// Metadata of an object.
#[derive(Clone, PartialEq, prost::Message)]
pub(super) struct ObjectMeta {
    /// The batch without its profile.
    #[prost(message, optional, tag = "1")]
    pub(super) batch: Option<Batch>,
    /// Sample types in the order of the profile's values.
    #[prost(message, repeated, tag = "2")]
    pub(super) types: Vec<TypeTotal>,
}

/// A sample type, and the sum of its values over the profile.
#[derive(Clone, PartialEq, prost::Message)]
pub(crate) struct TypeTotal {
    /// Type and unit, like `cpu/nanoseconds`.
    #[prost(string, tag = "1")]
    pub(crate) name: String,
    #[prost(int64, tag = "2")]
    pub(crate) total: i64,
}
