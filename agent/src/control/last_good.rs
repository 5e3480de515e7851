//! Stores the last rules from the collector that came into force, so that they survive a restart.

use std::{
    fs::{self, File},
    io,
    path::{Path, PathBuf},
    time::{Duration, SystemTime},
};

use gannet_proto::control::RuleSet;
use prost::Message as _;

use crate::{
    access::{OwnFiles, on_own_files_later},
    export::write_aside,
};

/// First bytes of the file; the digit is the version of the format.
const MAGIC: &[u8; 8] = b"GANNETR1";
/// The file holds `MAGIC`, the CRC-32 of the rest, the time in milliseconds since 1970, and the rule set.
const HEADER_BYTES: usize = 8 + 4;
/// A larger file holds no rule set.
const MAX_FILE_BYTES: u64 = 16 << 20;

/// The file with the last good rules.
#[derive(Clone, Debug)]
pub(crate) struct LastGoodRules {
    path: PathBuf,
}

/// A rule set and the time at which it came into force. Lifetimes count from then, also after a restart.
#[derive(Clone, Debug, PartialEq)]
pub(crate) struct SavedRules {
    /// The set as the collector sent it.
    pub(crate) set: RuleSet,
    /// Time by the node's clock.
    pub(crate) applied_at: SystemTime,
}

/// Reasons why the rules cannot be saved or read.
#[derive(Debug, thiserror::Error)]
pub(crate) enum LastGoodError {
    /// The file system refused an operation.
    #[error("cannot {action} {}: {source}; --state-dir must be a directory that this program may write to", path.display())]
    Io {
        action: &'static str,
        path: PathBuf,
        #[source]
        source: io::Error,
    },
    /// The file does not read as it was written.
    #[error("{} is damaged and was renamed to .corrupt; the collector will send the rules again", path.display())]
    Corrupt { path: PathBuf },
}

impl LastGoodRules {
    /// Returns the file in an existing directory.
    pub(crate) fn in_dir(dir: &Path) -> Self {
        Self { path: dir.join("rules.last") }
    }

    /// Saves a set. After a crash the file holds either this set or the one before.
    pub(crate) async fn save(&self, saved: &SavedRules) -> Result<(), LastGoodError> {
        let (path, bytes) = (self.path.clone(), encode(saved));
        let write = move || -> io::Result<()> {
            write_aside(&path, &bytes)?;
            File::open(path.parent().unwrap_or(Path::new(".")))?.sync_all()
        };
        let written = on_own_files_later(OwnFiles::State, self.path.clone(), write).await;
        written.and_then(|written| written).map_err(|source| LastGoodError::Io {
            action: "write",
            path: self.path.clone(),
            source,
        })
    }

    /// Returns the saved set. Renames a damaged file, so that it is an error only once.
    pub(crate) async fn load(&self) -> Result<Option<SavedRules>, LastGoodError> {
        let this = self.clone();
        let read = on_own_files_later(OwnFiles::State, self.path.clone(), move || this.load_here()).await;
        read.unwrap_or_else(|source| {
            Err(LastGoodError::Io { action: "read", path: self.path.clone(), source })
        })
    }

    fn load_here(&self) -> Result<Option<SavedRules>, LastGoodError> {
        let failed = |source| LastGoodError::Io { action: "read", path: self.path.clone(), source };
        let bytes = match fs::metadata(&self.path) {
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(None),
            Err(error) => return Err(failed(error)),
            Ok(metadata) if metadata.len() > MAX_FILE_BYTES => Vec::new(),
            Ok(_) => fs::read(&self.path).map_err(failed)?,
        };
        if let Some(saved) = decode(&bytes) {
            return Ok(Some(saved));
        }
        fs::rename(&self.path, self.path.with_extension("corrupt")).map_err(failed)?;
        Err(LastGoodError::Corrupt { path: self.path.clone() })
    }
}

fn encode(saved: &SavedRules) -> Vec<u8> {
    let since = saved.applied_at.duration_since(SystemTime::UNIX_EPOCH).unwrap_or_default();
    let mut body = u64::try_from(since.as_millis()).unwrap_or(u64::MAX).to_le_bytes().to_vec();
    body.extend(saved.set.encode_to_vec());
    let mut bytes = MAGIC.to_vec();
    bytes.extend(crc32fast::hash(&body).to_le_bytes());
    bytes.extend(body);
    bytes
}

fn decode(bytes: &[u8]) -> Option<SavedRules> {
    let (head, body) = bytes.split_at_checked(HEADER_BYTES)?;
    let checksum = u32::from_le_bytes(*head.strip_prefix(MAGIC)?.first_chunk()?);
    if crc32fast::hash(body) != checksum {
        return None;
    }
    let (since, set) = body.split_first_chunk()?;
    let applied_at = SystemTime::UNIX_EPOCH.checked_add(Duration::from_millis(u64::from_le_bytes(*since)))?;
    Some(SavedRules { set: RuleSet::decode(set).ok()?, applied_at })
}

#[cfg(test)]
mod tests {
    use gannet_proto::control::Rule;
    use proptest::prelude::*;

    use super::*;

    fn saved() -> SavedRules {
        let rules = vec![Rule { id: "a".into(), ..Rule::default() }];
        SavedRules {
            set: RuleSet {
                revision: 7,
                nonce: "n".into(),
                digest: gannet_proto::rules::digest(&rules),
                rules,
            },
            applied_at: SystemTime::UNIX_EPOCH + Duration::from_millis(1_700_000_000_123),
        }
    }

    #[tokio::test]
    async fn a_saved_set_loads_until_another_replaces_it() {
        let dir = tempfile::tempdir().unwrap();
        let store = LastGoodRules::in_dir(dir.path());
        assert!(store.load().await.unwrap().is_none());
        store.save(&saved()).await.unwrap();
        assert_eq!(store.load().await.unwrap(), Some(saved()));
        let later = SavedRules { set: RuleSet { revision: 8, ..saved().set }, ..saved() };
        store.save(&later).await.unwrap();
        assert_eq!(store.load().await.unwrap(), Some(later));
    }

    #[tokio::test]
    async fn a_damaged_file_is_renamed_and_reported_once() {
        let dir = tempfile::tempdir().unwrap();
        let store = LastGoodRules::in_dir(dir.path());
        store.save(&saved()).await.unwrap();
        let path = dir.path().join("rules.last");
        let mut bytes = fs::read(&path).unwrap();
        let last = bytes.len() - 1;
        bytes[last] ^= 1;
        fs::write(&path, bytes).unwrap();
        assert!(matches!(store.load().await, Err(LastGoodError::Corrupt { .. })));
        assert!(store.load().await.unwrap().is_none());
        assert!(dir.path().join("rules.corrupt").exists());
    }

    proptest! {
        #[test]
        fn the_checksum_notices_any_change(at in any::<prop::sample::Index>(), flip in 1_u8..) {
            let mut bytes = encode(&saved());
            let at = at.index(bytes.len());
            bytes[at] ^= flip;
            prop_assert_eq!(decode(&bytes), None);
        }
    }
}
