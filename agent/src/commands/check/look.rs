//! The single looks, from what stops everything to what only costs.

use std::{
    fs::{self, File},
    io::{BufRead, BufReader, ErrorKind, Read},
    path::Path,
};

use libbpf_rs::{MapHandle, MapType, ProgramType};
use perf_event_open_sys::bindings::{
    PERF_COUNT_SW_CPU_CLOCK, PERF_FLAG_FD_CLOEXEC, PERF_TYPE_SOFTWARE, perf_event_attr,
};
use rustix::process::{Resource, getrlimit};

use super::Check;

/// What must be true for Gannet to run, in the order in which it makes sense to mend it.
pub(super) const FATAL: &[fn() -> Check] =
    &[architecture, kernel, capabilities, lockdown, btf, bpf, ring_buffer, perf_clock, host_pid];

/// What it runs without.
pub(super) const OTHERS: &[fn() -> Check] = &[
    file_access,
    kernel_symbols,
    user_memory,
    bpf_loop,
    cgroup,
    psi,
    tracefs,
    memlock,
    open_files,
    bpf_stats,
];

const FLOOR: (u32, u32) = (5, 10);
const BTF_MAGIC: [u8; 2] = 0xeb9f_u16.to_ne_bytes();
/// `PROC_PID_INIT_INO`: the kernel gives the first pid namespace this number, always.
const FIRST_PID_NAMESPACE: u32 = 0xEFFF_FFFC;
const BPF_FUNC_LOOP: u32 = 181;
const CGROUP2_MAGIC: u64 = 0x6367_7270;
const ENOUGH_OPEN_FILES: u64 = 4096;
/// What all maps together come to.
const MAX_TRIED_MAP_BYTES: u64 = 32 << 20;

/// Capabilities by their number in `include/uapi/linux/capability.h`.
#[derive(Clone, Copy)]
struct Capability(&'static str, u32);

const DAC_READ_SEARCH: Capability = Capability("CAP_DAC_READ_SEARCH", 2);
const SYS_PTRACE: Capability = Capability("CAP_SYS_PTRACE", 19);
const SYS_ADMIN: Capability = Capability("CAP_SYS_ADMIN", 21);
const PERFMON: Capability = Capability("CAP_PERFMON", 38);
const BPF: Capability = Capability("CAP_BPF", 39);
const CHECKPOINT_RESTORE: Capability = Capability("CAP_CHECKPOINT_RESTORE", 40);

#[derive(Clone, Copy)]
struct CapabilitySet(u64);

impl CapabilitySet {
    fn effective() -> Self {
        let status = fs::read_to_string("/proc/self/status").unwrap_or_default();
        let hex = status.lines().find_map(|line| line.strip_prefix("CapEff:")).unwrap_or_default();
        Self(u64::from_str_radix(hex.trim(), 16).unwrap_or_default())
    }

    /// `CAP_SYS_ADMIN` stands for each of those that were split off from it.
    fn has(self, capability: Capability) -> bool {
        self.holds(capability)
            || (matches!(capability.0, "CAP_BPF" | "CAP_PERFMON" | "CAP_CHECKPOINT_RESTORE")
                && self.holds(SYS_ADMIN))
    }

    fn holds(self, capability: Capability) -> bool {
        self.0 & (1 << capability.1) != 0
    }

    fn missing(self, wanted: &[Capability]) -> Vec<&'static str> {
        wanted.iter().filter(|capability| !self.has(**capability)).map(|capability| capability.0).collect()
    }
}

fn architecture() -> Check {
    match std::env::consts::ARCH {
        known @ ("x86_64" | "aarch64") => Check::ok("architecture", known),
        other => Check::fail("architecture", other, "run Gannet on x86_64 or aarch64"),
    }
}

fn kernel() -> Check {
    judge_kernel(&rustix::system::uname().release().to_string_lossy())
}

fn judge_kernel(release: &str) -> Check {
    let mut numbers =
        release.split(|c: char| !c.is_ascii_digit()).map_while(|number| number.parse::<u32>().ok());
    match (numbers.next(), numbers.next()) {
        (Some(major), Some(minor)) if (major, minor) >= FLOOR => {
            Check::ok("kernel", format!("Linux {release}"))
        }
        _ => Check::fail(
            "kernel",
            format!("Linux {release} is older than {}.{}", FLOOR.0, FLOOR.1),
            format!("use a node with Linux {}.{} or newer", FLOOR.0, FLOOR.1),
        ),
    }
}

fn user_memory() -> Check {
    let name = rustix::system::uname();
    judge_user_memory(&name.release().to_string_lossy(), &name.version().to_string_lossy())
}

/// From 5.19 on copying user memory inside an interrupt could wait for a lock that the interrupted code holds. Linux 6.4
/// mended it, and two of the stable series took that over.
fn judge_user_memory(release: &str, version: &str) -> Check {
    let numbers = |text: &str| {
        let mut numbers = text.split(|c: char| !c.is_ascii_digit()).map_while(|n| n.parse::<u32>().ok());
        let mut next = || numbers.next().unwrap_or(0);
        (next(), next(), next())
    };
    // Debian calls its kernel 6.1.0-18 what is 6.1.76, and says so in the version.
    let (major, minor, mut patch) = numbers(release);
    for word in version.split_ascii_whitespace() {
        let (also_major, also_minor, also_patch) = numbers(word);
        if (also_major, also_minor) == (major, minor) {
            patch = patch.max(also_patch);
        }
    }
    let is_affected = match (major, minor) {
        (5, 19..) | (6, 0 | 2) => true,
        (6, 1) => patch < 36,
        (6, 3) => patch < 10,
        _ => false,
    };
    if is_affected {
        Check::warning(
            "user_memory",
            format!("Linux {release} may lock up when a profiler reads user stacks inside an interrupt"),
            "use Linux 6.1.36, 6.3.10, 6.4 or newer, unless the distribution has taken over \"mm: Fix copy_from_user_nofault()\"",
        )
    } else {
        Check::ok("user_memory", "can be read inside an interrupt")
    }
}

fn capabilities() -> Check {
    judge_capabilities(CapabilitySet::effective())
}

fn judge_capabilities(set: CapabilitySet) -> Check {
    match set.missing(&[BPF, PERFMON]) {
        missing if missing.is_empty() => {
            Check::ok("capabilities", "CAP_BPF and CAP_PERFMON, or CAP_SYS_ADMIN")
        }
        missing => Check::fail(
            "capabilities",
            format!("missing {}", missing.join(" and ")),
            "run as root, or with CAP_BPF and CAP_PERFMON (in a container, add them to its securityContext)",
        ),
    }
}

fn lockdown() -> Check {
    match fs::read_to_string("/sys/kernel/security/lockdown") {
        Ok(text) => judge_lockdown(&text),
        Err(error) if error.kind() == ErrorKind::NotFound => Check::ok("lockdown", "not in use"),
        Err(error) => Check::ok("lockdown", format!("cannot be read ({error}); loading BPF will tell")),
    }
}

/// All modes are listed, the one in force in brackets.
fn judge_lockdown(text: &str) -> Check {
    let mode = text.split(['[', ']']).nth(1).unwrap_or_default();
    if mode == "confidentiality" {
        Check::fail(
            "lockdown",
            "the kernel is locked down for confidentiality and lets nobody read its memory",
            "boot with lockdown=integrity or without lockdown",
        )
    } else {
        Check::ok("lockdown", if mode.is_empty() { "not in use" } else { mode })
    }
}

fn btf() -> Check {
    let mut magic = [0; 2];
    match File::open("/sys/kernel/btf/vmlinux").and_then(|mut file| file.read_exact(&mut magic)) {
        Ok(()) if magic == BTF_MAGIC => Check::ok("btf", "/sys/kernel/btf/vmlinux"),
        Ok(()) => Check::fail("btf", "/sys/kernel/btf/vmlinux is not BTF", BTF_CURE),
        Err(error) => Check::fail("btf", format!("no BTF: /sys/kernel/btf/vmlinux: {error}"), BTF_CURE),
    }
}

const BTF_CURE: &str = "use a kernel built with CONFIG_DEBUG_INFO_BTF=y, and mount /sys";

fn bpf() -> Check {
    match ProgramType::PerfEvent.is_supported() {
        Ok(true) => Check::ok("bpf", "a program was loaded"),
        Ok(false) => Check::fail(
            "bpf",
            "the kernel does not load a BPF program of type perf_event",
            "use a kernel with CONFIG_BPF_SYSCALL=y and CONFIG_BPF_EVENTS=y, and let no seccomp profile forbid bpf(2)",
        ),
        Err(error) => Check::fail(
            "bpf",
            format!("a BPF program cannot be loaded: {error}"),
            "run as root or with CAP_BPF and CAP_PERFMON, and let no seccomp profile forbid bpf(2)",
        ),
    }
}

fn ring_buffer() -> Check {
    match MapType::RingBuf.is_supported() {
        Ok(true) => Check::ok("ring_buffer", "a ring buffer was made"),
        Ok(false) => Check::fail(
            "ring_buffer",
            "the kernel makes no BPF ring buffer",
            format!("use a node with Linux {}.{} or newer", FLOOR.0, FLOOR.1),
        ),
        Err(error) => Check::fail(
            "ring_buffer",
            format!("a BPF ring buffer cannot be made: {error}"),
            "run as root or with CAP_BPF, and raise the limit on locked memory",
        ),
    }
}

fn perf_clock() -> Check {
    let paranoid = fs::read_to_string("/proc/sys/kernel/perf_event_paranoid").unwrap_or_default();
    judge_perf_clock(open_perf_clock(), paranoid.trim(), CapabilitySet::effective())
}

/// Kernels of Debian and Ubuntu know levels above 2, at which they ask for `CAP_SYS_ADMIN`, and answer EACCES.
fn judge_perf_clock(opened: std::io::Result<()>, paranoid: &str, set: CapabilitySet) -> Check {
    let error = match opened {
        Ok(()) => {
            return Check::ok(
                "perf_clock",
                format!("opened on CPU 0 (kernel.perf_event_paranoid is {paranoid})"),
            );
        }
        Err(error) => error,
    };
    let restricted = paranoid.parse().is_ok_and(|level: i32| level > 2);
    let cure = if error.raw_os_error() == Some(libc::EACCES) && restricted && !set.holds(SYS_ADMIN) {
        "run with CAP_SYS_ADMIN (the chart's agent.sysAdmin), or sysctl kernel.perf_event_paranoid=2: \
         above that, this kernel lets nobody else sample, whatever CAP_PERFMON says"
    } else {
        "run as root or with CAP_PERFMON, let no seccomp profile forbid perf_event_open(2), \
         or lower kernel.perf_event_paranoid"
    };
    let seen =
        format!("the CPU clock of perf cannot be opened: {error} (kernel.perf_event_paranoid is {paranoid})");
    Check::fail("perf_clock", seen, cure)
}

fn open_perf_clock() -> std::io::Result<()> {
    let mut attributes = perf_event_attr {
        type_: PERF_TYPE_SOFTWARE,
        size: size_of::<perf_event_attr>() as u32,
        config: u64::from(PERF_COUNT_SW_CPU_CLOCK),
        ..perf_event_attr::default()
    };
    attributes.set_disabled(1);
    // SAFETY: the attributes live through the call and carry their own size.
    let descriptor = unsafe {
        perf_event_open_sys::perf_event_open(&raw mut attributes, -1, 0, -1, u64::from(PERF_FLAG_FD_CLOEXEC))
    };
    if descriptor < 0 {
        return Err(std::io::Error::last_os_error());
    }
    // SAFETY: the kernel has just made the descriptor, and nobody else knows of it.
    drop(unsafe { <std::os::fd::OwnedFd as std::os::fd::FromRawFd>::from_raw_fd(descriptor) });
    Ok(())
}

fn host_pid() -> Check {
    judge_host_pid(&fs::read_link("/proc/self/ns/pid").unwrap_or_default().to_string_lossy())
}

fn judge_host_pid(link: &str) -> Check {
    if link == format!("pid:[{FIRST_PID_NAMESPACE}]") {
        Check::ok("host_pid", "in the host's pid namespace")
    } else {
        Check::fail(
            "host_pid",
            format!(
                "in a pid namespace of its own ({link}), where the processes of the node have other numbers"
            ),
            "set hostPID: true on the pod, or start the container with --pid=host",
        )
    }
}

fn file_access() -> Check {
    judge_file_access(CapabilitySet::effective())
}

fn judge_file_access(set: CapabilitySet) -> Check {
    match set.missing(&[SYS_PTRACE, CHECKPOINT_RESTORE, DAC_READ_SEARCH]) {
        missing if missing.is_empty() => {
            Check::ok("file_access", "CAP_SYS_PTRACE, CAP_CHECKPOINT_RESTORE, CAP_DAC_READ_SEARCH")
        }
        missing => Check::warning(
            "file_access",
            format!(
                "without {} the files of some processes cannot be read: their frames have no names",
                missing.join(" and ")
            ),
            format!("add {}", missing.join(" and ")),
        ),
    }
}

fn kernel_symbols() -> Check {
    let restrict = fs::read_to_string("/proc/sys/kernel/kptr_restrict").unwrap_or_default();
    let restrict = restrict.trim();
    // Older kernels list the per-CPU symbols first, some hundreds at and near address 0.
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

fn bpf_loop() -> Check {
    match ProgramType::PerfEvent.is_helper_supported(BPF_FUNC_LOOP) {
        Ok(true) => Check::ok("bpf_loop", "there is; the deepest stacks are whole"),
        // Older kernels have the other way, which serves all but very deep stacks.
        Ok(false) | Err(_) => Check::ok("bpf_loop", "there is none; stacks are walked by tail calls"),
    }
}

fn cgroup() -> Check {
    let kind = |path: &str| rustix::fs::statfs(path).map(|found| found.f_type as u64);
    judge_cgroup(
        kind("/sys/fs/cgroup") == Ok(CGROUP2_MAGIC),
        kind("/sys/fs/cgroup/unified") == Ok(CGROUP2_MAGIC),
    )
}

fn judge_cgroup(unified: bool, hybrid: bool) -> Check {
    const CURE: &str = "boot with systemd.unified_cgroup_hierarchy=1";
    match (unified, hybrid) {
        (true, _) => Check::ok("cgroup", "version 2"),
        (false, true) => Check::warning(
            "cgroup",
            "hybrid: version 2 is at /sys/fs/cgroup/unified without controllers; rules on cgroups see that tree",
            CURE,
        ),
        (false, false) => Check::warning(
            "cgroup",
            "no version 2 tree at /sys/fs/cgroup: rules on cgroups and on their pressure match nothing",
            CURE,
        ),
    }
}

fn psi() -> Check {
    match fs::read_to_string("/proc/pressure/cpu") {
        Ok(_) => Check::ok("psi", "pressure is measured"),
        Err(error) => Check::warning(
            "psi",
            format!("pressure is not measured (/proc/pressure/cpu: {error}): conditions on it never hold"),
            "boot with psi=1",
        ),
    }
}

fn tracefs() -> Check {
    let mounted = Path::new("/sys/kernel/tracing/events").exists();
    Check::ok("tracefs", if mounted { "mounted" } else { "not mounted, and not needed" })
}

fn memlock() -> Check {
    let limit = getrlimit(Resource::Memlock).current;
    let Some(limit) = limit else { return Check::ok("memlock", "unlimited") };
    let text = format!("the limit on locked memory is {} KiB", limit / 1024);
    match make_map_of(limit.saturating_add(1 << 20).min(MAX_TRIED_MAP_BYTES)) {
        Ok(()) => Check::ok("memlock", format!("{text}, and a BPF map larger than that was made")),
        Err(error) => Check::warning(
            "memlock",
            format!("{text}, and a BPF map larger than that cannot be made: {error}"),
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

fn open_files() -> Check {
    let limit = getrlimit(Resource::Nofile).maximum;
    match limit {
        Some(limit) if limit < ENOUGH_OPEN_FILES => Check::warning(
            "open_files",
            format!("at most {limit} open files: with more executables than that in use, some have no names"),
            "raise the limit (ulimit -n, LimitNOFILE=65536)",
        ),
        Some(limit) => Check::ok("open_files", format!("at most {limit}")),
        None => Check::ok("open_files", "unlimited"),
    }
}

fn bpf_stats() -> Check {
    match fs::read_to_string("/proc/sys/kernel/bpf_stats_enabled").unwrap_or_default().trim() {
        "1" => Check::warning(
            "bpf_stats",
            "the kernel measures every run of every BPF program",
            "set kernel.bpf_stats_enabled to 0 when it is not being looked at",
        ),
        _ => Check::ok("bpf_stats", "off"),
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

    use super::{
        super::{CheckOptions, State, check, preflight},
        *,
    };

    #[rstest]
    #[case("5.10.0", State::Ok)]
    #[case("5.9.16-1-amd64", State::Fail)]
    #[case("6.1.0-18-cloud-amd64", State::Ok)]
    #[case("7.2-rc1", State::Ok)]
    #[case("4.19.0", State::Fail)]
    #[case("10.0", State::Ok)]
    #[case("", State::Fail)]
    fn the_floor_is_5_10(#[case] release: &str, #[case] state: State) {
        assert_eq!(judge_kernel(release).state, state);
    }

    #[rstest]
    #[case("[none] integrity confidentiality\n", State::Ok)]
    #[case("none [integrity] confidentiality\n", State::Ok)]
    #[case("none integrity [confidentiality]\n", State::Fail)]
    #[case("", State::Ok)]
    fn only_confidentiality_stops_it(#[case] text: &str, #[case] state: State) {
        assert_eq!(judge_lockdown(text).state, state);
    }

    #[rstest]
    #[case("5.10.0-28-amd64", "", State::Ok)]
    #[case("5.18.19", "", State::Ok)]
    #[case("5.19.0-50-generic", "#50-Ubuntu SMP PREEMPT_DYNAMIC", State::Warning)]
    #[case("6.0.19", "", State::Warning)]
    #[case("6.1.35", "", State::Warning)]
    #[case("6.1.36", "", State::Ok)]
    #[case("6.1.0-18-amd64", "#1 SMP PREEMPT_DYNAMIC Debian 6.1.76-1 (2024-02-01)", State::Ok)]
    #[case("6.1.0-9-amd64", "#1 SMP PREEMPT_DYNAMIC Debian 6.1.27-1 (2023-05-08)", State::Warning)]
    #[case("6.2.16", "", State::Warning)]
    #[case("6.3.9", "", State::Warning)]
    #[case("6.3.10-arch1", "", State::Ok)]
    #[case("6.4.0", "", State::Ok)]
    #[case("6.18", "", State::Ok)]
    fn kernels_that_may_lock_up_are_warned_of(
        #[case] release: &str,
        #[case] version: &str,
        #[case] state: State,
    ) {
        let check = judge_user_memory(release, version);
        assert_eq!(check.state, state);
        assert_eq!(check.cure.contains("6.1.36"), state == State::Warning);
    }

    #[test]
    fn what_is_missing_is_named() {
        let none = judge_capabilities(CapabilitySet(0));
        assert_eq!(none.state, State::Fail);
        assert!(none.seen.contains("CAP_BPF and CAP_PERFMON"), "{none:?}");
        let only_bpf = judge_capabilities(CapabilitySet(1 << BPF.1));
        assert!(only_bpf.seen.contains("CAP_PERFMON") && !only_bpf.seen.contains("CAP_BPF"), "{only_bpf:?}");
        let admin = CapabilitySet(1 << SYS_ADMIN.1);
        assert_eq!(judge_capabilities(admin).state, State::Ok);
        let files = judge_file_access(admin);
        assert_eq!(files.state, State::Warning);
        assert!(files.cure.contains("CAP_SYS_PTRACE") && !files.cure.contains("CHECKPOINT"), "{files:?}");
    }

    #[rstest]
    #[case(libc::EACCES, "3", 1 << PERFMON.1, true)]
    #[case(libc::EACCES, "4", 1 << PERFMON.1, true)]
    #[case(libc::EACCES, "2", 0, false)]
    #[case(libc::EPERM, "3", 1 << PERFMON.1, false)]
    #[case(libc::EACCES, "3", 1 << SYS_ADMIN.1, false)]
    fn who_may_sample_on_kernels_that_restrict_it_is_told(
        #[case] error: i32,
        #[case] paranoid: &str,
        #[case] set: u64,
        #[case] admin: bool,
    ) {
        let refused = Err(std::io::Error::from_raw_os_error(error));
        let check = judge_perf_clock(refused, paranoid, CapabilitySet(set));
        assert_eq!(check.state, State::Fail);
        assert_eq!(check.cure.contains("CAP_SYS_ADMIN"), admin, "{check:?}");
    }

    #[rstest]
    #[case("pid:[4026531836]", State::Ok)]
    #[case("pid:[4026532201]", State::Fail)]
    #[case("", State::Fail)]
    fn only_the_first_pid_namespace_will_do(#[case] link: &str, #[case] state: State) {
        assert_eq!(judge_host_pid(link).state, state);
    }

    #[rstest]
    #[case(true, false, State::Ok)]
    #[case(false, true, State::Warning)]
    #[case(false, false, State::Warning)]
    fn cgroup_trees_are_told_apart(#[case] unified: bool, #[case] hybrid: bool, #[case] state: State) {
        assert_eq!(judge_cgroup(unified, hybrid).state, state);
    }

    #[test]
    fn a_state_directory_is_tried() {
        let directory = tempfile::tempdir().unwrap();
        assert_eq!(state_dir(&directory.path().join("new/deep")).state, State::Ok);
        assert_eq!(state_dir(Path::new("/proc/nowhere")).state, State::Warning);
    }

    #[test]
    fn each_check_has_one_name_and_what_is_wrong_has_a_cure() {
        let report = check(&CheckOptions::default());
        let mut names: Vec<_> = report.checks.iter().map(|check| check.name).collect();
        names.sort_unstable();
        names.dedup();
        assert_eq!(names.len(), report.checks.len());
        for check in &report.checks {
            assert!(!check.seen.is_empty());
            assert_eq!(check.state == State::Ok, check.cure.is_empty(), "{check:?}");
        }
        assert_eq!(report.can_run, preflight().is_ok(), "{report}");
    }
}
