//! The report of `check` on this machine, and in a child process without privileges.

use std::{io::Write as _, process::Command};

use gannet_agent::commands::check::{CheckOptions, CheckState, UnsafeKernel, check, preflight};

/// Set in the child process, which prints instead of starting a child of its own.
const CHILD: &str = "GANNET_TEST_CHILD";

/// Runs a test of this module again, as a user without privileges, in which `print` prints a text. Returns the output. In that
/// process it returns `None`.
#[track_caller]
fn unprivileged(test: &str, capabilities: &str, print: fn() -> String) -> Option<String> {
    if std::env::var_os(CHILD).is_some() {
        let _ = writeln!(std::io::stdout(), "{}", print());
        return None;
    }
    let directory = tempfile::tempdir().unwrap();
    // That user may have no access to the target directory.
    let program = directory.path().join("check");
    std::fs::copy(std::env::current_exe().unwrap(), &program).unwrap();
    let open = <std::fs::Permissions as std::os::unix::fs::PermissionsExt>::from_mode(0o755);
    for path in [directory.path(), &program] {
        std::fs::set_permissions(path, open.clone()).unwrap();
    }
    let output = Command::new("setpriv")
        .args(["--reuid=65534", "--regid=65534", "--clear-groups"])
        .arg(format!("--inh-caps={capabilities}"))
        .arg(format!("--ambient-caps={capabilities}"))
        .arg(&program)
        .args(["--exact", "--nocapture"])
        .arg(format!("check::{test}"))
        .env(CHILD, "1")
        .output()
        .expect("setpriv is part of util-linux");
    let text = String::from_utf8_lossy(&output.stdout).into_owned();
    assert!(
        output.status.success(),
        "this test needs root: {text}{}",
        String::from_utf8_lossy(&output.stderr)
    );
    Some(text)
}

fn refusal() -> String {
    preflight(UnsafeKernel::Refuse).map_or_else(|refusal| refusal.to_string(), |()| "can run".to_owned())
}

#[test]
fn one_line_names_the_missing_capabilities_and_the_cure() {
    let test = "one_line_names_the_missing_capabilities_and_the_cure";
    let Some(text) = unprivileged(test, "-all", refusal) else { return };
    let line = text.lines().find(|line| line.contains("cannot run here")).expect(&text);
    assert!(line.contains("missing CAP_BPF and CAP_PERFMON;"), "{line}");
    assert!(line.contains("run as root"), "{line}");
}

#[test]
fn only_the_capability_that_is_missing_is_named() {
    let test = "only_the_capability_that_is_missing_is_named";
    let Some(text) = unprivileged(test, "-all,+bpf", refusal) else { return };
    let line = text.lines().find(|line| line.contains("cannot run here")).expect(&text);
    assert!(line.contains("missing CAP_PERFMON;"), "{line}");
}

#[test]
fn other_missing_capabilities_are_only_warnings() {
    let report = || check(&CheckOptions::default()).to_json();
    let test = "other_missing_capabilities_are_only_warnings";
    let Some(text) = unprivileged(test, "-all,+bpf,+perfmon", report) else { return };
    let json: serde_json::Value =
        serde_json::from_str(&text[text.find('{').unwrap()..=text.rfind('}').unwrap()]).unwrap();
    assert_eq!(json["can_run"], true, "{json:#}");
    let of = |name: &str| {
        let checks = json["checks"].as_array().unwrap();
        checks
            .iter()
            .find(|check| check["name"] == name)
            .unwrap_or_else(|| panic!("{name} is missing"))
            .clone()
    };
    assert_eq!(of("file_access")["state"], "warning");
    assert!(of("file_access")["cure"].as_str().unwrap().contains("CAP_SYS_PTRACE"));
    assert_eq!(of("kernel_symbols")["state"], "warning");
    assert!(of("kernel_symbols")["cure"].as_str().unwrap().contains("CAP_SYSLOG"));
}

#[test]
fn root_can_run_the_agent_on_this_machine() {
    let report = check(&CheckOptions { state_dir: Some(std::env::temp_dir()), ..CheckOptions::default() });
    assert!(report.can_run, "the tests need a machine that Gannet runs on:\n{report}");
    assert_eq!(report.exit_code(), 0);
    assert!(report.to_string().ends_with("Gannet can run on this machine.\n"));
    assert!(report.checks.iter().any(|check| check.name == "state_dir" && check.state == CheckState::Ok));
}

#[test]
fn the_json_form_has_stable_names() {
    let json: serde_json::Value = serde_json::from_str(&check(&CheckOptions::default()).to_json()).unwrap();
    let checks = json["checks"].as_array().unwrap();
    let names: Vec<_> = checks.iter().map(|check| check["name"].as_str().unwrap()).collect();
    assert_eq!(
        names,
        [
            "architecture",
            "kernel",
            "user_memory",
            "capabilities",
            "lockdown",
            "btf",
            "bpf",
            "ring_buffer",
            "perf_clock",
            "host_pid",
            "file_access",
            "kernel_symbols",
            "bpf_loop",
            "cgroup",
            "psi",
            "tracefs",
            "memlock",
            "open_files",
            "bpf_stats",
        ]
    );
    for check in checks {
        let fields: Vec<_> = check.as_object().unwrap().keys().collect();
        assert_eq!(fields, ["cure", "name", "seen", "state"]);
    }
}
