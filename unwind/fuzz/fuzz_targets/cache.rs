//! A cached table whose checksum and content id are right, with any other bytes.
#![no_main]
use gannet_elf::ContentId;
use gannet_unwind::cache::{VERSION, decode};

libfuzzer_sys::fuzz_target!(|bytes: &[u8]| {
    let content = ContentId::from_bytes([0; 16]);
    let _ = decode(bytes, &content);
    let mut bytes = bytes.to_vec();
    if bytes.len() >= 64 {
        bytes[..8].copy_from_slice(b"gannetUT");
        bytes[8..12].copy_from_slice(&VERSION.to_le_bytes());
        bytes[16..32].fill(0);
        let sum = crc32fast::hash(&bytes[16..]);
        bytes[12..16].copy_from_slice(&sum.to_le_bytes());
        if let Ok(cached) = decode(&bytes, &content) {
            let span = u64::from(cached.table.granules()) << 11;
            for part in 0..=256 {
                let _ = cached.table.lookup(cached.table.base().wrapping_add(span / 256 * part));
            }
        }
    }
});
