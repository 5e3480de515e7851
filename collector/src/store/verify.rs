//! Reads every object of a store and reports the faulty ones. It changes nothing, and may run beside a collector.

use std::{io, path::Path, sync::Arc};

use bytes::Bytes;
use futures::{StreamExt as _, TryStreamExt as _, stream};
use object_store::{
    GetOptions, GetRange, ObjectStore, ObjectStoreExt as _, local::LocalFileSystem, path::Path as Key,
    prefix::PrefixStore,
};
use ulid::Ulid;

use super::{
    Bucket, StoreError,
    describe::describe_object,
    object::{ObjectName, TABLE, hour_of, hour_path, hours_in, segment_hour, unpack},
    replay::TableObjects,
    segment::{self, HEADER_BYTES, SegmentError, SegmentPosition},
    tombstone::{Tombstone, TombstoneError},
    with_cause,
};

/// Objects that are read at the same time.
const CONCURRENT_OBJECTS: usize = 8;
/// Largest object of the older layout: a profile with its metadata, by any limit that a collector had.
const MAX_PROFILE_OBJECT: u64 = 256 << 20;
/// Largest object of a deletion.
const MAX_DELETION_BYTES: u64 = 1 << 20;
/// Largest index part of a segment. That of a full segment, with 16,384 batches of long labels, takes a tenth.
const MAX_INDEX_BYTES: u64 = 1 << 30;

/// Why an object is faulty, and what to do.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum ObjectFault {
    /// The object has no bytes.
    #[error("it is empty; restore it from a backup, or delete it: its profiles are lost")]
    Empty,
    /// The first bytes of the object are zero, as after a power cut on a disk that does not keep its order.
    #[error("its first bytes are zero; restore it from a backup, or delete it: its profiles are lost")]
    Zeroed,
    /// A segment ends before the end of its index part.
    #[error("it is cut within its index; restore it from a backup, or delete it: its profiles are lost")]
    CutIndex,
    /// A segment ends before its last profile.
    #[error(
        "it is cut: {lost} of {profiles} profiles are incomplete; restore it from a backup, or keep it: queries leave these out"
    )]
    Cut {
        /// Profiles that are not complete.
        lost: usize,
        /// All profiles of the segment.
        profiles: usize,
    },
    /// Profiles of a complete object do not have their checksums.
    #[error(
        "{lost} of {profiles} profiles are damaged; restore it from a backup, or keep it: queries leave these out"
    )]
    Damaged {
        /// Profiles without their checksums.
        lost: usize,
        /// All profiles of the object.
        profiles: usize,
    },
    /// A segment has bytes behind its last profile.
    #[error(
        "it has {0} bytes behind its last profile; something else than a collector wrote to it: restore it from a backup"
    )]
    Longer(u64),
    /// An object under a wrong name, beside the one with the right name.
    #[error("it is a copy of {0}; delete this copy")]
    Copy(String),
    /// An object under a wrong name, and none with the right one.
    #[error("it belongs into {0}; move it there")]
    Misplaced(String),
    /// A deletion that is not carried out yet is damaged.
    #[error(
        "it is a damaged deletion, and no collector starts with it; restore it from a backup, or remove it and delete the profiles \
         again"
    )]
    Deletion,
    /// A newer collector wrote the object.
    #[error("a newer collector wrote it, in version {0}; upgrade this program")]
    Newer(u32),
    /// The content is no object of Gannet, or its description is damaged.
    #[error(
        "it is no object of Gannet, or its description is damaged; restore it from a backup, or delete it"
    )]
    Foreign,
    /// A file of a Delta table is missing, or does not match the log of the table.
    #[error(
        "{0}; stop the collector and run `gannet-collector repair`, then the collector writes the table again from the stored \
         profiles"
    )]
    TableFile(&'static str),
    /// An unreadable log of a Delta table. The text names the cure.
    #[error("{0}")]
    TableLog(String),
    /// The system or the bucket returned an error.
    #[error("it cannot be read: {0}; check the disk or the bucket, then run this again")]
    Unreadable(String),
}

/// Totals of a complete reading.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Verified {
    /// Objects that were read.
    pub objects: u64,
    /// Profiles in them that have their checksums, and ledgers without a profile.
    pub profiles: u64,
    /// Bytes of the objects.
    pub bytes: u64,
    /// Number of files of Delta tables that the check read.
    pub table_files: u64,
    /// Number of objects and files with a fault. The check reported each of them.
    pub faults: u64,
}

/// Reads all objects below this directory, or in the bucket, and calls `report` with the path and the fault of each faulty
/// one. An object that retention removes meanwhile is none. Fails if the objects cannot be listed.
pub(crate) async fn verify(
    data: &Path,
    bucket: Option<&Bucket>,
    mut report: impl FnMut(&str, &ObjectFault),
) -> Result<Verified, StoreError> {
    let objects = open(data, bucket)?;
    let failed = |error: StoreError| error.of_bucket(bucket);
    let mut verified = Verified::default();
    for hour in hours_in(&*objects).await.map_err(failed)? {
        let listed: Result<Vec<_>, _> = objects.list(Some(&hour_path(hour).into())).try_collect().await;
        let mut listed = listed.map_err(StoreError::Object).map_err(failed)?;
        listed.sort_unstable_by(|a, b| a.location.cmp(&b.location));
        let checks = listed.into_iter().filter_map(|object| {
            let name = object.location.filename().and_then(ObjectName::parse)?;
            let objects = Arc::clone(&objects);
            Some(async move {
                let at = Place { objects, path: object.location, bytes: object.size };
                let checked = at.check(name).await;
                (at, checked)
            })
        });
        let mut checks = stream::iter(checks.collect::<Vec<_>>()).buffered(CONCURRENT_OBJECTS);
        while let Some((at, checked)) = checks.next().await {
            let (sound, fault) = match checked {
                Ok(checked) => checked,
                Err(object_store::Error::NotFound { .. }) => continue,
                Err(error) => (0, Some(ObjectFault::Unreadable(with_cause(&error)))),
            };
            verified.objects += 1;
            verified.profiles += sound as u64;
            verified.bytes += at.bytes;
            if let Some(fault) = fault {
                verified.faults += 1;
                report(at.path.as_ref(), &fault);
            }
        }
    }
    Ok(verified)
}

/// Opens the tables of a store, if it has some. Changes nothing.
pub(crate) fn open_tables(data: &Path, bucket: Option<&Bucket>) -> Result<Option<TableObjects>, StoreError> {
    if bucket.is_some() {
        let objects = Arc::new(PrefixStore::new(open(data, bucket)?, TABLE));
        return Ok(Some(TableObjects { objects, root: None, block_bytes: 1 }));
    }
    let root = data.join(TABLE);
    if !root.is_dir() {
        return Ok(None);
    }
    let objects = Arc::new(LocalFileSystem::new_with_prefix(&root).map_err(StoreError::Object)?);
    Ok(Some(TableObjects { objects, root: Some(root), block_bytes: 1 }))
}

/// Opens the objects of a store that is there, without any change to it.
pub(super) fn open(data: &Path, bucket: Option<&Bucket>) -> Result<Arc<dyn ObjectStore>, StoreError> {
    if let Some(bucket) = bucket {
        crate::tls::install_provider();
        return bucket.connect().map_err(StoreError::Object);
    }
    let root = data.join("objects");
    if !root.is_dir() {
        let missing = io::Error::from(io::ErrorKind::NotFound);
        return Err(StoreError::io("find the profiles of a collector in", &root, missing));
    }
    Ok(Arc::new(LocalFileSystem::new_with_prefix(&root).map_err(StoreError::Object)?))
}

/// The number of sound profiles in an object, and its fault.
type Checked = (usize, Option<ObjectFault>);

/// An object as the store lists it.
struct Place {
    objects: Arc<dyn ObjectStore>,
    path: Key,
    bytes: u64,
}

impl Place {
    async fn check(&self, name: ObjectName) -> Result<Checked, object_store::Error> {
        if self.bytes == 0 && !matches!(name, ObjectName::Deletion(_)) {
            return Ok((0, Some(ObjectFault::Empty)));
        }
        match name {
            ObjectName::Segment(id) => self.check_segment(id).await,
            ObjectName::Profile(id) => self.check_profile(id).await,
            ObjectName::Deletion(id) => self.check_deletion(id).await,
        }
    }

    /// Returns the hour of the object's directory.
    fn hour(&self) -> Option<u64> {
        let (dir, _) = self.path.as_ref().rsplit_once('/')?;
        hour_of(&Key::from(dir))
    }

    /// Returns the fault of an object whose right name and hour are these.
    async fn misnamed(&self, name: ObjectName, hour: u64) -> Result<Checked, object_store::Error> {
        let right = name.path(hour);
        let fault = match self.objects.head(&right).await {
            Ok(_) => ObjectFault::Copy(right.to_string()),
            Err(object_store::Error::NotFound { .. }) => ObjectFault::Misplaced(right.to_string()),
            Err(error) => return Err(error),
        };
        Ok((0, Some(fault)))
    }

    async fn check_segment(&self, id: Ulid) -> Result<Checked, object_store::Error> {
        let header = self.objects.get_range(&self.path, 0..self.bytes.min(HEADER_BYTES as u64)).await?;
        let end = match segment::index_end(&header) {
            Ok(end) if end > self.bytes => return Ok((0, Some(ObjectFault::CutIndex))),
            Ok(end) if end > MAX_INDEX_BYTES => return Ok((0, Some(ObjectFault::Foreign))),
            Ok(end) => end,
            Err(SegmentError::Version(version)) => return Ok((0, Some(ObjectFault::Newer(version)))),
            Err(_) if header.iter().all(|byte| *byte == 0) => return Ok((0, Some(ObjectFault::Zeroed))),
            Err(_) if is_cut_header(&header) => return Ok((0, Some(ObjectFault::CutIndex))),
            Err(_) => return Ok((0, Some(ObjectFault::Foreign))),
        };
        let head = self.objects.get_range(&self.path, 0..end).await?;
        let positions: Vec<SegmentPosition> = match segment::read_index(id, &head) {
            Ok(entries) => entries.into_iter().map(|(_, position)| position).collect(),
            Err(SegmentError::Copy(own)) => {
                return self.misnamed(ObjectName::Segment(own), segment_hour(own)).await;
            }
            Err(_) => return Ok((0, Some(ObjectFault::Foreign))),
        };
        if self.hour() != Some(segment_hour(id)) {
            return self.misnamed(ObjectName::Segment(id), segment_hour(id)).await;
        }
        let mut profiles =
            Profiles { left: &positions, hasher: crc32fast::Hasher::new(), seen: 0, sound: 0, behind: 0 };
        profiles.add(&[]);
        if self.bytes > end {
            let options = GetOptions { range: Some(GetRange::Offset(end)), ..GetOptions::default() };
            let mut chunks = self.objects.get_opts(&self.path, options).await?.into_stream();
            while let Some(chunk) = chunks.try_next().await? {
                profiles.add(&chunk);
            }
        }
        let (all, sound, behind) = (positions.len(), profiles.sound, profiles.behind);
        let fault = match profiles.left.len() {
            0 if sound < all => Some(ObjectFault::Damaged { lost: all - sound, profiles: all }),
            0 if behind > 0 => Some(ObjectFault::Longer(behind)),
            0 => None,
            _ => Some(ObjectFault::Cut { lost: all - sound, profiles: all }),
        };
        Ok((sound, fault))
    }

    async fn check_deletion(&self, id: Ulid) -> Result<Checked, object_store::Error> {
        let object = self.objects.get_range(&self.path, 0..self.bytes.min(MAX_DELETION_BYTES)).await?;
        let fault = match Tombstone::decode(id, &object) {
            Ok(of) if Some(of.hour()) == self.hour() => None,
            Ok(of) => return self.misnamed(ObjectName::Deletion(id), of.hour()).await,
            Err(TombstoneError::Version(version)) => Some(ObjectFault::Newer(version)),
            Err(TombstoneError::Damaged) => Some(ObjectFault::Deletion),
        };
        Ok((0, fault))
    }

    /// Checks an object of the older layout.
    async fn check_profile(&self, id: Ulid) -> Result<Checked, object_store::Error> {
        if self.bytes > MAX_PROFILE_OBJECT {
            return Ok((0, Some(ObjectFault::Foreign)));
        }
        let object = self.objects.get(&self.path).await?.bytes().await?;
        let Some((meta, offset)) = unpack(&object) else {
            let fault = if object.iter().take(HEADER_BYTES).all(|byte| *byte == 0) {
                ObjectFault::Zeroed
            } else {
                ObjectFault::Foreign
            };
            return Ok((0, Some(fault)));
        };
        let Some((_, key, _)) = describe_object(&meta, object.len() as u64) else {
            return Ok((0, Some(ObjectFault::Foreign)));
        };
        if key.id != id || Some(key.hour()) != self.hour() {
            return self.misnamed(ObjectName::Profile(key.id), key.hour()).await;
        }
        let is_sound = offset <= object.len() && is_gzip(object.slice(offset..)).await;
        let fault = (!is_sound).then_some(ObjectFault::Damaged { lost: 1, profiles: 1 });
        Ok((usize::from(is_sound), fault))
    }
}

/// Reports whether the header of a segment is right as far as it goes, and ends early.
fn is_cut_header(header: &[u8]) -> bool {
    header.len() < HEADER_BYTES
        && segment::MAGIC.starts_with(&header[..header.len().min(segment::MAGIC.len())])
}

/// Reports whether these bytes are complete members of gzip with right checksums. A ledger without a profile has none.
pub(super) async fn is_gzip(bytes: Bytes) -> bool {
    let inflate = move || {
        bytes.is_empty()
            || io::copy(&mut flate2::read::MultiGzDecoder::new(&bytes[..]), &mut io::sink()).is_ok()
    };
    tokio::task::spawn_blocking(inflate).await.unwrap_or(false)
}

/// The profiles of a segment while its bytes arrive.
struct Profiles<'a> {
    /// Profiles that are not complete yet.
    left: &'a [SegmentPosition],
    /// Checksum of the first of them so far.
    hasher: crc32fast::Hasher,
    /// Bytes of the first of them so far.
    seen: u64,
    /// Profiles with their checksums.
    sound: usize,
    /// Bytes behind the last profile.
    behind: u64,
}

impl Profiles<'_> {
    fn add(&mut self, mut bytes: &[u8]) {
        while let Some((first, rest)) = self.left.split_first() {
            let wanted = usize::try_from(first.bytes - self.seen).unwrap_or(usize::MAX);
            let (own, others) = bytes.split_at(bytes.len().min(wanted));
            self.hasher.update(own);
            self.seen += own.len() as u64;
            if self.seen < first.bytes {
                return;
            }
            let crc = std::mem::take(&mut self.hasher).finalize();
            self.sound += usize::from(crc == first.crc);
            (self.left, self.seen, bytes) = (rest, 0, others);
        }
        self.behind += bytes.len() as u64;
    }
}
