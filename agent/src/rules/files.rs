//! Reads the node's rule files.

use std::{
    fs, io,
    path::{Path, PathBuf},
    time::SystemTime,
};

use gannet_proto::{
    control::Rule,
    rules::{ParseError, parse},
};

use crate::access::{OwnFiles, on_own_files_later};

/// Why rule files cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum RuleFilesError {
    /// The agent cannot read a file.
    #[error("cannot read rule file {} (--rules): {source}", path.display())]
    Read {
        /// Path of the file.
        path: PathBuf,
        /// The error of the system call.
        #[source]
        source: io::Error,
    },
    /// Files contain something else than valid rules.
    #[error("{}", .0.iter().map(ToString::to_string).collect::<Vec<_>>().join("\n"))]
    Parse(Vec<ParseError>),
}

impl RuleFilesError {
    /// Reports whether the file system of the files does not answer now.
    pub(crate) fn is_unanswered(&self) -> bool {
        matches!(self, Self::Read { source, .. } if source.kind() == io::ErrorKind::TimedOut)
    }
}

/// Modification times and sizes of files. Differs after a change of any of them.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct RuleFilesStamp(Vec<Option<(SystemTime, u64)>>);

impl RuleFilesStamp {
    /// Returns the stamp of these files, or an error if their file system does not answer.
    pub(crate) async fn take(files: &[PathBuf]) -> io::Result<Self> {
        let Some(first) = files.first().cloned() else { return Ok(Self(Vec::new())) };
        let files = files.to_vec();
        on_own_files_later(OwnFiles::Rules, first, move || Self::of(&files)).await
    }

    fn of(files: &[PathBuf]) -> Self {
        let stamp = |path: &PathBuf| {
            let metadata = fs::metadata(path).ok()?;
            Some((metadata.modified().ok()?, metadata.len()))
        };
        Self(files.iter().map(stamp).collect())
    }
}

/// Does the same as [`read_here`] on a worker: the file system may not answer.
pub(crate) async fn read(files: &[PathBuf]) -> Result<Vec<Rule>, RuleFilesError> {
    let Some(first) = files.first().cloned() else { return Ok(Vec::new()) };
    let theirs = files.to_vec();
    let read = on_own_files_later(OwnFiles::Rules, first.clone(), move || read_here(&theirs)).await;
    read.unwrap_or_else(|source| Err(RuleFilesError::Read { path: first, source }))
}

/// Returns the rules of all files together, or the errors of all files together.
fn read_here(files: &[PathBuf]) -> Result<Vec<Rule>, RuleFilesError> {
    let mut rules = Vec::new();
    let mut errors = Vec::new();
    for path in files {
        match parse(&text(path)?, &path.display().to_string()) {
            Ok(more) => rules.extend(more),
            Err(more) => errors.extend(more),
        }
    }
    if errors.is_empty() { Ok(rules) } else { Err(RuleFilesError::Parse(errors)) }
}

fn text(path: &Path) -> Result<String, RuleFilesError> {
    fs::read_to_string(path).map_err(|source| RuleFilesError::Read { path: path.to_owned(), source })
}
