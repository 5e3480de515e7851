//! The file of an export: a tar archive of segments.
//!
//! The first entry describes the export. The segments follow, each under its path in the store, so the archive unpacked below
//! `objects` is a store too. The last entry has the totals and a checksum over all entries before it, so a cut or changed
//! archive is recognized. Segments have checksums of their own besides.

use std::io::{self, Read, Write};

use bytes::Bytes;
use serde::{Deserialize, Serialize};
use sha2::{Digest as _, Sha256};
use tar::{Archive, Builder, EntryType, Header};
use ulid::Ulid;

use super::{
    describe::describe,
    meta::ObjectMeta,
    object::{ObjectName, segment_hour},
    segment::{self, SegmentPosition},
};

/// Version of the format, which this module reads and writes.
const VERSION: u32 = 1;
/// Name of the first entry.
const BEGIN: &str = "gannet-export.json";
/// Name of the last entry.
const END: &str = "gannet-export-end.json";
/// Largest first or last entry.
const MAX_TEXT_BYTES: u64 = 1 << 20;
/// Largest segment of an archive. An export splits larger ones.
const MAX_SEGMENT_BYTES: u64 = 512 << 20;

/// Why a file cannot be imported. Nothing of it is, unless the file changed meanwhile.
#[derive(Debug, thiserror::Error)]
pub enum ArchiveError {
    /// The file cannot be read.
    #[error("cannot read the file: {0}")]
    Io(#[from] io::Error),
    /// The first entry is not that of an export.
    #[error("it is no file of `gannet-collector export`")]
    Foreign,
    /// A newer program wrote the file.
    #[error("a newer program wrote it, in version {0}; upgrade this program")]
    Newer(u32),
    /// The file ends before its last entry.
    #[error("it is cut; copy it again from its origin, or export again")]
    Cut,
    /// The content does not match the checksum, or is none of an export.
    #[error("it is damaged: {0}; copy it again from its origin, or export again")]
    Damaged(String),
}

/// The first entry.
#[derive(Serialize, Deserialize)]
pub(super) struct Description {
    version: u32,
    /// The program that wrote the file, for people.
    written_by: String,
    query: String,
    /// Start of the range. Without it the range has none.
    from_ms: Option<u64>,
    /// End of the range, exclusive.
    until_ms: Option<u64>,
}

/// The last entry.
#[derive(Default, Serialize, Deserialize, PartialEq, Eq)]
struct End {
    segments: u64,
    batches: u64,
    /// SHA-256 over names, sizes and contents of all entries before, in hex.
    sha256: String,
}

/// Totals and checksum of the entries so far.
#[derive(Default)]
struct Sums {
    segments: u64,
    batches: u64,
    hasher: Sha256,
}

impl Sums {
    fn begin(&mut self, name: &str, bytes: u64) {
        for part in [name.as_bytes(), &[0], &bytes.to_le_bytes()] {
            self.hasher.update(part);
        }
    }

    fn end(self) -> End {
        let sha256 = gannet_base::hex(&self.hasher.finalize());
        End { segments: self.segments, batches: self.batches, sha256 }
    }
}

/// Writes an archive.
pub(super) struct ArchiveWriter<W: Write> {
    tar: Builder<W>,
    sums: Sums,
}

impl<W: Write> ArchiveWriter<W> {
    pub(super) fn new(out: W, query: &str, from_ms: u64, until_ms: u64) -> io::Result<Self> {
        let mut writer = Self { tar: Builder::new(out), sums: Sums::default() };
        let written_by = concat!("gannet-collector ", env!("CARGO_PKG_VERSION")).to_owned();
        let description = Description {
            version: VERSION,
            written_by,
            query: query.to_owned(),
            from_ms: Some(from_ms).filter(|from_ms| *from_ms > 0),
            until_ms: Some(until_ms).filter(|until_ms| *until_ms < u64::MAX),
        };
        writer.add(BEGIN, 0, &[serde_json::to_vec_pretty(&description)?.into()])?;
        Ok(writer)
    }

    /// Adds a segment. `parts` are its bytes in order, with this number of batches.
    pub(super) fn add_segment(&mut self, id: Ulid, parts: &[Bytes], batches: usize) -> io::Result<()> {
        let path = ObjectName::Segment(id).path(segment_hour(id));
        self.sums.segments += 1;
        self.sums.batches += batches as u64;
        self.add(path.as_ref(), id.timestamp_ms() / 1000, parts)
    }

    /// Writes the last entry and returns the output, which the caller makes durable.
    pub(super) fn finish(mut self) -> io::Result<W> {
        let end = std::mem::take(&mut self.sums).end();
        self.add(END, 0, &[serde_json::to_vec_pretty(&end)?.into()])?;
        self.tar.into_inner()
    }

    fn add(&mut self, name: &str, modified: u64, parts: &[Bytes]) -> io::Result<()> {
        let bytes = parts.iter().map(|part| part.len() as u64).sum();
        self.sums.begin(name, bytes);
        for part in parts {
            self.sums.hasher.update(part);
        }
        let mut header = Header::new_gnu();
        header.set_size(bytes);
        header.set_mode(0o644);
        header.set_mtime(modified);
        header.set_entry_type(EntryType::Regular);
        self.tar.append_data(&mut header, name, Parts { left: parts, at: 0 })
    }
}

/// Reads pieces of memory one after the other. A segment has some thousand, too many for a chain of readers.
struct Parts<'a> {
    left: &'a [Bytes],
    /// Bytes of the first part that are read.
    at: usize,
}

impl Read for Parts<'_> {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        while let Some((first, others)) = self.left.split_first() {
            let rest = &first[self.at..];
            let n = rest.len().min(buffer.len());
            if rest.is_empty() {
                (self.left, self.at) = (others, 0);
                continue;
            }
            buffer[..n].copy_from_slice(&rest[..n]);
            self.at += n;
            return Ok(n);
        }
        Ok(0)
    }
}

/// A checked segment of an archive.
pub(super) struct ArchivedSegment {
    pub(super) id: Ulid,
    pub(super) bytes: Bytes,
    pub(super) entries: Vec<(ObjectMeta, SegmentPosition)>,
}

/// Reads an archive from its first byte, and checks each segment.
pub(super) struct ArchiveReader<R: Read> {
    archive: Archive<R>,
}

impl<R: Read> ArchiveReader<R> {
    pub(super) fn new(input: R) -> Self {
        Self { archive: Archive::new(input) }
    }

    /// Calls `each` for every segment. Fails at the first fault, and so at the end of a cut or changed archive at the latest.
    pub(super) async fn read<E: From<ArchiveError>>(
        mut self,
        mut each: impl AsyncFnMut(ArchivedSegment) -> Result<(), E>,
    ) -> Result<(), E> {
        let mut sums = Sums::default();
        // Without the extensions of tar, whose names have no bound.
        let entries = self.archive.entries().map_err(ArchiveError::Io)?.raw(true);
        let mut is_first = true;
        for entry in entries {
            let mut entry =
                entry.map_err(|error| if is_first { ArchiveError::Foreign } else { unreadable(error) })?;
            let name = entry.path_bytes().into_owned();
            let name = String::from_utf8(name).map_err(|_| damaged("an entry has a foreign name"))?;
            let bytes = entry.header().entry_size().map_err(unreadable)?;
            if entry.header().entry_type() != EntryType::Regular {
                return Err(
                    if is_first { ArchiveError::Foreign } else { damaged("an entry is no file") }.into()
                );
            }
            if std::mem::take(&mut is_first) {
                if name != BEGIN {
                    return Err(ArchiveError::Foreign.into());
                }
                let text = content(&mut entry, bytes, MAX_TEXT_BYTES)?;
                check_version(&text)?;
                sums.begin(&name, bytes);
                sums.hasher.update(&text);
                continue;
            }
            if name == END {
                let text = content(&mut entry, bytes, MAX_TEXT_BYTES)?;
                let end: End =
                    serde_json::from_slice(&text).map_err(|_| damaged("its last entry is unreadable"))?;
                if end != sums.end() {
                    return Err(damaged("its content does not match its checksum").into());
                }
                return Ok(());
            }
            let id = match name.rsplit('/').next().and_then(ObjectName::parse) {
                Some(ObjectName::Segment(id))
                    if ObjectName::Segment(id).path(segment_hour(id)).as_ref() == name =>
                {
                    id
                }
                _ => return Err(damaged("an entry has a foreign name").into()),
            };
            let segment = content(&mut entry, bytes, MAX_SEGMENT_BYTES)?;
            sums.begin(&name, bytes);
            sums.hasher.update(&segment);
            let entries = check_segment(id, &segment)?;
            sums.segments += 1;
            sums.batches += entries.len() as u64;
            each(ArchivedSegment { id, bytes: segment, entries }).await?;
        }
        Err(if is_first { ArchiveError::Foreign } else { ArchiveError::Cut }.into())
    }
}

fn damaged(text: &str) -> ArchiveError {
    ArchiveError::Damaged(text.to_owned())
}

/// Returns the error of an entry that the tar reader does not read.
fn unreadable(error: io::Error) -> ArchiveError {
    match error.kind() {
        io::ErrorKind::UnexpectedEof => ArchiveError::Cut,
        io::ErrorKind::Other | io::ErrorKind::InvalidData | io::ErrorKind::InvalidInput => {
            // The message holds bytes of the file.
            ArchiveError::Damaged("a header is unreadable, or the file is cut".to_owned())
        }
        _ => ArchiveError::Io(error),
    }
}

/// Reads an entry, whose size its header claims.
fn content(entry: &mut impl Read, bytes: u64, limit: u64) -> Result<Bytes, ArchiveError> {
    if bytes > limit {
        return Err(damaged("an entry is too large"));
    }
    let mut content = Vec::new();
    entry.take(bytes).read_to_end(&mut content).map_err(unreadable)?;
    if content.len() as u64 != bytes {
        return Err(ArchiveError::Cut);
    }
    Ok(content.into())
}

fn check_version(text: &[u8]) -> Result<(), ArchiveError> {
    /// The part of the description that all versions have.
    #[derive(Deserialize)]
    struct Version {
        version: u32,
    }
    match serde_json::from_slice(text) {
        Ok(Version { version: VERSION }) => Ok(()),
        Ok(Version { version }) if version > VERSION => Err(ArchiveError::Newer(version)),
        _ => Err(damaged("its first entry is unreadable")),
    }
}

/// Checks a segment to its last byte, as a store must have it.
fn check_segment(id: Ulid, bytes: &Bytes) -> Result<Vec<(ObjectMeta, SegmentPosition)>, ArchiveError> {
    let fault = |reason: &str| ArchiveError::Damaged(format!("segment {id}: {reason}"));
    let entries = segment::read_index(id, bytes).map_err(|error| fault(&error.to_string()))?;
    let mut end = segment::index_end(bytes).map_err(|error| fault(&error.to_string()))?;
    for (meta, position) in &entries {
        let (labels, ..) =
            describe(meta, position.bytes, 0).ok_or_else(|| fault("a batch has no id or no time"))?;
        gannet_proto::labels::check(&labels).map_err(|error| fault(&error.to_string()))?;
        end = position.range().end;
        let profile = part(bytes, position).ok_or_else(|| fault("it is cut"))?;
        if crc32fast::hash(&profile) != position.crc {
            return Err(fault("a profile does not match its checksum"));
        }
    }
    if end != bytes.len() as u64 {
        return Err(fault("it has bytes behind its last profile"));
    }
    Ok(entries)
}

/// Returns the profile at a position of a complete segment, or `None` behind its end.
pub(super) fn part(segment: &Bytes, position: &SegmentPosition) -> Option<Bytes> {
    let range = position.range();
    let (start, end) = (usize::try_from(range.start).ok()?, usize::try_from(range.end).ok()?);
    (start <= end && end <= segment.len()).then(|| segment.slice(start..end))
}

/// Returns the id of a segment with these batches, which have the time of another segment. Equal batches get an equal id, so
/// that the same export or import again writes the same segment.
pub(super) fn derived_id(timestamp_ms: u64, batches: impl Iterator<Item = Ulid>) -> Ulid {
    let mut hasher = Sha256::new();
    for id in batches {
        hasher.update(id.0.to_be_bytes());
    }
    let random =
        hasher.finalize().iter().take(10).fold(0_u128, |number, byte| number << 8 | u128::from(*byte));
    Ulid::from_parts(timestamp_ms, random)
}
