//! Import of an exported file. It adds segments and changes none, so it can be repeated after an interruption.
//!
//! A segment keeps its id, so the same file again adds nothing. Two exports can hold different parts of one segment, which have
//! its time. So the import reads the segments of the same time in the store, and leaves out batches that are in one of them.

use std::{
    collections::{BTreeMap, HashSet},
    fs::{self, File},
    io::{BufReader, Seek as _},
    path::Path,
};

use ulid::Ulid;

use super::{
    Bucket, StoreError,
    archive::{ArchiveError, ArchiveReader, ArchivedSegment, derived_id, part},
    describe::describe,
    lock,
    object::{Head, HourObjects, Objects, segment_hour},
    segment::{self, PackedBatch},
    tombstone::Tombstone,
};

/// Hours whose objects the import remembers. Profiles are of hours before that of their segment.
const MAX_HOURS: usize = 48;
/// Bytes of one read of the file.
const READ_BYTES: usize = 1 << 20;

/// Totals of an import.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Imported {
    /// Profiles that the import added.
    pub added: u64,
    /// Bytes of these profiles.
    pub bytes: u64,
    /// Profiles that the store had already.
    pub known: u64,
    /// Profiles of the file that are older than the retention, which the collector removes.
    pub expired: u64,
}

/// The reason why an import failed. It may have added some segments; the same call adds the rest.
#[derive(Debug, thiserror::Error)]
pub enum ImportError {
    /// A fault of the file, of which nothing is imported.
    #[error(transparent)]
    File(#[from] ArchiveError),
    /// A deletion would take profiles of the file, and it is not carried out yet. Nothing is imported.
    #[error(
        "the file has profiles of the deletion {id} ({query}), which is not carried out yet and would delete them again; start the \
         collector, wait until `gannetctl profiles deletions` does not list it, and import then; or import into another store"
    )]
    Deleted {
        /// Id of the deletion.
        id: Ulid,
        /// The selector of the deletion, as text.
        query: String,
    },
    /// An error of the store.
    #[error(transparent)]
    Store(#[from] StoreError),
}

/// Checks a file, and then adds its segments to a store, which it creates if needed. `oldest_ms`: earliest start of a profile that
/// retention keeps. Calls `progress` from time to time. Fails if a collector uses the directory. Collectors of a bucket may run.
pub(crate) async fn import(
    data: &Path,
    bucket: Option<&Bucket>,
    mut file: File,
    oldest_ms: u64,
    mut progress: impl FnMut(&Imported),
) -> Result<Imported, ImportError> {
    // A damaged file changes nothing.
    ArchiveReader::new(BufReader::with_capacity(READ_BYTES, &file))
        .read(async |_| Ok::<_, ArchiveError>(()))
        .await?;
    file.rewind().map_err(ArchiveError::Io)?;
    let (_lock, objects) = if let Some(bucket) = bucket {
        (None, Objects::in_bucket(bucket)?)
    } else {
        fs::create_dir_all(data).map_err(|e| StoreError::io("create the directory --data", data, e))?;
        (Some(lock(data)?), Objects::open(&data.join("objects"))?)
    };
    let deletions = deletions(&objects).await.map_err(|error| error.of_bucket(bucket))?;
    if !deletions.is_empty() {
        let mut deleted = None;
        let reader = ArchiveReader::new(BufReader::with_capacity(READ_BYTES, &file));
        let read = reader.read(async |ArchivedSegment { id, entries, .. }| {
            let takes =
                |of: &&Tombstone| of.is_after(Some(id)) && entries.iter().any(|(meta, _)| of.takes(meta));
            if let Some(of) = deletions.iter().find(takes) {
                deleted = Some((of.id, of.query.clone()));
            }
            Ok::<_, ArchiveError>(())
        });
        read.await?;
        if let Some((id, query)) = deleted {
            return Err(ImportError::Deleted { id, query });
        }
        file.rewind().map_err(ArchiveError::Io)?;
    }
    let mut import = Import { objects, hours: BTreeMap::new(), oldest_ms, totals: Imported::default() };
    let added = ArchiveReader::new(BufReader::with_capacity(READ_BYTES, &file)).read(async |segment| {
        import.add(segment).await.map_err(|error| error.of_bucket(bucket))?;
        progress(&import.totals);
        Ok::<_, ImportError>(())
    });
    added.await?;
    Ok(import.totals)
}

/// Returns the deletions that no collector has carried out yet.
async fn deletions(objects: &Objects) -> Result<Vec<Tombstone>, StoreError> {
    let mut found = Vec::new();
    for hour in objects.hours().await? {
        for id in objects.of_hour(hour).await?.deletions {
            found.extend(Tombstone::read(objects, id).await?);
        }
    }
    Ok(found)
}

/// The objects in the directory of one hour.
#[derive(Default)]
struct Hour {
    /// Segments by the milliseconds of their ids.
    segments: BTreeMap<u64, Vec<Ulid>>,
    /// Objects of the older layout, each of one batch.
    profiles: HashSet<Ulid>,
}

struct Import {
    objects: Objects,
    /// The hours of the last segments. The segments of a file come in the order of hours.
    hours: BTreeMap<u64, Hour>,
    oldest_ms: u64,
    totals: Imported,
}

impl Import {
    /// Adds those batches of a segment that the store does not have.
    async fn add(&mut self, archived: ArchivedSegment) -> Result<(), StoreError> {
        let ArchivedSegment { id, bytes, entries } = archived;
        let hour = segment_hour(id);
        let siblings = self.hour(hour).await?.segments.get(&id.timestamp_ms()).cloned().unwrap_or_default();
        let is_there =
            siblings.contains(&id) && self.objects.segment_bytes(id).await? == Some(bytes.len() as u64);
        // A segment of this name and another size is cut, and its copy replaces it.
        let others: Vec<Ulid> = siblings.into_iter().filter(|other| *other != id).collect();
        let known = if is_there { HashSet::new() } else { self.batches_of(hour, &others).await? };
        let all = entries.len();
        let (mut kept, mut ids) = (Vec::new(), Vec::new());
        for (meta, position) in entries {
            let Some((_, key, _)) = describe(&meta, position.bytes, 0) else { continue };
            let is_profile = u64::from(position.bytes > 0);
            self.totals.expired += if key.start_ms < self.oldest_ms { is_profile } else { 0 };
            if is_there || known.contains(&key.id) || self.hour(key.hour()).await?.profiles.contains(&key.id)
            {
                self.totals.known += is_profile;
                continue;
            }
            let pprof = part(&bytes, &position).ok_or(StoreError::Damaged(key.id))?;
            self.totals.added += is_profile;
            self.totals.bytes += position.bytes;
            ids.push(key.id);
            kept.push(PackedBatch::kept(meta, pprof, position.crc));
        }
        if kept.is_empty() {
            return Ok(());
        }
        let (new, parts) = if kept.len() == all {
            (id, vec![bytes])
        } else {
            let new = derived_id(id.timestamp_ms(), ids.into_iter());
            (new, segment::build(new, &kept.iter().collect::<Vec<_>>()).0)
        };
        self.objects.put_segment(new, parts).await.map_err(StoreError::Object)?;
        self.hour(hour).await?.segments.entry(new.timestamp_ms()).or_default().push(new);
        Ok(())
    }

    /// Returns the objects of an hour, which it lists once for a run of segments.
    async fn hour(&mut self, hour: u64) -> Result<&mut Hour, StoreError> {
        if !self.hours.contains_key(&hour) {
            let HourObjects { profiles, segments, deletions: _ } = self.objects.of_hour(hour).await?;
            let mut listed = Hour { profiles: profiles.into_iter().collect(), ..Hour::default() };
            for id in segments {
                listed.segments.entry(id.timestamp_ms()).or_default().push(id);
            }
            if self.hours.len() == MAX_HOURS {
                self.hours.pop_first();
            }
            self.hours.insert(hour, listed);
        }
        Ok(self.hours.entry(hour).or_default())
    }

    /// Returns the ids of the batches in some segments. An unreadable segment has none.
    async fn batches_of(&self, hour: u64, segments: &[Ulid]) -> Result<HashSet<Ulid>, StoreError> {
        let mut batches = HashSet::new();
        for head in self.objects.segment_heads(hour, segments).await? {
            if let Head::Readable { content, .. } = head {
                let ids =
                    content.entries.iter().filter_map(|(meta, position)| describe(meta, position.bytes, 0));
                batches.extend(ids.map(|(_, key, _)| key.id));
            }
        }
        Ok(batches)
    }
}
