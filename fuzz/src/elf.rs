//! A whole file: reads everything that the crate can read of it.
#![no_main]
use gannet_elf::{ContentId, Elf, Headers, ElfLimits};

libfuzzer_sys::fuzz_target!(|bytes: &[u8]| {
    let limits = ElfLimits { section_bytes: 1 << 20, ..ElfLimits::default() };
    let _ = Headers::read(bytes).map(|headers| headers.build_ids.text());
    let Ok(elf) = Elf::parse(bytes, &limits) else { return };
    let _ = (ContentId::of(&elf), elf.debug_link(), elf.go_table(1 << 20));
    for (_, section) in elf.sections() {
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
});
