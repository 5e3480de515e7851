//! Tables kept on disk, so that a restarted agent need not make them again.
//!
//! One file for each content, written whole under another name and renamed; a file that does not hold what it should is
//! made anew. The directory is bounded: what was not used for the longest time goes first.

use std::{
    fs,
    io::{self, ErrorKind},
    os::unix::fs::DirBuilderExt as _,
    path::{Path, PathBuf},
    time::SystemTime,
};

use gannet_elf::{BuildId, ContentId, Segments};
use gannet_unwind::{
    cache::{self, CachedTable},
    table::UnwindTable,
};

/// What all files together may take.
const MOST_BYTES: u64 = 128 << 20;
/// Smaller tables are made as fast as they are read.
const LEAST_LINES: usize = 256;
const ENDING: &str = "table";

/// The directory of kept tables. Owner: the thread that makes tables.
#[derive(Debug)]
pub(super) struct Shelf {
    directory: PathBuf,
    bytes: u64,
    most: u64,
    told: bool,
}

impl Shelf {
    /// Opens the directory, makes it if need be, and removes what is too much or was left half written.
    pub(super) fn open(directory: &Path) -> io::Result<Self> {
        Self::bounded(directory, MOST_BYTES)
    }

    fn bounded(directory: &Path, most: u64) -> io::Result<Self> {
        // Who can write here can have any stack shown as any other.
        fs::DirBuilder::new().recursive(true).mode(0o700).create(directory)?;
        let mut shelf = Self { directory: directory.to_owned(), bytes: 0, most, told: false };
        shelf.tidy()?;
        Ok(shelf)
    }

    fn path(&self, content: &ContentId) -> PathBuf {
        self.directory.join(format!("{content}.{ENDING}"))
    }

    /// The table of a content, if it is kept and good.
    pub(super) fn take(&self, content: &ContentId) -> Option<CachedTable> {
        let path = self.path(content);
        let bytes = match cache::load(&path, self.most) {
            Ok(bytes) => bytes,
            Err(error) => {
                if error.kind() != ErrorKind::NotFound {
                    tracing::debug!("{}: {error}", path.display());
                }
                return None;
            }
        };
        match cache::decode(&bytes, content) {
            Ok(kept) => {
                // When it was used last; a disk that does not take it makes the order a little worse.
                let _ = fs::File::open(&path).and_then(|file| file.set_modified(SystemTime::now()));
                Some(kept)
            }
            Err(error) => {
                tracing::debug!("{}: {error}", path.display());
                let _ = fs::remove_file(&path);
                None
            }
        }
    }

    /// Whether a table is worth its place.
    pub(super) fn wants(table: &UnwindTable) -> bool {
        table.lines().len() >= LEAST_LINES
    }

    /// Keeps a table.
    pub(super) fn put(
        &mut self,
        content: &ContentId,
        table: &UnwindTable,
        segments: &Segments,
        build_id: Option<&BuildId>,
    ) {
        let bytes = cache::encode(content, table, segments, build_id);
        let result = cache::store(&self.path(content), &bytes).and_then(|()| {
            self.bytes += bytes.len() as u64;
            if self.bytes > self.most { self.tidy() } else { Ok(()) }
        });
        if let Err(error) = result
            && !std::mem::replace(&mut self.told, true)
        {
            let directory = self.directory.display();
            tracing::warn!("tables are not kept, and are made again after a restart: {directory}: {error}");
        }
    }

    /// Counts what is there; above the bound, removes the oldest down to three quarters of it.
    fn tidy(&mut self) -> io::Result<()> {
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
        if self.bytes > self.most {
            files.sort_unstable();
            for (_, size, path) in files {
                if self.bytes <= self.most / 4 * 3 {
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
    fn a_kept_table_is_found_again_and_a_damaged_one_is_not() {
        let directory = tempfile::tempdir().unwrap();
        let file = fs::File::open("/proc/self/exe").unwrap();
        let built = build_file(&file, &BuildOptions::new("self", &TableLimits::default())).unwrap();
        let mut shelf = Shelf::open(directory.path()).unwrap();
        assert!(shelf.take(&built.content).is_none());
        shelf.put(&built.content, &built.table, &built.segments, built.build_id.as_ref());
        let kept = Shelf::open(directory.path()).unwrap().take(&built.content).unwrap();
        assert_eq!((kept.table, kept.segments), (built.table, built.segments));
        let path = shelf.path(&built.content);
        let mut bytes = fs::read(&path).unwrap();
        *bytes.last_mut().unwrap() ^= 1;
        fs::write(&path, bytes).unwrap();
        assert!(shelf.take(&built.content).is_none());
        assert!(!path.exists(), "it would be tried again and again");
    }

    #[test]
    fn the_directory_is_bounded_and_the_oldest_go_first() {
        let directory = tempfile::tempdir().unwrap();
        for (name, age) in [("a", 30), ("b", 20), ("c", 10)] {
            let path = directory.path().join(format!("{name}.{ENDING}"));
            fs::write(&path, [0; 1000]).unwrap();
            let time = SystemTime::now() - std::time::Duration::from_secs(age);
            fs::File::open(&path).unwrap().set_modified(time).unwrap();
        }
        fs::write(directory.path().join("d.table.partial"), [0; 1000]).unwrap();
        let shelf = Shelf::bounded(directory.path(), 2800).unwrap();
        assert_eq!(shelf.bytes, 2000);
        let mut left: Vec<_> =
            fs::read_dir(directory.path()).unwrap().map(|entry| entry.unwrap().file_name()).collect();
        left.sort_unstable();
        assert_eq!(left, ["b.table", "c.table"]);
    }
}
