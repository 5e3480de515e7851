//! The contents of Go's function table, for both architectures.
#![no_main]
use gannet_unwind_fuzz::{elf, exercise};

libfuzzer_sys::fuzz_target!(|bytes: &[u8]| {
    exercise(&elf(62, ".gopclntab", bytes));
    exercise(&elf(183, ".gopclntab", bytes));
});
