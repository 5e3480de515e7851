//! The debug information of files: whether it may be read, and what reading it has cost.

use std::{
    fs::File,
    path::{Path, PathBuf},
    sync::{Arc, atomic::Ordering},
    time::{Duration, Instant},
};

use gannet_symbols::{
    alternate::find_alternate,
    dwarf::{self, DebugFrame, Examined, Unusable},
};

use tokio::sync::mpsc;

use super::{
    debug_file,
    offers::{FileOffers, OfferedFile},
    options::{DebugCost, Skipped, SymbolizerStats},
};
use crate::{
    access::{self, Target},
    governor::CountedChild,
    model::MappedFile,
};

/// The debug information of a file: the file that holds it, its size, and the time spent on it.
#[derive(Clone, Debug)]
pub(super) struct FileDebugInfo {
    /// The installed debug file; none if the file has its own debug information. The file itself is not held here, so that
    /// it can be closed.
    separate: Option<Arc<MappedFile>>,
    /// It refers to an installed file with the rest of it.
    has_alternate: bool,
    /// Bytes of the debug information and the symbol table, unpacked.
    state: Result<u64, Unusable>,
    spent: Spending,
}

impl FileDebugInfo {
    /// Returns the installed debug file.
    pub(super) fn separate_file(&self) -> Option<Arc<MappedFile>> {
        self.separate.clone()
    }
}

/// The frames that debug information gave.
#[derive(Debug)]
pub(super) enum DebugFrames {
    Read(Vec<DebugFrame>),
    /// The limit of time is used up. Names found without it are not final.
    Later,
    Absent,
}

impl DebugFrames {
    /// Returns the frame of the address with this index; none if the debug information does not describe it.
    pub(super) fn frame(&self, index: usize) -> Option<&DebugFrame> {
        match self {
            Self::Read(frames) => frames.get(index).filter(|frame| !frame.is_empty()),
            Self::Later | Self::Absent => None,
        }
    }
}

/// Reads debug information within limits.
pub(super) struct DebugInfoReader {
    /// The program that reads; see [`dwarf::resolve`].
    program: Option<PathBuf>,
    directories: Vec<PathBuf>,
    cost: DebugCost,
    offers: FileOffers,
    stats: Arc<SymbolizerStats>,
    /// Time spent on files whose debug information the program did not survive, all together: a user who makes one such
    /// file can make many.
    harm: Spending,
    /// Time spent on all files together.
    spent: Spending,
}

impl DebugInfoReader {
    pub(super) fn new(
        program: Option<PathBuf>,
        directories: Vec<PathBuf>,
        cost: DebugCost,
        offers: Option<mpsc::Sender<OfferedFile>>,
        stats: Arc<SymbolizerStats>,
    ) -> Self {
        let now = Instant::now();
        let offers = FileOffers::new(offers);
        Self {
            program,
            directories,
            cost,
            offers,
            stats,
            harm: Spending::new(now),
            spent: Spending::new(now),
        }
    }

    /// Reads the frames at these addresses, if the file has debug information that may be read now. `info` is the state of
    /// the file; it is none before the first call.
    pub(super) fn frames(
        &mut self,
        info: &mut Option<FileDebugInfo>,
        file: &Arc<MappedFile>,
        addresses: &[u64],
    ) -> DebugFrames {
        let begin = Instant::now();
        let is_new = info.is_none();
        if is_new {
            let (theirs, directories) = (Arc::clone(file), self.directories.clone());
            let examined = access::read_file(file, move |open| examine(&theirs, open, &directories, begin));
            // Without an answer the names of the symbol table are not final either.
            let Ok(examined) = examined else { return DebugFrames::Later };
            *info = examined.ok();
        }
        let Some(info) = info else { return DebugFrames::Absent };
        if info.state != Err(Unusable::None) {
            self.offers.offer(info.separate.as_ref().unwrap_or(file));
        }
        let Some(program) = &self.program else { return DebugFrames::Absent };
        let refused = match info.state {
            Err(Unusable::Refused) => {
                Some("is too large, refers to other files, or has an unknown compression")
            }
            Err(Unusable::NoAlternate) => Some(
                "refers to a file (.gnu_debugaltlink) that is not installed with it; install that file's package",
            ),
            _ => None,
        };
        if let Some(reason) = refused.filter(|_| is_new) {
            tracing::info!(path = file.path, "the debug information of this file {reason}");
            self.stats.unusable_debug_info.fetch_add(1, Ordering::Relaxed);
        }
        let skipped = match info.state {
            Ok(bytes) if bytes <= self.cost.file_bytes => None,
            Ok(_) => Some(Skipped::TooLarge),
            Err(Unusable::None) => return DebugFrames::Absent,
            Err(Unusable::Refused | Unusable::NoAlternate | Unusable::Harmful) => Some(Skipped::Unusable),
        };
        if let Some(reason) = skipped {
            self.stats.skip(reason, addresses.len());
            return DebugFrames::Absent;
        }
        if !self.has_time(info, begin) {
            return DebugFrames::Later;
        }
        let (program, separate, wanted) = (program.clone(), info.separate_file(), addresses.to_vec());
        let memory_bytes = self.cost.memory_bytes;
        let directories = if info.has_alternate { self.directories.clone() } else { Vec::new() };
        let deadline = dwarf::max_time(addresses.len());
        let theirs = Arc::clone(file);
        let result = access::node().run(Target::Device(file.dev), &file.path, deadline, move || {
            let open = theirs.open_for_reading()?;
            let separate = separate.as_ref().and_then(|file| file.file.as_ref());
            dwarf::resolve(
                &program,
                separate.unwrap_or(&open),
                &wanted,
                memory_bytes,
                &directories,
                &CountedChild::new,
            )
        });
        let Ok(result) = result else { return DebugFrames::Later };
        info.spent.add(begin.elapsed(), Instant::now());
        self.spent.add(begin.elapsed(), Instant::now());
        match result {
            Ok(frames) => DebugFrames::Read(frames),
            Err(error) => {
                tracing::warn!(
                    path = file.path,
                    %error,
                    "cannot use the debug information of this file; its symbol table names its functions"
                );
                self.harm.add(begin.elapsed(), Instant::now());
                info.state = Err(Unusable::Harmful);
                self.stats.unusable_debug_info.fetch_add(1, Ordering::Relaxed);
                self.stats.skip(Skipped::Unusable, addresses.len());
                DebugFrames::Absent
            }
        }
    }

    /// Returns whether debug information of this file may be read now.
    pub(super) fn has_time(&self, info: &FileDebugInfo, now: Instant) -> bool {
        !info.spent.is_over(Spending::MAX_OF_FILE, now)
            && !self.harm.is_over(Spending::MAX_OF_FILE, now)
            && !self.spent.is_over(self.cost.time, now)
    }
}

/// Looks for debug information in the file itself, then for an installed debug file.
fn examine(file: &MappedFile, open: &File, directories: &[PathBuf], now: Instant) -> FileDebugInfo {
    let spent = Spending::new(now);
    let of = |separate: Option<Arc<MappedFile>>, examined: Result<Examined, Unusable>| {
        let linker = separate.as_ref().map(|file| Path::new(&file.path));
        let total = examined.and_then(|examined| with_alternate(&examined, linker, directories));
        let has_alternate = total.is_ok_and(|(_, has_alternate)| has_alternate);
        FileDebugInfo { has_alternate, state: total.map(|(bytes, _)| bytes), separate, spent }
    };
    let own = of(None, dwarf::examine(open));
    if own.state != Err(Unusable::None) {
        return own;
    }
    let Some(separate) = debug_file::find(file, open, directories) else { return own };
    let examined = separate.file.as_ref().map_or(Err(Unusable::None), dwarf::examine);
    of(Some(Arc::new(separate)), examined)
}

/// Returns the size of debug information together with that of the file to which it refers, and whether it refers to one.
fn with_alternate(
    examined: &Examined,
    linker: Option<&Path>,
    directories: &[PathBuf],
) -> Result<(u64, bool), Unusable> {
    let Some(link) = &examined.alternate else { return Ok((examined.bytes, false)) };
    let alternate = find_alternate(link, linker, directories).ok_or(Unusable::NoAlternate)?;
    match dwarf::examine(&alternate) {
        Ok(Examined { bytes, alternate: None }) => Ok((examined.bytes.saturating_add(bytes), true)),
        _ => Err(Unusable::Refused),
    }
}

/// Time spent on something, forgotten at one hundredth of the speed at which time passes: so that it can take much at once,
/// as in the first minute, and little in the long run.
#[derive(Clone, Copy, Debug)]
struct Spending {
    spent: Duration,
    at: Instant,
}

impl Spending {
    /// Limit for one file.
    const MAX_OF_FILE: Duration = Duration::from_secs(2);
    /// Time that passes for each unit of time that is forgotten.
    const FORGET_AFTER: u32 = 100;

    fn new(now: Instant) -> Self {
        Self { spent: Duration::ZERO, at: now }
    }

    fn left(&self, now: Instant) -> Duration {
        self.spent.saturating_sub(now.saturating_duration_since(self.at) / Self::FORGET_AFTER)
    }

    fn is_over(&self, limit: Duration, now: Instant) -> bool {
        self.left(now) > limit
    }

    fn add(&mut self, spent: Duration, now: Instant) {
        *self = Self { spent: self.left(now) + spent, at: now };
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn time_spent_at_once_is_paid_back_in_the_long_run() {
        let is_too_much = |spending: &Spending, now| spending.is_over(Spending::MAX_OF_FILE, now);
        let begin = Instant::now();
        let mut spending = Spending::new(begin);
        spending.add(Duration::from_secs(2), begin);
        assert!(!is_too_much(&spending, begin));
        spending.add(Duration::from_secs(1), begin);
        assert!(is_too_much(&spending, begin + Duration::from_secs(99)));
        assert!(!is_too_much(&spending, begin + Duration::from_secs(100)));
        // Time that was not spent is not saved up.
        let later = begin + Duration::from_secs(1 << 20);
        spending.add(Duration::from_secs(3), later);
        assert!(is_too_much(&spending, later));
    }
}
