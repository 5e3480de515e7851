//! The sources of names in ELF files.

use gannet_agent::symbols::fuzz::{functions_of_file, packed};

use crate::elf::{self, NewSection, with_section};

const X86_64: u16 = 62;
const COMPRESSED: u64 = 0x800;
const ADDRESSES: [u64; 6] = [0, 0x1000, 0x40_1000, 0x40_1010, 0x50_0fff, u64::MAX];

/// A whole file.
pub(crate) fn symbols(bytes: &[u8]) {
    functions_of_file(bytes, &ADDRESSES);
}

/// A whole file with debug information.
pub(crate) fn start_lines(bytes: &[u8]) {
    let code: Vec<u64> = (0x1000..0x1080).chain(ADDRESSES).collect();
    gannet_symbols::fuzz::start_lines(bytes, &code);
}

/// The packed symbol table of a stripped file: its packed bytes, or the file that is packed.
pub(crate) fn minidebuginfo(bytes: &[u8]) {
    let Some((kind, bytes)) = bytes.split_first() else { return };
    let packed = if kind & 1 == 0 { bytes.to_vec() } else { packed(bytes) };
    let file = with_section(X86_64, &NewSection::data(".gnu_debugdata", &packed));
    functions_of_file(&file, &ADDRESSES);
}

/// A compressed section: the header and the packed bytes.
pub(crate) fn compressed_sections(bytes: &[u8]) {
    let Some((kind, contents)) = bytes.split_first() else { return };
    let names = [".debug_info", ".debug_frame", ".eh_frame", ".gopclntab", ".zdebug_info", ".gnu_debugdata"];
    let name = names[usize::from(*kind) % names.len()];
    let flags = if name.starts_with(".z") { 0 } else { COMPRESSED };
    let file = with_section(X86_64, &NewSection { name, kind: 1, flags, contents });
    elf::file(&file);
    functions_of_file(&file, &ADDRESSES);
    crate::unwind::exercise(&file);
}
