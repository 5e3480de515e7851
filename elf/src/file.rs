//! A file with its sections.

use std::borrow::Cow;

use object::{
    LittleEndian,
    elf::{CompressionHeader64, ELFCOMPRESS_ZLIB, ELFCOMPRESS_ZSTD},
    pod,
    read::{CompressedData, CompressionFormat},
};

use crate::{
    build_id::{BuildId, BuildIds},
    data::Data,
    debug_file::{self, AlternateLink, DebugLink},
    error::{ElfError, ElfLimits, ElfQuantity, at_most, malformed},
    file_header::{Arch, FileHeader, LE},
    headers::Headers,
    sections::{Section, SectionTable},
    segments::Segments,
    symbols::Symbols,
};

const COMPRESSION_HEADER_BYTES: u64 = size_of::<CompressionHeader64<LittleEndian>>() as u64;
/// Type, offset and addend of one relocation.
pub(crate) const RELOCATION_BYTES: usize = 24;
/// Relocations that are read at one time.
pub(crate) const RELOCATION_CHUNK: usize = 4096;

/// A file whose headers have been read and agree with the file.
#[derive(Debug)]
pub struct Elf<'d> {
    data: Data<'d>,
    file_bytes: u64,
    headers: Headers,
    sections: SectionTable,
    section_fault: Option<ElfError>,
    section_limit: u64,
}

impl<'d> Elf<'d> {
    /// Reads the headers.
    ///
    /// A file that runs needs no section headers. So a file with damaged ones counts as a file without sections, which is
    /// still unwound by its `.eh_frame_hdr`; [`Elf::section_fault`] returns the fault.
    pub fn parse(data: impl Into<Data<'d>>, limits: &ElfLimits) -> Result<Self, ElfError> {
        let data = data.into();
        let file_bytes = data.len().ok_or_else(|| malformed("the file has no length"))?;
        let header = FileHeader::read(data)?;
        let mut headers = Headers::of(data, &header)?;
        let (sections, section_fault) = match SectionTable::read(data, &header, limits) {
            Ok(sections) => (sections, None),
            Err(ElfError::TooLarge(too_large)) => return Err(too_large.into()),
            Err(fault) => (SectionTable::default(), Some(fault)),
        };
        headers.add_build_ids_of_sections(data, &sections);
        Ok(Self { data, file_bytes, headers, sections, section_fault, section_limit: limits.section_bytes })
    }

    /// Returns the instruction set.
    pub fn arch(&self) -> Arch {
        self.headers.arch
    }

    /// Returns the length of the file.
    pub fn file_bytes(&self) -> u64 {
        self.file_bytes
    }

    /// Returns the loaded segments.
    pub fn segments(&self) -> &Segments {
        &self.headers.segments
    }

    /// Returns the GNU build id.
    pub fn build_id(&self) -> Option<&BuildId> {
        self.headers.build_ids.gnu.as_ref()
    }

    /// Returns all build ids.
    pub fn build_ids(&self) -> &BuildIds {
        &self.headers.build_ids
    }

    /// Returns the address of the first instruction of a program or of the dynamic linker; 0 in libraries.
    pub fn entry(&self) -> u64 {
        self.headers.entry
    }

    /// Reports whether the program is linked for fixed addresses, so that a process has it at the addresses of the file.
    pub fn is_fixed(&self) -> bool {
        self.headers.is_fixed
    }

    /// Returns address and size of `.eh_frame_hdr`.
    pub fn eh_frame_hdr(&self) -> Option<(u64, u64)> {
        self.headers.eh_frame_hdr
    }

    /// Returns the reason why the file counts as one without sections, if its section headers are damaged.
    pub fn section_fault(&self) -> Option<&ElfError> {
        self.section_fault.as_ref()
    }

    /// Returns the first section of this name.
    pub fn section(&self, name: &[u8]) -> Option<&Section> {
        self.sections.find(name)
    }

    /// Returns the first section of this name that the file stores.
    pub fn stored_section(&self, name: &[u8]) -> Option<&Section> {
        self.sections.stored(name)
    }

    /// Returns all named sections.
    pub fn sections(&self) -> impl Iterator<Item = (&[u8], &Section)> {
        self.sections.iter().map(|section| (self.sections.name(section), section))
    }

    /// Returns the addresses of code, ascending: the sections of code, or the executable segments where there are no
    /// section headers.
    pub fn code(&self) -> Vec<(u64, u64)> {
        let in_sections = self.sections.iter().filter(|section| section.is_code());
        let mut code: Vec<(u64, u64)> =
            in_sections.map(|section| (section.vaddr, section.vaddr.saturating_add(section.bytes))).collect();
        if code.is_empty() {
            let segments = self.segments().as_slice().iter().filter(|segment| segment.executable);
            code.extend(segments.map(|s| (s.vaddr, s.vaddr.saturating_add(s.file_bytes))));
        }
        code.sort_unstable();
        code
    }

    /// Reads the bytes of a section and decompresses them if need be; a section that is not stored is empty.
    pub fn section_data(&self, section: &Section) -> Result<Cow<'d, [u8]>, ElfError> {
        self.section_data_within(section, self.section_limit)
    }

    /// Reads the bytes of a section if it has at most `max_bytes` bytes, before and after decompression.
    pub fn section_data_within(&self, section: &Section, max_bytes: u64) -> Result<Cow<'d, [u8]>, ElfError> {
        let max_bytes = max_bytes.min(self.section_limit);
        let broken = || self.outside(section);
        if !section.is_stored() {
            return Ok(Cow::Borrowed(&[]));
        }
        at_most(ElfQuantity::SectionBytes, max_bytes, section.bytes)?;
        let name = self.sections.name(section);
        let (format, header_bytes, bytes) = if section.is_compressed() {
            let (format, bytes) = self.compression(section)?;
            (format, COMPRESSION_HEADER_BYTES, bytes)
        } else if name.starts_with(b".zdebug_") {
            // The GNU form before section flags: "ZLIB", the size in big-endian, the data.
            let header = self.data.read(section.offset, 12).ok_or_else(broken)?;
            let size = header.strip_prefix(b"ZLIB").and_then(|size| size.first_chunk()).ok_or_else(broken)?;
            (CompressionFormat::Zlib, 12, u64::from_be_bytes(*size))
        } else {
            return self.data.read(section.offset, section.bytes).ok_or_else(broken);
        };
        at_most(ElfQuantity::SectionBytes, max_bytes, bytes)?;
        let packed_at = section.offset.checked_add(header_bytes).ok_or_else(broken)?;
        let packed_bytes = section.bytes.checked_sub(header_bytes).ok_or_else(broken)?;
        let packed = self.data.read(packed_at, packed_bytes).ok_or_else(broken)?;
        let data = CompressedData { format, data: &packed, uncompressed_size: bytes };
        let bytes = data
            .decompress()
            .map_err(|_| malformed(format!("section {} cannot be decompressed", name.escape_ascii())))?;
        Ok(Cow::Owned(bytes.into_owned()))
    }

    /// Reads the format and the unpacked size of a compressed section.
    fn compression(&self, section: &Section) -> Result<(CompressionFormat, u64), ElfError> {
        let broken = || self.outside(section);
        let header = self.data.read(section.offset, COMPRESSION_HEADER_BYTES).ok_or_else(broken)?;
        let (header, _) =
            pod::from_bytes::<CompressionHeader64<LittleEndian>>(&header).map_err(|()| broken())?;
        let format = match header.ch_type.get(LE) {
            ELFCOMPRESS_ZLIB => CompressionFormat::Zlib,
            ELFCOMPRESS_ZSTD => CompressionFormat::Zstandard,
            _ => return Err(broken()),
        };
        Ok((format, header.ch_size.get(LE)))
    }

    /// Returns the symbols of `.symtab` or `.dynsym`; none if the file does not store that table and its strings.
    pub fn symbols(&self, table: &[u8]) -> Option<Symbols<'d>> {
        let symbols = self.stored_section(table)?;
        let strings = self.sections.by_index(symbols.link).filter(|strings| strings.is_stored())?;
        // Nothing that builds programs compresses these tables. Read as if they were plain, they would give wrong names.
        let is_plain = !symbols.is_compressed() && !strings.is_compressed();
        is_plain.then(|| Symbols::new(self.data, symbols, strings))
    }

    /// Returns the value that a relative relocation puts at an address: a position-independent program has it there,
    /// before its base is added.
    pub(crate) fn relocated(&self, vaddr: u64) -> Result<Option<u64>, ElfError> {
        let Some(section) = self.stored_section(b".rela.dyn") else { return Ok(None) };
        at_most(ElfQuantity::SectionBytes, self.section_limit, section.bytes)?;
        let wanted = vaddr.to_le_bytes();
        let count = section.bytes as usize / RELOCATION_BYTES;
        for first in (0..count).step_by(RELOCATION_CHUNK) {
            let bytes = RELOCATION_CHUNK.min(count - first) * RELOCATION_BYTES;
            let offset = section.offset.saturating_add((first * RELOCATION_BYTES) as u64);
            let chunk = self.data.read(offset, bytes as u64).ok_or_else(|| self.outside(section))?;
            let entry = chunk.chunks_exact(RELOCATION_BYTES).find(|entry| entry[..8] == wanted);
            if let Some(addend) = entry.and_then(|entry| entry.last_chunk()) {
                return Ok(Some(u64::from_le_bytes(*addend)));
            }
        }
        Ok(None)
    }

    /// Returns the link to the file that holds the debug information.
    pub fn debug_link(&self) -> Option<DebugLink> {
        let section = self.stored_section(b".gnu_debuglink")?;
        DebugLink::parse(&self.section_data_within(section, debug_file::MAX_LINK_BYTES).ok()?)
    }

    /// Returns the link to the file with the debug information that several files share.
    pub fn alternate_link(&self) -> Option<AlternateLink> {
        let section = self.stored_section(b".gnu_debugaltlink")?;
        AlternateLink::parse(&self.section_data_within(section, debug_file::MAX_LINK_BYTES).ok()?)
    }

    /// Reports whether [`Self::section_data`] knows the form of a section. The bytes themselves are not checked.
    pub fn has_known_form(&self, section: &Section) -> bool {
        !section.is_compressed() || self.compression(section).is_ok()
    }

    /// Returns the size of a section after decompression, in bytes, as its header claims. Returns an error for an unknown form.
    pub fn unpacked_bytes(&self, section: &Section) -> Result<u64, ElfError> {
        if section.is_compressed() { Ok(self.compression(section)?.1) } else { Ok(section.file_bytes()) }
    }

    /// Reads the bytes at an ELF virtual address: at most `max_bytes`, and no further than the segment goes on in the file.
    pub fn bytes_at(&self, vaddr: u64, max_bytes: u64) -> Option<Cow<'d, [u8]>> {
        let (offset, size) = self.segments().file_range(vaddr)?;
        let size = size.min(max_bytes).min(self.file_bytes.checked_sub(offset)?);
        (size <= self.section_limit).then(|| self.data.read(offset, size)).flatten()
    }

    pub(crate) fn data(&self) -> Data<'d> {
        self.data
    }

    fn outside(&self, section: &Section) -> ElfError {
        malformed(format!("section {} is outside the file", self.sections.name(section).escape_ascii()))
    }
}
