//! Objects: the segments that the collector writes, and the older layout with one immutable file per batch.
//!
//! An object of the older layout is two gzip members. The first is empty and holds the metadata in its header's extra field (subfield
//! `GN`: CRC-32, little endian, then an [`ObjectMeta`] in protobuf). The second is the profile, byte for byte as the
//! agent sent it. The object of a batch with only a ledger has no second member. Gzip readers join members and skip
//! extra fields. So `go tool pprof` opens an object file directly, and the store can rebuild the index from the first
//! bytes of each object without decompressing anything. The store reads and removes such objects, and writes none.

use std::{
    collections::BTreeSet,
    fs::{self, DirEntry},
    io,
    ops::Range,
    path::{Path, PathBuf},
    sync::Arc,
};

use bytes::Bytes;
use futures::{StreamExt as _, TryStreamExt as _, stream};
use object_store::{
    GetOptions, GetRange, ObjectStore, ObjectStoreExt as _, PutPayload, local::LocalFileSystem,
    path::Path as Key,
};
use prost::Message as _;
use ulid::Ulid;

use super::{
    StoreError,
    bucket::Bucket,
    meta::ObjectMeta,
    segment::{self, SegmentError, SegmentPosition},
};

pub(super) const HOUR_MS: u64 = 3_600_000;
/// Bytes of the first member before the data: fixed header, length of the extra field, subfield header.
const BEFORE_DATA: usize = 10 + 2 + 4;
/// End of the first member: an empty deflate block, CRC and length of an empty text.
const AFTER_DATA: [u8; 10] = [3, 0, 0, 0, 0, 0, 0, 0, 0, 0];
/// Largest metadata that fits into the extra field beside the subfield's header and the checksum.
const MAX_META_BYTES: usize = u16::MAX as usize - 4 - 4;
/// Concurrent reads of object heads.
const CONCURRENT_HEADS: usize = 16;
/// Bytes of the first read of a segment. The index part of a usual segment fits.
const SEGMENT_HEAD_BYTES: u64 = 256 << 10;
/// End of a segment's file name.
const SEGMENT_SUFFIX: &str = ".segment";
/// First part of every path. There is one tenant until agents name theirs.
const TENANT: &str = "default";
/// A file system that reports larger blocks, like one on a network, does not allocate whole ones for small files.
const MAX_BLOCK_BYTES: u64 = 64 << 10;
const USUAL_BLOCK_BYTES: u64 = 4 << 10;

/// Reports whether metadata is small enough to be stored.
pub(super) fn fits(meta: &ObjectMeta) -> bool {
    meta.encoded_len() <= MAX_META_BYTES
}

/// Joins metadata and profile into an object of the older layout. Returns `None` for metadata above [`MAX_META_BYTES`].
/// Only the fuzzer and the tests call it.
pub(super) fn pack(meta: &ObjectMeta, pprof: &[u8]) -> Option<Bytes> {
    let meta = meta.encode_to_vec();
    if meta.len() > MAX_META_BYTES {
        return None;
    }
    let data = meta.len() + 4;
    let mut out = Vec::with_capacity(BEFORE_DATA + data + AFTER_DATA.len() + pprof.len());
    // Deflate, with an extra field, no time, unknown system: equal input gives equal bytes.
    out.extend_from_slice(&[0x1f, 0x8b, 8, 4, 0, 0, 0, 0, 0, 255]);
    out.extend_from_slice(&((data + 4) as u16).to_le_bytes());
    out.extend_from_slice(b"GN");
    out.extend_from_slice(&(data as u16).to_le_bytes());
    out.extend_from_slice(&crc32fast::hash(&meta).to_le_bytes());
    out.extend_from_slice(&meta);
    out.extend_from_slice(&AFTER_DATA);
    out.extend_from_slice(pprof);
    Some(out.into())
}

/// Returns the number of bytes before the profile in an object with this metadata.
pub(super) fn packed_header_len(meta: &ObjectMeta) -> u64 {
    (BEFORE_DATA + 4 + meta.encoded_len() + AFTER_DATA.len()) as u64
}

/// Returns the metadata of an object and the offset of its profile, or `None` if the bytes are not an object.
pub(super) fn unpack(object: &[u8]) -> Option<(ObjectMeta, usize)> {
    let rest = object.strip_prefix(&[0x1f, 0x8b, 8, 4, 0, 0, 0, 0, 0, 255])?;
    let (_extra, rest) = rest.split_first_chunk::<2>()?;
    let rest = rest.strip_prefix(b"GN")?;
    let (data, rest) = rest.split_first_chunk::<2>()?;
    let data = usize::from(u16::from_le_bytes(*data));
    let meta = rest.get(..data)?;
    let (crc, meta) = meta.split_first_chunk::<4>()?;
    if crc32fast::hash(meta) != u32::from_le_bytes(*crc) {
        return None;
    }
    let meta = ObjectMeta::decode(meta).ok()?;
    Some((meta, BEFORE_DATA + data + AFTER_DATA.len()))
}

/// The start of a batch's window and its id, which together make the path of its object. Ordered by time.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub(crate) struct ObjectKey {
    pub(crate) start_ms: u64,
    pub(crate) id: Ulid,
}

impl ObjectKey {
    /// Returns the hour of the start, counted from 1970.
    pub(super) fn hour(self) -> u64 {
        self.start_ms / HOUR_MS
    }

    fn path(self) -> Key {
        object_path(self.hour(), self.id)
    }
}

fn object_path(hour: u64, id: Ulid) -> Key {
    format!("{}/{id}.pb.gz", hour_path(hour)).into()
}

fn hour_path(hour: u64) -> String {
    let at = jiff::Timestamp::from_second((hour * 3600) as i64).unwrap_or_default();
    at.strftime(&format!("{TENANT}/%Y-%m-%d/%H")).to_string()
}

/// Parses the last two names of a directory path, as [`hour_path`] writes them.
fn hour_of(dir: &Key) -> Option<u64> {
    let mut names = dir.as_ref().rsplit('/');
    let hour: i8 = names.next()?.parse().ok()?;
    let day: jiff::civil::Date = names.next()?.parse().ok()?;
    let at = jiff::civil::Time::new(hour, 0, 0, 0).ok()?;
    let at = day.to_datetime(at).to_zoned(jiff::tz::TimeZone::UTC).ok()?;
    u64::try_from(at.timestamp().as_second() / 3600).ok()
}

/// Returns the hour of a segment's directory, which its id tells.
pub(super) fn segment_hour(id: Ulid) -> u64 {
    id.timestamp_ms() / HOUR_MS
}

fn segment_path(hour: u64, id: Ulid) -> Key {
    format!("{}/{id}{SEGMENT_SUFFIX}", hour_path(hour)).into()
}

/// The name of an object in the directory of an hour.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub(super) enum ObjectName {
    /// One profile, in the older layout.
    Profile(Ulid),
    Segment(Ulid),
}

impl ObjectName {
    fn parse(name: &str) -> Option<Self> {
        if let Some(id) = name.strip_suffix(SEGMENT_SUFFIX) {
            return Ulid::from_string(id).ok().map(Self::Segment);
        }
        Ulid::from_string(name.strip_suffix(".pb.gz")?).ok().map(Self::Profile)
    }

    fn path(self, hour: u64) -> Key {
        match self {
            Self::Profile(id) => object_path(hour, id),
            Self::Segment(id) => segment_path(hour, id),
        }
    }
}

/// Ids of the objects in the directory of one hour, by layout.
#[derive(Default)]
pub(super) struct HourObjects {
    /// Objects of one profile, in the older layout.
    pub(super) profiles: Vec<Ulid>,
    pub(super) segments: Vec<Ulid>,
}

impl FromIterator<ObjectName> for HourObjects {
    fn from_iter<T: IntoIterator<Item = ObjectName>>(names: T) -> Self {
        let mut objects = Self::default();
        for name in names {
            match name {
                ObjectName::Profile(id) => objects.profiles.push(id),
                ObjectName::Segment(id) => objects.segments.push(id),
            }
        }
        objects
    }
}

/// The index part of a segment, as a comparison finds it.
pub(super) enum SegmentHead {
    /// The segment has been removed since it was listed.
    Gone,
    /// The segment is damaged or foreign, or its file cannot be read.
    Unreadable {
        bytes: u64,
        reason: String,
    },
    Readable {
        entries: Vec<(ObjectMeta, SegmentPosition)>,
        bytes: u64,
    },
}

/// The first bytes of an object, as a comparison finds them.
pub(super) enum ObjectHead {
    /// The object has been removed since it was listed.
    Gone,
    /// The object is damaged, or its file cannot be read.
    Unreadable {
        bytes: u64,
    },
    Readable {
        meta: Box<ObjectMeta>,
        bytes: u64,
    },
}

/// All objects, in a directory or in a bucket.
pub(super) struct Objects {
    durable: Arc<dyn ObjectStore>,
    /// Without fsync, for reads and deletes. A deleted object that returns after a power cut expires again.
    relaxed: Arc<dyn ObjectStore>,
    /// Path of the directory. `None` for a bucket, which other collectors may change too.
    root: Option<PathBuf>,
    /// Unit in which the disk allocates space, in bytes. 1 for a bucket.
    block_bytes: u64,
}

impl Objects {
    /// Opens the objects of a directory, and creates it if needed.
    pub(super) fn open(root: &Path) -> Result<Self, StoreError> {
        fs::create_dir_all(root).map_err(|e| StoreError::io("create", root, e))?;
        sync_dir(root)?;
        if let Some(parent) = root.parent() {
            sync_dir(parent)?;
        }
        let local = || LocalFileSystem::new_with_prefix(root).map_err(StoreError::Object);
        let stat =
            rustix::fs::statvfs(root).map_err(|e| StoreError::io("check the disk of", root, e.into()))?;
        let block_bytes = if stat.f_frsize <= MAX_BLOCK_BYTES { stat.f_frsize } else { USUAL_BLOCK_BYTES };
        Ok(Self {
            // Syncs the file before its rename, then every directory whose entries changed.
            durable: Arc::new(local()?.with_fsync(true)),
            relaxed: Arc::new(local()?.with_automatic_cleanup(true)),
            root: Some(root.to_owned()),
            block_bytes: block_bytes.max(1),
        })
    }

    /// Opens the objects of a bucket, without any access to it.
    pub(super) fn in_bucket(bucket: &Bucket) -> Result<Self, StoreError> {
        // It succeeds once in a process. An earlier call has installed the same provider.
        let _ = rustls::crypto::ring::default_provider().install_default();
        let store = bucket.connect().map_err(StoreError::Object)?;
        Ok(Self { durable: Arc::clone(&store), relaxed: store, root: None, block_bytes: 1 })
    }

    /// Reports whether other collectors may change the objects too.
    pub(super) fn is_shared(&self) -> bool {
        self.root.is_none()
    }

    /// Returns the space that an object of this size takes, in bytes.
    pub(super) fn allocated(&self, object_bytes: u64) -> u64 {
        object_bytes.next_multiple_of(self.block_bytes)
    }

    /// Returns the space that a directory takes, in bytes. A bucket has none.
    pub(super) fn directory_bytes(&self) -> u64 {
        if self.root.is_some() { self.block_bytes } else { 0 }
    }

    /// Writes a segment, and returns once it survives a power cut. After an error it may be there all the same.
    pub(super) async fn put_segment(&self, id: Ulid, parts: Vec<Bytes>) -> Result<(), object_store::Error> {
        let payload: PutPayload = parts.into_iter().collect();
        self.durable.put(&segment_path(segment_hour(id), id), payload).await.map(drop)
    }

    /// Reads parts of a segment, or returns `None` if there is no such segment.
    pub(super) async fn segment_ranges(
        &self,
        id: Ulid,
        ranges: &[Range<u64>],
    ) -> Result<Option<Vec<Bytes>>, StoreError> {
        match self.relaxed.get_ranges(&segment_path(segment_hour(id), id), ranges).await {
            Ok(parts) => Ok(Some(parts)),
            Err(object_store::Error::NotFound { .. }) => Ok(None),
            Err(error) => Err(StoreError::Object(error)),
        }
    }

    /// Returns the size of a segment in bytes, or `None` if there is no such segment.
    pub(super) async fn segment_bytes(&self, id: Ulid) -> Result<Option<u64>, StoreError> {
        match self.relaxed.head(&segment_path(segment_hour(id), id)).await {
            Ok(found) => Ok(Some(found.size)),
            Err(object_store::Error::NotFound { .. }) => Ok(None),
            Err(error) => Err(StoreError::Object(error)),
        }
    }

    /// Reads an object, or returns `None` if there is none.
    pub(super) async fn get(&self, key: ObjectKey) -> Result<Option<Bytes>, StoreError> {
        match self.relaxed.get(&key.path()).await {
            Ok(found) => Ok(Some(found.bytes().await.map_err(StoreError::Object)?)),
            Err(object_store::Error::NotFound { .. }) => Ok(None),
            Err(error) => Err(StoreError::Object(error)),
        }
    }

    /// Removes the object with this name from the directory of an hour, readable or not. A missing object is no error.
    pub(super) async fn delete_in_hour(&self, hour: u64, name: ObjectName) -> Result<(), StoreError> {
        match self.relaxed.delete(&name.path(hour)).await {
            Ok(()) | Err(object_store::Error::NotFound { .. }) => Ok(()),
            Err(error) => Err(StoreError::Object(error)),
        }
    }

    /// Returns the hours that have objects. Names that are no day and hour do not count.
    pub(super) async fn hours(&self) -> Result<BTreeSet<u64>, StoreError> {
        if let Some(root) = &self.root {
            return local_hours(root);
        }
        let below = async |dir: Key| {
            let found = self.relaxed.list_with_delimiter(Some(&dir)).await;
            Ok::<_, StoreError>(found.map_err(StoreError::Object)?.common_prefixes)
        };
        let mut hours = BTreeSet::new();
        for day in below(TENANT.into()).await? {
            hours.extend(below(day).await?.iter().filter_map(hour_of));
        }
        Ok(hours)
    }

    /// Returns the objects of an hour. In a directory, it removes leftovers of interrupted writes, and the
    /// directory of an hour without files. Files with other names do not count.
    pub(super) async fn of_hour(&self, hour: u64) -> Result<HourObjects, StoreError> {
        if let Some(root) = &self.root {
            return Ok(local_objects(&root.join(hour_path(hour)))?.into_iter().collect());
        }
        let dir = Key::from(hour_path(hour));
        let names: Vec<ObjectName> = self
            .relaxed
            .list(Some(&dir))
            .try_filter_map(async |object| Ok(object.location.filename().and_then(ObjectName::parse)))
            .try_collect()
            .await
            .map_err(StoreError::Object)?;
        Ok(names.into_iter().collect())
    }

    /// Removes the directory of an hour, and of its day, if it has no files.
    pub(super) fn remove_empty_hour(&self, hour: u64) {
        let Some(root) = &self.root else { return };
        let dir = root.join(hour_path(hour));
        // A directory with a file stays.
        if fs::remove_dir(&dir).is_ok()
            && let Some(day) = dir.parent()
        {
            let _ = fs::remove_dir(day);
        }
    }

    /// Reads the metadata of objects without their profiles.
    pub(super) async fn heads(&self, hour: u64, ids: &[Ulid]) -> Result<Vec<ObjectHead>, StoreError> {
        stream::iter(ids.iter().map(|id| self.head(object_path(hour, *id))))
            .buffered(CONCURRENT_HEADS)
            .try_collect()
            .await
    }

    async fn head(&self, path: Key) -> Result<ObjectHead, StoreError> {
        match self.read_head(&path).await {
            Ok((meta, bytes)) => Ok(match unpack(&meta) {
                Some((meta, _)) => ObjectHead::Readable { meta: Box::new(meta), bytes },
                None => ObjectHead::Unreadable { bytes },
            }),
            Err(object_store::Error::NotFound { .. }) => Ok(ObjectHead::Gone),
            Err(error) => match self.relaxed.head(&path).await {
                Err(object_store::Error::NotFound { .. }) => Ok(ObjectHead::Gone),
                // A range of an empty object is an error.
                Ok(found) if found.size == 0 => Ok(ObjectHead::Unreadable { bytes: 0 }),
                // One file that cannot be read must not keep the others out of the index.
                found if self.root.is_some() => {
                    Ok(ObjectHead::Unreadable { bytes: found.map_or(0, |found| found.size) })
                }
                _ => Err(StoreError::Object(error)),
            },
        }
    }

    /// Reads the index parts of segments without their profiles.
    pub(super) async fn segment_heads(
        &self,
        hour: u64,
        ids: &[Ulid],
    ) -> Result<Vec<SegmentHead>, StoreError> {
        stream::iter(ids.iter().map(|id| self.segment_head(hour, *id)))
            .buffered(CONCURRENT_HEADS)
            .try_collect()
            .await
    }

    async fn segment_head(&self, hour: u64, id: Ulid) -> Result<SegmentHead, StoreError> {
        let path = segment_path(hour, id);
        let error = match self.read_segment_head(&path).await {
            Ok((head, bytes)) => {
                return Ok(match head.and_then(|head| segment::read_index(id, &head)) {
                    Ok(entries) => SegmentHead::Readable { entries, bytes },
                    Err(error) => SegmentHead::Unreadable { bytes, reason: error.to_string() },
                });
            }
            Err(object_store::Error::NotFound { .. }) => return Ok(SegmentHead::Gone),
            Err(error) => error,
        };
        match self.relaxed.head(&path).await {
            Err(object_store::Error::NotFound { .. }) => Ok(SegmentHead::Gone),
            // A range of an empty object is an error.
            Ok(found) if found.size == 0 => {
                Ok(SegmentHead::Unreadable { bytes: 0, reason: "it is empty".into() })
            }
            // One file that cannot be read must not keep the others out of the index.
            found if self.root.is_some() => Ok(SegmentHead::Unreadable {
                bytes: found.map_or(0, |found| found.size),
                reason: error.to_string(),
            }),
            _ => Err(StoreError::Object(error)),
        }
    }

    /// Returns the first bytes of a segment, at least its index part if that is complete, and its size.
    async fn read_segment_head(
        &self,
        path: &Key,
    ) -> Result<(Result<Bytes, SegmentError>, u64), object_store::Error> {
        let (head, bytes) = self.read_first(path, SEGMENT_HEAD_BYTES).await?;
        let end = match segment::index_end(&head) {
            Ok(end) if end > bytes => return Ok((Err(SegmentError::Index), bytes)),
            Ok(end) => end,
            Err(error) => return Ok((Err(error), bytes)),
        };
        if end <= head.len() as u64 {
            return Ok((Ok(head), bytes));
        }
        Ok((Ok(self.relaxed.get_range(path, 0..end).await?), bytes))
    }

    /// Returns the first bytes of an object, at least its metadata, and its size.
    async fn read_head(&self, path: &Key) -> Result<(Bytes, u64), object_store::Error> {
        self.read_first(path, (BEFORE_DATA + usize::from(u16::MAX)) as u64).await
    }

    /// Returns up to `limit` first bytes of an object, and its size.
    async fn read_first(&self, path: &Key, limit: u64) -> Result<(Bytes, u64), object_store::Error> {
        let range = GetRange::Bounded(0..limit);
        let found =
            self.relaxed.get_opts(path, GetOptions { range: Some(range), ..GetOptions::default() }).await?;
        let bytes = found.meta.size;
        Ok((found.bytes().await?, bytes))
    }
}

/// Returns the hours that have a directory below `root`.
fn local_hours(root: &Path) -> Result<BTreeSet<u64>, StoreError> {
    let mut hours = BTreeSet::new();
    let name = |entry: &DirEntry| entry.file_name().into_string().ok();
    for day in list(&root.join(TENANT))? {
        let Some(day_name) = name(&day) else { continue };
        for hour in list(&day.path())? {
            let hour = name(&hour).map(|hour| Key::from(format!("{TENANT}/{day_name}/{hour}")));
            hours.extend(hour.as_ref().and_then(hour_of));
        }
    }
    Ok(hours)
}

/// Returns the names of the objects in an hour's directory. Removes the temporary files of interrupted writes, and a
/// directory without files.
fn local_objects(dir: &Path) -> Result<Vec<ObjectName>, StoreError> {
    let (mut names, mut is_empty) = (Vec::new(), true);
    for entry in list(dir)? {
        let name = entry.file_name();
        let name = name.to_str().unwrap_or_default();
        if (name.contains(".pb.gz#") || name.contains(".segment#")) && fs::remove_file(entry.path()).is_ok() {
            continue;
        }
        is_empty = false;
        if entry.file_type().is_ok_and(|kind| kind.is_file()) {
            names.extend(ObjectName::parse(name));
        }
    }
    if is_empty {
        // Another file may have arrived, which is fine, as is a directory that is gone.
        let _ = fs::remove_dir(dir);
    }
    Ok(names)
}

fn list(dir: &Path) -> Result<Vec<DirEntry>, StoreError> {
    match fs::read_dir(dir) {
        Ok(entries) => entries.collect::<io::Result<_>>().map_err(|e| StoreError::io("list", dir, e)),
        // The store ignores stray files beside its directories.
        Err(e) if matches!(e.kind(), io::ErrorKind::NotFound | io::ErrorKind::NotADirectory) => {
            Ok(Vec::new())
        }
        Err(e) => Err(StoreError::io("list", dir, e)),
    }
}

fn sync_dir(dir: &Path) -> Result<(), StoreError> {
    fs::File::open(dir).and_then(|d| d.sync_all()).map_err(|e| StoreError::io("sync", dir, e))
}

#[cfg(test)]
mod tests {
    use std::io::{Read as _, Write as _};

    use gannet_proto::ingest::Batch;
    use proptest::prelude::*;

    use super::{super::meta::TypeTotal, *};

    fn gzip(data: &[u8]) -> Vec<u8> {
        let mut out = flate2::write::GzEncoder::new(Vec::new(), flate2::Compression::fast());
        out.write_all(data).unwrap();
        out.finish().unwrap()
    }

    proptest! {
        #[test]
        fn an_object_round_trips_and_is_plain_gzip(
            reason in ".{0,200}", profile in proptest::collection::vec(any::<u8>(), 0..500),
        ) {
            let meta = ObjectMeta {
                batch: Some(Batch { reason, ..Batch::default() }),
                types: vec![TypeTotal { name: "cpu/nanoseconds".into(), total: 7 }],
            };
            let pprof = gzip(&profile);
            let object = pack(&meta, &pprof).unwrap();
            let (back, offset) = unpack(&object).unwrap();
            prop_assert_eq!(back, meta);
            prop_assert_eq!(&object[offset..], &pprof[..]);
            let mut plain = Vec::new();
            flate2::read::MultiGzDecoder::new(&object[..]).read_to_end(&mut plain).unwrap();
            prop_assert_eq!(plain, profile);
        }

        #[test]
        fn arbitrary_bytes_are_no_object(bytes in proptest::collection::vec(any::<u8>(), 0..200)) {
            prop_assert!(unpack(&bytes).is_none());
        }

        #[test]
        fn a_flipped_bit_in_the_metadata_is_detected(at in 0_usize..30, bit in 0_u8..8) {
            let meta = ObjectMeta {
                batch: Some(Batch { reason: "because it was slow".into(), ..Batch::default() }),
                types: vec![],
            };
            let mut object = pack(&meta, b"").unwrap().to_vec();
            let at = BEFORE_DATA + at % (object.len() - BEFORE_DATA - AFTER_DATA.len());
            object[at] ^= 1 << bit;
            prop_assert!(unpack(&object).is_none());
        }
    }

    #[test]
    fn metadata_fits_up_to_the_limit_and_not_above() {
        let with = |n: usize| ObjectMeta {
            batch: Some(Batch { reason: "x".repeat(n), ..Batch::default() }),
            types: vec![],
        };
        let overhead = with(60_000).encoded_len() - 60_000;
        let fits = with(MAX_META_BYTES - overhead);
        assert_eq!(unpack(&pack(&fits, b"p").unwrap()).unwrap().0, fits);
        assert!(pack(&with(MAX_META_BYTES - overhead + 1), b"p").is_none());
    }

    #[test]
    fn paths_hold_tenant_day_and_hour() {
        let key = ObjectKey { start_ms: 1_700_000_000_000, id: Ulid::from_parts(1, 2) };
        assert_eq!(key.path().as_ref(), "default/2023-11-14/22/00000000010000000000000002.pb.gz");
        assert_eq!(hour_of(&Key::from("default/2023-11-14/22")), Some(key.hour()));
        let id = Ulid::from_parts(1_700_000_000_000, 2);
        let path = segment_path(segment_hour(id), id);
        assert_eq!(path.as_ref(), "default/2023-11-14/22/01HF7YAT000000000000000002.segment");
        assert_eq!(path.filename().and_then(ObjectName::parse), Some(ObjectName::Segment(id)));
    }
}
