//! The end of processes that another program started.

use std::{io, os::fd::OwnedFd, time::Duration};

use rustix::{
    event::{PollFd, PollFlags, Timespec, poll},
    io::Errno,
    process::{Pid, PidfdFlags, pidfd_open},
};

/// Interval between two looks at a process.
const LOOK_INTERVAL: Duration = Duration::from_millis(20);

/// Processes whose end `record` waits for.
#[derive(Debug)]
pub(super) struct TargetEnds(Vec<OwnedFd>);

impl TargetEnds {
    /// Opens the processes with these pids. A pid that no process has is an error: nothing could be recorded.
    pub(super) fn open(pids: &[u32]) -> io::Result<Self> {
        let open = |pid: &u32| {
            let id = i32::try_from(*pid).ok().and_then(Pid::from_raw);
            let opened = id.ok_or(Errno::SRCH).and_then(|id| pidfd_open(id, PidfdFlags::empty()));
            opened.map_err(|error| match error {
                Errno::SRCH => io::Error::other(format!("no process has the pid {pid}")),
                // The kernel opens the first thread of a process only.
                Errno::INVAL | Errno::NOENT => {
                    io::Error::other(format!("{pid} is the id of a thread; give the pid of its process"))
                }
                error => error.into(),
            })
        };
        pids.iter().map(open).collect::<io::Result<_>>().map(Self)
    }

    /// Returns when all threads of all these processes have ended.
    pub(super) async fn wait(&self) {
        for target in &self.0 {
            while !has_ended(target) {
                tokio::time::sleep(LOOK_INTERVAL).await;
            }
        }
    }
}

/// Reports whether a process has ended: its descriptor is readable from then on.
fn has_ended(target: &OwnedFd) -> bool {
    let now = Timespec { tv_sec: 0, tv_nsec: 0 };
    poll(&mut [PollFd::new(target, PollFlags::IN)], Some(&now)).is_ok_and(|ready| ready > 0)
}

#[cfg(test)]
mod tests {
    use std::{process::Command, time::Duration};

    use tokio::time::timeout;

    use super::*;

    #[tokio::test]
    async fn the_wait_is_over_when_the_last_process_has_ended() {
        let mut children = ["0", "1000"].map(|time| Command::new("sleep").arg(time).spawn().unwrap());
        let targets = TargetEnds::open(&children.each_ref().map(std::process::Child::id)).unwrap();
        assert!(timeout(Duration::from_millis(300), targets.wait()).await.is_err(), "one still runs");
        children[1].kill().unwrap();
        timeout(Duration::from_secs(10), targets.wait()).await.unwrap();
        for child in &mut children {
            child.wait().unwrap();
        }
    }

    #[tokio::test]
    async fn a_pid_that_no_process_has_is_named() {
        // Above the kernel's largest pid.
        let error = TargetEnds::open(&[u32::MAX / 4]).unwrap_err();
        assert_eq!(error.to_string(), format!("no process has the pid {}", u32::MAX / 4));
    }
}
