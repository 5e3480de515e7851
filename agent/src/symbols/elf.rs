//! What an ELF file says of itself, read piece by piece with bounds: every size comes from the file, and the file
//! comes from whoever runs on the node.
//!
//! Reads go through `pread`, never through a memory map: a file that is cut while it is read makes a short read here,
//! where a map would make a SIGBUS.

use std::{fmt::Write, fs::File, os::unix::fs::FileExt};

use object::{
    LittleEndian,
    elf::{
        EM_AARCH64, EM_X86_64, FileHeader64, NT_GNU_BUILD_ID, PF_X, PT_LOAD, PT_NOTE, ProgramHeader64,
        SHF_COMPRESSED, SHN_UNDEF, SHT_NOBITS, SectionHeader64,
    },
    pod,
};

const LE: LittleEndian = LittleEndian;
const MAX_PROGRAM_HEADERS: usize = 512;
const MAX_SECTIONS: usize = 65_536;
const MAX_SECTION_NAMES: u64 = 4 << 20;
const MAX_NOTE_BYTES: u64 = 64 << 10;
/// GNU build ids have 20 bytes; lld can make 8 and users can give any.
const MAX_BUILD_ID_BYTES: usize = 64;
/// A Go build id is four base64 hashes with slashes between them: 83 characters.
const MAX_GO_BUILD_ID_BYTES: usize = 128;
const NT_GO_BUILD_ID: u32 = 4;

/// Why nothing was read from an ELF file.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum ElfError {
    /// Not an ELF file, or none of this machine's kind.
    #[error("not a 64-bit little-endian ELF file")]
    NotElf,
    /// A header points outside of the file, or the file was cut while it was read.
    #[error("the ELF file is cut or damaged: {0} is outside of the file")]
    Damaged(&'static str),
    /// A part is larger than is read.
    #[error("the ELF file's {0} is larger than is read")]
    TooLarge(&'static str),
}

/// A part of the file that is loaded into memory.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Segment {
    offset: u64,
    file_size: u64,
    address: u64,
    executable: bool,
}

/// The ELF header and the program headers.
#[derive(Debug, Default)]
pub(crate) struct Headers {
    segments: Vec<Segment>,
    pub(crate) build_id: String,
}

impl Headers {
    pub(crate) fn read(file: &File) -> Result<Self, ElfError> {
        let header = header(file)?;
        let count = usize::from(header.e_phnum.get(LE));
        if count > MAX_PROGRAM_HEADERS {
            return Err(ElfError::TooLarge("program header table"));
        }
        let bytes = read(
            file,
            header.e_phoff.get(LE),
            count * size_of::<ProgramHeader64<LittleEndian>>(),
            "program headers",
        )?;
        let (headers, _) = pod::slice_from_bytes::<ProgramHeader64<LittleEndian>>(&bytes, count)
            .map_err(|()| ElfError::Damaged("program headers"))?;
        let segments = headers
            .iter()
            .filter(|header| header.p_type.get(LE) == PT_LOAD)
            .map(|header| Segment {
                offset: header.p_offset.get(LE),
                file_size: header.p_filesz.get(LE),
                address: header.p_vaddr.get(LE),
                executable: header.p_flags.get(LE).0 & PF_X.0 != 0,
            })
            .collect();
        let notes: Vec<Vec<u8>> = headers
            .iter()
            .filter(|header| header.p_type.get(LE) == PT_NOTE && header.p_filesz.get(LE) <= MAX_NOTE_BYTES)
            .take(8)
            .filter_map(|header| {
                read(file, header.p_offset.get(LE), header.p_filesz.get(LE) as usize, "notes").ok()
            })
            .collect();
        Ok(Self { segments, build_id: build_id(notes.iter().map(Vec::as_slice)) })
    }

    /// The virtual address, as the file counts, of what stands at `offset` in the file.
    ///
    /// It goes through the segment that holds the offset. The distance between offset and address differs from segment
    /// to segment in everything that lld links, so the first segment's serves nobody.
    pub(crate) fn address_of(&self, offset: u64) -> Option<u64> {
        let holds = |segment: &&Segment| {
            offset.checked_sub(segment.offset).is_some_and(|distance| distance < segment.file_size)
        };
        let segment = self
            .segments
            .iter()
            .filter(|segment| segment.executable)
            .find(holds)
            .or_else(|| self.segments.iter().find(holds))?;
        segment.address.checked_add(offset - segment.offset)
    }
}

/// A section of the file.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Section {
    pub(crate) offset: u64,
    pub(crate) size: u64,
    pub(crate) address: u64,
    /// Index of the section that this one refers to: a symbol table's strings.
    pub(crate) link: usize,
    /// Its bytes are compressed.
    pub(crate) packed: bool,
}

/// The section headers, with their names.
#[derive(Debug)]
pub(crate) struct Sections {
    sections: Vec<(u32, Option<Section>)>,
    names: Vec<u8>,
}

impl Sections {
    pub(crate) fn read(file: &File) -> Result<Self, ElfError> {
        let header = header(file)?;
        let (offset, mut count) = (header.e_shoff.get(LE), usize::from(header.e_shnum.get(LE)));
        if offset == 0 {
            return Ok(Self { sections: Vec::new(), names: Vec::new() });
        }
        let mut names_index = usize::from(header.e_shstrndx.get(LE).0);
        if count == 0 || names_index == usize::from(object::elf::SHN_XINDEX.0) {
            // More than a u16 can count: the real numbers are in the first section header.
            let bytes = read(file, offset, size_of::<SectionHeader64<LittleEndian>>(), "section headers")?;
            let (first, _) = pod::from_bytes::<SectionHeader64<LittleEndian>>(&bytes)
                .map_err(|()| ElfError::Damaged("section headers"))?;
            if count == 0 {
                count = usize::try_from(first.sh_size.get(LE))
                    .map_err(|_| ElfError::TooLarge("section header table"))?;
            }
            names_index = first.sh_link.get(LE) as usize;
        }
        if count > MAX_SECTIONS {
            return Err(ElfError::TooLarge("section header table"));
        }
        let bytes =
            read(file, offset, count * size_of::<SectionHeader64<LittleEndian>>(), "section headers")?;
        let (headers, _) = pod::slice_from_bytes::<SectionHeader64<LittleEndian>>(&bytes, count)
            .map_err(|()| ElfError::Damaged("section headers"))?;
        let sections: Vec<_> = headers
            .iter()
            .map(|section| {
                let here = section.sh_type.get(LE) != SHT_NOBITS;
                (
                    section.sh_name.get(LE),
                    here.then(|| Section {
                        offset: section.sh_offset.get(LE),
                        size: section.sh_size.get(LE),
                        address: section.sh_addr.get(LE),
                        link: section.sh_link.get(LE) as usize,
                        packed: section.sh_flags.get(LE).0 & SHF_COMPRESSED.0 != 0,
                    }),
                )
            })
            .collect();
        let names = match sections.get(names_index) {
            Some((_, Some(section))) if section.size <= MAX_SECTION_NAMES => {
                read(file, section.offset, section.size as usize, "section names")?
            }
            Some((_, Some(_))) => return Err(ElfError::TooLarge("table of section names")),
            _ => Vec::new(),
        };
        Ok(Self { sections, names })
    }

    /// The section of this name; none where there is no such section or it has no bytes in this file.
    pub(crate) fn find(&self, name: &str) -> Option<Section> {
        self.iter().find(|(found, _)| *found == name.as_bytes()).map(|(_, section)| section)
    }

    pub(crate) fn by_index(&self, index: usize) -> Option<Section> {
        if index == usize::from(SHN_UNDEF.0) { None } else { self.sections.get(index)?.1 }
    }

    /// Name and place of each section that has bytes in this file.
    pub(crate) fn iter(&self) -> impl Iterator<Item = (&[u8], Section)> {
        self.sections
            .iter()
            .filter_map(|(name, section)| Some((c_string(&self.names, *name as usize)?, (*section)?)))
    }
}

/// Reads a section whole, if it has no more than `most` bytes.
pub(crate) fn read_section(
    file: &File,
    section: Section,
    most: u64,
    what: &'static str,
) -> Result<Vec<u8>, ElfError> {
    if section.size > most {
        return Err(ElfError::TooLarge(what));
    }
    read(file, section.offset, section.size as usize, what)
}

/// The zero-terminated string at `offset`.
pub(crate) fn c_string(bytes: &[u8], offset: usize) -> Option<&[u8]> {
    let rest = bytes.get(offset..)?;
    Some(&rest[..rest.iter().position(|byte| *byte == 0)?])
}

/// The build id that these note sections hold: the GNU build id in lower-case hex, else Go's own text, else empty.
pub(crate) fn build_id<'a>(notes: impl Iterator<Item = &'a [u8]>) -> String {
    let mut go = String::new();
    for (name, kind, content) in notes.flat_map(notes_of) {
        if name == b"GNU\0" && kind == NT_GNU_BUILD_ID.0 && (1..=MAX_BUILD_ID_BYTES).contains(&content.len())
        {
            return content.iter().fold(String::new(), |mut hex, byte| {
                // A string takes every write.
                let _ = write!(hex, "{byte:02x}");
                hex
            });
        }
        if name == b"Go\0\0"
            && kind == NT_GO_BUILD_ID
            && content.len() <= MAX_GO_BUILD_ID_BYTES
            && go.is_empty()
        {
            let text = content.split(|byte| *byte == 0).next().unwrap_or_default();
            if text.iter().all(u8::is_ascii_graphic) {
                go = String::from_utf8_lossy(text).into_owned();
            }
        }
    }
    go
}

/// Name, type and content of each note.
fn notes_of(mut bytes: &[u8]) -> impl Iterator<Item = (&[u8], u32, &[u8])> {
    std::iter::from_fn(move || {
        let word = |at: usize| Some(u32::from_le_bytes(bytes.get(at..at + 4)?.try_into().ok()?));
        let (name_size, content_size, kind) = (word(0)? as usize, word(4)? as usize, word(8)?);
        let rest = bytes.get(12..)?;
        let name = rest.get(..name_size)?;
        let rest = rest.get(name_size.next_multiple_of(4)..)?;
        let content = rest.get(..content_size)?;
        bytes = rest.get(content_size.next_multiple_of(4)..).unwrap_or_default();
        Some((name, kind, content))
    })
}

fn header(file: &File) -> Result<FileHeader64<LittleEndian>, ElfError> {
    let bytes =
        read(file, 0, size_of::<FileHeader64<LittleEndian>>(), "header").map_err(|_| ElfError::NotElf)?;
    let (header, _) = pod::from_bytes::<FileHeader64<LittleEndian>>(&bytes).map_err(|()| ElfError::NotElf)?;
    let ident = &header.e_ident;
    let machine = header.e_machine.get(LE);
    if ident.magic != [0x7f, b'E', b'L', b'F']
        || ident.class.0 != 2
        || ident.data.0 != 1
        || !(machine == EM_X86_64 || machine == EM_AARCH64)
    {
        return Err(ElfError::NotElf);
    }
    Ok(*header)
}

/// Reads exactly `size` bytes, after making sure that the file is long enough: the size is the file's own claim, and
/// memory is not taken on a claim.
pub(crate) fn read(file: &File, offset: u64, size: usize, what: &'static str) -> Result<Vec<u8>, ElfError> {
    let length = file.metadata().map_err(|_| ElfError::Damaged(what))?.len();
    if offset.checked_add(size as u64).is_none_or(|end| end > length) {
        return Err(ElfError::Damaged(what));
    }
    let mut bytes = vec![0; size];
    file.read_exact_at(&mut bytes, offset).map_err(|_| ElfError::Damaged(what))?;
    Ok(bytes)
}
