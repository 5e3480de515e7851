//! Delivers profiles: they go to disk first, then to the collector, and leave the disk once it has acknowledged them.

mod aside;
mod authority;
mod backoff;
mod debug_files;
mod disk;
mod spool;
mod stream;

pub(crate) use aside::{ASIDE, write_aside};
pub(crate) use authority::explain;
pub(crate) use backoff::{Backoff, files_changed};
pub(crate) use debug_files::{DebugUploadOptions, upload_debug_files};
pub use spool::{Bounds, Spool, SpoolError, SpoolStats};
pub use stream::{ExportConfig, Exporter, StreamStats};
