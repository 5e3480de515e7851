//! Where the rule store is kept: one piece of content that is replaced as a whole, and only by whoever knows what it
//! replaces. Several collectors may keep theirs in one place.

use std::{
    fs::{self, File},
    io::{self, Read as _, Write as _},
    os::unix::fs::MetadataExt as _,
    path::{Path, PathBuf},
    time::Duration,
};

use flate2::{Compression, read::GzDecoder, write::GzEncoder};
use k8s_openapi::{ByteString, api::core::v1::ConfigMap, apimachinery::pkg::apis::meta::v1::ObjectMeta};
use kube::{Api, Client, api::PostParams};
use rustix::fs::{FlockOperation, flock};
use tokio::runtime::Handle;

use crate::durable;

/// What is there, compared with what was known.
pub(crate) enum Loaded {
    /// Still the version that was known.
    Same,
    /// Nothing.
    Nothing,
    /// Another version, and its content.
    New(String, Vec<u8>),
}

/// Why content was not replaced or read.
#[derive(Debug)]
pub(crate) enum KeepError {
    /// It is not the version that it was taken for: somebody else was faster.
    Conflict,
    /// It cannot be reached.
    Io(io::Error),
}

impl From<io::Error> for KeepError {
    fn from(error: io::Error) -> Self {
        Self::Io(error)
    }
}

/// A place for the content. All calls may block.
pub(crate) trait Keep: Send + Sync {
    /// What is there, unless it is the version that is known.
    fn load(&self, known: Option<&str>) -> Result<Loaded, KeepError>;
    /// Puts content in the place of the known version (`None`: of nothing). After a success it is durable. Gives its
    /// version.
    fn replace(&self, known: Option<&str>, content: &[u8]) -> Result<String, KeepError>;
    /// For messages.
    fn place(&self) -> String;
    /// How often to look for what others have put there.
    fn look_every(&self) -> Duration;
}

/// A file in a directory that several collectors may share.
pub(crate) struct FileKeep {
    path: PathBuf,
    lock: PathBuf,
}

impl FileKeep {
    /// Makes the directory if need be.
    pub(crate) fn open(dir: &Path) -> io::Result<Self> {
        fs::create_dir_all(dir)?;
        Ok(Self { path: dir.join("rules.pb"), lock: dir.join("rules.lock") })
    }

    /// Changes whenever the file is replaced: each version is a file of its own.
    fn stamp(&self) -> io::Result<Option<String>> {
        match fs::metadata(&self.path) {
            Ok(of) => Ok(Some(format!("{}-{}-{}-{}", of.ino(), of.mtime(), of.mtime_nsec(), of.len()))),
            Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(None),
            Err(error) => Err(error),
        }
    }
}

impl Keep for FileKeep {
    fn load(&self, known: Option<&str>) -> Result<Loaded, KeepError> {
        loop {
            let Some(stamp) = self.stamp()? else { return Ok(Loaded::Nothing) };
            if known == Some(stamp.as_str()) {
                return Ok(Loaded::Same);
            }
            let content = fs::read(&self.path)?;
            // Replaced between the two looks: the stamp would name content that it does not belong to.
            if self.stamp()?.as_ref() == Some(&stamp) {
                return Ok(Loaded::New(stamp, content));
            }
        }
    }

    fn replace(&self, known: Option<&str>, content: &[u8]) -> Result<String, KeepError> {
        // Held until the end of the function; the kernel lets go of it if this program dies.
        let lock = File::options().create(true).truncate(false).write(true).open(&self.lock)?;
        flock(&lock, FlockOperation::LockExclusive).map_err(io::Error::from)?;
        if self.stamp()?.as_deref() != known {
            return Err(KeepError::Conflict);
        }
        if known.is_some() {
            let before = PathBuf::from(format!("{}.prev", self.path.display()));
            let _ = fs::remove_file(&before);
            fs::hard_link(&self.path, &before)?;
        }
        durable::replace(&self.path, content)?;
        self.stamp()?.ok_or_else(|| io::Error::other("the file vanished as soon as it was written").into())
    }

    fn place(&self) -> String {
        self.path.display().to_string()
    }

    fn look_every(&self) -> Duration {
        // One call of stat(2).
        Duration::from_millis(250)
    }
}

/// A ConfigMap, which several collectors share. The API refuses whoever replaces what they have not read.
pub(crate) struct ConfigMapKeep {
    api: Api<ConfigMap>,
    runtime: Handle,
    namespace: String,
}

/// Its name.
const CONFIG_MAP: &str = "gannet-rules";
/// Its key.
const KEY: &str = "rules.pb.gz";
/// What the API takes is little more: 1 MiB with everything around it, and a third more in its own encoding.
const MAX_CONFIG_MAP: usize = 700 << 10;
/// The content may be so large when it is unpacked.
const MAX_CONTENT: u64 = 64 << 20;
const API_TIMEOUT: Duration = Duration::from_secs(10);

impl ConfigMapKeep {
    pub(crate) fn new(client: Client, namespace: &str, runtime: Handle) -> Self {
        Self { api: Api::namespaced(client, namespace), runtime, namespace: namespace.to_owned() }
    }

    fn ask<T>(&self, call: impl Future<Output = Result<T, kube::Error>>) -> Result<T, KeepError> {
        let call = async {
            match tokio::time::timeout(API_TIMEOUT, call).await {
                Ok(answer) => answer.map_err(|error| match error {
                    kube::Error::Api(status) if matches!(status.code, 404 | 409) => KeepError::Conflict,
                    error => KeepError::Io(io::Error::other(format!("the Kubernetes API: {error}"))),
                }),
                Err(_) => Err(KeepError::Io(io::ErrorKind::TimedOut.into())),
            }
        };
        self.runtime.block_on(call)
    }
}

fn version_of(map: &ConfigMap) -> String {
    let ObjectMeta { uid, resource_version, .. } = &map.metadata;
    format!("{}/{}", uid.as_deref().unwrap_or_default(), resource_version.as_deref().unwrap_or_default())
}

impl Keep for ConfigMapKeep {
    fn load(&self, known: Option<&str>) -> Result<Loaded, KeepError> {
        let Some(map) = self.ask(self.api.get_opt(CONFIG_MAP))? else { return Ok(Loaded::Nothing) };
        let version = version_of(&map);
        if known == Some(version.as_str()) {
            return Ok(Loaded::Same);
        }
        let packed = map.binary_data.and_then(|mut data| data.remove(KEY)).unwrap_or_default().0;
        let mut content = Vec::new();
        // What does not unpack is as damaged as what does not read.
        let _ = GzDecoder::new(packed.as_slice()).take(MAX_CONTENT).read_to_end(&mut content);
        Ok(Loaded::New(version, content))
    }

    fn replace(&self, known: Option<&str>, content: &[u8]) -> Result<String, KeepError> {
        let mut packer = GzEncoder::new(Vec::new(), Compression::default());
        packer.write_all(content)?;
        let packed = packer.finish()?;
        if packed.len() > MAX_CONFIG_MAP {
            return Err(KeepError::Io(io::Error::other(format!(
                "{} bytes of rules are more than a ConfigMap holds ({MAX_CONFIG_MAP}): remove or shorten some",
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
            None => self.ask(self.api.create(&params, &map))?,
            Some((uid, version)) => {
                map.metadata.uid = Some(uid.to_owned());
                map.metadata.resource_version = Some(version.to_owned());
                self.ask(self.api.replace(CONFIG_MAP, &params, &map))?
            }
        };
        Ok(version_of(&written))
    }

    fn place(&self) -> String {
        format!("ConfigMap {}/{CONFIG_MAP}", self.namespace)
    }

    fn look_every(&self) -> Duration {
        // The watch on the custom resources tells of most changes sooner.
        Duration::from_secs(2)
    }
}
