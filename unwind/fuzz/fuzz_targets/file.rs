//! A whole file.
#![no_main]
libfuzzer_sys::fuzz_target!(|bytes: &[u8]| gannet_unwind_fuzz::exercise(bytes));
