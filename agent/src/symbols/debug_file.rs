//! Separate debug files, as distributions install them under `/usr/lib/debug`: found by build id, or by the name and checksum
//! in `.gnu_debuglink`.
//!
//! Only directories in the agent's own root are searched. Otherwise a container could name the functions of a file that it
//! shares with other containers.

use std::{
    ffi::OsStr,
    fs::File,
    os::unix::ffi::OsStrExt,
    path::{Component, Path, PathBuf},
};

use gannet_elf::{Elf, ElfLimits, checksum};
use gannet_symbols::alternate::path_of_build_id;

use crate::model::MappedFile;

/// Finds the installed debug file of `file`. It must have the build id of `file`, or the checksum of its link.
pub(crate) fn find(file: &MappedFile, open: &File, directories: &[PathBuf]) -> Option<MappedFile> {
    if directories.is_empty() {
        return None;
    }
    let elf = Elf::parse(open, &ElfLimits::default()).ok()?;
    let link = elf.debug_link();
    directories.iter().find_map(|directory| {
        let by_id = path_of_build_id(&file.build_id).map(|path| directory.join(path));
        let by_name = link.as_ref().and_then(|link| {
            Some(directory.join(folder_of(&file.path)?).join(OsStr::from_bytes(&link.name)))
        });
        [by_id, by_name].into_iter().flatten().find_map(|path| {
            let found =
                File::open(&path).ok().filter(|found| found.metadata().is_ok_and(|data| data.is_file()))?;
            let debug = Elf::parse(&found, &ElfLimits::default()).ok();
            let same_build =
                elf.build_id().is_some() && debug.is_some_and(|debug| debug.build_id() == elf.build_id());
            let same_sum = || link.as_ref().is_some_and(|link| checksum(&found) == Some(link.crc));
            (same_build || same_sum()).then(|| MappedFile::opened(&path.to_string_lossy(), 0, 0, found))
        })
    })
}

/// Returns the directory of a file as a relative path that never leaves the directory it is joined to.
fn folder_of(path: &str) -> Option<PathBuf> {
    let folder = Path::new(path).parent()?.strip_prefix("/").ok()?;
    folder.components().all(|part| matches!(part, Component::Normal(_))).then(|| folder.to_owned())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn no_name_leaves_the_debug_directory() {
        assert_eq!(folder_of("/usr/bin/x"), Some("usr/bin".into()));
        assert_eq!(folder_of("/x"), Some(PathBuf::new()));
        for path in ["", "x", "/usr/../../etc/x", "/../x"] {
            assert_eq!(folder_of(path), None, "{path}");
        }
    }
}
