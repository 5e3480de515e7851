//! Storages of the rules: a file or a ConfigMap, which several collectors may share.
//!
//! A storage holds one piece of content. A writer names the version that it replaces, so no collector overwrites a change
//! that it has not read.

use std::{
    fmt,
    fs::{self, File},
    io::{self, Read as _, Write as _},
    os::unix::fs::MetadataExt as _,
    path::{Path, PathBuf},
    str::FromStr,
    time::Duration,
};

use flate2::{Compression, read::GzDecoder, write::GzEncoder};
use k8s_openapi::{ByteString, api::core::v1::ConfigMap, apimachinery::pkg::apis::meta::v1::ObjectMeta};
use kube::{Api, Client, api::PostParams};
use rustix::fs::{FlockOperation, flock};
use tokio::runtime::Handle;

use crate::durable;

/// The location of the rules, as `--rules-store` names it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum RulesLocation {
    /// A file below this directory, which several collectors may share. `None`: below the data directory.
    File(Option<PathBuf>),
    /// A ConfigMap and TriggerRule resources of this namespace. `None`: the collector's namespace.
    Kubernetes(Option<String>),
}

impl FromStr for RulesLocation {
    type Err = String;

    /// Parses `file`, `file=DIR`, `kubernetes`, `kubernetes=NAMESPACE`.
    fn from_str(text: &str) -> Result<Self, String> {
        match text.split_once('=') {
            None if text == "file" => Ok(Self::File(None)),
            Some(("file", dir)) if !dir.is_empty() => Ok(Self::File(Some(dir.into()))),
            None if text == "kubernetes" => Ok(Self::Kubernetes(None)),
            Some(("kubernetes", namespace)) if !namespace.is_empty() => {
                Ok(Self::Kubernetes(Some(namespace.to_owned())))
            }
            _ => Err(format!(
                "`{text}` is no rule store: write `file`, `file=DIR` for a directory that collectors share, `kubernetes`, or \
                 `kubernetes=NAMESPACE`"
            )),
        }
    }
}

impl fmt::Display for RulesLocation {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::File(None) => f.write_str("file"),
            Self::File(Some(dir)) => write!(f, "file={}", dir.display()),
            Self::Kubernetes(None) => f.write_str("kubernetes"),
            Self::Kubernetes(Some(namespace)) => write!(f, "kubernetes={namespace}"),
        }
    }
}

gannet_base::serde_as_text!(RulesLocation);

/// The stored content, compared with the known version.
pub(crate) enum Loaded {
    /// The content has the known version.
    Same,
    /// The storage is empty.
    Nothing,
    /// Another version, and its content.
    New(String, Vec<u8>),
}

/// Why content was not read or replaced.
#[derive(Debug)]
pub(crate) enum StorageError {
    /// Another collector has replaced the known version.
    Conflict,
    /// The storage returned an error.
    Io(io::Error),
}

impl From<io::Error> for StorageError {
    fn from(error: io::Error) -> Self {
        Self::Io(error)
    }
}

/// A place for the content. All calls may block.
pub(crate) trait RuleStorage: Send + Sync {
    /// Reads the content, unless it has the known version.
    fn load(&self, known: Option<&str>) -> Result<Loaded, StorageError>;
    /// Replaces the known version (`None`: an empty storage) and returns the new version. After success the content is
    /// durable.
    fn replace(&self, known: Option<&str>, content: &[u8]) -> Result<String, StorageError>;
    /// Describes the storage for messages.
    fn location(&self) -> String;
    /// Time between two readings for changes of other collectors.
    fn refresh_interval(&self) -> Duration;
}

/// A file in a directory that several collectors may share.
pub(crate) struct FileStorage {
    path: PathBuf,
    lock: PathBuf,
}

impl FileStorage {
    /// Opens the storage, and creates its directory if needed.
    pub(crate) fn open(dir: &Path) -> io::Result<Self> {
        fs::create_dir_all(dir)?;
        Ok(Self { path: dir.join("rules.pb"), lock: dir.join("rules.lock") })
    }

    /// Returns the version of the file. It changes with every replacement, because each version is a new file.
    fn stamp(&self) -> io::Result<Option<String>> {
        match fs::metadata(&self.path) {
            Ok(meta) => {
                Ok(Some(format!("{}-{}-{}-{}", meta.ino(), meta.mtime(), meta.mtime_nsec(), meta.len())))
            }
            Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(None),
            Err(error) => Err(error),
        }
    }
}

impl RuleStorage for FileStorage {
    fn load(&self, known: Option<&str>) -> Result<Loaded, StorageError> {
        loop {
            let Some(stamp) = self.stamp()? else { return Ok(Loaded::Nothing) };
            if known == Some(stamp.as_str()) {
                return Ok(Loaded::Same);
            }
            let content = fs::read(&self.path)?;
            // If the file was replaced in between, the stamp would belong to other content. So the loop reads again.
            if self.stamp()?.as_ref() == Some(&stamp) {
                return Ok(Loaded::New(stamp, content));
            }
        }
    }

    fn replace(&self, known: Option<&str>, content: &[u8]) -> Result<String, StorageError> {
        // Held until the end of the function. The kernel releases it if this program dies.
        let lock = File::options().create(true).truncate(false).write(true).open(&self.lock)?;
        flock(&lock, FlockOperation::LockExclusive).map_err(io::Error::from)?;
        if self.stamp()?.as_deref() != known {
            return Err(StorageError::Conflict);
        }
        if known.is_some() {
            let before = PathBuf::from(format!("{}.prev", self.path.display()));
            let _ = fs::remove_file(&before);
            fs::hard_link(&self.path, &before)?;
        }
        durable::replace(&self.path, content)?;
        self.stamp()?.ok_or_else(|| io::Error::other("the file is gone right after it was written").into())
    }

    fn location(&self) -> String {
        self.path.display().to_string()
    }

    fn refresh_interval(&self) -> Duration {
        // One call of stat(2).
        Duration::from_millis(250)
    }
}

/// A ConfigMap, which several collectors share. The API server refuses to replace another version than the named one.
pub(crate) struct ConfigMapStorage {
    api: Api<ConfigMap>,
    runtime: Handle,
    namespace: String,
}

/// Name of the ConfigMap.
const CONFIG_MAP: &str = "gannet-rules";
/// Key of the content in it.
const KEY: &str = "rules.pb.gz";
/// Bytes of the compressed content. The API server accepts 1 MiB for the complete object, whose encoding adds a third.
const MAX_CONFIG_MAP: usize = 700 << 10;
/// Bytes of the decompressed content.
const MAX_CONTENT: u64 = 64 << 20;
const API_TIMEOUT: Duration = Duration::from_secs(10);

impl ConfigMapStorage {
    pub(crate) fn new(client: Client, namespace: &str, runtime: Handle) -> Self {
        Self { api: Api::namespaced(client, namespace), runtime, namespace: namespace.to_owned() }
    }

    /// Waits for an API call, up to [`API_TIMEOUT`].
    fn wait_for<T>(&self, call: impl Future<Output = Result<T, kube::Error>>) -> Result<T, StorageError> {
        let call = async {
            match tokio::time::timeout(API_TIMEOUT, call).await {
                Ok(answer) => answer.map_err(|error| match error {
                    kube::Error::Api(status) if matches!(status.code, 404 | 409) => StorageError::Conflict,
                    error => StorageError::Io(io::Error::other(format!("the Kubernetes API: {error}"))),
                }),
                Err(_) => Err(StorageError::Io(io::ErrorKind::TimedOut.into())),
            }
        };
        self.runtime.block_on(call)
    }
}

fn version_of(map: &ConfigMap) -> String {
    let ObjectMeta { uid, resource_version, .. } = &map.metadata;
    format!("{}/{}", uid.as_deref().unwrap_or_default(), resource_version.as_deref().unwrap_or_default())
}

impl RuleStorage for ConfigMapStorage {
    fn load(&self, known: Option<&str>) -> Result<Loaded, StorageError> {
        let Some(map) = self.wait_for(self.api.get_opt(CONFIG_MAP))? else { return Ok(Loaded::Nothing) };
        let version = version_of(&map);
        if known == Some(version.as_str()) {
            return Ok(Loaded::Same);
        }
        let packed = map.binary_data.and_then(|mut data| data.remove(KEY)).unwrap_or_default().0;
        let mut content = Vec::new();
        // The parser of the content reports a broken archive as damaged content.
        let _ = GzDecoder::new(packed.as_slice()).take(MAX_CONTENT).read_to_end(&mut content);
        Ok(Loaded::New(version, content))
    }

    fn replace(&self, known: Option<&str>, content: &[u8]) -> Result<String, StorageError> {
        let mut packer = GzEncoder::new(Vec::new(), Compression::default());
        packer.write_all(content)?;
        let packed = packer.finish()?;
        if packed.len() > MAX_CONFIG_MAP {
            return Err(StorageError::Io(io::Error::other(format!(
                "{} bytes of rules exceed the space in a ConfigMap ({MAX_CONFIG_MAP}): remove or shorten some",
                packed.len()
            ))));
        }
        let mut map = ConfigMap {
            metadata: ObjectMeta {
                name: Some(CONFIG_MAP.to_owned()),
                labels: Some([("app.kubernetes.io/part-of".to_owned(), "gannet".to_owned())].into()),
                ..ObjectMeta::default()
            },
            binary_data: Some([(KEY.to_owned(), ByteString(packed))].into()),
            ..ConfigMap::default()
        };
        let params = PostParams::default();
        let written = match known.and_then(|known| known.split_once('/')) {
            None => self.wait_for(self.api.create(&params, &map))?,
            Some((uid, version)) => {
                map.metadata.uid = Some(uid.to_owned());
                map.metadata.resource_version = Some(version.to_owned());
                self.wait_for(self.api.replace(CONFIG_MAP, &params, &map))?
            }
        };
        Ok(version_of(&written))
    }

    fn location(&self) -> String {
        format!("ConfigMap {}/{CONFIG_MAP}", self.namespace)
    }

    fn refresh_interval(&self) -> Duration {
        // The watch on the custom resources reports most changes sooner.
        Duration::from_secs(2)
    }
}
