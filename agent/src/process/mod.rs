//! Who is who: the identity of processes and what is mapped into them.

mod files;
mod metadata;
mod proc;
mod survey;
mod table;

pub(crate) use files::open_in_root;
pub use files::{FileMapping, FileTable, FileTableStats};
pub use metadata::{Metadata, MetadataError, MetadataOptions, MetadataStats, ProcessMetadataCache};
pub use proc::{ProcError, ProcFs, RealProc, check as check_identity};
pub use survey::{Seen, cpus, see, survey};
pub use table::{Changes, Process, Processes, Saturated, State, Stats};
