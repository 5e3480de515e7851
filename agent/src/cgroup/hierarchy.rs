//! The hierarchies of control groups, and the path of a process in one.

use std::fs;

use super::{CgroupNames, container_part};

/// The hierarchy by which the agent tells processes apart.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum CgroupHierarchy {
    /// The unified one, cgroup2.
    V2,
    /// That of the v1 controller `cpu`. Pure v1 and hybrid hosts.
    V1Cpu,
    /// That of the v1 controller `memory`.
    V1Memory,
}

impl CgroupHierarchy {
    /// Chooses the hierarchy of this host: where v1 controllers are mounted, container runtimes use those.
    pub fn detect() -> Self {
        // Lines of /proc/cgroups: name, hierarchy number, ...; hierarchy 0 is "not mounted as v1".
        let table = fs::read_to_string("/proc/cgroups").unwrap_or_default();
        let mounted = |controller| {
            table.lines().any(|line| {
                let mut fields = line.split_ascii_whitespace();
                fields.next() == Some(controller) && fields.next().is_some_and(|hierarchy| hierarchy != "0")
            })
        };
        match () {
            () if mounted("cpu") => Self::V1Cpu,
            () if mounted("memory") => Self::V1Memory,
            () => Self::V2,
        }
    }

    /// Returns the controller that names the hierarchy in `/proc/PID/cgroup` and in mounts; empty for the unified one.
    pub fn controller(self) -> &'static str {
        match self {
            Self::V2 => "",
            Self::V1Cpu => "cpu",
            Self::V1Memory => "memory",
        }
    }
}

/// Reads the path of a process in the hierarchy of a v1 controller, or in the unified one for an empty name.
pub(crate) fn path_of(tgid: u32, controller: &str) -> Option<String> {
    parse_path(&fs::read_to_string(format!("/proc/{tgid}/cgroup")).ok()?, controller)
}

/// Finds the path of a process in the text of `/proc/PID/cgroup`; controllers are named as for [`path_of`].
pub(crate) fn parse_path(text: &str, controller: &str) -> Option<String> {
    text.lines().find_map(|line| {
        let mut fields = line.splitn(3, ':');
        let (number, controllers, path) = (fields.next()?, fields.next()?, fields.next()?);
        let is_wanted = if controller.is_empty() {
            number == "0" && controllers.is_empty()
        } else {
            controllers.split(',').any(|name| name == controller)
        };
        is_wanted.then(|| path.to_owned())
    })
}

/// Finds the path of the container whose id begins with `id`, by a process in it. `None` for an id of fewer than 8 digits: it
/// is not one container's.
pub(crate) fn find_container(id: &str) -> Option<String> {
    if id.len() < 8 || !id.bytes().all(|byte| byte.is_ascii_hexdigit()) {
        return None;
    }
    let controller = CgroupHierarchy::detect().controller();
    let pids = fs::read_dir("/proc").ok()?.filter_map(|entry| entry.ok()?.file_name().to_str()?.parse().ok());
    pids.filter_map(|pid: u32| path_of(pid, controller))
        .find(|path| CgroupNames::of(path).container_id.starts_with(id))
        .map(|path| container_part(&path).to_owned())
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn the_line_of_the_hierarchy_is_found() {
        let text = "5:cpu,cpuacct:/a\n1:name=systemd:/b\n0::/c:d\n";
        assert_eq!(parse_path(text, "").as_deref(), Some("/c:d"));
        assert_eq!(parse_path(text, "cpuacct").as_deref(), Some("/a"));
        assert_eq!(parse_path(text, "memory"), None);
    }

    proptest! {
        /// Checks that no text makes the parsers panic (R55).
        #[test]
        fn any_cgroup_text_is_read_without_panic(text in "(?s).{0,400}") {
            let _ = (parse_path(&text, "cpu"), CgroupNames::of(&text));
        }
    }
}
