//! Who is who: the identity of processes and what is mapped into them.

mod cgroup;
mod image;
mod key;
mod metadata;
mod proc;
mod survey;
mod table;
mod tree;

pub use cgroup::{CgroupNames, path_in as cgroup_path_in};
pub use image::{Image, Mapping, MappingKind};
pub use key::{ParseKeyError, ProcessKey};
pub use metadata::{Metadata, MetadataError, MetadataOptions, MetadataStats, ProcessMetadataCache};
pub use proc::{ProcError, ProcFs, RealProc, check as check_identity};
pub use survey::{Seen, cpus, see, survey};
pub use table::{Changes, ImageKey, Process, Processes, Saturated, State, Stats};
pub use tree::{CgroupTree, Group, TreeError, TreeStats};
