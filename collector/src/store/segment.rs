//! Segments: one immutable object per flush, with the profiles of many batches.
//!
//! A segment begins with a header: [`MAGIC`], the version, the length and the CRC-32 of the index part, each as a little
//! endian 32-bit number. The index part follows, a [`SegmentIndex`] in protobuf. Then come the profiles, byte for byte
//! as the agents sent them. So one read of the first bytes rebuilds the index rows of a segment, and a range read
//! returns one profile of it. A cut segment still shows what it held, because the index part comes first.

use std::ops::Range;

use bytes::{Bytes, BytesMut};
use prost::Message as _;
use ulid::Ulid;

use super::meta::ObjectMeta;

pub(super) const MAGIC: [u8; 8] = *b"GANNETSG";
/// Version of the format, which this module reads and writes.
const VERSION: u32 = 1;
/// Bytes before the index part.
pub(super) const HEADER_BYTES: usize = 8 + 3 * 4;

/// The index part of a segment.
#[derive(Clone, PartialEq, prost::Message)]
struct SegmentIndex {
    /// Id of the segment, big endian. A copy under another name is a foreign object.
    #[prost(bytes = "bytes", tag = "1")]
    id: Bytes,
    /// Encoded [`SegmentEntry`] for each batch, in the order of the profiles.
    #[prost(bytes = "bytes", repeated, tag = "2")]
    entries: Vec<Bytes>,
    /// Ids of the segments that a deletion replaced by this one, big endian. Its batches are theirs, without the deleted ones.
    #[prost(bytes = "bytes", repeated, tag = "3")]
    origins: Vec<Bytes>,
}

/// The index part of a segment, as readers need it.
#[derive(Clone, Debug, PartialEq)]
pub(super) struct SegmentHead {
    /// Each batch with the position of its profile.
    pub(super) entries: Vec<(ObjectMeta, SegmentPosition)>,
    /// Segments that a deletion replaced by this one.
    pub(super) origins: Vec<Ulid>,
}

/// One batch of a segment.
#[derive(Clone, PartialEq, prost::Message)]
struct SegmentEntry {
    #[prost(message, optional, tag = "1")]
    meta: Option<ObjectMeta>,
    /// Length of the profile. 0: the batch carried only a ledger.
    #[prost(uint64, tag = "2")]
    bytes: u64,
    /// CRC-32 of the profile.
    #[prost(fixed32, tag = "3")]
    crc: u32,
}

/// The position of a profile in a segment.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) struct SegmentPosition {
    pub(crate) segment: Ulid,
    pub(crate) offset: u64,
    pub(crate) bytes: u64,
    pub(crate) crc: u32,
}

impl SegmentPosition {
    /// Returns the bytes of the segment that hold the profile.
    pub(super) fn range(&self) -> Range<u64> {
        self.offset..self.offset.saturating_add(self.bytes)
    }
}

/// One batch in the form of a segment.
pub(super) struct PackedBatch {
    /// The encoded [`SegmentEntry`].
    entry: Bytes,
    pprof: Bytes,
    /// CRC-32 of the profile.
    crc: u32,
}

impl PackedBatch {
    pub(super) fn new(meta: ObjectMeta, pprof: Bytes) -> Self {
        let crc = crc32fast::hash(&pprof);
        let entry = SegmentEntry { meta: Some(meta), bytes: pprof.len() as u64, crc };
        Self { entry: entry.encode_to_vec().into(), pprof, crc }
    }

    /// Adds a batch of another segment with its former checksum, so that a damaged profile stays damaged.
    pub(super) fn kept(meta: ObjectMeta, pprof: Bytes, crc: u32) -> Self {
        let entry = SegmentEntry { meta: Some(meta), bytes: pprof.len() as u64, crc };
        Self { entry: entry.encode_to_vec().into(), pprof, crc }
    }

    /// Bytes of the batch in a segment.
    pub(super) fn bytes(&self) -> u64 {
        (self.entry.len() + self.pprof.len()) as u64
    }
}

/// Builds a segment. Returns its parts in order, and the position of each profile. Shares the memory of the profiles.
pub(super) fn build(id: Ulid, batches: &[&PackedBatch]) -> (Vec<Bytes>, Vec<SegmentPosition>) {
    build_from(id, batches, &[])
}

/// Builds a segment as [`build`] does, in place of others.
pub(super) fn build_from(
    id: Ulid,
    batches: &[&PackedBatch],
    origins: &[Ulid],
) -> (Vec<Bytes>, Vec<SegmentPosition>) {
    let bytes_of = |id: &Ulid| Bytes::copy_from_slice(&id.0.to_be_bytes());
    let index = SegmentIndex {
        id: bytes_of(&id),
        entries: batches.iter().map(|batch| Bytes::clone(&batch.entry)).collect(),
        origins: origins.iter().map(bytes_of).collect(),
    };
    let index = index.encode_to_vec();
    let mut head = BytesMut::with_capacity(HEADER_BYTES + index.len());
    head.extend_from_slice(&MAGIC);
    for number in [VERSION, index.len() as u32, crc32fast::hash(&index)] {
        head.extend_from_slice(&number.to_le_bytes());
    }
    head.extend_from_slice(&index);
    let mut offset = head.len() as u64;
    let mut parts = vec![head.freeze()];
    let mut positions = Vec::with_capacity(batches.len());
    for PackedBatch { pprof, crc, .. } in batches {
        let bytes = pprof.len() as u64;
        positions.push(SegmentPosition { segment: id, offset, bytes, crc: *crc });
        offset += bytes;
        if !pprof.is_empty() {
            parts.push(Bytes::clone(pprof));
        }
    }
    (parts, positions)
}

/// Why bytes are not a segment that this version reads.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub(super) enum SegmentError {
    #[error("it is no segment: its first bytes are foreign or damaged")]
    Foreign,
    #[error("it has version {0}, and this collector reads version {VERSION}: upgrade the collector")]
    Version(u32),
    #[error("its index part is cut or damaged")]
    Index,
    #[error("it is a copy of segment {0} under another name")]
    Copy(Ulid),
}

/// Returns the length of header and index part, which the header states.
pub(super) fn index_end(head: &[u8]) -> Result<u64, SegmentError> {
    let rest = head.strip_prefix(&MAGIC).ok_or(SegmentError::Foreign)?;
    let (version, rest) = number(rest).ok_or(SegmentError::Foreign)?;
    if version != VERSION {
        return Err(SegmentError::Version(version));
    }
    let (length, _) = number(rest).ok_or(SegmentError::Foreign)?;
    Ok(HEADER_BYTES as u64 + u64::from(length))
}

/// Reads header and index part of the segment with this id. `head` may be longer. Returns each batch with the position
/// of its profile.
pub(super) fn read_index(id: Ulid, head: &[u8]) -> Result<Vec<(ObjectMeta, SegmentPosition)>, SegmentError> {
    Ok(read_head(id, head)?.entries)
}

/// Reads header and index part of the segment with this id. `head` may be longer.
pub(super) fn read_head(id: Ulid, head: &[u8]) -> Result<SegmentHead, SegmentError> {
    let end = index_end(head)?;
    let index = head.get(HEADER_BYTES..end as usize).ok_or(SegmentError::Index)?;
    let (crc, _) = head.get(16..).and_then(number).ok_or(SegmentError::Index)?;
    if crc32fast::hash(index) != crc {
        return Err(SegmentError::Index);
    }
    let index = SegmentIndex::decode(index).map_err(|_| SegmentError::Index)?;
    let id_of = |bytes: &Bytes| <[u8; 16]>::try_from(&**bytes).map(|id| Ulid(u128::from_be_bytes(id)));
    match id_of(&index.id) {
        Ok(own) if own == id => {}
        Ok(own) => return Err(SegmentError::Copy(own)),
        Err(_) => return Err(SegmentError::Index),
    }
    let origins = index.origins.iter().map(id_of).collect::<Result<Vec<_>, _>>();
    let origins = origins.map_err(|_| SegmentError::Index)?;
    let mut offset = end;
    let entries = index.entries.into_iter().map(|entry| {
        let entry = SegmentEntry::decode(entry).ok()?;
        let position = SegmentPosition { segment: id, offset, bytes: entry.bytes, crc: entry.crc };
        offset = offset.checked_add(entry.bytes)?;
        Some((entry.meta?, position))
    });
    let entries = entries.collect::<Option<Vec<_>>>().ok_or(SegmentError::Index)?;
    Ok(SegmentHead { entries, origins })
}

fn number(bytes: &[u8]) -> Option<(u32, &[u8])> {
    let (number, rest) = bytes.split_first_chunk::<4>()?;
    Some((u32::from_le_bytes(*number), rest))
}

#[cfg(test)]
mod tests {
    use gannet_proto::ingest::Batch;
    use proptest::prelude::*;

    use super::*;

    fn meta(reason: &str) -> ObjectMeta {
        ObjectMeta { batch: Some(Batch { reason: reason.into(), ..Batch::default() }), types: Vec::new() }
    }

    fn segment(id: Ulid, profiles: &[Vec<u8>]) -> (Vec<u8>, Vec<SegmentPosition>) {
        let pack =
            |(i, pprof): (usize, &Vec<u8>)| PackedBatch::new(meta(&i.to_string()), pprof.clone().into());
        let batches: Vec<PackedBatch> = profiles.iter().enumerate().map(pack).collect();
        let (parts, positions) = build(id, &batches.iter().collect::<Vec<_>>());
        (parts.concat(), positions)
    }

    proptest! {
        #[test]
        fn a_segment_returns_each_batch_and_its_profile(
            profiles in proptest::collection::vec(proptest::collection::vec(any::<u8>(), 0..60), 0..20),
            id in any::<u128>(),
        ) {
            let (bytes, positions) = segment(Ulid(id), &profiles);
            let entries = read_index(Ulid(id), &bytes).unwrap();
            prop_assert_eq!(entries.len(), profiles.len());
            for (i, ((found, position), profile)) in entries.iter().zip(&profiles).enumerate() {
                prop_assert_eq!(found, &meta(&i.to_string()));
                prop_assert_eq!(position, &positions[i]);
                let range = position.offset as usize..(position.offset + position.bytes) as usize;
                prop_assert_eq!(&bytes[range], &profile[..]);
                prop_assert_eq!(position.crc, crc32fast::hash(profile));
            }
            // A cut behind the index part keeps the entries, an earlier one is an error.
            let end = index_end(&bytes).unwrap() as usize;
            prop_assert_eq!(read_index(Ulid(id), &bytes[..end]).unwrap(), entries);
            for cut in 0..end {
                prop_assert!(read_index(Ulid(id), &bytes[..cut]).is_err());
            }
        }

        #[test]
        fn arbitrary_bytes_are_no_segment(bytes in proptest::collection::vec(any::<u8>(), 0..200)) {
            prop_assert!(read_index(Ulid(1), &bytes).is_err());
        }

        #[test]
        fn a_flipped_bit_before_the_profiles_is_detected(at in any::<usize>(), bit in 0_u8..8) {
            let (mut bytes, _) = segment(Ulid(7), &[vec![1, 2, 3], vec![4]]);
            let end = index_end(&bytes).unwrap() as usize;
            bytes[at % end] ^= 1 << bit;
            prop_assert!(read_index(Ulid(7), &bytes).is_err());
        }
    }

    #[test]
    fn copies_and_newer_versions_are_refused_by_name() {
        let (mut bytes, _) = segment(Ulid(7), &[vec![1]]);
        assert_eq!(read_index(Ulid(8), &bytes), Err(SegmentError::Copy(Ulid(7))));
        bytes[8] = 2;
        assert_eq!(read_index(Ulid(7), &bytes), Err(SegmentError::Version(2)));
    }
}
