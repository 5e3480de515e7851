//! Rule files of the node.

use std::{
    fs, io,
    path::{Path, PathBuf},
    time::SystemTime,
};

use gannet_proto::{
    control::Rule,
    rules::{ParseError, parse},
};

/// Why rule files cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum FilesError {
    /// One cannot be read.
    #[error("--rules {}: {source}", path.display())]
    Read {
        /// Which.
        path: PathBuf,
        /// What the system said.
        #[source]
        source: io::Error,
    },
    /// They hold what is no rule.
    #[error("{}", .0.iter().map(ToString::to_string).collect::<Vec<_>>().join("\n"))]
    Parse(Vec<ParseError>),
}

/// Tells whether files have changed.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Stamp(Vec<Option<(SystemTime, u64)>>);

impl Stamp {
    /// As they are now.
    pub fn of(files: &[PathBuf]) -> Self {
        let stamp = |path: &PathBuf| {
            let metadata = fs::metadata(path).ok()?;
            Some((metadata.modified().ok()?, metadata.len()))
        };
        Self(files.iter().map(stamp).collect())
    }
}

/// The rules of all files together; all errors at once.
pub fn read(files: &[PathBuf]) -> Result<Vec<Rule>, FilesError> {
    let mut rules = Vec::new();
    let mut errors = Vec::new();
    for path in files {
        match parse(&text(path)?, &path.display().to_string()) {
            Ok(more) => rules.extend(more),
            Err(more) => errors.extend(more),
        }
    }
    if errors.is_empty() { Ok(rules) } else { Err(FilesError::Parse(errors)) }
}

fn text(path: &Path) -> Result<String, FilesError> {
    fs::read_to_string(path).map_err(|source| FilesError::Read { path: path.to_owned(), source })
}
