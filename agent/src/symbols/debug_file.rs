//! Debug information that a distribution ships apart from the program: under `/usr/lib/debug`, by build id or by the
//! name and checksum in `.gnu_debuglink`.
//!
//! Only directories of the agent's own root are searched. What a container puts into its own would otherwise name the
//! functions of a file that it shares with others.

use std::{
    ffi::OsStr,
    fs::File,
    io::{self, Read},
    os::unix::ffi::OsStrExt,
    path::{Component, Path, PathBuf},
};

use super::elf::{self, Section, Sections};
use crate::model::MappedFile;

const MAX_NOTE_BYTES: u64 = 4096;
/// Shorter ones are made up, and would look at whole directories.
const MIN_BUILD_ID_DIGITS: usize = 8;
const MAX_CHECKED_BYTES: u64 = 1 << 30;

/// The debug file of `file`, if one is installed and is truly its own.
pub(crate) fn find(file: &MappedFile, open: &File, directories: &[PathBuf]) -> Option<MappedFile> {
    if directories.is_empty() {
        return None;
    }
    let sections = Sections::read(open).ok()?;
    let link = sections.find(".gnu_debuglink").and_then(|section| read_link(open, section));
    directories.iter().find_map(|directory| {
        let by_id = by_build_id(&file.build_id).map(|path| directory.join(path));
        let by_name =
            link.as_ref().and_then(|(name, _)| Some(directory.join(folder_of(&file.path)?).join(name)));
        [by_id, by_name].into_iter().flatten().find_map(|path| {
            let found =
                File::open(&path).ok().filter(|found| found.metadata().is_ok_and(|data| data.is_file()))?;
            let id = Sections::read(&found).ok().and_then(|sections| {
                let note = sections.find(".note.gnu.build-id")?;
                let note = elf::read_section(&found, note, MAX_NOTE_BYTES, "build id").ok()?;
                Some(elf::build_id([note.as_slice()].into_iter()))
            });
            let same_id = id.is_some_and(|id| !id.is_empty() && id == file.build_id);
            let same_sum =
                || link.as_ref().is_some_and(|(_, sum)| checksum(&found).is_ok_and(|found| found == *sum));
            (same_id || same_sum()).then(|| MappedFile::opened(&path.to_string_lossy(), 0, 0, found))
        })
    })
}

fn by_build_id(id: &str) -> Option<PathBuf> {
    let is_hex = id.len() >= MIN_BUILD_ID_DIGITS && id.bytes().all(|digit| digit.is_ascii_hexdigit());
    let (first, rest) = id.split_at_checked(2).filter(|_| is_hex)?;
    Some(Path::new(".build-id").join(first).join(format!("{rest}.debug")))
}

/// The directory of a file, to be joined to another: never a way out of it.
fn folder_of(path: &str) -> Option<PathBuf> {
    let folder = Path::new(path).parent()?.strip_prefix("/").ok()?;
    folder.components().all(|part| matches!(part, Component::Normal(_))).then(|| folder.to_owned())
}

/// Name and checksum: the name ends with a zero, the sum is at the next multiple of four.
fn read_link(file: &File, section: Section) -> Option<(PathBuf, u32)> {
    let bytes = elf::read_section(file, section, MAX_NOTE_BYTES, "debug link").ok()?;
    let name = elf::c_string(&bytes, 0)?;
    let at = (name.len() + 1).next_multiple_of(4);
    let sum = u32::from_le_bytes(bytes.get(at..at + 4)?.try_into().ok()?);
    let name = Path::new(OsStr::from_bytes(name));
    let mut parts = name.components();
    match (parts.next(), parts.next()) {
        (Some(Component::Normal(_)), None) => Some((name.to_owned(), sum)),
        _ => None,
    }
}

fn checksum(file: &File) -> io::Result<u32> {
    let mut hasher = crc32fast::Hasher::new();
    let mut reader = io::BufReader::with_capacity(1 << 16, file.take(MAX_CHECKED_BYTES));
    loop {
        let bytes = io::BufRead::fill_buf(&mut reader)?;
        if bytes.is_empty() {
            return Ok(hasher.finalize());
        }
        hasher.update(bytes);
        let taken = bytes.len();
        io::BufRead::consume(&mut reader, taken);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn no_name_leads_out_of_the_debug_directory() {
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
