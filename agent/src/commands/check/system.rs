//! Checks of the system's settings and mounts.

use std::{
    fs::{self, File},
    io::{BufRead as _, BufReader},
    path::Path,
};

use libbpf_rs::{MapHandle, MapType};
use rustix::process::{Resource, getrlimit};

use super::Check;
use crate::cgroup::{CgroupHierarchy, mount_of};

/// With fewer open files than this, a node with many executables runs short.
const MIN_OPEN_FILES: u64 = 4096;
/// Size of all maps of the agent together.
const MAX_TRIED_MAP_BYTES: u64 = 32 << 20;

pub(super) fn kernel_symbols() -> Check {
    let restrict = fs::read_to_string("/proc/sys/kernel/kptr_restrict").unwrap_or_default();
    let restrict = restrict.trim();
    // Older kernels list some hundred per-CPU symbols first, at and near address 0.
    let visible = File::open("/proc/kallsyms").is_ok_and(|file| {
        BufReader::new(file).lines().map_while(Result::ok).any(|line| {
            line.split(' ').next().is_some_and(|address| address.bytes().any(|digit| digit != b'0'))
        })
    });
    if visible {
        Check::ok(
            "kernel_symbols",
            format!("/proc/kallsyms shows addresses (kernel.kptr_restrict is {restrict})"),
        )
    } else {
        Check::warning(
            "kernel_symbols",
            format!(
                "/proc/kallsyms shows no addresses (kernel.kptr_restrict is {restrict}): kernel frames have no names"
            ),
            "add CAP_SYSLOG, or set kernel.kptr_restrict to 1 or 0",
        )
    }
}

pub(super) fn cgroup() -> Check {
    judge_cgroup(CgroupHierarchy::detect(), mount_of("").as_deref())
}

/// Reports which tree rules compare, and where the pressure of containers is measured.
fn judge_cgroup(compared: CgroupHierarchy, unified: Option<&Path>) -> Check {
    const CURE: &str = "boot with systemd.unified_cgroup_hierarchy=1";
    let controller = compared.controller();
    match (controller, unified) {
        ("", Some(_)) => Check::ok("cgroup", "version 2"),
        ("", None) => Check::warning(
            "cgroup",
            "no control groups are mounted: conditions on containers never hold, rules on groups may match nothing",
            "mount cgroup2 at /sys/fs/cgroup",
        ),
        (_, Some(point)) => Check::warning(
            "cgroup",
            format!(
                "hybrid: rules compare paths of the version 1 controller `{controller}`; pressure is measured only in \
                 groups of the version 2 tree at {}",
                point.display()
            ),
            CURE,
        ),
        (_, None) => Check::warning(
            "cgroup",
            format!(
                "version 1: rules compare paths of the controller `{controller}`; conditions on the pressure of \
                 containers never hold"
            ),
            CURE,
        ),
    }
}

pub(super) fn psi() -> Check {
    match fs::read_to_string("/proc/pressure/cpu") {
        Ok(_) => Check::ok("psi", "pressure is measured"),
        Err(error) => Check::warning(
            "psi",
            format!("pressure is not measured (/proc/pressure/cpu: {error}): conditions on it never hold"),
            "boot with psi=1",
        ),
    }
}

pub(super) fn tracefs() -> Check {
    let mounted = Path::new("/sys/kernel/tracing/events").exists();
    Check::ok("tracefs", if mounted { "mounted" } else { "not mounted, and not needed" })
}

pub(super) fn memlock() -> Check {
    let limit = getrlimit(Resource::Memlock).current;
    let Some(limit) = limit else { return Check::ok("memlock", "unlimited") };
    let text = format!("the limit on locked memory is {} KiB", limit / 1024);
    match make_map_of(limit.saturating_add(1 << 20).min(MAX_TRIED_MAP_BYTES)) {
        Ok(()) => Check::ok("memlock", format!("{text}, and a larger BPF map was created")),
        Err(error) => Check::warning(
            "memlock",
            format!("{text}, and a larger BPF map cannot be created: {error}"),
            "raise it (ulimit -l unlimited, LimitMEMLOCK=infinity), or add CAP_SYS_RESOURCE",
        ),
    }
}

fn make_map_of(bytes: u64) -> libbpf_rs::Result<()> {
    const VALUE_BYTES: u32 = 4096;
    let options = libbpf_rs::libbpf_sys::bpf_map_create_opts {
        sz: size_of::<libbpf_rs::libbpf_sys::bpf_map_create_opts>() as libbpf_rs::libbpf_sys::size_t,
        ..Default::default()
    };
    let entries = u32::try_from(bytes / u64::from(VALUE_BYTES)).unwrap_or(u32::MAX);
    MapHandle::create(MapType::Array, Some("gannet_check"), 4, VALUE_BYTES, entries, &options).map(drop)
}

pub(super) fn open_files() -> Check {
    let limit = getrlimit(Resource::Nofile).maximum;
    match limit {
        Some(limit) if limit < MIN_OPEN_FILES => Check::warning(
            "open_files",
            format!("at most {limit} open files: with more executables than that in use, some have no names"),
            "raise the limit (ulimit -n, LimitNOFILE=65536)",
        ),
        Some(limit) => Check::ok("open_files", format!("at most {limit}")),
        None => Check::ok("open_files", "unlimited"),
    }
}

pub(super) fn state_dir(path: &Path) -> Check {
    let tried = fs::create_dir_all(path).and_then(|()| tempfile::tempfile_in(path));
    match tried {
        Ok(_) => Check::ok("state_dir", format!("{} can be written", path.display())),
        Err(error) => Check::warning(
            "state_dir",
            format!("{} cannot be written ({error}): `run` cannot start there", path.display()),
            "give --state-dir a directory that can be written",
        ),
    }
}

#[cfg(test)]
mod tests {
    use rstest::rstest;

    use super::{super::CheckState, *};

    #[rstest]
    #[case::version_2(CgroupHierarchy::V2, Some("/sys/fs/cgroup"), CheckState::Ok, "version 2")]
    #[case::no_tree(CgroupHierarchy::V2, None, CheckState::Warning, "no control groups are mounted")]
    #[case::hybrid(
        CgroupHierarchy::V1Cpu,
        Some("/sys/fs/cgroup/unified"),
        CheckState::Warning,
        "controller `cpu`; pressure is measured only in groups of the version 2 tree at /sys/fs/cgroup/unified"
    )]
    #[case::version_1(
        CgroupHierarchy::V1Memory,
        None,
        CheckState::Warning,
        "paths of the controller `memory`"
    )]
    fn the_cgroup_check_names_the_tree_that_rules_compare(
        #[case] compared: CgroupHierarchy,
        #[case] unified: Option<&str>,
        #[case] state: CheckState,
        #[case] seen: &str,
    ) {
        let check = judge_cgroup(compared, unified.map(Path::new));
        assert_eq!(check.state, state);
        assert!(check.seen.contains(seen), "{}", check.seen);
    }

    #[test]
    fn a_state_directory_must_be_writable() {
        let directory = tempfile::tempdir().unwrap();
        assert_eq!(state_dir(&directory.path().join("new/deep")).state, CheckState::Ok);
        assert_eq!(state_dir(Path::new("/proc/nowhere")).state, CheckState::Warning);
    }
}
