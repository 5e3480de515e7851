//! Reading the executable mappings of processes, and noting where they change.

use std::{
    collections::HashSet,
    mem,
    num::NonZeroUsize,
    sync::Arc,
    time::{Duration, Instant},
};

use super::{
    FileMapping, FileTable, FileTableStats, Process,
    proc::{self, ProcError, ProcFs},
};
use crate::model::{Image, ImageKey, Mapping, MappingKind, NewMapping, ProcessKey};

/// The least time between two readings of one process's mappings, however many addresses are unknown.
const RESCAN_INTERVAL: Duration = Duration::from_millis(50);
/// Executable mappings of one process; real ones have some hundreds.
pub(super) const MAX_MAPPINGS: usize = 16_384;

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
}

impl ImageReader {
    /// Builds a reader that holds at most `files` files open.
    pub(super) fn new(files: NonZeroUsize, proc: Arc<dyn ProcFs>) -> Self {
        Self { files: FileTable::new(files), proc, changes: ImageChanges::default(), rescans: 0 }
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
    pub(super) fn read(&mut self, key: ProcessKey, parent: u32) -> Result<Image, ProcError> {
        let text = proc::text(&*self.proc, key, "maps")?;
        let lines = proc::parse_maps(&text);
        let mappings = lines.iter().take(MAX_MAPPINGS).map(|line| self.open(key, parent, line)).collect();
        proc::check_in(&*self.proc, key)?;
        Ok(Image { mappings })
    }

    /// Builds an image from mappings that the kernel reported, oldest first.
    pub(super) fn build(&mut self, key: ProcessKey, parent: u32, mappings: &[NewMapping]) -> Image {
        let mut image = Image::default();
        for mapping in mappings {
            image.map(self.open(key, parent, mapping));
        }
        image
    }

    /// Adds a mapping that the kernel reported for the current image of a process.
    pub(super) fn add(&mut self, process: &mut Process, mapping: &NewMapping) {
        if process.image.mappings.len() >= MAX_MAPPINGS {
            return;
        }
        let mapping = self.open(process.key.process, process.parent, mapping);
        let before = Arc::clone(&process.image);
        Arc::make_mut(&mut process.image).map(mapping);
        self.note_change(process.key, &before, &process.image);
    }

    /// Reads the mappings of a process again if they hold not all of these addresses, unless that was done just now.
    pub(super) fn rescan(&mut self, process: &mut Process, addresses: &[u64]) {
        let rested = process.scanned.is_none_or(|at| at.elapsed() >= RESCAN_INTERVAL);
        let known = |address: &u64| process.image.find(*address).is_some();
        if process.kernel_thread || !process.is_alive() || !rested || addresses.iter().all(known) {
            return;
        }
        process.scanned = Some(Instant::now());
        if let Ok(image) = self.read(process.key.process, process.parent) {
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

    fn open(&mut self, key: ProcessKey, parent: u32, new: &NewMapping) -> Mapping {
        let kind = if new.path == "[vdso]" {
            MappingKind::Vdso
        } else if new.inode == 0 {
            MappingKind::Anon
        } else {
            MappingKind::File(self.files.open(&FileMapping {
                tgid: key.tgid,
                parent,
                start: new.start,
                end: new.end,
                path: &new.path,
                dev: new.dev,
                inode: new.inode,
            }))
        };
        Mapping { start: new.start, end: new.end, offset: new.offset, kind }
    }
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
