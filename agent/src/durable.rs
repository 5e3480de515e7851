//! Files that are there whole or not at all.

use std::{
    fs::{self, File},
    io::{self, Write as _},
    path::Path,
};

/// The extension of a file that is being written.
pub(crate) const ASIDE: &str = "aside";

/// Writes a file beside its place, syncs it, and puts it there in one step. The caller syncs the directory, which makes
/// the step itself durable.
pub(crate) fn write_aside(path: &Path, bytes: &[u8]) -> io::Result<()> {
    let aside = path.with_extension(ASIDE);
    let written = File::create(&aside).and_then(|mut file| {
        file.write_all(bytes)?;
        file.sync_all()
    });
    written.and_then(|()| fs::rename(&aside, path)).inspect_err(|_| {
        // Half a file would only take room.
        let _ = fs::remove_file(&aside);
    })
}
