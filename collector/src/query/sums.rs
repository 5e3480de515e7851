//! Flame graphs and tables of functions from the tables of sums: exact, or not from them.
//!
//! A sum has no labels of samples, and of the labels of profiles only the service, or service, namespace and pod. So it serves selections
//! by these alone. A query takes the sums of a minute (or hour) and service if the index proves that they are those of the selected
//! profiles: the minute lies in the range, the table has the segments of all its profiles, and each sample type has the same total in
//! both. Otherwise it reads the profiles. So late, deleted and damaged profiles, and a table that lags behind, change no answer.

use std::{
    collections::{BTreeMap, BTreeSet, HashMap, HashSet},
    ops::Bound,
    sync::{Arc, atomic::Ordering},
};

use gannet_proto::{
    labels::{self, Labels},
    pprof::{Builder, GUESSED_FROM, Header},
    profiles::Profile,
};
use sha2::{Digest as _, Sha256};
use tokio::runtime::Handle;
use tokio_util::sync::CancellationToken;
use ulid::Ulid;

use super::{
    Query, QueryError, QueryOptions,
    merge::{MergeProgress, Merged, check_stacks},
    select::{Found, Profiles, Selection, above_limits, within_limits},
};
use crate::{
    selector::Selector,
    store::{ProfileLocation, StoreError, StoredProfile},
    table::{Grain, LabelSet, StackSum, SumRow, SumTables, TableError, TableFrame, fill},
    time::HOUR_MS,
};

/// Profiles of one selection at most, of which a query reads sums: it reads all their index entries.
const MAX_PROFILES: u64 = 20_000_000;
/// Rows of one hour that are in memory together, about 48 bytes each. An hour with more is read profile by profile.
const MAX_ROWS_OF_HOUR: usize = 2_000_000;
/// Frames of all stacks of one answer.
const MAX_FRAMES: usize = 32_000_000;
/// Time by which a segment may be older than a profile in it. A node's clock may be wrong.
const MAX_SKEW_MS: u64 = 24 * HOUR_MS;

/// Labels that series with one sum have in common. Empty: no such label, or not part of the table.
#[derive(Clone, PartialEq, Eq, Hash, PartialOrd, Ord)]
struct Group {
    service: String,
    namespace: String,
    pod: String,
}

impl Group {
    fn of(labels: &Labels, grain: Grain) -> Self {
        let label = |name| labels.get(name).cloned().unwrap_or_default();
        let pod_label = |name| if grain == Grain::Hour { label(name) } else { String::new() };
        Self {
            service: label(labels::SERVICE_NAME),
            namespace: pod_label(labels::NAMESPACE),
            pod: pod_label(labels::POD),
        }
    }
}

/// Returns the table whose sums have all labels of a selector.
fn grain_of(selector: &Selector) -> Option<Grain> {
    let has_only = |names: &[&str]| selector.matchers().iter().all(|matcher| names.contains(&matcher.name()));
    if has_only(&[labels::SERVICE_NAME]) {
        Some(Grain::Minute)
    } else if has_only(&[labels::SERVICE_NAME, labels::NAMESPACE, labels::POD]) {
        Some(Grain::Hour)
    } else {
        None
    }
}

/// The sample types of some profiles, as a table of sums has them.
struct RowTypes {
    types: Vec<String>,
    /// The first of two values counts the samples of the second, so one row has both.
    counts: bool,
}

impl RowTypes {
    fn of(types: &[String]) -> Self {
        let is_count = |name: &String| name.split_once('/').is_some_and(|(_, unit)| unit == "count");
        let counts = matches!(types, [first, second] if is_count(first) && !is_count(second));
        Self { types: types.to_vec(), counts }
    }

    /// Returns the types of the rows.
    fn rows(&self) -> &[String] {
        &self.types[usize::from(self.counts)..]
    }

    /// Reports whether the rows of each type are known by its name.
    fn are_plain(&self) -> bool {
        let names: BTreeSet<&String> = self.rows().iter().collect();
        names.len() == self.rows().len() && self.types.iter().all(|name| name.matches('/').count() == 1)
    }

    /// Reports whether profiles with these other types have rows of the same type.
    fn clash_with(&self, other: &[String]) -> bool {
        let other = Self::of(other);
        other.types != self.types && other.rows().iter().any(|name| self.rows().contains(name))
    }

    /// Returns the index of the type of a row.
    fn row_index(&self, name: &[u8]) -> Option<usize> {
        self.rows().iter().position(|of| of.as_bytes() == name)
    }
}

/// The index entries of a selection, before a query reads any profile or sum.
struct Survey {
    grain: Grain,
    from_ms: u64,
    until_ms: u64,
    /// Ids of the series, each with the index of its group.
    series: Vec<(u64, u32)>,
    groups: Vec<Group>,
    /// Indexes of the series that have profiles in an hour.
    hours: BTreeMap<u64, Vec<u32>>,
    kinds: Vec<SurveyedKind>,
}

/// Profiles with the same sample types.
struct SurveyedKind {
    types: Vec<String>,
    first_ms: u64,
    profiles: u64,
    /// Hash of all ids.
    ids: Sha256,
}

/// Returns the names of the sample types of a profile.
fn types_of(entry: &StoredProfile) -> impl Iterator<Item = &String> + Clone {
    entry.row.types.iter().map(|of| &of.name)
}

impl Query {
    /// Merges the selected samples like [`Query::merged`], but without the labels of samples that [`gannet_proto::pprof::FlameTree`]
    /// ignores. Reads sums where they are exact. Dropping the future ends the work.
    pub(super) async fn merged_for_view(
        self: &Arc<Self>,
        selection: &Selection,
        sample_type: &str,
        progress: &Arc<MergeProgress>,
    ) -> Result<Option<(Arc<Merged>, String)>, QueryError> {
        let merged = self.merged_with_sums(selection, sample_type, progress).await?;
        match merged {
            Some(merged) => Ok(Some(merged)),
            None => self.merged(selection, sample_type, progress).await,
        }
    }

    /// Returns `None` if sums cannot help.
    async fn merged_with_sums(
        self: &Arc<Self>,
        selection: &Selection,
        sample_type: &str,
        progress: &Arc<MergeProgress>,
    ) -> Result<Option<(Arc<Merged>, String)>, QueryError> {
        let Some(sums) = self.sums.as_ref().filter(|_| self.clickhouse.is_none()) else { return Ok(None) };
        let Profiles::Range { selector, from_ms, until_ms } = &selection.of else { return Ok(None) };
        let Some(grain) = grain_of(selector).filter(|_| selection.has_all_samples()) else {
            return Ok(None);
        };
        let cancelled = CancellationToken::new();
        let _guard = cancelled.clone().drop_guard();
        let (of, token) = (selector.clone(), cancelled.clone());
        let range = (*from_ms, *until_ms);
        let surveyed = self.blocking(move |q| q.survey(&of, range, grain, &token)).await?;
        let Some(survey) = surveyed else { return Ok(None) };
        let mut found = Found::default();
        for kind in &survey.kinds {
            found.add_kind(&kind.types, kind.first_ms);
        }
        let Some(chosen) = found.mergeable(selection, sample_type)?.into_iter().next() else {
            return Ok(None);
        };
        let (types, sample_type) = (RowTypes::of(chosen.types()), chosen.sample_type().to_owned());
        let Some(kind) = survey.kinds.iter().find(|kind| kind.types == types.types) else { return Ok(None) };
        if !types.are_plain() {
            return Ok(None);
        }
        let total = kind.profiles;
        if total > MAX_PROFILES {
            return Err(above_limits(&self.options, &selection.describe()));
        }
        progress.total.store(total, Ordering::Relaxed);
        let mut sources = kind.ids.clone();
        sources.update(b"without labels of samples");
        let key = self.cache_key(sources);
        if let Some(merged) = self.cached(key, total, progress).await {
            return Ok(Some((merged, sample_type)));
        }
        let _permit = self.merge_permit().await?;
        let hours = survey.from_ms / HOUR_MS..survey.until_ms.div_ceil(HOUR_MS);
        let (logs, tables) = match sums.snapshot(hours).await {
            Ok(found) => found,
            Err(error) => {
                tracing::warn!(%error, "cannot read the tables of sums; a query reads the profiles instead");
                return Ok(None);
            }
        };
        let (runtime, of, describe) = (Handle::current(), Arc::clone(progress), selection.describe());
        let merged = self.blocking(move |q| {
            let since_ms = survey.from_ms.saturating_sub(MAX_SKEW_MS);
            // A deletion replaces segments, and the tables know them by their former ids.
            let lacks = |id: &Ulid| !q.store.segment_names(*id).iter().any(|id| logs.has(grain, *id));
            let pending = q.store.segments_since(since_ms, |_| true).into_iter().filter(lacks).collect();
            drop(logs);
            let reading = Reading {
                query: q,
                runtime: &runtime,
                survey: &survey,
                types: &types,
                tables: &tables,
                pending,
                cancelled: &cancelled,
                progress: &of,
                describe: &describe,
            };
            let Sums { profile, profiles: summed, mut others } = reading.run()?;
            others.sort_unstable();
            of.done.fetch_add(summed, Ordering::Relaxed);
            let sums = if summed > 0 { vec![profile] } else { Vec::new() };
            let mut merged = q.merge_profiles(&runtime, &others, sums, &cancelled, &of)?;
            if let Some(merged) = &mut merged {
                merged.origin.sums = summed;
                of.read.add_merged(&merged.origin);
            }
            Ok(merged)
        });
        match merged.await? {
            Some(merged) => Ok(Some((self.with_names(Arc::new(merged), key).await, sample_type))),
            None => Ok(None),
        }
    }

    /// Reads the index entries of a selection. Returns `None` if it has too few profiles, or no complete minute or hour. Blocking.
    fn survey(
        &self,
        selector: &Selector,
        (from_ms, until_ms): (u64, u64),
        grain: Grain,
        cancelled: &CancellationToken,
    ) -> Result<Option<Survey>, QueryError> {
        let mut groups: BTreeMap<Group, u32> = BTreeMap::new();
        let mut series = Vec::new();
        for of in self.store.series(selector, from_ms, until_ms) {
            let next = groups.len() as u32;
            series.push((of.id, *groups.entry(Group::of(&of.labels, grain)).or_insert(next)));
        }
        let mut ordered: Vec<(Group, u32)> = groups.into_iter().collect();
        ordered.sort_unstable_by_key(|(_, number)| *number);
        let groups = ordered.into_iter().map(|(group, _)| group).collect();
        let ids: Vec<u64> = series.iter().map(|(id, _)| *id).collect();
        let mut survey =
            Survey { grain, from_ms, until_ms, series, groups, hours: BTreeMap::new(), kinds: Vec::new() };
        let (mut last, mut profiles) = ((0, u64::MAX), 0_u64);
        self.store.scan_series(&ids, from_ms, until_ms, |entry| {
            // The entries come series by series, in the order of the ids.
            while ids.get(last.0).is_some_and(|id| *id != entry.series) {
                last = (last.0 + 1, u64::MAX);
            }
            let hour = entry.key.start_ms / HOUR_MS;
            if last.1 != hour {
                last.1 = hour;
                survey.hours.entry(hour).or_default().push(last.0 as u32);
            }
            survey.kind(&entry).add(&entry);
            profiles += 1;
            profiles <= MAX_PROFILES && !(profiles.is_multiple_of(4096) && cancelled.is_cancelled())
        })?;
        if cancelled.is_cancelled() {
            return Err(StoreError::Ended.into());
        }
        if profiles > MAX_PROFILES {
            return Err(above_limits(&self.options, &format!("{selector}")));
        }
        let is_large = profiles > self.options.min_summed_profiles as u64;
        Ok(is_large.then_some(survey))
    }
}

impl Survey {
    fn kind(&mut self, entry: &StoredProfile) -> &mut SurveyedKind {
        let known = self.kinds.iter().position(|kind| kind.types.iter().eq(types_of(entry)));
        let index = known.unwrap_or_else(|| {
            self.kinds.push(SurveyedKind {
                types: types_of(entry).cloned().collect(),
                first_ms: u64::MAX,
                profiles: 0,
                ids: Sha256::new(),
            });
            self.kinds.len() - 1
        });
        &mut self.kinds[index]
    }
}

impl SurveyedKind {
    fn add(&mut self, entry: &StoredProfile) {
        self.first_ms = self.first_ms.min(entry.key.start_ms);
        self.profiles += 1;
        self.ids.update(entry.key.id.0.to_be_bytes());
    }
}

/// The result of a reading.
struct Sums {
    /// The samples of these profiles, added up.
    profile: Profile,
    profiles: u64,
    /// Profiles that sums do not cover.
    others: Vec<ProfileLocation>,
}

/// The profiles of one group in one minute or hour, by the index.
#[derive(Default)]
struct Unit {
    /// Totals of the chosen sample types.
    totals: Vec<i64>,
    profiles: Vec<ProfileLocation>,
    bytes: u64,
    /// The table may lack some of them, or its rows may be those of other profiles too.
    is_unsure: bool,
}

impl Unit {
    fn add(&mut self, entry: &StoredProfile, is_covered: bool) {
        self.totals.resize(entry.row.types.len(), 0);
        for (sum, of) in self.totals.iter_mut().zip(&entry.row.types) {
            *sum = sum.saturating_add(of.total);
            // The sum may have reached its end.
            self.is_unsure |= *sum == i64::MAX || of.total < 0;
        }
        self.is_unsure |= !is_covered;
        self.profiles.push(entry.location());
        self.bytes += entry.row.bytes;
    }
}

/// A row of a table of sums that belongs to a unit.
struct UnitRow {
    unit: u32,
    /// Index of the type among those of the rows.
    kind: u32,
    stack: i64,
    guessed_from: i64,
    value: i64,
    count: i64,
}

/// The unit of the last row. The next row mostly has the same.
#[derive(Default)]
struct LastUnit {
    labels: [Vec<u8>; 3],
    start_ms: u64,
    unit: Option<u32>,
}

impl LastUnit {
    fn new(row: &SumRow<'_>, unit: Option<u32>) -> Self {
        let labels = [row.service, row.namespace, row.pod].map(<[u8]>::to_vec);
        Self { labels, start_ms: row.start_ms, unit }
    }

    fn is_of(&self, row: &SumRow<'_>) -> bool {
        let [service, namespace, pod] = &self.labels;
        // The defaults name no unit, and a row with them neither: its start would be 1970.
        self.start_ms == row.start_ms
            && (&service[..], &namespace[..], &pod[..]) == (row.service, row.namespace, row.pod)
    }
}

/// A reading of sums, hour by hour.
struct Reading<'q> {
    query: &'q Query,
    runtime: &'q Handle,
    survey: &'q Survey,
    types: &'q RowTypes,
    tables: &'q SumTables,
    /// Segments that the table lacks.
    pending: HashSet<Ulid>,
    cancelled: &'q CancellationToken,
    progress: &'q MergeProgress,
    describe: &'q str,
}

/// Why an hour is read profile by profile.
enum Unread {
    Table(TableError),
    TooManyRows,
    /// The table of stacks or frames lacks rows to which the sums refer.
    Missing,
}

impl From<TableError> for Unread {
    fn from(error: TableError) -> Self {
        Self::Table(error)
    }
}

/// Sums by stack, with the distinct stacks and frames.
#[derive(Default)]
struct Stacks {
    /// Index of each stack by its hash, and of its frames.
    by_hash: HashMap<u128, u32, foldhash::fast::RandomState>,
    frames_of: Vec<Vec<i64>>,
    /// Number of each frame by its hash, from 0.
    frame_numbers: HashMap<u128, i64, foldhash::fast::RandomState>,
    frames: HashMap<i64, TableFrame>,
    /// Number of frames of all stacks.
    depth: usize,
    /// Values by stack and guess.
    sums: HashMap<(u32, i64), Vec<i64>, foldhash::fast::RandomState>,
}

impl Reading<'_> {
    fn options(&self) -> &QueryOptions {
        &self.query.options
    }

    fn run(&self) -> Result<Sums, QueryError> {
        let (mut stacks, mut others, mut other_bytes, mut profiles) = (Stacks::default(), Vec::new(), 0, 0);
        let mut read_bytes = 0;
        for (hour, series) in &self.survey.hours {
            if self.cancelled.is_cancelled() {
                return Err(StoreError::Ended.into());
            }
            let mut units = self.units(*hour, series, &mut others, &mut other_bytes)?;
            let of_hour = self.hour(*hour, &mut units, &mut stacks, &mut read_bytes);
            if let Err(reason) = of_hour {
                match reason {
                    Unread::Table(error) => {
                        tracing::warn!(%error, hour, "cannot read sums of an hour; reading its profiles instead");
                    }
                    Unread::TooManyRows => tracing::debug!(hour, "an hour has too many sums"),
                    Unread::Missing => tracing::warn!(hour, "the tables lack stacks of an hour of sums"),
                }
                for unit in units.values_mut() {
                    unit.is_unsure = true;
                }
            }
            for unit in units.into_values() {
                if unit.is_unsure {
                    others.extend(unit.profiles);
                    other_bytes += unit.bytes;
                } else {
                    profiles += unit.profiles.len() as u64;
                }
            }
            if !within_limits(self.options(), others.len(), other_bytes + read_bytes) {
                return Err(above_limits(self.options(), self.describe));
            }
            check_stacks(stacks.sums.len())?;
            if stacks.depth > MAX_FRAMES {
                return Err(above_limits(self.options(), self.describe));
            }
        }
        Ok(Sums { profile: stacks.profile(&self.types.types), profiles, others })
    }

    /// Returns the profiles of an hour by group and by the start of their minute or hour. Adds those outside of complete ones to
    /// `others`.
    fn units(
        &self,
        hour: u64,
        series: &[u32],
        others: &mut Vec<ProfileLocation>,
        other_bytes: &mut u64,
    ) -> Result<HashMap<(u32, u64), Unit>, QueryError> {
        let Survey { grain, from_ms, until_ms, .. } = *self.survey;
        let ids: Vec<u64> = series.iter().map(|at| self.survey.series[*at as usize].0).collect();
        let groups: HashMap<u64, u32> = series.iter().map(|at| self.survey.series[*at as usize]).collect();
        let mut units: HashMap<(u32, u64), Unit> = HashMap::new();
        let (from, until) = (from_ms.max(hour * HOUR_MS), until_ms.min((hour + 1) * HOUR_MS));
        self.query.store.scan_series(&ids, from, until, |entry| {
            let is_chosen = self.types.types.iter().eq(types_of(&entry));
            let start_ms = entry.key.start_ms / grain.ms() * grain.ms();
            if start_ms < from_ms || start_ms + grain.ms() > until_ms {
                if is_chosen {
                    others.push(entry.location());
                    *other_bytes += entry.row.bytes;
                }
                return true;
            }
            let Some(group) = groups.get(&entry.series) else { return true };
            let unit = units.entry((*group, start_ms)).or_default();
            if is_chosen {
                let is_covered = entry.row.segment().is_some_and(|id| !self.pending.contains(&id));
                unit.add(&entry, is_covered);
            } else {
                let types: Vec<String> = types_of(&entry).cloned().collect();
                unit.is_unsure |= self.types.clash_with(&types);
            }
            true
        })?;
        Ok(units)
    }

    /// Reads the sums of an hour. Marks the units that it cannot prove, and adds the others to `stacks`. After an error, it has added
    /// nothing.
    fn hour(
        &self,
        hour: u64,
        units: &mut HashMap<(u32, u64), Unit>,
        stacks: &mut Stacks,
        read_bytes: &mut u64,
    ) -> Result<(), Unread> {
        let mut wanted: Vec<(&(u32, u64), &mut Unit)> =
            units.iter_mut().filter(|(_, unit)| !unit.is_unsure && !unit.profiles.is_empty()).collect();
        if wanted.is_empty() {
            return Ok(());
        }
        let group = |number: u32| &self.survey.groups[number as usize];
        let mut numbers: BTreeMap<(&str, &str, &str, u64), u32> = BTreeMap::new();
        for (number, ((of, start_ms), _)) in (0..).zip(&wanted) {
            let Group { service, namespace, pod } = group(*of);
            numbers.insert((service, namespace, pod, *start_ms), number);
        }
        let services: BTreeSet<&[u8]> =
            wanted.iter().map(|((of, _), _)| group(*of).service.as_bytes()).collect();
        let admits = |first: &[u8], last: &[u8]| {
            first <= last
                && services.range::<[u8], _>((Bound::Included(first), Bound::Included(last))).next().is_some()
        };
        let mut count = |bytes: u64| {
            *read_bytes += bytes;
            self.progress.read.add_sums(bytes);
        };
        let mut rows: Vec<UnitRow> = Vec::new();
        let (mut last, mut is_full) = (LastUnit::default(), false);
        let reading = self.tables.rows(self.survey.grain, hour, &admits, |row| {
            let Some(kind) = self.types.row_index(row.kind) else { return true };
            if !last.is_of(&row) {
                let text = |bytes| std::str::from_utf8(bytes).unwrap_or_default();
                let key = (text(row.service), text(row.namespace), text(row.pod), row.start_ms);
                last = LastUnit::new(&row, numbers.get(&key).copied());
            }
            let Some(unit) = last.unit else { return true };
            is_full = rows.len() >= MAX_ROWS_OF_HOUR;
            rows.push(UnitRow {
                unit,
                kind: kind as u32,
                stack: row.stack,
                guessed_from: row.guessed_from,
                value: row.value,
                // Without a count, a count of the index is never equal.
                count: row.count.unwrap_or(if self.types.counts { -1 } else { 0 }),
            });
            !is_full
        });
        count(self.runtime.block_on(reading)?);
        if is_full {
            return Err(Unread::TooManyRows);
        }
        self.prove(&mut wanted, &rows);
        rows.retain(|row| !wanted[row.unit as usize].1.is_unsure);
        let by_id = self.resolve(hour, &admits, &rows, stacks, &mut count)?;
        let width = self.types.types.len();
        for UnitRow { unit: _, kind, stack, guessed_from, value, count } in rows {
            let Some(stack) = by_id.get(&stack) else { continue };
            let sums = stacks.sums.entry((*stack, guessed_from)).or_insert_with(|| vec![0; width]);
            if self.types.counts {
                sums[0] = sums[0].saturating_add(count);
                sums[1] = sums[1].saturating_add(value);
            } else {
                sums[kind as usize] = sums[kind as usize].saturating_add(value);
            }
        }
        Ok(())
    }

    /// Marks the units whose rows have another total than their profiles.
    fn prove(&self, units: &mut [(&(u32, u64), &mut Unit)], rows: &[UnitRow]) {
        let width = self.types.types.len();
        let mut totals = vec![0_i128; units.len() * width];
        for UnitRow { unit, kind, value, count, guessed_from, .. } in rows {
            // Sums that a deletion added up again do not know the guesses.
            units[*unit as usize].1.is_unsure |= *guessed_from < 0;
            let totals = &mut totals[*unit as usize * width..][..width];
            if self.types.counts {
                totals[0] += i128::from(*count);
                totals[1] += i128::from(*value);
            } else {
                totals[*kind as usize] += i128::from(*value);
            }
        }
        for ((_, unit), totals) in units.iter_mut().zip(totals.chunks(width)) {
            unit.is_unsure |= !unit.totals.iter().map(|total| i128::from(*total)).eq(totals.iter().copied());
        }
    }

    /// Returns the index in `stacks` of each stack that the rows name. Reads those that are new.
    fn resolve(
        &self,
        hour: u64,
        admits: &dyn Fn(&[u8], &[u8]) -> bool,
        rows: &[UnitRow],
        stacks: &mut Stacks,
        count: &mut dyn FnMut(u64),
    ) -> Result<HashMap<i64, u32, foldhash::fast::RandomState>, Unread> {
        let wanted: HashSet<i64, foldhash::fast::RandomState> = rows.iter().map(|row| row.stack).collect();
        let mut hashes: HashMap<i64, u128, foldhash::fast::RandomState> = HashMap::default();
        let mut new: HashMap<u128, Vec<i64>> = HashMap::new();
        let mut named: HashSet<u128> = HashSet::new();
        let is_new = |id: i64, hash: u128| {
            wanted.contains(&id) && {
                hashes.insert(id, hash);
                !stacks.by_hash.contains_key(&hash) && named.insert(hash)
            }
        };
        let add = |hash, frames| {
            new.insert(hash, frames);
        };
        count(self.runtime.block_on(self.tables.stacks(hour, admits, is_new, add))?);
        if hashes.len() != wanted.len() {
            return Err(Unread::Missing);
        }
        let ids: HashSet<i64> = new.values().flatten().copied().collect();
        let mut frames: HashMap<i64, u128> = HashMap::with_capacity(ids.len());
        if !ids.is_empty() {
            let mut added: Vec<(u128, TableFrame)> = Vec::new();
            let mut named: HashSet<u128> = HashSet::new();
            let is_new = |id: i64, hash: u128| {
                ids.contains(&id) && {
                    frames.insert(id, hash);
                    !stacks.frame_numbers.contains_key(&hash) && named.insert(hash)
                }
            };
            let add = |hash, frame| added.push((hash, frame));
            count(self.runtime.block_on(self.tables.frames(hour, admits, is_new, add))?);
            for (hash, frame) in added {
                let number = stacks.frame_numbers.len() as i64;
                stacks.frame_numbers.insert(hash, number);
                stacks.frames.insert(number, frame);
            }
        }
        if frames.len() != ids.len() {
            return Err(Unread::Missing);
        }
        for (hash, ids) in new {
            let number = |id: &i64| frames.get(id).and_then(|hash| stacks.frame_numbers.get(hash)).copied();
            let numbers: Option<Vec<i64>> = ids.iter().map(number).collect();
            let Some(numbers) = numbers else { return Err(Unread::Missing) };
            stacks.depth += numbers.len();
            stacks.by_hash.insert(hash, stacks.frames_of.len() as u32);
            stacks.frames_of.push(numbers);
        }
        let index = |(id, hash): (i64, u128)| stacks.by_hash.get(&hash).map(|stack| (id, *stack));
        Ok(hashes.into_iter().filter_map(index).collect())
    }
}

impl Stacks {
    /// Returns the sums as a profile with these sample types.
    fn profile(self, types: &[String]) -> Profile {
        let names: Vec<(&str, &str)> =
            types.iter().map(|name| name.split_once('/').unwrap_or((name, ""))).collect();
        let mut builder = Builder::new(Header {
            sample_types: &names,
            period_type: ("", ""),
            period: 0,
            time_nanos: 0,
            duration_nanos: 0,
        });
        let mut guesses: HashMap<i64, LabelSet> = HashMap::new();
        let mut sums = Vec::with_capacity(self.sums.len());
        for ((stack, guessed_from), values) in self.sums {
            if guessed_from != 0 {
                guesses.entry(guessed_from).or_insert_with(|| LabelSet {
                    texts: Vec::new(),
                    numbers: vec![(GUESSED_FROM.to_owned(), guessed_from)],
                    units: HashMap::new(),
                });
            }
            let frames = self.frames_of[stack as usize].clone();
            sums.push(StackSum { frames, labels: guessed_from, values });
        }
        fill(&mut builder, &sums, &self.frames, &guesses);
        builder.finish()
    }
}
