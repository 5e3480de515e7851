//! ELF files and Go's table of functions.

use gannet_elf::{ContentId, Elf, ElfLimits, GoLines, GoTable, Headers, Segment, Segments};

/// Reads everything that the crate can read of a file.
pub(crate) fn file(bytes: &[u8]) {
    let limits = ElfLimits { section_bytes: 1 << 20, ..ElfLimits::default() };
    let _ = Headers::read(bytes).map(|headers| headers.build_ids.text());
    let Ok(elf) = Elf::parse(bytes, &limits) else { return };
    let _ = (ContentId::of(&elf), elf.debug_link(), elf.alternate_link(), elf.go_table(1 << 20));
    if let Ok(Some(Ok(lines))) = GoLines::of(&elf, 1 << 20) {
        for (start, end) in elf.code() {
            for address in [start, start / 2 + end / 2, end.saturating_sub(1)] {
                assert!(lines.at(address, 100).is_none_or(|found| !found.is_empty()));
            }
        }
    }
    for (_, section) in elf.sections() {
        let _ = elf.has_known_form(section);
        if let Ok(bytes) = elf.section_data(section) {
            assert!(bytes.len() as u64 <= limits.section_bytes);
        }
    }
    for name in [&b".symtab"[..], b".dynsym"] {
        let Some(table) = elf.symbols(name) else { continue };
        for symbol in table.iter().flatten() {
            let _ = table.name(&symbol, 100);
        }
    }
    for (start, end) in elf.code() {
        let _ = elf.bytes_at(start, end - start);
    }
    for segment in elf.segments().as_slice() {
        let _ = elf.segments().bias(segment.vaddr, segment.file_offset & !0xfff, 0x1000);
        let _ = elf.segments().vaddr_of_offset(segment.file_offset);
    }
}

/// Reads the contents of Go's table of functions.
pub(crate) fn go_table(bytes: &[u8]) {
    let Ok(table) = GoTable::parse(bytes) else { return };
    let size = 1 << 20;
    let code =
        Segment { vaddr: 0x40_1000, file_offset: 0, file_bytes: size, memory_bytes: size, executable: true };
    let segments = Segments::new(vec![code]);
    for function in table.functions(&segments).map_while(Result::ok).flatten() {
        assert!(function.start < function.end);
        if let Some(record) = table.record(&function) {
            let _ = table.name(&record, 100);
            // A table of depths may be shared by all functions: a few steps of each are enough.
            for (_, depth) in table.stack_depths(&record).take(100) {
                std::hint::black_box(depth);
            }
        }
    }
}

/// A section of a made file.
pub(crate) struct NewSection<'a> {
    pub(crate) name: &'a str,
    pub(crate) kind: u32,
    pub(crate) flags: u64,
    pub(crate) contents: &'a [u8],
}

impl<'a> NewSection<'a> {
    pub(crate) fn data(name: &'a str, contents: &'a [u8]) -> Self {
        Self { name, kind: 1, flags: 0, contents }
    }
}

/// Returns an ELF file with one section; its code is one segment of 1 MiB at 0x401000.
pub(crate) fn with_section(machine: u16, section: &NewSection<'_>) -> Vec<u8> {
    let NewSection { name, kind, flags, contents } = *section;
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
    for (at, name, kind, flags, offset, size) in [
        (headers_at + 64, 1_u32, kind, flags, contents_at, contents.len()),
        (headers_at + 128, name.len() as u32 + 2, 3, 0, names_at, names.len()),
    ] {
        put(at, &name.to_le_bytes());
        put(at + 4, &kind.to_le_bytes());
        put(at + 8, &flags.to_le_bytes());
        put(at + 24, &(offset as u64).to_le_bytes());
        put(at + 32, &(size as u64).to_le_bytes());
    }
    bytes
}
