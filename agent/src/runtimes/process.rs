//! The interpreter of a running process, found without the engine.

use std::{
    collections::{HashMap, HashSet},
    fs::File,
    io::{self, BufRead as _, BufReader, Read as _},
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering::Relaxed},
    },
};

use gannet_elf::{Elf, Segments};
use gannet_unwind::limits::TableLimits;

use super::{Attachment, ProcessMemory, RuntimeFile, WhyNot, detect};
use crate::model::{MapsFile, MapsLine, open_mapped};

/// Bytes that are read of the list of mappings, and files that are opened. Searches that end there are counted.
const MAX_MAPS_BYTES: u64 = 4 << 20;
const MAX_FILES: usize = 512;

/// Searches that found no interpreter in the part of the mappings that they read. All readers of processes share the count.
static CUT_SEARCHES: AtomicU64 = AtomicU64::new(0);

/// Returns the number of searches for an interpreter that ended at a limit without one, since the start.
pub(crate) fn cut_searches() -> u64 {
    CUT_SEARCHES.load(Relaxed)
}

/// The outcome of a search for the interpreter of a process.
#[derive(Debug)]
pub(crate) struct RuntimeSearch {
    /// The interpreter's file, and the address in the process minus the address in that file.
    pub(crate) found: Option<(Arc<RuntimeFile>, u64)>,
    /// There are more mapped files than were searched, and none of the searched ones is an interpreter with frames.
    pub(crate) is_cut: bool,
}

impl RuntimeSearch {
    /// Describes what a cut search means to a user.
    pub(crate) fn cut_text() -> String {
        format!("the agent searched the first {MAX_FILES} of its mapped programs and libraries alone")
    }
}

/// Finds the interpreter of a process, and where that keeps its frames or why they cannot be taken. `None` without an interpreter
/// that the agent knows. The calls may wait for the process and for its file systems without end.
pub(crate) fn inspect(tgid: u32) -> io::Result<Option<(RuntimeFile, Result<Attachment, WhyNot>)>> {
    let Some((file, bias)) = find(tgid)? else { return Ok(None) };
    let attached = file.runtime.attach(&file, bias, &ProcessMemory { tgid });
    Ok(Some((file, attached)))
}

/// Returns the interpreter's file, and the address in the process minus the address in that file.
pub(crate) fn find(tgid: u32) -> io::Result<Option<(RuntimeFile, u64)>> {
    let found = RuntimeFinder::default().find(tgid)?.found;
    Ok(found.map(|(file, bias)| (RuntimeFile::clone(&file), bias)))
}

/// Finds the interpreters of many processes. It reads a file that several of them map once.
#[derive(Debug, Default)]
pub(crate) struct RuntimeFinder {
    files: HashMap<MapsFile, Option<Found>>,
}

/// An interpreter's file, and where its parts belong.
type Found = (Arc<RuntimeFile>, Segments);

impl RuntimeFinder {
    /// Finds the interpreter's file of a process. The calls may wait for the process and for its file systems without end.
    pub(crate) fn find(&mut self, tgid: u32) -> io::Result<RuntimeSearch> {
        self.search(tgid, MAX_FILES, MAX_MAPS_BYTES)
    }

    fn search(&mut self, tgid: u32, max_files: usize, max_bytes: u64) -> io::Result<RuntimeSearch> {
        let search = self.search_files(tgid, max_files, max_bytes)?;
        if search.is_cut && CUT_SEARCHES.fetch_add(1, Relaxed) == 0 {
            tracing::warn!(
                tgid,
                "no interpreter is among the first {max_files} programs and libraries that the process maps, and the agent searches \
                 no more here: previews and explanations of rules show the process without a runtime, as /debug/processes does; \
                 rules in force search all; gannet_agent_runtimes_cut_searches_total counts further processes"
            );
        }
        Ok(search)
    }

    fn search_files(&mut self, tgid: u32, max_files: usize, max_bytes: u64) -> io::Result<RuntimeSearch> {
        let page = rustix::param::page_size() as u64;
        let mut maps = BufReader::new(File::open(format!("/proc/{tgid}/maps"))?.take(max_bytes));
        let mut seen = HashSet::new();
        let mut without_frames = None;
        let mut is_cut = false;
        for line in maps.by_ref().lines() {
            let line = line?;
            let Some(line) = MapsLine::parse(&line) else { continue };
            let numbers = line.file();
            if !line.path.starts_with('/') || !line.is_code() || !seen.insert(numbers.clone()) {
                continue;
            }
            if seen.len() > max_files {
                is_cut = true;
                break;
            }
            let known = if let Some(known) = self.files.get(&numbers) {
                known
            } else {
                let Ok(open) = open_mapped(tgid, line.start, line.end) else { continue };
                let Ok(elf) = Elf::parse(&open, &TableLimits::default().elf()) else { continue };
                let read = detect(&elf, line.path).map(|file| (Arc::new(file), elf.segments().clone()));
                &*self.files.entry(numbers).or_insert(read)
            };
            if let Some((file, segments)) = known
                && let Some(bias) = segments.bias(line.start, line.offset, page)
            {
                let found = Some((Arc::clone(file), bias));
                if file.runtime.has_frames() {
                    return Ok(RuntimeSearch { found, is_cut: false });
                }
                without_frames = without_frames.or(found);
            }
        }
        is_cut |= maps.get_ref().limit() == 0;
        Ok(RuntimeSearch { found: without_frames, is_cut })
    }
}

#[cfg(test)]
mod tests {
    use std::{
        io::{BufRead as _, BufReader},
        process::{Command, Stdio},
    };

    use super::*;

    #[test]
    fn searches_that_end_at_a_limit_are_counted() {
        let mut python = Command::new("/usr/bin/python3")
            .args(["-c", "print('ready', flush=True)\nimport time\ntime.sleep(100)"])
            .stdout(Stdio::piped())
            .spawn()
            .unwrap();
        let mut ready = String::new();
        BufReader::new(python.stdout.take().unwrap()).read_line(&mut ready).unwrap();
        let mut finder = RuntimeFinder::default();
        let mut search = |files, bytes| {
            let search = finder.search(python.id(), files, bytes).unwrap();
            (search.found.is_some(), search.is_cut)
        };
        let found = [search(MAX_FILES, MAX_MAPS_BYTES), search(0, MAX_MAPS_BYTES), search(MAX_FILES, 100)];
        python.kill().unwrap();
        python.wait().unwrap();
        assert_eq!(found, [(true, false), (false, true), (false, true)]);
        // This program maps more than one file and is no interpreter.
        let mut own = |files| finder.search(std::process::id(), files, MAX_MAPS_BYTES).unwrap();
        assert!(!own(MAX_FILES).is_cut && own(1).is_cut);
        // Searches of other tests are below the limits.
        assert_eq!(cut_searches(), 3);
    }
}
