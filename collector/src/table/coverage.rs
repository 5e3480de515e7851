//! What the tables hold, for an engine that reads them: a version of each table, and the segments in it.

use super::{
    TableError,
    log::Log,
    schema::{FRAMES, LABELS, PROFILES, SAMPLES, STACKS},
};
use crate::store::TableObjects;
use ulid::Ulid;

/// Follows the logs of the tables. It changes nothing.
pub(crate) struct CoverageReader {
    objects: TableObjects,
    samples: Log,
    profiles: Log,
    labels: Log,
    stacks: Log,
    frames: Log,
}

/// Versions of the tables that belong together: all stacks, frames and label sets of the samples are in theirs.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(crate) struct TableVersions {
    pub(crate) samples: u64,
    pub(crate) profiles: u64,
    pub(crate) labels: u64,
    pub(crate) stacks: u64,
    pub(crate) frames: u64,
}

impl CoverageReader {
    /// Starts without any reading.
    pub(crate) fn new(objects: TableObjects) -> Self {
        let log = |schema| Log::new(schema, objects.clone(), "");
        Self {
            samples: log(&SAMPLES),
            profiles: log(&PROFILES),
            labels: log(&LABELS),
            stacks: log(&STACKS),
            frames: log(&FRAMES),
            objects,
        }
    }

    /// Reads the new commits of all logs. Returns the versions, or `None` before the first commit of a table. After an error, the next
    /// call reads the logs from the start.
    pub(crate) async fn refresh(&mut self) -> Result<Option<TableVersions>, TableError> {
        let refreshed = self.read().await;
        if refreshed.is_err() {
            *self = Self::new(self.objects.clone());
        }
        refreshed
    }

    async fn read(&mut self) -> Result<Option<TableVersions>, TableError> {
        let Self { objects: _, samples, profiles, labels, stacks, frames } = self;
        let mut versions = [None; 5];
        // A commit of samples follows those of the rows to which it refers, so the samples go first here.
        for (log, version) in [samples, profiles, labels, stacks, frames].into_iter().zip(&mut versions) {
            log.follow().await?;
            *version = log.next_version().checked_sub(1);
        }
        let [Some(samples), Some(profiles), Some(labels), Some(stacks), Some(frames)] = versions else {
            return Ok(None);
        };
        Ok(Some(TableVersions { samples, profiles, labels, stacks, frames }))
    }

    /// Reports whether the table of samples and the table of profiles have the rows of a segment.
    pub(crate) fn has(&self, segment: Ulid) -> bool {
        self.samples.has_taken(segment) && self.profiles.has_taken(segment)
    }

    /// Reports whether the table of samples or the table of profiles has the rows of a segment. A compaction under way has added them to
    /// one of the tables.
    pub(crate) fn has_some(&self, segment: Ulid) -> bool {
        self.samples.has_taken(segment) || self.profiles.has_taken(segment)
    }
}
