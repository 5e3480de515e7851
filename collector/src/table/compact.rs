//! One compaction: takes segments that the table lacks, and adds their rows.
//!
//! The table of samples and the table of profiles each take a segment once. The commit that adds the rows of a segment names the
//! segment, in a tag of a data file. So rows and name come and go together: a crash before the commit leaves files that no reader
//! sees, and a crash after it leaves nothing to do. Rows of stacks, frames and label sets are committed before the samples that
//! refer to them. After a crash in between they are there without samples, which costs space and nothing else.

use std::collections::{BTreeMap, HashMap, HashSet};

use parquet::data_type::ByteArray;
use tokio::runtime::Handle;
use ulid::Ulid;

use super::{
    TableError,
    action::{Action, Add, SEGMENTS_TAG},
    file::{Cell, FileWriter, Rows},
    gather::{Gathered, ProfileRow, SampleRow, Series, Wants},
    ids::{GROUP_ROWS, Ids, Scope, optional},
    log::{Committed, Log},
    partition::{Partition, micros},
    rollup,
    tables::{Rollups, Tables},
};
use crate::store::{SegmentContent, SegmentInfo, Store};

/// Bytes of segments of one compaction. Its last segment may exceed it.
const MAX_SEGMENT_BYTES: u64 = 64 << 20;
/// Segments of one compaction.
pub(super) const MAX_SEGMENTS: usize = 1024;

/// Counts of one compaction.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(super) struct Compacted {
    pub(super) segments: usize,
    pub(super) profiles: u64,
    /// Profiles that are damaged.
    pub(super) skipped: u64,
    pub(super) rows: u64,
}

/// Segments that the table cannot take.
#[derive(Default)]
pub(super) struct SetAside {
    /// Segments without rows, which no file of the table can name.
    pub(super) empty: HashSet<Ulid>,
    /// Segments that could not be read since the last listing of all segments, which tries them again.
    pub(super) unreadable: HashSet<Ulid>,
    /// Unreadable segments that the log has named.
    logged: HashSet<Ulid>,
}

/// Takes the first of these segments, in order, and adds their rows to the table. `oldest`: the partition of the oldest rows
/// that the table keeps. `stop`: ends the reading early.
pub(super) fn compact(
    store: &Store,
    tables: &mut Tables,
    ids: &mut Ids,
    pending: &[SegmentInfo],
    aside: &mut SetAside,
    oldest: Partition,
    stop: &dyn Fn() -> bool,
) -> Result<Compacted, TableError> {
    let mut run = Run::default();
    let (mut bytes, mut taken) = (0, Vec::new());
    for segment in pending {
        if bytes >= MAX_SEGMENT_BYTES || stop() {
            break;
        }
        let id = segment.id;
        let wants = tables.wants_any(&store.segment_names(id));
        bytes += segment.disk_bytes;
        let profiles = match store.read_segment(id)? {
            // The index will forget it too.
            SegmentContent::Gone => {
                aside.empty.insert(id);
                continue;
            }
            SegmentContent::Unreadable(reason) => {
                aside.unreadable.insert(id);
                if aside.logged.insert(id) {
                    tracing::warn!(
                        segment = %id, reason,
                        "cannot read a segment for the table; `gannet-collector verify` names the cure"
                    );
                }
                continue;
            }
            SegmentContent::Profiles { profiles, damaged } => {
                if damaged > 0 {
                    tracing::warn!(segment = %id, profiles = damaged, "the table lacks damaged profiles");
                }
                run.done.skipped += damaged;
                profiles
            }
        };
        for profile in profiles {
            if Partition::at(profile.start_ms) < oldest {
                continue;
            }
            // Another collector added the same batch from another segment.
            let wants = profile.copies.iter().fold(wants, |wants, copy| wants.and(tables.wants(*copy)));
            if !wants.any() {
                continue;
            }
            let name = profile.id;
            if let Err(error) = run.gathered.add(&profile, wants) {
                tracing::warn!(profile = %name, %error, "the table lacks a profile that cannot be read");
                run.done.skipped += 1;
            }
            if run.gathered.is_full() {
                run.write_samples(tables, ids)?;
            }
        }
        taken.push((id, wants));
        run.done.segments += 1;
    }
    run.write_samples(tables, ids)?;
    run.commit(tables, &taken, aside)
}

/// A compaction under way.
#[derive(Default)]
struct Run {
    gathered: Gathered,
    /// Written files of samples, which no commit has added yet.
    adds: Vec<(Partition, Add)>,
    /// Written files of the sums by minute, and by hour.
    minutes: Vec<(Partition, Add)>,
    hours: Vec<(Partition, Add)>,
    done: Compacted,
}

impl Run {
    /// Writes the waiting rows of samples, and commits the rows to which they refer.
    fn write_samples(&mut self, tables: &mut Tables, ids: &mut Ids) -> Result<(), TableError> {
        let Gathered { series, profiles, types, distinct, samples, .. } = &mut self.gathered;
        let mut samples = std::mem::take(samples);
        let distinct = std::mem::take(distinct);
        if samples.is_empty() {
            return Ok(());
        }
        let (scopes, scope_of) = scopes(series, profiles);
        resolve(tables, ids, &distinct, &scopes, &scope_of, &mut samples)?;
        drop(distinct);
        let key = |row: &SampleRow| {
            let profile = &profiles[row.profile as usize];
            let scope = scope_of[row.profile as usize];
            let kind = types[row.kind as usize].data();
            // Rows of one profile stay together, so that its name, time and labels compress to almost nothing.
            (scope, kind, profile.start_ms, profile.id.data(), row.stack, row.labels)
        };
        if let Some(Rollups { minutes, hours }) = &mut tables.rollups {
            let runtime = &tables.runtime;
            let source = rollup::Source { samples: &samples, profiles, series, types, scope_of: &scope_of };
            rollup::write_minutes(runtime, minutes, &source, &mut self.minutes)?;
            rollup::write_hours(runtime, hours, &source, &mut self.hours)?;
            // A segment that the sums lack after a crash, or since they are on.
            samples.retain(|row| profiles[row.profile as usize].wants.samples);
        }
        samples.sort_unstable_by(|a, b| key(a).cmp(&key(b)));
        let partition = |row: &SampleRow| profiles[row.profile as usize].partition;
        for part in samples.chunk_by(|a, b| partition(a) == partition(b)) {
            let mut file = FileWriter::new(tables.samples.schema).map_err(TableError::Parquet)?;
            for group in part.chunks(GROUP_ROWS) {
                let mut rows = Rows::new(tables.samples.schema);
                for row in group {
                    push_sample(&mut rows, row, profiles, series, types);
                }
                file.write(rows).map_err(TableError::Parquet)?;
            }
            let file = file.finish().map_err(TableError::Parquet)?;
            self.done.rows += file.rows;
            let runtime = tables.runtime.clone();
            let add = runtime.block_on(tables.samples.put_file(partition(&part[0]), file, true))?;
            self.adds.push((partition(&part[0]), add));
        }
        Ok(())
    }

    /// Commits profiles, samples and sums, each with the names of the segments that the table lacked.
    fn commit(
        mut self,
        tables: &mut Tables,
        taken: &[(Ulid, Wants)],
        aside: &mut SetAside,
    ) -> Result<Compacted, TableError> {
        let runtime = tables.runtime.clone();
        let mut take = |log: &mut Log, adds, lacks: fn(&Wants) -> bool| {
            let names: Vec<Ulid> =
                taken.iter().filter(|(_, wants)| lacks(wants)).map(|(id, _)| *id).collect();
            if !take(&runtime, log, adds, &names)? {
                aside.empty.extend(names);
            }
            Ok::<_, TableError>(())
        };
        let adds = self.write_profiles(tables)?;
        take(&mut tables.profiles, adds, |wants| wants.profiles)?;
        take(&mut tables.samples, std::mem::take(&mut self.adds), |wants| wants.samples)?;
        if let Some(Rollups { minutes, hours }) = &mut tables.rollups {
            take(minutes, std::mem::take(&mut self.minutes), |wants| wants.minutes)?;
            take(hours, std::mem::take(&mut self.hours), |wants| wants.hours)?;
        }
        self.done.profiles = self.gathered.profiles.len() as u64;
        Ok(self.done)
    }

    /// Writes the files of the table of profiles.
    fn write_profiles(&mut self, tables: &mut Tables) -> Result<Vec<(Partition, Add)>, TableError> {
        let Gathered { series, profiles, .. } = &self.gathered;
        let mut rows: Vec<&ProfileRow> = profiles.iter().filter(|profile| profile.wants.profiles).collect();
        let key = |row: &ProfileRow| (row.partition, row.start_ms);
        let service = |row: &ProfileRow| series[row.series as usize].service.data();
        rows.sort_by(|a, b| {
            (a.partition, service(a)).cmp(&(b.partition, service(b))).then_with(|| key(a).cmp(&key(b)))
        });
        let mut adds = Vec::new();
        for part in rows.chunk_by(|a, b| a.partition == b.partition) {
            let mut file = FileWriter::new(tables.profiles.schema).map_err(TableError::Parquet)?;
            for group in part.chunks(GROUP_ROWS) {
                let mut out = Rows::new(tables.profiles.schema);
                for row in group {
                    push_profile(&mut out, row, &series[row.series as usize]);
                }
                file.write(out).map_err(TableError::Parquet)?;
            }
            let file = file.finish().map_err(TableError::Parquet)?;
            let partition = part[0].partition;
            let runtime = tables.runtime.clone();
            adds.push((partition, runtime.block_on(tables.profiles.put_file(partition, file, true))?));
        }
        Ok(adds)
    }
}

/// Returns the sorted scopes of profiles, and the index of the scope of each.
fn scopes(series: &[Series], profiles: &[ProfileRow]) -> (Vec<Scope>, Vec<u32>) {
    let scope = |profile: &ProfileRow| {
        let service = series[profile.series as usize].service.as_utf8().unwrap_or_default();
        Scope { partition: profile.partition, service: service.to_owned() }
    };
    let mut numbers: BTreeMap<Scope, u32> = profiles.iter().map(|profile| (scope(profile), 0)).collect();
    for (number, of) in numbers.values_mut().zip(0..) {
        *number = of;
    }
    let of = profiles.iter().map(|profile| numbers.get(&scope(profile)).copied().unwrap_or_default());
    let of = of.collect();
    (numbers.into_keys().collect(), of)
}

/// Replaces the numbers of stacks and label sets by their ids, and writes those that the table lacks.
fn resolve(
    tables: &mut Tables,
    ids: &mut Ids,
    distinct: &gannet_proto::pprof::Distinct,
    scopes: &[Scope],
    scope_of: &[u32],
    samples: &mut [SampleRow],
) -> Result<(), TableError> {
    let mut stacks: HashMap<(u32, u32), i64, foldhash::fast::RandomState> = HashMap::default();
    let mut labels: HashMap<(u32, u32), i64, foldhash::fast::RandomState> = HashMap::default();
    for row in samples.iter() {
        let scope = scope_of[row.profile as usize];
        stacks.entry((scope, row.stack as u32)).or_default();
        if let Some(set) = row.labels {
            labels.entry((scope, set as u32)).or_default();
        }
    }
    let sorted = |of: &HashMap<(u32, u32), i64, _>| {
        let mut keys: Vec<(u32, u32)> = of.keys().copied().collect();
        keys.sort_unstable();
        keys
    };
    let (stack_keys, label_keys) = (sorted(&stacks), sorted(&labels));
    let logs = [&mut tables.frames, &mut tables.stacks, &mut tables.labels];
    let [stack_ids, label_ids] =
        tables.runtime.block_on(ids.of(logs, distinct, scopes, &stack_keys, &label_keys))?;
    stacks.extend(stack_keys.into_iter().zip(stack_ids));
    labels.extend(label_keys.into_iter().zip(label_ids));
    for row in samples {
        let scope = scope_of[row.profile as usize];
        row.stack = stacks.get(&(scope, row.stack as u32)).copied().unwrap_or_default();
        row.labels = row.labels.and_then(|set| labels.get(&(scope, set as u32)).copied());
    }
    Ok(())
}

fn push_sample(
    rows: &mut Rows,
    row: &SampleRow,
    profiles: &[ProfileRow],
    series: &[Series],
    types: &[ByteArray],
) {
    let SampleRow { profile, kind, stack, labels, value, count, guessed_from: _ } = *row;
    let profile = &profiles[profile as usize];
    let Series { service, namespace, pod, container, node, labels: _ } = &series[profile.series as usize];
    let number = |number: Option<i64>| number.map_or(Cell::Null, Cell::Long);
    rows.push([
        Cell::Long(micros(profile.start_ms)),
        Cell::Text(service),
        optional(namespace.as_ref()),
        optional(pod.as_ref()),
        optional(container.as_ref()),
        optional(node.as_ref()),
        Cell::Text(&profile.id),
        Cell::Text(&types[kind as usize]),
        Cell::Long(stack),
        number(labels),
        Cell::Long(value),
        number(count),
    ]);
}

fn push_profile(rows: &mut Rows, row: &ProfileRow, series: &Series) {
    rows.push([
        Cell::Long(micros(row.start_ms)),
        Cell::Text(&series.service),
        Cell::Text(&row.id),
        Cell::TextMap(&series.labels),
        Cell::Long(row.duration_ms as i64),
        Cell::Text(&row.rule_id),
        Cell::Long(row.revision as i64),
        Cell::Text(&row.reason),
        Cell::Texts(&row.types),
        optional(row.period_type.as_ref()),
        Cell::Long(row.period),
        Cell::Long(row.time_nanos),
        Cell::Long(row.duration_nanos),
        Cell::Texts(&row.comments),
    ]);
}

/// Commits files with the names of their segments. If another writer has committed meanwhile, adds nothing, because it may have taken a
/// segment or a batch of these, and the next compaction takes the rest. Returns false if there is no file that could hold the names.
fn take(
    runtime: &Handle,
    log: &mut Log,
    mut adds: Vec<(Partition, Add)>,
    segments: &[Ulid],
) -> Result<bool, TableError> {
    // The newest partition is the last one that retention removes.
    adds.sort_by_key(|(partition, _)| *partition);
    let Some((_, last)) = adds.last_mut() else { return Ok(segments.is_empty()) };
    let names: Vec<String> = segments.iter().map(Ulid::to_string).collect();
    last.tags.get_or_insert_default().insert(SEGMENTS_TAG.to_owned(), names.join(" "));
    let actions = adds.iter().map(|(_, add)| Action { add: Some(add.clone()), ..Action::default() });
    match runtime.block_on(log.commit("WRITE", actions.collect()))? {
        Committed::Done => {}
        Committed::Conflict => {
            for (_, add) in &adds {
                runtime.block_on(log.drop_file(add));
            }
        }
    }
    Ok(true)
}
