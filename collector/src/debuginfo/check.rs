//! Checks of a file with debug information, before the collector stores it.
//!
//! The file is untrusted. These checks read its headers within bounds, in this process. Later a child process reads the debug information
//! ([`gannet_symbols::dwarf`]), and a search with a limit of work reads the symbol tables ([`gannet_symbols::tables`]).

use std::{fs::File, io};

use gannet_elf::{BuildId, Elf, ElfError, ElfLimits};
use gannet_symbols::dwarf::{self, Unusable};

use super::layout::Layout;

/// Maximum of all debug sections of a file after decompression, in bytes.
const MAX_UNPACKED_BYTES: u64 = 4 << 30;

/// The reason why the collector refuses a file. Each text names the cure.
#[derive(Debug, thiserror::Error)]
pub(crate) enum FileFault {
    #[error("cannot read the file: {0}")]
    Io(#[from] io::Error),
    #[error("cannot use the file: {0}; upload an ELF program or library, or its debug file")]
    Elf(#[from] ElfError),
    #[error(
        "the file has no GNU build id, so no profile can refer to it; link the program with `-Wl,--build-id` (Go: `-ldflags=-B=gobuildid`)"
    )]
    NoBuildId,
    #[error("section {name} claims {bytes} bytes, more than the file has; it is cut short or damaged")]
    Damaged { name: String, bytes: u64 },
    #[error("the file has the build id {found}, not {declared}: give the file of that build")]
    OtherBuildId { declared: BuildId, found: BuildId },
    #[error(
        "the file has neither debug information nor a symbol table, so it names nothing; upload the program as it was before `strip`, or \
         its debug file"
    )]
    Nothing,
    #[error(
        "the debug information refers to other files, has an unknown compression, or is larger than 2 GiB; upload a smaller file with \
         complete debug information, compressed by zlib or zstd or not at all"
    )]
    Refused,
    #[error(
        "the debug information claims {0} bytes after decompression, the limit is {MAX_UNPACKED_BYTES}; build with less of it, as \
         `-g1` does"
    )]
    TooLarge(u64),
}

/// The properties of a file that passed the checks.
#[derive(Debug)]
pub(crate) struct Checked {
    pub(crate) build_id: BuildId,
    pub(crate) layout: Layout,
    /// The file has debug information, beside its symbol tables.
    pub(crate) has_debug_info: bool,
    /// Build id of the file with the shared part of the debug information.
    pub(crate) alternate: Option<BuildId>,
}

/// Checks a file, and returns its properties. Blocking.
pub(crate) fn check(file: &File) -> Result<Checked, FileFault> {
    let elf = Elf::parse(file, &ElfLimits::default())?;
    if let Some(fault) = elf.section_fault() {
        return Err(fault.clone().into());
    }
    let build_id = elf.build_id().cloned().ok_or(FileFault::NoBuildId)?;
    let mut unpacked = 0_u64;
    for (name, section) in elf.sections() {
        let is_debug = name.starts_with(b".debug_");
        if (is_debug || matches!(name, b".symtab" | b".strtab"))
            && section.is_stored()
            && section.bytes > elf.file_bytes()
        {
            return Err(FileFault::Damaged { name: name.escape_ascii().to_string(), bytes: section.bytes });
        }
        if is_debug && section.is_stored() {
            unpacked = unpacked.saturating_add(elf.unpacked_bytes(section)?);
        }
    }
    let examined = match dwarf::examine(file) {
        Ok(examined) => Some(examined),
        Err(Unusable::None) => None,
        Err(Unusable::Refused | Unusable::NoAlternate | Unusable::Harmful) => return Err(FileFault::Refused),
    };
    if unpacked > MAX_UNPACKED_BYTES {
        return Err(FileFault::TooLarge(unpacked));
    }
    let tables = [&b".symtab"[..], b".gnu_debugdata", b".gopclntab"];
    if examined.is_none() && !tables.iter().any(|name| elf.stored_section(name).is_some()) {
        return Err(FileFault::Nothing);
    }
    Ok(Checked {
        build_id,
        layout: Layout::of(&elf),
        has_debug_info: examined.is_some(),
        alternate: examined.and_then(|examined| examined.alternate).map(|link| link.build_id),
    })
}

/// Checks that a file is usable and has this build id. Blocking.
pub(crate) fn check_declared(file: &File, declared: &BuildId) -> Result<(), FileFault> {
    let Checked { build_id: found, .. } = check(file)?;
    if found == *declared {
        Ok(())
    } else {
        Err(FileFault::OtherBuildId { declared: declared.clone(), found })
    }
}
