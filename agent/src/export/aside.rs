//! Writes a file so that after a crash it has either its old or its new content.

use std::{
    fs::{self, OpenOptions},
    io::{self, Write as _},
    os::unix::fs::OpenOptionsExt as _,
    path::Path,
};

/// Extension of a file whose write did not finish. Anyone may remove it.
pub(crate) const ASIDE: &str = "aside";

/// Writes to a file beside `path`, syncs it and renames it. The rename is durable once the caller has synced the directory;
/// a caller that writes often keeps the directory open.
pub(crate) fn write_aside(path: &Path, bytes: &[u8]) -> io::Result<()> {
    let aside = path.with_extension(ASIDE);
    let write = || {
        let mut file = OpenOptions::new().write(true).create(true).truncate(true).mode(0o600).open(&aside)?;
        file.write_all(bytes)?;
        file.sync_all()?;
        fs::rename(&aside, path)
    };
    write().inspect_err(|_| {
        // The next attempt needs the space.
        drop(fs::remove_file(&aside));
    })
}
