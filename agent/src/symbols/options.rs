//! Options and counters of the symbolizer.

use std::{path::PathBuf, sync::atomic::AtomicU64, time::Duration};

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
        }
    }
}

/// Limits of the cost of debug information.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct DebugCost {
    /// Bytes of debug information of one file, unpacked. Symbol tables name the functions of larger ones.
    pub file_bytes: u64,
    /// Time for all files together: at once this much, in the long run a hundredth of all time.
    pub time: Duration,
}

impl DebugCost {
    /// For programs that a user or a rule selected.
    pub const WANTED: Self = Self { file_bytes: 2 << 30, time: Duration::from_secs(8) };
    /// For every program of the machine.
    pub const EVERYTHING: Self = Self { file_bytes: 4 << 20, time: Duration::from_millis(60) };
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
    /// Files whose symbol table could not be used.
    pub unusable_tables: AtomicU64,
    /// Files whose debug information exists and could not be used.
    pub unusable_debug_info: AtomicU64,
    /// Memory of cached names, kernel symbols and perf maps.
    pub cached_bytes: AtomicU64,
}
