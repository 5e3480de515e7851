//! The last rules from the collector that were in force, on disk.

use std::{
    fs::{self, File},
    io,
    path::{Path, PathBuf},
    time::{Duration, SystemTime},
};

use gannet_proto::control::RuleSet;
use prost::Message as _;

use crate::export::write_aside;

/// The first bytes of the file; the digit is the version of the format.
const MAGIC: &[u8; 8] = b"GANNETR1";
/// MAGIC, CRC-32 of what follows, when it was applied (milliseconds since 1970), the set.
const HEAD: usize = 8 + 4;
/// No set of rules is as large.
const LARGEST: u64 = 16 << 20;

/// Where the set is kept.
#[derive(Clone, Debug)]
pub struct LastGood {
    path: PathBuf,
}

/// A set, and when it came into force: lifetimes count from then, over restarts.
#[derive(Clone, Debug, PartialEq)]
pub struct Saved {
    /// As the collector pushed it.
    pub set: RuleSet,
    /// By the node's clock.
    pub applied_at: SystemTime,
}

/// Why the set cannot be kept or read.
#[derive(Debug, thiserror::Error)]
pub enum LastGoodError {
    /// The file system refused.
    #[error("cannot {action} {}: {source}; --state-dir must be a directory that this program may write to", path.display())]
    Io {
        /// What was tried.
        action: &'static str,
        /// On what.
        path: PathBuf,
        /// Why not.
        #[source]
        source: io::Error,
    },
    /// It does not read as it was written.
    #[error("{} is damaged and was set aside as .corrupt; the rules come back from the collector", path.display())]
    Corrupt {
        /// Which.
        path: PathBuf,
    },
}

impl LastGood {
    /// In this directory, which exists.
    pub fn in_dir(dir: &Path) -> Self {
        Self { path: dir.join("rules.last") }
    }

    /// Keeps a set: whole or not at all, also over a crash.
    pub fn save(&self, saved: &Saved) -> Result<(), LastGoodError> {
        let failed = |source| LastGoodError::Io { action: "write", path: self.path.clone(), source };
        let write = || -> io::Result<()> {
            write_aside(&self.path, &encode(saved))?;
            File::open(self.path.parent().unwrap_or(Path::new(".")))?.sync_all()
        };
        write().map_err(failed)
    }

    /// What is kept. A damaged file is set aside and is an error once.
    pub fn load(&self) -> Result<Option<Saved>, LastGoodError> {
        let failed = |source| LastGoodError::Io { action: "read", path: self.path.clone(), source };
        let bytes = match fs::metadata(&self.path) {
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(None),
            Err(error) => return Err(failed(error)),
            Ok(metadata) if metadata.len() > LARGEST => Vec::new(),
            Ok(_) => fs::read(&self.path).map_err(failed)?,
        };
        if let Some(saved) = decode(&bytes) {
            return Ok(Some(saved));
        }
        fs::rename(&self.path, self.path.with_extension("corrupt")).map_err(failed)?;
        Err(LastGoodError::Corrupt { path: self.path.clone() })
    }
}

fn encode(saved: &Saved) -> Vec<u8> {
    let since = saved.applied_at.duration_since(SystemTime::UNIX_EPOCH).unwrap_or_default();
    let mut body = u64::try_from(since.as_millis()).unwrap_or(u64::MAX).to_le_bytes().to_vec();
    body.extend(saved.set.encode_to_vec());
    let mut bytes = MAGIC.to_vec();
    bytes.extend(crc32fast::hash(&body).to_le_bytes());
    bytes.extend(body);
    bytes
}

fn decode(bytes: &[u8]) -> Option<Saved> {
    let (head, body) = bytes.split_at_checked(HEAD)?;
    let checksum = u32::from_le_bytes(*head.strip_prefix(MAGIC)?.first_chunk()?);
    if crc32fast::hash(body) != checksum {
        return None;
    }
    let (since, set) = body.split_first_chunk()?;
    let applied_at = SystemTime::UNIX_EPOCH.checked_add(Duration::from_millis(u64::from_le_bytes(*since)))?;
    Some(Saved { set: RuleSet::decode(set).ok()?, applied_at })
}

#[cfg(test)]
mod tests {
    use gannet_proto::control::Rule;
    use proptest::prelude::*;

    use super::*;

    fn saved() -> Saved {
        let rules = vec![Rule { id: "a".into(), ..Rule::default() }];
        Saved {
            set: RuleSet {
                revision: 7,
                nonce: "n".into(),
                digest: gannet_proto::rules::digest(&rules),
                rules,
            },
            applied_at: SystemTime::UNIX_EPOCH + Duration::from_millis(1_700_000_000_123),
        }
    }

    #[test]
    fn what_is_saved_is_loaded_and_replaced() {
        let dir = tempfile::tempdir().unwrap();
        let store = LastGood::in_dir(dir.path());
        assert!(store.load().unwrap().is_none());
        store.save(&saved()).unwrap();
        assert_eq!(store.load().unwrap(), Some(saved()));
        let later = Saved { set: RuleSet { revision: 8, ..saved().set }, ..saved() };
        store.save(&later).unwrap();
        assert_eq!(store.load().unwrap(), Some(later));
    }

    #[test]
    fn a_damaged_file_is_set_aside_and_told_once() {
        let dir = tempfile::tempdir().unwrap();
        let store = LastGood::in_dir(dir.path());
        store.save(&saved()).unwrap();
        let path = dir.path().join("rules.last");
        let mut bytes = fs::read(&path).unwrap();
        let last = bytes.len() - 1;
        bytes[last] ^= 1;
        fs::write(&path, bytes).unwrap();
        assert!(matches!(store.load(), Err(LastGoodError::Corrupt { .. })));
        assert!(store.load().unwrap().is_none());
        assert!(dir.path().join("rules.corrupt").exists());
    }

    proptest! {
        #[test]
        fn any_change_to_the_bytes_is_noticed(at in any::<prop::sample::Index>(), flip in 1_u8..) {
            let mut bytes = encode(&saved());
            let at = at.index(bytes.len());
            bytes[at] ^= flip;
            prop_assert_eq!(decode(&bytes), None);
        }
    }
}
