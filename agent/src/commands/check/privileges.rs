//! Checks of privileges: capabilities, perf and namespaces.

use std::fs;

use perf_event::{Builder, events::Software};

use super::Check;

/// `PROC_PID_INIT_INO`: the kernel always gives this number to the first pid namespace.
const FIRST_PID_NAMESPACE: u32 = 0xEFFF_FFFC;

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

    /// Returns whether the capability is there, or `CAP_SYS_ADMIN`, from which the kernel split it off.
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

pub(super) fn capabilities() -> Check {
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

pub(super) fn perf_clock() -> Check {
    let paranoid = fs::read_to_string("/proc/sys/kernel/perf_event_paranoid").unwrap_or_default();
    judge_perf_clock(open_perf_clock(), paranoid.trim(), CapabilitySet::effective())
}

/// Kernels of Debian and Ubuntu have levels above 2, at which they require `CAP_SYS_ADMIN` and return EACCES.
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
         above that, this kernel ignores CAP_PERFMON"
    } else {
        "run as root or with CAP_PERFMON, let no seccomp profile forbid perf_event_open(2), \
         or lower kernel.perf_event_paranoid"
    };
    let seen =
        format!("the CPU clock of perf cannot be opened: {error} (kernel.perf_event_paranoid is {paranoid})");
    Check::fail("perf_clock", seen, cure)
}

fn open_perf_clock() -> std::io::Result<()> {
    let mut settings = Builder::new(Software::CPU_CLOCK);
    settings.any_pid().one_cpu(0).include_kernel().include_hv().build().map(drop)
}

pub(super) fn host_pid() -> Check {
    judge_host_pid(&fs::read_link("/proc/self/ns/pid").unwrap_or_default().to_string_lossy())
}

fn judge_host_pid(link: &str) -> Check {
    if link == format!("pid:[{FIRST_PID_NAMESPACE}]") {
        Check::ok("host_pid", "in the host's pid namespace")
    } else {
        Check::fail(
            "host_pid",
            format!("in its own pid namespace ({link}), where the node's processes have other pids"),
            "set hostPID: true on the pod, or start the container with --pid=host",
        )
    }
}

pub(super) fn file_access() -> Check {
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
                "without {} the agent cannot read the files of some processes: their frames have no names",
                missing.join(" and ")
            ),
            format!("add {}", missing.join(" and ")),
        ),
    }
}

#[cfg(test)]
mod tests {
    use rstest::rstest;

    use super::{super::CheckState, *};

    #[test]
    fn a_missing_capability_is_named() {
        let none = judge_capabilities(CapabilitySet(0));
        assert_eq!(none.state, CheckState::Fail);
        assert!(none.seen.contains("CAP_BPF and CAP_PERFMON"), "{none:?}");
        let only_bpf = judge_capabilities(CapabilitySet(1 << BPF.1));
        assert!(only_bpf.seen.contains("CAP_PERFMON") && !only_bpf.seen.contains("CAP_BPF"), "{only_bpf:?}");
        let admin = CapabilitySet(1 << SYS_ADMIN.1);
        assert_eq!(judge_capabilities(admin).state, CheckState::Ok);
        let files = judge_file_access(admin);
        assert_eq!(files.state, CheckState::Warning);
        assert!(files.cure.contains("CAP_SYS_PTRACE") && !files.cure.contains("CHECKPOINT"), "{files:?}");
    }

    #[rstest]
    #[case(libc::EACCES, "3", 1 << PERFMON.1, true)]
    #[case(libc::EACCES, "4", 1 << PERFMON.1, true)]
    #[case(libc::EACCES, "2", 0, false)]
    #[case(libc::EPERM, "3", 1 << PERFMON.1, false)]
    #[case(libc::EACCES, "3", 1 << SYS_ADMIN.1, false)]
    fn a_kernel_that_restricts_perf_names_the_capability(
        #[case] error: i32,
        #[case] paranoid: &str,
        #[case] set: u64,
        #[case] admin: bool,
    ) {
        let refused = Err(std::io::Error::from_raw_os_error(error));
        let check = judge_perf_clock(refused, paranoid, CapabilitySet(set));
        assert_eq!(check.state, CheckState::Fail);
        assert_eq!(check.cure.contains("CAP_SYS_ADMIN"), admin, "{check:?}");
    }

    #[rstest]
    #[case("pid:[4026531836]", CheckState::Ok)]
    #[case("pid:[4026532201]", CheckState::Fail)]
    #[case("", CheckState::Fail)]
    fn only_the_first_pid_namespace_passes(#[case] link: &str, #[case] state: CheckState) {
        assert_eq!(judge_host_pid(link).state, state);
    }
}
