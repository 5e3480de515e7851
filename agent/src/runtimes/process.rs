//! The interpreter of a running process, found without the engine.

use std::{
    collections::{HashMap, HashSet},
    fs::File,
    io::{self, BufRead as _, BufReader, Read as _},
    sync::Arc,
};

use gannet_elf::{Elf, Segments};
use gannet_unwind::limits::TableLimits;

use super::{Attachment, ProcessMemory, RuntimeFile, WhyNot, detect};

/// Bytes that are read of the list of mappings, and files that are opened.
const MAX_MAPS_BYTES: u64 = 4 << 20;
const MAX_FILES: usize = 512;

/// Finds the interpreter of a process, and where that keeps its frames or why they cannot be taken. `None` without an interpreter
/// that the agent knows. The calls may wait for the process and for its file systems without end.
pub(crate) fn inspect(tgid: u32) -> io::Result<Option<(RuntimeFile, Result<Attachment, WhyNot>)>> {
    let Some((file, bias)) = find(tgid)? else { return Ok(None) };
    let attached = file.runtime.attach(&file, bias, &ProcessMemory { tgid });
    Ok(Some((file, attached)))
}

/// Returns the interpreter's file, and the address in the process minus the address in that file.
pub(crate) fn find(tgid: u32) -> io::Result<Option<(RuntimeFile, u64)>> {
    let found = RuntimeFinder::default().find(tgid)?;
    Ok(found.map(|(file, bias)| (RuntimeFile::clone(&file), bias)))
}

/// Finds the interpreters of many processes. It reads a file that several of them map once.
#[derive(Debug, Default)]
pub(crate) struct RuntimeFinder {
    /// By device and inode number, as `/proc/PID/maps` shows them.
    files: HashMap<(String, String), Option<Found>>,
}

/// An interpreter's file, and where its parts belong.
type Found = (Arc<RuntimeFile>, Segments);

impl RuntimeFinder {
    /// Returns the interpreter's file of a process, and the address in the process minus the address in that file. The calls
    /// may wait for the process and for its file systems without end.
    pub(crate) fn find(&mut self, tgid: u32) -> io::Result<Option<(Arc<RuntimeFile>, u64)>> {
        let page = rustix::param::page_size() as u64;
        let maps = File::open(format!("/proc/{tgid}/maps"))?.take(MAX_MAPS_BYTES);
        let mut seen = HashSet::new();
        let mut without_frames = None;
        for line in BufReader::new(maps).lines() {
            let line = line?;
            let mut fields = line.split_ascii_whitespace();
            let (Some(range), Some(rights), Some(offset)) = (fields.next(), fields.next(), fields.next())
            else {
                continue;
            };
            let (Some(device), Some(inode)) = (fields.next(), fields.next()) else { continue };
            let Some(path) = fields.next().filter(|path| path.starts_with('/')) else { continue };
            let numbers = (device.to_owned(), inode.to_owned());
            if !rights.contains('x') || !seen.insert(numbers.clone()) {
                continue;
            }
            if seen.len() > MAX_FILES {
                break;
            }
            let hex = |text: &str| u64::from_str_radix(text, 16).ok();
            let Some((start, end)) =
                range.split_once('-').and_then(|(start, end)| Some((hex(start)?, hex(end)?)))
            else {
                continue;
            };
            let Some(offset) = hex(offset) else { continue };
            // This link leads to the mapped file, deleted or in another mount namespace. Its name has no leading zeros.
            let known = if let Some(known) = self.files.get(&numbers) {
                known
            } else {
                let Ok(open) = File::open(format!("/proc/{tgid}/map_files/{start:x}-{end:x}")) else {
                    continue;
                };
                let Ok(elf) = Elf::parse(&open, &TableLimits::default().elf()) else { continue };
                let read = detect(&elf, path).map(|file| (Arc::new(file), elf.segments().clone()));
                &*self.files.entry(numbers).or_insert(read)
            };
            if let Some((file, segments)) = known
                && let Some(bias) = segments.bias(start, offset, page)
            {
                let found = Some((Arc::clone(file), bias));
                if file.runtime.has_frames() {
                    return Ok(found);
                }
                without_frames = without_frames.or(found);
            }
        }
        Ok(without_frames)
    }
}
