//! Control groups of a test, in the hierarchy that the agent reads and in the unified one.

use std::{
    fs,
    path::{Path, PathBuf},
    time::{Duration, Instant},
};

use gannet_agent::cgroup::CgroupHierarchy;

const ENTER: &str = r#"
#include <fcntl.h>
#include <stdio.h>
#include <string.h>
#include <unistd.h>
int main(int c, char **v) {
	int i = 1;
	for (; i < c && strcmp(v[i], "--"); i++) {
		int fd = open(v[i], O_WRONLY);
		if (fd < 0 || write(fd, "0", 1) != 1) { perror(v[i]); return 125; }
		close(fd);
	}
	execv(v[i + 1], v + i + 1);
	perror(v[i + 1]);
	return 126;
}
"#;

/// Compiles a program that enters control groups and then executes another program, as container runtimes do:
/// `enter FILE... -- PROGRAM...`.
pub(crate) fn enter() -> PathBuf {
    super::program("gannet-enter", ENTER, &[])
}

/// A group. Dropping it kills its processes and removes it.
pub(crate) struct Group {
    /// The path below the hierarchy's root.
    pub(crate) path: String,
    /// The directory in the hierarchy that the agent reads.
    pub(crate) directory: PathBuf,
    /// The directory in the unified hierarchy; the same if the agent reads that one.
    pub(crate) unified: PathBuf,
}

impl Group {
    /// Makes a group of this name; slashes make groups below others.
    pub(crate) fn new(name: &str) -> Self {
        let path = format!("/gannet-test-{}/{name}", std::process::id());
        let unified_root = mount_of("cgroup2", "").unwrap_or_else(mount_unified);
        let root = match CgroupHierarchy::detect() {
            CgroupHierarchy::V2 => unified_root.clone(),
            CgroupHierarchy::V1Cpu => mount_of("cgroup", "cpu").unwrap(),
            CgroupHierarchy::V1Memory => mount_of("cgroup", "memory").unwrap(),
        };
        let group = Self { directory: root.join(&path[1..]), unified: unified_root.join(&path[1..]), path };
        fs::create_dir_all(&group.directory).unwrap();
        fs::create_dir_all(&group.unified).unwrap();
        group
    }

    /// Returns the kernel's id of it.
    pub(crate) fn id(&self) -> u64 {
        std::os::unix::fs::MetadataExt::ino(&fs::metadata(&self.directory).unwrap())
    }

    /// Returns the files through which processes enter it.
    pub(crate) fn entry_files(&self) -> Vec<PathBuf> {
        let mut files = vec![self.directory.join("cgroup.procs")];
        if self.directory != self.unified {
            files.push(self.unified.join("cgroup.procs"));
        }
        files
    }

    /// Moves a process into it.
    pub(crate) fn take(&self, pid: u32) {
        for file in self.entry_files() {
            fs::write(file, pid.to_string()).unwrap();
        }
    }
}

impl Drop for Group {
    fn drop(&mut self) {
        let end = Instant::now() + Duration::from_secs(5);
        for directory in [&self.directory, &self.unified] {
            while fs::remove_dir(directory).is_err() && directory.exists() && Instant::now() < end {
                for pid in fs::read_to_string(directory.join("cgroup.procs")).unwrap_or_default().lines() {
                    // SAFETY: no memory is passed; the process is of this test's own group.
                    unsafe { libc::kill(pid.parse().unwrap_or(i32::MAX), libc::SIGKILL) };
                }
                std::thread::sleep(Duration::from_millis(10));
            }
            // The group that holds those of this test goes with the last of them.
            let mut above = directory.parent();
            while let Some(directory) = above.filter(|path| path.to_string_lossy().contains("gannet-test-")) {
                let _ = fs::remove_dir(directory);
                above = directory.parent();
            }
        }
    }
}

/// Returns the mount point of a hierarchy.
fn mount_of(kind: &str, controller: &str) -> Option<PathBuf> {
    fs::read_to_string("/proc/self/mounts").unwrap().lines().find_map(|line| {
        let fields: Vec<&str> = line.split(' ').collect();
        let is_wanted = fields[2] == kind
            && (controller.is_empty() || fields[3].split(',').any(|option| option == controller));
        is_wanted.then(|| PathBuf::from(fields[1]))
    })
}

/// Mounts the unified hierarchy, which a small machine may lack, and returns its mount point.
fn mount_unified() -> PathBuf {
    let point = Path::new("/sys/fs/cgroup");
    let status =
        std::process::Command::new("mount").args(["-t", "cgroup2", "none", "/sys/fs/cgroup"]).status();
    assert!(status.is_ok_and(|status| status.success()), "cgroup2 can be mounted");
    point.to_owned()
}
