//! Writing a file so that after a crash it is there whole, or as it was.

use std::{
    fs::{self, OpenOptions},
    io::{self, Write as _},
    os::unix::fs::OpenOptionsExt as _,
    path::Path,
};

/// The extension of what is not finished; such a file means nothing and may be removed.
pub(crate) const ASIDE: &str = "aside";

/// Writes beside `path`, syncs, and renames. The rename is durable once the directory is synced, which is left to the
/// caller: who writes often keeps the directory open.
pub(crate) fn write_aside(path: &Path, bytes: &[u8]) -> io::Result<()> {
    let aside = path.with_extension(ASIDE);
    let write = || {
        let mut file = OpenOptions::new().write(true).create(true).truncate(true).mode(0o600).open(&aside)?;
        file.write_all(bytes)?;
        file.sync_all()?;
        fs::rename(&aside, path)
    };
    write().inspect_err(|_| {
        // Its space is wanted by whoever tries next.
        drop(fs::remove_file(&aside));
    })
}
