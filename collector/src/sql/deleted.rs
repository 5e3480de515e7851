//! Rows of deleted profiles, which a scan leaves out until the collector has removed them from the tables.

use std::{collections::BTreeSet, sync::Arc};

use ulid::Ulid;

use super::SqlError;
use crate::{
    store::{Store, StoreError},
    table::{ColumnValues, Datum, TableError, TableSnapshot},
    time::HOUR_MS,
};

/// The profiles that were deleted before a query, of which the tables may have rows.
pub(super) struct Deleted {
    store: Arc<Store>,
    /// Hours of their starts, counted from 1970. Empty: the tables have no such row.
    hours: BTreeSet<u64>,
}

impl Deleted {
    /// Finds the hours with deleted rows. Blocking.
    pub(super) fn new(store: Arc<Store>) -> Result<Self, StoreError> {
        let hours = if store.unclean_tables().is_some() { store.deleted_hours()? } else { BTreeSet::new() };
        Ok(Self { store, hours })
    }

    /// Returns the column that names the profile of a row, if this file of the table can have rows of deleted ones. Fails for sums,
    /// which do not name the profiles.
    pub(super) fn column_of(&self, table: &TableSnapshot, file: usize) -> Result<Option<usize>, SqlError> {
        if self.hours.is_empty() {
            return Ok(None);
        }
        let hour = table.files[file].hour_since_1970();
        if !hour.is_some_and(|hour| self.hours.contains(&hour)) {
            return Ok(None);
        }
        if table.has_sums() {
            let first = self.hours.first().copied().unwrap_or(0);
            let at = jiff::Timestamp::from_millisecond((first * HOUR_MS) as i64).unwrap_or_default();
            return Err(SqlError::Unclean(table.name(), at.to_string()));
        }
        Ok(table.columns().iter().position(|column| column.name == "profile_id"))
    }

    /// Returns the rows of deleted profiles, in order. `ids`: the column that names the profiles. Blocking.
    pub(super) fn rows(&self, ids: &ColumnValues, rows: usize) -> Result<Vec<u32>, SqlError> {
        let (mut found, mut last) = (Vec::new(), (None, false));
        for row in 0..rows {
            let number = ids.text_number(row);
            // The rows of a profile are neighbours.
            if number != last.0 || row == 0 {
                let id = match ids.get(row) {
                    Datum::Bytes(text) => {
                        std::str::from_utf8(text).ok().and_then(|id| Ulid::from_string(id).ok())
                    }
                    _ => None,
                };
                let is_deleted = match id {
                    Some(id) => self.store.are_deleted(&[id]).map_err(TableError::from)? == [true],
                    None => false,
                };
                last = (number, is_deleted);
            }
            if last.1 {
                found.push(row as u32);
            }
        }
        Ok(found)
    }
}
