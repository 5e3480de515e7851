//! Options and counters of the symbolizer.

use std::{
    path::PathBuf,
    sync::atomic::{AtomicU64, Ordering},
    time::Duration,
};

use tokio::sync::mpsc;

use super::offers::OfferedFile;
use crate::model::KernelSymbolLog;

/// Bounds of the symbolizer.
#[derive(Clone, Debug)]
pub struct SymbolizerConfig {
    /// Windows whose profiles may wait.
    pub queue: usize,
    /// Memory for the names of known addresses.
    pub cache_bytes: u64,
    /// The program that reads debug information, which has inlined functions and lines: the agent itself, by
    /// [`DEBUG_INFO_VERB`](super::DEBUG_INFO_VERB). Without it no debug information is read.
    pub debug_reader: Option<PathBuf>,
    /// Directories of separate debug files, as distributions ship them.
    pub debug_dirs: Vec<PathBuf>,
    /// Limits of the cost of debug information. Symbol tables name the functions of files that cost more.
    pub debug_cost: DebugCost,
    /// The log of changes of the kernel's symbols, which the kernel side writes.
    pub kernel_symbols: &'static KernelSymbolLog,
    /// The queue of files whose debug information the collector may want; none if it is not asked.
    pub offers: Option<mpsc::Sender<OfferedFile>>,
}

impl Default for SymbolizerConfig {
    fn default() -> Self {
        Self {
            queue: 8,
            cache_bytes: 6 << 20,
            debug_reader: Some(PathBuf::from("/proc/self/exe")),
            debug_dirs: vec![PathBuf::from("/usr/lib/debug")],
            debug_cost: DebugCost::WANTED,
            kernel_symbols: KernelSymbolLog::of_this_kernel(),
            offers: None,
        }
    }
}

/// The reason why the names at an address were not read completely.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Skipped {
    /// The file has more debug information and symbols than the limit. The symbol table names the function.
    TooLarge,
    /// The time for debug information is used up. The symbol table names the function, and the address is tried again.
    NoTime,
    /// The file refers to other files, or reading it failed. The symbol table names the function.
    Unusable,
    /// The perf map is large and was not searched completely. The address has no name, and is tried again.
    LargeMap,
}

impl Skipped {
    /// All reasons, in the order of the counters.
    pub const ALL: [Self; 4] = [Self::TooLarge, Self::NoTime, Self::Unusable, Self::LargeMap];

    /// Returns the name in metrics and reports.
    pub fn name(self) -> &'static str {
        match self {
            Self::TooLarge => "too_large",
            Self::NoTime => "no_time",
            Self::Unusable => "unusable",
            Self::LargeMap => "large_perf_map",
        }
    }

    /// Returns what the address lacks, human-readable.
    pub fn lacks(self) -> &'static str {
        match self {
            Self::TooLarge | Self::NoTime | Self::Unusable => "inlined functions and lines",
            Self::LargeMap => "a name",
        }
    }

    /// Returns the reason with its cure, human-readable.
    pub fn explanation(self) -> &'static str {
        match self {
            Self::TooLarge => "debug information too large (select the program: --comm, --pid)",
            Self::NoTime => "no time for debug information (select fewer programs, or record for longer)",
            Self::Unusable => "debug information unusable",
            Self::LargeMap => "perf map too large to search at once (record for longer)",
        }
    }
}

/// Limits of the cost of debug information.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct DebugCost {
    /// Bytes of debug information and symbol table of one file, unpacked. Symbol tables name the functions of larger ones.
    pub file_bytes: u64,
    /// Memory of the process that reads, beside the file.
    pub memory_bytes: u64,
    /// Time for all files together: at once this much, in the long run a hundredth of all time.
    pub time: Duration,
    /// Bytes of perf maps that are read for all processes together at once. In the long run it is 2 MiB a second.
    pub map_bytes: u64,
}

impl DebugCost {
    /// For programs that a user or a rule selected.
    pub const WANTED: Self = Self {
        file_bytes: 2 << 30,
        memory_bytes: 256 << 20,
        time: Duration::from_secs(8),
        map_bytes: 2 << 30,
    };
    /// For every program of the machine.
    pub const EVERYTHING: Self = Self {
        file_bytes: 6 << 20,
        memory_bytes: 24 << 20,
        time: Duration::from_millis(60),
        map_bytes: 512 << 20,
    };
}

/// Counts of the symbolizer.
#[derive(Debug, Default)]
pub struct SymbolizerStats {
    /// Profiles that were finished.
    pub profiles: AtomicU64,
    /// Different addresses, by profile, that have a name.
    pub named: AtomicU64,
    /// Different addresses, by profile, that have none.
    pub unnamed: AtomicU64,
    /// Samples whose stack was cut, because it had more frames with inlined ones than a collector takes.
    pub cut_stacks: AtomicU64,
    /// Files whose symbol table could not be used.
    pub unusable_tables: AtomicU64,
    /// Files whose debug information exists and could not be used.
    pub unusable_debug_info: AtomicU64,
    /// Addresses whose names exist and were not read, by [`Skipped`]. An address that is tried again counts once, or in each
    /// profile if it is in a perf map.
    pub skipped: [AtomicU64; Skipped::ALL.len()],
    /// Memory of cached names, kernel symbols and perf maps.
    pub cached_bytes: AtomicU64,
    /// Files with debug information that the collector took.
    pub debug_files_uploaded: AtomicU64,
    /// Bytes of these files.
    pub debug_bytes_uploaded: AtomicU64,
    /// Files that the collector wanted and did not get.
    pub debug_uploads_failed: AtomicU64,
}

impl SymbolizerStats {
    /// Counts addresses whose names were not read.
    pub(super) fn skip(&self, reason: Skipped, addresses: usize) {
        self.skipped[reason as usize].fetch_add(addresses as u64, Ordering::Relaxed);
    }

    /// Returns the number of addresses whose names were not read, for each reason.
    pub fn skipped(&self) -> impl Iterator<Item = (Skipped, u64)> {
        Skipped::ALL
            .into_iter()
            .zip(&self.skipped)
            .map(|(reason, count)| (reason, count.load(Ordering::Relaxed)))
    }
}
