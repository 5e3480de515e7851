//! Reading the executable mappings of processes, and noting where they change.

use std::{
    collections::HashSet,
    mem,
    num::NonZeroUsize,
    sync::Arc,
    time::{Duration, Instant},
};

use super::{
    FileMapping, FileTable, FileTableStats, Process, perf_map_files,
    proc::{self, CodeMapping, ProcError, ProcFs},
};
use crate::{
    access::{self, ENGINE_DEADLINE, Target},
    model::{Image, ImageKey, Mapping, MappingKind, NewMapping, ProcessKey},
};

/// The least time between two readings of one process's mappings, however many addresses are unknown.
pub(super) const RESCAN_INTERVAL: Duration = Duration::from_millis(50);
/// Executable mappings of one process; real ones have some hundreds. A process can have 65,530 mappings, unless the node's
/// `vm.max_map_count` allows more.
pub(super) const MAX_MAPPINGS: usize = 65_536;

/// Changes of images since the last [`ProcessTable::take_changes`](super::ProcessTable::take_changes).
#[derive(Debug, Default)]
pub struct ImageChanges {
    /// Images with more or other mappings than before.
    pub changed: HashSet<ImageKey>,
    /// Images as they were before a mapping was replaced by another file. Earlier samples are symbolized by these.
    pub replaced: Vec<(ImageKey, Arc<Image>)>,
}

/// Reads images. It owns the open files and the changes.
pub(super) struct ImageReader {
    files: FileTable,
    proc: Arc<dyn ProcFs>,
    changes: ImageChanges,
    /// Readings of mappings beyond the first of a process.
    pub(super) rescans: u64,
    /// Mappings beyond [`MAX_MAPPINGS`] of a process.
    pub(super) cut: u64,
}

impl ImageReader {
    /// Builds a reader that holds at most `files` files open.
    pub(super) fn new(files: NonZeroUsize, proc: Arc<dyn ProcFs>) -> Self {
        Self { files: FileTable::new(files), proc, changes: ImageChanges::default(), rescans: 0, cut: 0 }
    }

    pub(super) fn take_changes(&mut self) -> ImageChanges {
        mem::take(&mut self.changes)
    }

    pub(super) fn file_stats(&self) -> FileTableStats {
        self.files.stats()
    }

    pub(super) fn close_idle_files(&mut self) {
        self.files.close_idle();
    }

    /// Reads the executable mappings of a process from `/proc` and opens their files.
    pub(super) fn read(&mut self, process: &mut Process) -> Result<Image, ProcError> {
        let (proc, key) = (Arc::clone(&self.proc), process.key.process);
        let lines = on_worker(key, move || read_lines(&*proc, key));
        process.unanswered |= lines.is_err();
        let lines = lines??;
        Ok(self.image_of(process, &lines))
    }

    /// Builds an image from `/proc/PID/maps`.
    pub(super) fn image_of(&mut self, process: &mut Process, read: &MapsLines) -> Image {
        self.set_cut(process, read.cut);
        let mappings = read.lines.iter().map(|line| (&line.mapping, line.link));
        let mut image = Image { mappings: self.open_all(process, mappings) };
        image.join_anonymous();
        image
    }

    /// Notes the number of mappings that are missing in the image of a process. Counts those that were not missing before: a
    /// process is read again and again.
    fn set_cut(&mut self, process: &mut Process, cut: u64) {
        self.cut += cut.saturating_sub(process.cut_mappings);
        if cut > 0 && process.cut_mappings == 0 {
            let Process { key, comm, .. } = &*process;
            tracing::warn!(
                key = %key.process, comm,
                "the process has more executable mappings than the {MAX_MAPPINGS} that the agent reads: code in the others \
                 has no names; let it map its code in larger parts, or lower vm.max_map_count"
            );
        }
        process.cut_mappings = cut;
    }

    /// Builds an image from mappings that the kernel reported, oldest first. `cut`: the number that it reported beyond them.
    pub(super) fn build(&mut self, process: &mut Process, mappings: &[NewMapping], cut: u64) -> Image {
        self.set_cut(process, cut);
        let mut image = Image::default();
        let links = mappings.iter().map(|mapping| (mapping, (mapping.start, mapping.end)));
        for mapping in self.open_all(process, links) {
            image.map(mapping);
        }
        image
    }

    /// Adds a mapping that the kernel reported for the current image of a process.
    pub(super) fn add(&mut self, process: &mut Process, mapping: &NewMapping) {
        if mapping.inode == 0 && process.image.is_anonymous(mapping.start, mapping.end) {
            // The output of a just-in-time compiler, of which a part was writable for a while.
            return;
        }
        if process.image.mappings.len() >= MAX_MAPPINGS {
            self.set_cut(process, process.cut_mappings + 1);
            return;
        }
        // Programs may move their code to memory without a file, where it keeps its names; `/proc` decides.
        process.in_doubt |= mapping.inode == 0 && process.image.has_file_in(mapping.start, mapping.end);
        let new = self.open_all(process, std::iter::once((mapping, (mapping.start, mapping.end))));
        let before = Arc::clone(&process.image);
        let image = Arc::make_mut(&mut process.image);
        for mapping in new {
            image.map(mapping);
        }
        image.join_anonymous();
        self.note_change(process.key, &before, &process.image);
    }

    /// Reads the mappings of a process again if they hold not all of these addresses, unless that was done just now.
    pub(super) fn rescan(&mut self, process: &mut Process, addresses: &[u64]) {
        let rested = process.scanned.is_none_or(|at| at.elapsed() >= RESCAN_INTERVAL);
        let known = |address: &u64| process.image.find(*address).is_some();
        let is_known = addresses.iter().all(known) && !process.in_doubt;
        if process.kernel_thread || !process.is_alive() || !rested || is_known {
            return;
        }
        process.scanned = Some(Instant::now());
        self.read_again(process);
    }

    /// Reads the mappings of a process again.
    pub(super) fn read_again(&mut self, process: &mut Process) {
        if let Ok(image) = self.read(process) {
            process.in_doubt = false;
            self.rescans += 1;
            if process.read_at_ns.is_none() {
                process.reported = Some(Arc::clone(&process.image));
            }
            process.read_at_ns = Some(self.proc.now_ns());
            let before = mem::take(&mut process.image);
            process.image = Arc::new(merge(&before, image));
            self.note_change(process.key, &before, &process.image);
        }
    }

    fn note_change(&mut self, key: ImageKey, before: &Arc<Image>, after: &Image) {
        self.changes.changed.insert(key);
        if is_replaced(before, after) {
            self.changes.replaced.push((key, Arc::clone(before)));
        }
    }

    /// Opens the files of mappings. Each stands beside the range by which `/proc/PID/map_files` leads to its file.
    fn open_all<'a>(
        &mut self,
        process: &mut Process,
        mappings: impl Iterator<Item = (&'a NewMapping, (u64, u64))> + Clone,
    ) -> Vec<Mapping> {
        let (tgid, parent) = (process.key.process.tgid, process.parent);
        let of_files = mappings.clone().filter(|(new, _)| has_file(new)).map(|(new, (start, end))| {
            let NewMapping { dev, inode, .. } = *new;
            FileMapping { tgid, parent, start, end, path: &new.path, dev, inode }
        });
        let opened = self.files.open_all(tgid, parent, of_files);
        process.unanswered |= opened.unanswered;
        let mut files = opened.files.into_iter();
        let mappings: Vec<Mapping> = mappings
            .filter_map(|(new, _)| {
                let kind = if has_file(new) {
                    MappingKind::File(files.next()?)
                } else if new.path == VDSO {
                    MappingKind::Vdso
                } else {
                    MappingKind::Anon
                };
                Some(Mapping { start: new.start, end: new.end, offset: new.offset, kind })
            })
            .collect();
        let is_made = |mapping: &Mapping| match &mapping.kind {
            MappingKind::File(file) => !file.is_elf(),
            MappingKind::Anon => true,
            MappingKind::Vdso => false,
        };
        if !process.makes_code && mappings.iter().any(is_made) {
            process.makes_code = true;
            perf_map_files().note(process.key.process);
        }
        mappings
    }
}

/// The executable lines of `/proc/PID/maps`, and how many lie beyond the bounds.
#[derive(Debug, Default)]
pub(super) struct MapsLines {
    lines: Vec<CodeMapping>,
    cut: u64,
}

/// Reads the executable lines of `/proc/PID/maps`, of this process.
pub(super) fn read_lines(proc: &dyn ProcFs, key: ProcessKey) -> Result<MapsLines, ProcError> {
    let (text, is_cut) = proc::text_or_part(proc, key, "maps")?;
    let mut lines = proc::parse_maps(&text);
    let beyond = lines.len().saturating_sub(MAX_MAPPINGS) as u64;
    lines.truncate(MAX_MAPPINGS);
    proc::check_in(proc, key)?;
    // Of a text that is too long, the agent knows only that at least one line is missing.
    Ok(MapsLines { lines, cut: beyond + u64::from(is_cut) })
}

/// Makes a call about a process on a worker, within the time that the engine can wait.
pub(crate) fn on_worker<T: Send + 'static>(
    key: ProcessKey,
    call: impl FnOnce() -> T + Send + 'static,
) -> Result<T, ProcError> {
    access::node()
        .run(Target::Process(key.tgid), "its files in /proc", ENGINE_DEADLINE, call)
        .map_err(|_| ProcError::Unanswered(key.tgid))
}

/// The path of the kernel's own shared object in a mapping.
const VDSO: &str = "[vdso]";

fn has_file(mapping: &NewMapping) -> bool {
    mapping.inode != 0 && mapping.path != VDSO
}

/// Reports whether any address of a file mapping now belongs to another file, or to another offset of it.
fn is_replaced(old: &Image, new: &Image) -> bool {
    let location = |mapping: &Mapping| match &mapping.kind {
        MappingKind::File(file) => Some((file.id, mapping.start.wrapping_sub(mapping.offset))),
        MappingKind::Vdso | MappingKind::Anon => None,
    };
    old.mappings.iter().filter(|mapping| location(mapping).is_some()).any(|mapping| {
        let first = new.mappings.partition_point(|other| other.end <= mapping.start);
        new.mappings[first..]
            .iter()
            .take_while(|other| other.start < mapping.end)
            .any(|other| location(other) != location(mapping))
    })
}

/// Returns the new reading, and those mappings of the old one that overlap with no new mapping: earlier samples may point into
/// them.
fn merge(old: &Image, new: Image) -> Image {
    let mut mappings = new.mappings;
    let unmapped: Vec<Mapping> = old
        .mappings
        .iter()
        .filter(|mapping| {
            let after = mappings.partition_point(|other| other.start < mapping.end);
            mappings[..after].last().is_none_or(|other| other.end <= mapping.start)
        })
        .cloned()
        .collect();
    mappings.extend(unmapped);
    mappings.sort_unstable_by_key(|mapping| mapping.start);
    Image { mappings }
}
