//! The eventfd by which other threads wake the engine's thread before its own time.

use std::{
    io,
    os::fd::{AsFd as _, BorrowedFd, OwnedFd},
    sync::Arc,
    time::Duration,
};

use rustix::event::{EventfdFlags, PollFd, PollFlags, Timespec, eventfd, poll};

/// Clones wake the same thread.
#[derive(Clone, Debug)]
pub(super) struct WakeUp(Arc<OwnedFd>);

impl WakeUp {
    pub(super) fn new() -> io::Result<Self> {
        let fd = eventfd(0, EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK)?;
        Ok(Self(Arc::new(fd)))
    }

    /// Wakes the engine's thread, now or when it waits next.
    pub(super) fn wake(&self) {
        // A counter that is full wakes it as well.
        let _ = rustix::io::write(&self.0, &1_u64.to_ne_bytes());
    }

    /// Waits for a wake-up, or until one of `others` becomes readable, for `timeout` at most.
    pub(super) fn wait<'a>(&'a self, others: impl Iterator<Item = BorrowedFd<'a>>, timeout: Duration) {
        let timeout = Timespec::try_from(timeout).ok();
        let mut ready: Vec<PollFd<'_>> = std::iter::once(self.0.as_fd())
            .chain(others)
            .map(|fd| PollFd::from_borrowed_fd(fd, PollFlags::IN))
            .collect();
        // Interrupted by a signal is as good as a timeout.
        let _ = poll(&mut ready, timeout.as_ref());
        let _ = rustix::io::read(&self.0, &mut [0_u8; 8]);
    }
}
