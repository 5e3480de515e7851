//! The log of one Delta table: its state, and commits that no other writer can overwrite.

use std::{
    collections::{BTreeMap, HashMap, HashSet},
    time::Duration,
};

use bytes::Bytes;
use futures::TryStreamExt as _;
use object_store::{ObjectStore, ObjectStoreExt as _, PutMode, PutOptions, PutPayload, path::Path as Key};
use ulid::Ulid;

use super::{
    TableError,
    action::{
        Action, Add, CRC_TAG, CommitInfo, MetaData, Protocol, READER_VERSION, Remove, SEGMENTS_TAG,
        WRITER_VERSION, crc_text, decode, encode,
    },
    checkpoint,
    file::ParquetFile,
    partition::Partition,
    schema::Schema,
};
use crate::{store::TableObjects, time};

/// Commits between two checkpoints.
const CHECKPOINT_INTERVAL: u64 = 20;
/// Time after which this process reads the log again from a checkpoint. Commits stay for longer.
const MAX_STALE: Duration = Duration::from_secs(3600);

const FILE_PREFIX: &str = "part-";
const FILE_SUFFIX: &str = ".zstd.parquet";

/// Reports whether a compactor wrote this data file. Files of other programs do not say which segments they hold.
fn is_own_file(path: &str) -> bool {
    let name = path.rsplit('/').next().unwrap_or_default();
    let id = name.strip_prefix(FILE_PREFIX).and_then(|name| name.strip_suffix(FILE_SUFFIX));
    id.is_some_and(|id| Ulid::from_string(id).is_ok())
}

/// An active data file.
#[derive(Clone, Debug, PartialEq)]
pub(super) struct DataFile {
    pub(super) partition: Partition,
    /// As the log has it.
    pub(super) add: Add,
    /// Segments whose rows the commit of this file added.
    pub(super) segments: Vec<Ulid>,
}

/// The outcome of a commit.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Committed {
    Done,
    /// Another writer took the version. The log has read its commit.
    Conflict,
}

/// Counts of written objects.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(super) struct Written {
    pub(super) files: u64,
    pub(super) bytes: u64,
    /// Space of the files on the disk.
    pub(super) disk_bytes: u64,
}

/// The last commit of another process.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct OtherWriter {
    pub(super) writer: String,
    pub(super) at_ms: u64,
}

/// The log of a table, as far as it was read. Only the compactor changes it.
pub(super) struct Log {
    pub(super) schema: &'static Schema,
    objects: TableObjects,
    /// Id of this process.
    writer: String,
    /// Version of the next commit.
    next: u64,
    pub(super) files: BTreeMap<String, DataFile>,
    /// Removed files with the time of their removal, in milliseconds.
    pub(super) removed: HashMap<String, u64>,
    /// How many active files have each segment.
    taken: HashMap<Ulid, u32>,
    meta: Option<MetaData>,
    protocol: Option<Protocol>,
    other: Option<OtherWriter>,
    /// Written since [`Log::take_written`].
    written: Written,
    /// Version behind the last checkpoint.
    checkpointed: u64,
    /// Time of the last complete reading, in milliseconds.
    read_ms: u64,
}

impl Log {
    /// Starts without any reading.
    pub(super) fn new(schema: &'static Schema, objects: TableObjects, writer: &str) -> Self {
        Self {
            schema,
            objects,
            writer: writer.to_owned(),
            next: 0,
            files: BTreeMap::new(),
            removed: HashMap::new(),
            taken: HashMap::new(),
            meta: None,
            protocol: None,
            other: None,
            written: Written::default(),
            checkpointed: 0,
            read_ms: 0,
        }
    }

    /// Returns the key of a file of this table.
    pub(super) fn key(&self, path: &str) -> Key {
        Key::from(format!("{}/{path}", self.schema.name))
    }

    fn log_key(&self, name: &str) -> Key {
        self.key(&format!("_delta_log/{name}"))
    }

    fn commit_key(&self, version: u64) -> Key {
        self.log_key(&format!("{version:020}.json"))
    }

    /// Version that the next commit of this process tries.
    pub(super) fn next_version(&self) -> u64 {
        self.next
    }

    /// Reports whether the rows of a segment are in the table.
    pub(super) fn has_taken(&self, segment: Ulid) -> bool {
        self.taken.contains_key(&segment)
    }

    /// Returns the segments from this id on whose rows are in the table.
    pub(super) fn taken_from(&self, first: Ulid) -> impl Iterator<Item = Ulid> {
        self.taken.keys().copied().filter(move |id| *id >= first)
    }

    /// Returns the last commit of another process since the log was opened.
    pub(super) fn other_writer(&self) -> Option<&OtherWriter> {
        self.other.as_ref()
    }

    /// Forgets removed files that are deleted: all but these.
    pub(super) fn keep_removed(&mut self, paths: &HashSet<String>) {
        self.removed.retain(|path, _| paths.contains(path));
    }

    /// Returns what this process wrote since the last call.
    pub(super) fn take_written(&mut self) -> Written {
        std::mem::take(&mut self.written)
    }

    /// Reads the log again from its last checkpoint.
    pub(super) async fn reload(&mut self) -> Result<(), TableError> {
        let written = self.written;
        *self = Self::new(self.schema, self.objects.clone(), &self.writer);
        self.written = written;
        self.read().await?;
        self.create().await
    }

    /// Reads the commits that are new. Creates the table if there is none.
    pub(super) async fn refresh(&mut self) -> Result<(), TableError> {
        if self.is_stale() {
            return self.reload().await;
        }
        self.read().await?;
        self.create().await
    }

    /// Reads the commits that are new, for a reader: it creates no table.
    pub(super) async fn follow(&mut self) -> Result<(), TableError> {
        if self.is_stale() {
            *self = Self::new(self.schema, self.objects.clone(), &self.writer);
        }
        self.read().await
    }

    /// Reports whether the next commits may be deleted by now, so that the log would seem to end here.
    fn is_stale(&self) -> bool {
        self.next > 0 && time::now_ms().abs_diff(self.read_ms) > MAX_STALE.as_millis() as u64
    }

    /// Reads the new commits. Changes nothing in the table.
    pub(super) async fn read(&mut self) -> Result<(), TableError> {
        let now_ms = time::now_ms();
        if self.next == 0
            && let Some(version) = self.last_checkpoint().await?
        {
            let key = self.log_key(&checkpoint::name(version));
            let bytes = self.get(&key).await?.ok_or_else(|| damaged(&key, "the file is missing"))?;
            let actions = checkpoint::decode(bytes).map_err(|error| damaged(&key, &error.to_string()))?;
            self.apply(&key, actions)?;
            self.next = version + 1;
            self.checkpointed = self.next;
        }
        while self.read_next().await? {}
        self.read_ms = now_ms;
        Ok(())
    }

    /// Creates the table if it does not exist.
    async fn create(&mut self) -> Result<(), TableError> {
        if self.next == 0 {
            let create = Action {
                protocol: Some(Protocol {
                    min_reader_version: READER_VERSION,
                    min_writer_version: WRITER_VERSION,
                }),
                ..Action::default()
            };
            let describe = Action { meta_data: Some(MetaData::new(self.schema)), ..Action::default() };
            // After a conflict, the other writer has created it.
            self.commit("CREATE TABLE", vec![create, describe]).await?;
        }
        Ok(())
    }

    /// Returns the version that the file [`checkpoint::LAST`] states.
    async fn stated_checkpoint(&self) -> Result<Option<u64>, TableError> {
        let key = self.log_key(checkpoint::LAST);
        let Some(bytes) = self.get(&key).await? else { return Ok(None) };
        let last: Option<checkpoint::Last> = serde_json::from_slice(&bytes).ok();
        Ok(last.map(|last| last.version))
    }

    /// Returns the version of the last checkpoint, if there is one.
    async fn last_checkpoint(&self) -> Result<Option<u64>, TableError> {
        if let Some(version) = self.stated_checkpoint().await? {
            return Ok(Some(version));
        }
        // The file that states it may be lost, and the commits before the checkpoint are deleted.
        let dir = self.key("_delta_log");
        let listed: Vec<_> =
            self.objects.objects.list(Some(&dir)).try_collect().await.map_err(TableError::Object)?;
        Ok(listed.iter().filter_map(|object| checkpoint::version(object.location.filename()?)).max())
    }

    /// Reads the next commit. Reports whether there is one.
    async fn read_next(&mut self) -> Result<bool, TableError> {
        let key = self.commit_key(self.next);
        let Some(bytes) = self.get(&key).await? else { return Ok(false) };
        let actions = decode(&bytes).map_err(|error| damaged(&key, &error.to_string()))?;
        self.apply(&key, actions)?;
        self.next += 1;
        Ok(true)
    }

    /// Applies the actions of a commit or checkpoint.
    fn apply(&mut self, key: &Key, actions: Vec<Action>) -> Result<(), TableError> {
        let is_foreign =
            actions.iter().filter_map(|action| action.commit_info.as_ref()).any(|info| !info.is_own_kind());
        let changes_data = actions.iter().any(|action| action.add.is_some() || action.remove.is_some());
        if is_foreign && changes_data {
            return Err(TableError::Foreign(key.to_string()));
        }
        for Action { commit_info, protocol, meta_data, add, remove } in actions {
            if let Some(info) = commit_info
                && info.gannet_writer != self.writer
            {
                // A commit since the last reading is new, also if the other clock is wrong.
                let at_ms = if self.read_ms == 0 { info.timestamp } else { time::now_ms() };
                self.other = Some(OtherWriter { writer: info.gannet_writer, at_ms });
            }
            if let Some(protocol) = protocol {
                if protocol.min_writer_version > WRITER_VERSION
                    || protocol.min_reader_version > READER_VERSION
                {
                    return Err(TableError::Newer {
                        log: key.to_string(),
                        reader: protocol.min_reader_version,
                        writer: protocol.min_writer_version,
                    });
                }
                self.protocol = Some(protocol);
            }
            if let Some(meta) = meta_data {
                if meta.schema_string != self.schema.delta() {
                    return Err(TableError::Columns(key.to_string()));
                }
                self.meta = Some(meta);
            }
            if let Some(remove) = remove {
                self.forget(&remove.path);
                self.removed.insert(remove.path, remove.deletion_timestamp.unwrap_or(0));
            }
            if let Some(add) = add {
                if !is_own_file(&add.path) {
                    return Err(TableError::Foreign(key.to_string()));
                }
                let partition =
                    Partition::of(&add).ok_or_else(|| damaged(key, "a file has no valid partition"))?;
                self.forget(&add.path);
                self.removed.remove(&add.path);
                let segments: Vec<Ulid> = add
                    .tags
                    .as_ref()
                    .and_then(|tags| tags.get(SEGMENTS_TAG))
                    .map(|ids| ids.split(' ').map(Ulid::from_string).collect::<Result<_, _>>())
                    .transpose()
                    .map_err(|_| damaged(key, "a list of segments is damaged"))?
                    .unwrap_or_default();
                for segment in &segments {
                    *self.taken.entry(*segment).or_default() += 1;
                }
                self.files.insert(add.path.clone(), DataFile { partition, add, segments });
            }
        }
        Ok(())
    }

    fn forget(&mut self, path: &str) {
        let Some(file) = self.files.remove(path) else { return };
        for segment in file.segments {
            if let Some(files) = self.taken.get_mut(&segment) {
                *files -= 1;
                if *files == 0 {
                    self.taken.remove(&segment);
                }
            }
        }
    }

    /// Writes a data file, which no reader sees before a commit adds it. Returns the action for that commit.
    pub(super) async fn put_file(
        &mut self,
        partition: Partition,
        file: ParquetFile,
        data_change: bool,
    ) -> Result<Add, TableError> {
        let path = format!("{}/{FILE_PREFIX}{}{FILE_SUFFIX}", partition.path(), Ulid::new());
        let size = file.bytes.len() as u64;
        let crc = crc_text(&file.bytes);
        self.put(&self.key(&path), file.bytes.into(), PutMode::Overwrite).await?;
        Ok(Add {
            path,
            partition_values: partition.values(),
            size,
            modification_time: time::now_ms(),
            data_change,
            stats: Some(file.stats),
            tags: Some([(CRC_TAG.to_owned(), crc)].into()),
        })
    }

    /// Reads a data file. Returns `None` if it is missing.
    pub(super) async fn read_file(&self, path: &str) -> Result<Option<Bytes>, TableError> {
        self.get(&self.key(path)).await
    }

    /// Removes a data file that no commit has added. A failure leaves it to the cleaning.
    pub(super) async fn drop_file(&self, add: &Add) {
        if let Err(error) = self.objects.objects.delete(&self.key(&add.path)).await {
            tracing::debug!(file = add.path, %error, "cannot remove a file of the table; trying again later");
        }
    }

    /// Commits actions as the next version, or reads the commit of another writer. An error leaves open whether the commit is
    /// there; the next refresh shows it.
    pub(super) async fn commit(
        &mut self,
        operation: &str,
        actions: Vec<Action>,
    ) -> Result<Committed, TableError> {
        if self.is_stale() {
            return Err(TableError::Stale);
        }
        let info = CommitInfo::new(operation, &self.writer);
        let id = info.txn_id.clone();
        let mut all = vec![Action { commit_info: Some(info), ..Action::default() }];
        all.extend(actions);
        let key = self.commit_key(self.next);
        let bytes = encode(&all).map_err(|error| damaged(&key, &error.to_string()))?;
        match self.put(&key, bytes.into(), PutMode::Create).await {
            Ok(()) => {}
            Err(TableError::Object(object_store::Error::AlreadyExists { .. })) => {
                let before = self.next;
                // The client may have written it, and tried again after a lost answer.
                let is_own = self.get(&key).await?.is_some_and(|bytes| {
                    decode(&bytes).is_ok_and(|actions| {
                        actions.iter().any(|a| a.commit_info.as_ref().is_some_and(|info| info.txn_id == id))
                    })
                });
                while self.read_next().await? {}
                if self.next == before {
                    // A listing may be older than the object, and a reading too.
                    return Err(damaged(&key, "it exists, but cannot be read"));
                }
                return Ok(if is_own { Committed::Done } else { Committed::Conflict });
            }
            Err(error) => return Err(error),
        }
        self.apply(&key, all)?;
        self.next += 1;
        Ok(Committed::Done)
    }

    /// Writes a checkpoint if enough commits followed the last one, so that readers need few files of the log.
    pub(super) async fn checkpoint(&mut self) -> Result<(), TableError> {
        if self.next < self.checkpointed + CHECKPOINT_INTERVAL {
            return Ok(());
        }
        let (Some(protocol), Some(meta)) = (&self.protocol, &self.meta) else { return Ok(()) };
        let version = self.next - 1;
        let adds: Vec<&Add> = self.files.values().map(|file| &file.add).collect();
        let removes: Vec<Remove> = self
            .removed
            .iter()
            .map(|(path, at)| Remove {
                path: path.clone(),
                deletion_timestamp: Some(*at),
                data_change: true,
                extended_file_metadata: Some(false),
                partition_values: None,
                size: None,
            })
            .collect();
        let key = self.log_key(&checkpoint::name(version));
        let (bytes, actions) =
            checkpoint::encode(protocol, meta, &adds, &removes).map_err(TableError::Parquet)?;
        let last = checkpoint::Last { version, size: actions, size_in_bytes: bytes.len() as u64 };
        self.put(&key, bytes.into(), PutMode::Overwrite).await?;
        let last = serde_json::to_vec(&last).map_err(|error| damaged(&key, &error.to_string()))?;
        self.put(&self.log_key(checkpoint::LAST), last.into(), PutMode::Overwrite).await?;
        self.checkpointed = version + 1;
        Ok(())
    }

    async fn put(&mut self, key: &Key, bytes: Bytes, mode: PutMode) -> Result<(), TableError> {
        let (size, written) = (bytes.len() as u64, &mut self.written);
        written.files += 1;
        written.bytes += size;
        written.disk_bytes += self.objects.allocated(size);
        let options = PutOptions { mode, ..PutOptions::default() };
        self.objects
            .objects
            .put_opts(key, PutPayload::from(bytes), options)
            .await
            .map_err(TableError::Object)?;
        Ok(())
    }

    async fn get(&self, key: &Key) -> Result<Option<Bytes>, TableError> {
        match self.objects.objects.get(key).await {
            Ok(found) => Ok(Some(found.bytes().await.map_err(TableError::Object)?)),
            Err(object_store::Error::NotFound { .. }) => Ok(None),
            Err(error) => Err(TableError::Object(error)),
        }
    }
}

fn damaged(key: &Key, reason: &str) -> TableError {
    TableError::Damaged { log: key.to_string(), reason: reason.to_owned() }
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use object_store::memory::InMemory;

    use super::*;
    use crate::table::schema::SAMPLES;

    /// Checks that a commit of another process is recent because it is new here, also if its clock is an hour ahead or behind.
    #[tokio::test]
    async fn a_new_commit_is_recent_whatever_the_other_clock_says() {
        let objects = TableObjects { objects: Arc::new(InMemory::new()), root: None, block_bytes: 1 };
        let log = |writer| Log::new(&SAMPLES, objects.clone(), writer);
        let (mut other, mut own) = (log("other"), log("own"));
        other.refresh().await.unwrap();
        own.refresh().await.unwrap();
        let hour_ms = time::HOUR_MS;
        for wrong in [time::now_ms() + hour_ms, time::now_ms() - hour_ms] {
            let info = CommitInfo { timestamp: wrong, ..CommitInfo::new("WRITE", "other") };
            let commit = encode(&[Action { commit_info: Some(info), ..Action::default() }]).unwrap();
            let key = own.commit_key(own.next_version());
            objects.objects.put(&key, commit.into()).await.unwrap();
            let before = time::now_ms();
            own.refresh().await.unwrap();
            let seen = own.other_writer().unwrap();
            assert!((before..=time::now_ms()).contains(&seen.at_ms), "{seen:?}");
            // A process that starts knows only what the commit says.
            let mut started = log("started");
            started.refresh().await.unwrap();
            assert_eq!(started.other_writer().unwrap().at_ms, wrong);
        }
    }
}
