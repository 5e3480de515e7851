//! The logs of all tables.

use tokio::runtime::Handle;

use super::{
    TableError,
    log::Log,
    schema::{FRAMES, LABELS, PROFILES, SAMPLES, STACKS},
};
use crate::store::TableObjects;

/// The logs of all tables. One thread uses them.
pub(super) struct Tables {
    pub(super) frames: Log,
    pub(super) stacks: Log,
    pub(super) labels: Log,
    pub(super) profiles: Log,
    pub(super) samples: Log,
    pub(super) objects: TableObjects,
    pub(super) runtime: Handle,
}

impl Tables {
    /// Starts without any reading. `writer`: id of this process.
    pub(super) fn new(objects: TableObjects, writer: &str, runtime: Handle) -> Self {
        let log = |schema| Log::new(schema, objects.clone(), writer);
        Self {
            frames: log(&FRAMES),
            stacks: log(&STACKS),
            labels: log(&LABELS),
            profiles: log(&PROFILES),
            samples: log(&SAMPLES),
            runtime,
            objects,
        }
    }

    /// Returns all logs, in the order in which a compaction writes them.
    pub(super) fn all(&mut self) -> [&mut Log; 5] {
        let Self { frames, stacks, labels, profiles, samples, .. } = self;
        [frames, stacks, labels, profiles, samples]
    }

    /// Reads what is new in all logs, and creates missing tables.
    pub(super) fn refresh(&mut self) -> Result<(), TableError> {
        let runtime = self.runtime.clone();
        for log in self.all() {
            runtime.block_on(log.refresh())?;
        }
        Ok(())
    }

    /// Reads all logs again from their checkpoints.
    pub(super) fn reload(&mut self) -> Result<(), TableError> {
        let runtime = self.runtime.clone();
        for log in self.all() {
            runtime.block_on(log.reload())?;
        }
        Ok(())
    }

    /// Writes the checkpoints that are due.
    pub(super) fn checkpoint(&mut self) -> Result<(), TableError> {
        let runtime = self.runtime.clone();
        for log in self.all() {
            runtime.block_on(log.checkpoint())?;
        }
        Ok(())
    }
}
