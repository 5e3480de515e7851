//! Shared by the targets: limits, an ELF file around a section, and a check of the result.
use std::time::Duration;

use gannet_unwind::build::{BuildOptions, build_bytes};
use gannet_unwind::limits::TableLimits;

/// Returns small limits, so that a timeout of the fuzzer is a fault and not a large input.
pub fn limits() -> TableLimits {
    TableLimits {
        section_bytes: 1 << 20,
        rows: 1 << 16,
        functions: 1 << 16,
        span_bytes: 64 << 20,
        time: Some(Duration::from_secs(1)),
        ..TableLimits::default()
    }
}

/// Builds a table and looks up addresses all over it.
pub fn exercise(bytes: &[u8]) {
    let limits = limits();
    for runs in [false, true] {
        let Ok(built) = build_bytes(bytes, &BuildOptions { runs, ..BuildOptions::new("fuzz", &limits) }) else { continue };
        let (base, span) = (built.table.base(), u64::from(built.table.granules()) << 11);
        for part in 0..=256 {
            let _ = built.table.lookup(base.wrapping_add(span / 256 * part));
        }
        let stored = gannet_unwind::cache::encode(
            &built.content,
            &built.table,
            &built.segments,
            built.build_id.as_ref(),
        );
        let read = gannet_unwind::cache::decode(&stored, &built.content).expect("a stored table can be read");
        assert_eq!(read.table, built.table);
    }
}

/// Returns an ELF file with one section of this name and contents; its code is one segment of 1 MiB at 0x401000.
pub fn elf(machine: u16, name: &str, contents: &[u8]) -> Vec<u8> {
    let names = format!("\0{name}\0.shstrtab\0");
    let contents_at = 64 + 2 * 56;
    let names_at = contents_at + contents.len();
    let headers_at = (names_at + names.len()).next_multiple_of(8);
    let mut bytes = vec![0; headers_at + 3 * 64];
    let mut put = |at: usize, data: &[u8]| bytes[at..at + data.len()].copy_from_slice(data);
    put(0, b"\x7fELF\x02\x01\x01");
    put(16, &[2, 0]);
    put(18, &machine.to_le_bytes());
    put(32, &64_u64.to_le_bytes());
    put(40, &(headers_at as u64).to_le_bytes());
    for (index, value) in [64_u16, 56, 2, 64, 3, 2].into_iter().enumerate() {
        put(52 + index * 2, &value.to_le_bytes());
    }
    for (at, flags, vaddr, size) in [(64, 4_u32, 0_u64, names_at as u64), (120, 5, 0x40_1000, 1 << 20)] {
        put(at, &1_u32.to_le_bytes());
        put(at + 4, &flags.to_le_bytes());
        put(at + 16, &vaddr.to_le_bytes());
        put(at + 32, &size.to_le_bytes());
        put(at + 40, &size.to_le_bytes());
    }
    put(contents_at, contents);
    put(names_at, names.as_bytes());
    for (at, name, kind, offset, size) in [
        (headers_at + 64, 1_u32, 1_u32, contents_at, contents.len()),
        (headers_at + 128, name.len() as u32 + 2, 3, names_at, names.len()),
    ] {
        put(at, &name.to_le_bytes());
        put(at + 4, &kind.to_le_bytes());
        put(at + 16, &(offset as u64).to_le_bytes());
        put(at + 24, &(offset as u64).to_le_bytes());
        put(at + 32, &(size as u64).to_le_bytes());
    }
    bytes
}
