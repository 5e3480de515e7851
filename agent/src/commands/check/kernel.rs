//! Checks of the kernel: its version, its build and its security settings.

use std::{
    fs::{self, File},
    io::{ErrorKind, Read as _},
};

use libbpf_rs::{MapType, ProgramType};

use super::Check;

/// Oldest kernel that the agent supports.
const MIN_KERNEL: (u32, u32) = (5, 10);
const BTF_MAGIC: [u8; 2] = 0xeb9f_u16.to_ne_bytes();
const BPF_FUNC_LOOP: u32 = 181;
const BTF_CURE: &str = "use a kernel built with CONFIG_DEBUG_INFO_BTF=y, and mount /sys";

pub(super) fn architecture() -> Check {
    match std::env::consts::ARCH {
        known @ ("x86_64" | "aarch64") => Check::ok("architecture", known),
        other => Check::fail("architecture", other, "run Gannet on x86_64 or aarch64"),
    }
}

pub(super) fn kernel() -> Check {
    judge_kernel(&rustix::system::uname().release().to_string_lossy())
}

fn judge_kernel(release: &str) -> Check {
    let mut numbers =
        release.split(|c: char| !c.is_ascii_digit()).map_while(|number| number.parse::<u32>().ok());
    match (numbers.next(), numbers.next()) {
        (Some(major), Some(minor)) if (major, minor) >= MIN_KERNEL => {
            Check::ok("kernel", format!("Linux {release}"))
        }
        _ => Check::fail(
            "kernel",
            format!("Linux {release} is older than {}.{}", MIN_KERNEL.0, MIN_KERNEL.1),
            format!("use a node with Linux {}.{} or newer", MIN_KERNEL.0, MIN_KERNEL.1),
        ),
    }
}

/// Name of the check for kernels that may lock up.
pub(super) const USER_MEMORY: &str = "user_memory";

pub(super) fn user_memory() -> Check {
    let name = rustix::system::uname();
    judge_user_memory(&name.release().to_string_lossy(), &name.version().to_string_lossy())
}

/// From Linux 5.19 on, copying user memory inside an interrupt could wait for a lock that the interrupted code holds. The
/// CPU then hangs, and soon the node. Linux 6.4 fixed that ("mm: Fix `copy_from_user_nofault()`"), and two stable series
/// backported the fix.
pub(super) fn judge_user_memory(release: &str, version: &str) -> Check {
    let numbers = |text: &str| {
        let mut numbers = text.split(|c: char| !c.is_ascii_digit()).map_while(|n| n.parse::<u32>().ok());
        let mut next = || numbers.next().unwrap_or(0);
        (next(), next(), next())
    };
    // Debian releases 6.1.76 as 6.1.0-18 and shows the real number in the version.
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
        Check::fail(
            USER_MEMORY,
            format!("Linux {release} may lock up when a profiler reads user stacks inside an interrupt"),
            "use Linux 6.1.36, 6.3.10, 6.4 or newer; if the distribution has backported \"mm: Fix copy_from_user_nofault()\", pass --allow-unsafe-kernel",
        )
    } else {
        Check::ok(USER_MEMORY, "can be read inside an interrupt")
    }
}

pub(super) fn lockdown() -> Check {
    match fs::read_to_string("/sys/kernel/security/lockdown") {
        Ok(text) => judge_lockdown(&text),
        Err(error) if error.kind() == ErrorKind::NotFound => Check::ok("lockdown", "not in use"),
        Err(error) => Check::ok(
            "lockdown",
            format!("cannot be read ({error}); the check `bpf` shows whether programs load"),
        ),
    }
}

/// Reads the list of modes, in which brackets mark the one in force.
fn judge_lockdown(text: &str) -> Check {
    let mode = text.split(['[', ']']).nth(1).unwrap_or_default();
    if mode == "confidentiality" {
        Check::fail(
            "lockdown",
            "the kernel is locked down for confidentiality: no program may read its memory",
            "boot with lockdown=integrity or without lockdown",
        )
    } else {
        Check::ok("lockdown", if mode.is_empty() { "not in use" } else { mode })
    }
}

pub(super) fn btf() -> Check {
    let mut magic = [0; 2];
    match File::open("/sys/kernel/btf/vmlinux").and_then(|mut file| file.read_exact(&mut magic)) {
        Ok(()) if magic == BTF_MAGIC => Check::ok("btf", "/sys/kernel/btf/vmlinux"),
        Ok(()) => Check::fail("btf", "/sys/kernel/btf/vmlinux is not BTF", BTF_CURE),
        Err(error) => Check::fail("btf", format!("no BTF: /sys/kernel/btf/vmlinux: {error}"), BTF_CURE),
    }
}

pub(super) fn bpf() -> Check {
    match ProgramType::PerfEvent.is_supported() {
        Ok(true) => Check::ok("bpf", "a test program was loaded"),
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

pub(super) fn ring_buffer() -> Check {
    match MapType::RingBuf.is_supported() {
        Ok(true) => Check::ok("ring_buffer", "a ring buffer was created"),
        Ok(false) => Check::fail(
            "ring_buffer",
            "the kernel has no BPF ring buffer",
            format!("use a node with Linux {}.{} or newer", MIN_KERNEL.0, MIN_KERNEL.1),
        ),
        Err(error) => Check::fail(
            "ring_buffer",
            format!("a BPF ring buffer cannot be created: {error}"),
            "run as root or with CAP_BPF, and raise the limit on locked memory",
        ),
    }
}

pub(super) fn bpf_loop() -> Check {
    match ProgramType::PerfEvent.is_helper_supported(BPF_FUNC_LOOP) {
        Ok(true) => Check::ok("bpf_loop", "available; the deepest stacks are complete"),
        // Older kernels use tail calls, which reach all but very deep stacks.
        Ok(false) | Err(_) => Check::ok("bpf_loop", "not available; stacks are unwound by tail calls"),
    }
}

pub(super) fn bpf_stats() -> Check {
    match fs::read_to_string("/proc/sys/kernel/bpf_stats_enabled").unwrap_or_default().trim() {
        "1" => Check::warning(
            "bpf_stats",
            "the kernel measures every run of every BPF program",
            "set kernel.bpf_stats_enabled to 0 when no tool reads the statistics",
        ),
        _ => Check::ok("bpf_stats", "off"),
    }
}

#[cfg(test)]
mod tests {
    use rstest::rstest;

    use super::{super::CheckState, *};

    #[rstest]
    #[case("5.10.0", CheckState::Ok)]
    #[case("5.9.16-1-amd64", CheckState::Fail)]
    #[case("6.1.0-18-cloud-amd64", CheckState::Ok)]
    #[case("7.2-rc1", CheckState::Ok)]
    #[case("4.19.0", CheckState::Fail)]
    #[case("10.0", CheckState::Ok)]
    #[case("", CheckState::Fail)]
    fn linux_5_10_is_the_oldest_supported_kernel(#[case] release: &str, #[case] state: CheckState) {
        assert_eq!(judge_kernel(release).state, state);
    }

    #[rstest]
    #[case("[none] integrity confidentiality\n", CheckState::Ok)]
    #[case("none [integrity] confidentiality\n", CheckState::Ok)]
    #[case("none integrity [confidentiality]\n", CheckState::Fail)]
    #[case("", CheckState::Ok)]
    fn only_lockdown_for_confidentiality_fails(#[case] text: &str, #[case] state: CheckState) {
        assert_eq!(judge_lockdown(text).state, state);
    }

    #[rstest]
    #[case("5.10.0-28-amd64", "", CheckState::Ok)]
    #[case("5.18.19", "", CheckState::Ok)]
    #[case("5.19.0-50-generic", "#50-Ubuntu SMP PREEMPT_DYNAMIC", CheckState::Fail)]
    #[case("6.0.19", "", CheckState::Fail)]
    #[case("6.1.35", "", CheckState::Fail)]
    #[case("6.1.36", "", CheckState::Ok)]
    #[case("6.1.0-18-amd64", "#1 SMP PREEMPT_DYNAMIC Debian 6.1.76-1 (2024-02-01)", CheckState::Ok)]
    #[case("6.1.0-9-amd64", "#1 SMP PREEMPT_DYNAMIC Debian 6.1.27-1 (2023-05-08)", CheckState::Fail)]
    #[case("6.2.16", "", CheckState::Fail)]
    #[case("6.3.9", "", CheckState::Fail)]
    #[case("6.3.10-arch1", "", CheckState::Ok)]
    #[case("6.4.0", "", CheckState::Ok)]
    #[case("6.18", "", CheckState::Ok)]
    #[case("5.19.0", "", CheckState::Fail)]
    #[case("6.0-rc1", "", CheckState::Fail)]
    #[case("6.1", "", CheckState::Fail)]
    #[case("6.1.100", "", CheckState::Ok)]
    #[case("6.3.13", "", CheckState::Ok)]
    #[case("6.10.2", "", CheckState::Ok)]
    #[case("7.2.0", "", CheckState::Ok)]
    #[case("", "", CheckState::Ok)]
    fn a_kernel_that_may_lock_up_is_refused(
        #[case] release: &str,
        #[case] version: &str,
        #[case] state: CheckState,
    ) {
        let check = judge_user_memory(release, version);
        assert_eq!(check.state, state);
        assert_eq!(check.cure.contains("6.1.36"), state == CheckState::Fail);
    }
}
