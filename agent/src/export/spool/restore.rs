//! Opens a spool: locks the directory and loads the files of a former run.

use std::{
    fs::{self, File, OpenOptions},
    io::{Read as _, Write as _},
    os::unix::fs::OpenOptionsExt as _,
    path::{Path, PathBuf},
    sync::atomic::Ordering::Relaxed,
    thread,
    time::{Instant, SystemTime},
};

use gannet_proto::ledger::LossReason;

use super::{
    super::ASIDE,
    Spool, SpoolError,
    format::{Contents, EXTENSION, FileName, NewEntry, PendingFile, read_file},
    io_error,
};
use crate::{
    access::{WORKERS_OUTLIVE, WORKERS_PAUSE},
    ledger::Stage,
};

/// Damaged files that stay on disk for inspection.
const MAX_CORRUPT_FILES: usize = 8;

impl Spool {
    pub(super) fn load(&mut self) -> Result<(), SpoolError> {
        if let Ok(saved) = fs::read_to_string(self.sequence_path()) {
            if let Ok(next) = saved.trim().parse() {
                self.next_sequence = next;
            } else {
                tracing::warn!(
                    path = %self.sequence_path().display(),
                    "cannot read the spool's sequence file; sequence numbers may repeat"
                );
            }
        }
        let listing = fs::read_dir(&self.dir).map_err(|source| io_error("list", &self.dir, source))?;
        let mut found = Vec::new();
        for entry in listing {
            let path = entry.map_err(|source| io_error("list", &self.dir, source))?.path();
            match path.extension().and_then(|extension| extension.to_str()) {
                // Its write did not finish, so no caller relies on it.
                Some(ASIDE) => drop(fs::remove_file(&path)),
                Some(EXTENSION) => match FileName::parse(&path) {
                    Some(name) => found.push((name, path)),
                    None => self.set_aside(&path, "its name is not that of a spool file", 0),
                },
                _ => {}
            }
        }
        found.sort_by_key(|(name, _)| name.first);
        for (name, path) in found {
            self.next_sequence = self.next_sequence.max(name.first.saturating_add(name.batches));
            self.load_file(name, &path);
        }
        self.forget_split();
        self.expire(SystemTime::now());
        while self.bytes > self.bounds.bytes && self.evict_for_room() {}
        self.publish();
        if !self.batches.is_empty() {
            tracing::info!(
                batches = self.batches.len(),
                bytes = self.bytes,
                "the spool holds profiles of a former run"
            );
        }
        Ok(())
    }

    fn load_file(&mut self, name: FileName, path: &Path) {
        let (contents, written) = match read_file(path) {
            Ok(read) => read,
            Err(error) => {
                self.ledger.inherit(name.samples);
                self.ledger.lose(Stage::Spool, LossReason::SpoolCorrupt, name.samples);
                self.set_aside(path, &error.to_string(), name.samples);
                return;
            }
        };
        let Contents { mut good, damaged } = contents;
        // If a crash cut a repair short, the damaged file and the repaired one both exist.
        good.retain(|record| {
            !self.ids.contains_key(&record.batch.batch_id)
                && !self.batches.contains_key(&record.batch.sequence)
        });
        let samples = good.iter().map(|record| record.batch.samples).sum::<u64>();
        if !damaged && good.len() as u64 == name.batches && samples == name.samples {
            self.ledger.inherit(samples);
            let size = fs::metadata(path).map_or(0, |metadata| metadata.len());
            let entries = good.into_iter().map(NewEntry::of).collect();
            self.insert(path.to_owned(), name.first, size, written, entries);
            return;
        }
        let lost = name.samples.saturating_sub(samples);
        self.ledger.inherit(samples + lost);
        self.ledger.lose(Stage::Spool, LossReason::SpoolCorrupt, lost);
        self.set_aside(path, "it is damaged or cut short", lost);
        // The readable batches move to a new file.
        if let Some(first) = good.first() {
            let mut rest = PendingFile::new(first.batch.sequence);
            for record in &good {
                rest.push(&record.batch);
            }
            self.ledger.pass(Stage::Spool, Stage::Queue, samples);
            if let Err(error) = self.write(rest) {
                tracing::warn!(%error, "cannot save the readable part of a damaged spool file");
            }
        }
    }

    /// Moves a file into the directory `corrupt` for inspection, where only the newest few stay.
    fn set_aside(&self, path: &Path, why: &str, samples_lost: u64) {
        self.stats.corrupt_files.fetch_add(1, Relaxed);
        let dir = self.dir.join("corrupt");
        tracing::warn!(
            path = %path.display(), why, samples_lost, moved_to = %dir.display(),
            "cannot use a spool file"
        );
        let moved = fs::create_dir_all(&dir)
            .and_then(|()| fs::rename(path, dir.join(path.file_name().unwrap_or_default())));
        if moved.is_err() {
            // If it stayed, each start would count it again.
            drop(fs::remove_file(path));
        }
        let mut kept: Vec<PathBuf> =
            fs::read_dir(&dir).into_iter().flatten().flatten().map(|entry| entry.path()).collect();
        kept.sort();
        for old in kept.iter().rev().skip(MAX_CORRUPT_FILES) {
            drop(fs::remove_file(old));
        }
    }
}

/// Locks the directory for the process `holder`. Waits for a lock that an agent before this one may still have. The lock holds
/// as long as the returned file is open.
pub(super) fn lock(dir: &Path, holder: u32) -> Result<File, SpoolError> {
    let path = dir.join("lock");
    let mut file = OpenOptions::new()
        .read(true)
        .write(true)
        .create(true)
        .truncate(false)
        .mode(0o600)
        .open(&path)
        .map_err(|source| io_error("open", &path, source))?;
    let until = Instant::now() + WORKERS_OUTLIVE;
    let attempt = || rustix::fs::flock(&file, rustix::fs::FlockOperation::NonBlockingLockExclusive);
    let mut locked = attempt();
    while locked == Err(rustix::io::Errno::WOULDBLOCK) && Instant::now() < until {
        thread::sleep(WORKERS_PAUSE);
        locked = attempt();
    }
    match locked {
        Ok(()) => {
            // Another agent that finds the lock taken shows this number.
            drop(file.set_len(0).and_then(|()| file.write_all(holder.to_string().as_bytes())));
            Ok(file)
        }
        Err(rustix::io::Errno::WOULDBLOCK) => {
            let mut pid = String::new();
            let holder = match file.read_to_string(&mut pid) {
                Ok(1..) => format!(" (pid {pid})"),
                _ => String::new(),
            };
            Err(SpoolError::Locked { dir: dir.to_owned(), holder })
        }
        Err(errno) => Err(io_error("lock", &path, errno.into())),
    }
}
