//! What deletions leave in the index until they are carried out: the deleted batches, and the objects that still hold them.
//!
//! A deleted batch has no row, so no query finds it. Its id stays here, so that an agent that sends it again because it lost the
//! answer does not bring it back, and so that the tables can leave out its rows.

use std::{collections::BTreeSet, ops::Range};

use redb::{
    ReadOnlyTable, ReadTransaction, ReadableTable as _, ReadableTableMetadata as _, TableDefinition,
    TableError, WriteTransaction,
};
use ulid::Ulid;

use super::{
    change::IndexChange,
    object::{HOUR_MS, ObjectName},
};

/// id of a deleted batch -> start in ms
const HIDDEN: TableDefinition<'_, u128, u64> = TableDefinition::new("hidden");
/// (start in ms, id) of deleted batches
const HIDDEN_TIMES: TableDefinition<'_, (u64, u128), ()> = TableDefinition::new("hidden_times");
/// Objects with deleted batches: (hour of the directory, kind, id) -> time in ms at which other segments had all else of it, or 0
const DOOMED: TableDefinition<'_, (u64, u8, u128), u64> = TableDefinition::new("doomed");
/// (segment, a segment that a deletion replaced by it)
const ORIGINS: TableDefinition<'_, (u128, u128), ()> = TableDefinition::new("origins");

const KIND_PROFILE: u8 = 0;
const KIND_SEGMENT: u8 = 1;

/// An object with deleted batches.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(super) struct DoomedObject {
    /// Hour of its directory.
    pub(super) hour: u64,
    pub(super) name: ObjectName,
    /// Time from which other segments have its other batches, in milliseconds. `None`: they do not yet.
    pub(super) replaced_ms: Option<u64>,
}

fn key((hour, name): (u64, ObjectName)) -> Option<(u64, u8, u128)> {
    match name {
        ObjectName::Profile(id) => Some((hour, KIND_PROFILE, id.0)),
        ObjectName::Segment(id) => Some((hour, KIND_SEGMENT, id.0)),
        ObjectName::Deletion(_) => None,
    }
}

/// Opens a table, which an index without deletions does not have.
macro_rules! open {
    ($txn:expr, $table:expr) => {
        match $txn.open_table($table) {
            Ok(table) => Some(table),
            Err(TableError::TableDoesNotExist(_)) => None,
            Err(error) => return Err(error.into()),
        }
    };
}

/// Applies the part of a change that concerns deletions.
pub(super) fn apply(txn: &WriteTransaction, change: &IndexChange) -> Result<(), redb::Error> {
    let IndexChange { hide, doom, replaced, origins, done, add, remove_segments, .. } = change;
    {
        let (mut hidden, mut times) = (txn.open_table(HIDDEN)?, txn.open_table(HIDDEN_TIMES)?);
        if !hidden.is_empty()? {
            for added in add {
                // A collector accepted it again after the deletion.
                let id = added.profile.key.id.0;
                let start_ms = hidden.remove(id)?.map(|start_ms| start_ms.value());
                if let Some(start_ms) = start_ms {
                    times.remove((start_ms, id))?;
                }
            }
        }
        for (id, start_ms) in hide {
            hidden.insert(id.0, start_ms)?;
            times.insert((*start_ms, id.0), ())?;
        }
    }
    {
        let mut doomed = txn.open_table(DOOMED)?;
        for key in doom.iter().copied().filter_map(key) {
            if doomed.get(key)?.is_none() {
                doomed.insert(key, 0)?;
            }
        }
        for (object, at_ms) in replaced {
            if let Some(key) = key(*object) {
                doomed.insert(key, at_ms)?;
            }
        }
        for key in done.iter().copied().filter_map(key) {
            doomed.remove(key)?;
        }
        for id in remove_segments {
            doomed.remove((super::object::segment_hour(*id), KIND_SEGMENT, id.0))?;
        }
    }
    let mut table = txn.open_table(ORIGINS)?;
    for (segment, origin) in origins {
        table.insert((segment.0, origin.0), ())?;
    }
    if !table.is_empty()? {
        for id in remove_segments {
            table.retain_in((id.0, 0)..=(id.0, u128::MAX), |_, ()| false)?;
        }
    }
    Ok(())
}

/// Copies all entries into another database.
pub(super) fn copy(from: &ReadTransaction, to: &WriteTransaction) -> Result<(), redb::Error> {
    macro_rules! copy_tables {
        ($($table:ident),+) => {$(
            let mut out = to.open_table($table)?;
            if let Some(table) = open!(from, $table) {
                for found in table.iter()? {
                    let (key, value) = found?;
                    out.insert(key.value(), value.value())?;
                }
            }
        )+};
    }
    copy_tables!(HIDDEN, HIDDEN_TIMES, DOOMED, ORIGINS);
    Ok(())
}

/// Reports for each of these batches whether it is deleted.
pub(super) fn are_hidden(
    txn: &ReadTransaction,
    ids: impl IntoIterator<Item = Ulid>,
) -> Result<Vec<bool>, redb::Error> {
    let Some(hidden) = open!(txn, HIDDEN) else { return Ok(ids.into_iter().map(|_| false).collect()) };
    ids.into_iter().map(|id| Ok(hidden.get(id.0)?.is_some())).collect()
}

type ReadTimes = ReadOnlyTable<(u64, u128), ()>;

fn times(txn: &ReadTransaction) -> Result<Option<ReadTimes>, redb::Error> {
    Ok(open!(txn, HIDDEN_TIMES))
}

/// Returns the hours of the starts of deleted batches in a range of milliseconds.
pub(super) fn hours(txn: &ReadTransaction, range: Range<u64>) -> Result<BTreeSet<u64>, redb::Error> {
    let mut hours = BTreeSet::new();
    let Some(times) = times(txn)? else { return Ok(hours) };
    let mut from_ms = range.start;
    while from_ms < range.end
        && let Some(found) = times.range((from_ms, 0)..(range.end, 0))?.next()
    {
        let hour = found?.0.value().0 / HOUR_MS;
        hours.insert(hour);
        from_ms = (hour + 1) * HOUR_MS;
    }
    Ok(hours)
}

/// Returns up to `limit` deleted batches that start in a range of milliseconds, with their starts.
pub(super) fn between(
    txn: &ReadTransaction,
    range: Range<u64>,
    limit: usize,
) -> Result<Vec<(Ulid, u64)>, redb::Error> {
    let Some(times) = times(txn)? else { return Ok(Vec::new()) };
    if range.is_empty() {
        return Ok(Vec::new());
    }
    let found = times.range((range.start, 0)..(range.end, 0))?.take(limit);
    found
        .map(|found| {
            let (start_ms, id) = found?.0.value();
            Ok((Ulid(id), start_ms))
        })
        .collect()
}

/// Returns the number of deleted batches that start in a range of milliseconds, up to `limit`.
pub(super) fn count(txn: &ReadTransaction, range: Range<u64>, limit: usize) -> Result<usize, redb::Error> {
    let Some(times) = times(txn)? else { return Ok(0) };
    Ok(times.range((range.start, 0)..(range.end, 0))?.take(limit).count())
}

/// Forgets deleted batches. Their agents cannot send them again, because they are too old.
pub(super) fn forget(txn: &WriteTransaction, batches: &[(Ulid, u64)]) -> Result<(), redb::Error> {
    let (mut hidden, mut times) = (txn.open_table(HIDDEN)?, txn.open_table(HIDDEN_TIMES)?);
    for (id, start_ms) in batches {
        hidden.remove(id.0)?;
        times.remove((*start_ms, id.0))?;
    }
    Ok(())
}

/// Returns up to `limit` objects with deleted batches, the oldest first.
pub(super) fn doomed(txn: &ReadTransaction, limit: usize) -> Result<Vec<DoomedObject>, redb::Error> {
    let Some(table) = open!(txn, DOOMED) else { return Ok(Vec::new()) };
    let objects = table.iter()?.take(limit).map(|found| {
        let (key, value) = found?;
        let (hour, kind, id) = key.value();
        let name =
            if kind == KIND_SEGMENT { ObjectName::Segment(Ulid(id)) } else { ObjectName::Profile(Ulid(id)) };
        Ok(DoomedObject { hour, name, replaced_ms: Some(value.value()).filter(|at_ms| *at_ms > 0) })
    });
    objects.collect()
}

/// Returns the objects with deleted batches in the directory of an hour.
pub(super) fn doomed_in(txn: &ReadTransaction, hour: u64) -> Result<Vec<ObjectName>, redb::Error> {
    let Some(table) = open!(txn, DOOMED) else { return Ok(Vec::new()) };
    let objects = table.range((hour, 0, 0)..(hour + 1, 0, 0))?.map(|found| {
        let (_, kind, id) = found?.0.value();
        Ok(if kind == KIND_SEGMENT { ObjectName::Segment(Ulid(id)) } else { ObjectName::Profile(Ulid(id)) })
    });
    objects.collect()
}

/// Returns the hours of the directories with objects that hold deleted batches.
pub(super) fn doomed_hours(txn: &ReadTransaction) -> Result<Vec<u64>, redb::Error> {
    let mut hours = Vec::new();
    let Some(table) = open!(txn, DOOMED) else { return Ok(hours) };
    let mut from = 0;
    while let Some(found) = table.range((from, 0, 0)..)?.next() {
        let (hour, ..) = found?.0.value();
        hours.push(hour);
        from = hour + 1;
    }
    Ok(hours)
}

/// Returns all segments that a deletion made, each with one that it replaces.
pub(super) fn origins(txn: &ReadTransaction) -> Result<Vec<(Ulid, Ulid)>, redb::Error> {
    let Some(table) = open!(txn, ORIGINS) else { return Ok(Vec::new()) };
    let pairs = table.iter()?.map(|found| {
        let (segment, origin) = found?.0.value();
        Ok((Ulid(segment), Ulid(origin)))
    });
    pairs.collect()
}
