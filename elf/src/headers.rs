//! The program headers and the build ids: everything that the loader reads.

use object::{
    LittleEndian,
    elf::{ET_EXEC, PF_X, PT_GNU_EH_FRAME, PT_LOAD, PT_NOTE, ProgramHeader64},
    pod,
};

use crate::{
    build_id::BuildIds,
    data::Data,
    error::{ElfError, ElfLimits, malformed},
    file_header::{Arch, FileHeader, LE, PROGRAM_HEADER_BYTES},
    sections::SectionTable,
    segments::{Segment, Segments},
};

/// Notes take some hundred bytes.
const MAX_NOTE_BYTES: u64 = 64 << 10;
/// Linkers write a segment of notes for each alignment: two at most.
const MAX_NOTE_SEGMENTS: usize = 8;

/// The headers that the loader reads.
#[derive(Clone, Debug)]
pub struct Headers {
    /// The instruction set.
    pub arch: Arch,
    /// The loaded segments.
    pub segments: Segments,
    /// Build ids of the notes; see [`BuildIds`].
    pub build_ids: BuildIds,
    /// True if the linker fixed the addresses of the program: `ET_EXEC`.
    pub(crate) is_fixed: bool,
    /// Address of the first instruction of a program or of the dynamic linker; 0 in libraries.
    pub(crate) entry: u64,
    /// Address and size of `.eh_frame_hdr`.
    pub(crate) eh_frame_hdr: Option<(u64, u64)>,
}

impl Headers {
    /// Reads the headers of a file. Section headers are read only where no segment holds a GNU build id.
    pub fn read<'d>(data: impl Into<Data<'d>>) -> Result<Self, ElfError> {
        let data = data.into();
        let header = FileHeader::read(data)?;
        let mut headers = Self::of(data, &header)?;
        if headers.build_ids.gnu.is_none()
            && let Ok(sections) = SectionTable::read(data, &header, &ElfLimits::default())
        {
            headers.add_build_ids_of_sections(data, &sections);
        }
        Ok(headers)
    }

    /// Reads the program headers, and the build ids that segments hold.
    pub(crate) fn of(data: Data<'_>, header: &FileHeader) -> Result<Self, ElfError> {
        let bytes = header.program_headers(data)?;
        let (headers, _) = pod::slice_from_bytes::<ProgramHeader64<LittleEndian>>(
            &bytes,
            bytes.len() / PROGRAM_HEADER_BYTES,
        )
        .map_err(|()| malformed("program headers"))?;
        let mut build_ids = BuildIds::default();
        let notes = headers
            .iter()
            .filter(|header| header.p_type.get(LE) == PT_NOTE && header.p_filesz.get(LE) <= MAX_NOTE_BYTES);
        for header in notes.take(MAX_NOTE_SEGMENTS) {
            let align = if header.p_align.get(LE) == 8 { 8 } else { 4 };
            if let Some(bytes) = data.read(header.p_offset.get(LE), header.p_filesz.get(LE)) {
                build_ids.add_notes(&bytes, align);
            }
        }
        Ok(Self {
            arch: header.arch,
            segments: Segments::new(
                headers.iter().filter(|header| header.p_type.get(LE) == PT_LOAD).map(segment).collect(),
            ),
            build_ids,
            is_fixed: header.raw.e_type.get(LE) == ET_EXEC,
            entry: header.raw.e_entry.get(LE),
            eh_frame_hdr: headers
                .iter()
                .find(|header| header.p_type.get(LE) == PT_GNU_EH_FRAME)
                .map(|header| (header.p_vaddr.get(LE), header.p_filesz.get(LE))),
        })
    }

    /// Adds the build ids that only sections hold: debug files, and programs linked without note segments.
    pub(crate) fn add_build_ids_of_sections(&mut self, data: Data<'_>, sections: &SectionTable) {
        if self.build_ids.gnu.is_some() {
            return;
        }
        for name in [&b".note.gnu.build-id"[..], b".note.go.buildid"] {
            if let Some(section) = sections.stored(name)
                && section.file_bytes() <= MAX_NOTE_BYTES
                && let Some(bytes) = data.read(section.offset, section.file_bytes())
            {
                self.build_ids.add_notes(&bytes, 4);
            }
        }
    }
}

fn segment(header: &ProgramHeader64<LittleEndian>) -> Segment {
    Segment {
        vaddr: header.p_vaddr.get(LE),
        file_offset: header.p_offset.get(LE),
        file_bytes: header.p_filesz.get(LE),
        memory_bytes: header.p_memsz.get(LE),
        executable: header.p_flags.get(LE).0 & PF_X.0 != 0,
    }
}
