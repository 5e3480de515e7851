//! Limits of the work on one file: bytes read, rows and rules built, time spent.
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use crate::format::{MAX_LINES, MAX_RULES, WORDS_PER_LINE};

/// Limits of the work on one file. The defaults accept every file of a usual machine, browsers and compilers included.
#[derive(Clone, Debug)]
pub struct TableLimits {
    /// Bytes of one section, after decompression.
    pub section_bytes: u64,
    /// Sections that the headers may list.
    pub sections: u64,
    /// Functions: entries of `.eh_frame`, of Go's function table, and so on.
    pub functions: u64,
    /// Rows of the finished table.
    pub rows: u64,
    /// Different rules of the finished table.
    pub rules: u64,
    /// Bytes of address space between the first function and the last.
    pub span_bytes: u64,
    /// Bytes of undescribed code that are searched for signal trampolines.
    pub scanned_bytes: u64,
    /// Bytes of undescribed code whose instructions are read; in a file with more of it, none are.
    pub analyzed_bytes: u64,
    /// Time after which the work ends with an error.
    pub time: Option<Duration>,
}

impl Default for TableLimits {
    fn default() -> Self {
        Self {
            section_bytes: 256 << 20,
            sections: 1 << 16,
            functions: 4 << 20,
            rows: 32 << 20,
            rules: MAX_RULES as u64,
            span_bytes: 4 << 30,
            scanned_bytes: 16 << 20,
            analyzed_bytes: 1 << 20,
            time: Some(Duration::from_secs(10)),
        }
    }
}

impl TableLimits {
    /// Returns the limits of reading the file.
    pub fn elf(&self) -> gannet_elf::ElfLimits {
        gannet_elf::ElfLimits { section_bytes: self.section_bytes, sections: self.sections }
    }
}

const _: () = assert!((32 << 20) / WORDS_PER_LINE < MAX_LINES);

/// A size that has a limit.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum TableQuantity {
    /// Bytes of a section: [`TableLimits::section_bytes`].
    SectionBytes,
    /// Number of sections: [`TableLimits::sections`].
    Sections,
    /// Program headers; see [`gannet_elf::ElfQuantity::ProgramHeaders`].
    ProgramHeaders,
    /// Number of functions: [`TableLimits::functions`].
    Functions,
    /// Number of rows: [`TableLimits::rows`].
    Rows,
    /// Number of rules: [`TableLimits::rules`].
    Rules,
    /// Bytes of covered addresses: [`TableLimits::span_bytes`].
    SpanBytes,
    /// Number of cache lines: [`crate::format::MAX_LINES`].
    Lines,
}

impl TableQuantity {
    /// Returns the words that messages use.
    pub const fn as_str(self) -> &'static str {
        match self {
            Self::SectionBytes => gannet_elf::ElfQuantity::SectionBytes.as_str(),
            Self::Sections => gannet_elf::ElfQuantity::Sections.as_str(),
            Self::ProgramHeaders => gannet_elf::ElfQuantity::ProgramHeaders.as_str(),
            Self::Functions => "functions",
            Self::Rows => "rows",
            Self::Rules => "rules",
            Self::SpanBytes => "bytes of code address space",
            Self::Lines => "lines",
        }
    }
}

/// The reason why work stopped before its end.
#[derive(Clone, PartialEq, Eq, Debug, thiserror::Error)]
pub enum LimitExceeded {
    /// A size is over its limit.
    #[error("{found} {} are over the limit of {limit}: raise that limit, or supply a table for this file", what.as_str())]
    TooLarge {
        /// The size that is too large.
        what: TableQuantity,
        /// The limit in force.
        limit: u64,
        /// The size that the file claims, or that it had reached when work stopped.
        found: u64,
    },
    /// The time limit is over.
    #[error("not done after {} ms: raise the time limit, or supply a table for this file", limit.as_millis())]
    TimedOut {
        /// The limit in force.
        limit: Duration,
    },
    /// The caller asked to stop.
    #[error("cancelled")]
    Cancelled,
}

impl From<gannet_elf::TooLarge> for LimitExceeded {
    fn from(too_large: gannet_elf::TooLarge) -> Self {
        let gannet_elf::TooLarge { what, limit, found } = too_large;
        let what = match what {
            gannet_elf::ElfQuantity::SectionBytes => TableQuantity::SectionBytes,
            gannet_elf::ElfQuantity::Sections => TableQuantity::Sections,
            gannet_elf::ElfQuantity::ProgramHeaders => TableQuantity::ProgramHeaders,
        };
        Self::TooLarge { what, limit, found }
    }
}

/// Limits with a running clock.
#[derive(Debug)]
pub(crate) struct Budget<'a> {
    pub(crate) limits: &'a TableLimits,
    cancel: Option<&'a AtomicBool>,
    start: Instant,
    steps: u32,
}

/// Steps between two checks of the clock: about 0.1 ms of work.
const STEPS_PER_CHECK: u32 = 4096;

impl<'a> Budget<'a> {
    pub(crate) fn new(limits: &'a TableLimits, cancel: Option<&'a AtomicBool>) -> Self {
        Self { limits, cancel, start: Instant::now(), steps: 0 }
    }

    /// Counts a small piece of work that follows.
    #[inline]
    pub(crate) fn step(&mut self) -> Result<(), LimitExceeded> {
        self.steps += 1;
        if self.steps >= STEPS_PER_CHECK { self.check() } else { Ok(()) }
    }

    /// Checks the clock before a large piece of work.
    pub(crate) fn check(&mut self) -> Result<(), LimitExceeded> {
        self.steps = 0;
        if self.cancel.is_some_and(|cancel| cancel.load(Ordering::Relaxed)) {
            return Err(LimitExceeded::Cancelled);
        }
        match self.limits.time {
            Some(limit) if self.start.elapsed() > limit => Err(LimitExceeded::TimedOut { limit }),
            _ => Ok(()),
        }
    }
}

/// Returns an error if `found` is over `limit`.
pub(crate) fn at_most(what: TableQuantity, limit: u64, found: u64) -> Result<(), LimitExceeded> {
    if found > limit { Err(LimitExceeded::TooLarge { what, limit, found }) } else { Ok(()) }
}
