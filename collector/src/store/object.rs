//! Objects: the segments that the collector writes, and the older layout with one immutable file per batch.
//!
//! An object of the older layout is two gzip members. The first is empty and holds the metadata in its header's extra
//! field (subfield `GN`: CRC-32, little endian, then an [`ObjectMeta`] in protobuf). The second is the profile, byte for
//! byte as the agent sent it. The object of a batch with only a ledger has no second member. Gzip readers join members
//! and skip extra fields. So `go tool pprof` opens an object file directly, and the store can rebuild the index from the
//! first bytes of each object without decompressing anything. The store reads and removes such objects, and writes none.

use std::{
    collections::BTreeSet,
    fmt,
    fs::{self, DirEntry},
    io,
    ops::{Range, RangeInclusive},
    path::{Path, PathBuf},
    sync::Arc,
};

use bytes::Bytes;
use futures::{StreamExt as _, TryStreamExt as _, stream};
use object_store::{
    GetOptions, GetRange, ObjectStore, ObjectStoreExt as _, PutMode, PutOptions, PutPayload,
    local::LocalFileSystem, path::Path as Key, prefix::PrefixStore,
};
use prost::Message as _;
use ulid::Ulid;

use super::{
    StoreError,
    bucket::Bucket,
    meta::ObjectMeta,
    replay::TableObjects,
    segment::{self, SegmentError, SegmentHead},
};
pub(super) use crate::time::HOUR_MS;

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
/// End of the file name of an object of the older layout.
const PROFILE_SUFFIX: &str = ".pb.gz";
/// End of the file name of a deletion.
const DELETION_SUFFIX: &str = ".deletion";
/// End of the file name of the mark that no table has a profile of a deletion.
const MARK_SUFFIX: &str = ".cleaned";
/// Directory of the table in that of `--data`, or in the bucket.
pub(super) const TABLE: &str = "table";
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
    if !fits(meta) {
        return None;
    }
    let meta = meta.encode_to_vec();
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
        ObjectName::Profile(self.id).path(self.hour())
    }
}

pub(super) fn hour_path(hour: u64) -> String {
    let at = jiff::Timestamp::from_second((hour * 3600) as i64).unwrap_or_default();
    at.strftime(&format!("{TENANT}/%Y-%m-%d/%H")).to_string()
}

/// Parses the last two names of a directory path, as [`hour_path`] writes them.
pub(super) fn hour_of(dir: &Key) -> Option<u64> {
    let mut names = dir.as_ref().rsplit('/');
    let hour: i8 = names.next()?.parse().ok()?;
    let day: jiff::civil::Date = names.next()?.parse().ok()?;
    let at = jiff::civil::Time::new(hour, 0, 0, 0).ok()?;
    let at = day.to_datetime(at).to_zoned(jiff::tz::TimeZone::UTC).ok()?;
    u64::try_from(at.timestamp().as_second() / 3600).ok()
}

/// Returns the hour of a segment's directory, from the time in its id.
pub(super) fn segment_hour(id: Ulid) -> u64 {
    id.timestamp_ms() / HOUR_MS
}

/// Returns the path of a segment in the directory of its hour.
fn segment_path(id: Ulid) -> Key {
    ObjectName::Segment(id).path(segment_hour(id))
}

/// The name of an object in the directory of an hour.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub(super) enum ObjectName {
    /// One profile, in the older layout.
    Profile(Ulid),
    Segment(Ulid),
    /// A deletion that is not carried out yet, in the hour of its time.
    Deletion(Ulid),
}

impl ObjectName {
    pub(super) fn parse(name: &str) -> Option<Self> {
        if let Some(id) = name.strip_suffix(SEGMENT_SUFFIX) {
            return Ulid::from_string(id).ok().map(Self::Segment);
        }
        if let Some(id) = name.strip_suffix(DELETION_SUFFIX) {
            return Ulid::from_string(id).ok().map(Self::Deletion);
        }
        Ulid::from_string(name.strip_suffix(PROFILE_SUFFIX)?).ok().map(Self::Profile)
    }

    pub(super) fn path(self, hour: u64) -> Key {
        format!("{}/{self}", hour_path(hour)).into()
    }
}

/// Formats the file name.
impl fmt::Display for ObjectName {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Profile(id) => write!(f, "{id}{PROFILE_SUFFIX}"),
            Self::Segment(id) => write!(f, "{id}{SEGMENT_SUFFIX}"),
            Self::Deletion(id) => write!(f, "{id}{DELETION_SUFFIX}"),
        }
    }
}

/// Ids of the objects in the directory of one hour, by layout.
#[derive(Default)]
pub(super) struct HourObjects {
    /// Objects of one profile, in the older layout.
    pub(super) profiles: Vec<Ulid>,
    pub(super) segments: Vec<Ulid>,
    /// Deletions of this hour that are not carried out yet.
    pub(super) deletions: Vec<Ulid>,
}

impl FromIterator<ObjectName> for HourObjects {
    fn from_iter<T: IntoIterator<Item = ObjectName>>(names: T) -> Self {
        let mut objects = Self::default();
        for name in names {
            match name {
                ObjectName::Profile(id) => objects.profiles.push(id),
                ObjectName::Segment(id) => objects.segments.push(id),
                ObjectName::Deletion(id) => objects.deletions.push(id),
            }
        }
        objects
    }
}

/// The description at the start of an object, as a comparison finds it.
pub(super) enum Head<T> {
    /// The object has been removed since it was listed.
    Gone,
    /// The object is damaged or foreign, or its file cannot be read.
    Unreadable {
        bytes: u64,
        reason: String,
    },
    Readable {
        content: T,
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
        crate::tls::install_provider();
        let store = bucket.connect().map_err(StoreError::Object)?;
        Ok(Self { durable: Arc::clone(&store), relaxed: store, root: None, block_bytes: 1 })
    }

    /// Wraps the objects of a directory or bucket for a reader beside a collector, which changes nothing.
    pub(super) fn to_read(objects: Arc<dyn ObjectStore>) -> Self {
        Self { durable: Arc::clone(&objects), relaxed: objects, root: None, block_bytes: 1 }
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
        self.durable.put(&segment_path(id), payload).await.map(drop)
    }

    /// Writes the object of a deletion, and returns once it survives a power cut. Fails if there is one with this id. After another
    /// error it may be there all the same.
    pub(super) async fn create_deletion(&self, id: Ulid, bytes: Bytes) -> Result<(), object_store::Error> {
        let create = PutOptions { mode: PutMode::Create, ..PutOptions::default() };
        let path = ObjectName::Deletion(id).path(segment_hour(id));
        self.durable.put_opts(&path, bytes.into(), create).await.map(drop)
    }

    /// Reads the object of a deletion, or returns `None` if there is none.
    pub(super) async fn deletion(&self, id: Ulid) -> Result<Option<Bytes>, StoreError> {
        let path = ObjectName::Deletion(id).path(segment_hour(id));
        let Some(found) = unless_missing(self.relaxed.get(&path).await)? else { return Ok(None) };
        Ok(Some(found.bytes().await.map_err(StoreError::Object)?))
    }

    /// Reports whether there is an object of this deletion.
    pub(super) async fn has_deletion(&self, id: Ulid) -> Result<bool, StoreError> {
        let path = ObjectName::Deletion(id).path(segment_hour(id));
        Ok(unless_missing(self.relaxed.head(&path).await)?.is_some())
    }

    /// Returns the path of the mark that no table of the bucket has a profile of a deletion.
    fn mark_path(id: Ulid) -> Key {
        format!("{}/{id}{MARK_SUFFIX}", hour_path(segment_hour(id))).into()
    }

    /// Marks that no table has a profile of a deletion.
    pub(super) async fn mark_clean_tables(&self, id: Ulid) -> Result<(), StoreError> {
        self.durable.put(&Self::mark_path(id), PutPayload::new()).await.map(drop).map_err(StoreError::Object)
    }

    /// Reports whether no table has a profile of a deletion: there is the mark, or no table.
    pub(super) async fn has_clean_tables(&self, id: Ulid) -> Result<bool, StoreError> {
        if unless_missing(self.relaxed.head(&Self::mark_path(id)).await)?.is_some() {
            return Ok(true);
        }
        let log = Key::from(format!("{TABLE}/samples/_delta_log"));
        Ok(self.relaxed.list(Some(&log)).try_next().await.map_err(StoreError::Object)?.is_none())
    }

    /// Removes the mark of a deletion that is carried out.
    pub(super) async fn remove_mark(&self, id: Ulid) -> Result<(), StoreError> {
        unless_missing(self.relaxed.delete(&Self::mark_path(id)).await).map(drop)
    }

    /// Removes an object as [`Objects::delete_in_hour`] does, so that it does not return after a power cut.
    pub(super) async fn remove_durably(&self, hour: u64, name: ObjectName) -> Result<(), StoreError> {
        self.delete_in_hour(hour, name).await?;
        let Some(root) = &self.root else { return Ok(()) };
        let dir = root.join(hour_path(hour));
        // A directory without a file goes, too.
        dir.ancestors().find(|dir| dir.is_dir()).map_or(Ok(()), sync_dir)
    }

    /// Removes all files of the tables in a directory, which no thread updates. Leaves a bucket as it is.
    pub(super) async fn remove_unused_tables(&self) -> Result<(), StoreError> {
        let Some(root) = self.table_root().filter(|root| root.is_dir()) else { return Ok(()) };
        let objects = LocalFileSystem::new_with_prefix(&root).map_err(StoreError::Object)?;
        let files = objects.list(None).try_collect::<Vec<_>>().await.map_err(StoreError::Object)?;
        if files.is_empty() {
            return Ok(());
        }
        for file in files {
            unless_missing(objects.delete(&file.location).await)?;
        }
        tracing::warn!(
            "removed the tables, which have deleted profiles and are not kept up to date: the collector runs without --table"
        );
        sync_dir(&root)
    }

    /// Reads parts of a segment, or returns `None` if there is no such segment.
    pub(super) async fn segment_ranges(
        &self,
        id: Ulid,
        ranges: &[Range<u64>],
    ) -> Result<Option<Vec<Bytes>>, StoreError> {
        unless_missing(self.relaxed.get_ranges(&segment_path(id), ranges).await)
    }

    /// Reads a complete segment, or returns `None` if there is no such segment.
    pub(super) async fn segment(&self, id: Ulid) -> Result<Option<Bytes>, StoreError> {
        let Some(found) = unless_missing(self.relaxed.get(&segment_path(id)).await)? else { return Ok(None) };
        Ok(Some(found.bytes().await.map_err(StoreError::Object)?))
    }

    /// Returns the directory of the table, which need not exist. `None` for a bucket.
    pub(super) fn table_root(&self) -> Option<PathBuf> {
        Some(self.root.as_ref()?.parent()?.join(TABLE))
    }

    /// Opens the objects of the table: the directory `table` beside these, which it creates, or the path `table` in the bucket.
    pub(super) fn table(&self) -> Result<TableObjects, StoreError> {
        let Some(root) = self.table_root() else {
            let objects = Arc::new(PrefixStore::new(Arc::clone(&self.durable), TABLE));
            return Ok(TableObjects { objects, root: None, block_bytes: 1 });
        };
        fs::create_dir_all(&root).map_err(|e| StoreError::io("create", &root, e))?;
        let objects = LocalFileSystem::new_with_prefix(&root).map_err(StoreError::Object)?.with_fsync(true);
        Ok(TableObjects { objects: Arc::new(objects), root: Some(root), block_bytes: self.block_bytes })
    }

    /// Unit in which the disk allocates space, in bytes. 1 for a bucket.
    pub(super) fn block_bytes(&self) -> u64 {
        self.block_bytes
    }

    /// Returns the size of a segment in bytes, or `None` if there is no such segment.
    pub(super) async fn segment_bytes(&self, id: Ulid) -> Result<Option<u64>, StoreError> {
        let found = unless_missing(self.relaxed.head(&segment_path(id)).await)?;
        Ok(found.map(|found| found.size))
    }

    /// Reads an object, or returns `None` if there is none.
    pub(super) async fn get(&self, key: ObjectKey) -> Result<Option<Bytes>, StoreError> {
        let Some(found) = unless_missing(self.relaxed.get(&key.path()).await)? else { return Ok(None) };
        Ok(Some(found.bytes().await.map_err(StoreError::Object)?))
    }

    /// Removes the object with this name from the directory of an hour, readable or not. A missing object is no error.
    pub(super) async fn delete_in_hour(&self, hour: u64, name: ObjectName) -> Result<(), StoreError> {
        unless_missing(self.relaxed.delete(&name.path(hour)).await).map(drop)
    }

    /// Returns the hours that have objects. Names that are no day and hour do not count.
    pub(super) async fn hours(&self) -> Result<BTreeSet<u64>, StoreError> {
        if let Some(root) = &self.root {
            return local_hours(root);
        }
        hours_in(&*self.relaxed).await
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

    /// Returns the segments and deletions of a bucket with these times in milliseconds, up to `limit` of each hour. One page of names
    /// is one request.
    pub(super) async fn new_between(
        &self,
        times: RangeInclusive<u64>,
        limit: usize,
    ) -> Result<HourObjects, StoreError> {
        let (first, last) = (*times.start(), *times.end());
        let mut found = HourObjects::default();
        for hour in first / HOUR_MS..=last / HOUR_MS {
            let dir = Key::from(hour_path(hour));
            let before = ObjectName::Segment(Ulid::from_parts(first.max(hour * HOUR_MS), 0)).path(hour);
            let mut names = self.relaxed.list_with_offset(Some(&dir), &before).take(limit);
            while let Some(object) = names.try_next().await.map_err(StoreError::Object)? {
                match object.location.filename().and_then(ObjectName::parse) {
                    // Names come in the order of time. The next page would be a request.
                    Some(ObjectName::Segment(id)) if id.timestamp_ms() > last => break,
                    Some(ObjectName::Segment(id)) => found.segments.push(id),
                    Some(ObjectName::Deletion(id)) => found.deletions.push(id),
                    _ => {}
                }
            }
        }
        Ok(found)
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

    /// Reads the metadata of objects of the older layout without their profiles.
    pub(super) async fn heads(&self, hour: u64, ids: &[Ulid]) -> Result<Vec<Head<ObjectMeta>>, StoreError> {
        let heads = ids.iter().map(|id| async move {
            let path = ObjectName::Profile(*id).path(hour);
            let read = self.read_head(&path).await.map(|(head, bytes)| {
                let meta = unpack(&head).map(|(meta, _)| meta);
                (meta.ok_or_else(|| "it is no object, or its metadata is damaged".to_owned()), bytes)
            });
            self.head(&path, read).await
        });
        stream::iter(heads).buffered(CONCURRENT_HEADS).try_collect().await
    }

    /// Reads the index parts of segments without their profiles.
    pub(super) async fn segment_heads(
        &self,
        hour: u64,
        ids: &[Ulid],
    ) -> Result<Vec<Head<SegmentHead>>, StoreError> {
        let heads = ids.iter().map(|id| async move {
            let path = ObjectName::Segment(*id).path(hour);
            let read = self.read_segment_head(&path).await.map(|(head, bytes)| {
                let content = head.and_then(|head| segment::read_head(*id, &head));
                (content.map_err(|error| error.to_string()), bytes)
            });
            self.head(&path, read).await
        });
        stream::iter(heads).buffered(CONCURRENT_HEADS).try_collect().await
    }

    /// Returns the head of an object. `read`: its content or the damage, and the size of the object.
    async fn head<T>(
        &self,
        path: &Key,
        read: Result<(Result<T, String>, u64), object_store::Error>,
    ) -> Result<Head<T>, StoreError> {
        let error = match read {
            Ok((Ok(content), bytes)) => return Ok(Head::Readable { content, bytes }),
            Ok((Err(reason), bytes)) => return Ok(Head::Unreadable { bytes, reason }),
            Err(object_store::Error::NotFound { .. }) => return Ok(Head::Gone),
            Err(error) => error,
        };
        match self.relaxed.head(path).await {
            Err(object_store::Error::NotFound { .. }) => Ok(Head::Gone),
            // A range of an empty object is an error.
            Ok(found) if found.size == 0 => Ok(Head::Unreadable { bytes: 0, reason: "it is empty".into() }),
            // One file that cannot be read must not keep the others out of the index.
            found if self.root.is_some() => {
                Ok(Head::Unreadable { bytes: found.map_or(0, |found| found.size), reason: error.to_string() })
            }
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

/// Returns the hours that have objects in any store. Names that are no day and hour do not count.
pub(super) async fn hours_in(objects: &dyn ObjectStore) -> Result<BTreeSet<u64>, StoreError> {
    let below = async |dir: Key| {
        let found = objects.list_with_delimiter(Some(&dir)).await;
        Ok::<_, StoreError>(found.map_err(StoreError::Object)?.common_prefixes)
    };
    let mut hours = BTreeSet::new();
    for day in below(TENANT.into()).await? {
        hours.extend(below(day).await?.iter().filter_map(hour_of));
    }
    Ok(hours)
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
        // The store writes a file under its name with a number behind it first.
        let is_leftover = name.split_once('#').is_some_and(|(name, _)| ObjectName::parse(name).is_some());
        if is_leftover && fs::remove_file(entry.path()).is_ok() {
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

/// Returns `None` for an object that does not exist.
fn unless_missing<T>(result: Result<T, object_store::Error>) -> Result<Option<T>, StoreError> {
    match result {
        Ok(found) => Ok(Some(found)),
        Err(object_store::Error::NotFound { .. }) => Ok(None),
        Err(error) => Err(StoreError::Object(error)),
    }
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
        let path = segment_path(id);
        assert_eq!(path.as_ref(), "default/2023-11-14/22/01HF7YAT000000000000000002.segment");
        assert_eq!(path.filename().and_then(ObjectName::parse), Some(ObjectName::Segment(id)));
    }
}
