//! Removes partitions of the table that the store no longer has, and files that no reader needs. Counts the space of the table.

use std::{
    collections::HashSet,
    fs, io,
    path::Path,
    time::{Duration, Instant, SystemTime},
};

use futures::TryStreamExt as _;
use object_store::{ObjectMeta, ObjectStore as _, ObjectStoreExt as _};

use super::{
    TableError, TableOptions,
    action::Action,
    checkpoint,
    log::{Committed, Log, Written},
    partition::Partition,
    tables::Tables,
};
use crate::{
    metrics::Metrics,
    store::{StoreError, TableObjects},
    time,
};

/// Age of a file that no commit has added, before it counts as the leftover of a crash. A compaction takes less. The age is the time
/// to the newest file, by the clock of the bucket: with its own clock an hour ahead, a collector would delete what another one is
/// about to commit.
const LEFTOVER_AGE: Duration = Duration::from_secs(3600);
/// Files of one removing commit.
const MAX_REMOVED: usize = 1000;

/// When retention ran, and the space of the table.
#[derive(Default)]
pub(super) struct Retention {
    next: Option<Instant>,
    bytes: u64,
}

impl Retention {
    /// Space of all files of the table on the disk, in bytes.
    pub(super) fn bytes(&self) -> u64 {
        self.bytes
    }

    /// Adds what the logs wrote since the last call.
    pub(super) fn count_written(&mut self, tables: &mut Tables, metrics: &Metrics) {
        for log in tables.all() {
            let Written { files, bytes, disk_bytes } = log.take_written();
            metrics.table_files.inc_by(files);
            metrics.table_written.inc_by(bytes);
            self.bytes += disk_bytes;
        }
    }

    /// Removes partitions before `oldest` if a pass is due, and deletes files that were removed long enough ago.
    pub(super) fn run(
        &mut self,
        tables: &mut Tables,
        oldest: Partition,
        options: &TableOptions,
    ) -> Result<(), TableError> {
        let now = Instant::now();
        if self.next.is_some_and(|next| now < next) {
            return Ok(());
        }
        let runtime = tables.runtime.clone();
        // Samples first, so that no reader finds samples whose stacks are gone.
        for log in tables.all().into_iter().rev() {
            runtime.block_on(expire(log, oldest))?;
        }
        let objects = tables.objects.clone();
        let mut bytes = 0;
        for log in tables.all() {
            bytes += runtime.block_on(clean(log, &objects, options))?;
        }
        if let Some(root) = &objects.root {
            bytes = disk_use(root, objects.block_bytes).map_err(|source| StoreError::Io {
                doing: "count the files of",
                path: root.clone(),
                source,
            })?;
        }
        self.bytes = bytes;
        self.next = Some(now + options.retention_interval);
        Ok(())
    }
}

/// Removes the partitions before `oldest` from the log. Their files stay for readers of earlier versions.
async fn expire(log: &mut Log, oldest: Partition) -> Result<(), TableError> {
    loop {
        let removes: Vec<Action> = log
            .files
            .values()
            .filter(|file| file.partition < oldest)
            .take(MAX_REMOVED)
            .map(|file| Action { remove: Some(file.add.removal(true)), ..Action::default() })
            .collect();
        if removes.is_empty() {
            return Ok(());
        }
        let files = removes.len();
        if log.commit("DELETE", removes).await? == Committed::Done {
            tracing::debug!(table = log.schema.name, files, "removed old partitions from the table");
        }
    }
}

/// Deletes files that were removed before the delay, and leftovers. Returns the bytes of all other files.
async fn clean(log: &mut Log, objects: &TableObjects, options: &TableOptions) -> Result<u64, TableError> {
    let prefix = log.key("");
    let listed: Vec<_> =
        objects.objects.list(Some(&prefix)).try_collect().await.map_err(TableError::Object)?;
    let now_ms = time::now_ms();
    let delay_ms = options.delete_delay.as_millis() as u64;
    let first_version = first_version(&listed, options.log_keep, now_ms);
    let newest = listed.iter().map(|object| object.last_modified).max();
    let mut bytes = 0;
    let (mut deleted, mut kept) = (Vec::new(), HashSet::new());
    for object in listed {
        let path = object.location.as_ref().strip_prefix(prefix.as_ref()).unwrap_or_default();
        let path = path.trim_start_matches('/');
        let age = newest.map_or(0, |newest| (newest - object.last_modified).num_seconds());
        let is_due = match path.strip_prefix("_delta_log/") {
            Some(name) => version_of(name).is_some_and(|version| version < first_version),
            None if log.files.contains_key(path) => false,
            None => match log.removed.get(path) {
                Some(removed_ms) => now_ms.saturating_sub(*removed_ms) >= delay_ms,
                None => age >= LEFTOVER_AGE.as_secs() as i64,
            },
        };
        if is_due {
            match objects.objects.delete(&object.location).await {
                Ok(()) | Err(object_store::Error::NotFound { .. }) => {
                    deleted.push(path.to_owned());
                    continue;
                }
                Err(error) => return Err(TableError::Object(error)),
            }
        }
        bytes += object.size;
        kept.insert(path.to_owned());
    }
    if let Some(root) = &objects.root {
        for path in &deleted {
            let file = root.join(log.schema.name).join(path);
            // A directory with a file stays.
            for dir in file.ancestors().skip(1).take(2) {
                let _ = fs::remove_dir(dir);
            }
        }
    }
    log.keep_removed(&kept);
    Ok(bytes)
}

/// Returns the version of a commit or checkpoint with this name.
fn version_of(name: &str) -> Option<u64> {
    checkpoint::version(name).or_else(|| name.strip_suffix(".json")?.parse().ok())
}

/// Returns the version before which the log is not needed: that of the newest checkpoint that is old enough.
fn first_version(listed: &[ObjectMeta], keep: Duration, now_ms: u64) -> u64 {
    let old = listed.iter().filter_map(|object| {
        let modified_ms = u64::try_from(object.last_modified.timestamp_millis()).unwrap_or(u64::MAX);
        let is_old = now_ms.saturating_sub(modified_ms) >= keep.as_millis() as u64;
        checkpoint::version(object.location.filename()?).filter(|_| is_old)
    });
    old.max().unwrap_or(0)
}

/// Returns the space of a directory. Removes what interrupted writes left.
fn disk_use(dir: &Path, block_bytes: u64) -> io::Result<u64> {
    let entries = match fs::read_dir(dir) {
        Ok(entries) => entries,
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(0),
        Err(error) => return Err(error),
    };
    let mut bytes = block_bytes;
    for entry in entries {
        let entry = entry?;
        let Ok(meta) = entry.metadata() else { continue };
        if meta.is_dir() {
            bytes += disk_use(&entry.path(), block_bytes)?;
            continue;
        }
        let age = meta.modified().ok().and_then(|at| SystemTime::now().duration_since(at).ok());
        // The store writes a file under its name with a number behind it first.
        let is_leftover =
            entry.file_name().to_string_lossy().contains('#') && age.is_some_and(|age| age >= LEFTOVER_AGE);
        if !(is_leftover && fs::remove_file(entry.path()).is_ok()) {
            bytes += meta.len().next_multiple_of(block_bytes);
        }
    }
    Ok(bytes)
}

/// Returns the space of the directory of a table that an earlier run wrote, for a collector that does not write it.
pub(crate) fn count_unused(root: &Path, block_bytes: u64) -> u64 {
    disk_use(root, block_bytes).unwrap_or(0)
}
