//! The thread that keeps the table up to date.

use std::{
    collections::{BTreeMap, BTreeSet},
    sync::{
        Arc,
        mpsc::{self, Receiver, RecvTimeoutError, SyncSender},
    },
    thread,
    time::{Duration, Instant},
};

use object_store::{ObjectStoreExt as _, PutMode, PutOptions, PutPayload};
use tokio::runtime::Handle;
use tokio_util::sync::CancellationToken;
use ulid::Ulid;

use super::{
    TableError, TableOptions,
    clean::Cleaning,
    compact::{Compacted, MAX_SEGMENTS, SetAside, compact},
    ids::Ids,
    merge::{Merged, Merges},
    partition::Partition,
    retention::Retention,
    tables::Tables,
};
use crate::{
    metrics::Metrics,
    store::{SegmentInfo, Store, StoreError},
    time::{self, HOUR_MS},
};

/// Nice value of the thread: about a tenth of a core beside busy threads. With 19 it would get a sixtieth, and on a busy machine the
/// table would lag behind for good.
const NICE: i32 = 10;
/// Hours whose segments each compaction lists. Segments of older hours are rare: another collector was late, or a clock wrong.
const RECENT_HOURS: u64 = 3;
/// Time between two listings of all segments.
const LISTING_INTERVAL: Duration = Duration::from_secs(600);
/// Age of a segment from which on a listing shows it in any case. The clocks of two collectors may differ by an hour.
const LATE_LISTING: Duration = Duration::from_secs(2 * 3600);
/// Free space of the disk that a compaction needs, beside what the store keeps free.
const NEEDED_BYTES: u64 = 128 << 20;
/// Intervals for which this process leaves a bucket's table to another collector that has written to it.
const STANDBY_INTERVALS: u32 = 3;
/// Time between two steps while the tables have rows of deleted profiles.
const CLEANING_INTERVAL: Duration = Duration::from_secs(1);
/// Object by which the worker tests that a bucket creates objects only once.
const PROBE: &str = "_probe";

/// The running thread.
pub(crate) struct TableHandle {
    stop: CancellationToken,
    /// Wakes the thread when it is dropped.
    ended: SyncSender<()>,
    thread: thread::JoinHandle<()>,
}

impl TableHandle {
    /// Ends the thread, and waits until it has completed the file or commit that it is writing.
    pub(crate) async fn stop(self) {
        let Self { stop, ended, thread } = self;
        stop.cancel();
        drop(ended);
        let _ = tokio::task::spawn_blocking(move || thread.join()).await;
    }
}

/// Starts the thread.
pub(crate) fn start(
    store: Arc<Store>,
    options: &TableOptions,
    metrics: Metrics,
) -> Result<TableHandle, StoreError> {
    store.has_table_thread();
    let stop = CancellationToken::new();
    let (ended, receiver) = mpsc::sync_channel(1);
    let mut worker = Worker::new(store, options.clone(), metrics, stop.clone(), receiver, Handle::current())?;
    let run = move || {
        // The thread has its own value on Linux. A failure costs only the priority.
        let _ = rustix::process::nice(NICE);
        worker.run();
    };
    let thread = thread::Builder::new().name("table".to_owned()).spawn(run).map_err(|source| {
        StoreError::io("start a thread for the table of", std::path::Path::new("--data"), source)
    })?;
    Ok(TableHandle { stop, ended, thread })
}

/// The state of the thread.
struct Worker {
    store: Arc<Store>,
    tables: Tables,
    ids: Ids,
    merges: Merges,
    retention: Retention,
    cleaning: Cleaning,
    options: TableOptions,
    metrics: Metrics,
    stop: CancellationToken,
    ended: Receiver<()>,
    /// Segments that the table lacks, with the space that each takes.
    pending: BTreeMap<Ulid, u64>,
    aside: SetAside,
    next_listing: Instant,
    /// Segments of other collectors that the index does not know yet.
    awaited: BTreeMap<Ulid, Instant>,
    is_checked: bool,
    /// The logs must be read from the start, because the last reading or writing failed.
    is_unsure: bool,
    last_error: Option<(String, Instant)>,
}

impl Worker {
    fn new(
        store: Arc<Store>,
        options: TableOptions,
        metrics: Metrics,
        stop: CancellationToken,
        ended: Receiver<()>,
        runtime: Handle,
    ) -> Result<Self, StoreError> {
        let tables =
            Tables::new(store.table_objects()?, &Ulid::new().to_string(), runtime, options.table_rollups);
        Ok(Self {
            store,
            tables,
            ids: Ids::default(),
            merges: Merges::default(),
            retention: Retention::default(),
            cleaning: Cleaning::default(),
            options,
            metrics,
            stop,
            ended,
            pending: BTreeMap::new(),
            aside: SetAside::default(),
            next_listing: Instant::now(),
            awaited: BTreeMap::new(),
            is_checked: false,
            is_unsure: false,
            last_error: None,
        })
    }

    fn run(&mut self) {
        let interval = self.options.table_interval.0;
        while !self.stop.is_cancelled() {
            let began = Instant::now();
            let has_more = match self.step(began + interval) {
                Ok(has_more) => has_more,
                Err(error) => {
                    self.report(&error);
                    false
                }
            };
            if has_more {
                continue;
            }
            let mut wait = interval.saturating_sub(began.elapsed());
            if self.store.unclean_tables().is_some() {
                wait = wait.min(CLEANING_INTERVAL);
            }
            // Without the handle, the collector has ended.
            if !matches!(self.ended.recv_timeout(wait), Err(RecvTimeoutError::Timeout)) {
                return;
            }
        }
    }

    /// Counts a failure, and logs it unless it is the same as just before.
    fn report(&mut self, error: &TableError) {
        self.metrics.table_failures.inc();
        self.is_unsure = true;
        let text = error.to_string();
        let is_known = self
            .last_error
            .as_ref()
            .is_some_and(|(last, at)| *last == text && at.elapsed() < LISTING_INTERVAL);
        if !is_known {
            tracing::warn!(%error, "cannot bring the table up to date; trying again");
            self.last_error = Some((text, Instant::now()));
        }
    }

    /// Compacts once, then merges files until the next update is due, and runs retention if it is due. Reports whether more segments
    /// wait.
    fn step(&mut self, until: Instant) -> Result<bool, TableError> {
        self.check_bucket()?;
        if std::mem::take(&mut self.is_unsure) {
            self.tables.reload()?;
        }
        self.tables.refresh()?;
        self.list_pending()?;
        let retention_ms = self.store.retention_age().as_millis() as u64;
        let cutoff_ms = time::now_ms().saturating_sub(retention_ms);
        // Of an empty store, the table keeps nothing either: otherwise it alone could exceed `retention_bytes`.
        let oldest_ms = self.store.oldest_start_ms()?.unwrap_or_else(time::now_ms).max(cutoff_ms);
        let oldest = Partition::at(oldest_ms);
        let mut has_more = false;
        if !self.is_on_standby() && !self.pending.is_empty() && !self.awaits_segment()? {
            if !self.store.has_room(NEEDED_BYTES) {
                return Err(TableError::NoRoom);
            }
            let began = Instant::now();
            let compacted = self.compact(oldest)?;
            has_more = !self.pending.is_empty() && compacted.segments > 0;
            let Compacted { segments, profiles, skipped, rows } = compacted;
            tracing::debug!(segments, profiles, rows, skipped, took = ?began.elapsed(), "added profiles to the table");
        }
        if !self.is_on_standby() {
            self.cleaning.run(&self.store, &mut self.tables)?;
            self.merge(if has_more { Instant::now() } else { until })?;
            self.tables.checkpoint()?;
        }
        self.retention.count_written(&mut self.tables, &self.metrics);
        if !self.is_on_standby() {
            self.ids.forget_before(oldest);
            self.retention.run(&mut self.tables, oldest, &self.options)?;
            self.metrics.table_updates.inc();
        }
        self.store.set_table_bytes(self.retention.bytes());
        self.update_metrics();
        if self.last_error.take().is_some() {
            tracing::info!("the table is brought up to date again");
        }
        Ok(has_more)
    }

    fn compact(&mut self, oldest: Partition) -> Result<Compacted, TableError> {
        let pending: Vec<SegmentInfo> = self
            .pending
            .iter()
            .take(MAX_SEGMENTS)
            .map(|(id, bytes)| SegmentInfo { id: *id, disk_bytes: *bytes })
            .collect();
        let stop = self.stop.clone();
        let compacted = compact(
            &self.store,
            &mut self.tables,
            &mut self.ids,
            &pending,
            &mut self.aside,
            oldest,
            &|| stop.is_cancelled(),
        )?;
        self.drop_taken();
        self.metrics.table_rows.inc_by(compacted.rows);
        self.metrics.table_profiles.inc_by(compacted.profiles);
        self.metrics.table_skipped.inc_by(compacted.skipped);
        Ok(compacted)
    }

    /// Merges small files, at least once and then until this time.
    fn merge(&mut self, until: Instant) -> Result<(), TableError> {
        let stop = self.stop.clone();
        // Merges need space before they free some. If space is short, new rows take precedence.
        while self.store.has_room(NEEDED_BYTES) {
            let began = Instant::now();
            let merged =
                self.merges.run(&mut self.tables, &self.options, time::now_ms(), &|| stop.is_cancelled())?;
            let Merged { merges, files, rows } = merged;
            if merges == 0 {
                break;
            }
            self.metrics.table_merges.inc_by(merges);
            self.metrics.table_merged_files.inc_by(files);
            tracing::debug!(merges, files, rows, took = ?began.elapsed(), "merged files of the table");
            if Instant::now() >= until {
                break;
            }
        }
        Ok(())
    }

    /// Finds the segments that the table lacks.
    fn list_pending(&mut self) -> Result<(), TableError> {
        let now = Instant::now();
        if now >= self.next_listing {
            self.aside.unreadable.clear();
            let mut pending = BTreeMap::new();
            for hour in self.store.stored_hours()? {
                for segment in self.store.segments_of(hour..hour + 1)? {
                    if !self.is_done(segment.id) {
                        pending.insert(segment.id, segment.disk_bytes);
                    }
                }
            }
            self.pending = pending;
            self.next_listing = now + LISTING_INTERVAL;
            return Ok(());
        }
        let hour = time::now_ms() / HOUR_MS;
        for segment in self.store.segments_of(hour.saturating_sub(RECENT_HOURS - 1)..hour + 2)? {
            if !self.is_done(segment.id) {
                self.pending.insert(segment.id, segment.disk_bytes);
            }
        }
        self.drop_taken();
        Ok(())
    }

    fn is_done(&self, id: Ulid) -> bool {
        let SetAside { empty, unreadable, .. } = &self.aside;
        !self.tables.wants_any(&self.store.segment_names(id)).any()
            || empty.contains(&id)
            || unreadable.contains(&id)
    }

    fn drop_taken(&mut self) {
        let mut pending = std::mem::take(&mut self.pending);
        pending.retain(|id, _| !self.is_done(*id));
        self.pending = pending;
    }

    /// Reports whether another collector writes the table of a bucket.
    fn is_on_standby(&self) -> bool {
        let standby = self.options.table_interval.0 * STANDBY_INTERVALS;
        self.tables.objects.root.is_none()
            && self.tables.samples.other_writer().is_some_and(|other| {
                // A time in the future is that of a wrong clock.
                time::now_ms().abs_diff(other.at_ms) < standby.as_millis() as u64
            })
    }

    /// Reports whether the tables have a segment of another collector that the index does not know yet, because the listing of the bucket
    /// is late. The segment may hold batches of pending segments, too.
    fn awaits_segment(&mut self) -> Result<bool, TableError> {
        if self.tables.objects.root.is_some() {
            return Ok(false);
        }
        let first = Ulid::from_parts(time::now_ms().saturating_sub(LATE_LISTING.as_millis() as u64), 0);
        let taken = self.tables.samples.taken_from(first).chain(self.tables.profiles.taken_from(first));
        let taken: BTreeSet<Ulid> = taken.collect();
        let unknown = self.store.unknown_segments(taken);
        self.awaited.retain(|id, _| unknown.contains(id));
        for id in unknown {
            let since = *self.awaited.entry(id).or_insert_with(Instant::now);
            if since.elapsed() < LISTING_INTERVAL && self.store.has_segment(id)? {
                tracing::debug!(segment = %id, "the table waits for the listing of a segment");
                return Ok(true);
            }
        }
        Ok(false)
    }

    /// Checks once that the bucket creates an object only once, on which the commits rely.
    fn check_bucket(&mut self) -> Result<(), TableError> {
        if self.is_checked || self.tables.objects.root.is_some() {
            return Ok(());
        }
        let objects = Arc::clone(&self.tables.objects.objects);
        let probe = object_store::path::Path::from(PROBE);
        let payload = || PutPayload::from_static(b"gannet");
        let create = PutOptions { mode: PutMode::Create, ..PutOptions::default() };
        let created = self.tables.runtime.block_on(async {
            objects.put(&probe, payload()).await?;
            objects.put_opts(&probe, payload(), create).await
        });
        match created {
            Err(object_store::Error::AlreadyExists { .. }) => {}
            Ok(_) => return Err(TableError::Unconditional),
            Err(error) => return Err(TableError::Object(error)),
        }
        self.is_checked = true;
        Ok(())
    }

    fn update_metrics(&mut self) {
        self.metrics.table_damaged.set(self.merges.damaged(&mut self.tables) as i64);
        let files: usize = self.tables.all().iter().map(|log| log.files.len()).sum();
        self.metrics.table_data_files.set(files as i64);
        let oldest = self.pending.keys().next().map(|id| time::now_ms().saturating_sub(id.timestamp_ms()));
        self.metrics.table_debt_bytes.set(self.pending.values().sum::<u64>() as i64);
        self.metrics.table_debt_seconds.set(oldest.unwrap_or(0) as i64 / 1000);
        self.metrics.table_unreadable.set(self.aside.unreadable.len() as i64);
        self.metrics.table_bytes.set(self.retention.bytes() as i64);
    }
}
