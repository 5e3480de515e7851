//! The reader of stored objects on any bytes, for the fuzzer.

use super::object::{pack, packed_header_len, unpack};

/// Unpacks an object, with a right checksum too. Panics if an object that could be unpacked, packed again, unpacks to other data.
pub fn stored_object(bytes: &[u8]) {
    let _ = unpack(bytes);
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
