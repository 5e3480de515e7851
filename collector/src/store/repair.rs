//! Repair of the store: moves objects without a readable profile into another directory. Deletes nothing.

use std::{fmt, fs::File, path::Path, sync::Arc};

use object_store::{ObjectStore, ObjectStoreExt as _, local::LocalFileSystem, path::Path as Key};

use super::{
    Bucket, ObjectFault, StoreError, Verified, index::Index, lock, object::ObjectName, verify::verify,
};

/// Directory of the objects, below `--data`.
const OBJECTS: &str = "objects/";
/// Directory for faulty objects, below `--data` or in the bucket.
pub(crate) const ASIDE: &str = "set-aside";

/// The repair of one faulty object.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Repair {
    /// The new path of the object, which no collector reads.
    SetAside(String),
    /// The new path of an object that was in the directory of another hour.
    Moved(String),
    /// The reason why the object stays, with its fault.
    Kept(&'static str),
    /// The reason why the repair could not move the object.
    Failed(String),
}

impl Repair {
    /// Reports whether the repair removed the fault.
    pub fn is_done(&self) -> bool {
        matches!(self, Self::SetAside(_) | Self::Moved(_))
    }
}

impl fmt::Display for Repair {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::SetAside(path) => write!(f, "set aside as {path}"),
            Self::Moved(path) => write!(f, "moved to {path}"),
            Self::Kept(reason) => write!(f, "kept: {reason}"),
            Self::Failed(reason) => write!(f, "cannot move it: {reason}"),
        }
    }
}

/// The repair that a fault requires.
enum Wanted {
    SetAside,
    /// Move the object to this path below the objects.
    Move(String),
    Keep(&'static str),
    /// Set the object aside, unless the index has its profiles: then queries can read them without its own index part.
    AskIndex,
}

impl Wanted {
    fn of(fault: &ObjectFault) -> Self {
        match fault {
            ObjectFault::Empty | ObjectFault::CutIndex | ObjectFault::Copy(_) => Self::SetAside,
            ObjectFault::Zeroed | ObjectFault::Foreign => Self::AskIndex,
            ObjectFault::Cut { lost, profiles } | ObjectFault::Damaged { lost, profiles }
                if lost == profiles =>
            {
                Self::SetAside
            }
            ObjectFault::Cut { .. } | ObjectFault::Damaged { .. } => {
                Self::Keep("its other profiles are readable")
            }
            ObjectFault::Longer(_) => Self::Keep("its profiles are readable"),
            ObjectFault::Misplaced(path) => Self::Move(path.clone()),
            ObjectFault::Newer(_) => Self::Keep("a newer collector reads it"),
            ObjectFault::Deletion => {
                Self::Keep("without it, profiles would come back; remove it by hand, and delete them again")
            }
            ObjectFault::Unreadable(_) => Self::Keep("it may be readable later"),
            ObjectFault::TableFile(_) | ObjectFault::TableLog(_) => {
                Self::Keep("a repair of objects leaves tables alone")
            }
        }
    }
}

/// Locks the directory of an existing store. Fails if a collector uses it.
pub(crate) fn lock_unused(data: &Path, bucket: Option<&Bucket>) -> Result<Option<File>, StoreError> {
    let is_there = if bucket.is_some() { data.is_dir() } else { data.join(OBJECTS).is_dir() };
    is_there.then(|| lock(data)).transpose()
}

/// Reads all objects, and repairs each faulty one. Calls `report` with path, fault and repair. The caller holds the lock. Fails if it
/// cannot list the objects.
pub(crate) async fn repair(
    data: &Path,
    bucket: Option<&Bucket>,
    mut report: impl FnMut(&str, &ObjectFault, &Repair),
) -> Result<Verified, StoreError> {
    let mut faults = Vec::new();
    let verified = verify(data, bucket, |path, fault| faults.push((path.to_owned(), fault.clone()))).await?;
    let (objects, prefix): (Arc<dyn ObjectStore>, _) = if let Some(bucket) = bucket {
        (bucket.connect().map_err(StoreError::Object)?, "")
    } else {
        let local = LocalFileSystem::new_with_prefix(data).map_err(StoreError::Object)?;
        (Arc::new(local.with_fsync(true)), OBJECTS)
    };
    let index_path = data.join("index.redb");
    let index = index_path.is_file().then(|| Index::open(&index_path)).transpose()?.map(|(index, _)| index);
    for (path, fault) in faults {
        let wanted = match Wanted::of(&fault) {
            Wanted::AskIndex if is_indexed(index.as_ref(), &path)? => {
                Wanted::Keep("the index still finds its profiles")
            }
            wanted => wanted,
        };
        let from = Key::from(format!("{prefix}{path}"));
        let repair = match wanted {
            Wanted::Keep(reason) => Repair::Kept(reason),
            Wanted::SetAside | Wanted::AskIndex => {
                let to = format!("{ASIDE}/{path}");
                match objects.rename(&from, &Key::from(to.as_str())).await {
                    Ok(()) => Repair::SetAside(to),
                    Err(error) => Repair::Failed(error.to_string()),
                }
            }
            Wanted::Move(right) => {
                let to = Key::from(format!("{prefix}{right}"));
                match objects.rename_if_not_exists(&from, &to).await {
                    Ok(()) => Repair::Moved(right),
                    Err(error) => Repair::Failed(error.to_string()),
                }
            }
        };
        report(&path, &fault, &repair);
    }
    Ok(verified)
}

/// Reports whether the index has profiles of the segment at this path.
fn is_indexed(index: Option<&Index>, path: &str) -> Result<bool, StoreError> {
    let name = path.rsplit('/').next().and_then(ObjectName::parse);
    match (index, name) {
        (Some(index), Some(ObjectName::Segment(id))) => Ok(!index.of_segment(id)?.is_empty()),
        _ => Ok(false),
    }
}
