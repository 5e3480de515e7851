//! The contents of Go's function table.
#![no_main]
use gannet_elf::{GoTable, Segment, Segments};

libfuzzer_sys::fuzz_target!(|bytes: &[u8]| {
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
});
