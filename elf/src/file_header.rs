//! The file header, and the bytes of the program headers that it locates.

use std::borrow::Cow;

use object::{
    LittleEndian,
    elf::{EM_AARCH64, EM_X86_64, FileHeader64, Machine, ProgramHeader64},
    pod,
};

use crate::{
    data::Data,
    error::{ElfError, ElfQuantity, at_most, malformed},
};

pub(crate) const LE: LittleEndian = LittleEndian;
const FILE_HEADER_BYTES: u64 = size_of::<FileHeader64<LittleEndian>>() as u64;
pub(crate) const PROGRAM_HEADER_BYTES: usize = size_of::<ProgramHeader64<LittleEndian>>();
/// The kernel's own limit (64 KiB of program headers), so that no program that runs is refused.
const MAX_PROGRAM_HEADERS: u64 = (64 << 10) / PROGRAM_HEADER_BYTES as u64;

/// An instruction set.
#[derive(Clone, Copy, PartialEq, Eq, Debug, PartialOrd, Ord, Hash)]
pub enum Arch {
    /// Machine type `EM_X86_64`.
    X86_64,
    /// Machine type `EM_AARCH64`.
    Aarch64,
}

/// The file header of a file that can be read.
#[derive(Debug)]
pub(crate) struct FileHeader {
    pub(crate) raw: FileHeader64<LittleEndian>,
    pub(crate) arch: Arch,
}

impl FileHeader {
    pub(crate) fn read(data: Data<'_>) -> Result<Self, ElfError> {
        let mut ident = [0; 20];
        if data.read_into(0, &mut ident) != Some(ident.len()) || !ident.starts_with(b"\x7fELF") {
            return Err(ElfError::NotElf);
        }
        let unsupported = |what: &str| Err(ElfError::Unsupported { what: what.to_owned() });
        if ident[4] != 2 {
            return unsupported("32-bit ELF file");
        }
        if ident[5] != 1 {
            return unsupported("big-endian ELF file");
        }
        let arch = match Machine(u16::from_le_bytes([ident[18], ident[19]])) {
            EM_X86_64 => Arch::X86_64,
            EM_AARCH64 => Arch::Aarch64,
            other => return unsupported(&format!("ELF file for machine {}", other.0)),
        };
        let cut_off = || malformed("the file header is cut off");
        let bytes = data.read(0, FILE_HEADER_BYTES).ok_or_else(cut_off)?;
        let (raw, _) = pod::from_bytes::<FileHeader64<LittleEndian>>(&bytes).map_err(|()| cut_off())?;
        Ok(Self { raw: *raw, arch })
    }

    /// Reads the bytes of all program headers.
    pub(crate) fn program_headers<'d>(&self, data: Data<'d>) -> Result<Cow<'d, [u8]>, ElfError> {
        let offset = self.raw.e_phoff.get(LE);
        // 65535 says that the count is in the first section header; it is over the limit either way.
        let count = u64::from(self.raw.e_phnum.get(LE));
        at_most(ElfQuantity::ProgramHeaders, MAX_PROGRAM_HEADERS, count)?;
        if offset == 0 || count == 0 {
            return Ok(Cow::Borrowed(&[]));
        }
        if usize::from(self.raw.e_phentsize.get(LE)) != PROGRAM_HEADER_BYTES {
            return Err(malformed("the size of a program header"));
        }
        data.read(offset, count * PROGRAM_HEADER_BYTES as u64)
            .ok_or_else(|| malformed("program headers are outside the file"))
    }
}
