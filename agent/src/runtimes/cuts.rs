//! Counts of functions and code that the agent leaves out, or forgets and reads again, because of a limit.

use std::sync::atomic::{AtomicBool, AtomicU64, Ordering::Relaxed};

/// A limit of the readers of interpreters.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum CutLimit {
    /// Functions of one process. Those beyond have no name; each of their frames counts.
    Functions,
    /// Bytes of the texts of one process, or of all. The function has no name.
    Texts,
    /// Copies of texts that wait until the agent knows the interpreter of their process.
    Copies,
    /// Addresses and functions of one request. A later sample has the others read.
    Needs,
    /// Blocks and rows of one process. The agent forgets all blocks, and reads those that are still in use again.
    Blocks,
    /// Rows of all processes. The block has neither rules nor names.
    AllRows,
    /// Rows of one block. Stacks end at code without a row.
    BlockRows,
    /// Addresses without code of one process. The agent reads them again.
    Addresses,
    /// Functions without a name of one process. The agent reads them again.
    Nameless,
}

impl CutLimit {
    pub(crate) const ALL: [Self; 9] = [
        Self::Functions,
        Self::Texts,
        Self::Copies,
        Self::Needs,
        Self::Blocks,
        Self::AllRows,
        Self::BlockRows,
        Self::Addresses,
        Self::Nameless,
    ];

    /// Returns its name in metrics.
    pub(crate) fn name(self) -> &'static str {
        match self {
            Self::Functions => "functions",
            Self::Texts => "texts",
            Self::Copies => "copies",
            Self::Needs => "needs",
            Self::Blocks => "blocks",
            Self::AllRows => "all_rows",
            Self::BlockRows => "block_rows",
            Self::Addresses => "addresses",
            Self::Nameless => "nameless",
        }
    }

    /// Describes what a count of it counts.
    fn text(self) -> &'static str {
        match self {
            Self::Functions => "frames of functions beyond 16,384 have no name",
            Self::Texts => "functions have no name because their texts found no room",
            Self::Copies => "copies of texts found no room",
            Self::Needs => "addresses of stacks were left for a later reading",
            Self::Blocks => "blocks of code were forgotten, to be read again",
            Self::AllRows => "blocks of code found no room beside those of other processes",
            Self::BlockRows => "unwind rows of large blocks are missing, where stacks end",
            Self::Addresses => "addresses without code were forgotten, to be read again",
            Self::Nameless => "functions without a name were forgotten, to be read again",
        }
    }
}

const LIMITS: usize = CutLimit::ALL.len();

// Not a metric: `cut_by_limits` reads it for one.
static ALL: [AtomicU64; LIMITS] = [const { AtomicU64::new(0) }; LIMITS];

/// Returns the counts of all processes since the start.
pub(crate) fn cut_by_limits() -> impl Iterator<Item = (CutLimit, u64)> {
    CutLimit::ALL.into_iter().map(|limit| (limit, ALL[limit as usize].load(Relaxed)))
}

/// Counts for a process whose interpreter is not known. Returns whether it is the first of the node.
pub(crate) fn count_without_process(limit: CutLimit) -> bool {
    ALL[limit as usize].fetch_add(1, Relaxed) == 0
}

/// The counts of one process.
#[derive(Debug, Default)]
pub(crate) struct Cuts {
    // Not a metric: `cut_by_limits` has the sum over all processes.
    counts: [AtomicU64; LIMITS],
    is_logged: AtomicBool,
}

impl Cuts {
    /// Counts `count` more.
    pub(super) fn count(&self, limit: CutLimit, count: u64) {
        self.counts[limit as usize].fetch_add(count, Relaxed);
        ALL[limit as usize].fetch_add(count, Relaxed);
    }

    /// Describes the counts that are not 0; empty without one.
    pub(crate) fn text(&self) -> String {
        let counts = CutLimit::ALL.into_iter().map(|limit| (limit, self.of(limit)));
        let texts: Vec<_> = counts
            .filter(|(_, count)| *count > 0)
            .map(|(limit, count)| format!("{count} {}", limit.text()))
            .collect();
        texts.join(", ")
    }

    /// Returns the text once, when there is one.
    pub(crate) fn text_to_log(&self) -> Option<String> {
        let is_new =
            !self.is_logged.load(Relaxed) && CutLimit::ALL.into_iter().any(|limit| self.of(limit) > 0);
        (is_new && !self.is_logged.swap(true, Relaxed)).then(|| self.text())
    }

    pub(super) fn of(&self, limit: CutLimit) -> u64 {
        self.counts[limit as usize].load(Relaxed)
    }
}
