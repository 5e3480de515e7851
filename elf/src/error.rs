//! ElfLimits of one file, and the reasons why a file cannot be read.

/// ElfLimits of the work on one file. The defaults accept every file of a usual machine, browsers and compilers included.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct ElfLimits {
    /// Bytes of one section, after decompression.
    pub section_bytes: u64,
    /// Sections that the headers may list.
    pub sections: u64,
}

impl Default for ElfLimits {
    fn default() -> Self {
        Self { section_bytes: 256 << 20, sections: 1 << 16 }
    }
}

/// A size that has a limit.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum ElfQuantity {
    /// Bytes of one section: [`ElfLimits::section_bytes`].
    SectionBytes,
    /// Number of sections: [`ElfLimits::sections`].
    Sections,
    /// Program headers: the kernel runs no program with more than 64 KiB of them.
    ProgramHeaders,
}

impl ElfQuantity {
    /// Returns the words that messages use.
    pub const fn as_str(self) -> &'static str {
        match self {
            Self::SectionBytes => "bytes in one section",
            Self::Sections => "sections",
            Self::ProgramHeaders => "program headers",
        }
    }
}

/// A size of the file is over its limit.
#[derive(Clone, Copy, PartialEq, Eq, Debug, thiserror::Error)]
#[error("{found} {} are over the limit of {limit}", what.as_str())]
pub struct TooLarge {
    /// The size that is too large.
    pub what: ElfQuantity,
    /// The limit in force.
    pub limit: u64,
    /// The size that the file claims.
    pub found: u64,
}

/// The reason why nothing was read from a file, or from a part of it.
#[derive(Clone, PartialEq, Eq, Debug, thiserror::Error)]
pub enum ElfError {
    /// The file does not begin with the ELF magic.
    #[error("not an ELF file")]
    NotElf,
    /// The file has 32 bits, is big-endian, or is for another machine.
    #[error("{what}: only 64-bit little-endian x86_64 and aarch64 files are supported")]
    Unsupported {
        /// The kind of file that was found.
        what: String,
    },
    /// Headers contradict the file, or the file was cut while it was read.
    #[error("broken ELF file: {what}")]
    Malformed {
        /// The header or section, and its fault.
        what: String,
    },
    /// A size is over its limit.
    #[error(transparent)]
    TooLarge(#[from] TooLarge),
}

pub(crate) fn malformed(what: impl Into<String>) -> ElfError {
    ElfError::Malformed { what: what.into() }
}

/// Returns an error if `found` is over `limit`.
pub(crate) fn at_most(what: ElfQuantity, limit: u64, found: u64) -> Result<(), TooLarge> {
    if found > limit { Err(TooLarge { what, limit, found }) } else { Ok(()) }
}
