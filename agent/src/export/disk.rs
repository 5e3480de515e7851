//! The spool and the processes that touch its disk.
//!
//! A disk that stops answering holds up its callers, for ever if need be. So only two workers of their own use the spool,
//! which the end of the agent leaves behind: one writes windows, the other performs the operations of the stream.

use std::{
    io,
    path::PathBuf,
    sync::{
        Arc, Weak,
        mpsc::{SyncSender, sync_channel},
    },
    time::{Duration, Instant},
};

use parking_lot::Mutex;
use tokio::sync::oneshot;

use super::Spool;
use crate::access::{self, OwnFiles, Target, spawn_apart};

/// Operations that wait for the disk. The stream has one at a time, and the shutdown another one.
const MAX_OPERATIONS: usize = 8;
/// An operation that takes longer counts as one that does not answer.
const HUNG_AFTER: Duration = Duration::from_secs(5);
/// How often the agent looks at the time of the operation.
const CHECK_INTERVAL: Duration = Duration::from_secs(1);

type Operation = Box<dyn FnOnce(&mut Spool) + Send>;

/// The spool. One operation uses it at a time.
#[derive(Debug)]
pub(super) struct Disk {
    spool: Mutex<Spool>,
    directory: PathBuf,
    /// Since when an operation uses the spool.
    busy: Mutex<Option<Instant>>,
}

impl Disk {
    pub(super) fn new(spool: Spool) -> Arc<Self> {
        let directory = spool.directory().to_owned();
        Arc::new(Self { spool: Mutex::new(spool), directory, busy: Mutex::default() })
    }

    /// Performs one operation. Only for the workers of this module and the spool's own.
    pub(super) fn perform<T>(&self, operation: impl FnOnce(&mut Spool) -> T) -> T {
        let mut spool = self.spool.lock();
        *self.busy.lock() = Some(Instant::now());
        let value = operation(&mut spool);
        *self.busy.lock() = None;
        value
    }

    /// Reports when the disk does not answer, and when it does again, until the spool is closed.
    pub(super) async fn watch(this: Weak<Self>) {
        const TARGET: Target = Target::Own(OwnFiles::State);
        // The time of the operation that hangs.
        let mut hung = None;
        loop {
            tokio::time::sleep(CHECK_INTERVAL).await;
            let Some(disk) = this.upgrade() else { return };
            let busy = *disk.busy.lock();
            if hung.is_some() && hung != busy {
                hung = None;
                access::node().answers(TARGET);
            }
            if hung.is_none() && busy.is_some_and(|since| since.elapsed() > HUNG_AFTER) {
                hung = busy;
                let directory = disk.directory.display();
                let name = format!(
                    "{directory}; profiles wait in memory, and when that is full they are lost as queue_full: \
                     check this disk, or give a --state-dir on another one"
                );
                access::node().hangs(TARGET, &name);
            }
        }
    }
}

/// The worker of the stream's operations. It ends when this is dropped.
#[derive(Debug)]
pub(super) struct DiskWorker(SyncSender<Operation>);

impl DiskWorker {
    /// Starts the worker, which drops `token` at its end.
    pub(super) fn start(disk: Arc<Disk>, token: impl Send + 'static) -> io::Result<Self> {
        let (sender, operations) = sync_channel::<Operation>(MAX_OPERATIONS);
        spawn_apart("gannet-spool-io", move || {
            for operation in operations {
                disk.perform(operation);
            }
            drop(disk);
            drop(token);
        })?;
        Ok(Self(sender))
    }

    /// Performs one operation and waits for it, however long it takes. Returns `None` if the worker has ended.
    pub(super) async fn perform<T: Send + 'static>(
        &self,
        operation: impl FnOnce(&mut Spool) -> T + Send + 'static,
    ) -> Option<T> {
        let (sender, value) = oneshot::channel();
        // The caller may have stopped waiting.
        let operation: Operation = Box::new(move |spool| drop(sender.send(operation(spool))));
        self.0.try_send(operation).ok()?;
        value.await.ok()
    }
}
