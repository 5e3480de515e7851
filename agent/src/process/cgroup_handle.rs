//! From a control group's number to its path, without a process that is in it.

use std::{
    fs,
    os::fd::{AsRawFd as _, FromRawFd as _, OwnedFd},
};

use rustix::fs::{Mode, OFlags};

use crate::kernel::CgroupHierarchy;

/// One hierarchy, as it is mounted here.
pub(super) struct CgroupTree {
    root: OwnedFd,
    mounted_at: String,
}

/// `struct file_handle` with the eight bytes that kernfs wants.
#[repr(C)]
struct Handle {
    bytes: u32,
    kind: i32,
    id: u64,
}

/// `FILEID_KERNFS` of the kernel's exportfs.h.
const KERNFS: i32 = 0xfe;

impl CgroupTree {
    /// None where the hierarchy is not mounted here.
    pub(super) fn open(hierarchy: CgroupHierarchy) -> Option<Self> {
        let mounts = fs::read_to_string("/proc/self/mountinfo").ok()?;
        let mounted_at = mounts.lines().find_map(|line| mount_point(line, hierarchy))?;
        let root = rustix::fs::open(
            &mounted_at,
            OFlags::RDONLY | OFlags::DIRECTORY | OFlags::CLOEXEC,
            Mode::empty(),
        );
        Some(Self { root: root.ok()?, mounted_at })
    }

    /// The path below the hierarchy's root of the control group with this number, if it is still there.
    pub(super) fn path_of(&self, id: u64) -> Option<String> {
        let handle = Handle { bytes: 8, kind: KERNFS, id };
        // SAFETY: the handle has as many bytes as it says, and is only read.
        let fd = unsafe {
            libc::syscall(
                libc::SYS_open_by_handle_at,
                self.root.as_raw_fd(),
                &raw const handle,
                libc::O_PATH | libc::O_CLOEXEC,
            )
        };
        let fd = i32::try_from(fd).ok().filter(|fd| *fd >= 0)?;
        // SAFETY: a new descriptor that nobody else has.
        let group = unsafe { OwnedFd::from_raw_fd(fd) };
        let path = fs::read_link(format!("/proc/self/fd/{}", group.as_raw_fd())).ok()?;
        let path = path.to_str()?;
        let path = path.strip_suffix(" (deleted)").unwrap_or(path).strip_prefix(&self.mounted_at)?;
        Some(if path.is_empty() { "/".to_owned() } else { path.to_owned() })
    }
}

/// Of a line of `mountinfo`: where it mounts the root of this hierarchy.
fn mount_point(line: &str, hierarchy: CgroupHierarchy) -> Option<String> {
    let (mount, kind) = line.split_once(" - ")?;
    let mut mount = mount.split(' ').skip(3);
    let (root, point) = (mount.next()?, mount.next()?);
    let mut kind = kind.split(' ');
    let (name, options) = (kind.next()?, kind.nth(1)?);
    let wanted = match hierarchy.controller() {
        "" => name == "cgroup2",
        controller => name == "cgroup" && options.split(',').any(|option| option == controller),
    };
    (wanted && root == "/").then(|| point.to_owned())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_mount_of_each_hierarchy_is_found() {
        let two = "35 24 0:30 / /sys/fs/cgroup/unified rw,nosuid shared:9 - cgroup2 cgroup2 rw,nsdelegate";
        let one =
            "36 24 0:31 / /sys/fs/cgroup/cpu,cpuacct rw,nosuid shared:10 - cgroup cgroup rw,cpu,cpuacct";
        let part = "36 24 0:31 /a/b /sys/fs/cgroup/cpu rw - cgroup cgroup rw,cpu,cpuacct";
        assert_eq!(mount_point(two, CgroupHierarchy::V2).as_deref(), Some("/sys/fs/cgroup/unified"));
        assert_eq!(mount_point(one, CgroupHierarchy::V1Cpu).as_deref(), Some("/sys/fs/cgroup/cpu,cpuacct"));
        for (line, hierarchy) in [
            (two, CgroupHierarchy::V1Cpu),
            (one, CgroupHierarchy::V2),
            (one, CgroupHierarchy::V1Memory),
            (part, CgroupHierarchy::V1Cpu),
            ("", CgroupHierarchy::V2),
        ] {
            assert_eq!(mount_point(line, hierarchy), None, "{line}");
        }
    }
}
