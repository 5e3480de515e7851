//! Merges of small files: many files of one hour become one, in one commit that changes no row.
//!
//! Each update of the table adds a file to the hours of its profiles. A merge reads some files of one hour, sorts their rows, and
//! writes them as one file. Its commit removes the old files from the table and adds the new one, with the segment names of the
//! old files. So a reader sees either all old files or the new one. A crash before the commit leaves a file that no
//! reader sees. If another collector has removed one of the old files meanwhile, the merge discards its result.

use std::collections::{BTreeMap, BTreeSet, HashSet};

use ulid::Ulid;

use super::{
    TableError, TableOptions,
    action::{Action, Add, SEGMENTS_TAG},
    log::{Committed, DataFile, Log},
    partition::Partition,
    rows::{DataReader, LoadedRows},
    tables::Tables,
};
use crate::time::HOUR_MS;

/// Size from which a merge does not replace a file, in bytes.
const MAX_SOURCE_BYTES: u64 = 64 << 20;
/// Maximum size of all files of a merge, in bytes.
const MAX_MERGE_BYTES: u64 = 128 << 20;
/// Maximum number of rows of all files of a merge, according to the log.
const MAX_MERGE_ROWS: u64 = 4 << 20;
/// Maximum memory of the rows of a merge, in bytes.
const MAX_MERGE_MEMORY: u64 = 256 << 20;
/// Maximum size of the largest file of a merge relative to the others together, in an hour that gets new files.
const OPEN_RATIO: u64 = 1;
/// The same ratio in an hour that is over.
const CLOSED_RATIO: u64 = 8;
/// Number of attempts to commit, while other writers commit first.
const MAX_CONFLICTS: usize = 100;

/// Counts of merges.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(super) struct Merged {
    pub(super) merges: u64,
    /// Number of files that merges replaced.
    pub(super) files: u64,
    pub(super) rows: u64,
}

/// State of merges that the logs do not hold.
#[derive(Default)]
pub(super) struct Merges {
    /// Damaged files by table and path. No merge reads them again.
    damaged: BTreeSet<(&'static str, String)>,
    /// Files with too many rows for the memory of a merge.
    too_large: HashSet<String>,
}

impl Merges {
    /// Number of the damaged files that are still in the tables.
    pub(super) fn damaged(&mut self, tables: &mut Tables) -> usize {
        for log in tables.all() {
            self.damaged.retain(|(table, path)| *table != log.schema.name || log.files.contains_key(path));
        }
        self.damaged.len()
    }

    /// Merges files of one hour in each table that has enough of them. Ends early at `stop`.
    pub(super) fn run(
        &mut self,
        tables: &mut Tables,
        options: &TableOptions,
        now_ms: u64,
        stop: &dyn Fn() -> bool,
    ) -> Result<Merged, TableError> {
        let runtime = tables.runtime.clone();
        let mut done = Merged::default();
        for log in tables.all() {
            if stop() {
                break;
            }
            let sources = plan(log, options, now_ms, |path| self.is_aside(log, path));
            if sources.is_empty() {
                continue;
            }
            let Merged { merges, files, rows } = runtime.block_on(self.merge(log, &sources))?;
            done.merges += merges;
            done.files += files;
            done.rows += rows;
        }
        Ok(done)
    }

    fn is_aside(&self, log: &Log, path: &str) -> bool {
        self.too_large.contains(path) || self.damaged.contains(&(log.schema.name, path.to_owned()))
    }

    /// Merges the sound ones of these files, as many as fit into memory.
    async fn merge(&mut self, log: &mut Log, paths: &[String]) -> Result<Merged, TableError> {
        let mut rows = LoadedRows::new(log.schema);
        let mut sources: Vec<DataFile> = Vec::new();
        let mut memory = 0;
        for path in paths {
            let Some(file) = log.files.get(path).cloned() else { return Ok(Merged::default()) };
            let Some(bytes) = log.read_file(path).await? else {
                self.set_aside(log, path, "it is missing");
                continue;
            };
            if !file.add.has_content(&bytes) {
                self.set_aside(log, path, "its size or its checksum is not that of the log");
                continue;
            }
            let reader = match DataReader::open(log.schema, bytes) {
                Ok(reader) => reader,
                Err(error) => {
                    self.set_aside(log, path, &error.to_string());
                    continue;
                }
            };
            if memory + reader.memory() > MAX_MERGE_MEMORY {
                if sources.is_empty() {
                    self.too_large.insert(path.clone());
                    continue;
                }
                break;
            }
            memory += reader.memory();
            if let Err(error) = rows.add(&reader) {
                self.set_aside(log, path, &error.to_string());
                // The rows are incomplete now. The next merge begins without this file.
                return Ok(Merged::default());
            }
            sources.push(file);
        }
        if sources.len() < 2 {
            return Ok(Merged::default());
        }
        let partition = sources[0].partition;
        let file = rows.write().map_err(TableError::Parquet)?;
        let done = Merged { merges: 1, files: sources.len() as u64, rows: file.rows };
        let mut add = log.put_file(partition, file, false).await?;
        add_segments(&mut add, &sources);
        Ok(if replace(log, &sources, add).await? { done } else { Merged::default() })
    }

    fn set_aside(&mut self, log: &Log, path: &str, reason: &str) {
        if self.damaged.insert((log.schema.name, path.to_owned())) {
            tracing::warn!(
                file = %log.key(path), reason,
                "a file of the table is damaged, and queries of other programs may fail; stop the collector and run `gannet-collector \
                 repair`; the next collector writes the table again from the stored profiles"
            );
        }
    }
}

/// Adds the segment names of the sources to the entry of a new file.
pub(super) fn add_segments(add: &mut Add, sources: &[DataFile]) {
    let segments: BTreeSet<Ulid> = sources.iter().flat_map(|file| file.segments.iter().copied()).collect();
    if !segments.is_empty() {
        let names: Vec<String> = segments.iter().map(Ulid::to_string).collect();
        add.tags.get_or_insert_default().insert(SEGMENTS_TAG.to_owned(), names.join(" "));
    }
}

/// Commits a new file in place of others. If one of them is no longer in the table, removes the new file and returns false.
async fn replace(log: &mut Log, sources: &[DataFile], add: Add) -> Result<bool, TableError> {
    for _ in 0..MAX_CONFLICTS {
        if !sources.iter().all(|file| log.files.contains_key(&file.add.path)) {
            log.drop_file(&add).await;
            return Ok(false);
        }
        let removes =
            sources.iter().map(|file| Action { remove: Some(file.add.removal(false)), ..Action::default() });
        let adds = [Action { add: Some(add.clone()), ..Action::default() }];
        if log.commit("OPTIMIZE", removes.chain(adds).collect()).await? == Committed::Done {
            return Ok(true);
        }
    }
    Err(TableError::Contended)
}

/// Returns the paths of files to merge, all of one hour, the smallest first. Empty if no hour has enough files.
fn plan(log: &Log, options: &TableOptions, now_ms: u64, is_aside: impl Fn(&str) -> bool) -> Vec<String> {
    let mut hours: BTreeMap<Partition, Vec<&DataFile>> = BTreeMap::new();
    for file in log.files.values() {
        if file.add.size < MAX_SOURCE_BYTES && !is_aside(&file.add.path) {
            hours.entry(file.partition).or_default().push(file);
        }
    }
    let delay_ms = options.close_delay.as_millis() as u64;
    let chosen = hours.into_iter().map(|(hour, files)| {
        let is_closed = now_ms >= (hour.0 + 1).saturating_mul(HOUR_MS).saturating_add(delay_ms);
        choose(files, is_closed, options.merge_files)
    });
    // A merge helps most in the hour with the most files.
    let best = chosen.max_by_key(Vec::len).unwrap_or_default();
    best.into_iter().map(|file| file.add.path.clone()).collect()
}

/// Selects the files of one hour that a merge makes one file. A large file waits until the others together are not much smaller, so
/// that not every merge writes its rows again.
fn choose(mut files: Vec<&DataFile>, is_closed: bool, merge_files: usize) -> Vec<&DataFile> {
    let (least, ratio) = if is_closed { (2, CLOSED_RATIO) } else { (merge_files.max(2), OPEN_RATIO) };
    files.sort_by(|a, b| (a.add.size, &a.add.path).cmp(&(b.add.size, &b.add.path)));
    let (mut bytes, mut rows) = (0, 0);
    let mut chosen: Vec<(&DataFile, u64)> = Vec::new();
    for file in files {
        rows += file.add.rows().unwrap_or(0);
        if bytes + file.add.size > MAX_MERGE_BYTES || rows > MAX_MERGE_ROWS {
            break;
        }
        chosen.push((file, bytes));
        bytes += file.add.size;
    }
    while chosen.last().is_some_and(|(file, others)| file.add.size > others.saturating_mul(ratio)) {
        chosen.pop();
    }
    if chosen.len() < least { Vec::new() } else { chosen.into_iter().map(|(file, _)| file).collect() }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn files(sizes: &[u64]) -> Vec<DataFile> {
        let file = |(number, size): (usize, &u64)| DataFile {
            partition: Partition(473_000),
            add: Add {
                path: number.to_string(),
                partition_values: BTreeMap::new(),
                size: *size,
                modification_time: 0,
                data_change: true,
                stats: Some("{\"numRecords\":1000}".to_owned()),
                tags: None,
            },
            segments: Vec::new(),
        };
        sizes.iter().enumerate().map(file).collect()
    }

    #[rstest::rstest]
    #[case::few(&[5, 5, 5], false, &[])]
    #[case::enough(&[5, 5, 5, 5], false, &[5, 5, 5, 5])]
    #[case::large_one_waits(&[5, 5, 5, 5, 21], false, &[5, 5, 5, 5])]
    #[case::large_one_joins(&[5, 20, 5, 5, 5], false, &[5, 5, 5, 5, 20])]
    #[case::over_with_two(&[9, 5], true, &[5, 9])]
    #[case::over_with_one(&[9], true, &[])]
    #[case::over_with_a_large_one(&[5, 41], true, &[])]
    #[case::too_large_together(&[60 << 20, 60 << 20, 60 << 20], true, &[60 << 20, 60 << 20])]
    fn a_merge_takes_small_files_first(#[case] sizes: &[u64], #[case] is_over: bool, #[case] wanted: &[u64]) {
        let files = files(sizes);
        let chosen = choose(files.iter().collect(), is_over, 4);
        assert_eq!(chosen.iter().map(|file| file.add.size).collect::<Vec<_>>(), wanted);
    }

    /// Checks that 10,000 updates leave few files, and that merges write each row fewer than 12 times.
    #[test]
    fn merges_write_each_row_a_few_times() {
        let (mut sizes, mut written) = (Vec::new(), 0);
        for round in 0..10_000 {
            sizes.push(90 + round % 20);
            let now = files(&sizes);
            let chosen = choose(now.iter().collect(), false, 8);
            if !chosen.is_empty() {
                let sum: u64 = chosen.iter().map(|file| file.add.size).sum();
                let gone: HashSet<usize> = chosen.iter().map(|file| file.add.path.parse().unwrap()).collect();
                sizes = (0..sizes.len()).filter(|at| !gone.contains(at)).map(|at| sizes[at]).collect();
                sizes.push(sum);
                written += sum;
            }
        }
        assert!(sizes.len() < 24, "{sizes:?}");
        assert!(written < 12 * 1_000_000, "{written}");
    }
}
