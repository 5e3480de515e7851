//! The sections of call frame information: their bytes, wherever they are.

use std::borrow::Cow;

use gannet_elf::{Arch, Elf, checksum};
use gimli::{BaseAddresses, DebugFrame, EhFrame, LittleEndian, Vendor};

use super::{BuildFault, BuildOptions, pieces::Piece};
use crate::cfi::Slice;

/// Bytes and their address.
type Located<'d> = (u64, Cow<'d, [u8]>);

/// Opens the bytes of `.eh_frame`.
pub(super) fn open_eh_frame(bytes: &[u8], arch: Arch) -> EhFrame<Slice<'_>> {
    let mut section = EhFrame::from(Slice::new(bytes, LittleEndian));
    section.set_address_size(8);
    section.set_vendor(vendor(arch));
    section
}

/// Opens the bytes of `.debug_frame`.
pub(super) fn open_debug_frame(bytes: &[u8], arch: Arch) -> DebugFrame<Slice<'_>> {
    let mut section = DebugFrame::from(Slice::new(bytes, LittleEndian));
    section.set_address_size(8);
    section.set_vendor(vendor(arch));
    section
}

fn vendor(arch: Arch) -> Vendor {
    match arch {
        Arch::X86_64 => Vendor::Default,
        Arch::Aarch64 => Vendor::AArch64,
    }
}

/// Returns the addresses from which pointers in `.eh_frame` count.
pub(super) fn bases(elf: &Elf<'_>) -> BaseAddresses {
    let at = |name: &[u8]| elf.section(name).map(|section| section.vaddr);
    let mut bases = BaseAddresses::default();
    if let Some(text) = at(b".text") {
        bases = bases.set_text(text);
    }
    if let Some(got) = at(b".got") {
        bases = bases.set_got(got);
    }
    if let Some((header, _)) = elf.eh_frame_hdr() {
        bases = bases.set_eh_frame_hdr(header);
    }
    bases
}

/// Reads address and bytes of `.eh_frame`: by its section, or else by the pointer in `.eh_frame_hdr` and up to the end of
/// the segment (its terminator ends it).
pub(super) fn eh_frame<'d>(elf: &Elf<'d>) -> Result<Option<Located<'d>>, BuildFault> {
    if let Some(section) = elf.section(b".eh_frame") {
        return Ok(Some((section.vaddr, elf.section_data(section)?)));
    }
    let Some((header_at, size)) = elf.eh_frame_hdr() else { return Ok(None) };
    let pointed = elf.bytes_at(header_at, size.min(64)).and_then(|bytes| {
        let header = gimli::EhFrameHdr::new(&bytes, LittleEndian);
        let bases = BaseAddresses::default().set_eh_frame_hdr(header_at);
        header.parse(&bases, 8).ok().map(|header| header.eh_frame_ptr().pointer())
    });
    Ok(pointed.and_then(|at| {
        let bytes = elf.bytes_at(at, u64::MAX)?;
        let end = terminated(&bytes);
        Some((
            at,
            match bytes {
                Cow::Borrowed(bytes) => Cow::Borrowed(&bytes[..end]),
                Cow::Owned(mut bytes) => {
                    bytes.truncate(end);
                    Cow::Owned(bytes)
                }
            },
        ))
    }))
}

/// Returns the bytes up to the terminator, or all.
fn terminated(bytes: &[u8]) -> usize {
    let mut at = 0;
    while let Some(length) = bytes.get(at..).and_then(<[u8]>::first_chunk) {
        match u32::from_le_bytes(*length) {
            0 => return at,
            // Entries of more than 4 GiB do not exist in sections without a header.
            u32::MAX => return bytes.len(),
            length => at = at + 4 + length as usize,
        }
    }
    bytes.len()
}

/// Returns whether most code is without rules. A few functions always have some: those that the C library brings.
fn is_mostly_open(elf: &Elf<'_>, pieces: &[Piece]) -> bool {
    let code: u64 = elf.code().iter().map(|(start, end)| end - start).fold(0, u64::saturating_add);
    let covered: u64 = pieces.iter().map(|piece| piece.end - piece.start).fold(0, u64::saturating_add);
    covered < code / 2
}

/// Reads the bytes of `.debug_frame`: of the file itself, or of its debug file if the file describes little of its code.
pub(super) fn debug_frame<'d>(
    elf: &Elf<'d>,
    options: &BuildOptions<'_>,
    pieces: &[Piece],
) -> Result<Cow<'d, [u8]>, BuildFault> {
    let own = debug_frame_section(elf)?;
    let Some(files) = options.debug_files else { return Ok(own) };
    if !own.is_empty() || !is_mostly_open(elf, pieces) {
        return Ok(own);
    }
    let link = elf.debug_link();
    if link.is_none() && elf.build_id().is_none() {
        return Ok(own);
    }
    let Some(file) = files.open(elf.build_id(), link.as_ref()) else { return Ok(own) };
    let Ok(debug) = Elf::parse(&file, &options.limits.elf()) else { return Ok(own) };
    let same_build = elf.build_id().is_some() && debug.build_id() == elf.build_id();
    let linked = || link.is_some_and(|link| checksum(&file) == Some(link.crc));
    if debug.arch() != elf.arch() || !(same_build || linked()) {
        return Ok(own);
    }
    Ok(Cow::Owned(debug_frame_section(&debug)?.into_owned()))
}

fn debug_frame_section<'d>(elf: &Elf<'d>) -> Result<Cow<'d, [u8]>, BuildFault> {
    match elf.section(b".debug_frame").or_else(|| elf.section(b".zdebug_frame")) {
        Some(section) => Ok(elf.section_data(section)?),
        None => Ok(Cow::Borrowed(&[])),
    }
}
