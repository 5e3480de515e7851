//! Who is who: the identity of processes and what is mapped into them.

mod cgroup;
mod image;
mod key;
mod proc;
mod table;

pub use cgroup::CgroupNames;
pub use image::{Image, Mapping, MappingKind};
pub use key::{ParseKeyError, ProcessKey};
pub use proc::{ProcError, check as check_identity, stat};
pub use table::{ImageKey, Process, Processes, State, Stats};
