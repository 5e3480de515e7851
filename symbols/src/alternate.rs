//! Debug files by build id, and files with the debug information that several files share.

use std::{
    ffi::OsStr,
    fs::{self, File},
    os::unix::ffi::OsStrExt as _,
    path::{Path, PathBuf},
};

use gannet_elf::{AlternateLink, BuildId, Elf, ElfLimits};

/// Finds the file with the debug information that several files share. `linker` is the path of the debug file that refers to it, or
/// `None` for an untrusted file. The path in the link may lead anywhere, so the result must lie in one of the directories, and have
/// the build id of the link. The reader of debug information searches in the same order.
pub fn find_alternate(link: &AlternateLink, linker: Option<&Path>, directories: &[PathBuf]) -> Option<File> {
    let path = Path::new(OsStr::from_bytes(&link.path));
    let by_id = path_of_build_id(&link.build_id.to_string());
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

/// Returns the path of the debug file of a build id in hex, relative to a directory of debug files: `.build-id/ab/cdef01.debug`.
/// Returns `None` for a text that is not a build id.
pub fn path_of_build_id(id: &str) -> Option<PathBuf> {
    // A shorter id would match whole directories.
    id.parse().ok().filter(BuildId::is_unique)?;
    let (first, rest) = id.split_at_checked(2)?;
    Some(Path::new(".build-id").join(first).join(format!("{rest}.debug")))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_a_build_id_has_a_path() {
        assert_eq!(path_of_build_id("00ff10aa"), Some(".build-id/00/ff10aa.debug".into()));
        for id in ["", "00", "../../../../etc/passwd", "Go/build/id-text", "éééééééé"] {
            assert_eq!(path_of_build_id(id), None, "{id}");
        }
    }
}
