//! What an ELF file says about itself: segments, sections, build id, where its debug file is.
use std::borrow::Cow;
use std::fmt::{self, Display};
use std::fs::File;
use std::io::{self, Read, Seek, SeekFrom};
use std::os::unix::fs::FileExt;
use std::str::FromStr;

use object::LittleEndian;
use object::elf::{
    EM_AARCH64, EM_X86_64, FileHeader64, NT_GNU_BUILD_ID, PF_X, PT_GNU_EH_FRAME, PT_LOAD, PT_NOTE,
    ProgramHeader64, SHF_EXECINSTR, SHT_NOBITS, SectionHeader64,
};
use object::read::elf::{CompressionHeader, FileHeader, ProgramHeader, SectionHeader};
use object::read::{CompressedData, CompressedFileRange, ReadCache, ReadRef};

use crate::limits::{Exceeded, Limits, Quantity, at_most};
use crate::table::Arch;

const LE: LittleEndian = LittleEndian;
/// Notes are a few dozen bytes; whatever is larger than this is not looked at.
const MAX_NOTE_BYTES: u64 = 64 << 10;

/// Why a file is not one that can be unwound.
#[derive(Clone, PartialEq, Eq, Debug, thiserror::Error)]
pub enum ElfError {
    /// No ELF magic.
    #[error("not an ELF file")]
    NotElf,
    /// 32 bits, big-endian or another machine.
    #[error("{what}: only 64-bit little-endian x86_64 and aarch64 files can be unwound")]
    Unsupported {
        /// What it is instead.
        what: String,
    },
    /// Headers contradict the file.
    #[error("broken ELF file: {what}")]
    Malformed {
        /// Which header and how.
        what: String,
    },
    /// A limit.
    #[error(transparent)]
    Exceeded(#[from] Exceeded),
}

fn malformed(what: &str) -> ElfError {
    ElfError::Malformed { what: what.to_owned() }
}

/// The identifier that the linker put into a file, at most 64 bytes of it.
#[derive(Clone, PartialEq, Eq, Hash, Debug, PartialOrd, Ord)]
pub struct BuildId(Vec<u8>);

impl BuildId {
    const MAX_BYTES: usize = 64;

    /// The bytes.
    pub fn as_bytes(&self) -> &[u8] {
        &self.0
    }

    /// From bytes; what is longer than 64 is cut.
    pub fn from_bytes(bytes: &[u8]) -> Option<Self> {
        (!bytes.is_empty()).then(|| Self(bytes[..bytes.len().min(Self::MAX_BYTES)].to_vec()))
    }
}

impl Display for BuildId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.iter().try_for_each(|byte| write!(f, "{byte:02x}"))
    }
}

/// Text that is not the hexadecimal form of an identifier.
#[derive(Clone, PartialEq, Eq, Debug, thiserror::Error)]
#[error("{text:?} is not {expected}")]
pub struct ParseHexError {
    pub(crate) text: String,
    pub(crate) expected: &'static str,
}

pub(crate) fn parse_hex(text: &str) -> Option<Vec<u8>> {
    let digits = text.as_bytes();
    let nibble = |byte: u8| char::from(byte).to_digit(16).map(|digit| digit as u8);
    digits
        .len()
        .is_multiple_of(2)
        .then(|| digits.chunks(2).map(|pair| Some(nibble(pair[0])? << 4 | nibble(pair[1])?)).collect())
        .flatten()
}

impl FromStr for BuildId {
    type Err = ParseHexError;

    fn from_str(text: &str) -> Result<Self, ParseHexError> {
        parse_hex(text).filter(|bytes| (1..=Self::MAX_BYTES).contains(&bytes.len())).map(Self).ok_or_else(
            || ParseHexError { text: text.to_owned(), expected: "a build id (1 to 64 bytes in hex)" },
        )
    }
}

/// One `PT_LOAD`.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Hash)]
pub struct Segment {
    /// ELF virtual address of its first byte.
    pub vaddr: u64,
    /// Where that byte is in the file.
    pub file_offset: u64,
    /// Bytes in the file.
    pub file_bytes: u64,
    /// Bytes in memory.
    pub memory_bytes: u64,
    /// Whether it may be executed.
    pub executable: bool,
}

impl Segment {
    fn vaddr_end(&self) -> u64 {
        self.vaddr.saturating_add(self.memory_bytes)
    }
}

/// The `PT_LOAD`s of a file, in the order of its headers.
#[derive(Clone, PartialEq, Eq, Debug, Default, Hash)]
pub struct Segments(Vec<Segment>);

impl Segments {
    /// For images that have no file.
    pub fn new(segments: Vec<Segment>) -> Self {
        Self(segments)
    }

    /// All of them.
    pub fn as_slice(&self) -> &[Segment] {
        &self.0
    }

    /// The ELF virtual address of the first byte of an executable mapping that begins at `file_offset`, a multiple of
    /// `page_bytes`.
    ///
    /// The kernel maps whole pages, so a mapping may begin before its segment does, and neighbouring segments may
    /// share a page of the file: of those that reach into the mapping's first page, the one that begins in it is
    /// meant, else the one that spans it.
    pub fn vaddr_of_mapping(&self, file_offset: u64, page_bytes: u64) -> Option<u64> {
        let executable = self.0.iter().filter(|s| s.executable && s.file_bytes > 0);
        let begins = |s: &&Segment| s.file_offset & !(page_bytes - 1) == file_offset;
        let spans = |s: &&Segment| {
            s.file_offset <= file_offset && file_offset < s.file_offset.saturating_add(s.file_bytes)
        };
        let segment = executable.clone().find(begins).or_else(|| executable.clone().find(spans))?;
        Some(segment.vaddr.wrapping_add(file_offset).wrapping_sub(segment.file_offset))
    }

    /// What to subtract (wrapping) from an address in an executable mapping to get its ELF virtual address.
    pub fn bias(&self, mapping_start: u64, file_offset: u64, page_bytes: u64) -> Option<u64> {
        Some(mapping_start.wrapping_sub(self.vaddr_of_mapping(file_offset, page_bytes)?))
    }

    /// The end of the executable segment that holds this address.
    pub(crate) fn executable_end(&self, vaddr: u64) -> Option<u64> {
        self.0
            .iter()
            .filter(|s| s.executable && s.vaddr <= vaddr && vaddr < s.vaddr_end())
            .map(Segment::vaddr_end)
            .max()
    }

    /// Where in the file an address is, with the bytes that follow it in its segment.
    pub(crate) fn file_range(&self, vaddr: u64) -> Option<(u64, u64)> {
        self.0.iter().find_map(|s| {
            let into = vaddr.checked_sub(s.vaddr)?;
            (into < s.file_bytes).then(|| (s.file_offset.wrapping_add(into), s.file_bytes - into))
        })
    }
}

/// The name and checksum of a file with debug information.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct DebugLink {
    /// File name without directory, as the bytes in the file.
    pub name: Vec<u8>,
    /// CRC-32 of the whole debug file.
    pub crc: u32,
}

#[derive(Debug)]
pub(crate) struct Section<'d> {
    pub(crate) name: &'d [u8],
    pub(crate) vaddr: u64,
    pub(crate) bytes: u64,
    header: &'d SectionHeader64<LittleEndian>,
}

/// A file whose headers have been read and make sense.
#[derive(Debug)]
pub struct Elf<'d, R: ReadRef<'d>> {
    data: R,
    file_bytes: u64,
    arch: Arch,
    entry: u64,
    segments: Segments,
    sections: Vec<Section<'d>>,
    eh_frame_hdr: Option<(u64, u64)>,
    build_id: Option<BuildId>,
    section_limit: u64,
}

impl<'d, R: ReadRef<'d>> Elf<'d, R> {
    /// Reads the headers.
    pub fn parse(data: R, limits: &Limits) -> Result<Self, ElfError> {
        let file_bytes = data.len().map_err(|()| malformed("the file has no length"))?;
        let ident = data.read_bytes_at(0, 20).map_err(|()| ElfError::NotElf)?;
        if !ident.starts_with(b"\x7fELF") {
            return Err(ElfError::NotElf);
        }
        let unsupported = |what: String| Err(ElfError::Unsupported { what });
        if ident[4] != 2 {
            return unsupported("32-bit ELF file".to_owned());
        }
        if ident[5] != 1 {
            return unsupported("big-endian ELF file".to_owned());
        }
        let arch = match object::elf::Machine(u16::from_le_bytes([ident[18], ident[19]])) {
            EM_X86_64 => Arch::X86_64,
            EM_AARCH64 => Arch::Aarch64,
            other => return unsupported(format!("ELF file for machine {}", other.0)),
        };
        let header =
            FileHeader64::<LittleEndian>::parse(data).map_err(|_| malformed("the file header is cut off"))?;
        let segment_count = header.phnum(LE, data).map_err(|_| malformed("the number of segments"))?;
        at_most(Quantity::Sections, limits.sections, u64::from(segment_count))?;
        let headers = header
            .program_headers(LE, data)
            .map_err(|_| malformed("segment headers are outside the file"))?;
        let mut elf = Self {
            data,
            file_bytes,
            arch,
            entry: header.e_entry.get(LE),
            segments: Segments(
                headers.iter().filter(|header| header.p_type(LE) == PT_LOAD).map(segment).collect(),
            ),
            sections: Vec::new(),
            eh_frame_hdr: headers
                .iter()
                .find(|header| header.p_type(LE) == PT_GNU_EH_FRAME)
                .map(|header| (header.p_vaddr(LE), header.p_filesz(LE))),
            build_id: None,
            section_limit: limits.section_bytes,
        };
        elf.build_id = headers.iter().find_map(|header| elf.note_of_segment(header));
        // Nothing that runs needs section headers, so a file may have none, or broken ones, and is still unwound by
        // its `.eh_frame_hdr`.
        let section_count = header.shnum(LE, data).unwrap_or(0);
        at_most(Quantity::Sections, limits.sections, u64::from(section_count))?;
        if let Ok(table) = header.sections(LE, data) {
            elf.sections = table
                .iter()
                .filter_map(|header| {
                    let name = table.section_name(LE, header).ok()?;
                    Some(Section { name, vaddr: header.sh_addr(LE), bytes: header.sh_size(LE), header })
                })
                .collect();
            if elf.build_id.is_none() {
                // Debug files keep their notes in sections only.
                elf.build_id =
                    elf.sections.iter().find(|s| s.name == b".note.gnu.build-id").and_then(|section| {
                        let (offset, size) = section.header.file_range(LE)?;
                        elf.build_id_in(offset, size)
                    });
            }
        }
        Ok(elf)
    }

    /// The instruction set.
    pub fn arch(&self) -> Arch {
        self.arch
    }

    /// Length of the file.
    pub fn file_bytes(&self) -> u64 {
        self.file_bytes
    }

    /// The loaded segments.
    pub fn segments(&self) -> &Segments {
        &self.segments
    }

    /// The build id, if there is one.
    pub fn build_id(&self) -> Option<&BuildId> {
        self.build_id.as_ref()
    }

    /// Where the debug information went, if the file says so.
    pub fn debug_link(&self) -> Option<DebugLink> {
        let data = self.section_data(self.section(b".gnu_debuglink")?).ok()?;
        let end = data.iter().position(|byte| *byte == 0).filter(|end| *end > 0)?;
        let crc = data.get((end + 4) & !3..)?.first_chunk()?;
        let name = data[..end].to_vec();
        // A name with a directory would let the file choose what is opened.
        (!name.contains(&b'/')).then_some(DebugLink { name, crc: u32::from_le_bytes(*crc) })
    }

    /// Where a program, or the dynamic linker, begins to run; 0 in libraries.
    pub(crate) fn entry(&self) -> u64 {
        self.entry
    }

    pub(crate) fn data(&self) -> R {
        self.data
    }

    pub(crate) fn section(&self, name: &[u8]) -> Option<&Section<'d>> {
        self.sections.iter().find(|section| section.name == name)
    }

    /// Addresses of code, ascending: the executable sections, or segments where there are no section headers.
    pub(crate) fn code(&self) -> Vec<(u64, u64)> {
        let in_sections = self.sections.iter().filter(|section| {
            let flags = section.header.sh_flags(LE).0;
            flags & SHF_EXECINSTR.0 != 0 && section.header.sh_type(LE) != SHT_NOBITS
        });
        let mut code: Vec<(u64, u64)> =
            in_sections.map(|section| (section.vaddr, section.vaddr.saturating_add(section.bytes))).collect();
        if code.is_empty() {
            let segments = self.segments.0.iter().filter(|segment| segment.executable);
            code.extend(segments.map(|s| (s.vaddr, s.vaddr.saturating_add(s.file_bytes))));
        }
        code.sort_unstable();
        code
    }

    /// Address and size of `.eh_frame_hdr`.
    pub(crate) fn eh_frame_hdr(&self) -> Option<(u64, u64)> {
        self.eh_frame_hdr
    }

    /// The bytes of a section, inflated if need be; empty if it takes no place in the file.
    pub(crate) fn section_data(&self, section: &Section<'d>) -> Result<Cow<'d, [u8]>, ElfError> {
        let broken = || malformed(&format!("section {} is outside the file", section.name.escape_ascii()));
        if section.header.sh_type(LE) == SHT_NOBITS {
            return Ok(Cow::Borrowed(&[]));
        }
        let compression = section.header.compression(LE, self.data).map_err(|_| broken())?;
        let Some((header, offset, compressed_size)) = compression else {
            let (offset, size) = section.header.file_range(LE).ok_or_else(broken)?;
            at_most(Quantity::SectionBytes, self.section_limit, size)?;
            if section.name.starts_with(b".zdebug_") {
                return self.old_compressed(offset, size).ok_or_else(broken)?;
            }
            return self.data.read_bytes_at(offset, size).map(Cow::Borrowed).map_err(|()| broken());
        };
        let format = match header.ch_type(LE) {
            object::elf::ELFCOMPRESS_ZLIB => object::read::CompressionFormat::Zlib,
            object::elf::ELFCOMPRESS_ZSTD => object::read::CompressionFormat::Zstandard,
            _ => return Err(broken()),
        };
        let uncompressed_size = header.ch_size(LE);
        self.inflate(CompressedFileRange { format, offset, compressed_size, uncompressed_size })
    }

    /// The GNU form before section flags: "ZLIB", the size in big-endian, the data.
    fn old_compressed(&self, offset: u64, size: u64) -> Option<Result<Cow<'d, [u8]>, ElfError>> {
        let head = self.data.read_bytes_at(offset, 12).ok()?;
        let length = head.strip_prefix(b"ZLIB")?.first_chunk()?;
        Some(self.inflate(CompressedFileRange {
            format: object::read::CompressionFormat::Zlib,
            offset: offset + 12,
            compressed_size: size.checked_sub(12)?,
            uncompressed_size: u64::from_be_bytes(*length),
        }))
    }

    fn inflate(&self, range: CompressedFileRange) -> Result<Cow<'d, [u8]>, ElfError> {
        at_most(Quantity::SectionBytes, self.section_limit, range.uncompressed_size)?;
        at_most(Quantity::SectionBytes, self.section_limit, range.compressed_size)?;
        let data = self
            .data
            .read_bytes_at(range.offset, range.compressed_size)
            .map_err(|()| malformed("compressed section is outside the file"))?;
        CompressedData { format: range.format, data, uncompressed_size: range.uncompressed_size }
            .decompress()
            .map_err(|_| malformed("a compressed section cannot be inflated"))
    }

    /// The bytes at an address, up to `most`, as far as they are in the file.
    pub(crate) fn bytes_at(&self, vaddr: u64, most: u64) -> Option<&'d [u8]> {
        let (offset, size) = self.segments.file_range(vaddr)?;
        let size = size.min(most).min(self.file_bytes.checked_sub(offset)?);
        self.data.read_bytes_at(offset, size).ok()
    }

    fn note_of_segment(&self, header: &ProgramHeader64<LittleEndian>) -> Option<BuildId> {
        (header.p_type(LE) == PT_NOTE)
            .then(|| self.build_id_in(header.p_offset(LE), header.p_filesz(LE)))
            .flatten()
    }

    fn build_id_in(&self, offset: u64, size: u64) -> Option<BuildId> {
        if size > MAX_NOTE_BYTES {
            return None;
        }
        let mut data = self.data.read_bytes_at(offset, size).ok()?;
        while let Some((head, rest)) = data.split_first_chunk::<12>() {
            let word = |at: usize| u32::from_le_bytes([head[at], head[at + 1], head[at + 2], head[at + 3]]);
            let (name_bytes, desc_bytes, kind) = (word(0) as usize, word(4) as usize, word(8));
            let name = rest.get(..name_bytes)?;
            let desc_at = name_bytes.checked_next_multiple_of(4)?;
            let desc = rest.get(desc_at..desc_at.checked_add(desc_bytes)?)?;
            if kind == NT_GNU_BUILD_ID.0 && name == b"GNU\0" {
                return BuildId::from_bytes(desc);
            }
            data = rest.get(desc_at.checked_add(desc_bytes.checked_next_multiple_of(4)?)?..)?;
        }
        None
    }
}

fn segment(header: &ProgramHeader64<LittleEndian>) -> Segment {
    Segment {
        vaddr: header.p_vaddr(LE),
        file_offset: header.p_offset(LE),
        file_bytes: header.p_filesz(LE),
        memory_bytes: header.p_memsz(LE),
        executable: header.p_flags(LE).0 & PF_X.0 != 0,
    }
}

/// Reads a file piece by piece, without moving its position.
///
/// Not a memory mapping: whoever owns the file can cut it short at any time, and a page that is gone kills the
/// process that touches it.
pub struct FileReader<'f> {
    cache: ReadCache<At<'f>>,
    most: u64,
}

impl fmt::Debug for FileReader<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("FileReader").field("most", &self.most).finish_non_exhaustive()
    }
}

impl<'f> FileReader<'f> {
    /// Pieces of at most [`Limits::section_bytes`] are read.
    pub fn new(file: &'f File, limits: &Limits) -> Self {
        Self { cache: ReadCache::new(At { file, position: 0 }), most: limits.section_bytes }
    }
}

impl<'a> ReadRef<'a> for &'a FileReader<'_> {
    fn len(self) -> Result<u64, ()> {
        (&self.cache).len()
    }

    fn read_bytes_at(self, offset: u64, size: u64) -> Result<&'a [u8], ()> {
        if size > self.most {
            return Err(());
        }
        (&self.cache).read_bytes_at(offset, size)
    }

    fn read_bytes_at_until(self, range: std::ops::Range<u64>, delimiter: u8) -> Result<&'a [u8], ()> {
        (&self.cache).read_bytes_at_until(range, delimiter)
    }
}

struct At<'f> {
    file: &'f File,
    position: u64,
}

impl Read for At<'_> {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        let read = self.file.read_at(buffer, self.position)?;
        self.position += read as u64;
        Ok(read)
    }
}

impl Seek for At<'_> {
    fn seek(&mut self, to: SeekFrom) -> io::Result<u64> {
        let out_of_range = || io::Error::from(io::ErrorKind::InvalidInput);
        self.position = match to {
            SeekFrom::Start(position) => position,
            SeekFrom::Current(by) => self.position.checked_add_signed(by).ok_or_else(out_of_range)?,
            SeekFrom::End(by) => {
                self.file.metadata()?.len().checked_add_signed(by).ok_or_else(out_of_range)?
            }
        };
        Ok(self.position)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn segment(vaddr: u64, file_offset: u64, file_bytes: u64, executable: bool) -> Segment {
        Segment { vaddr, file_offset, file_bytes, memory_bytes: file_bytes, executable }
    }

    #[test]
    fn r47_a_mapping_is_that_of_the_segment_that_holds_its_offset() {
        // As lld lays out a program: each segment's address runs ahead of its offset by one more page, and segments
        // share pages of the file.
        let lld = Segments::new(vec![
            segment(0x0, 0x0, 0x5a60, false),
            segment(0x6a60, 0x5a60, 0x9f10, true),
            segment(0x11970, 0xf970, 0x800, false),
        ]);
        assert_eq!(lld.vaddr_of_mapping(0x5000, 0x1000), Some(0x6000));
        assert_eq!(lld.bias(0x5555_0000_6000, 0x5000, 0x1000), Some(0x5555_0000_0000));
        // The second half of a mapping that was split by mprotect.
        assert_eq!(lld.vaddr_of_mapping(0x8000, 0x1000), Some(0x9000));
        // An offset that only the read-only segment has.
        assert_eq!(lld.vaddr_of_mapping(0x10000, 0x1000), None);
        // Two executable segments in one page of the file: the second mapping begins in the page where the first ends.
        let two =
            Segments::new(vec![segment(0x1000, 0x1000, 0x1800, true), segment(0x9800, 0x2800, 0x100, true)]);
        assert_eq!(two.vaddr_of_mapping(0x1000, 0x1000), Some(0x1000));
        assert_eq!(two.vaddr_of_mapping(0x2000, 0x1000), Some(0x9000));
        // Not relocatable: the address is far from the offset.
        let fixed = Segments::new(vec![segment(0x40_1000, 0x1000, 0x2000, true)]);
        assert_eq!(fixed.bias(0x40_1000, 0x1000, 0x1000), Some(0));
    }

    #[test]
    fn build_ids_round_trip_as_text() {
        let id: BuildId = "00ffA5".parse().unwrap();
        assert_eq!(id.to_string(), "00ffa5");
        for bad in ["", "0", "zz", "é1", &"00".repeat(65)] {
            assert!(bad.parse::<BuildId>().is_err(), "{bad}");
        }
    }
}
