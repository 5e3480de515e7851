//! The contents of `.eh_frame`, for both architectures, and of `.debug_frame`.
#![no_main]
use gannet_unwind_fuzz::{elf, exercise};

libfuzzer_sys::fuzz_target!(|bytes: &[u8]| {
    exercise(&elf(62, ".eh_frame", bytes));
    exercise(&elf(183, ".eh_frame", bytes));
    exercise(&elf(62, ".debug_frame", bytes));
});
