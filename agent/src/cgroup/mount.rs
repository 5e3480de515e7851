//! Where the hierarchies of control groups are mounted, and the directories of groups.

use std::{
    ffi::OsString,
    fs,
    os::unix::{
        ffi::{OsStrExt as _, OsStringExt as _},
        fs::MetadataExt as _,
    },
    path::{Path, PathBuf},
};

use procfs::process::MountInfo;

/// The inode number of the root of each hierarchy.
const ROOT_INODE: u64 = 1;

/// A mount of a hierarchy.
#[derive(Clone, Debug, PartialEq, Eq)]
struct CgroupMount {
    /// The directory of the hierarchy that is mounted, as seen from this process's cgroup namespace.
    root: String,
    /// The mount point.
    point: PathBuf,
}

/// Returns the mount point of the hierarchy of a v1 controller, or of the unified one for an empty name.
pub(crate) fn mount_of(controller: &str) -> Option<PathBuf> {
    let text = fs::read_to_string("/proc/self/mountinfo").ok()?;
    let is_root = |point: &Path| fs::metadata(point).is_ok_and(|metadata| metadata.ino() == ROOT_INODE);
    choose(parse_mounts(&text, controller), is_root)
}

/// Chooses the mount of the hierarchy's root. In a container its own part of the tree may be mounted too, and its cgroup
/// namespace shows that part as `/`; so the inode number of the root decides before the path does.
fn choose(mounts: Vec<CgroupMount>, is_root: impl Fn(&Path) -> bool) -> Option<PathBuf> {
    let index = mounts
        .iter()
        .position(|mount| is_root(&mount.point))
        .or_else(|| mounts.iter().position(|mount| mount.root == "/"))
        .unwrap_or(0);
    mounts.into_iter().nth(index).map(|mount| mount.point)
}

/// Reads the mounts of one hierarchy from the text of `/proc/PID/mountinfo`. A line that cannot be understood is left out:
/// the others count.
fn parse_mounts(text: &str, controller: &str) -> Vec<CgroupMount> {
    text.lines()
        .filter_map(|line| MountInfo::from_line(line).ok())
        .filter(|mount| match controller {
            "" => mount.fs_type == "cgroup2",
            _ => mount.fs_type == "cgroup" && mount.super_options.contains_key(controller),
        })
        .map(|mount| CgroupMount { root: mount.root, point: unescape(&mount.mount_point) })
        .collect()
}

/// Reads a path of mountinfo, in which the kernel writes white space and backslashes as `\ooo`.
fn unescape(path: &Path) -> PathBuf {
    let mut bytes = Vec::new();
    let mut rest = path.as_os_str().as_bytes();
    while let Some((first, behind)) = rest.split_first() {
        let code = behind
            .first_chunk::<3>()
            .filter(|_| *first == b'\\')
            .and_then(|digits| u8::from_str_radix(std::str::from_utf8(digits).ok()?, 8).ok());
        bytes.push(code.unwrap_or(*first));
        rest = if code.is_some() { &behind[3..] } else { behind };
    }
    OsString::from_vec(bytes).into()
}

/// Returns the directory of a group's path below the mount point of its hierarchy.
pub(crate) fn directory(root: &Path, path: &str) -> PathBuf {
    root.join(path.trim_start_matches('/'))
}

/// Returns the kernel's id of the group with this directory: its inode number.
pub(crate) fn id_of(directory: &Path) -> Option<u64> {
    fs::metadata(directory).ok().map(|metadata| metadata.ino())
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    const HYBRID: &str = "31 23 0:28 / /sys/fs/cgroup rw - tmpfs tmpfs rw\n\
                          32 31 0:29 / /sys/fs/cgroup/cpu,cpuacct rw,nosuid - cgroup cgroup rw,cpu,cpuacct\n\
                          35 31 0:32 / /sys/fs/cgroup/memory rw shared:3 - cgroup cgroup rw,memory\n\
                          41 31 0:38 / /sys/fs/cgroup/unified rw - cgroup2 cgroup2 rw,nsdelegate\n";
    const PURE: &str = "25 22 0:22 / /sys/fs/cgroup rw,nosuid shared:4 master:1 - cgroup2 cgroup2 rw\n\
                        99 22 0:22 /../../.. /host/sys/fs/c\\040g rw - cgroup2 cgroup2 rw\n";

    #[test]
    fn hierarchies_are_found_on_hosts_of_each_kind() {
        let points = |text, controller| {
            let mounts = parse_mounts(text, controller);
            mounts.iter().map(|mount| mount.point.display().to_string()).collect::<Vec<_>>()
        };
        assert_eq!(points(HYBRID, "cpu"), ["/sys/fs/cgroup/cpu,cpuacct"]);
        assert_eq!(points(HYBRID, "cpuacct"), ["/sys/fs/cgroup/cpu,cpuacct"]);
        assert_eq!(points(HYBRID, "memory"), ["/sys/fs/cgroup/memory"]);
        assert_eq!(points(HYBRID, ""), ["/sys/fs/cgroup/unified"]);
        assert_eq!(points(PURE, ""), ["/sys/fs/cgroup", "/host/sys/fs/c g"]);
        assert_eq!(points(PURE, "cpu"), [""; 0]);
    }

    #[test]
    fn the_root_of_the_hierarchy_is_preferred() {
        let part = "31 1 0:27 /docker/x /elsewhere rw shared:1 - cgroup2 cgroup2 rw\n";
        let text = format!("{part}32 1 0:27 / /sys/fs/cgroup/unified rw - cgroup2 cgroup2 rw\n");
        let chosen =
            |text: &str, root: &str| choose(parse_mounts(text, ""), |point| point == Path::new(root));
        assert_eq!(chosen(&text, ""), Some("/sys/fs/cgroup/unified".into()));
        assert_eq!(chosen(&text, "/elsewhere"), Some("/elsewhere".into()));
        // In a container with a cgroup namespace, `/` is the container's own part.
        assert_eq!(chosen(PURE, "/host/sys/fs/c g"), Some("/host/sys/fs/c g".into()));
        assert_eq!(chosen(part, ""), Some("/elsewhere".into()));
        assert_eq!(chosen("", ""), None);
    }

    #[test]
    fn a_line_that_cannot_be_understood_hides_no_other() {
        let text = format!(
            "nonsense\n31 x 0:28 / /a rw - cgroup2 cgroup2 rw\n7 1 0:1 / /b rw shared:x - t t rw\n{PURE}"
        );
        assert_eq!(parse_mounts(&text, "").len(), 2);
    }

    #[test]
    fn escapes_are_read_and_other_backslashes_stay() {
        for (text, path) in
            [(r"/a\040b\134c", r"/a b\c"), (r"/\9", r"/\9"), (r"/x\04", r"/x\04"), (r"/\777", r"/\777")]
        {
            assert_eq!(unescape(Path::new(text)), Path::new(path));
        }
    }

    proptest! {
        /// Checks that no text makes the parser panic (R55).
        #[test]
        fn any_mountinfo_is_read_without_panic(text in "(?s).{0,400}", fields in "[ a-z0-9:,/\\\\=-]{0,200}") {
            let _ = (parse_mounts(&text, "cpu"), parse_mounts(&fields, ""), unescape(Path::new(&text)));
        }
    }
}
