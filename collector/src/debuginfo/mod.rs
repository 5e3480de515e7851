//! Debug information: files that name the functions of stripped programs, by build id, and the names that they give to stored
//! profiles.
//!
//! A query adds names when it merges or returns profiles ([`DebugInfo::name`]). The stored profiles do not change, so a file
//! that arrives today names the profiles of last week. Without a file, and without a server of debuginfod, a query does not use this
//! module.
//!
//! | module | owns |
//! |---|---|
//! | `grpc` | the services for people and agents |
//! | `debuginfod` | downloads from servers of debuginfod |
//! | `files` | the stored files, their directory and bucket, their limit |
//! | `attempts` | the pauses between attempts to read a file after errors |
//! | `check` | the checks of a file before the collector stores it |
//! | `naming` | the frames of a profile that need names, and the profile with these names |
//! | `reader` | the processes that read files, and the cache of functions |
//! | `layout` | addresses of frames as addresses of a file |

mod attempts;
mod check;
mod debuginfod;
mod files;
pub(crate) mod fuzz;
mod grpc;
mod layout;
mod naming;
mod reader;

use std::{
    collections::BTreeSet,
    fs::File,
    io,
    path::PathBuf,
    sync::Arc,
    time::{Duration, Instant},
};

use clap::Args;
use futures::future;
use gannet_base::ByteSize;
use gannet_elf::BuildId;
use gannet_proto::profiles::Profile;
use object_store::ObjectStore;
use parking_lot::Mutex;
use serde::{Deserialize, Serialize};

pub(crate) use self::grpc::DebugInfoGrpc;
use self::{
    check::FileFault,
    debuginfod::{Debuginfod, DebuginfodUrl},
    files::{DebugFiles, Incoming, Origin, StoredFile},
    layout::Place,
    naming::{Frames, Wanted},
    reader::{DebugFile, Reader},
};
use crate::metrics::Metrics;

/// Maximum number of files in the cache of states.
const MAX_KNOWN_FILES: usize = 4096;
/// Time after which the collector searches the bucket again for a missing file.
const BUCKET_TTL: Duration = Duration::from_secs(30);
/// Time after which the collector requests a missing file from the servers again.
const SERVER_TTL: Duration = Duration::from_secs(600);
/// Maximum number of frames of one file that one query names.
const MAX_PLACES: usize = 1 << 17;

/// Limits of the debug information that the collector keeps.
#[derive(Args, Clone, Debug, PartialEq, Serialize, Deserialize)]
#[command(next_help_heading = "Debug information")]
#[serde(default)]
pub struct DebugInfoOptions {
    /// Store at most this much debug information, below `debuginfo` in --data; beyond it the collector removes the least recently used
    /// files. 0 accepts none
    #[arg(long, value_name = "BYTES", env = "GANNET_COLLECTOR_DEBUGINFO_BYTES", default_value = "4GiB")]
    pub debuginfo_bytes: ByteSize,
    /// Refuse larger files with debug information
    #[arg(long, value_name = "BYTES", env = "GANNET_COLLECTOR_DEBUGINFO_FILE_BYTES", default_value = "1GiB")]
    pub debuginfo_file_bytes: ByteSize,
    /// Download the files of frames without a name from this server of debuginfod, such as https://debuginfod.debian.net (repeatable).
    /// The server learns the build ids of these programs
    #[arg(long, value_name = "URL", env = "GANNET_COLLECTOR_DEBUGINFOD", value_delimiter = ',')]
    pub debuginfod: Vec<DebuginfodUrl>,
    /// The program of the child process that reads debug information: the collector itself.
    #[arg(skip = PathBuf::from("/proc/self/exe"))]
    #[serde(skip, default = "own_program")]
    pub reader: PathBuf,
    /// Maximum size of the cache of functions, in bytes.
    #[arg(skip = 64_u64 << 20)]
    #[serde(skip, default = "cache_bytes")]
    pub cache_bytes: u64,
    /// Maximum time that a query waits for names. Later names are in the next answer.
    #[arg(skip = Duration::from_secs(10))]
    #[serde(skip, default = "query_timeout")]
    pub query_timeout: Duration,
    /// Pause after a failed attempt to use a file. It doubles with each failure, up to ten minutes.
    #[arg(skip = Duration::from_secs(30))]
    #[serde(skip, default = "retry_pause")]
    pub retry_pause: Duration,
}

impl Default for DebugInfoOptions {
    fn default() -> Self {
        gannet_base::defaults()
    }
}

/// The reason why the collector could not store, find or remove a file with debug information. Each text names the cure.
#[derive(Debug, thiserror::Error)]
pub(crate) enum DebugInfoError {
    #[error(transparent)]
    File(#[from] FileFault),
    #[error("build_id: give the GNU build id in hex, 4 to 64 bytes, as `readelf -n` prints it")]
    BuildId,
    #[error(
        "the file has {bytes} bytes, and the collector stores at most {max} in all; start it with a larger --debuginfo-bytes"
    )]
    NoRoom { bytes: u64, max: u64 },
    #[error(
        "the disk of --data has too little free space for the file; free some space, or lower --retention-bytes"
    )]
    DiskFull,
    #[error("cannot read or write the file at the collector: {0}")]
    Io(#[from] io::Error),
    #[error("cannot get the file from {server} (--debuginfod): {reason}")]
    Server { server: String, reason: String },
    #[error("cannot read or write an object: {0}")]
    Object(#[from] object_store::Error),
}

/// The state of a file by its build id.
#[derive(Clone)]
enum Known {
    Ready(Arc<DebugFile>),
    Missing {
        at: Instant,
        /// No server has the file either.
        asked: bool,
    },
    /// The collector could not find out, or could not open the file.
    Failed {
        failures: u32,
        retry_at: Instant,
    },
}

/// A profile with the names that debug information adds.
pub(crate) struct Named {
    /// The profile with names; `None` if debug information adds no name.
    pub(crate) profile: Option<Profile>,
    /// The query did not run out of time before it had all names.
    pub(crate) is_complete: bool,
    /// Time of the next attempt to read a file that failed. Names may be missing until then.
    pub(crate) retry_at: Option<Instant>,
}

/// The version of the stored files that names come from.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) struct NamesVersion {
    /// Number of files that this collector stored or removed.
    changes: u64,
    /// Number of changes after which former names are wrong: a file was removed, or another one took precedence over it.
    pub(crate) removed: u64,
}

/// Debug information: the only owner of its files, and the only part that names stored profiles.
pub(crate) struct DebugInfo {
    files: DebugFiles,
    servers: Option<Debuginfod>,
    reader: Arc<Reader>,
    known: quick_cache::sync::Cache<BuildId, Known>,
    version: Mutex<NamesVersion>,
    max_file_bytes: u64,
    query_timeout: Duration,
    retry_pause: Duration,
    metrics: Metrics,
}

impl DebugInfo {
    /// Opens the stored files. Blocking.
    pub(crate) fn open(
        data: &std::path::Path,
        bucket: Option<Arc<dyn ObjectStore>>,
        options: &DebugInfoOptions,
        min_free_bytes: u64,
        metrics: Metrics,
    ) -> io::Result<Self> {
        let DebugInfoOptions {
            debuginfo_bytes,
            debuginfo_file_bytes,
            debuginfod,
            reader,
            cache_bytes,
            query_timeout,
            retry_pause,
        } = options;
        let max_file_bytes = debuginfo_file_bytes.0.min(debuginfo_bytes.0);
        let servers = Debuginfod::new(debuginfod, max_file_bytes).map_err(io::Error::other)?;
        let bucket = bucket.filter(|_| debuginfo_bytes.0 > 0);
        let files = DebugFiles::open(
            data.join("debuginfo"),
            bucket,
            debuginfo_bytes.0,
            min_free_bytes,
            metrics.clone(),
        )?;
        Ok(Self {
            files,
            servers: servers.filter(|_| max_file_bytes > 0),
            reader: Arc::new(Reader::new(reader.clone(), *cache_bytes, *retry_pause, metrics.clone())),
            known: quick_cache::sync::Cache::new(MAX_KNOWN_FILES),
            version: Mutex::default(),
            max_file_bytes,
            query_timeout: *query_timeout,
            retry_pause: *retry_pause,
            metrics,
        })
    }

    /// Reports whether the collector has no file and no source of files, so that no profile can get a name.
    pub(crate) fn is_idle(&self) -> bool {
        self.servers.is_none() && self.files.is_empty()
    }

    /// Returns the version of the names that a profile gets now.
    pub(crate) fn version(&self) -> NamesVersion {
        *self.version.lock()
    }

    /// Reports whether another collector or a server may have added files since that version.
    pub(crate) fn may_have_news_since(&self, at: Instant) -> bool {
        let bucket = self.files.is_shared() && at.elapsed() > BUCKET_TTL;
        bucket || (self.servers.is_some() && at.elapsed() > SERVER_TTL)
    }

    /// Names the frames of a checked profile that have no name, and adds inlined functions and lines to frames that have only a name.
    /// Waits at most for the query timeout.
    pub(crate) async fn name(self: &Arc<Self>, profile: &Arc<Profile>) -> Named {
        let nothing = Named { profile: None, is_complete: true, retry_at: None };
        if self.is_idle() {
            return nothing;
        }
        let of = Arc::clone(profile);
        // A profile has up to a million stacks: too much for the threads of the runtime.
        let wanted = tokio::task::spawn_blocking(move || naming::wanted(&of)).await.unwrap_or_default();
        if wanted.is_empty() {
            return nothing;
        }
        let deadline = tokio::time::Instant::now() + self.query_timeout;
        let files = wanted.into_iter().map(|(build_id, wanted)| {
            let debug_info = Arc::clone(self);
            // The task goes on after the deadline, so its results are in the cache for the next query.
            let task = tokio::spawn(async move { debug_info.prepare(build_id, wanted).await });
            tokio::time::timeout_at(deadline, task)
        });
        let mut frames = Frames::new();
        let (mut is_complete, mut retry_at) = (true, None);
        for prepared in future::join_all(files).await {
            match prepared {
                Ok(Ok(Prepared { found, retry_at: at })) => {
                    retry_at = retry_at.into_iter().chain(at).min();
                    if let Some(found) = found {
                        self.collect(found, &mut frames);
                    }
                }
                Ok(Err(_)) => {}
                Err(_) => is_complete = false,
            }
        }
        let of = Arc::clone(profile);
        let named =
            tokio::task::spawn_blocking(move || naming::with_names(&of, &frames)).await.unwrap_or_default();
        self.metrics.debuginfo_named.inc_by(named.as_ref().map_or(0, |(_, count)| *count));
        Named { profile: named.map(|(profile, _)| profile), is_complete, retry_at }
    }

    /// Reads the functions of these frames into the cache. Returns the file and its addresses, and the next attempt after an error.
    async fn prepare(&self, build_id: BuildId, wanted: Wanted) -> Prepared {
        // A file may go while it is read, because a newer one takes its room. Then it is searched once more.
        for _ in 0..2 {
            // A frame that has a name is not worth a download.
            let file = match self.file(&build_id, !wanted.nameless.is_empty()).await {
                Ok(Some(file)) => file,
                Ok(None) => break,
                Err(retry_at) => return Prepared { found: None, retry_at: Some(retry_at) },
            };
            let mut places: Vec<(Place, u64)> = Vec::new();
            let mut addresses = BTreeSet::new();
            for place in wanted.nameless.iter().chain(&wanted.bare).take(MAX_PLACES) {
                if let Some(address) = file.layout.address_of(place) {
                    places.push((*place, address));
                    addresses.insert(address);
                }
            }
            if self.reader.has_all(&file, addresses.iter().copied())
                || self.reader.read(Arc::clone(&file), addresses.into_iter().collect()).await
            {
                let retry_at = file.retry_at();
                return Prepared { found: Some(Located { build_id, file, places }), retry_at };
            }
            self.known.remove(&build_id);
        }
        Prepared { found: None, retry_at: None }
    }

    fn collect(&self, found: Located, frames: &mut Frames) {
        let Located { build_id, file, places } = found;
        for (place, address) in places {
            if let Some(frame) = self.reader.known(&file, address) {
                frames.insert((build_id.clone(), place), frame);
            }
        }
    }

    /// Returns the file of a build id, if there is one, or the time of the next attempt after an error. `ask`: searches the servers
    /// too. Concurrent calls search once.
    async fn file(&self, build_id: &BuildId, ask: bool) -> Result<Option<Arc<DebugFile>>, Instant> {
        let ask = ask && self.servers.is_some();
        let mut failures = 0;
        match self.known.get(build_id) {
            Some(Known::Missing { at, asked }) if ask && !asked || self.may_have_news_since(at) => {
                self.known.remove(build_id);
            }
            Some(Known::Failed { failures: former, retry_at }) if retry_at <= Instant::now() => {
                failures = former;
                self.known.remove(build_id);
            }
            _ => {}
        }
        let before = self.version();
        let known = self.known.get_or_insert_async(build_id, async {
            Ok::<_, std::convert::Infallible>(match self.open_file(build_id, ask).await {
                Ok(Some(file)) => Known::Ready(Arc::new(file)),
                Ok(None) => Known::Missing { at: Instant::now(), asked: ask },
                Err(error) => {
                    self.metrics.debuginfo_failed.inc();
                    let failures = failures + 1;
                    let pause = attempts::pause(self.retry_pause, failures);
                    tracing::warn!(
                        %build_id, %error, retry_seconds = pause.as_secs(),
                        "cannot use the debug information of a build id now"
                    );
                    Known::Failed { failures, retry_at: Instant::now() + pause }
                }
            })
        });
        match known.await {
            Ok(Known::Ready(file)) => Ok(Some(file)),
            Ok(Known::Failed { retry_at, .. }) => Err(retry_at),
            Ok(Known::Missing { .. }) => {
                // An upload may have stored the file during the search. A change of another file is no reason to ask the servers again.
                if self.version() != before && self.files.find_here(build_id).is_some() {
                    self.known.remove(build_id);
                }
                Ok(None)
            }
            Err(never) => match never {},
        }
    }

    async fn open_file(&self, build_id: &BuildId, ask: bool) -> Result<Option<DebugFile>, DebugInfoError> {
        let path = match self.files.find(build_id).await? {
            Some(path) => path,
            None if ask => match self.fetch(build_id).await {
                Ok(Some(path)) => path,
                Ok(None) => return Ok(None),
                // The collector requests the file again after [`SERVER_TTL`], as one that the server lacks.
                Err(error) => {
                    self.metrics.debuginfo_failed.inc();
                    tracing::warn!(%build_id, %error, "cannot download debug information");
                    return Ok(None);
                }
            },
            None => return Ok(None),
        };
        let theirs = path.clone();
        let checked = tokio::task::spawn_blocking(move || check::check(&File::open(theirs)?));
        let checked = checked.await.map_err(io::Error::other)??;
        Ok(Some(self.reader.prepare(path, checked, self.files.directories())))
    }

    /// Downloads a file from a server, and stores it. Returns its path.
    async fn fetch(&self, build_id: &BuildId) -> Result<Option<PathBuf>, DebugInfoError> {
        let Some(servers) = &self.servers else { return Ok(None) };
        self.metrics.debuginfod_requests.inc();
        let Some(incoming) = servers.fetch(build_id, &self.files).await? else { return Ok(None) };
        self.check_and_keep(incoming, build_id, Origin::Debuginfod).await?;
        // Merges that did not wait for this download can get names now.
        self.version.lock().changes += 1;
        self.files.find(build_id).await
    }

    /// Starts a file of this size. Returns an error if there is no space for it.
    async fn begin(&self, bytes: u64) -> Result<Incoming, DebugInfoError> {
        self.files.begin(bytes).await
    }

    /// Checks a complete file, stores it, and uses it from now on.
    async fn store(
        &self,
        incoming: Incoming,
        build_id: &BuildId,
        origin: Origin,
    ) -> Result<StoredFile, DebugInfoError> {
        let stored = self.check_and_keep(incoming, build_id, origin).await?;
        self.forget(build_id, false);
        Ok(stored)
    }

    async fn check_and_keep(
        &self,
        mut incoming: Incoming,
        build_id: &BuildId,
        origin: Origin,
    ) -> Result<StoredFile, DebugInfoError> {
        let file = incoming.finish().await?;
        let declared = build_id.clone();
        let checked = tokio::task::spawn_blocking(move || check::check_declared(&file, &declared));
        checked.await.map_err(io::Error::other)??;
        let stored = self.files.keep(incoming, build_id, origin).await?;
        tracing::info!(%build_id, origin = origin.name(), bytes = stored.bytes, "stored debug information");
        Ok(stored)
    }

    async fn remove(&self, build_id: &BuildId) -> Result<bool, DebugInfoError> {
        let found = self.files.remove(build_id).await?;
        self.forget(build_id, true);
        Ok(found)
    }

    /// Forgets the state of a file that changed. `is_removed`: marks its former names as wrong too.
    fn forget(&self, build_id: &BuildId, is_removed: bool) {
        let former = self.known.remove(build_id);
        let mut version = self.version.lock();
        version.changes += 1;
        // An origin with precedence replaces the file of another origin.
        if is_removed || matches!(former, Some((_, Known::Ready(_)))) {
            version.removed += 1;
        }
    }
}

/// The frames of one build id, for a query.
struct Prepared {
    /// `None` without a file.
    found: Option<Located>,
    /// Time of the next attempt, if the file or a part of it could not be read.
    retry_at: Option<Instant>,
}

/// Frames of one file with their ELF virtual addresses.
struct Located {
    build_id: BuildId,
    file: Arc<DebugFile>,
    places: Vec<(Place, u64)>,
}

fn own_program() -> PathBuf {
    DebugInfoOptions::default().reader
}

fn cache_bytes() -> u64 {
    DebugInfoOptions::default().cache_bytes
}

fn query_timeout() -> Duration {
    DebugInfoOptions::default().query_timeout
}

fn retry_pause() -> Duration {
    DebugInfoOptions::default().retry_pause
}
