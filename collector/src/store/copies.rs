//! Batches that two segments of a bucket hold, because an agent changed collectors before it had the answer.
//!
//! The row of a batch names one of its segments, the one that this collector saw first. Another collector may have seen the other one
//! first. So a collector that adds a segment to the tables needs to know where else its batches are.

use std::collections::HashMap;

use redb::{
    ReadOnlyTable, ReadTransaction, ReadableTable as _, ReadableTableMetadata as _, TableDefinition,
    TableError, WriteTransaction,
};
use ulid::Ulid;

/// (id, a segment that holds the batch beside that of its row)
const COPIES: TableDefinition<'_, (u128, u128), ()> = TableDefinition::new("copies");

type ReadCopies = ReadOnlyTable<(u128, u128), ()>;

/// Opens the table, which an index without copies does not have.
fn open(txn: &ReadTransaction) -> Result<Option<ReadCopies>, redb::Error> {
    match txn.open_table(COPIES) {
        Ok(table) => Ok(Some(table)),
        Err(TableError::TableDoesNotExist(_)) => Ok(None),
        Err(error) => Err(error.into()),
    }
}

/// Adds batches with the segments that hold them too, and removes the entries of removed batches.
pub(super) fn apply(
    txn: &WriteTransaction,
    added: &[(Ulid, Ulid)],
    removed: impl IntoIterator<Item = Ulid>,
) -> Result<(), redb::Error> {
    let mut table = txn.open_table(COPIES)?;
    for (id, segment) in added {
        table.insert((id.0, segment.0), ())?;
    }
    if !table.is_empty()? {
        for id in removed {
            table.retain_in((id.0, 0)..=(id.0, u128::MAX), |_, ()| false)?;
        }
    }
    Ok(())
}

/// Copies all entries into another database.
pub(super) fn copy(from: &ReadTransaction, to: &WriteTransaction) -> Result<(), redb::Error> {
    let mut out = to.open_table(COPIES)?;
    if let Some(table) = open(from)? {
        for found in table.iter()? {
            out.insert(found?.0.value(), ())?;
        }
    }
    Ok(())
}

/// Returns the segments that hold these batches beside those of their rows. Most batches have none.
pub(super) fn find(
    txn: &ReadTransaction,
    ids: impl IntoIterator<Item = Ulid>,
) -> Result<HashMap<Ulid, Vec<Ulid>>, redb::Error> {
    let mut copies: HashMap<Ulid, Vec<Ulid>> = HashMap::new();
    let Some(table) = open(txn)? else { return Ok(copies) };
    if table.is_empty()? {
        return Ok(copies);
    }
    for id in ids {
        for found in table.range((id.0, 0)..=(id.0, u128::MAX))? {
            let (_, segment) = found?.0.value();
            copies.entry(id).or_default().push(Ulid(segment));
        }
    }
    Ok(copies)
}
