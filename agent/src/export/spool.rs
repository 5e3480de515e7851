//! Batches on disk, from the moment the exporter has them until the collector does.
//!
//! One file holds the batches of one call of [`Spool::append`] (a window, or a part of a large one): it is written
//! aside, synced, renamed, and the directory synced, so that after a crash a file is there whole or not at all. Each
//! batch in it has its own checksum, and the file's name says how many batches and samples it was written with, so
//! that damage is counted exactly. A file goes when all its batches are settled; after a crash the settled batches of
//! a file that others still wait in are sent once more, and the store knows them by their id.
//!
//! No more than [`Bounds`] allows is kept: the oldest file goes first, and its samples are counted as lost. Files with
//! a batch on the wire stay until it is answered, so that nothing is counted both as lost and as delivered.

use std::{
    collections::{BTreeMap, HashMap},
    fs::{self, File, OpenOptions},
    io::{self, Read as _, Write as _},
    os::unix::fs::{DirBuilderExt as _, FileExt as _, OpenOptionsExt as _},
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

use super::{ASIDE, write_aside};
use crate::ledger::{NodeLedger, Stage};

/// The first bytes of a spool file; the digit is the version of the format.
const MAGIC: &[u8; 8] = b"GANNETS1";
/// Before each batch: its length and its CRC-32, both little-endian.
const RECORD_HEADER_BYTES: usize = 8;
/// A larger append is cut into several files, so that the bound drops little at a time.
const FILE_BYTES: u64 = 4 << 20;
/// Damaged files that are kept for people to look at.
const CORRUPT_KEPT: usize = 8;
const EXTENSION: &str = "spool";

/// What the spool may keep.
#[derive(Clone, Copy, Debug)]
pub struct Bounds {
    /// Of all files together.
    pub bytes: u64,
    /// Since a file was written.
    pub age: Duration,
}

/// Why the spool cannot be used, or could not keep what it was given.
#[derive(Debug, thiserror::Error)]
pub enum SpoolError {
    /// Another process has it open.
    #[error(
        "{}: another gannet-agent{holder} is using this spool; stop it, or give this one a --state-dir of its own",
        dir.display()
    )]
    Locked {
        /// The spool's directory.
        dir: PathBuf,
        /// ` (pid N)`, or empty.
        holder: String,
    },
    /// The file system refused.
    #[error("cannot {action} {}: {source}; --state-dir must be a directory that this program may write to", path.display())]
    Io {
        /// What was tried: `create`, `write`, ...
        action: &'static str,
        /// On what.
        path: PathBuf,
        /// Why not.
        source: io::Error,
    },
    /// Not enough space, neither below the bound nor on the disk.
    #[error(
        "the spool has no room for {samples} samples: {why}; raise --spool-bytes, free the disk, or see why the collector takes nothing"
    )]
    NoRoom {
        /// That are lost.
        samples: u64,
        /// The bound that was reached, or what the disk said.
        why: String,
    },
}

/// What metrics and heartbeats show of the spool.
#[derive(Debug, Default)]
pub struct SpoolStats {
    bytes: AtomicU64,
    batches: AtomicU64,
    corrupt_files: AtomicU64,
    write_errors: AtomicU64,
}

impl SpoolStats {
    /// On disk now.
    pub fn bytes(&self) -> u64 {
        self.bytes.load(Relaxed)
    }
    /// Waiting or on the wire now.
    pub fn batches(&self) -> u64 {
        self.batches.load(Relaxed)
    }
    /// Damaged files found since the start.
    pub fn corrupt_files(&self) -> u64 {
        self.corrupt_files.load(Relaxed)
    }
    /// Writes that the file system refused since the start.
    pub fn write_errors(&self) -> u64 {
        self.write_errors.load(Relaxed)
    }
}

/// The spool. One owner; see the module's head.
#[derive(Debug)]
pub struct Spool {
    dir: PathBuf,
    /// Open, to be synced after each rename.
    dir_handle: File,
    /// Locked as long as it is open.
    _lock: File,
    bounds: Bounds,
    ledger: NodeLedger,
    stats: Arc<SpoolStats>,
    next_sequence: u64,
    /// By the sequence of their first batch.
    files: BTreeMap<u64, SpoolFile>,
    /// What is not settled, by sequence.
    batches: BTreeMap<u64, Entry>,
    /// From batch id to sequence.
    ids: HashMap<String, u64>,
    bytes: u64,
}

#[derive(Debug)]
struct SpoolFile {
    path: PathBuf,
    bytes: u64,
    written: SystemTime,
    /// Batches that are not settled.
    open: usize,
    on_wire: usize,
}

#[derive(Debug)]
struct Entry {
    /// Key of its file.
    file: u64,
    /// Of the encoded batch.
    offset: u64,
    len: u32,
    crc: u32,
    id: String,
    samples: u64,
    on_wire: bool,
}

/// What a file's name says of it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct FileName {
    first: u64,
    batches: u64,
    samples: u64,
}

impl FileName {
    fn parse(path: &Path) -> Option<Self> {
        let mut parts = path.file_stem()?.to_str()?.split('-').map(str::parse);
        let (first, batches, samples) = (parts.next()?.ok()?, parts.next()?.ok()?, parts.next()?.ok()?);
        parts.next().is_none().then_some(Self { first, batches, samples })
    }

    fn path(self, dir: &Path) -> PathBuf {
        // Zeros in front, so that a listing shows the order.
        dir.join(format!("{:020}-{}-{}.{EXTENSION}", self.first, self.batches, self.samples))
    }
}

/// What one file held.
struct Contents {
    /// With offset, length and checksum.
    good: Vec<(Batch, u64, u32, u32)>,
    /// Something did not read as it was written.
    damaged: bool,
}

impl Spool {
    /// Opens the spool in `dir`, which is created if need be, and takes in what a former run left there.
    ///
    /// The samples found enter the ledger as inherited; those in damaged files at once leave it again as
    /// [`LossReason::SpoolCorrupt`].
    pub fn open(
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
        let lock = lock(dir)?;
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

    /// Numbers the batches and makes them durable: what this returned `Ok` for survives a crash.
    ///
    /// Expects their samples at [`Stage::Queue`], and moves them to [`Stage::Spool`] or to the lost ones. The error is
    /// for the log; what was lost is counted already.
    pub fn append(&mut self, batches: Vec<Batch>) -> Result<(), SpoolError> {
        self.expire(SystemTime::now());
        let mut result = Ok(());
        let mut file = PendingFile::new(self.next_sequence);
        for mut batch in batches {
            batch.batch_id = Ulid::new().to_string();
            batch.sequence = self.next_sequence;
            self.next_sequence += 1;
            if file.bytes.len() as u64 + batch.encoded_len() as u64 > FILE_BYTES && !file.entries.is_empty() {
                result =
                    result.and(self.write(std::mem::replace(&mut file, PendingFile::new(batch.sequence))));
            }
            file.push(&batch);
        }
        if !file.entries.is_empty() {
            result = result.and(self.write(file));
        }
        self.publish();
        result
    }

    /// Loses what is older than the bound. Called by [`Self::append`]; the exporter calls it too when nothing comes.
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

    /// The oldest batch that is not on the wire; it is now.
    ///
    /// What cannot be read any more, or is larger than the receiver takes, is lost and counted on the way.
    pub fn next(&mut self, max_pprof_bytes: u64) -> Option<Batch> {
        let found = loop {
            let (&sequence, entry) = self.batches.iter().find(|(_, entry)| !entry.on_wire)?;
            match self.read(entry) {
                Ok(batch) if batch.pprof.len() as u64 > max_pprof_bytes => {
                    tracing::warn!(
                        batch_id = batch.batch_id,
                        bytes = batch.pprof.len(),
                        max_pprof_bytes,
                        samples = batch.samples,
                        "a profile is larger than the collector takes; its samples are lost"
                    );
                    self.settle(sequence, Outcome::Lost(LossReason::TooLarge));
                }
                Ok(batch) => break batch,
                Err(error) => {
                    tracing::warn!(%error, "a batch in the spool cannot be read; its samples are lost");
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

    /// The collector has it. False if the spool does not know it (it was settled already).
    pub fn accepted(&mut self, batch_id: &str) -> bool {
        self.settle_id(batch_id, Outcome::Delivered)
    }

    /// The collector will never take it. False as above.
    pub fn refused(&mut self, batch_id: &str) -> bool {
        self.settle_id(batch_id, Outcome::Lost(LossReason::Refused))
    }

    /// It is no longer on the wire, and waits again.
    pub fn release(&mut self, batch_id: &str) {
        if let Some(sequence) = self.ids.get(batch_id).copied() {
            self.release_sequence(sequence);
        }
    }

    /// The connection is gone: whatever was on the wire waits again.
    pub fn release_all(&mut self) {
        let on_wire: Vec<u64> =
            self.batches.iter().filter(|(_, entry)| entry.on_wire).map(|(&sequence, _)| sequence).collect();
        for sequence in on_wire {
            self.release_sequence(sequence);
        }
    }

    /// Nothing waits and nothing is on the wire.
    pub fn is_empty(&self) -> bool {
        self.batches.is_empty()
    }

    /// Batches that wait or are on the wire.
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

    /// Takes one batch out of the account and the spool, and its file if it was the last in it.
    fn settle(&mut self, sequence: u64, outcome: Outcome) {
        let Some(entry) = self.batches.remove(&sequence) else { return };
        self.ids.remove(&entry.id);
        let stage = if entry.on_wire { Stage::Wire } else { Stage::Spool };
        match outcome {
            Outcome::Delivered => self.ledger.deliver(stage, entry.samples),
            Outcome::Lost(reason) => self.ledger.lose(stage, reason, entry.samples),
        }
        if let Some(file) = self.files.get_mut(&entry.file) {
            file.open -= 1;
            file.on_wire -= usize::from(entry.on_wire);
            if file.open == 0 {
                self.remove_file(entry.file);
            }
        }
        self.publish();
    }

    /// The oldest file of which nothing is on the wire.
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
        // The last of them takes the file with it.
        for sequence in sequences {
            self.settle(sequence, Outcome::Lost(reason));
        }
    }

    fn remove_file(&mut self, first: u64) {
        if self.files.last_key_value().is_some_and(|(&last, _)| last == first) {
            // The highest number must outlive the file that shows it.
            self.keep_sequence();
        }
        if let Some(file) = self.files.remove(&first) {
            self.bytes -= file.bytes;
            if let Err(error) = fs::remove_file(&file.path) {
                // It will be sent again after a restart, and the store will know its batches.
                tracing::warn!(path = %file.path.display(), %error, "cannot remove a file of the spool");
            }
        }
    }

    fn sequence_path(&self) -> PathBuf {
        self.dir.join("sequence")
    }

    /// A failure only means that numbers could repeat after a restart; batches are known by their ids.
    fn keep_sequence(&self) {
        let path = self.sequence_path();
        if let Err(error) = write_aside(&path, self.next_sequence.to_string().as_bytes())
            .and_then(|()| self.dir_handle.sync_all())
        {
            tracing::debug!(path = %path.display(), %error, "cannot keep the spool's sequence");
        }
    }

    fn write(&mut self, file: PendingFile) -> Result<(), SpoolError> {
        let PendingFile { first, bytes, entries } = file;
        let size = bytes.len() as u64;
        let samples = entries.iter().map(|entry| entry.samples).sum();
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
                    self.ledger.pass(Stage::Queue, Stage::Spool, samples);
                    self.insert(path, first, size, SystemTime::now(), entries);
                    return Ok(());
                }
                Err(error) => {
                    self.stats.write_errors.fetch_add(1, Relaxed);
                    why = format!("cannot write {}: {error}", path.display());
                    // A full disk is a bound like the other: what is oldest makes room for what is new.
                    room = matches!(
                        error.kind(),
                        io::ErrorKind::StorageFull
                            | io::ErrorKind::QuotaExceeded
                            | io::ErrorKind::FileTooLarge
                    ) && self.evict_for_room();
                }
            }
        }
        self.ledger.lose(Stage::Queue, LossReason::SpoolFull, samples);
        Err(SpoolError::NoRoom { samples, why })
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
            if crc32fast::hash(&bytes) != entry.crc {
                return Err(io::Error::new(io::ErrorKind::InvalidData, "the checksum does not match"));
            }
            Batch::decode(bytes.as_slice()).map_err(|error| io::Error::new(io::ErrorKind::InvalidData, error))
        };
        read().map_err(|source| io_error("read", &file.path, source))
    }

    fn publish(&self) {
        self.stats.bytes.store(self.bytes, Relaxed);
        self.stats.batches.store(self.batches.len() as u64, Relaxed);
    }

    // --- what a former run left ---

    fn load(&mut self) -> Result<(), SpoolError> {
        if let Ok(kept) = fs::read_to_string(self.sequence_path()) {
            if let Ok(next) = kept.trim().parse() {
                self.next_sequence = next;
            } else {
                tracing::warn!(
                    path = %self.sequence_path().display(),
                    "the spool's sequence is unreadable; numbers may repeat"
                );
            }
        }
        let listing = fs::read_dir(&self.dir).map_err(|source| io_error("list", &self.dir, source))?;
        let mut found = Vec::new();
        for entry in listing {
            let path = entry.map_err(|source| io_error("list", &self.dir, source))?.path();
            match path.extension().and_then(|extension| extension.to_str()) {
                // Never became a file of the spool; its writer had no answer yet.
                Some(ASIDE) => drop(fs::remove_file(&path)),
                Some(EXTENSION) => match FileName::parse(&path) {
                    Some(name) => found.push((name, path)),
                    None => self.set_aside(&path, "its name is none of ours", 0),
                },
                _ => {}
            }
        }
        found.sort_by_key(|(name, _)| name.first);
        for (name, path) in found {
            self.next_sequence = self.next_sequence.max(name.first.saturating_add(name.batches));
            self.load_file(name, &path);
        }
        self.expire(SystemTime::now());
        while self.bytes > self.bounds.bytes && self.evict_for_room() {}
        self.publish();
        if !self.batches.is_empty() {
            tracing::info!(
                batches = self.batches.len(),
                bytes = self.bytes,
                "the spool still holds profiles of a former run"
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
        // After a repair was cut short by a crash, the damaged file and the repaired one are both there.
        good.retain(|(batch, ..)| {
            !self.ids.contains_key(&batch.batch_id) && !self.batches.contains_key(&batch.sequence)
        });
        let samples = good.iter().map(|(batch, ..)| batch.samples).sum::<u64>();
        if !damaged && good.len() as u64 == name.batches && samples == name.samples {
            self.ledger.inherit(samples);
            let size = fs::metadata(path).map_or(0, |metadata| metadata.len());
            let entries = good
                .into_iter()
                .map(|(batch, offset, len, crc)| NewEntry {
                    sequence: batch.sequence,
                    offset,
                    len,
                    crc,
                    id: batch.batch_id,
                    samples: batch.samples,
                })
                .collect();
            self.insert(path.to_owned(), name.first, size, written, entries);
            return;
        }
        let lost = name.samples.saturating_sub(samples);
        self.ledger.inherit(samples + lost);
        self.ledger.lose(Stage::Spool, LossReason::SpoolCorrupt, lost);
        self.set_aside(path, "it is damaged or cut short", lost);
        // What is readable goes on in a file of its own.
        if let Some((first, ..)) = good.first() {
            let mut rest = PendingFile::new(first.sequence);
            for (batch, ..) in &good {
                rest.push(batch);
            }
            self.ledger.pass(Stage::Spool, Stage::Queue, samples);
            if let Err(error) = self.write(rest) {
                tracing::warn!(%error, "what was readable of a damaged file cannot be kept");
            }
        }
    }

    /// Out of the way, for people to look at; the few newest are kept.
    fn set_aside(&self, path: &Path, why: &str, samples_lost: u64) {
        self.stats.corrupt_files.fetch_add(1, Relaxed);
        let dir = self.dir.join("corrupt");
        tracing::warn!(
            path = %path.display(), why, samples_lost, moved_to = %dir.display(),
            "a file of the spool cannot be used"
        );
        let moved = fs::create_dir_all(&dir)
            .and_then(|()| fs::rename(path, dir.join(path.file_name().unwrap_or_default())));
        if moved.is_err() {
            // In the way it would be counted again at each start.
            drop(fs::remove_file(path));
        }
        let mut kept: Vec<PathBuf> =
            fs::read_dir(&dir).into_iter().flatten().flatten().map(|entry| entry.path()).collect();
        kept.sort();
        for old in kept.iter().rev().skip(CORRUPT_KEPT) {
            drop(fs::remove_file(old));
        }
    }
}

#[derive(Clone, Copy)]
enum Outcome {
    Delivered,
    Lost(LossReason),
}

/// A file in the making.
struct PendingFile {
    first: u64,
    bytes: Vec<u8>,
    entries: Vec<NewEntry>,
}

struct NewEntry {
    sequence: u64,
    offset: u64,
    len: u32,
    crc: u32,
    id: String,
    samples: u64,
}

impl PendingFile {
    fn new(first: u64) -> Self {
        Self { first, bytes: MAGIC.to_vec(), entries: Vec::new() }
    }

    fn push(&mut self, batch: &Batch) {
        let encoded = batch.encode_to_vec();
        let crc = crc32fast::hash(&encoded);
        let len = encoded.len() as u32;
        self.bytes.extend_from_slice(&len.to_le_bytes());
        self.bytes.extend_from_slice(&crc.to_le_bytes());
        let offset = self.bytes.len() as u64;
        self.bytes.extend_from_slice(&encoded);
        self.entries.push(NewEntry {
            sequence: batch.sequence,
            offset,
            len,
            crc,
            id: batch.batch_id.clone(),
            samples: batch.samples,
        });
    }
}

fn io_error(action: &'static str, path: &Path, source: io::Error) -> SpoolError {
    SpoolError::Io { action, path: path.to_owned(), source }
}

fn lock(dir: &Path) -> Result<File, SpoolError> {
    let path = dir.join("lock");
    let mut file = OpenOptions::new()
        .read(true)
        .write(true)
        .create(true)
        .truncate(false)
        .mode(0o600)
        .open(&path)
        .map_err(|source| io_error("open", &path, source))?;
    match rustix::fs::flock(&file, rustix::fs::FlockOperation::NonBlockingLockExclusive) {
        Ok(()) => {
            // Only to tell the next one who has it.
            drop(file.set_len(0).and_then(|()| file.write_all(std::process::id().to_string().as_bytes())));
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

fn read_file(path: &Path) -> io::Result<(Contents, SystemTime)> {
    let written = fs::metadata(path)?.modified()?;
    Ok((parse(&fs::read(path)?), written))
}

/// Everything in a file that reads as it was written.
fn parse(bytes: &[u8]) -> Contents {
    let mut good = Vec::new();
    let Some(mut rest) = bytes.strip_prefix(MAGIC) else { return Contents { good, damaged: true } };
    let mut damaged = false;
    while let Some((header, body)) = rest.split_first_chunk::<RECORD_HEADER_BYTES>() {
        let header = u64::from_le_bytes(*header);
        let (len, crc) = (header as u32, (header >> 32) as u32);
        let Some((encoded, after)) = body.split_at_checked(len as usize) else { break };
        let offset = (bytes.len() - body.len()) as u64;
        match Batch::decode(encoded) {
            Ok(batch) if crc32fast::hash(encoded) == crc && !batch.batch_id.is_empty() => {
                good.push((batch, offset, len, crc));
            }
            _ => damaged = true,
        }
        rest = after;
    }
    Contents { good, damaged: damaged || !rest.is_empty() }
}
