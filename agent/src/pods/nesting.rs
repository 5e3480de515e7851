//! Finds the container in which a process was started whose own container Kubernetes does not know. Docker inside a pod may put
//! its containers outside of the pod's control groups, so their paths do not name the pod; the parents of their processes run
//! inside the pod.

use std::{
    fs::File,
    io::{self, Read as _},
};

use crate::cgroup::{CgroupHierarchy, CgroupNames, PathContainer, parse_path};

/// Parents to visit. A container's first process has its runtime's process for a parent, and that one the runtime.
const MAX_ANCESTORS: usize = 16;
/// Bytes to read of a process's file.
const MAX_FILE_BYTES: u64 = 64 << 10;

/// Returns the container of a pod in which the process's nearest ancestor runs; `None` if no ancestor runs in one. An error means
/// that the process has ended or is in another container now. Blocking.
pub(super) fn started_in(
    pid: u32,
    container_id: &str,
    hierarchy: CgroupHierarchy,
) -> io::Result<Option<PathContainer>> {
    let names_of = |pid: u32| -> io::Result<CgroupNames> {
        Ok(CgroupNames::of(&parse_path(&read(pid, "cgroup")?, hierarchy.controller()).unwrap_or_default()))
    };
    if names_of(pid)?.container_id != container_id {
        return Err(io::ErrorKind::NotFound.into());
    }
    let mut pid = pid;
    for _ in 0..MAX_ANCESTORS {
        pid = match parent_in(&read(pid, "stat")?) {
            None | Some(0) => return Ok(None),
            Some(parent) => parent,
        };
        let names = names_of(pid)?;
        let found = names.containers().into_iter().find(|(_, pod_uid)| !pod_uid.is_empty());
        if let Some((id, pod_uid)) = found {
            return Ok(Some(PathContainer { id: id.to_owned(), pod_uid: pod_uid.to_owned() }));
        }
    }
    Ok(None)
}

/// Returns the parent in the text of `/proc/PID/stat`. The name before it may hold anything.
fn parent_in(stat: &str) -> Option<u32> {
    stat.rsplit_once(')')?.1.split_ascii_whitespace().nth(1)?.parse().ok()
}

fn read(pid: u32, file: &str) -> io::Result<String> {
    let mut bytes = Vec::new();
    File::open(format!("/proc/{pid}/{file}"))?.take(MAX_FILE_BYTES).read_to_end(&mut bytes)?;
    Ok(String::from_utf8_lossy(&bytes).into_owned())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_parent_stands_behind_any_name() {
        assert_eq!(parent_in("7 (a) 1) S 42 7 7 0"), Some(42));
        assert_eq!(parent_in("7 (sh"), None);
        assert_eq!(parent_in(""), None);
    }

    #[test]
    fn a_process_outside_of_pods_is_of_none() {
        let hierarchy = CgroupHierarchy::detect();
        let own = std::process::id();
        let id = CgroupNames::of(
            &parse_path(&read(own, "cgroup").unwrap(), hierarchy.controller()).unwrap_or_default(),
        )
        .container_id;
        assert!(started_in(own, "another", hierarchy).is_err());
        assert!(started_in(own, &id, hierarchy).is_ok());
        assert!(started_in(u32::MAX, &id, hierarchy).is_err());
    }
}
