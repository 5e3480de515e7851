//! Files with debug information, each offered once to the task that uploads them.

use std::{num::NonZeroUsize, sync::Arc};

use gannet_symbols::alternate::path_of_build_id;
use lru::LruCache;
use tokio::sync::mpsc;

use crate::model::MappedFile;

/// Files that were offered lately, by build id.
const MAX_OFFERED: NonZeroUsize = NonZeroUsize::new(8192).unwrap();
/// Files that wait for the task. Each is held open.
const MAX_WAITING: usize = 64;

/// A file with debug information, for the build id that it has.
#[derive(Clone, Debug)]
pub struct OfferedFile {
    /// The file itself, or its installed debug file.
    pub file: Arc<MappedFile>,
    /// GNU build id in lower-case hex.
    pub build_id: String,
}

/// Returns a queue of offered files.
pub(crate) fn offered_files() -> (mpsc::Sender<OfferedFile>, mpsc::Receiver<OfferedFile>) {
    mpsc::channel(MAX_WAITING)
}

/// Offers files. Owner: the symbolizer's thread.
#[derive(Debug)]
pub(super) struct FileOffers {
    queue: Option<mpsc::Sender<OfferedFile>>,
    offered: LruCache<String, ()>,
}

impl FileOffers {
    /// Without a queue nothing is offered.
    pub(super) fn new(queue: Option<mpsc::Sender<OfferedFile>>) -> Self {
        Self { queue, offered: LruCache::new(MAX_OFFERED) }
    }

    /// Offers a file unless its build id was offered before. If the queue is full, a later call offers it.
    pub(super) fn offer(&mut self, file: &Arc<MappedFile>) {
        let Some(queue) = &self.queue else { return };
        // A build id of Go has no such path, and no debug information is stored for it.
        if path_of_build_id(&file.build_id).is_none() || self.offered.get(&file.build_id).is_some() {
            return;
        }
        let offered = OfferedFile { file: Arc::clone(file), build_id: file.build_id.clone() };
        if queue.try_send(offered).is_ok() {
            self.offered.put(file.build_id.clone(), ());
        }
    }
}
