//! Unwind tables that the operator supplies as texts: `*.unwind` files of one directory ([`gannet_unwind::overrides`]).
//!
//! A file that cannot be used is refused with the reason, and stops no other one. A user who can write here decides about the
//! stacks of any program, so a file has to belong to root or to the agent's user.

use std::{
    fmt, fs,
    io::{self, Read as _},
    os::unix::fs::{MetadataExt as _, OpenOptionsExt as _},
    path::{Path, PathBuf},
    sync::Arc,
    time::SystemTime,
};

use gannet_elf::{Arch, ContentId};
use gannet_unwind::{
    limits::TableLimits,
    overrides::{OverrideError, Overrides, parse_text},
};

/// Ending of the files.
const ENDING: &str = "unwind";
/// Files of the directory that are read, in the order of their names.
const MAX_FILES: usize = 256;
/// Bytes of one text: a table of a million rows.
const MAX_FILE_BYTES: u64 = 32 << 20;
/// Memory of all supplied tables.
const MAX_TABLE_BYTES: usize = 64 << 20;
/// Permission of every user to write.
const WORLD_WRITABLE: u32 = 0o002;

/// The supplied tables of a directory, and the files that it could not use.
#[derive(Clone, Debug, Default)]
pub(crate) struct SuppliedTables {
    /// Tables by file content.
    pub(crate) tables: Arc<Overrides>,
    /// The file of each table.
    pub(crate) used: Vec<(PathBuf, ContentId)>,
    /// The files that were refused.
    pub(crate) refused: Vec<Refused>,
}

/// A file that supplies no table.
#[derive(Debug, thiserror::Error)]
#[error("{}: {fault}", path.display())]
pub(crate) struct Refused {
    pub(crate) path: PathBuf,
    pub(crate) fault: Arc<Fault>,
}

impl Clone for Refused {
    fn clone(&self) -> Self {
        Self { path: self.path.clone(), fault: Arc::clone(&self.fault) }
    }
}

/// The reason why a file supplies no table.
#[derive(Debug, thiserror::Error)]
pub(crate) enum Fault {
    #[error("{0}; make it readable for the agent")]
    Read(#[from] io::Error),
    #[error("it is no regular file; replace it by one")]
    NoFile,
    #[error("its owner is the user {0}; give it to root: chown root FILE")]
    Owner(u32),
    #[error("every user can write it; forbid that: chmod o-w FILE")]
    WorldWritable,
    #[error("it has more than {MAX_FILE_BYTES} bytes; supply only the functions that need other rules")]
    TooLarge,
    #[error("it is no text; write one with `gannet-agent check --file PROGRAM --write-table FILE`")]
    NoText,
    #[error(
        "{0}; correct the line, or write the file again with `gannet-agent check --file PROGRAM --write-table FILE`"
    )]
    Text(#[from] OverrideError),
    #[error("field arch: {0:?} is not the architecture of this node; remove the file")]
    Arch(Arch),
    #[error("field content: {} is for the same file content; remove one of them", .0.display())]
    Duplicate(PathBuf),
    #[error("the tables of all files take more than {MAX_TABLE_BYTES} bytes; remove some")]
    NoMemory,
    #[error("the directory has more than {MAX_FILES} such files; remove some")]
    TooMany,
}

/// Names, times and sizes of the files of a directory. Differs after a change of any of them.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(crate) struct SuppliedStamp(Vec<(PathBuf, Option<FileStamp>)>);

/// Time of the last change, size and inode.
type FileStamp = (SystemTime, u64, u64);

impl SuppliedStamp {
    /// Reads the stamp of a directory; empty if it cannot be read.
    pub(crate) fn of(directory: &Path) -> Self {
        let stamp = |path: &PathBuf| {
            let metadata = fs::metadata(path).ok()?;
            Some((metadata.modified().ok()?, metadata.len(), metadata.ino()))
        };
        let files = files_of(directory);
        Self(files.into_iter().map(|path| (path.clone(), stamp(&path))).collect())
    }
}

/// Returns the files of a directory by name, one more than the agent reads.
fn files_of(directory: &Path) -> Vec<PathBuf> {
    let entries = fs::read_dir(directory).into_iter().flatten().flatten();
    let paths = entries.map(|entry| entry.path());
    let mut files: Vec<_> =
        paths.filter(|path| path.extension().is_some_and(|ending| ending == ENDING)).collect();
    files.sort_unstable();
    files.truncate(MAX_FILES + 1);
    files
}

impl SuppliedTables {
    /// Reads all files of a directory. A directory that is not there supplies nothing.
    pub(crate) fn read(directory: &Path) -> Self {
        let limits = TableLimits::default();
        let mut this = Self::default();
        let mut tables = Overrides::default();
        let mut bytes = 0;
        for (index, path) in files_of(directory).into_iter().enumerate() {
            let parsed = if index < MAX_FILES { read_text(&path) } else { Err(Fault::TooMany) };
            let parsed = parsed.and_then(|text| {
                let (content, table) = parse_text(&text, &limits)?;
                if let Some((other, _)) = this.used.iter().find(|(_, other)| *other == content) {
                    return Err(Fault::Duplicate(other.clone()));
                }
                if table.arch() != node_arch() {
                    return Err(Fault::Arch(table.arch()));
                }
                bytes += table.kernel_bytes();
                if bytes > MAX_TABLE_BYTES { Err(Fault::NoMemory) } else { Ok((content, table)) }
            });
            match parsed {
                Ok((content, table)) => {
                    tables.insert(content, table);
                    this.used.push((path, content));
                }
                Err(fault) => this.refused.push(Refused { path, fault: Arc::new(fault) }),
            }
        }
        this.tables = Arc::new(tables);
        this
    }

    /// Logs a line for each file.
    pub(crate) fn log(&self) {
        for (path, content) in &self.used {
            tracing::info!("using the unwind table in {} for file content {content}", path.display());
        }
        for refused in &self.refused {
            tracing::warn!("refused a supplied unwind table, using that of its file: {refused}");
        }
    }

    /// Returns why some files are not used; `None` if all are.
    pub(crate) fn degraded(&self) -> Option<String> {
        let first = self.refused.first()?;
        Some(match self.refused.len() {
            1 => format!("refused {first}"),
            all => format!("refused {all} files, the first is {first}"),
        })
    }
}

impl fmt::Display for SuppliedTables {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} used, {} refused", self.used.len(), self.refused.len())
    }
}

fn node_arch() -> Arch {
    if cfg!(target_arch = "aarch64") { Arch::Aarch64 } else { Arch::X86_64 }
}

fn read_text(path: &Path) -> Result<String, Fault> {
    // Opening a FIFO would wait for its writer.
    let file =
        fs::OpenOptions::new().read(true).custom_flags(libc::O_NONBLOCK | libc::O_NOCTTY).open(path)?;
    let metadata = file.metadata()?;
    if !metadata.is_file() {
        return Err(Fault::NoFile);
    }
    if ![0, rustix::process::geteuid().as_raw()].contains(&metadata.uid()) {
        return Err(Fault::Owner(metadata.uid()));
    }
    if metadata.mode() & WORLD_WRITABLE != 0 {
        return Err(Fault::WorldWritable);
    }
    let mut bytes = Vec::new();
    file.take(MAX_FILE_BYTES + 1).read_to_end(&mut bytes)?;
    if bytes.len() as u64 > MAX_FILE_BYTES {
        return Err(Fault::TooLarge);
    }
    String::from_utf8(bytes).map_err(|_| Fault::NoText)
}

#[cfg(test)]
mod tests {
    use std::{os::unix::fs::PermissionsExt as _, process::Command};

    use super::*;

    fn text(content: u8, rows: &str) -> String {
        let arch = if cfg!(target_arch = "aarch64") { "aarch64" } else { "x86_64" };
        format!("content {}\narch {arch}\n{rows}", format!("{content:02x}").repeat(16))
    }

    const GOOD: &str = "0x1000 sp+8\nend 0x2000\n";

    /// Checks that each bad file is refused with its name, the field and what to do, and that the others are used.
    #[test]
    fn a_bad_file_is_refused_with_field_and_cure() {
        let directory = tempfile::tempdir().unwrap();
        let path = |name: &str| directory.path().join(name);
        let other_arch = if cfg!(target_arch = "aarch64") { "x86_64" } else { "aarch64" };
        let foreign = text(1, GOOD).replace(std::env::consts::ARCH, other_arch);
        let long = text(9, &format!("{}{GOOD}", "# long\n".repeat((MAX_FILE_BYTES / 6) as usize)));
        for (name, bytes) in [
            ("a-good.unwind", text(2, GOOD).into_bytes()),
            ("b-cut.unwind", text(3, "0x1000 sp+8\n").into_bytes()),
            ("c-rule.unwind", text(4, "0x1000 rax+8\nend 0x2000").into_bytes()),
            ("d-bytes.unwind", vec![0xff; 100]),
            ("e-again.unwind", text(2, GOOD).into_bytes()),
            ("f-arch.unwind", foreign.into_bytes()),
            ("g-long.unwind", long.into_bytes()),
            ("h-order.unwind", text(5, "0x2000 sp+8\n0x1000 sp+8\nend 0x3000").into_bytes()),
            ("i-span.unwind", text(6, "0x1000 sp+8\nend 0xffffffffffffffff").into_bytes()),
            ("j-empty.unwind", Vec::new()),
            ("k-world.unwind", text(7, GOOD).into_bytes()),
            ("z-good.unwind", text(8, GOOD).into_bytes()),
            ("notes.txt", b"no table".to_vec()),
        ] {
            fs::write(path(name), bytes).unwrap();
        }
        fs::set_permissions(path("k-world.unwind"), fs::Permissions::from_mode(0o666)).unwrap();
        assert!(Command::new("mkfifo").arg(path("l-fifo.unwind")).status().unwrap().success());
        fs::create_dir(path("m-directory.unwind")).unwrap();
        std::os::unix::fs::symlink("nowhere", path("n-link.unwind")).unwrap();
        let supplied = SuppliedTables::read(directory.path());
        let used: Vec<_> = supplied.used.iter().map(|(path, _)| path.file_name().unwrap()).collect();
        assert_eq!(used, ["a-good.unwind", "z-good.unwind"]);
        assert_eq!(supplied.tables.len(), 2);
        let expected = [
            ("b-cut", "line 4: expected `end`"),
            ("c-rule", "line 3: expected `sp+N`"),
            ("d-bytes", "--write-table"),
            ("e-again", "field content"),
            ("f-arch", "field arch"),
            ("g-long", "more than"),
            ("h-order", "line 4"),
            ("i-span", "line 4"),
            ("j-empty", "line 1"),
            ("k-world", "chmod o-w"),
            ("l-fifo", "no regular file"),
            ("m-directory", "no regular file"),
            ("n-link", "No such file"),
        ];
        assert_eq!(supplied.refused.len(), expected.len(), "{:?}", supplied.refused);
        for (refused, (name, words)) in supplied.refused.iter().zip(expected) {
            let line = refused.to_string();
            assert!(line.contains(name) && line.contains(words) && line.contains("; "), "{line}");
        }
        assert!(supplied.degraded().unwrap().contains("b-cut"));
    }

    #[test]
    fn a_file_of_another_user_is_refused() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("theirs.unwind");
        fs::write(&path, text(1, GOOD)).unwrap();
        std::os::unix::fs::chown(&path, Some(65534), None).expect("this test needs root");
        let supplied = SuppliedTables::read(directory.path());
        assert!(supplied.tables.is_empty());
        assert!(supplied.refused[0].to_string().contains("chown root"), "{:?}", supplied.refused);
    }

    #[test]
    fn the_stamp_changes_with_any_file() {
        let directory = tempfile::tempdir().unwrap();
        let file = directory.path().join("one.unwind");
        let mut stamps = vec![SuppliedStamp::of(directory.path())];
        fs::write(&file, "a").unwrap();
        stamps.push(SuppliedStamp::of(directory.path()));
        fs::write(&file, "ab").unwrap();
        stamps.push(SuppliedStamp::of(directory.path()));
        let aside = directory.path().join("aside");
        fs::write(&aside, "ab").unwrap();
        fs::rename(aside, &file).unwrap();
        stamps.push(SuppliedStamp::of(directory.path()));
        fs::remove_file(file).unwrap();
        stamps.push(SuppliedStamp::of(directory.path()));
        assert!(stamps.windows(2).all(|pair| pair[0] != pair[1]), "{stamps:?}");
        assert_eq!(stamps[0], stamps[4]);
        assert_eq!(SuppliedStamp::of(Path::new("/nowhere")), stamps[0]);
    }
}
