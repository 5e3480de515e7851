//! From raw profiles to finished ones, on one thread with one bounded queue.

use std::{io, sync::Arc, thread};

use gannet_proto::profiles::Profile;
use tokio::sync::{mpsc, oneshot};

use super::{
    naming::ProfileNamer,
    options::{SymbolizerConfig, SymbolizerStats},
};
use crate::profile::RawProfile;

/// The reason why a profile has no names.
#[derive(Debug, thiserror::Error)]
pub enum SymbolizerError {
    /// The queue is full. The profiles come back, so that the caller can count their samples.
    #[error("the symbolizer is behind: {0} windows wait for it already")]
    Full(usize, Vec<RawProfile>),
    /// The thread has ended.
    #[error("the symbolizer has stopped")]
    Stopped,
}

/// A handle to the symbolizer's thread, which ends when the last handle is dropped.
#[derive(Clone, Debug)]
pub struct Symbolizer {
    jobs: mpsc::Sender<Job>,
    stats: Arc<SymbolizerStats>,
}

type Job = (Vec<RawProfile>, oneshot::Sender<Vec<Profile>>);

impl Symbolizer {
    /// Starts the thread.
    pub fn start(config: SymbolizerConfig) -> io::Result<Self> {
        let (jobs, mut inbox) = mpsc::channel::<Job>(config.queue.max(1));
        let stats = Arc::new(SymbolizerStats::default());
        let mut namer = ProfileNamer::new(config, Arc::clone(&stats));
        thread::Builder::new().name("gannet-symbols".to_owned()).spawn(move || {
            while let Some((raw, answer)) = inbox.blocking_recv() {
                // The caller may have stopped waiting; the profile is dropped with the answer.
                let _ = answer.send(namer.profiles(&raw));
            }
        })?;
        Ok(Self { jobs, stats })
    }

    /// Symbolizes profiles, waiting for room in the queue. Each file is read once for all of them.
    pub async fn symbolize_all(&self, raw: Vec<RawProfile>) -> Result<Vec<Profile>, SymbolizerError> {
        let (answer, answered) = oneshot::channel();
        self.jobs.send((raw, answer)).await.map_err(|_| SymbolizerError::Stopped)?;
        answered.await.map_err(|_| SymbolizerError::Stopped)
    }

    /// Symbolizes a profile, waiting for room in the queue.
    pub async fn symbolize(&self, raw: RawProfile) -> Result<Profile, SymbolizerError> {
        self.symbolize_all(vec![raw]).await?.pop().ok_or(SymbolizerError::Stopped)
    }

    /// Symbolizes profiles if the queue has room now.
    pub fn try_symbolize(
        &self,
        raw: Vec<RawProfile>,
    ) -> Result<oneshot::Receiver<Vec<Profile>>, SymbolizerError> {
        let (answer, answered) = oneshot::channel();
        match self.jobs.try_send((raw, answer)) {
            Ok(()) => Ok(answered),
            Err(mpsc::error::TrySendError::Full((raw, _))) => {
                Err(SymbolizerError::Full(self.jobs.max_capacity(), raw))
            }
            Err(mpsc::error::TrySendError::Closed(_)) => Err(SymbolizerError::Stopped),
        }
    }

    /// Returns the counts so far.
    pub fn stats(&self) -> &Arc<SymbolizerStats> {
        &self.stats
    }
}
