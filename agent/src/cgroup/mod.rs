//! Control groups: the hierarchies of the host, where they are mounted, the names in their paths, and the tree of one.

mod hierarchy;
mod mount;
mod names;
mod tree;

pub use hierarchy::CgroupHierarchy;
pub(crate) use hierarchy::{find_container, parse_path, path_of};
pub(crate) use mount::{directory, id_of, mount_of};
pub use names::{CgroupNames, PathContainer};
pub(crate) use names::{container_part, containers, pod_part};
pub(crate) use tree::CgroupTreeStats;
pub use tree::{Cgroup, CgroupTree, CgroupTreeError};
