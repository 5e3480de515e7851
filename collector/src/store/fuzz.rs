//! The reader of stored objects on any bytes, for the fuzzer.

use ulid::Ulid;

use super::{
    object::{pack, packed_header_len, unpack},
    segment,
};

/// Reads the index part of a segment, with a right checksum too.
fn segment_index(bytes: &[u8]) {
    let _ = segment::read_index(Ulid(0), bytes);
    let mut bytes = bytes.to_vec();
    let Ok(end) = segment::index_end(&bytes) else { return };
    let Some(index) = bytes.get(segment::HEADER_BYTES..end as usize) else { return };
    let sum = crc32fast::hash(index);
    bytes[16..20].copy_from_slice(&sum.to_le_bytes());
    if let Ok(entries) = segment::read_index(Ulid(0), &bytes) {
        let mut offset = end;
        for (_, position) in entries {
            assert_eq!(position.offset, offset);
            offset += position.bytes;
        }
    }
}

/// Unpacks an object or a segment, with a right checksum too. Panics if an object that could be unpacked, packed again,
/// unpacks to other data.
pub fn stored_object(bytes: &[u8]) {
    let _ = unpack(bytes);
    segment_index(bytes);
    // The fuzzer cannot find a checksum.
    let mut bytes = bytes.to_vec();
    let Some(data) = bytes.get(14..).and_then(|rest| rest.first_chunk()).map(|two| u16::from_le_bytes(*two))
    else {
        return;
    };
    let Some(meta) = bytes.get(20..16 + usize::from(data)) else { return };
    let sum = crc32fast::hash(meta);
    bytes[16..20].copy_from_slice(&sum.to_le_bytes());
    let Some((meta, _)) = unpack(&bytes) else { return };
    if let Some(packed) = pack(&meta, b"profile") {
        let again = unpack(&packed);
        let at = packed_header_len(&meta) as usize;
        // A sum of NaN is unequal to itself.
        assert_eq!(format!("{again:?}"), format!("{:?}", Some((meta, at))));
        assert_eq!(packed.get(at..), Some(&b"profile"[..]));
    }
}
