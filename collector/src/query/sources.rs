//! The sources of a merge: profiles in the store, and profiles of the tables.

use std::{collections::BTreeSet, sync::Arc};

use crate::{
    clickhouse::{TableKind, TableSelection},
    store::ProfileLocation,
};

/// Profiles that one merge joins.
#[derive(Default)]
pub(super) struct Sources {
    pub(super) profiles: Vec<ProfileLocation>,
    /// Profiles of the tables, which ClickHouse merges.
    pub(super) tables: Option<TableSum>,
}

/// Profiles of the tables that have the same sample types.
pub(super) struct TableSum {
    pub(super) of: Arc<TableSelection>,
    pub(super) kinds: Vec<TableKind>,
    /// Those with other sample types too.
    pub(super) all: Arc<[TableKind]>,
}

impl TableSum {
    pub(super) fn types(&self) -> &[String] {
        self.kinds.first().map_or(&[], |kind| &kind.types)
    }

    /// Returns the start of the oldest profile, in milliseconds.
    pub(super) fn first_ms(&self) -> u64 {
        self.kinds.iter().map(|kind| kind.first_ms).min().unwrap_or(u64::MAX)
    }

    pub(super) fn profiles(&self) -> u64 {
        self.kinds.iter().map(|kind| kind.profiles).sum()
    }

    /// Returns a text that only an equal sum has.
    pub(super) fn identity(&self) -> String {
        let names: BTreeSet<&str> = self.kinds.iter().map(|kind| kind.name.as_str()).collect();
        format!("{:?} {:?} {names:?}", self.of, self.types())
    }
}
