//! The checks of files with debug information, on arbitrary bytes, for the fuzzer.

use std::{fs::File, io::Write as _};

use super::{check, layout::Place};

/// Checks a file, and translates a frame into an address of it. The first 32 bytes are the frame.
pub fn debug_file(bytes: &[u8]) {
    let Some((place, bytes)) = bytes.split_first_chunk::<32>() else { return };
    let number = |at: usize| u64::from_le_bytes(std::array::from_fn(|index| place[at + index]));
    let place = Place { address: number(0), start: number(8), limit: number(16), offset: number(24) };
    let Ok(memory) = rustix::fs::memfd_create("gannet-fuzz", rustix::fs::MemfdFlags::CLOEXEC) else { return };
    let mut file = File::from(memory);
    if file.write_all(bytes).is_err() {
        return;
    }
    let Ok(checked) = check::check(&file) else { return };
    assert!(checked.build_id.as_bytes().len() <= 64);
    for start in [place.start, 0] {
        for limit in [place.limit, u64::MAX] {
            let _ = checked.layout.address_of(&Place { start, limit, ..place });
        }
    }
    assert!(check::check_declared(&file, &checked.build_id).is_ok());
}
