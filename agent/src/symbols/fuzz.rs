//! The readers of names on any bytes, for the fuzzer.

use std::{fs::File, io::Write as _};

use gannet_symbols::{demangle, dwarf, tables};
use lzma_rust2::{XzOptions, XzWriter};

use super::formats::{
    jitdump::{DumpedFunction, JitDump},
    perf_map::{Listed, MAX_LINE_BYTES, PIECE_BYTES, PerfMap, Text, parse_line},
};

const MAX_BYTES: u64 = 64 << 20;

/// A file whose first part is lines without a function, so that the text may lie across the pieces in which it is searched.
struct Padded<'a> {
    /// A multiple of 16.
    padding: u64,
    text: &'a [u8],
}

impl Text for Padded<'_> {
    fn bytes(&self) -> u64 {
        self.padding + self.text.len() as u64
    }

    fn read_at(&self, offset: u64, buffer: &mut [u8]) -> usize {
        let Some(rest) = self.bytes().checked_sub(offset) else { return 0 };
        let read = buffer.len().min(usize::try_from(rest).unwrap_or(usize::MAX));
        for (at, byte) in (offset..).zip(&mut buffer[..read]) {
            *byte = match at.checked_sub(self.padding) {
                Some(at) => self.text[at as usize],
                None if at % 16 == 15 => b'\n',
                None => b' ',
            };
        }
        read
    }
}

/// Reads all functions of a perf map, one line after the other.
fn functions(text: &[u8]) -> Vec<(u64, u64, String)> {
    text.split_inclusive(|byte| *byte == b'\n')
        // The compiler is in the middle of the last line.
        .filter(|line| line.ends_with(b"\n") || line.len() > MAX_LINE_BYTES)
        .filter_map(|line| parse_line(&line[..line.len().min(MAX_LINE_BYTES)]))
        .map(|(start, size, name)| (start, size, demangle::cut(&String::from_utf8_lossy(name))))
        .collect()
}

/// Searches a perf map that grows: in each state the last line that holds an address must name it, wherever it stands.
pub fn perf_map(bytes: &[u8]) {
    let Some(([kind, at, cut], text)) = bytes.split_first_chunk() else { return };
    let padding = if kind & 1 == 0 { 0 } else { PIECE_BYTES - u64::from(*at) * 16 };
    let cut = usize::from(*cut) * text.len() / 255;
    let mut addresses: Vec<u64> = functions(text)
        .into_iter()
        .take(64)
        .flat_map(|(start, size, _)| [start, start.saturating_add(size), start.saturating_add(size / 2)])
        .collect();
    addresses.extend([0, u64::MAX, u64::from(*kind)]);
    let mut map = PerfMap::default();
    for length in [cut, text.len()] {
        let text = &text[..length];
        let read = map.update(&Padded { padding, text }, (1, 1), &addresses, MAX_BYTES);
        assert!(read <= MAX_BYTES);
        let functions = functions(text);
        for address in &addresses {
            let last = functions
                .iter()
                .rfind(|(start, size, _)| (*start..start.saturating_add(*size)).contains(address))
                .map_or(Listed::Nowhere, |(.., name)| Listed::Name(name.clone()));
            assert_eq!(map.find(*address), last, "{address:#x}");
        }
    }
    // With few bytes to read, nothing may be wrong either.
    let mut map = PerfMap::default();
    for _ in 0..4 {
        map.update(&Padded { padding, text }, (1, 1), &addresses, PIECE_BYTES + 5000);
    }
}

/// Searches a jitdump that grows: names and lines must be those of the whole file.
pub fn jitdump(bytes: &[u8]) {
    let Some(([cut, step], bytes)) = bytes.split_first_chunk() else { return };
    let whole = Padded { padding: 0, text: bytes };
    let cut = &bytes[..usize::from(*cut) * bytes.len() / 255];
    // Any eight bytes may be an address of code.
    let mut addresses: Vec<u64> = bytes
        .windows(8)
        .step_by(usize::from(step % 8) + 1)
        .take(512)
        .filter_map(|eight| Some(u64::from_le_bytes(eight.try_into().ok()?)))
        .collect();
    addresses.extend([0, u64::MAX]);
    let mut dump = JitDump::default();
    dump.update(&whole, (1, 1), &addresses, MAX_BYTES);
    let mut grown = JitDump::default();
    grown.update(&Padded { padding: 0, text: cut }, (1, 1), &addresses, MAX_BYTES);
    grown.update(&whole, (1, 1), &addresses, MAX_BYTES);
    let mut late = JitDump::default();
    late.update(&whole, (1, 1), &[], MAX_BYTES);
    late.update(&whole, (1, 1), &addresses, MAX_BYTES);
    for address in &addresses {
        let found: Option<&DumpedFunction> = dump.find(*address);
        assert_eq!(found, grown.find(*address), "{address:#x} in a file that grew");
        assert_eq!(found, late.find(*address), "{address:#x} after the file was read");
    }
}

/// Finds the functions at the addresses of a file, and examines its debug information.
pub fn functions_of_file(bytes: &[u8], addresses: &[u64]) {
    let Ok(memory) = rustix::fs::memfd_create("gannet-fuzz", rustix::fs::MemfdFlags::CLOEXEC) else { return };
    let mut file = File::from(memory);
    if file.write_all(bytes).is_err() {
        return;
    }
    if let Ok(found) = tables::find(&file, None, addresses) {
        assert_eq!(found.names.len(), addresses.len());
    }
    let _ = dwarf::examine(&file);
}

/// Packs a file as distributions pack the symbol tables of their programs.
pub fn packed(bytes: &[u8]) -> Vec<u8> {
    let packing = XzWriter::new(Vec::new(), XzOptions::with_preset(0)).and_then(|mut writer| {
        writer.write_all(bytes)?;
        writer.finish()
    });
    packing.unwrap_or_default()
}

/// Makes a mangled name readable.
pub fn demangled(bytes: &[u8]) {
    let name = demangle::demangle(&String::from_utf8_lossy(bytes));
    // One character more than the limit, and the mark of a cut name.
    assert!(name.len() <= demangle::MAX_NAME_BYTES + 4 + '…'.len_utf8(), "{} bytes", name.len());
    assert!(!name.contains(char::is_control));
}
