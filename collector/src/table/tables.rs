//! The logs of all tables.

use tokio::runtime::Handle;
use ulid::Ulid;

use super::{
    TableError,
    gather::Wants,
    log::Log,
    schema::{FRAMES, HOURS, LABELS, MINUTES, PROFILES, SAMPLES, STACKS, Schema},
};
use crate::store::TableObjects;

/// The logs of all tables. One thread uses them.
pub(super) struct Tables {
    pub(super) frames: Log,
    pub(super) stacks: Log,
    pub(super) labels: Log,
    pub(super) profiles: Log,
    pub(super) samples: Log,
    pub(super) rollups: Option<Rollups>,
    pub(super) objects: TableObjects,
    pub(super) runtime: Handle,
    /// Id of this process.
    writer: String,
}

/// The logs of the tables of sums.
pub(super) struct Rollups {
    pub(super) minutes: Log,
    pub(super) hours: Log,
}

impl Tables {
    /// Starts without any reading. `writer`: id of this process. `has_rollups`: with the tables of sums.
    pub(super) fn new(objects: TableObjects, writer: &str, runtime: Handle, has_rollups: bool) -> Self {
        let log = |schema| Log::new(schema, objects.clone(), writer);
        Self {
            frames: log(&FRAMES),
            stacks: log(&STACKS),
            labels: log(&LABELS),
            profiles: log(&PROFILES),
            samples: log(&SAMPLES),
            rollups: has_rollups.then(|| Rollups { minutes: log(&MINUTES), hours: log(&HOURS) }),
            runtime,
            objects,
            writer: writer.to_owned(),
        }
    }

    /// Returns all logs, in the order in which a compaction writes them.
    pub(super) fn all(&mut self) -> Vec<&mut Log> {
        let Self { frames, stacks, labels, profiles, samples, rollups, .. } = self;
        let mut all = vec![frames, stacks, labels, profiles, samples];
        if let Some(Rollups { minutes, hours }) = rollups {
            all.extend([minutes, hours]);
        }
        all
    }

    /// Returns a table that this process otherwise does not write, without any reading.
    pub(super) fn open(&self, schema: &'static Schema) -> Log {
        Log::new(schema, self.objects.clone(), &self.writer)
    }

    /// Returns the tables that lack a segment and those that a deletion replaced by it.
    pub(super) fn wants_any(&self, names: &[Ulid]) -> Wants {
        let all = Wants { profiles: true, samples: true, minutes: true, hours: true };
        names.iter().fold(all, |wants, name| wants.and(self.wants(*name)))
    }

    /// Returns the tables that lack a segment.
    pub(super) fn wants(&self, segment: Ulid) -> Wants {
        let lacks = |log: &Log| !log.has_taken(segment);
        Wants {
            profiles: lacks(&self.profiles),
            samples: lacks(&self.samples),
            minutes: self.rollups.as_ref().is_some_and(|rollups| lacks(&rollups.minutes)),
            hours: self.rollups.as_ref().is_some_and(|rollups| lacks(&rollups.hours)),
        }
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
