//! Batches on disk, from the moment the exporter receives them until the collector has acknowledged them.
//!
//! One file holds the batches of one call of [`Spool::append`]: a window, or a part of a large one. The spool writes it
//! under another name, syncs it, renames it and syncs the directory, so that after a crash a file is complete or absent.
//! Each batch has its own checksum, and the name of the file says how many batches and samples it was written with, so
//! that damage is counted exactly. The spool removes a file when all its batches are settled. After a crash it sends the
//! settled batches of a file with unsettled ones again; the store recognizes them by their ids.
//!
//! The spool stays within its [`Bounds`]: it drops the oldest file first and counts its samples as lost. A file with a
//! batch on the wire stays until the answer comes, so that no sample counts both as lost and as delivered.

mod format;
mod parts;
mod restore;

use std::{
    collections::{BTreeMap, HashMap},
    fs::{self, File},
    io,
    os::unix::fs::{DirBuilderExt as _, FileExt as _},
    path::{Path, PathBuf},
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering::Relaxed},
    },
    time::{Duration, SystemTime},
};

use gannet_proto::{ingest::Batch, ledger::LossReason};
use prost::Message as _;
use ulid::Ulid;

pub(super) use parts::MAX_INFLATED;

use super::write_aside;
use crate::ledger::{NodeLedger, Stage};
use format::{FileName, NewEntry, PendingFile};

/// A larger append becomes several files, so that dropping one file loses little.
const FILE_BYTES: u64 = 4 << 20;

/// Limits of the spool.
#[derive(Clone, Copy, Debug)]
pub struct Bounds {
    /// Size of all files together.
    pub bytes: u64,
    /// Time since a file was written.
    pub age: Duration,
}

/// Reasons why the spool cannot be opened, or cannot store batches.
#[derive(Debug, thiserror::Error)]
pub enum SpoolError {
    /// Another process uses the directory.
    #[error(
        "{}: another gannet-agent{holder} is using this spool; stop it, or give this one a --state-dir of its own",
        dir.display()
    )]
    Locked {
        /// Directory of the spool.
        dir: PathBuf,
        /// ` (pid N)`, or empty.
        holder: String,
    },
    /// The file system refused an operation.
    #[error("cannot {action} {}: {source}; --state-dir must be a directory that this program may write to", path.display())]
    Io {
        /// The operation: `create`, `write`, ...
        action: &'static str,
        /// File or directory.
        path: PathBuf,
        /// The system's error.
        source: io::Error,
    },
    /// There is no space, either below the bound or on the disk.
    #[error(
        "the spool has no room for {samples} samples: {why}; raise --spool-bytes, free disk space, or check why the collector accepts nothing"
    )]
    NoRoom {
        /// Number of lost samples.
        samples: u64,
        /// The bound that was reached, or the error of the disk.
        why: String,
    },
}

/// Counters of the spool for metrics and heartbeats.
#[derive(Debug, Default)]
pub struct SpoolStats {
    pub(crate) bytes: AtomicU64,
    pub(crate) batches: AtomicU64,
    pub(crate) corrupt_files: AtomicU64,
    pub(crate) write_errors: AtomicU64,
    pub(crate) split_batches: AtomicU64,
}

impl SpoolStats {
    /// Returns the size of all files on disk.
    pub fn bytes(&self) -> u64 {
        self.bytes.load(Relaxed)
    }

    /// Returns the number of batches that wait or are on the wire.
    pub fn batches(&self) -> u64 {
        self.batches.load(Relaxed)
    }

    /// Returns the number of damaged files found since the start.
    pub fn corrupt_files(&self) -> u64 {
        self.corrupt_files.load(Relaxed)
    }

    /// Returns the number of batches that were split, because the collector does not take them as a whole.
    pub fn split_batches(&self) -> u64 {
        self.split_batches.load(Relaxed)
    }

    /// Returns the number of writes that failed since the start.
    pub fn write_errors(&self) -> u64 {
        self.write_errors.load(Relaxed)
    }
}

/// The spool of one agent; it locks its directory.
#[derive(Debug)]
pub struct Spool {
    dir: PathBuf,
    /// Synced after each rename.
    dir_handle: File,
    /// The lock holds as long as this file is open.
    _lock: File,
    bounds: Bounds,
    ledger: NodeLedger,
    stats: Arc<SpoolStats>,
    next_sequence: u64,
    /// Files by the sequence of their first batch.
    files: BTreeMap<u64, SpoolFile>,
    /// Batches that are not settled, by sequence.
    batches: BTreeMap<u64, Entry>,
    /// Sequences by batch id.
    ids: HashMap<String, u64>,
    bytes: u64,
}

#[derive(Debug)]
struct SpoolFile {
    path: PathBuf,
    bytes: u64,
    written: SystemTime,
    /// Number of batches that are not settled.
    open: usize,
    on_wire: usize,
}

#[derive(Debug)]
struct Entry {
    /// Key of its file.
    file: u64,
    /// Offset of the encoded batch.
    offset: u64,
    len: u32,
    crc: u32,
    id: String,
    samples: u64,
    on_wire: bool,
}

impl Spool {
    /// Opens the spool in `dir`, creates the directory if it is missing, and loads the files of a former run.
    ///
    /// The samples of those files enter the ledger as inherited; samples in damaged files leave it again at once as
    /// [`LossReason::SpoolCorrupt`].
    pub fn open(
        dir: &Path,
        bounds: Bounds,
        ledger: NodeLedger,
        stats: Arc<SpoolStats>,
    ) -> Result<Self, SpoolError> {
        Self::open_as(std::process::id(), dir, bounds, ledger, stats)
    }

    /// Does the same as [`Self::open`] on behalf of the process `holder`.
    pub(crate) fn open_as(
        holder: u32,
        dir: &Path,
        bounds: Bounds,
        ledger: NodeLedger,
        stats: Arc<SpoolStats>,
    ) -> Result<Self, SpoolError> {
        fs::DirBuilder::new()
            .recursive(true)
            .mode(0o700)
            .create(dir)
            .map_err(|source| io_error("create", dir, source))?;
        let lock = restore::lock(dir, holder)?;
        let dir_handle = File::open(dir).map_err(|source| io_error("open", dir, source))?;
        let mut spool = Self {
            dir: dir.to_owned(),
            dir_handle,
            _lock: lock,
            bounds,
            ledger,
            stats,
            next_sequence: 1,
            files: BTreeMap::new(),
            batches: BTreeMap::new(),
            ids: HashMap::new(),
            bytes: 0,
        };
        spool.load()?;
        Ok(spool)
    }

    pub(super) fn directory(&self) -> &Path {
        &self.dir
    }

    /// Numbers the batches and writes them durably: after `Ok` they survive a crash.
    ///
    /// Expects their samples at [`Stage::Queue`], and moves them to [`Stage::Spool`] or counts them as lost. The error is
    /// for the log; the loss is already counted.
    pub fn append(&mut self, batches: Vec<Batch>) -> Result<(), SpoolError> {
        self.expire(SystemTime::now());
        let received = batches.iter().map(|batch| batch.samples).sum();
        let mut handled = 0;
        let mut result = Ok(());
        let mut file = PendingFile::new(self.next_sequence);
        for mut batch in batches {
            batch.batch_id = Ulid::new().to_string();
            batch.sequence = self.next_sequence;
            self.next_sequence += 1;
            if file.bytes.len() as u64 + batch.encoded_len() as u64 > FILE_BYTES && !file.entries.is_empty() {
                let full = std::mem::replace(&mut file, PendingFile::new(batch.sequence));
                handled += full.samples();
                result = result.and(self.write(full));
            }
            file.push(&batch);
        }
        if !file.entries.is_empty() {
            handled += file.samples();
            result = result.and(self.write(file));
        }
        self.ledger.settle(Stage::Queue, received, handled);
        self.publish();
        result
    }

    /// Drops files that are older than the bound. [`Self::append`] calls it, and the exporter while nothing arrives.
    pub fn expire(&mut self, now: SystemTime) {
        while let Some(oldest) = self.oldest_idle() {
            let age = self.files.get(&oldest).and_then(|file| now.duration_since(file.written).ok());
            if age.is_none_or(|age| age <= self.bounds.age) {
                break;
            }
            self.evict(oldest, LossReason::Expired);
        }
        self.publish();
    }

    /// Returns the oldest batch that is not on the wire, and counts it as on the wire from now on.
    ///
    /// Splits batches before it that are larger than the collector accepts. Drops and counts those that cannot be read or
    /// split.
    pub fn next(&mut self, max_pprof_bytes: u64) -> Option<Batch> {
        let found = loop {
            let (&sequence, entry) = self.batches.iter().find(|(_, entry)| !entry.on_wire)?;
            match self.read(entry) {
                Ok(batch) if batch.pprof.len() as u64 > max_pprof_bytes => {
                    self.split_or_lose(batch, Some(max_pprof_bytes), LossReason::TooLarge);
                }
                Ok(batch) => break batch,
                Err(error) => {
                    tracing::warn!(%error, "cannot read a batch in the spool; its samples are lost");
                    self.stats.corrupt_files.fetch_add(1, Relaxed);
                    self.settle(sequence, Outcome::Lost(LossReason::SpoolCorrupt));
                }
            }
        };
        let entry = self.batches.get_mut(&found.sequence)?;
        entry.on_wire = true;
        if let Some(file) = self.files.get_mut(&entry.file) {
            file.on_wire += 1;
        }
        self.ledger.pass(Stage::Spool, Stage::Wire, entry.samples);
        Some(found)
    }

    /// Settles a batch that the collector has acknowledged, with the number of samples that it has counted; `None` if it does
    /// not say. Returns false if the spool does not know the batch, because it is settled already.
    pub fn accepted(&mut self, batch_id: &str, samples: Option<u64>) -> bool {
        self.settle_id(batch_id, Outcome::Delivered(samples))
    }

    /// Settles a batch that the collector will never accept. Returns false if the spool does not know it.
    pub fn refused(&mut self, batch_id: &str) -> bool {
        self.settle_id(batch_id, Outcome::Lost(LossReason::Refused))
    }

    /// Splits a batch that the collector has refused as too large, although it is within the limit: the inflated profile or
    /// one of its stacks is too large. Halving ends with that stack alone. Returns false if the spool does not know it.
    pub fn refused_as_too_large(&mut self, batch_id: &str) -> bool {
        let Some(sequence) = self.ids.get(batch_id).copied() else { return false };
        match self.batches.get(&sequence).map(|entry| self.read(entry)) {
            Some(Ok(batch)) => self.split_or_lose(batch, None, LossReason::Refused),
            _ => self.settle(sequence, Outcome::Lost(LossReason::Refused)),
        }
        true
    }

    /// Splits a batch. If that is impossible, counts its samples as lost for `reason`.
    fn split_or_lose(&mut self, batch: Batch, max_bytes: Option<u64>, reason: LossReason) {
        let Batch { sequence, samples, .. } = batch;
        let (batch_id, bytes) = (batch.batch_id.clone(), batch.pprof.len());
        match self.split(batch, max_bytes) {
            Ok(parts) => {
                self.stats.split_batches.fetch_add(1, Relaxed);
                tracing::debug!(
                    batch_id,
                    bytes,
                    parts,
                    "split a profile that the collector does not take as a whole"
                );
            }
            Err(why) => {
                tracing::warn!(
                    batch_id,
                    bytes,
                    samples,
                    "the collector takes neither a profile nor its parts; its samples are lost; raise --max-batch-bytes"
                );
                let reason = if why == LossReason::SpoolFull { why } else { reason };
                self.settle(sequence, Outcome::Lost(reason));
            }
        }
    }

    /// Marks a batch as waiting again instead of on the wire.
    pub fn release(&mut self, batch_id: &str) {
        if let Some(sequence) = self.ids.get(batch_id).copied() {
            self.release_sequence(sequence);
        }
    }

    /// Marks all batches on the wire as waiting again, because the connection has ended.
    pub fn release_all(&mut self) {
        let on_wire: Vec<u64> =
            self.batches.iter().filter(|(_, entry)| entry.on_wire).map(|(&sequence, _)| sequence).collect();
        for sequence in on_wire {
            self.release_sequence(sequence);
        }
    }

    /// Returns whether no batch waits or is on the wire.
    pub fn is_empty(&self) -> bool {
        self.batches.is_empty()
    }

    /// Returns the number of batches that wait or are on the wire.
    pub fn len(&self) -> usize {
        self.batches.len()
    }

    fn release_sequence(&mut self, sequence: u64) {
        let Some(entry) = self.batches.get_mut(&sequence) else { return };
        if !std::mem::take(&mut entry.on_wire) {
            return;
        }
        if let Some(file) = self.files.get_mut(&entry.file) {
            file.on_wire -= 1;
        }
        self.ledger.pass(Stage::Wire, Stage::Spool, entry.samples);
    }

    fn settle_id(&mut self, batch_id: &str, outcome: Outcome) -> bool {
        let Some(sequence) = self.ids.get(batch_id).copied() else { return false };
        self.settle(sequence, outcome);
        true
    }

    /// Removes one batch from the ledger and the spool.
    fn settle(&mut self, sequence: u64, outcome: Outcome) {
        let Some(entry) = self.remove(sequence) else { return };
        let stage = if entry.on_wire { Stage::Wire } else { Stage::Spool };
        match outcome {
            Outcome::Delivered(counted) => {
                let counted = counted.unwrap_or(entry.samples);
                if counted != entry.samples {
                    tracing::error!(
                        batch_id = entry.id,
                        sent = entry.samples,
                        stored = counted,
                        "the collector has stored another number of samples than it was sent"
                    );
                }
                self.ledger.deliver_counted(stage, entry.samples, counted);
            }
            Outcome::Lost(reason) => self.ledger.lose(stage, reason, entry.samples),
        }
        self.publish();
    }

    /// Removes one batch from the spool, and its file if it was the last one there.
    fn remove(&mut self, sequence: u64) -> Option<Entry> {
        let entry = self.batches.remove(&sequence)?;
        self.ids.remove(&entry.id);
        if let Some(file) = self.files.get_mut(&entry.file) {
            file.open -= 1;
            file.on_wire -= usize::from(entry.on_wire);
            if file.open == 0 {
                self.remove_file(entry.file);
            }
        }
        Some(entry)
    }

    /// Returns the oldest file without a batch on the wire.
    fn oldest_idle(&self) -> Option<u64> {
        self.files.iter().find(|(_, file)| file.on_wire == 0).map(|(&first, _)| first)
    }

    fn evict(&mut self, first: u64, reason: LossReason) {
        let sequences: Vec<u64> = self
            .batches
            .range(first..)
            .take_while(|(_, entry)| entry.file == first)
            .map(|(&s, _)| s)
            .collect();
        // Settling the last batch removes the file.
        for sequence in sequences {
            self.settle(sequence, Outcome::Lost(reason));
        }
    }

    fn remove_file(&mut self, first: u64) {
        if self.files.last_key_value().is_some_and(|(&last, _)| last == first) {
            // The highest number must outlive the file whose name holds it.
            self.save_sequence();
        }
        if let Some(file) = self.files.remove(&first) {
            self.bytes -= file.bytes;
            if let Err(error) = fs::remove_file(&file.path) {
                // After a restart the spool sends it again, and the store recognizes its batches.
                tracing::warn!(path = %file.path.display(), %error, "cannot remove a spool file");
            }
        }
    }

    fn sequence_path(&self) -> PathBuf {
        self.dir.join("sequence")
    }

    /// Saves the next number. A failure only means that numbers may repeat after a restart; ids identify batches.
    fn save_sequence(&self) {
        let path = self.sequence_path();
        if let Err(error) = write_aside(&path, self.next_sequence.to_string().as_bytes())
            .and_then(|()| self.dir_handle.sync_all())
        {
            tracing::debug!(path = %path.display(), %error, "cannot save the spool's sequence");
        }
    }

    /// Writes a file whose samples are at [`Stage::Queue`]. They move to [`Stage::Spool`] or are lost.
    fn write(&mut self, file: PendingFile) -> Result<(), SpoolError> {
        let samples = file.entries.iter().map(|entry| entry.samples).sum();
        self.store(file).map_err(|why| {
            self.ledger.lose(Stage::Queue, LossReason::SpoolFull, samples);
            SpoolError::NoRoom { samples, why }
        })?;
        self.ledger.pass(Stage::Queue, Stage::Spool, samples);
        Ok(())
    }

    /// Writes a file durably, or returns why there is no room for it.
    fn store(&mut self, file: PendingFile) -> Result<(), String> {
        let PendingFile { first, bytes, entries } = file;
        let size = bytes.len() as u64;
        let samples = entries.iter().map(|entry| entry.samples).sum::<u64>();
        let mut why = format!("--spool-bytes is {}", self.bounds.bytes);
        let mut room = true;
        while room && self.bytes + size > self.bounds.bytes {
            room = size <= self.bounds.bytes && self.evict_for_room();
        }
        let name = FileName { first, batches: entries.len() as u64, samples };
        let path = name.path(&self.dir);
        while room {
            match write_aside(&path, &bytes).and_then(|()| self.dir_handle.sync_all()) {
                Ok(()) => {
                    self.insert(path, first, size, SystemTime::now(), entries);
                    return Ok(());
                }
                Err(error) => {
                    self.stats.write_errors.fetch_add(1, Relaxed);
                    why = format!("cannot write {}: {error}", path.display());
                    // A full disk is a bound too: the oldest file makes room for the new one.
                    room = matches!(
                        error.kind(),
                        io::ErrorKind::StorageFull
                            | io::ErrorKind::QuotaExceeded
                            | io::ErrorKind::FileTooLarge
                    ) && self.evict_for_room();
                }
            }
        }
        Err(why)
    }

    fn evict_for_room(&mut self) -> bool {
        let oldest = self.oldest_idle();
        if let Some(oldest) = oldest {
            self.evict(oldest, LossReason::SpoolFull);
        }
        oldest.is_some()
    }

    fn insert(&mut self, path: PathBuf, first: u64, bytes: u64, written: SystemTime, entries: Vec<NewEntry>) {
        let open = entries.len();
        for NewEntry { sequence, offset, len, crc, id, samples } in entries {
            self.ids.insert(id.clone(), sequence);
            self.batches
                .insert(sequence, Entry { file: first, offset, len, crc, id, samples, on_wire: false });
        }
        self.files.insert(first, SpoolFile { path, bytes, written, open, on_wire: 0 });
        self.bytes += bytes;
    }

    fn read(&self, entry: &Entry) -> Result<Batch, SpoolError> {
        let Some(file) = self.files.get(&entry.file) else {
            return Err(io_error("find", &self.dir, io::ErrorKind::NotFound.into()));
        };
        let read = || {
            let mut bytes = vec![0; entry.len as usize];
            File::open(&file.path)?.read_exact_at(&mut bytes, entry.offset)?;
            format::decode(&bytes, entry.crc)
        };
        read().map_err(|source| io_error("read", &file.path, source))
    }

    fn publish(&self) {
        self.stats.bytes.store(self.bytes, Relaxed);
        self.stats.batches.store(self.batches.len() as u64, Relaxed);
    }
}

#[derive(Clone, Copy)]
enum Outcome {
    /// With the collector's count.
    Delivered(Option<u64>),
    Lost(LossReason),
}

fn io_error(action: &'static str, path: &Path, source: io::Error) -> SpoolError {
    SpoolError::Io { action, path: path.to_owned(), source }
}
