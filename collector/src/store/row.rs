//! Rows of the index: the descriptions of stored batches.

use gannet_proto::labels::Labels;
use prost::Message;
use ulid::Ulid;

use super::{meta::TypeTotal, object::ObjectKey, segment::SegmentPosition};

/// Bytes between two profiles of a segment up to which one read returns both. A request to a bucket takes as long as
/// reading some hundred KiB.
const MAX_GAP_BYTES: u64 = 256 << 10;

/// The description of a stored batch.
#[derive(Clone, PartialEq, Message)]
pub(crate) struct ProfileRow {
    #[prost(uint64, tag = "1")]
    pub(crate) duration_ms: u64,
    #[prost(uint64, tag = "2")]
    pub(crate) samples: u64,
    /// Compressed size of the profile. 0: the batch carried only a ledger.
    #[prost(uint64, tag = "3")]
    pub(crate) bytes: u64,
    #[prost(message, repeated, tag = "4")]
    pub(crate) types: Vec<TypeTotal>,
    #[prost(string, tag = "5")]
    pub(crate) rule_id: String,
    #[prost(uint64, tag = "6")]
    pub(crate) revision: u64,
    #[prost(string, tag = "7")]
    pub(crate) reason: String,
    /// ULID of the window, big endian. Empty: none.
    #[prost(bytes = "vec", tag = "8")]
    pub(crate) window: Vec<u8>,
    /// Size of the object with its metadata, in the older layout. 0 in a segment.
    #[prost(uint64, tag = "9")]
    pub(crate) object_bytes: u64,
    /// ULID of the segment, big endian. Empty: an object of its own.
    #[prost(bytes = "vec", tag = "10")]
    pub(super) segment: Vec<u8>,
    /// Offset of the profile in the segment.
    #[prost(uint64, tag = "11")]
    pub(super) offset: u64,
    /// CRC-32 of the profile in the segment.
    #[prost(fixed32, tag = "12")]
    pub(super) crc: u32,
}

/// Space of a row in all tables and in its directory, beside the encoded [`ProfileRow`]. Measured: 330 to 380 bytes with a
/// row of 80 bytes, in a file without free pages. Half as much again is for the free pages of a file that changes.
pub(super) const ROW_BYTES: u64 = 512;
/// Space of a series, beside its labels.
const SERIES_BYTES: u64 = 256;

impl ProfileRow {
    /// Returns an upper estimate of the space that the row takes in the index, in bytes.
    pub(super) fn index_bytes(&self) -> u64 {
        ROW_BYTES + 2 * self.encoded_len() as u64
    }

    /// Returns the row of a profile at this position of a segment.
    pub(super) fn at(self, position: SegmentPosition) -> Self {
        let SegmentPosition { segment, offset, bytes, crc } = position;
        Self { segment: segment.0.to_be_bytes().to_vec(), offset, bytes, crc, object_bytes: 0, ..self }
    }

    /// Returns the segment of the profile, or `None` for an object of its own.
    pub(crate) fn segment(&self) -> Option<Ulid> {
        self.segment.as_slice().try_into().ok().map(|id| Ulid(u128::from_be_bytes(id)))
    }
}

/// Returns an upper estimate of the space that a series takes in the index, in bytes.
pub(super) fn series_bytes(labels: &Labels) -> u64 {
    SERIES_BYTES + 2 * labels.iter().map(|(name, value)| (name.len() + value.len()) as u64).sum::<u64>()
}

/// A stored batch: its series, its key and its description.
#[derive(Clone, Debug)]
pub(crate) struct StoredProfile {
    pub(crate) series: u64,
    pub(crate) key: ObjectKey,
    pub(crate) row: ProfileRow,
}

impl StoredProfile {
    /// Reports whether the batch carried a profile, and not only a ledger.
    pub(super) fn has_profile(&self) -> bool {
        self.row.bytes > 0
    }

    /// Reports whether the profile has an object of its own, in the older layout.
    pub(crate) fn is_outside_segments(&self) -> bool {
        self.row.segment.is_empty()
    }

    /// Reports whether the profile is not in this segment, because a deletion has moved it.
    pub(super) fn has_moved_from(&self, segment: Ulid) -> bool {
        self.row.segment() != Some(segment)
    }

    /// Returns where the profile is.
    pub(crate) fn location(&self) -> ProfileLocation {
        let ProfileRow { offset, bytes, crc, .. } = self.row;
        let position = self.row.segment().map(|segment| SegmentPosition { segment, offset, bytes, crc });
        ProfileLocation { position, key: self.key }
    }
}

/// The object that holds a profile, and the position in it. Ordered by the position in the store, so that one read can
/// return neighbours.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) struct ProfileLocation {
    /// `None`: in an object of its own, in the older layout.
    pub(super) position: Option<SegmentPosition>,
    pub(crate) key: ObjectKey,
}

impl ProfileLocation {
    /// Reports whether one read can return both profiles: they are in the same segment, close to each other.
    pub(crate) fn is_neighbour_of(&self, next: &Self) -> bool {
        self.position.zip(next.position).is_some_and(|(own, next)| {
            own.segment == next.segment && next.offset.saturating_sub(own.range().end) <= MAX_GAP_BYTES
        })
    }
}

/// The part of an entry that removals and comparisons need.
#[derive(Clone, Copy)]
pub(super) struct IndexedObject {
    pub(super) series: u64,
    pub(super) key: ObjectKey,
    /// Space that the row takes on the disk, with its object in the older layout.
    pub(super) disk_bytes: u64,
    /// `None`: an object of its own.
    pub(super) segment: Option<Ulid>,
}
