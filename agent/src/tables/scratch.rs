//! Unwind tables in a file without a name, which goes with the agent.
//!
//! The agent keeps few tables in memory. Beside builds, whose processes are short and whose programs are large, it would
//! build the same table again every few seconds.

use std::{
    collections::HashMap,
    env,
    fs::File,
    io::{self, ErrorKind},
    os::unix::fs::FileExt as _,
};

use gannet_elf::ContentId;
use gannet_unwind::cache::{self, CachedTable};
use rustix::fs::{Mode, OFlags};

/// Limit of all tables together. Later ones are built again.
const MAX_BYTES: u64 = 64 << 20;

/// The file, and where the tables are in it. Owner: the thread that builds tables.
#[derive(Debug, Default)]
pub(super) struct Scratch {
    /// Made for the first table.
    file: Option<File>,
    /// Offset and length of each table, in bytes.
    places: HashMap<ContentId, (u64, usize)>,
    end: u64,
    /// The file could not be written: no further table is.
    failed: bool,
}

impl Scratch {
    /// Reads the table of a content, if it is there.
    pub(super) fn read(&self, content: &ContentId) -> Option<CachedTable> {
        let (offset, length) = *self.places.get(content)?;
        let mut bytes = vec![0; length];
        self.file.as_ref()?.read_exact_at(&mut bytes, offset).ok()?;
        cache::decode(&bytes, content).ok()
    }

    /// Writes an encoded table.
    pub(super) fn write(&mut self, content: &ContentId, bytes: &[u8]) {
        if self.failed || self.places.contains_key(content) {
            return;
        }
        let end = self.end + bytes.len() as u64;
        if end > MAX_BYTES {
            return;
        }
        match self.append(bytes) {
            Ok(()) => {
                self.places.insert(*content, (self.end, bytes.len()));
                self.end = end;
            }
            Err(error) => {
                let directory = env::temp_dir();
                let directory = directory.display();
                tracing::info!("cannot keep unwind tables in {directory}, they are built again: {error}");
                self.failed = true;
            }
        }
    }

    fn append(&mut self, bytes: &[u8]) -> io::Result<()> {
        if self.file.is_none() {
            let flags = OFlags::TMPFILE | OFlags::RDWR | OFlags::CLOEXEC;
            let opened = rustix::fs::open(env::temp_dir(), flags, Mode::RUSR | Mode::WUSR)?;
            self.file = Some(File::from(opened));
        }
        self.file.as_ref().ok_or(ErrorKind::NotFound)?.write_all_at(bytes, self.end)
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
    fn tables_are_found_again_by_their_content() {
        let mut scratch = Scratch::default();
        let built = ["/proc/self/exe", "/bin/sh"].map(|path| {
            let file = File::open(path).unwrap();
            build_file(&file, &BuildOptions::new(path, &TableLimits::default())).unwrap()
        });
        for table in &built {
            assert!(scratch.read(&table.content).is_none());
            let bytes = cache::encode(&table.content, &table.table, &table.segments, None);
            scratch.write(&table.content, &bytes);
        }
        for table in &built {
            let stored = scratch.read(&table.content).unwrap();
            assert_eq!((&stored.table, &stored.segments), (&table.table, &table.segments));
        }
    }
}
