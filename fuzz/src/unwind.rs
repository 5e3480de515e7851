//! Unwind tables: built from files, and read from the cache.

use std::time::Duration;

use gannet_elf::ContentId;
use gannet_unwind::{
    build::{BuildOptions, build_bytes},
    cache,
    limits::TableLimits,
    table::UnwindTable,
};

use crate::elf::{NewSection, with_section};

/// Machines of the ELF header.
const X86_64: u16 = 62;
const AARCH64: u16 = 183;

/// Looks up addresses all over a table.
fn look_up(table: &UnwindTable) {
    let span = u64::from(table.granules()) << 11;
    for part in 0..=256 {
        let _ = table.lookup(table.base().wrapping_add(span / 256 * part));
    }
}

/// Builds the tables of a file, stores them and reads them again.
pub(crate) fn exercise(bytes: &[u8]) {
    // Small limits, so that a timeout of the fuzzer is a fault and not a large input.
    let limits = TableLimits {
        section_bytes: 1 << 20,
        rows: 1 << 16,
        functions: 1 << 16,
        span_bytes: 64 << 20,
        time: Some(Duration::from_secs(1)),
        ..TableLimits::default()
    };
    for runs in [false, true] {
        let options = BuildOptions { runs, ..BuildOptions::new("fuzz", &limits) };
        let Ok(built) = build_bytes(bytes, &options) else { continue };
        look_up(&built.table);
        let stored = cache::encode(&built.content, &built.table, &built.segments, built.build_id.as_ref());
        let read = cache::decode(&stored, &built.content).expect("a stored table can be read");
        assert_eq!(read.table, built.table);
    }
}

/// The contents of `.eh_frame`, for both architectures, and of `.debug_frame`.
pub(crate) fn eh_frame(bytes: &[u8]) {
    exercise(&with_section(X86_64, &NewSection::data(".eh_frame", bytes)));
    exercise(&with_section(AARCH64, &NewSection::data(".eh_frame", bytes)));
    exercise(&with_section(X86_64, &NewSection::data(".debug_frame", bytes)));
}

/// The contents of Go's table of functions, for both architectures.
pub(crate) fn go(bytes: &[u8]) {
    exercise(&with_section(X86_64, &NewSection::data(".gopclntab", bytes)));
    exercise(&with_section(AARCH64, &NewSection::data(".gopclntab", bytes)));
}

/// A stored table whose checksum and content id are right, with any other bytes.
pub(crate) fn cache(bytes: &[u8]) {
    let content = ContentId::from_bytes([0; 16]);
    let _ = cache::decode(bytes, &content);
    let mut bytes = bytes.to_vec();
    if bytes.len() >= 64 {
        bytes[..8].copy_from_slice(b"gannetUT");
        bytes[8..12].copy_from_slice(&cache::VERSION.to_le_bytes());
        bytes[16..32].fill(0);
        let sum = crc32fast::hash(&bytes[16..]);
        bytes[12..16].copy_from_slice(&sum.to_le_bytes());
        if let Ok(cached) = cache::decode(&bytes, &content) {
            look_up(&cached.table);
        }
    }
}
