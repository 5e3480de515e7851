//! The format of a spool file: records with a checksum each, and a name that says what the file held when it was written.

use std::{
    fs, io,
    path::{Path, PathBuf},
    time::SystemTime,
};

use gannet_proto::ingest::Batch;
use prost::Message as _;

/// First bytes of a spool file; the digit is the version of the format.
const MAGIC: &[u8; 8] = b"GANNETS1";
/// Before each batch stand its length and its CRC-32, both little-endian.
const RECORD_HEADER_BYTES: usize = 8;
pub(super) const EXTENSION: &str = "spool";

/// Name of a file: the sequence of its first batch, and the numbers of batches and samples in it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct FileName {
    pub(super) first: u64,
    pub(super) batches: u64,
    pub(super) samples: u64,
}

impl FileName {
    pub(super) fn parse(path: &Path) -> Option<Self> {
        let mut parts = path.file_stem()?.to_str()?.split('-').map(str::parse);
        let (first, batches, samples) = (parts.next()?.ok()?, parts.next()?.ok()?, parts.next()?.ok()?);
        parts.next().is_none().then_some(Self { first, batches, samples })
    }

    pub(super) fn path(self, dir: &Path) -> PathBuf {
        // Leading zeros make a listing show the order.
        dir.join(format!("{:020}-{}-{}.{EXTENSION}", self.first, self.batches, self.samples))
    }
}

/// A batch and its position in the file.
pub(super) struct Record {
    pub(super) batch: Batch,
    /// Offset of the encoded batch.
    pub(super) offset: u64,
    pub(super) len: u32,
    pub(super) crc: u32,
}

/// The readable content of one file.
pub(super) struct Contents {
    pub(super) good: Vec<Record>,
    /// A part of the file does not read as it was written.
    pub(super) damaged: bool,
}

/// A file before it is written.
pub(super) struct PendingFile {
    pub(super) first: u64,
    pub(super) bytes: Vec<u8>,
    pub(super) entries: Vec<NewEntry>,
}

/// A batch that enters the spool's index.
pub(super) struct NewEntry {
    pub(super) sequence: u64,
    pub(super) offset: u64,
    pub(super) len: u32,
    pub(super) crc: u32,
    pub(super) id: String,
    pub(super) samples: u64,
}

impl NewEntry {
    pub(super) fn of(Record { batch, offset, len, crc }: Record) -> Self {
        let Batch { sequence, samples, batch_id, .. } = batch;
        Self { sequence, offset, len, crc, id: batch_id, samples }
    }
}

impl PendingFile {
    pub(super) fn new(first: u64) -> Self {
        Self { first, bytes: MAGIC.to_vec(), entries: Vec::new() }
    }

    /// Counts the samples of its batches.
    pub(super) fn samples(&self) -> u64 {
        self.entries.iter().map(|entry| entry.samples).sum()
    }

    pub(super) fn push(&mut self, batch: &Batch) {
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

/// Reads a file, and the time at which it was written.
pub(super) fn read_file(path: &Path) -> io::Result<(Contents, SystemTime)> {
    let written = fs::metadata(path)?.modified()?;
    Ok((parse(&fs::read(path)?), written))
}

/// Decodes one batch whose position in a file is known.
pub(super) fn decode(bytes: &[u8], crc: u32) -> io::Result<Batch> {
    if crc32fast::hash(bytes) != crc {
        return Err(io::Error::new(io::ErrorKind::InvalidData, "the checksum does not match"));
    }
    Batch::decode(bytes).map_err(|error| io::Error::new(io::ErrorKind::InvalidData, error))
}

/// Returns each record that reads as it was written.
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
                good.push(Record { batch, offset, len, crc });
            }
            _ => damaged = true,
        }
        rest = after;
    }
    Contents { good, damaged: damaged || !rest.is_empty() }
}
