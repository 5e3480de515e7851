//! The stored files: one for each build id and origin, in a directory, and in the bucket if the profiles lie in one.
//!
//! Each origin has its own directory in the layout that debuggers know: `uploaded/.build-id/ab/cdef01.debug`. A file gets its
//! name only after it is complete, checked and synced. With a bucket, the directory is a cache of the bucket.

use std::{
    collections::BTreeMap,
    fs::{self, File},
    io,
    path::{Path, PathBuf},
    sync::Arc,
    time::{Duration, Instant, SystemTime},
};

use futures::StreamExt as _;
use gannet_elf::BuildId;
use gannet_symbols::alternate::path_of_build_id;
use object_store::{ObjectStore, ObjectStoreExt as _, path::Path as ObjectPath};
use parking_lot::Mutex;
use tokio::io::AsyncWriteExt as _;
use ulid::Ulid;

use super::DebugInfoError;
use crate::metrics::Metrics;

/// The directory of incomplete files.
const INCOMING: &str = "incoming";
/// Lifetime of a cached list of the bucket.
const LIST_TTL: Duration = Duration::from_secs(30);
/// Bytes of one part of an upload to a bucket.
const PART_BYTES: usize = 8 << 20;

/// The source of a file, in the order of precedence.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub(crate) enum Origin {
    /// A person uploaded it.
    Upload,
    /// A server of debuginfod had it.
    Debuginfod,
    /// An agent sent it from its node. The owner of the program may have forged it.
    Agent,
}

impl Origin {
    pub(super) const ALL: [Self; 3] = [Self::Upload, Self::Debuginfod, Self::Agent];

    /// Returns the name in messages and metrics.
    pub(crate) fn name(self) -> &'static str {
        match self {
            Self::Upload => "upload",
            Self::Debuginfod => "debuginfod",
            Self::Agent => "agent",
        }
    }

    fn directory(self) -> &'static str {
        match self {
            Self::Upload => "uploaded",
            Self::Debuginfod => "debuginfod",
            Self::Agent => "agents",
        }
    }
}

/// A stored file with debug information.
#[derive(Clone, Debug)]
pub(crate) struct StoredFile {
    pub(crate) build_id: BuildId,
    pub(crate) origin: Origin,
    pub(crate) bytes: u64,
    pub(crate) stored: SystemTime,
}

/// A file in the directory.
#[derive(Clone, Debug)]
struct Kept {
    bytes: u64,
    stored: SystemTime,
    /// The value of a counter at the last use of the file.
    used: u64,
}

#[derive(Debug, Default)]
struct FilesState {
    files: BTreeMap<(BuildId, Origin), Kept>,
    bytes: u64,
    uses: u64,
}

/// The stored files. Owner of their directory.
pub(crate) struct DebugFiles {
    directory: PathBuf,
    bucket: Option<Arc<dyn ObjectStore>>,
    /// The list of the files in the bucket, and the time of the list.
    listed: tokio::sync::Mutex<Option<(Instant, Vec<StoredFile>)>>,
    max_bytes: u64,
    /// Free space that stays on the disk.
    min_free_bytes: u64,
    state: Mutex<FilesState>,
    metrics: Metrics,
}

/// An incomplete file. Dropping it removes the file.
pub(super) struct Incoming {
    path: PathBuf,
    file: tokio::fs::File,
}

impl Incoming {
    pub(super) async fn write(&mut self, bytes: &[u8]) -> io::Result<()> {
        self.file.write_all(bytes).await
    }

    /// Makes the content durable, and returns the file for reading.
    pub(super) async fn finish(&mut self) -> io::Result<File> {
        self.file.flush().await?;
        self.file.sync_all().await?;
        Ok(tokio::fs::File::open(&self.path).await?.into_std().await)
    }
}

impl Drop for Incoming {
    fn drop(&mut self) {
        // A complete file has its final name, so this path no longer exists.
        let _ = fs::remove_file(&self.path);
    }
}

impl DebugFiles {
    /// Opens the directory, and removes the incomplete files that a crash left. Creates nothing. Blocking.
    pub(super) fn open(
        directory: PathBuf,
        bucket: Option<Arc<dyn ObjectStore>>,
        max_bytes: u64,
        min_free_bytes: u64,
        metrics: Metrics,
    ) -> io::Result<Self> {
        let mut state = FilesState::default();
        match fs::remove_dir_all(directory.join(INCOMING)) {
            Err(error) if error.kind() != io::ErrorKind::NotFound => return Err(error),
            _ => {}
        }
        for origin in Origin::ALL {
            for (build_id, path) in files_in(&directory.join(origin.directory()).join(".build-id"))? {
                let metadata = fs::metadata(path)?;
                let stored = metadata.modified().unwrap_or(SystemTime::UNIX_EPOCH);
                state.bytes += metadata.len();
                state.files.insert((build_id, origin), Kept { bytes: metadata.len(), stored, used: 0 });
            }
        }
        let files = Self {
            directory,
            bucket,
            listed: tokio::sync::Mutex::default(),
            max_bytes,
            min_free_bytes,
            state: Mutex::new(state),
            metrics,
        };
        files.count(&files.state.lock());
        Ok(files)
    }

    fn count(&self, state: &FilesState) {
        self.metrics.debuginfo_files.set(state.files.len() as i64);
        self.metrics.debuginfo_bytes.set(state.bytes as i64);
    }

    /// Returns the directories of all origins. The reader searches them for files that debug information refers to.
    pub(super) fn directories(&self) -> Vec<PathBuf> {
        Origin::ALL.map(|origin| self.directory.join(origin.directory())).into()
    }

    /// Returns the limit of all files together, in bytes.
    pub(super) fn max_bytes(&self) -> u64 {
        self.max_bytes
    }

    /// Reports whether the collector has no file, and no bucket that may have one.
    pub(super) fn is_empty(&self) -> bool {
        self.bucket.is_none() && self.state.lock().files.is_empty()
    }

    /// Reports whether other collectors may add files.
    pub(super) fn is_shared(&self) -> bool {
        self.bucket.is_some()
    }

    fn path(&self, build_id: &BuildId, origin: Origin) -> Option<PathBuf> {
        Some(self.directory.join(origin.directory()).join(path_of_build_id(&build_id.to_string())?))
    }

    /// Starts a file of this size. Returns an error if there is no space for it.
    pub(super) async fn begin(&self, bytes: u64) -> Result<Incoming, DebugInfoError> {
        if bytes > self.max_bytes {
            return Err(DebugInfoError::NoRoom { bytes, max: self.max_bytes });
        }
        let directory = self.directory.join(INCOMING);
        let path = directory.join(Ulid::new().to_string());
        tokio::fs::create_dir_all(&directory).await?;
        let free = rustix::fs::statvfs(&directory).map_err(io::Error::from)?;
        if free.f_bavail.saturating_mul(free.f_frsize) < self.min_free_bytes.saturating_add(bytes) {
            return Err(DebugInfoError::DiskFull);
        }
        let file = tokio::fs::File::create_new(&path).await?;
        Ok(Incoming { path, file })
    }

    /// Moves a checked file to its final name. Removes the least recently used files if all together are too large.
    pub(super) async fn keep(
        &self,
        incoming: Incoming,
        build_id: &BuildId,
        origin: Origin,
    ) -> Result<StoredFile, DebugInfoError> {
        if let Some(bucket) = &self.bucket {
            upload(bucket.as_ref(), &object_path(build_id, origin), &incoming.path).await?;
            *self.listed.lock().await = None;
            self.trim_bucket(bucket.as_ref(), build_id).await;
        }
        self.keep_here(&incoming, build_id, origin)
    }

    fn keep_here(
        &self,
        incoming: &Incoming,
        build_id: &BuildId,
        origin: Origin,
    ) -> Result<StoredFile, DebugInfoError> {
        let path = self.path(build_id, origin).ok_or(DebugInfoError::BuildId)?;
        let parent = path.parent().ok_or(DebugInfoError::BuildId)?;
        fs::create_dir_all(parent)?;
        let bytes = fs::metadata(&incoming.path)?.len();
        let mut state = self.state.lock();
        fs::rename(&incoming.path, &path)?;
        File::open(parent)?.sync_all()?;
        state.uses += 1;
        let kept = Kept { bytes, stored: SystemTime::now(), used: state.uses };
        let stored = kept.stored;
        let former = state.files.insert((build_id.clone(), origin), kept);
        state.bytes = state.bytes - former.map_or(0, |kept| kept.bytes) + bytes;
        while state.bytes > self.max_bytes {
            let others = state.files.iter().filter(|((id, _), _)| id != build_id);
            // The collector can download these files again.
            let oldest = others
                .min_by_key(|((_, origin), kept)| (*origin != Origin::Debuginfod, kept.used, kept.stored));
            let Some(key) = oldest.map(|(key, _)| key.clone()) else { break };
            self.remove_here(&mut state, &key)?;
            self.metrics.debuginfo_removed.inc();
        }
        self.count(&state);
        Ok(StoredFile { build_id: build_id.clone(), origin, bytes, stored })
    }

    fn remove_here(&self, state: &mut FilesState, key: &(BuildId, Origin)) -> io::Result<()> {
        if let Some(path) = self.path(&key.0, key.1) {
            match fs::remove_file(path) {
                Err(error) if error.kind() != io::ErrorKind::NotFound => return Err(error),
                _ => {}
            }
        }
        if let Some(kept) = state.files.remove(key) {
            state.bytes -= kept.bytes;
        }
        Ok(())
    }

    /// Returns the path of the file of a build id. Downloads the file from the bucket first if the directory lacks it.
    pub(super) async fn find(&self, build_id: &BuildId) -> Result<Option<PathBuf>, DebugInfoError> {
        if let Some(path) = self.find_here(build_id) {
            return Ok(Some(path));
        }
        let Some(bucket) = &self.bucket else { return Ok(None) };
        let Some(origin) = self.in_bucket(bucket.as_ref(), build_id).await? else { return Ok(None) };
        let found = match bucket.get(&object_path(build_id, origin)).await {
            Ok(found) => found,
            Err(object_store::Error::NotFound { .. }) => return Ok(None),
            Err(error) => return Err(error.into()),
        };
        let mut incoming = self.begin(found.meta.size).await?;
        let mut parts = found.into_stream();
        while let Some(part) = parts.next().await {
            incoming.write(&part?).await?;
        }
        incoming.finish().await?;
        self.keep_here(&incoming, build_id, origin)?;
        Ok(self.find_here(build_id))
    }

    /// Returns the origin of a file in the bucket, from a list that is at most [`LIST_TTL`] old.
    async fn in_bucket(
        &self,
        bucket: &dyn ObjectStore,
        build_id: &BuildId,
    ) -> Result<Option<Origin>, DebugInfoError> {
        let mut listed = self.listed.lock().await;
        if listed.as_ref().is_none_or(|(at, _)| at.elapsed() > LIST_TTL) {
            let at = Instant::now();
            *listed = Some((at, list_bucket(bucket).await?));
        }
        let files = listed.as_ref().map_or(&[][..], |(_, files)| files);
        Ok(files.iter().filter(|file| file.build_id == *build_id).map(|file| file.origin).min())
    }

    /// Returns the path of a file in the directory, and counts that as a use.
    pub(super) fn find_here(&self, build_id: &BuildId) -> Option<PathBuf> {
        let mut state = self.state.lock();
        state.uses += 1;
        let now = state.uses;
        let origin =
            Origin::ALL.into_iter().find(|origin| state.files.contains_key(&(build_id.clone(), *origin)))?;
        state.files.get_mut(&(build_id.clone(), origin))?.used = now;
        self.path(build_id, origin)
    }

    /// Reports whether the collector has a file of this build id, from this origin or from one that takes precedence over it.
    pub(super) async fn has(&self, build_id: &BuildId, origin: Origin) -> Result<bool, DebugInfoError> {
        let origins: Vec<Origin> = Origin::ALL.into_iter().filter(|other| *other <= origin).collect();
        if let Some(bucket) = &self.bucket {
            for origin in origins {
                match bucket.head(&object_path(build_id, origin)).await {
                    Ok(_) => return Ok(true),
                    Err(object_store::Error::NotFound { .. }) => {}
                    Err(error) => return Err(error.into()),
                }
            }
            return Ok(false);
        }
        let state = self.state.lock();
        Ok(origins.into_iter().any(|origin| state.files.contains_key(&(build_id.clone(), origin))))
    }

    /// Returns all files, in the order of build ids.
    pub(super) async fn list(&self) -> Result<Vec<StoredFile>, DebugInfoError> {
        if let Some(bucket) = &self.bucket {
            let mut files = list_bucket(bucket.as_ref()).await?;
            files.sort_by(|a, b| (&a.build_id, a.origin).cmp(&(&b.build_id, b.origin)));
            return Ok(files);
        }
        let state = self.state.lock();
        let files = state.files.iter().map(|((build_id, origin), kept)| StoredFile {
            build_id: build_id.clone(),
            origin: *origin,
            bytes: kept.bytes,
            stored: kept.stored,
        });
        Ok(files.collect())
    }

    /// Removes the files of a build id. Returns false if there was none.
    pub(super) async fn remove(&self, build_id: &BuildId) -> Result<bool, DebugInfoError> {
        let mut found = false;
        *self.listed.lock().await = None;
        if let Some(bucket) = &self.bucket {
            for origin in Origin::ALL {
                let path = object_path(build_id, origin);
                match bucket.head(&path).await {
                    Ok(_) => found = true,
                    Err(object_store::Error::NotFound { .. }) => continue,
                    Err(error) => return Err(error.into()),
                }
                bucket.delete(&path).await?;
            }
        }
        let mut state = self.state.lock();
        for origin in Origin::ALL {
            let key = (build_id.clone(), origin);
            found |= state.files.contains_key(&key);
            self.remove_here(&mut state, &key)?;
        }
        self.count(&state);
        Ok(found)
    }

    /// Removes the oldest files of the bucket above the limit.
    async fn trim_bucket(&self, bucket: &dyn ObjectStore, newest: &BuildId) {
        let mut files = match list_bucket(bucket).await {
            Ok(files) => files,
            Err(error) => {
                tracing::warn!(%error, "cannot list the debug information in the bucket, which may exceed --debuginfo-bytes");
                return;
            }
        };
        let mut bytes: u64 = files.iter().map(|file| file.bytes).sum();
        files.sort_by_key(|file| (file.origin != Origin::Debuginfod, file.stored));
        for file in files.iter().filter(|file| file.build_id != *newest) {
            if bytes <= self.max_bytes {
                break;
            }
            if let Err(error) = bucket.delete(&object_path(&file.build_id, file.origin)).await {
                tracing::warn!(%error, build_id = %file.build_id, "cannot remove old debug information from the bucket");
            }
            bytes -= file.bytes;
            self.metrics.debuginfo_removed.inc();
        }
    }
}

/// Returns the build ids and paths of the files below a `.build-id` directory.
fn files_in(directory: &Path) -> io::Result<Vec<(BuildId, PathBuf)>> {
    let mut all = Vec::new();
    let entries = |directory: &Path| match fs::read_dir(directory) {
        Ok(entries) => entries.collect::<io::Result<Vec<_>>>(),
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(Vec::new()),
        Err(error) => Err(error),
    };
    for folder in entries(directory)?.into_iter().filter(|entry| entry.path().is_dir()) {
        for file in entries(&folder.path())? {
            let (first, rest) = (folder.file_name(), file.file_name());
            let rest = rest.to_str().and_then(|rest| rest.strip_suffix(".debug"));
            let build_id =
                first.to_str().zip(rest).and_then(|(first, rest)| format!("{first}{rest}").parse().ok());
            all.extend(build_id.map(|build_id| (build_id, file.path())));
        }
    }
    Ok(all)
}

fn object_path(build_id: &BuildId, origin: Origin) -> ObjectPath {
    ObjectPath::from(format!("debuginfo/{}/{build_id}", origin.directory()))
}

async fn list_bucket(bucket: &dyn ObjectStore) -> Result<Vec<StoredFile>, DebugInfoError> {
    let mut files = Vec::new();
    let mut objects = bucket.list(Some(&ObjectPath::from("debuginfo")));
    while let Some(object) = objects.next().await {
        let object = object?;
        let mut parts = object.location.as_ref().rsplit('/');
        let build_id = parts.next().and_then(|name| name.parse().ok());
        let origin =
            parts.next().and_then(|name| Origin::ALL.into_iter().find(|origin| origin.directory() == name));
        files.extend(build_id.zip(origin).map(|(build_id, origin)| StoredFile {
            build_id,
            origin,
            bytes: object.size,
            stored: object.last_modified.into(),
        }));
    }
    Ok(files)
}

async fn upload(bucket: &dyn ObjectStore, path: &ObjectPath, file: &Path) -> Result<(), DebugInfoError> {
    let mut file = tokio::fs::File::open(file).await?;
    let upload = bucket.put_multipart(path).await?;
    let mut writer = object_store::WriteMultipart::new_with_chunk_size(upload, PART_BYTES);
    let mut part = vec![0; PART_BYTES];
    loop {
        let read = tokio::io::AsyncReadExt::read(&mut file, &mut part).await?;
        if read == 0 {
            break;
        }
        writer.wait_for_capacity(2).await?;
        writer.write(&part[..read]);
    }
    writer.finish().await?;
    Ok(())
}
