//! The tables of sums, for queries of this process: the rows of an hour, and the stacks and frames to which they refer.

use std::{ops::Range, sync::Arc};

use tokio::sync::{Mutex, OwnedMutexGuard};
use ulid::Ulid;

use super::{
    TableError,
    log::Log,
    profile::TableFrame,
    reader::{Bounds, ColumnValues, Datum, TableSnapshot},
    schema::{FRAMES, HOURS, MINUTES, STACKS},
};
use crate::{
    store::TableObjects,
    time::{HOUR_MS, MINUTE_MS},
};

/// A table of sums, by the time that one of its sums covers.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(crate) enum Grain {
    /// By minute and service.
    Minute,
    /// By hour, service, namespace and pod.
    Hour,
}

impl Grain {
    /// Returns the time that one sum covers, in milliseconds.
    pub(crate) fn ms(self) -> u64 {
        match self {
            Self::Minute => MINUTE_MS,
            Self::Hour => HOUR_MS,
        }
    }
}

/// Follows the logs of the tables of sums. It changes nothing.
pub(crate) struct SumsReader {
    logs: Arc<Mutex<SumLogs>>,
}

/// The logs of the tables of sums, as far as they were read.
pub(crate) struct SumLogs {
    objects: TableObjects,
    minutes: Log,
    hours: Log,
    stacks: Log,
    frames: Log,
}

impl SumLogs {
    fn new(objects: TableObjects) -> Self {
        let log = |schema| Log::new(schema, objects.clone(), "");
        Self {
            minutes: log(&MINUTES),
            hours: log(&HOURS),
            stacks: log(&STACKS),
            frames: log(&FRAMES),
            objects,
        }
    }

    async fn follow(&mut self) -> Result<(), TableError> {
        // A commit of sums follows those of the rows to which it refers, so the sums go first here.
        for log in [&mut self.minutes, &mut self.hours, &mut self.stacks, &mut self.frames] {
            log.follow().await?;
        }
        Ok(())
    }

    /// Reports whether a table of sums has the samples of a segment.
    pub(crate) fn has(&self, grain: Grain, segment: Ulid) -> bool {
        match grain {
            Grain::Minute => self.minutes.has_taken(segment),
            Grain::Hour => self.hours.has_taken(segment),
        }
    }
}

impl SumsReader {
    /// Starts without any reading.
    pub(crate) fn new(objects: TableObjects) -> Self {
        Self { logs: Arc::new(Mutex::new(SumLogs::new(objects))) }
    }

    /// Reads the new commits. Returns the logs, and what they hold of some hours, counted from 1970. After an error, the next call
    /// reads the logs from the start.
    pub(crate) async fn snapshot(
        &self,
        of: Range<u64>,
    ) -> Result<(OwnedMutexGuard<SumLogs>, SumTables), TableError> {
        let mut logs = Arc::clone(&self.logs).lock_owned().await;
        if let Err(error) = logs.follow().await {
            *logs = SumLogs::new(logs.objects.clone());
            return Err(error);
        }
        let table = |log: &Log| {
            TableSnapshot::new(log.schema, logs.objects.clone(), log, |partition| of.contains(&partition.0))
        };
        let tables = SumTables {
            minutes: table(&logs.minutes),
            hours: table(&logs.hours),
            stacks: table(&logs.stacks),
            frames: table(&logs.frames),
        };
        Ok((logs, tables))
    }
}

/// One version of the tables of sums, with their stacks and frames.
pub(crate) struct SumTables {
    minutes: TableSnapshot,
    hours: TableSnapshot,
    stacks: TableSnapshot,
    frames: TableSnapshot,
}

/// A row of a table of sums.
#[derive(Clone, Copy, Debug)]
pub(crate) struct SumRow<'a> {
    pub(crate) service: &'a [u8],
    /// Empty in the table by minute, and without the label.
    pub(crate) namespace: &'a [u8],
    pub(crate) pod: &'a [u8],
    /// Type and unit of `value`.
    pub(crate) kind: &'a [u8],
    /// Start of the minute or hour, in milliseconds.
    pub(crate) start_ms: u64,
    pub(crate) stack: i64,
    pub(crate) value: i64,
    pub(crate) count: Option<i64>,
    /// Index of the first guessed location of the stack; 0: none.
    pub(crate) guessed_from: i64,
}

fn bytes(datum: Datum<'_>) -> &[u8] {
    if let Datum::Bytes(bytes) = datum { bytes } else { &[] }
}

fn long(datum: Datum<'_>) -> i64 {
    if let Datum::Long(value) = datum { value } else { 0 }
}

fn text(datum: Datum<'_>) -> String {
    String::from_utf8_lossy(bytes(datum)).into_owned()
}

fn hash(datum: Datum<'_>) -> u128 {
    bytes(datum).try_into().map_or(0, u128::from_be_bytes)
}

/// Returns the indexes of columns by their names.
fn columns<const N: usize>(table: &TableSnapshot, names: [&str; N]) -> [usize; N] {
    let at = |name: &str| table.columns().iter().position(|column| column.name == name);
    names.map(|name| at(name).unwrap_or_default())
}

/// A row group that may have rows of some services.
struct Group<'t> {
    table: &'t TableSnapshot,
    file: usize,
    footer: Arc<super::reader::Footer>,
    number: usize,
    rows: usize,
}

impl Group<'_> {
    /// Reads columns. Also returns the number of read bytes.
    async fn read<const N: usize>(&self, names: [&str; N]) -> Result<([ColumnValues; N], u64), TableError> {
        let (mut values, mut read) = (Vec::with_capacity(N), 0);
        for column in columns(self.table, names) {
            let (of, bytes) = self.table.column(self.file, &self.footer, self.number, column).await?;
            values.push(of);
            read += bytes;
        }
        // The list has N values.
        values.try_into().map(|values| (values, read)).map_err(|_| TableError::Stale)
    }
}

impl TableSnapshot {
    /// Returns the row groups of an hour that may have rows of some services, as `admits` says of the first and the last name in
    /// one. Also returns the number of read bytes.
    async fn groups(
        &self,
        hour: u64,
        admits: &dyn Fn(&[u8], &[u8]) -> bool,
    ) -> Result<(Vec<Group<'_>>, u64), TableError> {
        let [service] = columns(self, ["service_name"]);
        let may_have = |bounds: Option<&Bounds>| match bounds {
            Some(Bounds::Texts(first, last)) => admits(first, last),
            _ => true,
        };
        let (mut groups, mut read) = (Vec::new(), 0);
        for file in self.files_of(hour) {
            if !may_have(self.file_bounds(file, service)) {
                continue;
            }
            let (footer, bytes) = self.footer(file).await?;
            read += bytes;
            let footer = Arc::new(footer);
            for number in 0..footer.groups() {
                if may_have(self.group_bounds(&footer, number, service).as_ref()) {
                    let (rows, footer) = (footer.rows(number), Arc::clone(&footer));
                    groups.push(Group { table: self, file, footer, number, rows });
                }
            }
        }
        Ok((groups, read))
    }
}

impl SumTables {
    /// Calls `each` for the sums of an hour until it returns false. `admits` reports whether it wants a service between two names.
    /// Returns the number of read bytes.
    pub(crate) async fn rows(
        &self,
        grain: Grain,
        hour: u64,
        admits: &dyn Fn(&[u8], &[u8]) -> bool,
        mut each: impl FnMut(SumRow<'_>) -> bool,
    ) -> Result<u64, TableError> {
        let table = match grain {
            Grain::Minute => &self.minutes,
            Grain::Hour => &self.hours,
        };
        let (groups, mut read) = table.groups(hour, admits).await?;
        for group in groups {
            let names = ["service_name", "type", "stack_id", "value", "count", "guessed_from"];
            let ([services, kinds, stacks, values, counts, guesses], bytes_read) = group.read(names).await?;
            read += bytes_read;
            let (mut times, mut pods) = (None, None);
            match grain {
                Grain::Minute => {
                    let ([values], bytes_read) = group.read(["time"]).await?;
                    read += bytes_read;
                    times = Some(values);
                }
                Grain::Hour => {
                    let (values, bytes_read) = group.read(["namespace", "pod"]).await?;
                    read += bytes_read;
                    pods = Some(values);
                }
            }
            for row in 0..group.rows {
                let label = |at: usize| pods.as_ref().map_or(&[][..], |pods| bytes(pods[at].get(row)));
                let micros = times.as_ref().map(|times| long(times.get(row)));
                let sum = SumRow {
                    service: bytes(services.get(row)),
                    namespace: label(0),
                    pod: label(1),
                    kind: bytes(kinds.get(row)),
                    start_ms: micros.map_or(hour * HOUR_MS, |micros| micros.max(0) as u64 / 1000),
                    stack: long(stacks.get(row)),
                    value: long(values.get(row)),
                    count: if let Datum::Long(count) = counts.get(row) { Some(count) } else { None },
                    guessed_from: long(guesses.get(row)),
                };
                if !each(sum) {
                    return Ok(read);
                }
            }
        }
        Ok(read)
    }

    /// Calls `is_new` for the id and hash of each stack of an hour, and `add` with the hash and the frames of those for which it
    /// returns true. Returns the number of read bytes.
    pub(crate) async fn stacks(
        &self,
        hour: u64,
        admits: &dyn Fn(&[u8], &[u8]) -> bool,
        mut is_new: impl FnMut(i64, u128) -> bool,
        mut add: impl FnMut(u128, Vec<i64>),
    ) -> Result<u64, TableError> {
        let (groups, mut read) = self.stacks.groups(hour, admits).await?;
        for group in groups {
            let ([ids, hashes], bytes) = group.read(["stack_id", "stack_hash"]).await?;
            read += bytes;
            let new = (0..group.rows).filter_map(|row| {
                let hash = hash(hashes.get(row));
                is_new(long(ids.get(row)), hash).then_some((row, hash))
            });
            let new: Vec<(usize, u128)> = new.collect();
            if new.is_empty() {
                continue;
            }
            let ([frames], bytes) = group.read(["frames"]).await?;
            read += bytes;
            for (row, hash) in new {
                add(hash, frames.list(row).map(|(frame, _)| long(frame)).collect());
            }
        }
        Ok(read)
    }

    /// Calls `is_new` for the id and hash of each frame of an hour, and `add` with the hash and the content of those for which it
    /// returns true. Returns the number of read bytes.
    pub(crate) async fn frames(
        &self,
        hour: u64,
        admits: &dyn Fn(&[u8], &[u8]) -> bool,
        mut is_new: impl FnMut(i64, u128) -> bool,
        mut add: impl FnMut(u128, TableFrame),
    ) -> Result<u64, TableError> {
        let (groups, mut read) = self.frames.groups(hour, admits).await?;
        for group in groups {
            let ([ids, hashes], bytes) = group.read(["frame_id", "frame_hash"]).await?;
            read += bytes;
            let new = (0..group.rows).filter_map(|row| {
                let hash = hash(hashes.get(row));
                is_new(long(ids.get(row)), hash).then_some((row, hash))
            });
            let new: Vec<(usize, u128)> = new.collect();
            if new.is_empty() {
                continue;
            }
            let texts = ["function", "system_name", "file", "mapping_file", "build_id"];
            let ([functions, systems, files, mappings, build_ids], bytes) = group.read(texts).await?;
            read += bytes;
            let numbers = ["line", "column", "start_line", "address"];
            let ([lines, places, starts, addresses], bytes) = group.read(numbers).await?;
            read += bytes;
            let others = ["mapping_start", "mapping_limit", "mapping_offset", "inlined", "folded"];
            let ([froms, limits, offsets, inlined, folded], bytes) = group.read(others).await?;
            read += bytes;
            for (row, hash) in new {
                let has = |of: &ColumnValues| of.get(row) != Datum::Null;
                let text = |of: &ColumnValues| text(of.get(row));
                let long = |of: &ColumnValues| long(of.get(row));
                let frame = TableFrame {
                    line: has(&functions).then(|| [text(&functions), text(&systems), text(&files)]),
                    numbers: [long(&lines), long(&places), long(&starts)],
                    inlined: inlined.get(row) == Datum::Bool(true),
                    address: long(&addresses) as u64,
                    mapping: has(&mappings).then(|| [text(&mappings), text(&build_ids)]),
                    range: [long(&froms) as u64, long(&limits) as u64, long(&offsets) as u64],
                    folded: folded.get(row) == Datum::Bool(true),
                };
                add(hash, frame);
            }
        }
        Ok(read)
    }
}
