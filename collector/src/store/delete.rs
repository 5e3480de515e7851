//! Permanent deletion of profiles by their labels and times. If a segment also holds other profiles, the deletion writes it again
//! without the deleted ones.
//!
//! No collector runs meanwhile. The next one compares its index with the segments, and finds the new ones. A crash can leave both the
//! new and the old segment. Then the index has each profile once, and the next deletion deletes the rest.

use std::path::Path;

use futures::TryStreamExt as _;
use object_store::ObjectStoreExt as _;
use ulid::Ulid;

use super::{
    Bucket, StoreError,
    describe::describe,
    meta::ObjectMeta,
    object::{Head, HourObjects, ObjectName, Objects, segment_hour},
    segment::{self, PackedBatch, SegmentPosition},
    verify::{open, open_tables},
};
use crate::selector::Selector;

/// Number of index parts that the deletion reads together.
const CHUNK: usize = 64;

/// The profiles of a deletion or an export.
#[derive(Clone)]
pub(crate) struct Chosen {
    pub(crate) selector: Selector,
    /// Earliest start of a profile, in milliseconds since 1970.
    pub(crate) from_ms: u64,
    /// End of the range of starts, exclusive.
    pub(crate) until_ms: u64,
}

/// Totals of a deletion, or of its dry run.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Deleted {
    /// Profiles that match.
    pub profiles: u64,
    /// Bytes of these profiles.
    pub bytes: u64,
    /// Objects that hold them.
    pub objects: u64,
    /// Unreadable objects, which may hold other matching profiles.
    pub unreadable: u64,
    /// The store has Delta tables, which the deletion removes too. The collector writes them again.
    pub has_tables: bool,
}

impl Chosen {
    pub(super) fn matches(&self, meta: &ObjectMeta) -> bool {
        // The callers do not use the size.
        describe(meta, 1, 0).is_some_and(|(labels, key, _)| {
            (self.from_ms..self.until_ms).contains(&key.start_ms) && self.selector.matches(&labels)
        })
    }
}

/// Deletes profiles, or only counts them, and returns the totals. The caller holds the lock of the directory.
pub(crate) async fn delete(
    data: &Path,
    bucket: Option<&Bucket>,
    doomed: &Chosen,
    is_dry: bool,
) -> Result<Deleted, StoreError> {
    // A directory without a store stays as it is.
    open(data, bucket)?;
    let tables = open_tables(data, bucket)?;
    let objects = match bucket {
        Some(bucket) => Objects::in_bucket(bucket)?,
        None => Objects::open(&data.join("objects"))?,
    };
    let (mut deleted, found) = find(&objects, doomed).await?;
    if let Some(tables) = &tables {
        let files = tables.objects.list(None).try_collect::<Vec<_>>().await.map_err(StoreError::Object)?;
        deleted.has_tables = !files.is_empty();
        if !is_dry && !found.is_empty() {
            // The tables go first, so that a crash leaves no deleted profile in a table.
            for file in files {
                match tables.objects.delete(&file.location).await {
                    Ok(()) | Err(object_store::Error::NotFound { .. }) => {}
                    Err(error) => return Err(StoreError::Object(error)),
                }
            }
        }
    }
    if !is_dry {
        for (hour, name) in found {
            if let ObjectName::Segment(id) = name {
                rewrite(&objects, id, doomed).await?;
            }
            objects.delete_in_hour(hour, name).await?;
        }
    }
    Ok(deleted)
}

/// Returns the totals, and the objects with matching batches, each with the hour of its directory.
async fn find(objects: &Objects, doomed: &Chosen) -> Result<(Deleted, Vec<(u64, ObjectName)>), StoreError> {
    let (mut deleted, mut found) = (Deleted::default(), Vec::new());
    for hour in objects.hours().await? {
        let HourObjects { profiles, segments, deletions: _ } = objects.of_hour(hour).await?;
        for ids in profiles.chunks(CHUNK) {
            for (id, head) in ids.iter().zip(objects.heads(hour, ids).await?) {
                match head {
                    Head::Gone => {}
                    Head::Unreadable { .. } => deleted.unreadable += 1,
                    Head::Readable { content: meta, bytes } => {
                        if doomed.matches(&meta) {
                            deleted.profiles += 1;
                            deleted.bytes += bytes;
                            found.push((hour, ObjectName::Profile(*id)));
                        }
                    }
                }
            }
        }
        for ids in segments.chunks(CHUNK) {
            for (id, head) in ids.iter().zip(objects.segment_heads(hour, ids).await?) {
                let entries = match head {
                    Head::Gone => continue,
                    Head::Readable { content, .. } if segment_hour(*id) == hour => content.entries,
                    _ => {
                        deleted.unreadable += 1;
                        continue;
                    }
                };
                let mut gone = entries.iter().filter(|(meta, _)| doomed.matches(meta)).peekable();
                if gone.peek().is_none() {
                    continue;
                }
                found.push((hour, ObjectName::Segment(*id)));
                for (_, position) in gone {
                    deleted.profiles += u64::from(position.bytes > 0);
                    deleted.bytes += position.bytes;
                }
            }
        }
    }
    deleted.objects = found.len() as u64;
    Ok((deleted, found))
}

/// Writes the other batches of a segment as a new segment of the same time. Damaged profiles stay damaged.
async fn rewrite(objects: &Objects, id: Ulid, doomed: &Chosen) -> Result<(), StoreError> {
    let Some(bytes) = objects.segment(id).await? else { return Ok(()) };
    // The search has just read its index part.
    let entries = segment::read_index(id, &bytes).map_err(|_| StoreError::Damaged(id))?;
    let part = |position: &SegmentPosition| {
        let end = usize::try_from(position.range().end).unwrap_or(usize::MAX).min(bytes.len());
        let start = usize::try_from(position.offset).unwrap_or(usize::MAX).min(end);
        bytes.slice(start..end)
    };
    let kept: Vec<PackedBatch> = entries
        .into_iter()
        .filter(|(meta, _)| !doomed.matches(meta))
        .map(|(meta, position)| PackedBatch::kept(meta, part(&position), position.crc))
        .collect();
    if kept.is_empty() {
        return Ok(());
    }
    let new = Ulid::from_parts(id.timestamp_ms(), Ulid::new().random());
    let (parts, _) = segment::build(new, &kept.iter().collect::<Vec<_>>());
    objects.put_segment(new, parts).await.map_err(StoreError::Object)
}
