//! The agent's own files: their disk may stop answering like any other.

use std::{
    fmt, fs, io,
    path::{Path, PathBuf},
};

use tokio::{sync::oneshot, task::spawn_blocking};

use super::{Target, apart, node};

/// The directories and files that the agent itself uses.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(crate) enum OwnFiles {
    /// Spool, last good rules, unwind tables and kill switch.
    State,
    /// The rule files of this node.
    Rules,
    /// Unwind tables that go with the agent.
    Temporary,
    /// Certificates and token for the collector.
    Connection,
    /// Certificates and token for the kubelet.
    Kubelet,
}

impl fmt::Display for OwnFiles {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::State => "the file system of --state-dir",
            Self::Rules => "the file system of --rules",
            Self::Temporary => "the file system of temporary files",
            Self::Connection => "the file system of --tls-ca, --tls-cert, --tls-key or --token-file",
            Self::Kubelet => "the file system of --kubelet-ca, --kubelet-certificate or --kubelet-token-file",
        })
    }
}

/// Makes a call on own files on a worker, and waits for a short time. If the file system does not answer, the error is of the
/// kind [`io::ErrorKind::TimedOut`], and an abandoned call is dropped on the worker.
pub(crate) fn on_own_files<T: Send + 'static>(
    files: OwnFiles,
    path: &Path,
    call: impl FnOnce() -> T + Send + 'static,
) -> io::Result<T> {
    node()
        .compute(Target::Own(files), &path.display().to_string(), call)
        .map_err(|unanswered| io::Error::new(io::ErrorKind::TimedOut, unanswered.to_string()))
}

/// Reads one of the agent's own files, of some kilobytes, as [`on_own_files`] does.
pub(crate) fn read_own_file(files: OwnFiles, path: &Path) -> io::Result<Vec<u8>> {
    let theirs = path.to_owned();
    on_own_files(files, path, move || fs::read(theirs))?
}

/// Does the same as [`on_own_files`], for callers that must not wait on their thread.
pub(crate) async fn on_own_files_later<T: Send + 'static>(
    files: OwnFiles,
    path: PathBuf,
    call: impl FnOnce() -> T + Send + 'static,
) -> io::Result<T> {
    let made = spawn_blocking(move || on_own_files(files, &path, call)).await;
    made.unwrap_or_else(|error| Err(io::Error::other(error)))
}

/// Runs work that may wait for a disk without end in a process that shares the agent's memory: the end of the agent leaves it
/// behind.
pub(crate) fn spawn_apart(name: &str, work: impl FnOnce() + Send + 'static) -> io::Result<()> {
    apart::spawn(name, work)
}

/// Does the same as [`spawn_apart`] and returns the value of the work, however long it takes.
pub(crate) async fn run_apart<T: Send + 'static>(
    name: &str,
    work: impl FnOnce() -> T + Send + 'static,
) -> io::Result<T> {
    let (sender, value) = oneshot::channel();
    spawn_apart(name, move || drop(sender.send(work())))?;
    value.await.map_err(io::Error::other)
}
