//! Index entries of batches, from their metadata. Storing, comparing and reading back use the same functions, so they agree.

use gannet_proto::labels::Labels;
use ulid::Ulid;

use super::{
    meta::ObjectMeta,
    object::{ObjectKey, packed_header_len},
    row::ProfileRow,
};
use crate::time;

/// Returns the index entry of an object of the older layout with this metadata.
pub(super) fn describe_object(
    meta: &ObjectMeta,
    object_bytes: u64,
) -> Option<(Labels, ObjectKey, ProfileRow)> {
    describe(meta, object_bytes.saturating_sub(packed_header_len(meta)), object_bytes)
}

/// Returns the index entry of a batch with this metadata and a profile of this many bytes. `object_bytes`: size of its own
/// object, or 0 in a segment. Storing and rebuilding both use it, so they agree.
pub(super) fn describe(
    meta: &ObjectMeta,
    bytes: u64,
    object_bytes: u64,
) -> Option<(Labels, ObjectKey, ProfileRow)> {
    let batch = meta.batch.as_ref()?;
    let key = ObjectKey {
        start_ms: batch.start.as_ref().and_then(time::to_ms)?,
        id: Ulid::from_string(&batch.batch_id).ok()?,
    };
    let row = ProfileRow {
        duration_ms: batch.duration.as_ref().and_then(time::duration_to_ms).unwrap_or(0),
        samples: batch.samples,
        bytes,
        types: meta.types.clone(),
        rule_id: batch.rule_id.clone(),
        revision: batch.revision,
        reason: batch.reason.clone(),
        window: Ulid::from_string(&batch.window_id).map(|w| w.0.to_be_bytes().to_vec()).unwrap_or_default(),
        object_bytes,
        ..ProfileRow::default()
    };
    Some((batch.labels.clone(), key, row))
}
