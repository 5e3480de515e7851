//! Unwind tables on disk, so that a restarted agent does not build them again.
//!
//! Each content has a file, which is written under another name and then renamed. A damaged file is removed, and its table
//! built again. The directory has a size limit: files whose last use is longest ago go first.

use std::{
    fs,
    io::{self, ErrorKind},
    os::unix::fs::DirBuilderExt as _,
    path::{Path, PathBuf},
    time::SystemTime,
};

use gannet_elf::ContentId;
use gannet_unwind::{
    cache::{self, CachedTable},
    table::UnwindTable,
};

/// Limit of all files together.
const MAX_BYTES: u64 = 128 << 20;
/// Smaller tables are built as fast as they are read.
const MIN_LINES: usize = 256;
const ENDING: &str = "table";

/// The directory of tables. Owner: the thread that builds tables.
#[derive(Debug)]
pub(super) struct DiskCache {
    directory: PathBuf,
    bytes: u64,
    max_bytes: u64,
    /// A failure to write is logged once.
    failure_logged: bool,
}

impl DiskCache {
    /// Opens the directory, creates it if need be, and removes partial files and those beyond the size limit.
    pub(super) fn open(directory: &Path) -> io::Result<Self> {
        Self::with_limit(directory, MAX_BYTES)
    }

    fn with_limit(directory: &Path, max_bytes: u64) -> io::Result<Self> {
        // A user who can write here can forge the stacks of any program.
        fs::DirBuilder::new().recursive(true).mode(0o700).create(directory)?;
        let mut cache = Self { directory: directory.to_owned(), bytes: 0, max_bytes, failure_logged: false };
        cache.trim()?;
        Ok(cache)
    }

    fn path(&self, content: &ContentId) -> PathBuf {
        self.directory.join(format!("{content}.{ENDING}"))
    }

    /// Reads the table of a content, if there is an intact one.
    pub(super) fn read(&self, content: &ContentId) -> Option<CachedTable> {
        let path = self.path(content);
        let bytes = match cache::load(&path, self.max_bytes) {
            Ok(bytes) => bytes,
            Err(error) => {
                if error.kind() != ErrorKind::NotFound {
                    tracing::debug!("{}: {error}", path.display());
                }
                return None;
            }
        };
        match cache::decode(&bytes, content) {
            Ok(table) => {
                // The time of the last use. If the disk refuses it, the order of removal is a little worse.
                let _ = fs::File::open(&path).and_then(|file| file.set_modified(SystemTime::now()));
                Some(table)
            }
            Err(error) => {
                tracing::debug!("{}: {error}", path.display());
                let _ = fs::remove_file(&path);
                None
            }
        }
    }

    /// Returns whether reading a table is faster than building it.
    pub(super) fn is_worthwhile(table: &UnwindTable) -> bool {
        table.lines().len() >= MIN_LINES
    }

    /// Writes an encoded table.
    pub(super) fn write(&mut self, content: &ContentId, bytes: &[u8]) {
        let result = cache::store(&self.path(content), bytes).and_then(|()| {
            self.bytes += bytes.len() as u64;
            if self.bytes > self.max_bytes { self.trim() } else { Ok(()) }
        });
        if let Err(error) = result
            && !std::mem::replace(&mut self.failure_logged, true)
        {
            let directory = self.directory.display();
            tracing::warn!(
                "cannot store unwind tables in {directory}, they are built again after a restart: {error}"
            );
        }
    }

    /// Sums up the sizes; above the limit, removes the oldest files down to three quarters of it.
    fn trim(&mut self) -> io::Result<()> {
        let mut files = Vec::new();
        for entry in fs::read_dir(&self.directory)? {
            let entry = entry?;
            let path = entry.path();
            let Ok(metadata) = entry.metadata() else { continue };
            if path.extension().is_some_and(|ending| ending == ENDING) {
                files.push((metadata.modified().unwrap_or(SystemTime::UNIX_EPOCH), metadata.len(), path));
            } else if path.extension().is_some_and(|ending| ending == "partial") {
                let _ = fs::remove_file(path);
            }
        }
        self.bytes = files.iter().map(|(_, size, _)| size).sum();
        if self.bytes > self.max_bytes {
            files.sort_unstable();
            for (_, size, path) in files {
                if self.bytes <= self.max_bytes / 4 * 3 {
                    break;
                }
                fs::remove_file(path)?;
                self.bytes -= size;
            }
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use gannet_unwind::{
        build::{BuildOptions, build_file},
        limits::TableLimits,
    };

    use super::*;

    #[test]
    fn an_intact_table_is_found_again_and_a_damaged_one_is_not() {
        let directory = tempfile::tempdir().unwrap();
        let file = fs::File::open("/proc/self/exe").unwrap();
        let built = build_file(&file, &BuildOptions::new("self", &TableLimits::default())).unwrap();
        let mut cache = DiskCache::open(directory.path()).unwrap();
        assert!(cache.read(&built.content).is_none());
        cache.write(&built.content, &cache::encode(&built.content, &built.table, &built.segments, None));
        let stored = DiskCache::open(directory.path()).unwrap().read(&built.content).unwrap();
        assert_eq!((stored.table, stored.segments), (built.table, built.segments));
        let path = cache.path(&built.content);
        let mut bytes = fs::read(&path).unwrap();
        *bytes.last_mut().unwrap() ^= 1;
        fs::write(&path, bytes).unwrap();
        assert!(cache.read(&built.content).is_none());
        assert!(!path.exists(), "a damaged file is removed, so that it is read once");
    }

    #[test]
    fn the_oldest_files_leave_a_full_directory_first() {
        let directory = tempfile::tempdir().unwrap();
        for (name, age) in [("a", 30), ("b", 20), ("c", 10)] {
            let path = directory.path().join(format!("{name}.{ENDING}"));
            fs::write(&path, [0; 1000]).unwrap();
            let time = SystemTime::now() - std::time::Duration::from_secs(age);
            fs::File::open(&path).unwrap().set_modified(time).unwrap();
        }
        fs::write(directory.path().join("d.table.partial"), [0; 1000]).unwrap();
        let cache = DiskCache::with_limit(directory.path(), 2800).unwrap();
        assert_eq!(cache.bytes, 2000);
        let mut left: Vec<_> =
            fs::read_dir(directory.path()).unwrap().map(|entry| entry.unwrap().file_name()).collect();
        left.sort_unstable();
        assert_eq!(left, ["b.table", "c.table"]);
    }
}
