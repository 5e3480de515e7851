//! Waits for changes of rule files, so that a changed rule is in force shortly after it is written.

use std::{
    collections::BTreeSet,
    io,
    mem::MaybeUninit,
    os::fd::OwnedFd,
    path::{Path, PathBuf},
    time::Duration,
};

use rustix::fs::inotify::{self, CreateFlags, WatchFlags};
use tokio::io::{Interest, unix::AsyncFd};

use crate::access::{OwnFiles, on_own_files_later};

/// An editor writes, closes and renames. Changes that are this close together count as one.
const DEBOUNCE: Duration = Duration::from_millis(5);

/// Watches the directories of some files with inotify. Without inotify it only waits for its timeout.
pub(crate) struct FileWatcher {
    events: Option<AsyncFd<OwnedFd>>,
}

impl FileWatcher {
    /// Watches the directories instead of the files: Kubernetes and careful editors replace a file by renaming, which leaves
    /// the watched old file unchanged.
    pub(crate) async fn of(own: OwnFiles, files: &[PathBuf]) -> Self {
        let Some(first) = files.first().cloned() else { return Self { events: None } };
        let files = files.to_vec();
        let watch = move || -> io::Result<OwnedFd> {
            let fd = inotify::init(CreateFlags::CLOEXEC | CreateFlags::NONBLOCK)?;
            let directories: BTreeSet<&Path> = files
                .iter()
                .filter_map(|file| file.parent())
                .map(|dir| if dir.as_os_str().is_empty() { Path::new(".") } else { dir })
                .collect();
            // Not every write: a half-written file is no rule file.
            let changes =
                WatchFlags::CLOSE_WRITE | WatchFlags::MOVED_TO | WatchFlags::MOVED_FROM | WatchFlags::DELETE;
            for directory in directories {
                inotify::add_watch(&fd, directory, changes)?;
            }
            Ok(fd)
        };
        let watched = on_own_files_later(own, first, watch).await.and_then(|watched| watched);
        let register = |fd| {
            // SAFETY: the result owns the descriptor, closes it only when it is dropped, and lends it to no one.
            unsafe { AsyncFd::register_with_interest(fd, Interest::READABLE) }.map_err(io::Error::from)
        };
        let events = match watched.and_then(register) {
            Ok(events) => Some(events),
            Err(error) => {
                tracing::debug!("cannot watch rule files with inotify, checking them periodically: {error}");
                None
            }
        };
        Self { events }
    }

    /// Returns when something has changed in the files' directories, or after `timeout`.
    pub(crate) async fn changed(&self, timeout: Duration) {
        let Some(events) = &self.events else { return tokio::time::sleep(timeout).await };
        if let Ok(Ok(mut ready)) = tokio::time::timeout(timeout, events.readable()).await {
            tokio::time::sleep(DEBOUNCE).await;
            let mut buffer = [MaybeUninit::uninit(); 4096];
            let mut reader = inotify::Reader::new(events.get_ref(), &mut buffer);
            // The files themselves show what has changed. This loop only empties the descriptor.
            while reader.next().is_ok() {}
            ready.clear_ready();
        }
    }
}

#[cfg(test)]
mod tests {
    use std::{fs, time::Instant};

    use super::*;

    /// Checks that a written or replaced file ends the wait long before the timeout.
    #[tokio::test]
    async fn a_written_or_replaced_file_ends_the_wait() {
        const LONG: Duration = Duration::from_secs(60);
        let dir = tempfile::tempdir().unwrap();
        let file = dir.path().join("rules.yaml");
        fs::write(&file, "rules: []").unwrap();
        let watcher = FileWatcher::of(OwnFiles::Rules, std::slice::from_ref(&file)).await;
        let begin = Instant::now();
        fs::write(&file, "rules: [] # changed").unwrap();
        watcher.changed(LONG).await;
        let aside = dir.path().join("aside");
        fs::write(&aside, "rules: []").unwrap();
        watcher.changed(LONG).await;
        fs::rename(&aside, &file).unwrap();
        watcher.changed(LONG).await;
        assert!(begin.elapsed() < LONG);
        // Nothing happens: the timeout ends the wait.
        watcher.changed(Duration::from_millis(20)).await;
        FileWatcher::of(OwnFiles::Rules, &[]).await.changed(Duration::from_millis(20)).await;
    }
}
