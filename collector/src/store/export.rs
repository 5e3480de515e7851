//! Export of profiles by their labels and times into one file. It changes nothing in the store, and may run beside a collector.

use std::{
    fs::{self, File},
    io::{BufWriter, Write},
    path::{Path, PathBuf},
    sync::Arc,
};

use bytes::Bytes;
use futures::{StreamExt as _, stream};
use ulid::Ulid;

use super::{
    Bucket, Chosen, StoreError,
    archive::{ArchiveWriter, derived_id},
    describe::describe,
    meta::ObjectMeta,
    object::{HOUR_MS, Head, HourObjects, ObjectKey, Objects, unpack},
    segment::{self, PackedBatch, SegmentPosition},
    tombstone::Tombstone,
    verify::{is_gzip, open},
};

/// Objects whose descriptions are read at the same time.
const CONCURRENT_HEADS: usize = 16;
/// Bytes of profiles in one segment of the file. A collector writes no larger ones.
const SEGMENT_BYTES: u64 = 32 << 20;
/// Segments that are this much older than the range hold none of its profiles: a profile starts before its segment is
/// written, unless clocks are wrong.
const MARGIN_MS: u64 = 24 * HOUR_MS;

/// Totals of an export.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Exported {
    /// Profiles in the file.
    pub profiles: u64,
    /// Bytes of these profiles.
    pub bytes: u64,
    /// Matching profiles that are damaged, and not in the file.
    pub damaged: u64,
    /// Unreadable objects, which may hold other matching profiles.
    pub unreadable: u64,
    /// Objects read so far.
    pub objects: u64,
}

/// A matching batch, in the form of a segment.
struct Found {
    id: Ulid,
    packed: PackedBatch,
    has_profile: bool,
}

/// Writes all matching profiles into a file, and replaces an existing one at the end. Calls `progress` from time to time.
pub(crate) async fn export(
    data: &Path,
    bucket: Option<&Bucket>,
    wanted: &Chosen,
    query: &str,
    file: &Path,
    progress: impl FnMut(&Exported),
) -> Result<Exported, StoreError> {
    let objects = Arc::new(Objects::to_read(open(data, bucket)?));
    let partial = partial_of(file);
    let failed = |source| StoreError::io("write", &partial, source);
    let out = File::create(&partial).map_err(failed)?;
    let written = async {
        let archive = ArchiveWriter::new(BufWriter::new(out), query, wanted.from_ms, wanted.until_ms)
            .map_err(failed)?;
        let mut export = Export {
            objects,
            wanted,
            archive,
            partial: &partial,
            is_bucket: bucket.is_some(),
            deletions: Vec::new(),
            totals: Exported::default(),
            progress,
        };
        export.run().await.map_err(|error| error.of_bucket(bucket))?;
        let mut out = export.archive.finish().map_err(failed)?;
        out.flush().map_err(failed)?;
        out.get_ref().sync_all().map_err(failed)?;
        fs::rename(&partial, file).map_err(failed)?;
        Ok(export.totals)
    };
    written.await.inspect_err(|_| drop(fs::remove_file(&partial)))
}

/// Returns the name of a file while it is written.
fn partial_of(file: &Path) -> PathBuf {
    let mut name = file.as_os_str().to_owned();
    name.push(".partial");
    name.into()
}

struct Export<'a, P> {
    objects: Arc<Objects>,
    wanted: &'a Chosen,
    archive: ArchiveWriter<BufWriter<File>>,
    partial: &'a Path,
    is_bucket: bool,
    /// Deletions that no collector has carried out yet.
    deletions: Vec<Tombstone>,
    totals: Exported,
    progress: P,
}

impl<P: FnMut(&Exported)> Export<'_, P> {
    async fn run(&mut self) -> Result<(), StoreError> {
        // A deletion takes profiles of all hours before it, so all lists come first.
        let mut hours = Vec::new();
        for hour in self.objects.hours().await? {
            if (hour + 1) * HOUR_MS + MARGIN_MS <= self.wanted.from_ms {
                continue;
            }
            let mut objects = self.objects.of_hour(hour).await?;
            for id in std::mem::take(&mut objects.deletions) {
                self.deletions.extend(Tombstone::read(&self.objects, id).await?);
            }
            hours.push((hour, objects));
        }
        for (hour, HourObjects { profiles, segments, .. }) in hours {
            self.older_profiles(hour, profiles).await?;
            let objects = Arc::clone(&self.objects);
            let heads = stream::iter(segments).map(|id| {
                let objects = &objects;
                async move { (id, objects.segment_heads(hour, &[id]).await.map(|mut heads| heads.pop())) }
            });
            let mut heads = heads.buffered(CONCURRENT_HEADS);
            while let Some((id, head)) = heads.next().await {
                self.totals.objects += 1;
                match head {
                    Ok(Some(Head::Readable { content, .. })) => self.segment(id, content.entries).await?,
                    Ok(None | Some(Head::Gone)) => {}
                    Err(error) if self.is_bucket => return Err(error),
                    Ok(Some(Head::Unreadable { .. })) | Err(_) => self.totals.unreadable += 1,
                }
                (self.progress)(&self.totals);
            }
        }
        Ok(())
    }

    /// Reports whether a batch matches and is not deleted. `segment`: where it is, or `None` for an object of its own.
    fn is_wanted(&self, meta: &ObjectMeta, segment: Option<Ulid>) -> bool {
        let is_deleted = |of: &Tombstone| of.is_after(segment) && of.takes(meta);
        self.wanted.matches(meta) && !self.deletions.iter().any(is_deleted)
    }

    /// Adds the matching batches of a segment.
    async fn segment(
        &mut self,
        id: Ulid,
        entries: Vec<(ObjectMeta, SegmentPosition)>,
    ) -> Result<(), StoreError> {
        let all = entries.len();
        let matching = entries.into_iter().filter(|(meta, _)| self.is_wanted(meta, Some(id)));
        let matching: Vec<_> = matching.collect();
        let mut pieces: Vec<Vec<_>> = Vec::new();
        let mut bytes = u64::MAX;
        for (meta, position) in matching {
            bytes = bytes.saturating_add(position.bytes);
            match pieces.last_mut() {
                Some(piece) if bytes <= SEGMENT_BYTES => piece.push((meta, position)),
                _ => {
                    bytes = position.bytes;
                    pieces.push(vec![(meta, position)]);
                }
            }
        }
        for piece in pieces {
            let Some(profiles) = self.profiles(id, &piece).await? else { return Ok(()) };
            let mut found = Vec::with_capacity(piece.len());
            for ((meta, position), pprof) in piece.into_iter().zip(profiles) {
                let batch = describe(&meta, position.bytes, 0).map(|(_, key, _)| key.id);
                match (batch, pprof) {
                    (Some(batch), Some(pprof)) if crc32fast::hash(&pprof) == position.crc => {
                        found.push(Found {
                            id: batch,
                            packed: PackedBatch::kept(meta, pprof, position.crc),
                            has_profile: position.bytes > 0,
                        });
                    }
                    _ => self.totals.damaged += 1,
                }
            }
            // A complete segment keeps its id, so that its own store knows it.
            let same = (found.len() == all).then_some(id);
            self.write(id.timestamp_ms(), same, &found)?;
        }
        Ok(())
    }

    /// Reads some profiles of a segment, those that are cut off as `None`. Returns `None` if retention has removed the segment.
    async fn profiles(
        &self,
        id: Ulid,
        piece: &[(ObjectMeta, SegmentPosition)],
    ) -> Result<Option<Vec<Option<Bytes>>>, StoreError> {
        let ranges: Vec<_> = piece.iter().map(|(_, position)| position.range()).collect();
        match self.read(id, &ranges).await {
            Ok(found) => return Ok(found.map(|parts| parts.into_iter().map(Some).collect())),
            // One by one, because the object may be cut.
            Err(_) if ranges.len() > 1 => {}
            Err(error) => return self.unless_cut(id, &ranges[0], error).await.map(|()| Some(vec![None])),
        }
        let mut parts = Vec::with_capacity(ranges.len());
        for range in ranges {
            match self.read(id, std::slice::from_ref(&range)).await {
                Ok(Some(found)) => parts.extend(found.into_iter().map(Some)),
                Ok(None) => return Ok(None),
                Err(error) => {
                    self.unless_cut(id, &range, error).await?;
                    parts.push(None);
                }
            }
        }
        Ok(Some(parts))
    }

    /// Reads ranges of a segment. Batches with only a ledger have none.
    async fn read(
        &self,
        id: Ulid,
        ranges: &[std::ops::Range<u64>],
    ) -> Result<Option<Vec<Bytes>>, StoreError> {
        let filled: Vec<_> = ranges.iter().filter(|range| !range.is_empty()).cloned().collect();
        let found = if filled.is_empty() {
            Some(Vec::new())
        } else {
            self.objects.segment_ranges(id, &filled).await?
        };
        let Some(found) = found else { return Ok(None) };
        let mut found = found.into_iter();
        let parts = ranges
            .iter()
            .map(|range| if range.is_empty() { Bytes::new() } else { found.next().unwrap_or_default() });
        Ok(Some(parts.collect()))
    }

    /// Returns the error of a bucket, unless the segment ends before the range. One file that cannot be read must not end the export.
    async fn unless_cut(
        &self,
        id: Ulid,
        range: &std::ops::Range<u64>,
        error: StoreError,
    ) -> Result<(), StoreError> {
        match self.objects.segment_bytes(id).await? {
            Some(bytes) if self.is_bucket && bytes >= range.end => Err(error),
            _ => Ok(()),
        }
    }

    /// Adds the matching objects of the older layout, as segments with the time of their hour.
    async fn older_profiles(&mut self, hour: u64, mut ids: Vec<Ulid>) -> Result<(), StoreError> {
        if hour * HOUR_MS >= self.wanted.until_ms || (hour + 1) * HOUR_MS <= self.wanted.from_ms {
            return Ok(());
        }
        ids.sort_unstable();
        let (mut found, mut bytes) = (Vec::new(), 0);
        for id in ids {
            self.totals.objects += 1;
            // The path of these objects has the hour of their start.
            let object = match self.objects.get(ObjectKey { start_ms: hour * HOUR_MS, id }).await {
                Ok(Some(object)) => object,
                Ok(None) => continue,
                Err(error) if self.is_bucket => return Err(error),
                Err(_) => {
                    self.totals.unreadable += 1;
                    continue;
                }
            };
            let Some((meta, offset)) = unpack(&object).filter(|(_, offset)| *offset <= object.len()) else {
                self.totals.unreadable += 1;
                continue;
            };
            if !self.is_wanted(&meta, None) {
                continue;
            }
            let pprof = object.slice(offset..);
            if !is_gzip(pprof.clone()).await {
                self.totals.damaged += 1;
                continue;
            }
            bytes += pprof.len() as u64;
            let has_profile = !pprof.is_empty();
            found.push(Found { id, packed: PackedBatch::new(meta, pprof), has_profile });
            if bytes >= SEGMENT_BYTES {
                self.write(hour * HOUR_MS, None, &std::mem::take(&mut found))?;
                bytes = 0;
            }
            (self.progress)(&self.totals);
        }
        self.write(hour * HOUR_MS, None, &found)
    }

    /// Adds batches as a segment of this time, with this id if they are a complete one.
    fn write(&mut self, timestamp_ms: u64, same: Option<Ulid>, found: &[Found]) -> Result<(), StoreError> {
        if found.is_empty() {
            return Ok(());
        }
        let id = same.unwrap_or_else(|| derived_id(timestamp_ms, found.iter().map(|found| found.id)));
        let (parts, positions) =
            segment::build(id, &found.iter().map(|found| &found.packed).collect::<Vec<_>>());
        let added = self.archive.add_segment(id, &parts, found.len());
        added.map_err(|source| StoreError::io("write", self.partial, source))?;
        self.totals.profiles += found.iter().filter(|found| found.has_profile).count() as u64;
        self.totals.bytes += positions.iter().map(|position| position.bytes).sum::<u64>();
        Ok(())
    }
}
