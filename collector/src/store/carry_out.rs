//! Carries deletions out: writes segments with deleted profiles again without them, and deletes the old ones.
//!
//! The order of the steps makes every crash harmless:
//! 1. The object of the deletion is durable before the caller has the answer, and stays until the last step.
//! 2. A new segment has all other batches of an old one. Its id follows from them, so a second attempt writes it again.
//! 3. One commit of the index moves the rows to the new segment.
//! 4. The old object goes, then its entry in the index.
//! 5. Once no object and no table has a deleted profile, the object of the deletion goes.
//!
//! A crash leaves at most both segments. Then the index has each batch once, and the next attempt continues. A task of its own reads
//! and writes, so a slow bucket does not delay the writer. The writer commits.

use std::{
    collections::{HashMap, HashSet},
    sync::Arc,
    time::Duration,
};

use bytes::Bytes;
use tokio::{
    sync::{mpsc, oneshot},
    time::Instant,
};
use tokio_util::task::AbortOnDropHandle;
use ulid::Ulid;

use super::{
    Chosen, Store, StoreError,
    archive::derived_id,
    blocking,
    change::IndexChange,
    describe::describe,
    hidden::{self, DoomedObject},
    object::{HourObjects, ObjectName, segment_hour},
    segment::{self, PackedBatch, SegmentPosition},
    settle::{Repairs, Successor},
    tombstone::Tombstone,
};
use crate::time;

/// Deletions that wait for the writer.
const QUEUED_DELETIONS: usize = 16;
/// Doomed objects of which a step chooses one.
const DOOMED_CHUNK: usize = 256;
/// Time after a failure until the next attempt.
const RETRY_DELAY: Duration = Duration::from_secs(5);
/// Time between two attempts to complete a deletion while the tables still have deleted rows.
const POLL_INTERVAL: Duration = Duration::from_millis(500);

/// A deletion that waits for the writer.
pub(super) struct DeletionRequest {
    query: String,
    of: Chosen,
    who: String,
    reply: oneshot::Sender<Result<Ulid, StoreError>>,
}

/// The queue of deletions in front of the writer.
#[derive(Clone)]
pub(crate) struct DeletionQueue(mpsc::Sender<DeletionRequest>);

impl DeletionQueue {
    pub(super) fn new() -> (Self, mpsc::Receiver<DeletionRequest>) {
        let (sender, receiver) = mpsc::channel(QUEUED_DELETIONS);
        (Self(sender), receiver)
    }

    /// Deletes profiles. Returns the id of the deletion once it is durable and no query finds them. `query`: the selector as text.
    pub(crate) async fn delete(&self, query: &str, of: Chosen, who: &str) -> Result<Ulid, StoreError> {
        let (reply, answer) = oneshot::channel();
        let request = DeletionRequest { query: query.to_owned(), of, who: who.to_owned(), reply };
        self.0.send(request).await.map_err(|_| StoreError::Ended)?;
        answer.await.map_err(|_| StoreError::Ended)?
    }
}

/// The next thing that the writer does for a deletion.
pub(super) enum Step {
    /// Remove the rows of deleted profiles.
    Hide(Arc<Tombstone>),
    /// Apply the result of the task.
    Done(Result<Done, StoreError>),
}

/// The result of a task.
pub(super) enum Done {
    /// Nothing can be done now.
    Waiting,
    /// A segment has a successor, which has all batches of it but the deleted ones. `None`: there is no such batch.
    Replaced(Ulid, Option<Successor>),
    /// An object is gone.
    Dropped(DoomedObject),
    /// The objects of an hour in which another collector carries a deletion out.
    Compared(u64, HourObjects),
    /// A deletion is carried out.
    Finished(Ulid),
}

/// The work on deletions: at most one task at a time.
pub(super) struct Deleter {
    store: Arc<Store>,
    task: Option<AbortOnDropHandle<Result<Done, StoreError>>>,
    /// Callers who wait until their profiles are hidden.
    callers: HashMap<Ulid, oneshot::Sender<Result<Ulid, StoreError>>>,
    next_attempt: Instant,
    /// Number of tasks so far, which selects an hour.
    turn: usize,
    is_failing: bool,
}

impl Deleter {
    pub(super) fn new(store: Arc<Store>) -> Self {
        let next_attempt = Instant::now();
        Self { store, task: None, callers: HashMap::new(), next_attempt, turn: 0, is_failing: false }
    }

    /// Waits for the next step. Dropping the future loses nothing.
    pub(super) async fn next(&mut self) -> Step {
        loop {
            if let Some(tombstone) = self.store.deletions.next_to_hide() {
                return Step::Hide(tombstone);
            }
            if let Some(task) = &mut self.task {
                let done = task.await;
                self.task = None;
                return Step::Done(done.unwrap_or(Err(StoreError::Ended)));
            }
            if self.store.deletions.is_empty() {
                self.store.deletions.wake.notified().await;
                continue;
            }
            tokio::time::sleep_until(self.next_attempt).await;
            let task = tokio::spawn(work(Arc::clone(&self.store), self.turn));
            self.turn = self.turn.wrapping_add(1);
            self.task = Some(AbortOnDropHandle::new(task));
        }
    }

    /// Writes a deletion durably. Its caller gets the answer once its profiles are hidden.
    pub(super) async fn begin(&mut self, request: DeletionRequest) {
        let DeletionRequest { query, of, who, reply } = request;
        let newest_ms = self.store.newest_own_segment_ms();
        let tombstone = Tombstone::new(self.store.deletions.new_id(newest_ms), &query, &of, &who);
        let id = tombstone.id;
        match self.store.objects.create_deletion(id, tombstone.encode()).await {
            Ok(()) => {
                self.store.deletions.own(id);
                self.store.deletions.add(tombstone);
                self.store.update_size_metrics();
                self.callers.insert(id, reply);
                self.next_attempt = Instant::now();
            }
            Err(error) => {
                self.store.metrics.store_errors.inc();
                // It may be there all the same, and the caller does not know of it.
                let name = ObjectName::Deletion(id);
                if let Err(error) = self.store.objects.delete_in_hour(segment_hour(id), name).await {
                    tracing::warn!(
                        deletion = %id, %error,
                        "cannot remove a deletion whose write failed; it may take effect: list the deletions"
                    );
                }
                let _ = reply.send(Err(StoreError::Object(error)));
            }
        }
    }

    /// Carries out a step. Logs and counts a failure.
    pub(super) async fn apply(&mut self, step: Step) {
        let store = Arc::clone(&self.store);
        let applied = match step {
            Step::Hide(tombstone) => {
                let id = tombstone.id;
                let hidden = blocking(move || store.hide(&tombstone)).await;
                if let Ok(true) = hidden
                    && let Some(reply) = self.callers.remove(&id)
                {
                    let _ = reply.send(Ok(id));
                }
                hidden.map(drop)
            }
            Step::Done(Err(error)) => Err(error),
            Step::Done(Ok(Done::Waiting)) => {
                self.next_attempt = Instant::now() + POLL_INTERVAL;
                return;
            }
            Step::Done(Ok(done @ Done::Compared(..))) => {
                self.next_attempt = Instant::now() + self.store.options.bucket_interval.0;
                blocking(move || store.apply_done(done)).await
            }
            Step::Done(Ok(done)) => blocking(move || store.apply_done(done)).await,
        };
        match applied {
            Ok(()) => self.is_failing = false,
            Err(error) => {
                self.store.metrics.store_errors.inc();
                self.next_attempt = Instant::now() + RETRY_DELAY;
                if !std::mem::replace(&mut self.is_failing, true) {
                    tracing::warn!(%error, "cannot carry out a deletion; trying again");
                }
                if self.store.deletions.next_to_hide().is_some() {
                    // The writer would try again without a pause.
                    tokio::time::sleep(POLL_INTERVAL).await;
                }
            }
        }
    }

    /// Ends a task that is under way, which otherwise keeps the store open for a moment.
    pub(super) async fn end(self) {
        if let Some(task) = self.task {
            task.abort();
            let _ = task.await;
        }
    }
}

/// Runs one step of carrying out deletions, without a change of the index. `turn`: number of steps before.
async fn work(store: Arc<Store>, turn: usize) -> Result<Done, StoreError> {
    let of = Arc::clone(&store);
    let read = move || -> Result<_, StoreError> {
        Ok((of.index.read(|txn| hidden::doomed(txn, DOOMED_CHUNK))?, of.doomed_hours()?))
    };
    let (doomed, hours) = blocking(read).await?;
    let deletions = store.deletions.all();
    if !deletions.iter().any(|of| store.carries_out(of)) {
        // Other segments appear in these hours, and the old ones go.
        if hours.is_empty() {
            return Ok(Done::Waiting);
        }
        let hour = hours[turn % hours.len()];
        return Ok(Done::Compared(hour, store.objects.of_hour(hour).await?));
    }
    // Other collectors list one such hour in each interval.
    let listings = u32::try_from(2 * hours.len()).unwrap_or(u32::MAX);
    let grace = store.deletion_grace(store.options.bucket_interval.0.saturating_mul(listings));
    let now_ms = time::now_ms();
    for object in &doomed {
        match (object.name, object.replaced_ms) {
            (ObjectName::Segment(id), None) => return replace(&store, id).await,
            (_, replaced_ms) => {
                // A time in the future is that of a clock that was set back.
                let age_ms = replaced_ms.map_or(u64::MAX, |at_ms| now_ms.abs_diff(at_ms));
                if age_ms >= grace.as_millis() as u64 {
                    store.objects.remove_durably(object.hour, object.name).await?;
                    return Ok(Done::Dropped(*object));
                }
            }
        }
    }
    if !doomed.is_empty() {
        return Ok(Done::Waiting);
    }
    for of in deletions.iter().filter(|of| store.carries_out(of)) {
        if of.age() >= store.deletion_margin() && store.has_clean_tables(of.id).await? {
            store.objects.remove_durably(of.hour(), ObjectName::Deletion(of.id)).await?;
            if store.objects.is_shared() {
                store.objects.remove_mark(of.id).await?;
            }
            return Ok(Done::Finished(of.id));
        }
    }
    Ok(Done::Waiting)
}

/// Writes the batches of a segment that no deletion takes as a new segment of the same time. Damaged profiles stay damaged.
async fn replace(store: &Arc<Store>, id: Ulid) -> Result<Done, StoreError> {
    let Some(bytes) = store.objects.segment(id).await? else { return Ok(Done::Replaced(id, None)) };
    let head = segment::read_head(id, &bytes).map_err(|_| StoreError::Damaged(id))?;
    let part = |position: &SegmentPosition| -> Bytes {
        let end = usize::try_from(position.range().end).unwrap_or(usize::MAX).min(bytes.len());
        let start = usize::try_from(position.offset).unwrap_or(usize::MAX).min(end);
        bytes.slice(start..end)
    };
    let deletions = store.deletions.all();
    let (mut kept, mut described) = (Vec::new(), Vec::new());
    for (meta, position) in head.entries {
        let Some(entry) = describe(&meta, position.bytes, 0) else { continue };
        let (labels, key, _) = &entry;
        if deletions.iter().any(|of| of.is_after(Some(id)) && of.matches(labels, key.start_ms)) {
            continue;
        }
        kept.push(PackedBatch::kept(meta, part(&position), position.crc));
        described.push(entry);
    }
    if kept.is_empty() {
        return Ok(Done::Replaced(id, None));
    }
    // The old id is a part of it, because two segments can have the same other batches.
    let batches = described.iter().map(|(_, key, _)| key.id);
    let new = derived_id(id.timestamp_ms(), std::iter::once(id).chain(batches));
    let origins: Vec<Ulid> = std::iter::once(id).chain(head.origins).collect();
    let (parts, positions) = segment::build_from(new, &kept.iter().collect::<Vec<_>>(), &origins);
    let bytes = parts.iter().map(|part| part.len() as u64).sum();
    store.objects.put_segment(new, parts).await.map_err(StoreError::Object)?;
    let found = described.into_iter().zip(positions);
    let found = found.map(|((labels, key, row), position)| (labels, key, row.at(position))).collect();
    Ok(Done::Replaced(id, Some(Successor { id: new, bytes, origins, found })))
}

impl Store {
    /// Reports whether this collector carries a deletion out: it took it, or the collector that took it seems to be gone.
    fn carries_out(&self, of: &Tombstone) -> bool {
        let is_late = || of.age() >= self.options.deletion_takeover;
        !self.objects.is_shared() || self.deletions.is_own(of.id) || is_late()
    }

    /// Time for which a replaced segment stays for the other collectors of a bucket, at least this one. A directory has none.
    fn deletion_grace(&self, least: Duration) -> Duration {
        if self.objects.is_shared() { self.options.deletion_grace.max(least) } else { Duration::ZERO }
    }

    /// Returns the time of the newest segment if all are of this collector. In a bucket, other clocks may be ahead.
    fn newest_own_segment_ms(&self) -> u64 {
        if self.objects.is_shared() { 0 } else { self.state.read().newest_segment_ms() }
    }

    /// Reports whether no table has rows of a deletion. Removes tables of a directory that no thread updates.
    async fn has_clean_tables(&self, id: Ulid) -> Result<bool, StoreError> {
        if self.objects.is_shared() {
            return self.objects.has_clean_tables(id).await;
        }
        let (has_thread, is_clean) = self.deletions.tables();
        if has_thread {
            return Ok(is_clean);
        }
        self.objects.remove_unused_tables().await?;
        Ok(true)
    }

    /// Updates the index after a step. Blocking; only the writer calls it.
    fn apply_done(&self, done: Done) -> Result<(), StoreError> {
        match done {
            Done::Waiting => Ok(()),
            Done::Replaced(old, None) => self.note_replaced(old),
            Done::Replaced(old, Some(successor)) => {
                self.move_rows(successor, &mut Repairs::default())?;
                self.note_replaced(old)
            }
            Done::Compared(hour, objects) => {
                let HourObjects { profiles, segments, .. } = &objects;
                let there: HashSet<ObjectName> = (profiles.iter().map(|id| ObjectName::Profile(*id)))
                    .chain(segments.iter().map(|id| ObjectName::Segment(*id)))
                    .collect();
                self.follow_hour(hour, objects)?;
                let doomed = self.index.read(|txn| hidden::doomed_in(txn, hour))?.into_iter();
                let done: Vec<_> =
                    doomed.filter(|name| !there.contains(name)).map(|name| (hour, name)).collect();
                if !done.is_empty() {
                    self.index.commit(&IndexChange { done, ..IndexChange::default() })?;
                }
                Ok(())
            }
            Done::Dropped(DoomedObject { hour, name, .. }) => self.drop_object(hour, name),
            Done::Finished(id) => {
                self.deletions.remove(id);
                self.update_size_metrics();
                tracing::info!(deletion = %id, "a deletion is carried out");
                Ok(())
            }
        }
    }

    /// Notes that an old segment has a successor, and no rows.
    fn note_replaced(&self, old: Ulid) -> Result<(), StoreError> {
        let object = (segment_hour(old), ObjectName::Segment(old));
        let replaced = vec![(object, time::now_ms().max(1))];
        self.index.commit(&IndexChange { replaced, ..IndexChange::default() })?;
        Ok(())
    }

    /// Removes an object that is gone from the index.
    fn drop_object(&self, hour: u64, name: ObjectName) -> Result<(), StoreError> {
        let ObjectName::Segment(id) = name else {
            self.index.commit(&IndexChange { done: vec![(hour, name)], ..IndexChange::default() })?;
            return Ok(());
        };
        self.remove_rows(&self.index.of_segment(id)?, &[id], &mut Repairs::default())?;
        self.update_size_metrics();
        Ok(())
    }
}
