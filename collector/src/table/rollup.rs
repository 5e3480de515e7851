//! Sums of samples: by minute and service, and by hour and pod.
//!
//! Each compaction adds the sums of its own samples, so a minute or an hour has several rows of one stack until a merge adds them up.
//! Queries add them up too.

use std::collections::BTreeSet;

use parquet::data_type::ByteArray;
use tokio::runtime::Handle;

use super::{
    TableError,
    action::Add,
    file::{Cell, FileWriter, Rows},
    gather::{ProfileRow, SampleRow, Series},
    ids::{GROUP_ROWS, optional},
    log::Log,
    partition::{Partition, micros},
};
use crate::time::MINUTE_MS;

/// The samples of a compaction, with what they refer to.
pub(super) struct Source<'a> {
    pub(super) samples: &'a [SampleRow],
    pub(super) profiles: &'a [ProfileRow],
    pub(super) series: &'a [Series],
    pub(super) types: &'a [ByteArray],
    /// The number of the scope of each profile. Scopes ascend by partition and service.
    pub(super) scope_of: &'a [u32],
}

/// Samples that are equal in all columns of the table but the sums.
struct Sum {
    /// Number of the scope (partition and service), and what else the table has, in its order; last the stack and its guessed part.
    key: (u32, u64, u64, i64, i64),
    value: i64,
    count: Option<i64>,
    /// One of the summed profiles.
    profile: u32,
    /// Index of the type.
    kind: u32,
}

/// Writes the sums by minute, as files that no commit has added yet.
pub(super) fn write_minutes(
    runtime: &Handle,
    log: &mut Log,
    source: &Source<'_>,
    adds: &mut Vec<(Partition, Add)>,
) -> Result<(), TableError> {
    let kinds = ranks(source.types.iter().map(ByteArray::data));
    let minute = |profile: &ProfileRow| profile.start_ms / MINUTE_MS;
    let sums = source
        .sums(|profile| profile.wants.minutes, |row, profile| (kinds[row.kind as usize], minute(profile)));
    write(runtime, log, source, &sums, adds, |rows, sum, series| {
        let start_ms = minute(&source.profiles[sum.profile as usize]) * MINUTE_MS;
        let [kind, stack, value, count, guessed] = source.cells(sum);
        let start = Cell::Long(micros(start_ms));
        rows.push([start, Cell::Text(&series.service), kind, stack, value, count, guessed]);
    })
}

/// Writes the sums by hour and pod, as files that no commit has added yet.
pub(super) fn write_hours(
    runtime: &Handle,
    log: &mut Log,
    source: &Source<'_>,
    adds: &mut Vec<(Partition, Add)>,
) -> Result<(), TableError> {
    let kinds = ranks(source.types.iter().map(ByteArray::data));
    let bytes = |label: &Option<ByteArray>| label.as_ref().map(|label| label.data().to_vec());
    let pods = ranks(source.series.iter().map(|series| (bytes(&series.namespace), bytes(&series.pod))));
    let sums = source.sums(
        |profile| profile.wants.hours,
        |row, profile| (pods[profile.series as usize], kinds[row.kind as usize]),
    );
    write(runtime, log, source, &sums, adds, |rows, sum, series| {
        let (namespace, pod) = (optional(series.namespace.as_ref()), optional(series.pod.as_ref()));
        let [kind, stack, value, count, guessed] = source.cells(sum);
        rows.push([Cell::Text(&series.service), namespace, pod, kind, stack, value, count, guessed]);
    })
}

/// Returns for each item its rank among the different ones, by which sums are sorted.
fn ranks<T: Ord>(items: impl Iterator<Item = T>) -> Vec<u64> {
    let items: Vec<T> = items.collect();
    let sorted: Vec<&T> = items.iter().collect::<BTreeSet<_>>().into_iter().collect();
    items.iter().map(|item| sorted.partition_point(|other| *other < item) as u64).collect()
}

impl Source<'_> {
    /// Returns the last columns of both tables: type, stack, sums and guess.
    fn cells(&self, sum: &Sum) -> [Cell<'_>; 5] {
        [
            Cell::Text(&self.types[sum.kind as usize]),
            Cell::Long(sum.key.3),
            Cell::Long(sum.value),
            sum.count.map_or(Cell::Null, Cell::Long),
            Cell::Long(sum.key.4),
        ]
    }

    /// Adds up the samples of profiles that the table lacks. `parts`: what separates them beside scope and stack.
    fn sums(
        &self,
        is_wanted: impl Fn(&ProfileRow) -> bool,
        parts: impl Fn(&SampleRow, &ProfileRow) -> (u64, u64),
    ) -> Vec<Sum> {
        let wanted = self.samples.iter().filter(|row| is_wanted(&self.profiles[row.profile as usize]));
        let sum = |row: &SampleRow| {
            let (first, second) = parts(row, &self.profiles[row.profile as usize]);
            let key = (self.scope_of[row.profile as usize], first, second, row.stack, row.guessed_from);
            Sum { key, value: row.value, count: row.count, profile: row.profile, kind: row.kind }
        };
        let mut sums: Vec<Sum> = wanted.map(sum).collect();
        sums.sort_unstable_by_key(|sum| sum.key);
        sums.dedup_by(|next, sum| {
            let is_same = next.key == sum.key;
            if is_same {
                sum.value = sum.value.saturating_add(next.value);
                sum.count = match (sum.count, next.count) {
                    (Some(a), Some(b)) => Some(a.saturating_add(b)),
                    (a, b) => a.or(b),
                };
            }
            is_same
        });
        sums
    }
}

/// Writes sums as one file for each partition.
fn write(
    runtime: &Handle,
    log: &mut Log,
    source: &Source<'_>,
    sums: &[Sum],
    adds: &mut Vec<(Partition, Add)>,
    push: impl Fn(&mut Rows, &Sum, &Series),
) -> Result<(), TableError> {
    let profile = |sum: &Sum| &source.profiles[sum.profile as usize];
    // Scopes ascend by partition.
    for part in sums.chunk_by(|a, b| profile(a).partition == profile(b).partition) {
        let mut file = FileWriter::new(log.schema).map_err(TableError::Parquet)?;
        for group in part.chunks(GROUP_ROWS) {
            let mut rows = Rows::new(log.schema);
            for sum in group {
                push(&mut rows, sum, &source.series[profile(sum).series as usize]);
            }
            file.write(rows).map_err(TableError::Parquet)?;
        }
        let file = file.finish().map_err(TableError::Parquet)?;
        let partition = profile(&part[0]).partition;
        adds.push((partition, runtime.block_on(log.put_file(partition, file, true))?));
    }
    Ok(())
}
