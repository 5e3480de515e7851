//! Hears of changes of rule files as they happen, so that a rule that is written is in force a moment later.

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

/// Changes that come together are one: an editor writes, closes and renames.
const TOGETHER: Duration = Duration::from_millis(5);

/// Watches the directories of some files. Where that cannot be, only the time tells.
pub struct Notify {
    events: Option<AsyncFd<OwnedFd>>,
}

impl Notify {
    /// The directories and not the files: what replaces a file by renaming leaves the old one unchanged, and that is how
    /// Kubernetes and careful editors write.
    pub fn of(files: &[PathBuf]) -> Self {
        let watch = || -> io::Result<AsyncFd<OwnedFd>> {
            let fd = inotify::init(CreateFlags::CLOEXEC | CreateFlags::NONBLOCK)?;
            let directories: BTreeSet<&Path> = files
                .iter()
                .filter_map(|file| file.parent())
                .map(|dir| if dir.as_os_str().is_empty() { Path::new(".") } else { dir })
                .collect();
            // Not on every write: half a file is no rule file.
            let changes =
                WatchFlags::CLOSE_WRITE | WatchFlags::MOVED_TO | WatchFlags::MOVED_FROM | WatchFlags::DELETE;
            for directory in directories {
                inotify::add_watch(&fd, directory, changes)?;
            }
            // SAFETY: the descriptor is owned by the result, which closes it only when it is dropped, and hands it out to
            // nobody.
            let events = unsafe { AsyncFd::register_with_interest(fd, Interest::READABLE) };
            Ok(events?)
        };
        let events = match watch() {
            _ if files.is_empty() => None,
            Ok(events) => Some(events),
            Err(error) => {
                tracing::debug!("rule files are looked at from time to time only: {error}");
                None
            }
        };
        Self { events }
    }

    /// Returns when something has changed beside the files, or after `at_most`.
    pub async fn changed(&self, at_most: Duration) {
        let Some(events) = &self.events else { return tokio::time::sleep(at_most).await };
        if let Ok(Ok(mut ready)) = tokio::time::timeout(at_most, events.readable()).await {
            tokio::time::sleep(TOGETHER).await;
            let mut buffer = [MaybeUninit::uninit(); 4096];
            let mut reader = inotify::Reader::new(events.get_ref(), &mut buffer);
            // What changed is told by the files themselves; here it only matters that there is nothing left to read.
            while reader.next().is_ok() {}
            ready.clear_ready();
        }
    }
}

#[cfg(test)]
mod tests {
    use std::{fs, time::Instant};

    use super::*;

    #[tokio::test]
    async fn a_file_that_is_written_or_replaced_is_noticed_long_before_the_time_is_over() {
        const LONG: Duration = Duration::from_secs(60);
        let dir = tempfile::tempdir().unwrap();
        let file = dir.path().join("rules.yaml");
        fs::write(&file, "rules: []").unwrap();
        let notify = Notify::of(std::slice::from_ref(&file));
        let begin = Instant::now();
        fs::write(&file, "rules: [] # changed").unwrap();
        notify.changed(LONG).await;
        let aside = dir.path().join("aside");
        fs::write(&aside, "rules: []").unwrap();
        notify.changed(LONG).await;
        fs::rename(&aside, &file).unwrap();
        notify.changed(LONG).await;
        assert!(begin.elapsed() < LONG);
        // Nothing happens: the time tells.
        notify.changed(Duration::from_millis(20)).await;
        Notify::of(&[]).changed(Duration::from_millis(20)).await;
    }
}
