//! Section headers and their names.

use std::{borrow::Cow, ops::Range};

use object::{
    LittleEndian,
    elf::{SHF_COMPRESSED, SHF_EXECINSTR, SHN_XINDEX, SHT_NOBITS, SectionHeader64},
    pod,
};

use crate::{
    data::Data,
    error::{ElfError, ElfLimits, ElfQuantity, at_most, malformed},
    file_header::{FileHeader, LE},
};

const SECTION_HEADER_BYTES: usize = size_of::<SectionHeader64<LittleEndian>>();
/// Section names take some hundred bytes.
const MAX_NAME_BYTES: u64 = 4 << 20;

/// A section of the file.
#[derive(Clone, Debug)]
pub struct Section {
    /// ELF virtual address; 0 if the section is not loaded.
    pub vaddr: u64,
    /// Bytes in memory. They are also the bytes in the file, unless the section is not stored.
    pub bytes: u64,
    pub(crate) offset: u64,
    /// Index of the section that this one refers to: the strings of a symbol table.
    pub(crate) link: u32,
    is_stored: bool,
    is_code: bool,
    is_compressed: bool,
    name: Range<usize>,
}

impl Section {
    /// Returns whether the file holds the section's bytes. `.bss` has none, nor have most sections of a debug file.
    pub fn is_stored(&self) -> bool {
        self.is_stored
    }

    /// Returns whether the bytes in the file are compressed.
    pub fn is_compressed(&self) -> bool {
        self.is_compressed
    }

    /// Returns whether the section holds instructions.
    pub(crate) fn is_code(&self) -> bool {
        self.is_code && self.is_stored
    }

    pub(crate) fn file_bytes(&self) -> u64 {
        if self.is_stored { self.bytes } else { 0 }
    }
}

/// All sections of a file that have a name.
#[derive(Debug, Default)]
pub(crate) struct SectionTable {
    /// By index; none for a section without a name.
    sections: Vec<Option<Section>>,
    names: Vec<u8>,
}

impl SectionTable {
    /// Reads the section headers and their names. A file without section headers has an empty table.
    pub(crate) fn read(data: Data<'_>, header: &FileHeader, limits: &ElfLimits) -> Result<Self, ElfError> {
        let header = &header.raw;
        let offset = header.e_shoff.get(LE);
        if offset == 0 {
            return Ok(Self::default());
        }
        if usize::from(header.e_shentsize.get(LE)) != SECTION_HEADER_BYTES {
            return Err(malformed("the size of a section header"));
        }
        let outside = || malformed("section headers are outside the file");
        let first = data.read(offset, SECTION_HEADER_BYTES as u64).ok_or_else(outside)?;
        let (first, _) = pod::from_bytes::<SectionHeader64<LittleEndian>>(&first).map_err(|()| outside())?;
        // Numbers that do not fit 16 bits are in the first section header, each on its own.
        let count = match header.e_shnum.get(LE) {
            0 => first.sh_size.get(LE),
            count => count.into(),
        };
        let names_index = match header.e_shstrndx.get(LE) {
            SHN_XINDEX => first.sh_link.get(LE) as usize,
            index => usize::from(index.0),
        };
        at_most(ElfQuantity::Sections, limits.sections, count)?;
        let bytes = data.read(offset, count * SECTION_HEADER_BYTES as u64).ok_or_else(outside)?;
        let (headers, _) = pod::slice_from_bytes::<SectionHeader64<LittleEndian>>(&bytes, count as usize)
            .map_err(|()| outside())?;
        let names = names(data, headers.get(names_index))?.into_owned();
        let sections = headers.iter().map(|header| section(header, &names)).collect();
        Ok(Self { sections, names })
    }

    pub(crate) fn name(&self, section: &Section) -> &[u8] {
        &self.names[section.name.clone()]
    }

    pub(crate) fn iter(&self) -> impl Iterator<Item = &Section> {
        self.sections.iter().flatten()
    }

    pub(crate) fn find(&self, name: &[u8]) -> Option<&Section> {
        self.iter().find(|section| self.name(section) == name)
    }

    /// Returns the first section of this name that the file stores.
    pub(crate) fn stored(&self, name: &[u8]) -> Option<&Section> {
        self.iter().find(|section| section.is_stored && self.name(section) == name)
    }

    pub(crate) fn by_index(&self, index: u32) -> Option<&Section> {
        self.sections.get(index as usize)?.as_ref()
    }
}

fn names<'d>(
    data: Data<'d>,
    header: Option<&SectionHeader64<LittleEndian>>,
) -> Result<Cow<'d, [u8]>, ElfError> {
    let Some(header) = header.filter(|header| header.sh_type.get(LE) != SHT_NOBITS) else {
        return Ok(Cow::Borrowed(&[]));
    };
    let bytes = header.sh_size.get(LE);
    if bytes > MAX_NAME_BYTES {
        return Err(malformed("section names of more than 4 MiB"));
    }
    data.read(header.sh_offset.get(LE), bytes).ok_or_else(|| malformed("section names are outside the file"))
}

fn section(header: &SectionHeader64<LittleEndian>, names: &[u8]) -> Option<Section> {
    let start = header.sh_name.get(LE) as usize;
    let length = names.get(start..)?.iter().position(|byte| *byte == 0)?;
    let has_flag = |flag: u64| header.sh_flags.get(LE).0 & flag != 0;
    Some(Section {
        vaddr: header.sh_addr.get(LE),
        bytes: header.sh_size.get(LE),
        offset: header.sh_offset.get(LE),
        link: header.sh_link.get(LE),
        is_stored: header.sh_type.get(LE) != SHT_NOBITS,
        is_code: has_flag(SHF_EXECINSTR.0),
        is_compressed: has_flag(SHF_COMPRESSED.0),
        name: start..start + length,
    })
}
