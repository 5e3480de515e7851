//! Batches on their way to the collector.

mod spool;
mod stream;

pub use spool::{Bounds, Spool, SpoolError, SpoolStats};
pub use stream::Exporter;
