//! Limits that several modules share.

/// Ratio of decompressed to compressed size above which the collector refuses a profile.
pub(crate) const MAX_INFLATION: usize = 16;

/// Length of the longest node name in bytes. A node name is a DNS name.
pub(crate) const MAX_NODE_NAME: usize = 253;
