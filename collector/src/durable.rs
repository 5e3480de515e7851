//! Small files that are replaced as a whole: written aside, synced, renamed, and the directory synced.

use std::{
    fs::{self, File},
    io::{self, Write as _},
    path::Path,
};

/// After a success the file has the new content even after a power cut; after a failure, the old one.
pub(crate) fn replace(path: &Path, content: &[u8]) -> io::Result<()> {
    let aside = path.with_extension("new");
    let write = || {
        let mut file = File::create(&aside)?;
        file.write_all(content)?;
        file.sync_all()?;
        fs::rename(&aside, path)?;
        match path.parent() {
            Some(dir) => File::open(dir)?.sync_all(),
            None => Ok(()),
        }
    };
    write().inspect_err(|_| drop(fs::remove_file(&aside)))
}
