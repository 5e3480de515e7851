//! The changes of one commit of the index.

use gannet_proto::labels::Labels;
use ulid::Ulid;

use super::{
    object::{ObjectKey, ObjectName},
    row::{IndexedObject, StoredProfile, series_bytes},
};

/// A new entry.
pub(super) struct AddedProfile {
    pub(super) profile: StoredProfile,
    /// Space that the row takes on the disk, with its object in the older layout.
    pub(super) disk_bytes: u64,
}

/// The changes of one commit.
#[derive(Default)]
pub(super) struct IndexChange {
    pub(super) add: Vec<AddedProfile>,
    pub(super) add_series: Vec<(u64, Labels)>,
    /// Segments with the space that they take on the disk. `add` holds their rows.
    pub(super) add_segments: Vec<(Ulid, u64)>,
    /// Batches of other rows that a segment holds too.
    pub(super) copies: Vec<(Ulid, Ulid)>,
    /// Batches in `add` that have a row in another segment, with that segment.
    pub(super) moved: Vec<(Ulid, Ulid)>,
    pub(super) remove: Vec<(u64, ObjectKey)>,
    pub(super) remove_segments: Vec<Ulid>,
    pub(super) remove_series: Vec<u64>,
    /// Deleted batches with their starts in milliseconds.
    pub(super) hide: Vec<(Ulid, u64)>,
    /// Objects with deleted batches, by the hours of their directories.
    pub(super) doom: Vec<(u64, ObjectName)>,
    /// Such objects whose other batches are in other segments by this time in milliseconds.
    pub(super) replaced: Vec<((u64, ObjectName), u64)>,
    /// Such objects that are gone.
    pub(super) done: Vec<(u64, ObjectName)>,
    /// Segments that a deletion made, with those that they replace.
    pub(super) origins: Vec<(Ulid, Ulid)>,
}

impl IndexChange {
    /// Returns a change that removes these entries, series and segments.
    pub(super) fn removing(objects: &[IndexedObject], series: &[u64], segments: &[Ulid]) -> Self {
        Self {
            remove: objects.iter().map(|object| (object.series, object.key)).collect(),
            remove_series: series.to_vec(),
            remove_segments: segments.to_vec(),
            ..Self::default()
        }
    }

    /// Returns an upper estimate of the space that the change takes in the index, in bytes.
    pub(super) fn index_bytes(&self) -> u64 {
        let rows = self.add.iter().map(|added| added.profile.row.index_bytes());
        rows.chain(self.add_series.iter().map(|(_, labels)| series_bytes(labels))).sum()
    }
}
