//! Separate debug files, as distributions install them under `/usr/lib/debug`: found by build id, or by the name and checksum
//! in `.gnu_debuglink`.
//!
//! Only directories in the agent's own root are searched. Otherwise a container could name the functions of a file that it
//! shares with other containers.

use std::{
    ffi::OsStr,
    fs::{self, File},
    os::unix::ffi::OsStrExt,
    path::{Component, Path, PathBuf},
};

use gannet_elf::{AlternateLink, Elf, ElfLimits, checksum};

use crate::model::MappedFile;

/// A shorter build id is no real one, and would match whole directories.
const MIN_BUILD_ID_DIGITS: usize = 8;

/// Finds the installed debug file of `file`. It must have the build id of `file`, or the checksum of its link.
pub(crate) fn find(file: &MappedFile, open: &File, directories: &[PathBuf]) -> Option<MappedFile> {
    if directories.is_empty() {
        return None;
    }
    let elf = Elf::parse(open, &ElfLimits::default()).ok()?;
    let link = elf.debug_link();
    directories.iter().find_map(|directory| {
        let by_id = by_build_id(&file.build_id).map(|path| directory.join(path));
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

/// Finds the file with the debug information that several files share. `linker` is the path of the debug file that refers to it;
/// none for a file that anyone may have made. The path in the link may lead anywhere, so the result must lie in one of the
/// directories, and have the build id of the link. The reader of debug information searches in the same order.
pub(crate) fn find_alternate(
    link: &AlternateLink,
    linker: Option<&Path>,
    directories: &[PathBuf],
) -> Option<File> {
    let path = Path::new(OsStr::from_bytes(&link.path));
    let by_id = by_build_id(&link.build_id.to_string());
    let by_id = directories.iter().filter_map(|directory| Some(directory.join(by_id.as_ref()?)));
    let by_path = directories.iter().map(|directory| directory.join(path));
    let beside = linker.and_then(|linker| Some(fs::canonicalize(linker).ok()?.parent()?.join(path)));
    let first = by_id.chain(by_path).chain(beside).find(|candidate| candidate.exists())?;
    let canonical = fs::canonicalize(first).ok()?;
    let is_inside = |directory: &PathBuf| {
        fs::canonicalize(directory).is_ok_and(|directory| canonical.starts_with(directory))
    };
    let is_file = fs::metadata(&canonical).is_ok_and(|metadata| metadata.is_file());
    if !is_file || !directories.iter().any(is_inside) {
        return None;
    }
    let found = File::open(canonical).ok()?;
    let elf = Elf::parse(&found, &ElfLimits::default()).ok()?;
    (elf.build_id() == Some(&link.build_id)).then_some(found)
}

fn by_build_id(id: &str) -> Option<PathBuf> {
    let is_hex = id.len() >= MIN_BUILD_ID_DIGITS && id.bytes().all(|digit| digit.is_ascii_hexdigit());
    let (first, rest) = id.split_at_checked(2).filter(|_| is_hex)?;
    Some(Path::new(".build-id").join(first).join(format!("{rest}.debug")))
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
        assert_eq!(by_build_id("00ff10aa"), Some(".build-id/00/ff10aa.debug".into()));
        for id in ["", "00", "../../../../etc/passwd", "Go/build/id-text", "éééééééé"] {
            assert_eq!(by_build_id(id), None, "{id}");
        }
    }
}
