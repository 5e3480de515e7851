//! Where control groups are in the file system, and which of them stands for a container or a pod.

use std::{
    fs,
    os::unix::fs::MetadataExt as _,
    path::{Path, PathBuf},
};

use crate::{kernel::CgroupHierarchy, process::CgroupNames};

/// Where a hierarchy is mounted, from its root on: that of a v1 controller, or the unified one for an empty name.
pub fn mount_of(controller: &str) -> Option<PathBuf> {
    find_mount(&fs::read_to_string("/proc/self/mountinfo").ok()?, controller)
}

fn find_mount(text: &str, controller: &str) -> Option<PathBuf> {
    text.lines().find_map(|line| {
        // ID parent major:minor root place options [tags] - kind source options
        let (place, kind) = line.split_once(" - ")?;
        let place: Vec<&str> = place.split(' ').collect();
        let kind: Vec<&str> = kind.split(' ').collect();
        let here = match controller {
            "" => kind.first() == Some(&"cgroup2"),
            _ => {
                kind.first() == Some(&"cgroup") && kind.get(2)?.split(',').any(|option| option == controller)
            }
        };
        (here && place.get(3) == Some(&"/")).then(|| PathBuf::from(place.get(4).copied().unwrap_or_default()))
    })
}

/// The path of a process in one hierarchy: of a v1 controller, or of the unified one for an empty name.
pub fn path_of(tgid: u32, controller: &str) -> Option<String> {
    crate::process::cgroup_path_in(&fs::read_to_string(format!("/proc/{tgid}/cgroup")).ok()?, controller)
}

/// The path of the container whose id begins so, in the hierarchy that groups are told apart by; found by a process in it.
pub fn find_container(id: &str) -> Option<String> {
    let controller = match CgroupHierarchy::detect() {
        CgroupHierarchy::V2 => "",
        CgroupHierarchy::V1Cpu => "cpu",
        CgroupHierarchy::V1Memory => "memory",
    };
    // Shorter ones are not one container's.
    if id.len() < 8 || !id.bytes().all(|byte| byte.is_ascii_hexdigit()) {
        return None;
    }
    let pids = fs::read_dir("/proc").ok()?.filter_map(|entry| entry.ok()?.file_name().to_str()?.parse().ok());
    pids.filter_map(|pid: u32| path_of(pid, controller))
        .find(|path| CgroupNames::of(path).container_id.starts_with(id))
        .map(|path| container_part(&path).to_owned())
}

/// The directory of a path below a hierarchy's root.
pub fn directory(root: &Path, path: &str) -> PathBuf {
    root.join(path.trim_start_matches('/'))
}

/// The id that the kernel has for a control group.
pub fn id_of(directory: &Path) -> Option<u64> {
    fs::metadata(directory).ok().map(|metadata| metadata.ino())
}

/// Of the path of a process's control group the part that names its container; the whole where there is none.
pub fn container_part(path: &str) -> &str {
    part(path, |names| !names.container_id.is_empty(), |names| &names.container_id)
}

/// The part that names its pod; where there is none, that of its container.
pub fn pod_part(path: &str) -> &str {
    if CgroupNames::of(path).pod_uid.is_empty() {
        return container_part(path);
    }
    part(path, |names| !names.pod_uid.is_empty(), |names| &names.pod_uid)
}

/// The shortest beginning of a path that names the same as the whole.
fn part(path: &str, names_it: impl Fn(&CgroupNames) -> bool, name: impl Fn(&CgroupNames) -> &str) -> &str {
    let whole = CgroupNames::of(path);
    if !names_it(&whole) {
        return path;
    }
    path.match_indices('/')
        .map(|(at, _)| &path[..at])
        .chain([path])
        .find(|beginning| name(&CgroupNames::of(beginning)) == name(&whole))
        .unwrap_or(path)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_part_of_a_container_and_of_its_pod() {
        let id = "0123456789abcdef".repeat(4);
        let pod = "/kubepods.slice/kubepods-pod12345678_9abc_def0_1234_56789abcdef0.slice";
        let container = format!("{pod}/cri-containerd-{id}.scope");
        let inside = format!("{container}/system.slice/x.service");
        for path in [&container, &inside] {
            assert_eq!(container_part(path), container);
            assert_eq!(pod_part(path), pod);
        }
        assert_eq!(container_part("/system.slice/x.service"), "/system.slice/x.service");
        assert_eq!(pod_part("/a/b"), "/a/b");
        assert_eq!(container_part("/"), "/");
    }

    #[test]
    fn mounts_of_both_kinds() {
        let text = "\
30 1 0:26 / /sys/fs/cgroup/cpu rw,nosuid - cgroup cgroup rw,cpu,cpuacct
31 1 0:27 /docker/x /elsewhere rw shared:1 - cgroup2 cgroup2 rw
32 1 0:27 / /sys/fs/cgroup/unified rw - cgroup2 cgroup2 rw
";
        assert_eq!(find_mount(text, "cpuacct"), Some("/sys/fs/cgroup/cpu".into()));
        assert_eq!(find_mount(text, ""), Some("/sys/fs/cgroup/unified".into()));
        assert_eq!(find_mount(text, "memory"), None);
    }
}
