//! The sums of ClickHouse as a profile.

use std::collections::{HashMap, HashSet};

use gannet_proto::{
    pprof::{Builder, Header},
    profiles::Profile,
};

use super::{
    ClickHouse, ClickHouseError,
    rows::{Row, RowError},
    sql::{Kind, Statements, TableSelection},
};
use crate::table::{LabelSet, StackSum, TableFrame, fill};

/// Distinct stacks of one answer. It bounds the memory, as in a merge of profiles.
const MAX_SUMS: usize = 1_000_000;
/// Frames of all stacks of one answer.
const MAX_FRAMES: usize = 32_000_000;
/// Rows that one statement reads by their ids. It bounds the length of the statement.
const IDS_OF_STATEMENT: usize = 50_000;

/// Profiles of the tables that have the same sample types and the same name.
#[derive(Clone, Debug)]
pub(crate) struct TableKind {
    pub(crate) types: Vec<String>,
    /// Value of the label `profile_name`; empty without it.
    pub(crate) name: String,
    pub(crate) profiles: u64,
    /// Start of the oldest one, in milliseconds.
    pub(crate) first_ms: u64,
    properties: Properties,
}

/// Content of the profiles beside their samples.
#[derive(Clone, Debug)]
struct Properties {
    /// One or two of the period types.
    period_types: Vec<String>,
    period: i64,
    start_nanos: i64,
    end_nanos: i64,
    /// Length of the longest one, for profiles without a start.
    duration_nanos: i64,
    /// At least one has a start.
    has_start: bool,
    comments: Vec<String>,
}

impl TableKind {
    fn read(row: &mut Row<'_>) -> Result<Self, RowError> {
        let (types, name, profiles, first_ms) = (row.texts()?, row.text()?, row.long()?, row.long()?);
        let (period_types, period) = (row.texts()?, row.long()?);
        let (with_start, start_nanos, end_nanos) = (row.long()?, row.long()?, row.long()?);
        let (duration_nanos, comments) = (row.long()?, row.texts()?);
        let has_start = with_start > 0;
        let properties =
            Properties { period_types, period, start_nanos, end_nanos, duration_nanos, has_start, comments };
        let number = |number: i64| u64::try_from(number).unwrap_or(0);
        Ok(Self { types, name, profiles: number(profiles), first_ms: number(first_ms), properties })
    }
}

impl Properties {
    /// Starts a profile with these properties, by the rules of a merge of profiles.
    fn header<'a>(&'a self, sample_types: &'a [(&'a str, &'a str)]) -> Header<'a> {
        let (period_type, period) = match self.period_types.as_slice() {
            [one] if !one.is_empty() => (split(one), self.period),
            _ => (("", ""), 0),
        };
        let (time_nanos, duration_nanos) = if self.has_start {
            (self.start_nanos, self.end_nanos.saturating_sub(self.start_nanos))
        } else {
            (0, self.duration_nanos)
        };
        Header { sample_types, period_type, period, time_nanos, duration_nanos }
    }
}

/// Splits `cpu/nanoseconds` into type and unit.
fn split(name: &str) -> (&str, &str) {
    name.split_once('/').unwrap_or((name, ""))
}

/// Reads a frame with its id.
fn read_frame(row: &mut Row<'_>) -> Result<(i64, TableFrame), RowError> {
    let (id, has_no_function) = (row.long()?, row.flag()?);
    let texts = [row.text()?, row.text()?, row.text()?];
    let numbers = [row.long()?, row.long()?, row.long()?];
    let (inlined, address, has_no_mapping) = (row.flag()?, row.long()? as u64, row.flag()?);
    let mapping = [row.text()?, row.text()?];
    let range = [row.long()? as u64, row.long()? as u64, row.long()? as u64];
    let frame = TableFrame {
        line: (!has_no_function).then_some(texts),
        numbers,
        inlined,
        address,
        mapping: (!has_no_mapping).then_some(mapping),
        range,
        folded: row.flag()?,
    };
    Ok((id, frame))
}

/// Reads a label set with its id.
fn read_labels(row: &mut Row<'_>) -> Result<(i64, LabelSet), RowError> {
    let id = row.long()?;
    let texts = row.texts()?.into_iter().zip(row.texts()?).collect();
    let numbers = row.texts()?.into_iter().zip(row.longs()?).collect();
    let units = row.texts()?.into_iter().zip(row.texts()?).collect();
    Ok((id, LabelSet { texts, numbers, units }))
}

impl ClickHouse {
    /// Returns the kinds of profiles in the tables, and the bytes that ClickHouse read.
    pub(crate) async fn kinds(&self, of: &TableSelection) -> Result<(Vec<TableKind>, u64), ClickHouseError> {
        let mut kinds = Vec::new();
        let statement = Statements { location: &self.location, of }.kinds();
        let each = |row: &mut Row<'_>| collect(&mut kinds, TableKind::read(row)?, MAX_SUMS);
        let read = self.http.select(statement, each).await?;
        Ok((kinds, read))
    }

    /// Sums the samples of some kinds of `all`, which have the same types. The values of a stack are those that a merge of the profiles
    /// would have. Also returns the bytes that ClickHouse read. Memory grows with the distinct stacks.
    pub(crate) async fn merge(
        &self,
        of: &TableSelection,
        kinds: &[TableKind],
        all: &[TableKind],
    ) -> Result<(Vec<Profile>, u64), ClickHouseError> {
        let Some((first, others)) = kinds.split_first() else { return Ok((Vec::new(), 0)) };
        let same = all.iter().filter(|kind| kind.types == first.types).count();
        let names: Vec<String> = kinds.iter().map(|kind| kind.name.clone()).collect();
        let shares = |other: &TableKind| {
            other.types != first.types && other.types.iter().any(|t| first.types.contains(t))
        };
        let kind = Kind {
            types: &first.types,
            names: (same > kinds.len()).then_some(&names[..]),
            is_alone: same == kinds.len() && !all.iter().any(shares),
        };
        let statements = Statements { location: &self.location, of };
        let (width, mut sums, mut frames_left, mut misses) =
            (first.types.len(), Vec::new(), MAX_FRAMES, false);
        let statement = statements.sums(kind, MAX_SUMS + 1);
        let read = |row: &mut Row<'_>| {
            let (is_missing, frames, labels) = (row.flag()?, row.longs()?, row.long()?);
            let values: Vec<i64> = (0..width).map(|_| row.long()).collect::<Result<_, _>>()?;
            misses |= is_missing;
            frames_left = frames_left.checked_sub(frames.len()).ok_or(RowError::TooMany)?;
            collect(&mut sums, StackSum { frames, labels, values }, MAX_SUMS)
        };
        let mut bytes = self.http.select(statement, read).await?;
        if misses {
            return Err(self.incomplete("stacks"));
        }
        let wanted: HashSet<i64> = sums.iter().flat_map(|sum| sum.frames.iter().copied()).collect();
        let (frames, read) = self.by_id(wanted, |ids| statements.frames(ids), read_frame, "frames").await?;
        bytes += read;
        let wanted: HashSet<i64> = sums.iter().map(|sum| sum.labels).filter(|id| *id != 0).collect();
        let (labels, read) = self.by_id(wanted, |ids| statements.labels(ids), read_labels, "labels").await?;
        bytes += read;
        let types: Vec<(&str, &str)> = first.types.iter().map(|name| split(name)).collect();
        let mut builder = Builder::new(first.properties.header(&types));
        fill(&mut builder, &sums, &frames, &labels);
        // Profiles without samples carry the properties of the other kinds.
        let mut profiles = Vec::new();
        for kind in others {
            let mut builder = Builder::new(kind.properties.header(&types));
            kind.properties.comments.iter().for_each(|comment| builder.comment(comment));
            profiles.push(builder.finish());
        }
        first.properties.comments.iter().for_each(|comment| builder.comment(comment));
        profiles.push(builder.finish());
        Ok((profiles, bytes))
    }

    /// Reads rows by their ids, a part of the ids at a time. Also returns the bytes that ClickHouse read.
    async fn by_id<T>(
        &self,
        ids: HashSet<i64>,
        statement: impl Fn(&[i64]) -> String,
        read: impl Fn(&mut Row<'_>) -> Result<(i64, T), RowError>,
        table: &'static str,
    ) -> Result<(HashMap<i64, T>, u64), ClickHouseError> {
        let (mut rows, wanted, mut bytes) = (HashMap::with_capacity(ids.len()), ids.len(), 0);
        let mut ids: Vec<i64> = ids.into_iter().collect();
        // Neighbours are in the same files.
        ids.sort_unstable();
        for part in ids.chunks(IDS_OF_STATEMENT) {
            let each = |row: &mut Row<'_>| {
                let (id, value) = read(row)?;
                rows.insert(id, value);
                Ok(())
            };
            bytes += self.http.select(statement(part), each).await?;
        }
        if rows.len() == wanted { Ok((rows, bytes)) } else { Err(self.incomplete(table)) }
    }

    fn incomplete(&self, table: &str) -> ClickHouseError {
        ClickHouseError::Tables {
            server: self.server.to_string(),
            reason: format!("the table {table} lacks rows to which the samples refer"),
        }
    }
}

fn collect<T>(to: &mut Vec<T>, item: T, max: usize) -> Result<(), RowError> {
    if to.len() == max {
        return Err(RowError::TooMany);
    }
    to.push(item);
    Ok(())
}
