//! Follows a bucket that other collectors write to as well.
//!
//! Two listings share the work. The frequent one finds new segments: their names begin with the time, so it lists only the
//! names around the present. The rare one compares one hour after the other, and also finds removed segments, and those with
//! other times. If it finds the segment of a collector whose clock is wrong, the frequent one lists the names around that
//! time too.
//!
//! A task of its own lists, so a slow bucket does not delay the writer. The writer applies what was listed.

use std::{
    collections::{BTreeSet, VecDeque},
    ops::RangeInclusive,
    sync::Arc,
    time::Duration,
};

use tokio::time::Instant;
use tokio_util::task::AbortOnDropHandle;
use ulid::Ulid;

use super::{Store, StoreError, blocking, object::HourObjects, settle::Repairs};
use crate::time;

/// Distance in milliseconds between the present and the names that the frequent listing reads, in both directions. A segment has
/// the time at which its write began, a write takes up to 20 s with its repetitions, and clocks differ.
const WINDOW_MS: u64 = 60_000;
/// Names that one listing of new segments reads, at most. A page has 1,000, and a collector writes up to 120 in a window before
/// the present.
const MAX_NEW: usize = 4_000;
/// Times of other clocks that the frequent listing follows, at most.
const MAX_CLOCKS: usize = 3;
/// The frequent listing forgets a clock without a new segment after this time.
const CLOCK_TIMEOUT: Duration = Duration::from_secs(600);
/// Hours before the newest two that each rare listing compares, in turn.
const OLD_HOURS: usize = 4;

/// The next listing.
enum Step {
    /// New segments, by the range of their times in milliseconds.
    New(Vec<RangeInclusive<u64>>),
    /// The hours that have objects.
    Hours,
    /// All objects of an hour.
    Hour(u64),
}

/// The result of a listing.
pub(super) enum Listed {
    /// New segments and deletions.
    New(HourObjects),
    /// Hours of the bucket, and known deletions that are carried out.
    Hours(BTreeSet<u64>, Vec<Ulid>),
    Hour(u64, HourObjects),
}

/// The clock of other collectors, as far from the true time as their segments show.
struct OtherClock {
    /// Time of the newest segment, in milliseconds.
    newest_ms: u64,
    /// Arrival of that segment.
    seen: Instant,
}

/// The listings of one bucket.
pub(super) struct Follower {
    store: Arc<Store>,
    next_new: Instant,
    next_hours: Instant,
    /// Hours of the current comparison that are not listed yet.
    hours: VecDeque<u64>,
    /// Number of comparisons, which selects the older hours.
    turn: usize,
    clocks: Vec<OtherClock>,
    /// Deletions that are carried out, which this collector forgets after the present comparison.
    ended: Vec<Ulid>,
    listing: Option<AbortOnDropHandle<Result<Listed, StoreError>>>,
    is_failing: bool,
}

impl Follower {
    pub(super) fn new(store: Arc<Store>) -> Self {
        let now = Instant::now();
        let (next_new, next_hours) =
            (now + store.options.bucket_interval.0, now + store.options.bucket_hours_interval);
        Self {
            store,
            next_new,
            next_hours,
            hours: VecDeque::new(),
            turn: 0,
            clocks: Vec::new(),
            ended: Vec::new(),
            listing: None,
            is_failing: false,
        }
    }

    /// Ends a listing that is under way, which otherwise keeps the store open for a moment.
    pub(super) async fn end(self) {
        if let Some(listing) = self.listing {
            listing.abort();
            let _ = listing.await;
        }
    }

    /// Waits for the next listing and returns its result. Dropping the future loses nothing.
    pub(super) async fn listed(&mut self) -> Result<Listed, StoreError> {
        loop {
            if let Some(listing) = &mut self.listing {
                let listed = listing.await;
                self.listing = None;
                return listed.unwrap_or(Err(StoreError::Ended));
            }
            let now = Instant::now();
            match self.next_step(now, time::now_ms()) {
                Some(step) => {
                    let listing = tokio::spawn(list(Arc::clone(&self.store), step));
                    self.listing = Some(AbortOnDropHandle::new(listing));
                }
                None => tokio::time::sleep_until(self.next_new.min(self.next_hours)).await,
            }
        }
    }

    fn next_step(&mut self, now: Instant, now_ms: u64) -> Option<Step> {
        if now >= self.next_new {
            self.next_new = now + self.store.options.bucket_interval.0;
            return Some(Step::New(self.windows(now, now_ms)));
        }
        if let Some(hour) = self.hours.pop_front() {
            return Some(Step::Hour(hour));
        }
        if now >= self.next_hours {
            self.next_hours = now + self.store.options.bucket_hours_interval;
            return Some(Step::Hours);
        }
        None
    }

    /// Returns the times around which new segments can be.
    fn windows(&mut self, now: Instant, now_ms: u64) -> Vec<RangeInclusive<u64>> {
        self.clocks
            .retain(|clock| clock.seen + CLOCK_TIMEOUT > now && !window(now_ms).contains(&clock.newest_ms));
        let others = self.clocks.iter().map(|clock| clock.newest_ms);
        std::iter::once(now_ms).chain(others).map(window).collect()
    }

    /// Makes the index agree with a listing. Logs and counts a failure.
    pub(super) async fn apply(&mut self, listed: Result<Listed, StoreError>) {
        let applied = match listed {
            Ok(listed) => self.try_apply(listed).await,
            Err(error) => Err(error),
        };
        match applied {
            Ok(()) => self.is_failing = false,
            Err(error) => {
                self.store.metrics.store_errors.inc();
                if !std::mem::replace(&mut self.is_failing, true) {
                    tracing::warn!(%error, "cannot list the bucket or read a segment of it; trying again");
                }
            }
        }
    }

    async fn try_apply(&mut self, listed: Listed) -> Result<(), StoreError> {
        let (store, is_new) = (Arc::clone(&self.store), matches!(listed, Listed::New(_)));
        let Repairs { added, removed, segments, .. } = match listed {
            Listed::Hours(mut hours, ended) => {
                let read = move || Ok::<_, StoreError>((store.index.hours()?, store.doomed_hours()?));
                let (stored, doomed) = blocking(read).await?;
                hours.extend(stored);
                self.hours = self.select(&hours.into_iter().collect::<Vec<_>>());
                if !ended.is_empty() {
                    // Those hours have other segments now.
                    self.hours.extend(doomed);
                    self.ended = ended;
                }
                self.turn = self.turn.wrapping_add(1);
                return Ok(());
            }
            Listed::New(found) => {
                blocking(move || {
                    store.load_deletions(&found.deletions)?;
                    store.add_new_segments(found.segments)
                })
                .await?
            }
            Listed::Hour(hour, objects) => blocking(move || store.follow_hour(hour, objects)).await?,
        };
        if self.hours.is_empty() {
            for id in self.ended.drain(..) {
                self.store.deletions.remove(id);
                self.store.update_size_metrics();
            }
        }
        let by = if is_new { "new" } else { "hours" };
        self.store.metrics.followed(by, segments.len() as u64);
        self.note_clocks(&segments, Instant::now(), time::now_ms());
        if added + removed > 0 {
            tracing::debug!(added, removed, by, "followed the changes of other collectors in the bucket");
            self.store.update_size_metrics();
        }
        Ok(())
    }

    /// Returns the hours to compare of those that have objects or rows, which come in order: the newest two, and some others in
    /// turn.
    fn select(&self, hours: &[u64]) -> VecDeque<u64> {
        let (old, last) = hours.split_at(hours.len().saturating_sub(2));
        let first = self.turn.wrapping_mul(OLD_HOURS) % old.len().max(1);
        let old = old.iter().rev().cycle().skip(first).take(OLD_HOURS.min(old.len()));
        last.iter().rev().chain(old).copied().collect()
    }

    /// Notes the times of new segments that are not around the present.
    fn note_clocks(&mut self, segments: &[Ulid], now: Instant, now_ms: u64) {
        let mut times: Vec<u64> = segments.iter().map(Ulid::timestamp_ms).collect();
        times.sort_unstable();
        for newest_ms in times {
            if window(now_ms).contains(&newest_ms) {
                continue;
            }
            let mut known = self.clocks.iter_mut();
            if let Some(clock) = known.find(|clock| window(clock.newest_ms).contains(&newest_ms)) {
                *clock = OtherClock { newest_ms: clock.newest_ms.max(newest_ms), seen: now };
                continue;
            }
            if self.clocks.len() == MAX_CLOCKS {
                self.clocks.remove(0);
            }
            self.clocks.push(OtherClock { newest_ms, seen: now });
        }
    }
}

fn window(at_ms: u64) -> RangeInclusive<u64> {
    at_ms.saturating_sub(WINDOW_MS)..=at_ms.saturating_add(WINDOW_MS)
}

async fn list(store: Arc<Store>, step: Step) -> Result<Listed, StoreError> {
    Ok(match step {
        Step::New(windows) => {
            let mut found = HourObjects::default();
            for window in windows {
                let HourObjects { segments, deletions, .. } =
                    store.objects.new_between(window, MAX_NEW).await?;
                found.segments.extend(segments);
                found.deletions.extend(deletions);
            }
            Listed::New(found)
        }
        Step::Hours => {
            let mut ended = Vec::new();
            for of in store.deletions.all() {
                if !store.objects.has_deletion(of.id).await? {
                    ended.push(of.id);
                }
            }
            Listed::Hours(store.objects.hours().await?, ended)
        }
        Step::Hour(hour) => Listed::Hour(hour, store.objects.of_hour(hour).await?),
    })
}

#[cfg(test)]
mod tests {
    use super::{super::StoreOptions, *};
    use crate::metrics::Metrics;

    #[tokio::test]
    async fn comparisons_visit_every_hour_in_turn() {
        let dir = tempfile::tempdir().unwrap();
        let mut follower = follower(dir.path()).await;
        let hours: Vec<u64> = (100..117).collect();
        let mut seen = std::collections::BTreeSet::new();
        for turn in 0..4 {
            follower.turn = turn;
            let selected = follower.select(&hours);
            assert_eq!((selected.len(), selected[0], selected[1]), (6, 116, 115));
            seen.extend(selected);
        }
        assert_eq!(seen.into_iter().collect::<Vec<_>>(), hours);
        assert_eq!(follower.select(&[7]), [7]);
        assert!(follower.select(&[]).is_empty());
    }

    #[tokio::test]
    async fn segments_of_wrong_clocks_are_followed_for_a_while() {
        let dir = tempfile::tempdir().unwrap();
        let mut follower = follower(dir.path()).await;
        let (now, now_ms, hour) = (Instant::now(), 1_000_000_000_000, 3_600_000);
        let ids = |times: &[u64]| times.iter().map(|ms| Ulid::from_parts(*ms, 1)).collect::<Vec<_>>();
        let present = window(now_ms);
        follower.note_clocks(&ids(&[now_ms - 5, now_ms + 30_000]), now, now_ms);
        assert_eq!(follower.windows(now, now_ms), std::slice::from_ref(&present));
        // Two clocks, one of which moves on.
        follower.note_clocks(&ids(&[now_ms - hour, now_ms + hour]), now, now_ms);
        let later = now + CLOCK_TIMEOUT / 2;
        follower.note_clocks(&ids(&[now_ms - hour + 3_000]), later, now_ms);
        let (slow, fast) = (window(now_ms - hour + 3_000), window(now_ms + hour));
        assert_eq!(follower.windows(later, now_ms), [present.clone(), slow.clone(), fast]);
        assert_eq!(follower.windows(now + CLOCK_TIMEOUT, now_ms), [present.clone(), slow]);
        // Any number of them takes no more listings than these.
        follower.note_clocks(&ids(&[1, 2 * hour, 3 * hour, 4 * hour, 5 * hour]), now, now_ms);
        assert_eq!(follower.windows(now, now_ms).len(), 1 + MAX_CLOCKS);
    }

    async fn follower(data: &std::path::Path) -> Follower {
        let data = data.to_owned();
        let (options, metrics) = (StoreOptions::default(), Metrics::new());
        let open = move || Store::open(&data, None, &options, metrics);
        let (store, _) = tokio::task::spawn_blocking(open).await.unwrap().unwrap();
        Follower::new(store)
    }
}
